"""The report of an experiment: `write_report`."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.ablations import describe
from dsmoe_jax.experiments.charts import draw_ablations, draw_curves, draw_losses
from dsmoe_jax.experiments.comparisons import (
    COMPARISONS,
    CONFIDENCE,
    PAPER_ABLATIONS,
    Ablated,
    Comparison,
    Outcome,
    compare,
    interval,
)
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.variants import VARIANTS
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.progress import plural
from dsmoe_jax.storage.atomic_dir import write_json, write_text
from dsmoe_jax.train.run_records import RunRecords, column
from dsmoe_jax.train.trackers import RECORDS

REPORT: Final = "report.md"
JSON: Final = "report.json"
_WINDOW: Final = 0.02  # of the steps, of the moving average
_COUNTER_EVIDENCE: Final = (
    "Others found shared experts of little use (OLMoE, arXiv 2409.02060, section 4.1.3: slightly worse), others keep "
    "them (marin#4021)."
)


def write_report(experiment: Experiment) -> Path:
    """Write `report.md`, `report.json` and the charts of all complete runs.

    Args:
        experiment: The experiment.

    Returns:
        The Markdown report.

    Raises:
        DSMoEError: No run is complete, or matplotlib is not installed.
    """
    found = {job: result for job in experiment.jobs if (result := experiment.result(job)) is not None}
    if not found:
        raise DSMoEError(f"{experiment.out}: no run is complete")
    losses: dict[str, dict[int, float]] = {}
    for job, result in found.items():
        losses.setdefault(job.variant, {})[job.seed] = result["eval_loss"]
    ablations = _ablations(experiment)
    ablated = {name: {one["seed"]: _by_ablation(one) for one in found} for name, found in ablations.items()}
    outcomes = compare(losses, ablated)
    draw_losses(experiment.out / "losses.png", losses)
    charts = ["losses"]
    if curves := _curves(experiment, found):
        draw_curves(experiment.out / "training.png", curves)
        charts.append("training")
    if ablations:
        draw_ablations(experiment.out / "ablations.png", ablations)
    write_json(
        experiment.out / JSON,
        {
            "experiment": experiment.fields(),
            "runs": list(found.values()),
            "outcomes": list(map(_fields, outcomes)),
            "ablations": ablations,
        },
    )
    sections = [
        _decided(experiment),
        _outcomes(experiment, outcomes),
        _losses(list(found.values()), losses, charts),
        _ablation_section(ablations),
        _setting(experiment, found),
    ]
    write_text(experiment.out / REPORT, "\n\n".join(filter(None, sections)) + "\n")
    return experiment.out / REPORT


def _fields(one: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON; the half-width of one pair is null."""
    half = one.half_width if np.isfinite(one.half_width) else None
    return {**one._asdict(), "half_width": half, "comparison": one.comparison._asdict()}


def _ablations(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Return the ablations by variant, one per seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in experiment.jobs:
        if (measured := experiment.ablations(job)) is not None:
            found.setdefault(job.variant, []).append({"seed": job.seed, **measured})
    return found


def _by_ablation(result: Mapping[str, Any]) -> Ablated:
    """Return the losses of one model; `disabled` is empty in the paper's ablations."""
    names = ("disable_top", "active", "shared")
    return {Ablation(**{name: row[name] for name in names}): row["loss"] for row in result["losses"]}


def _curves(experiment: Experiment, jobs: Collection[Job]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return tokens and smoothed training losses of the first complete run of each variant."""
    curves = {}
    for job in jobs:
        folder = experiment.run_folder(job)
        if job.variant not in curves and (folder / RECORDS).exists():
            steps = RunRecords.read(folder).steps
            width = max(1, round(_WINDOW * len(steps)))
            mean = np.convolve(column(steps, "cross_entropy"), np.full(width, 1 / width), "valid")
            curves[job.variant] = column(steps, "tokens")[width - 1 :], mean
    return curves


def _decided(experiment: Experiment) -> str:
    size, first = experiment.scale, experiment.first
    tokens = size.steps * size.tokens_per_step
    variants, seeds = plural(len(experiment.variants), "variant"), plural(experiment.seeds, "seed")
    later = [f"`{name}`" for name in experiment.variants if name not in first["variants"]]
    later += [plural(experiment.seeds - first["seeds"], "seed")] if experiment.seeds > first["seeds"] else []
    added = f" (added later: {', '.join(later)})" if later else ""
    lines = [
        f"# DeepSeekMoE's comparisons at scale `{experiment.scale_name}`",
        "## Decided before running",
        f"`plan.json` was written before the first run. {variants}, {seeds}{added}, {tokens / 1e6:.1f}M tokens a run. "
        f"Runs of equal seed read the same data in the same order from the same initial seed and are compared in "
        f"pairs. The metric is the loss on the whole validation split in nats per token; an outcome is stated from the "
        f"{CONFIDENCE:.0%} t-interval of the paired difference, of losses or of their rises with experts disabled, not "
        "corrected for the number of comparisons. Claims and the variants that show them:",
        "\n".join(
            f"- {one.claim}: `{one.better}` {'=' if one.equal else '<'} `{one.worse}`{_late(experiment, one)}"
            for one in COMPARISONS
            if {one.better, one.worse} <= set(experiment.variants)
        ),
        _COUNTER_EVIDENCE,
    ]
    return "\n\n".join(lines)


def _late(experiment: Experiment, one: Comparison) -> str:
    return "" if experiment.decided(one) else " (added after the first run had started)"


def _outcomes(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return ""
    rows = ["| claim | difference | pairs | the paper's | outcome |", "| --- | --- | --- | --- | --- |"]
    for one in outcomes:
        half = f" ± {one.half_width:.4f}" if np.isfinite(one.half_width) else ""
        names = f"`{one.comparison.worse}` - `{one.comparison.better}`"
        paper = "" if one.paper is None else f"{one.paper:+.3f}"
        claim = f"{one.comparison.claim}{_late(experiment, one.comparison)}: {names}"
        pairs = f"{one.seeds}{' (seeds added later)' if one.seeds > experiment.first['seeds'] else ''}"
        cells = (claim, f"{one.mean:+.4f}{half}", pairs, paper, one.verdict)
        rows.append("| " + " | ".join(cells) + " |")
    note = (
        "A claim is confirmed or contradicted by an interval without 0. That two variants are equal can be "
        "contradicted, not confirmed. The paper's differences are those of its 2B on 100B tokens of another text."
    )
    return "\n\n".join(["## Results", "\n".join(rows), note])


def _losses(
    results: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[int, float]], charts: Sequence[str]
) -> str:
    sizes = {one["variant"]: (one["parameters"], one["active_parameters"]) for one in results}
    rows = [
        "| variant | | parameters, M | active, M | validation loss | seeds | the paper's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(losses, key=lambda name: -statistics.mean(losses[name].values())):
        mean, half = interval(np.array(list(losses[name].values())))
        error = f" ± {half:.4f}" if np.isfinite(half) else ""
        total, active = (f"{count / 1e6:.2f}" for count in sizes[name])
        paper = VARIANTS[name].paper
        published = "" if paper is None else f"{paper:.3f}"
        cells = (
            f"`{name}`",
            VARIANTS[name].note,
            total,
            active,
            f"{mean:.4f}{error}",
            str(len(losses[name])),
            published,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n\n".join(["## Losses", "\n".join(rows), "\n".join(f"![{name}]({name}.png)" for name in charts)])


def _ablation_section(ablations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not ablations:
        return ""
    rows = [
        "| variant | ablation | loss | change | seeds | the paper's change |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, results in ablations.items():
        published, found = PAPER_ABLATIONS.get(name, {}), [_by_ablation(one) for one in results]
        for ablation in found[0]:
            values = np.array([one[ablation] for one in found])
            mean, half = interval(values - [one[Ablation()] for one in found])
            error = f" ± {half:.3f}" if np.isfinite(half) and ablation != Ablation() else ""
            paper = f"{published[ablation] - published[Ablation()]:+.3f}" if ablation in published else ""
            change = f"{mean:+.3f}{error}"
            cells = (f"`{name}`", describe(ablation), f"{values.mean():.4f}", change, str(len(found)), paper)
            rows.append("| " + " | ".join(cells) + " |")
    (measured,) = {(one["tokens"], one["documents"]) for results in ablations.values() for one in results}
    text = (
        "Figures 4 and 5 and section 4.5 of the paper: routed experts of the highest scores disabled, fewer active "
        f"experts, the shared expert off with one more routed. All are of the same {measured[0]:,} tokens of "
        f"{plural(measured[1], 'document')}, a part of the validation split, so that `none` differs from the "
        "validation loss above. Intervals are over the seeds."
    )
    return "\n\n".join(["## Expert ablations", text, "\n".join(rows), "![ablations](ablations.png)"])


def _setting(experiment: Experiment, jobs: Mapping[Job, Mapping[str, Any]]) -> str:
    size = experiment.scale
    texts = ", ".join(f"`{Path(one).name}`" for one in experiment.sources)
    folders = [folder for job in jobs if ((folder := experiment.run_folder(job)) / RECORDS).exists()]
    skips = [RunRecords.read(folder).steps[-1]["total_skips"] for folder in folders]
    skipped = (
        f" Outliers of the gradient norm are skipped: {min(skips)} to {max(skips)} updates a run." if skips else ""
    )
    versions = sorted({f"dsmoe_jax {found['version']}" for found in jobs.values() if "version" in found})
    made = f" Trained by {', '.join(versions)}." if versions else ""
    lines = [
        "## Setting",
        f"hidden {size.hidden_size}, {size.layers} layers, {size.heads} heads, vocabulary {size.vocab_size}, sequences "
        f"of {size.sequence_length}, {size.batch_size} a step, {size.steps} steps, AdamW with the paper's schedule, "
        f"peak learning rate {size.learning_rate:g}, initial weights of standard deviation {size.initializer_range:g}."
        f"{skipped} Texts: {texts}.{made}",
    ]
    return "\n\n".join(lines)
