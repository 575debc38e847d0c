"""Writing of token shards. Start at `tokenize`."""

import array
import contextlib
import hashlib
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, check_space
from dsmoe_jax.storage.manifest import hash_file, write_manifest
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .shards import DTYPES, FORMAT, MANIFEST, OFFSET, SPLITS, TOKENIZER, is_token_shards, tokenizer_hash
from .sources import Document, documents, refuse_overlap, source_bytes, unlogged, warn_on_overlap

SHARD_TOKENS: Final = 1 << 27
_SAMPLE: Final = 0.01  # fraction of the sources from which the total size is extrapolated
_BATCH_CHARS: Final = 1 << 22  # per call of the tokenizer, which takes thirty times as many bytes
Sources = str | Path | Sequence[str | Path]
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
        unit: "document" or "example".
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
            loss = f", {split.loss_tokens:,} with loss" if self.unit == "example" else ""
            return f"{plural(split.tokens, 'token')} of {plural(split.documents, self.unit)}{loss}"

        return f"{self.folder}: training: {line(self.train)}; validation: {line(self.validation)}"


def tokenize(
    sources: Sources,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    validation: Sources = (),
    shard_tokens: int = SHARD_TOKENS,
    val_fraction: float = 0.01,
    field: str = "text",
    max_malformed_fraction: float = 0.01,
    split_special_tokens: bool = False,
    exclude: Iterable[Path] = (),
    progress: Meter = silent,
) -> ShardStats:
    """Tokenize texts into a new folder of token shards, written atomically.

    A document becomes BOS (if the tokenizer adds one), its tokens and EOS. The tokenizer's files are copied into the
    folder. The output is deterministic.

    Args:
        sources: One or more sources; see `documents`.
        tokenizer_folder: Holds the tokenizer's files.
        out: Output folder; must not exist.
        validation: Sources of the validation split; `val_fraction` is not applied then.
        shard_tokens: Size at which a shard is closed; documents are not split.
        val_fraction: Fraction of the documents in the validation split, in [0, 1), chosen by a hash of the text; above
            0 at least one of several documents.
        field: The field of a line or row that holds the text.
        max_malformed_fraction: Malformed lines of a file that are skipped and logged; more are an error.
        split_special_tokens: Encode the strings of special tokens in texts as text, not as control tokens.
        exclude: Files and folders to leave out of the sources.
        progress: Shows the bytes read.

    Returns:
        The number of documents and tokens per split.

    Raises:
        DSMoEError: An argument, a source or the tokenizer is invalid, a file is in both splits, the output exists, or
            the disk is (or, by extrapolation, will be) full.
    """
    options: dict[str, Any] = {"split_special_tokens": split_special_tokens, "exclude": exclude}
    options |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction, "validation": validation}
    writer = ShardWriter(sources, tokenizer_folder, out, unit="document", **options)
    reading: dict[str, Any] = {"field": field, "max_malformed_fraction": max_malformed_fraction}
    reading["exclude"] = writer.exclude
    contents = (document.text.encode() for source in writer.sources for document in documents(source, **reading))
    text_bytes = 0
    with writer.open(progress, contents):
        for source, held_out in writer.all_sources():
            for batch in _batches(documents(source, advance=writer.advance, **reading)):
                encoded = writer.tokenizer.encode_batch(document.text for document in batch)
                for document, ids in zip(batch, encoded, strict=True):
                    if ids[-1:] != [writer.eos]:  # some tokenizers add it
                        ids.append(writer.eos)
                    text = document.text.encode()
                    text_bytes += len(text)
                    writer.count_special_tokens([document.text])
                    writer.split_of(text, held_out).add(ids)
                writer.check_space()
        writer.fields["text_bytes"] = text_bytes
    return writer.stats()._replace(text_bytes=text_bytes)


class ShardWriter:
    """Writes documents or examples as token shards; see `tokenize` for the arguments."""

    def __init__(
        self,
        sources: Sources,
        tokenizer_folder: str | Path,
        out: str | Path,
        *,
        validation: Sources,
        unit: str,
        shard_tokens: int = SHARD_TOKENS,
        val_fraction: float,
        split_special_tokens: bool,
        exclude: Iterable[Path],
    ):
        """Check the arguments; `unit` is "document" or "example"."""
        self.sources, self._own_validation = _as_list(sources), _as_list(validation)
        if not self.sources:
            raise DSMoEError("sources must name at least one source")
        if not 0 <= val_fraction < 1:
            raise DSMoEError(f"val_fraction must be in [0, 1), got {val_fraction}")
        if shard_tokens < 1:
            raise DSMoEError(f"shard_tokens must be at least 1, got {shard_tokens}")
        if shards := next(filter(is_token_shards, self.sources + self._own_validation), None):
            raise DSMoEError(f"{shards}: holds token shards, already tokenized")
        check_new_path(out)
        self.tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split_special_tokens or None)
        if self.tokenizer.eos_token_id is None:
            raise DSMoEError(f"{tokenizer_folder}: the tokenizer has no EOS token")
        self.eos, self.exclude = self.tokenizer.eos_token_id, [Path(out), *exclude]
        self.fields: dict[str, Any] = {}
        self._tokenizer_files = tokenizer_files(self.tokenizer.files[0].parent)
        self._out, self._unit = Path(out), unit
        self._shard_tokens, self._val_fraction = shard_tokens, 0.0 if self._own_validation else val_fraction
        self._special_tokens = self._with_special_tokens = 0

    @contextlib.contextmanager
    def open(self, progress: Meter, contents: Iterable[bytes]) -> Iterator[None]:
        """Open the shards, finalized when the block ends without an error; `contents` are those of `sources`."""
        warn_on_overlap(self.sources, self.exclude)
        refuse_overlap(self.sources, self._own_validation, self.exclude)
        with unlogged():
            self._threshold = validation_threshold(contents, self._val_fraction)
        self._total, self._read = sum(source_bytes(source, self.exclude) for source, _ in self.all_sources()), 0
        dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        try:
            with atomic_dir(self._out) as staging, progress("tokenizing", self._total) as advance, ExitStack() as stack:
                self._advance, masked = advance, self._unit == "example"
                self._train, self._validation = (
                    _Split(staging.folder, split, DTYPES[dtype], self._shard_tokens, masked, stack) for split in SPLITS
                )
                yield
                fields = self._finalize(dtype)
                fields["files"] |= self._copy_tokenizer(staging.folder)
                write_manifest(staging.folder / MANIFEST, fields)
        except OSError as error:  # a full disk; errors of a source are ValueErrors
            raise DSMoEError(f"{self._out} cannot be written: {error.strerror}") from None
        self._report()

    def all_sources(self) -> list[tuple[str | Path, bool]]:
        """Return each source, and whether it is one of validation data."""
        return [(source, False) for source in self.sources] + [(source, True) for source in self._own_validation]

    def split_of(self, content: bytes, held_out: bool) -> "_Split":
        """Return the split of a document or example, by its content unless it is of a source of validation data."""
        return self._validation if held_out or is_validation(content, self._threshold) else self._train

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
            total = plural(self._validation.documents, self._unit)
            raise DSMoEError(f"val_fraction {self._val_fraction} leaves none of {total} to train on")
        splits = dict(zip(SPLITS, (self._train.finalize(), self._validation.finalize()), strict=True))
        return {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer_hash(self._tokenizer_files[0].parent),
            "vocab_size": self.tokenizer.vocab_size,
            "eos_token_id": self.eos,
            "dtype": dtype,
            "val_fraction": self._val_fraction,
            "split_special_tokens": self.tokenizer.split_special_tokens,
            "sources": [str(source) for source in self.sources],
            **({"validation": [str(source) for source in self._own_validation]} if self._own_validation else {}),
            "files": self._train.files | self._validation.files,
            "splits": splits,
            **self.fields,
        }

    def _copy_tokenizer(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Copy the tokenizer's files and return their entries in the manifest."""
        (folder / TOKENIZER).mkdir()
        copies = [shutil.copyfile(file, folder / TOKENIZER / file.name) for file in self._tokenizer_files]
        return {f"{TOKENIZER}/{copy.name}": hash_file(copy) for copy in copies}

    def _report(self) -> None:
        """Log special-token strings in the texts, and equal texts, which leave nothing to validate on."""
        if self._threshold and self._train.documents > 1 and not self._validation.documents:
            count = plural(self._train.documents, self._unit)
            _log.warning("%s: no validation split: all %s have the same text", self._out, count)
        if self._special_tokens:
            texts = plural(self._with_special_tokens, self._unit)
            found = f"{plural(self._special_tokens, 'special-token string')} in {texts}"
            if self.tokenizer.split_special_tokens:
                _log.info("%s: encoded %s as text", self._out, found)
            else:
                _log.warning("%s: %s become control tokens; set split_special_tokens to avoid it", self._out, found)

    def stats(self) -> ShardStats:
        """Return the size of both splits."""
        train, validation = (SplitStats(s.documents, s.tokens, s.loss_tokens) for s in (self._train, self._validation))
        return ShardStats(self._out, self._unit, train, validation)


def is_validation(content: bytes, threshold: int) -> bool:
    """Return whether a document or example with this content is in the validation split; see `validation_threshold`."""
    return _hash(content) < threshold


def validation_threshold(contents: Iterable[bytes], val_fraction: float) -> int:
    """Return the number in [0, 2**64] below which the hash of a content puts it in the validation split.

    It selects `val_fraction` of all hashes. If that selects none of these contents, it selects the smallest hash, if
    there are others.
    """
    threshold = math.ceil(val_fraction * 2**64)
    smallest = largest = None
    for content in contents if threshold else ():
        if (number := _hash(content)) < threshold:
            return threshold
        smallest, largest = min(number, smallest or number), max(number, largest or number)
    return threshold if smallest is None or smallest == largest else smallest + 1


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _as_list(sources: Sources) -> list[str | Path]:
    return [sources] if isinstance(sources, str | Path) else list(sources)


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
