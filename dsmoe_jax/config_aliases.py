"""Aliases of the fields of a `config.json`, in transformers 4 and 5 and in related models. Start at `standardize`."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError, closest

ROPE_SCALING_TYPES: Final = ("linear", "dynamic")
_DEFAULT_ROPE: Final = "default"  # transformers' name for plain RoPE
_DEFAULT_LENGTH: Final = 2048  # default of max_position_embeddings
_MAX_UNKNOWN: Final = 300  # fields; fuzzy matching is slow
_NEAR: Final = 0.83  # difflib ratio: one or two wrong letters

# The value that the original code treats null as.
_NULLS: Final[dict[str, Any]] = {
    "attention_bias": False,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "seq_aux": False,
    "aux_loss_alpha": 0.0,
    "attention_dropout": 0.0,
    "use_cache": True,
    "pretraining_tp": 1,
    "model_type": "deepseek",
}

# fmt: off
# Field: its names in other libraries and models.
_ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "vocab_size":              ("n_vocab", "padded_vocab_size", "vocabulary_size"),
    "hidden_size":             ("base_emb_dim", "d_model", "dim", "emb_dim", "embed_dim", "embedding_length",
                                "embedding_size", "hidden_dim", "model_dim", "n_embd"),
    "intermediate_size":       ("base_mlp_dim", "d_ff", "d_inner", "feed_forward_length", "ffn_dim", "ffn_hidden_size",
                                "inter_dim", "mlp_dim", "n_inner"),
    "moe_intermediate_size":   ("base_moe_mlp_dim", "expert_dim", "expert_feed_forward_length",
                                "expert_ffn_hidden_size", "expert_hidden_size", "expert_intermediate_size",
                                "moe_ffn_hidden_size", "moe_inter_dim", "moe_mlp_dim"),
    "num_hidden_layers":       ("base_num_decoder_layers", "block_count", "depth", "n_block", "n_layer", "n_layers",
                                "num_block", "num_decoder_layers", "num_layer", "num_layers"),
    "num_attention_heads":     ("base_num_query_heads", "head_count", "heads", "n_head", "n_heads", "num_attn_heads",
                                "num_head", "num_heads", "num_query_heads"),
    "num_key_value_heads":     ("base_num_kv_heads", "head_count_kv", "kv_heads", "multi_query_group_num", "n_head_kv",
                                "n_kv_head", "n_kv_heads", "num_kv_heads", "num_query_groups"),
    "n_shared_experts":        ("expert_shared_count", "moe_num_shared_experts", "moe_shared_expert_intermediate_size",
                                "num_shared", "num_shared_expert", "num_shared_experts",
                                "shared_expert_intermediate_size"),
    "n_routed_experts":        ("expert_count", "expert_num", "moe_num_experts", "n_experts", "num_expert",
                                "num_experts", "num_local_experts", "num_moe_experts", "num_routed_experts"),
    "num_experts_per_tok":     ("expert_used_count", "experts_per_token", "moe_k", "moe_router_topk", "moe_top_k",
                                "moe_topk", "n_activated_experts", "n_expert_used", "num_activated_experts",
                                "num_active_experts", "num_experts_per_token", "num_experts_to_select",
                                "num_experts_topk", "num_selected_experts", "router_top_k", "router_topk",
                                "top_k_experts", "topk"),
    "moe_layer_freq":          ("decoder_sparse_step", "expert_layer_period", "moe_every_n_layers", "moe_freq",
                                "moe_frequency", "moe_layer_frequency", "moe_layer_interval"),
    "first_k_dense_replace":   ("first_k_dense", "first_k_dense_layers", "first_num_dense_layers",
                                "leading_dense_block_count", "moe_layer_start_index", "n_dense_layers",
                                "num_dense_layers", "num_first_dense_layers"),
    "norm_topk_prob":          ("moe_renormalize", "norm_topk", "norm_topk_weights", "normalize_expert_weights",
                                "normalize_topk_prob", "renormalize", "route_norm"),
    "scoring_func":            ("moe_router_score_function", "router_score_func", "score_func", "score_function",
                                "scoring", "scoring_function"),
    "aux_loss_alpha":          ("aux_alpha", "aux_loss", "aux_loss_coef", "aux_loss_coeff", "aux_loss_weight",
                                "balance_alpha", "balance_loss_coef", "load_balancing_loss_coef", "moe_aux_loss_coef",
                                "moe_aux_loss_coeff", "router_aux_loss_coef", "router_aux_loss_factor"),
    "hidden_act":              ("act", "act_fn", "activation", "activation_function", "ffn_act_fn",
                                "hidden_activation"),
    "max_position_embeddings": ("block_size", "context_length", "context_size", "max_context_length", "max_positions",
                                "max_seq_len", "max_seq_length", "max_sequence_length", "n_ctx", "n_positions",
                                "seq_length"),
    "initializer_range":       ("init_method_std", "init_range", "init_std", "initializer_std"),
    "rms_norm_eps":            ("layer_norm_eps", "layer_norm_epsilon", "layer_norm_rms_epsilon", "layernorm_eps",
                                "layernorm_epsilon", "norm_eps", "norm_epsilon", "normalization_layer_epsilon",
                                "rms_eps"),
    "tie_word_embeddings":     ("share_embeddings", "tie_embeddings", "tie_weights", "tied_embeddings", "weight_tying"),
    "rope_theta":              ("base", "rope_base", "rope_freq_base", "rope_max_timescale", "rotary_base",
                                "rotary_emb_base", "theta"),
    "rope_scaling":            ("rope", "rope_scale", "rope_scaling_config", "rotary_scaling"),
    "bos_token_id":            ("bos_id",),
    "eos_token_id":            ("eos_id",),
    "pad_token_id":            ("pad_id",),
    "attention_bias":          ("add_bias_linear", "add_qkv_bias", "attn_bias", "bias", "qkv_bias", "use_bias"),
    "attention_dropout":       ("attention_probs_dropout_prob", "attn_dropout", "attn_pdrop"),
}

# Unrelated fields of transformers' configs with similar names.
_UNRELATED: Final = frozenset({
    "boa_token_id", "boi_token_id", "decoder_start_token_id", "eoa_token_id", "eod_token_id", "eoi_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout_prob", "max_length", "num_beam_groups",
    "output_attentions", "router_z_loss_coef", "sep_token_id", "top_k", "torchscript", "typical_p", "unk_token_id",
    "use_bfloat16",
})
# fmt: on
_FIELD_OF: Final = {alias: field for field, aliases in _ALIASES.items() for alias in aliases}


def standardize(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of a `config.json` to the original's spellings; contradictions are errors."""
    fields = dict(fields)
    fields |= {name: default for name, default in _NULLS.items() if name in fields and fields[name] is None}
    if type(fields.get("pretraining_tp")) is int and fields["pretraining_tp"] == 0:
        fields["pretraining_tp"] = 1  # only values above 1 have an effect
    for name in ("bos_token_id", "pad_token_id"):
        if isinstance(ids := fields.get(name), list | tuple):
            if len(ids) > 1:
                raise DSMoEError(f"{name} must be one token id, got {show_value(ids)}")
            fields[name] = next(iter(ids), None)
    for name in ("torch_dtype", "dtype"):
        if isinstance(dtype := fields.get(name), str):
            fields[name] = dtype.removeprefix("torch.")
    if fields.get("dtype") is not None:  # takes precedence in transformers, too
        fields["torch_dtype"] = fields["dtype"]
    layers = fields.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers)):
        raise DSMoEError(f"layer_types {show_value(layers)} is not supported, only 'full_attention' for every layer")
    _standardize_rope(fields)
    return fields


def check_unknown(extra: Mapping[str, Any], known: Mapping[str, Any], foreign: Collection[str]) -> None:
    """Reject unknown fields that look misspelled or are aliases of a known field with a different value."""
    if len(extra) > _MAX_UNKNOWN:
        raise DSMoEError(f"{len(extra)} fields are unknown to this model; at most {_MAX_UNKNOWN}")
    names = {*known, "dtype", "auto_map", "layer_types", "rope_parameters"}
    candidates = (*_FIELD_OF, *foreign, *names)
    simple, by_words = ({form(name): name for name in candidates} for form in (_simple, _words))
    for name, value in extra.items():
        if name in names or name in foreign or name in _UNRELATED:
            continue
        if (field := _FIELD_OF.get(name)) is not None:
            if value is not None and not equal(value, known[field]):
                raise DSMoEError(f"unknown field {name!r}; in this model it is called {field!r}")
        elif meant := _meant(name, simple, by_words):
            raise DSMoEError(f"unknown field {show_value(name)}; did you mean {_FIELD_OF.get(meant, meant)!r}?")
        elif isinstance(value, Mapping) and (inner := [field for field in _ALIASES if field in value]):
            raise DSMoEError(f"{show_value(name)} holds {inner[0]!r}, which must be at the top level")


def _standardize_rope(fields: dict[str, Any]) -> None:
    """Convert `rope_scaling` and `rope_parameters` of transformers 5 to `rope_theta` and `rope_scaling`."""
    thetas = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    scalings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name)
        if isinstance(value, Mapping) and value:
            theta, scalings[name] = _read_rope(name, value, fields.get("max_position_embeddings", _DEFAULT_LENGTH))
            if theta is not None:
                thetas[f"{name}.rope_theta"] = theta
        elif value is not None and not isinstance(value, Mapping):
            raise DSMoEError(f"{name} must be null or an object, got {show_value(value)}")
    fields.pop("rope_parameters", None)
    _check_agree(thetas)
    _check_agree(scalings)
    if thetas:
        fields["rope_theta"] = next(iter(thetas.values()))
    if "rope_scaling" in fields or scalings:
        fields["rope_scaling"] = next(iter(scalings.values()), None)


def _read_rope(name: str, value: Mapping[str, Any], length: Any) -> tuple[Any, dict[str, Any] | None]:
    """The theta and the scaling in a RoPE object; a scaling of None is plain RoPE."""
    rest = {key: item for key, item in value.items() if item is not None}
    theta = rest.pop("rope_theta", None)
    kinds = {f"{name}.{key}": rest.pop(key) for key in ("rope_type", "type") if key in rest}
    _check_agree(kinds)
    kind = next(iter(kinds.values()), _DEFAULT_ROPE)
    allowed = (_DEFAULT_ROPE, *ROPE_SCALING_TYPES)
    if kind not in allowed:
        raise DSMoEError(f"{name}.type {show_value(kind)} is not supported, only {', '.join(map(repr, allowed))}")
    neutral = {"partial_rotary_factor": 1, "attention_factor": 1, "original_max_position_embeddings": length}
    if kind == _DEFAULT_ROPE:
        neutral["factor"] = 1
    for key, meaning in neutral.items():
        if key in rest and not equal(found := rest.pop(key), meaning):
            raise DSMoEError(f"{name}.{key} {show_value(found)} is not supported with type {kind!r}, only {meaning!r}")
    if rest and kind == _DEFAULT_ROPE:
        raise DSMoEError(f"{name}.{next(iter(rest))[:80]} is not supported with type {kind!r}")
    return theta, None if kind == _DEFAULT_ROPE else {"type": kind, **rest}


def _check_agree(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        first, expected = next(iter(values.items()))
        if value != expected:
            raise DSMoEError(f"{first} {show_value(expected)} and {name} {show_value(value)} contradict each other")


def _meant(name: str, simple: Mapping[str, str], by_words: Mapping[str, str]) -> str | None:
    """The closest known name, by letters or by words."""
    near = closest(_simple(name), simple, _NEAR)
    return simple[near] if near else by_words.get(_words(name))


def _words(name: str) -> str:
    """The sorted words of a name, without count prefixes: `n_experts_routed` equals `num_routed_expert`."""
    words = {word.rstrip("s") for word in re.findall(r"[a-z0-9]+", name[:80].lower())}
    return " ".join(sorted(words - {"n", "num", "number", "nr", "of"}))


def _simple(name: str) -> str:
    """The name in lower case without punctuation: `hiddenSize` equals `hidden-size`."""
    return re.sub(r"[^a-z0-9]", "", name[:80].lower())


def equal(value: Any, other: Any) -> bool:
    """Whether two values are equal, with True and 1 distinct."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def show_value(value: Any) -> str:
    """Format a value from an untrusted file in one short line."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print very large ones
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
