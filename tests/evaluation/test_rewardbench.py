"""RewardBench's scores on small files, against values that are counted by hand."""

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from scir_jax.data.records import read_choices
from scir_jax.errors import InputError
from scir_jax.evaluation import rewardbench
from scir_jax.evaluation.rewardbench import Scored
from scir_jax.run import benchmark

FILES = Path(__file__).parent / "files"


def scored(name):
    rows = read_choices(FILES / name)
    return [Scored(c.row["subset"], np.array(c.row["rewards"]), len(c.right), str(c.row["id"])) for c in rows]


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-12), name


def test_version_1_by_hand():
    third, half = Fraction(1, 3), Fraction(1, 2)
    subsets = {
        "alpacaeval-easy": 2 * third,  # a tie is lost
        "mt-bench-med": 0,
        "mt-bench-hard": 1,
        "llmbar-adver-GPTInst": half,
        "math-prm": 2 * third,
        "hep-go": 1,
        "shp": half,
        "anthropic_hhh": 1,
        "anthropic_harmless": 0,  # in no section
    }
    sections = {
        "chat": 2 * third * 100 / 140,
        "chat hard": (37 + half * 92) / (37 + 92),
        "reasoning": (2 * third * 984 + 164) / (984 + 164),
        "prior sets": (half + 1) / 2,
    }
    overall = (
        2 * sections["chat"] + 2 * sections["chat hard"] + 2 * sections["reasoning"] + sections["prior sets"]
    ) / 7
    found = rewardbench.scores(scored("rewardbench_1.jsonl"), version=1)
    check(found["subsets"], subsets)
    check(found["sections"], sections)
    check({"overall": found["overall"]}, {"overall": overall})


def test_version_2_by_hand():
    # ties 0: s .5, m_tied 1, m_ref 1; 1: s 2, m_tied .5, m_ref -.5; 2: s 0, m_tied 1, m_ref 2; 3: s 0, m_tied 0, m_ref 0;
    # tied:9 has no ref and counts for the accuracy alone, which it fails.
    tanh = (math.tanh(1 / 0.5 - 1) + math.tanh(-0.5 / 2 - 1) + 1 + 0) / 4
    ties = 0.3 * 3 / 5 + 0.3 * 2 / 4 + 0.2 * 2 / 4 + 0.2 * 2 / 4 + 0.01 * tanh
    quarter = Fraction(1, 4)
    subsets = {
        "Factuality": (1 + 2 * quarter + quarter) / 4,
        "Precise IF": Fraction(1, 2),
        "Math": Fraction(1, 2),
        "Safety": 0,
        "Focus": 1,
        "Ties": ties,
    }
    found = rewardbench.scores(scored("rewardbench_2.jsonl"), version=2)
    check(found["subsets"], subsets)
    assert found["overall"] == pytest.approx(float(sum(map(float, subsets.values())) / 6), abs=1e-12)
    assert "sections" not in found


def test_subsets_that_are_not_the_benchmark_s_have_no_overall_score():
    for version in (1, 2):
        found = rewardbench.scores([Scored("mine", np.array([1.0, 0.0]), 1)], version=version)
        assert found["subsets"] == {"mine": 1.0} and "overall" not in found


def test_rewards_of_answers_are_mean_logits_against_the_others():
    n = 5
    logits = np.random.default_rng(0).normal(size=n * (n - 1) // 2)
    matrix = np.zeros((n, n))
    for logit, (i, j) in zip(logits, combinations(range(n), 2)):
        matrix[i, j], matrix[j, i] = logit, -logit
    np.testing.assert_allclose(rewardbench.pairwise_rewards(logits, n), matrix.sum(axis=1) / (n - 1), atol=1e-12)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"chosen": "a", "rejected": "b"}], ["rows.jsonl:1", "'subset'"]),
        ([{"chosen": ["a"], "rejected": "b", "subset": "Math"}], ["rows.jsonl:1", "rejected", "list"]),
        ([{"chosen": ["a", 1], "rejected": ["b"], "subset": "Math"}], ["rows.jsonl:1", "chosen", "list"]),
        ([{"chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "7"}], ["rows.jsonl:1", "ref:N"]),
        ([{"chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "tied:1"}], ["two right"]),
        ([{"chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "ref:1"}] * 2, ["rows.jsonl:2", "twice"]),
        ([{"chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "ref:1"}], ["rows.jsonl", "tied:N"]),
        (
            [{"chosen": "a", "rejected": "b", "subset": "x"}, {"chosen": ["a"], "rejected": ["b"], "subset": "x"}],
            ["rows.jsonl:2", "both versions"],
        ),
    ],
)
def test_rows_that_are_not_the_benchmark_s(rows, words, tmp_path, world_dir, tiny_config):
    from scir_jax.data.tally import Tally
    from scir_jax.run.setup import open_model

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "add 1 2", **row}) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        choices = read_choices(file)
        benchmark.version(choices)
        benchmark.questions(open_model(tiny_config(world_dir))[1], choices, Tally(str(file)))
    assert all(word in str(error.value) for word in words)
