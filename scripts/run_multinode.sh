#!/usr/bin/env bash
# One node's part of a job on several nodes, under any scheduler: start this once on each node, with
# the same arguments. It finds the node's place and hands over to run_node.sh.
#
#   scripts/run_multinode.sh train CONFIG [--section.key value ...]
#
# Slurm, PBS, LSF and Kubeflow's PyTorchJob say all that is needed (lib/place.sh); under pbsdsh and
# blaunch the job's own variables have to reach the node. Without a scheduler:
#
#   NNODES           nodes in the job
#   MASTER_ADDR      host name of the first node, as the others reach it
#   MASTER_PORT      a free port there (29500, or by the scheduler's job)
#   NPROC_PER_NODE   processes on this node (the GPUs that nvidia-smi shows)
#   NODE_RANK        this node's number, from 0 (not set: by addresses, when nodes meet)
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=lib/place.sh
source "$repo/scripts/lib/place.sh"

find_place
# A scheduler that lists this job's hosts, but not this one, means that its names are others.
if [[ -z "$NODE_RANK" && -n "${PBS_NODEFILE:-}${LSB_MCPU_HOSTS:-}" ]]; then
  hosts="$(scheduler_hosts)"
  printf 'run_multinode: %s is not among the hosts of the job (%s); set NODE_RANK\n' \
    "$HOSTNAME" "${hosts//$'\n'/ }" >&2
  exit 2
fi
NODE_RANK="${NODE_RANK:-any}"
export NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT
exec "${BASH:-bash}" "$repo/scripts/run_node.sh" "$@"
