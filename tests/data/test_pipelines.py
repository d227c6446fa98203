"""The Grain pipelines: every pair once an epoch, seeds, positions, hosts' shares, supervised rows."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from scir_jax.data.batches import RowGroup
from scir_jax.data.encode import Marked
from scir_jax.data.pipelines import Way, iterator, pair_batches, supervised_batches
from scir_jax.data.steps import TrainSpec
from scir_jax.errors import InputError
from scir_jax.model.segments import BRANCH
from tests.data.small_data import (
    WORDS,
    make_encoder,
    make_pairs,
    make_spec,
    marked_rows,
    read_of,
    rows_of,
    same,
    step_of,
)

REPLAYED = {"ift": marked_rows(), "eft": marked_rows()}


def batches_of(size=5, **settings):
    """What the steps of `stage_of` take."""
    return stage_of(size, **settings).dataset


def stage_of(
    size=5,
    *,
    epochs=1,
    seed=0,
    replay=None,
    share=np.arange,
    layouts=("standalone",),
    pairs=None,
    way=Way(),
    **values,
):
    """Batches of twelve pairs; `replay` says how many supervised rows of each name are beside them."""
    encoder = make_encoder(*layouts)
    return pair_batches(
        make_spec(encoder, size, replay, **values),
        encoder,
        make_pairs(encoder) if pairs is None else pairs,
        REPLAYED,
        epochs=epochs,
        seed=seed,
        seeds={"ift": seed + 1, "eft": seed + 2},
        share=share,
        way=way,
    )


def supervised(steps, *settings, **more):
    return supervised_stage(steps, *settings, **more).dataset


def supervised_stage(steps, seed=0, rows=None, tokens=4, sizes=None):
    sizes = sizes or {"ift": 3}
    spec = TrainSpec(None, tuple((name, RowGroup((size,), tokens, tokens)) for name, size in sizes.items()))
    rows = {"ift": REPLAYED["ift"] if rows is None else rows, "eft": REPLAYED["eft"]}
    seeds = {"ift": seed, "eft": seed + 1}
    return supervised_batches(spec, make_encoder(), rows, steps=steps, seeds=seeds)


def learned(batch, name="ift"):
    """The last tokens of the rows that a part learns, which tell them apart."""
    return [
        int(ids[-1]) for where, ids in rows_of(batch)[0] if where[-1] - 1 in batch.rows.places[batch.rows.learned[name]]
    ]


def index(batch):
    return batch.pairs.index.tolist()


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 6, 12, 16])
def test_each_pair_once_an_epoch(size):
    count = len(WORDS)
    assert count == 12
    dataset = batches_of(size)
    assert len(dataset) == -(-count // size)
    batches = list(iterator(dataset))
    assert all(len(b.pairs.index) == size and len(b.pairs.answer) == size for b in batches)
    seen = [i for b in batches for i in index(b)]
    real = [i for i in seen if i >= 0]
    assert sorted(real) == list(range(count)) and real != sorted(real)
    assert seen[:count] == real, "only the end is filled up"
    weights = np.concatenate([b.pairs.weight for b in batches])
    assert weights.tolist() == [1.0] * count + [0.0] * (len(seen) - count)


def test_a_batch_holds_the_pairs_that_it_names():
    encoder = make_encoder()
    pairs, spec = make_pairs(encoder), make_spec(encoder, 5, cached=("preference_logps",))
    for batch in iterator(batches_of(cached=("preference_logps",))):
        numbered = [None if i < 0 else (i, pairs[i]) for i in index(batch)]
        assert any(numbered)
        same(batch, step_of(spec, numbered, encoder))


def test_epochs_are_shuffled_anew():
    batches = list(iterator(batches_of(12, epochs=3)))
    orders = [index(b) for b in batches]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_each_pair_as_often_as_there_are_epochs():
    seen = [i for b in iterator(batches_of(5, epochs=2)) for i in index(b)]
    assert sorted(seen) == [-1] + sorted(list(range(12)) * 2), "24 pairs and one to fill"
    assert sorted(seen[:12]) == list(range(12)), "an epoch ends before the next begins"


# Of which rows of a batch over three devices a host holds which: one device's each, the first and last of them, some
# held by two hosts.
SHARES = {
    "parts": [lambda size, host=host: np.arange(size)[host * size // 3 : (host + 1) * size // 3] for host in range(3)],
    "apart": [lambda size: np.delete(np.arange(size), np.s_[size // 3 : 2 * size // 3])],
    "overlapping": [lambda size: np.arange(size)[: 2 * size // 3], lambda size: np.arange(size)[size // 3 :]],
}


@pytest.mark.parametrize(
    "kind, way",
    [("parts", Way()), ("apart", Way("lengths")), ("overlapping", Way("bins", 120))],
    ids=lambda value: getattr(value, "kind", value),
)
def test_shares_of_hosts_make_the_batch(kind, way):
    """Every host makes those rows of the batches that it holds, padding of the last one included."""

    def dataset(share=np.arange):
        parts = dict(replay=dict(ift=6, eft=3), layouts=("standalone", "continuation"), cached=("start_logps",))
        return batches_of(9, epochs=2, share=share, devices=3, way=way, **parts)

    whole = dataset()
    assert len(whole) == 3
    assert sorted(whole[2].pairs.weight.tolist()) == [0.0] * 3 + [1.0] * 6, "24 pairs and three to fill"
    for share in SHARES[kind]:
        own = dataset(share)
        assert len(own) == len(whole)
        for batch, (expected, found) in enumerate(zip(iterator(whole), iterator(own), strict=True)):
            same(found, jax.tree.map(lambda x: x[share(len(x))], expected))
            if way.kind == "off":
                assert [i < 0 for i in index(found)] == [batch == 2 and row >= 6 for row in share(9)]


def test_the_same_seed_gives_the_same_order():
    replay = dict(ift=3, eft=3)
    one, two, other = (list(iterator(batches_of(epochs=2, seed=s, replay=replay))) for s in (3, 3, 4))
    same(one, two)
    assert [index(b) for b in one] != [index(b) for b in other]
    assert any(learned(a) != learned(b) for a, b in zip(one, other))
    assert any(learned(b) != learned(b, "eft") for b in one), "a seed each"


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 5])
def test_a_position_is_restored_exactly(taken):
    def dataset():
        return batches_of(5, epochs=2, replay=dict(ift=3, eft=3))

    whole = list(iterator(dataset()))
    assert len(whole) == 5
    first = iterator(dataset())
    head = [next(first) for _ in range(taken)]
    state = json.loads(json.dumps(first.get_state()))
    rest = list(iterator(dataset(), state))
    assert len(rest) == 5 - taken
    same(head + rest, whole)
    same(list(first), rest)


def test_a_pair_that_lacks_a_value_is_refused_before_the_first_batch():
    pairs = make_pairs(make_encoder())
    pairs[6] = dataclasses.replace(pairs[6], cached={})
    with pytest.raises(InputError, match="^pairs.jsonl:7: cached: preference_logps has no values, 2 are needed$"):
        batches_of(cached=("preference_logps",), pairs=pairs)
    batches_of(pairs=pairs)


# --- supervised rows --------------------------------------------------------------------------------------------------


def test_supervised_batches():
    rows = [Marked((1, 2, 3), (False, True, True)), Marked((4,), (True,))]
    pad_id = make_encoder().chat.pad_id
    dataset = supervised(6, rows=rows, sizes=dict(ift=2))
    assert len(dataset) == 6
    for i in range(6):
        batch = dataset[i]
        assert sorted(ids for _, ids in rows_of(batch)[0]) == [(1, 2, 3), (4,)], "each row once a pass"
        assert batch.rows.targets[batch.rows.learned["ift"]].tolist() == [2, 3]
        assert (batch.rows.ids[0][batch.rows.segments[0] == 0] == pad_id).all()
    with pytest.raises(ValueError):
        supervised(6, rows=rows, tokens=2)[0]


def test_supervised_training():
    batches = list(iterator(supervised(4)))
    assert len(batches) == 4 and all(b.pairs is None and list(b.rows.learned) == ["ift"] for b in batches)
    assert all(b.rows.ids[0].shape == (3, 4) for b in batches)
    whole = [last for b in supervised(7) for last in learned(b)]
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7)) and whole[:7] != whole[7:14]
    both = supervised(2, sizes=dict(ift=3, eft=2))[1]
    assert [ids.shape for ids in both.rows.ids] == [(3, 4), (2, 4)] and set(both.rows.learned) == {"ift", "eft"}
    same(both.rows.ids[0], supervised(2)[1].rows.ids[0])


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    "way",
    [Way("bins", 2**20), Way("bins", 120), Way("bins", 2**20, "always"), Way("bins", 90, "always"), Way("lengths")],
    ids=str,
)
@pytest.mark.parametrize("orders", [2, 1])
def test_packed_batches_hold_the_rows_of_unpacked_ones(way, micro, orders):
    parts = dict(epochs=2, replay=dict(ift=4, eft=4), layouts=("continuation", "standalone"), cached=("start_logps",))
    parts["orders"] = orders
    unpacked = batches_of(8, devices=2, micro=micro, **parts)
    packed = batches_of(8, devices=2, micro=micro, way=way, **parts)
    assert len(packed) == len(unpacked) == 3
    for a, b in zip(iterator(packed), iterator(unpacked), strict=True):
        rows, others = ([ids for cell in rows_of(batch, 2, micro) for _, ids in cell] for batch in (a, b))
        assert sorted(rows) == sorted(others) and sorted(index(a)) == sorted(index(b))
        assert a.rows.ids[0].size < sum(ids.size for ids in b.rows.ids)
        assert ((a.rows.segments[0] >= BRANCH).any(), (b.rows.segments[0] >= BRANCH).any()) == (
            way.share == "always",
            False,
        )
        for batch in (a, b):
            found = rows_of(batch, 2, micro)
            encoder = make_encoder(*parts["layouts"])
            for number, (answers, verdicts) in zip(index(batch), read_of(batch, 2, micro), strict=True):
                pair = make_pairs(encoder)[number]
                for side in range(2) if number >= 0 else ():
                    cell, places, tokens = answers[side]
                    assert tokens == pair.answers[side].ids
                    sides = [0, 1] if orders == 2 else [number % 2]
                    for judge, at in zip(encoder.judges, verdicts, strict=True) if side in sides else ():
                        cell, place = at[sides.index(side)]
                        (ids,) = [ids for where, ids in found[cell] if where[-1] == place]
                        assert ids == encoder.judge_rows(judge, pair)[side].ids


@pytest.mark.parametrize("layouts", [("standalone",), ("continuation",), ("continuation", "standalone")])
@pytest.mark.parametrize("way", [Way(), Way("bins", 2**20), Way("bins", 2**20, "always")], ids=str)
@pytest.mark.parametrize("orders", [2, 1])
def test_the_tokens_of_each_part(layouts, way, orders):
    """They are those that the arrays hold, and the policy's are those of prompts and answers, however rows lie."""
    encoder = make_encoder(*layouts)
    pairs = make_pairs(encoder)
    for judged in (True, False):
        parts = dict(layouts=layouts, way=way, replay=dict(ift=3), judged=judged, cached=("start_logps",))
        stage = stage_of(5, orders=orders, **parts)
        for number, batch in enumerate(stage.dataset):
            tokens = stage.tokens(number)
            assert sum(tokens.values()) == sum(int((segments > 0).sum()) for segments in batch.rows.segments)
            numbers = [i for i in index(batch) if i >= 0]
            mine = [pairs[i] for i in numbers]
            shown = 1 if way.share == "always" else 2
            policy = sum(shown * len(pair.prompt.ids) + sum(pair.lengths) for pair in mine)
            assert tokens["policy"] == policy and tokens["ift"] == 9
            assert (tokens["judge"] > 0) == judged
            if way.share == "never" and judged:
                asked = 0
                for i, pair in zip(numbers, mine):
                    for side in range(2) if orders == 2 else [i % 2]:
                        asked += sum(len(encoder.judge_rows(judge, pair)[side].ids) for judge in encoder.judges)
                        # The first template's rows hold the answers where it continues the conversation.
                        asked -= (layouts[0] == "continuation") * len(encoder.answer_rows(pair)[side].ids)
                assert tokens["judge"] == asked
    stage = supervised_stage(2)
    assert [stage.tokens(number) for number in range(2)] == [{"ift": 9}] * 2


def test_a_row_that_is_longer_than_a_bin_is_named():
    parts = dict(replay=dict(ift=3), cached=("start_logps",))
    with pytest.raises(
        InputError, match=r"^pairs.jsonl:\d+: has a row of \d+ tokens, .* text.bin_tokens 20; set it to"
    ):
        batches_of(way=Way("bins", 20), **parts)


def test_rows_share_their_beginning_where_that_is_shorter():
    parts = dict(layouts=("standalone",), cached=("start_logps",))
    batches = {
        share: batches_of(12, way=Way("bins", 2**20, share), **parts)[0] for share in ("never", "auto", "always")
    }
    tokens = {share: int((batch.rows.segments[0] > 0).sum()) for share, batch in batches.items()}
    encoder = make_encoder("standalone")
    saved = 0
    for pair in make_pairs(encoder):
        others = dataclasses.replace(pair, a=encoder.answer("a"), b=encoder.answer("b"))
        one, other = (row.ids for row in encoder.judge_rows(encoder.judges[0], others))
        before = next(i for i in range(len(one)) if one[i] != other[i])
        assert before > len(pair.prompt.quote), "the question and the prompt"
        saved += len(pair.prompt.ids) + before
    assert tokens["never"] - tokens["always"] == saved > 0 and tokens["auto"] == tokens["always"]
    same(batches["auto"].rows, batches["always"].rows)
    # Answers that are the longest part by far leave nothing to be saved.
    parts["pairs"] = [
        dataclasses.replace(pair, a=encoder.sampled([7] * 400), b=encoder.sampled([8] * 390))
        for pair in make_pairs(encoder, 2)
    ]
    parts["judged"] = False
    batch = batches_of(2, way=Way("bins", 2**20, "auto"), **parts)[0]
    assert not (batch.rows.segments[0] >= BRANCH).any()
