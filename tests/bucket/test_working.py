"""Working copies of runs in a bucket."""

import os

from scir_jax.bucket.objects import shown
from scir_jax.bucket.working import WorkingCopy, copy_of, place


def written(bucket, before: int) -> list[str]:
    return [name.partition("/")[2] for name in bucket.writes()[before:]]


def test_changes_are_pushed_in_the_order_of_writing(folder, bucket):
    here = WorkingCopy(folder.url)
    for moment, name in enumerate(("b.json", "export/config.json", "a.jsonl", "export/model.safetensors", ".lock")):
        path = here.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        os.utime(path, ns=(moment, moment))
    before = len(bucket.writes())
    # What makes an export a model comes last.
    order = ["b.json", "a.jsonl", "export/model.safetensors", "export/config.json"]
    assert here.push() == order == written(bucket, before)
    assert here.push() == []
    assert here.news() == order and here.news() == []
    (here.path / "a.jsonl").unlink()
    (here.path / "b.json").write_text("changed")
    assert here.push() == ["b.json", "a.jsonl"]
    assert folder.read("b.json") == b"changed" and folder.read("a.jsonl") is None


def test_another_process_goes_on_from_what_is_there(folder):
    first, second = WorkingCopy(folder.url), WorkingCopy(folder.url)
    folder.write("checkpoints/M0/x", b"an array")
    for name in ("x.json", "export/config.json", "export/model.safetensors"):
        (first.path / name).parent.mkdir(exist_ok=True)
        (first.path / name).write_text(name)
    second.pull(first.push())
    assert (second.path / "x.json").read_text() == "x.json"
    assert not (second.path / "checkpoints").exists() and not (second.path / "export/model.safetensors").exists()
    assert second.push() == [], "nothing of it is new"
    (first.path / "x.json").unlink()
    second.pull(first.push())
    assert not (second.path / "x.json").exists()
    # A third one that finds more here than there lets it go.
    (second.path / "y.json").write_text("never pushed")
    second.pull()
    assert not (second.path / "y.json").exists() and (second.path / "export/config.json").exists()
    assert folder.read("export/model.safetensors") and folder.read("checkpoints/M0/x")


def test_an_export_that_is_removed_is_removed_there(folder):
    first = WorkingCopy(folder.url)
    (first.path / "export").mkdir()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        (first.path / "export" / name).write_text(name)
    first.push()
    second = WorkingCopy(folder.url)
    (second.path / "export" / "config.json").write_text("another model")
    (second.path / "export" / "model.safetensors").write_text("in one part")
    second.push()
    assert folder.names() == ["export/config.json", "export/model.safetensors"]


def test_a_run_has_one_place_in_a_process(folder, tmp_path):
    assert place(tmp_path) == tmp_path and copy_of(tmp_path) is None
    path = place(f"{folder.url}/run")
    assert place(f"{folder.url}/run/") == path and copy_of(path / "a" / "b").path == path
    assert shown(f"see {path}/pairs.jsonl:3") == f"see {folder.url}/run/pairs.jsonl:3"
