# shellcheck shell=bash
# Sourced by the other scripts. `use_environment FILE` creates .venv in the repository root, installs the
# requirements FILE into it if they have changed since the last call, and sets $python to its interpreter.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit

use_environment() {
  local requirements="$1" stamp
  python="$root/.venv/bin/python"
  if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: Python 3.11 or newer is required; set PYTHON=/path/to/python3.11" >&2
      exit 2
    }
    "${PYTHON:-python3}" -m venv "$root/.venv"
  fi
  stamp="$root/.venv/installed-$requirements"
  if ! cat requirements*.txt pyproject.toml | cmp -s - "$stamp"; then
    echo "installing $requirements into .venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" -e .
    cat requirements*.txt pyproject.toml > "$stamp"
  fi
}
