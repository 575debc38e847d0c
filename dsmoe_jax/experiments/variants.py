"""The models of the paper's comparisons at three scales: `VARIANTS`, `SCALES`. Start at `model_config`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.step import StepConfig


class Scale(NamedTuple):
    """The sizes that all variants of an experiment share.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the hidden states.
        layers: Blocks; every feed-forward of a mixture is an MoE layer.
        heads: Attention heads.
        ffn: Width of a standard feed-forward, which the experts' widths are fractions of.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per step.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warmup.
        val_fraction: Fraction of the documents held out.
        initializer_range: Standard deviation of the initial weights.
        step: Precision and memory of a step.
        mesh: Devices of a run; None: one device, and several runs at once.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    ffn: int
    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    val_fraction: float
    initializer_range: float = 0.02
    step: StepConfig = StepConfig()
    mesh: MeshConfig | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.sequence_length


class Variant(NamedTuple):
    """A model of the comparison.

    Attributes:
        width: Width of the dense feed-forward or of each expert, in standard feed-forwards.
        routed: Routed experts; 0: a dense model.
        top_k: Routed experts per token.
        shared: Shared experts.
        paper: Pile loss of the paper's 2B (arXiv 2401.06066, tables 1 and 2, section 4.4); None: not published.
        note: What it is.
        hash_routing: Experts by a hash of the token id.
    """

    width: float
    routed: int = 0
    top_k: int = 0
    shared: int = 0
    paper: float | None = None
    note: str = ""
    hash_routing: bool = False


# fmt: off
_PAPER_STEP: Final = StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=8, remat="dots")
_FSDP: Final = MeshConfig(fsdp=-1)
SCALES: Final[dict[str, Scale]] = {
    #               vocab  D     L  N   F     T     B     steps   lr       warmup held out
    "ci":     Scale(512,   32,   2, 2,  64,   64,   16,   30,     3e-3,    5,    0.02),
    "laptop": Scale(2048,  128,  4, 4,  352,  256,  16,   2000,   2e-3,    100,  0.02),
    "2b":     Scale(8192,  1280, 9, 10, 3456, 2048, 2048, 25_000, 1.08e-3, 2000, 0.01, 0.006, _PAPER_STEP, _FSDP),
}
VARIANTS: Final[dict[str, Variant]] = {
    #                      width routed top_k shared paper
    "dense":       Variant(1,    0,     0,    0,     2.060, "one feed-forward"),
    "hash":        Variant(1,    16,    1,    0,     1.932, "Hash Layer", hash_routing=True),
    "switch":      Variant(1,    16,    1,    0,     1.881, "Switch Transformer"),
    "gshard":      Variant(1,    16,    2,    0,     1.867, "GShard"),
    "deepseek_moe": Variant(1/4, 63,    7,    1,     1.808, "fine-grained and one shared expert"),
    "gshard_x1.5": Variant(1.5,  16,    2,    0,     1.808, "GShard, experts 1.5 times as wide"),
    "dense_x4":    Variant(4,    0,     0,    0,     1.908, "four feed-forwards"),
    "dense_x16":   Variant(16,   0,     0,    0,     1.806, "all parameters of the mixtures active"),
    "shared_1_15": Variant(1,    15,    1,    1,     None,  "one shared expert, no finer ones"),
    "shared_1_31": Variant(1/2,  31,    3,    1,     None,  "experts of half the width"),
    "fine_grained": Variant(1/4, 64,    8,    0,     None,  "fine-grained, no shared expert"),
    "shared_2_62": Variant(1/4,  62,    6,    2,     1.806, "two shared experts"),
    "shared_4_60": Variant(1/4,  60,    4,    4,     1.811, "four shared experts"),
    "half_active": Variant(1/4,  63,    3,    1,     None,  "half the active experts"),
}
# fmt: on
MAIN: Final = ("dense", "hash", "switch", "gshard", "deepseek_moe", "gshard_x1.5")  # the first six rows
_BALANCE_ALPHA: Final = 0.01  # section 4.1.3


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """Return the variants of these names, each once; "all" names all.

    Args:
        names: Keys of `VARIANTS`, or "all".

    Raises:
        DSMoEError: A name is unknown, or there is none.
    """
    if tuple(names) == ("all",):
        return tuple(VARIANTS)
    for name in names:
        check_choice("variant", name, VARIANTS)
    if not names:
        raise DSMoEError("variants must not be empty")
    return tuple(dict.fromkeys(names))


def model_config(variant: str, scale: Scale) -> ModelConfig:
    """Return the model of a variant.

    Args:
        variant: A key of `VARIANTS`.
        scale: A value of `SCALES`.
    """
    row = VARIANTS[variant]
    width = round(row.width * scale.ffn)
    sizes: dict[str, Any] = {"intermediate_size": width}
    if row.routed:
        sizes = {
            "intermediate_size": scale.ffn,  # of no layer
            "moe_intermediate_size": width,
            "n_routed_experts": row.routed,
            "num_experts_per_tok": row.top_k,
            "n_shared_experts": row.shared or None,
            "aux_loss_alpha": 0.0 if row.hash_routing else _BALANCE_ALPHA,
        }
    return ModelConfig(
        vocab_size=scale.vocab_size,
        hidden_size=scale.hidden_size,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=scale.sequence_length,
        initializer_range=scale.initializer_range,
        bos_token_id=0,
        eos_token_id=1,
        extra={"topk_method": "hash"} if row.hash_routing else {},
        **sizes,
    )


def run_config(scale: Scale, seed: int, *, model: Path, data: Path, out: Path, eval_batches: int = 1) -> RunConfig:
    """Return the training run of a variant: all variants have the same data, in the same order, and initial seed.

    Args:
        scale: Sizes and settings.
        seed: Seed of the initialization and the data order.
        model: The variant's `config.json`.
        data: Token shards.
        out: Output folder of the run.
        eval_batches: Batches of the validation split.
    """
    return RunConfig(
        output_dir=str(out),
        model=str(model),
        steps=scale.steps,
        seed=seed,
        data=DataConfig(sources=(str(data),), sequence_length=scale.sequence_length, batch_size=scale.batch_size),
        optimizer=OptimizerConfig(learning_rate=scale.learning_rate, warmup_steps=scale.warmup_steps),
        step=scale.step,
        mesh=scale.mesh or MeshConfig(),
        checkpoint=CheckpointConfig(interval=max(1, min(1000, scale.steps // 4)), max_to_keep=1),
        log_interval=max(1, scale.steps // 20),
        eval_interval=scale.steps,
        eval_batches=eval_batches,
        trackers=("console", "jsonl"),
    )


def shortened(scale: Scale, steps: int) -> Scale:
    """Return a scale with fewer or more steps; warmup keeps its share."""
    return scale._replace(steps=steps, warmup_steps=max(1, scale.warmup_steps * steps // scale.steps))


def settings(scale: Scale) -> dict[str, Any]:
    """Return a scale as JSON."""
    mesh = scale.mesh and dataclasses.asdict(scale.mesh)
    return {**scale._asdict(), "step": dataclasses.asdict(scale.step), "mesh": mesh}
