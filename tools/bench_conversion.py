"""Time and memory of converting a 1.5B-shaped Qwen2.5 checkpoint, against safetensors alone.

A checkpoint with the shapes of Qwen2.5-1.5B and random bfloat16 weights is written into a temporary
folder, then converted to Megatron and back, each in a process of its own. The floor is what the
safetensors library needs to load all tensors and save them again. Every process also pays for its
imports, which `imports alone` shows. Peak memory is the kernel's (ru_maxrss); how much of it was
anonymous and how much mapped from files is sampled every 10 ms, the page cache is in neither.

Converted files are synced to the disk and have checksums; the floor's are neither.

    OMP_NUM_THREADS=1 python tools/bench_conversion.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Qwen2.5-1.5B; small: to see that the tool works.
QWEN25_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
SMALL = {**QWEN25_1_5B, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 8192}


class Sampler(threading.Thread):
    """Largest anonymous and file-mapped memory of this process, from /proc."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.file = 0

    def run(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}
            self.anonymous = max(self.anonymous, kib["RssAnon"])
            self.file = max(self.file, kib["RssFile"])
            time.sleep(0.01)


def make_checkpoint(folder: Path, small: bool) -> None:
    """Write the random model, one tensor at a time."""
    import torch

    from gdpo_megatron.conversion.families import load_architecture
    from gdpo_megatron.conversion.hf_writer import write_hf_folder
    from gdpo_megatron.conversion.mapping import hf_shapes

    source = folder.with_name("config")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(SMALL if small else QWEN25_1_5B))
    arch = load_architecture(source)
    generator = torch.Generator().manual_seed(0)
    write_hf_folder(
        folder,
        (
            (name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
            for name, shape in hf_shapes(arch).items()
        ),
        arch,
        dtype=torch.bfloat16,
        source=source,
        save_tokenizer=lambda path: None,
    )


def safetensors_alone(source: Path, target: Path) -> None:
    """The floor: load everything, save everything."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    save_file(load_file(source / "model.safetensors"), target / "model.safetensors")


def to_megatron(source: Path, target: Path) -> None:
    """Hugging Face to Megatron."""
    from gdpo_megatron.conversion.convert import convert

    convert(source, target, to="megatron")


def to_hf(source: Path, target: Path) -> None:
    """Megatron to Hugging Face."""
    from gdpo_megatron.conversion.convert import convert

    convert(source, target, to="hf")


def imports_alone(source: Path, target: Path) -> None:
    """What a conversion needs before it has read anything."""
    importlib.import_module("gdpo_megatron.conversion.convert")


def check_same(source: Path, target: Path) -> None:
    """Whether the way there and back has given every tensor bit for bit."""
    from safetensors import safe_open

    paths = [folder / "model.safetensors" for folder in (source, target)]
    with safe_open(paths[0], framework="pt") as one, safe_open(paths[1], framework="pt") as other:
        names = list(one.keys())
        assert names == list(other.keys())
        for name in names:
            assert (one.get_tensor(name) == other.get_tensor(name)).all(), name


# Name -> what is done, from which folder, to which; each in a process of its own.
STEPS: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "imports alone": (imports_alone, "hf", "nothing"),
    "safetensors load + save": (safetensors_alone, "hf", "copy"),
    "HF -> Megatron": (to_megatron, "hf", "megatron"),
    "Megatron -> HF": (to_hf, "megatron", "back"),
    "compare": (check_same, "hf", "back"),
}


def measure(name: str, folder: Path) -> None:
    """Run one step in this process and print what it took, as JSON."""
    step, source, target = STEPS[name]
    sampler = Sampler()
    sampler.start()
    before = time.perf_counter()
    step(folder / source, folder / target)
    seconds = time.perf_counter() - before
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak": usage.ru_maxrss * 1024,
                "anonymous": sampler.anonymous * 1024,
                "file": sampler.file * 1024,
            }
        )
    )


def main() -> None:
    """Make the checkpoint, run every step, print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--folder", help="where there is room for 4 models (the system's)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        make_checkpoint(Path(options.folder) / "hf", options.small)
        return
    if options.step:
        measure(options.step, Path(options.folder))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_conversion_") as name:
        folder = Path(name)
        # Nothing is done in this process: the kernel counts its memory as that of its children.
        run_step("make", folder, *(["--small"] if options.small else []))
        size = (folder / "hf" / "model.safetensors").stat().st_size
        print(f"{size / 1e9:.3f} GB of weights, {os.cpu_count()} CPUs, load {os.getloadavg()[0]}")
        header = ("seconds", "CPU s", "peak GB", "of model", "anonymous", "mapped")
        print(f"{'':24}" + "".join(f"{text:>11}" for text in header))
        for step in STEPS:
            found = json.loads(run_step(step, folder).splitlines()[-1])
            numbers = (
                f"{found['seconds']:.1f}",
                f"{found['cpu_seconds']:.1f}",
                f"{found['peak'] / 1e9:.2f}",
                f"{found['peak'] / size:.2f}",
                f"{found['anonymous'] / 1e9:.2f}",
                f"{found['file'] / 1e9:.2f}",
            )
            print(f"{step:24}" + "".join(f"{number:>11}" for number in numbers), flush=True)
        print("all tensors bit-identical after both ways")


def run_step(step: str, folder: Path, *options: str) -> str:
    """Run one step in a process of its own; returns what it printed."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
