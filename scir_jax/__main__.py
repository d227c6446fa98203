"""scir-jax COMMAND: every command under one name, as python -m scir_jax.COMMAND runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from scir_jax.errors import InputError
from scir_jax.run import command

COMMANDS = {
    "train": ("train", "the whole run; again, it resumes"),
    "doctor": ("doctor", "what this machine can do, and whether the configured run could start on it"),
    "plan": ("plan", "whether a run fits on a TPU slice, and what an iteration costs there"),
    "sample": ("sample", "responses of a model to a file of prompts"),
    "judge": ("judge", "both reward models' probabilities for a file of pairs"),
    "evaluate": ("evaluate", "a run's models, or a model directory, on held-out data"),
    "compare": ("compare", "win rate and length-controlled win rate of two models' answers"),
    "export": ("export", "a checkpoint of a run as a Hugging Face directory"),
    "report": ("report.page", "report.html of a run"),
    "world": ("world.__main__", "an embedded world with a base model that is trained here"),
    "ablate": ("ablate", "methods against each other over seeds"),
}
"""name -> (module, what it does)"""


def run(argv: Sequence[str]) -> int | None:
    """Runs the command that the first argument names.

    Raises:
      InputError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{does}" for name, (_, does) in COMMANDS.items()]
        print("\n".join(["usage: scir-jax COMMAND ...", *lines, "scir-jax COMMAND --help has a command's options."]))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    return importlib.import_module(f"scir_jax.{COMMANDS[argv[0]][0]}").main(list(argv[1:]))


def main() -> None:
    """Runs the console script."""
    command.main(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
