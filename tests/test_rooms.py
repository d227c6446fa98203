"""The rooms of the package: which may import which, and that nothing goes in a circle."""

import ast
from pathlib import Path

import scir_jax

PACKAGE = Path(scir_jax.__file__).parent
# From the bottom up: a room imports those before it. What is not a package is a command, or is named here.
ROOMS = (
    "errors",
    "bucket",
    "config",
    "text",
    "model",
    "data",
    "method",
    "evaluation",
    "engine",
    "world",
    "run",
    "planning",
    "report",
    "study",
)
COMMANDS = {
    "__main__",
    "world.__main__",
    "train",
    "sample",
    "judge",
    "evaluate",
    "compare",
    "export",
    "plan",
    "doctor",
    "ablate",
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name without "scir_jax."."""
    files = (path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts)
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in files
    }


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that one imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scir_jax":
            base = node.module.removeprefix("scir_jax").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}" if base else alias.name
                found.add(whole if whole in known else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("scir_jax.") for a in node.names if a.name.startswith("scir_jax.")}
    return found


CLOCKS = {"time", "datetime", "date", "datetime.datetime", "datetime.date"}
MODULES = modules()
ARROWS = {name: imports(tree, set(MODULES)) for name, tree in MODULES.items()}


def room(module: str) -> str:
    return module if module in COMMANDS else module.split(".")[0]


def test_every_module_is_in_a_known_place():
    assert {room(name) for name in ARROWS} - {"__init__"} == {*ROOMS, *COMMANDS}


def test_arrows_between_rooms_point_down():
    """No room imports one above it; commands are above all rooms and import no command but train."""
    for name, targets in ARROWS.items():
        for target in targets:
            here, there = room(name), room(target)
            if here in COMMANDS:
                assert there not in COMMANDS, (name, target)
            elif here in ROOMS and here != there:
                assert there in ROOMS and ROOMS.index(there) < ROOMS.index(here), (name, target)


def test_no_import_goes_in_a_circle():
    """Neither when modules are loaded nor within functions."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in ARROWS.get(name, ()):
            visit(target, (*path, name))
        done.add(name)

    for name in ARROWS:
        visit(name, ())


def test_files_are_of_a_size_to_read():
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): lines for path, lines in sizes.items() if lines > 420} == {}


def test_nothing_depends_on_the_time_of_day():
    """Clocks jump, and differ from host to host: durations and leases are measured by monotonic ones."""
    of_day = {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "now", "utcnow", "today"}
    found = {
        f"{name}: {ast.unparse(node)}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in of_day and ast.unparse(node.value) in CLOCKS
    }
    found |= {
        f"{name}: {node.module}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time"
    }
    # An answer of MT-Bench says when it was written.
    assert found == {"run.mt_bench: time.time"}
