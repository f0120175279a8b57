#!/bin/sh
# Finds how this machine's compiler is told about its own processor, OpenMP, a BLAS and MPI, by compiling and
# running a small program, and writes the answer to FILE as make variables. The Makefile calls this on each run:
#
#   CC=cc CFLAGS=-O3 LDFLAGS= OPENMP=1 BLAS=auto MPI=0 sh dev/flags.sh FILE
#
# Where FILE holds the answer to the same question already, nothing is done; where the answer is the same as
# before, FILE keeps its time, so that nothing is rebuilt. What stands in the way is printed as one line on
# standard output, with exit status 1; a notice goes to standard error. A library that is found nowhere here
# (built by hand, say) is named by make CPPFLAGS=-I... LDFLAGS=-L...
set -u
file=$1
question="# CC=$CC CFLAGS=$CFLAGS LDFLAGS=$LDFLAGS OPENMP=$OPENMP BLAS=$BLAS MPI=${MPI:=0}"
[ -f "$file" ] && read -r answered <"$file" && [ "$answered" = "$question" ] && exit 0

fail() {
    echo "$*"
    exit 1
}

folder=$(dirname "$file")
mkdir -p "$folder" && scratch=$(mktemp -d "$folder/flags.XXXXXX") || fail "cannot write to $folder"
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

cat >"$scratch/test.c" <<'END_OF_C'
#include <stdio.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined USE_ACCELERATE
#include <Accelerate/Accelerate.h>
#elif defined USE_CBLAS
#include <cblas.h>
#endif
#ifdef USE_MPI
#include <mpi.h>
#endif

int main(void) // status 0: all is well; 2: OpenBLAS runs, but was built with threads of its own
{
    float a[4] = {1, 2, 3, 4}, c[4] = {0};
    int threads = 0, status = 0;
#ifdef USE_MPI
    MPI_Initialized(&threads);
#endif
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
END_OF_C

# Compiles the program with these flags before and these libraries behind it, and runs it.
runs() {
    $CC $CFLAGS $openmp_flags $1 -o "$scratch/test" "$scratch/test.c" $LDFLAGS $2 $openmp_libs -lm \
        >"$scratch/log" 2>&1 && "$scratch/test" >"$scratch/log" 2>&1
}

accepts() { # compiler flags
    $CC "$@" -c -o "$scratch/test.o" -x c /dev/null >"$scratch/log" 2>&1
}

openmp_flags=-Wno-unknown-pragmas openmp_libs=
command -v ${CC%% *} >/dev/null 2>&1 ||
    fail "no C compiler: $CC is not here; run sh dev/deps.sh, or say make CC=..."
runs "" "" || fail "$CC $CFLAGS makes no program that runs: $(head -n 1 "$scratch/log")"

# This machine's own processor: x86 says -march, the others -mcpu. AVX-512 is used at full width.
case $(uname -m) in
x86_64 | amd64 | i?86) native=-march=native ;;
*) native=-mcpu=native ;;
esac
accepts $native || native=-march=native
accepts $native || native=
wide="$native -mprefer-vector-width=512"
[ -n "$native" ] && $CC $native -dM -E -x c /dev/null 2>/dev/null | grep -q __AVX512F__ && accepts $wide &&
    native=$wide

# OpenMP: -fopenmp everywhere but with Apple's compiler, which wants the library from brew.
if [ "$OPENMP" != 0 ]; then
    openmp_flags=-fopenmp advice="install its runtime (for clang libomp)"
    if [ "$(uname)" = Darwin ] && ! runs "" ""; then
        advice="brew install libomp adds it"
        for folder in /opt/homebrew/opt/libomp /usr/local/opt/libomp; do
            openmp_flags="-Xpreprocessor -fopenmp -I$folder/include" openmp_libs="-L$folder/lib -lomp"
            [ -d "$folder" ] && break
        done
    fi
    runs "" "" || fail "$CC has no OpenMP: $advice, or make OPENMP=0 builds for one core"
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

# try_debian BUILD LIBRARY: Debian keeps each build in a folder of its own, behind a link that names one of them
# for all programs; -rpath makes the loader take the one we built with.
try_debian() {
    for folder in /usr/lib/*/"$1"; do
        include=/usr/include${folder#/usr/lib}
        [ -d "$folder" ] && try "$use -I$include" "-L$folder -Wl,-rpath,$folder -l$2" && return
    done
    return 1
}

# Fedora has the OpenMP build as libopenblaso, openSUSE as libopenblas_openmp.
find_openblas() {
    name=openblas use="-DUSE_CBLAS -DUSE_OPENBLAS"
    try_debian openblas-openmp openblas && return
    for library in openblaso openblas_openmp openblas; do
        try "$use" "-l$library" || try "$use -I/usr/include/openblas" "-l$library" && return
    done
    for folder in /opt/homebrew/opt/openblas /usr/local/opt/openblas; do
        [ -d "$folder" ] && try "$use -I$folder/include" "-L$folder/lib -lopenblas" && return
    done
    [ $blas_name != none ]
}

find_accelerate() { # macOS has it built in
    name=accelerate
    try "-DUSE_CBLAS -DUSE_ACCELERATE -DACCELERATE_NEW_LAPACK" "-framework Accelerate"
}

find_blis() {
    name=blis use=-DUSE_CBLAS
    try_debian blis-openmp blis || try "$use" -lblis || try "$use -I/usr/include/blis" -lblis
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

# MPI. Its compiler, mpicc, is the usual one with more flags, and says which. Fedora and openSUSE keep it out of
# PATH until a module is loaded.
mpi_flags='' mpi_libs=''
find_mpi() {
    for mpicc in ${MPI#1} $([ "$MPI" = 1 ] && echo mpicc /usr/lib64/mpich/bin/mpicc /usr/lib64/openmpi/bin/mpicc \
        /usr/lib64/mpi/gcc/*/bin/mpicc); do
        words=$($mpicc -show 2>"$scratch/log") || continue
        mpi_flags=-DUSE_MPI mpi_libs=
        for word in ${words#* }; do
            case $word in
            -L* | -l* | -Wl,*) mpi_libs="$mpi_libs $word" ;;
            *) mpi_flags="$mpi_flags $word" ;;
            esac
        done
        for folder in $(printf '%s\n' $mpi_libs | sed -n 's/^-L//p'); do # where the loader does not look by itself
            mpi_libs="$mpi_libs -Wl,-rpath,$folder"
        done
        runs "$mpi_flags" "$mpi_libs" && return
    done
    return 1
}
[ "$MPI" = 0 ] || find_mpi || fail "MPI=$MPI: no MPI found here: run MPI=1 sh dev/deps.sh, or say MPI=MPICC, where" \
    "MPICC is its compiler, such as mpicc.mpich"

cat >"$scratch/answer" <<END_OF_ANSWER
$question
NATIVE       := $native
OPENMP_FLAGS := $openmp_flags
OPENMP_LIBS  := $openmp_libs
BLAS_NAME    := $blas_name
BLAS_FLAGS   := $blas_flags
BLAS_LIBS    := $blas_libs
MPI_FLAGS    := $mpi_flags
MPI_LIBS     := $mpi_libs
END_OF_ANSWER
cmp -s "$scratch/answer" "$file" || mv "$scratch/answer" "$file"
