#!/usr/bin/env bash
# The whole test suite: bash scripts/test.sh [PYTEST ARGUMENTS], such as -m 'not slow'
set -euo pipefail

source "$(dirname "$0")/_environment.sh"
use_environment requirements-test.txt

"$python" -m ruff check .
JAX_PLATFORMS=cpu "$python" -m pytest "$@"
