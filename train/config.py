"""Configuration of a training run: `RunConfig`, whose fields are flags."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.layers.token_dispatcher import DispatchConfig
from dsmoe_jax.loading import resolve
from dsmoe_jax.model import check_seed
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.paths import expand_user
from dsmoe_jax.storage.remote import is_url

from .checks import check_choices, check_minimum
from .optimizer import OptimizerConfig
from .profiling import parse_steps
from .step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Fields of both `DataConfig` and `ExamplesConfig`."""

    tokenizer: str | None = None
    """Folder of the tokenizer. Default: that of `init_from` or of the token shards, or else one trained on the sources.
    """

    validation: tuple[str, ...] = ()
    """Validation data, like the training data: files, folders, globs or token shards. Default: `val_fraction` of it."""

    val_fraction: float | None = None
    """Fraction of the documents held out for validation, chosen by hash, at least one. Default: 0.01; 0.05 of
    `python-stdlib`."""

    split_special_tokens: bool = False
    """Tokenize special-token strings in the data as plain text instead of as control tokens."""

    prefetch: int = 2
    """Batches prepared ahead of the training step; 0 prepares each when it is needed."""

    def __post_init__(self) -> None:
        """Expand `~` in paths; raise `DSMoEError` for invalid values."""
        for name, value in vars(self).items():
            if name in ("sources", "files", "validation"):
                object.__setattr__(self, name, tuple(expand_user(one, f"data.{name}") for one in value))
            elif name in ("tokenizer", "template") and value is not None:
                object.__setattr__(self, name, expand_user(value, f"data.{name}"))
        check_choices(self, "data.")
        check_minimum(self, {"sequence_length": 1, "batch_size": 1, "prefetch": 0}, "data.")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise DSMoEError(f"data.val_fraction must be in [0, 1), got {self.val_fraction}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(DatasetConfig):
    """Pretraining data."""

    sources: tuple[str, ...] = ("python-stdlib",)
    """Texts (files, folders, globs, hf://datasets/OWNER/NAME, URLs of object stores), which are tokenized once into the
    output directory, token-shard folders, or NAME.bin of Megatron."""

    sequence_length: int = 256
    """Tokens per sequence."""

    batch_size: int = 8
    """Global batch size in sequences, over all devices and gradient-accumulation steps."""

    weights: tuple[float, ...] = ()
    """Sampling weight of each source in the mixture. Default: equal weights."""

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
    """Also keep every checkpoint whose step is divisible by this multiple of `interval`. Default: only the latest."""

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
    """Address of process 0; requires `num_processes` and `process_id`. Default: that of the launcher."""

    num_processes: int | None = None
    """Number of processes of the run. Default: that of the launcher, or else 1."""

    process_id: int | None = None
    """Index of this process, from 0. Default: that of the launcher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    _MINIMUM: ClassVar[Mapping[str, int]] = dict.fromkeys(
        (
            *("steps", "log_interval", "eval_interval", "eval_batches", "max_consecutive_skips"),
            *("eval_tasks_interval", "eval_tasks_limit"),
        ),
        1,
    )

    output_dir: str
    """Output directory: checkpoints, metrics, the resolved config (`run.json`), the final model."""

    recipe: tyro.conf.Suppress[str | None] = None
    """Name of the recipe that the settings started from; recorded in `run.json`."""

    model: str = "tiny"
    """Preset name, or path to a `config.json`."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest intact checkpoint in `output_dir`; `never` fails if there is one."""

    init_from: str | None = None
    """Native checkpoint, Hugging Face folder or hub id to initialize from; its config replaces `model`. Default: random
    weights."""

    revision: str | None = None
    """Branch, tag or commit if `init_from` is a hub id. Default: `main`."""

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
    """Sizes of the device mesh; the devices of all processes are used."""

    dispatch: DispatchConfig = dataclasses.field(default_factory=DispatchConfig)
    """Expert parallelism and the expert kernel; results do not depend on it."""

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When training checkpoints are saved, and which are kept."""

    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """Multi-process setup; needed only where no launcher (Slurm, Open MPI, JobSet) is detected."""

    log_interval: int = 10
    """Steps between console log lines."""

    eval_interval: int = 200
    """Steps between evaluations on the validation split; the first and the last step are always evaluated."""

    eval_batches: int = 8
    """Maximum batches per evaluation; more give a more precise loss and take longer."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to evaluate during training (extra `eval`). Default: none."""

    eval_tasks_interval: int | None = None
    """Steps between evaluations of the tasks; the last step is always evaluated. Default: `eval_interval`."""

    eval_tasks_limit: int = 100
    """Maximum documents of each task."""

    eval_tasks_data: str | None = None
    """Folder of local datasets, `TASK/SPLIT.jsonl` or copies of dataset repositories. Default: the Hugging Face Hub."""

    eval_tasks_include: tuple[str, ...] = ()
    """Folders with further task files. Default: none."""

    trackers: tuple[Literal["console", "jsonl", "tensorboard", "wandb", "plot"], ...] = (
        *("console", "jsonl", "tensorboard", "plot"),
    )
    """Where metrics are written: console, `metrics.jsonl`, TensorBoard files, Weights & Biases; `plot` draws those in
    `metrics.jsonl` at the end of the run."""

    profile: str | None = None
    """Steps to trace with JAX's profiler, `FIRST:LAST`, for xprof and TensorBoard; the trace is in `profile/` of the
    output directory. Default: none."""

    max_consecutive_skips: int = 10
    """Stop the run after more than this many skipped updates in a row."""

    aux_loss_alpha: float | None = None
    """Weight of the expert-level balance loss. Default: that of the model config."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        if is_url(self.output_dir):
            raise DSMoEError(f"output_dir must be on a local or mounted disk, got {self.output_dir}")
        for name in ("output_dir", "init_from"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand_user(value, name))
        check_minimum(self, self._MINIMUM)
        if self.profile is not None:
            parse_steps(self.profile)
        check_seed(self.seed)
        check_choices(self)

    def base_folder(self) -> Path | None:
        """Return the local folder of `init_from`, downloaded if it is a hub id."""
        return None if self.init_from is None else _resolve(self.init_from, self.revision)

    def model_config(self) -> ModelConfig:
        """Return the config of the model to train."""
        if self.init_from is None and self.model in PRESETS:
            config = ModelConfig.preset(self.model)
        else:
            config = ModelConfig.from_file(self.base_folder() or self.model)
        if self.aux_loss_alpha is None:
            return config
        return dataclasses.replace(config, aux_loss_alpha=self.aux_loss_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-compatible values."""
        return dataclasses.asdict(self)


@functools.cache  # one commit for the whole run
def _resolve(init_from: str, revision: str | None) -> Path:
    return resolve(init_from, revision, name="init_from")
