"""The update of a step: minibatches over the trainer's mesh, and the loss that they minimise.

A minibatch is one optimizer step. Groups are dealt to the minibatches in turn; within a minibatch
the rows are balanced by cost over the data-parallel ranks, which may leave them unequal in number.
That changes nothing: the loss divides by what the whole minibatch holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from gdpo_megatron.algorithms import loss_denominator, policy_loss_terms
from gdpo_megatron.config.loss import LossConfig
from gdpo_megatron.data.batching import (
    MicroBatch,
    make_micro_batches,
    place_token_values,
    select_row_values,
)
from gdpo_megatron.data.micro_batching import MicroBatching, assign_rows, sequence_cost
from gdpo_megatron.distributed.exchange import ExchangedTokens
from gdpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchPlan:
    """Which samples a minibatch trains on, where, and what it is divided by; equal on all ranks.

    Args:
        samples: sample ids of each data-parallel rank.
        row_lengths: tokens of each of them, prompt and completion.
        num_loss_tokens: completion tokens that the model drew, over all ranks.
        num_loss_rows: rows, over all ranks.
    """

    samples: list[list[int]]
    row_lengths: list[list[int]]
    num_loss_tokens: int
    num_loss_rows: int


def plan_minibatches(
    loss_rows: Tensor,
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    num_loss_tokens: Sequence[int] | None = None,
    group_size: int,
    num_minibatches: int,
    dp_size: int,
    hidden_size: int,
) -> list[MinibatchPlan]:
    """Deal the step's samples to minibatches and data-parallel ranks.

    Args:
        loss_rows: [B] bool, samples that count.
        prompt_lengths: [P] tokens of each prompt.
        lengths: [B] tokens of each completion.
        num_loss_tokens: [B] those of them that the model drew; not given, all of them.
        group_size: G.
        num_minibatches: optimizer steps of the step.
        dp_size: data-parallel ranks.
        hidden_size: of the model, for the cost of a row.
    """
    num_loss_tokens = lengths if num_loss_tokens is None else num_loss_tokens
    plans: list[MinibatchPlan] = []
    counted = [s for s in range(len(lengths)) if loss_rows[s] and num_loss_tokens[s]]
    turn = {group: i for i, group in enumerate(dict.fromkeys(s // group_size for s in counted))}
    for minibatch in range(num_minibatches):
        samples = [s for s in counted if turn[s // group_size] % num_minibatches == minibatch]
        row_lengths = [prompt_lengths[s // group_size] + lengths[s] for s in samples]
        ranks = assign_rows([sequence_cost(n, hidden_size) for n in row_lengths], dp_size)
        plans.append(
            MinibatchPlan(
                samples=[[samples[i] for i in rows] for rows in ranks],
                row_lengths=[[row_lengths[i] for i in rows] for rows in ranks],
                num_loss_tokens=sum(num_loss_tokens[s] for s in samples),
                num_loss_rows=len(samples),
            )
        )
    return plans


@dataclass(frozen=True, slots=True)
class RolloutMicroBatch(MicroBatch):
    """A micro-batch with what the loss needs besides tokens.

    Args:
        advantages: [b] float32.
        rollout_logprobs: [b, S] float32, of the engine.
        old_logprobs: [b, S] of the policy before the update; None where they are not needed.
        ref_logprobs: [b, S] of the reference; None where there is none.
    """

    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


def rollout_micro_batches(
    plan: MinibatchPlan,
    tokens: Mapping[int, ExchangedTokens],
    prompts: Sequence[Prompt],
    advantages: Tensor,
    *,
    group_size: int,
    batching: MicroBatching,
    dp_rank: int,
) -> list[RolloutMicroBatch]:
    """Micro-batches of this data-parallel rank's part of a minibatch; at least one.

    Args:
        plan: the minibatch.
        tokens: sample id -> what of its completion, of this rank's samples.
        prompts: [P] the step's prompts.
        advantages: [B].
        group_size: G.
        batching: which rows share a micro-batch.
        dp_rank: this one.
    """
    samples = plan.samples[dp_rank]
    rows = [(prompts[s // group_size].token_ids, tokens[s][0]) for s in samples]
    masks = [tokens[s][2] for s in samples]
    logprobs = [list(compress(tokens[s][1], tokens[s][2])) for s in samples]
    own = advantages[torch.tensor(samples, dtype=torch.int64)].float()
    return [
        RolloutMicroBatch(
            tokens=batch.tokens,
            labels=batch.labels,
            position_ids=batch.position_ids,
            loss_mask=batch.loss_mask,
            lengths=batch.lengths,
            row_ids=batch.row_ids,
            advantages=select_row_values(own, batch),
            rollout_logprobs=place_token_values(logprobs, batch),
        )
        for batch in make_micro_batches(rows, batching, loss_masks=masks, peers=plan.row_lengths)
    ]


class PolicyLoss:
    """The `loss` section as the loss function of an update (see policy.LossFn).

    Args:
        config: the `loss` section.
        plan: the minibatch, for its denominator.
        max_completion_tokens: the rollout's limit.
    """

    def __init__(self, config: LossConfig, plan: MinibatchPlan, max_completion_tokens: int):
        self._config = config
        self._denominator = loss_denominator(
            config.aggregation,
            num_loss_tokens=plan.num_loss_tokens,
            num_loss_rows=plan.num_loss_rows,
            max_completion_tokens=max_completion_tokens,
        )
        self.sums, self.maxima = _statistics(config)

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the minibatch's loss, and its statistics."""
        assert isinstance(batch, RolloutMicroBatch)
        terms = policy_loss_terms(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_mask,
            self._config,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            entropy=entropy,
        )
        loss = terms.token_loss.sum() / self._denominator
        return loss, {"total": loss.detach(), **terms.sums, **terms.maxima}


def _statistics(config: LossConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what `policy_loss_terms` reports for a config, asked of the function itself."""
    one = torch.zeros(1, 1)
    terms = policy_loss_terms(
        one,
        one if config.old_logprobs == "recompute" else None,
        torch.zeros(1),
        one.bool(),
        config,
        ref_logprobs=one if config.kl_coef > 0 else None,
        rollout_logprobs=one,
        entropy=one,
    )
    return ("total", *terms.sums), tuple(terms.maxima)
