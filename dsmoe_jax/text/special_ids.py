"""The ids of BOS, EOS and padding: do config, generation config and tokenizer agree? Start at `check_special_ids`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config_aliases import show_value
from dsmoe_jax.errors import DSMoEError

SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "the tokenizer"


class SpecialTokens(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The id of BOS, if there is one."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id of EOS, if there is one."""
        ...


class SpecialTokenIds(NamedTuple):
    """The ids alone, where there is no tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None


def check_special_ids(
    config: ModelConfig,
    tokenizer: SpecialTokens | None = None,
    generation_config: Mapping[str, Any] | None = None,
    where: str = "",
) -> list[str]:
    """Check that special token ids fit the vocabulary and one another. Changes nothing.

    Args:
        config: the model's.
        tokenizer: that of the same folder or run, if there is one.
        generation_config: the fields of its `generation_config.json`, if there is one.
        where: what the message starts with, a folder for example.

    Returns:
        One line for each thing that is legal but looks wrong, for the log.

    Raises:
        ValueError: every EOS id is outside the vocabulary, so that generation would never stop, or the tokenizer's BOS
            is, so that no prompt could be read.
    """
    V, prefix = config.vocab_size, f"{where}: " if where else ""
    sources = {_CONFIG: {name: getattr(config, name) for name in SPECIAL_IDS}, _GENERATION: generation_config or {}}
    if tokenizer is not None:
        sources[_TOKENIZER] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids = {
        (source, name): token_ids(name, fields.get(name), f"{prefix}{source}: ")
        for source, fields in sources.items()
        for name in SPECIAL_IDS
    }
    outside = f"outside the vocabulary of {V} tokens"
    lines = [
        f"{prefix}{name} {token} of {source} is {outside}"
        for (source, name), tokens in ids.items()
        for token in tokens
        if not _fits(name, token, V)
    ]
    bos, own_bos = ids.get((_TOKENIZER, "bos_token_id"), ()), ids[_CONFIG, "bos_token_id"]
    eos = ids.get((_TOKENIZER, "eos_token_id"), ())
    stops = ids[_GENERATION, "eos_token_id"] or ids[_CONFIG, "eos_token_id"] or eos
    inside = [token for token in (*stops, *eos) if _fits("eos_token_id", token, V)]
    if stops and not inside:
        raise DSMoEError(f"{prefix}eos_token_id {stops[0]} is {outside}, so generation would never stop")
    if bos and bos[0] >= V:
        raise DSMoEError(f"{prefix}bos_token_id {bos[0]} of {_TOKENIZER} is {outside}")
    if bos and own_bos and bos != own_bos:
        lines.append(f"{prefix}bos_token_id is {own_bos[0]} in {_CONFIG}, {bos[0]} in {_TOKENIZER}")
    if eos and eos[0] not in stops and any(token in inside for token in stops):
        lines.append(
            f"{prefix}eos_token_id {eos[0]} of {_TOKENIZER} is not among {list(stops)}, where generation stops"
        )
    return lines


def token_ids(name: str, value: Any, where: str = "") -> tuple[int, ...]:
    """The ids of a field that holds one, several or none; `ValueError` for anything else."""
    tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token in tokens:
        if type(token) is not int or not -1 <= token < 1 << 31:
            raise DSMoEError(f"{where}{name} must be a token id or a list of them, not {show_value(value)}")
    return tokens


def _fits(name: str, token: int, vocab_size: int) -> bool:
    """Whether the token is in the vocabulary; a padding id of -1, in Llama's configs, says that there is none."""
    return 0 <= token < vocab_size or (name == "pad_token_id" and token == -1)


def with_tokenizer_ids(config: ModelConfig, tokenizer: SpecialTokens) -> ModelConfig:
    """The config with the tokenizer's BOS and EOS in place of its own, for a model that is trained with it.

    Its EOS ids stay where the tokenizer's is among them.
    """
    own = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    if own["eos_token_id"] in config.eos_token_ids:
        own["eos_token_id"] = None
    return dataclasses.replace(config, **{name: token for name, token in own.items() if token is not None})


def drop_ids_outside_vocab(fields: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The fields of a config without token ids outside the vocabulary: null, or what is left of a list."""
    kept = dict(fields)
    for name, value in fields.items():
        if name.endswith("_token_id") and type(value) is int and not _fits(name, value, vocab_size):
            kept[name] = None
    for name in SPECIAL_IDS:
        tokens = token_ids(name, fields.get(name))
        inside = [token for token in tokens if _fits(name, token, vocab_size)]
        if len(inside) < len(tokens):
            kept[name] = inside if len(inside) > 1 else next(iter(inside), None)
    return kept


def exported_ids(fields: Mapping[str, Any], tokenizer: SpecialTokens | None, vocab_size: int) -> dict[str, Any]:
    """The fields of a config without ids outside the vocabulary; BOS and EOS are the tokenizer's where none is left."""
    kept = drop_ids_outside_vocab(fields, vocab_size)
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if kept.get(name) is None and token is not None and token < vocab_size:
            kept[name] = token
    return kept
