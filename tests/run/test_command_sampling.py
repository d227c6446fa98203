"""sample.command: another engine's answers are complete and this model's, or they are refused and leave nothing."""

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from scir_jax import train
from scir_jax.config.checks import check
from scir_jax.config.files import BUNDLED, find, read
from scir_jax.errors import InputError, Interrupted
from scir_jax.run import answers, command_sampling, console, hub, scoring
from scir_jax.run.costs import Account
from tests.hosts import run_hosts
from tests.processes import runs
from tests.run import engines, hub_cache
from tests.run.runs import WHOLE, check_iterations, content, lines, model, refused, same, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

PYTHON = f"{shlex.quote(sys.executable)} -S"
CALL = "{prompts} {output} {responses}"


class Stage:
    """stage() runs the sampling stage of a command that needs no model; `script` may be mended in between."""

    def __init__(self, make, folder, more=""):
        self.folder, self.script = folder, folder / "engine.py"
        self.path = folder / "responses.jsonl"
        self.setup = make(sample=dict(command=f"{PYTHON} {self.script} {CALL}{more}", responses=2))
        chat = self.setup.encoder.chat
        self.ids = [i for letter in "abcdef" for i in chat.encode_text(letter)]
        self.stop = chat.stop_ids[0]
        self.prompts = list(enumerate(self.setup.inputs.prompts))[4:10]
        params = self.setup.parameters.configured()
        self.models = type("Models", (), {"load": lambda self, number: params})()
        self.params = params
        self.account = Account()

    def write(self, source=engines.MADE_UP, **names):
        names = {"IDS": self.ids, "STOP": self.stop, **names}
        self.script.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()) + source)

    def __call__(self, stopper=None):
        setup = self.setup
        command_sampling.sample_with_command(
            setup.programs.config,
            setup.encoder,
            setup.programs,
            self.models,
            None,
            self.prompts,
            1,
            self.path,
            stopper or console.Stopper(),
            self.account,
        )

    def rows(self):
        """What the engine would write, to be changed."""
        rows = []
        for number, prompt in self.prompts:
            for n in range(2):
                ids = [self.ids[(number + n) % 6], self.ids[n], self.stop]
                text = self.setup.encoder.chat.decode(ids)
                row = command_sampling.prompt_row((number, prompt))
                rows.append({**row, "response": text, "response_ids": ids})
        return rows

    def given(self, rows):
        """The engine writes these rows."""
        file = write_lines(self.folder / "given.jsonl", rows)
        self.script.write_text(f"import shutil, sys\nshutil.copyfile({str(file)!r}, sys.argv[2])\n")


@pytest.fixture
def stage(make, tmp_path):
    return Stage(make, tmp_path)


def test_answers_take_the_form_of_our_own(stage):
    stage.write()
    stage()
    rows = lines(stage.path)
    assert [(row["prompt_number"], row["sample"]) for row in rows] == [(i, n) for i, _ in stage.prompts for n in (0, 1)]
    prompts = dict(stage.prompts)
    for row in rows:
        assert tuple(row["prompt_ids"]) == prompts[row["prompt_number"]].ids
        assert row["response"] == stage.setup.encoder.chat.decode(row["response_ids"]) and row["quote_ids"]
        assert row["response_ids"][-1] == stage.stop and row["stop"] == "eos"
    assert sorted(p.name for p in stage.folder.iterdir()) == ["command.log", "engine.py", "responses.jsonl"]
    assert (stage.folder / "command.log").read_text() == "answered\n"


def test_a_command_that_fails_shows_its_last_lines_and_goes_on_when_it_is_mended(stage, capsys):
    stage.script.write_text(
        "import sys\nfor i in range(99): print('line', i)\nopen(sys.argv[2], 'w').write('{')\n1 / 0\n"
    )
    with pytest.raises(InputError, match=r"sample.command failed \(exit code 1\).*command.log: mend it"):
        stage()
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "line 98" in said and "line 60" not in said
    assert sorted(p.name for p in stage.folder.iterdir() if p.is_file()) == ["command.log", "engine.py"]
    stage.script.write_text("")
    with pytest.raises(InputError, match="wrote no {output}"):
        stage()
    stage.write()
    stage()
    assert len(lines(stage.path)) == 12 and not (stage.folder / "command").exists()


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (lambda rows: rows[:-1], None, "1 answers to the prompt with prompt_number 9.*asks for 2"),
        (lambda rows: [*rows, rows[0]], None, "3 answers to the prompt with prompt_number 4"),
        (lambda rows: [{"prompt": "copy f=", "response": "f"}, *rows], 1, "answers a prompt that is not in"),
        (lambda rows: [*rows[:2], {**rows[2], "response_ids": [10**6]}, *rows[3:]], 3, "must be token ids from 0"),
        (lambda rows: [*rows[:2], {**rows[2], "response": "other"}, *rows[3:]], 3, "has another tokenizer"),
        (
            lambda rows: [*rows[:2], {**rows[2], "prompt_ids": rows[2]["prompt_ids"] * 2}, *rows[3:]],
            3,
            "prompt_ids are not what this model's tokenizer and chat template give from token",
        ),
        (lambda rows: [{**row, "response_ids": row["response_ids"][:-1]} for row in rows], 1, "without a stop token"),
        (lambda rows: [{**row, "logprob": 3} for row in rows], 1, "logprob: must be the sum of log-probabilities"),
        (lambda rows: [{**row, "logprob": -300.0} for row in rows], None, "gives this answer the log-probability -300"),
    ],
)
def test_wrong_answers_are_refused_and_named(stage, change, line, words):
    stage.given(change(stage.rows()))
    output = stage.folder / "command" / "responses.jsonl"
    with pytest.raises(InputError, match=words) as raised:
        stage()
    assert str(raised.value).startswith(f"{output}:{line}: " if line else f"{output}:")
    assert not stage.path.exists() and list(output.parent.iterdir()) == [output]
    stage.given(stage.rows())
    stage()
    assert stage.path.exists() and not output.parent.exists()


def test_log_probabilities_of_this_model_are_believed(stage, capsys):
    rows = stage.rows()
    prompts = dict(stage.prompts)
    items = [(prompts[row["prompt_number"]], stage.setup.encoder.sampled(row["response_ids"])) for row in rows]
    logps = scoring.score_answers(stage.setup.encoder, stage.setup.programs, stage.params, items)["logps"]
    stage.given([{**row, "logprob": float(logp) - 0.01} for row, logp in zip(rows, logps)])
    stage()
    assert "log-probabilities of 12 answers are 0.003 nats per token" in capsys.readouterr().err
    assert [row["logprob"] for row in lines(stage.path)] == pytest.approx(logps - 0.01)
    # Answers that were put in the stage's place are compared when they are scored.
    claims = tuple(answers.Claim(i, float(logp) - 9, f"f:{i + 1}") for i, logp in enumerate(logps))
    assert answers.check_claims(claims[:0], items, logps) is None
    with pytest.raises(InputError, match=r"^f:\d+: .*tokenizer"):
        answers.check_claims(claims, items, logps)


def test_ctrl_c_ends_the_command_and_what_it_started(stage):
    number = stage.folder / "pid"
    stage.script.write_text(
        "import pathlib, subprocess, time\n"
        "other = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(number)!r}).write_text(str(other.pid))\n"
        "time.sleep(60)\n"
    )

    class Stopper(console.Stopper):
        def check(self, *arguments, **named):
            self.signal = 2 if number.exists() and number.read_text() else None
            super().check(*arguments, **named)

    started = time.monotonic()
    with pytest.raises(Interrupted, match="run the same command again to go on"):
        stage(Stopper())
    assert time.monotonic() - started < 30
    status = Path("/proc", number.read_text(), "status")
    ends = time.monotonic() + 20
    while runs(status) and time.monotonic() < ends:
        time.sleep(0.05)  # a process that was killed ends when the system gets to it
    assert not runs(status)
    assert not stage.path.exists() and not (stage.folder / "command").exists()


# Two hosts run the stage twice; the engine is mended in between.
TWO_HOSTS = """
import sys
from pathlib import Path
from scir_jax.engine.hosts import hosts
hosts.start(True, wait=60)
from scir_jax.config import cli
from scir_jax.errors import InputError
from scir_jax.run import command_sampling, console
from scir_jax.run.costs import Account
from scir_jax.run.setup import prepare
console.only_first_host_speaks()
config, _ = cli.parse("train", "", ["--config", sys.argv[1]])
setup, folder = prepare(config), Path(sys.argv[2])
prompts = list(enumerate(setup.inputs.prompts))[:3]
needs = (config, setup.encoder, setup.programs, None, None, prompts, 1, folder / "responses.jsonl")
needs += (console.Stopper(), Account())
try:
    command_sampling.sample_with_command(*needs)
except InputError as error:
    print("error:", error)
if hosts.first():
    (folder / "broken.py").replace(folder / "was_broken.py")
    (folder / "whole.py").replace(folder / "broken.py")
hosts.barrier("mended")
command_sampling.sample_with_command(*needs)
hosts.barrier("sampled")
print("rows", len((folder / "responses.jsonl").read_text().splitlines()))
hosts.finish()
"""


@pytest.mark.slow
def test_the_first_of_two_hosts_runs_the_command(stage, configure, tmp_path):
    """Its failure is the sentence of both; what it wrote both read."""
    folder = stage.folder
    stage.write()
    (folder / "engine.py").replace(folder / "whole.py")
    (folder / "broken.py").write_text(f"open({str(folder / 'calls')!r}, 'a').write('.')\nraise SystemExit('no engine')")
    sample = dict(command=f"{PYTHON} {folder / 'broken.py'} {CALL}", responses=2)
    file = configure(tmp_path / "run", sample=sample)
    done = run_hosts(["-c", TWO_HOSTS, file, folder], 2, forked=True)
    assert [one.code for one in done] == [0, 0], done
    said = [[line for line in one.out.splitlines() if line.startswith(("error", "rows"))] for one in done]
    assert said[0] == said[1] and "sample.command failed (exit code 1)" in said[0][0] and said[0][1] == "rows 6"
    assert (folder / "calls").read_text() == "." and not (folder / "command").exists()
    assert "| no engine" in done[0].err and "no engine" not in done[1].err


def test_places_are_quoted_and_other_braces_stay(make, tmp_path):
    setup = make(sample=dict(command="x {prompts} ${HOME} {unknown} {stop_ids} {seed} {engines}"))
    config, folder = setup.programs.config, tmp_path / "a b"
    found = [command_sampling.filled(config, setup.encoder, t, folder, folder, folder) for t in (1, 1, 2)]
    assert found[0] == found[1] != found[2], "each iteration has a seed of its own"
    parts = shlex.split(found[0].replace("$", ""))
    assert parts[:4] == ["x", str(folder), "{HOME}", "{unknown}"] and parts[4] == str(setup.encoder.chat.stop_ids[0])
    assert Path(parts[6], "vllm_offline.py").is_file()


def test_commands_that_cannot_work_are_refused(make):
    config = make().programs.config
    for command, words in (("engine {prompts}", "where {output} stands"), ("engine {output}", "{prompts} stands")):
        with pytest.raises(InputError, match=words):
            check(dataclasses.replace(config, sample=dataclasses.replace(config.sample, command=command)))


def test_the_script_for_vllm_keeps_to_ids(make, tmp_path, monkeypatch):
    """With a stand-in for vllm that has the signatures of its offline API."""
    command = read(find("engines/vllm"))["sample"]["command"].replace("python ", f"PYTHONPATH={tmp_path} {PYTHON} ", 1)
    stage = Stage(make, tmp_path)
    texts = {str(i): stage.setup.encoder.chat.decode([i]) for i in stage.ids}
    (tmp_path / "vllm.py").write_text(f"IDS = {stage.ids!r}\nTEXTS = {texts!r}\n" + engines.VLLM)
    stage.setup = make(sample=dict(command=command.replace("{model}", "nothing"), responses=2))
    monkeypatch.setattr(answers, "FAR", 100.0)
    stage()
    rows = lines(stage.path)
    assert len(rows) == 12 and all(row["logprob"] == -1.5 and row["stop"] == "eos" for row in rows)
    assert (BUNDLED / "engines" / "vllm_offline.py").is_file()


@pytest.mark.slow
def test_a_whole_run_of_a_hubs_model_with_another_engine(
    configure, whole, no_page, command, world_dir, tmp_path, monkeypatch
):
    """transformers samples from the exported M1; its log-probabilities are this model's."""
    cache, name = tmp_path / "cache", "someone/tiny"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    hub_cache.add(cache, name, world_dir / "model", "a" * 40)
    engine, run = tmp_path / "engine.py", tmp_path / "run"
    call = " ".join(f"--{name} {{{name.replace('-', '_')}}}" for name in ("model", "prompts", "output", "responses"))
    call += " --max-tokens {max_tokens} --seed {seed} --stop-ids {stop_ids}"
    settings = dict(
        optimise=WHOLE["optimise"], sample={**WHOLE["sample"], "command": f"{sys.executable} {engine} {call}"}
    )
    settings |= dict(run=dict(start_from=str(whole.path)), data=dict(heldout_prompts=None), model=dict(path=name))
    file = configure(run, **settings)
    done = command(train.main, "--config", file)
    message = refused(done, "sample.command failed (exit code 2)", "command.log")
    assert "No such file" in done.err and message
    folder = run / "iteration_01"
    assert sorted(p.name for p in folder.iterdir()) == ["command.log"]
    engine.write_text(engines.TRANSFORMERS)
    # In the meantime the branch has moved on, to what is no model at all.
    hub_cache.add(cache, name, run, "b" * 40)
    hub._found.clear()
    done = command(train.main, "--config", file)
    assert done.code == 0, done.err
    check_iterations(run)
    rows = lines(folder / "responses.jsonl")
    assert len(rows) == WHOLE["sample"]["prompts"] * WHOLE["sample"]["responses"]
    assert not same(model(run, 1), model(run, 2)) and not (folder / "command").exists()
    starts = {}
    for pair in lines(folder / "pairs.jsonl"):
        starts |= {json.dumps(pair[f"response_{y}_ids"]): pair["cached"]["start_logps"]["ab".index(y)] for y in "ab"}
    found = [(starts[key], row["logprob"]) for row in rows if (key := json.dumps(row["response_ids"])) in starts]
    assert len(found) > 8 and all(ours == pytest.approx(theirs, abs=1e-3) for ours, theirs in found)
    assert content(run / "summary.json")["rows"]
    assert content(run / "manifest.json")["hub"] == {"model.path": {"name": name, "commit": "a" * 40}}
    assert ModelCard.load(run / "export" / "README.md").data.base_model == name
