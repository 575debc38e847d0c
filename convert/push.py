"""Upload a checkpoint to the Hugging Face Hub: `push`."""

import logging
import tempfile
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import count_parameters
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.atomic_dir import check_new_path, check_space
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.tokenizer import TOKENIZER_FILES

from .exporter import export_hf
from .hub import hub_of, list_files, one_line_errors
from .model_card import model_card

_CARD: Final = "README.md"
# Files of another model in the repository, which a reader could load instead of those of the upload.
_STALE: Final = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_*", "tf_model*", "flax_model*", *TOKENIZER_FILES),
)
_log = logging.getLogger(__name__)


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dtype: Any = None,
    license: str | None = None,
    base_model: str | None = None,
    dry_run: str | Path | None = None,
    progress: Meter = silent,
) -> str:
    """Export a checkpoint with PyTorch code and a model card, and upload it to the Hugging Face Hub.

    Weights are uploaded in chunks; a repeated upload after an interruption sends only what is missing. The export takes
    the size of the checkpoint on disk until the upload is complete. HF_TOKEN and HF_ENDPOINT apply.

    Args:
        checkpoint: Native checkpoint or Hugging Face folder.
        repo_id: Repository to create or update, `owner/name`.
        private: Create a private repository; an existing one keeps its visibility.
        revision: Branch to upload to, created if missing; default: `main`.
        dtype: "float32", "bfloat16" or "float16" to cast; default: the stored dtypes.
        license: License stated in the model card, for example "mit".
        base_model: Hub id of the base model stated in the model card.
        dry_run: New folder to write instead of uploading.
        progress: Progress meter of the export.

    Returns:
        URL of the commit, or the folder of a dry run.

    Raises:
        DSMoEError: The checkpoint is damaged, the disk is too full, or the hub refuses; nothing is left on disk.
    """
    cast_dtype = as_dtype(dtype)
    folder = user_path(checkpoint, "checkpoint")
    config = ModelConfig.from_file(folder)
    card = partial(model_card, folder, repo_id, license=license, base_model=base_model)
    checked_card = card()
    _check_ids(repo_id, base_model)

    def write(output_dir: Path) -> None:
        export_hf(folder, output_dir, dtype=dtype, with_modeling=True, progress=progress)
        (output_dir / _CARD).write_text(card(config=ModelConfig.from_file(output_dir)), encoding="utf-8")

    if dry_run is not None:
        write(check_new_path(dry_run))
        return str(dry_run)
    parent = folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.push.", dir=parent) as temporary:
        export = Path(temporary) / "export"
        stored = as_dtype(config.torch_dtype or "bfloat16")
        check_space(export, count_parameters(config).total * (cast_dtype or stored).itemsize)  # before the hub changes
        _create(repo_id, checked_card, revision, private)
        write(export)
        _log.info("Uploading to %s", repo_id)
        with hub_of(repo_id), one_line_errors(revision or "main", upload=True):
            return _upload(repo_id, export, revision)


def _check_ids(repo_id: str, base_model: str | None) -> None:
    """Raise `DSMoEError` for an id that the hub does not accept."""
    with hub_of(repo_id, needed_by="an upload"):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        try:
            if base_model is not None:
                validate_repo_id(base_model)
        except ValueError as error:
            raise DSMoEError(f"base_model must be a hub id, got {base_model!r}: {error}") from None


def _upload(repo_id: str, folder: Path, revision: str | None) -> str:
    """Commit the files of a folder; return the URL of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    additions = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):  # one at a time: Ctrl-C waits for the threads of several
            HfApi().preupload_lfs_files(repo_id, [addition], revision=revision)
    there, new = list_files(repo_id, revision or "main", upload=True)[1], {path.name for path in folder.iterdir()}
    stale = sorted(name for name in {*there} - new if "/" not in name and any(fnmatchcase(name, a) for a in _STALE))
    if stale:
        _log.info("Removing %s of another model from %s", plural(len(stale), "file"), repo_id)
    if _CARD in there:
        _log.info("Replacing %s of %s", _CARD, repo_id)
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    commit = HfApi().create_commit(repo_id, operations, commit_message="Upload of dsmoe_jax", revision=revision)
    return str(commit.commit_url)


def _create(repo_id: str, card: str, revision: str | None, private: bool) -> None:
    """Create the repository and the branch, unless they exist, after the hub has accepted the model card."""
    with hub_of(repo_id) as constants:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import get_session

        if get_token() is None:
            raise DSMoEError("an upload needs a token: set HF_TOKEN or run `hf auth login`")
        with one_line_errors(revision or "main", upload=True):
            fields = {"content": card, "repoType": "model"}
            checked = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=fields)
            if checked.status_code == 400:
                errors = "; ".join(str(error.get("message")) for error in checked.json().get("errors", ()))
                raise DSMoEError(f"the model card is invalid: {errors}")
            HfApi().create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                HfApi().create_branch(repo_id, branch=revision, exist_ok=True)
