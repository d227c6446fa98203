"""An exported directory to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from scir_jax.errors import InputError
from scir_jax.run import hub
from scir_jax.run.card import CARD


def check_name(name: str) -> None:
    """Checks that a model may be called so on the hub, before any work is done.

    Raises:
      InputError: it may not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        right = name.count("/") == 1
    except HFValidationError:
        right = False
    if not right:
        raise InputError(f"--push {name}: expected OWNER/NAME, as the Hugging Face hub calls models")


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Uploads an exported directory as one commit of a model of the hub, which is made where it is not there.

    Only the model's files and its card are sent, whatever else lies in the directory.

    Args:
      name: OWNER/NAME.
      private: of a model that is made here.

    Returns:
      The address of the commit.

    Raises:
      InputError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(library_name="scir_jax")
    try:
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=directory,
            allow_patterns=[*hub.FILES, CARD],
            commit_message="Model and card, written by scir_jax",
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        response = getattr(error, "response", None)
        denied = getattr(response, "status_code", None) in (401, 403)
        if denied or isinstance(error, errors.LocalTokenNotFoundError):
            reason = f"the hub does not let you write there ({reason}): hf auth login with a token that may write"
        raise InputError(f"--push {name}: {reason}; {directory} is written, run the same command again") from None
    return str(commit.commit_url)
