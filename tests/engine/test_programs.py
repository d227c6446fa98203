"""Programs come from one description each: their abstract arguments are those of a run's calls."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from scir_jax.config.schema import ModelConfig
from scir_jax.data.pairs import to_row
from scir_jax.engine.forward import Judged
from scir_jax.engine.optimizer import learning_rates
from scir_jax.engine.sampler import Samples, stream_key
from scir_jax.errors import InputError
from scir_jax.run import sampling, scoring, training
from scir_jax.run.costs import Account
from scir_jax.run.directory import RunDirectory
from scir_jax.run.setup import prepare
from tests.training import heldout_items, made_up_pairs

pytestmark = pytest.mark.usefixtures("cheap_compilation")

ALL_MODELS = dict(models=("generative", "implicit", "likelihood"), weights={"generative": 1.0, "likelihood": 0.5})
FROZEN = dict(labels="consensus", update="frozen")


def configurations(world):
    both = dict(templates=(f"{world}/judge_continuation.yaml", f"{world}/judge.yaml"))
    replay = dict(weight=0.5, ift_batch_size=4, eft_batch_size=8)
    return {
        "plain": {},
        "two templates": dict(generative=both, replay=replay),
        "adapters": dict(lora=dict(rank=2, dropout=0.1), training=dict(accumulate=4)),
        "frozen logits": dict(
            generative=both, rewards=ALL_MODELS, preference=FROZEN, consistency=dict(target="consensus")
        ),
        "no judge": dict(
            preference=FROZEN, consistency=dict(weight=0.0), selection=dict(rule="all"), replay=dict(weight=0.0)
        ),
    }


def calls(setup, directory, monkeypatch):
    """What a run's stages call each program with, by name; for steps without state and frozen parameters."""
    encoder, inputs, programs, parameters = setup
    found = {program.name: [] for program in programs.all()}

    def recorded(name, answer):
        def call(*arguments):
            found[name].append(arguments)
            return answer(arguments[1])

        return call

    spec, prefill, decode = programs.slot_spec, programs.prefill_programs[0].name, programs.decode_program().name
    read = Samples(
        np.zeros((spec.slots, spec.answer_tokens), np.int32), np.zeros(spec.slots, int), np.zeros(spec.slots)
    )

    sampler = programs.sampler

    class Recorded:
        def empty(self):
            return sampler.abstract

        def admit(self, params, slots, coming):
            found[prefill].append((params, slots, coming))
            return slots

        def decode(self, params, slots, *settings):
            found[decode].append((params, slots, *settings))
            return slots, np.ones(spec.slots, bool)

        def read(self, slots):
            return read

    def judged(rows):
        shape = (*rows.verdict.shape, len(encoder.judges))
        return Judged(np.zeros((*shape, 2)), np.zeros(shape))

    def trained(config, trainer, stage, *_, iteration, dataset, peak, **__):
        key, rates = trainer.dropout_key(0, iteration, 1), learning_rates(config.training, peak, len(dataset))
        found[{"sft": "SFT step", "optimise": "SCIR step"}[stage]] += [
            (dataset[step], rates[step], key) for step in range(len(dataset))
        ]

    programs.sampler = Recorded()
    programs.scorer = recorded(programs.score_programs[0].name, lambda rows: {"logps": np.zeros(rows.first.shape)})
    programs.judge = recorded(programs.judge_programs[0].name, judged)
    monkeypatch.setattr(training, "train_stage", trained)
    params = parameters.configured()
    for answers in (1, 2):
        settings = dict(sampling=sampling.settings_of(programs.config.sample), key=stream_key(0, "responses", 1))
        numbered = list(enumerate(inputs.prompts))[:5]
        sampling.sample_rows(encoder, programs, params, numbered, responses=answers, **settings)
    scoring.score_answers(encoder, programs, params, heldout_items(setup)[:9])
    scoring.judge_pairs(encoder, programs, params, inputs.heldout_pairs[:3])
    # Pairs with all that a method may ask for.
    logits = {name: (0.5,) * 2 for name in ("generative",)} | {name: (0.5,) for name in ("implicit", "likelihood")}
    columns = dict(programs.optimise_spec.pairs.frozen)
    with (RunDirectory(directory).iteration(1) / "pairs.jsonl").open("w") as file:
        for number, pair in enumerate(made_up_pairs(setup)):
            frozen = {name: values[: columns.get(name, 1)] for name, values in logits.items()}
            file.write(json.dumps({**to_row(pair, number), "frozen_logits": frozen}) + "\n")
    needs = (programs.config, encoder, inputs, programs, None, RunDirectory(directory), None, None)
    training.run_sft(*needs, Account())
    training.run_optimise(*needs, 1, Account())
    return found


def leaves(tree):
    """Shape and dtype of every array by its place."""
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", ["plain", "two templates", "adapters", "frozen logits", "no judge"])
def test_abstract_arguments_are_those_of_a_runs_calls(world_dir, tiny_config, tmp_path, monkeypatch, name):
    setup = prepare(tiny_config(world_dir, **configurations(world_dir)[name]))
    programs, spec = setup.programs.all(), setup.programs.slot_spec
    sampler, spec_tokens = setup.programs.sampler, spec.slots * spec.answer_tokens
    found = calls(setup, tmp_path / "run", monkeypatch)
    assert [program.name for program in programs] == list(found) and len(found) == 6 and all(found.values())
    for program in programs:
        described = leaves(program.arguments[2 if program.stage in ("sft", "optimise") else 0 :])
        for arguments in found[program.name]:
            assert leaves(arguments) == described, program.name
        places = sum(math.prod(shape) for place, (shape, _) in described.items() if ".ids" in place)
        if program.stage == "prefill":
            places -= math.prod(sampler.abstract.ids.shape)
        assert program.tokens == (spec_tokens if program.stage == "decode" else places)
    # The configurations differ in what a step takes.
    rows, pairs = found["SCIR step"][-1][0]
    asked = {"no judge": 0, "two templates": 2, "frozen logits": 2}.get(name, 1)
    assert pairs.verdict.shape[1] == asked
    assert {name: values.shape[1] for name, values in pairs.frozen.items()} == {
        "frozen logits": {"generative": 2, "implicit": 1, "likelihood": 1},
        "no judge": {"generative": 1, "implicit": 1},
    }.get(name, {})
    assert set(rows.learned) == {"two templates": {"ift", "eft"}, "no judge": set()}.get(name, {"eft"})


def test_rows_are_packed_as_the_attention_allows(world_dir, tiny_config, monkeypatch):
    """cuDNN's knows no segments; it runs on a GPU, which is not here, but what is decided for it is."""

    def way(attention, **text):
        programs = prepare(tiny_config(world_dir, text=text)).programs
        monkeypatch.setattr(programs, "_attention", lambda tokens, segmented=False: attention)
        return programs

    long = dict(max_prompt_tokens=120, max_response_tokens=60)
    assert way("xla").way.kind == "off", "rows of up to 128 tokens"
    assert way("blocks", **long).way.kind == "bins" and way("splash", **long).way.segmented
    assert way("cudnn", **long).way.kind == "lengths"
    programs = way("cudnn", packing="bins", bin_tokens=256, **long)
    assert programs.way.bin == 256, "auto takes blocks for bins"
    programs = way("cudnn", packing="bins", **long)
    programs.config = dataclasses.replace(programs.config, model=ModelConfig(attention="cudnn", dtype="bfloat16"))
    with pytest.raises(InputError, match="text.packing is bins, but model.attention is cudnn, .* lengths or off"):
        _ = programs.way
