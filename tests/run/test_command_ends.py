"""How a command ends: one sentence on stderr and an exit code, or the traceback of a bug."""

import logging
import sys
from types import SimpleNamespace

import pytest

from scir_jax.errors import Diverged, InputError, Interrupted
from scir_jax.run import command
from scir_jax.run.command import main


@pytest.mark.parametrize(
    "error, code, message",
    [
        (InputError("x: wrong"), 2, "error: x: wrong\n"),
        (Diverged("x: not finite"), 5, "error: x: not finite\n"),
        (Interrupted("saved", 15), 143, "saved\n"),
        (
            OSError(28, "No space left on device", "f"),
            3,
            "error: no space left to write f; what was saved before is intact",
        ),
        (ValueError("RESOURCE: No space left on device"), 3, "error: no space left to write; "),
        (
            OSError(30, "Read-only file system", "f"),
            3,
            "error: f: read-only file system; what was saved before is intact: mend the directory and run the same",
        ),
        (ValueError("INTERNAL: Input/output error"), 3, "error: a file: input/output error; what was saved before"),
    ],
)
def test_ends_of_a_command(capsys, error, code, message):
    def run():
        raise error

    with pytest.raises(SystemExit) as end:
        main(run)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == "" and err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(2, "No such file")])
def test_bugs_are_not_hidden(error):
    def run():
        raise error

    with pytest.raises(type(error)):
        main(run)


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (1, 1)])
def test_exit_code(result, code):
    with pytest.raises(SystemExit) as end:
        main(lambda: result)
    assert end.value.code == code


def test_what_an_abandoned_save_says_is_left_out(monkeypatch, caplog):
    said = []
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    command.without_abandoned_saves.__wrapped__()
    for message in ("Event loop is closed", "of another kind"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message)))
    assert [str(met.exc_value) for met in said] == ["of another kind"]
    for message in ("Task exception was never retrieved", "of another kind"):
        logging.getLogger("asyncio").error(message)
    assert caplog.messages == ["of another kind"]
