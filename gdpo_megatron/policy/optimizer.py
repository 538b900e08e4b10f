"""Megatron's optimizer and learning rate schedule for the policy.

AdamW comes from Transformer Engine or apex where they are installed, else from torch. torch keeps
`step` per parameter where the other two keep it per group, and Megatron's distributed optimizer is
written for those: `materialize_state` and `_carry_step` make up for the difference, so that a
resumed run is exactly the run that was saved.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from gdpo_megatron.config import schema
from gdpo_megatron.policy.megatron_api import build_config


def build_optimizer(
    config: schema.OptimizerConfig, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW with the distributed optimizer; biases and norms are not decayed (Megatron's rule)."""
    bf16 = bool(chunks[0].config.bf16)
    optimizer = get_megatron_optimizer(
        build_config(
            OptimizerConfig,
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            _carry_step(part)
    return optimizer


def build_scheduler(
    config: schema.OptimizerConfig, optimizer: MegatronOptimizer, total_steps: int
) -> OptimizerParamScheduler:
    """Linear warmup to `lr`, then down to `min_lr` at `total_steps` optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # The run's config rules: a longer num_steps on resume stretches the schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def clip_gradients(optimizer: MegatronOptimizer) -> float:
    """Scale the gradients down to the largest norm allowed; returns the norm they had.

    The part of Megatron's `step()` that comes before the weights change, which by itself goes on
    with a gradient that is not finite. Experts have an optimizer of their own: the norm is of all.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm() or 0.0)
    for part in _parts(optimizer):
        parameters: Any = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    return norm


def main_gradients(optimizer: MegatronOptimizer) -> list[Tensor]:
    """This rank's part of the reduced gradient, float32 copies.

    The ranks' parts are disjoint, and together the whole gradient: what several ranks hold is with
    one of them. Call after the backward pass and before the gradients are clipped.
    """
    optimizer.prepare_grads()
    parts: list[Any] = _parts(optimizer)
    return [g.float().clone() for part in parts for g in part.get_main_grads_for_grad_norm()]


def materialize_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state that it would create at its first step.

    Megatron can neither load an optimizer without one, nor save it: a run may be saved before any
    rollout was worth an update.
    """
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def sharded_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """State of all parts of an optimizer as Megatron's distributed checkpoint takes it.

    Tensors have the names of their parameters, whichever part they belong to: experts have an
    optimizer of their own in some layouts only, and a run may go on in another one. Megatron's own
    form names the parts, and holds the settings of each, which are the config's here.

    Args:
        optimizer: with state, see `materialize_state`.
        model: sharded state of the model.
        loading: whether it says what to load, or is saved.
    """
    parts = _parts(optimizer)
    states: list[dict[str, Any]] = [
        part.sharded_state_dict(
            model, is_loading=loading, metadata={"distrib_optim_sharding_type": _SHARDING}
        )
        for part in parts
    ]
    groups = [group for state in states for group in state["optimizer"]["param_groups"]]
    # Groups without parameters may have none, and so has an optimizer without an update.
    steps = {group["step"] for group in groups if group.get("step") is not None}
    assert len(steps) <= 1, f"parameter groups are at different steps: {steps}"
    return {
        "step": next(iter(steps), None),
        "param_state": {index: state["param_state"] for index, state in enumerate(states)},
    }


def load_sharded_state(optimizer: MegatronOptimizer, state: Mapping[str, Any]) -> None:
    """Take over what `sharded_state` of a saved run held."""
    step = {} if state["step"] is None else {"step": state["step"]}
    for index, part in enumerate(_parts(optimizer)):
        groups: list[dict[str, Any]] = part.state_dict()["optimizer"]["param_groups"]
        part.load_state_dict(
            {
                "optimizer": {"param_groups": [group | step for group in groups]},
                "param_state": state["param_state"][index],
                "param_state_sharding_type": _SHARDING,
            }
        )


_SHARDING = "fully_reshardable"


def _parts(optimizer: Any) -> list[DistributedOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _carry_step(optimizer: DistributedOptimizer) -> None:
    """Keep torch AdamW's `step` when Megatron loads a parameter's state.

    Megatron's `_set_main_param_and_optimizer_states` writes every key that the state has and is
    handed a dict without `step`; and it has set one step tensor for all parameters, which would
    then advance once per parameter.
    """
    original = type(optimizer)._set_main_param_and_optimizer_states

    def carry(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        state["step"] = state["step"].clone()
        return original(self, model_param, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = types.MethodType(carry, optimizer)
