"""The documents: commands that the program understands, links that lead somewhere, tables that fit, a site."""

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scir_jax.config import cli
from scir_jax.config.checks import check, resolve
from scir_jax.config.files import find
from scir_jax.study.file import read_study
from tests.documents import ALL, BLOCK, DOCUMENTS, PAGES, ROOT, run_by_tests

WIDTH = 100
COMMANDS = [c for c in ALL if c.program.startswith("scir_jax.") and c.arguments]
# What no test runs: the program, and why.
NOT_RUN = {
    "python3": "makes the virtual environment that the tests run in",
    "pip": "needs a package registry; CI installs with README's test command",
    "pytest": "runs these tests",
    "mkdocs serve": "serves until it is stopped; test_the_site_is_built_without_a_warning builds the same site",
}


class Reached(Exception):
    """The command line is read."""


@pytest.fixture
def read(monkeypatch):
    """read(module, arguments): reads a command line as its command does, and checks its configuration."""
    whole = cli.line

    def line(*arguments, **more):
        found = whole(*arguments, **more)
        if "optimise" in (more.get("sections") or ("optimise",)):
            config = resolve(dataclasses.replace(found.config))
            check(config)
        raise Reached

    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **more):
        found = parse(self, *arguments, **more)
        if (getattr(found, "study", None) or "").startswith("studies/"):
            with monkeypatch.context() as patch:
                patch.setattr(cli, "line", whole)
                read_study(found.study, methods=found.methods, seeds=found.seeds, iterations=found.iterations)
        raise Reached

    monkeypatch.setattr(cli, "line", line)

    def read(module: str, arguments: list[str]) -> None:
        name = {"scir_jax.world": "scir_jax.world.__main__", "scir_jax.report": "scir_jax.report.page"}.get(
            module, module
        )
        with monkeypatch.context() as patch:
            if name.rpartition(".")[2] in ("export", "ablate", "page"):
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            with pytest.raises(Reached):
                importlib.import_module(name).main(arguments)

    return read


def test_every_command_of_the_documents_is_run_by_a_test():
    """Or has its reason; and every reason is needed."""
    assert len(COMMANDS) >= 30 and {c.program for c in ALL} >= {
        f"launch/{name}.sh" for name in ("gpu", "slurm", "tpu_vm")
    }
    left = set(ALL) - run_by_tests()
    reasons = {c: [name for name in NOT_RUN if f"{c} ".startswith(f"{name} ")] for c in left}
    assert sorted(str(c) for c in left if not reasons[c]) == []
    assert {name for names in reasons.values() for name in names} == NOT_RUN.keys()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command)[:70])
def test_a_command_is_understood(command, read):
    read(command.program, list(command.arguments))


def test_no_configuration_names_data_that_a_user_must_have():
    for file in (path for path in sorted(ROOT.glob("configs/**/*.yaml")) if path.parent.name != "studies"):
        config, _ = cli.parse("test", "", ["--config", str(find(str(file)))], sections=("data", "world"))
        named = [name for name in ("prompts", "ift", "eft", "heldout_prompts", "heldout_pairs", "pairs")]
        assert all(
            str(getattr(config.data, name)).startswith("{world}/") for name in named if getattr(config.data, name)
        ), file
        assert config.world.directory or not any(getattr(config.data, name) for name in named)


@pytest.mark.parametrize("path", PAGES, ids=DOCUMENTS)
def test_tables_are_not_wider_than_a_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip()[:1] in tuple("|┃│┏└") and len(line) > WIDTH] == []


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=DOCUMENTS)
def test_links_lead_somewhere(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.is_file(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """Every page, link, anchor and docstring of mkdocs.yml; strict, so that a warning fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")}
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in ("train.run", "run.loaded.Model.sample", "method.consistency.penalty", "config.schema.SampleConfig"):
        assert f'id="scir_jax.{name}"' in reference
