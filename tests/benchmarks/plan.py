"""The tasks, the contenders of each area and the targets of their ratios: `AREAS`, then `BARS`. No jax or torch."""

from typing import Final, Literal, NamedTuple

from dsmoe_jax.config import ModelConfig

PRESET: Final = "bench"
SEED: Final = 0

# The four tasks.
PREFILL_TOKENS: Final = 512
PROMPT, NEW_TOKENS = 32, 64
TRAIN_SHAPE: Final = (4, 256)
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2
# CPU share of other processes in a quiet turn; in a short turn one clock tick is half of it.
QUIET: Final = 0.1
# For the kernel; other sizes are the preset's.
KERNEL_TOKENS: Final = 1024


class Area(NamedTuple):
    """A task and its interleaved contenders."""

    option: str  # for --only
    task: str
    contenders: tuple[str, ...]
    turns: int  # per round: more for short turns
    tokens: int = 0  # read or generated per turn


# fmt: off
ALL: Final = ("ours", "twin", "transformers")
BF16: Final = ("ours", "ours bf16")
LLAMA_CPP: Final = ("ours", "llama.cpp")
EIGHT_BIT: Final = ("ours int8", "llama.cpp q8_0")
AREAS: Final[dict[str, Area]] = {
    #                      option     task       contenders                turns  tokens
    "prefill":        Area("prefill", "prefill", ALL,                      4, PREFILL_TOKENS),
    "decode b=1":     Area("decode1", "decode1", ALL,                      3, NEW_TOKENS),
    "decode b=8":     Area("decode8", "decode8", ALL,                      2, 8 * NEW_TOKENS),
    "train":          Area("train",   "train",   ALL,                      1, TRAIN_SHAPE[0] * TRAIN_SHAPE[1]),
    "bf16 prefill":   Area("bf16",    "prefill", BF16,                     2, PREFILL_TOKENS),
    "bf16 decode b=1": Area("bf16",   "decode1", BF16,                     1, NEW_TOKENS),
    "bf16 decode b=8": Area("bf16",   "decode8", BF16,                     1, 8 * NEW_TOKENS),
    "llama.cpp prefill": Area("llama.cpp", "prefill", LLAMA_CPP,           4, PREFILL_TOKENS),
    "llama.cpp decode b=1": Area("llama.cpp", "decode1", LLAMA_CPP,        3, NEW_TOKENS),
    "8-bit decode b=1": Area("llama.cpp", "decode1", EIGHT_BIT,            3, NEW_TOKENS),
    "expert kernel":  Area("kernel",  "kernel",  ("block_loop", "ragged"), 1),
}
# fmt: on
OPTIONS: Final = tuple(dict.fromkeys(area.option for area in AREAS.values()))

FLOOR: Final = "floor"  # a pseudo-contender: the bound by hardware


class Bar(NamedTuple):
    """A ratio of two contenders in one area and its target; without a bar it is informational."""

    area: str
    above: str
    below: str
    sense: Literal["at least", "at most"]
    bar: float | None
    aim: float | None
    quantity: Literal["seconds", "temp_bytes"] = "seconds"


# fmt: off
BARS: Final = (
    #   area               above           below         sense       bar     aim
    Bar("prefill",         "twin",         "ours",       "at least", 1.3,    2.5),
    Bar("prefill",         "transformers", "ours",       "at least", 1.6,    2.5),
    Bar("prefill",         "ours",         FLOOR,        "at most",  None,   None),
    Bar("decode b=1",      "twin",         "ours",       "at least", 1.8,    2.5),
    Bar("decode b=1",      "transformers", "ours",       "at least", 1.0,    1.5),
    Bar("decode b=1",      "ours",         FLOOR,        "at most",  1.6,    1.15),
    Bar("decode b=8",      "twin",         "ours",       "at least", 1.8,    3.0),
    Bar("decode b=8",      "transformers", "ours",       "at least", 1.0,    1.5),
    Bar("decode b=8",      "ours",         FLOOR,        "at most",  1.2,    1.1),
    Bar("train",           "twin",         "ours",       "at least", 1.4,    3.0),
    Bar("train",           "transformers", "ours",       "at least", 1.5,    2.5),
    Bar("train",           "ours",         FLOOR,        "at most",  None,   None),
    Bar("bf16 prefill",    "ours bf16",    "ours",       "at most",  1.2,    None),
    Bar("bf16 decode b=1", "ours bf16",    "ours",       "at most",  2.5,    None),
    Bar("bf16 decode b=8", "ours bf16",    "ours",       "at most",  1.2,    None),
    Bar("llama.cpp prefill", "llama.cpp",  "ours",       "at least", 2.0,    None),
    Bar("llama.cpp decode b=1", "llama.cpp", "ours",     "at least", 1.0,    None),
    Bar("8-bit decode b=1", "llama.cpp q8_0", "ours int8", "at least", 1.0,  1.2),
    Bar("expert kernel",   "ragged",       "block_loop", "at least", 30.0,   45.0),
    Bar("expert kernel",   "block_loop",   "ragged",     "at most",  1 / 20, None, "temp_bytes"),
)
# fmt: on


def flops(config: ModelConfig, batch: int, tokens: int, *, head_tokens: int | None = None) -> int:
    """Count the FLOPs of a forward pass over [batch, tokens].

    Attention is causal: (T + 1) / 2 keys per query on average. `head_tokens` positions per sequence go through the
    head, by default all.
    """
    D, H = config.hidden_size, config.head_dim
    N, K = config.num_attention_heads, config.num_kv_heads
    projections = 2 * D * H * (2 * N + 2 * K)
    attention = 2 * N * H * (tokens + 1)  # two products, 2 · N · H each, over (T + 1) / 2 keys
    dense = 3 * 2 * D * config.intermediate_size
    kept, shared = config.num_experts_per_tok or 0, config.n_shared_experts or 0
    expert = 3 * 2 * D * config.moe_intermediate_size
    moe = 2 * D * (config.n_routed_experts or 0) + (kept + shared) * expert
    layers = range(config.num_hidden_layers)
    per_token = sum(projections + attention + (moe if config.is_moe_layer(i) else dense) for i in layers)
    head = 2 * D * config.vocab_size * (tokens if head_tokens is None else head_tokens)
    return batch * (tokens * per_token + head)


def task_flops(config: ModelConfig) -> dict[str, int]:
    """Count the FLOPs of a turn of each compute-bound task; backward costs twice the forward."""
    return {
        "prefill": flops(config, 1, PREFILL_TOKENS, head_tokens=1),
        "train": 3 * flops(config, *TRAIN_SHAPE),
    }
