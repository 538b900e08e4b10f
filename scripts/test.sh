#!/usr/bin/env bash
# All that CI runs: set-up, linters, tests, and on a second Megatron-Core the tests that reach it.
# Stops at the first section that fails, with its status.
#
#   scripts/test.sh [--full] [--megatron-0.19] [pytest arguments]
#
#   --full            also the long matrices of layouts and variants
#   --megatron-0.19   the tests on the second Megatron-Core alone
#
# With pytest arguments they choose the tests, and one Megatron-Core runs them.
#
# Variables: see setup.sh.
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${GDPO_VENV:-$repo/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
export GDPO_VENV="$venv"
marks="not full and not gpu"
full=0
only_next=0
pytest_args=()
for argument in "$@"; do
  case "$argument" in
    --full) full=1 marks="not gpu" ;;
    --megatron-0.19) only_next=1 ;;
    *) pytest_args+=("$argument") ;;
  esac
done

# What reaches Megatron; all of it under --full.
next_tests=(
  tests/unit/platform
  tests/unit/policy/test_megatron_api.py
  tests/distributed/test_versions.py
  tests/distributed/test_layouts.py
  tests/distributed/test_conversion.py
  tests/e2e/test_quickstart_flow.py::test_sft_learns_and_exports
  tests/e2e/test_quickstart_flow.py::test_training_logs_every_step
)
((full == 0)) || next_tests=(tests/unit/platform tests/unit/policy tests/distributed tests/e2e)

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
  "$shellcheck" -a -x -P SCRIPTDIR "${scripts[@]}" # with the files that they source
}

[[ -t 0 ]] || exec </dev/null # nothing here asks; with a closed stdin children would misbehave
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd -- "$repo"

run_pytest() { "$1/bin/python" -m pytest -m "$marks" "${@:2}"; }

# Runs everything in the environment of the default Megatron-Core.
check_default() {
  check "set-up" bash scripts/setup.sh dev
  check "ruff check" "$venv/bin/ruff" check .
  check "ruff format" "$venv/bin/ruff" format --check .
  check "pyright" "$venv/bin/pyright" --pythonpath "$venv/bin/python"
  check "shellcheck" check_shell
  check "pytest, $marks" run_pytest "$venv" ${pytest_args[@]+"${pytest_args[@]}"}
}

check_next() {
  local -a arguments=("${next_tests[@]}")
  ((${#pytest_args[@]} == 0)) || arguments=("${pytest_args[@]}")
  check "set-up, Megatron-Core 0.19" bash scripts/setup.sh megatron-0.19
  # For checkpoints that go from one version to the other.
  export GDPO_OTHER_MEGATRON="$venv/bin/python"
  check "pytest on Megatron-Core 0.19, $marks" run_pytest "$venv-megatron-0.19" "${arguments[@]}"
}

((only_next)) || check_default
((only_next == 0 && ${#pytest_args[@]} > 0)) || check_next
