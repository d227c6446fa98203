"""The reward models within a training stage: every so many steps their accuracies on the held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.engine.programs import Programs
from scir_jax.model import lora
from scir_jax.run import costs, evaluation, scoring
from scir_jax.run.costs import Account
from scir_jax.run.counts import Counts
from scir_jax.run.inputs import Inputs
from scir_jax.run.models import Models, roles

PREFIX = "eval/"
"""of the columns of metrics.jsonl that a look gives"""


class Watch(NamedTuple):
    """The evaluation within a stage.

    Attributes:
      look: trained parameters -> columns of metrics.jsonl.
      once: what it cost to ask the reference.
      each: what a look costs.
    """

    look: Callable[[Any], dict[str, float]]
    once: Counts
    each: Counts


def pair_watch(
    config: Config, encoder: Encoder, inputs: Inputs, programs: Programs, models: Models, iteration: int
) -> Watch | None:
    """Makes the evaluation of a stage's model on the held-out pairs, as evaluation.json has it of the finished model.

    The reference is asked here, before training begins, so that its weights are not beside the training state.

    Args:
      iteration: 0 for SFT.

    Returns:
      The evaluation, which changes nothing; None where evaluate.every is 0.
    """
    if not config.evaluate.every or not inputs.heldout_pairs:
        return None
    pairs, labels = evaluation.labelled_pairs(inputs.heldout_pairs)
    number = roles(config, iteration)["implicit"]
    items = [(pair.prompt, answer) for pair in pairs for answer in pair.answers]
    logps, asked = None, Account()
    each = costs.asked(programs, scoring.questions_together(encoder, programs, pairs))
    if encoder.pointwise is not None:
        sizes = scoring.rating_sizes(encoder, items)
        each += costs.rated(programs, sizes, len(encoder.pointwise.verdict_ids))
    if number != iteration + 1:
        scored = scoring.score_answers(encoder, programs, models.load(number), items, spend=asked.add)
        logps = scored["logps"].reshape(-1, 2)
        each += asked.counts
    shardings = jax.tree.map(lambda s: s.sharding, programs.abstract_inference)

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda x, s: x.astype(s.dtype), params, programs.abstract_inference)

    converted = programs.abstract_inference != programs.abstract_trained
    cast = jax.jit(cast, out_shardings=shardings) if converted else lambda params: params

    def look(params: Any) -> dict[str, float]:
        evidence = scoring.score_pairs(
            encoder,
            programs,
            pairs,
            config=config,
            model=lambda: lora.join(cast(params), models.parameters.frozen),
            reference=None,
            reference_logps=logps,
        )
        values = evaluation.clean(evaluation.pair_metrics(config, evidence, labels))
        return {f"{PREFIX}{name}": value for name, value in values.items()}

    return Watch(look, asked.counts, each)
