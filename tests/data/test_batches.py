"""Batches of rows: what stands where, the shapes that are announced, hosts' shares, and pairs that lack a value."""

import dataclasses

import jax
import numpy as np
import pytest
from tests.data.small_data import CHAT, LAYOUTS, fits, make_encoder, make_pairs, make_spec, marked_rows, same

from scir_jax.data.batches import PairSpec, PromptSpec, RowGroup, TrainSpec, pad
from scir_jax.data.encode import Lengths, Marked, Row
from scir_jax.errors import InputError

FROZEN = (("generative", 2), ("implicit", 1))


def known(columns=(2, 1), verdicts=2):
    """What is known of a pair before training, as FROZEN and the specification's verdicts need it."""
    frozen = {name: tuple(0.5 + i for i in range(n)) for (name, _), n in zip(FROZEN, columns)}
    return dict(frozen=frozen, verdicts=tuple(0.25 * i for i in range(verdicts)))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_padding():
    rows = RowGroup((3,), 4).arrays([Row((5, 6, 7), 1, 2), Row((0, 0), judged=True), Row((), 0, 0)], pad_id=9)
    assert rows.ids.tolist() == [[5, 6, 7, 9], [0, 0, 9, 9], [9, 9, 9, 9]]
    assert rows.start.tolist() == [1, 0, 0] and rows.length.tolist() == [2, 0, 0]
    assert rows.verdict.tolist() == [0, 1, 0]
    assert all(part.dtype == np.int32 for part in rows)
    assert pad((1, 2), 2, 0).tolist() == [1, 2]
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into 2"):
        pad((1, 2, 3), 2, 0)
    with pytest.raises(ValueError, match="does not fit"):
        RowGroup((2,), 2).arrays([Row((1,)), Row((1, 2, 3))], 0)


def test_rows_of_pairs_stand_side_by_side():
    group = RowGroup((2, 2), 3)
    rows = group.arrays([Row((i,) * n, i, 1, judged=i > 2) for i, n in ((1, 1), (2, 2), (3, 3), (4, 1))], 0)
    assert group.rows == 4 and rows.ids.shape == (2, 2, 3)
    assert rows.ids[:, :, 0].tolist() == rows.start.tolist() == [[1, 2], [3, 4]]
    assert rows.verdict.tolist() == [[0, 0], [2, 0]]


def test_supervised_rows():
    group = RowGroup((2,), 4)
    made = group.targets([Marked((1, 2, 3), (False, True, True)), Marked((4,), (True,))], pad_id=7)
    assert made.ids.tolist() == [[1, 2, 3, 7], [4, 7, 7, 7]] and made.ids.dtype == np.int32
    assert made.mask.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]] and made.mask.dtype == np.float32
    with pytest.raises(ValueError):
        RowGroup((2,), 2).targets([Marked((1, 2, 3), (False, True, True))], 7)


def test_prompts_and_places_without_one():
    made = PromptSpec(4, 3, 2, 5).arrays([(7, (1, 2)), None, (0, (3, 4, 5))], pad_id=9)
    assert made.ids.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert made.length.tolist() == [2, 1, 3] and made.index.tolist() == [7, -1, 0]
    assert all(part.dtype == np.int32 for part in made)


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("judged", [True, False])
def test_batches_hold_the_rows_of_their_pairs(layouts, judged):
    encoder = make_encoder(*layouts)
    cached = ("preference_logps", "implicit_logps", "start_logps")
    values = dict(frozen={"generative": (0.5, -0.5)}, verdicts=(1.0, -2.0, 3.0), length_penalty=0.25, label=0.75)
    pairs = make_pairs(encoder, weight=0.5, **values)
    spec = make_spec(encoder, 4, judged=judged, cached=cached, frozen=(("generative", 2),), verdicts=3)
    continued = judged and layouts[0] == "continuation"
    assert len(spec.pairs.judges) == (len(layouts) - continued if judged else 0)
    for first in range(0, len(pairs), 4):
        batch = spec.arrays(list(enumerate(pairs))[first : first + 4], {}, encoder)
        p = batch.pairs
        assert batch.targets == {} and p.index.tolist() == list(range(first, first + 4))
        for at, i in enumerate(p.index):
            pair = pairs[i]
            answers, judges = spec.pairs.rows(pair, encoder)
            asked = encoder.judges[continued:] if judged else ()
            assert [tuple(rows) for rows in judges] == [encoder.judge_rows(judge, pair) for judge in asked]
            assert tuple(answers) == (
                encoder.judge_rows(encoder.judges[0], pair) if continued else encoder.answer_rows(pair)
            )
            for made, expected in zip((p.answers, *p.judges), (answers, *judges), strict=True):
                for side, row in enumerate(expected):
                    assert tuple(made.ids[at, side, : len(row.ids)]) == row.ids
                    assert (made.ids[at, side, len(row.ids) :] == CHAT.pad_id).all()
                    assert made.start[at, side] == row.start and made.length[at, side] == row.length
                    assert made.verdict[at, side] == (len(row.ids) - 1 if row.judged else 0)
            for side, answer in enumerate(pair.answers):
                start, length = p.answers.start[at, side], p.answers.length[at, side]
                assert tuple(p.answers.ids[at, side, start : start + length]) == answer.ids, "scored as sampled"
            assert {name: tuple(values[at]) for name, values in p.cached.items()} == pair.cached
            assert p.length_penalty[at].tolist() == [0.25 * len(y.ids) for y in pair.answers]
            assert p.frozen["generative"][at].tolist() == [0.5, -0.5] and p.verdicts[at].tolist() == [1.0, -2.0, 3.0]
            assert p.label[at] == 0.75 and p.weight[at] == 0.5


def test_pairs_that_nobody_labelled_are_even():
    encoder = make_encoder()
    assert make_spec(encoder, 12).arrays(list(enumerate(make_pairs(encoder))), {}, encoder).pairs.label.tolist() == (
        [0.5] * 12
    )


def lacking(pair, **changes):
    """The sentence about a pair that a batch cannot be made of."""
    encoder = make_encoder("continuation", "standalone")
    spec = make_spec(encoder, 2, cached=("preference_logps", "implicit_logps"), frozen=FROZEN, verdicts=2)
    good = make_pairs(encoder, 3, **known())
    spec.arrays([(0, good[0]), (2, good[2])], {}, encoder)
    with pytest.raises(InputError) as error:
        spec.arrays([(0, good[0]), (pair, dataclasses.replace(good[pair], **changes))], {}, encoder)
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


# --- whole batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [None, *LAYOUTS], ids=lambda x: "-".join(x or ["none"]))
@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("filled", [5, 3, 0])
def test_shapes_are_those_of_the_arrays(layouts, judged, filled):
    """Whatever the configuration asks for, and whether or not the batch is full."""
    encoder = make_encoder(*(layouts or ()))
    values = dict(cached=("preference_logps", "implicit_logps"), frozen=FROZEN, verdicts=2) if layouts else {}
    spec = make_spec(encoder, 5, dict(ift=3, eft=2), judged=judged, **values)
    pairs = [*list(enumerate(make_pairs(encoder, **known())))[:filled], *[None] * (5 - filled)]
    rows = dict(ift=marked_rows()[:3], eft=marked_rows()[3:5])
    fits(spec.abstract(), spec.arrays(pairs, rows, encoder))
    fits(spec.pairs.abstract(), spec.pairs.arrays(pairs, encoder))
    supervised = TrainSpec(None, spec.targets)
    fits(supervised.abstract(), supervised.arrays((), rows, encoder))
    assert supervised.abstract().pairs is None and list(supervised.abstract().targets) == ["ift", "eft"]
    groups = (*spec.pairs.groups, *(group for _, group in spec.targets))
    assert spec.groups == groups and spec.tokens == sum(np.prod((*g.leading, g.tokens)) for g in groups)


@pytest.mark.parametrize("group", [RowGroup((5,), 8, 3), RowGroup((5, 2), 8, verdict=True), RowGroup((1,), 1)])
def test_shapes_of_rows(group):
    rows = [Row((1,), 0, 1)] * group.rows
    fits(group.abstract(), group.arrays(rows, 0))
    if len(group.leading) == 1:
        fits(group.abstract_targets(), group.targets([Marked((1,), (True,))] * group.rows, 0))


@pytest.mark.parametrize("filled", [4, 1, 0])
def test_shapes_of_prompts(filled):
    spec = PromptSpec(4, 6, 3, 5)
    fits(spec.abstract(), spec.arrays([*[(2, (1, 2, 3))] * filled, *[None] * (4 - filled)], 0))
    assert spec.places == 11


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_a_place_that_is_not_filled_is_padding(layouts):
    encoder = make_encoder(*layouts)
    spec = make_spec(encoder, 4, cached=("implicit_logps",), frozen=FROZEN, verdicts=2)
    pairs = make_pairs(encoder, 2, label=1.0, length_penalty=0.5, **known())
    p = spec.arrays([(0, pairs[0]), None, (1, pairs[1]), None], {}, encoder).pairs
    assert p.index.tolist() == [0, -1, 1, -1] and p.weight.tolist() == [1, 0, 1, 0] and p.label[1] == 0.5
    for rows in (p.answers, *p.judges):
        assert (rows.ids[1::2] == CHAT.pad_id).all() and (rows.ids[::2, :, 0] != CHAT.pad_id).all()
        assert not any(part[1::2].any() for part in (rows.start, rows.length, rows.verdict))
    rest = (*p.cached.values(), *p.frozen.values(), p.verdicts, p.length_penalty)
    assert all(np.isfinite(x).all() and not x[1::2].any() and x[::2].any() for x in rest)


@pytest.mark.parametrize("layouts", LAYOUTS[2:4], ids="-".join)
def test_shares_of_hosts_put_together_are_the_batch(layouts):
    encoder = make_encoder(*layouts)
    values = dict(cached=("start_logps",), frozen=FROZEN, verdicts=2)
    spec = make_spec(encoder, 6, dict(ift=6, eft=3), **values)
    pairs = [*enumerate(make_pairs(encoder, 4, **known())), None, None]
    rows = dict(ift=marked_rows()[:6], eft=marked_rows()[4:])
    whole = spec.arrays(pairs, rows, encoder)
    thirds = [lambda size, h=h: np.arange(size)[h * size // 3 : (h + 1) * size // 3] for h in range(3)]
    parts = [spec.arrays(pairs, rows, encoder, share) for share in thirds]
    same(jax.tree.map(lambda *parts: np.concatenate(parts), *parts), whole)
    assert [len(part.pairs.index) for part in parts] == [2, 2, 2] and parts[2].pairs.index.tolist() == [-1, -1]


def test_what_the_lengths_make_of_a_step():
    lengths = Lengths(prompt=16, answer=8, quote=16, scored=24, judges=(40, 48), targets={"ift": 64, "eft": 0})

    def described(**way):
        spec = PairSpec.of(3, lengths, **way)
        return spec.answers, spec.judges

    plain, asked = RowGroup((3, 2), 24, 8), [RowGroup((3, 2), tokens, verdict=True) for tokens in (40, 48)]
    assert described(judged=False, continued=False) == described(judged=False, continued=True) == (plain, ())
    assert described(judged=True, continued=False) == (plain, tuple(asked))
    assert described(judged=True, continued=True) == (RowGroup((3, 2), 40, 8, True), (asked[1],))
    # A name without rows has no part in the step; all places of the others' rows are learned at the most.
    assert TrainSpec.of(None, dict(ift=4, eft=0), lengths) == TrainSpec(None, (("ift", RowGroup((4,), 64, 64)),))
    assert TrainSpec.of(None, {}, lengths).groups == () and TrainSpec.of(None, {}, lengths).tokens == 0
