"""Logs beside metrics.jsonl: Weights & Biases and Trackio, with stand-ins for both, and TensorBoard's texts."""

import re
import struct
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from scir_jax.errors import InputError
from scir_jax.run import evaluation
from scir_jax.run.metrics import Metrics, NoMetrics
from tests.run.runs import content, lines

pytestmark = pytest.mark.usefixtures("shared_programs")

PACKAGES = ("wandb", "trackio")


@pytest.fixture(params=PACKAGES)
def stand_in(request, monkeypatch):
    """A package that keeps what it is told: `inits`, `logged` [(values, step)], `finished`."""
    log = SimpleNamespace(name=request.param, inits=[], logged=[], finished=0)

    class Run:
        def define_metric(self, *_, **__):
            assert log.name == "wandb"

        def log(self, values, step=None):
            # Each has the step where it keeps its own.
            assert (step is None) == ("step" in values) == (log.name == "wandb")
            values = dict(values)
            log.logged.append((values, values.pop("step") if step is None else step))

        def finish(self):
            log.finished += 1

    def init(**settings):
        log.inits.append(settings)
        return Run()

    module = SimpleNamespace(init=init, Table=lambda columns, data: SimpleNamespace(columns=columns, data=data))
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return log


def logs(directory, name: str, **more) -> Metrics:
    return Metrics(directory, tensorboard=False, config={"run": {"seed": 3}}, **{name: True}, **more)


def test_an_id_of_its_own_is_kept(stand_in, tmp_path):
    for name in ("one", "one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
        logs(tmp_path / name, stand_in.name).close()
    assert stand_in.finished == 3
    identities = [content(tmp_path / name / "tracker.json")["id"] for name in ("one", "one", "two")]
    assert identities[0] != identities[2] and all(re.fullmatch("[0-9a-f]{8}", i) for i in identities)
    for settings, identity, name in zip(stand_in.inits, identities, ("one", "one", "two"), strict=True):
        assert settings["resume"] == "allow" and settings["config"] == {"run": {"seed": 3}}
        assert settings["project"] == "scir_jax"
        if stand_in.name == "wandb":
            assert (settings["id"], settings["name"]) == (identity, name)
        else:
            assert settings["name"] == f"{name}-{identity}"


def test_the_users_project(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{stand_in.name.upper()}_PROJECT", "mine")
    logs(tmp_path, stand_in.name).close()
    assert stand_in.inits[0]["project"] == "mine"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"run.{name} is true but {name} is not installed; .*'scir_jax\[{name}\]'"):
        logs(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_run_is_logged_with_answers_and_pairs(stand_in, from_m1):
    run = from_m1(run={stand_in.name: True}, data={})
    numbers = [(values, step) for values, step in stand_in.logged if "loss" in values]
    assert [(values["loss"], step) for values, step in numbers] == [
        (row["loss"], row["step"]) for row in lines(run / "metrics.jsonl")
    ]
    evaluated = [(values, step) for values, step in stand_in.logged if "eval_agreement" in values]
    assert [step for _, step in evaluated] == [0, numbers[-1][1]]
    tables = {name: table for values, _ in stand_in.logged for name, table in values.items() if hasattr(table, "data")}
    pairs, decisions = (lines(run / "iteration_01" / f"{name}.jsonl") for name in ("pairs", "decisions"))
    shown = [dict(zip(tables["pairs"].columns, row, strict=True)) for row in tables["pairs"].data]
    assert len(shown) == min(len(pairs), evaluation.TABLE_ROWS)
    for i, row in enumerate(shown):
        last = [d for d in decisions if d["pair"] == i][-1]
        assert all(row[name] == pairs[i][name] for name in ("prompt", "response_a", "response_b"))
        assert (row["p_implicit"], row["agreed"], row["label"]) == (last["p_implicit"], last["agreed"], last["label"])
        assert row["p_generative"] == ", ".join(f"{p:.3f}" for p in last["p_generative"])
    assert stand_in.finished == 1 and len(stand_in.inits) == 1


def test_tables_of_answers(whole):
    rows = lines(whole.path / "iteration_01" / "heldout_responses.jsonl")
    tables = evaluation.tables_of(2, rows, whole.path / "iteration_01")
    first = [row for row in rows if not row["greedy"]][0]
    assert tables["answers"][0] == {
        **{name: first[name] for name in ("prompt", "response", "logprob", "stop")},
        "model": "M2",
        "tokens": len(first["response_ids"]),
    }
    assert len({row["prompt"] for row in tables["answers"]}) == len(tables["answers"]) == 8
    assert evaluation.tables_of(1, rows, None).keys() == {"answers"}


def texts(directory) -> list[str]:
    """The texts of TensorBoard's event files: records of length, checksum, content, checksum."""
    found = []
    for path in directory.glob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [v.tensor.string_val[0].decode() for v in event.summary.value if v.tensor.string_val]
            data = data[16 + length :]
    return found


def test_texts_of_a_model_stay_texts_in_tensorboard(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=True, config={})
    metrics.start_stage("sft", 0, 0)
    hostile = "![x](http://evil.example/x.png) a|b <script>\n# line \ud800"
    metrics.tables({"answers": [{"prompt": "p", "response": hostile, "logprob": -1.5, "agreed": None}], "pairs": []})
    metrics.close()
    (table,) = texts(tmp_path / "tensorboard")
    assert table.split("\n")[:2] == ["| prompt | response | logprob | agreed |", "| --- | --- | --- | --- |"]
    (row,) = table.split("\n")[2:]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert r"\!\[x\]\(http://evil\.example/x\.png\) a\|b &lt;script&gt; ↵ \# line ?" in row and r"\-1\.500" in row


def test_hosts_that_write_nothing_write_nothing():
    """What the first host writes, the others leave out."""
    public = {name for name, value in vars(Metrics).items() if callable(value) and not name.startswith("_")}
    assert public <= vars(NoMetrics).keys()
