"""Upload a checkpoint to the Hugging Face Hub: `push`."""

import logging
import shutil
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import count_parameters
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.atomic_dir import check_new_path, check_space, folder_size, staging_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.text.tokenizer import TOKENIZER_FILES

from .exporter import export_hf
from .hub import hub_of, is_repo_id, list_files, one_line_errors, resolve
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
    evaluation: str | Path | None = None,
    dry_run: str | Path | None = None,
    progress: Meter = silent,
) -> str:
    """Export a checkpoint with PyTorch code and a model card, and upload it to the Hugging Face Hub.

    Weights are uploaded in chunks; a repeated upload after an interruption sends only what is missing. The export,
    `.NAME.push` beside the checkpoint (of a hub id: in the current folder), takes the size of the checkpoint until the
    upload ends; the next push removes or resumes that of a killed one. HF_TOKEN and HF_ENDPOINT apply. Weights,
    adapters and tokenizers of another model in the repository are removed.

    Args:
        checkpoint: Native checkpoint, Hugging Face folder or hub id.
        repo_id: Repository to create or update, `owner/name`.
        private: Create a private repository; an existing public one is an error.
        revision: Branch to upload to, created if missing; default: `main`.
        dtype: "float32", "bfloat16" or "float16" to cast; default: the stored dtypes.
        license: License stated in the model card, for example "mit".
        base_model: Hub id of the base model stated in the model card.
        evaluation: Output folder of `dsmoe evaluate`, whose scores the model card states; default: `scores` beside the
            checkpoint, if they are of this checkpoint.
        dry_run: New folder to write instead of uploading.
        progress: Progress meter of the export.

    Returns:
        URL of the commit, or the folder of a dry run.

    Raises:
        DSMoEError: The checkpoint is damaged, the disk is too full, or the hub refuses; nothing is left on disk.
    """
    cast_dtype = as_dtype(dtype)
    _check_ids(repo_id, base_model)
    output = None if dry_run is None else check_new_path(dry_run)
    folder, from_hub = resolve(checkpoint, name="checkpoint"), is_repo_id(checkpoint)
    config = ModelConfig.from_file(folder)
    stated: dict[str, Any] = {"license": license, "base_model": base_model, "evaluation": evaluation}
    stated["origin"] = {"repository": str(checkpoint), "revision": folder.name} if from_hub else None

    def card(config: ModelConfig) -> str:
        return model_card(folder, repo_id, config=config, **stated)

    checked_card = card(config)
    export = partial(export_hf, folder, dtype=dtype, with_modeling=True, card=card, progress=progress)
    if output is not None:
        export(output)
        return str(dry_run)
    home = Path.cwd() / Path(checkpoint).name if from_hub else folder.resolve()
    staging = home.with_name(f".{home.name}.push")
    with lock_name(home, "push.lock"):
        shutil.rmtree(staging, ignore_errors=True)  # of a killed push
        stored = as_dtype(config.torch_dtype or "bfloat16")
        needs = count_parameters(config).total * (cast_dtype or stored).itemsize
        check_space(staging, needs - folder_size(staging_path(staging)))  # before the hub changes
        _create(repo_id, checked_card, revision, private)
        try:
            export(staging)
            _log.info("Uploading to %s", repo_id)
            with hub_of(repo_id), one_line_errors(revision or "main", purpose="upload"):
                return _upload(repo_id, staging, revision)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


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
        if base_model == repo_id:
            raise DSMoEError("base_model must be another repository")


def _upload(repo_id: str, folder: Path, revision: str | None) -> str:
    """Commit the files of a folder; return the URL of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    additions = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):  # one at a time: Ctrl-C waits for the threads of several
            HfApi().preupload_lfs_files(repo_id, [addition], revision=revision)
    there, new = list_files(repo_id, revision or "main", purpose="upload")[1], {path.name for path in folder.iterdir()}
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
        with one_line_errors(revision or "main", purpose="upload"):
            fields = {"content": card, "repoType": "model"}
            checked = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=fields)
            if checked.status_code == 400:
                errors = "; ".join(str(error.get("message")) for error in checked.json().get("errors", ()))
                raise DSMoEError(f"the model card is invalid: {errors}")
            HfApi().create_repo(repo_id, private=private, exist_ok=True)
            info = HfApi().model_info(repo_id, timeout=constants.HF_HUB_ETAG_TIMEOUT) if private else None
        if info is not None and not info.private:
            raise DSMoEError("private is set, but the repository exists and is public; nothing was uploaded")
        with one_line_errors(revision or "main", purpose="upload"):
            if revision is not None:
                HfApi().create_branch(repo_id, branch=revision, exist_ok=True)
