"""The paper's comparison of architectures, from texts to a report: `reproduce`."""

import logging
from collections.abc import Iterator, Sequence
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
    is_token_shards,
    is_validation,
    tokenize,
    validation_threshold,
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
        experiment = experiment.bind_data()
        failed = run_jobs(experiment, found)
        for job in experiment.jobs:
            if job.variant in ABLATED and experiment.result(job) is not None:
                _ablate(experiment, job)
        if failed and len(failed) == len(experiment.jobs):
            raise DSMoEError("; ".join(failed))
        report = write_report(experiment)
    if failed:
        raise DSMoEError(f"{'; '.join(failed)}; {report} is of the others")
    return report


def check_sources(experiment: Experiment) -> None:
    """Check the texts before anything is written.

    Args:
        experiment: Its sources and vocabulary size.

    Raises:
        DSMoEError: A text cannot be read, or token shards have no validation split or too many tokens.
    """
    if any(map(is_token_shards, experiment.sources)):
        _, validation = TokenShards.open_splits(experiment.data)
        validation.check(vocab_size=experiment.scale.vocab_size)
        _check_validation(experiment, validation)
    elif not experiment.data.exists():
        for source in experiment.sources:
            next(documents(source, exclude=[experiment.out]), None)


def _check_validation(experiment: Experiment, validation: TokenShards) -> None:
    if not len(validation):
        texts = ", ".join(experiment.sources)
        raise DSMoEError(f"{texts}: no document is held out for validation: at least 2 documents are needed")


def prepare(experiment: Experiment) -> None:
    """Train a tokenizer on the texts and tokenize them, once.

    Args:
        experiment: Its sources and vocabulary size.

    Raises:
        DSMoEError: The texts cannot be read.
    """
    if any(map(is_token_shards, experiment.sources)) or experiment.data.exists():
        return
    tokenizer = experiment.tokenizer
    fraction, vocab_size = experiment.scale.val_fraction, experiment.scale.vocab_size
    if not (tokenizer.is_dir() and tokenizer_files(tokenizer)):
        _log.info("Training a tokenizer of %d tokens", vocab_size)
        threshold = validation_threshold((text.encode() for text in _texts(experiment)), fraction)
        training = (text for text in _texts(experiment) if not is_validation(text.encode(), threshold))
        train_tokenizer(training, tokenizer, vocab_size)
    options = {"val_fraction": fraction, "exclude": [experiment.out]}
    stats = tokenize(list(experiment.sources), tokenizer, experiment.data, **options)
    _log.info("Tokenized %s", stats)
    _check_validation(experiment, TokenShards.open(experiment.data, "validation", verify=False))


def _texts(experiment: Experiment) -> Iterator[str]:
    return (one.text for source in experiment.sources for one in documents(source, exclude=[experiment.out]))


def _ablate(experiment: Experiment, job: Job) -> None:
    """Measure the ablations of a trained model, once."""
    path = experiment.ablation_file(job)
    if experiment.ablations(job) is not None:
        return
    _log.info("Ablating %s", job)
    model = load(experiment.run_folder(job) / "model")
    sizes = {"vocab_size": model.config.vocab_size}
    found = read_documents(experiment.data, None, experiment.ablation_tokens, **sizes)
    measured = measure(model, found, paper_settings(model.config))
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"tokens": predicted(found), **to_dict(measured, model.config)})
