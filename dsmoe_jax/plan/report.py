"""Plans as text for a terminal: one function for each kind."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from dsmoe_jax.plan.collectives import Traffic
from dsmoe_jax.plan.compiled import Compiled
from dsmoe_jax.plan.generation import GenerationPlan
from dsmoe_jax.plan.roofline import RANGE, model_flops
from dsmoe_jax.plan.search import Found, flags
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.plan.ways_out import WayOut
from dsmoe_jax.progress import byte_size, plural, with_prefix
from dsmoe_jax.train.metrics import flops_per_token

_WIDTH: Final = 40
_ROWS: Final = 10  # of a search
_NEGLIGIBLE: Final = 1e-4  # of the bytes of a device


def training_text(plan: TrainingPlan, card: str) -> str:
    """Return the text of `dsmoe plan pretrain` and `dsmoe plan finetune`."""
    work = plan.work
    lines = [
        _title(work.mesh.size, card, work.mesh.shape),
        _verdict(plan.fits, plan.bytes, plan.card.usable),
        "",
        *_table(
            "memory per device",
            {name: size for name, size in plan.held.items() if size > _NEGLIGIBLE * plan.bytes}
            | {f"{name} (temporary)": size for name, size in plan.temporary.items()}
            | {"sum": plan.bytes},
        ),
        *_traffic_lines("communication per step and device", plan.traffic),
        f"{plural(work.sequences, 'sequence')} × {plural(work.length, 'token')} per step, "
        f"{plural(work.parts, 'micro-batch')} of {plural(work.rows, 'sequence')} per device; "
        f"{with_prefix(flops_per_token(work.model, work.length), 'FLOP')} per token, "
        f"{with_prefix(model_flops(work), 'FLOP')} per step",
        *_speed_lines(plan),
    ]
    return "\n".join(lines) + "\n"


def generation_text(plan: GenerationPlan, card: str) -> str:
    """Return the text of `dsmoe plan generate`."""
    lines = [
        _title(plan.mesh.size, card, plan.mesh.shape),
        _verdict(plan.fits, plan.memory.total, plan.card.usable),
        "",
        *_table(
            "memory per device",
            {name.replace("_", " "): size for name, size in plan.memory._asdict().items()} | {"sum": plan.memory.total},
        ),
        *_traffic_lines("communication per decode step and device", plan.traffic),
        f"{plural(plan.batch_size, 'output')} of {plan.max_length:,} tokens at once; memory for {plan.longest:,}",
        f"estimate: decode {plan.decode[0]:,.0f} to {plan.decode[1]:,.0f} tok/s (bound by {' or '.join(plan.bounds)}), "
        f"prefill {plan.prefill[0]:,.0f} to {plan.prefill[1]:,.0f} tok/s, all devices",
        f"assumes: decode reads weights and cache at {_percent('bandwidth')} of the memory bandwidth, prefill reaches "
        f"{_percent('experts')} of the peak FLOP/s, links and network {_percent('link')}; no latencies; not measured "
        "on a GPU",
    ]
    return "\n".join(lines) + "\n"


def search_text(found: Found, card: str, ways: Sequence[WayOut] = ()) -> str:
    """Return the text of `--search`; `ways`: what makes room if nothing fits."""
    if not found.fitting:
        return "\n".join(["nothing fits", *_way_lines(found.smallest, ways)]) + "\n"
    axes, batch, time, mfu = "data fsdp expert tensor", "micro-batch", "s per step", "MFU"
    header = f"{axes:>24} {batch:>12} {'remat':>6} {'':>5} {'memory':>8} {time:>14} {mfu:>12}  bound"
    lines = [f"fitting candidates: {len(found.fitting):,}; the fastest by estimate on {card}:", header]
    for plan in found.fitting[:_ROWS]:
        work, (slow, fast), (least, most) = plan.work, plan.speed.step, plan.speed.mfu
        axes, batch = " ".join(f"{size:>5}" for size in work.mesh.shape.values()), f"{work.rows} × {work.parts}"
        time, mfu, scheme = f"{fast:.3g} to {slow:.3g}", f"{least:.0%} to {most:.0%}", work.scheme or ""
        lines.append(
            f"{axes:>24} {batch:>12} {work.config.step.remat:>6} {scheme:>5} {byte_size(plan.bytes):>8} "
            f"{time:>14} {mfu:>12}  {plan.estimates[1].bound}"
        )
    return "\n".join([*lines, "", f"flags of the first: {flags(found.fitting[0])}"]) + "\n"


def compiled_text(plan: TrainingPlan, compiled: Compiled) -> str:
    """Return the compiled step beside the arithmetic."""
    return _beside("the step", plan.arguments, plan.temporaries, plan.traffic, compiled)


def compiled_generation_text(plan: GenerationPlan, compiled: Mapping[str, Compiled]) -> str:
    """Return the compiled programs of generation beside the arithmetic."""
    memory, prefill, decode = plan.memory, compiled["prefill"], compiled["decode"]
    held = memory.weights + memory.prompt_cache
    return _beside("a prefill call", held, memory.activations, None, prefill) + _beside(
        "a decode step", memory.weights + memory.cache, None, plan.traffic, decode
    )


def _beside(
    what: str, arguments: int, temporaries: int | None, traffic: Sequence[Traffic] | None, compiled: Compiled
) -> str:
    """Return a compiled program beside the arithmetic; None: not planned."""
    rows: dict[str, list[int | None]] = {
        "arguments": [arguments, compiled.arguments],
        "temporaries": [temporaries, compiled.temporaries],
    }
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one in traffic or ():
        sums[one.kind][0] += one.bytes
    for one in compiled.collectives:
        sums[one.kind][1] += one.bytes * one.count
    rows |= {kind: [None if traffic is None else mine, its] for kind, (mine, its) in sums.items()}
    cells = {name: ("" if size is None else f"{size / 1e9:.4g}" for size in row) for name, row in rows.items()}
    lines = ["", f"{what}, compiled in {compiled.seconds:.0f} s"]
    lines += [f"{'GB per device':{_WIDTH}}{'arithmetic':>12}{'compiled':>12}"]
    lines += [f"  {name:{_WIDTH - 2}}{mine:>12}{its:>12}" for name, (mine, its) in cells.items()]
    return "\n".join(lines) + "\n"


def _title(devices: int, card: str, mesh: Mapping[str, int]) -> str:
    return f"{devices:,} × {card}: {', '.join(f'{axis}={size}' for axis, size in mesh.items())}"


def _verdict(fits: bool, size: float, usable: float) -> str:
    left = byte_size(abs(usable - size))
    verdict = f"fits, {left} left" if fits else f"does not fit, {left} missing"
    return f"{verdict}: {byte_size(size)} of {byte_size(usable)} per device"


def _table(title: str, sizes: Mapping[str, int]) -> list[str]:
    """Return rows of bytes."""
    rows = (f"  {name:{_WIDTH - 2}}{byte_size(size):>10}" for name, size in sizes.items())
    return [title, *rows, ""] if sizes else []


def _traffic_lines(title: str, traffic: Sequence[Traffic]) -> list[str]:
    """Group communication by kind and axes."""
    sizes: dict[str, int] = collections.defaultdict(int)
    for one in traffic:
        sizes[f"{one.kind} over {'+'.join(one.axes)}"] += one.bytes
    return _table(title, sizes)


def _speed_lines(plan: TrainingPlan) -> list[str]:
    (slow, fast), tokens, mfu = plan.speed.step, plan.speed.tokens, plan.speed.mfu
    parts = [
        f"{name} {getattr(plan.estimates[1], field):.3g} to {getattr(plan.estimates[0], field):.3g} s"
        for name, field in (("compute", "matmul"), ("optimizer", "memory"), ("links", "node"), ("network", "network"))
        if getattr(plan.estimates[0], field)
    ]
    bounds = dict.fromkeys(one.bound for one in plan.estimates)
    return [
        f"estimate: {fast:.3g} to {slow:.3g} s per step, {tokens[0]:,.0f} to {tokens[1]:,.0f} tok/s, "
        f"MFU {mfu[0]:.0%} to {mfu[1]:.0%}; bound by {' or '.join(bounds)} ({', '.join(parts)})",
        f"assumes: matmuls at {_percent('matmul')} of {plan.card.flops / 1e12:.4g} TFLOP/s, experts at "
        f"{_percent('experts')}, links at {_percent('link')} of {plan.card.link / 1e9:.4g} GB/s, network of "
        f"{plan.card.network / 1e9:.4g} GB/s per device, {_percent('overlap')} of communication hidden; "
        "balanced routing; not measured on a GPU",
    ]


def _percent(field: str) -> str:
    low, high = (getattr(one, field) for one in RANGE)
    return f"{low:.0%} to {high:.0%}"


def _way_lines(smallest: TrainingPlan, ways: Sequence[WayOut]) -> Iterator[str]:
    """Say what the smallest candidate needs, and what makes room."""
    yield f"the smallest candidate, {flags(smallest)}, needs {smallest}"
    for changed, plan in ways:
        rest = "which fits" if plan.fits else f"{byte_size(plan.bytes - plan.card.usable)} still missing"
        yield f"with {changed}: {byte_size(smallest.bytes - plan.bytes)} less, {rest}"
    if not ways:
        yield "no other number of devices, sequence length, moments, LoRA or quantization makes room on its own"
