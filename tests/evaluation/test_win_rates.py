"""Win rates, against those of alpaca_eval 0.6.6 on the same rows: recorded ones, and its own where it is installed."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from scir_jax.errors import InputError
from scir_jax.evaluation import outputs, win_rates

FILES = Path(__file__).parent / "files"
NAMES = ("one", "two")
REGRESSIONS = ("length_controlled_minimal", "length_controlled_v1")


def ours(name, regression):
    rows = outputs.read_annotations(str(FILES / f"annotations_{name}.json"))
    preferences = np.array([pair.preference for pair in rows])
    lengths = np.array([len(pair.baseline.text) - len(pair.model.text) for pair in rows], float)
    gamed = outputs.read_gamed(str(FILES / "df_gamed.csv")) if regression == REGRESSIONS[1] else None
    found = win_rates.length_controlled(preferences, lengths, gamed)
    return win_rates.win_rates(preferences) | {"length_controlled_winrate": found}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regression", REGRESSIONS)
def test_equal_to_the_recorded_values(name, regression):
    """files/alpaca_eval.json has what alpaca_eval 0.6.6 says of the annotations beside it."""
    pytest.importorskip("sklearn")
    expected = json.loads((FILES / "alpaca_eval.json").read_text())[name][regression]
    for key, value in ours(name, regression).items():
        assert value == pytest.approx(expected[key], abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equal_to_alpaca_eval(name, monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    import pandas
    import sklearn

    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(FILES / "df_gamed.csv"))
    rows = pandas.DataFrame(json.loads((FILES / f"annotations_{name}.json").read_text()))
    for regression in REGRESSIONS:
        with sklearn.config_context():  # it sets an option for good
            expected = glm.get_length_controlled_winrate(rows.copy(), glm_name=regression, save_weights_dir=None)
        for key, value in ours(name, regression).items():
            assert value == pytest.approx(float(expected[key]), abs=1e-6), key


def test_counts_by_hand():
    found = win_rates.win_rates(np.array([1.0, 0.75, 0.5, np.nan, 0.0]))
    deviation = np.sqrt(sum((x - 0.5625) ** 2 for x in (1, 0.75, 0.5, 0)) / 3)
    assert found == {
        "win_rate": pytest.approx(56.25),
        "standard_error": pytest.approx(100 * deviation / 2),
        "discrete_win_rate": pytest.approx(62.5),
        "n_wins": 2,
        "n_wins_base": 1,
        "n_draws": 1,
        "n_total": 4,
    }
    assert "standard_error" not in win_rates.win_rates(np.array([1.0]))


def test_length_that_explains_all_preferences_is_taken_out():
    """The longer answer wins with a probability that depends on lengths alone: without the lengths nobody wins."""
    pytest.importorskip("sklearn")
    lengths = np.random.default_rng(0).normal(20, 30, size=400).round()
    preferences = 1 / (1 + np.exp(3 * np.tanh(lengths / lengths.std(ddof=1))))
    assert 100 * preferences.mean() < 35
    assert win_rates.length_controlled(preferences, lengths) == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    "preferences, lengths, words",
    [([1.0, 0.0, 1.0, np.nan, 1.0], [1, 2, 3, 4, 5], "5 rows"), ([1.0] * 5, [7] * 5, "lengths differ")],
)
def test_rows_without_a_regression(preferences, lengths, words):
    with pytest.raises(InputError, match=words):
        win_rates.length_controlled(np.array(preferences), np.array(lengths, float))


def test_gamed_rows_are_for_alpaca_eval_s_own_instructions():
    gamed = outputs.read_gamed(str(FILES / "df_gamed.csv"))
    with pytest.raises(InputError, match="60 instructions and 6 rows"):
        win_rates.length_controlled(np.full(6, 0.5), np.arange(6.0), gamed)


def test_without_scikit_learn_a_sentence_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "sklearn":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'scir_jax\[evaluate\]'"):
        win_rates.length_controlled(np.linspace(0, 1, 6), np.arange(6.0))
