"""What a run trains: all in which pretraining and fine-tuning differ. Start at `Job`; `pretraining` makes one."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from jax.sharding import Mesh

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.manifest import read_manifest
from dsmoe_jax.checkpoint.native import collective_errors, load, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.text.generation_config import temporary_generation_config
from dsmoe_jax.text.special_ids import (
    SPECIAL_IDS,
    SpecialTokenIds,
    check_special_ids,
    drop_ids_outside_vocab,
    with_tokenizer_ids,
)
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .config import RunConfig
from .corpus import Corpus, prepare
from .inputs import differences
from .resume import identity
from .step import Trainable

MODEL: Final = "model"  # below the run's folder
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """What a run is given, once its data are there."""

    model: ModelConfig
    corpus: Corpus
    steps: int
    trained: Trainable
    frozen: Callable[[Mesh | None], Mapping[str, Operand]]  # the parameters that stay as they are stored
    fresh: Callable[[Mesh | None, Mapping[str, Operand]], Mapping[str, Array]]  # what is trained, before the first step
    result: str  # the name of what comes out, below the run's folder
    save: Callable[[Path, Mapping[str, Array]], None]  # writes it; by all processes together
    facts: Mapping[str, Any]  # what a checkpoint must have in common with the run that goes on from it, as JSON
    keep_best: bool = False  # whether what comes out is also kept from where it evaluated best


def pretraining(config: RunConfig, out: Path, *, resuming: bool = False) -> Job:
    """All parameters of a model, fresh or those of `init_from`, on text."""
    model, base = config.model_config(), None
    with collective_errors():
        if config.init_from is not None:
            base = read_manifest(Path(config.init_from)).identity
    corpus = prepare(config, model, out, resuming=resuming)
    model = with_token_ids(model, corpus)

    def fresh(mesh: Mesh | None, frozen: Mapping[str, Operand]) -> Mapping[str, Array]:
        if config.init_from is not None:
            return split(load(config.init_from, dtype="float32", mesh=mesh))[1]
        return split(DeepSeekMoE.init(model, seed=config.seed, mesh=mesh))[1]

    return Job(
        model=model,
        corpus=corpus,
        steps=config.steps,
        trained=Trainable.whole(model),
        frozen=lambda mesh: {},
        fresh=fresh,
        result=MODEL,
        save=model_writer(model, corpus),
        facts=make_facts(config, model, corpus, init_from=base),
    )


def make_facts(config: RunConfig, model: ModelConfig, corpus: Corpus, **others: Any) -> dict[str, Any]:
    """The facts of a run: its settings (with `others`), its data, and what those were made from."""
    settings = identity(config, model, **others)
    return {"config": settings, "stream": corpus.identity, "inputs": dict(corpus.inputs)}


def with_token_ids(model: ModelConfig, corpus: Corpus) -> ModelConfig:
    """The config with the special token ids of the run's tokenizer, and none outside the vocabulary.

    Raises `ValueError` as `check_special_ids` does, and logs what it returns.
    """
    tokenizer = None if corpus.tokenizer is None else Tokenizer.from_pretrained(corpus.tokenizer)
    # Token shards alone say where a document ends.
    known = tokenizer or SpecialTokenIds(None, corpus.eos_token_id)
    own, new = ({name: getattr(one, name) for name in SPECIAL_IDS} for one in (model, with_tokenizer_ids(model, known)))
    ids = drop_ids_outside_vocab(new, model.vocab_size)
    for change in differences(own, ids):
        _log.info("%s, as in the tokenizer", change)
    model = dataclasses.replace(model, **ids)
    for line in check_special_ids(model, tokenizer):
        _log.warning("%s", line)
    return model


def model_writer(
    model: ModelConfig, corpus: Corpus, generation: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Path, Mapping[str, Array]], None]:
    """Writes the parameters as a native checkpoint, fp32, tokenizer and generation config (if any) beside it."""
    files = tokenizer_files(corpus.tokenizer) if corpus.tokenizer is not None else ()

    def write(path: Path, params: Mapping[str, Array]) -> None:
        with temporary_generation_config(generation) as file:
            save(assemble(model.with_dtype("float32"), dict(params)), path, extra_files=(*files, *file))

    return write
