"""Files to a folder of examples, once: `write_examples`. store.py says how they lie on disk."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.checkpoint.manifest import add_hash
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, write_json
from dsmoe_jax.text.tokenizer import Tokenizer

from ..data import formats as files
from ..data import is_held_out, shards, source_bytes, warn_of_overlap
from ..data.sources import Lines, find
from ..data.writer import SpecialTokenCount, Split, shards_manifest, warn_if_none_held_out
from .formats import AUTO, FORMATS, Conversation, Line, ignored_fields, read_line, texts_of
from .shorten import shorten
from .store import FORMAT, MANIFEST, is_examples, targets_file
from .templates import TARGETS, Example, example_of, open_template

TOO_LONG: Final = ("truncate", "drop", "refuse")
_NAMED_FIELDS: Final = 20
_SHARD_TOKENS: Final = 1 << 27
_log = logging.getLogger(__name__)


class Written(NamedTuple):
    """What `write_examples` made."""

    folder: Path
    examples: int
    tokens: int
    targets: int
    heldout_examples: int
    heldout_tokens: int
    heldout_targets: int
    too_long: int  # examples that were truncated or dropped

    def __str__(self) -> str:
        """For a person."""
        return (
            f"{self.folder}: {self.examples:,} examples to train on, {self.tokens:,} tokens, {self.targets:,} of them "
            f"targets; {self.heldout_examples:,} examples held out"
        )


def write_examples(
    sources: str | Path | Sequence[str | Path],
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    template: str | Path = "chat",
    format: str = AUTO,
    targets: str = "all",
    sequence_length: int,
    too_long: str = "truncate",
    val_fraction: float = 0.0,
    most_broken: float = 0.01,
    split_special_tokens: bool = False,
    exclude: Iterable[Path] = (),
    progress: Callable[[str, int], AbstractContextManager[Advance]] = silent,
) -> Written:
    """Write the lines of `sources` as a new folder of examples, complete or not at all.

    A source is a file, a folder or a pattern, as for pretraining, of .jsonl, .jsonl.gz, .jsonl.zst or .parquet. What a
    line says is found from its fields, or read as `format`; see `FORMATS`. A conversation is written out by `template`,
    a name of `TEMPLATES` or a file of Jinja; the turns of the assistant are learned, or only its last one (`targets`).

    An example of more than `sequence_length` tokens is cut (see `shorten`), left out, or refused by name (`too_long`).
    About the share `val_fraction` of the examples is kept for evaluation: which ones depends on what they say alone.

    The strings of special tokens in the text of a line become those tokens, and the log has how many there are; with
    `split_special_tokens` they are text, and control tokens come from the template alone.

    Files and folders in `exclude` are left out where a source holds them.

    Broken lines are counted and named in the log. Raises `ValueError` in one line where more than the share
    `most_broken` of a file's lines are, or all, and for everything else that is wrong with the sources, the tokenizer,
    the template or the folder.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise DSMoEError("no sources of examples")
    _check_choice("format", format, (AUTO, *FORMATS))
    _check_choice("targets", targets, TARGETS)
    _check_choice("too_long", too_long, TOO_LONG)
    if sequence_length < 2:
        raise DSMoEError(f"sequence_length must be at least 2, a token and its target, not {sequence_length}")
    if not 0 <= val_fraction < 1:
        raise DSMoEError(f"val_fraction must be at least 0 and less than 1, not {val_fraction}")
    if already := next((source for source in sources if is_examples(source)), None):
        raise DSMoEError(f"{already}: holds examples already")
    check_new_path(out)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder, split_special_tokens=split_special_tokens or None)
    special = SpecialTokenCount(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DSMoEError(f"{tokenizer_folder}: the tokenizer has no eos token to end an answer with")
    write_out = open_template(template)

    ignored: Counter[str] = Counter()

    def make(fields: Mapping[str, Any]) -> tuple[Line, Example]:
        line = read_line(fields, format)
        example = example_of(line, tokenizer, write_out, targets)
        ignored.update(ignored_fields(fields, format))
        return line, example

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    exclude = [Path(out), *exclude]
    warn_of_overlap(sources, exclude)
    total = sum(source_bytes(source, exclude) for source in sources)
    count = longer = longest = 0
    try:
        with atomic_dir(out) as draft, progress("tokenizing", total) as advance, ExitStack() as stack:
            train, heldout = (_Examples(draft.folder, split, shards.DTYPES[dtype], stack) for split in shards.SPLITS)
            for source in sources:
                for where, (line, example) in _found(source, exclude, make, most_broken, advance):
                    count += 1
                    special.add(texts_of(line))
                    if (size := len(example.tokens)) > sequence_length:
                        if too_long == "refuse":
                            raise DSMoEError(f"{where} has {size} tokens; sequence_length is {sequence_length}")
                        longer, longest = longer + 1, max(longest, size)
                        if too_long == "drop":
                            continue
                        example = shorten(example, sequence_length, tokenizer.bos_token_id)
                    # The same messages are on the same side, whatever else their lines have.
                    said = [line.messages] if isinstance(line, Conversation) else line
                    content = json.dumps(said, sort_keys=True).encode()
                    (heldout if is_held_out(content, val_fraction) else train).add(example)
            if longer == count and too_long == "drop":
                raise DSMoEError(f"all of {count} examples have more tokens than sequence_length {sequence_length}")
            if not train.split.documents:
                raise DSMoEError(
                    f"val_fraction {val_fraction} leaves none of {heldout.split.documents} examples to train on"
                )
            splits = dict(zip(shards.SPLITS, (train.finish(), heldout.finish()), strict=True))
            found = {split: tokens for split, (tokens, _) in splits.items()}
            token_shards = shards_manifest(tokenizer, dtype, val_fraction, sources, found)
            manifest = {
                "format": FORMAT,
                "template": str(template),
                "targets": targets,
                "sequence_length": sequence_length,
                "too_long": {too_long: longer},
                "split_special_tokens": tokenizer.split_special_tokens,
                "splits": {split: found for split, (_, found) in splits.items()},
            }
            write_json(draft.folder / shards.MANIFEST, add_hash(token_shards))
            write_json(draft.folder / MANIFEST, add_hash(manifest))
    except OSError as error:  # a full disk; what goes wrong with a source is a ValueError
        raise DSMoEError(f"{out} cannot be written: {error.strerror}") from None
    special.log(out, "examples")
    warn_if_none_held_out(out, val_fraction, "examples", train.split.documents, heldout.split.documents)
    if ignored:
        names = ", ".join(f"{name} ({lines:,} lines)" for name, lines in sorted(ignored.items())[:_NAMED_FIELDS])
        more = f" and {len(ignored) - _NAMED_FIELDS} more" if len(ignored) > _NAMED_FIELDS else ""
        _log.info("%s: ignored fields: %s%s", out, names, more)
    if longer:
        done = {"truncate": "were truncated", "drop": "were left out"}[too_long]
        had = f"had more than {sequence_length} tokens (the longest {longest})"
        _log.warning("%s: %d of %d examples %s and %s", out, longer, count, had, done)
    made = ((one.split.documents, one.split.tokens, one.targets) for one in (train, heldout))
    return Written(Path(out), *next(made), *next(made), longer)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise DSMoEError(f"{name} {value!r} is not one of {', '.join(known)}")


def _found(
    source: str | Path,
    exclude: Iterable[Path],
    make: Callable[[Mapping[str, Any]], Any],
    most_broken: float,
    advance: Advance,
) -> Iterator[tuple[str, Any]]:
    """Where each line of a source is, and what `make` makes of it; one for which it raises `ValueError` is broken."""
    count = passed = 0
    found = find(source, exclude)
    found.log(source)
    for file in found.files:
        if files.reader_of(file.path) is files.read_text:
            if file.named:
                raise DSMoEError(f"{file.path}: is not one of {', '.join(files.FORMATS)}")
            passed += 1
            continue
        lines, done = Lines(file.path, most_broken), 0
        for entry in files.read_file(file.path, None):
            advance(entry.done - done)
            done = entry.done
            if entry.value is not None:
                try:
                    entry = entry._replace(value=make(entry.value))
                except ValueError as error:
                    entry = entry._replace(value=None, problem=str(error))
            if lines.whole(entry):
                count += 1
                yield f"{file.path}{entry.place}", entry.value
        lines.end()
    if passed:
        _log.info("%s: passed over %d files that are not one of %s", source, passed, ", ".join(files.FORMATS))
    if not count:
        raise DSMoEError(f"{source}: holds no examples")


class _Examples:
    """Writes the examples of a split: its token shards, and its targets beside them."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, stack: ExitStack):
        self.split = Split(folder, split, dtype, _SHARD_TOKENS)
        stack.callback(self.split.abandon)
        self._file = stack.enter_context((folder / targets_file(split)).open("wb"))
        self._hash = hashlib.sha256()
        self.targets = 0

    def add(self, example: Example) -> None:
        self.split.add(example.tokens.tolist())
        data = example.is_target.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.targets += int(example.is_target.sum())

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """End the files; returns what the two manifests say of the split."""
        self._file.close()
        return self.split.finish(), {"targets": self.targets, "sha256": self._hash.hexdigest()}
