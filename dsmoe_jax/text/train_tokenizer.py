"""A vocabulary of one's own: a byte-level BPE trained on texts. See `train_tokenizer`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import atomic_dir, write_json

_BOS: Final = "<｜begin▁of▁sentence｜>"
_EOS: Final = "<｜end▁of▁sentence｜>"
_LEAST: Final = 258  # 256 bytes and the two special tokens


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of `vocab_size` tokens to the new `folder`; DeepSeek's special tokens get the ids 0 and 1.

    There are fewer where the texts hold no more pairs to merge. Raises `ValueError` for a size below that of all bytes,
    and if `folder` exists.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < _LEAST:
        raise DSMoEError(f"a byte-level vocabulary has {_LEAST} tokens at least, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # transformers asks for a class, and adds BOS as this file says.
    special_tokens = [(_BOS, tokenizer.token_to_id(_BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS}:1 $B:1", special_tokens=special_tokens
    )
    special = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _EOS,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    with atomic_dir(folder) as draft:
        tokenizer.save(str(draft.folder / "tokenizer.json"))
        write_json(draft.folder / "tokenizer_config.json", special)
