"""Answers and annotations in the formats of other evaluations."""

import json
import math

import numpy as np
import pytest

from scir_jax.config.schema import ColumnsConfig
from scir_jax.errors import InputError
from scir_jax.evaluation import outputs

COLUMNS = ColumnsConfig()
QUESTIONS = [{"question_id": 81, "turns": ["q1", "q2"]}, {"question_id": 82, "turns": ["q3"]}]


@pytest.fixture
def write(tmp_path):
    def to(name, rows):
        path = tmp_path / name
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to


def test_three_kinds_of_answers(write):
    alpaca = write("a.json", [{"instruction": "add", "output": "3", "generator": "m", "dataset": "d"}])
    (one,) = outputs.read_outputs(alpaca, COLUMNS)
    assert (one.key, one.text, one.generator, one.dataset) == ("add", "3", "m", "d")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (two,) = outputs.read_outputs(write("b.jsonl", [{"prompt": "text", "messages": turns, "response": "d"}]), COLUMNS)
    assert two.messages == turns and two.text == "d" and two.generator == ""
    answers = [
        {"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["a1", "a2"]}]},
        {"question_id": 82, "model_id": "m", "choices": [{"index": 0, "turns": ["a3"]}]},
    ]
    found = outputs.read_outputs(write("c.jsonl", answers), COLUMNS, write("q.jsonl", QUESTIONS))
    assert [(o.key, o.messages[0]["content"], o.text) for o in found] == [
        ("81, turn 1", "q1", "a1"),
        ("81, turn 2", "q1", "a1\n\nuser: q2\n\nassistant: a2"),
        ("82, turn 1", "q3", "a3"),
    ]


def test_answers_are_matched_by_question_and_occurrence(write):
    def rows(*pairs):
        return [{"instruction": q, "output": a, "generator": "g"} for q, a in pairs]

    base = outputs.read_outputs(write("a.json", rows(("p", "1"), ("q", "2"), ("p", "3"))), COLUMNS)
    model = outputs.read_outputs(write("b.json", rows(("q", "x"), ("p", "y"), ("p", "z"))), COLUMNS)
    found = outputs.match(base, model, ("a", "b"))
    assert [(pair.baseline.text, pair.model.text) for pair in found] == [("1", "y"), ("2", "x"), ("3", "z")]
    with pytest.raises(InputError, match=r"a\.json:row 3: b has no answer"):
        outputs.match(base, model[:2], ("a", "b"))
    with pytest.raises(InputError, match=r"b\.json:row 1: a has no answer"):
        outputs.match(base[:1], model[:2], ("a", "b"))


def test_annotations_are_written_as_they_are_read(write):
    rows = [
        {"instruction": f"q{i}", "output_1": "a", "generator_1": "base", "dataset": "d", "output_2": "b",
         "generator_2": "m", "annotator": "judge", "preference": p}
        for i, p in enumerate([1, 2, 1.25, None])
    ]  # fmt: skip
    found = outputs.read_annotations(write("a.json", rows))
    np.testing.assert_array_equal([pair.preference for pair in found], [0, 1, 0.25, math.nan])
    assert outputs.annotation_rows(found, "judge") == rows
    assert outputs.read_annotations(write("b.json", [{**rows[0], "preference": 0}]))[0].preference == 0.5


@pytest.mark.parametrize(
    "name, rows, words",
    [
        ("a.jsonl", [{"prompt": "x"}], ["a.jsonl:1", "lacks the answer"]),
        ("a.jsonl", [{"instruction": "x", "response": "y"}], ["a.jsonl:1", "'output'"]),
        ("a.jsonl", [{"response": "y"}], ["a.jsonl:1", "lacks the key 'prompt'"]),
        ("a.jsonl", [{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}], ["a.jsonl:1", "--questions"]),
    ],
)
def test_rows_that_are_no_answers(write, name, rows, words):
    with pytest.raises(InputError) as error:
        outputs.read_outputs(write(name, rows), COLUMNS)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question_id": 9, "choices": []}, "no question_id 9"),
        ({"question_id": 81, "choices": [{"turns": ["a"]}]}, "2 'turns'"),
        ({"question_id": 81, "choices": "a"}, "2 'turns'"),
    ],
)
def test_answers_to_other_questions(write, row, words):
    with pytest.raises(InputError, match=rf"a\.jsonl:1: .*{words}"):
        outputs.read_outputs(write("a.jsonl", [row]), COLUMNS, write("q.jsonl", QUESTIONS))


@pytest.mark.parametrize("preference", [0.5, 2.5, "1", True])
def test_preferences_out_of_range(write, preference):
    row = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": preference}
    with pytest.raises(InputError, match=r"a\.json:row 1: preference"):
        outputs.read_annotations(write("a.json", [row]))


def test_annotations_of_several_models(write):
    row = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1}
    with pytest.raises(InputError, match=r"a\.json:row 2: .*'n'.*'m'"):
        outputs.read_annotations(write("a.json", [{**row, "generator_2": "m"}, {**row, "generator_2": "n"}]))


@pytest.mark.parametrize(
    "text, words",
    [
        ("index,preference\n0,1\n", "lacks the column 'std_delta_len'"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n", "no rows"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,.5,x,1,False\n", ":2: "),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,.5,1,1,yes\n", ":2: "),
    ],
)
def test_gamed_rows_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "df_gamed.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        outputs.read_gamed(str(path))
