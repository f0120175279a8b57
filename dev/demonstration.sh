#!/bin/sh
# Measures what README says of `make train` and `make finetune`: runs the two with several seeds, by the BLAS and by
# the built-in matmul, on one thread and on two.
#
#   sh dev/demonstration.sh [SEED...]                  make demonstration SEEDS="1 2 3"; 1 to 5 without
#
# TRAIN_OPTIONS and FINETUNE_OPTIONS try other options, as with the two commands themselves.
# Each run begins anew in build/demonstration/; what it printed stays there as SEED-MATMUL-THREADS.log. Prints a row
# for each run, then the ranges. The exit status is 1 if a run failed or fell short of what is promised here:
true_promised=95  # of the sentences in the model's stories, %, are true in the village
exact_promised=98 # of the held-out questions, %, are answered exactly
set -eu
cd "$(dirname "$0")/.."
work=build/demonstration
make=${MAKE:-make}

# cpu FILE: seconds of processor time that `times` counted for the programs that have ended
cpu() { sed -n '2s/[ms]/ /gp' "$1" | awk '{ print 60 * $1 + $2 + 60 * $3 + $4 }'; }

# timed NAME COMMAND...: runs it; seconds_NAME and cpu_NAME get its seconds, by the clock and of processor time
timed() {
    name=$1
    shift
    times >"$place.times"
    before=$(cpu "$place.times") started=$(date +%s)
    "$@" >>"$place.log" 2>&1 || { echo "$place failed: see $place.log" >&2 && exit 1; }
    times >"$place.times"
    eval "seconds_$name=$(($(date +%s) - started))"
    eval "cpu_$name=$(echo "$before $(cpu "$place.times")" | awk '{ print $2 - $1 }')"
}

# one SEED MATMUL THREADS: trains and fine-tunes, and prints a row
one() {
    place=$work/$1-$2-$3
    machine="--matmul $2 --threads $3"
    rm -rf "$place" "$place-finetuned" "$place.log"
    timed train "$make" train OUT="$place" SEED="$1" TRAIN_OPTIONS="${TRAIN_OPTIONS:-} $machine"
    timed finetune "$make" finetune OUT="$place" SEED="$1" FINETUNE_OPTIONS="${FINETUNE_OPTIONS:-} $machine"
    # `make finetune` ends with four evaluations: questions and stories by the model before, then by the one after
    awk -v run="$1 $2 $3" -v seconds="$seconds_train $seconds_finetune $cpu_train $cpu_finetune" '
        /true in the village/ { gsub(/[(]/, ""); sentences = $(NF - 1) }
        /^loss/ { loss[++n] = $2 }
        /^loss.*exact match/ { sub(/.*exact match */, ""); exact[++m] = $1 }
        END {
            if (n != 4 || m != 2 || sentences == "") exit 1
            split(seconds, s)
            printf "%s %.3f %.1f %.1f %.1f %.3f %d %d %.0f %.0f\n", run, loss[2], sentences, exact[1], exact[2],
                loss[4], s[1], s[2], s[3], s[4]
        }' "$place.log" >"$place.row" || { echo "$place.log does not hold what was expected" >&2 && exit 1; }
    row <"$place.row"
}

# row: sets a row, or the heading, in columns
row() {
    awk '{ printf "%4s %-8s", $1, $2; for (i = 3; i <= 12; i++) printf " %7s", $i; print "" }'
}

if [ "${1:-}" = --one ]; then # this script calls itself, see below
    shift
    one "$@"
    exit
fi

[ $# -gt 0 ] || set -- 1 2 3 4 5
matmuls=builtin
[ "$("$make" -s show-blas)" != openblas ] || matmuls="openblas builtin"
rm -rf "$work"
mkdir -p "$work"
cores=$(getconf _NPROCESSORS_ONLN)
cat <<END
val: validation loss; true: sentences, %; before, after: exact match before and after fine-tuning, %; stories: loss on
them after fine-tuning; train, tune: seconds of make train and make finetune, and the same in processor time (cpu)
END
echo "seed matmul threads val true before after stories train tune cpu cpu" | row
# one run for each core if it has one thread, for each two if it has two
failed=0
for threads in 1 2; do
    for seed in "$@"; do
        for matmul in $matmuls; do echo "$seed $matmul $threads"; done
    done | xargs -P $((cores > threads ? cores / threads : 1)) -L 1 sh "$0" --one || failed=1
done

cat "$work"/*.row | awk -v true_promised=$true_promised -v exact_promised=$exact_promised '
    {
        for (i = 4; i <= NF; i++) {
            if (NR == 1 || $i < least[i]) least[i] = $i
            if (NR == 1 || $i > most[i]) most[i] = $i
        }
    }
    function range(i, what) { printf "  %-46s %s to %s\n", what, least[i], most[i] }
    END {
        if (NR == 0) exit 1
        print "\n" NR " runs:"
        range(4, "validation loss"); range(5, "true sentences, %")
        range(6, "exact match before fine-tuning, %"); range(7, "exact match after it, %")
        range(8, "loss on the stories after it"); range(9, "make train, seconds"); range(10, "make finetune, seconds")
        range(11, "make train, seconds of processor time"); range(12, "make finetune, seconds of processor time")
        short = least[5] < true_promised || least[7] < exact_promised
        printf "%s: at least %s %% true sentences, %s %% exact match\n", short ? "not kept" : "kept", true_promised,
            exact_promised
        exit short
    }' || failed=1
exit $failed
