"""The model card of an exported checkpoint, from what is known about it: `model_card`."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe_jax.checkpoint.manifest import is_native, read_manifest
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.info import count_parameters
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import tokenizer_files, uses_sentencepiece

from .card_scores import model_index, read_scores
from .gguf_export import opens_in_llama_cpp

_CARD = """---
{front_matter}
---

# {name}

A [DeepSeekMoE](https://arxiv.org/abs/2401.06066) language model, exported by dsmoe_jax.

| | |
| --- | --- |
{facts}
{evaluation}
## Use

{use}
"""
_JAX = """In JAX, with dsmoe_jax installed (in a clone of its repository: `pip install -e '.[hub]'`):

```python
import dsmoe_jax

generate = dsmoe_jax.Generator.from_pretrained("{repo_id}")
{generate}
```"""
_TRANSFORMERS = """In transformers, with the PyTorch code of this repository (`modeling_deepseek.py`):

```python
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True, dtype="auto")
{tokenizer}
```"""
_VLLM = "In vLLM: `vllm serve {repo_id} --trust-remote-code`."
_LLAMA_CPP = """In llama.cpp, from a GGUF file (`pip install -e '.[hub,gguf]'`):
`dsmoe export {repo_id} model.gguf`."""
_SLOW = """The tokenizer is a `tokenizer.model`. Use it in transformers 4 with `use_fast=False`; for some texts
the ids of transformers 5 differ."""
_EVALUATION = """
## Evaluation

By `dsmoe evaluate`{settings}, in percent or bits per byte:

| benchmark | score | metric | shots | documents |
| --- | ---: | --- | ---: | ---: |
{rows}
"""


def model_card(
    checkpoint: Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    config: ModelConfig | None = None,
    origin: Mapping[str, str] | None = None,
    evaluation: str | Path | None = None,
) -> str:
    """Return the README.md of a repository.

    Args:
        checkpoint: Native checkpoint or Hugging Face folder; the `run.json` of its training run, if any, is in the
            parent folder.
        repo_id: Id of the repository, `owner/name`.
        license: Identifier of the license, as the hub has them; default: none is stated.
        base_model: Hub id of the model that this one was trained from; default: the source of the checkpoint, if it was
            converted from another repository.
        config: Config of the export, whose dtype may differ; default: that of the checkpoint.
        origin: `repository` and `revision` of a checkpoint from the hub; default: those that a native one records.
        evaluation: Output folder of `dsmoe evaluate`; default: `scores` beside the checkpoint, if of this checkpoint.

    Returns:
        Markdown with the hub's metadata as front matter.

    Raises:
        DSMoEError: `evaluation` has no report.
    """
    config = config or ModelConfig.from_file(checkpoint)
    source = origin or (read_manifest(checkpoint).source if is_native(checkpoint) else {})
    repository = source.get("repository")
    base_model = base_model or (repository if repository != repo_id else None)
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_moe", "mixture-of-experts", "jax", "custom_code"],
        "license": license,
        "base_model": base_model,
    }
    name = repo_id.partition("/")[2]
    scores = read_scores(checkpoint, evaluation)
    if scores:
        metadata["model-index"] = model_index(name, scores)
    front_matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in metadata.items() if value)
    facts = _architecture(config) | _training(checkpoint)
    if repository:
        facts["converted from"] = f"{repository}, commit {source.get('revision')}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    fields = {"front_matter": front_matter, "name": name, "facts": rows}
    return _CARD.format(**fields, evaluation=_evaluation(scores), use=_use(checkpoint, repo_id, config))


def _use(checkpoint: Path, repo_id: str, config: ModelConfig) -> str:
    """Return how to open the repository, by the libraries that support its config and tokenizer."""
    parts, fields = [_JAX, _TRANSFORMERS], {"repo_id": repo_id}
    if not tokenizer_files(checkpoint):
        fields |= {"classes": "AutoModelForCausalLM", "tokenizer": "logits = model(torch.tensor([[1, 2, 3]])).logits"}
        fields["generate"] = "print(generate([[1, 2, 3]], max_new_tokens=50)[0].token_ids)"
        return "\n\n".join(parts).format(**fields).replace("from transformers", "import torch\nfrom transformers")
    slow = uses_sentencepiece(checkpoint)
    options = ", use_fast=False" if slow else ""
    fields["classes"] = "AutoModelForCausalLM, AutoTokenizer"
    fields["tokenizer"] = f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True{options})'
    fields["generate"] = 'print(generate("Hello", max_new_tokens=50).text)'
    if slow:
        parts.append(_SLOW)
    if opens_in_llama_cpp(checkpoint, config):  # to our knowledge, vLLM supports these configs
        parts += [_VLLM.replace("-code", "-code --tokenizer-mode slow") if slow else _VLLM, _LLAMA_CPP]
    return "\n\n".join(parts).format(**fields)


def _evaluation(scores: Mapping[str, Any]) -> str:
    """Return the section of the scores; "" if there are none."""
    if not scores:
        return ""
    settings = {name: scores.get(name) for name in ("adapter", "quantize", "dtype", "limit", "num_fewshot")}
    stated = "".join(f", {name} {value}" for name, value in settings.items() if value not in (None, ""))
    rows = (
        (row["benchmark"], f"{row['score']:.3g}", row["metric"].replace(",none", ""), row["shots"], f"{row['n']:,}")
        for row in scores["rows"]
    )
    lines = ("| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in rows)
    return _EVALUATION.format(settings=stated, rows="\n".join(lines))


def _architecture(config: ModelConfig) -> dict[str, str]:
    counts = count_parameters(config)
    facts = {
        "parameters": f"{counts.total:,}, of which {counts.activated:,} are activated per token",
        "layers": f"{config.num_hidden_layers}, hidden size {config.hidden_size:,}",
        "attention": f"{config.num_attention_heads} heads, {config.num_kv_heads} key-value heads",
        "context length": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "dtype": str(config.torch_dtype),
    }
    if config.n_routed_experts:
        shared = f"{config.n_shared_experts or 0} shared"
        facts["experts"] = (
            f"{shared} and {config.n_routed_experts} routed ones per layer, top-{config.num_experts_per_tok}"
        )
    return facts


def _training(checkpoint: Path) -> dict[str, str]:
    """Return facts about the run whose result this checkpoint is; none for other checkpoints."""
    run: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):
        run = read_json(checkpoint.resolve().parent / "run.json")
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # a file of another program
        result, data, optimizer = run["result"], run["data"], run["optimizer"]
        facts = {
            "training": f"{result['step']:,} steps of {data['batch_size']} × {data['sequence_length']} tokens",
            "learning rate": f"{optimizer['learning_rate']}, schedule {optimizer['schedule']}",
        }
        losses = {"training loss": result["loss"], "validation loss": result["eval_loss"]}
        return facts | {name: f"{loss:.4f} nats per token" for name, loss in losses.items() if loss is not None}
    return {}
