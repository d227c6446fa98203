"""What a machine can do, and whether a configured run could start on it: one finding for each question."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.bucket.fetched import weights_of
from scir_jax.bucket.objects import Folder, in_bucket
from scir_jax.config.checks import check, resolve
from scir_jax.config.files import BUNDLED
from scir_jax.config.schema import Config
from scir_jax.engine.cost import memory
from scir_jax.engine.cost.chips import of_device
from scir_jax.engine.cost.memory import GIB
from scir_jax.engine.mesh import check_model, make_mesh
from scir_jax.errors import InputError
from scir_jax.model import decoder, lora
from scir_jax.model.attention import IMPLEMENTATIONS, attention, chosen, refusal
from scir_jax.run import hub
from scir_jax.run.models import adapters_of
from scir_jax.run.preflight import check_references
from scir_jax.run.scorer import read_reward_model, user_function
from scir_jax.run.setup import open_model

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain")
TOKENS, SEGMENT = 300, 100
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}
"""largest error of attention and its gradients, as a share of the largest value"""


class Finding(NamedTuple):
    """An answer: "ok", "note" (it works, but), or "fails"; and a sentence."""

    question: str
    state: str
    answer: str


def findings(config: Config) -> Iterator[Finding]:
    """Answers every question, the machine's first and then the configuration's."""
    yield _asked("versions", _versions)
    yield _asked("devices", _devices)
    yield _asked("bfloat16", _bfloat16)
    for implementation in IMPLEMENTATIONS:
        if implementation not in ("auto", "xla"):
            yield _asked(f"attention {implementation}", functools.partial(_attention, config, implementation))
    yield _asked("to the bit", _deterministic)
    yield _asked("settings", lambda: _settings(config))
    yield _asked("model", lambda: _model(config))
    if config.pairs.scorer:
        yield _asked("pairs.scorer", lambda: _scorer(config))
    if config.sample.command:
        yield _asked("sample.command", lambda: _sampler(config.sample.command))
    yield _asked("data", lambda: _data(config))
    yield _asked("disk", lambda: _disk(config))


def _asked(question: str, answer: Callable[[], tuple[str, str]]) -> Finding:
    """Asks; an error of the user's or the machine's is an answer too."""
    try:
        return Finding(question, *answer())
    except InputError as error:
        return Finding(question, "fails", str(error))
    except Exception as error:  # a broken driver may raise anything
        return Finding(question, "fails", " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _versions() -> tuple[str, str]:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return "ok", f"Python {platform.python_version()}, {', '.join(found)}"


def _devices() -> tuple[str, str]:
    devices, limit = jax.devices(), memory.limit()
    kind = devices[0].device_kind
    chip = of_device(kind)
    speed = f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16" if chip else "not in the table of chips: no MFU is shown"
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    return "ok", f"{len(devices)} x {kind}{hosts}{cores}, {limit / GIB:.1f} GiB each, {speed}"


def _bfloat16() -> tuple[str, str]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.bfloat16)
    found = np.asarray(jnp.matmul(x, x, preferred_element_type=jnp.float32))
    exact = np.asarray(x, np.float64) @ np.asarray(x, np.float64)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    return (
        ("ok", f"products are exact to {error:.0e}")
        if error < 1e-2
        else ("fails", f"products are wrong by {error:.0e}")
    )


def _attention(config: Config, name: str) -> tuple[str, str]:
    backend = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    dtype = config.model.dtype
    if reason := refusal(name, backend, dtype, None):
        return "note", reason
    if name == "splash" and backend == "cpu":
        return "note", "interpreted on a CPU, for tests alone"
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(2, TOKENS, heads, 64)).astype(np.float32) for heads in (4, 2, 2, 4))
    segments = None if name == "cudnn" else np.arange(TOKENS, dtype=np.int32)[None].repeat(2, 0) // SEGMENT

    def run(implementation: str, to: str) -> list[np.ndarray]:
        def loss(*rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed = attention(*rows, segments_BT=segments, implementation=implementation, backend=backend)
            return (mixed.astype(jnp.float32) * weight).sum(), mixed

        rows = [jnp.asarray(x, to) for x in (q, k, v)]
        (_, mixed), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*rows)
        return [np.asarray(x, np.float32) for x in (mixed, *gradients)]

    expected = run("xla", "float32")
    error = max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(run(name, dtype), expected, strict=True))
    taken = chosen("auto", backend, dtype, tokens=4096, head_dim=64)
    auto = "; long rows take it" if config.model.attention == "auto" and taken == name else ""
    if error > TOLERANCE[dtype]:
        return "fails", f"values and gradients in {dtype} are off by {error:.0e} of the largest"
    return "ok", f"values and gradients in {dtype} are within {error:.0e} of the largest{auto}"


def _deterministic() -> tuple[str, str]:
    if jax.default_backend() != "gpu" or "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", ""):
        return "ok", "the same step gives the same bits"
    return "note", "a GPU repeats a step to the bit with XLA_FLAGS=--xla_gpu_deterministic_ops=true alone"


def _settings(config: Config) -> tuple[str, str]:
    check(config)
    mesh = make_mesh(config.mesh)
    return "ok", f"mesh {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())}, {config.model.dtype}"


def _model(config: Config) -> tuple[str, str]:
    config = resolve(config)
    path = Path(config.model.path)
    if config.world.directory and not (path / "config.json").is_file():
        return "note", f"{path}: the embedded world is not there yet; the run makes it"
    arch, encoder = open_model(config)
    path = hub.directory(config.model.path, "model.path")
    check_model(make_mesh(config.mesh), arch)
    check_references(config, arch, encoder.chat)
    weights = _weights(path)
    templates = ", ".join(judge.template.name for judge in encoder.judges)
    return "ok", (
        f"{path}: {arch.parameter_count():,} parameters, {weights}, context "
        f"{arch.max_positions}, judge templates {templates}"
    )


def _scorer(config: Config) -> tuple[str, str]:
    name = config.pairs.scorer
    if hub.is_function(name):
        user_function(name)
        return "ok", f"{name}: a function that is called on the first host"
    path = hub.directory(name, "pairs.scorer")
    arch, _, _ = read_reward_model(path, name)
    check_model(make_mesh(config.mesh), arch)
    return "ok", f"{path}: {arch.parameter_count():,} parameters, {_weights(path)}, context {arch.max_positions}"


def _weights(path: Path) -> str:
    """Says how large a model directory's weights are."""
    files = [(weights_of(file), file) for file in path.glob("*.safetensors")]
    size = sum(away.holds()[0] if away else file.stat().st_size for away, file in files)
    if not size:
        raise InputError(f"{path}: holds no .safetensors file")
    return f"{size / GIB:.1f} GiB of weights"


def _sampler(command: str) -> tuple[str, str]:
    """Asks the shell for the program that a command of sample.command begins with."""
    words = command.replace("{engines}", str(BUNDLED / "engines")).split()
    # VARIABLE=value before a command is the shell's.
    name = next((word for word in words if not re.match(r"\w+=", word)), "")
    if not re.fullmatch(r"[\w./+-]+", name):
        return "note", f"runs {command!r}; its first word is not looked for"
    found = subprocess.run(["sh", "-c", 'command -v "$1"', "sh", name], capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"the shell finds no program {name!r}, with which sample.command begins: give its whole path")
    return "ok", f"runs {found.stdout.strip()}: {command}"


def _data(config: Config) -> tuple[str, str]:
    config = resolve(config)
    keys = ("prompts", "pairs", "ift", "eft", "heldout_prompts", "heldout_pairs")
    given = {key: getattr(config.data, key) for key in keys if getattr(config.data, key)}
    missing = [f"data.{key} {path}" for key, path in given.items() if "://" not in path and not Path(path).exists()]
    if missing and config.world.directory:
        return "note", "the run makes the embedded world's files"
    # A name that is no path may be a data set's on the hub.
    absent = [one for one in missing if Path(one.split(" ", 1)[1]).suffix]
    if absent:
        raise InputError(f"no such file: {', '.join(absent)}; leave out the option of a file that you do not have")
    if not given:
        return "note", "no data are set: give --data.prompts FILE"
    return "ok", ", ".join(given)


def _disk(config: Config) -> tuple[str, str]:
    if in_bucket(config.run.directory):
        Folder(config.run.directory).probe()
        return "ok", f"{config.run.directory} can be read and written"
    place = Path(config.run.directory).absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise InputError(f"run.directory {config.run.directory}: {place} cannot be written")
    free = shutil.disk_usage(place).free
    name = resolve(config).model.path
    if (config.world.directory or not hub.NAME.fullmatch(name)) and not Path(name, "config.json").is_file():
        return "ok", f"{free / GIB:.1f} GiB are free at {place}"
    arch, _ = open_model(resolve(config))
    # Trained weights are float32, and a checkpoint has the optimiser's two moments beside them; the export is whole.
    adapters = adapters_of(config.lora)
    trained, _ = lora.split(decoder.define(arch, lora=adapters).abstract(), adapters)
    copies = config.run.iterations + 2 + 3 * config.checkpoint.keep
    need = 4 * (copies * sum(x.size for x in jax.tree.leaves(trained)) + arch.parameter_count())
    text = f"{free / GIB:.1f} GiB are free at {place}; models and checkpoints of a run take about {need / GIB:.1f}"
    if free < need:
        raise InputError(f"{text}; free some space, or lower checkpoint.keep")
    return "ok", text
