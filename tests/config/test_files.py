"""Configuration files: those that come with the package, by name; what is missing; and how they are written."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from scir_jax.config import cli
from scir_jax.config.checks import check
from scir_jax.config.files import BUNDLED, bundled_names, find, keys, read, to_dict, to_yaml
from scir_jax.config.schema import Config
from tests.config.parsing import parse, refused, write

ROOT = Path(__file__).parents[2]
NAMES = bundled_names()
METHODS = [name for name in NAMES if name.startswith("methods/")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A directory that is not the project's."""
    monkeypatch.chdir(tmp_path)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_the_names_are_the_files():
    top = ROOT / "configs"
    files = {path.relative_to(top).as_posix().removesuffix(".yaml") for path in top.rglob("*.yaml")}
    files = {name for name in files if not name.startswith("studies/")}  # which are no configurations
    assert set(NAMES) == files and NAMES == sorted(NAMES)
    assert {"quickstart", "methods/srlm", "models/llama-3.1-8b"} <= files


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_of_the_package_is_found_by_its_name(name):
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert find(name) == find(f"{name}.yaml") == BUNDLED / f"{name}.yaml"
    assert read(find(name)) == content
    config = parse("--config", name)
    assert config == parse(f"--config={name}") == parse("--config", str(ROOT / "configs" / f"{name}.yaml"))
    # Not one key of the file is lost.
    assert config != Config() or name == "methods/scir", "which says what the defaults are"
    found = to_dict(config)
    for section, values in content.items():
        assert {k: found[section][k] for k in values} == values


def test_names_files_and_options_are_laid_over_each_other(tmp_path):
    own = write(tmp_path, {"pairs": {"per_prompt": 3}, "run": {"seed": 5}})
    config = parse("--config", "quickstart", "--config", "methods/srlm", "--config", own, "--run.iterations=7")
    srlm = read(find("methods/srlm"))
    assert config.world.directory == "runs/world" and config.run.iterations == 7 and config.run.seed == 5
    assert config.pairs.per_prompt == 3 and to_dict(config)["preference"].items() >= srlm["preference"].items()


def test_the_quickstart_is_the_default_of_a_command():
    assert parse(default_config=cli.QUICKSTART) == parse("--config", "quickstart")
    assert parse("--run.seed=3", default_config=cli.QUICKSTART).world.directory == "runs/world"
    assert parse("--config", "methods/srlm", default_config=cli.QUICKSTART).world.directory is None


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "methods/srlm", "methods/srlm.yaml"])
def test_a_users_file_wins(tmp_path, name):
    bundled = parse("--config", name)
    (tmp_path / name).mkdir(parents=True)
    assert parse("--config", name) == bundled, "a directory is no file"
    (tmp_path / name).rmdir()
    write(tmp_path, {"run": {"seed": 77}}, name)
    assert find(name) == Path(name)
    assert parse("--config", name) == parse(f"--config={name}") == parse("--run.seed=77")


@pytest.mark.parametrize(
    "name",
    [
        *("nothing", "nothing.yaml", "srlm", "methods", "methods/srl", "Quickstart", ""),
        *("/quickstart", "configs/quickstart.yaml"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name):
    words = f"--config {name}: no such file, and no configuration of that name; there are {', '.join(NAMES)}"
    assert refused("--config", name) == words
    if name:
        assert refused(f"--config={name}", "--run.seed=1") == words


def test_files_that_are_missing(tmp_path):
    for missing in (tmp_path / "no.yaml", tmp_path):
        assert refused("--config", str(missing)).startswith(f"--config {missing}: no such file")


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_laid_over_the_quickstart(name):
    config = parse("--config", "quickstart", "--config", name)
    found, base = to_dict(config), to_dict(parse("--config", "quickstart"))
    content = read(find(name))
    assert {**base, **{s: {**base[s], **v} for s, v in content.items()}} == found
    check(config)


# --- keys, and back ---------------------------------------------------------------------------------------------------


def test_keys_of_nested_mappings():
    content = {"run": {"seed": 1, "empty": {}}, "rewards": {"weights": {"a": 1, "b": {"c": 2}}}, "lora": {}, "x": None}
    assert keys(content) == ["run.seed", "run.empty", "rewards.weights.a", "rewards.weights.b.c", "lora", "x"]
    assert keys({}) == []


def test_yaml_round_trip(tmp_path):
    config = parse(
        "--run.directory=rüns/x: y", '--rewards.models=["likelihood"]', "--sample.prompts=5",
        "--optimise.learning_rate=1e-7", '--rewards.weights={"likelihood": 0.5, "implicit": 2}',
        '--generative.templates=["standalone","{world}/judge.yaml"]', "--run.compilation_cache=null",
        "--data.prompts=12",
    )  # fmt: skip
    assert config.data.prompts == "12" and config.rewards.weights == {"likelihood": 0.5, "implicit": 2.0}
    text = to_yaml(config)
    assert parse("--config", write(tmp_path, text)) == config
    assert to_dict(config) == yaml.safe_load(text)
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(Config)]
    assert to_dict(Config())["rewards"]["models"] == ["generative", "implicit"]
