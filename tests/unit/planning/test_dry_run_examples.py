"""Every example config: the shards of all places of its layout are the model, nothing else.

Models are built on fake tensors in their published shapes; configs of one model in one layout are
one case. Mixtures take minutes: they are `full`. Not covered: a step of each (test_dry_run.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.published_models import PUBLISHED

from gdpo_megatron.errors import InputError
from gdpo_megatron.planning.job import load_job

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))
from dry_run_table import EXAMPLES, Case, find_cases, make_models  # noqa: E402

STORIES = Path(os.environ.get("GDPO_ASSETS", ROOT.parent / "shared")) / "models/stories260K"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("models")
    for name, config in PUBLISHED.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    made = tmp_path_factory.mktemp("made")
    make_models(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDPO_MODELS", str(folder))
        patch.setenv("GDPO_ASSETS", str(STORIES.parents[1]))
        return find_cases(made)


needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")


@needs_stories
def test_every_example_is_in_a_case(cases: list[Case]):
    names = [name for case in cases for name in case.names]
    assert sorted(names) == sorted(str(it.relative_to(EXAMPLES)) for it in EXAMPLES.rglob("*.yaml"))
    layouts = {(case.job.tp, case.job.pp, case.job.ep) for case in cases}
    assert {(1, 1, 1), (2, 1, 1), (4, 4, 1), (2, 2, 8), (2, 1, 8)} <= layouts


def _check(cases: list[Case], mixtures: bool) -> None:
    from gdpo_megatron.planning.dry_run import shard_sums

    wrong: list[str] = []
    seen: set[Any] = set()
    for case in cases:
        of_places = (str(case.model), case.job.config.parallel)  # more replicas hold the same
        if (case.job.arch.moe is not None) is mixtures and of_places not in seen:
            sums = shard_sums(case.job)
            seen.add(of_places)
            if not sums.is_whole or sums.model_parameters != case.job.num_parameters:
                wrong.append(f"{case.names}: {sums}")
    assert seen and not wrong


@needs_stories
def test_shards_are_the_model(cases: list[Case]):
    _check(cases, mixtures=False)


@needs_stories
@pytest.mark.full
def test_shards_of_mixtures_are_the_model(cases: list[Case]):
    _check(cases, mixtures=True)


@needs_stories
def test_a_wrong_divisor_is_named_for_every_example(cases: list[Case]):
    """5 divides no model's heads, and no mixture's experts."""
    tp, ep = "parallel.tensor_model_parallel_size", "parallel.expert_model_parallel_size"
    for case in cases:
        keys = [(tp, "attention heads")] + [(ep, "experts")] * (case.job.arch.moe is not None)
        for key, what in keys:
            path, world_size = EXAMPLES / case.names[0], 5 * case.job.world_size
            with pytest.raises(InputError) as refused:
                load_job(path, [f"--{key}=5"], world_size=world_size, model_folder=case.model)
            told = "\n".join(refused.value.problems)
            assert re.search(rf"{key} 5 does not divide the model's \d+ {what}", told), told
