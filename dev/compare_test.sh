#!/bin/sh
# The live comparison with PyTorch: makes a virtual environment in build/venv, runs dev/compare_test.py.
#   sh dev/compare_test.sh [--seed N] [--count N]     SEED=N is --seed N; PYTHON=python3.12 chooses another Python
#   SCRIPT=dev/compare_pytorch.py sh dev/compare_test.sh [options]     runs another script in it
# The programs must have been built. The environment is used again until dev/requirements.txt changes.
set -eu
cd "$(dirname "$0")/.."
venv=build/venv

fail() {
    echo "compare_test.sh: $*" >&2
    exit 1
}

for program in train_gpt2 test_gpt2 tokenizer data/stories; do
    [ -x "$program" ] || fail "./$program is missing: run 'make $program' first"
done

sh dev/venv.sh "$venv" dev/requirements.txt
PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" "${SCRIPT:-dev/compare_test.py}" "$@"
