"""`dsmoe ablate`, `dsmoe routes` and `dsmoe reproduce`."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.cli.streams import print_status
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import count

_ID: Final = r"\d{1,9}"
_IDS: Final = rf"{_ID}(,{_ID})*"


def ablate(args: argparse.Namespace, load: Any) -> None:
    """Print the loss with experts switched off; `load` returns a model and its tokenizer."""
    from dsmoe_jax.experiments.ablations import ablate, table
    from dsmoe_jax.layers.ablation import Ablation

    options = _options(args)
    settings = [Ablation(disable_top=value) for value in args.disable_top or ()]
    settings += [Ablation(active=value) for value in args.active or ()]
    settings += [Ablation(shared=False)] if args.no_shared else []
    settings += [Ablation(disabled=disabled_experts(text)) for text in args.disable_experts or ()]
    model, tokenizer = load(args.model)
    print(table(ablate(model, tokenizer, args.data, ablations=settings or None, **options)))
    if args.out:
        print_status(f"Saved {Path(args.out)}: ablations.json, ablations.png")


def routes(args: argparse.Namespace, load: Any) -> None:
    """Print the specialization of the experts of each layer; `load` returns both."""
    from dsmoe_jax.experiments.routing import routes, table

    options = _options(args)
    model, tokenizer = load(args.model)
    print(table(routes(model, tokenizer, args.data, **options)))
    if args.out:
        print_status(f"Saved {Path(args.out)}: routes.json, routes.png")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that `ablate` and `routes` share, checked before a model is loaded."""
    from dsmoe_jax.experiments.texts import check_limits

    check_limits(args.max_tokens, args.sequence_length)
    return {"max_tokens": args.max_tokens, "window": args.sequence_length, "out": args.out, "progress": count}


def reproduce(args: argparse.Namespace) -> None:
    """Run or resume an experiment, and print its report."""
    from dsmoe_jax.experiments import reproduce
    from dsmoe_jax.experiments.memory import plan_text
    from dsmoe_jax.experiments.variants import MAIN

    variants = None if args.variants is None else tuple(args.variants.split(","))
    if args.plan:
        options = {"steps": args.steps, "devices": args.devices, "device": args.device or "h100"}
        print(plan_text(args.scale or "laptop", variants or MAIN, **options))
        return
    if args.out is None:
        raise DSMoEError("--out is required")
    for name in ("devices", "device"):
        if (value := getattr(args, name)) is not None:
            raise DSMoEError(f"--{name} {value} needs --plan; runs use the devices that are there")
    names = ("scale", "seeds", "steps", "workers", "ablation_tokens")
    options = {name: getattr(args, name) for name in names}
    report = reproduce(args.out, variants=variants, sources=args.data, report_only=bool(args.report_only), **options)
    print(report.read_text(encoding="utf-8"), end="")
    print_status(f"Saved report: {report}")


def disabled_experts(text: str) -> Mapping[int, Sequence[int]] | tuple[int, ...]:
    """Parse "3,5" for every layer, or "1:3,5 2:0" by layer.

    Args:
        text: The value of `--disable-experts`.

    Raises:
        DSMoEError: It has another form.
    """
    if re.fullmatch(_IDS, text):
        return tuple(map(int, text.split(",")))
    if re.fullmatch(rf"{_ID}:{_IDS}( +{_ID}:{_IDS})*", text):
        layers: dict[int, tuple[int, ...]] = {}
        for part in text.split():
            layer, ids = part.split(":")
            layers[int(layer)] = (*layers.get(int(layer), ()), *map(int, ids.split(",")))
        return layers
    raise DSMoEError(f"--disable-experts must be ID,ID or 'LAYER:ID,ID LAYER:ID', got {text!r:.80}")
