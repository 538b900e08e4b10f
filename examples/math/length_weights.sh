#!/usr/bin/env bash
# The paper's sweep over the weight of the length reward, R1-Distill-Qwen-7B: 1, 0.75, 0.5, 0.25,
# with the plain and the conditioned reward, GDPO and GRPO. 16 runs, one after the other; weight 1
# is r1_7b*.yaml itself. `--print` only shows the commands; other words are handed to each run.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=(gdpo-megatron)
if [[ "${1:-}" == --print ]]; then
  run=(echo gdpo-megatron)
  shift
fi
for reward in r1_7b r1_7b_conditioned; do
  for method in gdpo grpo; do
    for weight in 1.0 0.75 0.5 0.25; do
      "${run[@]}" train "examples/math/${reward}_${method}.yaml" --nproc 8 \
        --rewards.length.weight "$weight" \
        --run_dir "../../runs/math/${reward}_${method}_length_${weight}" "$@"
    done
  done
done
