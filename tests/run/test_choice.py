"""Which model of a run is exported, when a run ends early, and evaluations within a stage."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from scir_jax import train
from scir_jax.config.checks import resolve
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.errors import Interrupted
from scir_jax.run import choice, console, evaluation
from scir_jax.run.counts import Counts
from scir_jax.run.directory import RunDirectory
from scir_jax.run.models import Models
from scir_jax.run.runs import Run
from scir_jax.run.setup import prepare
from scir_jax.run.watching import pair_watch
from tests.run.runs import ITERATIONS, WHOLE, content, files, lines, model, same

pytestmark = pytest.mark.usefixtures("shared_programs")


def rows(*values) -> list[dict]:
    names = ("generative_accuracy", "implicit_accuracy", "agreement", "quality")
    return [{"model": f"M{n}", **dict(zip(names, row, strict=False))} for n, row in enumerate(values, 1)]


@pytest.mark.parametrize(
    "select, expected",
    [
        ("last", "M3"),
        ("consensus", "M2"),
        ("generative_accuracy", "M3"),
        ("implicit_accuracy", "M1"),
        ("quality", "M2"),
        ("greedy_quality", "M3"),
    ],
)
def test_the_best_model(select, expected):
    table = rows((0.5, 0.9, 0.1, 0.3), (0.7, 0.8, 0.2, 0.6), (0.95, 0.6, 0.9, 0.6))
    assert choice.best(table, select)["model"] == expected


def test_the_model_that_ended_a_run_early_is_not_its_last():
    table = rows((0.5, 0.9, 0.1), (0.8, 0.8, 0.2), (0.7, 0.6, 0.9))
    assert [choice.best(table, "last", early_stop=early)["model"] for early in (True, False)] == ["M2", "M3"]
    assert choice.best(table[:2], "last", early_stop=True)["model"] == "M2"
    assert [choice.marked(table, best, "last") for best in ("M2", "M3", None)] == ["M2", None, None]
    assert [choice.marked(table, "M3", select) for select in ("consensus", None)] == ["M3", None]


def test_a_win_rate_is_compared_with_m1_itself():
    assert choice.best([{"model": "M1"}, {"model": "M2", "win_rate": 0.45}], "win_rate")["model"] == "M1"
    assert choice.best([{"model": "M1"}, {"model": "M2", "win_rate": 0.55}], "win_rate")["model"] == "M2"


@pytest.mark.parametrize(
    "last, expected",
    [
        ((0.6, 0.6, 0.9), True),
        ((0.7, 0.6, 0.9), False),
        ((0.6, 0.8, 0.9), False),
        ((0.6, 0.6, 0.7), False),
        ((), False),
    ],
)
def test_agreement_on_being_wrong(last, expected):
    assert choice.agree_on_being_wrong(rows((0.1, 0.1, 0.1), (0.7, 0.7, 0.8), last)) is expected
    assert not choice.agree_on_being_wrong(rows(last))


@pytest.fixture
def doctored(monkeypatch):
    """Evaluations say that M2's reward models agree on being wrong."""
    told = iter(((0.8, 0.7, 0.6), (0.7, 0.6, 0.9), (0.9, 0.9, 0.9)))
    names = ("generative_accuracy", "implicit_accuracy", "agreement")
    monkeypatch.setattr(evaluation, "pair_metrics", lambda *_: dict(zip(names, next(told), strict=True)))


def test_a_run_ends_early_and_exports_its_best_model(doctored, from_m1, command, whole, tmp_path):
    settings = dict(run=dict(iterations=2), evaluate=dict(select="consensus", early_stop=True))
    run = from_m1(**settings)
    assert not (run / "iteration_02").exists()
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"M0", "M1", "M2", "arrays.json"}
    summary = content(run / "summary.json")
    assert [row["model"] for row in summary["rows"]] == ["M1", "M2"]
    assert (summary["best"], summary["select"], Run(run).best) == ("M1", "consensus", "M1")
    exported, expected = load_file(run / "export" / "model.safetensors"), model(run, 1)
    assert np.array_equal(exported["model.norm.weight"], expected["['norm']['scale']"])
    assert not np.array_equal(exported["model.norm.weight"], model(run, 2)["['norm']['scale']"])
    # Without a column to choose by it is the model before the one that ended the run.
    done = command(train.main, "--config", tmp_path / "run.yaml", "--evaluate.select", "last")
    assert done.code == 0 and "the run ends here and exports M1 (evaluate.early_stop)" in done.err
    assert (content(run / "summary.json")["best"], Run(run).marked) == ("M1", "M1") and "M1 *" in done.out
    assert command(train.main, "--config", tmp_path / "run.yaml").code == 0
    before = files(run)
    done = command(train.main, "--config", tmp_path / "run.yaml")
    assert done.code == 0 and "M1 *" in done.out and "* the best model, exported" in done.out and "M2 *" not in done.out
    assert "M2: the reward models agree more often and are right less often than those of M1" in done.err
    assert files(run) == before
    # What was exported of another model goes.
    directory = RunDirectory(run)
    directory.summarise(summary["rows"], "M1", "consensus", {}, {})
    assert (run / "export").exists()
    directory.summarise(summary["rows"], "M2", "last", {}, {})
    assert not (run / "export").exists() and directory.best == "M2"


def test_a_watch_says_what_the_evaluation_of_the_finished_model_says(whole):
    config = resolve(whole.config)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every=2))
    encoder, inputs, programs, parameters = prepare(config)
    store = ModelStore(whole.path / "checkpoints")
    for t in range(ITERATIONS + 1):
        watch = pair_watch(config, encoder, inputs, programs, Models(store, programs, parameters), t)
        found = watch.look(store.load(t + 1, programs.abstract_trained))
        expected = content(whole.path / f"iteration_{t:02d}" / "evaluation.json")
        # It costs what the pairs cost the evaluation, which asks the reference anew.
        spent = content(whole.path / f"iteration_{t:02d}" / "costs.json")["evaluate"]
        assert watch.each.judged == spent["judged"] > 0 == watch.each.generated
        assert watch.once == Counts(scored=watch.each.scored, flops=watch.once.flops)
        assert 0 < watch.once.scored <= spent["scored"] / 2 and 0 < watch.once.flops < watch.each.flops
        assert {"eval/generative_accuracy", "eval/implicit_accuracy", "eval/agreement"} <= found.keys()
        assert found == {name: pytest.approx(expected[name.removeprefix("eval/")], abs=1e-6) for name in found}
    assert pair_watch(whole.config, encoder, inputs, programs, None, 1) is None


class StopsLater(console.Stopper):
    """A signal comes in at the vote after so many others."""

    left = 0

    def vote(self):
        type(self).left -= 1
        if not self.left:
            self.signal = 2
        return super().vote()


@pytest.mark.slow
def test_evaluations_within_a_stage_change_nothing(configure, whole, no_page, tmp_path, monkeypatch):
    """The steps and models are the run's without them, to the bit; interrupted behind one, it goes on to equal rows."""
    settings = WHOLE | dict(evaluate=WHOLE["evaluate"] | dict(every=2), data=dict(heldout_prompts=None))
    del settings["evaluate"]["grader"]
    monkeypatch.setattr(console, "Stopper", StopsLater)
    found = {}
    for name, votes in (("at once", 0), ("in two parts", 6)):
        path = tmp_path / name.replace(" ", "_")
        file = configure(path, run=dict(iterations=1), **settings)
        StopsLater.left = votes
        if votes:
            with pytest.raises(Interrupted):
                train.main(["--config", str(file)])
            StopsLater.left = 0
        assert train.main(["--config", str(file)]) == 0
        found[name] = lines(path / "metrics.jsonl")
        assert all(same(model(path, n), model(whole.path, n)) for n in range(3))
    timings = ("seconds", "tokens_per_second", "teraflops")
    one, two = ([{k: v for k, v in row.items() if k not in timings} for row in r] for r in found.values())
    assert one == two
    spent = [content(tmp_path / name.replace(" ", "_") / "iteration_01" / "costs.json") for name in found]
    assert spent[0] == spent[1]
    looks = sum(row["stage"] == "optimise" and "eval/agreement" in row for row in one)
    assert spent[0]["optimise"]["judged"] == looks * spent[0]["evaluate"]["judged"] > 0
    # The reference is asked once, the model at every look.
    assert spent[0]["optimise"]["scored"] == (1 + looks) * spent[0]["evaluate"]["scored"] / 2
    steps = {(row["stage"], row["stage_step"]): {k for k in row if k.startswith("eval/")} for row in one}
    last = max(step for stage, step in steps if stage == "optimise")
    assert last > 4
    for (stage, step), looked in steps.items():
        assert bool(looked) == (step % 2 == 0 and step < {"sft": 3, "optimise": last}[stage])
    plain = [row for row in lines(whole.path / "metrics.jsonl") if row["iteration"] < 2]
    for row, expected in zip(one, plain, strict=True):
        kept = {k: v for k, v in expected.items() if k not in timings}
        assert {k: v for k, v in row.items() if not k.startswith("eval/")} == kept
