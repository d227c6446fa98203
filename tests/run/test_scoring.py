"""Rows are scored and judged at the shortest compiled length that holds them; what is found does not depend on it."""

import numpy as np
import pytest

from scir_jax.data import batches
from scir_jax.data.batches import by_length, row_lengths
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


def test_results_do_not_depend_on_lengths_or_company(world_dir, tiny_config, monkeypatch):
    templates = (f"{world_dir}/judge.yaml", f"{world_dir}/judge_continuation.yaml")
    config = tiny_config(world_dir, generative=dict(templates=templates), evaluate=dict(batch_size=4))
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
    assert len(setup.programs.score_specs) > 2 and len(setup.programs.judge_groups) > 3
    for many, one in zip(*found.values(), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    # Another order and other neighbours change no bit.
    order = np.random.default_rng(0).permutation(len(items))[:7]
    again = scoring.score_answers(setup.encoder, setup.programs, params, [items[i] for i in order])["logps"]
    np.testing.assert_array_equal(again, scores[order])
    judged_again = scoring.judge_pairs(setup.encoder, setup.programs, params, pairs[:1:-1])
    np.testing.assert_array_equal(judged_again.verdicts, judged.verdicts[:1:-1])


def test_answers_share_their_prompts_computation(world_dir, tiny_config):
    """Each answer's values are those that it has alone, whatever else lies behind its prompt; the prompt counts once."""
    sizes = dict(evaluate=dict(batch_size=8), sample=dict(responses=3), pairs=dict(kind="all"))
    found, counted = {}, {}
    for share in ("never", "always"):
        # Entropy is read too, which is a mean and no sum.
        text = dict(packing="bins", share_prompts=share)
        setup = prepare(tiny_config(world_dir, text=text, rewards=dict(models=("generative", "entropy")), **sizes))
        pairs = setup.inputs.heldout_pairs
        items = heldout_items(setup)
        # A third and a fourth answer to some prompts, the same answer once more, and one that is alone.
        more = [(pairs[i].prompt, pairs[i + 1].answers[0]) for i in range(0, 6)] + [items[0], items[1]]
        order = np.random.default_rng(1).permutation(len(items) + len(more))
        items = [[*items, *more][i] for i in order[:-1]]
        spent = []
        together = setup.programs.scored_together
        found[share] = scoring.score_answers(
            setup.encoder, setup.programs, setup.parameters.configured(), items, spend=spent.append
        )
        bins = scoring.by_prompt(items, together)
        assert sorted(number for one in bins for number in one) == list(range(len(items)))
        assert {items[i][0].ids for one in bins for i in one[:1]} == {prompt.ids for prompt, _ in items}
        assert max(map(len, bins)) == together == {"never": 1, "always": 3}[share]
        tokens = [len(items[one[0]][0].ids) + sum(len(items[i][1].ids) for i in one) for one in bins]
        assert [count.scored for count in spent] == [sum(tokens)]
        counted[share] = spent[0]
    assert set(found["never"]) == set(found["always"]) == {"logps", "entropy"}
    for name, alone in found["never"].items():
        np.testing.assert_allclose(found["always"][name], alone, rtol=1e-5, atol=1e-5, err_msg=name)
    assert counted["always"].scored < counted["never"].scored and counted["always"].flops < counted["never"].flops


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
