"""The tokenizer of a checkpoint as GGUF metadata: `add_tokenizer`."""

import json
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import hash_json
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files
from dsmoe_jax.text.tokenizer_config import read_settings

# llama.cpp's name of a pre-tokenizer, by the SHA-256 of its JSON in tokenizer.json.
_PRE: Final = {
    "5990693cd157d5b2abbe362cd9a0a103db4b3a87f7d029137ae0f1e70c1ee012": "gpt-2",  # ByteLevel, of `train_tokenizer`
    "5f897854a756c679d23afdd63e0198976b8f127933de1f78856a0b4ab1d456f9": "deepseek-llm",
}
_TEXT: Final = "a  ① ﬁ "  # changed by NFKC, and by removing repeated or final spaces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types


def add_tokenizer(writer: Any, folder: Path, config: ModelConfig) -> None:
    """Add vocabulary, merges, special tokens and chat template; without a tokenizer llama.cpp takes token ids only."""
    if not tokenizer_files(folder):
        writer.add_tokenizer_model("none")
        return
    tokenizer = Tokenizer.from_pretrained(folder)
    add = _add_bpe if (folder / "tokenizer.json").is_file() else _add_sentencepiece
    tokens, size = add(writer, folder, config.vocab_size), config.vocab_size
    if max(tokens) >= size:
        raise DSMoEError(f"{folder}: the tokenizer has {max(tokens) + 1} tokens, the model {size}")
    every = [tokens.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(size)]
    writer.add_token_list([token for token, _ in every])
    writer.add_token_types([kind for _, kind in every])
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer.encode("a")
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if template := tokenizer.chat_templates.get("default"):
        writer.add_chat_template(template)


def _add_bpe(writer: Any, folder: Path, _: int) -> dict[int, tuple[str, int]]:
    """Add the merges of a byte-level BPE; return its tokens and their types by id."""
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_bytes())  # the tokenizers library has read it
    model, normalizer = fields["model"], fields.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise DSMoEError(f"{path}: llama.cpp needs byte-level BPE or a tokenizer.model, got {model.get('type')}")
    if normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        raise DSMoEError(f"{path}: llama.cpp does not support normalizer {json.dumps(normalizer)[:80]}")
    pre = _PRE.get(hash_json(fields.get("pre_tokenizer")))
    if pre is None:
        raise DSMoEError(f"{path}: llama.cpp has no pre-tokenizer equal to this one")
    if not model["merges"]:
        raise DSMoEError(f"{path}: llama.cpp needs at least one merge")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    tokens = {i: (token, _NORMAL) for token, i in model["vocab"].items()}
    added = fields.get("added_tokens", ())
    for token in added:
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            raise DSMoEError(f"{path}: llama.cpp does not support {flags[0]} of added token {token['content']!r}")
    return tokens | {token["id"]: (token["content"], _kind(token["special"])) for token in added}


def _add_sentencepiece(writer: Any, folder: Path, vocab_size: int) -> dict[int, tuple[str, int]]:
    """Add the scores of a sentencepiece BPE; return its pieces and their types by id."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = (
        (_UNKNOWN, model.is_unknown),
        (_CONTROL, model.is_control),
        (_BYTE, model.is_byte),
        (_UNUSED, model.is_unused),
    )
    scores = [model.get_score(i) for i in ids]
    if any(score != round(score) for score in scores):  # BPE has ranks, unigram log-probabilities
        raise DSMoEError(f"{folder / 'tokenizer.model'}: llama.cpp needs a BPE model, got a unigram one")
    if model.decode(model.encode(_TEXT)) != _TEXT:
        raise DSMoEError(f"{folder / 'tokenizer.model'}: llama.cpp does not normalize text, which this model does")
    settings = read_settings(folder)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores + [0.0] * (vocab_size - len(scores)))
    writer.add_add_space_prefix(settings.flag("add_prefix_space", True))
    tokens = {i: (model.id_to_piece(i), next((kind for kind, test in kinds if test(i)), _NORMAL)) for i in ids}
    return tokens | {i: (token.content, _kind(token.special)) for i, token in settings.added_tokens.items()}


def _kind(special: bool) -> int:
    return _CONTROL if special else _USER_DEFINED
