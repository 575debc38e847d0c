"""The paper's comparison of architectures, from texts to a report: `reproduce`."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.ablations import measure, paper_settings, to_dict
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.queue import places, run_jobs
from dsmoe_jax.experiments.report import write_report
from dsmoe_jax.experiments.texts import read_tokens
from dsmoe_jax.experiments.variants import MAIN
from dsmoe_jax.loading import load
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.locks import lock_folder
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.data import (
    PYTHON_STDLIB,
    documents,
    is_token_shards,
    is_validation,
    tokenize,
    validation_threshold,
)

ABLATED: Final = ("deepseek_moe", "gshard_x1.5")  # figure 4
_TOKENIZER: Final = "tokenizer"
_log = logging.getLogger("dsmoe_jax")


def reproduce(
    out: str | Path,
    *,
    scale: Literal["ci", "laptop", "2b"] = "laptop",
    variants: Sequence[str] = MAIN,
    seeds: int = 3,
    sources: Sequence[str] = (PYTHON_STDLIB,),
    steps: int | None = None,
    workers: int | None = None,
    ablation_tokens: int = 65_536,
    report_only: bool = False,
) -> Path:
    """Train the variants of the paper on the same texts, ablate the trained models, and write a report.

    A killed experiment resumes from its folder; variants, seeds and workers may be added to it.

    Args:
        out: Folder of the experiment.
        scale: Sizes, a key of `variants.SCALES`.
        variants: Keys of `variants.VARIANTS`; "all" names all.
        seeds: Runs of each variant; those of equal seed have the same data and are compared in pairs.
        sources: Texts, or one folder of token shards with a validation split.
        steps: Steps of each run. Default: those of the scale.
        workers: Runs at once. Default: one per GPU or, without GPUs, per core.
        ablation_tokens: Validation tokens of the ablations.
        report_only: Write the report of what is complete, and run nothing.

    Returns:
        The report.

    Raises:
        DSMoEError: An argument is invalid, `out` is another experiment or in use, or a run failed.
    """
    if not sources:
        raise DSMoEError("sources must not be empty")
    options = {"variants": variants, "sources": sources, "steps": steps, "ablation_tokens": ablation_tokens}
    experiment = Experiment.create(Path(out), scale=scale, seeds=seeds, **options)
    found = places(workers, experiment.scale.mesh is not None)
    with lock_folder(experiment.out):
        if not report_only:
            experiment.write()
            prepare(experiment)
            run_jobs(experiment, found)
            for job in experiment.jobs:
                if job.variant in ABLATED:
                    _ablate(experiment, job)
        return write_report(experiment)


def prepare(experiment: Experiment) -> None:
    """Train a tokenizer on the texts and tokenize them, once.

    Args:
        experiment: Its sources and vocabulary size.

    Raises:
        DSMoEError: The texts cannot be read.
    """
    if any(map(is_token_shards, experiment.sources)) or experiment.data.exists():
        return
    tokenizer = experiment.out / _TOKENIZER
    fraction, vocab_size = experiment.scale.val_fraction, experiment.scale.vocab_size
    if not (tokenizer.is_dir() and tokenizer_files(tokenizer)):
        _log.info("Training a tokenizer of %d tokens", vocab_size)
        threshold = validation_threshold((text.encode() for text in _texts(experiment)), fraction)
        training = (text for text in _texts(experiment) if not is_validation(text.encode(), threshold))
        train_tokenizer(training, tokenizer, vocab_size)
    stats = tokenize(list(experiment.sources), tokenizer, experiment.data, val_fraction=fraction)
    _log.info("Tokenized %s", stats)


def _texts(experiment: Experiment) -> Iterator[str]:
    return (one.text for one in itertools.chain.from_iterable(map(documents, experiment.sources)))


def _ablate(experiment: Experiment, job: Job) -> None:
    """Measure the ablations of a trained model, once."""
    path = experiment.ablation_file(job)
    if path.exists():
        return
    _log.info("Ablating %s", job)
    model = load(experiment.run_folder(job) / "model")
    sizes = {"vocab_size": model.config.vocab_size}
    tokens = read_tokens(experiment.data, None, experiment.ablation_tokens, **sizes)
    measured = measure(model, tokens, paper_settings(model.config))
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"tokens": len(tokens), **to_dict(measured, model.config)})
