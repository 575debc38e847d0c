"""Writing of fine-tuning examples: `write_examples`."""

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.progress import Meter, plural, silent

from ..data.sources import read_source
from ..data.writer import ShardStats, ShardWriter, Sources
from .examples import Example
from .formats import AUTO, FORMATS, Conversation, Record, ignored_fields, parse_record, texts_of
from .templates import TRAIN_ON, open_template, tokenize_record
from .truncate import truncate

EXCESS_LENGTH_STRATEGIES: Final = ("truncate", "drop", "raise")
_NAMED_FIELDS: Final = 20
_log = logging.getLogger(__name__)


def write_examples(
    sources: Sources,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    validation: Sources = (),
    template: str | Path = "chat",
    format: str = AUTO,
    train_on: str = "all",
    sequence_length: int,
    excess_length_strategy: str = "truncate",
    val_fraction: float = 0.0,
    max_malformed_fraction: float = 0.01,
    split_special_tokens: bool = False,
    exclude: Iterable[Path] = (),
    progress: Meter = silent,
) -> ShardStats:
    """Tokenize conversations and completions into a new folder, written atomically.

    Args:
        sources: Files, folders or patterns of .jsonl, .jsonl.gz, .jsonl.zst or .parquet.
        tokenizer_folder: Holds the tokenizer's files.
        out: Output folder; must not exist.
        validation: Sources of the validation split; `val_fraction` is not applied then.
        template: A key of `TEMPLATES`, or a Jinja file; it renders conversations.
        format: A key of `FORMATS`, or "auto": detected from the fields of each record.
        train_on: Assistant turns in the loss: "all", or the "last" of each conversation.
        sequence_length: Maximum tokens of an example.
        excess_length_strategy: What to do with longer ones: "truncate" (see `truncate`), "drop" or "raise".
        val_fraction: Fraction of the examples in the validation split, in [0, 1), chosen by a hash of the content;
            above 0 at least one of several examples.
        max_malformed_fraction: Malformed records of a file that are skipped and logged; more are an error.
        split_special_tokens: Encode the strings of special tokens in records as text, not as control tokens.
        exclude: Files and folders to leave out of the sources.
        progress: Shows the bytes read.

    Returns:
        The number of examples and tokens per split.

    Raises:
        DSMoEError: An argument, a source, the tokenizer or the template is invalid, a file is in both splits, the
            output exists, or the disk is full.
    """
    check_choice("format", format, (AUTO, *FORMATS))
    check_choice("train_on", train_on, TRAIN_ON)
    check_choice("excess_length_strategy", excess_length_strategy, EXCESS_LENGTH_STRATEGIES)
    if sequence_length < 2:
        raise DSMoEError(f"sequence_length must be at least 2, a token and its label, got {sequence_length}")
    render = open_template(template)
    ignored: Counter[str] = Counter()
    options: dict[str, Any] = {"split_special_tokens": split_special_tokens, "exclude": exclude}
    options |= {"val_fraction": val_fraction, "validation": validation}
    writer = ShardWriter(sources, tokenizer_folder, out, **options)
    reading: dict[str, Any] = {"max_malformed_fraction": max_malformed_fraction, "exclude": writer.exclude}

    def parse(fields: Mapping[str, Any]) -> tuple[Record, Example]:
        record = parse_record(fields, format)
        example = tokenize_record(record, writer.tokenizer, render, train_on)
        ignored.update(ignored_fields(fields, format))
        return record, example

    parse_only = functools.partial(parse_record, format=format)
    records = (r for source in writer.sources for _, r in read_source(source, parse=parse_only, **reading))
    count = overlong = longest = 0
    with writer.open(progress, map(_content, records)):
        for source, held_out in writer.all_sources():
            records = read_source(source, parse=parse, advance=writer.advance, **reading)
            for where, (record, example) in records:
                count += 1
                writer.count_special_tokens(texts_of(record))
                if (size := len(example.tokens)) > sequence_length:
                    if excess_length_strategy == "raise":
                        raise DSMoEError(f"{where}: example must have at most {sequence_length} tokens, got {size}")
                    overlong, longest = overlong + 1, max(longest, size)
                    if excess_length_strategy == "drop":
                        continue
                    example = truncate(example, sequence_length, writer.tokenizer.bos_token_id)
                writer.split_of(_content(record), held_out).add(example.tokens.tolist(), example.loss_mask)
        if overlong == count and excess_length_strategy == "drop":
            raise DSMoEError(f"sequence_length {sequence_length} is less than the length of all {count} examples")
        settings = {"template": str(template), "train_on": train_on, "sequence_length": sequence_length}
        settings |= {"excess_length_strategy": excess_length_strategy, "overlong": overlong}
        writer.fields["examples"] = settings
    if ignored:
        names = ", ".join(
            f"{name} ({plural(lines, 'line')})" for name, lines in sorted(ignored.items())[:_NAMED_FIELDS]
        )
        more = f" and {len(ignored) - _NAMED_FIELDS} more" if len(ignored) > _NAMED_FIELDS else ""
        _log.info("%s: ignored fields: %s%s", out, names, more)
    if overlong:
        done = "truncated" if excess_length_strategy == "truncate" else "dropped"
        limit = f"longer than {sequence_length} tokens, the longest {longest}"
        _log.warning("%s: %s %d of %d examples (%s)", out, done, overlong, count, limit)
    return writer.stats()._replace(overlong=overlong)


def _content(record: Record) -> bytes:
    """Return what decides the split: conversations with equal messages are in the same one."""
    return json.dumps([record.messages] if isinstance(record, Conversation) else record, sort_keys=True).encode()
