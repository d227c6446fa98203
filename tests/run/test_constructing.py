"""The stage that constructs pairs of known order, and the rows that they become."""

from types import SimpleNamespace

import numpy as np
import pytest

from scir_jax.errors import InputError
from scir_jax.run import constructing
from scir_jax.run.answers import Source
from scir_jax.run.costs import Account
from tests.run.runs import lines

PROMPTS = ("copy abcd=", "copy abce=", "upper ghij=", "reverse hgj=")
ANSWERS = (("abcd!", "abc"), ("abce!", "ab"), ("GHIJ!", "GHI"), ("jgh!", "j"))


@pytest.fixture
def made(make):
    """made(kinds, answers) -> (setup, source) of two answers to each of four prompts."""

    def of(kinds=("similar", "cut"), answers=ANSWERS, **judge):
        setup = make(judge=dict(constructed_batch_size=4, constructions=kinds, **judge))
        encoder = setup.encoder
        prompts = [encoder.prompt([{"role": "user", "content": text}], text) for text in PROMPTS]
        items = [(prompt, encoder.answer(text)) for prompt, two in zip(prompts, answers) for text in two]
        return setup, Source(items)

    return of


def write(setup, source, path, iteration=1, params=None):
    models, stopper = SimpleNamespace(load=lambda number: params), SimpleNamespace(check=lambda title: None)
    encoder, programs = setup.encoder, setup.programs
    needs = (setup.inputs.config, encoder, programs, models, iteration, source, path, stopper)
    constructing.construct_pairs(*needs, Account())
    return lines(path)


def test_what_is_compared(made, tmp_path):
    setup, source = made()
    rows = write(setup, source, tmp_path / "a.jsonl")
    given = dict(zip(PROMPTS, ANSWERS))
    assert [row["pair"] for row in rows] == list(range(len(rows)))
    near = {PROMPTS[0]: PROMPTS[1], PROMPTS[1]: PROMPTS[0]}
    for row in rows:
        assert row["label"] == 1 and row["response_a"] in given[row["prompt"]]
        if row["construction"] == "similar":
            others = [given[p] for p in PROMPTS if p != row["prompt"]]
            assert any(row["response_b"] in two for two in others)
            if row["prompt"] in near:
                assert row["response_b"] in given[near[row["prompt"]]]
        else:
            # "abcd!" is cut to "ab", "abc" to "a"; of one letter nothing would be left.
            assert row["response_b"] == row["response_a"][: len(row["response_a"]) // 2] != ""
            assert row["response_b_ids"][-1] not in setup.encoder.chat.stop_ids
    kinds = [row["construction"] for row in rows]
    assert kinds.count("similar") == 4 and 3 <= kinds.count("cut") <= 4
    # Seed and iteration decide, and nothing else.
    assert write(setup, source, tmp_path / "again.jsonl") == rows
    assert write(setup, source, tmp_path / "b.jsonl", iteration=2) != rows


def test_rows_are_judge_questions_in_both_orders(made, tmp_path):
    setup, source = made(("other", "similar", "cut"))
    encoder, path = setup.encoder, tmp_path / "a.jsonl"
    pairs = write(setup, source, path)
    rows = constructing.constructed_rows(encoder, path)
    (judge,) = encoder.judges
    first, second = judge.verdict_ids
    assert len(rows) == 2 * len(pairs)
    for pair, shown, swapped in zip(pairs, rows[::2], rows[1::2]):
        assert shown.ids[-1] == first and swapped.ids[-1] == second
        assert sum(shown.marks) == sum(swapped.marks) == judge.answer_tokens
        text = encoder.chat.tokenizer.decode(list(shown.ids))
        plain = "".join(text.split())
        assert pair["response_a"] in plain and pair["response_b"] in plain
    # The step's rows hold the longest that there may be.
    (group,) = [group for name, group in setup.programs.optimise_spec.targets if name == "constructed"]
    assert group.rows == 4 and group.tokens >= max(len(row.ids) for row in rows)
    assert group.scored >= max(np.sum(row.marks) for row in rows)


def test_without_constructed_pairs_a_step_has_no_rows_for_them(make):
    for weight in (0.3, 0.0):
        programs = make(replay=dict(weight=weight)).programs
        assert [name for name, _ in programs.optimise_spec.targets] == (["eft"] if weight else [])
    alone = make(replay=dict(weight=0.0), judge=dict(constructed_batch_size=4)).programs
    assert [name for name, _ in alone.optimise_spec.targets] == ["constructed"]


def test_answers_that_are_all_alike_are_refused(made, tmp_path):
    setup, source = made(answers=(("a", "a"),) * 4)
    with pytest.raises(InputError, match="iteration 1: no pair can be constructed.*judge.constructions"):
        write(setup, source, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_halves(make):
    encoder = make().encoder
    assert constructing.first_half(encoder, encoder.answer("jg!")).text == "j"
    assert constructing.first_half(encoder, encoder.answer("j")).quote == ()


def test_changed_prompts(make):
    encoder, rng = make().encoder, np.random.default_rng(0)
    one, other = (encoder.prompt([{"role": "user", "content": text}]) for text in ("copy abcd=", "upper ghij="))

    def changed(kind, prompt=one):
        found = constructing.changed_prompt(encoder, prompt, other, kind, rng)
        return found and found.messages[-1]["content"]

    assert changed("truncated") == "copy"
    letters = encoder.prompt([{"role": "user", "content": "abcdef"}])
    assert changed("truncated", letters) == "abc"
    assert changed("truncated", encoder.prompt([{"role": "user", "content": "a"}])) is None
    found = {changed("perturbed") for _ in range(40)}
    assert found == {"upper abcd=", "copy ghij="}
    assert constructing.changed_prompt(encoder, one, one, "perturbed", rng) is None
    # What comes before the last message stays.
    talk = [{"role": "user", "content": "copy b="}, {"role": "assistant", "content": "b"}, *one.messages]
    found = constructing.changed_prompt(encoder, encoder.prompt(talk), other, "truncated", rng)
    assert found.messages == [*talk[:2], {"role": "user", "content": "copy"}]


def test_answers_to_changed_prompts_are_sampled(made, tmp_path):
    """By the model that the iteration starts from; the answer and not the changed prompt stands in the pair."""
    setup, source = made(("perturbed", "truncated"))
    params = setup.parameters.configured()
    rows = write(setup, source, tmp_path / "a.jsonl", params=params)
    given = dict(zip(PROMPTS, ANSWERS))
    assert {row["construction"] for row in rows} == {"perturbed", "truncated"} and 4 <= len(rows) <= 8
    for row in rows:
        assert row["response_a"] in given[row["prompt"]] and row["response_b"] != row["response_a"]
        assert 0 < len(row["response_b_ids"]) <= 12
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert write(setup, source, tmp_path / "b.jsonl", params=params) == rows


@pytest.mark.parametrize(("kinds", "samples"), [(("other", "cut"), False), (("cut", "truncated"), True)])
def test_the_sampler_is_planned_for_answers_to_changed_prompts(make, kinds, samples):
    judge = dict(constructed_batch_size=4, constructions=kinds)
    programs = make(data=dict(heldout_prompts=None), sample=dict(command="another engine"), judge=judge).programs
    assert any(program.stage == "prefill" for program in programs.all()) == samples
