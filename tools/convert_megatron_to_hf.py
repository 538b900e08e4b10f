"""Convert a Megatron distributed checkpoint, saved in any layout, into a Hugging Face model folder.

The same as `gdpo-megatron convert SRC DST --to hf`.
"""

from gdpo_megatron.checkpoint_cli import add_convert, run_convert, run_tool

if __name__ == "__main__":
    run_tool(str(__doc__), lambda parser: add_convert(parser, "hf"), run_convert)
