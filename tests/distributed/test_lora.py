"""LoRA: the same adapters in every layout, and outside of the package the same model.

A single process is compared with plain torch (plain_lora.py), every other layout with the single
process, and each comparison must see the mistakes in rank_lora.py. What is exported is loaded by
transformers and by `peft`. Left out: GPUs, and with them Transformer Engine, whose layers a LoRA
run does not use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plain_lora
import pytest
import torch
from rank_harness import run_ranks

from gdpo_megatron.certify.family_models import MODELS, VOCAB_SIZE, save_model
from gdpo_megatron.certify.layout_models import make_rollouts
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

pytestmark = pytest.mark.distributed

Results = dict[str, dict[str, Any]]

FAMILIES = ("tied", "qwen2", "qwen3")
ALL = {"rank": 4, "alpha": 6.0}
ATTENTION = {"rank": 2, "alpha": 3.0, "target_modules": ("linear_qkv", "linear_proj")}
SCALE = 1.5

# Relative to max(1, |value|) and, for adapters, to their change; in brackets the largest measured.
LIMITS = {
    "losses": 1e-6,  # (9.4e-8)
    "grad_norms": 5e-6,  # (4.5e-7)
    "logprobs": 2e-6,  # (1.9e-7)
    "adapters": 2e-5,  # (2.6e-6) all together, Euclidean
    "adapters_of_a_tensor": 1e-4,  # (1.5e-5) the worst one
}

TWO_RANKS: dict[str, dict[str, Any]] = {
    **{f"{model} tp2": {"tp": 2} for model in FAMILIES},
    **{f"{model} pp2": {"pp": 2} for model in FAMILIES},
    "tied pp2, 0 and 4": {"pp": 2, "stages": "E|ttttL"},  # a stage with nothing to train
    "tied dp2": {},
    "tied tp2, tokens shared": {"tp": 2, "sp": True},
    "tied cp2": {"cp": 2},
    "tied pp2, two chunks": {"pp": 2, "vp": 2},
}
MUTANTS: dict[str, tuple[dict[str, Any], str]] = {
    "no_reduction_of_columns": ({"tp": 2}, "adapters"),
    "no_reduction_of_rows": ({"tp": 2}, "losses"),
    "copies_count_twice": ({"tp": 2}, "grad_norms"),
    "start_of_rank": ({"tp": 2}, "adapters"),
    "gradients_of_own_tokens": ({"tp": 2, "sp": True}, "adapters"),
}


def case(model: str, layout: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    common = {"lora": ALL, "dtype": "float32", "mutant": None, "updates": 4, "export": None}
    return {"model": model, "layout": dict(layout), **common, **changes}


def run(
    cases: Mapping[str, dict[str, Any]], world_size: int, models: Path, folder: Path
) -> Results:
    """Run all cases in one launch; what the ranks say is brought together by case."""
    ranks = run_ranks(
        "rank_lora:run", world_size, folder, models=str(models), cases=list(cases.values())
    )
    results: Results = {}
    for index, name in enumerate(cases):
        of_ranks = [rank[index] for rank in ranks]
        merged = {**of_ranks[0], "ranks": of_ranks, "logprobs": {}, "policy": []}
        for other in of_ranks:
            assert other["steps"] == of_ranks[0]["steps"], f"{name}: ranks report differently"
            merged["logprobs"] |= {s: torch.tensor(row) for s, row in other["logprobs"].items()}
            merged["policy"] = merged["policy"] or other.get("policy", [])
        results[name] = merged
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, one with biases, one with q/k norms, one with experts."""
    folder = tmp_path_factory.mktemp("lora_models")
    for name in (*FAMILIES, "qwen3_moe"):
        layers = 4 if name == "tied" else 3
        save_model(folder / name, **MODELS[name], initializer_range=0.04, num_hidden_layers=layers)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora_exports")


@pytest.fixture(scope="module")
def one_rank(models: Path, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = {name: case(name, {}, export=str(exports / f"{name} tp1")) for name in FAMILIES}
    cases["qwen3_moe"] = case("qwen3_moe", {}, lora=ATTENTION)
    cases["scale_without_rank"] = case("tied", {}, mutant="scale_without_rank")
    cases["bfloat16"] = case("tied", {}, dtype="bfloat16")
    return run(cases, 1, models, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two_ranks(models: Path, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = {name: case(name.split()[0], layout) for name, layout in TWO_RANKS.items()}
    for model in FAMILIES:
        cases[f"{model} tp2"]["export"] = str(exports / f"{model} tp2")
    cases["qwen3_moe ep2"] = case("qwen3_moe", {"ep": 2}, lora=ATTENTION)
    cases |= {name: case("tied", layout, mutant=name) for name, (layout, _) in MUTANTS.items()}
    cases["bfloat16"] = case("tied", {"tp": 2}, dtype="bfloat16")
    return run(cases, 2, models, tmp_path_factory.mktemp("two") / "run")


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(b))


def of_logprobs(a: Mapping[int, torch.Tensor], b: Mapping[int, torch.Tensor]) -> float:
    assert a.keys() == b.keys() == set(range(len(make_rollouts().completions)))
    pairs = [(a[s].double(), b[s].double()) for s in a if len(b[s])]
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def differences(result: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Distances by the names of LIMITS."""
    a, b, start = result["adapters"], expected["adapters"], expected["start"]
    assert a.keys() == b.keys() == start.keys()
    apart = {name: float((a[name] - b[name]).double().norm()) for name in b}
    change = {name: float((b[name] - start[name]).double().norm()) for name in b}
    assert all(change.values()), "an adapter has not moved"
    total = sum(x**2 for x in apart.values()) / sum(x**2 for x in change.values())
    pairs = list(zip(result["steps"], expected["steps"], strict=True))
    return {
        "losses": max(relative(x["loss"], y["loss"]) for x, y in pairs),
        "grad_norms": max(relative(x["grad_norm"], y["grad_norm"]) for x, y in pairs),
        "logprobs": of_logprobs(result["logprobs"], expected["logprobs"]),
        "adapters": total**0.5,
        "adapters_of_a_tensor": max(apart[name] / change[name] for name in b),
    }


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected["start"]:
        assert torch.equal(result["start"][name], expected["start"][name]), name
    measured = differences(result, expected)
    print({name: f"{value:.1e}" for name, value in measured.items()})
    assert {n: v for n, v in measured.items() if v > LIMITS[n]} == {}


# ---- what holds in every layout ------------------------------------------------------------------


def check_frozen(result: dict[str, Any], arch: Any) -> None:
    """It starts as the model, trains adapters only, and is the model again without them."""
    assert result["names"] == list(hf_shapes(arch))
    assert result["changed_at_start"] == [], "at the start the merged weights are the model's"
    for rank in result["ranks"]:
        assert rank["start_is_base"] and rank["own_weights_moved"] == []
        assert rank["reference_is_base"] and rank["switched_on_again"]
        assert all(".lora." in name for name in rank["trainable"])
    assert any(rank["moved"] for rank in result["ranks"])
    projections = ("_proj.weight",) if arch.moe is None else ("q_proj.weight", "k_proj.weight")
    adapted = [n for n in result["names"] if n.endswith(projections)]
    assert set(adapted) <= set(result["changed_at_end"]) <= set(hf_shapes(arch))
    assert all(n.endswith("_proj.weight") for n in result["changed_at_end"])
    zeros = [x for name, x in result["start"].items() if name.endswith("lora_B.weight")]
    assert zeros and not any(x.any() for x in zeros)


@pytest.mark.parametrize("model", [*FAMILIES, "qwen3_moe"])
def test_one_rank_trains_adapters_only(model: str, one_rank: Results, models: Path) -> None:
    result = one_rank[model]
    check_frozen(result, load_architecture(models / model))
    # Factors that layers share count once.
    distinct: list[torch.Tensor] = []
    for name, x in result["start"].items():
        if name.endswith("B.weight") or not any(torch.equal(x, y) for y in distinct):
            distinct.append(x)
    assert result["num_optimized"] == sum(x.numel() for x in distinct)


@pytest.mark.parametrize("model", FAMILIES)
def test_one_rank_is_plain_torch(model: str, one_rank: Results, models: Path) -> None:
    result = one_rank[model]
    plain = plain_lora.updates(models / model, result["start"], SCALE, make_rollouts())
    clipped = plain_lora.OPTIMIZER.max_grad_norm
    assert all(step["grad_norm"] > 2 * clipped for step in plain["steps"])
    assert_same(result, {"start": result["start"], **plain})


def test_scale_without_rank_is_seen(one_rank: Results) -> None:
    measured = differences(one_rank["scale_without_rank"], one_rank["tied"])
    assert measured["losses"] > 100 * LIMITS["losses"]


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, one_rank: Results, two_ranks: Results, models: Path) -> None:
    result, model = two_ranks[name], name.split()[0]
    check_frozen(result, load_architecture(models / model))
    assert_same(result, one_rank[model])


def test_attention_of_a_mixture_of_experts(
    one_rank: Results, two_ranks: Results, models: Path
) -> None:
    result = two_ranks["qwen3_moe ep2"]
    check_frozen(result, load_architecture(models / "qwen3_moe"))
    assert_same(result, one_rank["qwen3_moe"])
    assert not any("mlp" in name for name in result["adapters"])


def test_four_ranks(one_rank: Results, models: Path, tmp_path: Path) -> None:
    layout = {"tp": 2, "pp": 2}
    cases = {name: case(name, layout) for name in FAMILIES}
    for name, result in run(cases, 4, models, tmp_path / "run").items():
        check_frozen(result, load_architecture(models / name))
        assert_same(result, one_rank[name])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistake_is_seen(mutant: str, one_rank: Results, two_ranks: Results) -> None:
    """Each mistake exceeds the limit of what it breaks a hundred times over."""
    measured = differences(two_ranks[mutant], one_rank["tied"])
    print({name: f"{value:.1e}" for name, value in measured.items()})
    broken = MUTANTS[mutant][1]
    assert measured[broken] > 100 * LIMITS[broken]


def test_bfloat16(one_rank: Results, two_ranks: Results) -> None:
    """Nothing but rounding: TP2 is as near to TP1 as TP1 is to float32."""
    exact, single, tp2 = one_rank["tied"], one_rank["bfloat16"], two_ranks["bfloat16"]
    assert single["changed_at_start"] == tp2["changed_at_start"] == []
    rounding = of_logprobs(single["logprobs"], exact["logprobs"])
    between = of_logprobs(tp2["logprobs"], single["logprobs"])
    print(f"to float32 {rounding:.1e}, between {between:.1e}")
    assert 1e-4 < rounding < 5e-2 and between < 2 * rounding


# ---- checkpoints ---------------------------------------------------------------------------------


def test_another_layout_goes_on(models: Path, tmp_path: Path) -> None:
    """Saved at TP1; loaded into other adapters with another past, it is the run that went on."""
    arguments = {"models": str(models), "folder": str(tmp_path / "run"), "case": case("qwen2", {})}
    (saved,) = run_ranks("rank_lora:save_on_one", 1, tmp_path / "one", **arguments)
    layouts = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}}
    ranks = run_ranks("rank_lora:load_elsewhere", 2, tmp_path / "two", layouts=layouts, **arguments)
    for name in layouts:
        for rank in ranks:
            loaded = rank[name]["loaded"]
            assert loaded.keys() == saved["saved"].keys()
            assert all(torch.equal(loaded[n], x) for n, x in saved["saved"].items())
            for step, expected in zip(rank[name]["onward"], saved["onward"], strict=True):
                assert step["lr"] == expected["lr"]
                assert step["loss"] == pytest.approx(expected["loss"], rel=2e-6)
                assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-6)
            for n, x in saved["adapters"].items():
                moved = (x - saved["saved"][n]).norm()
                assert (rank[name]["adapters"][n] - x).norm() <= 1e-3 * moved, (name, n)


# ---- exports and sync ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
@pytest.mark.parametrize("model", FAMILIES)
def test_peft_loads_what_is_merged(
    model: str, layout: str, one_rank: Results, two_ranks: Results, exports: Path, models: Path
) -> None:
    """The base model with the adapters in `peft` is the merged export in transformers."""
    from peft import PeftModel

    folder = exports / f"{model} {layout}"
    config = json.loads((folder / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / model)
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    base = plain_lora.load(models / model)
    adapted = PeftModel.from_pretrained(base, folder / "peft")
    trained = (one_rank[model] if layout == "tp1" else two_ranks[f"{model} tp2"])["adapters"]
    found = {
        name.replace(".default", ""): x
        for name, x in adapted.state_dict().items()
        if "lora_" in name
    }
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], x) for name, x in trained.items())
    merged = plain_lora.load(folder / "hf")
    assert merged.state_dict().keys() == plain_lora.load(models / model).state_dict().keys()
    tokens = torch.arange(40).remainder(VOCAB_SIZE).unsqueeze(0)
    with torch.no_grad():
        a, b = adapted(tokens).logits, merged(tokens).logits
        plain = plain_lora.load(models / model)(tokens).logits
    apart = float(((a - b).abs() / b.abs().clamp(min=1)).max())
    print(f"{apart:.1e}; to the base {float((b - plain).abs().max()):.1e}")
    assert apart <= 2e-6
    assert float((b - plain).abs().max()) > 0.1, "the adapters do nothing"


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
@pytest.mark.parametrize("model", FAMILIES)
def test_engine_says_what_the_policy_says(
    model: str, layout: str, one_rank: Results, two_ranks: Results
) -> None:
    """The engine has merged weights, the policy adds its adapters to every layer's output."""
    result = one_rank[model] if layout == "tp1" else two_ranks[f"{model} tp2"]
    for rank in result["ranks"]:
        assert [len(row) for row in rank["engine"]] == [12] * 5
        for said, own in zip(rank["engine"], result["policy"], strict=True):
            assert said == pytest.approx(own, rel=5e-6, abs=5e-6)
