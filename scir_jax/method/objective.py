"""The whole objective of a step: L = w_p L_preference[selected] + w_c L_consistency[all] + w_s L_sft[replay].

Two terms may teach the judge beside these: L_sft[constructed], and the penalty on its slot bias.

Every term and metric is a (sum, count) until the very end, where the sums over the global batch are divided once.
So accumulation, sharding and padding cannot change the result, and a term with nothing in it is 0, never 0/0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scir_jax.config.schema import Config
from scir_jax.method import consistency, labels, preference
from scir_jax.method.labels import LABELS
from scir_jax.method.pairing import PAIRING
from scir_jax.method.rewards import JUDGED, REWARDS, Evidence, judged, reward_logits
from scir_jax.method.selection import SELECTION
from scir_jax.method.targets import TARGETS

Array = jax.Array
Sums = dict[str, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the configured method must compute and store.

    Attributes:
      fresh: readings of the policy in every step (names in `Evidence.fresh`).
      rewards: reward models that those readings allow, so that a step shows them.
      cached: names in `Evidence.cached` that a step takes.
      frozen: reward models, and names of rewards.JUDGED, whose logits from the start of the iteration a step takes.
      start: reward models whose logits are made at the start of the iteration.
      verdicts: a step takes the judge's single verdicts from the start of the iteration.
      judged: the judge is asked about every candidate pair at the start of the iteration.
      pointwise: the judge gives points to every answer at the start of the iteration.
    """

    fresh: tuple[str, ...]
    rewards: tuple[str, ...]
    cached: tuple[str, ...]
    frozen: tuple[str, ...]
    start: tuple[str, ...]
    verdicts: bool
    judged: bool
    pointwise: bool

    @property
    def asks_judge(self) -> bool:
        """Whether the judge is asked in every step."""
        return "verdicts" in self.fresh


def needs(config: Config) -> Needs:
    """Derives from the tables what the configured method needs.

    A reward model is computed in every step where the consistency penalty, the selection or the label of that step
    looks at it. With weight 0, selection `all` and labels that are frozen or given none is, and the judge is not asked.
    """
    label, rule, way = (
        LABELS[config.preference.labels],
        SELECTION[config.selection.rule],
        PAIRING[config.pairs.kind],
    )
    models = set(config.rewards.models)
    now: set[str] = set()
    frozen: set[str] = set()
    (now if config.preference.update == "dynamic" else frozen).update(label.rewards(config))
    if rule.rewards:
        now |= models
    if config.consistency.weight:
        now |= models
        target = TARGETS[config.consistency.target]
        frozen |= set(target.frozen(config)) if target else set()
    readings = {"logps"}.union(rule.reads, *(REWARDS[name].reads for name in now))
    if config.judge.slot_penalty:
        readings |= set(REWARDS["generative"].reads)
    shown = _ordered(
        name
        for name, reward in REWARDS.items()
        if set(reward.reads) <= readings and (reward.reads or name in now | models)
    )
    cached = {"preference_logps"}.union(*(REWARDS[name].cached for name in shown))
    # Answers that have points are ranked by them.
    ranked = way.judged and not config.pairs.scorer and config.preference.labels != "pointwise"
    start = (frozen - set(JUDGED)) | ({"generative"} if ranked or "transitive" in frozen else set())
    return Needs(
        fresh=tuple(sorted(readings)),
        rewards=shown,
        cached=tuple(sorted(cached)),
        frozen=_ordered(frozen),
        start=_ordered(start),
        verdicts=rule.verdicts,
        judged=rule.verdicts or any("verdicts" in REWARDS[name].reads for name in start),
        pointwise="start_points" in {*cached, *(key for name in start for key in REWARDS[name].cached)},
    )


def _ordered(names) -> tuple[str, ...]:
    wanted = set(names)
    return tuple(name for name in (*REWARDS, *JUDGED) if name in wanted)


def objective(evidence: Evidence, config: Config) -> tuple[Sums, dict[str, Array]]:
    """Computes the preference and consistency terms of a batch with its metrics, and what was decided for each pair.

    Args:
      evidence: with everything that `needs(config)` names.

    Returns:
      sums: name -> (sum, count), float32 scalars; "preference", "consistency" and "slot_penalty" are terms of the loss.
      decisions: [P] (or [P, C]) p_REWARD of each reward model, agreed, selected, label, and the pair's weight in the
        preference term.
    """
    settings = config.preference
    wanted = needs(config)
    evidence = _blank(evidence)
    logits = reward_logits(evidence, config, wanted.rewards)
    stopped = jax.tree.map(jax.lax.stop_gradient, logits)
    models = tuple(config.rewards.models)
    together = _columns(stopped, models) if set(models) <= set(logits) else None

    label = LABELS[settings.labels]
    if label.logit is None:
        q = evidence.label
    else:
        source = stopped if settings.update == "dynamic" else evidence.frozen
        q = labels.probability(
            label.logit({name: source[name] for name in label.rewards(config)}, config), soft=settings.soft
        )
    # A pair without a preference (q = 1/2: identical answers, say) teaches DPO nothing but regression to the start.
    chosen = SELECTION[config.selection.rule].weight(together, evidence, config.selection) * (jnp.abs(q - 0.5) > 0)
    chosen_weight = evidence.weight * jax.lax.stop_gradient(chosen)

    logps, reference = evidence.fresh["logps"], evidence.cached["preference_logps"]
    margin = preference.margin(logps, reference, evidence.lengths, length_normalised=settings.length_normalised)
    losses = preference.loss(
        margin, q, kind=settings.loss, beta=settings.beta, label_smoothing=settings.label_smoothing
    )

    def mean(values: Array, weight: Array) -> tuple[Array, Array]:
        return (values * weight).sum(), weight.sum()

    sums = {"preference": mean(losses, chosen_weight)}
    if set(models) <= set(logits):
        target, logits_P, weight_P = TARGETS[config.consistency.target], None, 1.0
        if target is None or config.consistency.weight:
            if target is not None:
                logits_P = target.logits(evidence, config)
                weight_P = target.weight(evidence) if target.weight else 1.0
            penalties = consistency.penalty({name: logits[name] for name in models}, config.consistency, logits_P)
            sums["consistency"] = mean(penalties, evidence.weight * weight_P)
        sums["agreement"] = mean(_agreed(together, config), evidence.weight)
    if config.judge.slot_penalty:
        bias_PG = judged(evidence.fresh["verdicts"])["slot_bias"]
        sums["slot_penalty"] = mean(jnp.square(bias_PG).mean(axis=1), evidence.weight)
    sums["selected"] = mean((chosen > 0).astype(jnp.float32), evidence.weight)
    for name, values in logits.items():
        health = REWARDS[name].health
        found = {} if health is None else health(evidence)
        found["entropy"] = consistency.entropy(values.mean(axis=1))
        sums |= {f"{name}/{key}": mean(value, evidence.weight) for key, value in found.items()}

    first = q >= 0.5
    rewards_P2 = settings.beta * jax.lax.stop_gradient(logps - reference)
    ahead = jnp.where(first, 1, -1) * (rewards_P2[:, 0] - rewards_P2[:, 1])
    sums |= {
        f"{name}/{side}": mean(jnp.where(first == wanted_side, values[:, 0], values[:, 1]), chosen_weight)
        for name, values in (("rewards", rewards_P2), ("logps", logps))
        for side, wanted_side in (("chosen", True), ("rejected", False))
    }
    sums["rewards/margins"] = mean(ahead, chosen_weight)
    sums["rewards/accuracies"] = mean((ahead > 0).astype(jnp.float32), chosen_weight)

    decisions = {
        f"p_{name}": jax.nn.sigmoid(values if REWARDS[name].columns else values[:, 0])
        for name, values in logits.items()
    }
    if together is not None:
        decisions["agreed"] = _agreed(together, config) > 0
    decisions |= {"selected": chosen_weight > 0, "label": q, "weight": chosen_weight}
    return sums, jax.tree.map(jax.lax.stop_gradient, decisions)


def total(sums: Sums, config: Config, sft_terms: tuple[str, ...] = ()) -> Array:
    """Returns the loss: each term's sum over its count, weighted; scalar float32."""
    weights = {"preference": config.preference.weight, "consistency": config.consistency.weight}
    weights["slot_penalty"] = config.judge.slot_penalty
    weights |= {
        name: config.judge.constructed_weight if name == "sft/constructed" else config.replay.weight
        for name in sft_terms
    }
    return sum(weight * divide(*sums[name]) for name, weight in weights.items() if weight)


def divide(sum_: Array, count: Array) -> Array:
    """Returns sum / count, and 0 (with zero gradient) for a count of 0."""
    return jnp.where(count > 0, sum_ / jnp.maximum(count, 1e-9), 0.0)


def _agreed(logits_PR: Array, config: Config) -> Array:
    return SELECTION["agreement"].weight(logits_PR, None, config.selection)


def _columns(logits: dict[str, Array], models: tuple[str, ...]) -> Array:
    return jnp.concatenate([logits[name] for name in models], axis=1)


def _blank(evidence: Evidence) -> Evidence:
    """Puts zeros in place of what padded pairs hold.

    That may be anything: masked later, 0 * NaN would be a gradient.
    """

    def blank(values: Array) -> Array:
        real = evidence.weight > 0
        return jnp.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.zeros_like(values))

    return jax.tree.map(blank, evidence)
