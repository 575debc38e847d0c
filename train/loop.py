"""A training run, read from top to bottom: `run`."""

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe_jax.array_files import hash_file
from dsmoe_jax.checkpoint import together
from dsmoe_jax.locks import lock_folder
from dsmoe_jax.manifest import damage, is_native, own_hash, read_manifest
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.new_folder import recover_folder, replace_folder, write_json
from dsmoe_jax.sharding import BATCH_AXES, make_mesh
from dsmoe_jax.xla_options import quiet_cache_reads

from .batch import Batch
from .best import BEST, Best
from .checkpoints import Checkpoints
from .config import RunConfig
from .corpus import Corpus
from .finetune import ADAPTER, FinetuneConfig, finetuning
from .inputs import differences
from .job import MODEL, Job, pretraining
from .metrics import Recorder, read_records
from .optimizer import make_optimizer
from .processes import start
from .resume import CONFIG, check_resumable, identity, log_changes, read_run
from .step import Metrics, TrainState, evaluate_step, init_state, make_step, state_shardings

CHECKPOINTS: Final = "checkpoints"  # below the run's folder
_CACHE: Final = "compiled"
_NO_LOSS: Final = 1e-7  # nats; below it a softmax in fp32 cannot tell
_log = logging.getLogger(__name__)


class Result(NamedTuple):
    """How a run ended."""

    steps: int  # batches read in all
    of: int  # steps that were asked for
    stopped: bool  # by a signal, before the last step
    loss: float  # of the last step
    evaluation: float | None  # mean cross-entropy on the held-out text, in nats
    skipped: int  # updates that were not made
    model: Path | None  # the trained model, a native checkpoint, or adapter; None if stopped
    resumed_from: int = 0  # step of the checkpoint; equal to `steps` if there was nothing left to train


@quiet_cache_reads()
def run(config: RunConfig) -> Result:
    """Train, from the newest intact checkpoint in the run's folder if there is one.

    The same function on one device and on all processes of a cluster. SIGTERM and SIGINT end it after the step under
    way, with a checkpoint. Raises `ValueError` for what the config gets wrong, when another run is using the folder,
    and when too many updates in a row were skipped.
    """
    start(config.processes)
    out, mesh = Path(config.out), None
    with together():  # what is wrong is said before anything is made
        mesh = _check(config)
    with _locked(out):
        return _run(config, out, mesh)


def _run(config: RunConfig, out: Path, mesh: Mesh | None) -> Result:
    out.mkdir(parents=True, exist_ok=True)
    _compile_once(out / _CACHE)
    with ExitStack() as stack:
        checkpoints = Checkpoints(
            out / CHECKPOINTS, keep_last=config.checkpoints.keep_last, keep_every=config.checkpoints.keep_every
        )
        stack.callback(checkpoints.close)
        _agree_on(checkpoints)
        if config.resume == "never" and checkpoints.steps():
            raise ValueError(f"{checkpoints.folder} has checkpoints; --resume auto goes on from them")
        found = checkpoints.newest()
        if isinstance(config, FinetuneConfig):
            job = finetuning(config, out)
        else:
            job = pretraining(config, out, resuming=found is not None)
        before, now = read_run(out), config.to_dict() | {"steps": job.steps, "model_config": job.model.to_dict()}
        if found is not None:
            check_resumable(checkpoints.folder, *found, job.facts)
            if done := _finished(found[0], job, out, before.get("result")):
                return done
            log_changes(before, now, found[0])
        else:
            _warn_of_leftovers(job, out)
        if (warmup := config.optimizer.warmup_steps) > job.steps:
            _log.warning("optimizer.warmup_steps %d exceeds steps %d: warmup ends with the run", warmup, job.steps)
        stack.enter_context(nullcontext() if mesh is None else jax.set_mesh(mesh))
        corpus, trained = job.corpus, job.trained
        graph = abstract(job.model, config.dispatch)[0]
        optimizer, schedule = make_optimizer(config.optimizer, job.steps)
        frozen = job.frozen(mesh)
        state = _begin(config, job, optimizer, mesh, frozen, checkpoints, found)
        first = int(state.step)
        if jax.process_index() == 0:
            write_json(out / CONFIG, now)
        step = make_step(
            job.model,
            graph,
            optimizer,
            schedule,
            config.step,
            clip_norm=config.optimizer.clip_norm,
            mesh=mesh,
            seed=config.seed,
            trained=trained,
        )
        evaluate = evaluate_step(job.model, graph, config.step, trained)
        recorder = stack.enter_context(_recorder(config, job, out, first))
        clock = _Clock(recorder, config)
        best = Best(out, job, first) if job.keep_best else None
        stop = stack.enter_context(_stop_signal())
        batches = corpus.batches(first)
        stack.callback(getattr(batches, "close", lambda: None))

        metrics, evaluation, n, stopped = None, None, first, False
        while n < job.steps and not (stopped := _agreed(stop, n, config.log_every)):
            waited = -time.perf_counter()
            batch = _place(next(batches), mesh)
            waited += time.perf_counter()
            state, metrics = step(state, batch, frozen)
            n += 1
            clock.tick(n, metrics, waited)
            saves = n % config.checkpoints.every == 0
            evaluates = n % config.evaluate_every == 0 or n == job.steps
            if saves or evaluates:
                clock.flush()
                # Before the checkpoint: a run that goes on from it does not come back to this evaluation.
                if evaluates and (evaluation := _evaluate(evaluate, state, frozen, corpus, mesh)):
                    if recorder is not None:
                        recorder.evaluation(n, *evaluation)
                    if best is not None:
                        best.offer(n, evaluation[0], state.params)
                if saves:
                    checkpoints.save(n, state, {**job.facts, "loss": float(metrics.loss)})
                clock.restart()
        clock.flush()
        if metrics is not None:
            loss = float(metrics.loss)
            checkpoints.save(n, state, {**job.facts, "loss": loss})
        else:  # every step had been made: only the result is missing
            loss = _last_loss(out, n, found)
            evaluation = None if stopped else _evaluate(evaluate, state, frozen, corpus, mesh)
            if evaluation and best is not None:
                best.offer(n, evaluation[0], state.params)
        checkpoints.wait()
        held_out = None if evaluation is None else evaluation[0]
        result = Result(n, job.steps, stopped, loss, held_out, int(state.guard.skipped), None, first)
        if stopped:
            return result
        result = result._replace(model=out / job.result)
        _write_result(out / job.result, job, state.params)
        if jax.process_index() == 0:
            record = {"step": n, "loss": loss if math.isfinite(loss) else None, "evaluation": held_out}
            record |= {"skipped": result.skipped, "sha256": _sha256(out / job.result)}
            write_json(out / CONFIG, now | {"result": record})
    return result


def _check(config: RunConfig) -> Mesh | None:
    """The mesh, None on one device; `ValueError` for what cannot be, a line for what will have no effect."""
    model, mesh = config.model_config(), make_mesh(config.mesh)
    shardings(model, mesh)  # refuses what does not divide
    ways, parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])), config.step.accumulation
    if config.data.batch_size % (ways * parts):
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide over {ways} devices x {parts} micro-batches"
        )
    length, positions = config.data.sequence_length, model.max_position_embeddings
    if model.rope_scaling is not None:
        positions = int(positions * model.rope_scaling.factor)
    if length > positions:
        _log.warning("data.sequence_length %d exceeds the model's max_position_embeddings %d", length, positions)
    if config.init_from is not None and config.model not in ("", RunConfig.model):
        asked = dataclasses.replace(config, init_from=None).model_config()
        if changes := [change.name for change in differences(identity(config, asked), identity(config, model))]:
            _log.warning(
                "model %s has no effect: that of init_from %s is trained (other %s)",
                config.model,
                config.init_from,
                ", ".join(changes),
            )
    groups, alpha, experts = config.step.device_groups, config.step.device_alpha, model.n_routed_experts
    if experts is not None and experts % groups:
        raise ValueError(f"step.device_groups {groups} does not divide {experts} experts")
    if (groups > 1) != (alpha > 0):
        _log.warning("step.device_groups %d with step.device_alpha %s has no effect: both are needed", groups, alpha)
    return None if mesh.size == 1 else mesh


def _begin(
    config: RunConfig,
    job: Job,
    optimizer: Any,
    mesh: Mesh | None,
    frozen: Mapping[str, Any],
    checkpoints: Checkpoints,
    found: tuple[int, Mapping[str, Any]] | None,
) -> TrainState:
    """The state to go on from: a checkpoint's, or a fresh one."""
    places = state_shardings(job.model, optimizer, config.step, mesh, job.trained)

    def fresh(params: dict[str, Any]) -> TrainState:
        return init_state(job.model, params, optimizer, config.step)

    if found is None:
        return jax.jit(fresh, out_shardings=places, donate_argnums=0)(job.fresh(mesh, frozen))
    params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in job.trained.specs.items()}
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(fresh, params),
        places,
    )
    _log.info("going on after step %d of %d", found[0], job.steps)
    return checkpoints.restore(found[0], like)


# --- the result ---


def _finished(step: int, job: Job, out: Path, record: Mapping[str, Any] | None) -> Result | None:
    """The result of a run that has nothing left to do: all steps made, and what they gave is there, undamaged."""
    path, done = out / job.result, False
    with together():
        if record is not None and step >= job.steps and record.get("step") == step:
            done = jax.process_index() > 0 or _sha256(path) == record["sha256"]
    if jax.process_count() > 1:
        done = bool(multihost_utils.process_allgather(np.array(done)).all())
    if not done or record is None:
        return None
    loss = float("nan") if record["loss"] is None else record["loss"]
    return Result(step, job.steps, False, loss, record["evaluation"], record["skipped"], path, step)


def _write_result(path: Path, job: Job, params: Mapping[str, Any]) -> None:
    """Write what was trained in the place of what an earlier, shorter run left."""
    new = path.with_name(f"{path.name}.new")
    with together():
        if jax.process_index() == 0:
            recover_folder(path, new)
    job.save(new, params)
    with together():
        if jax.process_index() == 0:
            replace_folder(new, path)


def _sha256(result: Path) -> str | None:
    """The SHA-256 of all that is in the folder of a result; None where it is missing or damaged."""
    if is_native(result):
        try:
            manifest = read_manifest(result)
        except ValueError:
            return None
        return None if any(damage(result, manifest, manifest.files)) else manifest.sha256
    files = sorted(path for path in result.rglob("*") if path.is_file())
    return own_hash({path.name: hash_file(path) for path in files}) if files else None


def _last_loss(out: Path, step: int, found: tuple[int, Mapping[str, Any]] | None) -> float:
    """The loss of the last step, from its checkpoint or the records; NaN where neither has it."""
    if found is not None and "loss" in found[1]:
        return float(found[1]["loss"])
    with contextlib.suppress(OSError, ValueError):
        for record in reversed(read_records(out)):
            if record["step"] == step and record.get("loss") is not None:
                return record["loss"]
    return float("nan")


def _warn_of_leftovers(job: Job, out: Path) -> None:
    """Name the results of an earlier run, without checkpoints to go on from."""
    for name in (MODEL, ADAPTER, BEST):
        if (out / name).exists():
            ours = name == job.result or (name == BEST and job.keep_best)
            _log.warning(
                "%s: left by an earlier run; %s", out / name, "it is replaced" if ours else "it stays as it is"
            )


def _agree_on(checkpoints: Checkpoints) -> None:
    """`ValueError` unless all processes see the same checkpoints; otherwise they would wait for one another."""
    if jax.process_count() > 1:
        newest = np.array(max(checkpoints.steps(), default=-1))
        seen = multihost_utils.process_allgather(newest).ravel()
        if (seen != seen[0]).any():
            raise ValueError(
                f"{checkpoints.folder}: not all processes see the same checkpoints; is it a shared folder?"
            )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of the run's folder; where another run holds it, all processes end."""
    with ExitStack() as stack:
        with together():
            if jax.process_index() == 0:
                stack.enter_context(lock_folder(out))
        yield


# --- the way ---


class _Clock:
    """Reads each step's report while the next step is computed, and knows how long each took."""

    def __init__(self, recorder: Recorder | None, config: RunConfig):
        self._recorder, self._config = recorder, config
        self._pending: tuple[int, Metrics, float] | None = None
        self._nothing_left = 0  # steps in a row whose loss was 0
        self._since = time.perf_counter()

    def tick(self, step: int, metrics: Metrics, waited: float) -> None:
        """Step number `step` was asked for, its batch after `waited` seconds."""
        self.flush()
        self._pending = (step, metrics, waited)

    def restart(self) -> None:
        """What was done since the last step is not of the next."""
        self._since = time.perf_counter()

    def flush(self) -> None:
        """Read the report that is out; `ValueError` when too many in a row were skipped, or had no loss left."""
        if self._pending is None:
            return
        (step, unread, waited), self._pending = self._pending, None
        metrics = Metrics(*jax.device_get(unread))
        now = time.perf_counter()
        if self._recorder is not None:
            self._recorder.record(step, metrics, seconds=now - self._since, data_wait=waited)
        self._since = now
        if (in_a_row := int(metrics.skipped_in_a_row)) > self._config.most_skipped:
            raise ValueError(
                f"{in_a_row} updates in a row were skipped: loss {float(metrics.loss):.4g}, gradient norm "
                f"{float(metrics.gradient_norm):.4g} at step {step}; the checkpoints in {self._config.out} are good"
            )
        self._nothing_left = self._nothing_left + 1 if metrics.cross_entropy < _NO_LOSS else 0
        if self._nothing_left > self._config.most_skipped:
            raise ValueError(
                f"the loss has been 0 for {self._nothing_left} steps at step {step}: the data give the answer away, or "
                f"are learnt by heart; what was kept in {self._config.out} is from before"
            )


def _recorder(config: RunConfig, job: Job, out: Path, first: int) -> Recorder | nullcontext[None]:
    """Of process 0; the others say nothing."""
    if jax.process_index():
        return nullcontext()
    return Recorder(
        out,
        config=job.model,
        tokens_per_step=config.data.batch_size * config.data.sequence_length,
        sequence_length=config.data.sequence_length,
        steps=job.steps,
        sinks=config.sinks,
        log_every=config.log_every,
        resumed_from=first,
        name=out.name,
    )


def _evaluate(
    evaluate: Any, state: TrainState, frozen: Mapping[str, Any], corpus: Corpus, mesh: Mesh | None
) -> tuple[float, int] | None:
    """The mean cross-entropy of the held-out text, and over how many tokens; None if nothing is held out."""
    total, count = 0.0, 0
    for batch in corpus.evaluation():
        ce, counted = evaluate(state.params, state.router_bias, _place(batch, mesh), frozen)
        total, count = total + float(ce), count + int(counted)
    return (total / count, count) if count else None


def _place(batch: Batch, mesh: Mesh | None) -> Batch:
    """This process's rows of the batch, on its devices."""
    if mesh is None:
        return Batch(*map(jax.device_put, batch))
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return Batch(*(jax.make_array_from_process_local_data(place, rows) for rows in batch))


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT puts itself into; the second one of the same kind acts as ever."""
    seen: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: signals are somebody else's
        pass
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(stop: list[int], step: int, every: int) -> bool:
    """Whether to stop; processes ask one another every few steps, so that all stop after the same one."""
    if jax.process_count() == 1:
        return bool(stop)
    return step % every == 0 and bool(multihost_utils.process_allgather(np.array(bool(stop))).any())


def _compile_once(folder: Path) -> None:
    """Keep what was compiled, so that a restart does not compile again."""
    compilation_cache.reset_cache()  # an earlier run of this process would keep its own
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
