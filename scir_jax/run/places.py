"""Where the files of a run lie, on a disk or in a bucket, and how hosts come to have what each of them wrote."""

from __future__ import annotations

import time
from pathlib import Path

from etils import epath

from scir_jax.bucket.working import copy_of
from scir_jax.engine.hosts import hosts


def checkpoints_of(path: Path) -> Path:
    """Returns where the checkpoints of a run lie: in its directory, or in the bucket."""
    copy = copy_of(path)
    return path / "checkpoints" if copy is None else epath.Path(copy.folder.url) / "checkpoints"


def sync(path: Path) -> None:
    """Lets all hosts have what each of them wrote of the run that a path belongs to. All hosts call it, as a barrier.

    In a bucket it is from then on what a killed run goes on from.
    """
    copy = copy_of(path)
    if copy is None:
        hosts.barrier(f"sync {path}")
        return
    for host, names in enumerate(hosts.gather(copy.news())):
        if host != hosts.index():
            copy.pull(names)


def save(path: Path, seconds: float = 0.0) -> None:
    """Brings what this host wrote of the run that a path belongs to into its bucket; on a disk it is there already.

    Args:
      seconds: not before so many have passed since the last time.
    """
    copy = copy_of(path)
    if copy is not None and time.monotonic() - copy.pushed >= seconds:
        copy.push()
