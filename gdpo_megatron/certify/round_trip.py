"""A checkpoint in and out again: Hugging Face -> Megatron -> Hugging Face, the same bytes.

Sources are folders that transformers has written. What comes back is compared tensor by tensor, bit
for bit. Its files are compared, byte for byte, with those of an export that never was in Megatron's
format: the order of tensors in a file is a writer's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, findings_dict
from gdpo_megatron.certify.family_models import MODELS, save_model
from gdpo_megatron.certify.job import Job
from gdpo_megatron.platform import Platform


def run(job: Job) -> Findings:
    """All families."""
    return job.findings(f"{__name__}:on_rank", 1)


def on_rank(platform: Platform, folder: Path) -> dict[str, Any]:
    """Convert all families there and back, and verify."""
    measured: list[Measured] = []
    for name, config in MODELS.items():
        source = folder / "round_trip" / name / "source"
        save_model(source, **config)
        found = there_and_back(source, source.parent)
        measured += [Measured(f"{name}: {what}", n, "==", 0) for what, n in found.items()]
    return findings_dict(measured)


def there_and_back(source: Path, folder: Path) -> dict[str, int]:
    """Convert a model folder to Megatron's format and back.

    Args:
        source: Hugging Face folder.
        folder: for the others.

    Returns:
        How many tensors and files differ, and how many files are not as their manifest has them.
    """
    from gdpo_megatron.conversion.convert import convert
    from gdpo_megatron.conversion.output_folder import manifest_problems
    from gdpo_megatron.layer_values import open_model
    from gdpo_megatron.verify import different_tensors

    direct, megatron, back = (folder / name for name in ("direct", "megatron", "back"))
    convert(source, direct, to="hf")
    convert(source, megatron, to="megatron")
    convert(megatron, back, to="hf")
    (arch, original), (other, returned) = open_model(source), open_model(back)
    files = {path.name for path in direct.iterdir()} | {path.name for path in back.iterdir()}
    return {
        "tensors that differ": len(different_tensors(original, returned, arch)),
        "configs that differ": int(arch != other),
        "files that differ": sum(_bytes(direct / it) != _bytes(back / it) for it in files),
        "files unlike their manifest": sum(
            len(manifest_problems(it) or ()) for it in (direct, megatron, back)
        ),
    }


def _bytes(path: Path) -> bytes | None:
    """None where there is no such file; a manifest says where its model came from."""
    if path.name == "manifest.json":
        return b""
    return path.read_bytes() if path.is_file() else None
