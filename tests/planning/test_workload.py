"""Plans under stated lengths: what is drawn and read, and what programs compute of it."""

import json

import numpy as np
import pytest

from scir_jax import plan
from scir_jax.errors import InputError
from scir_jax.planning import iteration
from scir_jax.planning.limits import planned
from scir_jax.planning.workload import stated, workload
from scir_jax.run.setup import prepare

LONG = dict(text=dict(max_prompt_tokens=1536, max_response_tokens=1024))


@pytest.fixture(scope="module")
def run(world_dir, tiny_config):
    """A plan of rows long enough to be packed, for the small model made long."""
    config = tiny_config(world_dir, text=dict(max_prompt_tokens=96, max_response_tokens=80, packing="bins"))
    programs = prepare(config).programs
    return planned(config, programs.arch, programs.mesh)


def test_log_normal_lengths_have_the_stated_mean_and_percentile(tiny_config, world_dir):
    found = stated("180:480,300:800", tiny_config(world_dir, **LONG))
    for values, mean, high in ((found.prompts, 180, 480), (found.answers, 300, 800)):
        assert values.mean() == pytest.approx(mean, rel=0.06)
        assert np.percentile(values, 95) == pytest.approx(high, rel=0.06)
    assert found.answers.max() <= 1024 and found.prompts.min() >= 1


def test_lengths_of_a_file_are_its_own(tiny_config, world_dir, tmp_path):
    path = tmp_path / "responses.jsonl"
    rows = [(3, 5), (7, 200), (9, 1)]
    text = "".join(json.dumps({"prompt_ids": [1] * x, "response_ids": [2] * y}) + "\n" for x, y in rows)
    path.write_text(text)
    found = stated(str(path), tiny_config(world_dir, text=dict(max_response_tokens=100)))
    assert found.prompts.tolist() == [3, 7, 9] and found.answers.tolist() == [5, 100, 1], "cut as a run cuts them"
    path.write_text(text + '{"prompt": "x"}\n')
    with pytest.raises(InputError, match=f"^{path}:4: holds no prompt_ids and response_ids"):
        stated(str(path), tiny_config(world_dir))
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        stated(str(path), tiny_config(world_dir))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("180:480", "is no file"),
        ("nothing.jsonl", "is no file"),
        ("180:480,300", "'300' is no MEAN:P95"),
        ("180:480,300:x", "'300:x' is no MEAN:P95"),
        ("180:480,300:3000", "between 1 and 3.9 times the mean"),
        ("180:100,300:800", "in '180:100' the 95th percentile is below the mean"),
    ],
)
def test_bad_lengths_are_refused(tiny_config, world_dir, text, sentence):
    with pytest.raises(InputError, match=sentence):
        stated(text, tiny_config(world_dir))


def test_shorter_rows_ask_for_less(run):
    config = run.config
    short, long = (workload(run, stated(text, config)) for text in ("20:40,15:30", "60:96,50:80"))
    for kind in ("prefill", "score", "judge"):
        assert 0 < short.shares[kind] <= long.shares[kind] <= 1
    assert short.shape.tokens < long.shape.tokens < run._bound(run.optimise_spec).tokens
    assert short.real > 0.75 and long.real > 0.75
    assert short.seen < long.seen and short.answer == pytest.approx(15, rel=0.1)
    calls = [dict((kind, n) for _, kind, n in iteration.calls(run, 100, load)) for load in (None, short, long)]
    whole, few, more = (found["decode"] for found in calls)
    assert few < more < whole
    # Answers of 15 tokens in all slots, a look every 32: hardly more than the tokens ask for.
    tokens = 100 * config.sample.responses * short.answer
    assert few == pytest.approx(tokens / (run.slot_spec.slots * 32 * 0.92), abs=1)


def test_one_order_asks_for_less(run, tiny_config, world_dir):
    text = dict(max_prompt_tokens=96, max_response_tokens=80, packing="bins")
    one = prepare(tiny_config(world_dir, text=text, judge=dict(orders="one"))).programs
    given = stated("60:96,50:80", run.config)
    both, half = (workload(programs, given).shape for programs in (run, planned(one.config, one.arch, one.mesh)))
    assert half.verdicts == both.verdicts / 2 and half.answers == both.answers
    assert 0.5 * both.tokens < half.tokens < 0.9 * both.tokens


def test_stated_rows_that_are_longer_than_a_bin(run, tiny_config, world_dir):
    text = dict(max_prompt_tokens=96, max_response_tokens=80, packing="bins", bin_tokens=40)
    small = planned(tiny_config(world_dir, text=text), run.arch, run.mesh)
    # The program of the longest rows is there all the same: real ones may be shorter.
    assert small._bound(small.optimise_spec).groups[0][1] > 40
    with pytest.raises(InputError, match=r"^text.bin_tokens is 40, and a row of the stated lengths has \d+ tokens"):
        workload(small, stated("60:96,50:80", small.config))


def test_the_command_takes_lengths_and_programs(command, write_config):
    done = command(plan.main, "--config", write_config(), "--lengths", "9:12,5:9", "--programs", "score,prefill")
    assert done.code == 0
    assert "lengths as stated (9:12,5:9): answers of 5 tokens" in done.out
    assert "score, " in done.out and "prefill, " in done.out and "SCIR step" not in done.out
    assert "GiB per device, " in done.err, "each as soon as it is compiled"
    bad = command(plan.main, "--config", write_config(), "--programs", "score,train")
    assert bad.code == 2 and "'train' is none of prefill, decode, score" in bad.err
