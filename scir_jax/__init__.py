"""Self-Consistent Internal Rewards (SCIR) for language models, in JAX.

    run = scir_jax.train("quickstart", run={"directory": "runs/mine"})
    model = scir_jax.load("runs/mine")
    model.sample(["..."], responses=4)

docs/python.md has the rest. Nothing heavy is imported before one of these names is used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scir_jax.config.schema import Config
    from scir_jax.errors import InputError, Interrupted
    from scir_jax.run.loaded import Model, load
    from scir_jax.run.runs import Run
    from scir_jax.train import run as train

__all__ = ["Config", "InputError", "Interrupted", "Model", "Run", "load", "train"]

# Importing transformers would warn that torch is absent, which is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_PLACES = {
    "Config": "config.schema",
    "InputError": "errors",
    "Interrupted": "errors",
    "Model": "run.loaded",
    "Run": "run.runs",
    "load": "run.loaded",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "jax" not in sys.modules:
        importlib.import_module("scir_jax.run.command").without_absent_tpu()
    if name == "train":  # the module, which is called like a function
        return importlib.import_module("scir_jax.train")
    return getattr(importlib.import_module(f"scir_jax.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
