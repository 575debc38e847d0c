"""The two libraries behind `Tokenizer`: tokenizers for a tokenizer.json, sentencepiece for a tokenizer.model.

Start at `Backend`. Where a library alone gives other ids than transformers does with it, this file closes the gap.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.special_tokens import longest_first, make_placeholders
from dsmoe_jax.text.tokenizer_files import GENERIC_CLASSES, Settings, Token


class Backend(Protocol):
    """What the two libraries do differently.

    Attributes:
        size: How many ids there are, added tokens included.
        control: The ids of the tokens that are text under `split_special_tokens`, by name.
        placeholders: What stands for each control token then, by its name.
        around: The ids that the vocabulary's own file puts before and after a text.
    """

    size: int
    control: dict[str, int]
    placeholders: dict[str, str]
    around: tuple[list[int], list[int]]

    def default_special(self, kind: str) -> str | None:
        """The token of that kind where no config names one."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        ...

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """The ids of texts; split, the names of control tokens are text and their placeholders are the tokens."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids."""
        ...


class JsonBackend:
    """tokenizer.json, by the tokenizers library."""

    # Without a config nothing says which token begins a text; these two families are known by name.
    _KNOWN: Final = {
        "bos_token": ("<｜begin▁of▁sentence｜>", "<s>"),
        "eos_token": ("<｜end▁of▁sentence｜>", "</s>"),
    }

    def __init__(self, path: Path, settings: Settings):
        import tokenizers

        try:
            library = self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise DSMoEError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        # Settings of whoever saved the file; a prompt must never be cut by them.
        self._padding = (library.padding or {}).get("pad_token")
        library.no_truncation()
        library.no_padding()
        if dropout := getattr(library.model, "dropout", None):
            raise DSMoEError(f"{path}: dropout {dropout} gives random ids; set it to null")
        _check_prefix_space(path, library, settings)
        self._add(settings)
        added = library.get_added_tokens_decoder()
        self.size = max(library.get_vocab_size(), max(added, default=-1) + 1)
        self.control = {token.content: i for i, token in added.items() if token.special}
        self.placeholders = make_placeholders(self.control)
        self.around = _around(library)

    def _add(self, settings: Settings) -> None:
        """Adds the tokens of the config, whose flags win over those of tokenizer.json, and marks special ones."""
        named = [token for token in (*settings.special.values(), *settings.additional) if token is not None]
        names = {token.content for token in named}
        there = {token.content for token in self._library.get_added_tokens_decoder().values()}
        has_flags = "added_tokens_decoder" in settings.config  # added_tokens.json has only ids
        for i, token in settings.added.items():
            if has_flags or token.content not in there:
                self._library.add_tokens([_added(token, token.special or token.content in names)])
            if (got := self.id_of(token.content)) != i:
                raise DSMoEError(f"added token {token.content!r} has id {i} in the config and {got} in tokenizer.json")
        there = {token.content: token for token in self._library.get_added_tokens_decoder().values()}
        for token in named:
            own = None if has_flags and token.content in settings.with_flags else there.get(token.content)
            if own is not None and not own.special:
                own.special = True
                self._library.add_tokens([own])
            elif own is None and self.id_of(token.content) is not None:
                self._library.add_tokens([_added(token, special=True)])

    def default_special(self, kind: str) -> str | None:
        """See `Backend`."""
        known = (self._padding or "",) if kind == "pad_token" else self._KNOWN.get(kind, ())
        return next((name for name in known if self.id_of(name) is not None), None)

    def id_of(self, token: str) -> int | None:
        """See `Backend`."""
        return self._library.token_to_id(token)

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """See `Backend`."""
        library, ids = self._split if split_special_tokens else (self._library, None)
        # Fast: without the offsets into the text, which nobody asks for.
        found = [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]
        return found if ids is None else [[ids.get(i, i) for i in one] for one in found]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """See `Backend`."""
        return self._library.decode(ids, skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def _split(self) -> tuple[Any, dict[int, int]]:
        """A copy of the library's tokenizer that knows control tokens by their placeholders, and our ids for its ids.

        The library's own `encode_special_tokens` is one setting of a tokenizer that many threads may use.
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


def _added(token: Token, special: bool) -> Any:
    import tokenizers

    flags = token._asdict()
    return tokenizers.AddedToken(flags.pop("content"), **flags | {"special": special})


def _around(library: Any) -> tuple[list[int], list[int]]:
    plain, whole = (library.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def _check_prefix_space(path: Path, library: Any, settings: Settings) -> None:
    """Refuses an `add_prefix_space` that transformers 4 obeys and transformers 5 does not."""
    if settings.config.get("add_prefix_space") is None and settings.is_llama:
        return
    asked = settings.flag("add_prefix_space", False)
    written = _prefix_space(json.loads(library.to_str()), nested=settings.is_llama)
    if written is not None and asked != written:
        raise DSMoEError(
            f"{path}: add_prefix_space is {str(written).lower()}, and tokenizer_config.json has it as "
            f"{str(asked).lower()} or, which is the same, not at all"
        )


def _prefix_space(fields: Mapping[str, Any], nested: bool) -> bool | None:
    """Whether a tokenizer.json puts a space before a text; None where it has no step that a config could change."""
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


class _Part(NamedTuple):
    """A stretch of a text for sentencepiece, or a token."""

    text: str
    token: int | None = None


class ModelBackend:
    """tokenizer.model, by sentencepiece, as transformers' LlamaTokenizer uses it."""

    def __init__(self, path: Path, settings: Settings):
        import sentencepiece

        _check_model_flags(settings)
        self._legacy = _is_legacy(settings)
        self._prefix = not self._legacy and settings.flag("add_prefix_space", True)
        # An empty model would be taken for none at all. The suffix is a protobuf message of its own, which is merged
        # into the first: normalizer_spec.add_dummy_prefix = false.
        data = (path.read_bytes() or b"empty") + (b"" if self._legacy else b"\x1a\x02\x18\x00")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DSMoEError(f"{path} is no sentencepiece model: {' '.join(str(error).split())}") from None
        self._pieces: int = self._model.get_piece_size()
        self._tokens = self._found_in_text(settings)
        self._ids = {token.content: i for i, token in self._tokens.items()}
        self.control, self.around = dict(self._ids), ([], [])
        self.placeholders = make_placeholders(self.control)
        named = (*settings.special.values(), *settings.additional)
        names = {token.content for token in named if token is not None}
        names |= {name for kind in _NAMED if (name := self.default_special(kind)) and kind not in settings.special}
        self._special = {i for i, token in self._tokens.items() if token.content in names}
        self._hidden = self._special | {i for i, token in self._tokens.items() if token.special}
        self._hidden |= {i for i in range(self._pieces) if self._model.is_control(i)}
        self.size = max([self._pieces - 1, *self._tokens]) + 1
        unk = settings.special.get("unk_token")
        self._unk = unk.content if unk is not None else self.default_special("unk_token") or ""
        self._unk_length = len(self._encode_pieces([self._unk])[0])

    def _found_in_text(self, settings: Settings) -> dict[int, Token]:
        """The tokens that are matched before sentencepiece sees a text: it finds no control pieces in one."""
        tokens = dict(settings.added)
        there = {token.content: i for i, token in tokens.items()}
        for token in (*settings.special.values(), *settings.additional):
            if token is not None and token.content not in there and (i := self._piece_id(token.content)) is not None:
                tokens[i] = token
        for kind in _NAMED:
            if kind not in settings.special and (name := self.default_special(kind)) is not None:
                i = there.get(name, self._piece_id(name))
                assert i is not None
                tokens[i] = Token(name)
        return tokens

    def default_special(self, kind: str) -> str | None:
        """See `Backend`."""
        index = getattr(self._model, kind.removesuffix("_token") + "_id")() if kind in _NAMED else -1
        return None if index < 0 else self._model.id_to_piece(index)

    def id_of(self, token: str) -> int | None:
        """See `Backend`."""
        return self._ids[token] if token in self._ids else self._piece_id(token)

    def _piece_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        # An unknown piece answers with the id of <unk>.
        return index if self._model.id_to_piece(index) == token else None

    def encode(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        """See `Backend`."""
        names = self._ids
        if split_special_tokens:
            names = {self.placeholders[name]: i for name, i in names.items()}
        parts = [self._parts(text, names) for text in texts]
        found = iter(self._encode_parts([part.text for some in parts for part in some if part.token is None]))
        return [self._joined(some, found) for some in parts]

    def _joined(self, parts: list[_Part], found: Iterator[list[int]]) -> list[int]:
        ids = [next(found) if part.token is None else [part.token] for part in parts]
        # Without `legacy` a lone space before a special token at the beginning goes.
        if not self._legacy and len(parts) > 1 and parts[1].token in self._special:
            ids = ids[parts[0].text in ("▁", " ") and len(ids[0]) == 1 :]
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
        return [_Part(word, names.get(word)) for word in words if word]

    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        """With `legacy` each part gets sentencepiece's space in front; without, it keeps those that it begins with."""
        if self._legacy:
            return self._encode_pieces(texts)
        # sentencepiece drops a space at the beginning, so the unknown token is put there and taken away again.
        guarded = [text.startswith(("▁", " ")) for text in texts]
        found = self._encode_pieces([self._unk * guard + text for text, guard in zip(texts, guarded, strict=True)])
        return [
            ids[self._unk_length :] if guard and len(ids) >= self._unk_length else ids
            for ids, guard in zip(found, guarded, strict=True)
        ]

    def _encode_pieces(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """See `Backend`."""
        hidden = self._hidden if skip_special_tokens else ()
        seen = [i for i in ids if i not in hidden and (i < self._pieces or i in self._tokens)]
        named = self._tokens.keys() | self._hidden
        text = "".join(
            "".join(self._name(i) for i in run) if is_named else self._model.decode(list(run))
            for is_named, run in groupby(seen, key=named.__contains__)
        )
        # The space that `encode` put in front; with `legacy` sentencepiece does so itself.
        return text.removeprefix(" ") if self._prefix and seen and seen[0] not in named else text

    def _name(self, i: int) -> str:
        return self._tokens[i].content if i in self._tokens else self._model.id_to_piece(i)


_NAMED: Final = ("bos_token", "eos_token", "unk_token")
_NEUTRAL: Final = ("nbest_size", "alpha", "num_threads", "out_type")  # of sp_model_kwargs, without sampling


def _is_legacy(settings: Settings) -> bool:
    return settings.config.get("legacy") is None or settings.flag("legacy", True)


@functools.lru_cache(maxsize=16)
def _splitter(names: tuple[str, ...]) -> Any:
    return longest_first(names).split


def _check_model_flags(settings: Settings) -> None:
    config = settings.config
    if (name := config.get("tokenizer_class")) in GENERIC_CLASSES:
        raise DSMoEError(f"tokenizer_config.json: tokenizer_class {name!r} does not read a tokenizer.model")
    options = config.get("sp_model_kwargs") or {}
    if not isinstance(options, dict):
        raise DSMoEError(f"tokenizer_config.json: sp_model_kwargs must be an object, got {options!r:.80}")
    for name, value in options.items():
        if value and name not in _NEUTRAL:
            raise DSMoEError(f"tokenizer_config.json: sp_model_kwargs {name} {value!r:.80} is not supported")
    if _is_legacy(settings) and not settings.flag("add_prefix_space", True):
        raise DSMoEError(
            "tokenizer_config.json: add_prefix_space false needs legacy false; with legacy transformers' two Llama "
            "tokenizers differ"
        )
