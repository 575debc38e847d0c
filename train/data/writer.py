"""Writing of token shards. Start at `tokenize`."""

import array
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, check_space
from dsmoe_jax.storage.manifest import write_manifest
from dsmoe_jax.text.tokenizer import Tokenizer

from .shards import DTYPES, FORMAT, MANIFEST, OFFSET, SPLITS, is_token_shards, tokenizer_hash
from .sources import Document, documents, source_bytes, warn_on_overlap

SHARD_TOKENS: Final = 1 << 27
_SAMPLE: Final = 0.01  # fraction of the sources from which the total size is extrapolated
_BATCH_CHARS: Final = 1 << 22  # per call of the tokenizer, which takes thirty times as many bytes
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # like `dsmoe_jax.progress.Meter`
_log = logging.getLogger(__name__)


class SplitStats(NamedTuple):
    """Size of a split.

    Attributes:
        documents: Documents, or examples.
        tokens: Tokens of all of them.
        loss_tokens: Tokens in the loss masks of examples.
    """

    documents: int
    tokens: int
    loss_tokens: int


class ShardStats(NamedTuple):
    """What `tokenize` or `write_examples` wrote.

    Attributes:
        folder: The token shards.
        unit: "documents" or "examples".
        train: The training split.
        validation: The validation split.
        text_bytes: UTF-8 bytes of all documents; 0 for examples.
        overlong: Examples longer than the sequence length, truncated or dropped.
    """

    folder: Path
    unit: str
    train: SplitStats
    validation: SplitStats
    text_bytes: int = 0
    overlong: int = 0

    def __str__(self) -> str:
        """Return one line."""

        def line(split: SplitStats) -> str:
            loss = f", {split.loss_tokens:,} with loss" if self.unit == "examples" else ""
            return f"{split.tokens:,} tokens of {split.documents:,} {self.unit}{loss}"

        return f"{self.folder}: training: {line(self.train)}; validation: {line(self.validation)}"


def tokenize(
    sources: str | Path | Sequence[str | Path],
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    val_fraction: float = 0.01,
    field: str = "text",
    max_malformed_fraction: float = 0.01,
    split_special_tokens: bool = False,
    exclude: Iterable[Path] = (),
    progress: Progress = silent,
) -> ShardStats:
    """Tokenize texts into a new folder of token shards, written atomically.

    A document becomes BOS (if the tokenizer adds one), its tokens and EOS. The output is deterministic.

    Args:
        sources: One or more sources; see `documents`.
        tokenizer_folder: Holds the tokenizer's files.
        out: Output folder; must not exist.
        shard_tokens: Size at which a shard is closed; documents are not split.
        val_fraction: Fraction of the documents in the validation split, in [0, 1), chosen by a hash of the text.
        field: The field of a line or row that holds the text.
        max_malformed_fraction: Malformed lines of a file that are skipped and logged; more are an error.
        split_special_tokens: Encode the strings of special tokens in texts as text, not as control tokens.
        exclude: Files and folders to leave out of the sources.
        progress: Shows the bytes read.

    Returns:
        The number of documents and tokens per split.

    Raises:
        DSMoEError: An argument, a source or the tokenizer is invalid, the output exists, or the disk is (or, by
            extrapolation, will be) full.
    """
    options: dict[str, Any] = {"split_special_tokens": split_special_tokens, "exclude": exclude}
    options |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction}
    writer = ShardWriter(sources, tokenizer_folder, out, unit="documents", **options)
    reading = {"field": field, "max_malformed_fraction": max_malformed_fraction, "exclude": writer.exclude}
    text_bytes = 0
    with writer.open(progress):
        for source in writer.sources:
            for batch in _batches(documents(source, advance=writer.advance, **reading)):
                encoded = writer.tokenizer.encode_batch(document.text for document in batch)
                for document, ids in zip(batch, encoded, strict=True):
                    if ids[-1:] != [writer.eos]:  # some tokenizers add it
                        ids.append(writer.eos)
                    text = document.text.encode()
                    text_bytes += len(text)
                    writer.count_special_tokens([document.text])
                    writer.split_of(text).add(ids)
                writer.check_space()
        writer.fields["text_bytes"] = text_bytes
    return writer.stats()._replace(text_bytes=text_bytes)


class ShardWriter:
    """Writes documents or examples as token shards; see `tokenize` for the arguments."""

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        tokenizer_folder: str | Path,
        out: str | Path,
        *,
        unit: str,
        shard_tokens: int = SHARD_TOKENS,
        val_fraction: float,
        split_special_tokens: bool,
        exclude: Iterable[Path],
    ):
        """Check the arguments; `unit` is "documents" or "examples"."""
        self.sources = [sources] if isinstance(sources, str | Path) else list(sources)
        if not self.sources:
            raise DSMoEError("sources must name at least one source")
        if not 0 <= val_fraction < 1:
            raise DSMoEError(f"val_fraction must be in [0, 1), got {val_fraction}")
        if shard_tokens < 1:
            raise DSMoEError(f"shard_tokens must be at least 1, got {shard_tokens}")
        if shards := next((source for source in self.sources if is_token_shards(source)), None):
            raise DSMoEError(f"{shards}: holds token shards, already tokenized")
        check_new_path(out)
        self.tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split_special_tokens or None)
        if self.tokenizer.eos_token_id is None:
            raise DSMoEError(f"{tokenizer_folder}: the tokenizer has no EOS token")
        self.eos, self.exclude = self.tokenizer.eos_token_id, [Path(out), *exclude]
        self.fields: dict[str, Any] = {}
        self._out, self._unit = Path(out), unit
        self._shard_tokens, self._val_fraction = shard_tokens, val_fraction
        self._special_tokens = self._with_special_tokens = 0

    @contextlib.contextmanager
    def open(self, progress: Progress) -> Iterator[None]:
        """Open the shards, finalized when the block ends without an error."""
        warn_on_overlap(self.sources, self.exclude)
        self._total, self._read = sum(source_bytes(source, self.exclude) for source in self.sources), 0
        dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        try:
            with atomic_dir(self._out) as staging, progress("tokenizing", self._total) as advance, ExitStack() as stack:
                self._advance, masked = advance, self._unit == "examples"
                self._train, self._validation = (
                    _Split(staging.folder, split, DTYPES[dtype], self._shard_tokens, masked, stack) for split in SPLITS
                )
                yield
                write_manifest(staging.folder / MANIFEST, self._finalize(dtype))
        except OSError as error:  # a full disk; errors of a source are ValueErrors
            raise DSMoEError(f"{self._out} cannot be written: {error.strerror}") from None
        self._report()

    def split_of(self, content: bytes) -> "_Split":
        """Return the split of a document or example, which depends only on its content."""
        return self._validation if is_validation(content, self._val_fraction) else self._train

    def count_special_tokens(self, texts: Iterable[str]) -> None:
        """Count the strings of special tokens in a document or example, for the log."""
        found = sum(map(self.tokenizer.count_special_tokens, texts))
        self._special_tokens += found
        self._with_special_tokens += found > 0

    def advance(self, step: int) -> None:
        """Report bytes of the sources as read."""
        self._read += step
        self._advance(step)

    def check_space(self) -> None:
        """Raise `DSMoEError` if the disk is too small for the extrapolated rest."""
        if self._read >= self._total * _SAMPLE:
            written = self._train.size + self._validation.size
            check_space(self._out, written * (self._total - self._read) // max(self._read, 1))

    def _finalize(self, dtype: str) -> dict[str, Any]:
        """Close the shards and return the manifest."""
        if not self._train.documents:
            total = f"{self._validation.documents} {self._unit}"
            raise DSMoEError(f"val_fraction {self._val_fraction} leaves none of {total} to train on")
        splits = dict(zip(SPLITS, (self._train.finalize(), self._validation.finalize()), strict=True))
        return {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer_hash(self.tokenizer.files[0].parent),
            "vocab_size": self.tokenizer.vocab_size,
            "eos_token_id": self.eos,
            "dtype": dtype,
            "val_fraction": self._val_fraction,
            "split_special_tokens": self.tokenizer.split_special_tokens,
            "sources": [str(source) for source in self.sources],
            "files": self._train.files | self._validation.files,
            "splits": splits,
            **self.fields,
        }

    def _report(self) -> None:
        """Log special-token strings in the texts, and an empty validation split."""
        if self._special_tokens:
            found = f"{self._special_tokens:,} special-token strings in {self._with_special_tokens:,} {self._unit}"
            if self.tokenizer.split_special_tokens:
                _log.info("%s: encoded %s as text", self._out, found)
            else:
                _log.warning("%s: %s become control tokens; set split_special_tokens to avoid it", self._out, found)
        if self._val_fraction and not self._validation.documents:
            train = self._train.documents
            enough = min(5, train // 2)
            hint = f"; {enough / train:.2g} would select about {enough}" if enough else ""
            found = f"val_fraction {self._val_fraction:g} selects none of {train} {self._unit}"
            _log.warning("%s: no validation split: %s%s", self._out, found, hint)

    def stats(self) -> ShardStats:
        """Return the size of both splits."""
        train, validation = (SplitStats(s.documents, s.tokens, s.loss_tokens) for s in (self._train, self._validation))
        return ShardStats(self._out, self._unit, train, validation)


def is_validation(content: bytes, val_fraction: float) -> bool:
    """Return whether a document or example with this content is in the validation split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) < val_fraction * 2**64


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of `_BATCH_CHARS` or more."""
    batch, size = [], 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Split:
    """Writes the shards of a split, and the loss mask of examples."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, masked: bool, stack: ExitStack):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, str]] = []
        self._file = self._mask = None
        self.files: dict[str, dict[str, Any]] = {}
        self.documents = self.tokens = self.loss_tokens = 0
        stack.callback(self._close_file)
        if masked:
            self._mask_name, self._mask_hash = f"{split}.loss_mask", hashlib.sha256()
            self._mask = stack.enter_context((folder / self._mask_name).open("wb"))

    @property
    def size(self) -> int:
        """Bytes on disk when all shards are closed."""
        return self.tokens * self._dtype.itemsize + self.documents * OFFSET.itemsize

    def add(self, ids: Sequence[int], loss_mask: np.ndarray | None = None) -> None:
        """Append a document, or an example with its loss mask, bool [tokens]."""
        if self._file is None:
            names = shard_files(self._split, len(self._shards))
            self._shards.append(dict(zip(("tokens", "documents"), names, strict=True)))
            self._file, self._hash = (self._folder / names[0]).open("wb"), hashlib.sha256()
            self._offsets = array.array("Q", [0])
        data = np.array(ids, self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self.documents += 1
        self.tokens += len(ids)
        if self._mask is not None:
            assert loss_mask is not None
            self._mask.write(loss_mask.tobytes())
            self._mask_hash.update(loss_mask.tobytes())
            self.loss_tokens += int(loss_mask.sum())
        if self._offsets[-1] >= self._shard_tokens:
            self._close_shard()

    def finalize(self) -> dict[str, Any]:
        """Close the files and return the split's entry in the manifest."""
        if self._file is not None:
            self._close_shard()
        entry = {"documents": self.documents, "tokens": self.tokens, "shards": self._shards}
        if self._mask is None:
            return entry
        self._mask.close()
        self.files[self._mask_name] = {"bytes": self.tokens, "sha256": self._mask_hash.hexdigest()}
        return entry | {"loss_tokens": self.loss_tokens, "loss_mask": self._mask_name}

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file, names = None, self._shards[-1]
        offsets = np.array(self._offsets, OFFSET).tobytes()
        (self._folder / names["documents"]).write_bytes(offsets)
        tokens = {"bytes": self._offsets[-1] * self._dtype.itemsize, "sha256": self._hash.hexdigest()}
        self.files[names["tokens"]] = tokens
        self.files[names["documents"]] = {"bytes": len(offsets), "sha256": hashlib.sha256(offsets).hexdigest()}


def shard_files(split: str, index: int) -> tuple[str, str]:
    """Return the names of a shard's files: token ids, document offsets."""
    return f"{split}-{index:05d}.tokens", f"{split}-{index:05d}.documents"
