"""The commands of the documents: of their shell blocks, of their text, and of the help of the launching scripts."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from scir_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in PAGES]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("launch/*.sh"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


@dataclasses.dataclass(frozen=True, order=True)
class Command:
    """A command as a reader types it.

    Attributes:
      program: "scir_jax.train", "launch/gpu.sh", "pip".
      arguments: its words.
      variables: of the environment, NAME=VALUE, that stand before it.
      line: as it stands in the document.
    """

    program: str
    arguments: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    line: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        return shlex.join((self.program.removeprefix("scir_jax."), *self.arguments))


def lines(document: str) -> list[str]:
    """The command lines of a page's shell blocks and of its text, or of the examples in a script's help."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".sh"):
        blocks = re.findall(r"^examples?\n(.*?)^HELP$", text, re.S | re.M)
    else:
        blocks = [block for language, block in BLOCK.findall(text) if language == "sh"]
    found = [line.strip() for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    if not document.endswith(".sh"):
        named = (" ".join(one.split()) for one in re.findall(r"`([^`]+)`", BLOCK.sub("", text)))
        # A program that is named alone is no command.
        found += [one for one in named if re.match(r"(python -m [\w.]+|launch/\S+|scir-jax \w+) ", one)]
    return found


def commands(line: str) -> Iterator[Command]:
    """The commands of a line, and the training that a launching script starts."""
    for text in [line] if "{ " in line else line.split(" && "):
        words = shlex.split(text, comments=True)
        variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
        words = words[len(variables) :]
        if not words:
            continue
        if len(words) > 2 and words[0].endswith("python") and words[1] == "-m":
            words = words[2:]
        elif words[0] == "scir-jax":
            words = [f"scir_jax.{words[1]}", *words[2:]]
        program = words[0].removeprefix(".venv/bin/")
        yield Command(program, tuple(words[1:]), tuple(variables), text)
        if program.startswith("launch/") and "--" in words and "--dry-run" not in words:
            yield Command("scir_jax.train", tuple(words[words.index("--") + 1 :]), (), text)


ALL = sorted({command for name in (*DOCUMENTS, *SCRIPTS) for line in lines(name) for command in commands(line)})


def find(words: str) -> Command:
    """The documents' only command of the program that has these words, or has these words alone: "judge few.jsonl"."""
    program, *parts = shlex.split(words)
    of = [command for command in ALL if program in (command.program, command.program.removeprefix("scir_jax."))]
    found = [command for command in of if command.arguments == tuple(parts)]
    found = found or [command for command in of if set(parts) <= set(command.arguments)]
    assert len(found) == 1, f"{words!r} are words of {len(found)} commands: {', '.join(map(str, found))}"
    return found[0]


class Documented:
    """A command of the documents that a test runs.

    Attributes:
      used: whether the test has asked for its words.
    """

    def __init__(self, command: Command, run):
        self.command, self.used, self._run = command, False, run

    def words(self, instead: Mapping[str, object] | None = None) -> list[str]:
        """Its arguments, with other texts in the place of those that `instead` names."""
        self.used = True
        result = list(self.command.arguments)
        for text, other in (instead or {}).items():
            result = [word.replace(text, str(other)) for word in result]
        return result

    def __call__(self, *small, instead: Mapping[str, object] | None = None):
        """Runs it with settings of the small model beside its own words -> how it ends."""
        options = {str(word).partition("=")[0] for word in small if str(word).startswith("--")}
        assert not options & set(self.command.arguments) - {"--config"}, "the document's words are to win"
        module, _ = COMMANDS[self.command.program.removeprefix("scir_jax.")]
        return self._run(importlib.import_module(f"scir_jax.{module}").main, *self.words(instead), *small)


def run_by_tests() -> set[Command]:
    """The commands that the marks `documented` of the tests name; their fixture sees to it that each is used."""
    found = set()
    for path in ROOT.glob("tests/**/test_*.py"):
        text = path.read_text(encoding="utf-8")
        if "mark.documented" not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node for part in function.decorator_list for node in ast.walk(part) if isinstance(node, ast.Call)]
            marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.documented"]
            assert not marks or "documented" in [arg.arg for arg in function.args.args], (path, function.name)
            found |= {find(ast.literal_eval(words)) for mark in marks for words in mark.args}
    return found
