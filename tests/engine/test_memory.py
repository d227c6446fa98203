"""Memory of a run's programs: what is known exactly, what is refused, and that nothing is compiled twice."""

import dataclasses

import jax
import numpy as np
import pytest

from scir_jax import train
from scir_jax.engine.cost import memory
from scir_jax.run.metrics import Metrics
from scir_jax.errors import InputError
from scir_jax.run import console, programs
from scir_jax.run.directory import RunDirectory
from scir_jax.run.iteration import Run
from scir_jax.run.session import Session

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def session(world_dir, tiny_config):
    return Session(tiny_config(world_dir))


def adapted(world_dir, tiny_config, **overrides):
    return Session(tiny_config(world_dir, lora=dict(rank=2), **overrides))


def known(session):
    return {program.name: program.known for program in programs.programs(session)}


def test_weights_optimiser_gradients_and_cache_are_counted_exactly(session, world_dir, tiny_config):
    count, found = session.arch.parameter_count(), known(session)
    assert set(found) == {
        "sample 1 a prompt",
        "sample 2 a prompt",
        "score responses",
        "judge pairs",
        "SFT step",
        "SCIR step",
    }
    # two float32 moments and optax's two counters
    expected = memory.Memory(weights=4 * count, optimiser=8 * count + 4, gradients=4 * count)
    assert found["SFT step"] == found["SCIR step"] == expected
    places = session.shapes.prompt + session.shapes.response
    arch = session.arch
    cache = 2 * arch.num_layers * 8 * 2 * places * arch.num_kv_heads * arch.head_dim * 4
    assert found["sample 2 a prompt"] == memory.Memory(weights=4 * count, cache=cache)

    lora = adapted(world_dir, tiny_config, model=dict(path=session.config.model.path, dtype="bfloat16"))
    adapters = sum(x.size for x in jax.tree.leaves(lora.abstract_trained))
    step = known(lora)["SCIR step"]
    assert adapters < count / 5
    assert step.weights == 2 * count + 4 * adapters
    assert (step.optimiser, step.gradients) == (8 * adapters + 4, 4 * adapters)


def test_programs_ahead_are_the_programs_of_the_run(world_dir, tiny_config, tmp_path):
    config = tiny_config(world_dir, run=dict(directory=str(tmp_path / "run"), iterations=1, tensorboard=False))
    session = Session(config)
    found = dict(programs.check_memory(session))
    assert all(need.other > 0 for need in found.values())
    assert found["SCIR step"].total > found["SCIR step"].weights * 4
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    def probe(x):
        return x + 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(probe)(1)
        directory = RunDirectory(config.run.directory)
        directory.open(config)
        metrics = Metrics(directory.path, tensorboard=False, wandb=False, config={})
        Run(session, directory, metrics, console.Stopper()).run()
        metrics.close()
        directory.close()
    finally:
        jax.monitoring.clear_event_listeners()
    assert "jit(probe)" in compiled  # the test does listen
    assert {"jit(_step)", "jit(sample)"}.isdisjoint(compiled)


def test_what_cannot_fit_is_refused_before_anything_is_compiled(session, monkeypatch):
    def compiling(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(memory, "limit", lambda: 10 * session.arch.parameter_count())
    monkeypatch.setattr(memory, "compiled_bytes", compiling)
    with pytest.raises(InputError, match=r"^SFT step: needs .* GiB a device \(optimiser ") as raised:
        programs.check_memory(session)
    message = str(raised.value)
    assert "\n" not in message
    for advice in ("model.dtype bfloat16", "lora.rank 16", "optimizer.kind adafactor", "mesh.fsdp"):
        assert advice in message


def alone(monkeypatch, name):
    """Leaves one program of a run, which is quicker to compile than all."""
    whole = programs.programs
    monkeypatch.setattr(programs, "programs", lambda session: [p for p in whole(session) if p.name == name])


def test_what_the_compiler_finds_too_large_is_refused(world_dir, tiny_config, monkeypatch):
    alone(monkeypatch, "SCIR step")
    session = adapted(world_dir, tiny_config, optimizer=dict(accumulate=2))
    need = dict(programs.check_memory(session))["SCIR step"]
    assert need.other > need.weights + need.optimiser + need.gradients
    monkeypatch.setattr(memory, "limit", lambda: need.total - 1)
    with pytest.raises(InputError, match=r"^SCIR step: needs .* GiB a device \(other ") as raised:
        programs.check_memory(session)
    message = str(raised.value)
    assert "model.remat full" in message and "optimizer.accumulate" in message
    assert "lora" not in message
    monkeypatch.setattr(memory, "limit", lambda: need.total)
    programs.check_memory(session)


def test_micro_batches_and_rematerialisation_need_less(world_dir, tiny_config, monkeypatch):
    alone(monkeypatch, "SCIR step")

    def need(**overrides):
        session = Session(tiny_config(world_dir, optimise=dict(batch_size=32, learning_rate=1e-3), **overrides))
        return dict(programs.check_memory(session))["SCIR step"].other

    whole = need()
    assert need(optimizer=dict(accumulate=4)) < 0.6 * whole
    path = f"{world_dir}/model"
    assert need(model=dict(path=path, remat="full")) < 0.8 * whole


def test_a_run_that_does_not_fit_leaves_nothing_behind(write_config, command, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 1000)
    done = command(train.main, "--config", write_config())
    assert done.code == 2
    assert "needs" in done.err and "GiB a device" in done.err
    assert not list((tmp_path / "run" / "checkpoints").glob("M*"))
    # The same directory takes the corrected run.
    monkeypatch.undo()
    assert command(train.main, "--config", write_config()).code == 0


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
