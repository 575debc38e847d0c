"""Fine-tuning: a model on examples, all of it or by low-rank adapters over what may be quantised. See `finetuning`."""

import dataclasses
import functools
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import jax
import tyro
from jax.sharding import Mesh

from dsmoe_jax import lora
from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.manifest import is_native, read_manifest
from dsmoe_jax.checkpoint.native import collective_errors, gather_to_host, load
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft import untie_for_adapter, write_adapter
from dsmoe_jax.convert.peft_matching import make_plan, untied_config, unties_embeddings
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import count_parameters
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import split
from dsmoe_jax.quantize import SCHEMES, load_quantized
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.manifest import hash_json
from dsmoe_jax.storage.paths import expand_user
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.generation_config import (
    eos_token_ids,
    merge_stop_conditions,
    read_generation_config,
    with_default_eos,
)
from dsmoe_jax.text.special_ids import check_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .config import RunConfig
from .corpus import Corpus
from .data import Stream, tokenizer_hash
from .inputs import RECORD, Source, file_hashes
from .job import MODEL, Job, make_facts, model_writer, with_token_ids
from .optimizer import OptimizerConfig
from .sft import ExamplePacking, Examples, endings_of, example_batches, show, template_hash, write_examples
from .step import Trainable

ADAPTER: Final = "adapter"  # below the run's folder
_EXAMPLES: Final = "examples"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """What is read, and what of it is learnt."""

    # Conversations or completions, .jsonl(.gz, .zst) or .parquet, found from their fields.
    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    format: str = "auto"  # or a key of `examples.FORMATS`
    # The tokenizer's own, "chat"; "deepseek-instruct", whose answers end with the text <|EOT|> instead of an EOS token
    # (generation_config.json of the result gets it as a stop string); or a file of Jinja.
    template: str = "chat"
    targets: str = "all"  # turns of the assistant, or the "last" one
    tokenizer: str | None = None  # a folder; default: that of the model
    sequence_length: int = 1024
    too_long: str = "truncate"  # or "drop", or "refuse"
    batch_size: int = 64  # rows of all devices and micro-batches together
    packing: str = "packed"  # whole examples side by side in a row, apart from one another; or "alone"
    val_fraction: float = 0.02  # share of the examples that is kept for evaluation
    split_special_tokens: bool = False  # the strings of special tokens in messages are text, not control tokens
    prefetch: int = 2  # batches

    def __post_init__(self) -> None:
        """`ValueError` for empty paths."""
        object.__setattr__(self, "files", tuple(expand_user(file, "data.files") for file in self.files))
        for name in ("tokenizer", "template"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand_user(value, f"data.{name}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    _LEAST: ClassVar[Mapping[str, int]] = {**RunConfig._LEAST, "steps": 0}

    out: str = "runs/finetune"
    model: str = ""  # that of `init_from`
    steps: int = 0  # 0: as many as `epochs` make
    epochs: float = 3.0
    data: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)  # type: ignore[assignment]
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-5, schedule="cosine", warmup_steps=10, weight_decay=0.0, b2=0.999
        )
    )
    lora: LoraConfig | None = None  # None: the whole model is trained
    quantize: str | None = None  # what is not trained, as a key of `dsmoe_jax.quantize.SCHEMES`

    def __post_init__(self) -> None:
        """`ValueError` for a value that means nothing."""
        super().__post_init__()
        if not self.steps and not self.epochs > 0:
            raise DSMoEError(f"epochs must be more than 0, not {self.epochs}")
        if self.model:
            raise DSMoEError(f"model {self.model!r} cannot be chosen: it is that of the checkpoint")
        if self.quantize is not None and self.quantize not in SCHEMES:
            raise DSMoEError(f"quantize {self.quantize!r} is not one of {', '.join(SCHEMES)}")
        if self.quantize is not None and self.lora is None:
            raise DSMoEError(f"a base in {self.quantize} cannot be trained itself; --lora trains adapters on it")


def finetuning(config: FinetuneConfig, out: Path) -> Job:
    """The whole of a model, or an adapter on it, on examples."""
    base, made_from = Path(config.init_from or ""), ""
    with collective_errors():
        if not is_native(base):
            raise DSMoEError(f"{base}: not a native checkpoint; `dsmoe convert` makes one of a Hugging Face folder")
        made_from = read_manifest(base).identity
    model = config.model_config()
    corpus, steps = examples(config, model, out)
    adapter = None if config.lora is None else dataclasses.asdict(config.lora)
    facts = make_facts(config, model, corpus, init_from=made_from, lora=adapter, quantize=config.quantize)
    if config.lora is None:
        model = with_token_ids(model, corpus)
    own = read_generation_config(base)
    stated = with_default_eos(own, model)
    endings = _endings(config, corpus, eos_token_ids(stated))
    if config.lora is None:
        ids = {name: getattr(model, name) for name in ("bos_token_id", "pad_token_id")} | stated
        known = {name: value for name, value in ids.items() if value is not None}
        generation = merge_stop_conditions(known, endings) if own or endings else {}
        return Job(
            model=model,
            corpus=corpus,
            steps=steps,
            trained=Trainable.whole(model),
            frozen=lambda mesh: {},
            fresh=lambda mesh, frozen: split(load(base, dtype="float32", mesh=mesh))[1],
            result=MODEL,
            save=model_writer(model, corpus, generation),
            facts=facts,
        )

    for line in check_special_ids(model, Tokenizer.from_pretrained(corpus.tokenizer or base), where=str(base)):
        _log.warning("%s", line)  # an adapter is used with the config of its base
    adapter = config.lora
    plan = make_plan(adapter, model)
    onto = untied_config(model) if unties_embeddings(plan, model) else model

    def frozen(mesh: Mesh | None) -> Mapping[str, Operand]:
        if config.quantize is None:
            params = split(load(base, mesh=mesh))[1]
        else:
            params = load_quantized(base, config.quantize, mesh=mesh)[1]
        return untie_for_adapter(plan, model, params)[1]

    def fresh(mesh: Mesh | None, frozen: Mapping[str, Operand]) -> Mapping[str, Array]:
        key = jax.random.key(config.seed)
        draw = jax.jit(functools.partial(lora.init, plan, onto), out_shardings=lora.shardings(plan, onto, mesh))
        return draw(dict(frozen), key)

    def save(path: Path, params: Mapping[str, Array]) -> None:
        on_host = {name: gather_to_host(value) for name, value in params.items()}
        with collective_errors():
            if jax.process_index() == 0:
                write_adapter(path, adapter, model, on_host, base=str(base), generation=endings)

    _log.info("%d of %d weights are trained", lora.count(plan, onto), count_parameters(onto).total)
    return Job(
        model=onto,
        corpus=corpus,
        steps=steps,
        trained=Trainable(
            lora.specs(plan, onto),
            lambda trained, frozen, key: lora.attach(plan, frozen, trained, key),
            adapter.lora_dropout,
        ),
        frozen=frozen,
        fresh=fresh,
        result=ADAPTER,
        save=save,
        facts=facts,
        keep_best=True,
    )


def _endings(config: FinetuneConfig, corpus: Corpus, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """What the result's generation config needs beside the base's, so that it stops where it learns to."""
    assert corpus.tokenizer is not None
    return endings_of(config.data.template, Tokenizer.from_pretrained(corpus.tokenizer), eos_token_ids)


def examples(config: FinetuneConfig, model: ModelConfig, out: Path) -> tuple[Corpus, int]:
    """The examples of a run as its corpus, and its steps: those asked for, or as many as its epochs make."""
    data = config.data
    tokenizer, train, heldout, inputs = open_examples(config, model, out)
    shape: dict[str, Any] = {"sequence_length": data.sequence_length, "mode": data.packing}
    stream = Stream([train], batch_size=data.batch_size, seed=config.seed, packing=ExamplePacking, **shape)
    held_out = functools.partial(example_batches, [heldout], batch_size=data.batch_size, **shape)
    inputs = {**inputs, "heldout": [heldout.digest]}
    corpus = Corpus(stream, held_out, tokenizer, data.prefetch, config.eval_batches, inputs)
    if config.steps:
        if config.epochs != FinetuneConfig.epochs:
            _log.warning("steps %d: epochs %s has no effect; steps 0 trains for epochs", config.steps, config.epochs)
        return corpus, config.steps
    full, packing = int(config.epochs), ExamplePacking(train, seed=config.seed, **shape)
    last = packing.rows_of(full)
    rows = last.start + math.ceil((config.epochs - full) * len(last))
    return corpus, math.ceil(rows / data.batch_size)


class OpenExamples(NamedTuple):
    """The examples of a run."""

    tokenizer: Path  # its folder
    train: Examples
    heldout: Examples
    inputs: dict[str, Any]  # `files` and their hashes, and `options`


def open_examples(config: FinetuneConfig, model: ModelConfig, out: Path) -> OpenExamples:
    """The examples of a run; they are written below `out` once for all that has the same content.

    Raises `ValueError` for files that are empty or broken, and for a vocabulary that is larger than the model's.
    """
    data = config.data
    tokenizer = Path(data.tokenizer or config.init_from or "")
    options = {
        "template": data.template,
        "format": data.format,
        "targets": data.targets,
        "sequence_length": data.sequence_length,
        "too_long": data.too_long,
        "val_fraction": data.val_fraction,
        "split_special_tokens": data.split_special_tokens,
    }
    with collective_errors():
        if not data.files:
            raise DSMoEError("no examples to train on; --data FILE names some")
        if not tokenizer_files(tokenizer):
            raise DSMoEError(f"{tokenizer}: holds no tokenizer; --data.tokenizer names a folder that does")
        if jax.process_index() == 0:
            made_by = {f"data.{name}": value for name, value in options.items()}
            made_by |= {"data.template": template_hash(data.template), "data.tokenizer": tokenizer_hash(tokenizer)}
            hashes = {source: file_hashes(source, out) for source in data.files}
            sources = [Source.of(source, hashes[source]).sha256 for source in data.files]
            home = hash_json({"sources": sources, "options": made_by})[:12]
            if not (out / _EXAMPLES / home).exists():
                (out / _EXAMPLES).mkdir(parents=True, exist_ok=True)
                _log.info("%s", write_examples(data.files, tokenizer, out / _EXAMPLES / home, exclude=[out], **options))
            files = {name: sha256 for of_source in hashes.values() for name, sha256 in of_source.items()}
            write_json(out / RECORD, {"folder": home, "files": files, "options": made_by})
    inputs: dict[str, Any] = {}
    splits: list[Examples] = []
    with collective_errors():
        inputs |= read_json(out / RECORD)
        home = out / _EXAMPLES / inputs.pop("folder")
        splits += [Examples.open(home, split) for split in ("train", "heldout")]
        splits[0].check(tokenizer_hash=tokenizer_hash(tokenizer), vocab_size=model.vocab_size)
    if data.val_fraction and not len(splits[1]):
        _log.warning("no example is held out: nothing to evaluate on; raise data.val_fraction (%s)", data.val_fraction)
    return OpenExamples(tokenizer, splits[0], splits[1], inputs)


def show_examples(config: FinetuneConfig, count: int) -> None:
    """Print the first examples of a run with what is learnt of them in colour; nothing is trained or left behind."""
    with tempfile.TemporaryDirectory() as folder:
        found = open_examples(config, config.model_config(), Path(folder))
        show(found.train, Tokenizer.from_pretrained(found.tokenizer), count)
