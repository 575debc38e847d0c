"""What a run trains: all in which pretraining and fine-tuning differ. Start at `Job`; `pretraining` makes one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint import load, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generation_config import temporary_file
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.tokenizer import tokenizer_files

from .config import RunConfig
from .corpus import Corpus, prepare
from .step import Trained

MODEL = "model"  # below the run's folder


class Job(NamedTuple):
    """What a run is given, once its data are there."""

    model: ModelConfig
    corpus: Corpus
    steps: int
    trained: Trained
    frozen: Callable[[Mesh | None], Mapping[str, Operand]]  # the parameters that stay as they are stored
    fresh: Callable[[Mesh | None, Mapping[str, Operand]], Mapping[str, Array]]  # what is trained, before the first step
    result: str  # the name of what comes out, below the run's folder
    save: Callable[[Path, Mapping[str, Array]], None]  # writes it; by all processes together
    facts: Mapping[str, Any]  # what a checkpoint must have in common with the run that goes on from it, as JSON
    keep_best: bool = False  # whether what comes out is also kept from where it evaluated best


def pretraining(config: RunConfig, out: Path) -> Job:
    """All parameters of a model, fresh or those of `init_from`, on text."""
    model = config.model_config()
    corpus = prepare(config, model, out)

    def fresh(mesh: Mesh | None, frozen: Mapping[str, Operand]) -> Mapping[str, Array]:
        if config.init_from is not None:
            return split(load(config.init_from, dtype="float32", mesh=mesh))[1]
        return split(DeepSeekMoE.init(model, seed=config.seed, mesh=mesh))[1]

    return Job(
        model=model,
        corpus=corpus,
        steps=config.steps,
        trained=Trained.whole(model),
        frozen=lambda mesh: {},
        fresh=fresh,
        result=MODEL,
        save=model_writer(model, corpus),
        facts={"stream": corpus.identity},
    )


def model_writer(
    model: ModelConfig, corpus: Corpus, generation: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Path, Mapping[str, Array]], None]:
    """Writes the parameters as a native checkpoint, fp32, tokenizer and generation config (if any) beside it."""
    files = tokenizer_files(corpus.tokenizer) if corpus.tokenizer is not None else ()

    def write(path: Path, params: Mapping[str, Array]) -> None:
        with temporary_file(generation) as file:
            save(assemble(model.stored_as("float32"), dict(params)), path, beside=(*files, *file))

    return write
