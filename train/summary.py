"""The table at the start of a run: `log_summary`."""

import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dsmoe_jax.info import count_parameters
from dsmoe_jax.kernels import attention
from dsmoe_jax.kernels.expert_ffn import choose_legs
from dsmoe_jax.layers.token_dispatcher import choose_strategy
from dsmoe_jax.progress import log_level, plural
from dsmoe_jax.sharding import BATCH_AXES, EXPERT
from dsmoe_jax.xla_options import HUGE_PAGES, TUNABLES

from .config import RunConfig
from .data import Stream
from .finetune import FinetuneConfig
from .job import Job
from .step import TrainState

_log = logging.getLogger(__name__)


def log_summary(config: RunConfig, job: Job, mesh: Mesh | None, state: TrainState, frozen: Mapping[str, Any]) -> None:
    """Log what a run trains, on what and with what: a table on a terminal, else a line per row."""
    if not _log.isEnabledFor(logging.INFO):
        return
    rows = summary(config, job, mesh, state, frozen)
    if not sys.stderr.isatty():
        for name, text in rows.items():
            _log.info("%s: %s", name, text)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    table.columns[0].style = "bold"
    for row in rows.items():
        table.add_row(*row)
    Console(stderr=True, markup=False, highlight=False).print(table)  # paths may have brackets


def summary(
    config: RunConfig, job: Job, mesh: Mesh | None, state: TrainState, frozen: Mapping[str, Any]
) -> dict[str, str]:
    """Return the rows of the table."""
    counts, stream = count_parameters(job.model), job.corpus.stream
    trainable = sum(math.prod(leaf.shape) for leaf in state.params.values())
    tokens, step = stream.batch_size * stream.sequence_length, int(state.step)
    micro_batches = config.step.gradient_accumulation_steps
    validation = f"{job.corpus.validation_tokens:,} tokens" if job.corpus.validation_tokens else "none"
    data = plural(stream.documents, "example" if isinstance(config, FinetuneConfig) else "document")
    rows = {
        "Model": f"{config.init_from or config.model}, {counts.total:,} parameters, {counts.activated:,} activated",
        "Trainable": f"{trainable:,} parameters ({trainable / counts.total:.2%})" if frozen else "",
        "Devices": _devices(mesh),
        "Precision": _precision(config),
        "Batch": f"{stream.batch_size:,} sequences × {stream.sequence_length:,} tokens = {tokens:,} tokens per step"
        + (f", in {micro_batches} micro-batches" if micro_batches > 1 else ""),
        "Steps": f"{job.steps:,}, {job.steps * tokens:,} tokens" + (f"; resuming from step {step:,}" if step else ""),
        "Data": f"{data}, {stream.tokens:,} tokens; validation: {validation}",
        "Mixture": _mixture(stream, job.steps),
        "Optimizer": _optimizer(config, job.steps),
        "Kernels": _kernels(config, job, mesh, tokens // micro_batches),
        "Output": f"{config.output_dir} ({', '.join(config.trackers)})",
    }
    return {name: text for name, text in rows.items() if text}


def _mixture(stream: Stream, steps: int) -> str:
    """Name the share of each of several sources, and how often the run reads it."""
    if len(stream.names) == 1:
        return ""
    parts = zip(stream.names, stream.shares, stream.epochs(steps).values(), strict=True)
    return ", ".join(f"{name} {share:.1%} ({epochs:.3g} epochs)" for name, share, epochs in parts)


def _optimizer(config: RunConfig, steps: int) -> str:
    options = config.optimizer
    warmup = plural(min(options.warmup_steps, steps), "warmup step")
    return f"learning rate {options.learning_rate:g}, {options.schedule} schedule, {warmup}"


def _devices(mesh: Mesh | None) -> str:
    devices = jax.devices() if mesh is None else mesh.devices.flat
    kind = f"{1 if mesh is None else mesh.size} × {devices[0].device_kind}"
    axes = "" if mesh is None else f", mesh {', '.join(f'{name}={size}' for name, size in mesh.shape.items())}"
    pages = f"{HUGE_PAGES}=1" in os.environ.get(TUNABLES, "") and jax.default_backend() == "cpu"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return kind + axes + processes + (", huge pages (DSMOE_HUGE_PAGES=0: none)" if pages else "")


def _precision(config: RunConfig) -> str:
    quantized = getattr(config, "quantize", None)
    frozen = f", base weights {quantized}" if quantized else ""
    remat = "" if config.step.remat == "none" else f", remat {config.step.remat}"
    trained = f"trained weights float32{frozen}, moments {config.optimizer.moments}"
    return f"compute {config.step.compute_dtype}, {trained}{remat}"


def _kernels(config: RunConfig, job: Job, mesh: Mesh | None, tokens: int) -> str:
    """Name the backends that a micro-batch of `tokens` takes."""
    kernels = f"attention {attention.choose_backend(jax.default_backend(), config.step.compute_dtype)}"
    if not (experts := job.model.n_routed_experts):
        return kernels
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    ways = 1 if mesh is None else mesh.shape[EXPERT]
    rows = tokens // shards * (job.model.num_experts_per_tok or 1)
    with log_level("dsmoe_jax", logging.WARNING):  # it logs its choice
        legs = choose_legs(
            jax.default_backend(), config.step.compute_dtype, rows, experts // ways, config.dispatch.backend
        )
    backend = legs.fwd if len(set(legs)) == 1 else ",".join(legs)
    dispatch = f", dispatch {choose_strategy(config.dispatch.strategy, ways)}" if ways > 1 else ""
    return f"experts {backend}{dispatch}, {kernels}"
