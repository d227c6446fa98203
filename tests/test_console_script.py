"""scir-jax COMMAND: the same mains under one name."""

import configparser
import importlib
import re
from pathlib import Path

import pytest

from scir_jax import __main__ as script
from scir_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def test_the_console_script_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "scir-jax" and getattr(importlib.import_module(module), function) is script.main


def test_every_command_of_the_readme_is_there(capsys):
    named = re.findall(r"^\| `python -m scir_jax\.(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert named and set(named) == set(script.COMMANDS)
    assert script.run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", listed, re.M) for name in named)


@pytest.mark.parametrize("name", script.COMMANDS)
def test_a_command_is_the_module_s_own(name, capsys):
    with pytest.raises(SystemExit) as end:
        script.run([name, "--help"])
    assert end.value.code == 0
    assert f"python -m scir_jax.{name}" in capsys.readouterr().out


def test_no_command_and_an_unknown_one(capsys):
    assert script.run([]) == 2 and "usage: scir-jax" in capsys.readouterr().out
    with pytest.raises(InputError, match="no command 'trian'; there are train, "):
        script.run(["trian"])
