"""Settings that contradict each other are refused with one sentence that names the key."""

import dataclasses

import pytest

from scir_jax.config.checks import check, resolve, until_of
from scir_jax.config.schema import Config, RunConfig
from scir_jax.errors import InputError


def configured(**sections) -> Config:
    config = Config()
    values = {name: dataclasses.replace(getattr(config, name), **part) for name, part in sections.items()}
    return dataclasses.replace(config, **values)


CREAM = dict(pairs=dict(kind="cream"), preference=dict(labels="cream"))
DICE = dict(pairs=dict(kind="dice"), preference=dict(labels="dice"), consistency=dict(weight=0.0))


@pytest.mark.parametrize(
    "sections, words",
    [
        (dict(pairs=dict(kind="cream")), "preference.labels cream and pairs.kind cream belong together"),
        (dict(preference=dict(labels="cream")), "preference.labels cream and pairs.kind cream belong together"),
        (CREAM | dict(data=dict(pairs="pairs.jsonl")), "leave data.pairs out"),
        (CREAM | dict(selection=dict(rule="certainty")), "pairs.kind cream asks the judge nothing"),
        (
            CREAM | dict(consistency=dict(target="consensus")),
            "pairs.kind cream asks the judge nothing",
        ),
        (CREAM | dict(consistency=dict(target="lagged")), "pairs.kind cream asks the judge nothing"),
        (dict(pairs=dict(kind="dice")), "preference.labels dice and pairs.kind dice belong together"),
        (DICE | dict(selection=dict(rule="sampled")), "pairs.kind dice asks the judge nothing"),
        (DICE | dict(data=dict(pairs="pairs.jsonl")), "preference.labels is dice, which ranks sampled"),
        (dict(consistency=dict(target="labels")), "but preference.labels is agreement; set that to one of external"),
        (
            dict(consistency=dict(target="labels", weight=0.0), preference=dict(labels="external")),
            "consistency.weight is 0, so that they teach nothing",
        ),
        (dict(consistency=dict(target="transitive")), "set pairs.kind to all or best_worst"),
        (
            dict(consistency=dict(target="transitive"), pairs=dict(kind="all"), data=dict(pairs="pairs.jsonl")),
            "leave data.pairs out",
        ),
        (dict(selection=dict(rule="sampled")), "draws pairs by their labels before training; set preference.update"),
        (dict(pairs=dict(offline=1.0)), "pairs.offline must be at least 0 and below 1, not 1.0"),
        (dict(pairs=dict(offline=0.5), data=dict(eft="eft.jsonl")), "pairs.offline takes pairs from data.eft"),
        (dict(pairs=dict(kind="dice", offline=0.5), preference=dict(labels="dice")), "from data.eft"),
        (dict(judge=dict(constructed_batch_size=-1)), "judge.constructed_batch_size must not be negative, not -1"),
        (dict(judge=dict(slot_penalty=-0.1)), "judge.slot_penalty must not be negative"),
        (
            dict(judge=dict(orders="one", slot_penalty=0.1)),
            "judge.slot_penalty is set, for which a step asks the judge in",
        ),
        (dict(judge=dict(orders="one"), selection=dict(rule="both_orders")), "leave judge.orders at both"),
        (dict(judge=dict(constructed_batch_size=2, constructions=())), "judge.constructions is empty"),
        (dict(judge=dict(constructed_batch_size=3), training=dict(accumulate=2)), "batch_size=3 does not divide"),
        (dict(text=dict(bin_tokens=-1)), "text.bin_tokens is -1 and text.packing auto; it is the size of a bin"),
        (dict(text=dict(bin_tokens=512, packing="off")), "text.bin_tokens is 512 and text.packing off"),
        (dict(selection=dict(power=-1.0)), "selection.power must not be negative, not -1.0"),
        (dict(selection=dict(confidence=-0.1)), "selection.confidence must not be negative"),
        (dict(consistency=dict(sharpen=0.0)), "consistency.sharpen must be positive, not 0.0"),
        (dict(preference=dict(beta=0.0)), "preference.beta must be positive"),
        (
            dict(consistency=dict(target="consensus"), rewards=dict(weights={"likelihood": 1.0})),
            "rewards.weights.likelihood: likelihood is not in rewards.models",
        ),
        (dict(consistency=dict(target="consensus"), rewards=dict(weights={})), "the consensus .* has no weight"),
        (dict(rewards=dict(weights={"generative": "much"})), "rewards.weights.generative must be a number"),
        (dict(rewards=dict(models=("implicit", "implicit"))), "each once"),
        (dict(training=dict(accumulate=3)), "does not divide into training.accumulate=3 micro-batches"),
        (dict(generative=dict(passes=0)), "generative.passes must be at least 1"),
        (
            dict(evaluate=dict(select="consensus")),
            "select is consensus, which needs labelled pairs: set data.heldout_p",
        ),
        (dict(evaluate=dict(early_stop=True)), "evaluate.early_stop is true, which needs labelled pairs"),
        (dict(evaluate=dict(every=5)), "evaluate.every is 5, which needs labelled pairs"),
        (dict(evaluate=dict(temperature=-1.0)), "evaluate: temperature and top_k must not be negative"),
        (dict(sample=dict(top_p=0.0)), r"sample: .* top_p must be in \(0, 1\]"),
        (dict(evaluate=dict(every=-1)), "evaluate.every must not be negative, not -1"),
        (dict(evaluate=dict(select="win_rate")), "select is win_rate, which needs graded answers: set evaluate.grader"),
        (
            dict(evaluate=dict(select="greedy_quality", greedy=False, grader="m:f"), data=dict(heldout_prompts="p")),
            "evaluate.greedy is false",
        ),
    ],
)
def test_contradictions_are_refused(sections, words):
    with pytest.raises(InputError, match=words):
        check(configured(**sections))


def test_what_belongs_together_is_taken():
    check(configured())
    check(configured(**CREAM, selection=dict(rule="all"), consistency=dict(weight=0.0)))
    check(configured(selection=dict(rule="certainty"), consistency=dict(weight=0.0)))
    dice = dict(pairs=dict(kind="dice", offline=0.5), data=dict(eft="eft.jsonl"), selection=dict(rule="all"))
    check(configured(**DICE | dice))
    check(configured(selection=dict(rule="sampled"), preference=dict(update="frozen")))
    for kind in ("all", "best_worst"):
        check(configured(consistency=dict(target="transitive"), pairs=dict(kind=kind)))
    pairs = dict(heldout_pairs="pairs.jsonl", heldout_prompts="prompts.jsonl")
    check(configured(evaluate=dict(select="consensus", early_stop=True, every=3), data=pairs))
    check(configured(evaluate=dict(select="quality", grader="module:function"), data=pairs))


@pytest.mark.parametrize(
    "sections, words",
    [
        (dict(run=dict(directory="s3://bucket/a")), "run.directory is s3://bucket/a: of buckets only gs://"),
        (dict(run=dict(start_from="az://bucket/a")), "run.start_from is az://bucket/a: of buckets only gs://"),
        (dict(world=dict(directory="gs://bucket/world")), "world.directory is gs://bucket/world: the world is made on"),
        (dict(model=dict(path="hf://owner/name")), "model.path is hf://owner/name: of buckets only gs://"),
    ],
)
def test_places_that_cannot_be_used(sections, words):
    with pytest.raises(InputError, match=f"^{words}"):
        resolve(configured(**sections))


@pytest.mark.parametrize(
    "until, stage",
    [
        (None, None),
        ("sft", ("sft", 0)),
        ("evaluate:0", ("evaluate", 0)),
        ("sample:2", ("sample", 2)),
        ("optimise:1", ("optimise", 1)),
    ],
)
def test_the_last_stage(until, stage):
    assert until_of(Config(run=RunConfig(until=until))) == stage


@pytest.mark.parametrize(
    "until", ["sample:3", "sample", "sample:0", "sampel:1", "start:1", "sft:1", "evaluate:-1", ":1", ""]
)
def test_a_stage_that_the_run_has_not(until):
    with pytest.raises(InputError, match="this run's stages are sft"):
        check(Config(run=RunConfig(until=until)))


@pytest.mark.parametrize(
    "key, values, words",
    [
        ("implicit", dict(reference="start"), "it is one of previous, sft, base, a model directory, or"),
        ("preference", dict(reference="./models/none"), "there is no models/none/config.json"),
        ("data", dict(holdout=-1), "data.holdout must not be negative"),
    ],
)
def test_references_and_held_out_rows(key, values, words):
    section = dataclasses.replace(getattr(Config(), key), **values)
    with pytest.raises(InputError, match=words):
        check(dataclasses.replace(Config(), **{key: section}))


def test_a_reference_may_be_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), "someone/model", "someone/model@v2"):
        section = dataclasses.replace(Config().implicit, reference=name)
        check(dataclasses.replace(Config(), implicit=section))
