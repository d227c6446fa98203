"""The figures of a study, as SVG files: curves over iterations, paired differences, what a method costs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scir_jax.report.page import COLOURS, STYLE
from scir_jax.study.tables import TITLES, curve

CURVES = ("quality", "greedy_quality", "distinct", "generative_accuracy", "implicit_accuracy", "agreement")
DIFFERENCES = ("quality", "greedy_quality", "generative_accuracy", "implicit_accuracy", "agreement")
MARKERS = "osD^vP*X"
LINES = ("-", "--", ":")


def write_plots(found: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the figures that a study has enough for: curves.svg, differences.svg, costs.svg.

    Args:
      found: as results.collect makes it, with `tables`.

    Returns:
      The files.
    """
    figures = {"curves": _curves(found), "differences": _differences(found), "costs": _costs(found)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = directory / f"{name}.svg"
            target = io.StringIO()
            with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):  # the same figure is the same file
                figure.savefig(target, format="svg", metadata={"Date": None})
            path.write_text(target.getvalue(), encoding="utf-8")
            written.append(path)
    return written


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "markersize": 4,
    }


def _curves(found: dict[str, Any]) -> Figure | None:
    """Draws the means by iteration, with standard errors."""
    lines = {name: {m: curve(found, m, name) for m in found["methods"]} for name in CURVES}
    lines = {name: {m: points for m, points in of.items() if len(points) > 1} for name, of in lines.items()}
    lines = {name: of for name, of in lines.items() if of}
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        rows = -(-len(lines) // 3)
        figure = Figure(figsize=(11, 3.2 * rows + 0.25 * (1 + len(found["methods"]) // 6)), layout="constrained")
        for place, (name, of) in enumerate(lines.items(), start=1):
            axes = figure.add_subplot(rows, min(3, len(lines)), place)
            for method, points in of.items():
                mean = np.array([mean for mean, _ in points.values()])
                error = np.array([error or 0 for _, error in points.values()])
                style = _style(found["methods"].index(method))
                axes.errorbar(list(points), mean, error, label=method, elinewidth=0.6, **style)
            axes.set_title(TITLES[name])
            axes.set_xlabel("iterations")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6)
    return figure


def _differences(found: dict[str, Any]) -> Figure | None:
    """Draws the paired differences with their intervals, one row per method."""
    rows = [row for row in found["tables"].get(str(found["iterations"]), []) if row.get("differences")]
    names = [name for name in DIFFERENCES if any(name in row["differences"] for row in rows)]
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + 0.28 * len(rows)), layout="constrained")
        axes_of = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(axes_of, names):
            axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
            for place, row in enumerate(rows):
                if (value := row["differences"].get(name)) is None:
                    continue
                if value["interval"]:
                    axes.plot(value["interval"], [place, place], color=COLOURS[0])
                axes.plot([value["mean"]], [place], marker="o", markersize=4, color=COLOURS[0])
            axes.set_title(TITLES[name])
        axes_of[0].set_yticks(range(len(rows)), [f"{row['method']} less {row['against']}" for row in rows])
        axes_of[0].invert_yaxis()
        figure.supxlabel(f"after {found['iterations']} iterations", fontsize=9)
    return figure


def _costs(found: dict[str, Any]) -> Figure | None:
    """Draws the choosing column against the processor seconds of a run."""
    rows = [row for row in found["tables"].get(str(found["iterations"]), []) if row["method"] in found["methods"]]
    rows = [row for row in rows if {found["by"], "processor_seconds"} <= row["columns"].keys()]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            (x, x_error), (y, y_error) = row["columns"]["processor_seconds"], row["columns"][found["by"]]
            style = _style(found["methods"].index(row["method"])) | {"linestyle": "none"}
            axes.errorbar(x, y, y_error or 0, x_error or 0, label=row["method"], elinewidth=0.6, **style)
        axes.set_xlabel(f"processor seconds of a run of {found['iterations']} iterations")
        axes.set_ylabel(TITLES[found["by"]])
        figure.legend(loc="outside right upper")
    return figure
