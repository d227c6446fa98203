"""A cache of the hub's models, laid out as huggingface_hub lays it out, without a network."""

import hashlib
from pathlib import Path


def add(cache: Path, name: str, source: Path, commit: str, branch: str = "main") -> Path:
    """Puts a directory's files into the cache as a commit of OWNER/NAME, to which a branch points; the snapshot."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for directory in (snapshot, folder / "blobs", folder / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, source.iterdir()):
        content = file.read_bytes()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (folder / "refs" / branch).write_text(commit)
    return snapshot
