"""scir_jax.train, load and Run: the commands' results, in Python."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import scir_jax
from scir_jax import judge, sample
from scir_jax.config import cli
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from scir_jax.run import console
from tests.run.runs import ITERATIONS, content, lines, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(world_dir):
    """The tiny model, opened once."""
    return scir_jax.load(
        world_dir / "model",
        text=dict(max_prompt_tokens=32, max_response_tokens=12),
        generative=dict(templates=[f"{world_dir}/judge.yaml"]),
        **{"sample.batch_size": 4, "evaluate.batch_size": 8},
    )


@pytest.fixture(scope="module")
def run(whole):
    return scir_jax.Run(whole.path)


def test_the_import_is_light_and_names_its_parts():
    """Neither JAX nor anything of its size is imported before it is used."""
    code = (
        "import sys, scir_jax; heavy = {'jax', 'numpy', 'transformers', 'jsonargparse'} & set(sys.modules);"
        "assert not heavy, heavy; assert {'train', 'load', 'Run'} <= set(dir(scir_jax)); scir_jax.InputError;"
        "scir_jax.Config; assert 'jax' not in sys.modules; assert callable(scir_jax.train)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        getattr(scir_jax, "trian")  # noqa: B009


# --- a model ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_command(tiny, world_dir, sampling, command, tmp_path):
    output = tmp_path / "responses.jsonl"
    prompts = world_dir / "heldout_prompts.jsonl"
    done = command(sample.main, *sampling, "--data.prompts", prompts, "--run.seed", 3, "--output", output)
    assert done.code == 0, done.err
    texts = [row["prompt"] for row in lines(prompts)]
    found, expected = tiny.sample(texts, responses=3, seed=3), lines(output)
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in expected]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    np.testing.assert_allclose([r["logprob"] for r in found], [r["logprob"] for r in expected], atol=1e-5)
    other = tiny.sample(texts, responses=3, seed=4)
    assert [row["response_ids"] for row in other] != [row["response_ids"] for row in found]


def test_judgements_are_those_of_the_command(tiny, world_dir, judging, command, tmp_path):
    given = write_lines(tmp_path / "pairs.jsonl", lines(world_dir / "heldout_pairs.jsonl")[:3])
    output, reference = tmp_path / "judged.jsonl", world_dir / "model"
    files = ("--input", given, "--output", output, "--reference", reference, "--with_ids")
    assert command(judge.main, *judging, *files).code == 0
    found, expected = tiny.judge(lines(given), reference=tiny, with_ids=True), lines(output)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [r["ids"] for r in ours["judge_rows"]] == [r["ids"] for r in theirs["judge_rows"]]
        for name in ("p_generative", "p_implicit", "slot_bias", "verdict_mass", "logps", "reference_logps"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)
    (one,) = tiny.judge(lines(given)[0])
    assert one["p_generative"] == pytest.approx(expected[0]["p_generative"], abs=1e-5) and "p_implicit" not in one


def test_log_probabilities_are_those_of_transformers(whole, run):
    """Of the exported model and of M1, of texts and of ids."""
    row = lines(whole.path / "iteration_02" / "responses.jsonl")[0]
    texts = ["ab", "b"]
    model = scir_jax.load(whole.path)
    stop = model._plain[1].chat.stop_ids[0]
    network = AutoModelForCausalLM.from_pretrained(whole.path / "export", dtype=torch.float32)
    tokenizer = model._plain[1].chat.tokenizer
    expected = []
    for ids in [*([*tokenizer.encode(text, add_special_tokens=False), stop] for text in texts), row["response_ids"]]:
        whole_row = torch.tensor([row["prompt_ids"] + ids])
        with torch.no_grad():
            logps = torch.log_softmax(network(whole_row).logits[0, :-1], -1)
        behind = range(len(row["prompt_ids"]) - 1, whole_row.shape[1] - 1)
        expected.append(sum(float(logps[i, whole_row[0, i + 1]]) for i in behind))
    found = model.logprobs(row["prompt"], [*texts, row["response_ids"]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    last = run.models[f"M{ITERATIONS + 1}"]
    np.testing.assert_allclose(last.logprobs(row["messages"], [row["response_ids"]]), expected[-1:], atol=1e-4)
    assert model.logprobs(row["prompt"], []).shape == (0,)


def test_prompts_of_about_a_length_share_programs(tiny):
    before = dict(tiny._programs)
    for prompt in ("a", "abcabcabcabcabc"):
        assert tiny.logprobs(prompt, ["ab"])[0] < 0
    assert len(tiny._programs) == len(before) + 1


def test_models_of_a_run_are_its_checkpoints(whole, run):
    assert list(run.models) == [f"M{n}" for n in range(ITERATIONS + 2)]
    for t in (1, 2):
        pair = lines(whole.path / f"iteration_{t:02d}" / "pairs.jsonl")[0]
        ids = [pair["response_a_ids"], pair["response_b_ids"]]
        found = run.models[f"M{t}"].logprobs(pair["messages"], ids)
        np.testing.assert_allclose(found, pair["cached"]["start_logps"], atol=1e-4)


def test_what_a_model_refuses(tiny, whole, world_dir, copied):
    with pytest.raises(InputError, match="row 2: prompt: is empty"):
        tiny.sample(["ab", " "], responses=1)
    with pytest.raises(InputError, match="temperature and top_k must not be negative"):
        tiny.sample("ab", temperature=-1)
    with pytest.raises(InputError, match="sample.responses must be at least 1"):
        tiny.sample("ab", responses=0)
    with pytest.raises(InputError, match="response 2 has 13 tokens; text.max_response_tokens is 12"):
        tiny.logprobs("ab", ["a", [5] * 13])
    with pytest.raises(InputError, match="response 1: must be token ids"):
        tiny.logprobs("ab", [[10**6]])
    with pytest.raises(InputError, match="the prompt: longer than text.max_prompt_tokens, which is 32"):
        tiny.logprobs("ab" * 40, ["a"])
    with pytest.raises(InputError, match="row 1: lacks"):
        tiny.judge({"prompt": "a", "chosen": "b"})
    with pytest.raises(InputError, match="row 1: expected a mapping|row 1: lacks"):
        tiny.judge([{}])
    adapted = scir_jax.load(world_dir / "model", lora=dict(rank=2))
    with pytest.raises(InputError, match="other adapters"):
        tiny.judge({"prompt": "a", "chosen": "b", "rejected": "c"}, reference=adapted)
    with pytest.raises(InputError, match="did you mean 'text.max_response_tokens'"):
        scir_jax.load(world_dir / "model", text=dict(max_respons_tokens=3))
    shutil.rmtree(copied / "export")
    with pytest.raises(InputError, match="has exported no model yet"):
        scir_jax.load(copied)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_train_takes_files_and_settings(monkeypatch, whole):
    asked = []
    monkeypatch.setattr(scir_jax.train, "train", lambda config, given=None: asked.append(config))
    scir_jax.train()
    scir_jax.train("quickstart", "methods/srlm", {"run.seed": 7, "data": {"columns": {"prompt": ["q", "p"]}}})
    scir_jax.train(whole.file, lora=dict(rank=4), text=dict(chat_template_kwargs={"enable_thinking": False}))
    scir_jax.train(whole.config)
    options = ["--run.seed", "7", "--data.columns.prompt", '["q", "p"]']
    lines_ = (
        ["--config", "quickstart"],
        ["--config", "quickstart", "--config", "methods/srlm", *options],
        ["--config", str(whole.file), "--lora.rank", "4", "--text.chat_template_kwargs", '{"enable_thinking": false}'],
    )
    assert asked == [*(cli.parse("train", "", argv)[0] for argv in lines_), whole.config]
    with pytest.raises(InputError, match="unknown option --run.sed; did you mean 'run.seed'"):
        scir_jax.train("quickstart", run=dict(sed=1))
    with pytest.raises(InputError, match="run.seed: a set is no value of a setting"):
        scir_jax.train("quickstart", run=dict(seed={1}))
    with pytest.raises(InputError, match="give no others beside it"):
        scir_jax.train(Config(), run=dict(seed=1))


def test_a_run_in_another_thread(whole, copied):
    """Python's signal handlers can only be set in the main thread."""
    for name in ("evaluation.json", "heldout_responses.jsonl"):
        (copied / f"iteration_{ITERATIONS:02d}" / name).unlink()
    found = []
    settings = {"run.directory": str(copied)}

    def work():
        with pytest.MonkeyPatch.context() as patch:
            # The copy's records name the original.
            (copied / "config.yaml").write_text(
                (copied / "config.yaml").read_text().replace(f"directory: {whole.path}\n", f"directory: {copied}\n")
            )
            patch.chdir(copied.parent)
            found.append(scir_jax.train(whole.file, settings))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (run,) = found
    assert [row["model"] for row in run.rows] == [f"M{n}" for n in range(1, ITERATIONS + 2)]
    last = [
        {k: v for k, v in row.items() if k != "seconds"} for row in (run.rows[-1], scir_jax.Run(whole.path).rows[-1])
    ]
    assert last[0] == last[1]


def test_a_run_shows_its_table(run, whole, tmp_path):
    assert run.rows == content(whole.path / "summary.json")["rows"]
    assert run.report == whole.path / "report.html"
    assert run.evaluate() == [{k: v for k, v in row.items() if k != "seconds"} for row in run.rows]
    assert "M0, M1, M2, M3" in repr(run)
    shown = run._repr_html_()
    assert all(f"{row['generative_accuracy']:.3f}" in shown for row in run.rows) and "…" not in shown
    with pytest.raises(InputError, match="not a run directory"):
        scir_jax.Run(tmp_path)


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's display; gives what it shows, cell by cell."""
    shown = []

    class Handle:
        def update(self, value):
            shown[-1].append(value._repr_mimebundle_([], [])["text/plain"])

    def display(value, display_id):
        shown.append([])
        Handle().update(value)
        return Handle()

    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["IPython.display"].display = display
    monkeypatch.setattr(console, "stderr", console.Console(force_jupyter=True))
    return shown


def test_bars_of_a_notebook(notebook, monkeypatch):
    now = iter(np.arange(0, 100, 0.4))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage("SFT", 6) as bar:
        for step in range(6):
            bar.advance(f"loss {step}")
    (cell,) = notebook
    assert "0/6" in cell[0] and "SFT" in cell[-1] and "done" in cell[-1]
    counts = [text.split("/6")[0].split()[-1] for text in cell[:-1]]
    assert counts == sorted(set(counts), key=int) and 2 < len(counts) < 7  # not at every step
    assert any("loss" in text for text in cell)


@pytest.mark.slow
def test_the_notebook_runs(whole, tmp_path, monkeypatch, no_page):
    """Every cell up to where something is downloaded; a small run stands in for the quickstart."""
    cells = content(ROOT / "docs" / "quickstart.ipynb")["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), "cell", "exec")
    run = [cell for cell in code if "download" not in cell["metadata"].get("tags", [])]
    assert len(run) >= 5
    monkeypatch.chdir(tmp_path)
    small = whole.file.read_text(encoding="utf-8").replace(str(whole.path), "runs/quickstart")
    Path("quickstart").write_text(small, encoding="utf-8")  # a file comes before a configuration of that name
    names = {}
    for cell in run:
        exec("".join(cell["source"]), names)
    assert [row["model"] for row in names["run"].rows] == ["M1", "M2", "M3"]
    assert len(names["answers"]) == 4
