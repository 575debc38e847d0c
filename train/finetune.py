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
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.loading import identity, load_params
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.progress import log_level, plural
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
from dsmoe_jax.text.tokenizer import Tokenizer

from .config import DatasetConfig, RunConfig
from .corpus import Corpus, tokenizer_of, warn_without_validation
from .data import Stream, tokenizer_hash, validation_batches
from .distributed import on_process_0
from .inputs import HASHES, RECORD, Source, file_hashes
from .job import MODEL, Check, Job, model_writer, resume_metadata, with_token_ids
from .optimizer import OptimizerConfig
from .resume import identity as run_identity
from .resume import read_run
from .sft import ExamplePacking, Examples, infer_stop_config, show, template_hash, write_examples
from .shape import FEW_STEPS, FIT_STEPS, MAX_LENGTH, fit_batch_size, fit_sequence_length
from .step import Trainable

ADAPTER: Final = "adapter"  # in the output directory
_EXAMPLES: Final = "examples"
_NOT_WRITER_OPTIONS: Final = ("files", "tokenizer", "validation", "batch_size", "packing", "prefetch")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesConfig(DatasetConfig):
    """Fine-tuning data."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Examples: .jsonl (.gz, .zst) or .parquet files, folders or globs. Default: none, at least one is required."""

    format: Literal["auto", "instruction", "messages", "sharegpt", "completion", "tokens"] = "auto"
    """Format of the examples; `auto` detects it from their fields."""

    template: str = "chat"
    """Chat template: `chat` (the tokenizer's), `deepseek-instruct` (outputs end with the text <|EOT|>, which becomes a
    stop string of the result's generation config), or a Jinja file."""

    train_on: Literal["all", "last"] = "all"
    """Assistant turns in the loss: all of them or the last."""

    sequence_length: int | None = None
    """Tokens per sequence. Default: the multiple of 64 that holds the longest example, at most 1024 and at most the
    model's context length."""

    excess_length_strategy: Literal["truncate", "drop", "raise"] = "truncate"
    """What to do with examples longer than `sequence_length`."""

    batch_size: int | None = None
    """Global batch size in sequences, over all devices and gradient-accumulation steps. Default: at most 64, less if
    the run would have fewer than 40 steps."""

    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit`: several examples per sequence, with attention within each; `none`: one example per sequence."""

    tokenizer: str | None = None
    """Folder of the tokenizer. Default: that of the model."""

    val_fraction: float = 0.02
    """Fraction of the examples held out for validation, chosen by hash, at least one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with the settings of the original's fine-tuning."""

    learning_rate: float | None = None  # type: ignore[assignment]
    """Peak learning rate, reached after warmup. Default: 2e-5, or 2e-4 with LoRA."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    _MINIMUM: ClassVar[Mapping[str, int]] = {**RunConfig._MINIMUM, "steps": 0}

    output_dir: str = "runs/finetune"
    """Output directory: checkpoints, metrics, the resolved config (`run.json`), the final model or adapter."""

    model: tyro.conf.Suppress[str] = ""
    """Unused: the model is `init_from`."""

    init_from: tyro.conf.Suppress[str | None] = None
    """Model to fine-tune: native checkpoint, Hugging Face folder or hub id."""

    revision: str | None = None
    """Branch, tag or commit if the model is a hub id. Default: `main`."""

    steps: int = 0
    """Total optimizer steps; 0 derives them from `epochs`."""

    epochs: float = 3.0
    """Passes over the training examples, if `steps` is 0."""

    data: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)  # type: ignore[assignment]
    """Training and validation examples."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: FinetuneOptimizerConfig(schedule="cosine", warmup_steps=10, weight_decay=0.0, b2=0.999)
    )
    """Optimizer and learning-rate schedule."""

    lora: LoraConfig | None = None
    """Low-rank adapters. Default: train all parameters."""

    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Quantization of the frozen base weights; requires `lora`. Default: none."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        super().__post_init__()
        if not self.steps and not self.epochs > 0:
            raise DSMoEError(f"epochs must be more than 0, got {self.epochs}")
        if self.model:
            raise DSMoEError(f"model {self.model!r} cannot be set: fine-tuning uses the checkpoint's model")
        if self.quantize is not None and self.lora is None:
            raise DSMoEError(f"quantize {self.quantize} requires --lora: quantized weights cannot be trained")
        if self.step.scan_layers and self.lora is not None:
            raise DSMoEError("step.scan_layers cannot be used with --lora: it would copy the frozen weights")


def finetuning(
    config: FinetuneConfig,
    output_dir: Path,
    *,
    resuming: bool = False,
    batch_multiple: int = 1,
    check: Check = lambda identity: None,
) -> Job:
    """Set up full-parameter or LoRA fine-tuning.

    Args:
        config: The config of the run.
        output_dir: Its output directory.
        resuming: Whether there is a checkpoint.
        batch_multiple: The batch size is a multiple of it by default.
        check: Called with the settings that must match a checkpoint's, before the examples are tokenized.
    """
    base, init_from = Path(), ""
    with collective_errors():
        base = base_of(config)
        init_from = identity(base, HashCache(output_dir / HASHES))
    model = config.model_config()
    settings = None if config.lora is None else dataclasses.asdict(config.lora)
    others = {"init_from": init_from, "lora": settings, "quantize": config.quantize}
    check(run_identity(config, model, **others))
    corpus, steps = examples(config, model, output_dir, resuming=resuming, batch_multiple=batch_multiple)
    assert corpus.tokenizer is not None
    tokenizer = Tokenizer.from_pretrained(corpus.tokenizer)
    metadata = resume_metadata(config, model, corpus, **others)
    if config.lora is None:
        model = with_token_ids(model, tokenizer)
    base_generation = read_generation_config(base)
    with_eos = with_default_eos(base_generation, model)
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


def base_of(config: FinetuneConfig) -> Path:
    """Return the folder of the model to fine-tune."""
    if (folder := config.base_folder()) is None:
        raise DSMoEError("init_from must be the model to fine-tune, got None")
    return folder


def examples(
    config: FinetuneConfig, model: ModelConfig, output_dir: Path, *, resuming: bool = False, batch_multiple: int = 1
) -> tuple[Corpus, int]:
    """Return the run's corpus of examples and its number of steps."""
    data, epochs = config.data, config.epochs
    known = read_run(output_dir).get("data", {}) if resuming else {}
    length = known.get("sequence_length")
    tokenizer, train, validation, inputs = open_examples(config, model, output_dir, length)
    length = inputs["options"]["data.sequence_length"]
    if data.sequence_length is None and "sequence_length" not in known:
        longest = _longest(train, validation)
        _log.info("Sequence length: %d tokens, for a longest example of %d", length, longest)
    shape: dict[str, Any] = {"sequence_length": length, "packing": data.packing}
    batch_size, sequences = data.batch_size or known.get("batch_size"), 0
    if batch_size is None or not config.steps:
        last = ExamplePacking(train, seed=config.seed, **shape).sequences_of(int(epochs))
        sequences = last.start + math.ceil((epochs - int(epochs)) * len(last))
    if batch_size is None:
        batch_size = fit_batch_size(sequences, batch_multiple, config.steps or FIT_STEPS)
    if batch_size % batch_multiple:  # of the run that is resumed, on another mesh
        raise DSMoEError(f"data.batch_size must be a multiple of {batch_multiple}, got {batch_size}")
    batched = {"batch_size": batch_size, "packer": ExamplePacking, **shape}
    stream = Stream([train], seed=config.seed, **batched)
    batches = functools.partial(validation_batches, [validation], **batched)
    inputs = {**inputs, "validation": [validation.digest]}
    sizes = data.prefetch, config.eval_batches
    corpus = Corpus(stream, batches, tokenizer, *sizes, inputs, validation_tokens=validation.tokens)
    if config.steps:
        if epochs != FinetuneConfig.epochs:
            _log.warning("epochs %s has no effect with steps %d; set steps 0", epochs, config.steps)
        if config.steps < FEW_STEPS and not resuming:
            _log.warning("%s hardly train: pass at least --steps %d", plural(config.steps, "step"), FEW_STEPS)
        return corpus, config.steps
    steps = math.ceil(sequences / batch_size)
    if steps < FEW_STEPS:
        made = f"{plural(len(train), 'example')} × {epochs:g} epochs = {plural(steps, 'step')}"
        text = "%s at batch size %d × %d tokens: decrease --data.batch-size or increase --epochs"
        _log.warning(text, made, batch_size, length)
    return corpus, steps


def open_examples(
    config: FinetuneConfig, model: ModelConfig, output_dir: Path, sequence_length: int | None = None
) -> tuple[Path, Examples, Examples, dict[str, Any]]:
    """Tokenize the examples unless their inputs are unchanged; return tokenizer folder, both splits and the inputs."""
    data, tokenizer = config.data, tokenizer_of(config)
    length = data.sequence_length or sequence_length
    with collective_errors():
        if not data.files:
            raise DSMoEError("data.files is empty: pass --data FILE")
        if tokenizer is None:
            raise DSMoEError(f"{config.init_from} has no tokenizer: pass --data.tokenizer FOLDER")
    assert tokenizer is not None
    on_process_0(_write_examples, data, tokenizer, output_dir, length, min(MAX_LENGTH, model.context_length))
    inputs: dict[str, Any] = {}
    splits: list[Examples] = []
    with collective_errors():
        inputs |= read_json(output_dir / RECORD)
        splits += Examples.open_splits(output_dir / _EXAMPLES / inputs.pop("folder"))
        splits[0].check(tokenizer_hash=tokenizer_hash(tokenizer), vocab_size=model.vocab_size)
    train, validation = splits
    warn_without_validation([validation], data.val_fraction)
    return tokenizer, train, validation, inputs


def _longest(*splits: Examples) -> int:
    """Return the tokens of the longest example."""
    return max(int(split.lengths.max(initial=0)) for split in splits)


def _write_examples(data: ExamplesConfig, tokenizer: Path, output_dir: Path, length: int | None, default: int) -> None:
    """Tokenize examples of up to `length` tokens into a folder named after the hash of their inputs.

    The sequence length is recorded: `length`, or for None, which stands for `default`, what fits the longest example.
    """
    limit = length or default
    options = {name: value for name, value in vars(data).items() if name not in _NOT_WRITER_OPTIONS}
    options |= {"sequence_length": limit, "val_fraction": 0.0 if data.validation else data.val_fraction}
    made_by = {f"data.{name}": value for name, value in options.items()}
    made_by |= {"data.template": template_hash(data.template), "data.tokenizer": tokenizer_hash(tokenizer)}
    hashes = {source: file_hashes(source, output_dir) for source in (*data.files, *data.validation)}
    sources = [Source.of(source, hashes[source]).sha256 for source in data.files]
    own = [Source.of(source, hashes[source]).sha256 for source in data.validation]

    def folder_of(limit: int) -> Path:
        identity = {"sources": sources, "options": made_by | {"data.sequence_length": limit}}
        return output_dir / _EXAMPLES / hash_json(identity | ({"validation": own} if own else {}))[:12]

    folder, fitted = folder_of(limit), folder_of(default)
    # The same examples if none is longer: a run resumes with the length that was fitted at its first start.
    if not folder.exists() and limit < default and fitted.exists() and _longest(*Examples.open_splits(fitted)) <= limit:
        folder = fitted
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        options |= {"validation": data.validation, "exclude": [output_dir]}
        _log.info("Wrote %s", write_examples(data.files, tokenizer, folder, **options))
    if length is None:
        made_by["data.sequence_length"] = fit_sequence_length(_longest(*Examples.open_splits(folder)), limit)
    files = {path: sha256 for of_source in hashes.values() for path, sha256 in of_source.items()}
    write_json(output_dir / RECORD, {"folder": folder.name, "files": files, "options": made_by})


def show_examples(config: FinetuneConfig, count: int) -> None:
    """Print the first `count` examples with their loss tokens highlighted."""
    with tempfile.TemporaryDirectory() as folder, log_level("dsmoe_jax", logging.WARNING):
        tokenizer, train, *_ = open_examples(config, config.model_config(), Path(folder))
        show(train, Tokenizer.from_pretrained(tokenizer), count)
