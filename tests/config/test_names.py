"""Short names, what a line gives, and the help of commands."""

import importlib

import pytest

from scir_jax.config import cli, names
from scir_jax.errors import InputError
from tests.config.parsing import refused, write

COMMANDS = (
    "train",
    "sample",
    "judge",
    "plan",
    "doctor",
    "evaluate",
    "world.__main__",
    "export",
    "ablate",
    "report.page",
)

FEW = ("run", "world", "model", "data", "sample", "optimise")  # a parser of all sections takes half a second


def line(*argv, **arguments):
    arguments = {"sections": FEW} | arguments
    return cli.line("test", "a test", argv, default_config="quickstart", **arguments)


def test_short_names_are_the_long_ones():
    found = line("--model", "m", "--prompts=p.jsonl", "--run", "mine", "--eft", "e", "--iterations=3")
    config = found.config
    assert (config.model.path, config.data.prompts, config.run.directory) == ("m", "p.jsonl", "runs/mine")
    assert (config.data.eft, config.run.iterations, config.world.directory) == ("e", 3, None)
    assert found.given == {"model.path", "data.prompts", "run.directory", "data.eft", "run.iterations"}
    assert config == line(*(f"--{k}={v}" for k, v in (
        ("model.path", "m"), ("data.prompts", "p.jsonl"), ("run.directory", "runs/mine"), ("data.eft", "e"),
        ("run.iterations", 3),
    ))).config  # fmt: skip
    assert config.data.ift is config.data.heldout_pairs is config.data.heldout_prompts is None


@pytest.mark.parametrize(
    "name, path", [("a/b", "a/b"), ("/a", "/a"), ("./a", "./a"), (".", "."), ("gs://a/b", "gs://a/b")]
)
def test_a_run_is_a_name_or_a_directory(name, path):
    assert line("--run", name).config.run.directory == path


def test_a_directory_that_is_there_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names.run_directory("here") == "runs/here"
    (tmp_path / "here").mkdir()
    assert names.run_directory("here") == "here"


def test_when_settings_are_proposed(tmp_path):
    file = write(tmp_path, {"sample": {"responses": 3}})
    assert not line().config.run.auto and not line("--run", "x", "--sample.top_k", "8").config.run.auto
    for own in (("--model", "m"), ("--prompts", "p"), ("--model.path=m",)):
        assert line(*own).config.run.auto and line(*own).config.world.directory is None
        assert not line(*own, "--config", file).config.run.auto and not line(*own, "--auto", "false").config.run.auto
        assert line(*own, "--config", file, "--auto").config.run.auto
    assert line("--config", "quickstart").config.world.directory


def test_what_is_given(tmp_path):
    file = write(tmp_path, {"sample": {"responses": 3}, "data": {"columns": {"prompt": "q"}}})
    found = line("--config", file, "--optimise", "{epochs: 2, batch_size: 8}", "--run.seed=1")
    assert found.given == {
        *("sample.responses", "data.columns.prompt", "optimise.epochs", "optimise.batch_size", "run.seed")
    }
    assert line("--config", file, sections=("sample",)).given == {"sample.responses"}


def test_own_options_stand_before_short_names():
    found = line("--prompts", "12", options={"prompts": (int, 1, "number")})
    assert found.options == {"prompts": 12} and found.config.data.prompts != "12" and not found.config.run.auto


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--modle", "did you mean 'model'?"),
        ("--promts=x", "did you mean 'prompts'?"),
        ("--heldout_pair", "did you mean 'heldout_pairs'?"),
        ("--qqqqqq", "--help all lists the keys"),
    ],
)
def test_unknown_short_names(argument, words):
    assert refused(argument, "x") == f"unknown option {argument.partition('=')[0]}; {words}"
    with pytest.raises(InputError):
        line("--model")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_one_screen(module, capsys):
    main = importlib.import_module(f"scir_jax.{module}").main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and 10 <= len(lines) <= 40 and max(map(len, lines)) <= 100
    if module == "sample":
        with pytest.raises(SystemExit) as stop:
            main(["--help", "all"])
        known = {f"--{key}" for key in names.fields(["model", "mesh"])}
        assert stop.value.code == 0 and known <= set(capsys.readouterr().out.replace(",", " ").split())
