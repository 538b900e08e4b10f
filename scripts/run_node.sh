#!/usr/bin/env bash
# One node's part of a job on several nodes: start this once on each node, with the same arguments.
#
#   scripts/run_node.sh train CONFIG [--section.key value ...]
#
# It runs gdpo-megatron with the node's place in the job, taken from the environment:
#
#   NNODES           --nnodes          nodes in the job (else SLURM_NNODES)
#   NODE_RANK        --node-rank       this node's number, from 0 (else SLURM_NODEID); with "any" nodes
#                                      are numbered when they meet, by their addresses
#   NPROC_PER_NODE   --nproc           processes on this node, one per device
#   MASTER_ADDR      --rdzv-endpoint   host name of node 0, as the other nodes reach it
#   MASTER_PORT                        a free port there
#
# Of gdpo-megatron it takes the one in GDPO_VENV (default: .venv in the repository), else on PATH.
set -euo pipefail

die() {
  printf 'run_node: %s\n' "$*" >&2
  exit 2
}

(($# > 0)) || die "no command; usage: run_node.sh train CONFIG [--section.key value ...]"

nnodes="${NNODES:-${SLURM_NNODES:-}}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-}}"
missing=()
[[ -n "$nnodes" ]] || missing+=("NNODES (or SLURM_NNODES)")
[[ -n "$node_rank" ]] || missing+=("NODE_RANK (or SLURM_NODEID)")
for name in NPROC_PER_NODE MASTER_ADDR MASTER_PORT; do
  [[ -n "${!name:-}" ]] || missing+=("$name")
done
if ((${#missing[@]} > 0)); then
  list="$(printf '%s, ' "${missing[@]}")"
  die "not set: ${list%, }"
fi

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cli="${GDPO_VENV:-$repo/.venv}/bin/gdpo-megatron"
[[ -x "$cli" ]] || cli="$(command -v gdpo-megatron)" ||
  die "gdpo-megatron is neither in ${GDPO_VENV:-$repo/.venv} nor on PATH; run scripts/setup.sh"

place=(--nproc "$NPROC_PER_NODE" --nnodes "$nnodes")
[[ "$node_rank" == any ]] || place+=(--node-rank "$node_rank")
# In front of the caller's own arguments, so that those win.
exec "$cli" "$1" "${place[@]}" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" "${@:2}"
