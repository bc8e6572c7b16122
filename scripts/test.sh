#!/usr/bin/env bash
# All checks and tests: bash scripts/test.sh [PYTEST ARGUMENTS], for example -m 'not slow'.
# The checks take about a minute and run before the tests; the first one that fails ends the script.
set -euo pipefail

# shellcheck source=scripts/_environment.sh
source "$(dirname "$0")/_environment.sh"
use_environment requirements-test.txt

site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
export JAX_PLATFORMS=cpu
export NO_MKDOCS_2_WARNING=1  # mkdocs-material's notice about its end of life

"$python" -m ruff check .
"$python" -m ruff format --check .
"$root/.venv/bin/lint-imports"
"$python" -m mypy
"$python" -m mkdocs build --quiet --strict --site-dir "$site"
# --dist=loadfile: the tests of a file run in one process because they share expensive fixtures.
"$python" -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
