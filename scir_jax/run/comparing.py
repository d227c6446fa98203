"""Which of two models' answers is better, as a model that judges says, or a grader; and the win rates that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.messages import prompt_text
from scir_jax.data.pairs import Pair
from scir_jax.data.tally import Tally
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.evaluation import win_rates
from scir_jax.evaluation.outputs import Compared
from scir_jax.evaluation.win_rates import Gamed
from scir_jax.run import scoring
from scir_jax.run.evaluation import Grader, reward_logits

KEYS = ("win_rate", "standard_error", "discrete_win_rate", "length_controlled_winrate", "avg_length", "avg_length_base")
"""of the results, those with a fraction"""


def pairs_of(encoder: Encoder, compared: Sequence[Compared], tally: Tally) -> tuple[list[Pair], list[int]]:
    """Encodes pairs of answers, the baseline's first, and gives their places among all.

    Raises:
      InputError: a prompt cannot be encoded, or none is left.
    """
    pairs, places = [], []
    for place, (baseline, model, _) in enumerate(compared):
        tally.rows += 1
        with tally.row(model.where):
            prompt = encoder.prompt(model.messages, model.where)
            if prompt is None:
                tally.leave_out("prompt longer than text.max_prompt_tokens")
                continue
            pairs.append(Pair(prompt, encoder.answer(baseline.text), encoder.answer(model.text)))
            places.append(place)
    tally.finish(len(pairs))
    return pairs, places


def judge(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    params: Any,
    pairs: Sequence[Pair],
    advance: scoring.Advance = scoring.nothing,
) -> np.ndarray:
    """Asks a model as a judge, both orders of each pair and all templates.

    Returns:
      [P] float64, the probability that the second answer is better.
    """
    found = scoring.judge_pairs(encoder, programs, params, pairs, advance)
    fresh = {"verdicts": found.verdicts, "verdict_mass": found.mass}
    logits = reward_logits(config, scoring.evidence_of(pairs, fresh, {}, config))["generative"]
    return 0.5 * (1 - np.tanh(logits / 2))


def grade(compared: Sequence[Compared], grader: Grader) -> np.ndarray:
    """Asks a grader: 1 where the model's answer has the larger "quality", 0 where the baseline's has, 1/2 for equal ones.

    Raises:
      InputError: the grader fails, or gives no number.
    """

    def quality(side: Any) -> float:
        try:
            value = float(grader(prompt_text(side.messages), side.text)["quality"])
        except Exception as error:
            raise InputError(f"the grader fails at {side.where}: {type(error).__name__}: {error}") from error
        if not np.isfinite(value):
            raise InputError(f"the grader gives {value} at {side.where}")
        return value

    return np.array([0.5 * (1 + np.sign(quality(model) - quality(baseline))) for baseline, model, _ in compared])


def results(compared: Sequence[Compared], *, gamed: Gamed | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Computes the win rates of annotated pairs, and the mean lengths of the answers, in characters.

    Args:
      gamed: for the regression with AlpacaEval's gamed baselines; only for its own instructions.
      tell: is told why there is no length-controlled win rate, where there is none.

    Raises:
      InputError: nobody has a preference, or with `gamed` the regression cannot be computed.
    """
    preferences = np.array([pair.preference for pair in compared])
    if np.isnan(preferences).all():
        raise InputError("no pair has a preference")
    theirs, ours = (np.array([len(side.text) for side in sides]) for sides in zip(*((b, m) for b, m, _ in compared)))
    values: dict[str, Any] = {
        "model": compared[0].model.generator,
        "baseline": compared[0].baseline.generator,
        **win_rates.win_rates(preferences),
        "avg_length": float(ours.mean()),
        "avg_length_base": float(theirs.mean()),
    }
    try:
        found = win_rates.length_controlled(preferences, (theirs - ours).astype(np.float64), gamed)
    except InputError as error:
        if gamed is not None:
            raise
        tell(f"left out: {error}")
        return values
    return {**values, "length_controlled_winrate": found, "regression": "full" if gamed else "minimal"}


def table(values: dict[str, Any]) -> str:
    """Writes `results` with a line per number; win rates are in percent, lengths in characters."""
    lines = [f"{'model':<26} {values['model']}", f"{'baseline':<26} {values['baseline']}"]
    for key in KEYS:
        if key in values:
            lines.append(f"{key:<26} {values[key]:.2f}")
    lines += [f"{key:<26} {values[key]}" for key in ("n_wins", "n_wins_base", "n_draws", "n_total")]
    return "\n".join(lines)
