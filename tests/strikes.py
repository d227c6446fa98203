"""python -m tests.strikes STRIKE ...: the training command, which gets a signal at a chosen call of a function."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable

from markupsafe import Markup

from tests.forks import share_programs

WRITE, SAVE = "scir_jax.run.metrics:Metrics.write", "scir_jax.engine.checkpoint:StageCheckpoints.save"
STORE = "scir_jax.engine.checkpoint:ModelStore.save"
COMMIT = "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize"
COMMIT_IN_BUCKET = "orbax.checkpoint._src.path.atomicity:CommitFileTemporaryPath.finalize"


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal that a process gets at a call of a function.

    Attributes:
      place: "module:function" or "module:Class.function", in the module that looks it up when it calls it.
      call: the number of the call in this process, or its first arguments.
      when: "before" or "after" it, or "twice" before it.
      ahead: programs are compiled before the first stage as ever; else each where it is needed, which is quicker.
      world: what the embedded world that is built has beside its defaults.
    """

    place: str = ""
    call: int | tuple = 1
    when: str = "before"
    signal: int = signal.SIGKILL
    ahead: bool = True
    world: dict = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The interpreter's arguments; those of the training command may follow."""
        return ["-m", "tests.strikes", json.dumps(dataclasses.asdict(self))]

    def prepare(self) -> None:
        """Puts the strike into this process."""
        # The figures of reports take longer than a tiny run.
        _replace("scir_jax.report.page:panel", lambda _: lambda title, draw, size=None: Markup("<svg></svg>"))
        if not self.ahead:
            _replace("scir_jax.run.preflight:check_memory", lambda _: lambda *_: [])
        if self.world:
            _replace("scir_jax.run.base_model:WorldSpec", lambda spec: lambda **given: spec(**given | self.world))
        if self.place:
            _replace(self.place, self._struck)

    def _struck(self, function: Callable) -> Callable:
        calls = 0

        @functools.wraps(function)
        def struck(*arguments, **keywords):
            nonlocal calls
            calls += 1
            first = list(arguments[1:])  # without self
            met = calls == self.call if isinstance(self.call, int) else first[: len(self.call)] == list(self.call)
            if met and self.when != "after":
                os.kill(os.getpid(), self.signal)
                if self.when == "twice":
                    os.kill(os.getpid(), self.signal)
            result = function(*arguments, **keywords)
            if met and self.when == "after":
                os.kill(os.getpid(), self.signal)
            return result

        return struck


def _replace(place: str, change: Callable[[Callable], Callable]) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, change(getattr(owner, name)))


if __name__ == "__main__":
    from scir_jax import train
    from scir_jax.run import command

    share_programs()
    Strike(**json.loads(sys.argv.pop(1))).prepare()
    command.main(train.main)
