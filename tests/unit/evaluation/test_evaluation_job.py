"""An evaluation that is ended anywhere goes on, and finds byte for byte what one in a piece finds.

The engine answers by heart, another answer for each noise key; real engines: tests/e2e. Not
covered: several ranks (test_quickstart_flow.py has two).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import evaluate, save_answering_model, write_config
from support.jobs import read_jsonl

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation import job
from gdpo_megatron.evaluation.loaded import load_set
from gdpo_megatron.evaluation.sets import resolve_sets
from gdpo_megatron.evaluation.store import SetStore
from gdpo_megatron.validate import validate

NUM_ROWS = {"sums": 7, "products": 5}
N = 4
FILES = (
    "results.json",
    *(f"{name}{end}.jsonl" for name in ("data.eval", *NUM_ROWS) for end in ("", ".progress")),
)


class _Killed(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right two times of three, by noise; of the last sum it knows nothing."""
    folder = tmp_path_factory.mktemp("answering") / "model"
    signs = {"sums": "+", "products": "*"}
    answers = {
        f"{n} {sign} 3 =": [f"so \\boxed{{{n + 3 if sign == '+' else n * 3}}}"] * 2 + ["no idea"]
        for name, sign in signs.items()
        for n in range(NUM_ROWS[name] - (name == "sums"))
    }
    save_answering_model(folder, answers)
    return folder


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    for name, sign in (("sums", "+"), ("products", "*")):
        rows = [
            {
                "id": f"{name}/{n}",
                "prompt": f"{n} {sign} 3 =",
                "answer": str(n + 3 if sign == "+" else n * 3),
            }
            for n in range(NUM_ROWS[name])
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(it)}\n" for it in rows))
    return write_config(
        tmp_path,
        data={"eval": "sums.jsonl"},
        rewards=[{"name": "right", "type": "math_correctness"}],
        reward_suite={"num_workers": 1, "sample_timeout_seconds": 120},
        eval={
            "max_completion_tokens": 64,
            "samples_per_prompt": N,
            "correct": {"reward": "right", "pass_at_k": [1, 2, N]},
            "exceed_tokens": 10,
            "num_bootstrap": 50,
            "num_completions_per_chunk": 2 * N,
            "rewards": [{"name": "short", "type": "length", "args": {"limit": 10}}],
            "sets": [
                {"name": "sums", "data": "sums.jsonl", "rewards": ["right", "short"]},
                {"name": "products", "data": "products.jsonl", "samples_per_prompt": 2,
                 "correct": {"reward": "right"}},
            ],
        },
    )  # fmt: skip


def contents(folder: Path, run: str) -> dict[str, bytes]:
    return {name: (folder / run / "eval/model" / name).read_bytes() for name in FILES}


def ending(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Kill the next evaluation when it writes its chunk number `after`, between the two files."""
    append, count = SetStore.append, [0]

    def torn(store: SetStore, records: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == after:
            with store.samples_path.open("a") as file:
                file.write('{"prompt_id": "sums/')
            raise _Killed
        append(store, records, **more)

    monkeypatch.setattr(SetStore, "append", torn)


def test_it_goes_on_where_it_was_killed(config: Path, monkeypatch: pytest.MonkeyPatch):
    validate("eval", load_config(RLConfig, config), config.parent, 1)
    assert evaluate(config, "--run_dir", "whole")
    for after in (1, 3, 6):  # of 4 + 4 + 1 chunks
        with monkeypatch.context() as patch:
            ending(patch, after)
            with pytest.raises(_Killed):
                evaluate(config, "--run_dir", "broken")
    # Interrupted, too: it ends at a chunk, and says that it is not complete.
    with monkeypatch.context() as patch:
        patch.setattr(job.Interrupt, "agreed", lambda self: True)
        assert not evaluate(config, "--run_dir", "broken")
    assert evaluate(config, "--run_dir", "broken")
    assert contents(config.parent, "broken") == contents(config.parent, "whole")
    # What is complete is not made again, and stays.
    with monkeypatch.context() as patch:
        ending(patch, 1)
        assert evaluate(config, "--run_dir", "broken")
    assert contents(config.parent, "broken") == contents(config.parent, "whole")
    results = json.loads(contents(config.parent, "whole")["results.json"])
    samples = read_jsonl(config.parent / "whole/eval/model/sums.jsonl")
    check_results(results, samples)


def check_results(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """The figures of the set `sums`, once more from its completions."""
    found = results["sets"]["sums"]
    assert list(results["sets"]) == ["data.eval", "sums", "products"]
    assert [(it["prompt_id"], it["sample"]) for it in samples] == [
        (f"sums/{n}", sample) for n in range(NUM_ROWS["sums"]) for sample in range(N)
    ]
    right = [it["rewards"]["right"] for it in samples]
    assert 0 < sum(right) < len(right) - N and right[-N:] == [0.0] * N
    assert all(("boxed" in it["text"]) == it["rewards"]["right"] for it in samples)
    quantities = found["quantities"]
    assert quantities["pass@1"]["mean"] == pytest.approx(sum(right) / len(right))
    solved = [any(right[first : first + N]) for first in range(0, len(right), N)]
    assert quantities[f"pass@{N}"]["mean"] == pytest.approx(sum(solved) / len(solved))
    assert quantities["pass@1"]["mean"] < quantities["pass@2"]["mean"]
    long = [it["num_tokens"] > 10 for it in samples]
    assert quantities["exceed_share"]["mean"] == pytest.approx(sum(long) / len(long))
    assert quantities["reward/short"]["mean"] == pytest.approx(1 - sum(long) / len(long))
    assert found["events"] == {"right": {"no_answer": len(right) - int(sum(right))}}
    assert found["missing"]["right"] == {"num_not_applicable": 0, "num_invalid": 0, "reasons": {}}
    assert (found["num_prompts"], found["samples_per_prompt"]) == (NUM_ROWS["sums"], N)
    assert len(found["data"]["sha256"]) == 64 and found["num_left_out"] == 0
    # Sets have noise of their own.
    others = [results["sets"][name]["quantities"]["pass@1"] for name in ("data.eval", "products")]
    assert others[0]["mean"] != quantities["pass@1"]["mean"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--eval.temperature", "0.6"], "sampling.temperature 1.0, now 0.6"),
        (["--seed", "5"], "seed 1234, now 5"),
        (["--eval.sets.sums.num_prompts", "3"], "num_prompts 7, now 3"),
        (["--rewards.right.args.timeout", "2"], "rewards.right.args.timeout not there, now 2"),
    ],
)
def test_what_has_changed_is_refused_before_a_rank_is_started(
    config: Path, change: list[str], difference: str, model: Path
):
    loaded = load_config(RLConfig, config)
    tokenizer = load_tokenizer(model)
    for eval_set in resolve_sets(loaded):
        it = load_set(eval_set, loaded, config.parent, tokenizer)
        store = SetStore(config.parent / "run/eval/model", eval_set.name)
        store.open({"weights_sha256": "x", **it.identity})
    validate("eval", loaded, config.parent, 1)
    with pytest.raises(InputError) as caught:
        validate("eval", load_config(RLConfig, config, change), config.parent, 1)
    told = [it for it in caught.value.problems if "another eval.label" in it]
    assert told and all(difference in it for it in told)
    validate(
        "eval", load_config(RLConfig, config, [*change, "--eval.label", "b"]), config.parent, 1
    )


def test_other_weights_are_refused(config: Path, model: Path, tmp_path: Path):
    assert evaluate(config)
    other = tmp_path / "other/model"
    save_answering_model(other, {})
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="weights_sha256"):
        evaluate(config, "--model.hf_path", "other/model")
