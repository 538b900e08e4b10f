#!/usr/bin/env bash
# Makes the Python environment that everything else here runs in: a virtual environment, the right
# build of torch, this package. A second call sees from a stamp that nothing changed and is done.
#
#   scripts/setup.sh [test|dev|megatron-0.19|vllm|lm-eval|bfcl]
#
#   test (the default)   the package and what its tests need
#   dev                  the same and the linters
#   megatron-0.19, vllm  test, and beside it a second environment, the first one's name followed by
#                        -megatron-0.19 or -vllm: a Megatron-Core of its own, or vLLM for CPUs,
#                        before the packages of the first
#   lm-eval, bfcl        test, and beside it an environment of its own with an evaluator of others,
#                        which shares no packages with the first: theirs exclude each other
#
# Variables:
#   GDPO_VENV         the environment's folder (default: .venv in the repository)
#   GDPO_PYTHON       the interpreter to build it from (default: the first of python3.11, python3,
#                     python3.12, python3.13 that is 3.11 or newer)
#   GDPO_TORCH        cpu or cuda (default: what was asked for last time, at first cpu)
#   GDPO_TORCH_INDEX  package index to take torch from
#
# Exit codes: 0 ready; 2 something here has to be put right first; 1 an install failed. Either way
# one line on stderr says what and why, and the installers' own output is in setup.log in the
# environment's folder.
set -euo pipefail

readonly CPU_INDEX="https://download.pytorch.org/whl/cpu"
# A new environment with the CPU build takes 1.7 GB, plus wheels while they are unpacked. With CUDA:
# an estimate, never measured.
readonly CPU_FREE_MB=3000 CUDA_FREE_MB=12000
readonly FULL_MB=20 # with less than this left, a failure is put down to the disk

say() { printf 'setup: %s\n' "$*"; }
die() {
  local code="$1"
  shift
  printf 'setup: %s\n' "$*" >&2
  exit "$code"
}

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${GDPO_VENV:-$repo/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
mode="${1:-test}"
extras="test"
[[ "$mode" != dev ]] || extras="dev"
log="$venv/setup.log"
stamp="$venv/.gdpo-setup-$extras"
made_here="$venv/.gdpo-made-here"
torch_asked="$venv/.gdpo-torch" # holds cpu or cuda
unset PYTHONHOME PYTHONPATH # they would lend the environment packages that it does not have

# shellcheck source=scripts/lib/second_environment.sh
source "$repo/scripts/lib/second_environment.sh"

# Run a command with its output in the log; where even the log cannot be written, fail quietly:
# the caller says why.
logged() { { printf '+ %s\n' "$*" >>"$log" && "$@" >>"$log" 2>&1; } 2>/dev/null; }

in_venv() { "$venv/bin/python" -I "$@"; }

pip() { in_venv -m pip --disable-pip-version-check --no-input "$@"; }

check_arguments() {
  case "$#$mode" in
    0test | 1test | 1dev | 1megatron-0.19 | 1vllm | 1lm-eval | 1bfcl) ;;
    *) die 2 "unknown arguments '$*'; choices: test, dev, megatron-0.19, vllm, lm-eval," \
      "bfcl" ;;
  esac
  if [[ -n "${GDPO_TORCH:-}" && "$GDPO_TORCH" != cpu && "$GDPO_TORCH" != cuda ]]; then
    die 2 "GDPO_TORCH is '$GDPO_TORCH'; choices: cpu, cuda"
  fi
}

# What the stamp must say: everything that an install depends on, the interpreter included.
fingerprint() {
  in_venv - "$repo" "$venv" "$1" 2>/dev/null <<'PY'
import hashlib, pathlib, platform, sys
digest = hashlib.sha256(pathlib.Path(sys.argv[1], "pyproject.toml").read_bytes())
digest.update(repr((sys.argv[1:], platform.python_version(), platform.machine())).encode())
print(digest.hexdigest())
PY
}

is_ready() {
  [[ -f "$stamp" && -f "$torch_asked" ]] || return 1
  [[ -z "${GDPO_TORCH:-}" || "$GDPO_TORCH" == "$(<"$torch_asked")" ]] || return 1
  local now
  now="$(fingerprint "$extras")" && [[ -n "$now" && "$(<"$stamp")" == "$now" ]]
}

# The interpreter's version when it can be run and is new enough (status 0) or too old (status 3).
python_version() {
  "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(0 if sys.version_info >= (3, 11) else 3)' 2>/dev/null
}

# Sets `python` and `version`, or returns 1 with the reason in `found`.
find_python() {
  local candidate status
  local -a candidates=(python3.11 python3 python3.12 python3.13)
  [[ -z "${GDPO_PYTHON:-}" ]] || candidates=("$GDPO_PYTHON")
  found=""
  for candidate in "${candidates[@]}"; do
    status=0
    version="$(python_version "$candidate")" || status=$?
    if ((status == 0)); then
      python="$candidate"
      return 0
    fi
    ((status != 3)) || found+="${found:+, }$candidate is $version"
  done
  found="${found:-${GDPO_PYTHON:-python3.11 and python3} cannot be run}"
  return 1
}

# Debian and Ubuntu packages, where we may install them; otherwise returns 1.
apt_install() {
  [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 1
  say "installing system packages: $*"
  logged env DEBIAN_FRONTEND=noninteractive apt-get update || true # an old list may do
  logged env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

check_python() {
  if ! find_python; then
    if [[ -n "${GDPO_PYTHON:-}" ]] || ! apt_install python3.11 python3.11-venv || ! find_python; then
      die 2 "Python 3.11 or newer is needed, but $found; install it (Debian/Ubuntu, as root:" \
        "apt-get install python3.11 python3.11-venv) or set GDPO_PYTHON"
    fi
  fi
  [[ "$version" == 3.11.* ]] || say "note: Python $version; only 3.11 has been shown to work"
  # Debian splits off what `python -m venv` needs; without it venv dies halfway with a long text.
  local package="python${version%.*}-venv"
  if ! has_venv && { ! apt_install "$package" || ! has_venv; }; then
    die 2 "Python $version ($python) has no venv module; install it (Debian/Ubuntu, as root:" \
      "apt-get install $package)"
  fi
}

# What the sandbox for model-written code prefers; where it cannot be had, `gdpo-megatron doctor`
# says what is used instead.
add_bubblewrap() {
  command -v bwrap >/dev/null || apt_install bubblewrap ||
    say "note: no bubblewrap (Debian/Ubuntu, as root: apt-get install bubblewrap)"
}

free_mb() {
  "${python:-$venv/bin/python}" -c 'import shutil, sys
print(shutil.disk_usage(sys.argv[1]).free // 10**6)' "$venv"
}

# Stop when less than $1 MB are free.
check_space() {
  local free need_mb="$1"
  free="$(free_mb)"
  ((free >= need_mb)) ||
    die 2 "not enough disk space: $free MB free at $venv, $need_mb MB needed; free some or set" \
      "GDPO_VENV to a folder on another disk"
}

# Report a failed step: $1 says what was tried, its output why it failed.
die_failed() {
  local output reason
  output="$(awk '/^[+] /{text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$log" 2>&1)" ||
    true
  # The venv module hides why its pip step failed, hence the look at the disk itself.
  if grep -qiE 'no space left on device|errno 28|disk quota exceeded' <<<"$output" ||
    (($(free_mb 2>/dev/null || echo 0) < FULL_MB)); then
    die 2 "the disk became full while $1; free some space on the disks of $venv and" \
      "${TMPDIR:-/tmp}, then run this again; log: $log"
  fi
  reason="$(grep -iE '^(error|e): ' <<<"$output" | tail -n 1 | cut -c 1-300)" || true
  if grep -q 'after connection broken by' <<<"$output"; then
    reason="connections to the package index broke${reason:+; $reason}"
  fi
  die 1 "failed while $1${reason:+ ($reason)}; log: $log"
}

# Whether what is there can be installed into. The programs of an environment name its interpreter by
# full path: one that was moved or copied is no use.
venv_works() {
  python_version "$venv/bin/python" >/dev/null && "$venv/bin/pip" --version >/dev/null 2>&1 &&
    [[ ! -e "$made_here" || "$(<"$made_here")" == "$venv" ]]
}

make_venv() {
  if venv_works; then
    return
  fi
  # Half-made, moved, or its interpreter is gone. What somebody else put there is never deleted.
  if [[ -e "$made_here" ]]; then
    find "$venv" -mindepth 1 -delete
  elif [[ -n "$(find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.log)" ]]; then
    die 2 "$venv is not empty and not a working environment (Python 3.11 or newer, pip); delete it" \
      "or set GDPO_VENV to another folder"
  fi
  check_python
  if [[ "$1" == cpu ]]; then check_space "$CPU_FREE_MB"; else check_space "$CUDA_FREE_MB"; fi
  say "creating $venv with Python $version"
  { printf '%s\n' "$venv" >"$made_here"; } 2>/dev/null || die_failed "creating $venv"
  logged "$python" -m venv "$venv" || die_failed "creating $venv with $python"
}

# "cpu" or "cuda", as the installed torch itself says; nothing when there is none.
installed_torch() {
  in_venv -c 'import torch
print("cuda" if torch.version.cuda else "cpu")' 2>/dev/null || true
}

# The version that pip would take if it were asked now, e.g. 2.13.0+cpu. It reads the package's
# metadata only.
offered_torch() {
  pip install --dry-run --ignore-installed --no-deps --quiet --report - "$1" 2>>"$log" |
    in_venv -c 'import json, sys
print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true
}

# Sets `requirement`, as pyproject.toml has it, and `index`, where to take it from.
choose_torch() {
  local wanted="$1" offered
  requirement="$(in_venv -c 'import sys, tomllib
with open(sys.argv[1], "rb") as file:
    required = tomllib.load(file)["project"]["dependencies"]
print(next(line for line in required if line.startswith("torch==")))' "$repo/pyproject.toml")"
  index=()
  if [[ -n "${GDPO_TORCH_INDEX:-}" ]]; then
    index=(--index-url "$GDPO_TORCH_INDEX")
    return
  fi
  offered="$(offered_torch "$requirement")"
  if [[ "$wanted" == cpu && "$offered" != *+cpu ]]; then
    index=(--index-url "$CPU_INDEX")
  elif [[ "$wanted" == cuda && "$offered" == *+cpu ]]; then
    die 2 "GDPO_TORCH=cuda, but pip offers torch $offered, a CPU build; set GDPO_TORCH_INDEX to" \
      "an index with CUDA builds"
  fi
}

install_torch() {
  local wanted="$1" present
  present="$(installed_torch)"
  if [[ -n "$present" && "$present" != "$wanted" ]]; then
    say "replacing the $present build of torch"
    logged pip uninstall -y torch || die_failed "removing the $present build of torch"
  fi
  say "installing $requirement, $wanted build (log: $log)"
  logged pip install ${index[@]+"${index[@]}"} "$requirement" ||
    die_failed "installing $requirement from ${index[1]:-the default index} (GDPO_TORCH_INDEX: another)"
}

check_torch() {
  local present
  present="$(installed_torch)"
  [[ "$present" == "$1" ]] ||
    die 1 "torch should be the $1 build and is ${present:-not importable}; delete $venv and set" \
      "GDPO_TORCH_INDEX to an index with $1 builds; log: $log"
}

# One set-up of one environment at a time; the lock goes when this process does.
lock_venv() {
  command -v flock >/dev/null || return 0
  exec 9<"$1"
  flock --nonblock 9 || {
    say "another set-up of $1 is running, waiting for it"
    flock 9
  }
}

main() {
  check_arguments "$@"
  make_base
  case "$mode" in
    megatron-0.19) make_megatron_second ;;
    vllm) make_vllm_second ;;
    lm-eval) make_lm_eval_second ;;
    bfcl) make_bfcl_second ;;
  esac
}

make_base() {
  local torch="${GDPO_TORCH:-}" problem
  if is_ready; then
    return
  fi
  problem="$(mkdir -p -- "$venv" 2>&1)" || die 2 "cannot create the environment: $problem"
  [[ -w "$venv" ]] || die 2 "cannot write to $venv; set GDPO_VENV to another folder"
  lock_venv "$venv"
  if is_ready; then # another set-up has just finished
    return
  fi
  [[ -n "$torch" || ! -f "$torch_asked" ]] || torch="$(<"$torch_asked")"
  if [[ -z "$torch" ]]; then
    torch=cpu
    ! command -v nvidia-smi >/dev/null ||
      say "note: this machine seems to have a GPU; GDPO_TORCH=cuda takes the CUDA build of torch"
  fi

  : 2>/dev/null >"$log" || true
  make_venv "$torch"
  # An old pip would download the whole wheel to answer what it would install.
  logged pip install --upgrade pip || die_failed "updating pip"
  choose_torch "$torch"
  rm -f -- "$venv"/.gdpo-setup-* # from here on the environment changes
  printf '%s\n' "$torch" >"$torch_asked"
  install_torch "$torch"
  add_bubblewrap
  say "installing gdpo-megatron[$extras] (log: $log)"
  logged pip install --editable "${repo}[$extras]" || die_failed "installing gdpo-megatron[$extras]"
  check_torch "$torch"

  fingerprint test >"$venv/.gdpo-setup-test"
  [[ "$extras" == test ]] || fingerprint dev >"$stamp" # dev includes test
  say "ready after $SECONDS s"
}

main "$@"
