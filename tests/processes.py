"""Quick compilation, functions of test modules in processes of their own, and what all processes of pytest share."""

import os
import pickle
import sys
import tempfile
from pathlib import Path

import jax

from tests.forks import ROOT, Fork, environment

# Less time to compile, more to run.
QUICK = {"xla_backend_optimization_level": 0}


def quick_jit(function):
    return jax.jit(function, compiler_options=QUICK)


def on_eight_devices(function, *arguments):
    """function(*arguments) in a process with eight devices, quickly compiled."""
    flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in QUICK.items())]
    return elsewhere(function, *arguments, JAX_NUM_CPU_DEVICES="8", XLA_FLAGS=" ".join(flags))


def elsewhere(function, *arguments, **variables):
    """function(*arguments) in a process of its own; arguments and result are pickled, the function by its name."""
    with tempfile.TemporaryDirectory() as directory:
        call, result, out, err = (Path(directory, name) for name in ("call", "result", "out", "err"))
        call.write_bytes(pickle.dumps((function, arguments)))
        command = ["-m", "tests.processes", call, result]
        process = Fork(command, env=environment(**variables), cwd=ROOT, out=out, err=err)
        try:
            assert process.wait(850) == 0, err.read_text()[-4000:]
        finally:
            process.kill()
        return pickle.loads(result.read_bytes())


def shared_directory(tmp_path_factory, name: str) -> Path:
    """Returns a directory of this name that all processes of pytest use."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    return directory


def runs(status: Path) -> bool:
    """Says whether a process, of this file in /proc, is neither gone nor a zombie."""
    try:
        return "zombie" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    function, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(function(*arguments)))
