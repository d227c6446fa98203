"""Models by their hub names, from a cache like huggingface_hub's and without a network."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from scir_jax import judge
from scir_jax.errors import InputError
from scir_jax.run import hub
from scir_jax.run.directory import RunDirectory
from scir_jax.run.manifest import manifest
from scir_jax.run.setup import open_model
from tests.run import hub_cache
from tests.run.runs import refused

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache, empty; names mean nothing yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def named(cache, world_dir):
    hub_cache.add(cache, "someone/tiny", world_dir / "model", FIRST)
    return "someone/tiny"


def test_a_name_is_the_snapshot_of_its_revision(named, cache, world_dir, tiny_config):
    hub_cache.add(cache, named, world_dir / "model", SECOND, branch="other")
    expected = open_model(tiny_config(world_dir))
    for name, commit in ((named, FIRST), (f"{named}@other", SECOND), (f"{named}@{FIRST}", FIRST)):
        config = tiny_config(world_dir, model=dict(path=name))
        arch, encoder = open_model(config)
        assert arch == expected[0] and encoder.chat.stop_ids == expected[1].chat.stop_ids
        found = manifest(config, {})
        assert found["hub"] == {"model.path": {"name": name, "commit": commit}}
        assert found["sha256"] == manifest(tiny_config(world_dir), {})["sha256"]
        assert hub.repository(name) == named
    assert manifest(tiny_config(world_dir), {})["hub"] == {}


def test_a_directory_of_that_name_wins(named, world_dir, tmp_path):
    shutil.copytree(world_dir / "model", tmp_path / named)
    assert hub.directory(named, "model.path").resolve() == tmp_path / named
    assert hub.repository(named) == named and hub.repository("/models/x@y") == "/models/x@y"


def test_a_begun_run_keeps_its_commit(named, cache, world_dir, tiny_config, tmp_path):
    config = tiny_config(world_dir, model=dict(path=named), implicit=dict(reference=f"{named}@main"))
    run = tmp_path / "run"
    run.mkdir()
    made = manifest(config, {})
    assert {key.partition("/")[0] for key in made["sha256"]} >= {"model.path", "implicit.reference"}
    (run / "manifest.json").write_text(json.dumps(made))
    hub_cache.add(cache, named, world_dir / "model", SECOND)
    hub._found.clear()
    assert hub.directory(named, "model.path").name == SECOND
    hub._found.clear()
    RunDirectory(run).keep_models(config)
    assert [hub.directory(name, "").name for name in (named, f"{named}@main")] == [FIRST, FIRST]
    RunDirectory(tmp_path / "new").keep_models(config)


def test_without_network_the_error_says_what_was_looked_for_and_what_to_do(command, judging, world_dir, cache):
    pairs = ("--input", world_dir / "heldout_pairs.jsonl", "--output", "out.jsonl")
    done = command(judge.main, *judging, *pairs, "--model.path", "nobody/nothing@v2")
    refused(done, "model.path 'nobody/nothing@v2'", "no such directory", cache, "nothing at v2", "safetensors", "path")
    done = command(judge.main, *judging, *pairs, "--model.path", "no/such/directory")
    refused(done, "no/such/directory: there is no such model directory")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model some/one, or it is private: hf auth login"),
        (errors.GatedRepoError, "accepted its terms"),
        (errors.RevisionNotFoundError, "some/one has no revision v2 on the hub"),
        (errors.HfHubHTTPError, "the hub does not give some/one: broken"),
    ],
)
def test_what_the_hub_refuses(error, words, monkeypatch):
    def refuse(*_, **__):
        raise error("broken", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=words) as raised:
        hub.directory("some/one@v2", "pairs.scorer")
    assert str(raised.value).startswith("pairs.scorer 'some/one@v2': ") and "\n" not in str(raised.value)


def test_neither_pickles_nor_code_are_fetched(monkeypatch, tmp_path):
    wanted = {}

    def download(repository, *, revision, allow_patterns):
        wanted.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.directory("some/one@v2", "model.path") == tmp_path
    assert (wanted["repository"], wanted["revision"]) == ("some/one", "v2")
    hub.configuration("another/one", "pairs.scorer")
    assert (wanted["repository"], wanted["patterns"]) == ("another/one", ["config.json"])
    assert hub.configuration("some/one@v2", "pairs.scorer") == tmp_path, "what is there is not fetched again"
    assert wanted["repository"] == "another/one"
    hub.directory("third/one", "model.path")
    needed = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    needed += ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    needed += ["generation_config.json", "adapter_config.json", "adapter_model.safetensors"]
    others = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "training_args.bin", "x.pt", "x.gguf"]
    others += ["tokenizer.pkl", "README.md", "adapter_model.bin", "onnx/model.onnx"]
    assert list(filter_repo_objects(needed + others, allow_patterns=wanted["patterns"])) == needed
