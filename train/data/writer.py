"""Text to token shards, once: `tokenize`, the function behind `dsmoe tokenize`. shards.py says how they lie on disk."""

import array
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.checkpoint.manifest import add_hash
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, check_space, write_json
from dsmoe_jax.text.tokenizer import Tokenizer

from .shards import BOUNDARY, DTYPES, FORMAT, MANIFEST, SPLITS, is_token_shards, shard_files, tokenizer_hash
from .sources import Document, documents, source_bytes, warn_of_overlap

_SAMPLE: Final = 0.01  # share of the sources after which the size of the rest is foreseen
_log = logging.getLogger(__name__)
_AT_ONCE: Final = 1 << 22  # characters that are encoded together; meanwhile they take thirty times as many bytes


class Tokenized(NamedTuple):
    """What `tokenize` made."""

    folder: Path
    documents: int
    tokens: int
    heldout_documents: int
    heldout_tokens: int
    text_bytes: int

    def __str__(self) -> str:
        """For a person."""
        return (
            f"{self.folder}: {self.tokens:,} tokens of {self.documents:,} documents to train on, "
            f"{self.heldout_tokens:,} of {self.heldout_documents:,} held out; {self.text_bytes / 1e6:,.1f} MB of text"
        )


def tokenize(
    sources: str | Path | Sequence[str | Path],
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    shard_tokens: int = 1 << 27,
    val_fraction: float = 0.01,
    field: str = "text",
    most_broken: float = 0.01,
    split_special_tokens: bool = False,
    exclude: Iterable[Path] = (),
    progress: Callable[[str, int], AbstractContextManager[Advance]] = silent,
) -> Tokenized:
    """Write the texts of `sources` (see `documents`) as a new folder of token shards, complete or not at all.

    A document is what the tokenizer makes of it (bos in front, if it adds one) and eos. A shard is closed when it has
    `shard_tokens`; no document crosses shards. About the share `val_fraction` of the documents is kept for
    validation, chosen by their text alone: copies of a text are never in both splits.

    The string of a special token within a text becomes that token, as everywhere with `Tokenizer`, unless
    `split_special_tokens`; the log has how many there are. Where documents end is known from the boundaries, not from
    eos.

    Files and folders in `exclude` are left out where a source holds them.

    The same text and tokenizer give the same bytes. Raises `ValueError` in one line for everything that is wrong with
    the sources, the tokenizer or the folder, for a full disk, and as soon as what was read so far says that the disk
    will be too full for the rest.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise DSMoEError("no sources to tokenize")
    if not 0 <= val_fraction < 1:
        raise DSMoEError(f"val_fraction must be at least 0 and less than 1, not {val_fraction}")
    if shard_tokens < 1:
        raise DSMoEError(f"shard_tokens must be at least 1, not {shard_tokens}")
    if shards := next((source for source in sources if is_token_shards(source)), None):
        raise DSMoEError(f"{shards}: holds token shards already, no text")
    check_new_path(out)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split_special_tokens or None)
    special = SpecialTokenCount(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DSMoEError(f"{tokenizer_folder}: the tokenizer has no eos token to end a document with")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    exclude = [Path(out), *exclude]
    warn_of_overlap(sources, exclude)
    total = sum(source_bytes(source, exclude) for source in sources)

    text_bytes = 0
    try:
        with atomic_dir(out) as draft, progress("tokenizing", total) as advance, ExitStack() as stack:
            train, heldout = (Split(draft.folder, split, DTYPES[dtype], shard_tokens) for split in SPLITS)
            stack.callback(train.abandon)
            stack.callback(heldout.abandon)
            space = _Space(Path(out), total, advance)
            for source in sources:
                found = documents(source, field=field, most_broken=most_broken, exclude=exclude, advance=space.read)
                for some in _batches(found):
                    for document in some:
                        special.add([document.text])
                    for text, ids in _encoded(some, tokenizer, tokenizer.eos_token_id):
                        (heldout if is_held_out(text, val_fraction) else train).add(ids)
                        text_bytes += len(text)
                    space.check(train.size + heldout.size)
            if not train.documents:
                raise DSMoEError(
                    f"val_fraction {val_fraction} leaves none of {heldout.documents} documents to train on"
                )
            splits = dict(zip(SPLITS, (train.finish(), heldout.finish()), strict=True))
            manifest = shards_manifest(tokenizer, dtype, val_fraction, sources, splits)
            manifest |= {"text_bytes": text_bytes, "split_special_tokens": tokenizer.split_special_tokens}
            write_json(draft.folder / MANIFEST, add_hash(manifest))
    except OSError as error:  # a full disk; what goes wrong with a source is a ValueError
        raise DSMoEError(f"{out} cannot be written: {error.strerror}") from None
    special.log(out, "documents")
    warn_if_none_held_out(out, val_fraction, "documents", train.documents, heldout.documents)
    return Tokenized(Path(out), train.documents, train.tokens, heldout.documents, heldout.tokens, text_bytes)


class SpecialTokenCount:
    """How many strings of special tokens a text for training has."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._strings = self._texts = 0

    def add(self, texts: Iterable[str]) -> None:
        """Counts in the texts of a document."""
        found = sum(map(self._tokenizer.count_special_tokens, texts))
        self._strings += found
        self._texts += found > 0

    def log(self, out: str | Path, what: str) -> None:
        """One line, where there are any."""
        if not self._strings:
            return
        found = f"{self._strings:,} special-token strings in the text of {self._texts:,} {what}"
        if self._tokenizer.split_special_tokens:
            _log.info("%s: %s are encoded as text", out, found)
        else:
            _log.warning("%s: %s become control tokens; split_special_tokens encodes them as text", out, found)


def shards_manifest(
    tokenizer: Tokenizer, dtype: str, val_fraction: float, sources: Iterable[str | Path], splits: Mapping[Any, Any]
) -> dict[str, Any]:
    """The manifest of token shards, also of those that hold examples."""
    return {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_hash(tokenizer.files[0].parent),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": dtype,
        "val_fraction": val_fraction,
        "sources": [str(source) for source in sources],
        "splits": dict(splits),
    }


def warn_if_none_held_out(out: str | Path, val_fraction: float, what: str, train: int, heldout: int) -> None:
    """Say that a share came to nothing, and which share would not have."""
    if val_fraction and not heldout:
        enough = min(5, train // 2)
        more = f"; {enough / train:.2g} would hold out about {enough}" if enough else ""
        _log.warning(
            "%s: val_fraction %g holds out none of %d %s: no evaluation%s", out, val_fraction, train, what, more
        )


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document is kept for evaluation: a pure function of its UTF-8."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < share * 2**64


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Whole documents, together no longer than need be to reach `_AT_ONCE`."""
    some, size = [], 0
    for document in found:
        some.append(document)
        size += len(document.text)
        if size >= _AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def _encoded(some: Sequence[Document], tokenizer: Tokenizer, eos: int) -> Iterator[tuple[bytes, list[int]]]:
    """Each document's UTF-8 and its ids, eos at the end."""
    for document, ids in zip(some, tokenizer.encode_batch(document.text for document in some), strict=True):
        if ids[-1:] != [eos]:  # a tokenizer may add it already
            ids.append(eos)
        yield document.text.encode(), ids


class _Space:
    """Whether the disk has room for the rest, if that takes as many bytes for each byte read as what came before."""

    def __init__(self, out: Path, total: int, advance: Advance):
        self._out, self._total, self._advance = out, total, advance
        self._done = 0

    def read(self, step: int) -> None:
        """So many bytes more of the sources are read."""
        self._done += step
        self._advance(step)

    def check(self, written: int) -> None:
        """`ValueError` if there is no room; nothing before a hundredth is read, which might be unlike the rest."""
        if self._done >= self._total * _SAMPLE:
            check_space(self._out, written * (self._total - self._done) // max(self._done, 1))


class Split:
    """Writes the shards of a split one after another."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self._folder, self._split, self._dtype, self._most = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file = None
        self.documents = self.tokens = 0

    @property
    def size(self) -> int:
        """Its size on disk, once its shards have ended."""
        return self.tokens * self._dtype.itemsize + self.documents * BOUNDARY.itemsize

    def add(self, ids: list[int]) -> None:
        """One more document."""
        if self._file is None:
            name = shard_files(self._split, len(self._shards))[0]
            self._file, self._hash = (self._folder / name).open("wb"), hashlib.sha256()
            self._boundaries = array.array("Q", [0])
        data = np.array(ids, self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._boundaries.append(self._boundaries[-1] + len(ids))
        self.documents += 1
        self.tokens += len(ids)
        if self._boundaries[-1] >= self._most:
            self._end_shard()

    def finish(self) -> dict[str, Any]:
        """End the last shard; returns what the manifest says of the split."""
        if self._file is not None:
            self._end_shard()
        return {"documents": self.documents, "tokens": self.tokens, "shards": self._shards}

    def abandon(self) -> None:
        """Let go of the file, if one is open still."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _end_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        boundaries = np.array(self._boundaries, BOUNDARY).tobytes()
        (self._folder / shard_files(self._split, len(self._shards))[1]).write_bytes(boundaries)
        self._shards.append(
            {
                "tokens": {"bytes": self._boundaries[-1] * self._dtype.itemsize, "sha256": self._hash.hexdigest()},
                "documents": {"bytes": len(boundaries), "sha256": hashlib.sha256(boundaries).hexdigest()},
            }
        )
