"""How a command begins: the backends that JAX is let look for."""

import importlib.util
import os

import pytest

from scir_jax.run.command import GOOGLE, without_absent_tpu


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(vendors, modules, **environment) -> JAX_PLATFORMS after the start, None where it is not set."""

    def start(vendors=(), modules=("libtpu",), **environment):
        for number, vendor in enumerate(vendors):
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plugins = tmp_path / "jax_plugins"
        for name in modules:
            (plugins / name).mkdir(parents=True)
            (plugins / name / "__init__.py").touch()
        spec = importlib.util.spec_from_loader("jax_plugins", None, is_package=True)
        spec.submodule_search_locations = [str(plugins)] if len(modules) > 1 else []
        found = {"libtpu": spec if "libtpu" in modules else None, "jax_plugins": spec}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name])
        without_absent_tpu(tmp_path)
        return os.environ.get("JAX_PLATFORMS")

    return start


def test_libtpu_without_a_tpu_is_not_asked(machine):
    assert machine(vendors=["0x8086", "0x10de"]) == "cpu"


@pytest.mark.parametrize(
    "how, expected",
    [
        (dict(vendors=["0x8086", GOOGLE]), None),
        (dict(modules=()), None),
        (dict(modules=("libtpu", "xla_cuda12")), None),
        (dict(JAX_PLATFORMS="tpu"), "tpu"),
        (dict(JAX_FORCE_TPU_INIT="1"), None),
    ],
)
def test_all_else_is_left_to_jax(machine, how, expected):
    assert machine(**how) == expected
