"""llama.cpp as a server on loopback, and tokenizers for models that it opens."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _module() -> Any:
    import pytest

    return pytest.importorskip("xllamacpp", reason="the reader is llama.cpp: pip install -e '.[interop]'")


@contextmanager
def server(file: Path, *, threads: int = 1, context: int = 256, exact: bool = True) -> Iterator[Any]:
    """Yield a function that posts JSON to llama.cpp's server on loopback; `exact`: its KV cache is in float32."""
    module = _module()
    params = module.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), context, 1, False
    params.cpuparams.n_threads, params.verbosity = threads, 0
    if exact:
        params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32  # default: float16
        params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    running = module.Server(params)

    def post(path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(running.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield post
    del running


def byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of `vocab_size` tokens with one merge, for models of 256 tokens or more."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:255], "ab", *(f"<{i}>" for i in range(256, vocab_size))]
    library = Library(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "tokenizer.json"))
