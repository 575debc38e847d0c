"""A training run, read from top to bottom: `run`."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe_jax.checkpoint import load, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, split
from dsmoe_jax.new_folder import write_json
from dsmoe_jax.sharding import BATCH_AXES, make_mesh
from dsmoe_jax.tokenizer import tokenizer_files

from .batch import Batch
from .checkpoints import Checkpoints
from .config import RunConfig
from .corpus import Corpus, prepare
from .metrics import Recorder
from .optimizer import make_optimizer
from .processes import start
from .step import Metrics, TrainState, evaluate_step, init_state, make_step, state_shardings

CHECKPOINTS: Final = "checkpoints"  # below the run's folder
MODEL: Final = "model"
CONFIG: Final = "run.json"
_CACHE: Final = "compiled"
_log = logging.getLogger(__name__)


class Result(NamedTuple):
    """How a run ended."""

    steps: int  # batches read in all
    stopped: bool  # by a signal, before the last step
    loss: float  # of the last step
    evaluation: float | None  # mean cross-entropy on the held-out text, in nats
    skipped: int  # updates that were not made
    model: Path | None  # the trained model, a native checkpoint; None if stopped


def run(config: RunConfig) -> Result:
    """Train, from the newest intact checkpoint in the run's folder if there is one.

    The same function on one device and on all processes of a cluster. SIGTERM and SIGINT end it after the step under
    way, with a checkpoint. Raises `ValueError` for what the config gets wrong, and when too many updates in a row were
    skipped.
    """
    start(config.processes)
    out = Path(config.out)
    model_config = config.model_config()
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    _check_divides(config, mesh)
    out.mkdir(parents=True, exist_ok=True)
    _compile_once(out / _CACHE)
    corpus = prepare(config, model_config, out)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps)
    places = state_shardings(model_config, optimizer, config.step, mesh)
    facts = {"stream": corpus.identity}

    with ExitStack() as stack:
        stack.enter_context(nullcontext() if mesh is None else jax.set_mesh(mesh))
        checkpoints = Checkpoints(
            out / CHECKPOINTS, keep_last=config.checkpoints.keep_last, keep_every=config.checkpoints.keep_every
        )
        stack.callback(checkpoints.close)
        graph, state = _begin(config, model_config, optimizer, places, mesh, checkpoints, facts)
        first = int(state.step)
        if jax.process_index() == 0:
            write_json(out / CONFIG, config.to_dict() | {"model_config": model_config.to_dict()})
        step = make_step(
            model_config,
            graph,
            optimizer,
            schedule,
            config.step,
            clip_norm=config.optimizer.clip_norm,
            mesh=mesh,
            seed=config.seed,
        )
        evaluate = evaluate_step(model_config, graph, config.step)
        recorder = stack.enter_context(_recorder(config, model_config, out, first))
        clock = _Clock(recorder, config)
        stop = stack.enter_context(_stop_signal())
        batches = corpus.batches(first)
        stack.callback(getattr(batches, "close", lambda: None))

        metrics, evaluation, n, stopped = None, None, first, False
        while n < config.steps and not (stopped := _agreed(stop, n, config.log_every)):
            waited = -time.perf_counter()
            batch = _place(next(batches), mesh)
            waited += time.perf_counter()
            state, metrics = step(state, batch)
            n += 1
            clock.tick(n, metrics, waited)
            saves = n % config.checkpoints.every == 0
            evaluates = n % config.evaluate_every == 0 or n == config.steps
            if saves or evaluates:
                clock.flush()
                if saves:
                    checkpoints.save(n, state, facts)
                if evaluates and (evaluation := _evaluate(evaluate, state, corpus, mesh)) and recorder is not None:
                    recorder.evaluation(n, *evaluation)
                clock.restart()
        clock.flush()
        if n > first:
            checkpoints.save(n, state, facts)
        checkpoints.wait()
        model = None if stopped else _save_model(out, model_config, state, corpus)
        loss = float("nan") if metrics is None else float(metrics.loss)
        skipped = int(state.guard.skipped)
    return Result(n, stopped, loss, None if evaluation is None else evaluation[0], skipped, model)


# --- the beginning and the end ---


def _begin(
    config: RunConfig,
    model_config: ModelConfig,
    optimizer: Any,
    places: TrainState,
    mesh: Mesh | None,
    checkpoints: Checkpoints,
    facts: dict[str, Any],
) -> tuple[Any, TrainState]:
    """The model's graph and the state to go on from: a checkpoint's, or a fresh one."""
    found = checkpoints.newest() if config.resume == "auto" else None
    if config.resume == "never" and checkpoints.steps():
        raise ValueError(f"{checkpoints.folder} has checkpoints; --resume auto goes on from them")

    def fresh(params: dict[str, Any]) -> TrainState:
        return init_state(model_config, params, optimizer, config.step)

    if found is not None:
        step, known = found
        if known != facts:
            changed = ", ".join(k for k, v in facts["stream"].items() if known.get("stream", {}).get(k) != v)
            raise ValueError(f"{checkpoints.folder}: step {step} was trained on another stream: {changed} changed")
        graph, specs = abstract(model_config)
        params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in specs.items()}
        like = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(fresh, params),
            places,
        )
        state = checkpoints.restore(step, like)
        _log.info("going on after step %d of %d", step, config.steps)
        return graph, state
    if config.init_from is not None:
        model = load(config.init_from, dtype="float32", mesh=mesh)
    else:
        model = DeepSeekMoE.init(model_config, seed=config.seed, mesh=mesh)
    graph, params = split(model)
    return graph, jax.jit(fresh, out_shardings=places, donate_argnums=0)(params)


def _save_model(out: Path, model_config: ModelConfig, state: TrainState, corpus: Corpus) -> Path:
    """The trained weights as a native checkpoint, the tokenizer beside it."""
    path = out / MODEL
    if not path.exists():
        files = tokenizer_files(corpus.tokenizer) if corpus.tokenizer is not None else ()
        save(assemble(model_config.stored_as("float32"), state.params), path, beside=files)
    return path


# --- the way ---


class _Clock:
    """Reads each step's report while the next step is computed, and knows how long each took."""

    def __init__(self, recorder: Recorder | None, config: RunConfig):
        self._recorder, self._config = recorder, config
        self._pending: tuple[int, Metrics, float] | None = None
        self._since = time.perf_counter()

    def tick(self, step: int, metrics: Metrics, waited: float) -> None:
        """Step number `step` was asked for, its batch after `waited` seconds."""
        self.flush()
        self._pending = (step, metrics, waited)

    def restart(self) -> None:
        """What was done since the last step is not of the next."""
        self._since = time.perf_counter()

    def flush(self) -> None:
        """Read the report that is out; `ValueError` when too many updates in a row were skipped."""
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


def _evaluate(evaluate: Any, state: TrainState, corpus: Corpus, mesh: Mesh | None) -> tuple[float, int] | None:
    """The mean cross-entropy of the held-out text, and over how many tokens; None if nothing is held out."""
    total, count = 0.0, 0
    for batch in corpus.evaluation():
        ce, counted = evaluate(state.params, state.router_bias, _place(batch, mesh))
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
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _check_divides(config: RunConfig, mesh: Mesh | None) -> None:
    ways = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    parts = config.step.accumulation
    if config.data.batch_size % (ways * parts):
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide over {ways} devices x {parts} micro-batches"
        )
