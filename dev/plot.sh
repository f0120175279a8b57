#!/bin/sh
# Draws runs: OUT/log.csv as OUT/log.png (loss, accuracy, learning rate, gradient norm by update), and what --find-rate
# wrote, OUT/find-rate.csv, as OUT/find-rate.png. Several folders become one picture, FIRST/runs.png.
#
#   sh dev/plot.sh [OUT ...]      needs gnuplot 5.4 or newer; FORMAT=svg instead of png
set -u
format=${FORMAT:-png}

fail() {
    echo "dev/plot.sh: $*" >&2
    exit 1
}

# What dev/plot.gp must know of the files, as its variables: for each column the range of its values in all files (those
# that a log axis cannot show count as 1e-6), which files have rows of evaluation and of exact match, and how many
# training steps each has. Columns are found by their names; a file of --find-rate has training steps only. From the last
# file comes what --find-rate suggests: a tenth of the rate at which the mean loss of nine updates is lowest.
# shellcheck disable=SC2016
ranges='
function see(column, factor, smallest, value) {
    if (!(column in at) || $at[column] == "") return 0
    value = $at[column] * factor < smallest ? smallest : $at[column] * factor
    if (!(column in low) || value < low[column]) low[column] = value
    if (!(column in high) || value > high[column]) high[column] = value
    return 1
}
FNR == 1 {
    files++
    split("", at)
    for (i = 1; i <= NF; i++) at[$i] = i
    next
}
"split" in at && $at["split"] == "val" {
    if (see("loss", 1, 1e-6)) held_out[files] = 1
    see("accuracy", 100, 0)
    if (see("exact_match", 100, 0)) exact[files] = 1
    next
}
{
    rate[++rows[files]] = $at["learning_rate"]
    loss[rows[files]] = $at["loss"]
    see("step", 1, 0)
    see("loss", 1, 1e-6)
    see("accuracy", 100, 0)
    see("learning_rate", 1, 0)
    see("grad_norm", 1, 1e-6)
}
END {
    for (column in low) printf "low_%s = %.9g; high_%s = %.9g; ", column, low[column], column, high[column]
    for (i = 1; i <= files; i++) {
        counts = counts " " rows[i]
        if (i in held_out) with_val = with_val " " i
        if (i in exact) with_exact = with_exact " " i
    }
    for (i = 1; i <= rows[files]; i++) {
        sum = near = 0
        for (j = i < 5 ? 1 : i - 4; j <= i + 4 && j <= rows[files]; j++) { sum += loss[j]; near++ }
        if (i == 1 || sum / near < lowest) { lowest = sum / near; best = rate[i] }
    }
    printf "best = %.9g; suggested = %.1g; ", best, best / 10
    printf "counts = \"%s\"; with_val = \"%s\"; with_exact = \"%s\"\n", counts, with_val, with_exact
}'

# draw PICTURE FILE...: the picture gets its name when it is whole.
draw() {
    picture=$1
    shift
    gnuplot -e "$(awk -F, "$ranges" "$@")" -c "$(dirname "$0")/plot.gp" "$format" "$picture.part" "$@" ||
        fail "gnuplot could not draw $picture"
    mv "$picture.part" "$picture" && echo "$picture"
}

command -v gnuplot >/dev/null ||
    fail "gnuplot is not here: install the package gnuplot (Debian: gnuplot-nox; dnf, pacman, brew: gnuplot)"
[ $# -gt 0 ] || set -- out
first=$1 count=$#
for out; do
    shift
    if [ -s "$out/find-rate.csv" ]; then
        draw "$out/find-rate.$format" "$out/find-rate.csv"
    fi
    if grep -q ',train,' "$out/log.csv" 2>/dev/null; then
        set -- "$@" "$out/log.csv"
    elif ! [ -s "$out/find-rate.csv" ]; then
        fail "$out: has no log.csv with a training step, and no find-rate.csv; training writes its log into --out"
    fi
done
[ $# -gt 0 ] || exit 0
name=log
[ "$count" = 1 ] || name=runs
draw "$first/$name.$format" "$@"
