#!/bin/sh
# One experiment for each claim of the fine-tuning recipe: `make recipe` runs them all.
#
#   sh dev/recipe/run.sh [--quick] [--write] [EXPERIMENT...]     EXPERIMENT: a b c d e f g h, all without one
#
# Starts from a model as `make train` makes it and teaches it half the questions of `make finetune`, for half as many
# epochs: so not all is learned where all goes well, and a difference can show. Rows go to build/recipe/runs/, tables
# (Markdown) and pictures (SVG, by gnuplot) to build/recipe/; --write puts them into dev/recipe/ and README.md there.
# What has been run is not run again: an interrupted run goes on. --quick takes a tiny base, one seed and few updates:
# it tests this script, its figures say nothing.
set -eu
cd "$(dirname "$0")/../.."
work=build/recipe seeds="1 2 3" length="--epochs 2" write= chosen=
for word in "$@"; do
    case $word in
    --quick) work=build/recipe_quick seeds=1 length="--steps 4" ;;
    --write) write=yes ;;
    --one) break ;;
    [a-h]) chosen="$chosen $word" ;;
    *) echo "run.sh: $word: --quick, --write or letters from a to h expected" >&2 && exit 2 ;;
    esac
done
base=$work/base train=$work/questions_train.jsonl held_out=$work/questions_held_out.jsonl
stories=$work/stories_val.txt tokenizer=$work/tokenizer
freeze="wte|wpe|mlp" rate=2e-3 size="--n-layer 2 --n-head 8 --n-embd 128 --n-positions 64" # as in the Makefile
fixed="--batch-size 32 --seq-len 64 --val-fraction 0 --threads 1 --matmul builtin --quiet"

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

# ---- one run ----

# number WORD TEXT: the number behind a word in what --eval prints
number() { echo "$2" | sed -n "s/.*$1 *\([0-9.]*\).*/\1/p"; }

# one NAME SEED PROGRAM OPTIONS...: trains, evaluates, and writes a row: NAME, SEED, exact match and loss on held-out
# questions, exact match by the program that trained, loss on the stories, seconds of training
one() {
    name=$1 seed=$2 program=$3 row=$work/runs/$1-$2.csv out=$work/out/$1-$2
    shift 3
    [ -s "$row" ] && return
    rm -rf "$out"
    # what the experiment does not say is as in the recipe
    case " $* " in *" --learning-rate "*) ;; *) set -- "$@" --learning-rate $rate ;; esac
    case " $* " in *" --freeze "*) ;; *) set -- "$@" --freeze "$freeze" ;; esac
    case " $* " in *" --init "* | *" --n-layer "*) ;; *) set -- --init "$base" "$@" ;; esac
    case " $* " in *" --steps "*) ;; *) set -- "$@" $length ;; esac
    case " $* " in *" --train "*) ;; *) set -- "$@" --train "$train" ;; esac
    "$program" "$@" $fixed --seed "$seed" --out "$out" >/dev/null || fail "$name, seed $seed failed"
    set -- --init "$out" --eval --batch-size 32 --quiet --threads 1 --matmul builtin
    right=$(./train_gpt2 "$@" --val "$held_out")
    same=$("$program" "$@" --val "$held_out")
    forgotten=$(./train_gpt2 "$@" --val "$stories")
    seconds=$(tail -n 1 "$out/log.csv" | cut -d, -f9)
    echo "$name,$seed,$(number 'exact match' "$right"),$(number loss "$right"),$(number 'exact match' "$same"),$(number \
        loss "$forgotten"),$seconds" >"$row.part"
    mv "$row.part" "$row"
    rm -rf "$out"
    echo "$(cat "$row")"
}

# overfit_one SEED: keeps the log of --overfit on 16 examples, with the questions as validation
overfit_one() {
    log=$work/runs/f-overfit-$1.csv
    [ -s "$log" ] && return
    rm -rf "$work/out/f-$1"
    steps=200 every=20
    [ "$length" = "--epochs 2" ] || steps=4 every=2
    ./train_gpt2 --init "$base" --overfit --train "$train" --val "$held_out" --batch-size 16 --seq-len 64 --steps $steps \
        --val-every $every --learning-rate $rate --schedule constant --warmup-steps 10% --threads 1 --matmul builtin --quiet \
        --seed "$1" --out "$work/out/f-$1" >/dev/null || [ $steps = 4 ] || fail "overfitting one batch, seed $1: not passed"
    mv "$work/out/f-$1/log.csv" "$log"
    rm -rf "$work/out/f-$1"
    echo "f-overfit, seed $1"
}

case " $* " in
*" --one "*) # this script calls itself, see `run` below
    while [ "$1" != --one ]; do shift; done
    shift
    case $1 in f-overfit) overfit_one "$2" ;; *) one "$@" ;; esac
    exit
    ;;
esac

# ---- what the runs need ----

# patched NAME SED-SCRIPT: a copy of train_gpt2.c with one fault, as a program. The trainer itself carries none.
patched() {
    [ -x "$work/$1" ] && [ "$work/$1" -nt train_gpt2.c ] && return
    sed "$2" train_gpt2.c >"$work/$1.c"
    [ "$(diff train_gpt2.c "$work/$1.c" | grep -c '^>')" = "$3" ] || fail "$1: the lines to patch are no longer there"
    ${CC:-cc} -std=gnu11 -O3 -march=native -fno-math-errno -fopenmp -w "$work/$1.c" -lm -o "$work/$1"
}

prepare() {
    mkdir -p "$work/runs" "$work/out"
    if [ "$work" = build/recipe ]; then
        [ -f "$base/model.safetensors" ] || make train OUT="$base" SEED=1 \
            TRAIN_OPTIONS="--threads 1 --matmul builtin" # the same figures on any number of cores
        ./data/stories questions --seed 1 --count 2000 >"$train"
        ./data/stories questions --seed 2 --count 400 --held-out >"$held_out"
        ./data/stories text --seed 2 --megabytes 0.05 >"$stories"
    else
        ./data/stories text --seed 1 --megabytes 0.05 >"$stories"
        ./data/stories questions --seed 1 --count 64 >"$train"
        ./data/stories questions --seed 2 --count 32 --held-out >"$held_out"
        ./tokenizer train --vocab-size 500 --out "$tokenizer" "$stories" 2>/dev/null
        [ -f "$base/model.safetensors" ] || ./train_gpt2 $size --tokenizer "$tokenizer" \
            --train "$stories" --val-fraction 0 --steps 5 --batch-size 8 --quiet --out "$base" >/dev/null
    fi
    # of the base's size (a village has few words), learned from other text: C
    vocabulary=$(sed -n 's/.*"vocab_size": *\([0-9]*\).*/\1/p' "$base/config.json")
    ./tokenizer train --vocab-size "$vocabulary" --out "$work/c_tokenizer" train_gpt2.c test_gpt2.c 2>/dev/null
    for count in 32 128 512; do head -n $count "$train" >"$work/few_$count.jsonl"; done
    place='^        add_example(data, start, scored, seq_len, where);$'
    short='source->ids.size - start <= (size_t)seq_len' end='tokenizer->end_of_text'
    patched pad_scored "s/$place/while ($short) ids_push(\&source->ids, $end); &/" 1
    patched pad_attended "s/$place/for (; $short; scored++) { ids_push(\&source->ids, $end); int *ids = source->ids.data + start; \
memmove(ids + 1, ids, (source->ids.size - start - 1) * sizeof(int)); ids[0] = ~$end; } &/" 1
    patched positions_padded 's/batch_add_row(batch, token < 0 ? ~token : token, t,/batch_add_row(batch, token < 0 ? ~token : token, t + 65 - example->size,/' 1
    patched l2_in_loss 's/float g = gradient\[j\] \* clip;/float g = gradient[j] * clip + (tensor->decay ? (float)h->weight_decay : 0) * p[j];/
        s/p\[j\] = p\[j\] \* shrink - corrected_rate/p[j] = p[j] - corrected_rate/' 2
}

# ---- the experiments: name, program, options; each with every seed ----

experiment() {
    case $1 in
    a) cat <<END
a-right ./train_gpt2
a-pad_scored $work/pad_scored
a-pad_attended $work/pad_attended
a-positions_of_padded $work/positions_padded
END
        ;;
    b) cat <<END
b-its_own ./train_gpt2
b-another ./train_gpt2 --tokenizer $work/c_tokenizer
END
        ;;
    c) cat <<END
c-none ./train_gpt2 --weight-decay 0
c-AdamW_0.01 ./train_gpt2
c-AdamW_1 ./train_gpt2 --weight-decay 1
c-on_all_1 ./train_gpt2 --weight-decay 1 --no-decay none
c-L2_0.01 $work/l2_in_loss
c-L2_1 $work/l2_in_loss --weight-decay 1
END
        ;;
    d) for peak in 5e-5 1e-4 3e-4 1e-3 2e-3 5e-3 1e-2; do echo "d-rate_$peak ./train_gpt2 --learning-rate $peak"; done
        for warmup in 0 10% 1ep; do
            echo "d-5e-3_warmup_$warmup ./train_gpt2 --learning-rate 5e-3 --warmup-steps $warmup"
        done
        for schedule in constant linear cosine; do echo "d-$schedule ./train_gpt2 --schedule $schedule"; done ;;
    e) cat <<END
e-nothing ./train_gpt2 --freeze none
e-lower_half ./train_gpt2 --freeze wte|wpe|h.0.
e-all_but_top_block ./train_gpt2 --freeze wte|wpe|h.0.|ln_f
e-all_but_biases_and_norms ./train_gpt2 --freeze wte|wpe|c_.+weight
e-embeddings_and_MLPs ./train_gpt2 --freeze wte|wpe|mlp
END
        ;;
    f) echo "f-overfit" ;;
    h) echo "h-everything ./train_gpt2 --freeze none"
        echo "h-attention_alone ./train_gpt2"
        for rank in 1 2 4 8 16; do echo "h-LoRA_rank_$rank ./train_gpt2 --freeze none --lora-rank $rank"; done
        cat <<END
h-rank_8_all_matrices ./train_gpt2 --freeze none --lora-rank 8 --lora-target c_attn|c_proj|c_fc
h-rank_8_rate_1e-2 ./train_gpt2 --freeze none --lora-rank 8 --learning-rate 1e-2
END
        ;;
    g) for count in 32 128 512; do
            data="--train $work/few_$count.jsonl --steps $([ "$length" = "--epochs 2" ] && echo 200 || echo 4) --warmup-steps 10%"
            echo "g-tuned_on_$count ./train_gpt2 $data"
            echo "g-scratch_on_$count ./train_gpt2 $data $size --tokenizer $base --freeze none"
        done ;;
    esac
}

# All runs that are wanted, two at a time on two cores: each on one thread, so that times compare.
run() {
    for letter in $chosen; do
        experiment "$letter" | while read -r name program options; do
            for seed in $seeds; do echo "$name $seed${program:+ $program}${options:+ $options}"; done
        done
    done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 sh "$0" $quick --one
}

# ---- tables and pictures ----

# A row for each variant: mean (smallest to largest) over seeds.
table() {
    letter=$1
    echo "| | exact match, % | loss | exact match by the program that trained it, % | loss on the stories | seconds |"
    echo "| --- | --- | --- | --- | --- | --- |"
    experiment "$letter" | while read -r name _; do
        for seed in $seeds; do cat "$work/runs/$name-$seed.csv"; done | awk -F, -v label="$(echo "${name#*-}" | tr _ ' ')" '
            { for (i = 3; i <= 7; i++) { s[i] += $i; if (NR == 1 || $i < lo[i]) lo[i] = $i; if (NR == 1 || $i > hi[i]) hi[i] = $i } }
            function cell(i, f) { return sprintf(f " (" f " to " f ")", s[i] / NR, lo[i], hi[i]) }
            END { printf "| %s | %s | %s | %s | %s | %.1f |\n", label, cell(3, "%.1f"), cell(4, "%.3f"), cell(5, "%.1f"), cell(6, "%.3f"), s[7] / NR }'
    done
}

# The same for the logs of --overfit: first and last evaluation.
overfit_table() {
    echo "| seed | training loss | training accuracy, % | validation loss: first, best, last |"
    echo "| --- | --- | --- | --- |"
    for seed in $seeds; do
        awk -F, -v seed="$seed" '$3 == "train" { if (!n++) first = $4; last = $4; accuracy = 100 * $5 }
            $3 == "val" { if (!v++) before = $4; if (best == "" || $4 < best) best = $4; after = $4 }
            END { printf "| %d | %.3f to %.4f | %.1f | %.3f, %.3f, %.3f |\n", seed, first, last, accuracy, before, best, after }' \
            "$work/runs/f-overfit-$seed.csv"
    done
}

# What --plan says of each variant: parameters that are trained, and what training takes, in MB.
plan_table() {
    echo && echo "| | trained parameters | memory of training by --plan, MB |" && echo "| --- | --- | --- |"
    experiment "$1" | while read -r name _ options; do
        case " $options " in *" --freeze "*) ;; *) options="$options --freeze $freeze" ;; esac
        plan=$(./train_gpt2 --init "$base" --train "$train" $fixed --plan $options)
        echo "| $(echo "${name#*-}" | tr _ ' ') | $(number trained "$plan") | $(number 'in all' "$plan") |"
    done
}

report() {
    for letter in $chosen; do
        if [ "$letter" = f ]; then overfit_table; else table "$letter"; fi >"$work/$letter.md"
        case $letter in [eh]) plan_table "$letter" >>"$work/$letter.md" ;; esac
        { echo && echo "## $letter" && cat "$work/$letter.md"; } | sed 's/^$//'
        if command -v gnuplot >/dev/null 2>&1; then
            case $letter in f) ;; *)
                experiment "$letter" | while read -r name _; do
                    for seed in $seeds; do cat "$work/runs/$name-$seed.csv"; done | awk -F, -v label="$(echo "${name#*-}" | tr _ ' ')" '
                        { s += $3; f += $6; if (NR == 1 || $3 < lo) lo = $3; if (NR == 1 || $3 > hi) hi = $3 }
                        END { printf "\"%s\" %f %f %f %f\n", label, s / NR, lo, hi, f / NR }'
                done >"$work/$letter.dat" ;;
            esac
            gnuplot -e "letter='$letter'; work='$work'" dev/recipe/plot.gp
        else
            echo "run.sh: no gnuplot, no pictures (Debian: gnuplot-nox)" >&2
        fi
    done
    [ -n "$write" ] || return 0
    for letter in $chosen; do
        [ ! -f "$work/$letter.svg" ] || cp "$work/$letter.svg" dev/recipe/
        awk -v letter="$letter" -v table="$work/$letter.md" '
            $0 == "<!-- table " letter " -->" { print; while ((getline line < table) > 0) print line; skip = 1; next }
            $0 == "<!-- end -->" { skip = 0 }
            !skip { print }' dev/recipe/README.md >"$work/README.md"
        cp "$work/README.md" dev/recipe/README.md
    done
}

[ -n "$chosen" ] || chosen="a b c d e f g h"
quick=$([ "$work" = build/recipe ] || echo --quick)
for program in train_gpt2 tokenizer data/stories; do
    [ -x "$program" ] || fail "./$program is missing: run make first"
done
prepare
run
report
