"""The sampling stage: slots that refill, its file through interruptions, answers that depend on no slot."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from scir_jax.config.schema import EvaluateConfig
from scir_jax.data.jsonl import AppendOnly
from scir_jax.engine import sampler as engine_sampler
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError, Interrupted
from scir_jax.run import console, costs, evaluation, sampling, scoring
from scir_jax.run.costs import Account
from scir_jax.run.setup import prepare

pytestmark = pytest.mark.usefixtures("few_functions", "cheap_compilation")

ONE = Sampling.of(1.0)


class StopsAfter(console.Stopper):
    """Asks to stop at the safe point after `checks` others."""

    def __init__(self, checks):
        super().__init__()
        self.left = checks

    def check(self, *arguments, **named):
        if not self.left:
            self.signal = 2
        self.left -= 1
        super().check(*arguments, **named)


class SampleStage:
    """stage(path, stopper) samples 2 answers to each of 20 prompts in `slots` slots, with a look every few tokens."""

    def __init__(self, config, prompts=20, looks=4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_sampler, "SEGMENT", looks)
            self.encoder, inputs, self.programs, parameters = prepare(config)
            self.prompts = inputs.prompts[:prompts]
            self.params = parameters.configured()
            # Compiled while the look is what it is.
            for _ in sampling.sample(
                self.encoder,
                self.programs,
                self.params,
                self.numbered[:1],
                responses=2,
                sampling=ONE,
                key=self.key,
            ):
                pass
        self.slots = self.programs.slot_spec.slots
        self.asked = []

    key = stream_key(0, "responses", 1)

    @property
    def numbered(self):
        return list(enumerate(self.prompts))

    def __call__(self, path, stopper):
        given, self.asked, self.account = sampling.sample, [], Account()

        def sample(encoder, programs, params, prompts, **settings):
            self.asked = [number for number, _ in prompts]
            return given(encoder, programs, params, prompts, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "sample", sample)
            sampling.sample_file(
                self.encoder,
                self.programs,
                self.params,
                self.numbered,
                path,
                responses=2,
                sampling=ONE,
                key=self.key,
                title="sample",
                stopper=stopper,
                account=self.account,
            )


@pytest.fixture(scope="module")
def stage(world_dir, tiny_config):
    return SampleStage(tiny_config(world_dir, sample=dict(batch_size=2)))


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "responses.jsonl"
    stage(path, console.Stopper())
    return path


def rows_in(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_stage_file(stage, whole):
    rows = rows_in(whole)
    assert stage.slots < len(rows) / 4, "every slot is used again and again"
    assert [(row["prompt_number"], row["sample"]) for row in rows] == [(i, n) for i in range(20) for n in range(2)]
    for row in rows:
        assert tuple(row["prompt_ids"]) == stage.prompts[row["prompt_number"]].ids
        assert 1 <= len(row["response_ids"]) <= 12
        assert row["stop"] == ("eos" if row["response_ids"][-1] in stage.encoder.chat.stop_ids else "length")
    assert len({len(row["response_ids"]) for row in rows}) > 2, "they end at different times"
    assert list(whole.parent.iterdir()) == [whole]


def test_answers_depend_on_no_slot_and_have_the_scorers_logprobs(stage, whole, world_dir, tiny_config):
    rows = rows_in(whole)
    other = SampleStage(tiny_config(world_dir, sample=dict(batch_size=16)), looks=12)
    assert other.slots == 8 * stage.slots
    found = sampling.sample_rows(
        other.encoder,
        other.programs,
        other.params,
        other.numbered[::-1],
        responses=2,
        sampling=ONE,
        key=other.key,
    )
    found = sorted(found, key=lambda row: (row["prompt_number"], row["sample"]))
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in rows]
    np.testing.assert_allclose([r["logprob"] for r in found], [r["logprob"] for r in rows], rtol=0, atol=5e-5)
    items = [(stage.prompts[row["prompt_number"]], stage.encoder.sampled(row["response_ids"])) for row in rows]
    scored = scoring.score_answers(stage.encoder, stage.programs, stage.params, items)["logps"]
    np.testing.assert_allclose([row["logprob"] for row in rows], scored, rtol=0, atol=1e-4)


@pytest.mark.parametrize("looks", [1, 4, 7])
@pytest.mark.parametrize("damage", ["none", "torn line", "half a prompt"])
def test_an_interrupted_stage_goes_on_to_the_same_file(stage, whole, tmp_path, looks, damage):
    path = tmp_path / "responses.jsonl"
    partial = tmp_path / "responses.jsonl.partial"
    with pytest.raises(Interrupted):
        stage(path, StopsAfter(looks))
    assert stage.asked == list(range(20)) and not path.exists()
    lines = partial.read_bytes().split(b"\n")[:-1]
    assert 0 < len(lines) < 40
    if damage == "torn line":
        partial.write_bytes(b"\n".join([*lines, lines[-1][:-9]]))
    elif damage == "half a prompt":
        lines = lines[:-1]
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
    rows = [json.loads(line) for line in lines]
    done = [i for i in range(20) if sum(row["prompt_number"] == i for row in rows) == 2]
    stage(path, console.Stopper())
    assert stage.asked == [i for i in range(20) if i not in done]
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    # What was sampled before the interruption counts too, and once.
    assert stage.account.counts == costs.sampled(stage.programs, rows_in(whole))
    assert stage.account.counts.generated == sum(len(row["response_ids"]) for row in rows_in(whole))


def test_a_whole_part_samples_nothing(stage, whole, tmp_path):
    partial = tmp_path / "responses.jsonl.partial"
    partial.write_bytes(whole.read_bytes())
    stage(tmp_path / "responses.jsonl", console.Stopper())
    assert stage.asked == [] and (tmp_path / "responses.jsonl").read_bytes() == whole.read_bytes()


def test_slots_are_full_and_nothing_compiles_again(stage, whole, tmp_path, monkeypatch):
    """Of the slots' tokens most are an answer's; a slot is empty at most until the next look."""
    used = []
    decode = stage.programs.sampler.decode

    def counted(params, slots, *settings):
        before = np.asarray(slots.lengths).copy(), np.asarray(slots.done).copy()
        slots, done = decode(params, slots, *settings)
        grown = np.where(before[1], 0, np.asarray(slots.lengths) - before[0])
        used.append((grown.sum(), grown.max() * len(grown)))
        return slots, done

    compiled = decode._cache_size(), stage.programs.sampler.admit._cache_size()
    monkeypatch.setattr(stage.programs.sampler, "decode", counted)
    stage(tmp_path / "again.jsonl", console.Stopper())
    assert (decode._cache_size(), stage.programs.sampler.admit._cache_size()) == compiled
    assert compiled[0] > 0
    # All but the last looks, at which nothing waits any more.
    tokens, places = np.sum(used[:-3], axis=0)
    assert tokens / places > 0.7


def test_a_line_holds_any_text(tmp_path):
    characters = "\u2028\u2029\x85\x0b\x0c\x1c\r\n\ud800é"
    rows = [{"response": f"a{character}b", "n": n} for n, character in enumerate(characters)]
    file = AppendOnly(tmp_path / "rows.jsonl")
    for row in rows:
        file.write(row)
    assert file.cut(lambda row: True) == rows
    assert file.cut(lambda row: row["n"] < 3) == rows[:3]


def test_without_memory_half_of_the_slots_go_on(world_dir, tiny_config, whole, monkeypatch, capsys):
    made = SampleStage(tiny_config(world_dir, sample=dict(batch_size=2)))
    slots, calls = made.slots, []

    def exhausted(decode, most):
        def call(*arguments):
            calls.append(1)
            if len(calls) > most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
            return decode(*arguments)

        return call

    def rows():
        settings = dict(responses=2, sampling=ONE, key=made.key)
        return sampling.sample_rows(made.encoder, made.programs, made.params, made.numbered, **settings)

    monkeypatch.setattr(engine_sampler, "SEGMENT", 4)
    monkeypatch.setattr(made.programs.sampler, "decode", exhausted(made.programs.sampler.decode, 6))
    found = rows()
    assert made.programs.slot_spec.slots == slots // 2
    assert f"going on with {slots // 2} answers at once" in capsys.readouterr().err
    expected = rows_in(whole)
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in expected]
    # Not a second time.
    calls.clear()
    monkeypatch.setattr(made.programs.sampler, "decode", exhausted(made.programs.sampler.decode, 1))
    with pytest.raises(InputError, match=f"no memory for {slots // 2} answers at once; set sample.batch_size"):
        rows()


def test_held_out_answers_are_sampled_as_evaluate_says(world_dir, tiny_config):
    """At temperature 0 all answers to a prompt are the greedy one, whatever the answers are that a run trains on."""
    wanted = dict(sample=dict(temperature=0.8, top_p=0.95), evaluate=dict(temperature=0.0, samples=2))
    encoder, inputs, programs, parameters = prepare(tiny_config(world_dir, **wanted))
    config = programs.config
    assert evaluation.heldout_sampling(config) == Sampling.of(0.0, 0.95)
    as_sampled = dataclasses.replace(config, evaluate=EvaluateConfig(top_k=5))
    assert evaluation.heldout_sampling(as_sampled) == Sampling.of(0.8, 0.95, 5)
    of = dict(model=parameters.configured, reference=None, grader=None, title="evaluate")
    values, rows = evaluation.evaluate(config, encoder, inputs, programs, **of)
    greedy = {row["prompt_number"]: row["response_ids"] for row in rows if row["greedy"]}
    sampled = [row for row in rows if not row["greedy"]]
    assert len(sampled) == 2 * len(greedy) == 2 * len(inputs.heldout_prompts) > 2
    assert all(row["response_ids"] == greedy[row["prompt_number"]] for row in sampled) and values["distinct"] == 1
