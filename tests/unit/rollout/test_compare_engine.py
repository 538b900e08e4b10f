"""tools/compare_engine.py: a right engine passes; of a wrong one the first wrong point is named.

What is wrong is put into the engine: a tensor that is not the policy's, a norm that is changed
afterwards, an output layer that is left as it was, a cache that is off by one. One process, one
rank. Not covered: engines over several ranks, GPUs, mixtures of experts in vLLM.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.engines import engine_setup, one_rank
from support.sabotage import KeepsPackedOutputLayer, Named, Wrapped
from torch import Tensor

from gdpo_megatron.certify.family_models import EOS, save_model
from gdpo_megatron.checkpoint_cli import run_tool
from gdpo_megatron.compare_engine import (
    EngineComparison,
    add_compare,
    compare_engine,
    report_lines,
    run_compare,
)
from gdpo_megatron.layer_values import join_alone, megatron_model, open_model
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rollout.base import FinishedCompletion, engines
from gdpo_megatron.rollout.native.decoder import Decoder
from gdpo_megatron.types import Completion

ROOT = Path(__file__).resolve().parents[3]
LENGTH, NUM_TOKENS = 64, 6
PROMPTS = [list(range(20, 50)), [7, 200, EOS, 90]]
POINTS = [
    "embedding",
    *(f"layer {index} {part}" for index in range(2) for part in ("attention", "mlp")),
    "final norm",
    "logits",
    "log-probs",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model that vLLM takes on a CPU."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, "qwen3", hidden_size=128, head_dim=32, tie_word_embeddings=True)
    return path


@dataclass(frozen=True)
class Pair:
    """Both sides, without weights in the engine."""

    folder: Path
    policy: Any
    engine: Any

    def compare(self, engine: Any = None) -> EngineComparison:
        found = compare_engine(
            self.policy,
            engine or self.engine,
            self.folder,
            open_model(self.folder)[1],
            PROMPTS,
            num_tokens=NUM_TOKENS,
        )
        assert [row.name for row in found.rows] == POINTS
        assert found.num_tokens == sum(map(len, PROMPTS)) + len(PROMPTS) * NUM_TOKENS
        return found


def named_first(found: EngineComparison) -> str | None:
    return None if found.first is None else found.first.name


@pytest.fixture(scope="module")
def rank() -> Iterator[None]:
    """Joined once: Megatron's groups are of one process group."""
    detect_platform().prepare_megatron()
    with one_rank():
        yield
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module", params=["native", pytest.param("vllm", marks=pytest.mark.vllm)])
def pair(request: pytest.FixtureRequest, folder: Path, rank: None) -> Iterator[Pair]:
    platform = detect_platform()
    join_alone(platform)
    arch, checkpoint = open_model(folder)
    policy = megatron_model(platform, checkpoint, arch, LENGTH)
    setup = engine_setup(folder, max_sequence_length=LENGTH, max_concurrent_sequences=1)
    engine: Any = engines.get(request.param)(setup)
    yield Pair(folder, policy, engine)
    if request.param == "vllm":
        engine.close()


class Altered(Wrapped):
    """Takes one tensor other than it came."""

    def __init__(self, engine: Any, name: str):
        super().__init__(engine)
        self._name = name

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        self.inner.load_weights(((name, self._altered(name, x)) for name, x in tensors), version)

    def _altered(self, name: str, x: Tensor) -> Tensor:
        return x * 1.01 if name == self._name else x


def test_a_right_engine_differs_by_rounding(pair: Pair):
    for _ in range(2):  # a second sync, after sleep, and prompts that were seen
        found = pair.compare()
        assert found.first is None and not found.places
        rows = {row.name: row for row in found.rows}
        assert rows["embedding"].difference == 0
        assert 0 < rows["logits"].relative < 1e-4 and 0 < rows["logits"].rounding < 1e-4
        assert 0 < rows["log-probs"].difference < 1e-4
    lines = list(report_lines(found, "it", "float32", None))
    assert len(lines) == 3 + len(POINTS) + 1 and "beyond" not in "".join(lines[3:-1])
    assert lines[-1].startswith("no difference beyond rounding")


@pytest.mark.parametrize(
    ("tensor", "point"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.k_norm.weight", "layer 0 attention"),
        ("model.layers.0.mlp.down_proj.weight", "layer 0 mlp"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 attention"),
        ("model.layers.1.post_attention_layernorm.weight", "layer 1 mlp"),
        ("model.norm.weight", "final norm"),
    ],
)
def test_the_point_of_a_wrong_tensor_is_named(pair: Pair, tensor: str, point: str):
    found = pair.compare(Altered(pair.engine, tensor))
    assert named_first(found) == point
    # What comes before is as it should be, what comes after is not.
    assert list(found.places)[:1] == [point] and "logits" in found.places
    assert found.places[point][0] == 0  # the first prompt
    lines = list(report_lines(found, "it", "float32", None))
    (marked,) = [line for line in lines if line.endswith("<- first beyond its limit")]
    assert marked.split("  ")[1] == point
    assert lines[-1].startswith(f"first difference: {point}, ")


@pytest.mark.vllm
@pytest.mark.parametrize("pair", ["vllm"], indirect=True)
def test_an_output_layer_that_keeps_old_weights_is_named(pair: Pair):
    pair.compare(Altered(pair.engine, "model.embed_tokens.weight"))  # the old weights
    found = pair.compare(KeepsPackedOutputLayer(pair.engine))
    assert named_first(found) == "logits" and list(found.places) == ["logits", "log-probs"]
    assert found.places["logits"] == (0, len(PROMPTS[0]) - 1)  # from which the first is drawn
    assert pair.compare().first is None


@pytest.mark.parametrize("pair", ["native"], indirect=True)
def test_a_wrong_cache_is_named_with_its_token(pair: Pair):
    """Prompts are right; the first new token writes over the last one's keys and values."""
    original = Decoder.decode

    def off_by_one(self: Decoder, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        return original(self, tokens, lengths - 1, longest - 1)

    with mock.patch.object(Decoder, "decode", off_by_one):
        found = pair.compare()
    assert named_first(found) == "layer 0 attention"
    assert found.places["layer 0 attention"] == (0, len(PROMPTS[0]))
    last = list(report_lines(found, "it", "float32", None))[-1]
    assert last.endswith("prompt 0, from completion token 0 on")


class Misreporting(Wrapped):
    """Says that each token is less likely than it computed."""

    def poll(self) -> list[FinishedCompletion]:
        return [replace(it, completion=self._spoilt(it.completion)) for it in self.inner.poll()]

    def _spoilt(self, it: Completion) -> Completion:
        return replace(it, logprobs=tuple(x - 0.01 for x in it.logprobs))


def test_log_probs_are_compared_as_they_were_reported(pair: Pair):
    """What the engine computes is right."""
    assert list(pair.compare(Misreporting(pair.engine)).places) == ["log-probs"]


def test_no_number_is_beyond_any_limit(pair: Pair):
    class NoNumber(Altered):
        def _altered(self, name: str, x: Tensor) -> Tensor:
            return x * torch.nan if name == self._name else x

    found = pair.compare(NoNumber(pair.engine, "model.layers.1.mlp.up_proj.weight"))
    assert named_first(found) == "layer 1 mlp"


# ---- the command line ----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        run_tool("", add_compare, run_compare, [*map(str, arguments)])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    return said.err


def test_bad_input_gives_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    native = ("--engine", "native")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "long").write_text("word " * 200)
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((folder, "--engine", "vlm"), "no rollout engine named 'vlm'; did you mean 'vllm'"),
        ((tmp_path / "nowhere", *native), "nowhere"),
        ((folder, *native, "--limit", "0"), "--limit is 0.0; needs to be above 0"),
        ((folder, *native, "--prompts", tmp_path / "none"), "--prompts: no file"),
        ((folder, *native, "--prompts", tmp_path / "empty"), "has no line with text"),
        ((folder, *native, "--prompts", tmp_path / "long"), "the model takes 1 to 112 and 16"),
        ((folder, *native, "--num-tokens", "128"), "the model has 128 positions"),
    ]
    for arguments, message in cases:
        said = refused(capsys, *arguments)
        assert message in said and said.count("\n") == 1


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/compare_engine.py"), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_tool(folder: Path, tmp_path: Path):
    """In bfloat16, on texts; with a limit that nothing keeps it ends with 1."""
    (tmp_path / "prompts").write_text("the cat sat\n\non the mat and the hat\n")
    arguments = (folder, "--engine", "native", "--prompts", tmp_path / "prompts")
    outcome = run(*arguments, "--dtype", "bfloat16")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "native and Megatron in bfloat16" in outcome.stdout
    outcome = run(*arguments, "--limit", "1e-12")
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "where 1.00e-12 is allowed" in outcome.stdout.splitlines()[-1]


@pytest.mark.vllm
def test_the_tool_with_vllm(folder: Path, model_folder: Callable[[str], Path]):
    outcome = run(folder, "--engine", "vllm")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "no difference beyond rounding" in outcome.stdout
    outcome = run(model_folder("gqa"), "--engine", "vllm")  # heads of size 16
    assert outcome.returncode == 2 and "heads of size" in outcome.stderr.splitlines()[-1]
