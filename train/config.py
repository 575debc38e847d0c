"""Configuration of a training run: `RunConfig`, whose fields are flags."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.layers.token_dispatcher import DispatchConfig
from dsmoe_jax.model import check_seed
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.paths import expand_user

from .checks import check_choices, check_minimum
from .optimizer import OptimizerConfig
from .step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Fields of both `DataConfig` and `ExamplesConfig`."""

    tokenizer: str | None = None
    """Tokenizer folder. Default: that of `init_from`; without it, pretraining trains one on the sources."""

    sequence_length: int = 256
    """Tokens per sequence."""

    batch_size: int = 8
    """Global batch size in sequences, over all devices and gradient-accumulation steps."""

    val_fraction: float = 0.01
    """Fraction of the documents held out for validation, chosen by hash."""

    split_special_tokens: bool = False
    """Tokenize special-token strings in the data as plain text instead of as control tokens."""

    prefetch: int = 2
    """Batches prepared ahead of the training step."""

    def __post_init__(self) -> None:
        """Expand `~` in paths; raise `DSMoEError` for invalid values."""
        for name, value in vars(self).items():
            if name in ("sources", "files"):
                object.__setattr__(self, name, tuple(expand_user(one, f"data.{name}") for one in value))
            elif name in ("tokenizer", "template") and value is not None:
                object.__setattr__(self, name, expand_user(value, f"data.{name}"))
        check_choices(self, "data.")
        check_minimum(self, {"sequence_length": 1, "batch_size": 1, "prefetch": 0}, "data.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(DatasetConfig):
    """Pretraining data."""

    sources: tuple[str, ...] = ("python-stdlib",)
    """Token-shard folders or text files, folders and globs; text is tokenized once into the output directory."""

    weights: tuple[float, ...] = ()
    """Sampling weight of each source in the mixture; equal weights if empty."""

    packing: Literal["block_causal", "causal"] = "block_causal"
    """Attention of packed documents: within each (`block_causal`, by segment IDs) or across them (`causal`)."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        super().__post_init__()
        if self.weights and len(self.weights) != len(self.sources):
            raise DSMoEError(f"{len(self.weights)} data.weights for {len(self.sources)} data.sources")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When training checkpoints are saved and which are kept."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""

    max_to_keep: int = 3
    """Number of latest intact checkpoints to keep."""

    keep_period: int | None = None
    """Also keep every checkpoint whose step is divisible by this; a multiple of `interval`."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        check_minimum(self, dict.fromkeys(vars(self), 1), "checkpoint.")
        if self.keep_period is not None and self.keep_period % self.interval:
            multiple = f"a multiple of checkpoint.interval {self.interval}"
            raise DSMoEError(f"checkpoint.keep_period must be {multiple}, got {self.keep_period}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Multi-process setup; Slurm, Open MPI and JobSet are auto-detected."""

    initialize: bool = False
    """Call `jax.distributed.initialize()` even where no launcher is detected."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0; requires `num_processes` and `process_id`."""

    num_processes: int | None = None
    """Number of processes."""

    process_id: int | None = None
    """Index of this process, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    _MINIMUM: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("steps", "log_interval", "eval_interval", "eval_batches", "max_consecutive_skips"), 1
    )

    output_dir: str
    """Output directory: checkpoints, metrics, the resolved config (`run.json`), the final model."""

    model: str = "tiny"
    """Preset name, or path to a `config.json`."""

    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the newest intact checkpoint in `output_dir`; `never`: fail if there is one."""

    init_from: str | None = None
    """Native checkpoint to initialize from; its config replaces `model`."""

    steps: int = 1000
    """Total optimizer steps."""

    seed: int = 0
    """Seed of the initialization, the data order and dropout, in [0, 2**32)."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Training and validation data."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimizer and learning-rate schedule."""

    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    """Precision, rematerialization, micro-batches and auxiliary losses."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Device mesh."""

    dispatch: DispatchConfig = dataclasses.field(default_factory=DispatchConfig)
    """Expert parallelism and the expert kernel; results do not depend on it."""

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Training checkpoints."""

    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """Multi-process setup."""

    log_interval: int = 10
    """Steps between console log lines."""

    eval_interval: int = 200
    """Steps between evaluations on the validation split; the first and the last step are always evaluated."""

    eval_batches: int = 8
    """Maximum batches per evaluation."""

    trackers: tuple[Literal["console", "jsonl", "tensorboard", "wandb", "plot"], ...] = (
        *("console", "jsonl", "tensorboard", "plot"),
    )
    """Where metrics are written; `plot` draws the `jsonl` ones at the end of the run."""

    max_consecutive_skips: int = 10
    """Stop the run after more than this many skipped updates in a row."""

    aux_loss_alpha: float | None = None
    """Weight of the expert-level balance loss. Default: the model config's."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        for name in ("output_dir", "init_from"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand_user(value, name))
        check_minimum(self, self._MINIMUM)
        check_seed(self.seed)
        check_choices(self)

    def model_config(self) -> ModelConfig:
        """Return the config of the model to train."""
        if self.init_from is None and self.model in PRESETS:
            config = ModelConfig.preset(self.model)
        else:
            config = ModelConfig.from_file(self.init_from or self.model)
        if self.aux_loss_alpha is None:
            return config
        return dataclasses.replace(config, aux_loss_alpha=self.aux_loss_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-compatible values."""
        return dataclasses.asdict(self)
