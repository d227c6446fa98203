"""The whole objective through a model: rows, forward pass, losses and gradients against torch in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scir_jax.config.checks import resolve
from scir_jax.config.schema import Config
from scir_jax.data.batches import RowGroup
from scir_jax.data.pairs import from_row
from scir_jax.data.pipelines import Way, pair_batches
from scir_jax.data.steps import TrainBatch, TrainSpec
from scir_jax.engine import forward
from scir_jax.method import rewards
from scir_jax.model.hf import weights
from scir_jax.model.segments import BRANCH
from scir_jax.run import scoring
from scir_jax.run.setup import Setup, prepare
from tests.run.runs import POINTWISE
from tests.torch_objective import ANSWERS, CONTINUATION, PROMPTS, STANDALONE, Reference, objective

# Compiling takes nearly all of the time here, running nearly none.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def settings(world_dir, tiny_config, tmp_path, templates, **overrides) -> Config:
    """A configuration with two replay batches that hold whole (small) files."""
    world_files = {"ift": 4, "eft": 2}
    for name, count in world_files.items():
        lines = (world_dir / f"{name}.jsonl").read_text().splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    changes = {
        "data": dict(ift=str(tmp_path / "ift.jsonl"), eft=str(tmp_path / "eft.jsonl")),
        "generative": dict(templates=tuple(str(world_dir / name) for name in templates)),
        "replay": dict(ift_batch_size=4, eft_batch_size=4 * len(templates), weight=0.3),
        "implicit": dict(beta=0.4),
        "consistency": dict(weight=0.7),
    }
    for section, values in overrides.items():
        changes[section] = {**changes.get(section, {}), **values}
    return resolve(tiny_config(world_dir, **changes))


@pytest.fixture(scope="module")
def reference(world_dir):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rows are small
    yield Reference(world_dir / "model")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def params(world_dir):
    return weights.load(world_dir / "model")[1]


@pytest.fixture
def make(world_dir, tiny_config, tmp_path):
    def make(templates=(CONTINUATION,), **overrides) -> Setup:
        return prepare(settings(world_dir, tiny_config, tmp_path, templates, **overrides))

    return make


def file_rows(reference, templates, *, weighted=False, seed=0):
    """Rows of pairs.jsonl whose cached values are near the model's own, but not equal to them."""
    near, rng, points = (np.random.default_rng(seed + i) for i in range(3))
    rows = []
    for prompt, answers, logps in zip(PROMPTS, ANSWERS, reference.answer_logps, strict=True):
        row = {"prompt_ids": reference.prompt_ids(prompt), "prompt_quote_ids": reference.ids(prompt)}
        for side, answer in zip("ab", answers):
            row |= {f"response_{side}_ids": reference.answer_ids(answer), f"quote_{side}_ids": reference.ids(answer[0])}
        row["cached"] = {
            f"{role}_logps": (logps + near.normal(0, 3, 2)).tolist() for role in ("preference", "implicit", "start")
        }
        row["cached"] |= {"start_points": points.uniform(0, 5, 2).tolist(), "start_points_mass": [0.5, 0.25]}
        row["frozen_logits"] = {
            name: rng.normal(0, 2, templates if name == "generative" else 1).tolist()
            for name in rewards.REWARDS
            if name != "pointwise"
        }
        row["verdicts"] = rng.normal(0, 2, 2 * templates).tolist()
        row["length_penalty"] = 0.05
        row["label"] = float(rng.choice([0, 1, 0.8, 0.3]))
        row["weight"] = float(rng.choice([1, 0.5, 3])) if weighted else 1.0
        rows.append(row)
    return rows


def widened(spec: TrainSpec, size: int, longer: int) -> TrainSpec:
    """The same batch with `size` pairs and rows that are `longer` tokens wider."""

    def wider(group: RowGroup) -> RowGroup:
        return group._replace(leading=(size, *group.leading[1:]), tokens=group.tokens + longer)

    pairs = dataclasses.replace(
        spec.pairs, pairs=size, answers=wider(spec.pairs.answers), judges=tuple(map(wider, spec.pairs.judges))
    )
    targets = tuple((name, group._replace(tokens=group.tokens + longer)) for name, group in spec.targets)
    return dataclasses.replace(spec, pairs=pairs, targets=targets)


def train_batch(setup: Setup, rows, *, size=8, longer=0, way=Way()) -> TrainBatch:
    """The first batch of the pipelines, `longer` tokens wider than the run's own."""
    pairs = [from_row(row, f"row {i}") for i, row in enumerate(rows)]
    spec = widened(setup.programs.optimise_spec, size, longer)
    seeds = {"ift": 1, "eft": 1}
    return pair_batches(
        spec, setup.encoder, pairs, setup.inputs.targets, epochs=1, seed=0, seeds=seeds, way=way
    ).dataset[0]


@functools.cache
def step_of(trainer):
    return jax.jit(jax.value_and_grad(lambda p, b: trainer.value(p, {}, b), has_aux=True), compiler_options=QUICK)


def evaluated(setup: Setup, params, batch: TrainBatch):
    """(loss, means, decisions of the real pairs in the file's order, gradients)."""
    (loss, (sums, decisions)), gradients = jax.device_get(step_of(setup.programs.optimise)(params, batch))
    means = {name: total / max(count, 1e-9) for name, (total, count) in sums.items()}
    np.testing.assert_array_equal(decisions["pair"], batch.pairs.index)
    places = [int(np.flatnonzero(batch.pairs.index == i)[0]) for i in range(batch.pairs.index.max() + 1)]
    return loss, means, {name: value[places] for name, value in decisions.items()}, gradients


def outputs(setup: Setup, params, batch: TrainBatch, segmented=False):
    """log pi(y|x) [P, 2], verdicts [P, G, 2, 2] and the reward models' logits [P, R] of a batch of pairs."""
    programs, config = setup.programs, setup.programs.config

    def run(params, batch):
        found = forward.outputs(
            programs.model,
            params,
            batch,
            segmented=segmented,
            verdict_ids=programs.facts.verdict_ids,
            answer_tokens=programs.facts.lengths.answer,
            wanted=tuple(forward.SPANS),
        ).fresh
        logits = rewards.reward_logits(forward.evidence(batch.pairs, found), config, config.rewards.models)
        return found["logps"], found["verdicts"], jnp.concatenate(list(logits.values()), axis=1)

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, batch))


def assert_same_gradients(found, expected, tolerance):
    """Each array's error relative to its norm."""
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected)]
    assert min(norms) > 0
    floor = 1e-3 * max(norms)
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), floor), found, expected)
    assert max(jax.tree.leaves(errors)) < tolerance, errors


NO_REPLAY = dict(weight=0.0, ift_batch_size=0, eft_batch_size=0)
QUIET = dict(consistency=dict(weight=0.0), selection=dict(rule="all"))
CASES = {
    "scir": ((STANDALONE, CONTINUATION), {}),
    "continued first, soft frozen consensus, ipo": (
        (CONTINUATION, STANDALONE),
        dict(
            replay=NO_REPLAY,
            consistency=dict(kind="cross_entropy", stop_gradient="implicit"),
            rewards=dict(weights={"generative": 1.0, "implicit": 0.5}),
            implicit=dict(length="mean"),
            preference=dict(labels="consensus", update="frozen", soft=True, loss="ipo", length_normalised=True),
        ),
    ),
    "likelihood, hinge, js": (
        (CONTINUATION,),
        dict(
            replay=NO_REPLAY,
            consistency=dict(kind="js"),
            rewards=dict(models=("likelihood", "implicit", "generative"), likelihood_length="mean"),
            preference=dict(labels="likelihood", loss="hinge", beta=0.3),
            selection=dict(rule="all"),
        ),
    ),
    "confident judge, smoothed": (
        (STANDALONE,),
        dict(
            replay=NO_REPLAY,
            consistency=dict(kind="agreement", stop_gradient="generative"),
            implicit=dict(length="penalty"),
            preference=dict(labels="generative", soft=True, label_smoothing=0.1),
            selection=dict(confidence=0.02),
        ),
    ),
    "external labels, towards the consensus": (
        (CONTINUATION, STANDALONE),
        dict(
            consistency=dict(kind="pseudo_label", target="consensus"),
            rewards=dict(models=("implicit", "generative"), weights={"generative": 1.0, "implicit": 0.2}),
            preference=dict(labels="external"),
            selection=dict(rule="all"),
        ),
    ),
    "one order": (
        (CONTINUATION, STANDALONE),
        dict(replay=NO_REPLAY, judge=dict(orders="one"), consistency=dict(kind="cross_entropy")),
    ),
    "entropy": (
        (CONTINUATION,),
        dict(
            replay=NO_REPLAY,
            rewards=dict(models=("generative", "implicit", "entropy"), entropy_scale=3.0),
            preference=dict(labels="entropy", soft=True),
            selection=dict(rule="all"),
        ),
    ),
    "no judge in the step: frozen labels of the judge": (
        (CONTINUATION, STANDALONE),
        dict(**QUIET, preference=dict(labels="generative", update="frozen")),
    ),
    "no judge in the step: as much as it was certain": (
        (STANDALONE,),
        dict(
            replay=NO_REPLAY,
            consistency=dict(weight=0.0),
            selection=dict(rule="certainty", power=2.0),
            preference=dict(labels="external", loss="ipo"),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_torch(case, make, reference, params, tmp_path):
    templates, overrides = CASES[case]
    setup = make(templates, **overrides)
    config, judged = setup.programs.config, not case.startswith("no judge")
    rows = file_rows(reference, len(templates), weighted=True)
    batch = train_batch(setup, rows)
    assert (batch.pairs.weight > 0).sum() == len(rows) < len(batch.pairs.weight)
    assert len({row["weight"] for row in rows}) > 1
    orders = 1 if case == "one order" else 2
    assert batch.pairs.verdict.shape == (8, len(templates) if judged else 0, orders)

    loss, means, decisions, gradients = evaluated(setup, params, batch)
    expected, expected_means, expected_decisions = objective(reference, rows, config, templates, judged)
    assert 0 < expected_means["selected"]
    if judged:
        assert len(np.unique(expected_decisions["agreed"])) == 2
    else:
        assert not {"p_generative", "agreed"} & set(decisions)
        assert not any(name.startswith("generative/") for name in means)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, value in expected_means.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert ("generative/slot_bias" in means) == (judged and orders == 2)
    for name, value in expected_decisions.items():
        np.testing.assert_allclose(np.float64(decisions[name]), np.float64(value), atol=3e-5, err_msg=name)
    assert_same_gradients(gradients, reference.gradients(expected, tmp_path / "gradients"), 1e-4)


def with_answers(row, *sides):
    """A row whose first and second answer are those of the sides "a" or "b", with their values."""
    other = {**row, "cached": {}}
    for new, old in zip("ab", sides, strict=True):
        other |= {f"{key}_{new}_ids": row[f"{key}_{old}_ids"] for key in ("response", "quote")}
    for name, values in row["cached"].items():
        other["cached"][name] = [values["ab".index(old)] for old in sides]
    return other


@pytest.mark.parametrize(
    "templates", [(STANDALONE, CONTINUATION), (CONTINUATION, STANDALONE)], ids=["separate", "continued"]
)
def test_identical_and_swapped_pairs_in_every_reward_model(templates, make, reference, params, tmp_path):
    (tmp_path / "points.yaml").write_text(POINTWISE)
    generative = dict(pointwise=str(tmp_path / "points.yaml"))
    setup = make(templates, rewards=dict(models=tuple(rewards.REWARDS), entropy_scale=3.0), generative=generative)
    rows = file_rows(reference, 2)
    batch = train_batch(setup, rows)
    _, _, logits = outputs(setup, params, batch)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    assert p.shape == (8, 6) and np.abs(p[:6] - 0.5).max(axis=0).min() > 0.05

    # The rows of a swapped pair are made from the swapped file, not by exchanging the rows.
    swapped_batch = train_batch(setup, [with_answers(row, "b", "a") for row in rows])
    np.testing.assert_array_equal(swapped_batch.pairs.length, batch.pairs.length[:, ::-1])
    _, _, swapped = outputs(setup, params, swapped_batch)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.float64(swapped))), 1 - p, atol=1e-6)

    _, _, same = outputs(setup, params, train_batch(setup, [with_answers(row, "a", "a") for row in rows]))
    np.testing.assert_allclose(1 / (1 + np.exp(-np.float64(same))), 0.5, atol=1e-6)


def test_both_layouts_score_answers_alike(make, reference, params):
    rows = file_rows(reference, 2)
    found = {}
    for templates in ((STANDALONE, CONTINUATION), (CONTINUATION, STANDALONE)):
        setup = make(templates)
        batch = train_batch(setup, rows)
        logps, verdicts, _ = outputs(setup, params, batch)
        order = np.argsort(batch.pairs.index[: len(rows)])
        found[templates[0]] = logps[order], verdicts[order][:, :: 1 if templates[0] == STANDALONE else -1]
    for separate, continued in zip(*found.values(), strict=True):
        np.testing.assert_allclose(continued, separate, atol=2e-5)
    np.testing.assert_allclose(found[STANDALONE][0], reference.answer_logps, atol=1e-4)


@pytest.mark.slow
def test_padding_packing_and_accumulation_change_nothing(make, reference, params):
    # Five pairs of eight: with two micro-batches one is padded, with four the last is padding alone.
    rows = file_rows(reference, 1, weighted=True)[:5]

    def made(micro=1, kind="off", bin=0, prompts="never", **longer):
        text = dict(packing=kind, bin_tokens=bin, share_prompts=prompts)
        setup = make(replay=dict(ift_batch_size=4), training=dict(accumulate=micro), text=text)
        way = setup.programs.way
        assert way.kind == kind and setup.programs.optimise_spec.micro == micro
        return setup, train_batch(setup, rows, way=way, **longer)

    setup, batch = made()
    loss, means, decisions, gradients = evaluated(setup, params, batch)
    variants = {
        "longer rows, more padded pairs": (setup, train_batch(setup, rows, size=12, longer=24)),
        "two micro-batches": made(2),
        "one bin": made(1, "bins"),
        "bins": made(1, "bins", 96),
        "bins of two micro-batches": made(2, "bins", 96),
        "bins in which rows share their beginnings": made(1, "bins", prompts="always"),
        "few lengths of four micro-batches": made(4, "lengths"),
    }
    assert (batch.pairs.weight > 0).tolist() == [True] * 5 + [False] * 3
    shapes = {name: [ids.shape for ids in other.rows.ids] for name, (_, other) in variants.items()}
    assert shapes["one bin"][0][0] == 1 < shapes["bins"][0][0] and shapes["bins"][0][1] == 96
    assert len(shapes["few lengths of four micro-batches"]) > 1
    assert (variants["bins in which rows share their beginnings"][1].rows.segments[0] >= 2 * BRANCH).any()
    for name, (other, other_batch) in variants.items():
        loss_, means_, decisions_, gradients_ = evaluated(other, params, other_batch)
        assert loss_ == pytest.approx(loss, rel=1e-5), name
        assert means_ == pytest.approx(means, rel=1e-5, abs=1e-5), name
        for key, value in decisions.items():
            np.testing.assert_allclose(np.float64(decisions_[key]), np.float64(value), atol=1e-5, err_msg=name)
        assert_same_gradients(gradients_, gradients, 1e-5)


@pytest.mark.parametrize("prompts", ["never", "always"])
def test_no_row_of_a_bin_sees_another(prompts, make, reference, params):
    """Another answer of one pair changes no bit of what is read off the others, nor of the pair's first answer."""
    text = dict(packing="bins", share_prompts=prompts)
    setup = make((STANDALONE, CONTINUATION), text=text, replay=NO_REPLAY)
    programs, rows = setup.programs, file_rows(reference, 2)

    def found(rows):
        batch = train_batch(setup, rows, way=programs.way)
        assert len(batch.rows.ids) == 1 and len(np.unique(batch.rows.segments[0])) > 4 * len(rows), "one bin holds all"
        assert (batch.rows.segments[0] >= BRANCH).any() == (prompts == "always")
        logps, verdicts, _ = outputs(setup, params, batch, segmented=True)
        order = np.argsort(batch.pairs.index)[-len(rows) :]
        return logps[order], verdicts[order]

    number = max(range(len(rows)), key=lambda i: len(rows[i]["response_b_ids"]))
    changed = with_answers(rows[number], "a", "b")
    for key in ("response_b_ids", "quote_b_ids"):
        changed[key] = [changed[key][1], changed[key][0], *changed[key][2:]]
    assert changed["response_b_ids"] != rows[number]["response_b_ids"]
    others = [i for i in range(len(rows)) if i != number]
    for before, after in zip(found(rows), found([*rows[:number], changed, *rows[number + 1 :]]), strict=True):
        assert (before[number] != after[number]).any()
        assert before[others].tobytes() == after[others].tobytes()
        if before.ndim == 2:
            assert before[number, 0] == after[number, 0] and before[number, 1] != after[number, 1]


def test_first_step_and_skipped_steps(make, reference, params):
    setup = make(selection=dict(rule="all"), replay=NO_REPLAY, consistency=dict(weight=0.0))
    encoder, programs = setup.encoder, setup.programs
    rows = file_rows(reference, 1)
    prompts = [encoder.prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    items = [
        (prompt, encoder.sampled(row[f"response_{side}_ids"])) for prompt, row in zip(prompts, rows) for side in "ab"
    ]
    start = scoring.score_answers(encoder, programs, jax.tree.map(jnp.asarray, params), items)["logps"].reshape(-1, 2)
    for row, values in zip(rows, start):
        row["cached"]["preference_logps"] = row["cached"]["start_logps"] = values.tolist()
    batch = train_batch(setup, rows)
    cached = {name: values.copy() for name, values in batch.pairs.cached.items()}
    broken = batch._replace(pairs=batch.pairs._replace(cached=cached))
    cached["preference_logps"][2, 0] = np.nan

    def snapshot(state):
        return [np.array(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]

    trainer = programs.optimise
    state = trainer.init(jax.tree.map(jnp.array, params))
    rate = np.float32(1e-2)
    step = trainer.step.lower(state, {}, batch, rate, None).compile(QUICK)
    before = snapshot(state)
    for skipped in (1, 2):
        state, output = step(state, {}, broken, rate, None)
        assert output.metrics["skipped"] == 1 and output.metrics["skipped_in_a_row"] == state.skipped == skipped
        for old, new in zip(before, snapshot(state), strict=True):
            assert old.tobytes() == new.tobytes()
    state, output = step(state, {}, batch, rate, None)
    # The reference is the policy: DPO's loss is ln 2, whatever the labels.
    assert output.metrics["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert output.metrics["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert output.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert output.metrics["skipped"] == 0 and state.skipped == 0
    assert all(not np.array_equal(old, new) for old, new in zip(before, snapshot(state)) if old.ndim)
    state, output = step(state, {}, batch, rate, None)
    assert output.metrics["preference"] < np.log(2) - 0.01


def test_a_step_without_pairs_that_agree(make, reference, params):
    """Nothing selected, nothing else weighed: loss 0 and no gradient, not 0 / 0."""
    setup = make(selection=dict(confidence=0.499999), replay=NO_REPLAY, consistency=dict(weight=0.0))
    loss, means, decisions, gradients = evaluated(setup, params, train_batch(setup, file_rows(reference, 1)))
    assert loss == 0 and means["selected"] == 0 and not decisions["selected"].any()
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(gradients))
