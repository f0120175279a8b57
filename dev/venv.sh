#!/bin/sh
# Makes a Python environment with the packages of a requirements file, once: it is used again until that file changes.
#   sh dev/venv.sh FOLDER REQUIREMENTS     PYTHON=python3.12 chooses another Python
set -eu
cd "$(dirname "$0")/.."
venv=$1 requirements=$2
python=${PYTHON:-python3}

fail() {
    echo "dev/venv.sh: $*" >&2
    exit 1
}

cmp -s "$requirements" "$venv/installed.txt" && exit 0
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && command -v apt-get >/dev/null; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    echo "dev/venv.sh: $python has no venv and pip, installing python3-venv" >&2
    { $sudo apt-get update -q && $sudo apt-get install -qy python3-venv; } >&2 || true
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is missing or older than 3.11: install Python 3.11 or newer, or set PYTHON to one"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments: install its venv and pip (Debian: python3-venv)"
echo "dev/venv.sh: installing the packages of $requirements into $venv, once" >&2
"$python" -m venv --clear "$venv" || fail "could not make $venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" ||
    fail "could not install $requirements into $venv"
cp "$requirements" "$venv/installed.txt"
