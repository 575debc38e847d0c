"""Text to token ids and back: tokenizer.json and tokenizer.model behind one face.

Start at `Tokenizer`. `DecodeStream` is for printing while a model generates. tokenizer_files.py reads the small files
of a folder, tokenizer_backends.py has what the two libraries (tokenizers, sentencepiece) do differently.
"""

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import check_listed_files
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text import chat_template
from dsmoe_jax.text.special_tokens import Escape
from dsmoe_jax.text.tokenizer_backends import Backend, JsonBackend, ModelBackend
from dsmoe_jax.text.tokenizer_files import KINDS, TOKENIZER_FILES, Settings, read_settings

_log = logging.getLogger("dsmoe_jax")


def tokenizer_files(folder: str | Path) -> tuple[Path, ...]:
    """Returns the files of `folder` that belong to its tokenizer and must travel with a checkpoint."""
    return tuple(path for name in TOKENIZER_FILES if (path := user_path(folder, "tokenizer folder") / name).is_file())


class Tokenizer:
    """Encodes and decodes as the checkpoint's original tokenizer does.

    As in transformers, the string of a special token in a text becomes that token, unless `split_special_tokens`.

    Attributes:
        bos_token: The token that begins a text, or None; its id is `bos_token_id`.
        eos_token: The token that ends one, or None; its id is `eos_token_id`.
        pad_token_id: That of the padding token, else of eos.
        special_tokens_map: The names of special tokens by kind, as chat templates see them.
        chat_templates: The chat templates by name; a model that has only one calls it "default".
        split_special_tokens: Whether the strings of special tokens are encoded as text by default.
        vocab_size: How many ids there are, added tokens included; a model may have more rows.
        files: Must travel with a checkpoint.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        chat_templates: Mapping[str, str],
        files: tuple[Path, ...],
        split_special_tokens: bool = False,
    ):
        """Use `from_pretrained`."""
        self._backend = backend
        self.chat_templates = dict(chat_templates)
        self.files = files
        self.split_special_tokens = split_special_tokens
        self.vocab_size = backend.size
        special = {kind: _special(backend, settings, kind) for kind in KINDS}
        self.bos_token, self.bos_token_id = special["bos_token"]
        self.eos_token, self.eos_token_id = special["eos_token"]
        pad_token_id = special["pad_token"][1]
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        for token in settings.additional:
            if backend.id_of(token.content) is None:
                raise DSMoEError(f"additional special token {token.content!r} is not in the tokenizer's vocabulary")
        names: dict[str, Any] = {kind: name for kind, (name, _) in special.items() if name is not None}
        if settings.is_llama and "unk_token" not in settings.special:
            names.setdefault("unk_token", "<unk>")  # The default of the class, which may be in no vocabulary.
        if settings.additional:
            names["additional_special_tokens"] = [token.content for token in settings.additional]
        self.special_tokens_map = names
        self._before, self._after = _around(backend, settings, self.bos_token_id, self.eos_token_id)
        self._escape = Escape(backend.placeholders)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, split_special_tokens: bool | None = None, verify: bool = True
    ) -> "Tokenizer":
        """Opens the tokenizer of a folder.

        Args:
            folder: Holds tokenizer.json, else tokenizer.model; other files are optional.
            split_special_tokens: Whether the strings of special tokens in a text are encoded as text; by default as
                tokenizer_config.json says, else not.
            verify: Whether its files are compared with the folder's manifest, if there is one.

        Raises:
            ValueError: If there is neither file, a file cannot be read or does not match the folder's manifest, or
                the folder has a setting that would give other ids than transformers does.
        """
        folder = user_path(folder, "tokenizer folder")
        if verify:
            check_listed_files(folder, TOKENIZER_FILES)
        for name, backend in (("tokenizer.json", JsonBackend), ("tokenizer.model", ModelBackend)):
            if (folder / name).is_file():
                settings = read_settings(folder)
                if settings.flag("clean_up_tokenization_spaces", False):
                    _log.info("%s: ignored clean_up_tokenization_spaces, as transformers 5 does", folder)
                templates = chat_template.read_chat_templates(folder, settings.config)
                if split_special_tokens is None:
                    split_special_tokens = settings.flag("split_special_tokens", False)
                opened = backend(folder / name, settings)
                return cls(opened, settings, templates, tokenizer_files(folder), split_special_tokens)
        raise DSMoEError(f"no tokenizer in {folder}: it holds neither tokenizer.json nor tokenizer.model")

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool | None = None
    ) -> list[int]:
        """Encodes a text.

        Args:
            text: What to encode.
            add_special_tokens: Whether BOS goes before it (and EOS after) as tokenizer_config.json says.
            split_special_tokens: Whether the strings of special tokens in it are text; by default the attribute.

        Raises:
            ValueError: If `text` is not a string or holds half of a surrogate pair, or the tokenizer fails on it.
        """
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": split_special_tokens}
        return self.encode_batch([text], **options)[0]

    def encode_batch(
        self, texts: Iterable[str], *, add_special_tokens: bool = True, split_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Returns what `encode` gives for each of `texts`, made side by side in threads; raises as it does."""
        if isinstance(texts, str):
            raise DSMoEError("texts to encode must be several strings, got one")
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        checked = [_checked_text(text) for text in texts]
        try:
            found = self._backend.encode(checked, split)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tokenizers: over a pattern without end, say; no Exception
                raise
            raise DSMoEError(f"the tokenizer failed on a text: {' '.join(str(error).split())[:200]}") from None
        return [[*self._before, *ids, *self._after] for ids in found] if add_special_tokens else found

    def count_special_tokens(self, text: str) -> int:
        """Returns how many strings of special tokens a text has."""
        # Usually none, and then this is far faster than the pattern.
        return len(self._escape.names.findall(text)) if any(name in text for name in self._backend.control) else 0

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`, U+FFFD where their bytes are not UTF-8.

        An id at or past `vocab_size` decodes to nothing: DeepSeekMoE-16B has 2,385 rows without a token, and
        sampling can hit one. Raises ValueError where an id is negative or not an integer.
        """
        try:
            # Arrays, jax's above all, are slow to walk through.
            integers = [operator.index(i) for i in getattr(ids, "tolist", lambda: ids)()]
        except TypeError as error:
            raise DSMoEError(f"token ids must be a flat sequence of integers: {error}") from None
        if (lowest := min(integers, default=0)) < 0:
            raise DSMoEError(f"token ids cannot be negative, got {lowest}")
        return self._backend.decode([i for i in integers if i < self.vocab_size], skip_special_tokens)

    def decode_stream(self) -> "DecodeStream":
        """Returns a decoder for ids that arrive one by one."""
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
        """Writes a conversation as the text the model reads, BOS included.

        Args:
            messages: {"role": system, user, assistant or what else the template knows, "content": text or a list of
                text parts}, and other fields for the template.
            add_generation_prompt: Whether the assistant's next turn is opened.
            split_special_tokens: Whether control tokens of the template itself are written as placeholders, which
                `encode(..., split_special_tokens=True)` of this tokenizer reads, so that none comes from a message.
            chat_template: The name of a template of `chat_templates`, or Jinja source; default: "tool_use" with tools
                where there is one, else "default".
            tools: JSON schemas for the template.
            documents: Documents for the template.
            variables: What else the template sees; over the special tokens' names.

        Raises:
            ValueError: Naming the malformed message, or why the template failed.
        """
        source = self._chat_template(chat_template, tools is not None)
        given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **variables}
        return self.render_template(source, messages, split_special_tokens=split_special_tokens, **given)

    def render_template(
        self, template: str, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool = False, **given: Any
    ) -> str:
        """Returns what `render_chat` does, from the Jinja source of any template."""
        text = chat_template.render(template, messages, **self.special_tokens_map | given)
        if not split_special_tokens:
            return text
        escaped, given = self.escape([dict(message) for message in messages]), self.escape(given)
        marked = chat_template.render(template, escaped, **self.special_tokens_map | given)
        if self._escape.unescape(marked) != text:
            raise DSMoEError(
                "the chat template changes the text of messages, and split_special_tokens cannot tell it from the rest"
            )
        return self.protect(marked)

    def escape(self, value: Any) -> Any:
        """Marks strings of special tokens in text (or in JSON) as text, for `protect`."""
        return self._escape(value)

    def protect(self, text: str) -> str:
        """Writes control tokens as placeholders, except those that `escape` has marked as text."""
        return self._escape.protect(text)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, split_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Returns the ids of `render_chat`, whose template wrote the BOS already. Raises as it does.

        Args:
            messages: As in `render_chat`.
            split_special_tokens: Whether the strings of special tokens in messages are text; by default the attribute.
                The template's own stay tokens.
            options: Those of `render_chat`.
        """
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        text = self.render_chat(messages, split_special_tokens=split, **options)
        return self.encode(text, add_special_tokens=False, split_special_tokens=split)

    def _chat_template(self, name: str | None, has_tools: bool) -> str:
        templates = self.chat_templates
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in templates else "default"
            if name not in templates:
                raise DSMoEError(f"chat_template must be one of {', '.join(sorted(templates))}: none is the default")
        return templates.get(name, name)


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


def _special(backend: Backend, settings: Settings, kind: str) -> tuple[str | None, int | None]:
    """Returns string and id of the token of a kind: the config's, where it is silent the backend's."""
    if kind in settings.special:
        token = settings.special[kind]
        name = None if token is None else token.content
    else:
        name = backend.default_special(kind)
    if name is None:
        return None, None
    if (index := backend.id_of(name)) is None:
        raise DSMoEError(f"{kind} {name!r} is not in the tokenizer's vocabulary")
    return name, index


def _around(backend: Backend, settings: Settings, bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """Returns the ids before and after a text.

    For the Llama family the config decides, whatever tokenizer.json's post-processor does: DeepSeek's adds no BOS, the
    original does. For others, and where no config speaks, the post-processor.
    """
    flags = {"add_bos_token": (bos, True), "add_eos_token": (eos, False)}
    named = settings.config.get("tokenizer_class") is not None
    given = [flag for flag in flags if flag in settings.config]
    if not settings.is_llama:
        if ignored := [flag for flag in given if settings.flag(flag, False) != bool(backend.around[flag == given[-1]])]:
            _log.info("ignored %s: the post-processor of tokenizer.json decides", ", ".join(ignored))
        return backend.around
    if not named and not given and any(backend.around):
        return backend.around
    around = []
    for flag, (index, default) in flags.items():
        if index is None and flag in settings.config and settings.flag(flag, default):
            raise DSMoEError(f"tokenizer_config.json: {flag} is true, but the tokenizer has no {flag[4:]}")
        around.append([index] if index is not None and settings.flag(flag, default) else [])
    return around[0], around[1]


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise DSMoEError(f"text to encode must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DSMoEError(f"text to encode holds half a surrogate pair at character {error.start}") from None
    return text
