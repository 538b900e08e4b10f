#!/usr/bin/env bash
# All that CI runs: set-up, linters, tests, and in environments of their own the tests that reach a
# second Megatron-Core and those that need vLLM. What starts ranks waits a good deal of its time, so
# it runs beside the rest, whose output is shown when it has ended. Each of the two stops at its
# first section that fails; the exit code is that section's.
#
#   scripts/test.sh [--full] [--megatron-0.19] [--vllm] [pytest arguments]
#
#   --full            also the long matrices of layouts and variants, and the evaluators of others
#   --megatron-0.19   the tests on the second Megatron-Core alone
#   --vllm            the tests that need vLLM alone
#
# With pytest arguments they choose the tests, and they run in the first environment unless an option
# names another.
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
only_vllm=0
pytest_args=()
for argument in "$@"; do
  case "$argument" in
    --full) full=1 marks="not gpu" ;;
    --megatron-0.19) only_next=1 ;;
    --vllm) only_vllm=1 ;;
    *) pytest_args+=("$argument") ;;
  esac
done

# What starts ranks.
rank_tests=(tests/distributed tests/e2e)
# What reaches Megatron; all of it under --full.
next_tests=(
  tests/unit/platform/test_megatron_cpu.py
  tests/unit/platform/test_megatron_versions.py
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
  local -a scripts=("$repo"/scripts/*.sh "$repo"/scripts/*.sbatch "$repo"/tools/*.sh "$repo/.ci/run")
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

# $1 an environment, $2 which marks, then arguments.
run_pytest() { "$1/bin/python" -m pytest -m "$2" "${@:3}"; }

check_set_up() {
  check "set-up" bash scripts/setup.sh dev
  check "ruff check" "$venv/bin/ruff" check .
  check "ruff format" "$venv/bin/ruff" format --check .
  check "shellcheck" check_shell
}

check_pyright() { check "pyright" "$venv/bin/pyright" --pythonpath "$venv/bin/python"; }

# The default environment; arguments choose tests.
check_default() {
  local title="$1"
  shift
  check "$title, $marks and not vllm" run_pytest "$venv" "$marks and not vllm" "$@"
}

check_next() {
  local -a arguments=("${next_tests[@]}")
  ((${#pytest_args[@]} == 0)) || arguments=("${pytest_args[@]}")
  check "set-up, Megatron-Core 0.19" bash scripts/setup.sh megatron-0.19
  # For checkpoints that go from one version to the other.
  GDPO_OTHER_MEGATRON="$venv/bin/python" check "pytest on Megatron-Core 0.19, $marks and not vllm" \
    run_pytest "$venv-megatron-0.19" "$marks and not vllm" "${arguments[@]}"
}

check_vllm() {
  check "set-up, vLLM" bash scripts/setup.sh vllm
  if ((full)); then # tests that have a served model evaluated by programs of others
    check "set-up, lm-eval" bash scripts/setup.sh lm-eval
    check "set-up, bfcl-eval" bash scripts/setup.sh bfcl
  fi
  check "pytest with vLLM, vllm and $marks" run_pytest "$venv-vllm" "vllm and $marks" \
    ${pytest_args[@]+"${pytest_args[@]}"}
}

# ---- side by side ----

jobs_started=()
beside_log=""

# With a signal or an error nothing that was started runs on. Each job has a process group of its own.
end_jobs() {
  local signal
  for signal in INT TERM KILL; do # at the first one pytest takes its own children along
    signal_jobs "$signal" || break
    for _ in {1..150}; do
      signal_jobs 0 || break
      sleep 0.1
    done
  done
  [[ -z "$beside_log" ]] || rm -f -- "$beside_log"
}

# Whether one of them was there to get it.
signal_jobs() {
  local job status=1
  for job in ${jobs_started[@]+"${jobs_started[@]}"}; do
    ! kill "-$1" -- "-$job" 2>/dev/null || status=0
  done
  return "$status"
}

# Run two functions; the second one's output comes after the first one's.
side_by_side() {
  local first=0 second=0
  beside_log="$(mktemp)"
  trap end_jobs EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  set -m
  "$1" </dev/null &
  jobs_started+=("$!")
  "$2" </dev/null >"$beside_log" 2>&1 &
  jobs_started+=("$!")
  set +m
  wait "${jobs_started[0]}" || first=$?
  wait "${jobs_started[1]}" || second=$?
  jobs_started=()
  cat -- "$beside_log"
  ((first == 0)) || printf 'test: %s failed with status %d, see above\n' "$1" "$first" >&2
  ((second == 0)) || tail -n 1 -- "$beside_log" >&2
  return "$((first == 0 ? second : first))"
}

with_ranks() { check_default "pytest with ranks" "${rank_tests[@]}"; }

without_ranks() {
  check_pyright
  check_default "pytest without ranks" tests "${rank_tests[@]/#/--ignore=}"
  check_next
  check_vllm
}

if ((only_next || only_vllm)); then
  ((only_next == 0)) || check_next
  ((only_vllm == 0)) || check_vllm
elif ((${#pytest_args[@]} > 0)); then
  check_set_up
  check_pyright
  check_default "pytest" "${pytest_args[@]}"
else
  check_set_up
  side_by_side with_ranks without_ranks
fi
