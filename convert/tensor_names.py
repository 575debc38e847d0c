"""Tensor names as wrappers leave them (DDP, FSDP, torch.compile, Lightning, PEFT), brought to Hugging Face's own.

Start at `adopt_names`.
"""

import re

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError

from .param_mapping import TIED_HEAD
from .reader import CheckpointReader
from .torch_pickle import show

_EMBEDDING = "embed_tokens.weight"
_VALUE_HEAD = "v_head."
# What wrappers of single modules put between the parts of a name.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def adopt_names(reader: CheckpointReader, config: ModelConfig) -> None:
    """Rename the reader's tensors to Hugging Face's names, and drop what says nothing.

    A prefix is dropped where all tensors have it, and so is the value head of TRL. Tensors without `model.` (of the
    model without its head) get it, a tied head is an embedding, and the empty shared experts of `n_shared_experts` 0
    are dropped. `reader.ignored` says what was changed.

    Raises:
        ValueError: the folder holds LoRA factors, some tensors alone have the prefix, or two get the same name.
    """
    if lora := next((name for name in reader.tensors if ".lora_" in name), None):
        raise DSMoEError(
            f"{reader.folder}: tensor {show(lora)} belongs to a LoRA adapter that is not merged; "
            "merge it first, or load base and adapter from folders of their own"
        )
    if heads := [name for name in reader.tensors if name.startswith(_VALUE_HEAD)]:
        reader.ignored += heads
        reader.tensors = {name: info for name, info in reader.tensors.items() if name not in heads}
    renamed = {name: _WRAPPERS.sub("", name) for name in reader.tensors}
    if inside := next((name for name, plain in renamed.items() if name != plain), None):
        reader.ignored.append(f"wrappers in names such as {show(inside)}")
    prefix = _prefix(list(renamed.values()))
    if prefix:
        for name, plain in renamed.items():
            if not plain.startswith(prefix):
                raise DSMoEError(f"{reader.folder}: tensor {show(name)} lacks the prefix {show(prefix)} of the others")
        renamed = {name: plain.removeprefix(prefix) for name, plain in renamed.items()}
        reader.ignored.append(f"the prefix {show(prefix)} of all tensors")
    if _EMBEDDING in renamed.values():
        renamed = {name: plain if plain == TIED_HEAD else f"model.{plain}" for name, plain in renamed.items()}
    if config.tie_word_embeddings and f"model.{_EMBEDDING}" not in renamed.values():
        renamed = {name: f"model.{_EMBEDDING}" if plain == TIED_HEAD else plain for name, plain in renamed.items()}
    original: dict[str, str] = {}
    for name, plain in renamed.items():
        if plain in original:
            raise DSMoEError(f"{reader.folder}: tensors {show(original[plain])} and {show(name)} mean the same")
        original[plain] = name
    reader.tensors = {renamed[name]: info for name, info in reader.tensors.items()}
    if config.n_shared_experts is None:
        empty = [name for name, info in reader.tensors.items() if ".shared_experts." in name and 0 in info.shape]
        for name in empty:
            del reader.tensors[name]
        reader.ignored += empty[:1]


def _prefix(names: list[str]) -> str:
    """What stands before Hugging Face's name of the embedding, or of the final norm."""
    for end in (_EMBEDDING, "norm.weight"):
        for name in (name for name in names if name.endswith(end)):
            match = re.fullmatch(rf"(.*?)(?:model\.)?{re.escape(end)}", name)
            if match and (not match[1] or match[1].endswith(".")) and "layers." not in match[1]:
                return match[1]
    return ""
