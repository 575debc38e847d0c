"""Fine-tuning of all parameters or of LoRA adapters. Start at `finetuning`."""

import dataclasses
import functools
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import jax
import tyro
from jax.sharding import Mesh

from dsmoe_jax import lora
from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.native import collective_errors, gather_to_host
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft import untie_for_adapter, write_adapter
from dsmoe_jax.convert.peft_matching import base_config, make_plan
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import count_parameters
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.loading import identity, load_params
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.manifest import HashCache, hash_json
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.generation_config import (
    eos_token_ids,
    merge_stop_conditions,
    read_generation_config,
    with_default_eos,
)
from dsmoe_jax.text.special_ids import check_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .config import DatasetConfig, RunConfig
from .corpus import Corpus
from .data import Stream, tokenizer_hash, validation_batches
from .data.shards import SPLITS
from .distributed import on_process_0
from .inputs import HASHES, RECORD, Source, file_hashes
from .job import MODEL, Job, model_writer, resume_metadata, with_token_ids
from .optimizer import OptimizerConfig
from .sft import ExamplePacking, Examples, infer_stop_config, show, template_hash, write_examples
from .step import Trainable

ADAPTER: Final = "adapter"  # in the output directory
_EXAMPLES: Final = "examples"
_NOT_WRITER_OPTIONS: Final = ("files", "tokenizer", "batch_size", "packing", "prefetch")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig(DatasetConfig):
    """Fine-tuning data."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Conversations or completions: .jsonl (.gz, .zst) or .parquet files, folders or globs."""

    format: str = "auto"
    """Format of the examples, a key of `dsmoe_jax.train.sft.FORMATS`; `auto` detects it from their fields."""

    template: str = "chat"
    """Chat template: `chat` (the tokenizer's), `deepseek-instruct` (outputs end with the text <|EOT|>, which becomes a
    stop string of the result's generation config), or a Jinja file."""

    train_on: Literal["all", "last"] = "all"
    """Assistant turns in the loss: all of them or the last."""

    sequence_length: int = 1024
    """Tokens per sequence."""

    excess_length_strategy: Literal["truncate", "drop", "raise"] = "truncate"
    """What to do with examples longer than `sequence_length`."""

    batch_size: int = 64
    """Global batch size in sequences, over all devices and gradient-accumulation steps."""

    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit`: several examples per sequence, with attention within each; `none`: one example per sequence."""

    val_fraction: float = 0.02
    """Fraction of the examples held out for validation, chosen by hash."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    _MINIMUM: ClassVar[Mapping[str, int]] = {**RunConfig._MINIMUM, "steps": 0}

    output_dir: str = "runs/finetune"
    """Output directory: checkpoints, metrics, the resolved config (`run.json`), the final model or adapter."""

    model: tyro.conf.Suppress[str] = ""
    """Unused: the model is `init_from`."""

    steps: int = 0
    """Total optimizer steps; 0 derives them from `epochs`."""

    epochs: float = 3.0
    """Passes over the training examples, if `steps` is 0."""

    data: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)  # type: ignore[assignment]
    """Training and validation examples."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-5, schedule="cosine", warmup_steps=10, weight_decay=0.0, b2=0.999
        )
    )
    """Optimizer and learning-rate schedule."""

    lora: LoraConfig | None = None
    """Low-rank adapters; None trains all parameters."""

    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Quantization of the frozen base weights; requires `lora`."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        super().__post_init__()
        if not self.steps and not self.epochs > 0:
            raise DSMoEError(f"epochs must be more than 0, got {self.epochs}")
        if self.model:
            raise DSMoEError(f"model {self.model!r} cannot be set: fine-tuning uses the checkpoint's model")
        if self.quantize is not None and self.lora is None:
            raise DSMoEError(f"quantize {self.quantize} requires --lora: quantized weights cannot be trained")


def finetuning(config: FinetuneConfig, output_dir: Path) -> Job:
    """Set up full-parameter or LoRA fine-tuning."""
    base, init_from = Path(), ""
    with collective_errors():
        if config.init_from is None:
            raise DSMoEError("init_from must be the checkpoint to fine-tune, got None")
        base = config.base_folder() or base
        init_from = identity(base, HashCache(output_dir / HASHES))
    model = config.model_config()
    corpus, steps = examples(config, model, output_dir)
    settings = None if config.lora is None else dataclasses.asdict(config.lora)
    metadata = resume_metadata(config, model, corpus, init_from=init_from, lora=settings, quantize=config.quantize)
    if config.lora is None:
        model = with_token_ids(model, corpus)
    base_generation = read_generation_config(base)
    with_eos = with_default_eos(base_generation, model)
    assert corpus.tokenizer is not None
    tokenizer = Tokenizer.from_pretrained(corpus.tokenizer)
    stops = infer_stop_config(config.data.template, tokenizer, eos_token_ids(with_eos))
    if config.lora is None:
        ids = {name: getattr(model, name) for name in ("bos_token_id", "pad_token_id")} | with_eos
        known = {name: value for name, value in ids.items() if value is not None}
        generation = merge_stop_conditions(known, stops) if base_generation or stops else {}
        return Job(
            model=model,
            corpus=corpus,
            steps=steps,
            trainable=Trainable.all_params(model),
            load_frozen=lambda mesh: {},
            init_params=lambda mesh, frozen: load_params(base, dtype="float32", mesh=mesh)[1],
            result=MODEL,
            save=model_writer(model, corpus, generation),
            resume_metadata=metadata,
        )

    for line in check_special_ids(model, tokenizer, where=str(base)):
        _log.warning("%s", line)  # an adapter is used with the config of its base
    adapter = config.lora
    plan = make_plan(adapter, model)
    onto = base_config(plan, model)

    def load_frozen(mesh: Mesh | None) -> Mapping[str, Operand]:
        params = load_params(base, mesh=mesh, quantize=config.quantize)[1]
        return untie_for_adapter(plan, model, params)[1]

    def init_params(mesh: Mesh | None, frozen: Mapping[str, Operand]) -> Mapping[str, Array]:
        init = jax.jit(functools.partial(lora.init, plan, onto), out_shardings=lora.shardings(plan, onto, mesh))
        return init(dict(frozen), jax.random.key(config.seed))

    def attach(params: Mapping[str, Array], frozen: Mapping[str, Operand], key: Any) -> Mapping[str, Operand]:
        return lora.attach(plan, frozen, params, key)

    def save(path: Path, params: Mapping[str, Array]) -> None:
        on_host = {name: gather_to_host(value) for name, value in params.items()}
        on_process_0(write_adapter, path, adapter, model, on_host, base=config.init_from, generation=stops)

    _log.info("Trainable parameters: %s of %s", f"{lora.count(plan, onto):,}", f"{count_parameters(onto).total:,}")
    return Job(
        model=onto,
        corpus=corpus,
        steps=steps,
        trainable=Trainable(lora.specs(plan, onto), attach, adapter.lora_dropout),
        load_frozen=load_frozen,
        init_params=init_params,
        result=ADAPTER,
        save=save,
        resume_metadata=metadata,
        keep_best=True,
    )


def examples(config: FinetuneConfig, model: ModelConfig, output_dir: Path) -> tuple[Corpus, int]:
    """Return the run's corpus of examples and its number of steps."""
    data = config.data
    tokenizer, train, validation, inputs = open_examples(config, model, output_dir)
    shape: dict[str, Any] = {"sequence_length": data.sequence_length, "packing": data.packing}
    batched = {"batch_size": data.batch_size, "packer": ExamplePacking, **shape}
    stream = Stream([train], seed=config.seed, **batched)
    batches = functools.partial(validation_batches, [validation], **batched)
    inputs = {**inputs, "validation": [validation.digest]}
    corpus = Corpus(stream, batches, tokenizer, data.prefetch, config.eval_batches, inputs)
    if config.steps:
        if config.epochs != FinetuneConfig.epochs:
            _log.warning("epochs %s has no effect with steps %d; set steps 0", config.epochs, config.steps)
        return corpus, config.steps
    full, packing = int(config.epochs), ExamplePacking(train, seed=config.seed, **shape)
    last = packing.sequences_of(full)
    sequences = last.start + math.ceil((config.epochs - full) * len(last))
    return corpus, math.ceil(sequences / data.batch_size)


def open_examples(
    config: FinetuneConfig, model: ModelConfig, output_dir: Path
) -> tuple[Path, Examples, Examples, dict[str, Any]]:
    """Tokenize the examples unless their inputs are unchanged; return tokenizer folder, both splits and the inputs."""
    data = config.data
    tokenizer = Path(data.tokenizer or config.base_folder() or "")
    with collective_errors():
        if not data.files:
            raise DSMoEError("data.files is empty: pass --data FILE")
        if not tokenizer_files(tokenizer):
            raise DSMoEError(f"{tokenizer} has no tokenizer: pass --data.tokenizer FOLDER")
    on_process_0(_write_examples, data, tokenizer, output_dir)
    inputs: dict[str, Any] = {}
    splits: list[Examples] = []
    with collective_errors():
        inputs |= read_json(output_dir / RECORD)
        folder = output_dir / _EXAMPLES / inputs.pop("folder")
        splits += [Examples.open(folder, split) for split in SPLITS]
        splits[0].check(tokenizer_hash=tokenizer_hash(tokenizer), vocab_size=model.vocab_size)
    if data.val_fraction and not len(splits[1]):
        _log.warning("No validation examples: evaluation is skipped; increase data.val_fraction %s", data.val_fraction)
    return tokenizer, splits[0], splits[1], inputs


def _write_examples(data: ExamplesConfig, tokenizer: Path, output_dir: Path) -> None:
    """Tokenize the examples into a folder named after the hash of their inputs."""
    options = {name: value for name, value in vars(data).items() if name not in _NOT_WRITER_OPTIONS}
    made_by = {f"data.{name}": value for name, value in options.items()}
    made_by |= {"data.template": template_hash(data.template), "data.tokenizer": tokenizer_hash(tokenizer)}
    hashes = {source: file_hashes(source, output_dir) for source in data.files}
    sources = [Source.of(source, hashes[source]).sha256 for source in data.files]
    name = hash_json({"sources": sources, "options": made_by})[:12]
    folder = output_dir / _EXAMPLES / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _log.info("Wrote %s", write_examples(data.files, tokenizer, folder, exclude=[output_dir], **options))
    files = {path: sha256 for of_source in hashes.values() for path, sha256 in of_source.items()}
    write_json(output_dir / RECORD, {"folder": name, "files": files, "options": made_by})


def show_examples(config: FinetuneConfig, count: int) -> None:
    """Print the first `count` examples with their loss tokens highlighted."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, train, *_ = open_examples(config, config.model_config(), Path(folder))
        show(train, Tokenizer.from_pretrained(tokenizer), count)
