"""Memory of a run's programs: what is known exactly, what is refused, and that nothing is compiled twice."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from scir_jax import train
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.cost import memory
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.report import page
from scir_jax.run import console, iteration
from scir_jax.run.directory import RunDirectory
from scir_jax.run.manifest import manifest
from scir_jax.run.metrics import Metrics
from scir_jax.run.models import Models
from scir_jax.run.preflight import check_memory
from scir_jax.run.setup import prepare, templates_of
from tests.training import ANSWERS_ALONE

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def programs(world_dir, tiny_config):
    return prepare(tiny_config(world_dir)).programs


@pytest.fixture
def only_the_scir_step(monkeypatch):
    """Leaves one program of a run, which is quicker to compile than all."""
    monkeypatch.setattr(Programs, "all", lambda programs: [programs.optimise_program()])


def checked(programs: Programs) -> dict[str, memory.Memory]:
    return dict(check_memory(programs.config, programs))


def known(programs: Programs) -> dict[str, memory.Memory]:
    return {program.name: program.known for program in programs.all()}


def test_weights_optimiser_gradients_and_cache_are_counted_exactly(programs, world_dir, tiny_config):
    arch, lengths, found = programs.arch, programs.facts.lengths, known(programs)
    count = arch.parameter_count()
    assert set(found) == {
        f"prefill, {lengths.prompt} tokens",
        "decode, 16 slots",
        f"score, {lengths.scored} tokens",
        f"judge, {lengths.judges[0]} tokens",
        "SFT step",
        "SCIR step",
    }
    # two float32 moments and optax's two counters
    expected = memory.Memory(weights=4 * count, optimiser=8 * count + 4, gradients=4 * count)
    assert found["SFT step"] == found["SCIR step"] == expected
    assert (
        found[f"score, {lengths.scored} tokens"]
        == found[f"judge, {lengths.judges[0]} tokens"]
        == memory.Memory(weights=4 * count)
    )
    places = lengths.prompt + lengths.answer
    cache = 2 * arch.num_layers * 8 * 2 * places * arch.num_kv_heads * arch.head_dim * 4
    assert found["decode, 16 slots"] == memory.Memory(weights=4 * count, cache=cache)

    model = dict(path=programs.config.model.path, dtype="bfloat16")
    lora = prepare(tiny_config(world_dir, lora=dict(rank=2), model=model)).programs
    adapters = sum(x.size for x in jax.tree.leaves(lora.abstract_trained))
    step = known(lora)["SCIR step"]
    assert adapters < count / 5
    assert step.weights == 2 * count + 4 * adapters
    assert (step.optimiser, step.gradients) == (8 * adapters + 4, 4 * adapters)


@pytest.mark.slow
def test_programs_ahead_are_the_programs_of_the_run(world_dir, tiny_config, tmp_path):
    config = tiny_config(world_dir, run=dict(directory=str(tmp_path / "run"), iterations=1, tensorboard=False))
    encoder, inputs, programs, parameters = prepare(config)
    found = checked(programs)
    assert all(need.other > 0 for need in found.values())
    assert found["SCIR step"].total > found["SCIR step"].weights * 4
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    def probe(x):
        return x + 1

    directory = RunDirectory(config.run.directory)
    directory.open(config)
    directory.check_manifest(manifest(config, templates_of(encoder)))
    metrics = Metrics(directory.path, tensorboard=False, wandb=False, config={})
    models, stopper = Models(ModelStore(directory.checkpoints), programs, parameters), console.Stopper()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(probe)(1)
        stages = iteration.recipe(config, encoder, inputs, programs, models, directory, metrics, stopper)
        iteration.run_stages(stages, directory, stopper)
    finally:
        jax.monitoring.clear_event_listeners()
    metrics.close()
    directory.close()
    assert models.store.numbers() == [0, 1, 2]
    assert "jit(probe)" in compiled  # the test does listen
    assert {"jit(_step)", "jit(_decode)", "jit(_admit)"}.isdisjoint(compiled)
    # The states that SFT and SCIR training begin with, and neither the scorer nor the judge.
    assert compiled.count("jit(<lambda>)") == 2


def test_what_cannot_fit_is_refused_before_anything_is_compiled(programs, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 10 * programs.arch.parameter_count())
    monkeypatch.setattr(Program, "compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(InputError, match=r"^SFT step: needs .* GiB per device \(optimiser ") as raised:
        checked(programs)
    message = str(raised.value)
    assert "\n" not in message
    for advice in ("model.dtype bfloat16", "lora.rank 16", "training.optimizer adafactor", "mesh.fsdp"):
        assert advice in message


@pytest.mark.slow
def test_what_the_compiler_finds_too_large_is_refused(world_dir, tiny_config, monkeypatch, only_the_scir_step):
    programs = prepare(tiny_config(world_dir, lora=dict(rank=2), training=dict(accumulate=2), **ANSWERS_ALONE)).programs
    need = checked(programs)["SCIR step"]
    assert need.other > need.weights + need.optimiser + need.gradients
    monkeypatch.setattr(memory, "limit", lambda: need.total - 1)
    with pytest.raises(InputError, match=r"^SCIR step: needs .* GiB per device \(other ") as raised:
        checked(programs)
    message = str(raised.value)
    assert "model.remat full" in message and "training.accumulate" in message
    assert "lora" not in message
    monkeypatch.setattr(memory, "limit", lambda: need.total)
    checked(programs)


@pytest.mark.slow
def test_micro_batches_and_rematerialisation_need_less(world_dir, tiny_config, only_the_scir_step):
    def need(**overrides):
        batch = dict(batch_size=32, learning_rate=1e-3)
        config = tiny_config(world_dir, optimise=batch, **ANSWERS_ALONE, **overrides)
        return checked(prepare(config).programs)["SCIR step"].other

    whole = need()
    assert need(training=dict(accumulate=4)) < 0.6 * whole
    path = f"{world_dir}/model"
    assert need(model=dict(path=path, remat="full")) < 0.8 * whole


@pytest.mark.slow
def test_a_run_that_does_not_fit_leaves_nothing_behind(write_config, command, tmp_path, monkeypatch):
    alone = dict(run=dict(iterations=0), data=dict(heldout_prompts=None, heldout_pairs=None))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "limit", lambda: 1000)
        done = command(train.main, "--config", write_config())
    assert done.code == 2
    assert "needs" in done.err and "GiB per device" in done.err
    assert not list((tmp_path / "run" / "checkpoints").glob("M*"))
    # The same directory takes the corrected run.
    monkeypatch.setattr(page, "write_report", lambda path: path / "report.html")
    assert command(train.main, "--config", write_config(**alone)).code == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("M*")) == ["M0", "M1"]


def test_limit_is_the_containers_where_it_is_smaller(monkeypatch):
    whole = memory.limit()
    assert whole > 2**28
    monkeypatch.setattr(memory.Path, "is_file", lambda path: path.name == "memory.max")
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "268435456\n")
    assert memory.limit() == 2**28 // jax.local_device_count()


def test_device_bytes_of_split_arrays():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"a": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding), "b": np.zeros(5, np.int16)}
    assert memory.device_bytes(tree) == 8 * 3 * 4 + 10


def test_memory_totals_its_parts():
    parts = memory.Memory(1, 2, 3, 4, 5)
    assert parts.total == 15 == sum(dataclasses.astuple(parts))


def test_the_peak_is_that_of_the_fullest_device_or_of_the_process(monkeypatch):
    most, whose = memory.peak()
    held = np.ones(2**26, np.uint8)
    assert whose == "process" and 2**26 < most <= memory.peak()[0] and held.all()
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 9, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.peak() == (9, "device")
    devices.append(SimpleNamespace(memory_stats=lambda: None))
    assert memory.peak()[1] == "process"
