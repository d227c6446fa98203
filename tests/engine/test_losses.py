"""The whole objective through a model: rows, forward pass, losses and gradients.

The reference is transformers and torch in float64. It makes its own rows, one string at a time and without padding,
and has its own formulas.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from scir_jax.config.schema import Config
from scir_jax.data.pipelines import pairs_dataset, targets_dataset
from scir_jax.data.batches import TrainBatch
from scir_jax.engine import forward
from scir_jax.run import scoring
from scir_jax.run.session import Session
from scir_jax.method import objective
from scir_jax.model.hf import weights

STANDALONE, CONTINUATION = "judge.yaml", "judge_continuation.yaml"
RESPONSE_TOKENS = 12
# Compiling takes nearly all of the time here, running nearly none.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PROMPTS = ("copy abc=", "upper-reverse dbfbe=", "rotate eie=", "copy h=", "rotate aghceg=", "copy hha=")
# Text, and whether the stop token was sampled; one without it was cut, at RESPONSE_TOKENS or before.
ANSWERS = (
    (("abc!", True), ("ab", True)),
    (("EBFBD", True), ("EBFBDabcdefg", False)),
    (("iee", True), ("", True)),
    (("hhhhhhhhhhhh", False), ("gggg!!", False)),
    (("ghcega!", True), ("G=;1 2\njudge", True)),
    (("hha!", True), ("hhahh", True)),
)


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
    return tiny_config(world_dir, **changes)


# --- the reference ---------------------------------------------------------------------------------------------------


class Reference:
    """A model directory in torch, float64, one row at a time."""

    def __init__(self, directory):
        self.directory = directory
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(self, answer):
        text, ended = answer
        return self.ids(text) + self.ids("</s>") * ended

    def log_softmax(self, ids):
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)

    def logp(self, context, ids):
        """Log-probabilities of ids behind a context, [len(ids)]."""
        table = self.log_softmax([*context, *ids])
        return torch.stack([table[len(context) + i - 1, token] for i, token in enumerate(ids)])

    def judge_context(self, layout, prompt, a, b):
        if layout == STANDALONE:
            return self.ids(f"<s><|user|>judge {prompt}{a[0]};{prompt}{b[0]}<|assistant|>")
        return self.ids(f"<s><|user|>{prompt}<|assistant|>{a[0]}</s><|user|>judge {prompt}{b[0]}<|assistant|>")

    def verdict(self, layout, prompt, a, b):
        """logit(A) - logit(B), and P(A) + P(B)."""
        table = self.log_softmax(self.judge_context(layout, prompt, a, b))[-1]
        first, second = self.ids("1")[0], self.ids("2")[0]
        return table[first] - table[second], (table[first].exp() + table[second].exp()).detach()

    def response_logp(self, prompt, answer):
        return self.logp(self.ids(f"<s><|user|>{prompt}<|assistant|>"), self.answer_ids(answer)).sum()

    @functools.cached_property
    def response_logps(self):
        """[P, 2] of all answers, NumPy."""
        with torch.no_grad():
            return np.array([[self.response_logp(x, y).item() for y in ys] for x, ys in zip(PROMPTS, ANSWERS)])

    def replay_means(self, config, templates):
        """Mean negative log-likelihood of the marked tokens of both files."""
        ift, eft = [], []
        for line in open(config.data.ift):
            user, assistant = (m["content"] for m in json.loads(line)["messages"])
            ift.append(self.logp(self.ids(f"<s><|user|>{user}<|assistant|>"), self.ids(assistant + "</s>")))
        for line in open(config.data.eft):
            row = json.loads(line)
            good, bad = ((row[k], True) for k in ("chosen", "rejected"))
            assert max(len(self.answer_ids(x)) for x in (good, bad)) <= RESPONSE_TOKENS
            for layout in templates:
                eft.append(self.logp(self.judge_context(layout, row["prompt"], good, bad), self.ids("1")))
                eft.append(self.logp(self.judge_context(layout, row["prompt"], bad, good), self.ids("2")))
        return -torch.cat(ift).mean(), -torch.cat(eft).mean()

    def gradients(self, loss, scratch):
        """d loss / d parameters as the code's own pytree."""
        self.model.zero_grad()
        loss.backward()
        scratch.mkdir(exist_ok=True)
        shutil.copy(self.directory / "config.json", scratch)
        gradients = {name: p.grad.float().contiguous() for name, p in self.model.named_parameters()}
        save_file(gradients, scratch / "model.safetensors")
        return weights.load(scratch)[1]


def cross(p, q):
    return -(p * q.log() + (1 - p) * (1 - q).log())


def divergence(p, q):
    return cross(p, q) - cross(p, p)


def reference_consistency(ps, kind, sharpen):
    """The penalty of probabilities [P] against each other."""
    R = len(ps)
    if kind in ("kl", "cross_entropy"):
        function = divergence if kind == "kl" else cross
        return sum(function(ps[i], ps[j]) for i in range(R) for j in range(R) if i != j) / (R * (R - 1))
    if kind == "js":
        return sum(divergence(p, sum(ps) / R) for p in ps) / R
    if kind == "agreement":
        return -(torch.stack(ps).prod(dim=0) + (1 - torch.stack(ps)).prod(dim=0)).log()
    target = torch.sigmoid(sum(torch.logit(p) for p in ps).detach() / R / sharpen)
    return sum(cross(target, p) for p in ps) / R


def reference_objective(reference, rows, config, templates):
    """(loss, what is compared beside it). `rows` are those of a file of pairs."""
    size = range(len(rows))
    logps = torch.stack([torch.stack([reference.response_logp(PROMPTS[i], y) for y in ANSWERS[i]]) for i in size])
    orders = [((a, b), (b, a)) for a, b in ANSWERS]
    read = [[[reference.verdict(t, PROMPTS[i], *order) for order in orders[i]] for t in templates] for i in size]
    z = torch.stack([torch.stack([torch.stack([v for v, _ in both]) for both in of_pair]) for of_pair in read])

    def column(key):
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    lengths = torch.tensor([[len(row["response_a_ids"]), len(row["response_b_ids"])] for row in rows])
    judged = (z[..., 0] - z[..., 1]) / 2  # [P, G]
    r = config.implicit.beta * (logps - column("implicit_logps"))
    r = {"none": r, "mean": r / lengths, "penalty": r - column("length_penalty")[:, None] * lengths}[
        config.implicit.length
    ]
    start = column("start_logps") / (lengths if config.rewards.likelihood_length == "mean" else 1)
    kinds = {"generative": judged, "implicit": r[:, :1] - r[:, 1:], "likelihood": start[:, :1] - start[:, 1:]}
    names = [n for n in config.rewards.models for _ in range(kinds[n].shape[1])]
    logits = torch.cat([kinds[n] for n in config.rewards.models], dim=1)
    held, frozen = logits.detach(), column("frozen_logits")

    def consensus(of):
        share = [getattr(config.rewards, f"{n}_weight") / names.count(n) for n in names]
        return (of * torch.tensor(share, dtype=torch.float64)).sum(dim=1)

    choice = config.preference
    source = frozen if choice.update == "frozen" else held
    if choice.labels == "external":
        q = column("label")
    else:
        logit = {
            "agreement": source.mean(dim=1),
            "likelihood": kinds["likelihood"][:, 0],
            "consensus": consensus(source),
        }
        logit |= {n: source[:, [m == n for m in names]].mean(dim=1) for n in ("generative", "implicit")}
        logit = logit[choice.labels].detach()
        q = torch.sigmoid(logit) if choice.soft else (logit > 0).double()
    assert (q != 0.5).all()
    p = torch.sigmoid(held)
    level = config.selection.confidence
    agreed = (p > 0.5 + level).all(dim=1) | (p < 0.5 - level).all(dim=1)
    selected = agreed if config.selection.rule == "agreement" else torch.ones_like(agreed)

    ratio = (logps - column("preference_logps")) / (lengths if choice.length_normalised else 1)
    m = ratio[:, 0] - ratio[:, 1]
    losses = []
    for side in (m, -m):
        if choice.loss == "sigmoid":
            losses.append(-torch.sigmoid(choice.beta * side).log())
        elif choice.loss == "ipo":
            losses.append((side - 1 / (2 * choice.beta)) ** 2)
        else:
            losses.append(torch.clamp(1 - choice.beta * side, min=0))
    q_ = q + choice.label_smoothing * (1 - 2 * q)
    losses = q_ * losses[0] + (1 - q_) * losses[1]

    settings = config.consistency
    ps = [torch.sigmoid((held if n == settings.stop_gradient else logits)[:, i]) for i, n in enumerate(names)]
    if settings.target == "mutual":
        penalty = reference_consistency(ps, settings.kind, settings.sharpen)
    else:
        teacher = torch.sigmoid(consensus(frozen))
        one_way = {"kl": divergence, "cross_entropy": cross}.get(
            settings.kind, lambda t, x: reference_consistency([t, x], settings.kind, settings.sharpen)
        )
        penalty = sum(one_way(teacher, x) for x in ps) / len(ps)

    ift, eft = reference.replay_means(config, templates) if config.replay.weight else (0, 0)
    preference = losses[selected].mean() if selected.any() else torch.zeros(())
    loss = choice.weight * preference + settings.weight * penalty.mean() + config.replay.weight * (ift + eft)
    means = {
        "preference": preference,
        "consistency": penalty.mean(),
        "agreement": agreed.double().mean(),
        "selected": selected.double().mean(),
        "generative/slot_bias": z.mean(),
        "generative/flip_rate": (z[..., 0] * z[..., 1] > 0).double().mean(),
        "generative/verdict_mass": torch.stack([mass for of in read for both in of for _, mass in both]).mean(),
    }
    if config.replay.weight:
        means |= {"sft/ift": ift, "sft/eft": eft}
    decisions = {
        "p_generative": torch.sigmoid(judged),
        "p_implicit": torch.sigmoid(kinds["implicit"][:, 0]),
        "agreed": agreed,
        "selected": selected,
        "label": q,
    }
    return loss, means, {name: value.detach().numpy() for name, value in decisions.items()}


# --- the code under test ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(world_dir):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rows are small
    yield Reference(world_dir / "model")
    torch.set_num_threads(threads)


@pytest.fixture
def make_session(world_dir, tiny_config, tmp_path):
    def make(templates=(CONTINUATION,), **overrides):
        return Session(settings(world_dir, tiny_config, tmp_path, templates, **overrides))

    return make


def file_rows(reference, columns, seed=0):
    """Rows of pairs.jsonl whose cached values are near the model's own, but not equal to them."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, answers, logps in zip(PROMPTS, ANSWERS, reference.response_logps, strict=True):
        rows.append(
            {
                "messages": [{"role": "user", "content": prompt}],
                **{f"response_{side}_ids": reference.answer_ids(y) for side, y in zip("ab", answers)},
                **{
                    f"{role}_logps": (logps + rng.normal(0, 3, 2)).tolist()
                    for role in ("preference", "implicit", "start")
                },
                "length_penalty": 0.05,
                "frozen_logits": rng.normal(0, 2, columns).tolist(),
                "label": float(rng.choice([0, 1, 0.8, 0.3])),
            }
        )
    return rows


def train_batch(session, rows, *, size=8, longer=0) -> TrainBatch:
    """The first batch of the pipelines, `longer` tokens wider than the run's own."""
    shapes, replay = session.shapes, session.config.replay
    ift, eft = (
        targets_dataset(marked, tokens + longer, batch, session.chat.pad_id, seed=1)
        for marked, tokens, batch in (
            (session.data.ift_rows, shapes.ift, replay.ift_batch_size),
            (session.data.eft_rows, shapes.eft, replay.eft_batch_size),
        )
    )
    wider = dataclasses.replace(shapes, row=shapes.row + longer, judges=tuple(t + longer for t in shapes.judges))
    dataset = pairs_dataset(
        [(f"row {i}", row) for i, row in enumerate(rows)],
        session.encoder,
        wider,
        rewards=len(objective.reward_names(session.config)),
        need_label=("label",) if session.config.preference.labels == "external" else None,
        batch_size=size,
        epochs=1,
        seed=0,
        ift=ift,
        eft=eft,
    )
    return dataset[0]


@functools.cache
def step_of(trainer):
    return jax.jit(jax.value_and_grad(lambda p, b: trainer.loss(p, {}, b), has_aux=True), compiler_options=QUICK)


def evaluated(session, params, batch):
    """(loss, means, decisions of the real pairs in the file's order, gradients)."""
    (loss, (sums, decisions)), gradients = jax.device_get(step_of(session.trainer)(params, batch))
    means = {name: total / max(count, 1e-9) for name, (total, count) in sums.items()}
    places = [int(np.flatnonzero(batch.pairs.index == i)[0]) for i in range(batch.pairs.index.max() + 1)]
    return loss, means, {name: value[places] for name, value in decisions.items()}, gradients


def outputs(session, params, pairs):
    """log pi(y|x) [P, 2], verdicts [P, G, 2, 2] and the reward models' logits [P, R] of a batch of pairs."""

    def run(params, pairs):
        logps, judged, _ = forward.outputs(
            session.model,
            params,
            TrainBatch(pairs, None, None),
            verdict_ids=session.facts.verdict_ids,
            continued=session.encoder.continued,
            response_tokens=session.shapes.response,
        )
        logits, _ = objective.reward_logits(forward.objective_inputs(pairs, logps, judged), session.config)
        return logps, judged.verdicts, logits

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, pairs))


def assert_same_gradients(found, expected, tolerance):
    """Each array's error relative to its norm."""
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected)]
    assert min(norms) > 0
    floor = 1e-3 * max(norms)
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), floor), found, expected)
    assert max(jax.tree.leaves(errors)) < tolerance, errors


@pytest.fixture(scope="module")
def params(world_dir):
    return weights.load(world_dir / "model")[1]


NO_REPLAY = dict(weight=0.0, ift_batch_size=0, eft_batch_size=0)
CASES = {
    "scir": ((STANDALONE, CONTINUATION), {}),
    "continued first, soft frozen consensus, ipo": (
        (CONTINUATION, STANDALONE),
        dict(
            replay=NO_REPLAY,
            consistency=dict(kind="cross_entropy", stop_gradient="implicit"),
            rewards=dict(implicit_weight=0.5),
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
            rewards=dict(models=("implicit", "generative"), implicit_weight=0.2),
            preference=dict(labels="external"),
            selection=dict(rule="all"),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_torch(case, make_session, reference, params, tmp_path):
    templates, overrides = CASES[case]
    session = make_session(templates, **overrides)
    config = session.config
    rows = file_rows(reference, len(objective.reward_names(config)))
    batch = train_batch(session, rows)
    assert batch.pairs.weight.sum() == len(rows) < len(batch.pairs.weight)

    loss, means, decisions, gradients = evaluated(session, params, batch)
    expected, expected_means, expected_decisions = reference_objective(reference, rows, config, templates)
    assert 0 < expected_means["selected"] and len(np.unique(expected_decisions["agreed"])) == 2
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, value in expected_means.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    for name, value in expected_decisions.items():
        np.testing.assert_allclose(np.float64(decisions[name]), np.float64(value), atol=3e-5, err_msg=name)
    assert_same_gradients(gradients, reference.gradients(expected, tmp_path / "gradients"), 1e-4)


@pytest.mark.parametrize(
    "templates", [(STANDALONE, CONTINUATION), (CONTINUATION, STANDALONE)], ids=["separate", "continued"]
)
def test_identical_and_swapped_pairs_in_every_reward_model(templates, make_session, reference, params):
    session = make_session(templates, rewards=dict(models=("generative", "implicit", "likelihood")))
    batch = train_batch(session, file_rows(reference, 4)).pairs
    _, _, logits = outputs(session, params, batch)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    assert p.shape == (8, 4) and np.abs(p[:6] - 0.5).max(axis=0).min() > 0.05

    def exchanged(rows):
        return jax.tree.map(lambda x: x[:, ::-1], rows)

    # The rows of a swapped pair are made from the swapped file, not by exchanging the rows.
    swapped_rows = [
        {
            **row,
            "response_a_ids": row["response_b_ids"],
            "response_b_ids": row["response_a_ids"],
            **{name: value[::-1] for name, value in row.items() if name.endswith("_logps")},
        }
        for row in file_rows(reference, 4)
    ]
    swapped_batch = train_batch(session, swapped_rows).pairs
    jax.tree.map(np.testing.assert_array_equal, swapped_batch.responses, exchanged(batch.responses))
    _, _, swapped = outputs(session, params, swapped_batch)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.float64(swapped))), 1 - p, atol=1e-6)

    same_rows = [
        {
            **row,
            "response_b_ids": row["response_a_ids"],
            **{name: [value[0]] * 2 for name, value in row.items() if name.endswith("_logps")},
        }
        for row in file_rows(reference, 4)
    ]
    _, _, same = outputs(session, params, train_batch(session, same_rows).pairs)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.float64(same))), 0.5, atol=1e-6)


def test_both_layouts_score_responses_alike(make_session, reference, params):
    rows = file_rows(reference, 3)
    found = {}
    for templates in ((STANDALONE, CONTINUATION), (CONTINUATION, STANDALONE)):
        session = make_session(templates)
        batch = train_batch(session, rows).pairs
        logps, verdicts, _ = outputs(session, params, batch)
        order = np.argsort(batch.index[: len(rows)])
        found[templates[0]] = logps[order], verdicts[order][:, :: 1 if templates[0] == STANDALONE else -1]
    for separate, continued in zip(*found.values(), strict=True):
        np.testing.assert_allclose(continued, separate, atol=2e-5)
    np.testing.assert_allclose(found[STANDALONE][0], reference.response_logps, atol=1e-4)


def test_padding_order_and_accumulation_change_nothing(make_session, reference, params):
    session, four = (make_session(replay=dict(ift_batch_size=0), optimizer=dict(accumulate=n)) for n in (1, 4))
    two = make_session(replay=dict(ift_batch_size=0), optimizer=dict(accumulate=2))
    # Five pairs of eight: with two micro-batches one is padded, with four the last is padding alone.
    rows = file_rows(reference, 2)[:5]
    batch = train_batch(session, rows)
    loss, means, decisions, gradients = evaluated(session, params, batch)
    turned = jax.tree.map(lambda x: np.roll(x[::-1], 3, axis=0), batch)
    variants = {
        "longer rows, more padded pairs": (session, train_batch(session, rows, size=12, longer=24)),
        "another order": (session, turned),
        "two micro-batches": (two, batch),
        "four micro-batches": (four, batch),
        "four micro-batches, another order": (four, turned),
    }
    assert batch.pairs.weight.tolist() == [1] * 5 + [0] * 3
    for name, (other, other_batch) in variants.items():
        loss_, means_, decisions_, gradients_ = evaluated(other, params, other_batch)
        assert loss_ == pytest.approx(loss, rel=1e-5), name
        assert means_ == pytest.approx(means, rel=1e-5, abs=1e-5), name
        for key, value in decisions.items():
            np.testing.assert_allclose(np.float64(decisions_[key]), np.float64(value), atol=1e-5, err_msg=name)
        assert_same_gradients(gradients_, gradients, 1e-5)


def test_first_step_and_skipped_steps(make_session, reference, params):
    session = make_session(
        selection=dict(rule="all"),
        replay=NO_REPLAY,
        consistency=dict(weight=0.0),
    )
    rows = file_rows(reference, 2)
    encoder = session.encoder
    items = [
        (encoder.prompt(row["messages"]), encoder.sampled(row[f"response_{side}_ids"])) for row in rows for side in "ab"
    ]
    start = scoring.response_logps(session, jax.tree.map(jnp.asarray, params), items).reshape(-1, 2)
    for row, values in zip(rows, start):
        row["preference_logps"] = row["start_logps"] = values.tolist()
    batch = train_batch(session, rows)
    broken = batch._replace(pairs=batch.pairs._replace(preference_logps=batch.pairs.preference_logps.copy()))
    broken.pairs.preference_logps[2, 0] = np.nan

    def snapshot(state):
        return [np.array(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]

    trainer = session.trainer
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


def test_a_step_without_pairs_that_agree(make_session, reference, params):
    """Nothing selected, nothing else weighed: loss 0 and no gradient, not 0 / 0."""
    session = make_session(
        selection=dict(confidence=0.499999),
        replay=NO_REPLAY,
        consistency=dict(weight=0.0),
    )
    loss, means, decisions, gradients = evaluated(session, params, train_batch(session, file_rows(reference, 2)))
    assert loss == 0 and means["selected"] == 0 and not decisions["selected"].any()
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(gradients))
