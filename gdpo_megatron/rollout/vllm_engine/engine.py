"""vLLM behind the rollout protocol: one engine over `mesh.tp_size` of the trainer's ranks.

The ranks are those that torchrun started (vLLM calls this external_launcher): each holds a
scheduler of its own, which decides as the others do as long as all see the same requests in the
same order. Tokens go in and out as numbers; texts, stop strings and the order of completions are
made here, so that they are what every engine makes. What vLLM kept of earlier weights is forgotten
at each sync.
"""

# vLLM lives in an environment of its own, which pyright does not see.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.data.tokenizer import IncrementalDecoder
from gdpo_megatron.errors import InputError
from gdpo_megatron.rollout.base import (
    EngineSetup,
    FinishedCompletion,
    RolloutRequest,
    SamplingParams,
)
from gdpo_megatron.rollout.observe import OnValue, hooked
from gdpo_megatron.rollout.vllm_engine import environment, shared_memory
from gdpo_megatron.rollout.vllm_engine.observe import points
from gdpo_megatron.types import Completion, FinishReason

_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
_TAGS = frozenset({"weights", "kv_cache"})  # what vLLM can give back
_SEEDS = 1 << 63  # they are signed


@dataclass(slots=True)
class _Running:
    """What a request has so far."""

    request: RolloutRequest
    decoder: IncrementalDecoder | None  # only where there are stop strings
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    text: str = ""  # its end, as far as a stop string may reach back

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], stop: tuple[str, ...]) -> bool:
        """Append what was generated; whether it completes a stop string."""
        self.tokens += tokens
        self.logprobs += logprobs
        if self.decoder is None:
            return False
        self.text += "".join(map(self.decoder.feed, tokens))
        found = any(string in self.text for string in stop)
        reach = max(map(len, stop)) - 1
        self.text = self.text[-reach:] if reach else ""
        return found


class VllmEngine:
    """`RolloutEngine` over vLLM.

    Args:
        setup: what it is made from.

    Raises:
        InputError: vLLM cannot be imported, or refuses the model on this machine.
    """

    def __init__(self, setup: EngineSetup):
        self._setup, self._tokenizer = setup, setup.tokenizer
        self._llm: Any = _start(setup)
        self._core: Any = self._llm.llm_engine
        # It would end the process group, which is the trainer's.
        self._core.engine_core._finalizer.detach()
        self._core.engine_core.get_output = self._counted(self._core.engine_core.get_output)
        self._running: dict[str, _Running] = {}
        self._finished: list[FinishedCompletion] = []
        self._sampling: SamplingParams | None = None
        self._tags_asleep = frozenset[str]()
        self.policy_version: int | None = None
        self.num_generated_tokens = 0

    @property
    def num_unfinished(self) -> int:
        """Requests that `poll` has not returned yet."""
        return len(self._running) + len(self._finished)

    # ---- weights and memory ------------------------------------------------------------------

    def wake(self) -> None:
        """Take memory for weights again; that for the cache follows when they are there."""
        if self._tags_asleep == _TAGS:
            self._wake("weights")

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights; see RolloutEngine."""
        self._require_idle()
        self.wake()
        self.policy_version = None  # a failed update must not leave a mixture under a version
        self._llm.start_weight_update()
        update = {"tensors": tensors, "shapes": hf_shapes(self._setup.arch)}
        self._llm.update_weights({"update_info": update})
        self._llm.finish_weight_update(str(version))
        if self._tags_asleep:
            self._wake("kv_cache")
        # Its keys are tokens: entries of the old weights would be found, and used.
        self._forget_prefixes()
        self._core.reset_encoder_cache()
        self.policy_version = version

    def resident_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What vLLM holds under a Hugging Face name as it came: see ReadableEngine.

        Norms and, where an engine is one rank, embeddings; fused, packed and quantised layers are
        no longer what came.
        """
        shapes = hf_shapes(self._setup.arch)
        (parameters,) = self._llm.apply_model(lambda model: dict(model.named_parameters()))
        for name, parameter in parameters.items():
            shape = shapes.get(name)
            if shape is None or parameter.dtype != self._setup.dtype:
                continue
            held = parameter.detach()
            if held.ndim == 2 and self._setup.mesh.tp_size == 1:
                held = held[: shape[0]]  # vocabularies are padded
            if tuple(held.shape) == shape:
                yield name, held

    @contextmanager
    def observed(self, on_value: OnValue) -> Iterator[None]:
        """Report what its forward passes compute, if it runs eagerly; see ObservableEngine."""
        self._require_idle()
        self._forget_prefixes()
        (found,) = self._llm.apply_model(points)
        with hooked(found, on_value):
            yield

    def sleep(self) -> None:
        """Give weights and cache back; on a CPU, vLLM keeps them."""
        self._require_idle()
        if self._tags_asleep != _TAGS:
            self._llm.sleep(level=2)  # nothing is kept: the next sync brings all
        self._tags_asleep, self.policy_version = _TAGS, None

    def _wake(self, tag: str) -> None:
        self._llm.wake_up(tags=[tag])
        self._tags_asleep = self._tags_asleep - {tag}

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def _require_idle(self) -> None:
        if self.num_unfinished:
            raise RuntimeError(f"{self.num_unfinished} requests are unfinished; poll or abort them")

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        """Queue requests; see RolloutEngine."""
        if self.policy_version is None:
            raise RuntimeError("no weights are loaded; call load_weights first")
        if self.num_unfinished and sampling != self._sampling:
            raise ValueError("unfinished requests were submitted with other sampling parameters")
        ids = {int(name) for name in self._running} | {it.request_id for it in self._finished}
        for request in requests:
            if request.request_id in ids:
                raise ValueError(f"request_id {request.request_id} is in use")
            if not request.prompt_token_ids or self._room(request, sampling) <= 0:
                raise ValueError(
                    f"request {request.request_id}: {len(request.prompt_token_ids)} prompt tokens "
                    f"and {request.num_carried} carried ones leave nothing to generate within "
                    f"max_sequence_length {self._setup.max_sequence_length}"
                )
            ids.add(request.request_id)
        self._sampling = sampling
        for request in requests:
            name = str(request.request_id)
            decoder = IncrementalDecoder(self._tokenizer) if sampling.stop else None
            self._running[name] = running = _Running(request, decoder)
            if request.carried is not None:
                running.take(request.carried.token_ids, request.carried.logprobs, sampling.stop)
            self._core.add_request(
                name,
                {"prompt_token_ids": list(request.input_token_ids)},
                self._params(request, sampling),
            )

    def _room(self, request: RolloutRequest, sampling: SamplingParams) -> int:
        """Tokens that are left to generate."""
        room = self._setup.max_sequence_length - len(request.prompt_token_ids)
        return min(sampling.max_completion_tokens, room) - request.num_carried

    def _params(self, request: RolloutRequest, sampling: SamplingParams) -> Any:
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind

        return VllmSamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=self._room(request, sampling),
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # stop_token_ids says it all
            # vLLM draws from a generator of the request: where it goes on, it needs another one.
            seed=(request.noise_key + request.num_carried) % _SEEDS,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            # Every token is looked at only where a stop string may be found: that takes time.
            output_kind=(
                RequestOutputKind.DELTA if sampling.stop else RequestOutputKind.FINAL_ONLY
            ),
        )

    def _counted(self, get_output: Callable[[], Any]) -> Callable[[], Any]:
        """Count the tokens of every step, told or not."""

        def counted() -> Any:
            step = get_output()
            self.num_generated_tokens += sum(len(it.new_token_ids) for it in step.outputs)
            return step

        return counted

    def poll(self) -> list[FinishedCompletion]:
        """Generate until something finishes; see RolloutEngine."""
        while not self._finished and self._running:
            assert self._sampling is not None
            for output in self._core.step():
                running = self._running.get(output.request_id)
                if running is None:  # aborted while it was computed
                    continue
                (part,) = output.outputs
                if running.take(part.token_ids, part.logprobs.logprobs, self._sampling.stop):
                    if not output.finished:
                        self._core.abort_request([output.request_id])
                    self._report(output.request_id, "stop")
                elif output.finished:
                    self._report(output.request_id, _REASONS[part.finish_reason])
        finished, self._finished = self._finished, []
        return finished

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests; see RolloutEngine."""
        wanted = dict.fromkeys(map(str, request_ids))
        names = [name for name in wanted if name in self._running]
        for name in names:
            self._take_untold(name)
        self._core.abort_request(names)
        for name in names:
            self._report(name, "abort")

    def _take_untold(self, name: str) -> None:
        """Take what a request has so far and vLLM would have told at its end."""
        assert self._sampling is not None
        if self._sampling.stop:
            return  # told with each token
        processor = self._core.output_processor
        (inner,) = processor.external_req_ids[name]
        state, running = processor.request_states[inner], self._running[name]
        tokens = state.detokenizer.output_token_ids
        running.take(tokens, state.logprobs_processor.logprobs.logprobs, ())

    def _report(self, name: str, reason: FinishReason) -> None:
        running = self._running.pop(name)
        assert self.policy_version is not None
        self._finished.append(
            FinishedCompletion(
                request_id=running.request.request_id,
                completion=Completion(
                    token_ids=tuple(running.tokens),
                    logprobs=tuple(running.logprobs),
                    text=self._tokenizer.decode(running.tokens),
                    finish_reason=reason,
                ),
                policy_version=self.policy_version,
            )
        )

    def close(self) -> None:
        """Give everything back but the process group, so that another engine can be made."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        self._core.engine_core.engine_core.model_executor.shutdown()
        del self._llm, self._core
        destroy_model_parallel()


def _prepare_cpu(setup: EngineSetup, platform: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if setup.arch.head_dim not in sizes:  # vLLM itself would say so at the first token
        raise InputError(
            f"rollout.engine: vllm on a CPU takes heads of size {', '.join(map(str, sizes))}; this "
            f"model's have size {setup.arch.head_dim}; use native"
        )
    if setup.arch.moe is not None:
        # vLLM 0.32: an update of experts whose weights it packs fails, or leaves other weights.
        raise InputError(
            "rollout.engine: vllm on a CPU does not take a sync of a mixture of experts; use native"
        )
    if setup.vllm.enforce_eager:
        # Small functions of the sampler would be compiled all the same, with a C++ compiler.
        platform.simple_compile_backend = "eager"


def _start(setup: EngineSetup) -> Any:
    environment.prepare()
    try:
        from vllm import LLM

        from gdpo_megatron.rollout.vllm_engine.transfer import BACKEND
    except ImportError as error:
        raise InputError(
            f"rollout.engine: vllm cannot be imported ({error}); scripts/setup.sh vllm makes an "
            "environment that has it"
        ) from error
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    names = nullcontext()
    if current_platform.is_cpu():
        _prepare_cpu(setup, current_platform)
        names = shared_memory.own_names(setup.mesh)
    try:
        with names:
            return LLM(
                model=str(setup.model_files),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                load_format="dummy",  # the first sync brings the weights
                dtype=setup.dtype,
                seed=setup.seed,  # equal on all ranks of an engine, whose schedulers must agree
                max_model_len=setup.max_sequence_length,
                max_num_seqs=setup.max_concurrent_sequences,
                kv_cache_memory_bytes=int(setup.vllm.kv_cache_gib * 2**30),
                enforce_eager=setup.vllm.enforce_eager,
                enable_prefix_caching=True,
                tensor_parallel_size=setup.mesh.tp_size,
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                enable_sleep_mode=current_platform.is_sleep_mode_available(),
                generation_config="vllm",  # the folder's would change the sampling
            )
    except (ValueError, NotImplementedError) as error:  # vLLM's own ways to refuse a model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"rollout.engine: vllm refuses this model here: {reason}; use native"
        ) from error
