"""Settings that are proposed: they fit, what is given stands, and more room never makes a run smaller."""

import dataclasses
import itertools

import numpy as np
import pytest

from scir_jax.config.checks import check
from scir_jax.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from scir_jax.model import families
from scir_jax.planning.architectures import architecture
from scir_jax.run.proposals import PROPOSALS, Facts, Need, propose

GIB = 2**30
SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
CONFIG = Config(data=DataConfig(prompts="p.jsonl"))


def facts(name="Qwen3-8B", gib=80.0, **changes) -> Facts:
    arch = families.read(*architecture(f"models/{name}"))
    judges = {"evaluator": 160, "standalone": 120, "criteria": 90}
    found = Facts(arch, "gpu", 1, int(gib * GIB), prompts=(40, 100, 180), rows=3000, judges=judges)
    return dataclasses.replace(found, **changes)


def proposed(found: Facts, config: Config = CONFIG, given=(), kinds=PROPOSALS):
    config, proposals = propose(found, config, set(given), kinds, SECTIONS)
    check(config)
    return config, proposals


@pytest.mark.parametrize(
    "name, gib, devices, rank",
    [
        ("Qwen3-8B", 80, 1, 16),
        ("Qwen3-8B", 80, 8, 0),
        ("Llama-3.2-1B-Instruct", 80, 1, 0),
        ("Llama-3.2-1B-Instruct", 16, 1, 16),
        ("Qwen3-8B", 24, 1, 16),
    ],
)
def test_full_fine_tuning_where_it_fits_else_adapters(name, gib, devices, rank):
    found = facts(name, gib, devices=devices)
    config, proposals = proposed(found)
    assert config.lora.rank == rank and config.model.dtype == "bfloat16"
    # 16 bytes per parameter: weights, gradients and two moments in float32.
    whole = 16 * found.arch.parameter_count() / devices
    assert (whole > 0.9 * gib * GIB) <= bool(rank)
    assert (config.optimise.learning_rate == 2e-5) == bool(rank)
    assert (config.mesh.fsdp == -1) == (devices > 1)
    need = Need(found, config)
    assert need.training(config.lora.rank, config.model.remat, config.training.accumulate) <= 0.9 * gib * GIB
    assert need.sampling(config.sample.batch_size) <= 0.9 * gib * GIB
    assert need.scoring(config.evaluate.batch_size) <= 0.9 * gib * GIB
    assert all(proposal.reason for proposal in proposals.values())


def test_more_memory_never_makes_a_run_smaller():
    before = None
    for gib in (20, 24, 40, 80, 141, 180):
        config, _ = proposed(facts(gib=gib))
        now = (config.lora.rank == 0, config.model.remat == "none", -config.training.accumulate)
        slots = (config.sample.batch_size, config.evaluate.batch_size)
        if before:
            assert now >= before[0] and all(new >= old for new, old in zip(slots, before[1]))
        before = now, slots


def test_what_is_given_stands_and_the_rest_is_proposed_for_it():
    small = facts("Llama-3.2-1B-Instruct", 80)
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=64), training=TrainingConfig(accumulate=4))
    given = {"lora.rank", "training.accumulate", "data.prompts"}
    found, proposals = proposed(small, config, given)
    assert (found.lora.rank, found.training.accumulate) == (64, 4) and not given & set(proposals)
    everything = {
        f"{s.name}.{f.name}" for s in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, s.name))
    }
    assert proposed(small, config, everything) == (config, {})
    assert set(proposed(small, kinds=("devices",))[1]) == {"model.dtype"}


def test_a_model_that_fits_in_no_way_is_proposed_the_smallest():
    """The memory of the compiled programs is what refuses it, with advice."""
    config, proposals = proposed(facts(gib=4))
    assert (config.lora.rank, config.model.remat, config.training.accumulate) == (16, "full", 16)
    assert "too large" in proposals["training.accumulate"].reason


@pytest.mark.parametrize("context, thinks", itertools.product((256, 1024, 4096, 40960), (False, True)))
def test_a_question_with_two_answers_fits_into_the_context(context, thinks):
    rng = np.random.default_rng(context)
    for _ in range(50):
        prompts = rng.integers(1, rng.choice([50, 500, 5000, 50000]), 20)
        answers = rng.integers(1, rng.choice([50, 3000]), rng.choice([0, 20]))
        found = facts(prompts=prompts, answers=answers, thinks=thinks)
        found = dataclasses.replace(found, arch=dataclasses.replace(found.arch, max_positions=context))
        config, proposals = proposed(found, kinds=("text",))
        (template,) = config.generative.templates
        prompt, answer = config.text.max_prompt_tokens, config.text.max_response_tokens
        assert prompt >= 1 and answer >= 1
        assert found.judges[template] + prompt + 2 * answer + 1 <= context
        assert bool(config.text.chat_template_kwargs) == thinks
        cut = int((prompts > prompt).sum())
        assert cut <= 1 or "two answers must fit beside it" in proposals["text.max_prompt_tokens"].reason
        if len(answers) and "holds two" not in proposals["text.max_response_tokens"].reason:
            assert answer >= np.percentile(answers, 99)


def test_templates_that_the_tokenizer_does_not_allow():
    assert proposed(facts(judges={"criteria": 90}))[0].generative.templates == ("criteria",)
    config, proposals = proposed(facts(judges={}))
    assert config.generative == CONFIG.generative and "text.max_prompt_tokens" not in proposals


def test_what_there_are_no_data_for_is_left_out():
    data = DataConfig(prompts="p.jsonl")
    config, _ = proposed(facts())
    assert (config.sft.epochs, config.replay.weight, config.data.holdout) == (0, 0, 64)
    both = dataclasses.replace(data, ift="i", eft="e", heldout_prompts="h")
    assert not set(proposed(facts(), dataclasses.replace(CONFIG, data=both), kinds=("method",))[1])
    assert proposed(facts(rows=24))[0].data.holdout == 2 and proposed(facts(rows=7))[0].data.holdout == 0
    assert proposed(facts(rows=12))[0].sample.batch_size <= 8


def test_batches_divide_over_devices_and_micro_batches():
    for devices, gib in itertools.product((1, 2, 4, 8), (20, 80)):
        config, _ = proposed(facts(gib=gib, devices=devices))
        for size in (config.optimise.batch_size, config.sft.ift_batch_size, config.replay.eft_batch_size):
            assert size % (config.training.accumulate * devices) == 0
        assert config.sample.batch_size % devices == config.evaluate.batch_size % devices == 0
