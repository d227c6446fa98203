"""Scores of many answers and pairs under one set of parameters, batch by batch in fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.batches import RowGroup, by_length
from scir_jax.data.encode import Encoder, Row
from scir_jax.data.jsonl import batched
from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.data.reading import ReadSpec, Together, calls, together
from scir_jax.engine.forward import Judged
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.method.rewards import Evidence, expected_points, fit_length_penalty, judged
from scir_jax.run import costs
from scir_jax.run.costs import Spend

Item = tuple[Prompt, Answer]
Advance = Callable[[int], None]


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
    found = answers_together(programs, items)
    result: dict[str, np.ndarray] = {"logps": np.zeros(len(items), np.float32)}
    for spec, bins in calls(programs.score_specs, found, segmented=programs.way.segmented):
        rows = _arrays(encoder, programs, spec, bins, lambda number: encoder.scored_row(*items[number]))
        read = programs.scorer(params, rows)
        numbers = [[number for one in bin for number in one.rows] for bin in bins]
        for name, values in read.items():
            values = np.asarray(values)[: len(bins)]
            check_finite(values, "log-probabilities")
            into = result.setdefault(name, np.zeros(len(items), np.float32))
            for answers, row in zip(numbers, values, strict=True):
                into[answers] = row[: len(answers)]
        advance(sum(map(len, numbers)))
    if spend is not nothing:
        spend(costs.scored(programs, found))
    return result


def answers_together(programs: Programs, items: Sequence[Item]) -> list[Together]:
    """Says which answers lie together where they are scored: those to one prompt, as the attention allows."""
    rows = [(prompt.ids, len(prompt.ids), len(prompt.ids) + len(answer.ids)) for prompt, answer in items]
    return together(0, rows, programs.score_specs[-1], share=programs.way.share != "never")


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
    found = questions_together(encoder, programs, pairs)
    shape = len(pairs), len(encoder.judges), 2
    verdicts, mass = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32)

    def question(number: int) -> Row:
        # Rows are made again call by call: all of them at once could be more than a host holds.
        at, template, order = np.unravel_index(number, shape)
        pair = pairs[at]
        shown = pair.answers[::-1] if order else pair.answers
        return encoder.judge_row(encoder.judges[template], pair.prompt, *shown)

    done = 0
    for number, (spec, bins) in enumerate(calls(programs.judge_specs, found, segmented=programs.way.segmented)):
        rows = _arrays(encoder, programs, spec, bins, question)
        read = programs.judge(params, rows, None if key is None else jax.random.fold_in(key, number))
        read = Judged(*(np.asarray(values)[: len(bins)] for values in read))
        for bin, verdicts_VG2, mass_VG in zip(bins, *read, strict=True):
            asked = [number for one in bin for number in one.rows]
            at, place = np.unravel_index(asked, shape), np.arange(len(asked))
            verdicts[at], mass[at] = verdicts_VG2[place, at[1]], mass_VG[place, at[1]]
            check_finite(verdicts[at], "verdicts")
            check_finite(mass[at], "verdicts")
            # A pair counts when the last of its questions is answered, as near as makes no difference.
            before, done = done, done + len(asked)
            advance(done // (2 * shape[1]) - before // (2 * shape[1]))
    if spend is not nothing:
        spend(costs.asked(programs, found))
    return Judged(verdicts, mass)


def questions_together(encoder: Encoder, programs: Programs, pairs: Sequence[Pair]) -> list[Together]:
    """Says which of the questions about pairs, numbered as their verdicts are, lie together where they are judged."""
    rows = []
    for pair in pairs:
        for number, judge in enumerate(encoder.judges):
            key = number, pair.prompt.ids, pair.prompt.quote
            rows += [(key, row.start, len(row.ids)) for row in encoder.judge_rows(judge, pair)]
    return together(1, rows, programs.judge_specs[-1], share=programs.way.share != "never") if rows else []


def _arrays(
    encoder: Encoder,
    programs: Programs,
    spec: ReadSpec,
    bins: Sequence[Sequence[Together]],
    row: Callable[[int], Row],
) -> Any:
    """Puts this host's bins of a call on the devices."""
    mine = (bins[i] if i < len(bins) else () for i in programs.local_rows(spec.bins))
    laid = [[one.laid(row) for one in bin] for bin in mine]
    return put_batch(spec.arrays(laid, encoder.chat.pad_id), programs.mesh)


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
        spend(costs.rated(programs, sizes, len(points)))
    return result


def _parts(groups: Sequence[RowGroup], tokens: Sequence[int]) -> Iterator[tuple[RowGroup, Sequence[int]]]:
    """Yields the numbers of rows of these lengths that are computed together, with the group that holds them."""
    by_group = by_length([(count,) for count in tokens], [(group.tokens,) for group in groups])
    for group, numbers in zip(groups, by_group, strict=True):
        for part in batched(numbers, group.rows):
            yield group, part


def rating_sizes(encoder: Encoder, items: Sequence[Item]) -> np.ndarray:
    """Counts the tokens of the pointwise question about each answer, [len(items)] int."""
    return np.array([len(encoder.pointwise_row(*item).ids) for item in items], int)


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
