#!/usr/bin/env bash
# The whole test suite: bash scripts/test.sh [PYTEST ARGUMENTS], such as -m 'not slow'
set -euo pipefail

source "$(dirname "$0")/_environment.sh"
use_environment requirements-test.txt

"$python" -m ruff check .
# a worker a core; files stay whole, for their tests share what is slow to make
JAX_PLATFORMS=cpu "$python" -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
