"""Tokenizer backends with transformers' ids: tokenizers for tokenizer.json, sentencepiece for tokenizer.model."""

import functools
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Protocol

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.escaping import longest_match, make_placeholders
from dsmoe_jax.text.tokenizer_config import GENERIC_CLASSES, AddedToken, TokenizerSettings

Affixes = tuple[list[int], list[int]]  # ids before and after a text


class Backend(Protocol):
    """A tokenizer library with a loaded tokenizer."""

    vocab_size: int  # number of ids, including added tokens
    special_ids: dict[str, int]  # of special tokens by string; `split_special_tokens` encodes these strings as text
    placeholders: dict[str, str]  # replacements of special tokens under `split_special_tokens`
    affixes: Affixes  # added by the post-processor

    def default_special(self, attribute: str) -> str | None:
        """Return the special token of an attribute (`bos_token` …) that the config does not set."""
        ...

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        ...

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text; if split, only placeholders become special tokens."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of the ids."""
        ...


class TokenizersBackend:
    """tokenizer.json, read by the tokenizers library."""

    # Special tokens of DeepSeek and Llama, used if the config sets none.
    _KNOWN: Final = {"bos_token": ("<｜begin▁of▁sentence｜>", "<s>"), "eos_token": ("<｜end▁of▁sentence｜>", "</s>")}

    def __init__(self, path: Path, settings: TokenizerSettings):
        import tokenizers

        try:
            library = self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise DSMoEError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        self.id_of, self.decode = library.token_to_id, library.decode
        # Settings left from training; prompts must not be truncated or padded.
        self._padding = (library.padding or {}).get("pad_token")
        library.no_truncation()
        library.no_padding()
        if dropout := getattr(library.model, "dropout", None):
            raise DSMoEError(f"{path}: dropout {dropout} makes encoding random; set it to null")
        _check_prefix_space(path, library, settings)
        self._add(settings)
        added = library.get_added_tokens_decoder()
        self.vocab_size = max(library.get_vocab_size(), max(added, default=-1) + 1)
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.placeholders = make_placeholders(self.special_ids)
        self.affixes = _affixes(library)

    def _add(self, settings: TokenizerSettings) -> None:
        """Add the config's tokens, whose flags override tokenizer.json, and mark special ones."""
        names = {token.content for token in settings.named_tokens}
        present = {token.content for token in self._library.get_added_tokens_decoder().values()}
        has_flags = "added_tokens_decoder" in settings.config  # added_tokens.json has ids only
        for i, token in settings.added_tokens.items():
            if has_flags or token.content not in present:
                self._library.add_tokens([_added_token(token, token.special or token.content in names)])
            if (got := self.id_of(token.content)) != i:
                raise DSMoEError(f"added token {token.content!r} has id {i} in the config and {got} in tokenizer.json")
        present = {token.content: token for token in self._library.get_added_tokens_decoder().values()}
        for token in settings.named_tokens:
            found = None if has_flags and token.content in settings.with_flags else present.get(token.content)
            if found is not None and not found.special:
                found.special = True
                self._library.add_tokens([found])
            elif found is None and self.id_of(token.content) is not None:
                self._library.add_tokens([_added_token(token, special=True)])

    def default_special(self, attribute: str) -> str | None:
        """See `Backend`."""
        candidates = (self._padding or "",) if attribute == "pad_token" else self._KNOWN.get(attribute, ())
        return next((name for name in candidates if self.id_of(name) is not None), None)

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """See `Backend`."""
        library, ids = self._split if split_special_tokens else (self._library, None)
        # encode_batch_fast skips the unused text offsets.
        found = [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]
        return found if ids is None else [[ids.get(i, i) for i in one] for one in found]

    @functools.cached_property
    def _split(self) -> tuple[Any, dict[int, int]]:
        """Return a copy of the tokenizer with placeholders for special tokens, and the map from its ids to ours.

        The library's `encode_special_tokens` is tokenizer state, so it is not thread-safe.
        """
        import tokenizers

        fields = json.loads(self._library.to_str())
        fields["added_tokens"], fields["post_processor"] = [], None
        library, ids = tokenizers.Tokenizer.from_str(json.dumps(fields)), {}
        for i, token in sorted(self._library.get_added_tokens_decoder().items()):
            name = self.placeholders.get(token.content, token.content)
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            library.add_tokens([tokenizers.AddedToken(name, **flags)])
            ids[library.token_to_id(name)] = i
        return library, ids


def _added_token(token: AddedToken, special: bool) -> Any:
    import tokenizers

    flags = token._asdict()
    return tokenizers.AddedToken(flags.pop("content"), **flags | {"special": special})


def _affixes(library: Any) -> Affixes:
    plain, full = (library.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    return full[:at], full[at + len(plain) :]


def _check_prefix_space(path: Path, library: Any, settings: TokenizerSettings) -> None:
    """Reject an `add_prefix_space` that transformers 4 applies and transformers 5 ignores."""
    if settings.config.get("add_prefix_space") is None and settings.is_llama:
        return
    configured = settings.flag("add_prefix_space", False)
    actual = _prefix_space(json.loads(library.to_str()), nested=settings.is_llama)
    if actual is not None and configured != actual:
        found = f"{str(actual).lower()} and {str(configured).lower()}"
        files = f"{path} and tokenizer_config.json (default false)"
        raise DSMoEError(f"add_prefix_space must be the same in {files}, got {found}")


def _prefix_space(fields: Mapping[str, Any], nested: bool) -> bool | None:
    """Return whether a tokenizer.json prepends a space, or None without such a step."""
    steps = [fields.get("pre_tokenizer"), fields.get("normalizer")]
    inner = [inner for step in steps if step for inner in step.get("pretokenizers", step.get("normalizers", []))]
    steps += inner if nested else []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": bool(prefix)}:
                return prefix
            case {"type": "Metaspace", "prepend_scheme": str(scheme)} if nested:
                return scheme != "never"
            case {"type": "Prepend"} if nested:
                return True
    return None


_Part = tuple[str, int | None]  # text for sentencepiece and None, or an added token and its id


class SentencePieceBackend:
    """tokenizer.model, read by sentencepiece as in transformers' LlamaTokenizer."""

    def __init__(self, path: Path, settings: TokenizerSettings):
        import sentencepiece

        _check_model_flags(settings)
        self._legacy = _is_legacy(settings)
        self._prefix = not self._legacy and settings.flag("add_prefix_space", True)
        # sentencepiece ignores an empty model_proto. The suffix is a second protobuf message, merged into the first:
        # normalizer_spec.add_dummy_prefix = false.
        data = (path.read_bytes() or b"empty") + (b"" if self._legacy else b"\x1a\x02\x18\x00")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DSMoEError(f"{path} is not a sentencepiece model: {' '.join(str(error).split())}") from None
        self._pieces: int = self._model.get_piece_size()
        self._tokens = self._added_tokens(settings)
        self._ids = {token.content: i for i, token in self._tokens.items()}
        self.special_ids, self.affixes = dict(self._ids), ([], [])
        self.placeholders = make_placeholders(self.special_ids)
        names = {token.content for token in settings.named_tokens} | set(self._defaults(settings))
        self._special = {i for i, token in self._tokens.items() if token.content in names}
        self._hidden = self._special | {i for i, token in self._tokens.items() if token.special}
        self._hidden |= {i for i in range(self._pieces) if self._model.is_control(i)}
        self.vocab_size = max([self._pieces - 1, *self._tokens]) + 1
        unk = settings.special_tokens.get("unk_token")
        self._unk = unk.content if unk is not None else self.default_special("unk_token") or ""
        self._unk_length = len(self._model.encode(self._unk))

    def _added_tokens(self, settings: TokenizerSettings) -> dict[int, AddedToken]:
        """Return the tokens that are split off before sentencepiece, which never matches control pieces in text."""
        tokens = dict(settings.added_tokens)
        present = {token.content: i for i, token in tokens.items()}
        for token in settings.named_tokens:
            if token.content not in present and (i := self._piece_id(token.content)) is not None:
                tokens[i] = token
        for name in self._defaults(settings):
            i = present.get(name, self._piece_id(name))
            assert i is not None
            tokens[i] = AddedToken(name)
        return tokens

    def _defaults(self, settings: TokenizerSettings) -> list[str]:
        """Return the special tokens of the model that the config does not set."""
        unset = (attribute for attribute in _MODEL_ATTRIBUTES if attribute not in settings.special_tokens)
        return list(filter(None, map(self.default_special, unset)))

    def default_special(self, attribute: str) -> str | None:
        """See `Backend`."""
        if attribute not in _MODEL_ATTRIBUTES:
            return None
        index = getattr(self._model, attribute.removesuffix("_token") + "_id")()
        return None if index < 0 else self._model.id_to_piece(index)

    def id_of(self, token: str) -> int | None:
        """See `Backend`."""
        return self._ids[token] if token in self._ids else self._piece_id(token)

    def _piece_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        # An unknown piece has the id of <unk>.
        return index if self._model.id_to_piece(index) == token else None

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """See `Backend`."""
        names = self._ids
        if split_special_tokens:
            names = {self.placeholders[name]: i for name, i in names.items()}
        parts = [self._parts(text, names) for text in texts]
        found = iter(self._encode_parts([text for one in parts for text, token in one if token is None]))
        return [self._join(one, found) for one in parts]

    def _join(self, parts: list[_Part], found: Iterator[list[int]]) -> list[int]:
        ids = [next(found) if token is None else [token] for _, token in parts]
        # Without `legacy` a single space before a leading special token is dropped.
        if not self._legacy and len(parts) > 1 and parts[1][1] in self._special:
            ids = ids[parts[0][0] in ("▁", " ") and len(ids[0]) == 1 :]
        return [i for some in ids for i in some]

    def _parts(self, text: str, names: Mapping[str, int]) -> list[_Part]:
        if not self._legacy and text:
            text = "▁" * self._prefix + text.replace("▁", " ")
        words = [word for word in _splitter(tuple(names))(text) if word]
        for at, word in enumerate(words):
            if word not in names:
                continue
            token = self._tokens[names[word]]
            left, right = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
            if token.rstrip and right:
                words[at + 1] = right.lstrip()
            if token.lstrip and left:
                words[at - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                words[at - 1], words[at] = words[at - 1] + word, ""
            elif token.single_word and right and right[0] != " ":
                words[at], words[at + 1] = "", word + words[at + 1]
        return [(word, names.get(word)) for word in words if word]

    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        """Encode text parts; without `legacy` leading spaces are preserved."""
        if self._legacy:
            return self._model.encode(texts)
        # sentencepiece drops a leading space, so the unknown token is prepended and its ids removed.
        guards = [self._unk * text.startswith(("▁", " ")) for text in texts]
        found = self._model.encode([guard + text for guard, text in zip(guards, texts, strict=True)])
        n = self._unk_length
        return [ids[n:] if guard and len(ids) >= n else ids for guard, ids in zip(guards, found, strict=True)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """See `Backend`."""
        hidden = self._hidden if skip_special_tokens else ()
        visible = [i for i in ids if i not in hidden and (i < self._pieces or i in self._tokens)]
        added = self._tokens.keys() | self._hidden
        text = ""
        for is_added, group in groupby(visible, key=added.__contains__):
            run = list(group)
            contents = (self._tokens[i].content if i in self._tokens else self._model.id_to_piece(i) for i in run)
            text += "".join(contents) if is_added else self._model.decode(run)
        # Remove the space that `encode` prepended; with `legacy` sentencepiece does.
        return text.removeprefix(" ") if self._prefix and visible and visible[0] not in added else text


_MODEL_ATTRIBUTES: Final = ("bos_token", "eos_token", "unk_token")
_IGNORED_OPTIONS: Final = ("nbest_size", "alpha", "num_threads", "out_type")  # of sp_model_kwargs


def _is_legacy(settings: TokenizerSettings) -> bool:
    return settings.config.get("legacy") is None or settings.flag("legacy", True)


@functools.lru_cache(maxsize=16)
def _splitter(names: tuple[str, ...]) -> Any:
    return longest_match(names).split


def _check_model_flags(settings: TokenizerSettings) -> None:
    config = settings.config
    if (name := config.get("tokenizer_class")) in GENERIC_CLASSES:
        raise DSMoEError(f"tokenizer_config.json: tokenizer_class {name!r} does not support tokenizer.model")
    options = config.get("sp_model_kwargs") or {}
    if not isinstance(options, dict):
        raise DSMoEError(f"tokenizer_config.json: sp_model_kwargs must be an object, got {options!r:.80}")
    for name, value in options.items():
        if value and name not in _IGNORED_OPTIONS:
            raise DSMoEError(f"tokenizer_config.json: sp_model_kwargs {name} {value!r:.80} is not supported")
    if _is_legacy(settings) and not settings.flag("add_prefix_space", True):
        reason = "with legacy the slow and fast Llama tokenizers of transformers differ"
        raise DSMoEError(f"tokenizer_config.json: add_prefix_space false needs legacy false: {reason}")
