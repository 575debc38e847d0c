"""What differs between pretraining and fine-tuning. Start at `Job`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from jax.sharding import Mesh

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.native import collective_errors, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.loading import identity as base_identity
from dsmoe_jax.loading import load_params
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.storage.manifest import HashCache
from dsmoe_jax.text.generation_config import temporary_generation_config
from dsmoe_jax.text.special_ids import SPECIAL_IDS, check_special_ids, drop_ids_outside_vocab, with_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .config import RunConfig
from .corpus import Corpus, prepare
from .inputs import HASHES, differences
from .resume import identity
from .step import Trainable

MODEL: Final = "model"  # in the output directory
_log = logging.getLogger(__name__)


Check = Callable[[Mapping[str, Any]], None]  # raises for settings that differ from those of a checkpoint


class Job(NamedTuple):
    """A training run once its data is ready."""

    model: ModelConfig
    corpus: Corpus
    steps: int  # in total, earlier starts included
    trainable: Trainable
    load_frozen: Callable[[Mesh | None], Mapping[str, Operand]]  # onto a mesh, in their storage dtype
    init_params: Callable[[Mesh | None, Mapping[str, Operand]], Mapping[str, Array]]  # fp32, from the frozen ones
    result: str  # name in the output directory
    save: Callable[[Path, Mapping[str, Array]], None]  # writes the result; collective
    resume_metadata: Mapping[str, Any]  # JSON that must match to resume from a checkpoint
    keep_best: bool = False  # also save the result with the lowest validation loss


def pretraining(
    config: RunConfig, output_dir: Path, *, resuming: bool = False, check: Check = lambda identity: None
) -> Job:
    """Set up pretraining; `resuming` refuses changed data, `check` other settings before the texts are tokenized."""
    model, base, init_from = config.model_config(), None, None
    with collective_errors():
        if (base := config.base_folder()) is not None:
            init_from = base_identity(base, HashCache(output_dir / HASHES))
    check(identity(config, model, init_from=init_from))
    corpus = prepare(config, model, output_dir, resuming=resuming)
    if corpus.tokenizer is None:
        _log.warning("No tokenizer: the model is saved without one; pass --data.tokenizer FOLDER")
    tokenizer = None if corpus.tokenizer is None else Tokenizer.from_pretrained(corpus.tokenizer)
    model = with_token_ids(model, tokenizer, corpus.eos_token_id)

    def init_params(mesh: Mesh | None, frozen: Mapping[str, Operand]) -> Mapping[str, Array]:
        if base is not None:
            return load_params(base, dtype="float32", mesh=mesh)[1]
        return split(DeepSeekMoE.init(model, seed=config.seed, mesh=mesh))[1]

    return Job(
        model=model,
        corpus=corpus,
        steps=config.steps,
        trainable=Trainable.all_params(model),
        load_frozen=lambda mesh: {},
        init_params=init_params,
        result=MODEL,
        save=model_writer(model, corpus),
        resume_metadata=resume_metadata(config, model, corpus, init_from=init_from),
    )


def resume_metadata(config: RunConfig, model: ModelConfig, corpus: Corpus, **others: Any) -> dict[str, Any]:
    """Return settings (including `others`), data stream and input hashes."""
    stream, inputs = corpus.stream.identity, dict(corpus.inputs)
    return {"config": identity(config, model, **others), "stream": stream, "inputs": inputs}


def with_token_ids(model: ModelConfig, tokenizer: Tokenizer | None, eos_token_id: int | None = None) -> ModelConfig:
    """Return the config with the special token ids of the run's tokenizer, None for ids outside the vocabulary.

    Without a tokenizer, `eos_token_id` is that of the token shards.
    """
    bos, eos = (tokenizer.bos_token_id, tokenizer.eos_token_id) if tokenizer else (None, eos_token_id)
    updated = with_special_ids(model, bos, eos)
    old, new = ({name: getattr(one, name) for name in SPECIAL_IDS} for one in (model, updated))
    ids = drop_ids_outside_vocab(new, model.vocab_size)
    for change in differences(old, ids):
        _log.info("Using the tokenizer's %s", change)
    model = dataclasses.replace(model, **ids)
    for line in check_special_ids(model, tokenizer):
        _log.warning("%s", line)
    return model


def model_writer(
    model: ModelConfig, corpus: Corpus, generation: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Path, Mapping[str, Array]], None]:
    """Return a function that saves a native checkpoint with tokenizer, in fp32."""
    files = tokenizer_files(corpus.tokenizer) if corpus.tokenizer is not None else ()

    def write(path: Path, params: Mapping[str, Array]) -> None:
        with temporary_generation_config(generation) as file:
            save(assemble(model.with_dtype("float32"), dict(params)), path, extra_files=(*files, *file))

    return write
