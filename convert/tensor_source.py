"""Tensors of a native checkpoint or a Hugging Face folder, both by Hugging Face's names: `open_source`."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.checkpoint.manifest import PARAMETERS, is_native, read_manifest
from dsmoe_jax.checkpoint.native import check_names_and_shapes, check_tensor_count
from dsmoe_jax.checkpoint.zarr_io import STATE, open_array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import abstract

from .importer import check_tensors, file_versions
from .param_mapping import export_order
from .reader import CheckpointReader


class TensorSource(contextlib.AbstractContextManager["TensorSource"]):
    """Reads memory-mapped tensors by Hugging Face's names.

    Attributes:
        folder: The checkpoint.
        config: Config of the model.
        order: Our parameter and the expert in it, by Hugging Face's name, in the order of an export.
        sha256: SHA-256 of our parameters; empty if the folder has none.
        version: JSON that identifies the content.
    """

    folder: Path
    config: ModelConfig
    order: Mapping[str, tuple[str, int | None]]
    sha256: Mapping[str, str]
    version: Any

    def read(self, hf_name: str) -> np.ndarray:
        """Return a read-only view of a tensor."""
        raise NotImplementedError

    def file_of(self, hf_name: str) -> str:
        """Return the file or folder of a tensor, relative to the checkpoint."""
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        """Release the files."""


def open_source(folder: Path) -> TensorSource:
    """Open a native checkpoint or a Hugging Face folder; checks names, shapes and dtypes, not the values."""
    return NativeSource(folder) if opens_as_native(folder) else HFSource(folder)


def opens_as_native(folder: Path) -> bool:
    """Return whether a folder is a native checkpoint, or one whose manifest is missing, which opening reports."""
    return is_native(folder) or (folder / PARAMETERS).is_dir()


class NativeSource(TensorSource):
    """A native checkpoint."""

    def __init__(self, folder: Path):
        manifest = read_manifest(folder)
        self.folder, self.config = folder, ModelConfig.from_file(folder)
        check_tensor_count(folder, self.config, len(manifest.tensors))
        shapes = {name: tuple(tensor["shape"]) for name, tensor in manifest.tensors.items()}
        check_names_and_shapes(folder, {name: spec.shape for name, spec in abstract(self.config)[1].items()}, shapes)
        self._arrays = {name: open_array(folder / PARAMETERS, name) for name in shapes}
        for name, array in self._arrays.items():
            if (dtype := manifest.tensors[name]["dtype"]) != array.dtype.name or array.shape != shapes[name]:
                found = f"{array.dtype} {list(array.shape)}"
                raise DSMoEError(f"{folder}: tensor {name} is {found}, {dtype} in the manifest")
        self.order = {hf_name: (ours, expert) for hf_name, ours, expert in export_order(self.config)}
        self.sha256 = {name: str(tensor.get("sha256")) for name, tensor in manifest.tensors.items()}
        self.version = manifest.sha256

    def read(self, hf_name: str) -> np.ndarray:
        """Return a view of a tensor."""
        ours, expert = self.order[hf_name]
        return self._arrays[ours] if expert is None else self._arrays[ours][expert]

    def file_of(self, hf_name: str) -> str:
        """Return the folder of the array."""
        return f"{PARAMETERS}/{STATE}/{self.order[hf_name][0]}"


class HFSource(TensorSource):
    """A Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.sha256 = folder, ModelConfig.from_file(folder), {}
        self._reader = CheckpointReader(folder)
        check_tensors(folder, self.config, self._reader)
        self.order = {hf_name: (ours, expert) for hf_name, ours, expert in export_order(self.config)}
        self.version = {"files": file_versions(self._reader), "config": self.config.to_dict()}

    def read(self, hf_name: str) -> np.ndarray:
        """Return a view of a tensor."""
        return self._reader.read(hf_name)

    def file_of(self, hf_name: str) -> str:
        """Return the weight file."""
        return self._reader.tensors[hf_name].file

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [self.folder / file for file in sorted({info.file for info in self._reader.tensors.values()})]

    def __exit__(self, *_: object) -> None:
        """Release the files."""
        self._reader.__exit__()
