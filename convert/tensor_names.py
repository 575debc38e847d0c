"""Normalize tensor names changed by wrappers (DDP, FSDP, torch.compile, Lightning, PEFT): `normalize_names`."""

import re

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError

from .param_mapping import TIED_HEAD
from .reader import CheckpointReader
from .tensor_info import quote

_EMBEDDING = "embed_tokens.weight"
_VALUE_HEAD = "v_head."
# Name parts that wrappers of submodules insert.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def normalize_names(reader: CheckpointReader, config: ModelConfig) -> None:
    """Rename the reader's tensors to Hugging Face's names and list the changes in `reader.ignored`.

    Also drops TRL's value head and empty shared experts, and maps a tied head without an embedding to the embedding.
    """
    if lora := next((name for name in reader.tensors if ".lora_" in name), None):
        advice = "merge it first, or load base and adapter from separate folders"
        raise DSMoEError(f"{reader.folder}: tensor {quote(lora)} belongs to an unmerged LoRA adapter; {advice}")
    if heads := [name for name in reader.tensors if name.startswith(_VALUE_HEAD)]:
        reader.ignored += heads
        reader.tensors = {name: info for name, info in reader.tensors.items() if not name.startswith(_VALUE_HEAD)}
    renamed = {name: _WRAPPERS.sub("", name) for name in reader.tensors}
    if wrapped := next((name for name, plain in renamed.items() if name != plain), None):
        reader.ignored.append(f"wrappers in names such as {quote(wrapped)}")
    prefix = _prefix(list(renamed.values()))
    if prefix:
        if other := next((name for name, plain in renamed.items() if not plain.startswith(prefix)), None):
            raise DSMoEError(f"{reader.folder}: tensor {quote(other)} lacks the prefix {quote(prefix)} of the others")
        renamed = {name: plain.removeprefix(prefix) for name, plain in renamed.items()}
        reader.ignored.append(f"the prefix {quote(prefix)} of all tensors")
    if _EMBEDDING in renamed.values():
        renamed = {name: plain if plain == TIED_HEAD else f"model.{plain}" for name, plain in renamed.items()}
    if config.tie_word_embeddings and f"model.{_EMBEDDING}" not in renamed.values():
        renamed = {name: f"model.{_EMBEDDING}" if plain == TIED_HEAD else plain for name, plain in renamed.items()}
    original: dict[str, str] = {}
    for name, plain in renamed.items():
        if plain in original:
            both = f"{quote(original[plain])} and {quote(name)}"
            raise DSMoEError(f"{reader.folder}: tensors {both} have the same normalized name")
        original[plain] = name
    reader.tensors = {renamed[name]: info for name, info in reader.tensors.items()}
    if config.n_shared_experts is None:
        empty = [name for name, info in reader.tensors.items() if ".shared_experts." in name and 0 in info.shape]
        for name in empty:
            del reader.tensors[name]
        reader.ignored += empty[:1]


def _prefix(names: list[str]) -> str:
    """Return the prefix of the embedding or the final norm."""
    for end in (_EMBEDDING, "norm.weight"):
        for name in (name for name in names if name.endswith(end)):
            match = re.fullmatch(rf"(.*?)(?:model\.)?{re.escape(end)}", name)
            if match and (not match[1] or match[1].endswith(".")) and "layers." not in match[1]:
                return match[1]
    return ""
