"""The documents: commands that the program understands, links that lead somewhere, tables that fit, a site."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scir_jax.config import cli
from scir_jax.config.checks import check, resolve
from scir_jax.config.files import find
from scir_jax.report import page
from scir_jax.study.file import read_study
from tests.run.runs import content, lines
from tests.small_model import write_data, write_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in PAGES]
WIDTH = 100
MAIN = "python -m scir_jax.train --model models/my-model --prompts prompts.jsonl --run mine"


def commands(document: str) -> list[list[str]]:
    """The commands of a document's shell blocks, and those in its text, as lists of words."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found += [one for one in re.findall(r"`([^`\n]+)`", text) if re.match(r"(python -m|launch/)", one)]
    result = []
    for line in found:
        if "scir_jax." in line or " -- " in line:
            result += [shlex.split(part, comments=True) for part in line.split(" && ")]
    return result


def programs(words: list[str]) -> list[tuple[str, list[str]]]:
    """(module of scir_jax, its arguments) of a command; a launching script gives its last part to train."""
    for place, word in enumerate(words[:-1]):
        if word == "-m" and words[place + 1].startswith("scir_jax."):
            return [(words[place + 1], words[place + 2 :])]
    if words and words[0].startswith("launch/") and "--" in words:
        return [("scir_jax.train", words[words.index("--") + 1 :])]
    return []


ALL = sorted({(module, tuple(rest)) for d in DOCUMENTS for words in commands(d) for module, rest in programs(words)})
NAMED_ALONE = [(module, rest) for module, rest in ALL if not rest]
COMMANDS = [(module, rest) for module, rest in ALL if rest]


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


def test_commands_are_found():
    assert MAIN.split()[2:] in [[module, *rest] for module, rest in COMMANDS]
    assert len(COMMANDS) >= 15 and {module.partition(".")[2] for module, _ in ALL} >= {
        *("train", "sample", "judge", "plan", "doctor", "evaluate", "export", "report", "world", "ablate")
    }


@pytest.mark.parametrize("module, arguments", COMMANDS, ids=[f"{m} {' '.join(a)}"[:70] for m, a in COMMANDS])
def test_a_command_is_understood(module, arguments, read):
    # A shell makes several words of one with braces.
    words = []
    for word in arguments:
        braces = re.fullmatch(r"([\w/]+)\{([\w,]+)\}", word)
        words += [braces[1] + part for part in braces[2].split(",")] if braces else [word]
    read(module, words)


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
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=DOCUMENTS)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
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


@pytest.mark.slow
def test_prompts_are_enough(tmp_path, monkeypatch, command):
    """README's command, with a small random model: it trains, evaluates, exports; again, it keeps what it proposed."""
    monkeypatch.chdir(tmp_path)
    # Its figures take longer than the run.
    monkeypatch.setattr(page, "write_report", lambda path: path / "report.html")
    write_model("qwen3", tmp_path / "models" / "my-model")
    write_data(tmp_path)
    for name in ("ift", "eft", "heldout_prompts", "heldout_pairs"):
        (tmp_path / f"{name}.jsonl").unlink()
    ((module, arguments),) = programs(MAIN.split())
    train = importlib.import_module(module).main
    # A few programs less to compile.
    short = (
        "--iterations",
        1,
        "--text.max_response_tokens",
        8,
        "--evaluate.greedy",
        "false",
        "--run.tensorboard",
        "false",
    )
    done = command(train, *arguments, *short)
    assert done.code == 0, done.err
    proposed = done.err.partition("starting")[0]
    assert "text.max_prompt_tokens" in proposed and "lora.rank" in proposed and "text.max_response" not in proposed
    run = tmp_path / "runs" / "mine"
    assert [row["model"] for row in content(run / "summary.json")["rows"]] == ["M1", "M2"]
    assert all("length" in row for row in content(run / "summary.json")["rows"])
    recorded = cli.of_run(run)
    assert recorded.run.proposed["data.holdout"] and recorded.text.chat_template_kwargs == {"enable_thinking": False}
    assert recorded.generative.templates == ("evaluator",) and recorded.sft.epochs == 0
    rows = [json.dumps(row["messages"]) for row in lines(run / "iteration_01" / "pairs.jsonl")]
    held = [
        json.dumps([{"role": "user", "content": row["prompt"]}])
        for row in lines(run / "iteration_00" / "heldout_responses.jsonl")
    ]
    assert rows and held and not set(rows) & set(held)
    assert (run / "export" / "model.safetensors").exists()
    before = (run / "config.yaml").read_bytes()
    done = command(train, *arguments, *short)
    assert done.code == 0 and "settings that were proposed when the run began stay" in done.err, done.err
    assert (run / "config.yaml").read_bytes() == before
