"""Train a byte-level BPE tokenizer: `train_tokenizer`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import atomic_dir, write_json

_BOS: Final = "<｜begin▁of▁sentence｜>"
_EOS: Final = "<｜end▁of▁sentence｜>"
_MIN_VOCAB_SIZE: Final = 258  # 256 bytes, BOS and EOS


def train_tokenizer(texts: Iterable[str], output_dir: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer, with DeepSeek's BOS and EOS as ids 0 and 1, and save it to a new directory.

    It has fewer than `vocab_size` tokens if the texts have too few pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < _MIN_VOCAB_SIZE:
        raise DSMoEError(f"vocab_size must be at least {_MIN_VOCAB_SIZE} for byte-level BPE, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BOS, _EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # For transformers, which adds BOS by the post-processor.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS}:1 $B:1", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    tokens = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    with atomic_dir(output_dir) as draft:
        tokenizer.save(str(draft.folder / "tokenizer.json"))
        write_json(draft.folder / "tokenizer_config.json", flags | tokens)
