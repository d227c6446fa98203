"""What an iteration asks for if the lengths of prompts and answers are stated: a plan's share of the longest rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.batches import by_length
from scir_jax.data.packing import Packing, RowSize, Shape, deal
from scir_jax.data.reading import ReadSpec
from scir_jax.engine.programs import Programs
from scir_jax.engine.reward import compiled_length
from scir_jax.engine.sampler import SEGMENT
from scir_jax.errors import InputError
from scir_jax.planning.limits import assumed_judge
from scir_jax.text.judge import Judge, load_template

PAIRS = 4096
STEPS = 24
"""that are drawn"""
NORMAL_95 = 1.6449  # the normal distribution's 95th percentile
FILLED = 0.97
"""share of the places of bins that hold a token, where answers are scored and pairs judged"""
WAITING = 0.9
"""share of the slots' tokens that are an answer's; the others pass while slots wait for prompts"""


@dataclasses.dataclass(frozen=True)
class Stated:
    """Lengths of prompts and answers in tokens, drawn or read: [n] each."""

    prompts: np.ndarray
    answers: np.ndarray
    source: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """What programs compute of what they would with the longest rows.

    Attributes:
      source: says where the lengths come from.
      shares: stage of a program -> share of its largest call's work, in the mean of the calls.
      seen: places of the cache that a query sees in the mean.
      answer: tokens of an answer in the mean.
      shape: of the largest training step; None: that of the longest rows.
      real: share of a training step's computed places that hold a token.
    """

    source: str
    shares: dict[str, float]
    seen: int
    answer: float
    shape: Shape | None
    real: float

    def looks(self, answers: int, slots: int) -> int:
        """Returns the calls of the sampler for so many answers."""
        return math.ceil(answers * self.answer / (slots * SEGMENT * WAITING))


def stated(text: str, config: Config) -> Stated:
    """Reads the option: MEAN:P95 of prompts and of answers, or a file of answers.

    Raises:
      InputError: it is neither.
    """
    limits = (config.text.max_prompt_tokens, config.text.max_response_tokens)
    if Path(text).is_file():
        found = _of_file(Path(text))
    else:
        rng = np.random.default_rng(0)
        parts = text.split(",")
        if len(parts) != 2:
            raise InputError(
                f"--lengths {text!r} is no file; give one, or mean and 95th percentile of the tokens of prompts and of "
                "answers: 180:480,300:800"
            )
        found = [_log_normal(rng, part) for part in parts]
    prompts, answers = (np.clip(values, 1, limit).astype(int) for values, limit in zip(found, limits, strict=True))
    return Stated(prompts, answers, text)


def _of_file(path: Path) -> list[np.ndarray]:
    """Reads the lengths of a responses.jsonl."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((len(row["prompt_ids"]), len(row["response_ids"])))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{number}: holds no prompt_ids and response_ids; --lengths takes a run's responses.jsonl, or "
                "what python -m scir_jax.sample writes"
            ) from None
    if not rows:
        raise InputError(f"{path}: is empty")
    return list(np.array(rows).T)


def _log_normal(rng: np.random.Generator, text: str) -> np.ndarray:
    """Draws lengths of a mean and a 95th percentile."""
    try:
        mean, high = map(float, text.split(":"))
        ratio = math.log(high / mean)
        # exp(z s - s^2 / 2) = high / mean has two solutions; the smaller spread is meant.
        spread = NORMAL_95 - math.sqrt(NORMAL_95**2 - 2 * ratio)
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"--lengths: {text!r} is no MEAN:P95 of a log-normal distribution, such as 180:480; the 95th percentile is "
            f"between 1 and {math.exp(NORMAL_95**2 / 2):.1f} times the mean"
        ) from None
    if ratio < 0:
        raise InputError(f"--lengths: in {text!r} the 95th percentile is below the mean")
    return rng.lognormal(math.log(mean) - spread**2 / 2, spread, PAIRS)


def workload(run: Programs, lengths: Stated) -> Workload:
    """Finds out what the programs compute where rows have these lengths."""
    rng = np.random.default_rng(1)
    judges = [assumed_judge(load_template(name)) for name in run.config.generative.templates]
    x = rng.choice(lengths.prompts, PAIRS)
    a, b = (rng.choice(lengths.answers, PAIRS) for _ in range(2))
    questions = [_judge_row(judge, *row) for judge in judges for row in zip(x, a, b, strict=True)]
    shares = {
        "prefill": _share(x, run.slot_spec.tokens),
        "score": _read_share(run, run.score_specs, x + a, run.facts.lengths.scored),
    }
    if questions:
        shares["judge"] = _read_share(run, run.judge_specs, np.array(questions), max(run.facts.lengths.judges))
    limits = run.config.text
    shares["reward"] = float(np.mean([compiled_length(int(n)) for n in x + a]))
    shares["reward"] /= compiled_length(limits.max_prompt_tokens + limits.max_response_tokens)
    shape, real, shares["optimise"] = _packed(run, judges, np.stack([x, a, b], axis=1), rng)
    seen = int(x.mean() + (a**2).mean() / a.mean() / 2)
    shares["decode"] = 1.0
    return Workload(lengths.source, shares, seen, float(a.mean()), shape, real)


def _share(rows: np.ndarray, lengths: Sequence[int]) -> float:
    """Returns the mean of the compiled lengths of rows, as a share of the longest."""
    numbers = by_length([(n,) for n in rows], [(n,) for n in lengths])
    computed = sum(len(part) * length for part, length in zip(numbers, lengths, strict=True))
    return computed / (len(rows) * lengths[-1])


def _read_share(run: Programs, specs: Sequence[ReadSpec], rows: np.ndarray, longest: int) -> float:
    """Returns what rows that are scored or judged need, as a share of what the longest need.

    Beginnings that rows share are not taken into account.
    """
    rows = np.minimum(rows, longest)
    if not run.way.segmented:
        return _share(rows, [spec.tokens for spec in specs])
    call = specs[-1]
    return float(rows.mean()) * call.holds(longest) / (call.bins * call.tokens * FILLED)


def _judge_row(judge: Judge, x: int, a: int, b: int) -> int:
    """Returns the tokens of a judge's question, where quotes are as long as what they quote."""
    tokens = judge.fixed_tokens + judge.slots("prompt") * x
    tokens += judge.slots("response_a") * a + judge.slots("response_b") * b
    return int(tokens + (x + a + 1 if judge.template.layout == "continuation" else 0))


def _packed(
    run: Programs, judges: list[Judge], pairs: np.ndarray, rng: np.random.Generator
) -> tuple[Shape | None, float, float]:
    """Packs drawn steps -> the largest shape, the share of places with a token, the mean step's share of the shape."""
    spec, way = run.optimise_spec, run.way
    asked = judges[len(judges) - spec.pairs.asked :] if spec.pairs.asked else []

    def item(x: int, a: int, b: int) -> tuple[RowSize, ...]:
        found = []
        for kind, group in enumerate(spec.pairs.groups):
            judge = asked[kind - (0 if group.scored and group.verdict else 1)] if group.verdict else None
            for first, second in ((a, b), (b, a))[: group.leading[1]]:
                asks = judge is not None and spec.pairs.asks(len(found))
                tokens = _judge_row(judge, x, first, second) if asks else x + first
                scored = int(first) if group.scored else 0
                found.append(RowSize(kind, min(int(tokens), group.tokens), scored, int(not kind), int(asks)))
        return tuple(found)

    replayed = [
        (RowSize(len(spec.pairs.groups) + kind, max(group.tokens // 2, 1), group.scored),)
        for kind, (_, group) in enumerate(spec.targets)
        for _ in range(group.rows)
    ]
    steps = []
    for _ in range(STEPS):
        items = [*(item(*pairs[i]) for i in rng.choice(len(pairs), spec.pairs.pairs)), *replayed]
        dealt = spec.own(items) if way.kind == "off" else deal(items, spec.pairs.pairs, spec.devices, spec.micro)
        steps.append([[items[i][r] for i, r in cell] for cell in dealt.cells])
    longest = max(row.tokens for step in steps for cell in step for row in cell)
    if way.segmented and longest > way.bin:
        raise InputError(
            f"text.bin_tokens is {way.bin}, and a row of the stated lengths has {longest} tokens; set it to that at "
            "least, or to 0"
        )
    packing = Packing.of(way.kind, steps, spec.bound, way.bin)
    real = sum(row.tokens for step in steps for cell in step for row in cell)
    computed = [packing.shape(step).tokens for step in steps]
    share = sum(computed) / (len(steps) * packing.shapes[-1].tokens)
    shape = None if way.kind == "off" else packing.shapes[-1]
    return shape, real / (spec.cells * sum(computed)), share
