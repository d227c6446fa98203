"""Scores of many answers and pairs under one set of parameters, batch by batch in fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.batches import RowGroup, by_length
from scir_jax.data.bins import Laid, ScoreSpec
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import batched
from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.engine.forward import Judged
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.method.rewards import Evidence, expected_points, fit_length_penalty, judged
from scir_jax.run import costs
from scir_jax.run.costs import Spend
from scir_jax.text.tokens import Ids

Item = tuple[Prompt, Answer]
Advance = Callable[[int], None]
Group = TypeVar("Group", RowGroup, ScoreSpec)


def nothing(*_) -> None:
    """Does not report progress."""


def score_answers(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    items: Sequence[Item],
    advance: Advance = nothing,
    spend: Spend = nothing,
) -> dict[str, np.ndarray]:
    """Reads values of each answer under a model.

    Args:
      advance: is told after each batch how many answers it held.
      spend: is told what that cost.

    Returns:
      name -> [len(items)] float32; "logps" is log pi(y|x), nats, summed over the answer's tokens with the stop token.

    Raises:
      InputError: the model gives values that are not finite.
    """
    together = by_prompt(items, programs.scored_together)
    tokens = [len(items[one[0]][0].ids) + sum(len(items[i][1].ids) for i in one) for one in together]
    result: dict[str, np.ndarray] = {"logps": np.zeros(len(items), np.float32)}
    for spec, part in _parts(programs.score_specs, tokens):
        mine = [together[bin] for bin in taken(part, programs.local_rows(spec.rows))]
        laid = [Laid.of(0, [encoder.scored_row(*items[i]) for i in one]) for one in mine]
        read = programs.scorer(params, put_batch(spec.arrays(laid, encoder.chat.pad_id), programs.mesh))
        numbers = [together[bin] for bin in part]
        for name, values in read.items():
            values = np.asarray(values)[: len(part)]
            check_finite(values, "log-probabilities")
            into = result.setdefault(name, np.zeros(len(items), np.float32))
            for one, row in zip(numbers, values, strict=True):
                into[one] = row[: len(one)]
        advance(sum(map(len, numbers)))
    if spend is not nothing:
        spend(costs.scored(programs, [(items[one[0]][0], [items[i][1] for i in one]) for one in together]))
    return result


def by_prompt(items: Sequence[Item], most: int) -> list[list[int]]:
    """Returns the numbers of answers to one prompt that are scored together, at most so many, in order."""
    parts: list[list[int]] = []
    open_: dict[Ids, list[int]] = {}
    for number, (prompt, _) in enumerate(items):
        if len(part := open_.get(prompt.ids, [])) in (0, most):
            part = open_[prompt.ids] = []
            parts.append(part)
        part.append(number)
    return parts


def judge_pairs(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    pairs: Sequence[Pair],
    advance: Advance = nothing,
    key: Any = None,
    spend: Spend = nothing,
) -> Judged:
    """Reads verdicts [P, G, 2, 2] and verdict mass [P, G, 2] of pairs in both orders, NumPy float32.

    Args:
      advance: is told after each batch how many pairs it held.
      key: key of the adapters' dropout; None drops nothing.
      spend: is told what that cost.

    Raises:
      InputError: the model gives values that are not finite.
    """
    lengths = [tuple(group.tokens for group in groups) for groups in programs.judge_groups]
    # Rows are made again batch by batch: all of them at once could be more than a host holds.
    sizes = question_sizes(encoder, pairs)
    tokens = [tuple(row) for row in sizes.max(axis=2).tolist()]
    verdicts = np.zeros((len(pairs), len(encoder.judges), 2, 2), np.float32)
    mass = np.zeros((len(pairs), len(encoder.judges), 2), np.float32)
    calls = 0
    for groups, numbers in zip(programs.judge_groups, by_length(tokens, lengths), strict=True):
        size = groups[0].leading[0]
        for part in batched(numbers, size):
            mine = [pairs[i] for i in taken(part, programs.local_rows(size))]
            rows = tuple(
                group.arrays([row for pair in mine for row in encoder.judge_rows(judge, pair)], encoder.chat.pad_id)
                for judge, group in zip(encoder.judges, groups, strict=True)
            )
            batch_key = None if key is None else jax.random.fold_in(key, calls)
            read = programs.judge(params, put_batch(rows, programs.mesh), batch_key)
            verdicts[part] = np.asarray(read.verdicts)[: len(part)]
            mass[part] = np.asarray(read.mass)[: len(part)]
            check_finite(verdicts[part], "verdicts")
            check_finite(mass[part], "verdicts")
            advance(len(part))
            calls += 1
    if spend is not nothing:
        spend(costs.judged(programs, sizes))
    return Judged(verdicts, mass)


def rate_answers(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    items: Sequence[Item],
    advance: Advance = nothing,
    spend: Spend = nothing,
) -> dict[str, np.ndarray]:
    """Reads the points that the judge gives each answer.

    Args:
      advance: is told after each batch how many answers it held.
      spend: is told what that cost.

    Returns:
      [len(items)] float32: "points", their expectation; "points_mass", the probability of all points together.

    Raises:
      InputError: the model gives values that are not finite.
    """
    points = tuple(map(float, encoder.pointwise.template.verdicts))
    sizes = rating_sizes(encoder, items)
    result = {name: np.zeros(len(items), np.float32) for name in ("points", "points_mass")}
    for group, part in _parts(programs.rate_groups, sizes.tolist()):
        rows = [encoder.pointwise_row(*items[i]) for i in taken(part, programs.local_rows(group.rows))]
        read = programs.rater(params, put_batch(group.arrays(rows, encoder.chat.pad_id), programs.mesh))
        logits, mass = (np.asarray(values)[: len(part)] for values in read)
        check_finite(logits, "points")
        check_finite(mass, "points")
        result["points"][part], result["points_mass"][part] = expected_points(logits, points), mass
        advance(len(part))
    if spend is not nothing:
        spend(costs.judged(programs, sizes, len(points)))
    return result


def _parts(groups: Sequence[Group], tokens: Sequence[int]) -> Iterator[tuple[Group, Sequence[int]]]:
    """Yields the numbers of rows of these lengths that are computed together, with the group that holds them."""
    by_group = by_length([(count,) for count in tokens], [(group.tokens,) for group in groups])
    for group, numbers in zip(groups, by_group, strict=True):
        for part in batched(numbers, group.rows):
            yield group, part


def rating_sizes(encoder: Encoder, items: Sequence[Item]) -> np.ndarray:
    """Counts the tokens of the pointwise question about each answer, [len(items)] int."""
    return np.array([len(encoder.pointwise_row(*item).ids) for item in items], int)


def question_sizes(encoder: Encoder, pairs: Sequence[Pair]) -> np.ndarray:
    """Counts the tokens of every template's question about pairs in both orders, [P, G, 2] int."""
    sizes = [[[len(row.ids) for row in encoder.judge_rows(judge, pair)] for judge in encoder.judges] for pair in pairs]
    return np.array(sizes, int).reshape(len(pairs), len(encoder.judges), 2)


def single_verdicts(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    pairs: Sequence[Pair],
    advance: Advance,
    key: Any,
    spend: Spend = nothing,
) -> np.ndarray:
    """Samples the judge's predictions with the adapters' dropout, [P, programs.judge_passes] logits, float32.

    Args:
      key: key of the dropout, from which each pass has one of its own.
      spend: is told what that cost.
    """
    passes = [
        judge_pairs(encoder, programs, params, pairs, advance, jax.random.fold_in(key, number), spend).verdicts
        for number in range(programs.judge_passes)
    ]
    return np.stack([np.asarray(judged(verdicts)["logit"]).mean(axis=1) for verdicts in passes], axis=1)


def score_pairs(
    encoder: Encoder,
    programs: Programs,
    pairs: Sequence[Pair],
    *,
    config: Config,
    model: Callable[[], Any],
    reference: Callable[[], Any] | None,
    reference_logps: np.ndarray | None = None,
    advance: Advance = nothing,
    spend: Spend = nothing,
) -> Evidence:
    """Collects what the reward models need of pairs under a model, outside training; NumPy arrays.

    Args:
      config: its `implicit` says whether a length penalty is fitted to these pairs.
      model, reference: give parameters when called, the reference's first, so that one copy is there at a time.
        Without a reference there are no log-probabilities, and no implicit reward.
      reference_logps: [P, 2] of the reference where they are known, in the place of `reference`.
      spend: is told what that cost.
    """
    items = [(pair.prompt, answer) for pair in pairs for answer in pair.answers]
    cached: dict[str, np.ndarray] = {}
    fresh: dict[str, np.ndarray] = {}
    if reference is not None:
        reference_logps = score_answers(encoder, programs, reference(), items, advance, spend)["logps"]
        reference_logps = reference_logps.reshape(-1, 2)
    params = model()
    if reference_logps is not None:
        cached["implicit_logps"] = reference_logps
        found = score_answers(encoder, programs, params, items, advance, spend)
        fresh |= {name: values.reshape(-1, 2) for name, values in found.items()}
        cached["start_logps"] = fresh["logps"]
    if encoder.pointwise is not None:
        rated = rate_answers(encoder, programs, params, items, advance, spend)
        cached |= {f"start_{name}": values.reshape(-1, 2) for name, values in rated.items()}
    judged = judge_pairs(encoder, programs, params, pairs, advance, spend=spend)
    fresh |= {"verdicts": judged.verdicts, "verdict_mass": judged.mass}
    return evidence_of(pairs, fresh, cached, config)


def evidence_of(
    pairs: Sequence[Pair], fresh: dict[str, np.ndarray], cached: dict[str, np.ndarray], config: Config
) -> Evidence:
    """Puts readings of pairs together, with a length penalty that is fitted to them where the configuration has one.

    Args:
      fresh, cached: as in Evidence; the penalty needs "logps" and "implicit_logps".
    """
    lengths = np.array([pair.lengths for pair in pairs], np.float32).reshape(-1, 2)
    alpha = 0.0
    if "logps" in fresh and "implicit_logps" in cached:
        alpha = length_penalty(config, fresh["logps"], cached["implicit_logps"], lengths)
    none = np.zeros(len(pairs), np.float32)
    return Evidence(
        fresh=fresh,
        cached=cached,
        frozen={},
        lengths=lengths,
        length_penalty=np.float32(alpha) * lengths,
        verdicts=np.zeros((len(pairs), 0), np.float32),
        label=none + np.float32(0.5),
        weight=none + 1,
    )


def length_penalty(config: Config, logps: np.ndarray, reference_logps: np.ndarray, lengths: np.ndarray) -> float:
    """Fits alpha of the implicit reward to pairs, [P, 2] each; 0 where implicit.length is not "penalty"."""
    if config.implicit.length != "penalty":
        return 0.0
    return fit_length_penalty(config.implicit.beta * (logps - reference_logps), lengths)


def score_count(pairs: int, *, with_reference: bool, rated: bool = False) -> int:
    """Returns what `score_pairs` tells `advance` in total: answers, and pairs that are judged.

    Args:
      rated: the judge gives points too.
    """
    return pairs * ((5 if with_reference else 1) + 2 * rated)


def taken(items: Sequence, rows: np.ndarray) -> list:
    """Returns the items at these rows of a batch; past their end, where a last batch is not full, the first one."""
    return [items[row] if row < len(items) else items[0] for row in rows]


def check_finite(values: np.ndarray, what: str) -> None:
    """Checks the values that a model gives; NaN or infinity mean that its weights are broken.

    Nothing that is made of such values is of use.

    Args:
      what: names the values in the error.

    Raises:
      InputError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise InputError(f"the model gives {what} that are not finite; its weights are broken")
