"""Pairs as rows of pairs.jsonl: ids are never made again from text, and a bad row is named."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from scir_jax.config.schema import TextConfig
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import write_rows
from scir_jax.data.pairs import IDS, Pair, answer_row, from_row, to_row
from scir_jax.data.pipelines import Way
from scir_jax.data.reading import ReadSpec
from scir_jax.data.records import Comparison, read_comparisons
from scir_jax.data.steps import PairSpec, TrainSpec
from scir_jax.engine.forward import Judged
from scir_jax.errors import InputError
from scir_jax.run import scoring
from scir_jax.run.answers import sampled_answers
from scir_jax.run.pairing import given_pairs
from scir_jax.text.judge import compile_judge, load_template
from tests.chat_templates import chat, turns
from tests.data.small_data import CHAT, make_encoder, make_pairs, read_of, rows_of, step_of

WHERE = "run/pairs.jsonl:3"
NUMBERS = dict(
    cached={"start_logps": (-1.5, -2.25), "implicit_logps": (-3.0, 0.0)},
    frozen={"generative": (0.5, -0.5, 1.0, 2.0), "implicit": (-0.25,)},
    verdicts=(1.0, -1.0, 0.5, 0.25),
    label=0.75,
    weight=0.5,
    length_penalty=0.125,
)


def written(pair, number=0):
    """The row of a pair as it is read from its file."""
    return json.loads(json.dumps(to_row(pair, number)))


def ids_of(pair):
    """All ids of a pair, and how they are quoted."""
    return [(part.ids, part.quote) for part in (pair.prompt, *pair.answers)]


def known():
    """A pair of which everything is known."""
    (pair,) = make_pairs(make_encoder(), 1, **NUMBERS)
    return pair


# --- one tokenisation -------------------------------------------------------------------------------------------------

ANSWERS = ("Blue, of course!", " Red.\n", "<think>\nWhich?\n</think>\n\nGreen.", "<think>\nNever ends", "")
LAYOUTS = [
    ("standalone",),
    ("continuation",),
    ("continuation", "standalone"),
    ("standalone", "continuation", "standalone"),
]


def thinking_encoder(layouts, *, quote_thinking=False, template="qwen-3", **text):
    """An encoder on a model that thinks, with the package's own judges."""
    made = chat("qwen-2", template)
    judges = [compile_judge(load_template(name), made) for name in layouts]
    limits = TextConfig(**(dict(max_prompt_tokens=64, max_response_tokens=32) | text))
    return Encoder(limits, made, judges, 2048, quote_thinking=quote_thinking)


def comparisons():
    """A conversation of one turn and one of three; every answer is once the first and once the second."""
    prompts = turns("Name a colour."), turns("Hello", "<think>\nHm.\n</think>\n\nHi.", "And a colour?")
    return [
        Comparison(prompts[i % 2], a, b, 1.0, f"eft.jsonl:{i + 1}")
        for i, (a, b) in enumerate(zip(ANSWERS, ANSWERS[1:] + ANSWERS[:1]))
    ]


def same_everywhere(encoder, pairs, tmp_path, monkeypatch):
    """Asserts that judging before training and training itself see the rows of these pairs as they were encoded."""
    path = tmp_path / "pairs.jsonl"
    write_rows(path, (to_row(pair, i) for i, pair in enumerate(pairs)))
    lines = path.read_text(encoding="utf-8").splitlines()
    read = [from_row(json.loads(line), f"{path}:{i + 1}") for i, line in enumerate(lines)]
    assert list(map(ids_of, read)) == list(map(ids_of, pairs))

    lengths = encoder.lengths([pair.prompt for pair in pairs])
    asked = []

    def judge(_, rows, *key):
        assert key in ((), (None,)), "nothing is dropped"
        asked.append(rows)
        shape = (*rows.verdict.shape, len(encoder.judges))
        return Judged(np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32))

    specs = (ReadSpec(2 * len(pairs) * len(encoder.judges), max(lengths.judges), verdicts=1),)
    programs = SimpleNamespace(judge_specs=specs, way=Way(), judge=judge, local_rows=np.arange, mesh=None)
    monkeypatch.setattr(scoring, "put_batch", lambda rows, _: rows)
    scoring.judge_pairs(encoder, programs, None, pairs)
    spec = PairSpec.of(len(pairs), lengths, judged=True, continued=encoder.continued)
    for source in (pairs, read):
        batch = step_of(TrainSpec(spec), list(enumerate(source)), encoder)
        ((*found,),) = rows_of(batch)
        by_place = {int(place): ids for where, ids in found for place in where}
        (questions,) = asked
        for row, (i, number, side) in enumerate(np.ndindex(len(pairs), len(encoder.judges), 2)):
            ids = tuple(questions.ids[0][row, : questions.verdict[row, 0] + 1].tolist())
            assert by_place[read_of(batch)[i][1][number][side][1]] == ids
        for pair in source:
            rows = spec.rows(pair, encoder)
            expected = [encoder.judge_rows(judge, pair) for judge in encoder.judges]
            assert [tuple(both) for both in rows][-len(expected) :] == expected
            assert encoder.continued or tuple(rows[0]) == encoder.answer_rows(pair)
    assert (asked[0].verdict > 0).all()


@pytest.mark.parametrize("quote_thinking", [False, True])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_given_answers_are_judged_before_training_as_in_it(tmp_path, monkeypatch, layouts, quote_thinking):
    """Under a template that writes an empty thinking block before an answer."""
    encoder = thinking_encoder(layouts, quote_thinking=quote_thinking)
    assert "<think>" in encoder.chat.lead
    pairs = [encoder.pair(comparison) for comparison in comparisons()]
    # Read from data.pairs and told apart again as an iteration does, they are the same pairs.
    items, choices, _ = given_pairs(SimpleNamespace(given_pairs=pairs), 1, 1)
    assert [Pair(items[c.a][0], items[c.a][1], items[c.b][1], c.label) for c in choices] == pairs
    same_everywhere(encoder, pairs, tmp_path, monkeypatch)


@pytest.mark.parametrize("layouts", LAYOUTS[:3], ids="-".join)
def test_another_engines_answers_are_encoded_once(tmp_path, monkeypatch, layouts):
    """Its file holds no ids; given answers in a file of pairs have the same ones, and our own file gives them back."""
    encoder = thinking_encoder(layouts)
    path, own = tmp_path / "responses.jsonl", tmp_path / "own.jsonl"
    given = comparisons()
    write_rows(path, ({"messages": c.messages, "prompt": "", "response": text} for c in given for text in (c.a, c.b)))
    vocabulary = len(encoder.chat.tokenizer)
    lengths = encoder.lengths([encoder.prompt(c.messages) for c in given])
    items, choices, _ = sampled_answers(encoder, lengths, vocabulary, path)
    assert choices is None
    pairs = [Pair(a[0], a[1], b[1]) for a, b in zip(items[::2], items[1::2], strict=True)]
    assert list(map(ids_of, pairs)) == [ids_of(encoder.pair(c)) for c in given]
    same_everywhere(encoder, pairs, tmp_path, monkeypatch)
    write_rows(own, (answer_row(*item) for item in items))
    again = sampled_answers(encoder, lengths, vocabulary, own).items
    assert [(p.ids, p.quote, y.ids, y.quote, y.text) for p, y in again] == [
        (p.ids, p.quote, y.ids, y.quote, y.text) for p, y in items
    ]


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("template", ["qwen-3", "qwq", "qwen-2"])
def test_a_thinking_block_is_quoted_only_where_that_is_wanted(template, wanted):
    """Whether the template writes an empty block before an answer, opens one in the prompt, or knows none."""
    encoder = thinking_encoder(("standalone",), quote_thinking=wanted, template=template)
    (judge,) = encoder.judges
    thinking = set(encoder.chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))

    def marks(*parts):
        return sum(i in thinking for ids in parts for i in ids)

    for text, spoken in zip(ANSWERS, ("Blue, of course!", " Red.\n", "Green.", "", ""), strict=True):
        assert encoder.answer(text).quote == encoder.chat.encode_text(text if wanted else spoken)
    sampled = encoder.sampled(encoder.answer(ANSWERS[2]).ids)
    assert marks(sampled.ids) and bool(marks(sampled.quote)) is wanted
    assert wanted or sampled.quote == encoder.chat.encode_text("Green.")
    for comparison in comparisons():
        pair = encoder.pair(comparison)
        quotes = [part.quote for part in (pair.prompt, *pair.answers)]
        assert bool(marks(quotes[0])) is (wanted and len(comparison.messages) > 1)
        assert wanted or not marks(*quotes)
        for source in (pair, from_row(written(pair), WHERE)):
            for row in encoder.judge_rows(judge, source):
                # Beside the quotes, the question has the empty block of the judge's own turn at the most.
                assert marks(row.ids) == marks(*quotes) + marks(*(p for p in judge.parts if not isinstance(p, str)))


def test_a_cut_answer_and_a_cut_prompt_are_written_as_they_were_cut(tmp_path, monkeypatch):
    encoder = thinking_encoder(("continuation", "standalone"), max_prompt_tokens=14, max_response_tokens=6)
    pairs = [encoder.pair(comparison) for comparison in comparisons()]
    assert all(pair.a.cut or pair.b.cut for pair in pairs) and any(pair.prompt.cut for pair in pairs)
    same_everywhere(encoder, pairs, tmp_path, monkeypatch)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_gives_the_pair_back():
    pair = known()
    row = written(pair, 7)
    assert row["pair"] == 7 and row["prompt"] == pair.prompt.messages[0]["content"]
    assert (row["length_a"], row["length_b"]) == pair.lengths
    found = from_row(row, WHERE)
    assert found.prompt.where == WHERE
    assert {field.name for field in dataclasses.fields(Pair)} == {"prompt", "a", "b", *NUMBERS}
    assert all(getattr(found, name) == value == getattr(pair, name) for name, value in NUMBERS.items())
    assert found.prompt == dataclasses.replace(pair.prompt, where=WHERE, tokens=0)
    assert found.answers == tuple(dataclasses.replace(answer, tokens=0) for answer in pair.answers)
    assert written(found, 7) == row, "and the row again"
    (bare,) = make_pairs(make_encoder(), 1, cached={})
    row = written(bare)
    assert not {"label", "verdicts", "frozen_logits"} & row.keys() and row["cached"] == {} and row["weight"] == 1.0
    found = from_row(row, WHERE)
    assert (found.label, found.weight, found.length_penalty) == (None, 1.0, 0.0)
    assert (found.cached, found.frozen, found.verdicts) == ({}, {}, ())


def test_what_a_user_may_leave_out():
    row = written(known())
    for key in row.keys() - {*IDS}:
        assert ids_of(from_row({k: v for k, v in row.items() if k != key}, WHERE)) == ids_of(known())
    for key in ("cached", "frozen_logits", "verdicts", "label"):
        from_row({**row, key: None}, WHERE)


def refused(**changes):
    """The sentence about a row with these values, without its place."""
    row = {key: value for key, value in {**written(known()), **changes}.items() if value != "absent"}
    with pytest.raises(InputError) as error:
        from_row(row, WHERE)
    message = str(error.value)
    assert "\n" not in message and len(message) < 450 and message.startswith(f"{WHERE}: ")
    return message.removeprefix(f"{WHERE}: ")


@pytest.mark.parametrize("key", IDS)
def test_a_row_without_ids_is_refused(key):
    assert refused(**{key: "absent"}).startswith(f"lacks the key '{key}'; has 'pair', 'prompt', ")
    for bad in (None, "1 2", 3, [1.0], [True], ["1"], [-1], [2**31], [None], {"0": 1}, [[1]]):
        assert refused(**{key: bad}) == f"{key}: must be token ids from 0 to 2147483647", bad


NOT_NUMBERS = (None, "1", True, [1.0], {}, float("nan"), float("inf"), 1e39, 10**309)


@pytest.mark.parametrize("key", ["weight", "length_penalty"])
def test_a_bad_number_is_refused(key):
    for bad in (*NOT_NUMBERS, -0.5):
        assert refused(**{key: bad})[:60].startswith(f"{key}: must be a number of at least 0, not {bad!r}"[:60]), bad
    assert getattr(from_row({**written(known()), key: 0}, WHERE), key) == 0


def test_a_bad_label_is_refused():
    for bad in (*NOT_NUMBERS[1:], -0.1, 1.5):
        assert refused(label=bad)[:50] == f"label: must be a number from 0 to 1, not {bad!r}"[:50], bad


@pytest.mark.parametrize("key", ["cached", "frozen_logits"])
def test_bad_lists_of_numbers_are_refused(key):
    for bad in (0, 3, "x", "", [], [1.0], True):
        assert refused(**{key: bad}) == f"{key}: must map names to lists of numbers, not {bad!r}", bad
    numbers = 2 if key == "cached" else "finite"
    for bad in (None, 1.0, "12", {"0": 1}, *([x, 1.0] for x in NOT_NUMBERS)):
        start = f"{key}.start_logps: must be a list of {numbers} numbers, not {bad!r}"
        assert refused(**{key: {"good": [1.0, 2.0], "start_logps": bad}})[:70] == start[:70], bad
    if key == "cached":
        for bad in ([], [1.0], [1.0, 2.0, 3.0]):
            assert refused(cached={"x": bad}) == f"cached.x: must be a list of 2 numbers, not {bad!r}"


def test_bad_verdicts_are_refused():
    for bad in (0, 1.0, "", "12", {}, *([1.0, x] for x in NOT_NUMBERS)):
        assert refused(verdicts=bad)[:60] == f"verdicts: must be a list of finite numbers, not {bad!r}"[:60], bad


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_of_other_columns():
    row = {**written(known()), "teacher": 0.25, "human": None}
    assert from_row(row, WHERE).label == 0.75
    assert from_row(row, WHERE, ("teacher",)).label == 0.25
    assert from_row(row, WHERE, ("human", "teacher", "label")).label == 0.25, "the first that says something"
    assert from_row(row, WHERE, ("human",)).label is None and from_row(row, WHERE, ("nobody",)).label is None
    with pytest.raises(InputError, match=f"^{WHERE}: teacher: must be a number from 0 to 1, not 2$"):
        from_row({**row, "teacher": 2}, WHERE, ("teacher",))
    # What nobody reads may be anything.
    assert from_row({**row, "label": "a"}, WHERE, ("teacher",)).label == 0.25


def test_swapped():
    encoder = make_encoder("standalone", "continuation")
    pair = dataclasses.replace(make_pairs(encoder, 1, cached={})[0], label=0.75, weight=2.0)
    other = pair.swapped()
    assert other.answers == pair.answers[::-1] and other.lengths == pair.lengths[::-1] and other.prompt == pair.prompt
    assert other.label == 0.25 and other.weight == 2.0 and other.swapped() == pair
    assert dataclasses.replace(pair, label=None).swapped().label is None
    assert encoder.answer_rows(other) == encoder.answer_rows(pair)[::-1]
    for judge in encoder.judges:
        assert encoder.judge_rows(judge, other) == encoder.judge_rows(judge, pair)[::-1]


def test_encoded_comparisons_keep_label_and_place(tmp_path):
    encoder = make_encoder()
    rows = [{"prompt": "copy ab=", "response_a": "ab", "response_b": "b", "label": 0.25}, {"prompt": "q" * 99}]
    write_rows(tmp_path / "pairs.jsonl", [rows[0], {**rows[0], "label": None}])
    one, two = map(encoder.pair, read_comparisons(tmp_path / "pairs.jsonl"))
    assert (one.label, two.label) == (0.25, None) and one.prompt.where == f"{tmp_path}/pairs.jsonl:1"
    assert one.a.ids == CHAT.answer("ab") and one.a.text == "ab" and one.a.quote == CHAT.encode_text("ab")
    dropping = make_encoder(long_prompts="drop")
    assert dropping.pair(Comparison(turns("q" * 99), "a", "b", None)) is None
