"""The best point of a grid, its edges, and how a grid grows there."""

import numpy as np
import pytest

from scir_jax.study.tuning import choose, grown, next_value


@pytest.mark.parametrize(
    "values, following",
    [
        ((5e-5, 1e-4, 2e-4), 4e-4),
        ((2e-4, 1e-4, 5e-5), 2.5e-5),
        ((1.0, 3.0, 10.0), 33.3),
        ((1.0, 2.0), 4.0),
        ((0.1, 0.2, 0.3), 0.4),
        ((0.0, 0.5, 1.0), 1.5),
        ((1.0, 0.5, 0.0), -0.5),
        ((-1.0, 0.0), 1.0),
        ((2, 4, 6), 8),
        ((1, 2, 4), 8),
    ],
)
def test_next_values(values, following):
    found = next_value(values)
    assert found == pytest.approx(following) and type(found) is type(values[0])


def of(**scores):
    return {(("rate", float(name[1:])),): value for name, value in scores.items()}


def test_a_winner_inside_has_no_edge():
    choice = choose(of(_1=0.5, _2=0.7, _4=0.6))
    assert choice.point == (("rate", 2.0),) and choice.edges == () and grown(choice) == []


def test_a_winner_at_an_edge_grows_the_grid_there():
    assert grown(choose(of(_1=0.5, _2=0.7, _4=0.8))) == [(("rate", 8.0),)]
    assert grown(choose(of(_1=0.9, _2=0.7, _4=-np.inf))) == [(("rate", 0.5),)]
    assert choose(of(_1=0.9, _2=0.9)).point == (("rate", 1.0),), "of equal ones the first"


def test_several_keys():
    """The grid grows by the winner with one other value; what has one value, or values that are no numbers, has no edge."""
    scores = {
        (("rate", rate), ("kind", kind), ("weight", 3.0), ("epochs", epochs)): rate + epochs
        for rate in (1.0, 2.0, 3.0)
        for kind in ("kl", "js")
        for epochs in (1, 2)
    }
    choice = choose(scores)
    assert choice.edges == ("rate", "epochs")
    assert grown(choice) == [
        (("rate", 4.0), ("kind", "kl"), ("weight", 3.0), ("epochs", 2)),
        (("rate", 3.0), ("kind", "kl"), ("weight", 3.0), ("epochs", 4)),
    ]
