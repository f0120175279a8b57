#!/bin/sh
# The live comparison with PyTorch: makes a virtual environment in build/venv, runs dev/compare_test.py.
#   sh dev/compare_test.sh [--seed N] [--count N]     PYTHON=python3.12 chooses another Python
#   SCRIPT=dev/compare_pytorch.py sh dev/compare_test.sh [options]     runs another script in it
# The programs must have been built. The environment is used again until dev/requirements.txt changes.
set -eu
cd "$(dirname "$0")/.."
venv=build/venv
python=${PYTHON:-python3}

fail() {
    echo "compare_test.sh: $*" >&2
    exit 1
}

for program in train_gpt2 test_gpt2 tokenizer data/stories; do
    [ -x "$program" ] || fail "./$program is missing: run 'make $program' first"
done

if ! cmp -s dev/requirements.txt "$venv/installed.txt"; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && command -v apt-get >/dev/null; then
        sudo=
        [ "$(id -u)" = 0 ] || sudo="sudo -n"
        echo "compare_test.sh: $python has no venv and pip, installing python3-venv" >&2
        { $sudo apt-get update -q && $sudo apt-get install -qy python3-venv; } >&2 || true
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$python is missing or older than 3.11: install Python 3.11 or newer, or set PYTHON to one"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv and pip (Debian: python3-venv)"
    echo "compare_test.sh: installing PyTorch and transformers into $venv, once" >&2
    "$python" -m venv --clear "$venv" || fail "could not make $venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r dev/requirements.txt ||
        fail "could not install dev/requirements.txt into $venv"
    cp dev/requirements.txt "$venv/installed.txt"
fi
PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" "${SCRIPT:-dev/compare_test.py}" "$@"
