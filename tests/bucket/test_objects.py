"""Objects of a bucket: whole or not there, conditions, and what a store refuses."""

import pytest

from scir_jax.bucket import objects
from scir_jax.bucket.objects import Folder, in_bucket, refusal, shown
from scir_jax.bucket.outputs import output, upload
from scir_jax.config import cli
from scir_jax.errors import InputError, Unavailable


@pytest.mark.parametrize("name", ["runs/a", "/a/b", "C:/a", "data.jsonl", "OWNER/NAME@v1"])
def test_names_of_disks(name):
    assert not in_bucket(name)


def test_only_one_scheme_is_known():
    assert in_bucket("gs://a/b")
    with pytest.raises(InputError, match="s3://a/b: of buckets only gs://BUCKET/PATH is read and written"):
        in_bucket("s3://a/b")
    for url in ("gs://", "gs:///a", "gs://a//b"):
        with pytest.raises(InputError, match="is no address in a bucket; write gs://BUCKET/PATH"):
            Folder(url)


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(objects, "EXTRAS", ("package_that_is_not_there", "google.nothing.below"))
    with pytest.raises(InputError, match=r"gs://a/b: a bucket needs the extra \[gcs\]: pip install"):
        Folder("gs://a/b")


def test_objects_are_written_read_listed_and_deleted(folder):
    assert folder.read("a") is None and folder.names() == []
    for number in range(10):  # more than one page of a listing
        folder.write(f"x/{number}", bytes([number]) * 5)
    assert folder.names() == [f"x/{number}" for number in range(10)]
    assert folder.read("x/3") == b"\3" * 5 and folder.read("x/3", 1, 3) == b"\3" * 2
    assert Folder(f"{folder.url}/x").names() == [str(number) for number in range(10)], "names below a folder only"
    folder.delete("x/3")
    folder.delete("x/3")
    assert folder.read("x/3") is None


def test_conditions(folder):
    _, nothing = folder.read_generation("a")
    first = folder.write("a", b"1", nothing)
    assert first and folder.write("a", b"2", nothing) is None, "it is there by now"
    second = folder.write("a", b"2", first)
    assert second and folder.write("a", b"3", first) is None and folder.read("a") == b"2"
    folder.delete("a", first)
    assert folder.read("a") == b"2", "another generation stays"
    folder.delete("a", second)
    assert folder.read("a") is None


def test_a_write_whose_answer_is_lost_has_happened(folder, bucket):
    _, nothing = folder.read_generation("a")
    bucket.faults(lose_at=1)
    generation = folder.write("a", b"1", nothing)
    assert generation == folder.read_generation("a")[1] and folder.read("a") == b"1"


def test_what_a_store_refuses_is_one_sentence(folder, bucket):
    bucket.faults(deny_at=1)
    with pytest.raises(InputError, match=f"^{folder.url}: may not be read and written by this account; give it roles/"):
        folder.write("a", b"1")
    with pytest.raises(InputError, match="^gs://another/a: there is no bucket another"):
        Folder("gs://another/a").write("b", b"1")
    bucket.faults(stop_at=1)
    with pytest.raises(Unavailable, match="what was written before is intact, the same command goes on"):
        folder.write("a", b"1")
    assert refusal(ValueError("something else")) is None


def test_large_files_go_in_parts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "LARGE", 1000)
    content = bytes(range(256)) * 20
    (tmp_path / "a").write_bytes(content)
    folder.upload("a", tmp_path / "a")
    assert folder.read("a") == content and folder.holds("a")[0] == 5120


def test_outputs_are_there_when_a_command_succeeds(folder, tmp_path):
    assert output(tmp_path) == tmp_path
    place = cli.output_file(f"{folder.url}/rows.jsonl")
    place.write_text("{}\n")
    model = output(f"{folder.url}/model")
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "weights"):
        (model / name).write_text(name)
    assert shown(place) == f"{folder.url}/rows.jsonl" and folder.names() == []
    upload()
    assert folder.names() == ["model/config.json", "model/tokenizer.json", "model/weights", "rows.jsonl"]
    assert folder.read("rows.jsonl") == b"{}\n"
