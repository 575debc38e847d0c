"""One run of an experiment in a process of its own: `python -m dsmoe_jax.experiments.worker OUT VARIANT SEED CORES`.

It ends when its standard input closes, so that no run outlives a queue that was killed.
"""

import logging
import math
import os
import signal
import sys
import threading
from pathlib import Path

from dsmoe_jax import __version__
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.variants import model_config
from dsmoe_jax.info import count_parameters
from dsmoe_jax.train.loop import run


def main(out: Path, job: Job) -> int:
    """Train, and write the result; return the exit code."""
    experiment = Experiment.read(out)
    result = run(experiment.run_config(job))
    if result.stopped:
        return 1
    if result.eval_loss is None or not math.isfinite(result.eval_loss):
        raise DSMoEError(f"the validation loss is {result.eval_loss}")
    counts = count_parameters(model_config(job.variant, experiment.scale))
    experiment.write_result(
        job,
        {
            "eval_loss": result.eval_loss,
            "loss": result.loss,
            "steps": result.steps,
            "tokens": result.steps * experiment.scale.tokens_per_step,
            "parameters": counts.total,
            "active_parameters": counts.activated,
            "resumed_from": result.resumed_from,
            "version": __version__,
        },
    )
    return 0


def _stop_with_parent() -> None:
    """Stop as by SIGTERM once standard input ends, with a checkpoint."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    if cores := [int(core) for core in sys.argv[4].split(",") if core]:
        os.sched_setaffinity(0, cores)  # before XLA starts its threads
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        sys.exit(main(Path(sys.argv[1]), Job(sys.argv[2], int(sys.argv[3]))))
    except (DSMoEError, OSError) as error:
        print(f"{sys.argv[2]}-{sys.argv[3]}: {error}", file=sys.stderr)
        sys.exit(2)
