#!/usr/bin/env bash
# The install steps of the Dockerfile, which calls this; scripts/replay_image.sh calls it without a
# container. Makes a virtual environment with exactly the packages of a row of the table of versions
# (gdpo_megatron/platform/pins.toml), then puts this package into it.
#
#   scripts/install_image.sh ROW PREFIX packages      ROW: cpu or gpu; PREFIX: a new folder
#   scripts/install_image.sh ROW PREFIX compiled      gpu: what is compiled against torch
#   scripts/install_image.sh ROW PREFIX project       this package, and a look at what is there
#
# The steps are apart so that a change of this package's source repeats the last one alone.
#
# Variables:
#   GDPO_PYTHON       interpreter (default: python3.11 for cpu, python3.12 for gpu, as the row says)
#   GDPO_TORCH_INDEX  index of the CPU build of torch (default: pip's own where that has it, else the
#                     one of PyTorch)
#   MAX_JOBS          compilers at a time (default: one per core)
set -euo pipefail

readonly CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly COMPILED="transformer-engine-torch" # no wheels of it: 33 files of C++

say() { printf 'install_image: %s\n' "$*"; }
die() {
  local code="$1"
  shift
  printf 'install_image: %s\n' "$*" >&2
  exit "$code"
}

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
(($# == 3)) || die 2 "usage: install_image.sh cpu|gpu PREFIX packages|compiled|project"
row="$1" prefix="$2" step="$3"
locked="$repo/scripts/lib/requirements-image-$row.txt"
[[ "$row" == cpu || "$row" == gpu ]] || die 2 "no row '$row'; choices: cpu, gpu"
unset PYTHONHOME PYTHONPATH # they would lend the environment packages that it does not have

# Isolated: nothing of the folder that this is started in is imported.
in_prefix() { "$prefix/bin/python" -I "$@"; }

# No requirement is followed: the file has all of them.
pip() {
  in_prefix -m pip --disable-pip-version-check --no-input "$@"
}
install() { pip install --no-cache-dir --no-deps --quiet "$@"; }

make_prefix() {
  local python wanted
  [[ ! -e "$prefix/bin/python" ]] || die 2 "$prefix is there already; delete it or name another"
  wanted="$(sed -n "/^\[$row\]/,/^\[$row\./s/^python = \"\(.*\)\"/\1/p" \
    "$repo/gdpo_megatron/platform/pins.toml")"
  python="${GDPO_PYTHON:-python$wanted}"
  "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$wanted')" ||
    die 2 "row $row needs Python $wanted, which $python is not; set GDPO_PYTHON"
  "$python" -m venv "$prefix" || die 1 "no environment can be made at $prefix with $python"
}

install_packages() {
  local torch index=() rest
  make_prefix
  rest="$(mktemp)"
  # shellcheck disable=SC2064 # now, not then
  trap "rm -f -- '$rest'" EXIT
  grep -vE "^(#|$COMPILED==)" "$locked" >"$rest"
  if [[ "$row" == cpu ]]; then
    torch="$(grep '^torch==' "$locked")"
    sed -i '/^torch==/d' "$rest"
    if [[ -n "${GDPO_TORCH_INDEX:-}" ]]; then
      index=(--index-url "$GDPO_TORCH_INDEX")
    elif ! pip download --quiet --no-deps --dest "$prefix/torch" "$torch" >/dev/null 2>&1; then
      index=(--index-url "$CPU_INDEX")
    else
      index=(--no-index --find-links "$prefix/torch")
    fi
    say "installing $torch"
    install ${index[@]+"${index[@]}"} "$torch" || die 1 "$torch cannot be installed"
    rm -rf -- "$prefix/torch"
  fi
  say "installing $(wc -l <"$rest") packages of ${locked##*/}, as wheels"
  install --only-binary :all: --requirement "$rest" || die 1 "a package cannot be installed; see above"
}

install_compiled() {
  local compiled
  if ! compiled="$(grep "^$COMPILED==" "$locked")"; then
    say "row $row has nothing to compile"
    return
  fi
  command -v nvcc >/dev/null || [[ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]] ||
    die 2 "$compiled is compiled with CUDA's headers, and there is no nvcc here or in CUDA_HOME"
  say "compiling $compiled: 35 to 50 minutes of one core"
  # Else its set-up takes a wheel from elsewhere, where there is one for this torch.
  NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch \
    install --no-build-isolation --no-binary "$COMPILED" "$compiled" ||
    die 1 "$compiled cannot be compiled"
}

install_project() {
  local found
  say "installing gdpo-megatron"
  install --no-build-isolation "$repo" || die 1 "gdpo-megatron cannot be installed"
  # pyproject.toml asks for the Megatron-Core of the row cpu.
  found="$(pip check | grep -vE '^gdpo-megatron .* requirement megatron-core==|^No broken')" || true
  [[ -z "$found" ]] || die 1 "the packages do not fit together: $found"
  in_prefix -c 'import importlib.metadata as m
print("installed: gdpo-megatron", m.version("gdpo-megatron"))'
}

case "$step" in
  packages) install_packages ;;
  compiled) install_compiled ;;
  project) install_project ;;
  *) die 2 "no step '$step'; choices: packages, compiled, project" ;;
esac
