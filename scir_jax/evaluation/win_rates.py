"""Win rates of one model against another as AlpacaEval computes them, with and without control for length; float64.

Source of the regression: "Length-Controlled AlpacaEval", arXiv 2404.04475, and version 0.6.6 of its program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scir_jax.errors import InputError

FOLDS = 5
SEED = 123
GAMED_WEIGHT = 0.2 / 2
"""of a row about a gamed baseline, of which there are two"""


class Gamed(NamedTuple):
    """AlpacaEval's rows about baselines whose lengths were gamed, which regularise its regression.

    Attributes:
      preferences: [G] from 0 to 1, NaN where there is none.
      lengths: [G] standardised length differences.
      difficulties: [G] of the rows' instructions.
      not_gamed: [G] 1 or 0.
      by_instruction: [I] difficulty of each instruction, in the order of the evaluation's rows.
    """

    preferences: np.ndarray
    lengths: np.ndarray
    difficulties: np.ndarray
    not_gamed: np.ndarray
    by_instruction: np.ndarray


def win_rates(preferences: np.ndarray) -> dict[str, float | int]:
    """Computes the win rate in percent, its standard error, and the counts behind it.

    Args:
      preferences: [N] probability that the model's answer is better than the baseline's; NaN where nobody knows.

    Returns:
      win_rate, standard_error (none for a single row), discrete_win_rate (every preference counts as a win, a loss or a
      draw), n_wins, n_wins_base, n_draws, n_total.
    """
    known = preferences[~np.isnan(preferences)]
    wins, losses, total = int((known > 0.5).sum()), int((known < 0.5).sum()), len(known)
    result: dict[str, float | int] = {"win_rate": 100 * float(known.mean())}
    if total > 1:
        result["standard_error"] = 100 * float(known.std(ddof=1) / np.sqrt(total))
    draws = total - wins - losses
    result["discrete_win_rate"] = 100 * (wins + draws / 2) / total
    return result | {"n_wins": wins, "n_wins_base": losses, "n_draws": draws, "n_total": total}


def length_controlled(preferences: np.ndarray, lengths: np.ndarray, gamed: Gamed | None = None) -> float:
    """Computes the win rate in percent that the model would have if its answers were as long as the baseline's.

    A logistic regression without intercept predicts the preference from tanh of the standardised length difference, from
    a constant, and with `gamed` from the instruction's difficulty. Every row is there twice, as a win with weight p and as
    a loss with weight 1 - p; the strength of the L1 penalty is chosen by the log loss over five groups of rows.

    Args:
      preferences: [N] probability that the model's answer is better than the baseline's; NaN where nobody knows.
      lengths: [N] characters of the baseline's answer minus those of the model's.
      gamed: of AlpacaEval's own instructions; then the rows are its instructions, in its order.

    Raises:
      InputError: scikit-learn is not installed, or these rows allow no regression.
    """
    rows = len(preferences)
    if int((~np.isnan(preferences)).sum()) < FOLDS:
        raise InputError(f"the length-controlled win rate needs at least {FOLDS} rows")
    spread = np.std(lengths, ddof=1)
    if spread == 0:
        raise InputError(
            "the length-controlled win rate needs answers whose lengths differ by more in some rows than in others"
        )
    features = [np.tanh(lengths / spread), np.ones(rows)]
    if gamed is None:
        return 100 * float(_predicted(np.stack(features, axis=1), preferences, np.ones(rows), rows).mean())
    if len(gamed.by_instruction) != rows:
        raise InputError(
            f"there are difficulties of {len(gamed.by_instruction)} instructions and {rows} rows: the regression with "
            "gamed baselines is for AlpacaEval's own instructions, in its order"
        )
    ours = np.stack([features[0], gamed.by_instruction, features[1]], axis=1)
    theirs = np.stack([np.tanh(gamed.lengths), gamed.difficulties, gamed.not_gamed], axis=1)
    weights = np.concatenate([np.where(gamed.not_gamed > 0, 1.0, GAMED_WEIGHT), np.ones(rows)])
    every = np.concatenate([theirs, ours])
    return 100 * float(_predicted(every, np.concatenate([gamed.preferences, preferences]), weights, rows).mean())


def _predicted(features: np.ndarray, preferences: np.ndarray, weights: np.ndarray, last: int) -> np.ndarray:
    """Fits the regression, and predicts the preferences of the last rows as if their answers were of one length."""
    sklearn = needs_sklearn()
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    known = ~np.isnan(preferences)
    x, p, w = features[known], preferences[known], weights[known]
    probability, weight = np.concatenate([p, 1 - p]), np.concatenate([w, w])
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            cv=GroupKFold(FOLDS),
            scoring=scorer.set_score_request(probability=True, weight=True),
            solver="liblinear",
            l1_ratios=(1.0,),
            fit_intercept=False,
            random_state=SEED,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        model.fit(
            np.concatenate([x, x]),
            np.concatenate([np.ones(len(p)), np.zeros(len(p))]),
            sample_weight=probability * weight,
            groups=np.tile(np.arange(len(p)), 2),
            probability=probability,
            weight=weight,
        )
        asked = features[-last:].copy()
        asked[:, 0] = 0
        return model.predict_proba(asked)[:, 1]


def needs_sklearn() -> Any:
    """Imports scikit-learn, which only the regression needs.

    Raises:
      InputError: it is not installed.
    """
    try:
        import sklearn
    except ImportError:
        raise InputError(
            "the length-controlled win rate is computed with scikit-learn: pip install 'scir_jax[evaluate]'"
        ) from None
    return sklearn


def _loss(wins: Sequence[float], predicted: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> float:
    """Computes the log loss of a prediction against a probability, whichever of its two rows it stands in."""
    target = np.where(np.asarray(wins) == 1, probability, 1 - probability)
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    return -float(np.mean(weight * (target * np.log(predicted) + (1 - target) * np.log(1 - predicted))))
