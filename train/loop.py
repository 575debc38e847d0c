"""A training run, read from top to bottom: `run`."""

import dataclasses
import logging
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

from dsmoe_jax.checkpoint import together
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.locks import lock_folder
from dsmoe_jax.model import abstract
from dsmoe_jax.new_folder import write_json
from dsmoe_jax.sharding import BATCH_AXES, make_mesh
from dsmoe_jax.xla_options import quiet_cache_reads

from .batch import Batch
from .best import Best
from .checkpoints import Checkpoints
from .config import RunConfig
from .corpus import Corpus
from .finetune import FinetuneConfig, finetuning
from .job import Job, pretraining
from .metrics import Recorder
from .optimizer import make_optimizer
from .processes import start
from .step import Metrics, TrainState, evaluate_step, init_state, make_step, state_shardings

CHECKPOINTS: Final = "checkpoints"  # below the run's folder
CONFIG: Final = "run.json"
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


@quiet_cache_reads()
def run(config: RunConfig) -> Result:
    """Train, from the newest intact checkpoint in the run's folder if there is one.

    The same function on one device and on all processes of a cluster. SIGTERM and SIGINT end it after the step under
    way, with a checkpoint. Raises `ValueError` for what the config gets wrong, when another run is using the folder,
    and when too many updates in a row were skipped.
    """
    start(config.processes)
    config.model_config()  # what is wrong with it is said before anything is made
    with _locked(Path(config.out)):
        return _run(config)


def _run(config: RunConfig) -> Result:
    out = Path(config.out)
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    _check_divides(config, mesh)
    out.mkdir(parents=True, exist_ok=True)
    _compile_once(out / _CACHE)
    job = finetuning(config, out) if isinstance(config, FinetuneConfig) else pretraining(config, out)
    config = dataclasses.replace(config, steps=job.steps)
    corpus, trained = job.corpus, job.trained
    graph = abstract(job.model)[0]
    optimizer, schedule = make_optimizer(config.optimizer, config.steps)

    with ExitStack() as stack:
        stack.enter_context(nullcontext() if mesh is None else jax.set_mesh(mesh))
        checkpoints = Checkpoints(
            out / CHECKPOINTS, keep_last=config.checkpoints.keep_last, keep_every=config.checkpoints.keep_every
        )
        stack.callback(checkpoints.close)
        frozen = job.frozen(mesh)
        state = _begin(config, job, optimizer, mesh, frozen, checkpoints)
        first = int(state.step)
        if jax.process_index() == 0:
            write_json(out / CONFIG, config.to_dict() | {"model_config": job.model.to_dict()})
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
        recorder = stack.enter_context(_recorder(config, job.model, out, first))
        clock = _Clock(recorder, config)
        best = Best(out, job, first) if job.keep_best else None
        stop = stack.enter_context(_stop_signal())
        batches = corpus.batches(first)
        stack.callback(getattr(batches, "close", lambda: None))

        metrics, evaluation, n, stopped = None, None, first, False
        while n < config.steps and not (stopped := _agreed(stop, n, config.log_every)):
            waited = -time.perf_counter()
            batch = _place(next(batches), mesh)
            waited += time.perf_counter()
            state, metrics = step(state, batch, frozen)
            n += 1
            clock.tick(n, metrics, waited)
            saves = n % config.checkpoints.every == 0
            evaluates = n % config.evaluate_every == 0 or n == config.steps
            if saves or evaluates:
                clock.flush()
                # Before the checkpoint: a run that goes on from it does not come back to this evaluation.
                if evaluates and (evaluation := _evaluate(evaluate, state, frozen, corpus, mesh)):
                    if recorder is not None:
                        recorder.evaluation(n, *evaluation)
                    if best is not None:
                        best.offer(n, evaluation[0], state.params)
                if saves:
                    checkpoints.save(n, state, job.facts)
                clock.restart()
        clock.flush()
        if n > first:
            checkpoints.save(n, state, job.facts)
        checkpoints.wait()
        result = None if stopped else out / job.result
        if result is not None and not result.exists():
            job.save(result, state.params)
        loss = float("nan") if metrics is None else float(metrics.loss)
        skipped = int(state.guard.skipped)
    return Result(n, config.steps, stopped, loss, None if evaluation is None else evaluation[0], skipped, result)


def _begin(
    config: RunConfig,
    job: Job,
    optimizer: Any,
    mesh: Mesh | None,
    frozen: Mapping[str, Any],
    checkpoints: Checkpoints,
) -> TrainState:
    """The state to go on from: a checkpoint's, or a fresh one."""
    found = checkpoints.newest() if config.resume == "auto" else None
    if config.resume == "never" and checkpoints.steps():
        raise ValueError(f"{checkpoints.folder} has checkpoints; --resume auto goes on from them")
    places = state_shardings(job.model, optimizer, config.step, mesh, job.trained)

    def fresh(params: dict[str, Any]) -> TrainState:
        return init_state(job.model, params, optimizer, config.step)

    if found is None:
        return jax.jit(fresh, out_shardings=places, donate_argnums=0)(job.fresh(mesh, frozen))
    step, known = found
    for what, now in job.facts.items():
        if changed := [name for name, value in now.items() if known.get(what, {}).get(name) != value]:
            names = ", ".join(changed)
            raise ValueError(f"{checkpoints.folder}: step {step} was trained on another {what}: {names} changed")
    params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in job.trained.specs.items()}
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(fresh, params),
        places,
    )
    _log.info("going on after step %d of %d", step, config.steps)
    return checkpoints.restore(step, like)


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


def _recorder(config: RunConfig, model_config: ModelConfig, out: Path, first: int) -> Recorder | nullcontext[None]:
    """Of process 0; the others say nothing."""
    if jax.process_index():
        return nullcontext()
    return Recorder(
        out,
        config=model_config,
        tokens_per_step=config.data.batch_size * config.data.sequence_length,
        sequence_length=config.data.sequence_length,
        steps=config.steps,
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


def _check_divides(config: RunConfig, mesh: Mesh | None) -> None:
    ways = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    parts = config.step.accumulation
    if config.data.batch_size % (ways * parts):
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide over {ways} devices x {parts} micro-batches"
        )
