"""The paper's comparison of architectures, from texts to a report: `reproduce`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.ablations import measure, paper_settings, predicted, to_dict
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.queue import places, run_jobs
from dsmoe_jax.experiments.report import write_report
from dsmoe_jax.experiments.texts import read_documents, source_names
from dsmoe_jax.loading import load
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.locks import lock_folder
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.data import (
    TokenShards,
    documents,
    tokenize,
    training_texts,
)
from dsmoe_jax.train.plotting import check_matplotlib

ABLATED: Final = ("deepseek_moe", "gshard_x1.5")  # figure 4
_log = logging.getLogger("dsmoe_jax")


def reproduce(
    out: str | Path,
    *,
    scale: Literal["ci", "laptop", "2b"] | None = None,
    variants: str | Sequence[str] | None = None,
    seeds: int | None = None,
    sources: str | Path | Sequence[str | Path] | None = None,
    steps: int | None = None,
    workers: int | None = None,
    ablation_tokens: int | None = None,
    report_only: bool = False,
) -> Path:
    """Train the variants of the paper on the same texts, ablate the trained models, and write a report.

    A killed experiment resumes from its folder, with its own settings as defaults; variants and seeds may be added.
    Texts are tokenized once.

    Args:
        out: Folder of the experiment.
        scale: Sizes, a key of `variants.SCALES`. Default: laptop.
        variants: Keys of `variants.VARIANTS`; "all" names all. Default: `variants.MAIN`.
        seeds: Runs of each variant; those of equal seed have the same data and are compared in pairs. Default: 3.
        sources: Texts, or one folder of token shards with a validation split. Default: Python's standard library.
        steps: Steps of each run. Default: those of the scale.
        workers: Runs at once. Default: one per GPU or, without GPUs, per core.
        ablation_tokens: Validation tokens of the ablations. Default: 65,536.
        report_only: Write the report of what is complete, and run nothing.

    Returns:
        The report.

    Raises:
        DSMoEError: An argument is invalid, `out` is another experiment or in use, or a run failed.
    """
    if isinstance(variants, str):
        variants = [variants]
    texts = None if sources is None else source_names(sources)
    options = {"variants": variants, "sources": texts, "steps": steps, "ablation_tokens": ablation_tokens}
    experiment = Experiment.create(user_path(out, "out"), scale=scale, seeds=seeds, **options)
    if report_only:
        return write_report(experiment)
    found = places(workers, experiment.scale.mesh is not None)
    check_matplotlib()
    check_sources(experiment)
    with lock_folder(experiment.out):
        experiment.write()
        prepare(experiment)
        _check_validation(experiment)
        experiment = experiment.bind_data()
        failed = run_jobs(experiment, found)
        if failed and len(failed) == len(experiment.jobs):
            raise DSMoEError("; ".join(failed))
        failed += filter(None, (_ablate(experiment, job) for job in experiment.jobs))
        report = write_report(experiment)
    if failed:
        raise DSMoEError(f"{'; '.join(failed)}; {report} is of the others")
    return report


def check_sources(experiment: Experiment) -> None:
    """Check the texts before anything is written.

    Args:
        experiment: Its sources and vocabulary size.

    Raises:
        DSMoEError: A text cannot be read, or token shards have no validation split, or token ids beyond the vocabulary.
    """
    if experiment.given_shards:
        _, validation = TokenShards.open_splits(experiment.data)
        validation.check(vocab_size=experiment.scale.vocab_size)
        _check_validation(experiment)
    elif not experiment.data.exists():
        for source in experiment.sources:
            next(documents(source, exclude=[experiment.out]), None)


def _check_validation(experiment: Experiment) -> None:
    """Raise if no document is held out; what was made of the texts is deleted, so that others can be given."""
    if not len(TokenShards.open(experiment.data, "validation", verify=False)):
        if not experiment.given_shards:
            experiment.discard_data()
        texts = ", ".join(experiment.sources)
        raise DSMoEError(f"{texts}: no document is held out for validation: at least 2 documents are needed")


def prepare(experiment: Experiment) -> None:
    """Train a tokenizer on the texts and tokenize them, once.

    Args:
        experiment: Its sources and vocabulary size.

    Raises:
        DSMoEError: The texts cannot be read.
    """
    if experiment.given_shards or experiment.data.exists():
        return
    tokenizer, sources = experiment.tokenizer, list(experiment.sources)
    split = {"val_fraction": experiment.scale.val_fraction, "exclude": [experiment.out]}
    if not (tokenizer.is_dir() and tokenizer_files(tokenizer)):
        _log.info("Training a tokenizer of %d tokens", experiment.scale.vocab_size)
        train_tokenizer(training_texts(sources, **split), tokenizer, experiment.scale.vocab_size)
    stats = tokenize(sources, tokenizer, experiment.data, **split)
    _log.info("Tokenized %s", stats)


def _ablate(experiment: Experiment, job: Job) -> str | None:
    """Measure the ablations of a trained model, once; return a line if that failed."""
    path = experiment.ablation_file(job)
    if job.variant not in ABLATED or experiment.result(job) is None or experiment.ablations(job) is not None:
        return None
    _log.info("Ablating %s", job)
    try:
        model = load(experiment.run_folder(job) / "model")
        found = read_documents(experiment.data, None, experiment.ablation_tokens, vocab_size=model.config.vocab_size)
        measured = measure(model, found, paper_settings(model.config))
    except DSMoEError as error:
        return f"{job} was not ablated: {error}"
    path.parent.mkdir(exist_ok=True)
    sizes = {"documents": len(found), "tokens": predicted(found)}
    write_json(path, {**sizes, **to_dict(measured, model.config)})
    return None
