"""The report of an evaluation: `Result` per benchmark and metric, `to_json`, `to_markdown`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dsmoe_jax.evaluate.suites import NOTES, Row, Suite, scale
from dsmoe_jax.progress import plural

_NOTE: Final = """\
The published scores (arXiv:2401.06066) were measured with an internal framework whose prompts are not published. A
difference is no evidence of an error in the model or its conversion: evaluate LLaMA2 7B with the same tasks to see how
far the prompts move a score."""
_OWN: Final = ("alias", "name", "sample_len", "sample_count")  # fields of the harness's results that are no metric
_COUNTED: Final = ("prompt_tokens", "reused_tokens", "time")  # of this process alone
_NO_VERSION: Final = ("None", "N/A", "Yaml")  # the harness's, of a task that states none


class Result(NamedTuple):
    """The score of a benchmark in one metric, or the reason why there is none.

    Attributes:
        row: The benchmark.
        metric: Metric and filter, as in the harness's results.
        score: In the paper's unit: percent, or bits per byte; None if it was not run.
        stderr: Standard error of the score, None if the harness has none.
        version: Version of the task.
        shots: Examples in the context; None if the tasks of a group differ.
        n: Documents.
        truncated: Requests whose context was truncated; None if it is known only for several tasks together.
        reason: Why it was not run.
    """

    row: Row
    metric: str
    score: float | None = None
    stderr: float | None = None
    version: str = ""
    shots: int | None = None
    n: int = 0
    truncated: int | None = 0
    reason: str = ""


def read_results(row: Row, found: Mapping[str, Any], truncated: int) -> list[Result]:
    """Return the results of a benchmark from the output of `lm_eval.evaluate`; without a metric in the row, all.

    A tag, and a group that aggregates no metric, has the results of each of its tasks.
    """
    samples, shots = found["n-samples"], found.get("n-shot", {})
    metrics = found["results"].get(row.task) or found.get("groups", {}).get(row.task) or {}
    if any("," in name for name in metrics):
        counts, used = (
            [one["effective"] for one in samples.values()],
            {shots[name] for name in samples if name in shots},
        )
        shared = {"shots": used.pop() if len(used) == 1 else None, "n": sum(counts), "truncated": truncated}
        return _row_results(row, metrics, {**shared, "version": _version(found, row.task)})
    results = []
    for task, count in samples.items():
        shared = {"shots": shots.get(task), "n": count["effective"], "truncated": None if truncated else 0}
        leaf = row._replace(benchmark=task, task=task)
        results += _row_results(leaf, found["results"][task], {**shared, "version": _version(found, task)})
    return results or [Result(row, row.metric, reason=f"lm_eval returned no score of {row.task}")]


def _row_results(row: Row, metrics: Mapping[str, Any], shared: dict[str, Any]) -> list[Result]:
    names = [name for name in metrics if name not in _OWN and "_stderr," not in name]
    if row.metric and row.metric not in names:
        return [Result(row, row.metric, reason=f"lm_eval has no {row.metric} of {row.task}: {', '.join(names)}")]
    results = []
    for name in [row.metric] if row.metric else names:
        metric, _, kind = name.partition(",")
        factor = scale(name)
        score, stderr = _number(metrics[name]), _number(metrics.get(f"{metric}_stderr,{kind}"))
        if score is not None:
            results.append(Result(row, name, score * factor, None if stderr is None else stderr * factor, **shared))
    return results or [Result(row, row.metric, reason=f"lm_eval returned no score of {row.task}")]


def _version(found: Mapping[str, Any], task: str) -> str:
    version = str(found.get("versions", {}).get(task, ""))
    return "" if version in _NO_VERSION else version


def to_json(suite: Suite, results: Sequence[Result], head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report as JSON: the head's fields and `rows`."""
    rows = []
    for result in results:
        row = result.row
        published = dict(zip(suite.models, row.published, strict=False))
        fields = {"benchmark": row.benchmark, "task": row.task, "note": NOTES.get(row.task, ""), "published": published}
        rows.append(fields | {name: value for name, value in result._asdict().items() if name != "row"})
    return {**head, "models": suite.models, "rows": rows}


def to_markdown(suite: Suite, results: Sequence[Result], head: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    published = [f"{model} (published)" for model in suite.models]
    header = ["benchmark", "score", *published, "n", "protocol"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 2), "---"])]
    for result in results:
        values = [*result.row.published, *[None] * len(suite.models)][: len(suite.models)]
        cells = [_format(value, result.metric) for value in values]
        n = f"{result.n:,}" if result.n else "–"
        lines.append(_line([result.row.benchmark, _score(result), *cells, n, _protocol(result)]))
    settings = "\n".join(f"- {line}" for line in _settings(head))
    note = f"\n{_NOTE}\n" if suite.models else ""
    table = "\n".join(lines)
    return (
        f"# Evaluation of {head.get('model', 'a model')}\n\n{table}\n\nScores ± standard error.\n{note}\n{settings}\n"
    )


def _score(result: Result) -> str:
    if result.score is None:
        return "not run"
    error = "" if result.stderr is None else f" ± {_format(result.stderr, result.metric)}"
    return f"**{_format(result.score, result.metric)}**{error}"


def _protocol(result: Result) -> str:
    row = result.row
    shots = row.shots if result.shots is None else result.shots
    shown = [
        f"`{row.task}` {result.version}".rstrip(),
        "" if shots is None else f"{shots}-shot",
        result.metric.replace(",none", "").replace(",", " "),
        NOTES.get(row.task, ""),
        f"{result.truncated} contexts truncated" if result.truncated else "",
    ]
    text = ", ".join(part for part in shown if part)
    return f"{result.reason} ({text})" if result.reason else text


def _format(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if scale(metric) != 1 else f"{value:.3g}"


def _settings(head: Mapping[str, Any]) -> Iterator[str]:
    kept = head.get("kept_responses")
    for name, value in head.items():
        if name == "apply_chat_template":
            yield f"prompts: {'chats, by the template of the tokenizer' if value else 'plain text, no chat template'}"
        elif value not in (None, False, 0):
            since = (
                f" (since the last start, with {plural(kept, 'response')} kept)" if kept and name in _COUNTED else ""
            )
            yield f"{name.replace('_', ' ')}: {_shown(name, value)}{since}"


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    if value is True:
        return "yes"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _number(value: Any) -> float | None:
    """Return a finite number; the harness has "N/A" for a standard error that it cannot compute."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
