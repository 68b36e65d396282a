"""Uploads of a folder to a private repository of the hub: `refuse_upload` checks the request, `upload` uploads."""

from pathlib import Path

from lisa_lightning.runtime.errors import UserError, first_line


def refuse_upload(repo_id: str) -> None:
    """Check a request to upload before anything is written.

    Args:
        repo_id: hub id of the repository, such as owner/name.

    Raises:
        UserError: if the id is not valid, or the hub is switched off by HF_HUB_OFFLINE.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub={repo_id[:80]}: it is no hub id ({first_line(error)}). Fix: name owner/name"
        ) from error
    if is_offline_mode():
        raise UserError(
            f"push_to_hub={repo_id}: HF_HUB_OFFLINE=1 forbids uploads. Fix: unset it, or leave the option out"
        )


def upload(folder: Path, repo_id: str) -> str:
    """Upload a folder to a private model repository of the hub, and return the address of the commit.

    The repository is created if it does not exist. A public repository is rejected, because the model may be harmful.

    Args:
        folder: folder to upload.
        repo_id: hub id of the repository.

    Raises:
        UserError: if the hub rejects the upload or can't be reached, or the repository is public. The folder is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        is_private = api.model_info(repo_id).private
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder) if is_private else None
    except Exception as error:
        raise UserError(
            f"push_to_hub={repo_id}: the hub can't be written ({first_line(error)[:300]}). {folder} holds the model. "
            "Fix: log in (`hf auth login`, or HF_TOKEN with the right to write), and upload the folder"
        ) from error
    if commit is None:
        raise UserError(
            f"push_to_hub={repo_id}: the repository is public, and the model may be harmful. {folder} holds the model. "
            "Fix: make the repository private, or name another one"
        )
    return str(commit.commit_url)
