"""One self-contained HTML page about a run, finished or not.

    python -m scir_jax.report RUN_DIRECTORY

The page reads only files of the run directory, and makes no request of any kind when it is opened. Responses are
text that a model wrote: every string is escaped, and a content security policy forbids scripts and loading.
"""

import argparse
import html
import io
import math
import os
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scir_jax.bucket import objects
from scir_jax.bucket.working import copy_of, place
from scir_jax.config.names import run_directory
from scir_jax.errors import InputError
from scir_jax.report.contents import (
    MAX_CHARACTERS,
    SEED,
    IterationFiles,
    RunFiles,
    column,
    is_number,
    read_run,
    read_text,
)
from scir_jax.report.costs import costs, shown, whose
from scir_jax.report.result import sentence, warnings
from scir_jax.run.choice import marked
from scir_jax.run.columns import KEYS

MAX_POINTS = 400  # a curve or a scatter with more makes a page that a phone cannot open

# The curves in reading order: figure, what the horizontal axis runs over, panel, columns, level of a dashed line.
PANELS = (
    ("Answers by model", "models", "quality", ("quality", "greedy_quality", "exact"), None),
    ("Answers by model", "models", "win rate", ("win_rate",), 0.5),
    ("Reward models by model", "models", "reward model accuracy", ("generative_accuracy", "implicit_accuracy"), 0.5),
    ("Reward models by model", "models", "agreement and label accuracy", ("agreement", "label_accuracy"), None),
    ("Drift by model", "models", "tokens per answer", ("length",), None),
    ("Drift by model", "models", "entropy of answers", ("entropy",), None),
    ("Drift by model", "models", "divergence from M1", ("kl",), 0),
    ("Drift by model", "models", "ended answers and verdict mass", ("eos_rate", "verdict_mass"), None),
    ("Drift by model", "models", "different answers", ("distinct",), None),
    ("Within the stages", "steps", "on held-out pairs", ("eval/generative_accuracy", "eval/implicit_accuracy"), 0.5),
    ("Within the stages", "steps", "their agreement", ("eval/agreement",), None),
    ("Loss", "sft", "supervised fine-tuning", ("loss",), None),
    ("Loss", "optimise", "optimisation: total and terms", ("loss", "preference", "consistency", "sft"), None),
    ("Agreement and selection", "optimise", "agreement and selected", ("agreement", "selected"), None),
    ("Implicit rewards", "optimise", "rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins"), 0),
    ("Implicit rewards", "optimise", "accuracies", ("rewards/accuracies",), 0.5),
    ("Implicit rewards", "optimise", "log-probabilities", ("logps/chosen", "logps/rejected"), None),
    ("Inside the reward models", "optimise", "slot bias", ("generative/slot_bias",), 0),
    ("Inside the reward models", "optimise", "verdict", ("generative/verdict_mass", "generative/flip_rate"), None),
    ("Inside the reward models", "optimise", "entropy", ("generative/entropy", "implicit/entropy"), None),
    ("Optimiser", "steps", "gradient norm", ("grad_norm",), None),
    ("Optimiser", "steps", "learning rate", ("learning_rate",), None),
    ("Optimiser", "steps", "tokens per second", ("tokens_per_second",), None),
    ("Optimiser", "steps", "model TFLOP/s per device", ("teraflops",), None),
    ("Optimiser", "steps", "places that hold a token", ("filled",), None),
)
OPTIONAL = ("Drift by model", "Within the stages")  # figures that are left out where the run has nothing of them

# Mid-tones that stand out from a white and from a near-black page alike, and from each other for the colour-blind.
COLOURS = ("#3987e5", "#d95926", "#199e70", "#9085e9", "#b8860b", "#d55181")
INK = "#010203"  # stands for currentColor, which matplotlib does not know
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 10, "lines.linewidth": 1.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": 0.6, "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.axisbelow": True, "axes.titlelocation": "left", "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}  # fmt: skip


@dataclass
class Plot:
    """A figure of the page: panels side by side; its legend sentence is in the template, under `kind`."""

    kind: str
    title: str
    panels: list[Markup] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # columns without a value


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Makes at most MAX_POINTS points: means of neighbours, so that no region of a long run is hidden by chance."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= MAX_POINTS:
        return x, y
    return tuple(np.array([part.mean() for part in np.array_split(values, MAX_POINTS)]) for values in (x, y))


def show(value: object) -> str:
    """Writes a value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, list):
        return ", ".join(show(item) for item in value)
    return str(value)


def show_label(value: Any) -> str:
    """Writes a label as the response that it prefers, with its weight where it is soft."""
    if not is_number(value):
        return "–"
    side = "A" if value > 0.5 else "B" if value < 0.5 else "neither"
    return side if value in (0, 0.5, 1) else f"{side} ({float(value):.2f})"


def generative(decision: dict) -> float:
    """Returns p_generative of a decision, the mean of its templates; nan where there is none."""
    values = decision.get("p_generative")
    values = [v for v in (values if isinstance(values, list) else [values]) if is_number(v)]
    return sum(values) / len(values) if values else math.nan


def panel(title: str, draw, size: tuple[float, float] = (3.9, 2.8)) -> Markup:
    """Makes one SVG drawn by `draw(axes)`, in the page's own text colour and font, with nothing outside it."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # the salt keeps ids of different panels apart
        figure = Figure(figsize=size, dpi=72, layout="constrained")  # the dots of SVG
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        labels = sorted(axes.get_legend_handles_labels()[1], key=len)
        if labels and labels != [title.replace(" ", "_")]:
            figure.legend(loc="outside lower left", ncols=2 if len("".join(labels[-2:])) < 40 else 1)
        # Laid out once: saving would draw the whole figure for it, and then again.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        target = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and they repeat from panel to panel
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))


def curves(title: str, x: np.ndarray, series: dict[str, np.ndarray], marks=(), level=None, models=()) -> Markup:
    """Makes a panel of curves over steps or, where `models` names them, over models.

    Args:
      series: label -> values.
      marks: places of vertical lines.
      level: height of a dashed line.
    """

    def draw(axes):
        for mark in marks:
            axes.axvline(mark, color=INK, alpha=0.6, linewidth=1, linestyle=":")
        if level is not None:
            axes.axhline(level, color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        for name, y in series.items():
            points_x, points_y = thin(x, y)
            few = bool(models) or len(points_x) < 12  # a single point makes no line
            axes.plot(points_x, points_y, label=name, marker="o" if few else None, markersize=4)
        if models:
            axes.set_xticks(range(len(models)), models)
            axes.set_xlim(-0.3, len(models) - 0.7)
        else:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return panel(title, draw)


def curve_plots(run: RunFiles) -> list[Plot]:
    """Makes the figures of PANELS; columns without a value are named instead of drawn."""
    records = {
        "models": run.rows,
        "steps": run.metrics,
        "sft": [m for m in run.metrics if m.get("stage") == "sft"],
        "optimise": [m for m in run.metrics if m.get("stage") != "sft"],
    }
    models = [str(row.get("model", "?"))[:16] for row in run.rows]
    starts = [b["step"] for a, b in zip(run.metrics, run.metrics[1:]) if a.get("iteration") != b.get("iteration")]
    plots = {}
    for figure, over, title, names, level in PANELS:
        by_model = over == "models"
        plot = plots.setdefault(figure, Plot(figure, figure))
        series = {name: column(records[over], name) for name in names}
        present = {name: y for name, y in series.items() if np.isfinite(y).any()}
        plot.absent += [name for name in names if name not in present] if present else [title]
        if not present:
            continue
        x = np.arange(len(models), dtype=float) if by_model else column(records[over], "step")
        marks = [] if by_model else [step for step in starts if x[0] < step <= x[-1]]
        plot.panels.append(curves(title, x, present, marks, level, models if by_model else ()))
    return [plot for name, plot in plots.items() if plot.panels or name not in OPTIONAL]


def length_plot(iterations: list[IterationFiles]) -> Plot | None:
    """Makes the distribution of response lengths, one outline per iteration; None without responses."""
    sampled = [it for it in iterations if it.lengths]
    if not sampled:
        return None
    low, high = min(min(it.lengths) for it in sampled), max(max(it.lengths) for it in sampled)
    width = math.ceil((high - low + 1) / 30)
    bins = np.arange(low, high + 2 + width, width) - 0.5

    def draw(axes):
        for it in sampled:
            name = f"iteration {it.number}: {len(it.lengths):,}, {it.cut / len(it.lengths):.0%} cut"
            weights = np.full(len(it.lengths), 1 / len(it.lengths))
            axes.hist(it.lengths, bins=bins, weights=weights, histtype="step", linewidth=1.6, label=name)
        axes.set_xlabel("tokens")

    return Plot("Response lengths", "Response lengths", [panel("lengths", draw)])


def kind_of(decision: dict) -> str:
    """Says how a decision is marked in a scatter."""
    if not decision.get("agreed"):
        return "not agreed"
    return "selected" if decision.get("selected") else "agreed, not selected"


def scatter_plot(iteration: IterationFiles) -> Plot | None:
    """Plots p_generative against p_implicit, at the first and at the last decision about every pair."""
    if not iteration.first:
        return None
    plot = Plot("Reward models by pair", f"Iteration {iteration.number}: the two reward models")
    order = sorted(iteration.first)
    random.Random(SEED).shuffle(order)
    rounds = {"first decisions": iteration.first, "last decisions": iteration.last}
    if iteration.first == iteration.last:
        rounds = {"decisions (one per pair)": iteration.first}
    looks = {
        "not agreed": dict(marker="x", color=COLOURS[1]),
        "agreed, not selected": dict(marker="o", edgecolors=COLOURS[0], facecolors="none"),
        "selected": dict(marker="o", color=COLOURS[0], linewidths=0),
    }
    for name, decisions in rounds.items():
        shown = [decisions[pair] for pair in order[:MAX_POINTS]]
        shown = [d for d in shown if is_number(d.get("p_implicit")) and is_number(generative(d))]
        if not shown:
            plot.absent.append(f"both probabilities in the {name}")
            continue

        def draw(axes, shown=shown):
            axes.axvline(0.5, color=INK, alpha=0.5, linewidth=0.8)
            axes.axhline(0.5, color=INK, alpha=0.5, linewidth=0.8)
            for kind, look in looks.items():
                group = [d for d in shown if kind_of(d) == kind]
                x, y = [generative(d) for d in group], [d["p_implicit"] for d in group]
                axes.scatter(x, y, s=16, alpha=0.75, label=f"{kind}: {len(group)}", **look)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="p_generative", ylabel="p_implicit", aspect="equal")

        plot.panels.append(panel(f"iteration {iteration.number}: {name}", draw, size=(3.9, 4.1)))
    return plot


def pair_rows(iteration: IterationFiles) -> list[dict]:
    """Returns the sampled pairs with their last decisions, as strings."""
    rows = []
    for pair in iteration.pairs:
        decision = iteration.last.get(pair["pair"], {})
        row = {name: show(decision.get(name)) for name in ("p_generative", "p_implicit", "agreed", "selected")}
        row["label"] = show_label(decision.get("label"))
        for name in ("pair", "prompt", "response_a", "response_b"):
            text = show(pair.get(name))
            row[name] = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … [cut]"
        rows.append(row)
    return rows


def table_of(rows: list[dict], known: bool) -> tuple[list[str], list[list[str]]]:
    """Makes the table of models: its columns that have a value in some row, and its cells.

    Args:
      known: the columns of the table at the end of a run; else the others that evaluations have.
    """
    others = dict.fromkeys(name for row in rows for name in row if name not in ("model", *KEYS))
    names = [name for name in (KEYS if known else others) if any(row.get(name) is not None for row in rows)]
    return names, [[show(row.get("model"))] + [show(row.get(name)) for name in names] for row in rows]


def write_report(run_directory: Path) -> Path:
    """Writes `report.html` into the run directory and returns its path; an older one is replaced whole.

    Raises:
      InputError: the directory has neither metrics nor an evaluation.
    """
    run_directory = Path(run_directory)
    run = read_run(run_directory)
    names, table = table_of(run.rows, known=True)
    more, more_table = table_of(run.rows, known=False)
    sources = {name: run_directory / name for name in ("config.yaml", "manifest.json")}
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = template.get_template("report.html.jinja").render(
        name=run_directory.resolve().name,
        notices=run.notices,
        last=run.metrics[-1] if run.metrics else None,
        skipped=int(np.nansum(column(run.metrics, "skipped"))),
        result=sentence(run.rows, run.best),
        warnings=warnings(run.rows),
        best=marked(run.rows, run.best, run.select),
        select=run.select,
        names=names,
        table=table,
        more=more,
        more_table=more_table,
        costs=shown(costs(run)),
        memory_of=whose(run),
        curves=curve_plots(run),
        lengths=length_plot(run.iterations),
        iterations=[(it.number, scatter_plot(it), pair_rows(it)) for it in run.iterations if it.number],
        files={name: read_text(path) for name, path in sources.items()},
    )
    target = run_directory / "report.html"
    temporary = run_directory / f".report.html.{os.getpid()}"
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # JSON can hold lone surrogates
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scir_jax.report",
        description="Write RUN_DIRECTORY/report.html: headline table, curves, lengths and sampled pairs of a run.",
        epilog="The run may be unfinished: the page says what is not there.",
    )
    parser.add_argument("run_directory", help="directory that a training run writes, or NAME for runs/NAME")
    try:
        path = place(run_directory(parser.parse_args(arguments).run_directory))
        report = write_report(path)
        if copy := copy_of(path):
            copy.push()
        print(objects.shown(report))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
