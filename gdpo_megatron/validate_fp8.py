"""What can be known to be wrong about `precision.fp8` before a rank starts (see validate.py)."""

from __future__ import annotations

from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.platform import detect_platform

_MULTIPLE = 16  # of the kernels; policy/fp8.py asserts it


def fp8_problems(
    job: str,
    config: RLConfig | SFTConfig,
    arch: ModelArchitecture | None,
    *,
    elsewhere: bool = False,
) -> list[str]:
    """Problems of the section, of its machine and of its model.

    Args:
        job: "train", "sft" or "eval"; the last one has no update.
        config: the loaded config.
        arch: of the model; None where it could not be read.
        elsewhere: it will run on other machines, of which nothing is asked here.
    """
    fp8 = config.precision.fp8
    if fp8 is None or job == "eval":
        return []
    problems: list[str] = []
    missing = None if elsewhere else detect_platform().missing_for_fp8()
    if missing is not None:
        problems.append(f"precision.fp8: {fp8.backend} needs {missing}; set precision.fp8: null")
    if arch is None:
        return problems
    if arch.moe is not None:
        return [
            *problems,
            f"precision.fp8: {arch.family} has experts, whose layers are not built in FP8; "
            "set precision.fp8: null",
        ]
    first, last = fp8.num_first_layers_in_params_dtype, fp8.num_last_layers_in_params_dtype
    if first + last >= arch.num_layers:
        problems.append(
            f"precision.fp8: num_first_layers_in_params_dtype {first} and "
            f"num_last_layers_in_params_dtype {last} leave none of the model's "
            f"{arch.num_layers} layers for FP8; lower them, or set precision.fp8: null"
        )
    return problems + _sizes(arch, config.parallel.tensor_model_parallel_size)


def _sizes(arch: ModelArchitecture, tp: int) -> list[str]:
    """Sizes of a rank's matrices that the kernels cannot multiply."""
    heads = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    shared = {
        "outputs of linear_qkv": heads + 2 * keys,
        "inputs of linear_proj": heads,
        "outputs of linear_fc1": 2 * arch.intermediate_size,
        "inputs of linear_fc2": arch.intermediate_size,
    }
    sizes = {"hidden_size": (arch.hidden_size, "")} | {
        name: (size // tp, f" ({size} shared by {tp} ranks)" if tp > 1 else "")
        for name, size in shared.items()
        if size % tp == 0  # else it is told already
    }
    return [
        f"precision.fp8: the model's {name} {'are' if ' ' in name else 'is'} {size}{how}, no "
        f"multiple of {_MULTIPLE}, which FP8 kernels need; set precision.fp8: null"
        + (", or a smaller parallel.tensor_model_parallel_size" if how else "")
        for name, (size, how) in sizes.items()
        if size % _MULTIPLE
    ]
