"""Sizes of public models by name or from a directory."""

import json
from pathlib import Path

import pytest
import yaml

from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.architecture import Architecture
from scir_jax.planning import architectures
from tests.hub_configs import WEIGHTS

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_shipped_file_is_tested_and_readable():
    assert set(architectures.names()) == set(WEIGHTS)
    for name, weights in WEIGHTS.items():
        config, where = architectures.architecture(f"models/{name}")
        assert name in where
        assert families.read(config, where).parameter_count() == weights


def test_every_committed_configuration_can_be_planned_without_its_model():
    paths = {}
    for file in [*CONFIGS.glob("models/*.yaml"), CONFIGS / "mistral-7b.yaml"]:
        path = yaml.safe_load(file.read_text())["model"]["path"]
        paths[path] = architectures.architecture(path)[1].rsplit(" ", 1)[1]
    assert len(paths) >= 12
    assert paths["models/Mistral-Nemo-Instruct-2407"] == "Mistral-Nemo-Base-2407"
    assert paths["models/Llama-2-7b-chat-hf"] == "Llama-2-7b-hf"
    assert paths["models/gemma-3-1b-it"] == "gemma-3-1b-it"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/LLAMA-3.1-70b-instruct", "Llama-3.1-70B"),
        ("meta-llama/Meta-Llama-3.1-8B/", "Llama-3.1-8B"),
        ("Llama-3-8B", "Meta-Llama-3-8B"),
        ("google/gemma-2-27b-it", "gemma-2-27b"),
    ],
)
def test_variants_of_one_shape_share_a_file(path, name):
    assert architectures.architecture(path) == (architectures.known(name), f"the known sizes of {name}")


def test_a_directory_with_a_config_goes_first(tmp_path):
    directory = tmp_path / "Mistral-7B-v0.1"
    directory.mkdir()
    assert architectures.architecture(str(directory))[0]["hidden_size"] == 4096
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert architectures.architecture(str(directory)) == ({"hidden_size": 8}, str(directory / "config.json"))


@pytest.mark.parametrize("name", ["Mistral-7B-Instruct-v0.2", "unheard-of", "", "instruct"])
def test_an_unknown_model_is_refused_with_those_that_are_known(name):
    with pytest.raises(InputError, match="download the model's config.json") as raised:
        architectures.architecture(f"models/{name}" if name else "")
    assert "Llama-3.1-70B" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json: "):
        architectures.architecture(str(tmp_path))
