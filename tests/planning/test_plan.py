"""The plan command: its tables, its refusals, its search, against runs, brute force and the TPU compiler."""

import dataclasses
import importlib.util
import json
import os
import re

import jax
import numpy as np
import pytest

from scir_jax import plan
from scir_jax.config import cli
from scir_jax.config.checks import resolve
from scir_jax.engine.cost import memory
from scir_jax.engine.cost.chips import CHIPS
from scir_jax.engine.cost.flops import Flops
from scir_jax.engine.program import Program
from scir_jax.planning import batches, iteration, limits, machine, stages, tables, topology
from scir_jax.planning.limits import planned
from scir_jax.run.preflight import check_memory
from scir_jax.run.setup import prepare
from tests.run.reward_models import write_reward_model
from tests.small_model import write_model
from tests.training import ANSWERS_ALONE

pytestmark = pytest.mark.usefixtures("cheap_compilation")

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", ""))
# One program of each kind, with few rows.
SMALL = dict(
    sft=dict(ift_batch_size=0, eft_batch_size=8),
    evaluate=dict(batch_size=8, samples=2, greedy=False),
    **ANSWERS_ALONE,
)


@pytest.fixture(scope="module")
def both(world_dir, tiny_config):
    """The same configuration as a plan sees it and as a run does."""
    config = tiny_config(world_dir)
    programs = prepare(config).programs
    return planned(config, programs.arch, programs.mesh), programs


# --- against a run ----------------------------------------------------------------------------------------------------


def test_a_plan_has_the_programs_of_the_run(both):
    # Their names may hold the lengths of the rows, which are longer in a plan.
    ours, theirs = ({p.name.partition(",")[0]: p for p in programs.all()} for programs in both)
    assert ours.keys() == theirs.keys()
    for name, program in ours.items():
        assert program.stage == theirs[name].stage
        if program.stage not in ("prefill", "decode"):  # whose cache is as long as the rows
            assert program.known == theirs[name].known
        assert program.known.total >= theirs[name].known.total
        assert program.tokens >= theirs[name].tokens
    assert both[0].facts.continued == both[1].facts.continued


def test_rows_of_a_plan_are_not_shorter_than_those_of_the_run(both):
    ours, theirs = (programs.facts.lengths for programs in both)
    for field in dataclasses.fields(ours):
        if field.name not in ("targets", "learned"):  # of the data files alone
            assert np.all(np.array(getattr(ours, field.name)) >= np.array(getattr(theirs, field.name))), field.name


@pytest.mark.slow
def test_memory_of_a_plan_is_that_of_the_programs(world_dir, tiny_config, monkeypatch):
    """Where the limits are the lengths of the data, plan and run compile the same."""
    run = prepare(tiny_config(world_dir, **SMALL)).programs
    monkeypatch.setattr(limits, "facts", lambda config, context: run.facts)
    found = stages.survey(planned(run.config, run.arch, run.mesh), memory.limit(), lambda name: None)
    assert {stage.name: stage.memory for stage in found} == dict(check_memory(run.config, run))
    assert {stage.kind for stage in found} == {"prefill", "decode", "score", "judge", "sft", "optimise"}
    assert all(stage.fits and stage.seconds > 0 and stage.flops.hardware > 0 for stage in found)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_that_a_run_fits(command, write_config):
    done = command(plan.main, "--config", write_config(**SMALL), "--batch", 16)
    assert done.code == 0
    for text in (
        "SCIR step",
        "SFT step",
        "judge, ",
        "score, ",
        "prefill, ",
        "decode, ",
        "fits",
        "no times are",
    ):
        assert text in done.out
    assert done.out.rstrip().splitlines()[-1].startswith("fits")


def test_what_does_not_fit_is_said_without_compiling(command, write_config, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 1000)
    monkeypatch.setattr(Program, "compile", None)
    done = command(plan.main, "--config", write_config())
    assert done.code == 1 and "not compiled" in done.out and " NO " in done.out
    last = done.out.rstrip().splitlines()[-1]
    assert last.startswith("does not fit: ") and "lora.rank 16" in last


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (("--batch", "many"), ("--batch", "many", "largest")),
        (("--batch", 0), ("--batch",)),
        (("--efficiency", 2), ("--efficiency", "(0, 1]")),
        (("--topology", "v9:2x2"), ("v9:2x2", "v4, v5e, v5p, v6e, tpu7x")),
        (("--topology", "v5e:3x5"), ("v5e:3x5", "v5e:4x4 (v5e-16)")),
        (("--mesh.tensor", 3), ("mesh", "tensor 3", "1 devices", "mesh.tensor 1")),
        (("--batch", 7, "--training.accumulate", 4), ("optimise.batch_size", "7", "4")),
        (
            ("--model.path", "models/Nobody-7B", "--world.directory", "null"),
            ("Nobody-7B", "Mistral-7B-v0.1", "config.json"),
        ),
    ],
)
def test_bad_input_is_one_sentence(command, write_config, arguments, parts):
    done = command(plan.main, "--config", write_config(), *arguments)
    assert done.code == 2 and done.err.count("\n") == 1 and done.out == ""
    for part in parts:
        assert str(part) in done.err


def test_without_libtpu_the_message_says_how_to_install_it(command, write_config, monkeypatch):
    monkeypatch.setattr(topology, "_installed", lambda: False)
    done = command(plan.main, "--config", write_config(), "--topology", "v5e:4x4")
    assert done.code == 2 and "pip install 'scir_jax[tpu]'" in done.err


def test_an_unmade_world_is_named(command, tmp_path):
    done = command(plan.main, "--config", "configs/quickstart.yaml", "--world.directory", tmp_path / "world")
    assert done.code == 2 and "scir_jax.train makes it" in done.err


# --- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 8, 48])
@pytest.mark.parametrize("configured", [1, 16, 100, 5000])
def test_the_largest_batch_is_that_of_a_brute_force_search(unit, configured):
    chip = CHIPS["v5e"]
    rng = np.random.default_rng([unit, configured])
    for _ in range(30):
        start, slope, bend = rng.uniform(0, 1.2), rng.uniform(0.0001, 0.05), rng.uniform(0, 2)
        need = lambda size: int(chip.usable * (start + slope * size / unit + 0.01 * bend * np.sqrt(size)))
        calls = []

        def compiled(size):
            calls.append(size)
            total = need(size)
            reason = "no way" if total > 2 * chip.usable else None
            return [
                stages.Stage("SCIR step", "optimise", memory.Memory(other=total), chip.usable, Flops(), reason=reason)
            ]

        found, total, above = batches._search(compiled, configured, unit)
        sizes = range(unit, batches.MOST + 1, unit)
        fitting = [size for size in sizes if need(size) <= chip.usable]
        assert found == max(fitting, default=0)
        assert total == (need(found) if found else 0)
        assert above == (found + unit if found + unit in sizes else 0)
        assert all(size % unit == 0 for size in calls) and len(calls) == len(set(calls)) <= 20


def test_calls_of_an_iteration(tiny_config, world_dir):
    def counts(prompts, **sections):
        run = prepare(tiny_config(world_dir, **sections)).programs
        return {kind: n for _, kind, n in iteration.calls(run, prompts)}

    sampled = dict(responses=4, batch_size=8)
    # 100 prompts x 4 answers, by M_t and M_t-1 in batches of 16; 2 pairs a prompt
    expected = {"prefill": 13, "decode": 13, "score": 2 * 25, "optimise": 25}
    assert counts(100, sample=sampled, pairs=dict(per_prompt=2)) == expected
    longer = counts(100, sample=sampled, text=dict(max_response_tokens=100))
    assert (longer["prefill"], longer["decode"]) == (100, 13 * 4), "a prompt at a time, and a look every 32 tokens"
    # M_t and M1, whatever asks for M1
    both = counts(100, sample=sampled, implicit=dict(reference="sft"), preference=dict(reference="sft"))
    assert both["score"] == 2 * 25
    # every pair is judged before the best and the worst are known
    judged = counts(10, sample=sampled, pairs=dict(kind="best_worst", per_prompt=2))
    assert judged["judge"] == -(-10 * 6 // 8) and judged["optimise"] == -(-20 // 8)
    # and by the judge before too, where it teaches
    target = dict(target="lagged")
    lagged = counts(10, sample=sampled, pairs=dict(kind="all"), consistency=target)
    assert lagged["judge"] == 2 * -(-10 * 6 // 8)
    # a pair a prompt, and as many labelled ones whose answers are scored by M_t and M_t-1 too
    dice = dict(kind="dice", offline=0.5)
    mixed = counts(10, sample=sampled, pairs=dice, preference=dict(labels="dice"), consistency=dict(weight=0.0))
    assert mixed["optimise"] == -(-20 // 8) and mixed["score"] == 2 * -(-(10 * 4 + 20) // 16)


def test_calls_of_what_others_do(tiny_config, world_dir):
    """Another engine's sampling is no call of ours; a reward model scores every answer that is in a pair."""
    sections = dict(preference=dict(labels="external"), consistency=dict(weight=0.0), selection=dict(rule="all"))
    sample = dict(responses=4, batch_size=8, command="engine {prompts} {output}")
    run = prepare(tiny_config(world_dir, **sections, sample=sample, pairs=dict(scorer="models/reward"))).programs
    found = [(stage, kind) for stage, kind, _ in iteration.calls(run, 100)]
    assert found == [("score", "score"), ("score", "reward"), ("optimise", "optimise")]
    assert {kind: n for _, kind, n in iteration.calls(run, 100)}["reward"] == -(-100 * 4 // 16)
    function = dataclasses.replace(run.config, pairs=dataclasses.replace(run.config.pairs, scorer="module:function"))
    run.config = function
    assert "reward" not in {kind for _, kind, _ in iteration.calls(run, 100)} and not limits.reward_programs(run)


def test_least_times_are_those_of_the_chip():
    chip = CHIPS["v5e"]
    stage = stages.Stage(
        "x", "sample", memory.Memory(), 1, Flops(1, int(chip.flops * 32)), streamed=int(chip.bandwidth * 3)
    )
    assert stage.least(chip, 16) == pytest.approx({"arithmetic": 2, "memory": 3, "links": 0})


def test_a_program_that_cannot_be_read_has_a_question_mark(world_dir, tiny_config, monkeypatch, capfd):
    """jaxlib may not know every instruction of a newer libtpu's compiler; its memory and its arithmetic are known."""
    run = planned(*(getattr(prepare(tiny_config(world_dir, **SMALL)).programs, x) for x in ("config", "arch", "mesh")))

    class Compiled:
        def as_text(self):
            os.write(2, b"*** Begin stack trace ***")
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update should have 1 operands")

        def memory_analysis(self):
            return None

    monkeypatch.setattr(Program, "compile", lambda self, mesh: Compiled())
    monkeypatch.setattr(memory, "whole", lambda known, compiled, backend: known)
    (found,) = stages.survey(run, memory.limit(), lambda name: None, lambda program: program.stage == "optimise")
    assert found.fits and found.collectives is None and set(found.least(CHIPS["v5e"], 1)) == {"arithmetic", "memory"}
    tables.show_times(run, [found], machine.Machine("v5e", tuple(jax.devices()), CHIPS["v5e"], memory.limit()))
    out, err = capfd.readouterr()
    assert re.search(r"SCIR step .*[\d.]+ .* - .* \? ", out) and "cannot read this program" in out and not err


def test_a_machine_that_is_here():
    here = machine.describe(None)
    assert here.chip is None and here.devices == tuple(jax.devices()) and here.limit == memory.limit()


# --- the TPU compiler -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_a_plan_for_a_slice(command, write_config):
    config = write_config(model=dict(dtype="bfloat16", remat="full"))
    done = command(plan.main, "--config", config, "--topology", "v5e:2x2", "--mesh.data", 1, "--mesh.fsdp", 4)
    assert done.code == 0, done.err
    for text in ("v5e:2x2: 4 chip(s)", "15.75", "197 TFLOP/s", "chip-hours", "all-gather", "fits"):
        assert text in done.out


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("slice_", "configs"),
    [("v5e:4x4", ["tpu/v5e-16"]), ("v6e:8x8", ["models/llama-3.1-70b", "tpu/llama-70b-v6e"])],
)
def test_decoding_on_a_tpu_holds_nothing_twice(slice_, configs):
    """The whole cache is there once, whatever writes a token's place into it, and a device's part of the head."""
    config, *_ = cli.parse("plan", "", [part for name in ("mistral-7b", *configs) for part in ("--config", name)])
    run = machine.plan(resolve(config), machine.describe(slice_))
    program = run.decode_program()
    compiled = program.compile(run.mesh)
    assert program.known.cache > 2**30 > 3 * compiled.memory_analysis().temp_size_in_bytes, "bytes per device"
    whole = rf"bf16\[{run.arch.vocab_size},{run.arch.hidden_size}\]\S* all-gather"
    assert not re.search(whole, compiled.as_text())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
@pytest.mark.documented("plan --config mistral-7b --config tpu/v5e-16 --topology v5e:4x4", "plan v5e:4x4 --lengths")
@pytest.mark.documented("plan v6e:2x4", "plan v5p:2x2x4", "plan v6e:8x8")
def test_the_documents_plans(documented, tmp_path):
    """Of a small model and one program; at last with a reward model, whose program is the run's too."""
    write_model("qwen3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"num_key_value_heads": 4}  # as many as the widest mesh has parts; no weights are read
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    small = ("--model.path", tmp_path / "model", "--text.max_prompt_tokens", 200, "--text.max_response_tokens", 8)
    for one in documented:
        done = one(*small, "--programs", "score")
        assert done.code == 0, done.err
        chips = one.command.arguments[one.command.arguments.index("--topology") + 1]
        assert f"{chips}: " in done.out and "score, " in done.out and "chip-hours" in done.out
        assert done.out.rstrip().splitlines()[-1].startswith("fits")
    reward = write_reward_model("qwen3", tmp_path / "reward")
    external = ("--config", "methods/external", "--pairs.scorer", reward, "--replay.weight", 0)
    done = documented[0](*small, *external, "--programs", "reward")
    assert done.code == 0 and "reward, 256 tokens" in done.out, done


@pytest.mark.slow
def test_programs_do_not_grow_with_depth(world_dir, tiny_config):
    run = prepare(tiny_config(world_dir, **SMALL)).programs

    def instructions(layers):
        arch = dataclasses.replace(run.arch, layers=run.arch.layers[:1] * layers)
        text = planned(run.config, arch, run.mesh).optimise_program().compile(run.mesh).as_text()
        return sum(" = " in line for line in text.splitlines())

    # But for a fusion here or there, about which the compiler decides by size.
    assert instructions(17) == pytest.approx(instructions(9), rel=2e-3)
