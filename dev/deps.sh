#!/bin/sh
# Installs what the build needs (C compiler, make, OpenMP, OpenBLAS) with the system's own package manager:
# apt, dnf, pacman, zypper, apk or brew; sudo is used only when not root. Does nothing where a test program
# already compiles, links and runs. Without OpenBLAS the build goes on with its built-in matmul.
#
#   sh dev/deps.sh              MPI=1 sh dev/deps.sh also installs an MPI (MPICH where there is a choice)
set -u
MPI=${MPI:-0}
cd "$(dirname "$0")/.." || exit 1

# Prints the BLAS that make would build with: the Makefile compiles and runs a program to find out.
find_blas() { command -v make >/dev/null && make -s show-blas MPI="$MPI" 2>/dev/null; }

ready() {
    blas=$(find_blas) && { [ "$blas" != none ] || [ "${BLAS:-}" = none ]; }
}

if ready; then
    echo "dev/deps.sh: nothing to install: compiler, make and OpenMP are here (BLAS: $blas, MPI: $MPI)"
    exit 0
fi

if [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null; then
    as_root=sudo
else
    as_root=false # no way to become root: each installation fails at once, and the end of this file says so
fi

# Each manager: how it installs, what the build cannot do without, and the names OpenBLAS may have there,
# the OpenMP build first.
refresh=true
if [ "$(uname)" = Darwin ]; then # the compiler is Apple's, and so is the BLAS: only OpenMP is missing
    if ! xcode-select -p >/dev/null 2>&1; then
        echo "dev/deps.sh: no C compiler: install Apple's with: xcode-select --install" >&2
        exit 1
    fi
    if ! command -v brew >/dev/null; then
        echo "dev/deps.sh: Homebrew (brew) is not here to install OpenMP: install it, or use make OPENMP=0" >&2
        exit 1
    fi
    manager=brew install="env NONINTERACTIVE=1 brew install" needed=libomp openblas= mpi=mpich
elif command -v apt-get >/dev/null; then
    apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300"
    manager=apt refresh="$apt update" install="$apt install --no-install-recommends"
    needed="gcc libc6-dev make" openblas="libopenblas-openmp-dev libopenblas-dev" mpi="mpich libmpich-dev"
elif command -v dnf >/dev/null; then
    manager=dnf install="$as_root dnf -q -y install --setopt=install_weak_deps=False"
    needed="gcc make" openblas="openblas-devel" mpi=mpich-devel
elif command -v pacman >/dev/null; then
    manager=pacman install="$as_root pacman -Sy --noconfirm --needed"
    needed="gcc make" openblas="openblas blas-openblas" mpi=openmpi
elif command -v zypper >/dev/null; then
    manager=zypper install="$as_root zypper -q --non-interactive install --no-recommends"
    needed="gcc make" openblas="openblas_openmp-devel libopenblas_openmp-devel openblas-devel" mpi=mpich-devel
elif command -v apk >/dev/null; then
    manager=apk install="$as_root apk add --no-progress"
    refresh="$as_root apk update" needed="build-base" openblas="openblas-dev" mpi="openmpi openmpi-dev"
else
    manager=none install=false needed="a C compiler and make" openblas= mpi=
fi
[ "$MPI" = 0 ] || needed="$needed $mpi"

# Tries with each name of OpenBLAS, then without. The managers' chatter is kept for when nothing works.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM
if [ "$manager" != none ] && [ "$as_root" != false ]; then
    echo "dev/deps.sh: installing $needed${openblas:+ ${openblas%% *}} with $manager"
    $refresh >>"$log" 2>&1 </dev/null
    for name in $openblas ""; do
        $install $needed $name >>"$log" 2>&1 </dev/null && break
    done
fi

why=
[ "$manager" = none ] && why=" (no package manager known here)"
[ "$as_root" = false ] && why=" (neither root nor sudo)"
if ready; then
    echo "dev/deps.sh: done (BLAS: $blas)"
elif [ "${blas:-}" = none ]; then
    grep -E '^(E:|[Ee]rror|ERROR)' "$log" | tail -n 2 >&2
    echo "dev/deps.sh: notice: OpenBLAS could not be installed$why;" \
        "the build uses its built-in matmul (make BLAS=none)" >&2
else
    tail -n 3 "$log" >&2
    if ! command -v ${CC:-cc} >/dev/null || ! command -v make >/dev/null; then
        echo "dev/deps.sh: a C compiler and make are needed and could not be installed$why: install $needed" >&2
    else
        make -s show-blas MPI="$MPI" >&2 # says what is wrong, in one line
    fi
    exit 1
fi
