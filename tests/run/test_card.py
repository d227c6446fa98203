"""Model cards by the hub's own reader, and uploads to a stand-in for its API."""

import dataclasses
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import filter_repo_objects

from scir_jax import export
from scir_jax.config.files import to_dict
from scir_jax.data.jsonl import write_json
from scir_jax.run import hub
from scir_jax.run.card import CARD, write_card
from scir_jax.run.directory import RunDirectory
from scir_jax.run.manifest import manifest
from tests.run import hub_cache
from tests.run.runs import ITERATIONS, content, refused


@pytest.fixture
def finished(tiny_config, world_dir, tmp_path, monkeypatch):
    """What a card is made of: a run of a hub's model, two models of which are evaluated."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    hub_cache.add(tmp_path / "cache", "someone/tiny-3B", world_dir / "model", "a" * 40)
    config = tiny_config(
        world_dir,
        run=dict(directory=str(tmp_path / "secret" / "run")),
        model=dict(path="someone/tiny-3B"),
        sample=dict(command="KEY=hidden engine {prompts} {output}"),
    )
    run = RunDirectory(tmp_path / "secret" / "run")
    made = manifest(config, {})
    # A data set of the hub, as the manifest of a run on one has it.
    config = to_data(config, heldout_pairs="someone/pairs:test")
    made["sha256"]["data.heldout_pairs"] = "0" * 64
    run.path.mkdir(parents=True)
    write_json(run.path / "manifest.json", made)
    write_json(run.path / "data.json", {"files": {"prompts": {"used": 24}}})
    for t, quality in enumerate((0.25, 0.5)):
        values = {"model": f"M{t + 1}", "generative_accuracy": quality, "agreement": 0.75, "length": 6.5}
        write_json(run.iteration(t) / "evaluation.json", values)
    return SimpleNamespace(config=config, run=run, hashes=made["sha256"])


def to_data(config, **values):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_hub_reads_the_card(finished, world_dir, tmp_path, adapter):
    output = tmp_path / "out"
    output.mkdir()
    if adapter:
        (output / "adapter_config.json").write_text("{}")
    write_card(output, finished.config, finished.run, 2, "me/better")
    card = ModelCard.load(output / CARD)
    data = card.data.to_dict()
    assert data["library_name"] == ("peft" if adapter else "transformers") and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "someone/tiny-3B" and data["datasets"] == ["someone/pairs"]
    assert data["base_model_relation"] == ("adapter" if adapter else "finetune") and "scir_jax" in data["tags"]
    text = card.text
    assert f"`someone/tiny-3B` at {'a' * 40}" in text
    assert "| M1 | 0.250 | 0.750 | 6.5 |" in text and "| M2 | 0.500 | 0.750 | 6.5 |" in text
    assert f"| data.prompts | prompts.jsonl | 24 | `{finished.hashes['data.prompts']}` |" in text
    assert finished.hashes["model.path/model.safetensors"] in text
    # Others read it: neither directories of this machine nor a command's secrets are in it.
    assert not re.search(f"secret|hidden|KEY|{re.escape(str(tmp_path))}|{re.escape(str(world_dir))}", text)
    settings = yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["sample"] == {"responses": 2, "prompts": 8, "batch_size": 8}
    assert settings["generative"] == {"templates": ["judge.yaml"]} and "mesh" not in settings
    ours = to_dict(finished.config)
    assert all(settings[s][k] == ours[s][k] for s in settings for k in settings[s] if s != "generative")
    python = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    compile(python, "card", "exec")
    assert '"me/better"' in python and ("peft" in python) == adapter
    assert ("--lora.adapter me/better" in text) == adapter


def test_a_card_of_the_users_stays_and_ours_is_made_anew(finished, tmp_path):
    path = tmp_path / CARD
    path.write_text("# mine\n")
    write_card(tmp_path, finished.config, finished.run, 2)
    assert path.read_text() == "# mine\n"
    path.unlink()
    write_card(tmp_path, finished.config, finished.run, 1)
    first = path.read_text()
    write_card(tmp_path, finished.config, finished.run, 2)
    assert first != path.read_text() and "This is M2" in path.read_text()


class Api:
    """Keeps what would be sent."""

    sent: dict = {}
    error: Exception | None = None

    def __init__(self, library_name):
        self.sent.clear()

    def create_repo(self, name, *, repo_type, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.sent.update(name=name, private=private, repo_type=repo_type, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        assert repo_id == self.sent["name"] and repo_type == "model" and commit_message
        files = [str(p.relative_to(folder_path)) for p in sorted(folder_path.rglob("*")) if p.is_file()]
        self.sent["files"] = {
            f: (folder_path / f).read_bytes() for f in filter_repo_objects(files, allow_patterns=allow_patterns)
        }
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit")


@pytest.mark.slow
@pytest.mark.documented("export --push")
def test_push_sends_the_model_and_its_card_and_nothing_else(documented, whole, command, tmp_path, monkeypatch):
    (push,) = documented
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(whole.path)
    output = tmp_path / "exported"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for name in ("nobody", "a/b/c", "a b/c"):
        refused(command(export.main, whole.path, output, "--push", name), f"--push {name}", "OWNER/NAME")
        assert not (output / "config.json").exists()
    done = push("--private")
    assert done.code == 0 and "hub/OWNER/NAME/commit" in done.err
    assert Api.sent["private"] and Api.sent["exist_ok"]
    files = Api.sent["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", CARD} <= files.keys()
    assert files["model.safetensors"] == (whole.path / "export" / "model.safetensors").read_bytes()
    assert "notes.txt" not in files and (output / "notes.txt").read_text() == "mine"
    card = ModelCard(files[CARD].decode())
    assert 'from_pretrained("OWNER/NAME")' in card.text and f"This is M{ITERATIONS + 1}" in card.text
    # The run's own export has a card too, with the figures of its table.
    own = ModelCard.load(whole.path / "export" / CARD)
    for row in content(whole.path / "summary.json")["rows"]:
        assert re.search(rf"\| {row['model']} \| {row['quality']:.3f} \|", own.text)
    monkeypatch.setattr(Api, "error", huggingface_hub.errors.LocalTokenNotFoundError("no token"))
    message = refused(command(export.main, whole.path, output, "--push", "me/better"), "hf auth login", output)
    assert "is written" in message
