"""Models and data in a bucket are those of a disk."""

import jax
import numpy as np
import pytest

from scir_jax.bucket import fetched
from scir_jax.bucket.fetched import model_directory, weights_of
from scir_jax.data import sources
from scir_jax.errors import InputError
from scir_jax.model.hf import weights
from scir_jax.run import hub


@pytest.fixture
def uploaded(folder, world_dir):
    """The small model, in the bucket."""
    for path in (world_dir / "model").iterdir():
        folder.upload(path.name, path)
    return folder


def test_a_model_is_read_by_ranges(uploaded, world_dir, monkeypatch):
    monkeypatch.setattr(fetched, "PART", 1000)  # less than a tensor has
    directory = hub.directory(uploaded.url, "model.path")
    assert (directory / "model.safetensors").stat().st_size == 0, "the weights are not fetched"
    for mine, theirs in zip(
        jax.tree.leaves(weights.load(directory)[1]), jax.tree.leaves(weights.load(world_dir / "model")[1]), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert weights.dtype_of(directory) == "float32"
    size = (world_dir / "model" / "model.safetensors").stat().st_size
    assert weights_of(directory / "model.safetensors").holds()[0] == size


def test_any_part_of_a_tensor_is_what_it_is(folder, tmp_path):
    from safetensors.numpy import save_file

    values = {"a": np.arange(60, dtype=np.float16).reshape(5, 4, 3), "b": np.arange(7, dtype=np.float32)}
    save_file(values, tmp_path / "model.safetensors")
    folder.upload("model.safetensors", tmp_path / "model.safetensors")
    tensors = weights_of(model_directory(folder.url) / "model.safetensors").tensors()
    for part in ((slice(1, 4),), (slice(0, 5), slice(2, 3)), (slice(2, 2), slice(0, 4), slice(1, 3))):
        np.testing.assert_array_equal(tensors["a"][part], values["a"][part])
    np.testing.assert_array_equal(tensors["b"][2:6], values["b"][2:6])


def test_what_is_no_model(folder):
    with pytest.raises(InputError, match=f"^{folder.url}: there is no such model directory"):
        model_directory(folder.url)
    folder.write("model.safetensors", b"no header")
    with pytest.raises(InputError, match=f"^{folder.url}/model.safetensors: this is not a readable safetensors file"):
        weights_of(model_directory(folder.url) / "model.safetensors").tensors()


def test_data_of_a_bucket(folder, world_dir):
    path = world_dir / "prompts.jsonl"
    folder.upload("prompts.jsonl", path)
    folder.upload("parts/data-00000-of-00001.jsonl", path)
    expected = list(row for _, row in sources.rows(path))
    for name in ("prompts.jsonl", "parts"):
        assert [row for _, row in sources.rows(f"{folder.url}/{name}")] == expected
        assert sources.sha256(f"{folder.url}/{name}") == sources.sha256(path)
    with pytest.raises(InputError, match=f"^{folder.url}/missing.jsonl: no such file"):
        sources.rows(f"{folder.url}/missing.jsonl")
