"""Command lines: YAML files and dotted options to a typed configuration, and what is refused."""

import dataclasses
import os

import pytest

from scir_jax.config import cli
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from tests.config.parsing import parse, refused, write

# --- what is understood -----------------------------------------------------------------------------------------------


def test_defaults():
    assert parse() == Config()


def test_files_and_options_are_laid_over_each_other(tmp_path):
    first = write(tmp_path, {"sample": {"responses": 3, "top_k": 5}, "rewards": {"models": ["implicit"]}}, "1.yaml")
    second = write(tmp_path, {"sample": {"responses": 7}, "run": {"directory": "there"}}, "2.yaml")
    config = parse("--config", first, "--config", second)
    assert (config.sample.responses, config.sample.top_k, config.run.directory) == (7, 5, "there")
    assert config.rewards.models == ("implicit",)
    assert parse(f"--config={second}", f"--config={first}").sample.responses == 3
    config = parse("--config", first, "--sample.responses", "9", "--sample.top_p=0.5", "--optimise.learning_rate=2e-6")
    assert (config.sample.responses, config.sample.top_k, config.sample.top_p) == (9, 5, 0.5)
    assert config.optimise.learning_rate == 2e-6
    # Whatever comes later wins, a file too.
    assert parse("--sample.responses", "9", "--config", first).sample.responses == 3


def test_values_of_every_type():
    config = parse(
        "--run.tensorboard=false", "--sample.prompts=12", "--data.prompts=p.jsonl", "--mesh.data=-1",
        '--rewards.models=["generative","likelihood"]', "--consistency.kind=js", "--sample.temperature=0",
    )  # fmt: skip
    assert config.run.tensorboard is False and config.sample.prompts == 12 and config.data.prompts == "p.jsonl"
    assert config.rewards.models == ("generative", "likelihood") and config.consistency.kind == "js"
    assert config.mesh.data == -1 and config.sample.temperature == 0 and isinstance(config.sample.temperature, float)
    assert parse("--sample.prompts=null").sample.prompts is None


def test_empty_files(tmp_path):
    assert parse("--config", write(tmp_path, "")) == parse("--config", write(tmp_path, "# nothing\n")) == Config()


def test_options_of_a_command():
    own = {"output": (str, ..., "file"), "count": (int, 3, "number")}
    config, values = cli.parse("x", "y", ["--output=o", "--run.seed=5"], options=own)
    assert values == {"output": "o", "count": 3} and config.run.seed == 5
    assert cli.parse("x", "y", ["--output", "o", "--count", "4"], options=own)[1]["count"] == 4
    assert "output" in refused(options=own)
    assert refused("--output=o", "--count=many", options=own)
    assert refused("--outputs=o", options=own) == "unknown option --outputs; did you mean 'output'?"


def test_the_default_configuration(tmp_path):
    path = write(tmp_path, {"run": {"seed": 4}})
    assert parse(default_config=path).run.seed == 4
    assert parse("--run.iterations=7", default_config=path).run == dataclasses.replace(
        Config().run, seed=4, iterations=7
    )
    other = write(tmp_path, {"run": {"iterations": 1}}, "other.yaml")
    assert parse("--config", other, default_config=path).run.seed == 0
    assert parse(f"--config={other}", default_config=path).run.seed == 0
    missing = str(tmp_path / "no.yaml")
    assert refused(default_config=missing).startswith(f"--config {missing}: no such file")
    assert parse("--config", other, default_config=missing).run.iterations == 1


def test_a_command_takes_the_sections_that_it_reads(tmp_path):
    file = write(tmp_path, {"sample": {"responses": 3}, "optimise": {"epochs": 9}, "run": {"seed": 2}})
    config = parse("--config", file, "--sample.top_k=4", sections=("sample", "run"))
    assert (config.sample.responses, config.sample.top_k, config.run.seed) == (3, 4, 2)
    assert config.optimise == Config().optimise
    assert parse(f"--config={file}", sections=("sample",)).sample.responses == 3
    assert parse(f"--config={file}", sections=("text",)) == Config(), "none of the file's sections is read"
    assert refused("--optimise.epochs=2", sections=("sample",)).startswith("unknown option --optimise.epochs")
    wrong = write(tmp_path, {"optimise": {"epoch": 9}})
    assert "unknown key 'optimise.epoch'" in refused("--config", wrong, sections=("sample",))


def test_a_flag_may_stand_alone():
    own = {"with_ids": (bool, False, ""), "output": (str, ..., "")}
    for argv, value in (
        (["--output", "x"], False),
        (["--with_ids", "--output", "x"], True),
        (["--output", "x", "--with_ids"], True),
        (["--with_ids", "false", "--output", "x"], False),
        (["--with_ids=true", "--output", "x"], True),
    ):
        assert cli.parse("judge", "", argv, options=own)[1]["with_ids"] is value


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optimise.learning_rat", "did you mean 'optimise.learning_rate'?"),
        ("consistency.wieght", "did you mean 'consistency.weight'?"),
        ("sampling.responses", "did you mean 'sample.responses'?"),
        ("zzzzzzzz.reference", "did you mean 'implicit.reference'?"),
        ("qqqq.xxxx", "--help all lists the keys"),
    ],
)
def test_unknown_keys(tmp_path, key, nearest):
    section, _, leaf = key.partition(".")
    file = write(tmp_path, {section: {leaf: 1}})
    assert refused("--config", file) == f"{file}: unknown key {key!r}; {nearest}"
    assert refused(f"--config={file}") == f"{file}: unknown key {key!r}; {nearest}"
    assert refused(f"--{key}", "1") == f"unknown option --{key}; {nearest}"
    assert refused(f"--{key}=1") == f"unknown option --{key}; {nearest}"


@pytest.mark.parametrize(
    "content",
    [
        {"optimisee": {}},
        {"optimisee": 5},
        {"seed": 3},
        {5: 6},
        {"run": {"seed": 1, "sed": 2}},
        {"run": {7: 2}},
        {"config": "x.yaml"},
    ],
)
def test_unknown_sections_and_keys(tmp_path, content):
    file = write(tmp_path, content)
    assert refused("--config", file).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("sample", "responses", "many"),
        ("sample", "responses", 1.5),
        ("sample", "responses", None),
        ("sample", "responses", [4]),
        ("optimise", "learning_rate", "fast"),
        ("consistency", "kind", "kll"),
        ("rewards", "models", "generative"),
        ("rewards", "models", ["generative", "other"]),
        ("run", "tensorboard", "perhaps"),
        ("run", "directory", ["a"]),
        ("run", "directory", {"a": 1}),
    ],
)
def test_wrong_types(tmp_path, section, key, value):
    file = write(tmp_path, {section: {key: value}})
    assert f"{section}.{key}" in refused("--config", file)
    assert f"{section}.{key}" in refused("--config", file, sections=(section,))
    if key != "directory" and value is not None:  # on the command line anything is a text
        assert f"{section}.{key}" in refused(f"--{section}.{key}={value}")


@pytest.mark.parametrize("sections", [None, ("sample",), ("run",)])
@pytest.mark.parametrize("value, found", [(5, "int"), ("text", "str"), (["seed"], "list")])
def test_a_section_that_is_no_mapping(tmp_path, value, found, sections):
    file = write(tmp_path, {"run": value})
    assert refused("--config", file, sections=sections) == f"{file}: 'run' must be a mapping of keys, found {found}"


@pytest.mark.parametrize("sections", [None, ("sample",), ("sample", "run")])
def test_a_section_without_keys_changes_nothing(tmp_path, sections):
    file = write(tmp_path, "run:\n# seed: 1\noptimise: {}\nsample:\n  responses: 3\n")
    assert parse("--config", file, sections=sections) == parse("--sample.responses=3")


def test_arguments_without_their_option():
    for argv in (("word",), ("--run.seed",), ("--config",), ("--run.seed=1", "2")):
        assert refused(*argv)


@pytest.mark.parametrize(
    "content", [b"run: [", b"run:\n\tseed: 1\n", b"a: b: c\n", b"run: {seed: \xff}\n", b"a: 1\n---\nb: 2\n", b"\x00"]
)
@pytest.mark.parametrize("sections", [None, ("sample",)])
def test_files_that_are_no_yaml(tmp_path, content, sections):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    assert refused("--config", str(file), sections=sections).startswith(f"{file}: not a YAML file: ")


@pytest.mark.parametrize("content, found", [("- run\n", "list"), ("just text", "str"), ("5", "int")])
def test_files_that_are_no_mapping(tmp_path, content, found):
    file = write(tmp_path, content)
    assert refused("--config", file) == f"{file}: expected a mapping of sections, found {found}"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{0}]",
        "!!python/object/new:os.mkdir [[{0}]]",
        "!!python/name:os.system",
        "!!python/tuple [a]",
        "!x 5",
    ],
)
@pytest.mark.parametrize("place", ["run:\n  directory: {}\n", "{}\n", "{}: 5\n"])
def test_yaml_cannot_run_code(tmp_path, tag, place):
    made = tmp_path / "made"
    value = tag.format(made)
    file = write(tmp_path, place.format(value))
    assert refused("--config", file).startswith(f"{file}: not a YAML file: ")
    if place.startswith("run"):
        try:
            assert parse(f"--run.directory={value}").run.directory == value, "an option's value is text"
        except InputError:
            pass
    assert not os.path.exists(made)
