"""The report of small synthetic run directories."""

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from scir_jax.errors import InputError
from scir_jax.report import page as page_module
from scir_jax.report.contents import read_run, sample_pairs
from scir_jax.report.page import MAX_POINTS, main, show_label, thin, write_report
from scir_jax.run.counts import FIELDS

pytestmark = pytest.mark.usefixtures("drawn")

HOSTILE = "</div><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> $\\frac{ \ud800 & \"'"
GRADED = ("quality", "exact", "greedy_quality", "label_accuracy")
# What a step without judge rows does not know.
JUDGED = {"p_generative", "agreed", "agreement", "consistency"}


def write_json_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def unjudged(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in JUDGED and not name.startswith("generative/")}


def metrics(sft: int, steps: int, iterations: int, source: random.Random) -> list[dict]:
    lines = []
    for step in range(sft):
        loss = 3 * math.exp(-step / 30) + 0.5 + source.gauss(0, 0.05)
        lines.append({"step": step, "stage": "sft", "iteration": 0, "loss": loss, "grad_norm": 1 + source.random(),
                      "learning_rate": 1e-3, "tokens_per_second": 9000.0, "teraflops": 0.1, "tokens": 900.0,
                      "filled": 0.6})  # fmt: skip
    for step in range(sft, sft + steps * iterations):
        iteration = 1 + (step - sft) // steps
        gain = (step - sft) / (steps * iterations)
        noise = source.gauss(0, 0.05)
        lines.append({
            "step": step, "stage": "optimise", "iteration": iteration, "loss": 1.2 - 0.5 * gain + noise,
            "preference": None if step % 17 == 0 else 0.69 - 0.3 * gain + noise,
            "consistency": 0.4 - 0.2 * gain + noise, "sft": 0.11,
            "agreement": 0.6 + 0.3 * gain + noise, "selected": 0.5 + 0.3 * gain + noise,
            "rewards/margins": gain, "rewards/accuracies": 0.5 + 0.4 * gain + noise, "rewards/chosen": gain / 2,
            "rewards/rejected": -gain / 2, "logps/chosen": -20 - gain, "logps/rejected": -21 - 3 * gain,
            "generative/slot_bias": 0.4 - 0.5 * gain, "generative/flip_rate": 0.3 - 0.2 * gain,
            "generative/verdict_mass": 0.95, "generative/entropy": 0.6 - 0.2 * gain,
            "implicit/entropy": 0.69 - 0.4 * gain, "grad_norm": 0.5, "learning_rate": 1e-4 * (1 - gain),
            "skipped": int(step == sft + 3), "tokens_per_second": 5e3, "teraflops": 0.1, "tokens": 500.0,
            "filled": 0.5 if step % 2 else 1.0,
        })  # fmt: skip
    return lines


def make_run(
    root: Path,
    iterations: int = 2,
    graded: bool = True,
    judged: bool = True,
    text: str = "Sort: fig",
    steps: int = 30,
) -> Path:
    """A finished run as the training command leaves it; not `judged`: its method asks no judge in a step."""
    known = dict if judged else unjudged
    source = random.Random(7)
    run = root / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: demo\nconsistency:\n  kind: js\n  note: {text!r}\n")
    (run / "manifest.json").write_text(json.dumps({"seed": 0, "versions": {"jax": "0.7"}}))
    write_json_lines(run / "metrics.jsonl", [known(row) for row in metrics(20, steps, iterations, source)])
    rows = []
    for number in range(iterations + 1):
        folder = run / f"iteration_{number:02d}"
        folder.mkdir()
        row = {"model": f"M{number + 1}", "quality": 0.4 + 0.1 * number, "exact": 0.2 + 0.1 * number,
               "greedy_quality": 0.45 + 0.1 * number, "win_rate": 0.5 + 0.1 * number if number else None,
               "generative_accuracy": 0.7 + 0.05 * number, "implicit_accuracy": 0.55 + 0.1 * number,
               "agreement": 0.6 + 0.12 * number, "selected": 0.6, "label_accuracy": 0.8 + 0.01 * number,
               "length": 12.25 + number, "eos_rate": 0.98, "distinct": 0.8, "seconds": 3.5, "verdict_mass": 0.95,
               "entropy": 0.5 - 0.1 * number, "kl": 1.5 * number if number else None}  # fmt: skip
        rows.append({name: value for name, value in row.items() if graded or name not in GRADED})
        (folder / "evaluation.json").write_text(json.dumps(rows[-1]))
        stages = {"sample": 2.0, "score": 1.0, "optimise": 20.0} if number else {"start": 0.5, "sft": 30.0}
        (folder / "seconds.json").write_text(json.dumps({**stages, "evaluate": 3.5}))
        none = dict.fromkeys(FIELDS, 0)
        spent = {"optimise": none | {"trained_judge": 3000, "flops": 6 * 10**11}} if number else {}
        spent = spent or {"sft": none | {"trained_replay": 18_000, "flops": 1234 * 10**12}}
        (folder / "costs.json").write_text(json.dumps(spent))
        peaks = {name: {"bytes": (1.5 + number / 2) * 2**30, "of": "process"} for name in spent}
        (folder / "memory.json").write_text(json.dumps(peaks))
        if not number:
            continue
        pairs, decisions, responses = [], [], []
        for pair in range(60):
            pairs.append({"pair": pair, "prompt": f"{text} {pair}", "response_a": f"apple fig\n{text}",
                          "response_b": "fig", "length_a": 5, "length_b": 2})  # fmt: skip
            for epoch in range(2):
                lean = source.gauss(0, 1.5)
                p, q = (1 / (1 + math.exp(-lean * (1 + epoch) - source.gauss(0, 1.5 - epoch))) for _ in range(2))
                agreed = (p > 0.5) == (q > 0.5)
                decisions.append({"step": 20 + epoch, "pair": pair, "p_generative": [p, p**1.1], "p_implicit": q,
                                  "agreed": agreed, "selected": agreed and abs(q - 0.5) > 0.1,
                                  "label": int(p > 0.5)})  # fmt: skip
            length = max(1, round(source.gauss(12 + number, 4)))
            responses.append({"prompt": text, "response": "fig", "stop": "length" if length > 17 else "eos",
                              "logprob": -3.0, "response_ids": list(range(length))})  # fmt: skip
        write_json_lines(folder / "pairs.jsonl", pairs)
        write_json_lines(folder / "decisions.jsonl", [known(decision) for decision in decisions])
        write_json_lines(folder / "responses.jsonl", responses)
    (run / "summary.json").write_text(json.dumps({"rows": rows}))
    return run


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser would take them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(path.read_text())
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in ("meta", "li", "dt", "dd"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag):
        if tag not in ("li", "dt", "dd"):
            assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("hostile"), text=HOSTILE)
    evaluation = run / "iteration_02" / "evaluation.json"
    row = json.loads(evaluation.read_text()) | {"model": "<b>$x_$ -->", HOSTILE: 1.0, "list": [HOSTILE]}
    evaluation.write_text(json.dumps(row))
    return write_report(run)


def test_full_run_shows_every_part(plain):
    page = Page(plain)
    for words in ("M1", "M3", "generative accuracy", "label accuracy", "slot bias", "first decisions",
                  "last decisions", "Iteration 2: 20 sampled pairs", "config.yaml", "1 step skipped",
                  "Last step 79"):  # fmt: skip
        assert words in page.text
    assert "Agreement alone is no success" in page.text
    assert "not there:" not in page.text.lower() and "What is not there" not in page.text
    assert page.tags.count("svg") == 28
    assert [path.name for path in plain.parent.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of a page's time."""
    monkeypatch.setattr(page_module, "panel", lambda *_, **__: Markup("<svg></svg>"))


def cells(path: Path, table: str) -> list[list[str]]:
    """The rows of the first table of a class."""
    found = re.search(rf'<table class="{table}">(.*?)</table>', path.read_text(), re.DOTALL).group(1)
    rows = re.findall(r"<tr.*?>(.*?)</tr>", found, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_the_result_stands_first_in_one_sentence(plain, tmp_path, no_figures):
    text = Page(plain).text
    result = (
        "From M1 to M3 the quality of answers rose from 0.400 to 0.600, the generative reward model's accuracy rose "
        "from 0.700 to 0.800, the implicit one's rose from 0.550 to 0.750, and their agreement rose from 0.600 to "
        "0.840."
    )
    assert text.index(result) < text.index("Models")
    assert "right less often" not in text
    run = make_run(tmp_path)
    for number, changes in ((1, {"generative_accuracy": 0.6, "implicit_accuracy": 0.5}), (2, {"quality": 0.4})):
        path = run / f"iteration_{number:02d}" / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    text = Page(write_report(run)).text
    assert "the quality of answers stayed at 0.400" in text
    assert "M2's reward models agree more often and are right less often than those of M1." in text
    assert "M3's reward models agree more" not in text


def test_the_chosen_model_is_marked(tmp_path, plain, no_figures):
    run = make_run(tmp_path)
    summary = run / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"best": "M2", "select": "win_rate"}))
    page = write_report(run)
    assert [row[0] for row in cells(page, "headline")] == ["model", "M1", "M2 ★", "M3"]
    text = Page(page).text
    assert "M2 is the best one by win rate, and was exported." in text and "From M1 to M2 the quality" in text
    assert "★" not in Page(plain).text
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"select": "last"}))
    text = Page(write_report(run)).text
    assert "M2 is the last one before the reward models began to agree on being wrong, and was exported." in text


def test_the_cost_of_each_stage(plain, tmp_path, no_figures):
    """Of 30 steps with 500 tokens each half have 500 places and half 1,000: a third of them is padding."""
    rows = cells(plain, "costs")
    assert rows[0][:5] == ["iteration", "stage", "seconds", "generated", "scored"]
    by_stage = {(row[0], row[1]): dict(zip(rows[0], row)) for row in rows[1:]}
    unknown = dict.fromkeys(rows[0][3:], "–")
    head = {"iteration": "0", "stage": "supervised fine-tuning", "seconds": "30.0"}
    assert by_stage["0", "supervised fine-tuning"] == {
        **unknown, **head, "trained: policy": "0", "judge": "0", "replay": "18,000", "generated": "0", "scored": "0",
        "judged": "0", "TFLOP": "1,234", "peak GiB": "1.5", "padding": "40%",
    }  # fmt: skip
    optimised = by_stage["2", "optimisation"]
    assert (optimised["padding"], optimised["seconds"], optimised["judge"]) == ("33%", "20.0", "3,000")
    # A stage of an older version has its seconds alone.
    assert by_stage["0", "import of M0"] == {
        **unknown, "iteration": "0", "stage": "import of M0", "seconds": "0.5"
    }  # fmt: skip
    whole = dict(zip(rows[0], rows[-1]))
    assert len(rows) == 1 + 3 + 4 + 4 + 1 and whole["stage"] == "all stages" and whole["seconds"] == "87.0"
    assert (whole["replay"], whole["judge"], whole["TFLOP"]) == ("18,000", "6,000", "1,235")
    assert whole["peak GiB"] == "2.5" and "resident memory" in Page(plain).text
    seconds = cells(plain, "headline")[0].index("seconds")
    assert [row[seconds] for row in cells(plain, "headline")[1:]] == ["34.0", "26.5", "26.5"]
    run = make_run(tmp_path)
    (run / "iteration_01" / "costs.json").write_text('{"optimise": 3}')
    (run / "iteration_01" / "memory.json").write_text('{"optimise": {"bytes": "many"}}')
    assert cells(write_report(run), "costs")[6][3:] == ["–"] * 8 + ["33%"]


def test_evaluations_within_stages_have_a_figure(tmp_path, plain, no_figures):
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = {"eval/generative_accuracy": 0.7, "eval/implicit_accuracy": 0.6, "eval/agreement": 0.8}
    write_json_lines(run / "metrics.jsonl", [row | (looks if row["step"] % 10 == 0 else {}) for row in rows])
    page = Page(write_report(run))
    assert page.tags.count("svg") == 28 + 2 and "Within the stages" in page.text
    assert "Within the stages" not in Page(plain).text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 768, 1280)
FRAMES = """<!doctype html><body></body><script>
Promise.all([{widths}].map(width => new Promise(done => {{
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${{width}}px;height:800px;border:0`;
  frame.onload = () => {{
    const page = frame.contentDocument, table = page.querySelector(".headline"), first = table.querySelector("td");
    const left = first.getBoundingClientRect().left;
    table.parentElement.scrollLeft = 200;
    const box = page.querySelector(".result").getBoundingClientRect();
    done([width, page.documentElement.scrollWidth, box.bottom < 800, table.scrollWidth > table.parentElement.clientWidth,
          first.getBoundingClientRect().left === left, page.querySelectorAll("svg").length]);
  }};
  frame.src = "report.html";
  document.body.append(frame);
}}))).then(found => {{ document.body.innerHTML = `<pre>${{JSON.stringify(found)}}</pre>`; }});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_opens_it_at_the_widths_of_phones_and_desks(plain, tmp_path):
    """Nothing is wider than the window; a table that is scrolls with its first column fixed; the result is in sight."""
    shutil.copy(plain, tmp_path / "report.html")
    (tmp_path / "frames.html").write_text(FRAMES.format(widths=", ".join(map(str, WIDTHS))))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--timeout=20000")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *flags, profile, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<pre>(\[\[.*\]\])</pre>", dom).group(1))
    assert [(width, wide <= width, result, fixed, svgs) for width, wide, result, _, fixed, svgs in found] == [
        (width, True, True, True, 23) for width in WIDTHS
    ]
    assert [scrolls for _, _, _, scrolls, _, _ in found] == [True, True, False]


def test_unfinished_run_says_what_is_not_there(tmp_path, no_figures):
    run = make_run(tmp_path)
    (run / "summary.json").unlink()
    (run / "manifest.json").unlink()
    for name in ("evaluation.json", "decisions.jsonl"):
        (run / "iteration_02" / name).unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 80, "stage": "opt')
    page = Page(write_report(run))
    assert "the run has not finished" in page.text
    assert "iteration_02: evaluation.json, decisions.jsonl not there." in page.text
    assert "demo/metrics.jsonl: 1 unreadable line was left out." in page.text
    assert "Iteration 2: no decisions are there." in page.text
    assert "Iteration 2: 20 sampled pairs" in page.text
    assert "manifest.json is not there." in page.text
    assert "2 models evaluated" in page.text and "Last step 79" in page.text


def test_run_in_its_first_steps(tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    write_json_lines(run / "metrics.jsonl", metrics(1, 0, 0, random.Random(0)))
    page = Page(write_report(run))
    assert "No model has been evaluated yet" in page.text
    assert "Implicit rewards: no values are there." in page.text
    assert "Not there: optimisation: total and terms." in page.text
    assert "No iteration has made pairs yet." in page.text


def test_evaluations_without_metrics(tmp_path, no_figures):
    run = make_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert "no curves over steps" in Page(write_report(run)).text


def test_run_without_grader_has_no_quality_columns(tmp_path, no_figures):
    run = make_run(tmp_path, graded=False)
    page = Page(write_report(run))
    assert "Not in any evaluation: quality, exact, greedy_quality, label_accuracy. The run has no grader's" in page.text
    head = re.search(r'class="headline">.*?</thead>', (run / "report.html").read_text(), re.DOTALL).group()
    assert "quality" not in head and "win rate" in head
    assert "Not there: label_accuracy." in page.text


def test_a_method_that_asks_no_judge_in_the_step(tmp_path, plain):
    """Its decisions have neither p_generative nor agreed, its steps no agreement; all else is on the page."""
    run = make_run(tmp_path, judged=False)
    page, whole = Page(write_report(run)), Page(plain)
    for iteration in (1, 2):
        assert f"Iteration {iteration}: 20 sampled pairs" in page.text
        assert f"Iteration {iteration}: no decisions are there." not in page.text
        assert f"Iteration {iteration}: the two reward models: no values are there." in page.text
    for name in ("agreement", "consistency", "slot bias", "verdict", "generative/entropy"):
        assert re.search(rf"Not there: [^.]*\b{name}\b", page.text), name
    # The scatters, the slot bias and the verdict's panel are all that is gone.
    assert page.tags.count("svg") == whole.tags.count("svg") - 2 * 2 - 2
    assert set(page.tags) == {*whole.tags, "span"} and "generative accuracy" in page.text
    html = (run / "report.html").read_text()
    cells = re.findall(r'data-label="(p generative|p implicit|agreed|selected)">(.*?)</td>', html)
    assert {value for label, value in cells if label in ("p generative", "agreed")} == {"–"}
    assert {value for label, value in cells if label == "selected"} == {"yes", "no"}
    assert all(0 <= float(value) <= 1 for label, value in cells if label == "p implicit")


def test_hostile_text_is_text(plain, hostile):
    plain, hostile = Page(plain), Page(hostile)
    assert "script" not in hostile.tags and "img" not in hostile.tags and "b" not in hostile.tags
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count("<script>alert(1)</script>") > 20
    assert set(hostile.tags) == set(plain.tags)


def test_page_is_self_contained(hostile):
    page = Page(hostile)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert links and all(value.startswith("#") for value in links)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not [value for _, value in page.attributes if "url(" in value and "url(#" not in value]
    assert "@import" not in page.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_ids_are_unique_and_references_resolve(plain):
    page = Page(plain)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name == "href"}
    used |= {found for _, value in page.attributes for found in re.findall(r"url\(#(.*?)\)", value)}
    assert used <= set(ids)


def test_report_is_deterministic_and_replaces_the_old_one(tmp_path, plain):
    run = make_run(tmp_path)
    (run / "report.html").write_text("old")
    assert write_report(run).read_bytes() == plain.read_bytes()


def test_odd_values_do_not_stop_it(tmp_path):
    run = make_run(tmp_path)
    write_json_lines(run / "iteration_01" / "decisions.jsonl", [
        {"pair": 1, "p_generative": None, "p_implicit": None}, {"pair": "x"}, {"pair": []},
        {"pair": 2, "p_generative": 0.3, "p_implicit": 0.4},
        {"pair": 900, "p_generative": [], "p_implicit": 10**400, "label": 0.7},
    ])  # fmt: skip
    with (run / "iteration_01" / "pairs.jsonl").open("a") as lines:
        lines.write('[1]\n{"pair": 61}\n{"pair": [2]}\n')
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 80, "stage": "optimise", "loss": NaN, "iteration": 2}\n{"no": "step"}\n')
    (run / "iteration_01" / "evaluation.json").write_text("{")
    page = Page(write_report(run))
    assert "iteration_01/evaluation.json cannot be read." in page.text
    assert "iteration_01/pairs.jsonl: 1 unreadable line was left out." in page.text


@pytest.mark.parametrize("found", ["no directory", "empty directory", "empty metrics"])
def test_nothing_to_report_is_one_sentence_and_status_two(tmp_path, capsys, found):
    if found != "no directory":
        (tmp_path / "run").mkdir()
    if found == "empty metrics":
        (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(InputError):
        read_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_command_prints_the_path(tmp_path, capsys, no_figures):
    run = make_run(tmp_path)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_sample_mixes_agreed_and_not():
    decisions = {pair: {"agreed": pair % 10 != 0} for pair in range(200)}
    chosen = sample_pairs(list(range(300)), decisions, random.Random(0))
    assert len(chosen) == len(set(chosen)) == 20
    assert sum(decisions[pair]["agreed"] for pair in chosen) == 10
    assert len(sample_pairs([1, 2, 3], {}, random.Random(0))) == 3


def test_long_curves_are_thinned_and_labels_are_named():
    x, y = thin(np.arange(10_000.0), np.where(np.arange(10_000) % 3 == 0, np.nan, 1.0))
    assert len(x) == len(y) == MAX_POINTS and (y == 1).all()
    assert [show_label(v) for v in (1, 0, 0.75, 0.5, None)] == ["A", "B", "A (0.75)", "neither", "–"]
