"""Memory keys change no number: what is recomputed, chunked, freed or swapped is what it was.

Each variant is compared with the same layout without it, on the same rank, gradient by gradient;
that the layouts are equal to each other is in test_layouts.py. Recomputation is the same operations
once more, so everything is equal bit for bit; chunks are other shapes of the same matrix products,
so rounding differs. Peak memory is what torch's allocator reports, with bounds worked out by hand.
Left out: GPUs, Transformer Engine's layers, memory of several processes together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_harness import run_ranks
from torch import Tensor

pytestmark = pytest.mark.distributed

Case = Mapping[str, Any]
Results = list[dict[str, dict[str, Any]]]

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK = {**FULL, "recompute_method": "block"}
MLP = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
ATTENTION = {**MLP, "recompute_modules": ("core_attn",)}
BOTH = {**MLP, "recompute_modules": ("core_attn", "mlp")}
MOE = {**MLP, "recompute_modules": ("core_attn", "moe")}
CHUNKS = {"logprob_chunk_tokens": 7}

# Relative to the largest value of a tensor; in brackets the largest measured in any layout.
LIMITS = {
    "logprobs": 1e-6,  # (1.3e-7)
    "gradients": 5e-6,  # (2.4e-7) of the first update
    "weights": 1e-4,  # (3.3e-6) after it, and the second update's gradients and log-probs
}

VARIANTS: dict[str, Case] = {
    "plain": {},
    "full": {"memory": FULL},
    "both": {"memory": BOTH},
    "chunks": {"memory": CHUNKS},
    "block and chunks": {"memory": {**BLOCK, **CHUNKS}},
}
EXPERTS: dict[str, Case] = {
    "plain": {},
    "full": {"memory": FULL},
    "moe": {"memory": MOE},
    "chunks": {"memory": CHUNKS},
}
MORE: dict[str, Case] = {
    **VARIANTS,
    "core_attn": {"memory": ATTENTION},
    "mlp": {"memory": MLP},
    "uniform, 5 layers": {"memory": {**FULL, "recompute_num_layers": 5}},
    "one chunk": {"memory": {"logprob_chunk_tokens": 1000}},
    "mistake: other_inputs_recomputed": {"memory": MLP, "mutant": "other_inputs_recomputed"},
    "mistake: last_chunk_without_weight_gradient": {
        "memory": CHUNKS,
        "mutant": "last_chunk_without_weight_gradient",
    },
}


def variants_of(options: Case) -> dict[str, Case]:
    return {name: {**case, **options} for name, case in VARIANTS.items()}


ONE_RANK: dict[str, dict[str, Any]] = {
    "tied": {"model": "tied", "layout": {}, "variants": MORE},
    "untied": {"model": "untied", "layout": {}, "variants": VARIANTS},
    "log-probs alone": {
        "model": "tied",
        "layout": {},
        "variants": variants_of({"entropy": False}),
    },
    "packed": {"model": "tied", "layout": {}, "variants": variants_of({"packing": True})},
    "lora": {
        "model": "tied",
        "layout": {},
        "variants": {
            **variants_of({"lora": True}),
            "mistake: no_gradient_asked": {
                "lora": True,
                "memory": BLOCK,
                "mutant": "no_gradient_asked",
            },
        },
    },
    "bfloat16": {"model": "tied", "layout": {}, "variants": variants_of({"dtype": "bfloat16"})},
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp2": {
        "model": "tied",
        "layout": {"tp": 2},
        "variants": {
            **VARIANTS,
            "mistake: hidden_gradient_of_one_rank": {
                "memory": CHUNKS,
                "mutant": "hidden_gradient_of_one_rank",
            },
        },
    },
    "tp2 sp": {
        "model": "untied",
        "layout": {"tp": 2, "sp": True},
        "variants": {
            **VARIANTS,
            "mistake: hidden_gradient_scattered": {
                "memory": CHUNKS,
                "mutant": "hidden_gradient_scattered",
            },
        },
    },
    "tp2 sp packed": {
        "model": "tied",
        "layout": {"tp": 2, "sp": True},
        "variants": variants_of({"packing": True}),
    },
    "pp2": {"model": "tied", "layout": {"pp": 2}, "variants": VARIANTS},
    "pp2 vp2": {"model": "tied", "layout": {"pp": 2, "vp": 2}, "variants": VARIANTS},
    "cp2": {"model": "tied", "layout": {"cp": 2}, "variants": VARIANTS},
    "dp2 overlap": {
        "model": "tied",
        "layout": {"overlap": True},
        "variants": VARIANTS,
    },
    "ep2": {"model": "experts", "layout": {"ep": 2}, "variants": EXPERTS},
    "tp2 sp lora": {
        "model": "tied",
        "layout": {"tp": 2, "sp": True},
        "variants": variants_of({"lora": True}),
    },
}


def run(world_size: int, layouts: Mapping[str, Any], models: Path, folder: Path) -> dict[str, Any]:
    """Layout -> variant -> results of each rank."""
    ranks = run_ranks(
        "rank_memory:compare",
        world_size,
        folder,
        models=str(models),
        layouts=list(layouts.values()),
    )
    return {
        name: {variant: [rank[i][variant] for rank in ranks] for variant in entry["variants"]}
        for i, (name, entry) in enumerate(layouts.items())
    }


@pytest.fixture(scope="module")
def one_rank(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, ONE_RANK, models, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(2, TWO_RANKS, models, tmp_path_factory.mktemp("two") / "run")


def tensors(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, value) of everything that a rank reports."""
    for key in ("logprobs", "logprobs_after"):
        for i, x in enumerate(result[key]):
            yield "logprobs" if key == "logprobs" else "weights", f"{key} {i}", x
    for i, step in enumerate(result["steps"]):
        yield "logprobs", f"statistics {i}", torch.tensor(list(step.values()), dtype=torch.float64)
    for i, gradients in enumerate(result["gradients"]):
        for name, x in gradients.items():
            yield "gradients" if i == 0 else "weights", f"gradient {i} {name}", x
    for name, x in result["weights"].items():
        yield "weights", name, x


def differences(result: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference relative to a tensor's largest value, by the names of LIMITS."""
    found = dict.fromkeys(LIMITS, 0.0)
    for (kind, name, a), (_, same, b) in zip(tensors(result), tensors(plain), strict=True):
        assert name == same and a.shape == b.shape and torch.isfinite(a).all()
        scale = float(b.abs().max()) or 1.0
        found[kind] = max(found[kind], float((a.double() - b.double()).abs().max()) / scale)
    return found


def check(name: str, variants: Mapping[str, list[Any]], cases: Mapping[str, Case]) -> None:
    for variant, of_ranks in variants.items():
        if variant == "plain" or variant.startswith("mistake"):
            continue
        chunked = "logprob_chunk_tokens" in cases[variant]["memory"]
        for result, plain in zip(of_ranks, variants["plain"], strict=True):
            assert sum(len(g) for g in result["gradients"]) > 0
            measured = differences(result, plain)
            print(name, variant, {k: f"{v:.1e}" for k, v in measured.items()})
            if chunked:
                assert {k: v for k, v in measured.items() if v > LIMITS[k]} == {}, variant
            else:
                assert set(measured.values()) == {0.0}, variant


@pytest.mark.parametrize("layout", [name for name in ONE_RANK if name != "bfloat16"])
def test_one_rank(layout: str, one_rank: dict[str, Any]) -> None:
    check(layout, one_rank[layout], ONE_RANK[layout]["variants"])


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks(layout: str, two_ranks: dict[str, Any]) -> None:
    check(layout, two_ranks[layout], TWO_RANKS[layout]["variants"])


def test_bfloat16(one_rank: dict[str, Any]) -> None:
    """Recomputation is exact; of chunks, each part of the output layer's gradient is rounded."""
    results = {name: ranks[0] for name, ranks in one_rank["bfloat16"].items()}
    for variant in ("full", "both"):
        assert set(differences(results[variant], results["plain"]).values()) == {0.0}
    found = differences(results["chunks"], results["plain"])
    print(found)
    assert found["logprobs"] < 2**-8 and 0 < found["gradients"] < 2**-6


MISTAKES = [
    (layout, variant)
    for layouts in (ONE_RANK, TWO_RANKS)
    for layout, entry in layouts.items()
    for variant in entry["variants"]
    if variant.startswith("mistake")
]


@pytest.mark.parametrize(("layout", "variant"), MISTAKES)
def test_mistake_is_seen(
    layout: str, variant: str, one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    results = (one_rank | two_ranks)[layout]
    measured = [
        differences(result, plain)["gradients"]
        for result, plain in zip(results[variant], results["plain"], strict=True)
    ]
    print(measured)
    assert max(measured) > 1000 * LIMITS["gradients"]


# ---- between updates -----------------------------------------------------------------------------

SWAPPED: dict[str, tuple[dict[str, Any], int]] = {
    "dp2": ({"model": "tied", "layout": {}}, 2),
    "dp2 overlap": ({"model": "tied", "layout": {"overlap": True}}, 2),
    "cp2": ({"model": "tied", "layout": {"cp": 2}}, 2),
    "tp2 sp": ({"model": "untied", "layout": {"tp": 2, "sp": True}}, 1),
    "pp2": ({"model": "tied", "layout": {"pp": 2}}, 1),
    "pp2 vp2": ({"model": "tied", "layout": {"pp": 2, "vp": 2}}, 1),
    "dp2 bfloat16": ({"model": "tied", "layout": {}, "dtype": "bfloat16"}, 2),
    "ep2": ({"model": "experts", "layout": {"ep": 2}}, 0),
}
"""Layout -> case, and how many ranks share the reference's weights; experts are shared by fewer."""


@pytest.fixture(scope="module")
def swapped(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = {name: case for name, (case, _) in SWAPPED.items()}
    cases["mistake"] = {**cases["dp2"], "mutant": "parts_not_gathered"}
    folder = tmp_path_factory.mktemp("swapped") / "run"
    ranks = run_ranks(
        "rank_memory:references", 2, folder, models=str(models), layouts=list(cases.values())
    )
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(cases)}


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", SWAPPED)
def test_swapped_reference(layout: str, swapped: dict[str, list[Any]]) -> None:
    """The reference says what a model of its own says, and the policy does not notice."""
    num_ranks = SWAPPED[layout][1]
    assert any(result["separate"] for result in swapped[layout])
    for result in swapped[layout]:
        assert same(result["start"], result["separate"])
        assert same(result["after_update"], result["separate"])
        assert same(result["policy"], result["right_policy"])
        if result["policy"]:
            assert not same(result["policy"], result["separate"])
        for name, weight in result["weights"].items():
            assert torch.equal(weight, result["right_weights"][name]), name
        if num_ranks:
            assert result["num_bytes"] * num_ranks == result["buffer_bytes"]
        else:
            assert result["buffer_bytes"] / 2 < result["num_bytes"] < result["buffer_bytes"]


def test_part_of_a_reference_is_seen(swapped: dict[str, list[Any]]) -> None:
    for result in swapped["mistake"]:
        for mine, right in zip(result["after_update"], result["separate"], strict=True):
            assert float((mine - right).abs().max()) > 1e-3


FREED: dict[str, dict[str, Any]] = {
    "dp2 overlap": {"model": "tied", "layout": {"overlap": True}},
    "dp2 bfloat16": {"model": "tied", "layout": {}, "dtype": "bfloat16"},
    "tp2 sp lora": {"model": "tied", "layout": {"tp": 2, "sp": True}, "lora": True},
    "pp2 vp2": {"model": "tied", "layout": {"pp": 2, "vp": 2}},
    "ep2": {"model": "experts", "layout": {"ep": 2}},
    "mistake": {"model": "tied", "layout": {}, "mutant": "buffers_stay"},
}


@pytest.fixture(scope="module")
def freed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("freed")
    ranks = run_ranks(
        "rank_memory:freed",
        2,
        folder / "run",
        models=str(models),
        folder=str(folder / "checkpoints"),
        layouts=list(FREED.values()),
    )
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(FREED)}


@pytest.mark.parametrize("layout", [name for name in FREED if name != "mistake"])
def test_freed_gradient_buffers(layout: str, freed: dict[str, list[Any]]) -> None:
    """No byte of them is left between updates; gradients, weights and checkpoints are the same."""
    for result in freed[layout]:
        assert result["whole"] > 0 and result["held"] == [0, result["whole"]] * 2
        for mine, right in zip(result["gradients"], result["right_gradients"], strict=True):
            assert mine.keys() == right.keys() and len(mine) > 0
            assert all(torch.equal(x, right[name]) for name, x in mine.items())
        for mine, right in (("weights", "right_weights"), ("resumed", "went_on")):
            for name, weight in result[mine].items():
                assert torch.equal(weight, result[right][name]), (mine, name)


def test_buffers_that_stay_are_seen(freed: dict[str, list[Any]]) -> None:
    for result in freed["mistake"]:
        assert result["held"] == [result["whole"]] * 4


# ---- peak memory ---------------------------------------------------------------------------------

VOCABULARY, HIDDEN, FFN, NUM_LAYERS, NUM_HEADS = 8192, 64, 512, 4, 4
SIZES = {"rows": 4, "tokens": 256}
NUM_TOKENS = SIZES["rows"] * SIZES["tokens"]
FLOAT = 4
PEAKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"logprob_chunk_tokens": 64},
    "mlp": {"logprob_chunk_tokens": 64, **MLP},
    "full": {"logprob_chunk_tokens": 64, **FULL},
    "block of 2": {"logprob_chunk_tokens": 64, **BLOCK, "recompute_num_layers": 2},
}


ATTENTION_PEAKS: dict[str, dict[str, Any]] = {
    "kept": {"logprob_chunk_tokens": 64},
    "core_attn": {"logprob_chunk_tokens": 64, **ATTENTION},
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a config whose logits are larger than its layers."""
    folder = tmp_path_factory.mktemp("wide")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measured(
    model: Path, folder: Path, cases: Mapping[str, Case], world_size: int = 1, **options: Any
) -> dict[str, int]:
    """Case -> peak of the first rank."""
    result = run_ranks(
        "rank_memory:peaks",
        world_size,
        folder / "run",
        python=sys.executable,  # not forked: see support/peak_memory.py
        config=str(model),
        sizes=SIZES,
        cases=dict(cases),
        **options,
    )[0]
    print({name: f"{value / 2**20:.2f} MiB" for name, value in result.items()})
    return result


@pytest.fixture(scope="module")
def peaks(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return measured(wide_model, tmp_path_factory.mktemp("peaks"), PEAKS)


def test_peak_of_chunks(peaks: dict[str, int]) -> None:
    """Whole: the logits, and two float32 tensors of their shape in the backward pass."""
    logits = NUM_TOKENS * VOCABULARY * FLOAT
    of_chunk = 64 * VOCABULARY * FLOAT
    gradient = VOCABULARY * HIDDEN * FLOAT
    assert peaks["plain"] > 3 * logits
    # Instead of them those of a chunk, and the output layer's gradient.
    assert peaks["plain"] - peaks["chunks"] > 3 * (logits - of_chunk) - 3 * gradient - logits / 4


def test_peak_of_recomputation(peaks: dict[str, int]) -> None:
    """What layers keep for their backward pass, of all layers but the one that is recomputed."""
    tokens = NUM_TOKENS * FLOAT
    others = NUM_LAYERS - 1
    # Gate and up projection, the gate's activation, their product.
    mlp = tokens * 4 * FFN
    assert peaks["chunks"] - peaks["mlp"] > 0.9 * others * mlp
    # Everything but the layer's input.
    assert peaks["chunks"] - peaks["full"] > 0.9 * others * (mlp + 6 * tokens * HIDDEN)
    saved = (peaks["chunks"] - peaks["block of 2"]) / (peaks["chunks"] - peaks["full"])
    assert 0.5 < saved < 0.8  # two of four layers are kept, where three were not


def test_peak_of_attention(wide_model: Path, tmp_path: Path) -> None:
    """What attention has of its own over packed rows: the results of single rows."""
    of_layer = NUM_TOKENS * HIDDEN * FLOAT
    peaks = measured(wide_model, tmp_path / "packed", ATTENTION_PEAKS, layout={"packing": True})
    assert peaks["kept"] - peaks["core_attn"] > 0.9 * (NUM_LAYERS - 1) * of_layer
