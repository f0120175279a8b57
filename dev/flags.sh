#!/bin/sh
# Finds how this machine's compiler is told about its own processor, OpenMP and a BLAS, by compiling and running
# a small program, and writes the answer to FILE as make variables. The Makefile calls this on each run:
#
#   CC=cc CFLAGS=-O3 LDFLAGS= OPENMP=1 BLAS=auto sh dev/flags.sh FILE
#
# Where FILE holds the answer to the same question already, nothing is done; where the answer is the same as
# before, FILE keeps its time, so that nothing is rebuilt. What stands in the way is printed as one line on
# standard output, with exit status 1; a notice goes to standard error.
set -u
file=$1
question="# CC=$CC CFLAGS=$CFLAGS LDFLAGS=$LDFLAGS OPENMP=$OPENMP BLAS=$BLAS"
if [ -f "$file" ] && read -r answered <"$file" && [ "$answered" = "$question" ]; then
    exit 0
fi

fail() {
    echo "$*"
    exit 1
}

folder=$(dirname "$file")
mkdir -p "$folder" || fail "cannot write to $folder"
scratch=$(mktemp -d "$folder/flags.XXXXXX") || fail "cannot write to $folder"
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

cat >"$scratch/test.c" <<'END'
#include <stdio.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined USE_ACCELERATE
#include <Accelerate/Accelerate.h>
#elif defined USE_CBLAS
#include <cblas.h>
#endif

int main(void) // status 0: all is well; 2: OpenBLAS runs, but was built with threads of its own
{
    float a[4] = {1, 2, 3, 4}, c[4] = {0};
    int threads = 0, status = 0;
#pragma omp parallel reduction(+ : threads)
    threads += 1;
#ifdef USE_CBLAS
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 2, 2, 2, 1, a, 2, a, 2, 0, c, 2);
    status = c[0] != 7 || c[3] != 22;
#endif
#if defined USE_OPENBLAS && defined _OPENMP
    status = status ? 1 : openblas_get_parallel() == 2 ? 0 : 2;
#endif
    return threads < 1 ? 1 : status;
}
END

# Compiles the program with these flags before and these libraries behind it, and runs it.
runs() {
    $CC $CFLAGS $openmp_flags $1 -o "$scratch/test" "$scratch/test.c" $LDFLAGS $2 $openmp_libs -lm \
        >"$scratch/log" 2>&1 || return 1
    "$scratch/test" >"$scratch/log" 2>&1
}

accepts() { # a compiler flag
    $CC "$@" -c -o "$scratch/test.o" -x c /dev/null >"$scratch/log" 2>&1
}

# The compiler.
openmp_flags=-Wno-unknown-pragmas openmp_libs=
command -v ${CC%% *} >/dev/null 2>&1 ||
    fail "no C compiler: $CC is not here; run sh dev/deps.sh, or say make CC=..."
runs "" "" || fail "$CC $CFLAGS makes no program that runs: $(head -n 1 "$scratch/log")"

# This machine's own processor: x86 says -march, the others -mcpu. AVX-512 is used at full width.
native=
case $(uname -m) in
x86_64 | amd64 | i?86) choices="-march=native" ;;
*) choices="-mcpu=native -march=native" ;;
esac
for flag in $choices; do
    if accepts "$flag"; then
        native=$flag
        break
    fi
done
if [ -n "$native" ] && $CC $native -dM -E -x c /dev/null 2>/dev/null | grep -q __AVX512F__ &&
    accepts $native -mprefer-vector-width=512; then
    native="$native -mprefer-vector-width=512"
fi

# OpenMP: -fopenmp everywhere but with Apple's compiler, which wants the library from brew.
if [ "$OPENMP" != 0 ]; then
    openmp_flags=-fopenmp
    if ! runs "" ""; then
        found=
        for folder in /opt/homebrew/opt/libomp /usr/local/opt/libomp; do
            openmp_flags="-Xpreprocessor -fopenmp -I$folder/include"
            openmp_libs="-L$folder/lib -lomp"
            [ "$(uname)" = Darwin ] && runs "" "" && found=yes && break
        done
        if [ -z "$found" ]; then
            [ "$(uname)" = Darwin ] &&
                fail "$CC has no OpenMP: brew install libomp adds it (or make OPENMP=0 builds for one core)"
            fail "$CC has no OpenMP: install its runtime (for clang libomp), or make OPENMP=0 builds for one core"
        fi
    fi
fi

# BLAS. try FLAGS LIBS keeps the first that runs in blas_flags and blas_libs, but goes on looking (by failing)
# while that is an OpenBLAS with threads of its own: the OpenMP build shares our threads and is faster.
blas_name=none blas_flags='' blas_libs=''
try() {
    runs "$1" "$2"
    status=$?
    [ $status = 0 ] || { [ $status = 2 ] && [ $blas_name = none ]; } || return 1
    blas_name=$name blas_flags=$1 blas_libs=$2
    return $status
}

# Debian keeps each build in a folder of its own, behind a link that names one of them for all programs; -rpath
# makes the loader take the one we built with. Fedora has the OpenMP build as libopenblaso.
find_openblas() {
    name=openblas use="-DUSE_CBLAS -DUSE_OPENBLAS"
    for folder in /usr/lib/*/openblas-openmp /usr/lib*/openblas-openmp; do
        include=/usr/include${folder#/usr/lib}
        [ -d "$include" ] || include=/usr/include/openblas
        [ -e "$folder/libopenblas.so" ] && try "$use -I$include" "-L$folder -Wl,-rpath,$folder -lopenblas" && return
    done
    for library in openblaso openblas_openmp openblas; do
        try "$use" "-l$library" && return
        try "$use -I/usr/include/openblas" "-l$library" && return
    done
    for folder in /opt/homebrew/opt/openblas /usr/local/opt/openblas /opt/OpenBLAS /usr/local; do
        [ -d "$folder/lib" ] &&
            try "$use -I$folder/include" "-L$folder/lib -Wl,-rpath,$folder/lib -lopenblas" && return
    done
    command -v pkg-config >/dev/null 2>&1 && pkg-config --exists openblas &&
        try "$use $(pkg-config --cflags openblas)" \
            "$(pkg-config --libs openblas | sed 's/-L\([^ ]*\)/& -Wl,-rpath,\1/g')" && return
    [ $blas_name != none ]
}

find_accelerate() { # macOS has it built in
    name=accelerate
    try "-DUSE_CBLAS -DUSE_ACCELERATE -DACCELERATE_NEW_LAPACK" "-framework Accelerate"
}

find_blis() {
    name=blis
    for folder in /usr/lib/*/blis-openmp; do
        [ -d "$folder" ] && try "-DUSE_CBLAS -I/usr/include${folder#/usr/lib}" \
            "-L$folder -Wl,-rpath,$folder -lblis" && return
    done
    try "-DUSE_CBLAS" "-lblis" || try "-DUSE_CBLAS -I/usr/include/blis" "-lblis" ||
        try "-DUSE_CBLAS -I/usr/local/include/blis" "-L/usr/local/lib -Wl,-rpath,/usr/local/lib -lblis"
}

case $BLAS in
none) ;;
openblas) find_openblas || fail "BLAS=openblas: no OpenBLAS found; run sh dev/deps.sh, or say make BLAS=none" ;;
accelerate) find_accelerate || fail "BLAS=accelerate: only macOS has it; say make BLAS=auto" ;;
blis) find_blis || fail "BLAS=blis: no BLIS with its CBLAS header found; say make BLAS=auto" ;;
auto)
    if ! { [ "$(uname)" = Darwin ] && find_accelerate; } && ! find_openblas; then
        echo "notice: no OpenBLAS found, so the built-in matmul is used (sh dev/deps.sh would install it;" \
            "make BLAS=none is silent)" >&2
        question="# (no BLAS yet: look again next time) $question"
    fi
    ;;
*) fail "BLAS=$BLAS: it must be auto, openblas, accelerate, blis or none" ;;
esac

cat >"$scratch/answer" <<END
$question
NATIVE       := $native
OPENMP_FLAGS := $openmp_flags
OPENMP_LIBS  := $openmp_libs
BLAS_NAME    := $blas_name
BLAS_FLAGS   := $blas_flags
BLAS_LIBS    := $blas_libs
END
cmp -s "$scratch/answer" "$file" || mv "$scratch/answer" "$file"
