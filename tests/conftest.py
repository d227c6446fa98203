"""Shared fixtures: a small embedded world with a random model, and configurations for it."""

import dataclasses
import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from markupsafe import Markup

from scir_jax.config.files import to_yaml
from scir_jax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    GenerativeConfig,
    ModelConfig,
    OptimiseConfig,
    ReplayConfig,
    RunConfig,
    SampleConfig,
    SFTConfig,
    TextConfig,
    WorldConfig,
)
from scir_jax.model import decoder, families
from scir_jax.model.hf import weights
from scir_jax.report import page
from scir_jax.run import command as commands
from scir_jax.world.files import WorldSpec, write_world
from tests import documents
from tests.fake_cluster import Cluster
from tests.forks import look_seldom_for_garbage
from tests.processes import quick_jit, shared_directory

# A third of the time to compile for a CPU. XLA reads its flags when the first program is compiled, and ends at one that
# it does not know: later versions than these may not, and libtpu's does not.
if jax.__version_info__ < (0, 11) and not ("TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu")):
    flags = (os.environ.get("XLA_FLAGS"), "--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))

# Compilation is most of the tests' time. The fixture `optimised` is for those that ask what the compiler makes of a
# program.
jax.config.update("jax_disable_most_optimizations", True)

PANEL = page.panel
page.panel = lambda title, draw, size=None: Markup("<svg></svg>")


def pytest_collection_finish():
    look_seldom_for_garbage()


@pytest.fixture
def optimised():
    """Compiles as runs do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def drawn():
    """Draws the figures of reports, which take longer than a tiny run; other tests leave them out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "panel", PANEL)
        yield


@pytest.fixture(scope="module")
def few_functions():
    """Forgets what was compiled. JAX counts the variants of the first 8,192 jitted functions of a process only."""
    jax.clear_caches()


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """A world of few rows; `model/` is a Hugging Face directory with random weights. Read only."""
    directory = tmp_path_factory.mktemp("world") / "world"
    spec = WorldSpec(
        base_documents=8,
        base_comparisons=8,
        ift_documents=24,
        eft_comparisons=12,
        prompts=24,
        heldout_prompts=8,
        heldout_pairs=8,
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        head_dim=8,
    )
    write_world(directory, spec)
    untrained = directory / "untrained"
    config = weights.hf_config(untrained)
    arch = families.read(config, str(untrained))
    params = quick_jit(decoder.define(arch).init)(jax.random.key(0))
    # Larger than at initialisation, so that the distributions are far from uniform.
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: np.asarray(p if path[-1].key == "scale" else 12 * p), params
    )
    weights.save(directory / "model", arch, params, config=config, source=untrained)
    return directory


def _tiny_config(world_dir, **overrides) -> Config:
    """A configuration with small batches; overrides are a mapping a section: sample=dict(responses=3)."""
    world = str(world_dir)
    config = Config(
        run=RunConfig(iterations=1, tensorboard=False),
        world=WorldConfig(directory=world),
        model=ModelConfig(path=f"{world}/model"),
        data=DataConfig(
            prompts=f"{world}/prompts.jsonl",
            ift=f"{world}/ift.jsonl",
            eft=f"{world}/eft.jsonl",
            heldout_prompts=f"{world}/heldout_prompts.jsonl",
            heldout_pairs=f"{world}/heldout_pairs.jsonl",
        ),
        text=TextConfig(max_prompt_tokens=32, max_response_tokens=12),
        sft=SFTConfig(ift_batch_size=8, eft_batch_size=8, learning_rate=1e-3),
        sample=SampleConfig(responses=2, prompts=8, batch_size=8),
        generative=GenerativeConfig(templates=(f"{world}/judge.yaml",)),
        replay=ReplayConfig(eft_batch_size=8),
        optimise=OptimiseConfig(batch_size=8, learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=2),
        evaluate=EvaluateConfig(batch_size=8, samples=1),
    )
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in overrides.items()}
    return dataclasses.replace(config, **sections)


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(world_dir, **overrides) -> Config."""
    return _tiny_config


@pytest.fixture(scope="session")
def compiled_directory(tmp_path_factory):
    """Compiled programs that the tests' runs share, whichever process of pytest compiles them first."""
    return shared_directory(tmp_path_factory, "compiled")


@pytest.fixture(scope="module")
def cheap_compilation(compiled_directory):
    """Compilations of the module's runs are kept between them."""
    values = {
        "jax_compilation_cache_dir": str(compiled_directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def write_config(tmp_path, world_dir):
    """write_config(**overrides) -> YAML file of a tiny run in tmp_path/run, without building a world."""

    def write(**overrides):
        run = dict(directory=str(tmp_path / "run"), **overrides.pop("run", {}))
        config = _tiny_config(world_dir, run=run, world=dict(directory=None), **overrides)
        path = tmp_path / "tiny.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        return path

    return write


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys):
    """command(module.main, *arguments) -> Done: as its process would end; an uncaught exception comes through."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            commands.main(lambda: main([str(argument) for argument in arguments]))
        return Done(stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def documented(request, command):
    """The documents' commands that the test's marks `documented` name, in order; it has to use each of them."""
    marks = reversed(list(request.node.iter_markers("documented")))
    found = [documents.Documented(documents.find(words), command) for mark in marks for words in mark.args]
    yield found
    assert [str(one.command) for one in found if not one.used] == []


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for the programs that launch/ calls."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()
