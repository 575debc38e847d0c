"""Tokenize documents into token shards, piece by piece. Start at `tokenize`; tasks.py spreads it over machines."""

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, Meter, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, check_space, sync
from dsmoe_jax.storage.manifest import add_hash, hash_json
from dsmoe_jax.storage.remote import is_url, remove_tree, save_json
from dsmoe_jax.text.bulk import BulkEncoder, Encoded

from .files import resolve_source
from .formats import Columns
from .join import KEYED, Record, join
from .pieces import Piece, cut
from .shards import DTYPES, MANIFEST, SPLITS
from .sources import Counts, Document, Selection, documents, read_texts
from .split_writer import SplitWriter
from .writer import (
    SHARD_TOKENS,
    ShardJob,
    ShardStats,
    Sources,
    SpecialTokens,
    SplitStats,
    check_not_empty,
    copy_tokenizer,
    is_validation,
    report,
    validation_threshold,
)

_SAMPLE: Final = 0.01  # fraction of the sources from which the total size is extrapolated
_BATCH_CHARS: Final = 1 << 19  # per call of the tokenizer, which takes a hundred times as many bytes
_PARALLEL_BYTES: Final = 32 << 20  # of sources from which worker processes pay; they start in a second
PIECES: Final = "pieces"  # folder of the shards of pieces, in that of the token shards


def tokenize(
    sources: Sources,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    progress: Meter = silent,
    **options: Any,
) -> ShardStats:
    """Tokenize texts into a new folder of token shards, written atomically.

    A document becomes BOS (if the tokenizer adds one), its tokens and EOS. The tokenizer's files are copied into the
    folder. The output is deterministic, whatever the number of workers. A killed call that is repeated resumes.

    Args:
        sources: One or more sources; see `documents`.
        tokenizer_folder: Holds the tokenizer's files.
        out: Output folder, or its URL in an object store; must not exist.
        workers: Processes that encode; 0 encodes in this one. Default: one per core, 0 for less than 32 MB of sources.
        progress: Shows the bytes read.
        **options: Options of `TokenizationJob`.

    Returns:
        The number of documents and tokens per split.

    Raises:
        DSMoEError: An argument, a source or the tokenizer is invalid, a file is in both splits, the output exists, or
            the disk is (or, by extrapolation, will be) full.
    """
    if is_url(out):
        from .tasks import merge, tokenize_task

        tokenize_task(sources, tokenizer_folder, out, task=0, tasks=1, workers=workers, progress=progress, **options)
        return merge(out)
    check_new_path(out)
    job = TokenizationJob(sources, tokenizer_folder, Path(out), **options)
    try:
        with atomic_dir(job.out, job=job.plan) as staging:
            folder = staging.folder / PIECES
            folder.mkdir(exist_ok=True)
            job.encode(Work(folder, staging.finished, staging.finish), workers=workers, progress=progress)
            records = [staging.finished[str(number)] for number in range(len(job.pieces))]
            files = job.tokenizer_files
            stats = finalize(
                job.plan, records, folder, job.out, staging.folder, tokenizer_files=files, take=Path.rename
            )
            remove_tree(folder)
    except ChildProcessError as error:  # of a worker; finished pieces are kept
        raise DSMoEError(str(error)) from None
    except OSError as error:  # a full disk; errors of a source are ValueErrors
        raise DSMoEError(f"{job.out} cannot be written: {error.strerror}") from None
    return stats


class Work(NamedTuple):
    """Where pieces are written: their folder, the records of finished ones by number, and how to add one."""

    folder: Any
    finished: Mapping[str, Record]
    finish: Callable[[str, Record], None]


class TokenizationJob(ShardJob):
    """Sources of documents, cut into pieces, and how to tokenize them.

    Attributes:
        pieces: The pieces of all sources.
        files: A line for each file: number of its source, bytes, version, path.
        plan: JSON of everything that determines the output.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer_folder: str | Path,
        out: Any,
        *,
        validation: Sources = (),
        shard_tokens: int = SHARD_TOKENS,
        val_fraction: float = 0.01,
        field: str = "text",
        where: Mapping[str, Collection[str]] | None = None,
        min_chars: int = 0,
        deduplicate: bool = False,
        max_malformed_fraction: float = 0.01,
        split_special_tokens: bool = False,
        exclude: Iterable[Path] = (),
    ):
        """Check the arguments and find the files.

        Args:
            sources: One or more sources; see `documents`.
            tokenizer_folder: Holds the tokenizer's files.
            out: Output folder, a `Path` or a `RemotePath`.
            validation: Sources of the validation split; `val_fraction` is not applied then.
            shard_tokens: Size at which a shard is closed; documents are not split.
            val_fraction: Fraction of the documents in the validation split, in [0, 1), chosen by a hash of the text;
                above 0 at least one of several documents.
            field: The field of a line, or the column, that holds the text.
            where: Allowed values of other fields; records with another value are skipped.
            min_chars: Shorter texts are skipped.
            deduplicate: Keep the first of equal texts only.
            max_malformed_fraction: Malformed lines of a file that are skipped and logged; more are an error.
            split_special_tokens: Encode the strings of special tokens in texts as text, not as control tokens.
            exclude: Files and folders to leave out of the sources.
        """
        options: dict[str, Any] = {"split_special_tokens": split_special_tokens, "exclude": exclude}
        options |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction, "validation": validation}
        super().__init__(sources, tokenizer_folder, out, unit="document", **options)
        if min_chars < 0:
            raise DSMoEError(f"min_chars must be at least 0, got {min_chars}")
        allowed = {name: sorted(values) for name, values in (where or {}).items()}
        self.selection = Selection(field, allowed, min_chars, max_malformed_fraction)
        self.deduplicate = deduplicate
        reading: dict[str, Any] = {**self.selection._asdict(), "exclude": self.exclude}
        texts = (document.text.encode() for source in self.sources for document in documents(source, **reading))
        threshold = self.threshold(texts)
        found = [resolve_source(source, self.exclude) for source, _ in self.all_sources()]
        for (source, _), files in zip(self.all_sources(), found, strict=True):
            files.log(source)
        numbered = [(number, file) for number, files in enumerate(found) for file in files.files]
        self.pieces: Sequence[Piece] = cut(numbered)
        pairs = zip(self.all_sources(), found, strict=True)
        revisions = {str(source): files.revision for (source, _), files in pairs if files.revision}
        manifest = self.manifest() | self._not_default() | ({"revisions": revisions} if revisions else {})
        plan: dict[str, Any] = {"manifest": manifest, "threshold": threshold}
        plan |= {"selection": self.selection._asdict(), "deduplicate": deduplicate, "shard_tokens": shard_tokens}
        identities = ((number, *file.identity()) for number, file in numbered)
        self.files = [f"{number} {size} {version} {path}" for number, path, size, version in identities]
        self.plan = {**plan, "pieces": len(self.pieces), "files": hash_json({"files": self.files})}

    def _not_default(self) -> dict[str, Any]:
        """Return the options for the manifest, without defaults."""
        options = {**self.selection._asdict(), "deduplicate": self.deduplicate}
        default = {**Selection()._asdict(), "deduplicate": False}
        changed = {name: value for name, value in options.items() if value != default[name]}
        return {"selection": changed} if changed else {}

    def encode(
        self, work: Work, *, numbers: Iterable[int] | None = None, workers: int | None = None, progress: Meter = silent
    ) -> None:
        """Write the shards of pieces, by default all, that are not finished."""
        todo = [n for n in (range(len(self.pieces)) if numbers is None else numbers) if str(n) not in work.finished]
        total = sum(part.size for number in todo for part in self.pieces[number])
        if workers is not None and workers < 0:
            raise DSMoEError(f"workers must be at least 0, got {workers}")
        if workers is None:
            workers = _cores() if total > _PARALLEL_BYTES else 0
        dtype, split = DTYPES[self.dtype], self.tokenizer.split_special_tokens
        options: dict[str, Any] = {"split_special_tokens": split, "dtype": dtype, "keys": self.deduplicate}
        encoder = BulkEncoder(self.tokenizer_files[0].parent, workers=workers, **options)
        writer, written = None, 0
        with contextlib.ExitStack() as stack:
            stack.callback(encoder.close)
            stack.callback(lambda: writer and writer.close())
            advance = stack.enter_context(progress("tokenizing", total))
            results = stack.enter_context(contextlib.closing(encoder.encode(self._batches(todo, advance))))
            for batch, encoded in results:
                writer = writer or PieceWriter(self, work.folder, batch.piece)
                writer.add(encoded, batch.held_out)
                if batch.counts is not None:
                    work.finish(str(batch.piece), writer.finish(batch.counts))
                    written += writer.size
                    writer = None
                elif batch.read >= total * _SAMPLE and isinstance(self.out, Path):
                    size = written + writer.size
                    check_space(self.out, size * (total - batch.read) // max(batch.read, 1))

    def _batches(self, numbers: Iterable[int], advance: Advance) -> Iterator[tuple["_Batch", list[str]]]:
        """Iterate over batches of the texts of pieces; the last batch of each is empty and has its counts."""
        read = 0

        def count(step: int) -> None:
            nonlocal read
            read += step
            advance(step)

        for number in numbers:
            counts: dict[str, Counts] = {}
            for source, parts in itertools.groupby(self.pieces[number], key=lambda part: part.source):
                name, held_out = self.all_sources()[source]
                found = counts[str(source)] = Counts()
                files = ((part.file, part.part) for part in parts)
                for batch in _grouped(read_texts(name, files, self.selection, found, count)):
                    yield _Batch(number, held_out, read), [document.text for document in batch]
            yield _Batch(number, False, read, counts), []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Batch(NamedTuple):
    """Texts of a piece; `read` bytes of all sources had been read."""

    piece: int
    held_out: bool
    read: int
    counts: Mapping[str, Counts] | None = None  # by source, at the end of a piece


def _grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
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


class PieceWriter:
    """Writes the shards of a piece."""

    def __init__(self, job: TokenizationJob, folder: Any, number: int):
        self._stack = stack = contextlib.ExitStack()
        self._folder, self._threshold = folder, job.plan["threshold"]
        self._names = {split: f"{number:06d}.{split}" for split in SPLITS}
        dtype = DTYPES[job.dtype]
        self._splits = [
            SplitWriter(folder, name, dtype, job.shard_tokens, False, stack) for name in self._names.values()
        ]
        keys = [folder / f"{name}.keys" for name in self._names.values()] if job.deduplicate else []
        self._keys = [stack.enter_context(path.open("wb")) for path in keys]
        self._text_bytes, self._special = 0, np.zeros(2, np.int64)

    @property
    def size(self) -> int:
        """Bytes on disk when all shards are closed."""
        return sum(split.size for split in self._splits)

    def add(self, batch: Encoded, held_out: bool) -> None:
        """Append documents, to the split of their hash unless they are of a source of validation data."""
        self._text_bytes += int(batch.text_bytes.sum())
        self._special += (batch.special_tokens, batch.with_special_tokens)
        validation = np.array([held_out or int(value) < self._threshold for value in batch.hashes], bool)
        for number, mask in enumerate((~validation, validation)):
            if mask.any():
                ids = batch.ids if mask.all() else batch.ids[np.repeat(mask, batch.lengths)]
                self._splits[number].extend(ids, batch.lengths[mask])
                if self._keys:
                    keyed = np.zeros(int(mask.sum()), KEYED)
                    keyed["high"], keyed["low"] = batch.keys[mask].T
                    keyed["text_bytes"] = batch.text_bytes[mask]
                    self._keys[number].write(keyed.tobytes())

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def finish(self, counts: Mapping[str, Counts]) -> dict[str, Any]:
        """Close the files and return the record of the piece."""
        splits = dict(zip(SPLITS, (split.finalize() for split in self._splits), strict=True))
        files = {name: entry for split in self._splits for name, entry in split.files.items()}
        record = {"splits": splits, "files": files, "counts": {source: dict(one) for source, one in counts.items()}}
        record |= {"text_bytes": self._text_bytes, "special_tokens": self._special.tolist()}
        self.close()
        names = list(files)
        if self._keys:
            record["keys"] = {split: f"{name}.keys" for split, name in self._names.items()}
            names += record["keys"].values()
        for name in names:
            if isinstance(self._folder, Path):
                sync(self._folder / name)
        return record


def finalize(
    plan: Mapping[str, Any],
    records: list[Record],
    pieces: Any,
    out: Any,
    folder: Any,
    *,
    tokenizer_files: Sequence[Path],
    take: Callable[[Any, Any], object],
) -> ShardStats:
    """Join finished pieces into `folder`, which becomes `out`; log what was skipped."""
    selection, manifest = plan["selection"], plan["manifest"]
    sources = [*manifest["sources"], *manifest.get("validation", ())]
    for number, source in enumerate(sources):
        counts = Counts()
        for record in records:
            counts.update(record["counts"].get(str(number), {}))
        counts.log(source, Columns(selection["field"]))
    options = {name: plan[name] for name in ("shard_tokens", "deduplicate")}
    joined = join(records, pieces, folder, dtype=manifest["dtype"], take=take, **options)
    train, validation = (SplitStats(entry["documents"], entry["tokens"], 0) for entry in joined.splits.values())
    check_not_empty(manifest["val_fraction"], train.documents, validation.documents, "document")
    files = joined.files | copy_tokenizer(tokenizer_files, folder)
    fields = {**manifest, "files": files, "splits": joined.splits, "text_bytes": joined.text_bytes}
    fields |= {"copies": joined.copies} if plan["deduplicate"] else {}
    save_json(folder / MANIFEST, add_hash(fields))
    stats = ShardStats(out, "document", train, validation, joined.text_bytes, copies=joined.copies)
    special = np.sum([np.array(record["special_tokens"]) for record in records], axis=0).tolist()
    report(stats, plan["threshold"], SpecialTokens(*special), split=manifest["split_special_tokens"])
    return stats


def training_texts(sources: Sequence[str], val_fraction: float, *, exclude: Collection[Path] = ()) -> Iterator[str]:
    """Iterate over the texts that `tokenize` puts in the training split of these sources.

    Args:
        sources: Texts, as for `tokenize`.
        val_fraction: Fraction of the documents held out.
        exclude: Folders that are not read.
    """
    texts = lambda: (one.text for source in sources for one in documents(source, exclude=exclude))  # noqa: E731
    threshold = validation_threshold(map(str.encode, texts()), val_fraction)
    return (text for text in texts() if not is_validation(text.encode(), threshold))
