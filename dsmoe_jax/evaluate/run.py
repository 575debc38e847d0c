"""Evaluate a model on a suite of benchmarks: `evaluate`, which writes a report; `task_metrics` during training.

In a cluster all processes make the same calls; process 0 alone writes.
"""

import contextlib
import importlib.metadata
import json
import logging
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.chart import draw
from dsmoe_jax.evaluate.libraries import allow_code, check_installed, quiet
from dsmoe_jax.evaluate.report import Result, read_results, to_json, to_markdown
from dsmoe_jax.evaluate.responses import HASHES, lock_output, open_responses
from dsmoe_jax.evaluate.suites import Suite
from dsmoe_jax.evaluate.task_data import data_folder
from dsmoe_jax.evaluate.task_loading import LoadedRow, TaskLoader, describe
from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.memory_plan import weight_dtypes
from dsmoe_jax.loading import identity, resolve
from dsmoe_jax.progress import Meter, count, duration, logged, plural, silent
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.manifest import HashCache, hash_json
from dsmoe_jax.storage.paths import user_path

REPORT: Final = "report"  # .md and .json
RAW: Final = "results.json"
CHART: Final = "scores.png"
_SEED: Final = 1234  # the harness's, of examples in the context
_BOOTSTRAP: Final = 1000  # samples; only for metrics other than means
_MERGED: Final = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
)
_log = logging.getLogger("dsmoe_jax")


class Evaluation(NamedTuple):
    """The outcome of `evaluate`.

    Attributes:
        out: Folder of the report.
        results: One per benchmark and metric.
    """

    out: Path
    results: list[Result]

    def __str__(self) -> str:
        """Return a summary of one line."""
        done = sum(result.score is not None for result in self.results)
        return f"Evaluated {done} of {plural(len(self.results), 'score')}: {self.out / REPORT}.md"


class Protocol(NamedTuple):
    """How tasks are run.

    Attributes:
        limit: Documents of each task, or their fraction if less than 1; None: all.
        num_fewshot: Examples in the context of every task; None: those of the suite or the task.
        apply_chat_template: Whether prompts are rendered as chats.
        unsafe_code: Whether generated code may run.
        seed: Seed of examples and samples.
    """

    limit: int | float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    unsafe_code: bool = False
    seed: int = _SEED


def evaluate(
    model: str | Path,
    *,
    out: str | Path,
    suite: str = "base",
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    max_gen_toks: int | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    data: str | Path | None = None,
    include_path: str | Path | Sequence[str | Path] = (),
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    seed: int = _SEED,
    force: bool = False,
) -> Evaluation:
    """Evaluate a model and write `report.md`, `report.json`, `scores.png` and the harness's `results.json`.

    Responses of the model are kept in the folder as they are computed: the same call resumes, and more benchmarks or
    documents of the same model reuse them.

    Args:
        model: Native checkpoint, Hugging Face folder or hub id.
        out: Folder of the report.
        suite: "base", "chat", "leaderboard", or tasks of lm-evaluation-harness separated by commas.
        limit: Documents of each task, or their fraction if less than 1; default: all.
        num_fewshot: Examples in the context; default: those of the suite or of the task.
        batch_size: Sequences scored and outputs generated at once; default: those of `Generator`.
        max_gen_toks: Maximum output length of tasks that state none; default: 256, at most half the window.
        quantize: Quantize the weights: "int8", "int4" or "nf4".
        adapter: Folder of a LoRA adapter.
        dtype: Dtype of the weights; default: as stored.
        revision: Branch, tag or commit of a hub id.
        mesh: Mesh to shard the model over.
        data: Folder with local datasets: `owner/name`, a copy of a dataset repository, or `TASK/SPLIT.jsonl`.
        include_path: Folder or folders with further task files.
        apply_chat_template: Render prompts as chats.
        confirm_run_unsafe_code: Allow tasks that run generated code on this machine.
        seed: Seed of examples in the context, and of tasks that sample.
        force: Load a model that exceeds the planned memory, with a warning.

    Returns:
        The results.

    Raises:
        DSMoEError: An argument is invalid, no benchmark of the suite can run, a task given by name cannot run, or the
            folder belongs to something else.
    """
    for name, value, minimum in (("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < minimum:
            raise DSMoEError(f"{name} must be at least {minimum}, got {value}")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise DSMoEError(f"limit must be a positive int, or a fraction of the documents in (0, 1), got {limit}")
    folder, start = user_path(out, "out").absolute(), time.monotonic()
    protocol = Protocol(limit, num_fewshot, apply_chat_template, confirm_run_unsafe_code, seed)
    with quiet(), allow_code(confirm_run_unsafe_code), lock_output(folder):
        check_installed()
        with collective_errors():
            paths = [include_path] if isinstance(include_path, str | Path) else include_path
            loader = TaskLoader(paths, data_folder(data))
            chosen = loader.suite(suite)
        source = resolve(model, revision)
        rows = load_rows(loader, chosen, protocol)
        options = {"dtype": dtype, "quantize": quantize, "adapter": adapter, "mesh": mesh, "force": force}
        generator = Generator.from_pretrained(source, max_batch_size=batch_size, **options)
        evaluated: dict[str, Any] = {}
        with collective_errors():
            if jax.process_index() == 0:
                evaluated = _identity(source, generator, adapter, folder)
                evaluated |= {"quantize": quantize, "dtype": _cast(source, generator, dtype), "seed": seed}
        with open_responses(folder, evaluated) as responses:
            from dsmoe_jax.evaluate.harness import DSMoELM

            lm = DSMoELM(generator, batch_size=batch_size, max_gen_toks=max_gen_toks, responses=responses, seed=seed)
            lm.chat_template(apply_chat_template)  # raises without one
            head = {
                "model": str(model),
                "suite": suite,
                "adapter": None if adapter is None else str(adapter),
                "quantize": quantize,
                "dtype": dtype,
                "max_length": lm.max_length,
                "max_gen_toks": lm.max_gen_toks,
                **protocol._asdict(),
                "kept_responses": len(responses),
                "versions": {name: importlib.metadata.version(name) for name in ("dsmoe_jax", "lm_eval", "jax")},
            }
            results = _run(lm, rows, protocol, _Report(folder, chosen, head, start))
    if all(result.score is None for result in results):
        raise DSMoEError(f"nothing was scored; {results[0].row.benchmark}: {results[0].reason}")
    return Evaluation(folder, results)


def load_rows(loader: TaskLoader, suite: Suite, protocol: Protocol) -> list[LoadedRow]:
    """Load the tasks of a suite; collective.

    Raises:
        DSMoEError: A task given by name cannot run, or no benchmark of the suite can.
    """
    rows = []
    for row in suite.rows:
        loaded = loader.load(row, unsafe_code=protocol.unsafe_code)
        if not _agree(not loaded.reason) and not loaded.reason:
            loaded = LoadedRow(row, None, "another process cannot load it; see its log")
        rows.append(loaded)
    failed = [loaded for loaded in rows if loaded.reason]
    if failed and suite.is_list:
        raise DSMoEError(failed[0].reason)
    if failed and len(failed) == len(rows):
        raise DSMoEError(f"none of {plural(len(rows), 'benchmark')} can run; the first: {failed[0].reason}")
    for loaded in failed:
        _log.info("Skipping %s: %s", loaded.row.benchmark, loaded.reason)
    return rows


def run_row(lm: Any, loaded: LoadedRow, protocol: Protocol) -> tuple[list[Result], dict[str, Any]]:
    """Run the tasks of a benchmark.

    Args:
        lm: The model, a `DSMoELM`.
        loaded: The benchmark, without a reason.
        protocol: How to run it.

    Returns:
        Its results, and the harness's.

    Raises:
        DSMoEError: The code of a task fails, for example on a document.
    """
    from lm_eval.evaluator import evaluate as run_tasks  # pyright: ignore[reportMissingImports]

    assert loaded.tasks is not None
    shots = loaded.row.shots if protocol.num_fewshot is None else protocol.num_fewshot
    before = lm.truncated
    with _task_errors(loaded.row.task):
        for task in loaded.tasks["tasks"].values():
            if shots is not None and task.OUTPUT_TYPE != "loglikelihood_rolling":
                task.set_config("num_fewshot", shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(protocol.seed)
        random.seed(protocol.seed)
        np.random.seed(protocol.seed % 2**32)
        found: Any = run_tasks(
            lm,
            loaded.tasks,  # pyright: ignore[reportArgumentType]
            limit=protocol.limit,  # pyright: ignore[reportArgumentType]
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            apply_chat_template=protocol.apply_chat_template,
            fewshot_as_multiturn=protocol.apply_chat_template,
            confirm_run_unsafe_code=protocol.unsafe_code,
        )
    raw = {name: found[name] for name in _MERGED if name in found}
    return read_results(loaded.row, raw, lm.truncated - before), raw


def task_metrics(lm: Any, rows: Sequence[LoadedRow], protocol: Protocol) -> dict[str, float]:
    """Run loaded tasks, for evaluation during training; collective.

    Args:
        lm: The model, a `DSMoELM`; a new one for each state of the weights.
        rows: From `load_rows`; they can be run again.
        protocol: How to run them.

    Returns:
        Scores in the paper's unit by "task/metric".
    """
    with quiet():
        found = [result for loaded in rows if not loaded.reason for result in run_row(lm, loaded, protocol)[0]]
    return {
        f"{result.row.task}/{result.metric.removesuffix(',none')}": result.score
        for result in found
        if result.score is not None
    }


@contextlib.contextmanager
def _task_errors(task: str) -> Iterator[None]:
    """Raise `DSMoEError` for an exception of the code of a task; those of the model and the device pass."""
    from dsmoe_jax.evaluate import harness

    try:
        yield
    except (DSMoEError, MemoryError):
        raise
    except Exception as error:
        if any(frame.f_code.co_filename == harness.__file__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise DSMoEError(describe(task, error)) from error


class _Report(NamedTuple):
    """Where the report is written, and what it says besides the results."""

    folder: Path
    suite: Suite
    head: dict[str, Any]
    start: float

    def write(self, results: Sequence[Result], raw: Mapping[str, Any], lm: Any) -> None:
        """Write all files on process 0; collective."""
        with collective_errors():
            if jax.process_index() == 0:
                head = self.head | {
                    "prompt_tokens": lm.prompt_tokens,
                    "reused_tokens": lm.reused_tokens,
                    "truncated": lm.truncated,
                    "time": duration(time.monotonic() - self.start),
                }
                report = self.folder / REPORT
                write_json(report.with_suffix(".json"), to_json(self.suite, results, head))
                report.with_suffix(".md").write_text(to_markdown(self.suite, results, head), encoding="utf-8")
                write_json(self.folder / RAW, json.loads(json.dumps(raw, default=str)))
                draw(self.folder / CHART, self.suite, results, f"{Path(self.head['model']).name}, {self.head['suite']}")


def _run(lm: Any, rows: Sequence[LoadedRow], protocol: Protocol, report: _Report) -> list[Result]:
    """Run all benchmarks; the report is written after each."""
    results: list[Result] = []
    raw: dict[str, dict[str, Any]] = {name: {} for name in _MERGED}
    for number, loaded in enumerate(rows, 1):
        row = loaded.row
        found, one = [Result(row, row.metric, reason=loaded.reason)], {}
        if not loaded.reason:
            name = f"{row.benchmark} ({number} of {len(rows)})"
            _log.info("Evaluating %s", name)
            lm.progress = _named_meter(name)
            try:
                found, one = run_row(lm, loaded, protocol)
            except Exception as error:
                if report.suite.is_list or not isinstance(error, DSMoEError):
                    raise
                found = [Result(row, row.metric, reason=str(error))]
            for result in found:
                value = result.reason if result.score is None else f"{result.metric} {result.score:.4g}"
                _log.info("%s: %s", result.row.benchmark, value)
        results += found
        for name, entries in one.items():
            raw[name] |= {f"{row.benchmark}: {key}" if key in raw[name] else key: e for key, e in entries.items()}
        later = [Result(one.row, one.row.metric, reason=one.reason or "not yet") for one in rows[number:]]
        report.write([*results, *later], raw, lm)
    return results


def _named_meter(name: str) -> Meter:
    meter = silent if jax.process_index() else count if sys.stderr.isatty() else logged
    return lambda what, total: meter(name, total)


def _agree(value: bool) -> bool:
    """Return whether the value is true on all processes."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).all())


def _identity(source: Path, generator: Generator, adapter: str | Path | None, folder: Path) -> dict[str, Any]:
    """Return what determines the responses: SHA-256 of weights, tokenizer and adapter, and the stop conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = HashCache(folder / HASHES)
    tokenizer = generator.tokenizer
    files = () if tokenizer is None else tokenizer.files
    found = {"model": identity(source, cache), "tokenizer": _hash(cache, files), "adapter": None}
    if adapter is not None:
        home = user_path(adapter, "adapter")
        found["adapter"] = _hash(cache, sorted(file for file in home.glob("adapter_*") if file.is_file()))
    # Of generation configs, that of the adapter included.
    found |= {"eos_token_ids": sorted(generator.eos_token_ids), "stop_strings": list(generator.stop_strings)}
    return found


def _cast(source: Path, generator: Generator, dtype: str | None) -> str | None:
    """Return the dtype unless all weights are stored in it."""
    if dtype is None:
        return None
    stored = {np.dtype(one) for one in weight_dtypes(source, generator.config).values()}
    return None if stored == {np.dtype(dtype)} else dtype


def _hash(cache: HashCache, files: Sequence[Path]) -> str:
    return hash_json({file.name: sha256 for file, sha256 in cache.hashes(files).items()})
