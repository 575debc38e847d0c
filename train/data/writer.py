"""Writing of token shards, and of examples: `ShardWriter`; tokenization.py writes documents."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, plural
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path
from dsmoe_jax.storage.manifest import hash_file, write_manifest
from dsmoe_jax.text.bulk import split_hash
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .files import refuse_overlap, source_bytes, unlogged, warn_on_overlap
from .megatron import is_tokenized
from .shards import DTYPES, FORMAT, MANIFEST, SPLITS, TOKENIZER, is_token_shards, tokenizer_hash
from .split_writer import SplitWriter

SHARD_TOKENS: Final = 1 << 27
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
        copies: Copies of documents that were removed.
    """

    folder: Path
    unit: str
    train: SplitStats
    validation: SplitStats
    text_bytes: int = 0
    overlong: int = 0
    copies: int = 0

    def __str__(self) -> str:
        """Return one line."""

        def line(split: SplitStats) -> str:
            loss = f", {split.loss_tokens:,} with loss" if self.unit == "example" else ""
            return f"{plural(split.tokens, 'token')} of {plural(split.documents, self.unit)}{loss}"

        copies = f"; removed {self.copies:,} exact {'copy' if self.copies == 1 else 'copies'}" if self.copies else ""
        return f"{self.folder}: training: {line(self.train)}; validation: {line(self.validation)}{copies}"


class ShardJob:
    """Checked sources, tokenizer and options of token shards; see `TokenizationJob` for the arguments."""

    def __init__(
        self,
        sources: Sources,
        tokenizer_folder: str | Path,
        out: Any,
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
        if shards := next(filter(is_tokenized, self.sources + self._own_validation), None):
            what = "token shards" if is_token_shards(shards) else "tokens of Megatron"
            raise DSMoEError(f"{shards}: holds {what}, already tokenized")
        self.tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split_special_tokens or None)
        if self.tokenizer.eos_token_id is None:
            raise DSMoEError(f"{tokenizer_folder}: the tokenizer has no EOS token")
        self.eos, self.exclude = self.tokenizer.eos_token_id, [out, *exclude]
        self.tokenizer_files = tokenizer_files(self.tokenizer.files[0].parent)
        self.out, self.unit = out, unit
        self.shard_tokens, self.val_fraction = shard_tokens, 0.0 if self._own_validation else val_fraction
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def all_sources(self) -> list[tuple[str | Path, bool]]:
        """Return each source, and whether it is one of validation data."""
        return [(source, False) for source in self.sources] + [(source, True) for source in self._own_validation]

    def threshold(self, contents: Iterable[bytes]) -> int:
        """Check for files in several sources; return the `validation_threshold` of `contents`, those of `sources`."""
        warn_on_overlap(self.sources, self.exclude)
        refuse_overlap(self.sources, self._own_validation, self.exclude)
        with unlogged():
            return validation_threshold(contents, self.val_fraction)

    def manifest(self) -> dict[str, Any]:
        """Return the fields of the manifest that do not depend on the texts."""
        return {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer_hash(self.tokenizer_files[0].parent),
            "vocab_size": self.tokenizer.vocab_size,
            "eos_token_id": self.eos,
            "dtype": self.dtype,
            "val_fraction": self.val_fraction,
            "split_special_tokens": self.tokenizer.split_special_tokens,
            "sources": [str(source) for source in self.sources],
            **({"validation": [str(source) for source in self._own_validation]} if self._own_validation else {}),
        }


class ShardWriter(ShardJob):
    """Writes examples as token shards."""

    def __init__(self, sources: Sources, tokenizer_folder: str | Path, out: str | Path, **options: Any):
        """Check the arguments of `ShardJob`."""
        check_new_path(out)
        super().__init__(sources, tokenizer_folder, Path(out), unit="example", **options)
        self.fields: dict[str, Any] = {}
        self._special = SpecialTokens()

    @contextlib.contextmanager
    def open(self, progress: Meter, contents: Iterable[bytes]) -> Iterator[None]:
        """Open the shards, finalized when the block ends without an error; `contents` are those of `sources`."""
        self._threshold = self.threshold(contents)
        total = sum(source_bytes(source, self.exclude) for source, _ in self.all_sources())
        try:
            with atomic_dir(self.out) as staging, progress("tokenizing", total) as self.advance, ExitStack() as stack:
                self._train, self._validation = (
                    SplitWriter(staging.folder, split, DTYPES[self.dtype], self.shard_tokens, True, stack)
                    for split in SPLITS
                )
                yield
                check_not_empty(self.val_fraction, self._train.documents, self._validation.documents, self.unit)
                splits = dict(zip(SPLITS, (self._train.finalize(), self._validation.finalize()), strict=True))
                files = self._train.files | self._validation.files
                files |= copy_tokenizer(self.tokenizer_files, staging.folder)
                fields = {**self.manifest(), "files": files, "splits": splits, **self.fields}
                write_manifest(staging.folder / MANIFEST, fields)
        except OSError as error:  # a full disk; errors of a source are ValueErrors
            raise DSMoEError(f"{self.out} cannot be written: {error.strerror}") from None
        report(self.stats(), self._threshold, self._special, split=self.tokenizer.split_special_tokens)

    def split_of(self, content: bytes, held_out: bool) -> SplitWriter:
        """Return the split of an example, by its content unless it is of a source of validation data."""
        return self._validation if held_out or is_validation(content, self._threshold) else self._train

    def count_special_tokens(self, texts: Iterable[str]) -> None:
        """Count the strings of special tokens in an example, for the log."""
        found = sum(map(self.tokenizer.count_special_tokens, texts))
        self._special = SpecialTokens(self._special.strings + found, self._special.texts + (found > 0))

    def stats(self) -> ShardStats:
        """Return the size of both splits."""
        train, validation = (SplitStats(s.documents, s.tokens, s.loss_tokens) for s in (self._train, self._validation))
        return ShardStats(self.out, self.unit, train, validation)


class SpecialTokens(NamedTuple):
    """Strings of special tokens in texts, and the texts that have some."""

    strings: int = 0
    texts: int = 0


def check_not_empty(val_fraction: float, train: int, validation: int, unit: str) -> None:
    """Raise `DSMoEError` if no documents or examples are left to train on."""
    if not train:
        raise DSMoEError(f"val_fraction {val_fraction} leaves none of {plural(validation, unit)} to train on")


def copy_tokenizer(files: Sequence[Path], folder: Any) -> dict[str, dict[str, Any]]:
    """Copy a tokenizer's files into token shards and return their entries in the manifest."""
    if isinstance(folder, Path):
        (folder / TOKENIZER).mkdir()
    for file in files:
        (folder / TOKENIZER / file.name).write_bytes(file.read_bytes())
    return {f"{TOKENIZER}/{file.name}": hash_file(file) for file in files}


def report(stats: ShardStats, threshold: int, special: SpecialTokens, *, split: bool) -> None:
    """Log special-token strings in the texts, and equal texts, which leave nothing to validate on."""
    if threshold and stats.train.documents > 1 and not stats.validation.documents:
        count = plural(stats.train.documents, stats.unit)
        _log.warning("%s: no validation split: all %s have the same text", stats.folder, count)
    if special.strings:
        found = f"{plural(special.strings, 'special-token string')} in {plural(special.texts, stats.unit)}"
        if split:
            _log.info("%s: encoded %s as text", stats.folder, found)
        else:
            _log.warning("%s: %s become control tokens; set split_special_tokens to avoid it", stats.folder, found)


def is_validation(content: bytes, threshold: int) -> bool:
    """Return whether a document or example with this content is in the validation split; see `validation_threshold`."""
    return split_hash(content) < threshold


def validation_threshold(contents: Iterable[bytes], val_fraction: float) -> int:
    """Return the number in [0, 2**64] below which the hash of a content puts it in the validation split.

    It selects `val_fraction` of all hashes. If that selects none of these contents, it selects the smallest hash, if
    there are others.
    """
    threshold = math.ceil(val_fraction * 2**64)
    smallest = largest = None
    for content in contents if threshold else ():
        if (number := split_hash(content)) < threshold:
            return threshold
        smallest, largest = min(number, smallest or number), max(number, largest or number)
    return threshold if smallest is None or smallest == largest else smallest + 1


def _as_list(sources: Sources) -> list[str | Path]:
    return [sources] if isinstance(sources, str | Path) else list(sources)
