"""Tasks of lm-evaluation-harness during training: `open_tasks`, then `EvalTasks.scores`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.libraries import check_installed, quiet
from dsmoe_jax.evaluate.run import Protocol, load_rows, task_metrics
from dsmoe_jax.evaluate.task_data import data_folder
from dsmoe_jax.evaluate.task_loading import LoadedRow, TaskLoader
from dsmoe_jax.generate import Generator
from dsmoe_jax.model import merge
from dsmoe_jax.progress import silent
from dsmoe_jax.text.tokenizer import Tokenizer

from .config import RunConfig
from .job import Job


class EvalTasks(NamedTuple):
    """Loaded tasks, and the model of a run without its parameters."""

    rows: list[LoadedRow]
    protocol: Protocol
    job: Job
    graph: Any
    tokenizer: Tokenizer
    dtype: Any

    def scores(self, params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, float]:
        """Evaluate the parameters in the compute dtype; collective.

        Args:
            params: The trainable parameters.
            frozen: The other ones.

        Returns:
            Scores by "TASK/METRIC".
        """
        from dsmoe_jax.evaluate.harness import DSMoELM

        merged = self.job.trainable.merge_params(params, frozen, None)
        generator = Generator(merge(self.graph, _cast(merged, self.dtype)), self.tokenizer)
        return task_metrics(DSMoELM(generator, progress=silent), self.rows, self.protocol)


def open_tasks(config: RunConfig, job: Job, graph: Any) -> EvalTasks | None:
    """Load the tasks of a run; collective.

    Args:
        config: The config of the run.
        job: The run.
        graph: The graph of its model.

    Returns:
        The tasks, None if there are none.

    Raises:
        DSMoEError: `lm_eval` is not installed, a task is unknown or has no data, or the run has no tokenizer.
    """
    if not config.eval_tasks:
        return None
    with quiet():
        with collective_errors():
            check_installed()
            if job.corpus.tokenizer is None:
                raise DSMoEError("eval_tasks need a tokenizer: pass --data.tokenizer FOLDER")
            loader = TaskLoader(config.eval_tasks_include, data_folder(config.eval_tasks_data))
            suite = loader.suite(",".join(config.eval_tasks))
        protocol = Protocol(limit=config.eval_tasks_limit)
        rows = load_rows(loader, suite, protocol)
    tokenizer = Tokenizer.from_pretrained(job.corpus.tokenizer)
    return EvalTasks(rows, protocol, job, graph, tokenizer, jnp.dtype(config.step.compute_dtype))


@jax.jit
def _as_bfloat16(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, params)


def _cast(params: Any, dtype: Any) -> Any:
    return _as_bfloat16(params) if dtype == jnp.bfloat16 else params
