"""Convert a Hugging Face model folder into a Megatron distributed checkpoint, for any layout.

The same as `gdpo-megatron convert SRC DST --to megatron`.
"""

from gdpo_megatron.checkpoint_cli import add_convert, run_convert, run_tool

if __name__ == "__main__":
    run_tool(str(__doc__), lambda parser: add_convert(parser, "megatron"), run_convert)
