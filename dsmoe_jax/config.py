"""The architecture of a model: `ModelConfig`, in Hugging Face's field names, with presets and validation.

Start at the fields, then `_LIMITS`. `config_aliases.py` converts fields of transformers 5 and of other libraries.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.config_aliases import ROPE_SCALING_TYPES, check_unknown, equal, show_value, standardize
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json

MODEL_TYPE: Final = "deepseek"
ARCHITECTURES: Final = ("DeepseekForCausalLM",)
ACTIVATIONS: Final = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
_SIZES: Final = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULT_BOS: Final = 100000  # of the original tokenizer of 100,015 tokens
_DEFAULT_EOS: Final = 100001


class RopeScaling(NamedTuple):
    """Scaling of rotary embeddings beyond the trained length."""

    type: str  # "linear" or "dynamic" (NTK)
    factor: float  # > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a DeepSeekMoE v1 model; names and defaults are those of the original `DeepseekConfig`.

    Attributes:
        vocab_size: Rows of the embedding and of the head.
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the dense feed-forward layers.
        moe_intermediate_size: Width of one expert, routed or shared.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key-value heads; None: as many as query heads.
        n_shared_experts: Shared experts per MoE layer; None: none.
        n_routed_experts: Routed experts per MoE layer; None: all layers are dense.
        num_experts_per_tok: Top-k of the router.
        moe_layer_freq: Every n-th layer is an MoE layer.
        first_k_dense_replace: Number of leading dense layers.
        norm_topk_prob: Normalize the top-k router weights to sum to 1.
        scoring_func: Scoring of the router; only "softmax".
        aux_loss_alpha: Coefficient of the balance loss (arXiv 2401.06066, §3.3).
        seq_aux: Compute the balance loss per sequence, not over the batch.
        hidden_act: Activation of the feed-forward layers; one of `ACTIVATIONS`.
        max_position_embeddings: Trained context length, in tokens.
        initializer_range: Standard deviation of initial weights.
        rms_norm_eps: Epsilon of the RMS norms.
        use_cache: Not used here; kept for export, like `pretraining_tp` and the next fields but `extra`.
        pad_token_id: Padding token.
        bos_token_id: BOS token; the default becomes None in a smaller vocabulary.
        eos_token_id: EOS token or tokens; the default becomes None in a smaller vocabulary.
        pretraining_tp: Not used here; must be 1.
        tie_word_embeddings: Use the embedding as the head.
        rope_theta: Base of the rotary embeddings.
        rope_scaling: Scaling of the rotary embeddings; a mapping with exactly `type` and `factor` is accepted too.
        attention_bias: Whether the projections of attention have biases.
        attention_dropout: Dropout of attention weights in training.
        torch_dtype: dtype of the stored weights; not used here.
        transformers_version: Version that wrote config.json; not used here.
        architectures: Always `ARCHITECTURES`.
        extra: Unknown fields of config.json, written back on export.

    Raises:
        DSMoEError: A field has an unsupported value.
    """

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = _DEFAULT_BOS
    eos_token_id: int | tuple[int, ...] | None = _DEFAULT_EOS
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    torch_dtype: str | None = None
    transformers_version: str | None = None
    architectures: tuple[str, ...] = ARCHITECTURES
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Normalize and validate all fields."""
        for name, value in _normalized(self).items():
            object.__setattr__(self, name, value)
        for name, (kinds, low, high) in _LIMITS.items():
            _check(name, getattr(self, name), kinds, low, high)
        _check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        _check_choice("scoring_func", self.scoring_func, ("softmax",))
        _check_choice("pretraining_tp", self.pretraining_tp, (1,))
        object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads
        if self.hidden_size % (2 * heads):  # rotary embeddings rotate pairs
            raise DSMoEError(f"hidden_size {self.hidden_size} is not an even multiple of num_attention_heads {heads}")
        if self.rope_scaling is not None and self.rope_scaling.type == "dynamic" and self.head_dim == 2:
            raise DSMoEError("rope_scaling.type 'dynamic' needs heads wider than 2 (hidden_size / num_attention_heads)")
        if heads % kv_heads:
            raise DSMoEError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if self.n_routed_experts is not None:
            if self.num_experts_per_tok is None:
                raise DSMoEError(f"num_experts_per_tok is missing though n_routed_experts is {self.n_routed_experts}")
            _check("num_experts_per_tok", self.num_experts_per_tok, (int,), 1, self.n_routed_experts)
        if self.hash_routing and (self.num_experts_per_tok != 1 or self.aux_loss_alpha):
            raise DSMoEError("topk_method 'hash' needs num_experts_per_tok 1 and aux_loss_alpha 0")

    @property
    def num_kv_heads(self) -> int:
        """`num_key_value_heads`, or `num_attention_heads` for None."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def hash_routing(self) -> bool:
        """Whether `topk_method` in `extra` is "hash": experts by a hash of the token id, a baseline of the paper."""
        return self.extra.get("topk_method") == "hash"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids in `eos_token_id`: none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @property
    def context_length(self) -> int:
        """Trained context length in tokens: `max_position_embeddings`, times the factor of RoPE scaling."""
        return int(self.max_position_embeddings * (1 if self.rope_scaling is None else self.rope_scaling.factor))

    def with_dtype(self, dtype: str) -> "ModelConfig":
        """Replace `torch_dtype`, and `dtype`, its name in transformers 5, if present."""
        extra = {**self.extra, "dtype": dtype} if "dtype" in self.extra else self.extra
        return dataclasses.replace(self, torch_dtype=dtype, extra=extra)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, is an MoE layer."""
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        return self.n_routed_experts is not None and layer >= first and layer % every == 0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Create a config from the fields of a `config.json`.

        Known aliases are converted, `auto_map` is dropped, and unknown fields go to `extra`.

        Raises:
            DSMoEError: A field is invalid or probably misspelled, or enables a feature that DeepSeekMoE v1 lacks.
        """
        fields = standardize(fields)
        fields.pop("auto_map", None)
        _check_choice("model_type", fields.pop("model_type", MODEL_TYPE), (MODEL_TYPE,))
        defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "extra"}
        known = {name: fields.get(name, default) for name, default in defaults.items()}
        extra = {name: value for name, value in fields.items() if name not in known}
        check_unknown(extra, known, {*_FOREIGN, *_IMPLIED})  # before validation, which would report a missing field
        config = cls(**{name: value for name, value in fields.items() if name in known}, extra=extra)
        implied = {name: (None, getattr(config, field)) for name, field in _IMPLIED.items()}
        for name, neutral in (_FOREIGN | implied).items():
            if name in extra:
                _check_choice(name, extra[name], neutral)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `config.json`; the inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        extra = fields.pop("extra")
        fields["architectures"] = list(self.architectures)
        fields["eos_token_id"] = list(eos) if isinstance(eos := self.eos_token_id, tuple) else eos
        fields["rope_scaling"] = self.rope_scaling and self.rope_scaling._asdict()
        return {**extra, **fields, "model_type": MODEL_TYPE}

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a config from a `config.json` or its folder; the sizes of the model must be in it."""
        path = user_path(path, "config")
        path = path / "config.json" if path.is_dir() else path
        fields = read_json(path)
        try:
            config = cls.from_dict(fields)
        except ValueError as error:
            raise DSMoEError(f"{path}: {error}") from None
        sizes = _SIZES if config.n_routed_experts is None else (*_SIZES, "moe_intermediate_size")
        if missing := [name for name in sizes if name not in fields]:
            raise DSMoEError(f"{path}: is not the config of a model, it has no {', '.join(missing)}")
        return config

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The config of a model in `PRESETS`."""
        _check_choice("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name])


# fmt: off
_SIZE: Final = ((int,), 1, 1 << 24)  # beyond any real size; rejected before anything is allocated
_LARGEST: Final = 1e30  # fits float32, with room for powers
_TOKEN_ID: Final = ((int, None), 0, 1 << 31)
# field: (accepted types, lowest, highest)
_LIMITS: Final[dict[str, tuple[tuple[type | None, ...], float, float]]] = {
    "vocab_size":              _SIZE,
    "hidden_size":             _SIZE,
    "intermediate_size":       _SIZE,
    "moe_intermediate_size":   _SIZE,
    "num_hidden_layers":       ((int,), 1, 4096),
    "num_attention_heads":     _SIZE,
    "num_key_value_heads":     ((int, None), 1, 1 << 24),
    "n_shared_experts":        ((int, None), 1, 4096),
    "n_routed_experts":        ((int, None), 1, 65536),
    "num_experts_per_tok":     ((int, None), 1, 65536),
    "moe_layer_freq":          ((int,), 1, 4096),
    "first_k_dense_replace":   ((int,), 0, 4096),
    "norm_topk_prob":          ((bool,), 0, 1),
    "scoring_func":            ((str,), 0, 0),
    "aux_loss_alpha":          ((float, int), 0, _LARGEST),
    "seq_aux":                 ((bool,), 0, 1),
    "hidden_act":              ((str,), 0, 0),
    "max_position_embeddings": ((int,), 1, 1 << 31),
    "initializer_range":       ((float, int), 0, _LARGEST),
    "rms_norm_eps":            ((float, int), 0, 1),
    "use_cache":               ((bool,), 0, 1),
    "pad_token_id":            ((int, None), -1, 1 << 31),
    "bos_token_id":            _TOKEN_ID,
    "tie_word_embeddings":     ((bool,), 0, 1),
    "rope_theta":              ((float, int), 1e-3, _LARGEST),
    "attention_bias":          ((bool,), 0, 1),
    "attention_dropout":       ((float, int), 0, 0.999),
    "torch_dtype":             ((str, None), 0, 0),
    "transformers_version":    ((str, None), 0, 0),
}

# Fields of related models (DeepSeek V2 and V3, Llama), by the values that are equivalent to v1.
_FOREIGN: Final[dict[str, tuple[Any, ...]]] = {
    name: neutral
    for neutral, names in (
        ((None,), "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window "
                  "attn_logit_softcapping final_logit_softcapping attention_multiplier clip_qkv scale_depth "
                  "swiglu_limit"),
        ((None, False), "mlp_bias rope_interleave use_sliding_window qk_norm use_qk_norm use_parallel_residual "
                        "alibi qk_layernorm o_bias lm_head_bias router_bias expert_bias use_expert_bias "
                        "moe_router_enable_expert_bias attention_output_gate"),
        ((None, 0), "num_nextn_predict_layers num_mtp_layers mtp_num_layers dropout hidden_dropout "
                    "resid_pdrop embd_pdrop"),
        ((None, 1), "routed_scaling_factor partial_rotary_factor rope_scaling_factor logit_scale "
                    "logits_scaling embedding_multiplier residual_multiplier rotary_pct rope_pct rope_ratio "
                    "scale_emb residual_scale route_scale"),
        ((None, 0, 1), "n_group topk_group n_expert_groups n_limited_groups"),
        ((None, {}), "quantization_config pruned_heads"),
        ((None, []), "mlp_only_layers"),
        ((None, "greedy", "gready", "hash"), "topk_method"),  # DeepSeek V2's own default is misspelled
    )
    for name in names.split()
}
# Redundant fields of other configs, by the attribute they must equal.
_IMPLIED: Final = {"head_dim": "head_dim", "rotary_dim": "head_dim", "kv_channels": "head_dim",
                   "original_max_position_embeddings": "max_position_embeddings"}

_BASE: Final[dict[str, Any]] = {"bos_token_id": 100000, "eos_token_id": 100001, "torch_dtype": "bfloat16"}

# The paper's three models (arXiv 2401.06066, table 7) and two small ones. The paper gives expert widths as ratios of
# a standard feed-forward; 864 and 1408 reproduce its totals. The dense layer of the 145B is twice the standard
# feed-forward, as that of the 16B: 1.99B, 16.38B and 144.61B parameters in total (paper: 2.0, 16.4, 144.6).
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "deepseek_moe_16b": _BASE | {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
    },
    "deepseek_moe_2b": {
        "vocab_size": 8192, "hidden_size": 1280, "intermediate_size": 3456, "moe_intermediate_size": 864,
        "num_hidden_layers": 9, "num_attention_heads": 10, "num_key_value_heads": 10,
        "n_shared_experts": 1, "n_routed_experts": 63, "num_experts_per_tok": 7, "first_k_dense_replace": 0,
        "max_position_embeddings": 2048, "initializer_range": 0.006, "aux_loss_alpha": 0.01,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "deepseek_moe_145b": _BASE | {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 21888, "moe_intermediate_size": 1408,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32,
        "n_shared_experts": 4, "n_routed_experts": 128, "num_experts_per_tok": 12, "first_k_dense_replace": 1,
        "max_position_embeddings": 4096, "initializer_range": 0.006, "aux_loss_alpha": 0.003,
    },
    "bench": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2736, "moe_intermediate_size": 352,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    },
    "tiny": {
        "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "moe_intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6,
        "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    },
}
# fmt: on


def _normalized(config: ModelConfig) -> dict[str, Any]:
    """Normalized values of the fields that have equivalent spellings."""
    classes = config.architectures
    if not isinstance(classes, list | tuple | None) or not all(isinstance(name, str) for name in classes or ()):
        raise DSMoEError(f"architectures must be null or a list of strings, got {show_value(classes)}")
    eos = config.eos_token_id
    eos = int(eos) if type(eos) is float and eos.is_integer() else eos
    if isinstance(eos, list | tuple):
        for token in eos:
            _check("eos_token_id", token, *_TOKEN_ID)
        eos = tuple(dict.fromkeys(eos))
        eos = eos if len(eos) > 1 else next(iter(eos), None)
    else:
        _check("eos_token_id", eos, *_TOKEN_ID)
    # 0 experts means none; the original writes null.
    experts = {name: getattr(config, name) for name in ("n_shared_experts", "n_routed_experts", "num_experts_per_tok")}
    without = {name: None for name, value in experts.items() if type(value) is int and value == 0}
    if "n_routed_experts" not in without and config.n_routed_experts is not None:
        without.pop("num_experts_per_tok", None)
    integers = {
        name: int(value)  # 64.0, as written by programs with one number type
        for name, (kinds, _, _) in _LIMITS.items()
        if type(value := getattr(config, name)) is float and float not in kinds and value.is_integer()
    }
    fields = {**integers, **without, "architectures": ARCHITECTURES, "eos_token_id": eos}
    # The default ids do not exist in a smaller vocabulary.
    if type(config.vocab_size) is int:
        for name, default in (("bos_token_id", _DEFAULT_BOS), ("eos_token_id", _DEFAULT_EOS)):
            if fields.get(name, getattr(config, name)) == default >= config.vocab_size:
                fields[name] = None
    return fields


def _check(name: str, value: Any, kinds: tuple[type | None, ...], low: float, high: float) -> None:
    if value is None and None in kinds:
        return
    if type(value) not in kinds:
        allowed = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise DSMoEError(f"{name} must be {allowed}, got {show_value(value)}")
    if isinstance(value, str):
        return
    assert value is not None  # only fields with None in `kinds` accept it
    if not low <= value <= high:  # NaN is in no interval
        raise DSMoEError(f"{name} must be a finite number in [{low}, {high}], got {show_value(value)}")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(equal(value, choice) for choice in choices):
        raise DSMoEError(f"{name} {show_value(value)} is not supported, only {', '.join(map(repr, choices))}")


def _rope_scaling(value: Any) -> RopeScaling | None:
    """Parse null or {"type": "linear" | "dynamic", "factor": number > 1}; a linear factor of 1 is no scaling."""
    if value is None:
        return None
    fields = value._asdict() if isinstance(value, RopeScaling) else value
    if not isinstance(fields, Mapping) or set(fields) != {"type", "factor"}:
        raise DSMoEError(f"rope_scaling must be null or hold exactly `type` and `factor`, got {show_value(value)}")
    _check_choice("rope_scaling.type", fields["type"], ROPE_SCALING_TYPES)
    factor = fields["factor"]
    if type(factor) not in (int, float) or not 1 <= factor <= _LARGEST or (factor == 1 and fields["type"] != "linear"):
        raise DSMoEError(f"rope_scaling.factor must be a finite number > 1, got {show_value(factor)}")
    return None if factor == 1 else RopeScaling(fields["type"], float(factor))
