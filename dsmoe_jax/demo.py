"""`dsmoe demo`: a checkpoint in the Hugging Face layout made on the spot, converted, and asked for text.

No network and no weights: the vocabulary comes from the sources of Python's own standard library, the weights are
random, so the text is noise; what is shown is that every step from a PyTorch checkpoint to text works here.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_BOS: Final = "<｜begin▁of▁sentence｜>"
_EOS: Final = "<｜end▁of▁sentence｜>"
_TEXT_BYTES: Final = 2_000_000
_PROMPT: Final = "def main(argv=None):\n"


def run(out: str | Path | None = None) -> None:
    """Make, convert and generate, with a line for each step; both checkpoints stay in `out` if it is given.

    Raises `ValueError` if `out` exists.
    """
    if out is not None and Path(out).exists():
        raise ValueError(f"{out} exists; nothing is overwritten")
    with contextlib.nullcontext(out) if out is not None else tempfile.TemporaryDirectory() as folder:
        _run(Path(folder))


def _run(folder: Path) -> None:
    from dsmoe_jax.convert import import_hf
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.info import count_parameters

    hf, native = folder / "hf", folder / "native"
    with _step("vocabulary from the standard library's sources"):
        make_tokenizer(hf)
    with _step("checkpoint in the Hugging Face layout"):
        config = make_checkpoint(hf)
    counts = count_parameters(config)
    print(f"  {counts.total:,} parameters, {counts.activated:,} activated per token")
    with _step("convert"):
        import_hf(hf, native)
    with _step("load the native checkpoint"):
        generator = Generator.from_pretrained(native)
    print(f"\n{_PROMPT}", end="", flush=True)
    started = time.perf_counter()
    for piece in generator.stream(_PROMPT, max_new_tokens=48, temperature=0.7, top_p=0.9):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(f"\n\n{seconds:.1f} s, compilation included. The weights are random: this is no prose yet.")


def stdlib_text(limit: int = _TEXT_BYTES) -> Iterator[str]:
    """The standard library's modules, in the order of their names, `limit` characters in all."""
    for path in sorted(Path(contextlib.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")[:limit]
        limit -= len(text)
        if not text:
            return
        yield text


def make_tokenizer(folder: Path, vocab_size: int = 2048) -> None:
    """Train a byte-level BPE on the standard library's sources; DeepSeek's special tokens get the ids 0 and 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dsmoe_jax.new_folder import write_json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BOS, _EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stdlib_text(), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"add_bos_token": True, "add_eos_token": False, "bos_token": _BOS, "eos_token": _EOS}
    write_json(folder / "tokenizer_config.json", special)


def make_checkpoint(folder: Path):
    """Write a random `tiny` model in the Hugging Face layout; returns its `ModelConfig`."""
    import jax
    from safetensors.numpy import save_file

    from dsmoe_jax.config import ModelConfig
    from dsmoe_jax.convert.names import hf_names, is_stacked
    from dsmoe_jax.model import DeepSeekMoE, split
    from dsmoe_jax.new_folder import write_json

    config = ModelConfig.preset("tiny")
    params = jax.device_get(split(DeepSeekMoE.init(config))[1])
    tensors = {}
    for name, parts in hf_names(config).items():
        tensors |= dict(zip(parts, params[name] if is_stacked(name) else [params[name]], strict=True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_dict())
    return config


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} …", end="", flush=True)
    started = time.perf_counter()
    yield
    print(f" {time.perf_counter() - started:.1f} s", flush=True)
