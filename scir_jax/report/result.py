"""The result of a run in a sentence, and what warns of it."""

from __future__ import annotations

from typing import Any

from scir_jax.report.contents import is_number
from scir_jax.run.choice import agree_on_being_wrong

MEASURES = (
    ("quality", "the quality of answers"),
    ("generative_accuracy", "the generative reward model's accuracy"),
    ("implicit_accuracy", "the implicit one's"),
    ("agreement", "their agreement"),
)
"""column -> what the sentence calls it"""


def sentence(rows: list[dict], best: str | None) -> str | None:
    """Writes the result in a sentence: what changed from M1 to the model that the run exports.

    Args:
      rows: one per evaluated model, M1 first.
      best: name of that model; the last one where it is not known.

    Returns:
      The sentence, None without an evaluated model.
    """
    if not rows:
        return None
    first = rows[0]
    last = next((row for row in rows if row.get("model") == best), rows[-1])
    named = [(title, first.get(key), last.get(key)) for key, title in MEASURES]
    named = [(title, before, float(now)) for title, before, now in named if is_number(now)]
    name = str(last.get("model", "?"))
    if not named:
        return f"{name} has been trained; nothing of it was measured."
    if last is first:
        return f"{name}: {_joined([f'{title} is {now:.3f}' for title, _, now in named])}."
    return f"From {first.get('model', '?')} to {name} {_joined([_change(*measure) for measure in named])}."


def warnings(rows: list[dict]) -> list[str]:
    """Says what a reader of the sentence must not miss."""
    found = []
    for number in range(2, len(rows) + 1):
        if agree_on_being_wrong(rows[:number]):
            before, now = (str(row.get("model", "?")) for row in rows[number - 2 : number])
            found.append(f"{now}'s reward models agree more often and are right less often than those of {before}.")
    return found


def _change(title: str, before: Any, now: float) -> str:
    if not is_number(before):
        return f"{title} came to {now:.3f}"
    old, new = f"{float(before):.3f}", f"{now:.3f}"
    if old == new:
        return f"{title} stayed at {new}"
    return f"{title} {'rose' if now > float(before) else 'fell'} from {old} to {new}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
