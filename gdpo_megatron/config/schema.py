"""The config tree: one frozen section per concern, each default in exactly one place.

`RLConfig` is what `train` and `eval` read, `SFTConfig` what `sft` reads. Ranges are checked here;
what concerns several sections, or the world outside the file, is checked in validate.py.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.config.dynamic_sampling import DynamicSamplingConfig
from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.config.evaluation import EvalConfig
from gdpo_megatron.config.fp8 import Fp8Config
from gdpo_megatron.config.launch import LaunchConfig
from gdpo_megatron.config.long_tail import LongTailConfig
from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.loss import LossConfig
from gdpo_megatron.config.memory import MemoryConfig, RLMemoryConfig
from gdpo_megatron.config.profiling import ProfilingConfig
from gdpo_megatron.config.reward import RewardConfig
from gdpo_megatron.config.row_fields import RowFieldsConfig
from gdpo_megatron.config.sampling import SamplingConfig
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
    section,
)
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.config.weight_sync import WeightSyncConfig


@section
class ModelConfig:
    """The policy, and what the reference starts from."""

    hf_path: str
    """Model folder: of Hugging Face, a converted Megatron one, or a checkpoint of a run."""

    tokenizer_path: str | None = None
    """Tokenizer folder, or a SentencePiece .model file; null means hf_path."""

    init: Literal["pretrained", "random"] = "pretrained"
    """Load the weights of hf_path, or draw new ones (then only its config.json is needed)."""

    max_sequence_length: PositiveInt = 2048
    """Prompt and completion together, in tokens."""

    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; null trains all of
    them."""


@section
class ParallelConfig:
    """Layout of the policy, by Megatron's names.

    What is left of the world is data parallel, with Megatron's distributed optimizer.
    """

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (1F1B)."""

    sequence_parallel: bool = False
    """TP ranks share the tokens between their layers as well: less memory for activations."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each row, for long ones."""

    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture; divides what is data parallel."""

    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share each expert."""

    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Stages of each rank, interleaved: a smaller bubble, more messages."""

    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass goes on; needs overlap_grad_reduce."""

    pipeline_model_parallel_layout: str | None = None
    """Layers per stage in Megatron's notation, e.g. "Ettt|ttL" for 3 + 2 layers; null spreads them
    as evenly as possible, the longer stages first. With virtual stages, all of them in the order
    that a token passes them."""


@section
class PrecisionConfig:
    """Number formats of the update."""

    params_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; with bfloat16 the optimizer keeps float32 master weights."""

    fp8: Fp8Config | None = None
    """Multiply in FP8 in the layers' linear parts, forward and backward; null does not."""


@section
class RolloutConfig(SamplingConfig):
    """The rollout engine and what it is asked for in a step."""

    engine: str = "native"
    """Rollout engine: native (KV-cache decoding of the policy's weights) or vllm (needs an
    environment of its own: scripts/setup.sh vllm); or one of yours, ./file.py:factory relative to
    the config file."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share one engine; world size / this engines generate side by side."""

    num_prompts_per_step: PositiveInt = 16
    """Prompts (groups) of a step, over all ranks."""

    group_size: PositiveInt = 8
    """Completions per prompt (G)."""

    max_concurrent_sequences: PositiveInt = 256
    """Completions that one engine decodes at a time; bounds its KV cache."""

    long_tail: LongTailConfig = field(default_factory=LongTailConfig)

    environment: EnvironmentConfig | None = None
    """What answers the model between its turns; null makes a completion one turn."""

    stall_timeout_seconds: PositiveFloat = 600.0
    """The run is saved and stops when an engine has made no progress for so long: no token drawn,
    no tensor of a weight sync taken, no return from wake or sleep."""

    vllm: VllmConfig | None = None
    """More settings of engine vllm; null takes their defaults."""


@section
class RewardSuiteConfig:
    """How rewards are run."""

    num_workers: PositiveInt = 2
    """Processes that score completions while generation goes on, per engine."""

    sample_timeout_seconds: PositiveFloat = 10.0
    """For one sample in one reward, counted from the call; a batch call has so much for each of its
    samples. A worker that takes longer is killed, and the entry invalid."""

    step_timeout_seconds: PositiveFloat = 600.0
    """For all rewards of a step, counted from the end of generation, when they are waited for; what
    is not done then is invalid."""

    worker_memory_mb: PositiveInt = 2048
    """Resident memory of a worker in MiB; above it, it is killed, and the call made once more on a
    fresh one. At three quarters of it, it is replaced between two calls."""

    max_concurrent_async: PositiveInt = 64
    """Calls of async rewards that wait side by side."""

    max_invalid_fraction: UnitFloat = 0.5
    """The run is saved and stops when more than this share of a reward's rows in a step is invalid
    (not applicable ones do not count; fewer than 8 rows count as 8); 1 never stops."""


@section
class DataFilesConfig:
    """The files of a run."""

    train: str | None = None
    """Rows to train on; `eval` alone does without."""

    eval: str | None = None
    """Held-out rows, same fields."""


@section
class DataConfig(RowFieldsConfig, DataFilesConfig):
    """Prompts, from jsonl or parquet; relative paths start at the config file."""

    completion_key: str = "completion"
    """Field of the completion to imitate (sft only)."""

    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are left out and counted; null means what fits beside the completion."""

    shuffle: bool = True
    """Draw rows in a seeded order, anew each epoch, instead of file order."""


@section
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Where the schedule ends."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warmup, over all optimizer steps of the run."""

    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warmup."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; biases and norms are exempt."""

    betas: tuple[UnitFloat, UnitFloat] = (0.9, 0.95)
    """Adam's moment decay rates."""

    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""

    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""


@section
class MicroBatchConfig:
    """What one forward and backward pass on one data-parallel rank holds."""

    micro_batch_size: PositiveInt = 4
    """Rows of one forward and backward pass on one data-parallel rank; not used where
    max_tokens_per_micro_batch is set."""

    max_tokens_per_micro_batch: PositiveInt | None = None
    """As many rows as stay within so many tokens, padding included; a longer row gets a pass of its
    own. null takes micro_batch_size rows, whatever their length."""

    packing: bool = False
    """Lay the rows of a pass end to end instead of padding them to the longest: the same numbers,
    no work for padding. Not with context parallelism."""


@section
class TrainConfig(MicroBatchConfig):
    """Length of the run and size of its batches."""

    num_steps: PositiveInt = 100
    """Steps; one is a rollout and its update (in sft: one optimizer step)."""

    num_minibatches_per_step: PositiveInt = 1
    """Optimizer steps that a rollout batch is split into."""

    eval_interval: NonNegativeInt = 0
    """Evaluate data.eval and eval.sets every so many steps; 0 means never."""


@section
class SFTTrainConfig(MicroBatchConfig):
    """Length of the run and size of its batches."""

    num_steps: PositiveInt = 100
    """Optimizer steps."""

    global_batch_size: PositiveInt = 64
    """Rows of one optimizer step, over all ranks."""

    micro_batch_size: PositiveInt = 16
    """Rows of one forward and backward pass on one data-parallel rank; not used where
    max_tokens_per_micro_batch is set."""


@section
class CheckpointConfig:
    """What is kept of a run."""

    save_interval: NonNegativeInt = 50
    """Save every so many steps, and at the end; 0 means at the end only."""

    keep_last: PositiveInt = 2
    """Older checkpoints are removed."""

    export_hf: bool = True
    """Write the final policy as a Hugging Face folder, <run_dir>/hf."""


@section
class LoggingConfig:
    """What a run tells."""

    tensorboard: bool = True
    """Write <run_dir>/tensorboard beside metrics.jsonl."""

    num_rollout_groups: NonNegativeInt = 1
    """Groups of rollouts written to <run_dir>/rollouts in each step."""

    compare_plan: bool = True
    """After the first step of a start, print what `plan` says of its memory and its phases' time
    beside what they took. Its first update is watched for that, which takes longer."""


@section
class RLConfig:
    """A GDPO run (`train`, `eval`)."""

    run_dir: str
    """Folder of the run: checkpoints, metrics, rollouts, export. A run found there is resumed."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    rewards: tuple[RewardConfig, ...]
    """The rewards, each with its weight."""

    seed: int = 1234
    """Of the data order, the sampling noise and new weights."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: RLMemoryConfig = field(default_factory=RLMemoryConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    reward_suite: RewardSuiteConfig = field(default_factory=RewardSuiteConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)


@section
class SFTConfig:
    """A supervised run (`sft`)."""

    run_dir: str
    """Folder of the run: checkpoints, metrics, export. A run found there is resumed."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)

    seed: int = 1234
    """Of the data order and new weights."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: SFTTrainConfig = field(default_factory=SFTTrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)
