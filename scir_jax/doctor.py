"""python -m scir_jax.doctor: what this machine can do, and whether the configured run could start on it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import resolve
from scir_jax.errors import InputError
from scir_jax.run import command

MARKS = {"ok": "ok", "note": "-", "fails": "FAILS"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 where something fails."""
    config, _, given = cli.line("doctor", __doc__, argv, default_config=cli.QUICKSTART)

    from scir_jax.run import auto
    from scir_jax.run.health import findings

    failed = []
    # What stands in the way of proposals is found below: a model or prompts that cannot be read.
    with contextlib.suppress(InputError):
        config = auto.settle(resolve(config), given, begun=True)
    for found in findings(config):
        print(f"{MARKS[found.state]:<6}{found.question:<18}{found.answer}", flush=True)
        failed += [found.question] if found.state == "fails" else []
    if failed:
        print(f"{', '.join(failed)}: see above; the run would not start or not be right")
        return 1
    print("nothing stands in the way")
    return 0


if __name__ == "__main__":
    command.main(main)
