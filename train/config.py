"""What a run is: `RunConfig`, as data. `recipes.py` has whole ones; every field is a flag of `dsmoe pretrain`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.layers.dispatch import DispatchConfig
from dsmoe_jax.model import check_seed
from dsmoe_jax.paths import expand_user
from dsmoe_jax.sharding import MeshConfig

from .optimizer import OptimizerConfig
from .step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    sources: tuple[str, ...] = ("python-stdlib",)  # folders of token shards, or texts: tokenized once, beside the run
    weights: tuple[float, ...] = ()  # of the sources in the mixture; default equal
    tokenizer: str | None = None  # a folder; default: that of `init_from`, or one trained on the sources
    sequence_length: int = 256
    batch_size: int = 8  # rows of all devices and micro-batches together
    packing: str = "documents"  # documents in a row do not see each other; or "contiguous"
    holdout: float = 0.01  # share of the documents that is kept for evaluation
    split_special_tokens: bool = False  # the strings of special tokens in a text are text, not control tokens
    prefetch: int = 2  # batches

    def __post_init__(self) -> None:
        """`ValueError` for weights that are not of the sources, and for empty paths."""
        object.__setattr__(self, "sources", tuple(expand_user(source, "data.sources") for source in self.sources))
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", expand_user(self.tokenizer, "data.tokenizer"))
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} data.weights for {len(self.sources)} data.sources")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what stays."""

    every: int = 1000  # steps
    keep_last: int = 3
    keep_every: int | None = None  # steps; a multiple of `every`

    def __post_init__(self) -> None:
        """`ValueError` for intervals below 1, or that never meet."""
        for name in ("every", "keep_last", "keep_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"checkpoints.{name} must be at least 1, got {value}")
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"checkpoints.keep_every must be a multiple of checkpoints.every {self.every}, got {self.keep_every}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How several processes find each other; Slurm, Open MPI and Kubernetes' JobSet are found by themselves."""

    distributed: bool = False
    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    _LEAST: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("steps", "log_every", "evaluate_every", "evaluate_batches", "most_skipped"), 1
    )

    out: str  # the run's folder: checkpoints, records, the resolved config, the final model
    model: str = "tiny"  # a preset's name, or a path to config.json
    resume: str = "auto"  # from the newest intact checkpoint in `out`, if there is one; or "never"
    init_from: str | None = None  # a native checkpoint to start from; `model` is then its config
    steps: int = 1000
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    dispatch: DispatchConfig = dataclasses.field(default_factory=DispatchConfig)  # how tokens reach the experts
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    processes: ProcessConfig = dataclasses.field(default_factory=ProcessConfig)
    log_every: int = 10
    evaluate_every: int = 200
    evaluate_batches: int = 8
    sinks: tuple[str, ...] = ("console", "jsonl", "tensorboard")
    most_skipped: int = 10  # updates in a row; then the run stops
    aux_loss_alpha: float | None = None  # default: the model's own

    def __post_init__(self) -> None:
        """`ValueError` for a value that means nothing."""
        for name in ("out", "init_from"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand_user(value, name))
        for name, least in self._LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name in ("sequence_length", "batch_size"):
            if (value := getattr(self.data, name)) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {value}")
        check_seed(self.seed)
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume {self.resume!r} is not one of auto, never")

    def model_config(self) -> ModelConfig:
        """The model that is trained."""
        if self.init_from is not None:
            config = ModelConfig.from_file(self.init_from)
        elif self.model in PRESETS:
            config = ModelConfig.preset(self.model)
        else:
            config = ModelConfig.from_file(self.model)
        if self.aux_loss_alpha is not None:
            config = dataclasses.replace(config, aux_loss_alpha=self.aux_loss_alpha)
        return config

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)
