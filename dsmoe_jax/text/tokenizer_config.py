"""Read the configuration files of a tokenizer and merge them as transformers does. Start at `read_settings`.

special_tokens_map.json and added_tokens.json, written by older releases of transformers, are read only if
tokenizer_config.json has no `added_tokens_decoder`.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import read_json

# fmt: off
# Copied with a checkpoint.
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)
SPECIAL_TOKENS_ATTRIBUTES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)
_ADDITIONAL: Final = ("additional_special_tokens", "extra_special_tokens")
_FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Llama classes add BOS and EOS by add_bos_token (default true) and add_eos_token, generic ones by the post-processor of
# tokenizer.json.
LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast", "DeepseekTokenizer", "DeepseekTokenizerFast")
GENERIC_CLASSES: Final = (
    "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)
# fmt: on
_log = logging.getLogger("dsmoe_jax")


class AddedToken(NamedTuple):
    """A token matched before the tokenizer model runs, with the fields of transformers' AddedToken."""

    content: str
    lstrip: bool = False  # also matches spaces before it
    rstrip: bool = False  # also matches spaces after it
    single_word: bool = False  # matches only between spaces
    normalized: bool = False
    special: bool = True


class TokenizerSettings(NamedTuple):
    """The merged settings of a tokenizer."""

    config: Mapping[str, Any]  # fields of tokenizer_config.json
    special_tokens: dict[str, AddedToken | None]  # by attribute (`bos_token` …), if set in a file
    with_flags: frozenset[str]  # special tokens with explicit flags
    additional_special_tokens: tuple[AddedToken, ...]
    added_tokens: dict[int, AddedToken]  # by id

    @property
    def is_llama(self) -> bool:
        """Return whether the tokenizer class is of the Llama family, the default."""
        return self.config.get("tokenizer_class") in (None, *LLAMA_CLASSES)

    @property
    def named_tokens(self) -> list[AddedToken]:
        """Return all special tokens."""
        return [token for token in (*self.special_tokens.values(), *self.additional_special_tokens) if token]

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean field: `default` if absent, false if null, as in transformers."""
        value = self.config.get(name, default)
        if not isinstance(value, bool | None):
            raise DSMoEError(f"tokenizer_config.json: {name} must be true or false, got {value!r}")
        return bool(value)


def read_settings(folder: Path) -> TokenizerSettings:
    """Read and validate a tokenizer's configuration files; all of them are optional."""
    paths = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    config, tokens_map = (read_json(path) if path.is_file() else {} for path in paths)
    added_path = folder / "added_tokens.json"
    if (name := config.get("tokenizer_class")) not in (None, *LLAMA_CLASSES, *GENERIC_CLASSES):
        allowed = ", ".join((*LLAMA_CLASSES, *GENERIC_CLASSES))
        raise DSMoEError(f"tokenizer_config.json: tokenizer_class {name!r:.80} is not supported; allowed are {allowed}")
    has_decoder = "added_tokens_decoder" in config
    different = [key for key in tokens_map if key in config and _content(tokens_map[key]) != _content(config[key])]
    if has_decoder:
        if ignored := [key for key in tokens_map if key not in config or key in different]:
            _log.info("Ignoring %s of %s/special_tokens_map.json", ", ".join(ignored), folder)
        if added_path.is_file():
            _log.info("Ignoring %s: tokenizer_config.json has added_tokens_decoder", added_path)
    else:
        if different:
            _log.info("Using %s of %s/special_tokens_map.json", ", ".join(different), folder)
        merged = {**config, **tokens_map}
        for key in _ADDITIONAL:
            if isinstance(config.get(key), list) and isinstance(tokens_map.get(key), list):
                merged[key] = [*config[key], *(token for token in tokens_map[key] if token not in config[key])]
        config = merged
    special = {key: _special_token(key, config[key]) for key in SPECIAL_TOKENS_ATTRIBUTES if key in config}
    additional = tuple(token for key in _ADDITIONAL for token in _additional(key, config.get(key)))
    if has_decoder:
        added = _added_tokens_decoder(config["added_tokens_decoder"])
    else:
        names = {token.content for token in (*special.values(), *additional) if token is not None}
        added = _added_tokens(added_path, names) if added_path.is_file() else {}
    with_flags = frozenset(_content(config[key]) for key in special if isinstance(config[key], dict))
    with_flags -= {token.content for token in added.values()}
    return TokenizerSettings(config, special, with_flags, additional, added)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(value: Any, **default: bool) -> AddedToken:
    """Return a token from its string or from a serialized AddedToken."""
    if isinstance(value, str):
        return AddedToken(value, **default)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise DSMoEError(f"{value!r:.80} is neither a string nor an added token")
    flags = default | {name: value[name] for name in _FLAGS if name in value}
    if bad := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise DSMoEError(f"{bad[0]} must be true or false, got {flags[bad[0]]!r:.80}")
    return AddedToken(value["content"], **({"normalized": not flags.get("special", True)} | flags))


def _special_token(key: str, value: Any) -> AddedToken | None:
    if value is None:
        return None
    try:
        return _token(value)._replace(special=True)
    except DSMoEError:
        raise DSMoEError(f"{key} {value!r:.80} is not in the tokenizer's vocabulary") from None


def _additional(key: str, value: Any) -> Iterator[AddedToken]:
    if isinstance(value, dict):  # {"image_token": "<image>"}
        value = list(value.values())
    if not isinstance(value, list | None):
        raise DSMoEError(f"tokenizer_config.json: {key} must be a list of tokens, got {value!r:.80}")
    for token in value or ():
        try:
            yield _token(token)._replace(special=True)
        except DSMoEError as error:
            raise DSMoEError(f"tokenizer_config.json: {key}: {error}") from None


def _added_tokens_decoder(value: Any) -> dict[int, AddedToken]:
    try:
        tokens = {int(i): _token(dict(token), special=False) for i, token in (value or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise DSMoEError("tokenizer_config.json: added_tokens_decoder must map ids to tokens") from None
    return dict(sorted(tokens.items()))


def _added_tokens(path: Path, special: set[str]) -> dict[int, AddedToken]:
    ids = read_json(path)
    if not all(type(i) is int and i >= 0 for i in ids.values()):
        raise DSMoEError(f"{path}: must map tokens to ids")
    return {
        i: AddedToken(content, special=content in special, normalized=content not in special)
        for content, i in sorted(ids.items(), key=lambda item: item[1])
    }
