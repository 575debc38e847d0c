"""What the small files beside a vocabulary say: `read_settings` merges them as transformers does.

tokenizer_config.json has the settings. Older folders have special tokens in special_tokens_map.json and added ones in
added_tokens.json; both count only where tokenizer_config.json has no `added_tokens_decoder`.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import read_json

# What belongs to a tokenizer and travels with a checkpoint.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
KINDS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDITIONAL: Final = ("additional_special_tokens", "extra_special_tokens")
_FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Who decides about BOS and EOS: for these add_bos_token (default true) and add_eos_token, for the others the
# post-processor of tokenizer.json, unless the config has one of the two flags.
LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast", "DeepseekTokenizer", "DeepseekTokenizerFast")
GENERIC_CLASSES: Final = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)
_log = logging.getLogger("dsmoe_jax")


class Token(NamedTuple):
    """A token that is found in a text as a whole."""

    content: str
    lstrip: bool = False  # takes the spaces before it
    rstrip: bool = False  # and those after it
    single_word: bool = False  # only between spaces
    normalized: bool = False
    special: bool = True


class Settings(NamedTuple):
    """What the files of a tokenizer say."""

    config: Mapping[str, Any]
    special: dict[str, Token | None]  # by their kind, as far as named
    with_flags: frozenset[str]  # those tokens of `special` that the config writes out with flags of their own
    additional: tuple[Token, ...]
    added: dict[int, Token]

    @property
    def is_llama(self) -> bool:
        """Whether it is of the Llama family, which is also what a folder that names no class is taken for."""
        return self.config.get("tokenizer_class") in (None, *LLAMA_CLASSES)

    def flag(self, name: str, default: bool) -> bool:
        """The value of a flag; as in transformers null is false, and `default` is for an absent one."""
        value = self.config.get(name, default)
        if not isinstance(value, bool | None):
            raise DSMoEError(f"tokenizer_config.json: {name} must be true or false, got {value!r}")
        return bool(value)


def read_settings(folder: Path) -> Settings:
    """Reads the files of `folder` beside its vocabulary; none of them has to be there.

    Raises:
        ValueError: If a file is malformed, or names a `tokenizer_class` of another family.
    """
    config = _read(folder / "tokenizer_config.json")
    older = _read(folder / "special_tokens_map.json")
    numbered = folder / "added_tokens.json"
    known = (*LLAMA_CLASSES, *GENERIC_CLASSES)
    if (name := config.get("tokenizer_class")) is not None and name not in known:
        raise DSMoEError(
            f"tokenizer_config.json: tokenizer_class {name!r:.80} is not supported; allowed are {', '.join(known)}"
        )
    has_decoder = "added_tokens_decoder" in config
    different = [key for key in older if key in config and _content(older[key]) != _content(config[key])]
    if has_decoder:
        if missing := [key for key in older if key not in config or key in different]:
            _log.info("%s/special_tokens_map.json: ignored %s", folder, ", ".join(missing))
        if numbered.is_file():
            _log.info("%s: ignored, tokenizer_config.json has added_tokens_decoder", numbered)
    else:
        if different:
            _log.info("%s/special_tokens_map.json: overrides %s", folder, ", ".join(different))
        config = {**config, **older}
        for key in _ADDITIONAL:
            if isinstance(older.get(key), list) and isinstance(
                was := _read(folder / "tokenizer_config.json").get(key), list
            ):
                config[key] = [*was, *(token for token in older[key] if token not in was)]
    special = {kind: _special_token(kind, config[kind]) for kind in KINDS if kind in config}
    additional = tuple(token for key in _ADDITIONAL for token in _additional(key, config.get(key)))
    if has_decoder:
        added = _decoder(config["added_tokens_decoder"])
    else:
        names = {token.content for token in (*special.values(), *additional) if token is not None}
        added = _numbered(numbered, names) if numbered.is_file() else {}
    with_flags = frozenset(_content(config[kind]) for kind in special if isinstance(config[kind], dict))
    return Settings(config, special, with_flags - {token.content for token in added.values()}, additional, added)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(value: Any, **default: bool) -> Token:
    """A token from its text or from transformers' AddedToken, written out."""
    if isinstance(value, str):
        return Token(value, **default)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise DSMoEError(f"{value!r:.80} is neither a string nor an added token")
    flags = default | {name: value[name] for name in _FLAGS if name in value}
    if strange := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise DSMoEError(f"{strange[0]} must be true or false, got {flags[strange[0]]!r:.80}")
    return Token(value["content"], **({"normalized": not flags.get("special", True)} | flags))


def _special_token(kind: str, value: Any) -> Token | None:
    if value is None:
        return None
    try:
        token = _token(value)
    except ValueError:
        raise DSMoEError(f"{kind} {value!r:.80} is not in the tokenizer's vocabulary") from None
    return token._replace(special=True)


def _additional(key: str, value: Any) -> Iterator[Token]:
    if isinstance(value, dict):  # {"image_token": "<image>"}
        value = list(value.values())
    if not isinstance(value, list | None):
        raise DSMoEError(f"tokenizer_config.json: {key} must be a list of tokens, got {value!r:.80}")
    for token in value or ():
        try:
            yield _token(token)._replace(special=True)
        except ValueError as error:
            raise DSMoEError(f"tokenizer_config.json: {key}: {error}") from None


def _decoder(value: Any) -> dict[int, Token]:
    try:
        return {int(i): _token(dict(token), special=False) for i, token in sorted((value or {}).items(), key=_number)}
    except (AttributeError, TypeError, ValueError):
        raise DSMoEError("tokenizer_config.json: added_tokens_decoder must map ids to tokens") from None


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _numbered(path: Path, special: set[str]) -> dict[int, Token]:
    ids = read_json(path)
    if not all(type(i) is int and i >= 0 for i in ids.values()):
        raise DSMoEError(f"{path}: must map tokens to ids")
    return {
        i: Token(name, special=name in special, normalized=name not in special)
        for name, i in sorted(ids.items(), key=lambda item: item[1])
    }
