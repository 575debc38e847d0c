"""Encode text to token ids and decode them, with tokenizer.json or tokenizer.model. Start at `Tokenizer`."""

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import check_listed_files
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text import chat_template
from dsmoe_jax.text.escaping import SpecialTokenEscaper
from dsmoe_jax.text.tokenizer_backends import Affixes, Backend, SentencePieceBackend, TokenizersBackend
from dsmoe_jax.text.tokenizer_config import SPECIAL_TOKENS_ATTRIBUTES, TOKENIZER_FILES, TokenizerSettings, read_settings

_log = logging.getLogger("dsmoe_jax")


def tokenizer_files(folder: str | Path) -> tuple[Path, ...]:
    """Return the tokenizer files of `folder`, which are copied with a checkpoint."""
    return tuple(path for name in TOKENIZER_FILES if (path := user_path(folder, "tokenizer folder") / name).is_file())


def uses_sentencepiece(folder: Path) -> bool:
    """Return whether the tokenizer of `folder` is a `tokenizer.model`, which transformers converts when it loads it."""
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


class Tokenizer:
    """Encodes and decodes text with the same ids as transformers.

    As in transformers, special-token strings in a text become special tokens, unless `split_special_tokens`.

    Attributes:
        bos_token: Beginning-of-sequence token or None; its id is `bos_token_id`.
        eos_token: End-of-sequence token or None; its id is `eos_token_id`.
        pad_token_id: Id of the padding token, by default that of EOS.
        special_tokens_map: Special tokens by attribute, as variables of chat templates.
        chat_templates: Chat templates by name; a single one is "default".
        split_special_tokens: Whether special-token strings are encoded as text by default.
        vocab_size: Number of ids, including added tokens; the model's may be larger.
        files: Files that are copied with a checkpoint.
    """

    def __init__(
        self, folder: Path, backend: Backend, settings: TokenizerSettings, templates: dict[str, str], split: bool
    ):
        self._backend, self.chat_templates, self.split_special_tokens = backend, templates, split
        self.files = tokenizer_files(folder)
        self.vocab_size = backend.vocab_size
        special = {key: _special_token(backend, settings, key) for key in SPECIAL_TOKENS_ATTRIBUTES}
        self.bos_token, self.bos_token_id = special["bos_token"]
        self.eos_token, self.eos_token_id = special["eos_token"]
        pad_token_id = special["pad_token"][1]
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        for token in settings.additional_special_tokens:
            if backend.id_of(token.content) is None:
                raise DSMoEError(f"additional special token {token.content!r} is not in the tokenizer's vocabulary")
        names: dict[str, Any] = {key: token for key, (token, _) in special.items() if token is not None}
        if settings.is_llama and "unk_token" not in settings.special_tokens:
            names.setdefault("unk_token", "<unk>")  # the default of the class, even if not in the vocabulary
        if settings.additional_special_tokens:
            names["additional_special_tokens"] = [token.content for token in settings.additional_special_tokens]
        self.special_tokens_map = names
        self._prefix, self._suffix = _affixes(backend, settings, self.bos_token_id, self.eos_token_id)
        self.escape = SpecialTokenEscaper(backend.placeholders)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, split_special_tokens: bool | None = None, verify: bool = True
    ) -> "Tokenizer":
        """Load the tokenizer of a folder.

        Args:
            folder: Folder with tokenizer.json or, if absent, tokenizer.model; other files are optional.
            split_special_tokens: Whether to encode special-token strings as text; default: the value in
                tokenizer_config.json, else False.
            verify: Whether to check the files against the folder's manifest, if any.

        Returns:
            The tokenizer.

        Raises:
            DSMoEError: A file is missing, malformed or does not match the manifest, or a setting is not supported.
        """
        folder = user_path(folder, "tokenizer folder")
        if verify:
            check_listed_files(folder, TOKENIZER_FILES)
        for name, backend in (("tokenizer.json", TokenizersBackend), ("tokenizer.model", SentencePieceBackend)):
            if (folder / name).is_file():
                settings = read_settings(folder)
                if settings.flag("clean_up_tokenization_spaces", False):
                    _log.info("Ignoring clean_up_tokenization_spaces of %s, as transformers 5 does", folder)
                templates = chat_template.read_chat_templates(folder, settings.config)
                if split_special_tokens is None:
                    split_special_tokens = settings.flag("split_special_tokens", False)
                return cls(folder, backend(folder / name, settings), settings, templates, split_special_tokens)
        if not folder.exists():
            hint = (
                "; of a hub id, use Generator.from_pretrained(…).tokenizer"
                if len(folder.parts) == 2 and not folder.is_absolute()
                else ""
            )
            raise DSMoEError(f"{folder}: does not exist{hint}")
        raise DSMoEError(f"{folder}: no tokenizer; looked for tokenizer.json and tokenizer.model")

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool | None = None
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Text to encode.
            add_special_tokens: Whether to add BOS and EOS as configured.
            split_special_tokens: Whether to encode special-token strings as text; default: the attribute.

        Returns:
            The token ids.

        Raises:
            DSMoEError: `text` is not a string or has a lone surrogate, or the tokenizers library fails.
        """
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": split_special_tokens}
        return self.encode_batch([text], **options)[0]

    def encode_batch(
        self, texts: Iterable[str], *, add_special_tokens: bool = True, split_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Encode texts in parallel threads.

        Args:
            texts: Texts.
            add_special_tokens: Add BOS and EOS as the tokenizer's config says.
            split_special_tokens: Encode special-token strings as plain text; default: that of the tokenizer.

        Returns:
            The token ids of each text, as from `encode`.

        Raises:
            DSMoEError: A text is not a valid string, or the tokenizer fails on it.
        """
        if isinstance(texts, str):
            raise DSMoEError("texts must be an iterable of strings, got one string")
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        checked = [_checked_text(text) for text in texts]
        try:
            encoded = self._backend.encode(checked, split)
        except BaseException as error:
            # A panic in tokenizers, for example by a runaway pattern, is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise DSMoEError(f"the tokenizer failed on a text: {' '.join(str(error).split())[:200]}") from None
        return [[*self._prefix, *ids, *self._suffix] for ids in encoded] if add_special_tokens else encoded

    def count_special_tokens(self, text: str) -> int:
        """Return the number of special-token strings in a text."""
        # Usually 0; the substring search is far faster than the pattern.
        found = any(token in text for token in self._backend.special_ids)
        return len(self.escape.pattern.findall(text)) if found else 0

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, with U+FFFD for invalid UTF-8.

        Args:
            ids: Token ids. Those from `vocab_size` up decode to "": 2,385 embedding rows of DeepSeekMoE-16B are unused.
            skip_special_tokens: Whether to leave out special tokens.

        Returns:
            The text.

        Raises:
            DSMoEError: An id is negative or not an integer.
        """
        try:
            # Iterating over arrays, above all jax arrays, is slow.
            integers = [operator.index(i) for i in getattr(ids, "tolist", lambda: ids)()]
        except TypeError as error:
            raise DSMoEError(f"token ids must be a flat sequence of integers: {error}") from None
        if (lowest := min(integers, default=0)) < 0:
            raise DSMoEError(f"token ids must not be negative, got {lowest}")
        return self._backend.decode([i for i in integers if i < self.vocab_size], skip_special_tokens)

    def decode_stream(self) -> "DecodeStream":
        """Return an incremental decoder."""
        return DecodeStream(self)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        split_special_tokens: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation by a chat template, BOS included.

        Args:
            messages: `{"role": …, "content": …}` and other fields; content is a string or a list of text parts.
            add_generation_prompt: Whether to end with the prefix of an assistant message.
            split_special_tokens: Whether to replace the template's special tokens by placeholders for
                `encode(..., split_special_tokens=True)`, so that no message can contain a special token.
            chat_template: Name in `chat_templates` or Jinja source; default: "tool_use" with tools if it exists, else
                "default".
            tools: JSON schemas of functions.
            documents: Documents for the template.
            **variables: Further template variables; they override the special tokens.

        Returns:
            The text, to encode without special tokens.

        Raises:
            DSMoEError: A message is malformed, or the template fails.
        """
        if chat_template is None:
            chat_template = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
            if chat_template not in self.chat_templates:
                names = ", ".join(sorted(self.chat_templates))
                raise DSMoEError(f"chat_template must be one of {names}: there is no default")
        source = self.chat_templates.get(chat_template, chat_template)
        variables |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return self.render_template(source, messages, split_special_tokens=split_special_tokens, **variables)

    def render_template(
        self, template: str, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool, **variables: Any
    ) -> str:
        """Render a conversation like `render_chat`, with the Jinja source of a template.

        Args:
            template: Jinja source.
            messages: Messages with `role` and `content`.
            split_special_tokens: Protect special-token strings in messages, so that they are encoded as plain text.
            **variables: Further variables of the template.

        Returns:
            The text.

        Raises:
            DSMoEError: The template fails, exceeds its limits, or does not support `split_special_tokens`.
        """
        text = chat_template.render(template, messages, **self.special_tokens_map | variables)
        if not split_special_tokens:
            return text
        escaped, variables = self.escape([dict(message) for message in messages]), self.escape(variables)
        marked = chat_template.render(template, escaped, **self.special_tokens_map | variables)
        if self.escape.unescape(marked) != text:
            reason = "it changes the text of messages"
            raise DSMoEError(f"split_special_tokens is not supported by this chat template: {reason}")
        return self.escape.protect(marked)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Render and encode a conversation.

        Args:
            messages: Messages with `role` and `content`.
            split_special_tokens: Encode special-token strings in messages as plain text; default: as the tokenizer.
            **options: Arguments of `render_chat`.

        Returns:
            The token ids.

        Raises:
            DSMoEError: As `render_chat`.
        """
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        text = self.render_chat(messages, split_special_tokens=split, **options)
        return self.encode(text, add_special_tokens=False, split_special_tokens=split)


class DecodeStream:
    """Decodes ids one at a time and withholds text that a later id may change.

    The pieces concatenate to `decode` of all ids, except for truncated characters with ByteFallback in tokenizer.json.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._reset()

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` completes, "" within a character."""
        window = [*self._window, token_id]
        text = self._decode(window)
        # An incomplete character decodes to U+FFFD at the end.
        complete = text.rstrip("\ufffd")
        piece = complete[self._emitted :]
        self._window, self._emitted = window, max(self._emitted, len(complete))
        # Decoding all ids each time would be quadratic, so the window advances at complete characters. Its last
        # ids remain as context: sentencepiece drops the leading space of a text.
        recent = window[self._context :]
        if text == complete and (recent_text := self._decode(recent)):
            self._window, self._context, self._emitted = recent, len(recent), len(recent_text)
        return piece

    def flush(self) -> str:
        """Return the withheld text and reset."""
        rest = self._decode(self._window)[self._emitted :]
        self._reset()
        return rest

    def _reset(self) -> None:
        self._window: list[int] = []
        self._context = 0  # leading ids of the window that are context only
        self._emitted = 0  # characters of the window's text returned so far


def _special_token(backend: Backend, settings: TokenizerSettings, attribute: str) -> tuple[str | None, int | None]:
    """Return the string and id of a special token, by the config or else the backend."""
    token = settings.special_tokens.get(attribute)
    name = token.content if token else None
    if attribute not in settings.special_tokens:
        name = backend.default_special(attribute)
    if name is None:
        return None, None
    if (index := backend.id_of(name)) is None:
        raise DSMoEError(f"{attribute} {name!r} is not in the tokenizer's vocabulary")
    return name, index


def _affixes(backend: Backend, settings: TokenizerSettings, bos: int | None, eos: int | None) -> Affixes:
    """Return the ids added before and after a text.

    The config decides for Llama classes: the post-processor of DeepSeek's tokenizer.json adds no BOS, the original
    tokenizer does. The post-processor decides for other classes and without a config.
    """
    flags = {"add_bos_token": (bos, True), "add_eos_token": (eos, False)}
    configured = [flag for flag in flags if flag in settings.config]
    if not settings.is_llama:
        actual = dict(zip(flags, map(bool, backend.affixes), strict=True))
        if ignored := [flag for flag in configured if settings.flag(flag, False) != actual[flag]]:
            _log.info("Ignoring %s: the post-processor of tokenizer.json decides", ", ".join(ignored))
        return backend.affixes
    if settings.config.get("tokenizer_class") is None and not configured and any(backend.affixes):
        return backend.affixes
    affixes = []
    for flag, (index, default) in flags.items():
        enabled = settings.flag(flag, default)
        if index is None and flag in configured and enabled:
            raise DSMoEError(f"tokenizer_config.json: {flag} is true, but the tokenizer has no {flag[4:]}")
        affixes.append([index] if index is not None and enabled else [])
    return affixes[0], affixes[1]


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise DSMoEError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DSMoEError(f"text has a lone surrogate at character {error.start}") from None
    return text
