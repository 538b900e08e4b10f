# shellcheck shell=bash
# Where this node stands in its job, from what schedulers set. Sourced by run_multinode.sh. What is
# set by hand wins.
#
#   by hand     NNODES          NODE_RANK         MASTER_ADDR          NPROC_PER_NODE
#   Slurm       SLURM_NNODES    SLURM_NODEID      SLURM_JOB_NODELIST   SLURM_GPUS_ON_NODE
#   PBS         PBS_NODEFILE: its hosts, and where this one stands among them
#   LSF         LSB_MCPU_HOSTS: likewise
#   Kubeflow    PET_NNODES      PET_NODE_RANK     MASTER_ADDR          PET_NPROC_PER_NODE

# Hosts of the job in order, one a line, each once; nothing where no scheduler says.
scheduler_hosts() {
  local -a words
  local i
  if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
    slurm_hosts "$SLURM_JOB_NODELIST"
  elif [[ -n "${PBS_NODEFILE:-}" ]]; then
    awk 'NF && !seen[$1]++ { print $1 }' "$PBS_NODEFILE"
  elif [[ -n "${LSB_MCPU_HOSTS:-}" ]]; then
    read -ra words <<<"$LSB_MCPU_HOSTS" # host slots host slots ...
    for ((i = 0; i < ${#words[@]}; i += 2)); do printf '%s\n' "${words[i]}"; done
  fi
}

# scontrol knows them all. Without it, in a container, the first one of a[03-05,7]-x,b1 is enough.
slurm_hosts() {
  local list='^([^][,]*)\[([^],-]+)[^]]*\]([^,]*)'
  if command -v scontrol >/dev/null; then
    scontrol show hostnames "$1"
  elif [[ "$1" =~ $list ]]; then
    printf '%s\n' "${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}"
  else
    printf '%s\n' "${1%%,*}"
  fi
}

# The number of this host in a list, from 0; nothing where it is not there.
number_of_this_host() {
  local host number=0 address='^[0-9.]+$'
  while read -r host; do
    if [[ "$host" == "$HOSTNAME" ]] ||
      [[ ! "$host" =~ $address && "${host%%.*}" == "${HOSTNAME%%.*}" ]]; then
      printf '%d' "$number"
      return
    fi
    number=$((number + 1))
  done
}

# A port that two jobs on the same node hardly share.
port_of_job() {
  local id="${SLURM_JOB_ID:-${PBS_JOBID:-${LSB_JOBID:-}}}"
  id="${id%%[!0-9]*}"
  if [[ -n "$id" ]]; then
    printf '%d' "$((20000 + 10#$id % 10000))"
  else
    printf '29500'
  fi
}

# Set what is not set, as far as a scheduler says it.
find_place() {
  local hosts
  hosts="$(scheduler_hosts)"
  NNODES="${NNODES:-${SLURM_NNODES:-${PET_NNODES:-}}}"
  NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-${PET_NODE_RANK:-}}}"
  NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-${PET_NPROC_PER_NODE:-}}}"
  MASTER_ADDR="${MASTER_ADDR:-${hosts%%$'\n'*}}"
  MASTER_PORT="${MASTER_PORT:-$(port_of_job)}"
  if [[ -n "${PBS_NODEFILE:-}${LSB_MCPU_HOSTS:-}" ]]; then
    NNODES="${NNODES:-$(grep -c . <<<"$hosts")}"
    NODE_RANK="${NODE_RANK:-$(number_of_this_host <<<"$hosts")}"
  fi
  # Kubeflow may say "auto".
  if [[ ! "$NPROC_PER_NODE" =~ ^[0-9]+$ ]] && command -v nvidia-smi >/dev/null; then
    NPROC_PER_NODE="$(nvidia-smi -L | grep -c '^GPU ')"
  fi
}
