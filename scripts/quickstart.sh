#!/usr/bin/env bash
# The main job from nothing: set up, then warm-start a small model, train it with GDPO and with GRPO,
# compare, plot, export. Arguments go to examples/quickstart/quickstart.py (--help shows them);
# variables: see setup.sh.
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$repo/scripts/setup.sh" test

# Ranks share the cores; more threads than cores is many times slower, not faster.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${GDPO_VENV:-$repo/.venv}/bin/python" "$repo/examples/quickstart/quickstart.py" "$@"
