"""What torchrun starts for a check: `python -m gdpo_megatron.certify.rank FUNCTION FOLDER SECONDS`.

Calls a function of this package, "module:function", with what FOLDER/arguments.json holds, and
leaves what it returns in FOLDER/rank_R.json, or in FOLDER/rank_R.error why it failed. After SECONDS
the log gets the stacks of a rank that hangs.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from gdpo_megatron.processes import die_with_parent


def main(arguments: list[str]) -> None:
    """Run one rank of a check."""
    function, path, seconds = arguments
    die_with_parent(signal.SIGKILL)
    faulthandler.dump_traceback_later(float(seconds))
    folder, rank = Path(path), os.environ["RANK"]
    try:
        from gdpo_megatron.platform import detect_platform
        from gdpo_megatron.worker import leave_out_warnings

        leave_out_warnings()
        platform = detect_platform()
        platform.prepare_megatron()
        module, name = function.split(":")
        words = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
        words["folder"] = Path(words["folder"])
        answer = getattr(importlib.import_module(module), name)(platform, **words)
        (folder / f"rank_{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        (folder / f"rank_{rank}.error").write_text(text, encoding="utf-8")
        raise
    import torch.distributed as dist

    if dist.is_initialized():
        # Leaving while a peer still talks would look like a crash to it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
