"""Check the BOS, EOS and padding ids of config, generation config and tokenizer. Start at `check_special_ids`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Protocol

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config_aliases import show_value
from dsmoe_jax.errors import DSMoEError

SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_Fields = Mapping[str, Any]
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "the tokenizer"


class SpecialTokens(Protocol):
    """The special token ids of a `Tokenizer`, None if undefined."""

    bos_token_id: int | None
    eos_token_id: int | None


def check_special_ids(
    config: ModelConfig, tokenizer: SpecialTokens | None, generation_config: _Fields | None = None, where: str = ""
) -> list[str]:
    """Return a warning for each special token id that is outside the vocabulary or differs between sources.

    Raises if every EOS id or the tokenizer's BOS id is outside the vocabulary. Messages start with `where`.
    """
    V, prefix = config.vocab_size, f"{where}: " if where else ""
    sources = {_CONFIG: {name: getattr(config, name) for name in SPECIAL_IDS}, _GENERATION: generation_config or {}}
    if tokenizer is not None:
        sources[_TOKENIZER] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids, warnings, outside = {}, [], f"outside the vocabulary of {V} tokens"
    for source, fields in sources.items():
        for name in SPECIAL_IDS:
            ids[source, name] = tokens = token_ids(name, fields.get(name), f"{prefix}{source}: ")
            invalid = [token for token in tokens if not _is_valid(name, token, V)]
            warnings += [f"{prefix}{name} {token} of {source} is {outside}" for token in invalid]
    bos, config_bos = ids.get((_TOKENIZER, "bos_token_id"), ()), ids[_CONFIG, "bos_token_id"]
    eos = ids.get((_TOKENIZER, "eos_token_id"), ())
    stops = ids[_GENERATION, "eos_token_id"] or ids[_CONFIG, "eos_token_id"] or eos
    inside = [token for token in (*stops, *eos) if _is_valid("eos_token_id", token, V)]
    if stops and not inside:
        raise DSMoEError(f"{prefix}eos_token_id {stops[0]} is {outside}, so generation would never stop")
    if bos and bos[0] >= V:
        raise DSMoEError(f"{prefix}bos_token_id {bos[0]} of {_TOKENIZER} is {outside}")
    if bos and config_bos and bos != config_bos:
        warnings.append(f"{prefix}bos_token_id is {config_bos[0]} in {_CONFIG}, {bos[0]} in {_TOKENIZER}")
    if eos and eos[0] not in stops and any(token in inside for token in stops):
        among = f"not among the EOS ids of generation, {list(stops)}"
        warnings.append(f"{prefix}eos_token_id {eos[0]} of {_TOKENIZER} is {among}")
    return warnings


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the values of a field that is null, a single value or a list."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def token_ids(name: str, value: Any, where: str = "") -> tuple[int, ...]:
    """Return the ids of the field `name`: none, one or several. Errors start with `where`."""
    tokens = as_tuple(value)
    for token in tokens:
        if type(token) is not int or not -1 <= token < 1 << 31:
            raise DSMoEError(f"{where}{name} must be a token id or a list of token ids, got {show_value(value)}")
    return tokens


def _is_valid(name: str, token: int, vocab_size: int) -> bool:
    """Return whether the id is in the vocabulary; in Llama configs a padding id of -1 means none."""
    return 0 <= token < vocab_size or (name == "pad_token_id" and token == -1)


def with_special_ids(config: ModelConfig, bos: int | None, eos: int | None) -> ModelConfig:
    """Return the config with this BOS id, and this EOS id unless the config lists it."""
    ids = {} if bos is None else {"bos_token_id": bos}
    if eos is not None and eos not in config.eos_token_ids:
        ids["eos_token_id"] = eos
    return dataclasses.replace(config, **ids)


def drop_ids_outside_vocab(fields: _Fields, vocab_size: int) -> dict[str, Any]:
    """Return config fields with token ids outside the vocabulary removed from lists or set to None."""
    cleaned = dict(fields)
    for name, value in fields.items():
        if name.endswith("_token_id") and type(value) is int and not _is_valid(name, value, vocab_size):
            cleaned[name] = None
    for name in SPECIAL_IDS:
        tokens = token_ids(name, fields.get(name))
        inside = [token for token in tokens if _is_valid(name, token, vocab_size)]
        if len(inside) < len(tokens):
            cleaned[name] = inside if len(inside) > 1 else next(iter(inside), None)
    return cleaned


def ids_for_export(fields: _Fields, tokenizer: SpecialTokens | None, vocab_size: int) -> dict[str, Any]:
    """Return config fields with valid token ids only; missing BOS and EOS ids come from the tokenizer."""
    exported = drop_ids_outside_vocab(fields, vocab_size)
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if exported.get(name) is None and token is not None and token < vocab_size:
            exported[name] = token
    return exported
