"""The scores of `dsmoe evaluate` for a model card: `read_scores`, `model_index`."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json

_REPORT: Final = "report.json"
_FIELDS: Final = {
    "benchmark": str,
    "task": str,
    "metric": str,
    "score": int | float,
    "shots": int | None,
    "n": int,
}


def read_scores(checkpoint: Path, evaluation: str | Path | None) -> dict[str, Any]:
    """Return the report of an evaluation with the rows that have a score; empty if there is none.

    Args:
        checkpoint: The evaluated checkpoint.
        evaluation: Output folder of `dsmoe evaluate`; default: `scores` beside the checkpoint, unless the report is of
            another checkpoint.

    Returns:
        The report.

    Raises:
        DSMoEError: `evaluation` has no report with a score.
    """
    if evaluation is not None:
        path = user_path(evaluation, "evaluation") / _REPORT
        if scores := _with_scores(read_json(path)):
            return scores
        raise DSMoEError(f"{path} is no report of `dsmoe evaluate` with a score")
    with contextlib.suppress(OSError, TypeError, ValueError):
        scores = _with_scores(read_json(checkpoint.resolve().parent / "scores" / _REPORT))
        if Path(scores.get("model", "")).resolve() == checkpoint.resolve() and scores.get("adapter") is None:
            return scores
    return {}


def model_index(name: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores of a model as the hub's metadata `model-index`."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["benchmark"],
            metric_type=row["metric"].partition(",")[0],
            metric_name=row["metric"],
            metric_value=row["score"],
        )
        for row in scores["rows"]
    ]
    return eval_results_to_model_index(name, results)


def _with_scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with only the rows that have a score; empty if there are none or it is another file."""
    rows = report.get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    rows = [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in _FIELDS.items())]
    return {**report, "rows": rows} if rows else {}
