"""The configuration's choices are the entries of the method's tables."""

import typing

import pytest

from scir_jax.method.consistency import KINDS
from scir_jax.method.labels import LABELS
from scir_jax.method.pairing import PAIRING
from scir_jax.method.preference import LOSSES
from scir_jax.method.rewards import REWARDS
from scir_jax.method.selection import SELECTION
from tests.method_reference import configured, options


@pytest.mark.parametrize(
    ("section", "key", "entries"),
    [
        ("ConsistencyConfig", "kind", KINDS),
        ("PreferenceConfig", "labels", LABELS),
        ("PreferenceConfig", "loss", LOSSES),
        ("SelectionConfig", "rule", SELECTION),
        ("PairsConfig", "kind", PAIRING),
    ],
)
def test_choices_are_the_entries_of_a_table(section, key, entries):
    assert sorted(options(section, key)) == sorted(entries)


def test_reward_models():
    (of_one, more) = options("RewardsConfig", "models")  # tuple[Literal[...], ...]
    assert more is ... and sorted(typing.get_args(of_one)) == sorted(REWARDS)
    stopped = options("ConsistencyConfig", "stop_gradient")
    assert stopped[0] == "none" and set(stopped[1:]) <= set(REWARDS)
    # Every reward model that learns can be told not to.
    assert {name for name, reward in REWARDS.items() if reward.reads} == set(stopped[1:])
    # Every reward model can label on its own.
    assert set(REWARDS) <= set(LABELS)


def test_what_entries_name_is_there():
    config = configured({})
    assert set(config.rewards.models) | set(config.rewards.weights) <= set(REWARDS)
    for label in LABELS.values():
        assert set(label.rewards(config)) <= set(REWARDS)
        assert bool(label.rewards(config)) == (label.logit is not None)
    for way in PAIRING.values():
        assert not way.judged or way.choose  # verdicts are for choosing
