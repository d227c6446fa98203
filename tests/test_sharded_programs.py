"""What the compiled programs of a sharded run hold and send: never a whole embedding or head, and no weights while
answers are sampled."""

import re

import pytest

from scir_jax.config import MeshConfig
from scir_jax.engine.mesh import make_mesh
from scir_jax.loop import programs
from scir_jax.model import logprobs
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.planning.collectives import collectives
from scir_jax.planning.limits import Planned
from tests.processes import on_eight_devices

# Sizes that no other array has.
ARCH = Architecture("llama", 9001, 72, 176, 8, 4, 24, layers=(Layer(),) * 3)
MESHES = ((1, 4, 2), (2, 2, 2))
ROWS, STEPS = 8, 12

pytestmark = pytest.mark.slow


def compiled(config):
    """(mesh, program) -> (shapes of arrays, [Collective])."""
    # Whole rows of logits would be small here; at most 128 columns at a time, as with large models.
    logprobs._CHUNK_BYTES = logprobs.VERDICT_CHUNK = 128
    found = {}
    for mesh in MESHES:
        run = Planned(config, ARCH, make_mesh(MeshConfig(*mesh)))
        for program in programs.programs(run):
            text = programs.compile_program(run, program).as_text()
            shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)}
            found[mesh, program.name] = shapes, collectives(text)
    return found


@pytest.fixture(scope="module")
def found(world_dir, tiny_config):
    return on_eight_devices(compiled, tiny_config(world_dir, sample=dict(batch_size=ROWS, responses=2)))


def test_no_device_has_a_whole_embedding_or_head(found):
    assert len(found) >= 5 * len(MESHES)
    for case, (shapes, _) in found.items():
        split = {shape for shape in shapes if ARCH.vocab_size in shape}
        assert split, case
        assert not {shape for shape in split if ARCH.hidden_size in shape}, case


def test_no_weights_travel_while_answers_are_sampled(found):
    arch, samplers = ARCH, 0
    heads = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
    weights = 4 * arch.num_layers * arch.hidden_size * (heads + 3 * arch.intermediate_size)
    for (mesh, name), (_, sent) in found.items():
        if name.startswith("sample"):
            samplers += 1
            gathered = sum(c.bytes for c in sent if c.kind != "all-reduce")
            # The prompts' pass gathers the layers' weights once.
            once = weights / mesh[2]
            assert once < gathered < once * STEPS / 2, (mesh, name)
            # Logits, and of each layer what its products give, a row and step.
            widths = arch.num_layers * (heads + 2 * arch.hidden_size + 3 * arch.intermediate_size)
            reduced = sum(c.bytes for c in sent if c.kind == "all-reduce")
            rows = ROWS * int(name.split()[1])
            assert reduced < 1.2 * 4 * STEPS * rows * (arch.vocab_size + widths), (mesh, name)
    assert samplers == 2 * len(MESHES)
