"""llama.cpp on the GGUF export of the checkpoint, through its server on loopback. Start at `actions`."""

from pathlib import Path
from typing import Any

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import export_gguf
from tests.benchmarks import machine, plan
from tests.benchmarks.children import Actions
from tests.benchmarks.inputs import batch
from tests.helpers.llama_cpp import byte_tokenizer, server


def actions(task: str, folder: Path, dtype: str = "float32") -> Actions:
    """Return the actions of a child; times are those that llama.cpp reports."""
    config = ModelConfig.from_file(folder)
    file, context = _exported(folder, dtype, config), 2 * plan.PREFILL_TOKENS
    post = server(file, threads=machine.cores(), context=context, exact=False).__enter__()  # until the process ends
    options = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}

    def complete(prompt: list[int], count: int) -> dict[str, Any]:
        return post("/completion", prompt=prompt, n_predict=count, **options)

    def prefill() -> float:
        (prompt,) = batch(config, 1, plan.PREFILL_TOKENS).tolist()
        return complete(prompt, 1)["timings"]["prompt_ms"] / 1e3

    (prompt,) = batch(config, 1, plan.PROMPT).tolist()

    def decode() -> float:
        # The first token comes with the prompt; the time is that of the others.
        return complete(prompt, plan.NEW_TOKENS + 1)["timings"]["predicted_ms"] / 1e3

    def tokens() -> list[list[int]]:
        return [[token] for token in complete(prompt, plan.NEW_TOKENS + 1)["tokens"]]

    return {"run": prefill} if task == "prefill" else {"run": decode, "tokens": tokens}


def _exported(folder: Path, dtype: str, config: ModelConfig) -> Path:
    """Export the checkpoint once for each dtype, with a tokenizer, without which llama.cpp generates nothing."""
    file = folder.with_name(f"{folder.name}-{dtype}.gguf")
    if not file.exists():
        if not (folder / "tokenizer.json").exists():
            byte_tokenizer(folder, config.vocab_size)
        export_gguf(folder, file, dtype=dtype)
    return file
