"""Training steps' batches: what stands where, the shapes that are announced, hosts' shares, pairs that lack a value."""

import dataclasses

import jax
import numpy as np
import pytest

from scir_jax.data.batches import RowGroup
from scir_jax.data.encode import Lengths, Marked
from scir_jax.data.packing import Shape
from scir_jax.data.steps import PairSpec, TrainSpec
from scir_jax.errors import InputError
from tests.data.small_data import (
    LAYOUTS,
    fits,
    make_encoder,
    make_pairs,
    make_spec,
    marked_rows,
    read_of,
    rows_of,
    same,
    step_of,
)

FROZEN = (("generative", 2), ("implicit", 1))


def known(columns=(2, 1), verdicts=2):
    """What is known of a pair before training, as FROZEN and the specification's verdicts need it."""
    frozen = {name: tuple(0.5 + i for i in range(n)) for (name, _), n in zip(FROZEN, columns)}
    return dict(frozen=frozen, verdicts=tuple(0.25 * i for i in range(verdicts)))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(("judged", "orders"), [(True, 2), (True, 1), (False, 2)])
def test_batches_hold_the_rows_of_their_pairs(layouts, judged, orders):
    encoder = make_encoder(*layouts)
    cached = ("preference_logps", "implicit_logps", "start_logps")
    values = dict(frozen={"generative": (0.5, -0.5)}, verdicts=(1.0, -2.0, 3.0), length_penalty=0.25, label=0.75)
    pairs = make_pairs(encoder, weight=0.5, **values)
    spec = make_spec(encoder, 4, judged=judged, cached=cached, frozen=(("generative", 2),), verdicts=3, orders=orders)
    continued = judged and layouts[0] == "continuation"
    asked = encoder.judges if judged else ()
    assert spec.pairs.asked == len(asked) and len(spec.pairs.judges) == len(asked) - continued
    for first in range(0, len(pairs), 4):
        batch = step_of(spec, list(enumerate(pairs))[first : first + 4], encoder)
        p, rows = batch.pairs, batch.rows
        assert rows.learned == {} and p.index.tolist() == list(range(first, first + 4))
        (found,) = rows_of(batch)
        by_place = {int(place): (where, ids) for where, ids in found for place in where}
        assert len(found) == 4 * (2 + orders * len(spec.pairs.judges))
        for at, i in enumerate(p.index):
            pair = pairs[i]
            sides = range(2) if orders == 2 else [int(i % 2)]
            assert all(len(numbers) == orders for numbers in p.verdict[at])
            answers, verdicts = read_of(batch)[at]
            for side, answer in enumerate(pair.answers):
                _, places, tokens = answers[side]
                assert tokens == answer.ids and p.length[at, side] == len(answer.ids), "scored as sampled"
                where, ids = by_place[int(places[0])]
                asks = continued and side in sides
                row = (encoder.judge_rows(encoder.judges[0], pair) if asks else encoder.answer_rows(pair))[side]
                assert ids == row.ids, "behind its prompt"
                np.testing.assert_array_equal(places, where[row.start - 1 : row.start - 1 + row.length])
                for number, judge in enumerate(asked if side in sides else ()):
                    place = verdicts[number][sides.index(side)][1]
                    where, ids = by_place[place]
                    assert ids == encoder.judge_rows(judge, pair)[side].ids and where[-1] == place
            assert {name: tuple(values[at]) for name, values in p.cached.items()} == pair.cached
            assert p.length_penalty[at].tolist() == [0.25 * len(y.ids) for y in pair.answers]
            assert p.frozen["generative"][at].tolist() == [0.5, -0.5] and p.verdicts[at].tolist() == [1.0, -2.0, 3.0]
            assert p.label[at] == 0.75 and p.weight[at] == 0.5


def test_pairs_that_nobody_labelled_are_even():
    encoder = make_encoder()
    assert step_of(make_spec(encoder, 12), list(enumerate(make_pairs(encoder))), encoder).pairs.label.tolist() == (
        [0.5] * 12
    )


def lacking(pair, **changes):
    """The sentence about a pair that a batch cannot be made of."""
    encoder = make_encoder("continuation", "standalone")
    spec = make_spec(encoder, 2, cached=("preference_logps", "implicit_logps"), frozen=FROZEN, verdicts=2)
    good = make_pairs(encoder, 3, **known())
    step_of(spec, [(0, good[0]), (2, good[2])], encoder)
    with pytest.raises(InputError) as error:
        step_of(spec, [(0, good[0]), (pair, dataclasses.replace(good[pair], **changes))], encoder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pair_that_lacks_a_value_is_named():
    assert lacking(1, cached={"preference_logps": (-1.0, -2.0)}) == (
        "pairs.jsonl:2: cached: implicit_logps has no values, 2 are needed"
    )
    assert lacking(2, cached={}).startswith("pairs.jsonl:3: cached: preference_logps has no values")
    assert lacking(1, frozen={"generative": (0.5, 1.5)}) == (
        "pairs.jsonl:2: frozen_logits: implicit has no values, 1 are needed"
    )
    assert lacking(1, **known(columns=(3, 1))) == "pairs.jsonl:2: frozen_logits: generative has 3 values, 2 are needed"
    assert lacking(1, **known(columns=(2, 0))) == "pairs.jsonl:2: frozen_logits: implicit has 0 values, 1 are needed"
    assert lacking(1, **known(verdicts=0)) == "pairs.jsonl:2: verdicts: holds 0 numbers, 2 are needed"
    assert lacking(2, **known(verdicts=1)) == "pairs.jsonl:3: verdicts: holds 1 numbers, 2 are needed"


def test_supervised_rows():
    spec = TrainSpec(None, (("ift", RowGroup((2,), 4, 2)),))
    rows = [Marked((1, 2, 3), (False, True, True)), Marked((4,), (True,))]
    batch = step_of(spec, [], make_encoder(), {"ift": rows})
    assert [ids for _, ids in rows_of(batch)[0]] == [(1, 2, 3), (4,)] and batch.pairs is None
    # The first token of a row is behind none that could predict it.
    learned = batch.rows.learned["ift"]
    assert learned.tolist() == [[True, True, False, False]]
    assert batch.rows.places[learned].tolist() == [0, 1] and batch.rows.targets[learned].tolist() == [2, 3]
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit"):
        step_of(TrainSpec(None, (("ift", RowGroup((2,), 2, 2)),)), [], make_encoder(), {"ift": rows})


# --- whole batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [None, *LAYOUTS], ids=lambda x: "-".join(x or ["none"]))
@pytest.mark.parametrize(("judged", "orders"), [(True, 2), (True, 1), (False, 2)])
@pytest.mark.parametrize("filled", [6, 3, 0])
def test_shapes_are_those_of_the_arrays(layouts, judged, orders, filled):
    """Whatever the configuration asks for, and whether or not the batch is full."""
    encoder = make_encoder(*(layouts or ()))
    values = dict(cached=("preference_logps", "implicit_logps"), frozen=FROZEN, verdicts=2) if layouts else {}
    spec = make_spec(encoder, 6, dict(ift=3, eft=3), judged=judged, devices=3, orders=orders, **values)
    pairs = [*list(enumerate(make_pairs(encoder, **known())))[:filled], *[None] * (6 - filled)]
    rows = dict(ift=marked_rows()[:3], eft=marked_rows()[3:6])
    fits(spec.abstract(spec.bound), step_of(spec, pairs, encoder, rows))
    supervised = dataclasses.replace(spec, pairs=None)
    fits(supervised.abstract(supervised.bound), step_of(supervised, [], encoder, rows))
    assert supervised.abstract(supervised.bound).pairs is None
    assert set(supervised.abstract(supervised.bound).rows.learned) == {"ift", "eft"}
    assert spec.groups == (*spec.pairs.groups, *(group for _, group in spec.targets))
    assert 3 * spec.bound.tokens == sum(np.prod((*g.leading, g.tokens)) for g in spec.groups)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_a_place_that_is_not_filled_is_padding(layouts):
    encoder = make_encoder(*layouts)
    spec = make_spec(encoder, 4, cached=("implicit_logps",), frozen=FROZEN, verdicts=2)
    pairs = make_pairs(encoder, 2, label=1.0, length_penalty=0.5, **known())
    batch = step_of(spec, [(0, pairs[0]), None, (1, pairs[1]), None], encoder)
    p = batch.pairs
    assert p.index.tolist() == [0, -1, 1, -1] and p.weight.tolist() == [1, 0, 1, 0] and p.label[1] == 0.5
    assert len(rows_of(batch)[0]) == 2 * 2 * (1 + len(spec.pairs.judges))
    assert not any(part[1::2].any() for part in (p.answer, p.length, p.verdict)) and p.length[::2].all()
    rest = (*p.cached.values(), *p.frozen.values(), p.verdicts, p.length_penalty)
    assert all(np.isfinite(x).all() and not x[1::2].any() and x[::2].any() for x in rest)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("layouts", LAYOUTS[2:4], ids="-".join)
def test_shares_of_hosts_put_together_are_the_batch(layouts, micro):
    encoder = make_encoder(*layouts)
    values = dict(cached=("start_logps",), frozen=FROZEN, verdicts=2)
    spec = make_spec(encoder, 12, dict(ift=6, eft=6), devices=3, micro=micro, **values)
    pairs = [*enumerate(make_pairs(encoder, 8, **known())), *[None] * 4]
    rows = dict(ift=marked_rows()[:6], eft=marked_rows()[1:])
    whole = step_of(spec, pairs, encoder, rows)
    thirds = [lambda size, h=h: np.arange(size)[h * size // 3 : (h + 1) * size // 3] for h in range(3)]
    parts = [step_of(spec, pairs, encoder, rows, share) for share in thirds]
    same(jax.tree.map(lambda *parts: np.concatenate(parts), *parts), whole)
    assert [len(part.pairs.index) for part in parts] == [4, 4, 4] and parts[2].pairs.index.tolist() == [-1] * 4
    # Each micro-batch takes every micro-th row of each device.
    assert whole.pairs.index.tolist() == [*range(8), *[-1] * 4]
    assert spec.numbers(2).tolist() == (
        [[0, 1], [2, 3], [4, 5]] if micro == 1 else [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]
    )


def test_what_the_lengths_make_of_a_step():
    lengths = Lengths(
        prompt=16,
        answer=8,
        quote=16,
        scored=24,
        judges=(40, 48),
        targets={"ift": 64, "eft": 0},
        learned={"ift": 20, "eft": 0},
    )

    def described(**way):
        spec = PairSpec.of(3, lengths, **way)
        return spec.answers, spec.judges

    plain, asked = RowGroup((3, 2), 24, 8), [RowGroup((3, 2), tokens, verdict=True) for tokens in (40, 48)]
    assert described(judged=False, continued=False) == described(judged=False, continued=True) == (plain, ())
    assert described(judged=True, continued=False) == (plain, tuple(asked))
    assert described(judged=True, continued=True) == (RowGroup((3, 2), 40, 8, True), (asked[1],))
    # A name without rows has no part in the step.
    spec = TrainSpec.of(None, dict(ift=4, eft=0), lengths, 2)
    assert spec == TrainSpec(None, (("ift", RowGroup((4,), 64, 20)),), 2) and spec.bound == Shape(((2, 64),), 40)
    assert TrainSpec.of(None, {}, lengths).groups == ()
    pairs = PairSpec.of(4, lengths, judged=True, continued=False)
    spec = TrainSpec.of(pairs, dict(ift=4), lengths, 2, 2)
    assert spec.bound == Shape(((2, 24), (2, 40), (2, 48), (1, 64)), 2 * 8 + 20, answers=2, verdicts=4)
