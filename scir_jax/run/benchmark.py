"""A model's reward models on RewardBench's rows: every answer of a row gets a reward from each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.data.records import Choices
from scir_jax.data.tally import Tally
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.evaluation import rewardbench
from scir_jax.evaluation.rewardbench import Scored
from scir_jax.run import scoring
from scir_jax.run.evaluation import reward_logits

_TIES_ID = re.compile(r"(ref|tied):\d+")


class Question(NamedTuple):
    """A row: a prompt and its answers, the right ones first."""

    prompt: Prompt
    answers: tuple[Answer, ...]
    right: int
    subset: str
    id: str
    row: dict[str, Any]


def version(rows: Sequence[Choices]) -> int:
    """Returns the benchmark's version, 2 where rows list several answers.

    Raises:
      InputError: some rows do, and some do not.
    """
    several = {choices.several for choices in rows}
    if len(several) > 1:
        first = next(c for c in rows if c.several != rows[0].several)
        raise InputError(f"{first.where}: rows of both versions of RewardBench in one file; give one file per version")
    return 2 if several == {True} else 1


def questions(encoder: Encoder, rows: Sequence[Choices], tally: Tally) -> list[Question]:
    """Encodes a benchmark's rows.

    Raises:
      InputError: a row is not one of the benchmark's, and bad rows are not skipped, or no row is left.
    """
    found: list[Question] = []
    ids: set[str] = set()
    for choices in rows:
        with tally.row(choices.where):
            subset, id = _subset(choices), str(choices.row.get("id", ""))
            ties = choices.several and rewardbench.is_ties(subset)
            if ties:
                _check_ties(choices, id, ids)
            prompt = encoder.prompt(choices.messages, choices.where)
            if prompt is None:
                tally.leave_out("prompt longer than text.max_prompt_tokens")
                continue
            answers = tuple(encoder.answer(text) for text in (*choices.right, *choices.wrong))
            if ties:
                ids.add(id)
            found.append(Question(prompt, answers, len(choices.right), subset, id, choices.row))
    tally.finish(len(found))
    if ids and not {f"tied{id[3:]}" for id in ids if id.startswith("ref")} & ids:
        raise InputError(
            f"{tally.path}: the subset of ties has no prompt both as ref:N and as tied:N; its score needs both"
        )
    return found


def rewards(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    items: Sequence[Question],
    *,
    model: Callable[[], Any],
    reference: Callable[[], Any] | None,
    advance: scoring.Advance = scoring.nothing,
) -> dict[str, list[np.ndarray]]:
    """Computes a reward for every answer.

    The generative reward is the mean logit against the row's other answers, both orders of each pair and all templates;
    the implicit one the log-ratio as `implicit` says, up to a constant per row; the consensus their sum, the generative
    one times (n - 1) / n for n answers: if z_ij = s_i - s_j, the rewards differ by z_ij, whatever n is.

    Args:
      model, reference: give parameters when called; without a reference there is the generative reward alone.
      advance: is told how many answers are scored and how many pairs judged; `count` has the total.

    Returns:
      reward model -> [answers] float64 of each row.
    """
    found: dict[str, list[np.ndarray]] = {"generative": []}
    sizes = [len(question.answers) for question in items]
    flat = [(question.prompt, answer) for question in items for answer in question.answers]
    logps = {}
    if reference is not None:
        logps["reference"] = scoring.score_answers(encoder, programs, reference(), flat, advance)["logps"]
    params = model()
    if reference is not None:
        logps["model"] = scoring.score_answers(encoder, programs, params, flat, advance)["logps"]
    pairs = [Pair(q.prompt, a, b) for q in items for a, b in combinations(q.answers, 2)]
    judged = scoring.judge_pairs(encoder, programs, params, pairs, advance)
    fresh = {"verdicts": judged.verdicts, "verdict_mass": judged.mass}
    logits = reward_logits(config, scoring.evidence_of(pairs, fresh, {}, config))["generative"]
    for size, part in zip(sizes, _parts(logits, [n * (n - 1) // 2 for n in sizes])):
        found["generative"].append(rewardbench.pairwise_rewards(part, size))
    if reference is None:
        return found
    # Each answer against the first one of its row: the implicit reward up to a constant.
    against = [Pair(q.prompt, answer, q.answers[0]) for q in items for answer in q.answers]
    first = np.concatenate([np.full(n, at) for n, at in zip(sizes, np.cumsum([0, *sizes]))])
    both = {name: np.stack([values, values[first]], axis=1) for name, values in logps.items()}
    evidence = scoring.evidence_of(against, {"logps": both["model"]}, {"implicit_logps": both["reference"]}, config)
    found["implicit"] = _parts(reward_logits(config, evidence)["implicit"], sizes)
    found["consensus"] = [
        generative * (size - 1) / size + implicit
        for size, generative, implicit in zip(sizes, found["generative"], found["implicit"])
    ]
    return found


def count(items: Sequence[Question], *, with_reference: bool) -> int:
    """Returns what `rewards` tells `advance` in total."""
    sizes = [len(question.answers) for question in items]
    return sum(n * (n - 1) // 2 for n in sizes) + (2 * sum(sizes) if with_reference else 0)


def results(items: Sequence[Question], found: dict[str, list[np.ndarray]], *, version: int) -> dict[str, Any]:
    """Computes the benchmark's scores of each reward model, and the number of rows of each subset."""
    counts: dict[str, int] = {}
    for question in items:
        counts[question.subset] = counts.get(question.subset, 0) + 1
    scored = {
        name: rewardbench.scores(
            [Scored(q.subset, values, q.right, q.id) for q, values in zip(items, each)], version=version
        )
        for name, each in found.items()
    }
    return {"version": version, "rows": len(items), "counts": counts, **scored}


def reward_rows(items: Sequence[Question], found: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    """Returns the rows as they were read with `rewards`, reward model -> one number per answer, the right ones first."""
    return [
        {**question.row, "rewards": {name: [float(x) for x in each[i]] for name, each in found.items()}}
        for i, question in enumerate(items)
    ]


def cut(items: Sequence[Question]) -> list[str]:
    """Says how many prompts and answers were cut, a sentence each where there are some."""
    prompts = sum(question.prompt.cut for question in items)
    answers = [answer for question in items for answer in question.answers]
    short = sum(answer.cut for answer in answers)
    found = (
        (prompts, f"{prompts} of {len(items)} prompts are longer than text.max_prompt_tokens and lost their middle"),
        (short, f"{short} of {len(answers)} answers are longer than text.max_response_tokens and lost their end"),
    )
    return [sentence for count, sentence in found if count]


def table(values: dict[str, Any]) -> str:
    """Writes `results` as a table: a line per subset and section, a column per reward model, in percent."""
    names = [name for name in ("generative", "implicit", "consensus") if name in values]
    lines = [f"{'RewardBench ' + str(values['version']):<24}{'rows':>7}" + "".join(f"{name:>12}" for name in names)]

    def line(title: str, rows: Any, read: Callable[[dict[str, Any]], float]) -> str:
        return f"{title:<24}{rows:>7}" + "".join(f"{100 * read(values[name]):>12.1f}" for name in names)

    for subset, rows in values["counts"].items():
        lines.append(line(subset, rows, lambda scores: scores["subsets"][subset]))
    for section in values[names[0]].get("sections", ()):
        lines.append(line(section.upper(), "", lambda scores: scores["sections"][section]))
    if "overall" in values[names[0]]:
        lines.append(line("OVERALL", values["rows"], lambda scores: scores["overall"]))
    return "\n".join(lines)


def _parts(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.asarray(values, np.float64), np.cumsum(sizes)[:-1])


def _subset(choices: Choices) -> str:
    subset = choices.row.get("subset")
    if not isinstance(subset, str) or not subset:
        raise InputError(f"{choices.where}: lacks the text 'subset', by which RewardBench counts its rows")
    return subset


def _check_ties(choices: Choices, id: str, before: set[str]) -> None:
    """Checks a row of the subset of ties, whose score needs both rows of a prompt."""
    if not _TIES_ID.fullmatch(id):
        raise InputError(f"{choices.where}: id: must be ref:N or tied:N in the subset of ties, not {id!r}")
    if id in before:
        raise InputError(f"{choices.where}: the id {id!r} occurs twice")
    if id.startswith("tied") and len(choices.right) < 2:
        raise InputError(f"{choices.where}: chosen: {id} needs at least two right answers")
