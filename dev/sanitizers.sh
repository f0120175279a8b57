#!/bin/sh
# Small runs under ThreadSanitizer and valgrind: training, resuming, evaluation, generation, and the tokenizer.
#
#   sh dev/sanitizers.sh [tsan] [valgrind]        both, or those named; ends with: N passed, N failed
#
# ThreadSanitizer knows of OpenMP's barriers through clang's libarcher; on Debian: clang libclang-rt-VERSION-dev and
# libomp-dev of the same version. CLANG chooses another one.
set -u
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] || set -- tsan valgrind
folder=build/sanitizers
rm -rf $folder
mkdir -p $folder || exit 1
passed=0 failed=0
cat train_gpt2.c >$folder/text.txt # 250 kB: enough for the tokenizer to share out among threads
head -c 3000 README.md >$folder/train.txt
printf '{"prompt": "the", "completion": " end %s"}\n' 1 2 3 4 5 6 7 8 9 >$folder/val.jsonl
printf '#version: 0.2\ne r\nt h\n\304\240 th\na n\n\304\240th e\n' >$folder/merges.txt

# run NAME COMMAND...: one run; it fails when the tool found something or the exit status is not 0
run() {
    name=$1
    shift
    "$@" >$folder/log 2>&1
    status=$?
    if [ $status = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "$name: exit status $status of $*"
        grep -E -m 12 'WARNING: Thread|^==|    #[0-3] ' $folder/log
    fi
}

# runs NAME TOOL...: all runs, each program started by the tool
runs() {
    name=$1
    shift
    model="--init d4 --n-layer 2 --n-embd 32 --n-head 2 --n-positions 64 --tokenizer $folder/merges.txt"
    data="--train $folder/train.txt --val $folder/val.jsonl --batch-size 2 --threads 2"
    for more in "" "--accumulate 2 --dropout 0.1" "--freeze wte|wpe|h.0 --recompute"; do
        rm -rf $folder/out
        # shellcheck disable=SC2086 # words
        run "$name" "$@" $folder/train_gpt2 $model $data --out $folder/out --steps 4 --sample-every 2 --sample-tokens 8 $more
    done
    run "$name" "$@" $folder/train_gpt2 --out $folder/out --resume --steps 6 --threads 2
    run "$name" "$@" $folder/train_gpt2 --init $folder/out --eval --val $folder/train.txt --threads 2
    run "$name" "$@" $folder/train_gpt2 --init $folder/out --generate 20 --samples 3 --prompt the --top-k 5 --threads 2
    run "$name" "$@" $folder/tokenizer encode --tokenizer $folder/merges.txt $folder/text.txt
    run "$name" "$@" $folder/tokenizer train --vocab-size 400 --out $folder/vocabulary $folder/text.txt
}

# build COMPILER-AND-FLAGS...
build() {
    for program in train_gpt2 tokenizer; do
        "$@" -std=gnu11 -g -fopenmp -Wno-unused-function -Wno-unknown-pragmas -o $folder/$program $program.c -lm || exit 1
    done
}

export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
for tool; do
    start=$(date +%s) before=$failed
    case $tool in
    tsan)
        for compiler in ${CLANG:-clang clang-19 clang-16 clang-14}; do # the first that has libarcher
            archer=$("$compiler" -print-resource-dir 2>/dev/null)/../../libarcher.so
            [ -e "$archer" ] && break
        done
        [ -e "$archer" ] || { echo "tsan: no clang with libarcher: apt-get install clang libomp-dev" && exit 1; }
        build "$compiler" -O1 -fsanitize=thread -Wno-pass-failed
        export TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" OMP_TOOL_LIBRARIES="$archer"
        runs tsan
        unset TSAN_OPTIONS OMP_TOOL_LIBRARIES
        ;;
    valgrind) # it knows no AVX-512
        case $(uname -m) in x86_64) build cc -O1 -march=x86-64-v3 ;; *) build cc -O1 ;; esac
        runs valgrind valgrind -q --error-exitcode=66
        ;;
    esac
    echo "$tool: $((failed - before)) failed, $(($(date +%s) - start)) s"
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
