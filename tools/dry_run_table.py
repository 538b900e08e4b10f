"""The dry runs of docs/planning.md: shard sums of every example config.

Configs of the same model in the same layout are one case. Published models are folders with a
config.json; those that examples make themselves are made here, with the largest vocabulary that
they may get.

    GDPO_MODELS=/models OMP_NUM_THREADS=1 python tools/dry_run_table.py [--print]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.planning.job import Job, load_either, load_job
from gdpo_megatron.planning.tables import layout_name
from gdpo_megatron.tiny_model import TinyShape, make_tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENT = ROOT / "docs" / "planning.md"
MARKS = re.compile(r"(<!-- dry runs -->\n).*?(\n<!-- end -->)", re.S)
RANKS = {"math/qwen3_30b_a3b_gdpo.yaml": 16}
"""Where they are not 8, nor in the name, nor 2, as of the examples for a laptop."""


@dataclass(slots=True)
class Case:
    """Example configs of one model in one layout.

    Args:
        model: the folder that its config.json is in.
        job: of the first of them.
        names: of their files below examples/.
    """

    model: Path
    job: Job
    names: list[str] = field(default_factory=list[str])


def make_models(folder: Path) -> None:
    """Write the config.json of the models that examples make: quickstart, calculator, cpu."""
    quickstart, calculator = (_module(name) for name in ("quickstart", "calculator"))
    (folder / "quickstart").mkdir()
    quickstart._write_model_config(folder / "quickstart", quickstart.MAX_VOCAB_SIZE)
    positions = calculator.MAX_POSITIONS
    shapes = {
        "calculator": (calculator.MAX_VOCAB_SIZE, TinyShape(num_layers=2, max_positions=positions)),
        "cpu": (3000, TinyShape()),
    }
    for name, (vocab_size, shape) in shapes.items():
        make_tiny_model(folder / name, ["a text"], vocab_size=vocab_size, shape=shape)
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": vocab_size}))


def _module(name: str) -> Any:
    path = EXAMPLES / name / "make_data.py"
    spec = importlib.util.spec_from_file_location(f"make_data_of_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


def find_cases(made: Path) -> list[Case]:
    """All example configs, a case for each different model and layout.

    Args:
        made: folder that make_models wrote.
    """
    cases: dict[Any, Case] = {}
    for path in sorted(EXAMPLES.glob("**/*.yaml")):
        name = str(path.relative_to(EXAMPLES))
        config = load_either(path, [])
        model = Path(config.model.hf_path)
        world_size = 2
        if model.name in ("hf", "model"):  # of a run that makes it
            model = made / model.parts[model.parts.index("runs") + 1]
        elif model.name != "stories260K":
            world_size = RANKS.get(name, 8)
        if path.parent.name == "clusters":
            nodes, gpus = path.stem.rsplit("_", 1)[1].split("x")
            world_size = int(nodes) * int(gpus)
        if not model.is_absolute():
            model = (path.parent / model).resolve()
        key = (str(model), config.parallel, world_size)
        if key not in cases:
            job = load_job(path, [], world_size=world_size, model_folder=model)
            cases[key] = Case(model, job)
        cases[key].names.append(name)
    return list(cases.values())


def table_lines(cases: list[Case]) -> list[str]:
    """Of all cases; printed as they come."""
    from gdpo_megatron.planning.dry_run import shard_sums

    lines = [
        "| example | others of its kind | ranks | layout | places | parameters of the model "
        "| held by all places | seconds |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for case in cases:
        began = time.process_time()
        sums = shard_sums(case.job)
        seconds = time.process_time() - began  # of the processor, whatever else it has to do
        extra = sums.padding + sums.tied_copies
        verdict = "the same" if sums.is_whole else "NOT THE MODEL"
        if sums.is_whole and extra:
            verdict = f"the same + {extra:,}"
        cells = [
            f"`{case.names[0].removesuffix('.yaml')}`",
            str(len(case.names) - 1),
            str(case.job.world_size),
            layout_name(case.job),
            str(sums.num_places),
            f"{sums.model_parameters:,}",
            verdict,
            f"{seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run all, and write the table where the document has the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the document as it is")
    options = parser.parse_args()
    os.environ.setdefault("GDPO_ASSETS", str(ROOT.parent / "shared"))
    warnings.filterwarnings("ignore")
    import gdpo_megatron.planning.dry_run  # noqa: F401  # the import is not a part of the first case

    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        lines = table_lines(find_cases(Path(name)))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
    if not options.print:
        text = DOCUMENT.read_text()
        assert MARKS.search(text), f"{DOCUMENT} has no place for the table"
        DOCUMENT.write_text(MARKS.sub(lambda m: m[1] + "\n".join(lines) + m[2], text))


if __name__ == "__main__":
    main()
