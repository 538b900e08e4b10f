"""Check a model folder of either format: files, tensors, and logits against transformers.

The same as `gdpo-megatron verify FOLDER [OTHER]`.
"""

from gdpo_megatron.checkpoint_cli import add_verify, run_tool, run_verify

if __name__ == "__main__":
    run_tool(str(__doc__), add_verify, run_verify)
