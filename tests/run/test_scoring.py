"""Rows are scored and judged at the shortest compiled length that holds them; what is found does not depend on it."""

import numpy as np
import pytest

from scir_jax.data import batches, reading
from scir_jax.data.batches import by_length, row_lengths
from scir_jax.data.pairs import Pair
from scir_jax.data.reading import ReadSpec, together
from scir_jax.engine import descriptions
from scir_jax.run import pairing, scoring
from scir_jax.run.setup import prepare
from tests.training import heldout_items

pytestmark = pytest.mark.usefixtures("cheap_compilation")


def test_lengths_end_with_the_longest():
    assert row_lengths([96]) == [(96,)]
    assert row_lengths([1024]) == [(128,), (160,), (232,), (384,), (512,), (1024,)]
    assert row_lengths([256, 1100]) == [
        (128, 128), (128, 168), (128, 248), (128, 384), (128, 640), (256, 1100)
    ]  # fmt: skip


def test_a_row_has_the_first_length_that_holds_all_of_it():
    found = by_length([(5, 9), (8, 8), (4, 8), (16, 1)], [(4, 8), (8, 8), (16, 16)])
    assert [numbers.tolist() for numbers in found] == [[2], [1], [0, 3]]
    assert [numbers.tolist() for numbers in by_length([], [(4,), (8,)])] == [[], []]
    with pytest.raises(ValueError, match=r"\[9\] tokens"):
        by_length([(8,), (9,)], [(4,), (8,)])


def both(world_dir):
    return (f"{world_dir}/judge.yaml", f"{world_dir}/judge_continuation.yaml")


def test_results_do_not_depend_on_lengths_or_company(world_dir, tiny_config, monkeypatch):
    config = tiny_config(world_dir, generative=dict(templates=both(world_dir)), evaluate=dict(batch_size=4))
    found = {}
    for shortest in (batches.SHORTEST, 8):
        monkeypatch.setattr(batches, "SHORTEST", shortest)
        setup = prepare(config)
        params, items, pairs = setup.parameters.configured(), heldout_items(setup), setup.inputs.heldout_pairs
        seen = []
        scores = scoring.score_answers(setup.encoder, setup.programs, params, items, seen.append)["logps"]
        judged = scoring.judge_pairs(setup.encoder, setup.programs, params, pairs, seen.append)
        assert sum(seen) == len(items) + len(pairs)
        found[shortest] = scores, *judged
    assert len(setup.programs.score_specs) > 2 and len(setup.programs.judge_specs) > 3
    for many, one in zip(*found.values(), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    # Another order and other neighbours change no bit.
    order = np.random.default_rng(0).permutation(len(items))[:7]
    again = scoring.score_answers(setup.encoder, setup.programs, params, [items[i] for i in order])["logps"]
    np.testing.assert_array_equal(again, scores[order])
    judged_again = scoring.judge_pairs(setup.encoder, setup.programs, params, pairs[:1:-1])
    np.testing.assert_array_equal(judged_again.verdicts, judged.verdicts[:1:-1])


def test_rows_in_bins_are_read_as_those_that_lie_alone(world_dir, tiny_config, monkeypatch):
    """Whatever else lies in a bin or behind the same prompt. What rows begin with in common costs once."""
    found, counted, filled = {}, {}, {}
    monkeypatch.setattr(descriptions, "LONG_BIN", 300)
    monkeypatch.setattr(descriptions, "SHORT_ROW", 8)
    for name, packing, share in (("alone", "off", "auto"), ("bins", "bins", "never"), ("shared", "bins", "always")):
        # The entropy is read too, which is a mean and no sum.
        models = dict(models=("generative", "entropy"))
        text, generative = dict(packing=packing, share_prompts=share), dict(templates=both(world_dir))
        size = dict(evaluate=dict(batch_size=16))
        setup = prepare(tiny_config(world_dir, text=text, rewards=models, generative=generative, **size))
        programs, pairs = setup.programs, setup.inputs.heldout_pairs
        # Three answers to some prompts, one answer twice, and one that is alone; pairs of the same prompts.
        pairs = [*pairs, *(Pair(pairs[i].prompt, pairs[i + 1].a, pairs[i].b, None) for i in range(6))]
        items = [(pair.prompt, answer) for pair in pairs for answer in pair.answers]
        order = np.random.default_rng(1).permutation(len(items))[:-1]
        items, calls, spent, seen = [items[i] for i in order], [], [], []
        for kind in ("scorer", "judge"):
            function = getattr(programs, kind)
            record = lambda *given, function=function: (calls.append(given[1]), function(*given))[1]
            monkeypatch.setattr(programs, kind, record)
        params, encoder = setup.parameters.configured(), setup.encoder
        scores = scoring.score_answers(encoder, programs, params, items, seen.append, spent.append)
        assert set(scores) == {"logps", "entropy"} and sum(seen) == len(items)
        judged = scoring.judge_pairs(encoder, programs, params, pairs, seen.append, spend=spent.append)
        assert sum(seen) == len(items) + len(pairs)
        found[name], counted[name] = (*scores.values(), *judged), spent
        places = sum(rows.ids[0].size for rows in calls)
        tokens = sum(int((rows.segments[0] > 0).sum()) for rows in calls)
        filled[name] = tokens / places
        assert tokens == spent[0].scored + spent[1].judged, "what lies in the bins of all calls is what is counted"
        assert len({rows.ids[0].shape for rows in calls}) <= 4, "compiled shapes"
    for name in ("bins", "shared"):
        for values, alone in zip(found[name], found["alone"], strict=True):
            np.testing.assert_allclose(values, alone, rtol=1e-5, atol=1e-5, err_msg=name)
    for i, unit in enumerate(("scored", "judged")):
        alone, bins, shared = (counted[name][i] for name in ("alone", "bins", "shared"))
        assert alone == bins and getattr(shared, unit) < 0.9 * getattr(alone, unit) and shared.flops < alone.flops
    assert filled["alone"] < 0.8 < filled["shared"] and filled["bins"] > 0.8, filled


def test_bins_of_many_short_rows():
    """Neither tokens nor readings are more than there is room for, and each row is in one bin."""
    rng = np.random.default_rng(0)
    specs = [ReadSpec(number, 256, 256, 4) for number in (2, 8)]
    for _ in range(20):
        keys, start = rng.integers(0, 9, 60).tolist(), rng.integers(1, 20, 9).tolist()
        rows = [(key, start[key], start[key] + int(rng.integers(1, 90))) for key in keys]
        for share in (False, True):
            found = together(0, rows, specs[-1], share=share)
            assert [one.tokens for one in found if len(one.rows) == 1] == [
                rows[one.rows[0]][2] for one in found if len(one.rows) == 1
            ]
            made = list(reading.calls(specs, found, segmented=True))
            numbers = [number for _, bins in made for bin in bins for one in bin for number in one.rows]
            assert sorted(numbers) == list(range(60)) and any(len(one.rows) > 1 for one in found) == share
            for spec, bins in made:
                assert len(bins) <= spec.bins
                for bin in bins:
                    assert sum(one.tokens for one in bin) <= 256 and sum(len(one.rows) for one in bin) <= 4
                    for one in bin:
                        assert len({rows[number][0] for number in one.rows}) == 1
            # Small calls take what would leave a large one half empty.
            total = sum(len(bins) for _, bins in made)
            assert sum(spec.bins for spec, _ in made) - total < 2


def test_answers_in_no_pair_are_not_scored(world_dir, tiny_config, monkeypatch):
    setup = prepare(tiny_config(world_dir, pairs=dict(kind="random")))
    items = heldout_items(setup)
    asked = []

    def score_answers(encoder, programs, params, items, advance, spend):
        asked.append(items)
        return {"logps": np.arange(len(items), dtype=np.float32)}

    monkeypatch.setattr(scoring, "score_answers", score_answers)
    choices = [pairing.Choice(4, 1, None), pairing.Choice(1, 6, None)]
    models = type("Models", (), {"load": lambda self, number: None})()
    stopper = type("Stopper", (), {"check": lambda self, title: None})()
    judged = scoring.Judged(np.zeros((2, 1, 2, 2), np.float32), np.zeros((2, 1, 2), np.float32))
    monkeypatch.setattr(scoring, "judge_pairs", lambda *_, **__: judged)
    scored = pairing.score_candidates(
        setup.programs.config, setup.encoder, setup.programs, models, 1, items, choices, stopper
    )
    assert asked and all(found == [items[1], items[4], items[6]] for found in asked)
    start = scored.by_role["start"]["logps"]
    assert start[[1, 4, 6]].tolist() == [0, 1, 2] and np.isnan(np.delete(start, [1, 4, 6])).all()
