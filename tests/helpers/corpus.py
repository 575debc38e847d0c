"""Small corpora: a byte tokenizer, text files in every format, token shards."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.train.data import TokenShards

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = ["def f(x):\n    return x\n", "你好, wörld 👩‍👧", "a", "the quick brown fox\r\n" * 9, "tab\tand nul-free"]


def byte_tokenizer(folder: Path, *, eos: bool = True, bos: bool = True, fill: int = 0) -> Path:
    """Return a byte tokenizer with BOS 0, EOS 1 and `fill` unused tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet, *(f"fill {i}" for i in range(fill))])}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    library.decoder = decoders.ByteLevel()  # pyright: ignore
    library.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    folder.mkdir(parents=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"add_bos_token": bos, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS if eos else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def jsonl(texts: Sequence[Any], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_texts(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """Write the texts as one file in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(texts))), field: list(texts)})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif path.name.endswith(".zst"):
        import zstandard

        data, half = jsonl(texts, field), len(jsonl(texts, field)) // 2
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(data[:half]) + compress(data[half:]))  # a file may have several frames
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(texts, field)))
    else:
        path.write_bytes(jsonl(texts, field))
    return path


def hand_made_shards(folder: Path, lengths: Sequence[int], *, shards: int = 1, first_id: int = 1) -> TokenShards:
    """Write documents of these lengths as shards of uint32 with consecutive token ids."""
    folder.mkdir(parents=True)
    files, names, next_id = {}, [], first_id
    for index, part in enumerate(np.array_split(np.array(lengths), shards)):
        ids = np.arange(next_id, next_id + part.sum()).astype("<u4")
        offsets = np.concatenate([[0], np.cumsum(part)]).astype("<u8")
        next_id += len(ids)
        names.append({kind: f"train-{index:05d}.{kind}" for kind in ("tokens", "documents")})
        for name, data in zip(names[-1].values(), (ids.tobytes(), offsets.tobytes()), strict=True):
            (folder / name).write_bytes(data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "format": "dsmoe token shards 2",
        "tokenizer_sha256": "0" * 64,
        "vocab_size": next_id,
        "eos_token_id": 1,
        "dtype": "uint32",
        "files": files,
        "splits": {
            "train": {"documents": len(lengths), "tokens": int(sum(lengths)), "shards": names},
            "validation": {"documents": 0, "tokens": 0, "shards": []},
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenShards.open(folder, verify=True)


def ids_of(shards: TokenShards) -> list[list[int]]:
    return [shards.read(document).tolist() for document in range(len(shards))]
