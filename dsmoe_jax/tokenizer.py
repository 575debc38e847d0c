"""Text to token ids and back: tokenizer.json and tokenizer.model behind one face.

Start at `Tokenizer`. `DecodeStream` is for printing while a model generates; the two backends hold what their
libraries (tokenizers, sentencepiece) do differently.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Protocol

from dsmoe_jax import chat_template
from dsmoe_jax.json_file import read_json
from dsmoe_jax.manifest import check_files

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def tokenizer_files(folder: str | Path) -> tuple[Path, ...]:
    """Returns the files of `folder` that belong to its tokenizer and must travel with a checkpoint."""
    return tuple(path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file())


class Tokenizer:
    """Encodes and decodes as the checkpoint's original tokenizer does.

    `bos_token`, `eos_token` and their ids are None where there is no such token; `pad_token_id` falls back
    to eos. `vocab_size` counts ids, added tokens included; a model may have more rows. `files` must travel
    with a checkpoint. As in transformers, the string of a special token in a text becomes that token.
    """

    def __init__(self, backend: "_Backend", config: Mapping[str, Any], template: str, files: tuple[Path, ...]):
        """Use `from_pretrained`."""
        self._backend = backend
        self._template = template
        self.files = files
        self.vocab_size = backend.size
        self.bos_token, self.bos_token_id = _special(backend, config, "bos_token")
        self.eos_token, self.eos_token_id = _special(backend, config, "eos_token")
        pad_token_id = _special(backend, config, "pad_token")[1]
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        # The config decides, not tokenizer.json's post-processor: DeepSeek's adds no BOS, the original does.
        self._before = _ids_if(config, "add_bos_token", True, self.bos_token_id)
        self._after = _ids_if(config, "add_eos_token", False, self.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Returns the tokenizer of `folder`: tokenizer.json, else tokenizer.model; other files are optional.

        Raises ValueError where there is neither, where a file cannot be read, or is not as a manifest there says.
        """
        folder = Path(folder)
        check_files(folder, *TOKENIZER_FILES)
        for name, backend in (("tokenizer.json", _JsonBackend), ("tokenizer.model", _ModelBackend)):
            if (folder / name).is_file():
                older, newer = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
                config = {k: v for file in (older, newer) if file.is_file() for k, v in read_json(file).items()}
                template = chat_template.find_template(folder, config)
                return cls(backend(folder / name, config), config, template, tokenizer_files(folder))
        raise ValueError(f"no tokenizer in {folder}: it holds neither tokenizer.json nor tokenizer.model")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of `text`; by default with BOS before (EOS after) as tokenizer_config.json says.

        Raises ValueError where `text` is not a string or holds half of a surrogate pair.
        """
        ids = self._backend.encode(_checked_text(text))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Returns what `encode` gives for each of `texts`, made side by side in threads; raises as it does."""
        if isinstance(texts, str):
            raise ValueError("texts to encode must be several strings, got one")
        found = self._backend.encode_batch([_checked_text(text) for text in texts])
        return [[*self._before, *ids, *self._after] for ids in found] if add_special_tokens else found

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`, U+FFFD where their bytes are not UTF-8.

        An id at or past `vocab_size` decodes to nothing: DeepSeekMoE-16B has 2,385 rows without a token, and
        sampling can hit one. Raises ValueError where an id is negative or not an integer.
        """
        try:
            # Arrays, jax's above all, are slow to walk through.
            integers = [operator.index(i) for i in getattr(ids, "tolist", lambda: ids)()]
        except TypeError as error:
            raise ValueError(f"token ids must be a flat sequence of integers: {error}") from None
        if (lowest := min(integers, default=0)) < 0:
            raise ValueError(f"token ids cannot be negative, got {lowest}")
        return self._backend.decode([i for i in integers if i < self.vocab_size], skip_special_tokens)

    def decode_stream(self) -> "DecodeStream":
        """Returns a decoder for ids that arrive one by one."""
        return DecodeStream(self)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Returns the conversation as the text the model reads, BOS included.

        `messages` are {"role": system, user or assistant, "content": text}; `add_generation_prompt` opens the
        assistant's next turn. Raises ValueError naming the malformed message, or why the template failed.
        """
        return chat_template.render(
            self._template,
            messages,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            add_generation_prompt=add_generation_prompt,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """Returns the ids of `render_chat`, whose template wrote the BOS already. Raises as it does."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


class DecodeStream:
    """Gives the text of each id as it comes, holding back what a later id may still change.

    All pieces and the flush together are `decode` of all ids. (One exception: where a tokenizer.json decodes
    by ByteFallback, `decode` lets one cut-off character spoil its whole run of bytes.)
    """

    def __init__(self, tokenizer: Tokenizer):
        """Starts with nothing held back."""
        self._decode = tokenizer.decode
        self._start_over()

    def feed(self, token_id: int) -> str:
        """Returns the text that `token_id` settles, "" in the middle of a character; raises as `decode`."""
        window = [*self._window, token_id]
        text = self._decode(window)
        # An unfinished character shows as U+FFFD at the end.
        settled = text.rstrip("\ufffd")
        piece = settled[self._shown :]
        self._window, self._shown = window, max(self._shown, len(settled))
        # Decoding all ids each time would be quadratic, so the window moves on at whole characters. Its last
        # ids stay as context: sentencepiece drops the space a text begins with, so some text must precede it.
        recent = window[self._context :]
        if text == settled and (recent_text := self._decode(recent)):
            self._window, self._context, self._shown = recent, len(recent), len(recent_text)
        return piece

    def flush(self) -> str:
        """Returns what was held back, and starts over."""
        rest = self._decode(self._window)[self._shown :]
        self._start_over()
        return rest

    def _start_over(self) -> None:
        self._window: list[int] = []
        self._context = 0  # How many ids of the window are there only as context.
        self._shown = 0  # How many characters of the window's text have been given out.


class _Backend(Protocol):
    """What the two tokenizer libraries do differently."""

    size: int

    def default_special(self, kind: str) -> str | None: ...
    def id_of(self, token: str) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


class _JsonBackend:
    # Without a config nothing says which token begins a text; these two families are known by name.
    _KNOWN: Final = {
        "bos_token": ("<｜begin▁of▁sentence｜>", "<s>"),
        "eos_token": ("<｜end▁of▁sentence｜>", "</s>"),
    }

    def __init__(self, path: Path, _config: Mapping[str, Any]):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        # Settings of whoever saved the file; a prompt must never be cut by them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.size = max(self._tokenizer.get_vocab_size(), max(added, default=-1) + 1)

    def default_special(self, kind: str) -> str | None:
        return next((name for name in self._KNOWN.get(kind, ()) if self.id_of(name) is not None), None)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # Fast: without the offsets into the text, which nobody asks for.
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class _ModelBackend:
    def __init__(self, path: Path, config: Mapping[str, Any]):
        import sentencepiece

        try:
            # An empty model would be taken for none at all.
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() or b"empty")
        except RuntimeError as error:
            raise ValueError(f"{path} is no sentencepiece model: {' '.join(str(error).split())}") from None
        pieces = self._model.get_piece_size()
        # sentencepiece finds no control pieces in a text and knows no added tokens: both are matched here.
        control = {i: self._model.id_to_piece(i) for i in range(pieces) if self._model.is_control(i)}
        added, special = _added_tokens(config, pieces)
        self._names = control | added
        self._hidden = control.keys() | special
        self._ids = {name: i for i, name in self._names.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")").split
        self._pieces = pieces
        self.size = max([pieces - 1, *self._names]) + 1

    def default_special(self, kind: str) -> str | None:
        index = getattr(self._model, kind.removesuffix("_token") + "_id")()
        return None if index < 0 else self._model.id_to_piece(index)

    def id_of(self, token: str) -> int | None:
        index = self._ids.get(token, self._model.piece_to_id(token))
        # An unknown piece answers with the id of <unk>.
        return index if token in self._ids or self._model.id_to_piece(index) == token else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # Each part gets sentencepiece's space in front, as in transformers' "legacy" mode.
        parts = [self._split(text) for text in texts]
        found = iter(self._model.encode([part for some in parts for part in some if part not in self._ids]))
        return [
            [i for part in some for i in ([self._ids[part]] if part in self._ids else next(found))] for some in parts
        ]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        hidden = self._hidden if skip_special_tokens else ()
        seen = [i for i in ids if i not in hidden and (i < self._pieces or i in self._names)]
        return "".join(
            "".join(self._names[i] for i in run) if named else self._model.decode(list(run))
            for named, run in groupby(seen, key=self._names.__contains__)
        )


def _special(backend: _Backend, config: Mapping[str, Any], kind: str) -> tuple[str | None, int | None]:
    """Returns string and id of the bos, eos or pad token: the config's, where it is silent the backend's."""
    token = config.get(kind, backend.default_special(kind))
    if isinstance(token, dict):  # transformers' AddedToken, written out.
        token = token.get("content")
    if token is None:
        return None, None
    if not isinstance(token, str) or (index := backend.id_of(token)) is None:
        raise ValueError(f"{kind} {token!r} is not in the tokenizer's vocabulary")
    return token, index


def _ids_if(config: Mapping[str, Any], flag: str, default: bool, index: int | None) -> list[int]:
    wanted = config.get(flag)
    if not isinstance(wanted, bool | None):
        raise ValueError(f"tokenizer_config.json: {flag} must be true or false, got {wanted!r}")
    return [index] if index is not None and (default if wanted is None else wanted) else []


def _added_tokens(config: Mapping[str, Any], pieces: int) -> tuple[dict[int, str], set[int]]:
    """Returns the tokens that a checkpoint adds after tokenizer.model's pieces, and which are special."""
    try:
        decoder = (config.get("added_tokens_decoder") or {}).items()
        entries = {int(i): entry for i, entry in decoder if int(i) >= pieces}
        names = {i: str(entry["content"]) for i, entry in entries.items()}
        return names, {i for i, entry in entries.items() if entry.get("special")}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("tokenizer_config.json: added_tokens_decoder must map ids to tokens") from None


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text to encode must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text to encode holds half a surrogate pair at character {error.start}") from None
    return text
