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

_CARD = """---
{front_matter}
---

# {name}

A [DeepSeekMoE](https://arxiv.org/abs/2401.06066) language model, exported by dsmoe_jax.

| | |
| --- | --- |
{facts}

## Use

In JAX:

```python
import dsmoe_jax

generate = dsmoe_jax.Generator.from_pretrained("{repo_id}")
print(generate("Hello", max_new_tokens=50).text)
```

In transformers, with the PyTorch code of this repository (`modeling_deepseek.py`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

In vLLM: `vllm serve {repo_id} --trust-remote-code`. In llama.cpp, from a GGUF file:
`dsmoe convert {repo_id} native && dsmoe export native model.gguf --format gguf`.
"""


def model_card(
    checkpoint: Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    config: ModelConfig | None = None,
    origin: Mapping[str, str] | None = None,
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

    Returns:
        Markdown with the hub's metadata as front matter.
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
    front_matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in metadata.items() if value)
    facts = _architecture(config) | _training(checkpoint)
    if repository:
        facts["converted from"] = f"{repository}, commit {source.get('revision')}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return _CARD.format(front_matter=front_matter, name=repo_id.partition("/")[2], repo_id=repo_id, facts=rows)


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
