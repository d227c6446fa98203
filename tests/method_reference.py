"""The method in float64 NumPy, written from the mathematics: probabilities as tables over the two outcomes.

Everything that can be known of pairs is a flat dictionary of arrays here (`example`); `evidence` picks from it what the
code under test asks for.
"""

import dataclasses
import itertools
import typing
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.config import schema
from scir_jax.config.schema import Config
from scir_jax.method import objective, rewards

# --- configurations --------------------------------------------------------------------------------------------------


def options(section, key):
    """The values that the configuration allows for a key."""
    return typing.get_args(typing.get_type_hints(getattr(schema, section))[key])


def changed(config, values):
    """A Config laid over by {"section.key": value}."""
    sections = defaultdict(dict)
    for name, value in values.items():
        section, key = name.split(".")
        sections[section][key] = value
    return dataclasses.replace(config, **{s: dataclasses.replace(getattr(config, s), **v) for s, v in sections.items()})


def configured(values):
    """A Config from {"section.key": value}."""
    return changed(Config(), values)


VARIED = {
    "rewards.models": [
        ("generative", "implicit"),
        ("implicit", "generative"),
        ("generative", "implicit", "likelihood"),
        ("generative",),
        ("implicit",),
        ("likelihood", "generative"),
        ("entropy", "generative"),
        ("implicit", "entropy"),
        ("generative", "implicit", "pointwise"),
    ],
    "generative.templates": [("a",), ("a", "b")],
    "rewards.likelihood_length": options("RewardsConfig", "likelihood_length"),
    "rewards.entropy_scale": [1.0, 0.4],
    "rewards.weights": [
        *(
            dict(generative=g, implicit=i, likelihood=li, entropy=0.7)
            for g, i, li in itertools.product([1.0, 0.4], [0.3, -0.2], [0.1, 0.05])
        ),
        dict(generative=2.0),
    ],
    "implicit.beta": [0.1, 0.4],
    "implicit.length": options("ImplicitConfig", "length"),
    "consistency.kind": options("ConsistencyConfig", "kind"),
    "consistency.stop_gradient": options("ConsistencyConfig", "stop_gradient"),
    "consistency.target": options("ConsistencyConfig", "target"),
    "consistency.weight": [1.0, 2.5, 0.0],
    "consistency.sharpen": [0.5, 1.3],
    "consistency.entropy": [0.0, 0.7],
    "judge.slot_penalty": [0.0, 0.3],
    "selection.rule": options("SelectionConfig", "rule"),
    "selection.confidence": [0.0, 0.1],
    "selection.power": [1.0, 2.5],
    "preference.loss": options("PreferenceConfig", "loss"),
    "preference.beta": [0.1, 0.3],
    "preference.weight": [1.0, 0.6],
    "preference.label_smoothing": [0.0, 0.1],
    "preference.length_normalised": [False, True],
    "preference.labels": options("PreferenceConfig", "labels"),
    "preference.soft": [False, True],
    "preference.update": options("PreferenceConfig", "update"),
}
CONFIGURATIONS = 24


def random_settings():
    """Settings in which every value of every key occurs about equally often, in random combinations."""
    rng = np.random.default_rng(14)
    columns = {}
    for name, values in VARIED.items():
        places = rng.permutation(np.arange(CONFIGURATIONS) % len(values))
        columns[name] = [values[i] for i in places]
    return [{name: values[i] for name, values in columns.items()} for i in range(CONFIGURATIONS)]


# --- pairs -----------------------------------------------------------------------------------------------------------

FRESH = ("logps", "verdicts", "verdict_mass", "entropy")
CACHED = ("preference_logps", "implicit_logps", "start_logps", "start_points", "start_points_mass")
FROZEN = ("generative", "implicit", "likelihood", "entropy", "generative_before", "transitive", "pointwise")


def example(config, seed, pairs=7, real=5, weighted=False):
    """Pairs as float64 arrays of float32 values. The second is a pair of identical answers; the last are padding.

    Args:
      weighted: real pairs have other weights than 1.
    """
    rng, points = (np.random.default_rng([seed, stream][: stream + 1]) for stream in range(2))
    templates = len(config.generative.templates)
    lengths = rng.integers(1, 12, (pairs, 2))
    values = {
        "logps": rng.normal(-9, 4, (pairs, 2)),
        "verdicts": rng.normal(0, 2, (pairs, templates, 2, 2)),
        "verdict_mass": rng.uniform(0, 1, (pairs, templates, 2)),
        "entropy": rng.uniform(0, 3, (pairs, 2)),
        "lengths": lengths,
        "preference_logps": rng.normal(-9, 4, (pairs, 2)),
        "implicit_logps": rng.normal(-9, 4, (pairs, 2)),
        "start_logps": rng.normal(-9, 4, (pairs, 2)),
        "start_points": points.uniform(0, 5, (pairs, 2)),
        "start_points_mass": points.uniform(0, 1, (pairs, 2)),
        "length_penalty": 0.07 * lengths,
        "single": rng.normal(0, 2, (pairs, 2 * templates)),
        "label": rng.choice([0, 0.5, 1, 0.7, 0.2], pairs),
        "weight": (np.arange(pairs) < real) * (rng.choice([0.25, 1, 3.5], pairs) if weighted else 1),
    }
    # Half of the pairs lean to one side everywhere, so that some are agreed on.
    for i in range(0, pairs, 2):
        sign = rng.choice([-1, 1])
        values["verdicts"][i, :, 0, 0] += 6 * sign
        values["logps"][i, 0] += 30 * sign
        values["entropy"][i, 1] += 4 * sign
        values["start_logps"][i, 0] += 30 * sign
    for name, value in values.items():
        if value.shape[1:] == (2,) and name != "single":
            value[1, 1] = value[1, 0]
    values["verdicts"][1, :, 1] = values["verdicts"][1, :, 0]
    for name in FROZEN:
        values[f"frozen {name}"] = rng.normal(0, 2, (pairs, templates if name.startswith("generative") else 1))
    return {name: np.float32(value).astype(np.float64) for name, value in values.items()}


def swapped(values):
    """The same pairs with their answers exchanged."""
    result = {name: value[:, ::-1] if value.shape[1:] == (2,) else value for name, value in values.items()}
    result["verdicts"] = values["verdicts"][:, :, ::-1]
    result["verdict_mass"] = values["verdict_mass"][:, :, ::-1]
    result["single"] = -values["single"]
    result["label"] = 1 - values["label"]
    return result | {name: -value for name, value in values.items() if name.startswith("frozen")}


def evidence(values, config, *, everything=False):
    """What the configured method needs of pairs, or everything."""
    wanted = objective.needs(config)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return rewards.Evidence(
        fresh={name: arrays[name] for name in (FRESH if everything else wanted.fresh)},
        cached={name: arrays[name] for name in (CACHED if everything else wanted.cached)},
        frozen={name: arrays[f"frozen {name}"] for name in (FROZEN if everything else wanted.frozen)},
        lengths=arrays["lengths"].astype(jnp.int32),
        length_penalty=arrays["length_penalty"],
        verdicts=arrays["single"] if everything or wanted.verdicts else jnp.zeros((len(arrays["weight"]), 0)),
        label=arrays["label"],
        weight=arrays["weight"],
    )


def value_and_grad(given, config):
    """(loss, sums, decisions, gradients of the fresh readings) of the code under test, for evidence or an example."""
    given = given if isinstance(given, rewards.Evidence) else evidence(given, config)

    def loss(fresh):
        sums, decisions = objective.objective(given._replace(fresh=fresh), config)
        return objective.total(sums, config), (sums, decisions)

    (value, (sums, decisions)), grads = jax.device_get(jax.value_and_grad(loss, has_aux=True)(given.fresh))
    sums = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    return float(value), sums, decisions, grads


# --- formulas --------------------------------------------------------------------------------------------------------


def table(logits):
    """Log-probabilities [..., 2] that the first and that the second is better."""
    logits = np.asarray(logits, np.float64)
    return np.stack([-np.logaddexp(0, -logits), -np.logaddexp(0, logits)], axis=-1)


def ref_cross(p, q):
    """H(p, q) of two tables."""
    return -(np.exp(p) * q).sum(-1)


def ref_entropy(p):
    return ref_cross(p, p)


def ref_consistency(columns, kind, target=None):
    """The penalty of columns of logits [P] against each other; `target` [P]: the pseudo-label's logit."""
    tables = [table(c) for c in columns]
    ordered = list(itertools.permutations(tables, 2))
    if kind in ("kl", "cross_entropy"):
        values = [ref_cross(p, q) - (ref_entropy(p) if kind == "kl" else 0) for p, q in ordered]
        return np.mean(values, axis=0) if values else np.zeros(len(columns[0]))
    if kind == "js":
        mean = np.log(np.maximum(np.mean(np.exp(tables), axis=0), 1e-320))
        return ref_entropy(mean) - np.mean([ref_entropy(p) for p in tables], axis=0)
    if kind == "agreement":
        joint = np.sum(tables, axis=0)
        return -np.logaddexp(joint[..., 0], joint[..., 1])
    assert kind == "pseudo_label"
    return np.mean([ref_cross(table(target), p) for p in tables], axis=0)


def ref_penalty(
    logits, at, names, *, kind, stop_gradient="none", target="mutual", consensus=None, sharpen=0.5, entropy=0.0
):
    """`at`: the point at which everything under a stop-gradient is held while `logits` move."""
    columns = [(at if name == stop_gradient else logits)[:, r] for r, name in enumerate(names)]
    doubt = entropy * np.mean([ref_entropy(table(column)) for column in columns], axis=0)
    if target == "mutual":
        return ref_consistency(columns, kind, at.mean(axis=1) / sharpen) + doubt
    teacher = table(consensus)
    result = []
    for r, column in enumerate(columns):
        if kind == "kl":
            result.append(ref_cross(teacher, table(column)) - ref_entropy(teacher))
        elif kind == "cross_entropy":
            result.append(ref_cross(teacher, table(column)))
        else:
            result.append(ref_consistency([consensus, column], kind, (consensus + at[:, r]) / 2 / sharpen))
    return np.mean(result, axis=0) + doubt


def ref_loss(margin, q, *, kind, beta, label_smoothing=0.0):
    q = q * (1 - label_smoothing) + (1 - q) * label_smoothing
    result = 0
    for share, m in ((q, margin), (1 - q, -margin)):
        if kind == "sigmoid":
            value = np.logaddexp(0, -beta * m)
        elif kind == "ipo":
            value = (m - 0.5 / beta) ** 2
        else:
            assert kind == "hinge"
            value = np.where(beta * m < 1, 1 - beta * m, 0)
        result = result + share * value
    return result


def ref_rewards(pairs, config):
    """Logits [P, G] of the judge, [P, 1] of the others."""
    v = pairs["verdicts"]
    z = v[..., 0] - v[..., 1]  # [P, G, first or second as A]
    lengths = pairs["lengths"]
    r = config.implicit.beta * (pairs["logps"] - pairs["implicit_logps"])
    if config.implicit.length == "mean":
        r = r / lengths
    elif config.implicit.length == "penalty":
        r = r - pairs["length_penalty"]
    s = pairs["start_logps"] / (lengths if config.rewards.likelihood_length == "mean" else 1)
    h = -config.rewards.entropy_scale * pairs["entropy"]
    scores = {"implicit": r, "likelihood": s, "entropy": h, "pointwise": pairs["start_points"]}
    return {"generative": (z[..., 0] - z[..., 1]) / 2, **{name: y[:, :1] - y[:, 1:] for name, y in scores.items()}}


def ref_columns(logits, config):
    """The reward model of each column of the method's, and the columns [P, R]."""
    names = tuple(name for name in config.rewards.models for _ in logits[name].T)
    return names, np.concatenate([logits[name] for name in config.rewards.models], axis=1)


def ref_consensus(columns, names, config):
    """The columns of a reward model share its weight."""
    return sum(config.rewards.weights.get(n, 0) / names.count(n) * columns[:, r] for r, n in enumerate(names))


def ref_certainty(pairs, config):
    """(1 - B)^power, where B is the information that which prediction was made gives about the outcome, in bits."""
    predictions = table(pairs["single"])  # [P, S, 2]
    mean = np.maximum(np.exp(predictions).mean(axis=1), 1e-320)
    known = (ref_entropy(np.log(mean)) - ref_entropy(predictions).mean(axis=1)) / np.log(2)
    return (1 - known) ** config.selection.power


def ref_frozen(pairs):
    return {name: pairs[f"frozen {name}"] for name in FROZEN}


def ref_target(pairs, config):
    """The logit that the reward models are taught, and how much each pair counts."""
    frozen, kind = ref_frozen(pairs), config.consistency.target
    names, columns = ref_columns(frozen, config)
    if kind == "lagged":
        now, before = frozen["generative"].mean(axis=1), frozen["generative_before"].mean(axis=1)
        p, q = np.exp(table(now))[:, 0], np.exp(table(before))[:, 0]
        return (now + before) / 2, 1 - np.maximum(p - q, q - p)
    if kind == "transitive":
        return frozen["transitive"][:, 0], np.ones(len(columns))
    if kind == "labels":
        limits = np.exp(-16) / (1 + np.exp(-16)), 1 / (1 + np.exp(-16))
        q = np.clip(pairs["label"], *limits)
        return np.log(q / (1 - q)), np.where(pairs["label"] == 0.5, 0.0, 1.0)
    return ref_consensus(columns, names, config), np.ones(len(columns))


def ref_both_orders(pairs):
    """Whether every verdict, with the first or the second answer shown as A, prefers the same answer."""
    z = pairs["verdicts"][..., 0] - pairs["verdicts"][..., 1]
    first = (z[..., 0] > 0) & (z[..., 1] < 0)
    second = (z[..., 0] < 0) & (z[..., 1] > 0)
    return first.all(axis=1) | second.all(axis=1)


def ref_labels(pairs, logits, config):
    settings = config.preference
    if settings.labels in ("external", "cream", "dice"):
        return pairs["label"]
    source = ref_frozen(pairs) if settings.update == "frozen" else logits
    names, columns = ref_columns(source, config)
    if settings.labels == "consensus":
        logit = ref_consensus(columns, names, config)
    elif settings.labels == "agreement":
        logit = columns.mean(axis=1)
    else:
        logit = source[settings.labels].mean(axis=1)
    return np.exp(table(logit)[:, 0]) if settings.soft else np.where(logit > 0, 1.0, np.where(logit < 0, 0.0, 0.5))


def ref_shown(config):
    """Reward models whose logits a step has: those that something in it looks at, and those that cost nothing."""
    # The answers' rows, which are always there, give the implicit reward; what is frozen is only carried along.
    looked = {"implicit"} | ({"likelihood", "pointwise"} & set(config.rewards.models))
    if config.consistency.weight or config.selection.rule in ("agreement", "both_orders"):
        looked |= set(config.rewards.models)
    if config.judge.slot_penalty or config.selection.rule == "both_orders":
        looked.add("generative")
    if config.preference.update == "dynamic":
        everyone = {
            "agreement": config.rewards.models,
            "consensus": config.rewards.models,
            "external": (),
            "cream": (),
            "dice": (),
        }
        looked |= set(everyone.get(config.preference.labels, [config.preference.labels]))
    return looked


def ref_objective(pairs, at, config):
    """(total, sums, decisions) at `pairs`; labels, selection and stopped columns are taken at `at`."""
    logits, logits_at = ref_rewards(pairs, config), ref_rewards(at, config)
    (names, columns), (_, columns_at) = ref_columns(logits, config), ref_columns(logits_at, config)
    q = ref_labels(at, logits_at, config)
    far = np.abs(np.exp(table(columns_at)[..., 0]) - 0.5) > config.selection.confidence
    same = np.all(columns_at > 0, axis=1) | np.all(columns_at < 0, axis=1)
    agreed = same & far.all(axis=1)
    rules = {"agreement": agreed, "certainty": ref_certainty(at, config), "all": 1.0, "sampled": 1.0}
    rules["both_orders"] = agreed & ref_both_orders(at)
    share = (q != 0.5) * rules[config.selection.rule]

    def ratio(policy):
        return policy - pairs["preference_logps"]

    m = ratio(pairs["logps"])
    if config.preference.length_normalised:
        m = m / pairs["lengths"]
    losses = ref_loss(
        m[:, 0] - m[:, 1],
        q,
        kind=config.preference.loss,
        beta=config.preference.beta,
        label_smoothing=config.preference.label_smoothing,
    )
    teacher, counted = ref_target(pairs, config)
    penalties = ref_penalty(
        columns,
        columns_at,
        names,
        kind=config.consistency.kind,
        stop_gradient=config.consistency.stop_gradient,
        target=config.consistency.target,
        consensus=teacher,
        sharpen=config.consistency.sharpen,
        entropy=config.consistency.entropy,
    )
    weight = pairs["weight"]
    chosen = weight * share
    z = pairs["verdicts"][..., 0] - pairs["verdicts"][..., 1]
    better, worse = np.where(q >= 0.5, 0, 1), np.where(q >= 0.5, 1, 0)
    row = np.arange(len(q))
    reward = config.preference.beta * ratio(pairs["logps"])
    gap = reward[row, better] - reward[row, worse]
    per_pair = {
        "preference": (losses, chosen),
        "selected": (share > 0, weight),
        "rewards/chosen": (reward[row, better], chosen),
        "rewards/rejected": (reward[row, worse], chosen),
        "logps/chosen": (pairs["logps"][row, better], chosen),
        "logps/rejected": (pairs["logps"][row, worse], chosen),
        "rewards/margins": (gap, chosen),
        "rewards/accuracies": (gap > 0, chosen),
    }
    shown = ref_shown(config)
    per_pair |= {f"{name}/entropy": (ref_entropy(table(logits[name].mean(axis=1))), weight) for name in shown}
    if "generative" in shown:
        per_pair |= {
            "generative/slot_bias": ((z.sum(axis=2) / 2).mean(axis=1), weight),
            "generative/flip_rate": ((np.sign(z[..., 0]) == np.sign(z[..., 1])).mean(axis=1), weight),
            "generative/verdict_mass": (pairs["verdict_mass"].mean(axis=(1, 2)), weight),
        }
    if "pointwise" in shown:
        per_pair["pointwise/points_mass"] = (pairs["start_points_mass"].mean(axis=1), weight)
    everyone = shown >= set(config.rewards.models)
    if everyone:
        per_pair["agreement"] = (agreed, weight)
    if everyone and (config.consistency.weight or config.consistency.target == "mutual"):
        per_pair["consistency"] = (penalties, weight * (1 if config.consistency.target == "mutual" else counted))
    if config.judge.slot_penalty:
        per_pair["slot_penalty"] = (((z.sum(axis=2) / 2) ** 2).mean(axis=1), weight)
    sums = {name: (np.sum(values * weights), weights.sum()) for name, (values, weights) in per_pair.items()}
    total = 0.0
    shares = dict(preference=config.preference.weight, consistency=config.consistency.weight)
    for name, share in (shares | dict(slot_penalty=config.judge.slot_penalty)).items():
        if share and sums[name][1]:
            total += share * sums[name][0] / sums[name][1]
    decisions = {f"p_{name}": np.exp(table(logits[name])[..., 0]) for name in shown}
    decisions = {name: p if name == "p_generative" else p[:, 0] for name, p in decisions.items()}
    if everyone:
        decisions["agreed"] = agreed
    return total, sums, decisions | {"selected": chosen > 0, "label": q, "weight": chosen}


def differences(function, x, step=1e-5):
    """Central finite differences of a scalar function of a float64 array."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient
