#!/usr/bin/env bash
# Shows that each row of the table of versions (gdpo_megatron/platform/pins.toml) can be had: that
# every package of it is on the index, and that all of them and what they require resolve together,
# as wheels for the row's Python and its base image's glibc. Nothing is installed.
#
#   scripts/check_pins.sh [--write]
#
#   (nothing)  resolve, and compare with scripts/lib/requirements-image-*.txt
#   --write    write those files
#
# Variables:
#   GDPO_UV           the uv to use (default: uv on PATH, else one in a temporary environment)
#   GDPO_TORCH_INDEX  index of the CPU builds of torch (default: the one of PyTorch), or `none` where
#                     uv's own settings (UV_INDEX, UV_FIND_LINKS) lead to them
#
# Exit codes: 0 all rows resolve to what the files hold; 1 not; 2 cannot be looked into.
set -euo pipefail

readonly UV="uv==0.13.9" CPU_INDEX="https://download.pytorch.org/whl/cpu"
# Compiled at install, so that there is no wheel of it; and what its and our own builds need.
readonly COMPILED="transformer-engine-torch"
readonly BUILD=("setuptools>=77" "wheel>=0.45" "ninja>=1.11")

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
lib="$repo/scripts/lib"
write=""
[[ "${1:-}" != --write ]] || write=yes

die() {
  printf 'check_pins: %s\n' "$*" >&2
  exit 2
}
(($# == 0)) || [[ "$#$write" == 1yes ]] || die "unknown arguments '$*'; choices: --write"

python="${GDPO_PYTHON:-${GDPO_VENV:-$repo/.venv}/bin/python}"
[[ -x "$python" ]] || python="$(command -v python3)" || die "no Python 3.11 or newer; set GDPO_PYTHON"
pins() { "$python" -I "$lib/pins.py" "$@"; }

temporary="$(mktemp -d)"
trap 'rm -rf -- "$temporary"' EXIT

find_uv() {
  uv="${GDPO_UV:-$(command -v uv || true)}"
  [[ -z "$uv" ]] || return 0
  if ! { "$python" -m venv "$temporary/uv" &&
    "$temporary/uv/bin/python" -m pip install --quiet "$UV"; } >"$temporary/log" 2>&1; then
    die "$UV cannot be installed ($(tail -n 1 "$temporary/log")); set GDPO_UV"
  fi
  uv="$temporary/uv/bin/uv"
}

# Resolve a row into $2: what this project requires, with the row's versions instead of its own.
#   $1 row, $2 file, further: more requirements
resolve() {
  local row="$1" output="$2"
  shift 2
  local -a options=(--no-annotate --no-header --python-version "$(pins "$row" python)"
    --python-platform "$(pins "$row" platform)" --only-binary :all: --no-binary "$COMPILED")
  if [[ "$row" == cpu ]]; then
    case "${GDPO_TORCH_INDEX:-}" in
      none) ;;
      "") options+=(--index "$CPU_INDEX" --index-strategy unsafe-best-match) ;;
      *) options+=(--index "$GDPO_TORCH_INDEX" --index-strategy unsafe-best-match) ;;
    esac
    printf 'torch%s+cpu\n' "$(pins cpu packages | sed -n 's/^torch//p')" >"$temporary/torch"
  else
    : >"$temporary/torch"
  fi
  pins "$row" packages >"$temporary/overrides"
  { pins "$row" packages && printf '%s\n' "${BUILD[@]}" "$@" && cat "$temporary/torch"; } \
    >"$temporary/requirements"
  # Run elsewhere: uv takes settings from the folder that it is started in.
  (cd "$temporary" && "$uv" pip compile --quiet "${options[@]}" --override overrides \
    "$repo/pyproject.toml" requirements -o "$output" >/dev/null)
}

status=0
find_uv
for row in cpu gpu; do
  locked="$lib/requirements-image-$row.txt"
  fresh="$temporary/$row"
  # What is locked is preferred, as long as it fits: newer releases of others change nothing.
  [[ ! -f "$locked" ]] || sed '/^#/d' "$locked" >"$fresh"
  if ! resolve "$row" "$fresh"; then
    printf 'check_pins: row %s does not resolve\n' "$row" >&2
    status=1
    continue
  fi
  {
    printf '# All packages of the row %s, resolved by scripts/check_pins.sh.\n' "$row"
    cat "$fresh"
  } >"$fresh.new"
  [[ -z "$write" ]] || cp -- "$fresh.new" "$locked"
  if ! diff -u -- "$locked" "$fresh.new" >&2; then
    printf 'check_pins: row %s resolves to something else; see above\n' "$row" >&2
    status=1
  fi
  printf 'row %s, Python %s, %s: %d packages resolve together\n' "$row" "$(pins "$row" python)" \
    "$(pins "$row" platform)" "$(grep -c == "$fresh")"
  while read -r name; do
    grep -E "^$name==" "$fresh" | sed 's/^/  /'
  done < <(pins "$row" packages | sed 's/[^A-Za-z0-9_-].*//')
  beside="$(pins "$row" beside)"
  if [[ -n "$beside" ]]; then
    if resolve "$row" "$temporary/beside" "$beside"; then
      printf '  beside it: %s resolves with these\n' "$beside"
    else
      printf 'check_pins: row %s does not resolve with %s\n' "$row" "$beside" >&2
      status=1
    fi
  fi
done
exit "$status"
