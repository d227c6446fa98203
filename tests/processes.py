"""Quick compilation, and functions of test modules in processes of their own."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

# Less time to compile, more to run.
QUICK = {"xla_backend_optimization_level": 0}
ROOT = Path(__file__).parents[1]


def quick_jit(function):
    return jax.jit(function, compiler_options=QUICK)


def on_eight_devices(function, *arguments):
    """function(*arguments) in a process with eight devices, quickly compiled."""
    flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in QUICK.items())]
    return elsewhere(function, *arguments, JAX_NUM_CPU_DEVICES="8", XLA_FLAGS=" ".join(flags))


def elsewhere(function, *arguments, **environment):
    """function(*arguments) in a process of its own; arguments and result are pickled, the function by its name."""
    with tempfile.TemporaryDirectory() as directory:
        call, result = Path(directory, "call"), Path(directory, "result")
        call.write_bytes(pickle.dumps((function, arguments)))
        done = subprocess.run(
            [sys.executable, "-m", "tests.processes", str(call), str(result)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=850,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return pickle.loads(result.read_bytes())


if __name__ == "__main__":
    function, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(function(*arguments)))
