"""Collectives of compiled programs, against bytes and counts that the program's source gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scir_jax.planning import hlo
from scir_jax.planning.collectives import Collective, collectives

STORED = Path(__file__).parent / "hlo"
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax import lax
jax.config.update("jax_num_cpu_devices", 8)
P = jax.P
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
SWAP = [(0, 1), (1, 0)]

def program(x):  # [4, 16] float32 on a device: 256 bytes
    def outer(c, _):
        def inner(c, _):
            gathered = lax.all_gather(c, "b", axis=0, tiled=True)  # 1024 bytes
            return c + lax.psum_scatter(jnp.sin(gathered), "b", scatter_dimension=0, tiled=True), None
        c, _ = lax.scan(inner, c, None, length=5)
        return c * lax.psum(c.sum(), ("a", "b")), None

    c, _ = lax.scan(outer, x, None, length=3)
    c = lax.cond(
        c[0, 0] > 0,
        lambda c: lax.ppermute(c, "a", SWAP),
        lambda c: lax.ppermute(lax.ppermute(c, "a", SWAP) * 2, "a", SWAP),
        c,
    )
    # ends at 7 runs at the latest
    more = lambda s: (s[0] < 7) & (s[1].sum() < 1e9)
    swap = lambda v: lax.all_to_all(v, "b", 0, 0, tiled=True)
    _, c = lax.while_loop(more, lambda s: (s[0] + 1, s[1] + swap(s[1])), (0, c))
    # nobody knows how often
    return lax.while_loop(lambda c: c.sum() < 1e9, lambda c: c + lax.all_gather(c, "a").sum(0), c)

wrapped = jax.shard_map(program, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
print(jax.jit(wrapped).lower(jax.ShapeDtypeStruct((8, 64), jnp.float32)).compile().as_text())
"""
EXPECTED = {
    Collective("all-gather", 3 * 5 * 1024, 15, 4),
    Collective("reduce-scatter", 3 * 5 * 1024, 15, 4),
    Collective("all-to-all", 7 * 256, 7, 4),
    Collective("all-gather", 512, 1, 2, unknown=True),
    Collective("collective-permute", 2 * 256, 2, 0),
    Collective("all-reduce", 3 * 4, 3, 8),
}


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_loops_in_loops_and_branches_are_multiplied_out(compiled):
    found = collectives(compiled)
    assert set(found) == EXPECTED and len(found) == len(EXPECTED)
    assert [c.bytes for c in found] == sorted((c.bytes for c in found), reverse=True)


def test_loops_without_notes_are_read_off_their_conditions(compiled):
    bare, notes = re.subn(r'"known_trip_count":\{[^}]*\},?', "", compiled)
    assert notes >= 2
    assert set(collectives(bare)) == EXPECTED


# The stored programs: 3 micro-batches of 4 layers, each x + silu(x A) B with A [1024, 4096] and B [4096, 1024] in
# float32, computed in bfloat16 from rows [2 a device of 512, 1024], blocks computed again in the backward pass, weights
# split over fsdp (and tensor). MiB of one bfloat16 weight: 8.
LAYERS, MIB = 3 * 4, 2**20


def test_tpu_asynchronous_fusions_count_once():
    # v5e, mesh (data 2, fsdp 4, tensor 2): a weight's tensor half is 4 MiB.
    found = {(c.kind, c.devices, c.count): c for c in collectives((STORED / "v5e_4x4.txt").read_text())}
    assert not any(c.unknown for c in found.values())
    # forward and backward: both weights
    assert found.pop(("all-gather", 4, 4 * LAYERS)).bytes == 4 * LAYERS * 4 * MIB
    assert found.pop(("reduce-scatter", 4, 2 * LAYERS)).bytes == 2 * LAYERS * 4 * MIB
    # over tensor: outputs and gradients of the rows of a device, 4 MiB; over data: gradients' fsdp parts, 2 x 1 MiB
    assert found.pop(("all-reduce", 2, 3 * LAYERS)).bytes == LAYERS * (2 * 4 + 2) * MIB
    # the losses
    assert found == {("all-reduce", 8, 3): Collective("all-reduce", 12, 3, 8)}


def test_tpu_reduce_scatter_as_fusion_of_all_reduce():
    found = {(c.kind, c.count): c for c in collectives((STORED / "v6e_2x4.txt").read_text())}
    assert found[("all-gather", 4 * LAYERS)].bytes == 4 * LAYERS * 8 * MIB
    assert found[("reduce-scatter", LAYERS)].bytes == LAYERS * 8 * MIB
    assert found[("all-reduce", LAYERS + 3)].bytes == LAYERS * 8 * MIB + 12
    assert len(found) == 3 and {c.devices for c in found.values()} == {8}


def test_tpu_collectives_in_asynchronous_calls():
    found = {c.kind: c for c in collectives((STORED / "tpu7x_2x2x1.txt").read_text())}
    assert found == {
        "all-gather": Collective("all-gather", 4 * LAYERS * 8 * MIB, 4 * LAYERS, 8),
        "reduce-scatter": Collective("reduce-scatter", 2 * LAYERS * 8 * MIB, 2 * LAYERS, 8),
        "all-reduce": Collective("all-reduce", 12, 3, 8),
    }


HANDWRITTEN = """HloModule handwritten

%body (p: (u32[], s32[], f32[4])) -> (u32[], s32[], f32[4]) {
  %p = (u32[]{:T(128)}, s32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %limit = s32[] get-tuple-element(%p), index=1
  %x = f32[4] get-tuple-element(%p), index=2
  %start = (f32[4]{0}, f32[16]{0:T(128)S(1)}) all-gather-start(%x), replica_groups=mesh['r'=2,'c'=4] {'c'}, dimensions={0}
  %done = f32[16] all-gather-done(%start)
  %permuted = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %both = (f32[4], bf16[2,2]) all-reduce-start(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %scattered = ((f32[4]), f32[2]) reduce-scatter-start(%x), replica_groups=[4,2]<=[8], to_apply=%sum
  %wrapped = ((f32[4]), f32[4], u32[]) async-start(%x), calls=%swap
  %end = f32[4] async-done(%wrapped), calls=%swap
  ROOT %t = (u32[], s32[], f32[4]) tuple(%next, %limit, %x)
}

%swap (q: f32[4]) -> f32[4] {
  %q = f32[4] parameter(0)
  ROOT %a = f32[4] all-to-all(%q), replica_groups={}, dimensions={0}
}

%condition (c: (u32[], s32[], f32[4])) -> pred[] {
  %c = (u32[], s32[], f32[4]) parameter(0)
  %j = u32[] get-tuple-element(%c), index=0
  %end = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%end, %j), direction=GE
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %one = u32[] constant(1)
  %ten = s32[] constant(10)
  %copied = s32[] copy(%ten)
  %init = (u32[], s32[], /*index=2*/f32[4]) tuple(%one, %copied, %a)
  %while = (u32[], s32[], f32[4]) while(%init), condition=%condition, body=%body
  ROOT %r = f32[4] get-tuple-element(%while), index=2
}
"""


def test_asynchronous_forms_and_a_loop_whose_limit_is_carried():
    # 1, 3, 5, 7, 9 <= 10
    assert set(collectives(HANDWRITTEN)) == {
        Collective("all-gather", 5 * 64, 5, 4),
        Collective("collective-permute", 5 * 16, 5, 0),
        Collective("all-reduce", 5 * 24, 5, 2),
        Collective("reduce-scatter", 5 * 16, 5, 2),
        Collective("all-to-all", 5 * 16, 5, 0),
    }


def test_a_limit_that_moves_or_a_counter_that_stands_still_is_unknown():
    for text in (
        HANDWRITTEN.replace("tuple(%next, %limit", "tuple(%i, %limit"),
        HANDWRITTEN.replace("copy(%ten)", "parameter(1)"),
    ):
        assert {(c.count, c.unknown) for c in collectives(text)} == {(1, True)}


def test_types():
    assert hlo.type_bytes("bf16[3,4]{1,0:T(8,128)(2,1)}") == 24
    assert hlo.type_bytes("(f32[2]{0}, (s4[4], pred[3]), f8e4m3fn[5], c64[1], token[], s32[])") == 8 + 2 + 3 + 5 + 8 + 4
    assert hlo.tuple_types("(f32[2,3]{1,0:T(8,128)}, (s4[4], pred[3]))") == [
        "f32[2,3]{1,0:T(8,128)}",
        "(s4[4], pred[3])",
    ]


def test_least_bytes_received():
    assert Collective("all-gather", 800, 1, 4).received == 600
    assert Collective("all-reduce", 800, 1, 4).received == 1200
    assert Collective("collective-permute", 800, 1, 0).received == 800


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        collectives("HloModule nothing")
