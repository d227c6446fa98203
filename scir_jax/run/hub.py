"""Models by their names on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION, through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scir_jax.bucket import fetched
from scir_jax.bucket.objects import in_bucket
from scir_jax.config.names import HUB
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from scir_jax.model.hf.weights import TOKENIZER_FILES

NAME = HUB
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    *TOKENIZER_FILES,
)
"""what is fetched: configurations, safetensors, tokenizers, chat templates; no pickle and no code"""

_found: dict[str, Path] = {}


def directory(name: str, key: str, commit: str | None = None) -> Path:
    """Returns the directory of a model: a local one if there is one of that name, else one that is fetched.

    As long as the process runs a name stands for one directory, whatever happens to a branch in the meantime.

    Args:
      name: a path, gs://BUCKET/PATH, or OWNER/NAME or OWNER/NAME@REVISION.
      key: of the configuration, for errors.
      commit: of the hub that is taken instead of the newest one.

    Raises:
      InputError: there is neither such a directory nor, within reach, such a model.
    """
    if in_bucket(name):
        return fetched.model_directory(name)
    if Path(name).exists() or not NAME.fullmatch(name):
        return Path(name)
    if name not in _found:
        _found[name] = _fetched(name, key, commit)
    return _found[name]


def configuration(name: str, key: str) -> Path:
    """Returns a directory with the config.json of a model, of the hub too; no other file is fetched.

    Args:
      name, key: as `directory`.

    Raises:
      InputError: there is neither such a directory nor, within reach, such a model.
    """
    if Path(name).exists() or not NAME.fullmatch(name):
        return Path(name)
    return _found[name] if name in _found else _fetched(name, key, None, FILES[:1])


def is_function(name: str) -> bool:
    """Checks whether a name is that of a function, module:function, and not of a model."""
    return bool(FUNCTION.fullmatch(name)) and not Path(name).exists()


def names(config: Config) -> dict[str, str]:
    """Returns key of the configuration -> name, of those models that are the hub's."""
    given = {
        "model.path": config.model.path,
        "lora.adapter": config.lora.adapter,
        "pairs.scorer": config.pairs.scorer,
        "implicit.reference": config.implicit.reference,
        "preference.reference": config.preference.reference,
    }
    return {key: name for key, name in given.items() if name and NAME.fullmatch(name) and not Path(name).exists()}


def repository(name: str) -> str:
    """Returns OWNER/NAME of a hub's name without its revision, and a path as it is."""
    return name.partition("@")[0] if NAME.fullmatch(name) and not Path(name).exists() else name


def commits(config: Config) -> dict[str, dict[str, str]]:
    """Returns what the hub's names of a configuration stand for: key -> name and commit."""
    return {key: {"name": name, "commit": directory(name, key).name} for key, name in names(config).items()}


def keep(config: Config, recorded: dict[str, dict[str, str]]) -> None:
    """Lets the names of a begun run stand for the commits that it began with.

    Args:
      recorded: `commits` of then.

    Raises:
      InputError: such a commit is not within reach.
    """
    for key, name in names(config).items():
        if recorded.get(key, {}).get("name") == name:
            directory(name, key, recorded[key]["commit"])


def _fetched(name: str, key: str, commit: str | None, files: Sequence[str] = FILES) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    match = NAME.fullmatch(name)
    wanted, revision = match["repository"], commit or match["revision"]
    try:
        found = huggingface_hub.snapshot_download(wanted, revision=revision, allow_patterns=list(files))
    except errors.GatedRepoError:
        reason = f"the hub gives {wanted} to those who have accepted its terms: do so there, then hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"{wanted} has no revision {revision} on the hub"
    except errors.RepositoryNotFoundError:
        reason = f"the hub has no model {wanted}, or it is private: hf auth login"
    except errors.LocalEntryNotFoundError:
        revised = f" at {revision}" if revision else ""
        reason = (
            f"the cache {constants.HF_HUB_CACHE} does not have the model {wanted}{revised}, and the Hugging Face hub "
            "cannot be reached"
        )
    except Exception as error:
        reason = f"the hub does not give {wanted}: {' '.join(str(error).split())[:200]}"
    else:
        return Path(found)
    raise InputError(
        f"{key} {name!r}: there is no such directory here, and {reason}; or put config.json, *.safetensors and the "
        "tokenizer's files into a directory and give its path"
    )
