"""Scheduling of requests over the decoder: continuous batching with compaction.

Active requests fill rows 0 .. n-1 of the KV cache. A finished one leaves at once: the last active
row moves into its place, so a step never decodes for rows that are done. Waiting requests enter
when enough rows are free; equal prompts that enter together are prefilled once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.data.tokenizer import IncrementalDecoder, Tokenizer
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutRequest,
    SamplingParams,
)
from gdpo_megatron.rollout.native.decoder import Decoder
from gdpo_megatron.rollout.native.sampler import KeyedNoise, sample, split_keys
from gdpo_megatron.rollout.native.weights import NativeWeights
from gdpo_megatron.rollout.observe import OnValue
from gdpo_megatron.types import Completion, FinishReason

_PREFILL_TOKENS = 16384  # prompt tokens of one prefill pass, padding included; bounds its memory


@dataclass(slots=True)
class _Active:
    """Bookkeeping of one row on the host."""

    request: RolloutRequest
    decoder: IncrementalDecoder | None  # only where there are stop strings
    text: str = ""  # its end, as far as a stop string may reach back

    def feed(self, token: int, stop: Sequence[str]) -> bool:
        """Take the next token; whether it completes a stop string."""
        assert self.decoder is not None
        self.text += self.decoder.feed(token)
        matched = any(s in self.text for s in stop)
        keep = max(len(s) for s in stop) - 1
        self.text = self.text[-keep:] if keep else ""
        return matched


@dataclass(slots=True)
class _Rows:
    """Device state of all rows; row i belongs to the i-th active request."""

    last_tokens: Tensor
    lengths: Tensor  # tokens in the cache; the last token drawn is not in it yet
    counts: Tensor  # completion tokens drawn
    limits: Tensor
    keys: Tensor
    tokens: Tensor  # [rows, T]
    logprobs: Tensor  # [rows, T]
    host_lengths: list[int] = field(default_factory=list)  # of the active rows, as in `lengths`

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.last_tokens,
            self.lengths,
            self.counts,
            self.limits,
            self.keys,
            self.tokens,
            self.logprobs,
        )

    def move(self, sources: list[int], targets: list[int]) -> None:
        for tensor in self.tensors():
            tensor[targets] = tensor[sources]


class NativeEngine:
    """`RolloutEngine` that decodes with this package's own loop.

    Args:
        arch: shape of the model.
        tokenizer: for text and stop strings.
        mesh: this rank's place among the engines.
        platform: where to run.
        dtype: of weights and cache.
        max_sequence_length: prompt and completion together.
        max_concurrent_sequences: rows of the KV cache.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        tokenizer: Tokenizer,
        *,
        mesh: EngineMesh,
        platform: Platform,
        dtype: torch.dtype,
        max_sequence_length: int,
        max_concurrent_sequences: int,
    ):
        self._arch, self._tokenizer, self._mesh = arch, tokenizer, mesh
        self._device, self._dtype = platform.device, dtype
        self._max_length, self._max_rows = max_sequence_length, max_concurrent_sequences
        self._noise = KeyedNoise(arch.vocab_size, platform.device)
        self._decoder: Decoder | None = None
        self._rows: _Rows | None = None
        self._sampling: SamplingParams | None = None
        self._stop_ids = torch.empty(0, dtype=torch.int64)
        self._pending: deque[RolloutRequest] = deque()
        self._active: list[_Active] = []
        self._finished: list[FinishedCompletion] = []
        self._ids: set[int] = set()
        self.policy_version: int | None = None
        self.num_generated_tokens = 0

    @property
    def num_unfinished(self) -> int:
        """Requests that `poll` has not returned yet."""
        return len(self._ids)

    # ---- weights and memory ------------------------------------------------------------------

    def wake(self) -> None:
        """Allocate the weights."""
        if self._decoder is None:
            weights = NativeWeights(
                self._arch, self._mesh.tp_rank, self._mesh.tp_size, self._dtype, self._device
            )
            self._decoder = Decoder(weights, self._max_length, self._mesh.tp_group)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights; see RolloutEngine."""
        self._require_idle()
        self.wake()
        assert self._decoder is not None
        self.policy_version = None  # a failed load must not leave a mixture under a version
        self._decoder.drop_cache()
        self._decoder.weights.load(tensors)
        self.policy_version = version

    def resident_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights as they are; see ReadableEngine."""
        assert self._decoder is not None
        yield from self._decoder.weights.whole_tensors(self._mesh.tp_group)

    @contextmanager
    def observed(self, on_value: OnValue) -> Iterator[None]:
        """Report what its forward passes compute; see ObservableEngine."""
        self._require_idle()
        assert self._decoder is not None
        self._decoder.on_value = on_value
        try:
            yield
        finally:
            self._decoder.on_value = None

    def sleep(self) -> None:
        """Free weights and cache."""
        self._require_idle()
        self._decoder = self._rows = self.policy_version = None

    def _require_idle(self) -> None:
        if self._ids:
            raise RuntimeError(f"{len(self._ids)} requests are unfinished; poll or abort them")

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        """Queue requests; see RolloutEngine."""
        if self.policy_version is None:
            raise RuntimeError("no weights are loaded; call load_weights first")
        if self._ids and sampling != self._sampling:
            raise ValueError("unfinished requests were submitted with other sampling parameters")
        ids = set(self._ids)  # nothing is queued unless all of them can be
        for request in requests:
            if request.request_id in ids:
                raise ValueError(f"request_id {request.request_id} is in use")
            if not 0 < len(request.prompt_token_ids) < self._max_length:
                raise ValueError(
                    f"request {request.request_id}: a prompt of {len(request.prompt_token_ids)} "
                    f"tokens does not fit max_sequence_length {self._max_length}"
                )
            if request.num_carried >= self._limit(request, sampling):
                raise ValueError(
                    f"request {request.request_id}: nothing is left to generate after "
                    f"{request.num_carried} carried tokens"
                )
            ids.add(request.request_id)
        self._ids, self._sampling = ids, sampling
        self._stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64).to(self._device)
        self._pending.extend(requests)

    def _limit(self, request: RolloutRequest, sampling: SamplingParams) -> int:
        """Tokens that its completion may have."""
        room = self._max_length - len(request.prompt_token_ids)
        return min(sampling.max_completion_tokens, room)

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests; see RolloutEngine."""
        wanted = set(request_ids)
        for request in [r for r in self._pending if r.request_id in wanted]:
            self._pending.remove(request)
            carried = request.carried
            tokens, logprobs = (carried.token_ids, carried.logprobs) if carried else ((), ())
            self._report(request, tokens, logprobs, "abort")
        rows = [i for i, a in enumerate(self._active) if a.request.request_id in wanted]
        self._release(rows, dict.fromkeys(rows, "abort"))

    def poll(self) -> list[FinishedCompletion]:
        """Generate until something finishes; see RolloutEngine."""
        while not self._finished and self._ids:
            free = self._max_rows - len(self._active)
            # Prefilling a few rows at a time would stall the many; wait for an eighth to be free.
            if self._pending and (free >= max(1, self._max_rows // 8) or not self._active):
                self._admit(free)
            else:
                self._decode_step()
        finished, self._finished = self._finished, []
        self._ids.difference_update(it.request_id for it in finished)
        return finished

    # ---- steps -------------------------------------------------------------------------------

    def _admit(self, free: int) -> None:
        """Prefill waiting requests into free rows and draw their first tokens."""
        assert self._decoder is not None and self._sampling is not None
        prompts: dict[tuple[int, ...], int] = {}
        entering: list[RolloutRequest] = []
        longest = 0
        while self._pending and len(entering) < free:
            ids = self._pending[0].input_token_ids
            longest_then = max(longest, len(ids))
            if (len(prompts) + (ids not in prompts)) * longest_then > _PREFILL_TOKENS and entering:
                break
            longest = longest_then
            prompts.setdefault(ids, len(prompts))
            entering.append(self._pending.popleft())
        first = len(self._active)
        limits = [self._limit(request, self._sampling) for request in entering]
        self._reserve(
            first + len(entering),
            max(len(r.prompt_token_ids) + n for r, n in zip(entering, limits, strict=True)),
        )
        assert self._rows is not None
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for ids, index in prompts.items():
            tokens[index, : len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids in prompts])
        index = torch.tensor([prompts[r.input_token_ids] for r in entering]).to(self._device)
        rows = slice(first, first + len(entering))
        logits = self._decoder.prefill(
            tokens.to(self._device),
            lengths.to(self._device),
            index,
            torch.arange(rows.start, rows.stop, device=self._device),
        )
        state = self._rows
        state.lengths[rows] = lengths.to(self._device)[index]
        state.counts[rows] = torch.tensor([r.num_carried for r in entering], device=self._device)
        state.limits[rows] = torch.tensor(limits, device=self._device)
        state.keys[rows] = split_keys([r.noise_key for r in entering], self._device)
        state.host_lengths += [len(r.input_token_ids) for r in entering]
        for row, request in enumerate(entering, first):
            decoder = IncrementalDecoder(self._tokenizer) if self._sampling.stop else None
            active = _Active(request, decoder)
            self._active.append(active)
            if request.carried is not None:
                n = request.num_carried
                state.tokens[row, :n] = torch.tensor(request.carried.token_ids)
                state.logprobs[row, :n] = torch.tensor(request.carried.logprobs)
                for token in request.carried.token_ids if decoder else ():
                    active.feed(token, self._sampling.stop)
        self._draw(logits[index], rows)

    def _decode_step(self) -> None:
        """Append the last token of every active row and draw the next."""
        assert self._decoder is not None and self._rows is not None
        state, n = self._rows, len(self._active)
        logits = self._decoder.decode(
            state.last_tokens[:n], state.lengths[:n], max(state.host_lengths)
        )
        state.lengths[:n] += 1
        state.host_lengths = [length + 1 for length in state.host_lengths]
        self._draw(logits, slice(0, n))

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """Draw a token for a range of rows and release those that are done."""
        assert self._rows is not None and self._sampling is not None
        state, sampling = self._rows, self._sampling
        counts = state.counts[rows]
        tokens, logprobs = sample(
            logits,
            self._noise,
            state.keys[rows],
            counts,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        position = counts.unsqueeze(1)
        state.tokens[rows].scatter_(1, position, tokens.unsqueeze(1))
        state.logprobs[rows].scatter_(1, position, logprobs.unsqueeze(1))
        state.last_tokens[rows] = tokens
        state.counts[rows] += 1
        self.num_generated_tokens += len(tokens)
        stopped = torch.isin(tokens, self._stop_ids)
        done = stopped | (state.counts[rows] >= state.limits[rows])
        if sampling.stop:
            by_string = self._match_stop_strings(tokens.tolist(), rows.start)
            stopped |= by_string
            done |= by_string
        # The one point of a step where the host waits for the device.
        indices = done.nonzero().flatten().tolist()
        if indices:
            reasons = stopped.tolist()
            self._release(
                [rows.start + i for i in indices],
                {rows.start + i: "stop" if reasons[i] else "length" for i in indices},
            )

    def _match_stop_strings(self, tokens: list[int], first: int) -> Tensor:
        """Which rows completed a stop string with this token."""
        assert self._sampling is not None
        matched = [
            active.feed(token, self._sampling.stop)
            for active, token in zip(self._active[first:], tokens, strict=True)
        ]
        return torch.tensor(matched, dtype=torch.bool, device=self._device)

    def _release(self, rows: list[int], reasons: dict[int, FinishReason]) -> None:
        """Report rows as finished and close the gaps that they leave."""
        if not rows:
            return
        state = self._rows
        assert state is not None and self._decoder is not None
        index = torch.tensor(rows, device=self._device)
        counts, tokens = state.counts[index].tolist(), state.tokens[index].tolist()
        logprobs = state.logprobs[index].tolist()
        for i, row in enumerate(rows):
            n = counts[i]
            self._report(self._active[row].request, tokens[i][:n], logprobs[i][:n], reasons[row])
        leaving, remaining = set(rows), len(self._active) - len(rows)
        holes = [row for row in sorted(leaving) if row < remaining]
        movers = [row for row in range(remaining, len(self._active)) if row not in leaving]
        for hole, mover in zip(holes, movers, strict=True):
            self._active[hole] = self._active[mover]
            state.host_lengths[hole] = state.host_lengths[mover]
        if holes:
            self._decoder.move_rows(movers, holes)
            state.move(movers, holes)
        del self._active[remaining:]
        del state.host_lengths[remaining:]

    def _report(
        self,
        request: RolloutRequest,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        reason: FinishReason,
    ) -> None:
        assert self.policy_version is not None
        self._finished.append(
            FinishedCompletion(
                request_id=request.request_id,
                completion=Completion(
                    token_ids=tuple(tokens),
                    logprobs=tuple(logprobs),
                    text=self._tokenizer.decode(tokens),
                    finish_reason=reason,
                ),
                policy_version=self.policy_version,
            )
        )

    def _reserve(self, rows: int, length: int) -> None:
        """Make room for active rows, and at once for the requests that wait behind them."""
        assert self._decoder is not None and self._sampling is not None
        max_tokens = self._sampling.max_completion_tokens
        waiting = [len(r.prompt_token_ids) for r in self._pending]
        rows = min(self._max_rows, rows + len(waiting))
        length = min(self._max_length, max([length, *(n + max_tokens for n in waiting)]))
        active = len(self._active)
        self._decoder.reserve(rows, length, keep_rows=active)
        size = self._decoder.cache.shape[2]
        old = self._rows
        if old is not None and old.tokens.shape == (size, max_tokens):
            return
        self._rows = _Rows(
            last_tokens=self._zeros(size),
            lengths=self._zeros(size),
            counts=self._zeros(size),
            limits=self._zeros(size),
            keys=torch.zeros(size, 2, dtype=torch.int32, device=self._device),
            tokens=self._zeros(size, max_tokens),
            logprobs=torch.zeros(size, max_tokens, device=self._device),
        )
        if old is not None and active:
            self._rows.host_lengths = old.host_lengths
            for new_tensor, tensor in zip(self._rows.tensors(), old.tensors(), strict=True):
                new_tensor[:active] = tensor[:active]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)
