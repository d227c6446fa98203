"""Model and adapter directories to and from meshes: eight devices of one process, and two processes with four each."""

import dataclasses
import math
import os
import pickle
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from scir_jax.config.schema import MeshConfig
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import abstract_params
from scir_jax.errors import InputError
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import LINEARS, Architecture, Layer
from scir_jax.model.families import read
from scir_jax.model.hf import adapters, tensors, transfer, weights

MESHES = {1: ((1, 8, 1), (2, 2, 2)), 2: ((1, 8, 1), (4, 2, 1))}  # by the number of processes
STORED = ("float32", "bfloat16", "float16")
LORA = lora.Lora(3, 6.0, tuple(LINEARS))
MERGED = "qwen3 q/k norms, head_dim, tied head"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models of every family, in several files, by name; `adapter` beside each holds adapters for it."""
    from tests import families  # torch, which the other processes do without

    rng = np.random.default_rng(0)
    made = {}
    for number, case in enumerate((*families.FOREMOST.values(), families.CASES[3], families.CASES[9])):
        config = case.hf_config().to_dict()
        arch = read(config, "config.json")
        draw = lambda s: rng.normal(size=s.shape).astype(np.float32)
        directory, dtype = tmp_path_factory.mktemp("model"), STORED[number % len(STORED)]
        params = jax.tree.map(draw, decoder.define(arch).abstract())
        weights.save(directory / "model", arch, params, config=config, dtype=dtype, max_shard_bytes=30_000)
        trained = jax.tree.map(draw, lora.split(decoder.define(arch, lora=LORA).abstract(), LORA)[0])
        adapters.save(directory / "adapter", arch, LORA, trained, base_model="base")
        made[str(case)] = SimpleNamespace(directory=directory, arch=arch, config=config, dtype=dtype)
    return made


class Counted:
    """In place of safe_open: counts the bytes that are read of tensors."""

    read = 0

    def __init__(self, *arguments, **options):
        self.file = COUNTED_OPEN(*arguments, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountedSlice(self.file.get_slice(name))


class CountedSlice:
    def __init__(self, view):
        self.view = view
        self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

    def __getitem__(self, index):
        value = self.view[index]
        Counted.read += value.nbytes
        return value


COUNTED_OPEN = tensors.safe_open


def files_of(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def held(specs, itemsize):
    """Bytes of what this process's devices hold, what several of them hold counted once."""
    total = 0
    for spec in jax.tree.leaves(specs):
        mine = np.zeros(spec.shape, bool)
        for index in spec.sharding.addressable_devices_indices_map(spec.shape).values():
            mine[index] = True
        total += int(mine.sum()) * itemsize
    return total


# --- in processes of their own ----------------------------------------------------------------------------------------


def load_and_save(made, sizes, output):
    """What a process finds of a model on a mesh: its parts, bytes read, and errors. It writes where it is the first."""
    mesh = meshes.make_mesh(MeshConfig(*sizes))
    writer = jax.process_index() == 0
    model = decoder.define(made.arch, compute_dtype="bfloat16", lora=LORA)
    trained, frozen = lora.split(abstract_params(model, mesh), LORA)
    whole = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=s.sharding), frozen)
    result = {}

    def load(name, abstract, function):
        Counted.read = 0
        params = function()
        leaves = jax.tree_util.tree_leaves_with_path(params)
        result[name] = {
            jax.tree_util.keystr(path): (x.shape, [(s.index, np.asarray(s.data)) for s in x.addressable_shards])
            for path, x in leaves
        }
        result[name, "kept"] = jax.tree.all(
            jax.tree.map(lambda s, x: s.sharding == x.sharding and s.dtype == x.dtype, abstract, params)
        )
        result[name, "read"] = Counted.read
        return params

    params = load("model", whole, lambda: weights.load(made.directory / "model", whole)[1])
    load("frozen", frozen, lambda: weights.load(made.directory / "model", frozen)[1])
    adapted = load("adapter", trained, lambda: adapters.load(made.directory / "adapter", made.arch, LORA, trained))
    itemsize = 4 if made.dtype == "float32" else 2
    result["model", "held"] = result["frozen", "held"] = held(whole, itemsize)
    result["adapter", "held"] = held(trained, 4)

    output.mkdir(parents=True)
    options = dict(config=made.config, dtype=made.dtype, max_shard_bytes=30_000, writer=writer)
    weights.save(output / "model", made.arch, params, **options)
    adapters.save(output / "adapter", made.arch, LORA, adapted, base_model="base", writer=writer)
    Counted.read = 0
    with weights.stored_tensors(made.directory / "model") as base:
        read = Counted.read
        merged = adapters.merged(base, adapted, LORA, wanted=writer)
        weights.save(output / "merged", made.arch, merged, **options)
    result["merged", "read"] = Counted.read - read
    # A writer that cannot write must not leave the others waiting for it.
    (output / "file").write_text("")
    try:
        weights.save(output / "file", made.arch, params, **options)
    except InputError as error:
        result["error"] = str(error)
    (output / "file").unlink()
    multihost_utils.sync_global_devices("after an error")
    return result


def worker(directory, address, processes, process):
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    assert jax.device_count() == 8 and jax.process_count() == processes
    tensors.safe_open = Counted
    transfer._BLOCK = 1000  # some rows of the embedding at a time
    models = pickle.loads((directory / "models.pickle").read_bytes())
    if processes > 1:
        models = {name: models[name] for name in (MERGED, "llama biases")}
    results = {
        (name, sizes): load_and_save(made, sizes, directory / str(process) / name.replace("/", "") / str(number))
        for name, made in models.items()
        for number, sizes in enumerate(MESHES[processes])
    }
    (directory / f"results{process}.pickle").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module", params=MESHES, ids=["one process", "two processes"])
def found(request, models, tmp_path_factory):
    """(directory, results of each process)."""
    directory = tmp_path_factory.mktemp("found")
    (directory / "models.pickle").write_bytes(pickle.dumps(models))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // request.param)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, directory, address, str(request.param), str(process)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(request.param)
    ]
    try:
        errors = [process.communicate(timeout=850)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), "\n".join(error[-3000:] for error in errors)
    return directory, [pickle.loads((directory / f"results{p}.pickle").read_bytes()) for p in range(request.param)]


# --- what they found --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_device_has_its_part_of_what_one_device_has(found, models):
    _, results = found
    for name, sizes in results[0]:
        made = models[name]
        _, expected = weights.load(made.directory / "model")
        halved = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), expected)
        trained = adapters.load(made.directory / "adapter", made.arch, LORA)
        for kind, tree in (("model", expected), ("frozen", halved), ("adapter", trained)):
            leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
            split = 0
            for result in (process[name, sizes] for process in results):
                assert result[kind, "kept"] and result[kind].keys() == leaves.keys()
                for path, (shape, parts) in result[kind].items():
                    assert shape == leaves[path].shape and len(parts) == 8 // len(results)
                    for index, part in parts:
                        assert part.dtype == leaves[path].dtype
                        np.testing.assert_array_equal(part, leaves[path][index], err_msg=f"{name} {sizes} {path}")
                    split += parts[0][1].size < leaves[path].size
            assert split, (name, sizes, kind)


@pytest.mark.slow
def test_only_what_a_process_holds_is_read_and_once(found, models):
    _, results = found
    for (name, sizes), result in results[0].items():
        sources = {kind: (models[name].directory / kind).glob("*.safetensors") for kind in ("model", "adapter")}
        stored = {
            kind: sum(x.nbytes for path in paths for x in load_file(path).values()) for kind, paths in sources.items()
        }
        stored["frozen"] = stored["model"]
        for process in results:
            for kind, size in stored.items():
                read = process[name, sizes][kind, "read"]
                assert read == process[name, sizes][kind, "held"], (name, sizes, kind)
                # With the data axis across the processes, each holds a whole model.
                assert (read == size) == (len(results) == 1 or sizes[0] > 1), (name, sizes, kind)
        # The base model is read where its merged form is written.
        assert [process[name, sizes]["merged", "read"] for process in results] == [stored["model"], 0][: len(results)]
        if sizes == (1, 8, 1) and len(results) == 2:
            assert 0.45 < result["model", "read"] / stored["model"] < 0.75


@pytest.mark.slow
def test_the_first_process_writes_what_one_device_writes(found, models, tmp_path):
    directory, results = found
    for number, (name, sizes) in enumerate(results[0]):
        made, place = models[name], Path(name.replace("/", "")) / str(MESHES[len(results)].index(sizes))
        assert sorted(path.name for path in (directory / "0" / place).iterdir()) == ["adapter", "merged", "model"]
        for kind in ("model", "adapter"):
            assert files_of(directory / "0" / place / kind) == files_of(made.directory / kind)
        trained = adapters.load(made.directory / "adapter", made.arch, LORA)
        with weights.stored_tensors(made.directory / "model") as base:
            merged = adapters.merged(base, trained, LORA, wanted=True)
            options = dict(config=made.config, dtype=made.dtype, max_shard_bytes=30_000)
            weights.save(tmp_path / str(number), made.arch, merged, **options)
        assert files_of(directory / "0" / place / "merged") == files_of(tmp_path / str(number))
        for process in range(1, len(results)):
            assert list((directory / str(process) / place).iterdir()) == []


@pytest.mark.slow
def test_an_error_of_the_writer_is_raised_there_and_nobody_waits(found):
    _, results = found
    for first, *others in zip(*(process.values() for process in results), strict=True):
        assert "this is a file" in first["error"]
        assert not any("error" in other for other in others)


# --- on one device ----------------------------------------------------------------------------------------------------


def test_a_merged_export_is_w_plus_scale_b_a(models, tmp_path):
    """With the weights as the files have them, layer by layer in double precision."""
    made = models[MERGED]
    with weights.stored_tensors(made.directory / "model") as base:
        trained = adapters.load(made.directory / "adapter", made.arch, LORA)
        weights.save(
            tmp_path, made.arch, adapters.merged(base, trained, LORA, wanted=True), config=made.config, dtype="float32"
        )
    low = {
        name.removeprefix("base_model.model."): x
        for name, x in load_file(made.directory / "adapter" / adapters.WEIGHTS).items()
    }
    before = {n: x for path in (made.directory / "model").glob("*.safetensors") for n, x in load_file(path).items()}
    changed = 0
    for name, found in load_file(tmp_path / "model.safetensors").items():
        weight, factors = before[name], [low.get(name.replace("weight", f"lora_{side}.weight")) for side in "BA"]
        if factors[0] is None:
            np.testing.assert_array_equal(found, weight.astype(np.float32))
            continue
        expected = weight.astype(np.float64) + 2.0 * factors[0].astype(np.float64) @ factors[1]
        # Merged in the dtype of the base model's files.
        np.testing.assert_array_equal(found, found.astype(weight.dtype).astype(np.float32))
        assert np.abs(found - expected).max() < float(ml_dtypes.finfo(weight.dtype).eps) * np.abs(expected).max()
        changed += 1
    assert changed == made.arch.num_layers * len(LINEARS)


def test_an_axis_inside_a_group_cannot_be_split():
    stored = tensors.Stored(Path("x"), np.arange(96).reshape(24, 4), (24, 4), "F32")
    tensor = tensors.Tensor(("layers", "q", "weight"), 0, ((4, 6), (4,)))
    part = tensors.read(tensor, stored, (slice(1, 3), slice(0, 6), slice(2, 4)))
    np.testing.assert_array_equal(part, np.arange(96).reshape(4, 6, 4)[1:3, :, 2:4])
    with pytest.raises(ValueError, match=r"layers.q.weight: of the axes \(4, 6\) only the first may be split"):
        tensors.read(tensor, stored, (slice(0, 4), slice(0, 3), slice(0, 4)))


def test_parameters_of_another_model_are_refused(models):
    made = models[MERGED]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = decoder.define(dataclasses.replace(made.arch, intermediate_size=48)).abstract()
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), abstract)
    with pytest.raises(ValueError, match=r"layers.mlp.gate.weight: the files have the shape \(3, 44, 32\)"):
        weights.load(made.directory / "model", abstract)


def test_a_file_at_a_time_is_on_the_host(tmp_path):
    arch = Architecture("llama", 512, 256, 512, 4, 4, 64, layers=(Layer(),) * 12)
    config = dict(model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    config |= dict(num_attention_heads=4, num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-6)
    ones = lambda s: jax.numpy.ones(s.shape, s.dtype)
    params = jax.tree.map(ones, decoder.define(arch).abstract())
    trained = jax.tree.map(ones, lora.split(decoder.define(arch, lora=LORA).abstract(), LORA)[0])
    options = dict(config=config, dtype="bfloat16", max_shard_bytes=10**6)
    total = 2 * arch.parameter_count()

    def peak(save):
        tracemalloc.start()
        save()
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert 2 * 10**6 < peak(
        lambda: weights.save(tmp_path / "whole", arch, params, **{**options, "max_shard_bytes": total})
    )
    assert peak(lambda: weights.save(tmp_path / "model", arch, params, **options)) < 2 * 10**6 < total / 6

    def merge():
        with weights.stored_tensors(tmp_path / "model") as base:
            weights.save(tmp_path / "merged", arch, adapters.merged(base, trained, LORA, wanted=True), **options)

    # The factors' product is float32.
    assert peak(merge) < 4 * 10**6 < total / 3
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > math.floor(total / 10**6)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
