"""The verb `tokenize`: `run`."""

import argparse
import functools

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import bar


def run(args: argparse.Namespace) -> object:
    """Tokenize everything or a task's share, or merge the shares; return a line."""
    from dsmoe_jax.train import data

    if args.merge is not None:
        if args.sources or args.out or args.tokenizer:
            raise DSMoEError("--merge takes no other arguments: the tasks have recorded them")
        return data.merge(args.merge)
    for name, value in {"SOURCE": args.sources, "--tokenizer": args.tokenizer, "--out": args.out}.items():
        if not value:
            raise DSMoEError(f"the following arguments are required: {name}")
    if (args.task is None) != (args.tasks is None):
        raise DSMoEError("--task and --tasks must be passed together")
    names = ("validation", "val_fraction", "split_special_tokens", "min_chars", "deduplicate", "workers")
    options = {name: getattr(args, name) for name in names}
    where: dict[str, list[str]] = {}
    for name, values in args.where:
        where.setdefault(name, []).extend(values.split(","))
    options |= {"field": args.text_column, "where": where}
    tokenize = data.tokenize
    if args.task is not None:
        tokenize = functools.partial(data.tokenize_task, task=args.task, tasks=args.tasks)
    return tokenize(args.sources, args.tokenizer, args.out, progress=bar, **options)
