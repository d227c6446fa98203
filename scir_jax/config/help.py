"""The help of a command: one screen of what matters, or every setting."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection

from scir_jax.config.names import SHORT

WIDTH = 100
COLUMN = 31
LINES = 40
"""of the first screen, at the most"""
_TEXT = ("text.max_prompt_tokens", "text.max_response_tokens", "text.chat_template_kwargs")
_JUDGE = ("generative.templates", "generative.quote_thinking")
_DEVICE = ("model.dtype", "lora.adapter", "evaluate.batch_size", "mesh.fsdp", "run.distributed")
_SAMPLE = ("sample.prompts", "sample.responses", "sample.temperature", "sample.top_p", "sample.batch_size")
_METHOD = (
    *("text.max_prompt_tokens", "text.max_response_tokens", "sample.responses", "sample.temperature"),
    *("generative.templates", "implicit.reference", "lora.rank", "optimise.learning_rate", "optimise.batch_size"),
    *("training.accumulate", "model.dtype", "mesh.fsdp"),
)
_RUN = ("model", "prompts", "run", "iterations", "ift", "eft", "heldout_prompts", "heldout_pairs", "auto")
_WORLD = ("directory", "seed", "steps", "documents", "comparisons", "learning_rate")
SCREENS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (_RUN, ("run.until", "run.start_from", *_METHOD, "evaluate.grader")),
    "plan": (("model", "ift", "eft", "heldout_prompts", "heldout_pairs", "auto"), _METHOD),
    "doctor": (_RUN, _METHOD),
    "sample": (("model", "prompts", "auto"), (*_SAMPLE, *_TEXT, *_DEVICE, "run.seed")),
    "judge": (("model", "auto"), (*_JUDGE, *_TEXT, *_DEVICE, "implicit.beta", "implicit.length")),
    "evaluate": (
        ("model", "heldout_prompts", "heldout_pairs"),
        (*_JUDGE, *_TEXT, *_DEVICE, "evaluate.samples", "evaluate.grader", "sample.temperature"),
    ),
    "world": ((), tuple(f"world.{name}" for name in _WORLD)),
}
"""command -> the short names and the settings on its first screen"""


def screen(parser: argparse.ArgumentParser, description: str, own: Collection[str], known: Collection[str]) -> str:
    """Writes the help that fits on one screen.

    Args:
      parser: knows all options with their help and defaults.
      own: the command's own options.
      known: the settings that it reads, by dotted key.
    """
    command = parser.prog.rpartition(".")[2]
    names, matter = SCREENS.get(command, ((), ()))
    actions = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    short = {name: SHORT[name] for name in names if SHORT[name][0] in known and name not in own}
    needed = [f"--{name} {_value(actions[name])}" for name in own if actions[name].required]
    mains = [f"--{name} {short[name][1]}" for name in ("model", "prompts") if name in short]
    lines = [f"usage: {' '.join([parser.prog, *mains, *needed])} [options]", ""]
    for text in description.strip().removeprefix(f"{parser.prog}: ").split("\n"):
        lines += textwrap.wrap(text, WIDTH) or [""]
    lines.append("")
    entries = []
    for name, (key, value) in short.items():
        default = "" if name in ("run", "model") or key.startswith("data.") else _default(actions[key])
        where = "NAME for runs/NAME, or a directory, " if name == "run" else ""
        entries.append((f"--{name} {value}", f"{where}{actions[key].help}", default))
    for name in (*own, "config", *(key for key in matter if key in known)):
        action = actions[name]
        entries.append((f"--{name} {_value(action)}".rstrip(), action.help or "", _default(action)))
    count = sum("." in name for name in actions)
    end = [
        "",
        f"--help all lists every one of the {count} settings. All of them may stand in a YAML file for --config.",
    ]
    whole = [line for entry in entries for line in _entry(*entry)]
    if len(lines) + len(whole) + len(end) > LINES:
        whole = [_shortened(*entry) for entry in entries]
    return "\n".join([*lines, *whole, *end])


def _value(action: argparse.Action) -> str:
    name = action.dest.rpartition(".")[2]
    return {"output": "FILE", "input": "FILE", "config": "FILE|NAME", "reference": "DIR"}.get(name, "")


def _default(action: argparse.Action) -> str:
    value = action.default
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()
    return "" if value in (None, False, argparse.SUPPRESS, {}) or action.required else f" ({shown})"


def _entry(option: str, text: str, default: str) -> list[str]:
    """Writes an option with all of its help."""
    left = f"  {option:<{COLUMN - 3}} "
    lines = textwrap.wrap(" ".join(text.split()) + default, WIDTH - COLUMN) or [""]
    return [left + lines[0], *(" " * COLUMN + line for line in lines[1:])]


def _shortened(option: str, text: str, default: str) -> str:
    """Writes an option with its help in one line, cut at a word where it is longer."""
    left = f"  {option:<{COLUMN - 3}} "
    return (
        left + textwrap.shorten(" ".join(text.split()), WIDTH - len(left) - len(default), placeholder=" ...") + default
    )
