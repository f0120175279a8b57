#!/bin/sh
# Builds everything in many ways and runs the tests of each; prints a line per way, with its seconds.
#
#   sh dev/portability.sh [NAME...]      all, or those named; logs are in build/portability/NAME.log
#
# What is not installed is skipped and said. On Debian the whole matrix needs: gcc clang libomp-dev
# libopenblas-openmp-dev libopenblas-pthread-dev libblis-dev musl-tools clang-16 libomp-16-dev valgrind
# gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD/build/portability
mkdir -p "$root" || exit 1
[ $# -gt 0 ] && chosen=" $* " || chosen=
passed=0 failed=0 skipped=0
multiarch=$(cc -print-multiarch 2>/dev/null)

# way NAME NEEDS COMMAND: copies the sources to a folder of its own and runs COMMAND there, if the file or program
# NEEDS is here.
way() {
    name=$1 needs=$2 command=$3
    [ -n "$chosen" ] && case $chosen in *" $name "*) ;; *) return ;; esac
    if ! [ -e "$needs" ] && ! command -v "$needs" >/dev/null 2>&1; then
        printf '%-24s skipped: no %s\n' "$name" "$needs"
        skipped=$((skipped + 1))
        return
    fi
    rm -rf "${root:?}/$name"
    mkdir -p "$root/$name"
    tar -cf - --exclude=./build --exclude=./.git --exclude='./out*' . | tar -xf - -C "$root/$name"
    start=$(date +%s)
    (cd "$root/$name" && rm -f train_gpt2 tokenizer test_gpt2 data/stories && sh -ec "$command") >"$root/$name.log" 2>&1
    status=$?
    counts=$(grep -oE '[0-9]+ passed, [0-9]+ failed' "$root/$name.log" | tail -n 1)
    printf '%-24s %-24s %4d s%s\n' "$name" "${counts:-no counts}" $(($(date +%s) - start)) \
        "$([ $status = 0 ] || echo "   FAILED, see build/portability/$name.log")"
    if [ $status = 0 ] && [ -n "$counts" ]; then
        passed=$((passed + 1))
        rm -rf "${root:?}/$name"
    else
        failed=$((failed + 1))
    fi
}

# direct COMPILER-AND-FLAGS LIBRARIES EMULATOR: builds without make, and starts programs through an emulator (-0: under
# the name that they were started by, so that the tests also start others through it)
direct() {
    echo "for p in train_gpt2 tokenizer test_gpt2 data/stories; do
            $1 -std=gnu11 -O3 -fno-math-errno -fopenmp -Wall -Wextra -Wno-unused-function -o \$p.run \$p.c $2 -lm
            printf '#!/bin/sh\nexec $3 %s \"\$@\"\n' \"\$PWD/\$p.run\" >\$p
            chmod +x \$p
        done
        OMP_WAIT_POLICY=passive ./test_gpt2"
}

way gcc gcc "make test CC=gcc"
way clang clang "make test CC=clang"
way clang-14 clang-14 "make test CC=clang-14"
way clang-16 clang-16 "make test CC=clang-16" # its OpenMP runtime hangs when a forked process starts threads
way musl musl-gcc "make test CC=musl-gcc OPENMP=0 BLAS=none" # Alpine's libc; Debian has no OpenMP for it
way no-blas gcc "make test BLAS=none"
way no-openmp gcc "make test OPENMP=0"
way no-openmp-no-blas gcc "make test OPENMP=0 BLAS=none"
way blis "/usr/include/$multiarch/blis-openmp" "make test BLAS=blis"
folder=$multiarch/openblas-pthread # dev/flags.sh prefers the OpenMP build
way openblas-pthread "/usr/include/$folder" "$(direct "cc -march=native -DUSE_CBLAS -DUSE_OPENBLAS -I/usr/include/$folder" \
    "-L/usr/lib/$folder -Wl,-rpath,/usr/lib/$folder -lopenblas" "")"
case $(uname -m) in
x86_64)
    way x86-64-baseline gcc "make test BLAS=none CFLAGS='-O3 -march=x86-64'"
    way x86-64-v3 gcc "make test BLAS=none CFLAGS='-O3 -march=x86-64-v3'"
    # Intel's tiles written out in plain C, in panels of 16 columns and of 48
    way amx-emulated gcc "make test BLAS=none CFLAGS='-O3 -march=x86-64-v3 -include dev/amx_emulation.h'"
    way amx-emulated-avx512 gcc "make test BLAS=none CFLAGS='-O3 -march=native -include dev/amx_emulation.h'"
    # an emulated processor that has SSE4.2 at most
    way x86-64-nehalem-qemu qemu-x86_64 "$(direct "cc -march=x86-64" "" 'qemu-x86_64 -cpu Nehalem -0 "$0"')"
    ;;
esac
way tsan clang "sh dev/sanitizers.sh tsan"
way valgrind valgrind "sh dev/sanitizers.sh valgrind"
way aarch64-qemu aarch64-linux-gnu-gcc "$(direct "aarch64-linux-gnu-gcc -static" "" 'qemu-aarch64 -0 "$0"')"
way aarch64-bf16-qemu aarch64-linux-gnu-gcc "$(direct "aarch64-linux-gnu-gcc -static -march=armv8.2-a+bf16" "" \
    'qemu-aarch64 -cpu max -0 "$0"')"

echo "$passed ways passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
