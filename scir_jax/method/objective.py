"""The whole objective of a step: L = w_p L_preference[selected] + w_c L_consistency[all] + w_s L_sft[replay].

Every term and metric is a (sum, count) until the very end, where the sums over the global batch are divided once.
So accumulation, sharding and padding cannot change the result, and a term with nothing in it is 0, never 0/0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.config import Config
from scir_jax.method import consistency, preference, rewards

Array = jax.Array
Sums = dict[str, tuple[Array, Array]]


class Pairs(NamedTuple):
    """What the objective knows of P pairs; float32 but for what is said.

    Attributes:
      logps: [P, 2] log pi(y|x) under the parameters being trained, summed over tokens, nats.
      verdicts: [P, G, 2, 2] logits of (A, B) for G templates, first or second response shown as A.
      verdict_mass: [P, G, 2] P(A) + P(B).
      lengths: [P, 2] int32 tokens.
      preference_logps, implicit_logps, start_logps: [P, 2] cached, under DPO's reference, the implicit reward's
        reference, and the policy that the iteration started from.
      length_penalty: [P, 2] alpha |y|.
      frozen_logits: [P, R] the reward models' logits at the start of the iteration (zeros where not needed).
      external: [P] the user's label: probability that the first response is better (1/2 without one).
      weight: [P] 1, or 0 for padding.
    """

    logps: Array
    verdicts: Array
    verdict_mass: Array
    lengths: Array
    preference_logps: Array
    implicit_logps: Array
    start_logps: Array
    length_penalty: Array
    frozen_logits: Array
    external: Array
    weight: Array


def reward_names(config: Config) -> tuple[str, ...]:
    """The reward model of each column of the logits: one "generative" a template."""
    names: list[str] = []
    for name in config.rewards.models:
        names += ["generative"] * len(config.generative.templates) if name == "generative" else [name]
    return tuple(names)


def reward_logits(pairs: Pairs, config: Config) -> tuple[Array, dict[str, Array]]:
    """The reward models' logits [P, R], and by name the logit of each kind [P] whether it is in the set or not."""
    judged = jax.vmap(rewards.generative, in_axes=1, out_axes=1)(pairs.verdicts)  # [P, G] each
    kinds = {
        "generative": judged["logit"].mean(axis=1),
        "implicit": rewards.implicit(
            pairs.logps,
            pairs.implicit_logps,
            pairs.lengths,
            pairs.length_penalty,
            beta=config.implicit.beta,
            length=config.implicit.length,
        ),
        "likelihood": rewards.likelihood(pairs.start_logps, pairs.lengths, length=config.rewards.likelihood_length),
    }
    columns = []
    for name in config.rewards.models:
        columns += list(judged["logit"].T) if name == "generative" else [kinds[name]]
    return jnp.stack(columns, axis=1), {**kinds, "slot_bias": judged["slot_bias"], "flip": judged["flip"]}


def consensus_logits(logits_PR: Array, config: Config) -> Array:
    """The consensus's logit [P]; the templates of the judge share its weight."""
    names = reward_names(config)
    weight = {name: getattr(config.rewards, f"{name}_weight") / names.count(name) for name in names}
    return rewards.consensus(logits_PR, tuple(weight[name] for name in names))


def objective(pairs: Pairs, config: Config) -> tuple[Sums, dict[str, Array]]:
    """The preference and consistency terms of a batch with its metrics, and what was decided for each pair.

    Returns:
      sums: name -> (sum, count); "preference" and "consistency" are the terms of the loss.
      decisions: [P] (or [P, G]) p_generative, p_implicit, agreed, selected, label.
    """
    settings = config.preference
    pairs = _blank(pairs)
    logits, kinds = reward_logits(pairs, config)
    stopped = jax.lax.stop_gradient(logits)
    agreed = preference.agreed(stopped, config.selection.confidence)
    if settings.labels in ("external", "cream"):
        label = pairs.external
    else:
        chosen_by = _label_logits(pairs, stopped, jax.tree.map(jax.lax.stop_gradient, kinds), config)
        label = preference.label(chosen_by, soft=settings.soft)
    # A pair without a preference (q = 1/2: identical responses, say) teaches DPO nothing but regression to the start.
    decided = jnp.abs(label - 0.5) > 0
    selected = (agreed & decided) if config.selection.rule == "agreement" else decided
    chosen_weight = pairs.weight * selected

    margin = preference.margin(
        pairs.logps, pairs.preference_logps, pairs.lengths, length_normalised=settings.length_normalised
    )
    losses = preference.loss(
        margin, label, kind=settings.loss, beta=settings.beta, label_smoothing=settings.label_smoothing
    )
    penalties = consistency.penalty(
        logits,
        reward_names(config),
        kind=config.consistency.kind,
        stop_gradient=config.consistency.stop_gradient,
        target=config.consistency.target,
        consensus_P=consensus_logits(pairs.frozen_logits, config),
        sharpen=config.consistency.sharpen,
    )

    def mean(values: Array, weight: Array) -> tuple[Array, Array]:
        return (values * weight).sum(), weight.sum()

    first = label >= 0.5
    rewards_P2 = settings.beta * jax.lax.stop_gradient(pairs.logps - pairs.preference_logps)
    sums = {
        "preference": mean(losses, chosen_weight),
        "consistency": mean(penalties, pairs.weight),
        "agreement": mean(agreed.astype(jnp.float32), pairs.weight),
        "selected": mean(selected.astype(jnp.float32), pairs.weight),
        "generative/slot_bias": mean(kinds["slot_bias"].mean(axis=1), pairs.weight),
        "generative/flip_rate": mean(kinds["flip"].mean(axis=1), pairs.weight),
        "generative/verdict_mass": mean(pairs.verdict_mass.mean(axis=(1, 2)), pairs.weight),
        "generative/entropy": mean(consistency.entropy(kinds["generative"]), pairs.weight),
        "implicit/entropy": mean(consistency.entropy(kinds["implicit"]), pairs.weight),
        **{
            f"{name}/{side}": mean(jnp.where(first == wanted, values[:, 0], values[:, 1]), chosen_weight)
            for name, values in (("rewards", rewards_P2), ("logps", pairs.logps))
            for side, wanted in (("chosen", True), ("rejected", False))
        },
        "rewards/margins": mean(jnp.where(first, 1, -1) * (rewards_P2[:, 0] - rewards_P2[:, 1]), chosen_weight),
        "rewards/accuracies": mean(
            (jnp.where(first, 1, -1) * (rewards_P2[:, 0] - rewards_P2[:, 1]) > 0).astype(jnp.float32), chosen_weight
        ),
    }
    decisions = {
        "p_generative": jax.nn.sigmoid(rewards_by_template(pairs)),
        "p_implicit": jax.nn.sigmoid(kinds["implicit"]),
        "agreed": agreed,
        "selected": selected & (pairs.weight > 0),
        "label": label,
    }
    return sums, jax.tree.map(jax.lax.stop_gradient, decisions)


def rewards_by_template(pairs: Pairs) -> Array:
    """The generative reward model's logits [P, G], one column a template."""
    return jax.vmap(rewards.generative, in_axes=1, out_axes=1)(pairs.verdicts)["logit"]


def _blank(pairs: Pairs) -> Pairs:
    """Zeros in place of what padded pairs hold, which may be anything: masked later, 0 * NaN would be a gradient."""

    def blank(values: Array) -> Array:
        real = pairs.weight > 0
        return jnp.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.zeros_like(values))

    return jax.tree.map(blank, pairs)


def _label_logits(pairs: Pairs, logits: Array, kinds: dict[str, Array], config: Config) -> Array:
    """The logit that labels a pair, [P]: made anew from the parameters, or frozen at the iteration's start."""
    labels = config.preference.labels
    if labels == "consensus":
        return consensus_logits(pairs.frozen_logits if config.preference.update == "frozen" else logits, config)
    if labels == "likelihood":
        return kinds["likelihood"]  # frozen by definition
    if config.preference.update == "frozen":
        logits = pairs.frozen_logits
        names = reward_names(config)
        columns = [r for r, name in enumerate(names) if labels in ("agreement", name)]
        return logits[:, jnp.asarray(columns)].mean(axis=1)
    return logits.mean(axis=1) if labels == "agreement" else kinds[labels]


def total(sums: Sums, config: Config, sft_terms: tuple[str, ...] = ()) -> Array:
    """The loss: each term's sum over its count, weighted; scalar float32."""
    weights = {"preference": config.preference.weight, "consistency": config.consistency.weight}
    weights |= dict.fromkeys(sft_terms, config.replay.weight)
    return sum(weight * divide(*sums[name]) for name, weight in weights.items() if weight)


def divide(sum_: Array, count: Array) -> Array:
    """sum / count, and 0 (with zero gradient) for a count of 0."""
    return jnp.where(count > 0, sum_ / jnp.maximum(count, 1e-9), 0.0)
