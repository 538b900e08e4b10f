#!/usr/bin/env bash
# All that CI runs: set-up, linters, tests. Stops at the first section that fails, with its status.
#
#   scripts/test.sh [--full] [pytest arguments]
#
#   --full   also the long matrices of layouts and variants
#
# Variables: see setup.sh.
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${GDPO_VENV:-$repo/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
export GDPO_VENV="$venv"
marks="not full and not gpu"
pytest_args=()
for argument in "$@"; do
  if [[ "$argument" == --full ]]; then
    marks="not gpu"
  else
    pytest_args+=("$argument")
  fi
done

heading() { printf '\n=== [%4d s] %s ===\n' "$SECONDS" "$1"; }

check() {
  local title="$1" status=0
  shift
  heading "$title"
  "$@" || status=$?
  if ((status != 0)); then
    printf 'test: %s failed with status %d; what follows it did not run\n' "$title" "$status" >&2
    exit "$status"
  fi
}

check_shell() {
  local -a scripts=("$repo"/scripts/*.sh "$repo/.ci/run")
  local shellcheck="$venv/bin/shellcheck"
  [[ -x "$shellcheck" ]] || shellcheck="$(command -v shellcheck)" || {
    echo "skipped: no shellcheck in $venv or on PATH (package shellcheck of Debian/Ubuntu)"
    return 0
  }
  "$shellcheck" "${scripts[@]}"
}

[[ -t 0 ]] || exec </dev/null # nothing here asks; with a closed stdin children would misbehave
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd -- "$repo"

check "set-up" bash scripts/setup.sh dev
check "ruff check" "$venv/bin/ruff" check .
check "ruff format" "$venv/bin/ruff" format --check .
check "pyright" "$venv/bin/pyright" --pythonpath "$venv/bin/python"
check "shellcheck" check_shell
heading "pytest, $marks"
exec "$venv/bin/python" -m pytest -m "$marks" ${pytest_args[@]+"${pytest_args[@]}"}
