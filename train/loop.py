"""A training run, read from top to bottom: `run`."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import find_damage, is_native, read_manifest
from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.environment import check_environment
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.progress import plural
from dsmoe_jax.sharding import BATCH_AXES, make_mesh
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.locks import lock_folder
from dsmoe_jax.storage.manifest import hash_file, hash_json
from dsmoe_jax.xla_options import quiet_cache_reads

from .best import BEST, Best, replace_result
from .checkpoints import Checkpoints
from .checks import check_model
from .config import RunConfig
from .defaults import with_defaults
from .distributed import initialize, on_process_0
from .eval_tasks import open_tasks
from .evaluation import evaluation_loss, place
from .failures import check_finite, memory_errors
from .finetune import ADAPTER, FinetuneConfig, finetuning
from .goodput import Goodput
from .inputs import differences
from .job import MODEL, Job, pretraining
from .metrics import Recorder, read_records
from .monitor import Monitor
from .optimizer import make_optimizer
from .preflight import check_inputs
from .profiling import Tracer
from .resume import CHECKPOINTS, CONFIG, check_resumable, check_settings, identity, log_changes, read_run
from .step import TrainState, init_state, make_eval_step, make_step, state_shardings
from .summary import log_summary
from .trackers import console_log

_CACHE: Final = "compiled"
_log = logging.getLogger(__name__)


class Result(NamedTuple):
    """Outcome of a run.

    Attributes:
        steps: Steps completed, earlier starts included.
        total_steps: Steps that the run is configured for.
        stopped: Whether a signal stopped the run early.
        loss: Training loss of the last step.
        eval_loss: Validation cross-entropy, nats per token; None without validation data.
        total_skips: Updates skipped.
        model: Trained model (native checkpoint) or adapter; None if stopped.
        resumed_from: Step of the checkpoint resumed from; equal to `steps` if the run was already complete.
    """

    steps: int
    total_steps: int
    stopped: bool
    loss: float
    eval_loss: float | None
    total_skips: int
    model: Path | None
    resumed_from: int = 0


@quiet_cache_reads()
def run(config: RunConfig, *, check: Callable[[RunConfig, Mesh | None], None] | None = None) -> Result:
    """Train, resuming from the newest intact checkpoint in the output directory.

    The same function runs on one device and on every process of a cluster. SIGTERM and SIGINT stop it after the current
    step, with a checkpoint.

    Args:
        config: A `RunConfig` to pretrain, a `FinetuneConfig` to fine-tune.
        check: Called with the config and the mesh (None: one device) before anything is written; may raise.

    Returns:
        The outcome.

    Raises:
        DSMoEError: for an invalid config, an output directory in use, too many skipped updates in a row, parameters
            or a final loss that are not finite, or too little device memory.
    """
    started = time.time()
    with ExitStack() as stack:
        stack.enter_context(console_log(config.trackers))
        initialize(config.distributed)
        output_dir, mesh = Path(config.output_dir), None
        with collective_errors():  # fail before anything is written
            config = with_defaults(config)
            mesh = _check(config)
            if check is not None:
                check(config, mesh)
        on_process_0(check_inputs, config)
        on_process_0(lambda: stack.enter_context(lock_folder(output_dir)))
        stack.enter_context(memory_errors())
        return _run(config, output_dir, mesh, started)


def _run(config: RunConfig, output_dir: Path, mesh: Mesh | None, started: float) -> Result:
    output_dir.mkdir(parents=True, exist_ok=True)
    _enable_compilation_cache(output_dir / _CACHE)
    with ExitStack() as stack:
        folder, keep = output_dir / CHECKPOINTS, config.checkpoint
        checkpoints = Checkpoints(folder, max_to_keep=keep.max_to_keep, keep_period=keep.keep_period)
        stack.callback(checkpoints.close)
        _check_same_checkpoints(checkpoints)
        if config.resume == "never" and checkpoints.steps():
            raise DSMoEError(
                f"{checkpoints.folder} has checkpoints: omit --resume never, or choose another --output-dir"
            )
        found = checkpoints.newest()
        setup: dict[str, Any] = {}
        if found is not None:
            setup = {"resuming": True, "check": functools.partial(check_settings, checkpoints.folder, *found)}
        if isinstance(config, FinetuneConfig):
            job = finetuning(config, output_dir, batch_multiple=_batch_multiple(config, mesh), **setup)
        else:
            job = pretraining(config, output_dir, **setup)
        before, resolved = read_run(output_dir), {"total_steps": job.steps, "model_config": job.model.to_dict()}
        now = config.to_dict() | resolved
        now["data"] |= job.corpus.settings
        if found is not None:
            check_resumable(checkpoints.folder, *found, job.resume_metadata)
            if result := _completed(found[0], job, output_dir, before.get("result")):
                return result
            log_changes(before, now, found[0])
        else:
            _warn_of_leftovers(job, output_dir)
        if (warmup := config.optimizer.warmup_steps) > job.steps:
            _log.warning("Warmup shortened to %s: optimizer.warmup_steps is %d", plural(job.steps, "step"), warmup)
        stack.enter_context(nullcontext() if mesh is None else jax.set_mesh(mesh))
        corpus = job.corpus
        graph = abstract(job.model, config.dispatch)[0]
        optimizer, schedule = make_optimizer(config.optimizer, job.steps)
        frozen = job.load_frozen(mesh)
        state = _initial_state(config, job, optimizer, mesh, frozen, checkpoints, found)
        first = int(state.step)
        if jax.process_index() == 0:
            write_json(output_dir / CONFIG, now)
            log_summary(config, job, mesh, state, frozen)
        options: dict[str, Any] = {"mesh": mesh, "seed": config.seed, "max_grad_norm": config.optimizer.max_grad_norm}
        step = make_step(job.model, graph, optimizer, schedule, config.step, trainable=job.trainable, **options)
        eval_step = make_eval_step(job.model, graph, config.step, job.trainable)
        evaluate = functools.partial(evaluation_loss, eval_step, frozen, mesh)
        tasks = open_tasks(config, job, graph)
        goodput = Goodput(started, _earlier_records(output_dir, first))
        recorder = stack.enter_context(_recorder(config, job, output_dir, first, goodput))
        tracer = stack.enter_context(Tracer(config.profile, output_dir, first))
        monitor = Monitor(recorder, config)
        best = Best(output_dir, job, first) if job.keep_best else None
        stop = stack.enter_context(_stop_signal())
        batches = corpus.batches(first)
        stack.callback(getattr(batches, "close", lambda: None))

        goodput.add("setup", time.time() - started)
        metrics, evaluation, n, stopped = None, None, first, False
        while n < job.steps and not (stopped := _should_stop(stop, n, config.log_interval)):
            tracer.before(n + 1)
            loading = -time.perf_counter()
            batch = place(next(batches), mesh)
            loading += time.perf_counter()
            dispatched = time.perf_counter()
            state, metrics = step(state, batch, frozen)
            if n == first:
                goodput.add("compile", seconds := time.perf_counter() - dispatched)
                if recorder is not None:
                    _log.info("Compiled the training step in %.1f s", seconds)
            n += 1
            monitor.add(n, metrics, loading)
            tracer.after(n, metrics)
            saves = n % config.checkpoint.interval == 0
            evaluates = n % config.eval_interval == 0 or n in (1, job.steps)
            runs_tasks = n % (config.eval_tasks_interval or config.eval_interval) == 0 or n == job.steps
            if saves or evaluates or (runs_tasks and tasks is not None):
                monitor.flush()
                # Before the checkpoint: a run resumed from it does not repeat this evaluation.
                if evaluates:
                    with goodput.measure("evaluation"):
                        evaluation = evaluate(state, corpus.validation_batches())
                        by_source = {name: evaluate(state, one) for name, one in corpus.batches_by_source().items()}
                    if evaluation and recorder is not None:
                        recorder.record_eval(n, *evaluation, {name: one[0] for name, one in by_source.items() if one})
                    if evaluation and best is not None:
                        best.offer(n, evaluation[0], state.params)
                if runs_tasks and tasks is not None:
                    with goodput.measure("evaluation"):
                        scores = tasks.scores(state.params, frozen)
                    if recorder is not None:
                        recorder.record_tasks(n, scores)
                if saves:
                    with goodput.measure("checkpoint"):
                        check_finite(n, state.params, output_dir)
                        checkpoints.save(n, state, {**job.resume_metadata, "loss": float(metrics.loss)})
                monitor.restart_timer()
        monitor.flush()
        if metrics is None and not stopped:  # all steps were done; only the result is missing
            evaluation = evaluate(state, corpus.validation_batches())
            if evaluation and best is not None:
                best.offer(n, evaluation[0], state.params)
        eval_loss = None if evaluation is None else evaluation[0]
        loss = _last_loss(output_dir, n, found) if metrics is None else float(metrics.loss)
        final = {} if stopped else {"loss": None if metrics is None else loss, "eval_loss": eval_loss}
        with goodput.measure("checkpoint"):
            check_finite(n, state.params, output_dir, **final)
            if metrics is not None:
                checkpoints.save(n, state, {**job.resume_metadata, "loss": loss})
            checkpoints.wait()
        result = Result(n, job.steps, stopped, loss, eval_loss, int(state.guard.total_skips), None, first)
        if stopped:
            _log_goodput(goodput)
            return result
        result = result._replace(model=output_dir / job.result)
        with goodput.measure("checkpoint"):
            replace_result(output_dir / job.result, job, state.params)
        _log_goodput(goodput)
        if jax.process_index() == 0:
            record = {"step": n, "loss": loss if math.isfinite(loss) else None, "eval_loss": eval_loss}
            record |= {
                "time": goodput.fractions(),
                "total_skips": result.total_skips,
                "sha256": _sha256(output_dir / job.result),
            }
            write_json(output_dir / CONFIG, now | {"result": record})
    return result


def _check(config: RunConfig) -> Mesh | None:
    """Validate the config and the environment; return the mesh, None for one device."""
    check_environment()
    model, mesh = config.model_config(), make_mesh(config.mesh)
    shardings(model, mesh)  # raises for axes that do not divide
    batch_size, multiple = config.data.batch_size, _batch_multiple(config, mesh)
    if batch_size is not None and batch_size % multiple:
        micro_batches = config.step.gradient_accumulation_steps
        why = f"{multiple // micro_batches} data-parallel devices × {micro_batches} gradient-accumulation steps"
        raise DSMoEError(f"data.batch_size must be a multiple of {multiple} ({why}), got {batch_size}")
    check_model(config, model)
    if config.init_from is not None and config.model not in ("", RunConfig.model):
        requested = dataclasses.replace(config, init_from=None).model_config()
        if changes := [change.name for change in differences(identity(config, requested), identity(config, model))]:
            text = "model %s has no effect: init_from %s has its own config (different %s)"
            _log.warning(text, config.model, config.init_from, ", ".join(changes))
    return None if mesh.size == 1 else mesh


def _batch_multiple(config: RunConfig, mesh: Mesh | None) -> int:
    """Return what the batch size must be a multiple of: data-parallel devices × micro-batches."""
    data_parallel = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    return data_parallel * config.step.gradient_accumulation_steps


def _initial_state(
    config: RunConfig,
    job: Job,
    optimizer: Any,
    mesh: Mesh | None,
    frozen: Mapping[str, Any],
    checkpoints: Checkpoints,
    found: tuple[int, Mapping[str, Any]] | None,
) -> TrainState:
    """Restore the state from the checkpoint found, or initialize it."""
    places = state_shardings(job.model, optimizer, config.step, mesh, job.trainable)

    def init(params: dict[str, Any]) -> TrainState:
        return init_state(job.model, params, optimizer, config.step)

    if found is None:
        return jax.jit(init, out_shardings=places, donate_argnums=0)(job.init_params(mesh, frozen))
    params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in job.trainable.specs.items()}
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init, params),
        places,
    )
    return checkpoints.restore(found[0], like)


# --- the result ---


def _completed(step: int, job: Job, output_dir: Path, record: Mapping[str, Any] | None) -> Result | None:
    """Return the result of a complete run: all steps done and the result intact."""
    path, done = output_dir / job.result, False
    with collective_errors():
        if record is not None and step >= job.steps and record.get("step") == step:
            done = jax.process_index() > 0 or _sha256(path) == record["sha256"]
    if jax.process_count() > 1:
        done = bool(multihost_utils.process_allgather(np.array(done)).all())
    if not done or record is None:
        return None
    if step > job.steps:
        _log.warning("Already complete at step %d: --steps %d is less; pass more to continue", step, job.steps)
    loss = float("nan") if record["loss"] is None else record["loss"]
    return Result(step, job.steps, False, loss, record["eval_loss"], record["total_skips"], path, step)


def _sha256(result: Path) -> str | None:
    """Return the SHA-256 of a result's files; None if it is missing or damaged."""
    if is_native(result):
        with contextlib.suppress(ValueError):
            manifest = read_manifest(result, verify=False)
            return None if any(find_damage(result, manifest)) else manifest.sha256
        return None
    files = sorted(path for path in result.rglob("*") if path.is_file())
    return hash_json({path.name: hash_file(path) for path in files}) if files else None


def _last_loss(output_dir: Path, step: int, found: tuple[int, Mapping[str, Any]] | None) -> float:
    """Return the loss of the last step; NaN if it was not recorded."""
    if found is not None and "loss" in found[1]:
        return float(found[1]["loss"])
    with contextlib.suppress(OSError, ValueError):
        for record in reversed(read_records(output_dir)):
            if record["step"] == step and record.get("loss") is not None:
                return record["loss"]
    return float("nan")


def _warn_of_leftovers(job: Job, output_dir: Path) -> None:
    """Warn about results of an earlier run that has no checkpoints."""
    for name in (MODEL, ADAPTER, BEST):
        if (output_dir / name).exists():
            replaced = name == job.result or (name == BEST and job.keep_best)
            action = "will be replaced" if replaced else "is kept"
            _log.warning("%s of an earlier run %s", output_dir / name, action)


def _check_same_checkpoints(checkpoints: Checkpoints) -> None:
    """Refuse processes that see different checkpoints: they would deadlock."""
    if jax.process_count() > 1:
        newest = np.array(max(checkpoints.steps(), default=-1))
        seen = multihost_utils.process_allgather(newest).ravel()
        if (seen != seen[0]).any():
            raise DSMoEError(f"{checkpoints.folder} differs between processes; the file system must be shared")


# --- the loop ---


def _earlier_records(output_dir: Path, first: int) -> list[dict[str, Any]]:
    """Return the records of earlier processes of a resumed run, in process 0."""
    if not first or jax.process_index():
        return []
    with contextlib.suppress(OSError, ValueError):
        return read_records(output_dir, superseded=True)
    return []


def _log_goodput(goodput: Goodput) -> None:
    if jax.process_index() == 0:
        _log.info("Time: %s", goodput)


def _recorder(
    config: RunConfig, job: Job, output_dir: Path, first: int, goodput: Goodput
) -> Recorder | nullcontext[None]:
    """Return the recorder of process 0; the others record nothing."""
    if jax.process_index():
        return nullcontext()
    return Recorder(
        output_dir,
        config=job.model,
        tokens_per_step=job.corpus.stream.batch_size * job.corpus.stream.sequence_length,
        sequence_length=job.corpus.stream.sequence_length,
        steps=job.steps,
        trackers=config.trackers,
        log_interval=config.log_interval,
        resumed_from=first,
        name=output_dir.name,
        goodput=goodput,
        epochs=job.corpus.stream.epochs,
    )


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Yield a list of the SIGTERM and SIGINT received; a repeated one kills."""
    seen: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):  # raised outside the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _should_stop(stop: list[int], step: int, every: int) -> bool:
    """Return whether to stop; all processes agree, every few steps."""
    if jax.process_count() == 1:
        return bool(stop)
    return step % every == 0 and bool(multihost_utils.process_allgather(np.array(bool(stop))).any())


def _enable_compilation_cache(folder: Path) -> None:
    """Enable the persistent compilation cache, for restarts."""
    compilation_cache.reset_cache()  # of an earlier run in this process
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
