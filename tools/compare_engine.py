"""Find the first layer at which a rollout engine differs from the trainer's Megatron model.

For when the canary of the weight sync stops a run: MODEL_FOLDER is the model that the run started
from, or a checkpoint of it. What both compute for the same tokens is compared after the embedding,
after each layer's attention and MLP, after the last norm, at the logits, and as the log-probs that
an update would see. One process, no torchrun; vLLM runs eagerly. Exit code 1 with a difference.

    python tools/compare_engine.py MODEL_FOLDER --engine vllm
"""

from gdpo_megatron.checkpoint_cli import run_tool
from gdpo_megatron.compare_engine import add_compare, run_compare

if __name__ == "__main__":
    run_tool(str(__doc__), add_compare, run_compare)
