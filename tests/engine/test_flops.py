"""Counted FLOPs, against the products in the programs' jaxprs, against XLA's own count, and against the formulas."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.data.batches import RowGroup
from scir_jax.data.reading import ReadSpec
from scir_jax.engine import forward
from scir_jax.engine.cost import flops, memory
from scir_jax.engine.cost.flops import Flops
from scir_jax.model import decoder, families, logprobs
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.lora import Lora, join, split
from scir_jax.planning import architectures, hlo
from scir_jax.run.setup import prepare

ARCH = Architecture("llama", 300, 64, 96, 4, 2, 16, (Layer(), Layer(window=8), Layer()))
ADAPTERS = {
    "all": Lora(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "some": Lora(4, 8.0, ("q_proj", "v_proj", "up_proj")),
}


def products(jaxpr, runs=1):
    """2 m k n of every product that a jaxpr executes, loops multiplied; `runs` of a loop of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = settings["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes[i] for i in contracted)
            continue
        values = [x for v in settings.values() for x in (v if isinstance(v, (tuple, list)) else [v])]
        inner = [getattr(value, "jaxpr", value) for value in values]
        counts = [products(value, runs) for value in inner if hasattr(value, "eqns")]
        times = {"scan": settings.get("length"), "while": runs}.get(name, 1)
        total += times * (max(counts) if name == "cond" else sum(counts))
    return total


def compiled_products(text):
    """Likewise of a program that XLA compiled for a CPU, after it has left out what nobody asks for."""
    module = hlo.parse(text)

    def shape(of):
        return [int(size) for size in re.search(r"\[([\d,]*)\]", of.type)[1].split(",") if size]

    def count(computation, known):
        total = 0
        for instruction in computation.instructions.values():
            if instruction.opcode == "dot":
                left = shape(computation.instructions[instruction.operands[0]])
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.attributes)[1].split(",")
                total += 2 * math.prod(shape(instruction)) * math.prod(left[int(i)] for i in contracted)
            elif instruction.opcode == "while":
                inner = hlo.loop_constants(module, computation, instruction, known)
                runs = hlo.trip_count(module, computation, instruction, known)
                total += runs * count(module.computations[instruction.called["body"]], inner)
            elif instruction.opcode == "conditional":
                total += max(count(module.computations[name], {}) for name in instruction.branches)
            elif instruction.opcode in ("fusion", "call"):
                name = instruction.called.get("calls") or instruction.called["to_apply"]
                total += count(module.computations[name], {})
        return total

    return count(module.computations[module.entry], {})


GROUP = RowGroup((4,), tokens=24, scored=7, verdict=True)


def loss_and_arguments(arch, lora, remat):
    """A loss with both kinds of read-outs, and its abstract arguments (trained, frozen, bins and rows of GROUP)."""
    model = decoder.define(arch, remat=remat, lora=lora)

    def loss(trained, frozen, batch):
        params, (bins, rows) = join(trained, frozen), batch
        hidden = model.hidden(params, rows.ids)
        logps = forward.read_tokens(model, params, hidden, bins, ("logps",))["logps"]
        verdicts, mass = forward._verdict(model, params, hidden, rows, (3, 5))
        return logps.sum() + jnp.square(verdicts).sum(), mass

    return loss, (
        *split(model.abstract(), lora),
        (ReadSpec(GROUP.rows, GROUP.tokens, GROUP.scored, 1).abstract(), GROUP.abstract()),
    )


@pytest.mark.parametrize(
    ("remat", "adapters", "post_norms"),
    [(remat, adapters, False) for remat in decoder.REMAT for adapters in (None, *ADAPTERS)]
    + [("full", adapters, True) for adapters in (None, "all")],
)
def test_products_forward_and_backward_are_those_of_the_jaxpr(remat, adapters, post_norms, monkeypatch):
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * 28 * 128)  # 3 chunks, the last one overlapping
    arch, lora = dataclasses.replace(ARCH, post_norms=post_norms), ADAPTERS.get(adapters)
    loss, arguments = loss_and_arguments(arch, lora, remat)
    passes = [GROUP]
    assert flops.inference(arch, passes, lora=lora).hardware == products(jax.make_jaxpr(loss)(*arguments).jaxpr)
    gradient = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*arguments).jaxpr
    # The frozen head's gradient is written down; the compiler leaves it out (the test below).
    dropped = 2 * 4 * 7 * arch.hidden_size * 384 if lora else 0
    assert flops.training(arch, passes, lora=lora, remat=remat).hardware == products(gradient) - dropped


def test_products_of_the_compiled_program(monkeypatch, cheap_compilation):
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * 28 * 128)
    lora = ADAPTERS["all"]
    loss, arguments = loss_and_arguments(ARCH, lora, "full")
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile()
    counted = flops.training(ARCH, [GROUP], lora=lora, remat="full").hardware
    # The verdicts' two logits are asked for twice and computed once.
    assert compiled_products(compiled.as_text()) == pytest.approx(counted, rel=1e-4)


def test_xla_counts_the_same_for_one_layer(cheap_compilation):
    # XLA counts a scanned layer once, and besides products what is done element by element.
    arch = Architecture("llama", 256, 256, 512, 2, 2, 128, (Layer(),))
    model = decoder.define(arch)
    compiled = jax.jit(model.hidden).lower(model.abstract(), jax.ShapeDtypeStruct((2, 64), np.int32)).compile()
    counted = flops.inference(arch, [RowGroup((2,), 64)]).hardware
    assert counted < compiled.cost_analysis()["flops"] < 1.03 * counted


@pytest.mark.parametrize("name", ["plain", "micro-batches", "adapters"])
def test_flops_of_a_runs_programs_are_the_products_of_their_jaxprs(name, world_dir, tiny_config):
    replay = {"weight": 0.5, "ift_batch_size": 4, "eft_batch_size": 8}
    templates = (f"{world_dir}/judge_continuation.yaml", f"{world_dir}/judge.yaml")
    overrides = {
        "plain": {},
        "micro-batches": {"training": {"accumulate": 4}, "model": {"path": f"{world_dir}/model", "remat": "full"}},
        "adapters": {"lora": {"rank": 2}, "replay": replay, "generative": {"templates": templates}},
    }
    programs = prepare(tiny_config(world_dir, **overrides[name])).programs
    found = programs.all()
    assert len(found) == 6
    for program in found:
        step = program.stage in ("sft", "optimise")
        if name != "plain" and not step:
            continue
        jaxpr = program.function.trace(*program.arguments).jaxpr.jaxpr
        expected = products(jaxpr, runs=programs.facts.lengths.answer)
        if programs.model.lora is None or not step:
            # The objective has products of its own, of a few numbers a pair.
            assert program.flops.hardware == pytest.approx(expected, rel=1e-6), program.name
        else:
            # Frozen heads' gradients, as above.
            assert 0.8 * expected < program.flops.hardware < expected
        assert 0 < program.flops.model < program.flops.hardware


def always(tokens):
    return True


MISTRAL = families.read(architectures.known("Mistral-7B-v0.1"), "Mistral")


def test_model_flops_follow_the_convention():
    # Where nothing but weights counts: 2 a weight and position forward, 6 trained, the embedding looked up.
    weights = MISTRAL.parameter_count() - MISTRAL.vocab_size * MISTRAL.hidden_size
    weights -= (2 * MISTRAL.num_layers + 1) * MISTRAL.hidden_size  # norms
    passes = [RowGroup((8,), 2048, scored=2048)]
    visible = 4 * 8 * 32 * 32 * 128 * (2048 * 2049 // 2)
    forward_flops = 2 * weights * 8 * 2048 + visible
    assert flops.inference(MISTRAL, passes).model == forward_flops
    for settings in ({}, {"remat": "full"}, {"remat": "dots", "accumulate": 4}, {"flash": always}):
        assert flops.training(MISTRAL, passes, **settings).model == 3 * forward_flops
    # PaLM's 6 N + 12 L H Q T a token, of which a causal model sees half.
    per_token = flops.training(MISTRAL, passes).model / (8 * 2048)
    assert per_token == pytest.approx(6 * weights + 6 * 32 * 32 * 128 * 2048, rel=1e-3)


def test_windows_bound_what_is_seen():
    def brute(tokens, window):
        return sum(min(t + 1, window or tokens) for t in range(tokens))

    for tokens, window in ((1, None), (7, None), (7, 3), (7, 7), (7, 9), (4096 + 5, 4096)):
        assert flops._visible(tokens, window) == brute(tokens, window)
    full = dataclasses.replace(MISTRAL, layers=(Layer(),) * 32)
    for length, same in ((4096, True), (8192, False)):
        passes = [RowGroup((1,), length)]
        assert (flops.inference(MISTRAL, passes) == flops.inference(full, passes)) == same
    # Attention that skips masked pairs executes what the mathematics asks for.
    skipping = flops.inference(MISTRAL, [RowGroup((1,), 8192)], flash=always)
    assert skipping.model == skipping.hardware < flops.inference(MISTRAL, [RowGroup((1,), 8192)]).hardware


def test_frozen_weights_cost_two_thirds():
    lora = Lora(16, 16.0, ADAPTERS["all"].targets)
    passes = [RowGroup((8,), 2048, 512)]
    whole, adapted = flops.training(MISTRAL, passes), flops.training(MISTRAL, passes, lora=lora)
    assert 0.66 < adapted.model / whole.model < 0.7
    assert whole.model < whole.hardware < flops.training(MISTRAL, passes, remat="dots").hardware
    # One forward pass more, but for the last product of every block.
    full = flops.training(MISTRAL, passes, remat="full")
    assert 1.2 < full.hardware / whole.hardware < 1.33


def test_micro_batches_compute_the_forward_pass_again():
    passes = [RowGroup((8,), 2048, 512, True)]
    whole, micro = flops.training(MISTRAL, passes), flops.training(MISTRAL, passes, accumulate=4)
    assert micro.model == whole.model
    assert micro.hardware - whole.hardware == pytest.approx(flops.inference(MISTRAL, passes).hardware, rel=0.02)


def test_decoding_multiplies_every_weight_once_a_token():
    # 8 rows, ten tokens each, every weight once; and the places of the cache.
    weights = MISTRAL.parameter_count() - MISTRAL.vocab_size * MISTRAL.hidden_size - 65 * MISTRAL.hidden_size
    found = flops.decoding(MISTRAL, 8, 10, seen=20, places=26)
    assert found.hardware == 80 * (2 * weights + 4 * 32 * 32 * 128 * 26)
    assert found.model == 80 * (2 * weights + 4 * 32 * 32 * 128 * 20)
    # Of a large cache those blocks that are seen; of a layer with a window no more than it holds.
    some = dataclasses.replace(MISTRAL, layers=(Layer(), *(Layer(window=4000),) * 31))
    blocks = flops.decoding(some, 1, 1, seen=5000, places=8192)
    assert blocks.hardware - 2 * weights == 4 * 32 * 128 * (5120 + 31 * 4096)
    assert blocks.model - 2 * weights == 4 * 32 * 128 * (5000 + 31 * 4000)


@pytest.mark.parametrize("lora", [None, ADAPTERS["some"]], ids=["full", "adapters"])
def test_the_work_of_a_step_is_that_of_its_rows(lora):
    """Rows without padding ask for what a padded step of their lengths counts."""
    groups = [RowGroup((6,), 20, 7, heads=2), RowGroup((4,), 31, verdict=True), RowGroup((3,), 11, 5)]
    seen = sum(
        group.rows * sum(flops._visible(group.tokens, layer.window) for layer in ARCH.layers) for group in groups
    )
    tokens = sum(group.rows * group.tokens for group in groups)
    work = flops.Work(tokens, seen, learned=15, scored=42, verdicts=4)
    assert flops.of_step(ARCH, work, lora=lora, heads=2) == flops.training(ARCH, groups, lora=lora).model


def test_bytes_of_a_decoding_step():
    weights = MISTRAL.parameter_count() - MISTRAL.vocab_size * MISTRAL.hidden_size
    cache = 2 * 32 * 64 * 1024 * 8 * 128
    assert flops.decode_bytes(MISTRAL, 64, 1024, 2) == 2 * (weights + cache)
    shared = flops.decode_bytes(MISTRAL, 64, 1024, 2, tensor=4, batch_shards=2)
    assert shared == 2 * (math.ceil(weights / 4) + cache // 8)
    # More devices than key heads hold the heads whole.
    assert flops.decode_bytes(MISTRAL, 64, 1024, 2, tensor=16) == 2 * (math.ceil(weights / 16) + cache)
    tied = dataclasses.replace(MISTRAL, tie_embeddings=True)
    assert flops.decode_bytes(tied, 64, 1024, 2) == 2 * (weights + cache)
    # Layers with a window hold no more than that.
    gemma = families.read(architectures.known("gemma-3-1b-it"), "Gemma")
    held = jax.eval_shape(lambda: decoder.define(gemma).empty_cache(64, 8192))
    cache = 2 * 64 * (4 * 8192 + 22 * 512) * 256
    assert flops.cache_bytes(gemma, 64, 8192, 4) == sum(x.size * 4 for x in jax.tree.leaves(held)) == 4 * cache
    model = decoder.define(ARCH, lora=ADAPTERS["some"])
    everything = memory.device_bytes(model.abstract()) - 4 * ARCH.vocab_size * ARCH.hidden_size
    assert flops.decode_bytes(ARCH, 0, 0, 4, lora=ADAPTERS["some"]) == everything


def test_figures_add_up():
    assert Flops(1, 2) + Flops(3, 4) * 5 == Flops(16, 22)


@pytest.mark.parametrize("adapters", [None, "all"])
def test_rows_that_only_go_forward(adapters):
    """Rows without padding are those of a description of that length, each answer's token those of one position more."""
    lora = ADAPTERS.get(adapters)
    group = RowGroup((4,), tokens=24, scored=7, verdict=True, heads=2)
    work = flops.rows_work(ARCH, [24] * 4, scored=4 * 7, verdicts=4)
    assert flops.of_pass(ARCH, work, lora=lora, heads=2) == flops.inference(ARCH, [group], lora=lora).model
    assert flops.of_step(ARCH, work, heads=2) == 3 * flops.of_pass(ARCH, work, heads=2)

    def of(tokens, scored=0):
        return flops.inference(ARCH, [RowGroup((1,), tokens, scored)], lora=lora).model

    # The prompt is read once; an answer adds what its row has more than the prompt alone.
    answers = [1, 5, 5, 12]
    expected = of(10) + sum(of(10 + n, n) - of(10) for n in answers)
    assert (
        flops.of_pass(ARCH, flops.branched_work(ARCH, 10, answers)._replace(scored=sum(answers)), lora=lora) == expected
    )
