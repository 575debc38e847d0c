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
_SIDES: Final = (("", ""), ("a", "a"), ("a ", " a"))  # of an added token, to compare
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types of llama.cpp and sentencepiece
_Tokens = dict[int, tuple[str, int]]  # tokens and their types by id


def add_tokenizer(writer: Any, folder: Path, config: ModelConfig) -> str:
    """Add vocabulary, merges, special tokens and chat template; without a tokenizer llama.cpp takes token ids only.

    Returns a warning, or "".
    """
    if not tokenizer_files(folder):
        writer.add_tokenizer_model("none")
        return ""
    tokenizer = Tokenizer.from_pretrained(folder)
    add = _add_bpe if (folder / "tokenizer.json").is_file() else _add_sentencepiece
    tokens, size = add(writer, folder, tokenizer, config.vocab_size), config.vocab_size
    if max(tokens) >= size:
        raise DSMoEError(f"{folder}: the tokenizer has {max(tokens) + 1} tokens, the model {size}")
    warning = _check_added_tokens(folder, tokenizer, tokens)
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
    return warning


def _add_bpe(writer: Any, folder: Path, *_: Any) -> _Tokens:
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


def _add_sentencepiece(writer: Any, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> _Tokens:
    """Add the scores of a sentencepiece BPE; return its pieces and their types by id."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    path = folder / "tokenizer.model"
    proto = ModelProto.FromString(path.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
    kinds = {piece.type for piece in proto.pieces}
    refusals = {
        f"llama.cpp needs a BPE model, got a {kind} one": kind != "bpe",
        "llama.cpp encodes unknown characters as bytes, which this model does not": _BYTE not in kinds,
        "llama.cpp does not support spaces as suffixes": proto.trainer_spec.treat_whitespace_as_suffix,
        "llama.cpp does not resegment unused pieces": _UNUSED in kinds,
        "llama.cpp does not normalize text, which this model does": model.decode(model.encode(_TEXT)) != _TEXT,
    }
    for message, applies in refusals.items():
        if applies:
            raise DSMoEError(f"{path}: {message}")
    scores = [piece.score for piece in proto.pieces]
    first, *_ = tokenizer.encode("a", add_special_tokens=False)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores + [0.0] * (vocab_size - len(scores)))
    writer.add_add_space_prefix(model.id_to_piece(first).startswith("▁"))
    tokens = {i: (piece.piece, piece.type) for i, piece in enumerate(proto.pieces)}
    added = read_settings(folder).added_tokens
    return tokens | {i: (token.content, _kind(token.special)) for i, token in added.items()}


def _check_added_tokens(folder: Path, tokenizer: Tokenizer, tokens: _Tokens) -> str:
    """Compare encodings next to added tokens: llama.cpp splits the text at all of them and encodes each rest alone.

    It splits at user-defined tokens always, and at control tokens only on request: a difference there is a warning,
    which is returned.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer.encode_batch(texts, add_special_tokens=False, split_special_tokens=False)

    for wanted in (_USER_DEFINED, _CONTROL):
        added = {i: token for i, (token, kind) in tokens.items() if kind == wanted}
        for left, right in _SIDES:
            before, after = encode([left, right])
            encoded = encode([f"{left}{token}{right}" for token in added.values()])
            for (i, token), ids in zip(added.items(), encoded, strict=True):
                if ids == [*before, i, *after] or (wanted == _CONTROL and i not in ids):
                    continue
                message = f"{folder}: llama.cpp encodes text next to token {token!r} otherwise"
                if wanted == _USER_DEFINED:
                    raise DSMoEError(message)
                return message
    return ""


def _kind(special: bool) -> int:
    return _CONTROL if special else _USER_DEFINED
