#!/bin/sh
# Builds the fuzz targets under ASan and UBSan, and runs each for some seconds; or those that are named.
#
#   sh dev/fuzz/run.sh [SECONDS [TARGET...]]       60 seconds each; JOBS=2 runs two at a time
#
# A fifth of the time goes to inputs of 1 MB, without sanitizers (see fuzz.c). A target fails when an input makes it crash, takes over a
# second of processor time or over 100 MB; the input is kept in build/fuzz. Needs clang with its runtime: on Debian
# clang-14 and libclang-rt-14-dev. What is found of new inputs stays in build/fuzz/corpus for the next run.
cd "$(dirname "$0")/../.." || exit 1
build=build/fuzz
export ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=3 FUZZ_TARGET FUZZ_LARGE

# fuzz TARGET NAME SECONDS [-large]: one target; prints a line
fuzz() {
    FUZZ_TARGET=$1 log=$build/$2.log corpus=$build/corpus/$2
    mkdir -p "$corpus"
    "$build/fuzz$4" -close_fd_mask=3 -detect_leaks=0 -timeout=20 -rss_limit_mb=600 -malloc_limit_mb=0 -max_len=4096 \
        -max_total_time="$3" -print_final_stats=1 -artifact_prefix="$build/$2-" "$corpus" "dev/fuzz/seeds/$1" \
        >"$log" 2>&1
    status=$?
    number() { sed -n "s/^stat::$1: *//p" "$log" | tail -n 1; }
    printf '%-16s %10s executions, %6s a second  %s\n' "$2" "$(number number_of_executed_units)" \
        "$(number average_exec_per_sec)" "$([ $status = 0 ] && echo passed || echo "FAILED, see $log")"
    [ $status = 0 ] || grep -aE -m 3 '^fuzz:|runtime error:|^SUMMARY|ERROR:|Test unit written' "$log"
}

if [ "$1" = --one ]; then
    fuzz "$2" "$2" $(($3 - $3 / 5))
    FUZZ_LARGE=1
    fuzz "$2" "$2-large" $(($3 / 5)) -large
    exit
fi

seconds=${1:-60}
[ $# = 0 ] || shift
[ $# = 0 ] && set -- json model tokenizer text jsonl shard state options log
mkdir -p $build
[ -n "$CLANG" ] || CLANG=$(command -v clang-14 || command -v clang) || {
    echo "dev/fuzz: clang with libFuzzer is needed: apt-get install clang-14 libclang-rt-14-dev; or set CLANG"
    exit 1
}
build() {
    "$CLANG" -std=gnu11 -g -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas "$@" dev/fuzz/fuzz.c -lm || exit 1
}
build -O1 -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all -o $build/fuzz
build -O2 -fsanitize=fuzzer -o $build/fuzz-large
for target; do echo "$target"; done | xargs -P "${JOBS:-1}" -I{} sh dev/fuzz/run.sh --one {} "$seconds" | tee $build/results
rm -rf /dev/shm/fuzz.??????
passed=$(grep -c 'passed$' $build/results) failed=$(grep -c 'FAILED, see' $build/results)
awk '/executions/ {n += $2} END {printf "%.2f million executions\n", n / 1e6}' $build/results
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
