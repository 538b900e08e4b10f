"""The log-prob contract: four log-probs of one token, all of the same distribution.

| name             | whose                          | when                          |
|------------------|--------------------------------|-------------------------------|
| rollout_logprobs | the engine, version v          | while sampling                |
| old_logprobs     | the policy, before the update  | one forward pass, no gradient |
| ref_logprobs     | the frozen reference           | one forward pass, no gradient |
| logprobs         | the policy, being updated      | in the loss, with gradient    |

All four are log softmax(logits / T) of the sampled token with the rollout's temperature T, over the
whole vocabulary. A ratio of two distributions at different temperatures, or of a truncated and a
whole one, is wrong by a factor that no clip can tell from learning; so greedy sampling, top-p and
top-k are refused in training.

Without the old pass (`loss.old_logprobs`):

| term                     | recompute       | current                 | rollout                  |
|--------------------------|-----------------|-------------------------|--------------------------|
| ratio, clip, update_kl   | pi / pi_old     | 1; gradient of log pi   | pi / pi_rollout          |
| mismatch weight, metrics | old / rollout   | current / rollout       | 1; the ratio has it      |
| KL, direct               | pi, reference   | same                    | same                     |
| KL, unbiased: its ratio  | pi / pi_old     | 1; gradient of log pi   | pi / pi_rollout          |
| entropy                  | pi              | same                    | same                     |

`current` equals `recompute` in the first optimizer step of a rollout batch and in no later one.
"""

from __future__ import annotations

from gdpo_megatron.config.loss import LossConfig


def logprob_problems(
    loss: LossConfig,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    num_minibatches_per_step: int,
) -> list[str]:
    """Find what breaks the contract; for the validation of a run, before anything is built.

    Args:
        loss: the `loss` section.
        temperature: rollout.temperature.
        top_p: rollout.top_p; 1 keeps all.
        top_k: rollout.top_k; 0 keeps all.
        num_minibatches_per_step: train.num_minibatches_per_step.

    Returns:
        One line per problem; empty when the configuration can be trained.
    """
    problems: list[str] = []
    if temperature <= 0:
        problems.append(
            f"rollout.temperature is {temperature:g}: greedy samples have no log-probs to train "
            "on; use a temperature above 0, such as 1.0"
        )
    if top_p < 1:
        problems.append(
            f"rollout.top_p is {top_p:g}: the update would take the ratio of a truncated and a "
            "whole distribution; use 1.0 in training (eval.top_p is free)"
        )
    if top_k > 0:
        problems.append(
            f"rollout.top_k is {top_k}: the update would take the ratio of a truncated and a whole "
            "distribution; use 0 in training (eval.top_k is free)"
        )
    if loss.old_logprobs == "current" and num_minibatches_per_step > 1:
        problems.append(
            "loss.old_logprobs is 'current' with train.num_minibatches_per_step "
            f"{num_minibatches_per_step}: from the second optimizer step on, the policy before the "
            "update is gone; use old_logprobs: recompute (or rollout), or one minibatch"
        )
    return problems


def needs_old_pass(loss: LossConfig) -> bool:
    """Whether a forward pass of the policy before the update is needed."""
    return loss.old_logprobs == "recompute"


def needs_reference(loss: LossConfig) -> bool:
    """Whether the loss uses the reference."""
    return loss.kl_coef > 0
