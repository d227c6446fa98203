"""What an iteration costs: how often each program is called, and how long that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scir_jax.config.schema import Config
from scir_jax.data.files import read_rows
from scir_jax.engine.cost.chips import Chip
from scir_jax.engine.descriptions import ADMISSIONS
from scir_jax.engine.sampler import SEGMENT
from scir_jax.errors import InputError
from scir_jax.method.objective import needs
from scir_jax.method.pairing import PAIRING
from scir_jax.planning.stages import Stage
from scir_jax.run.models import roles

PROMPTS = 1000
"""prompts per iteration, where neither the configuration nor a file says how many"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one stage of an iteration costs.

    Attributes:
      stage: the stage of the iteration.
      kind: the stage of the program that is called.
      program: its name.
      calls: how often it is called.
      least: seconds at the least, all calls.
    """

    stage: str
    kind: str
    program: str
    calls: int
    least: float


def prompts_of(config: Config, given: int | None) -> tuple[int, str]:
    """Returns the prompts of an iteration, and who says so."""
    if given:
        return given, "--prompts"
    if config.sample.prompts:
        return config.sample.prompts, "sample.prompts"
    try:
        rows = len(read_rows(config.data.prompts or ""))
    except (InputError, OSError, UnicodeDecodeError):
        return PROMPTS, "assumed; --prompts says another number"
    return max(rows // max(config.run.iterations, 1), 1), config.data.prompts


def calls(config: Config, prompts: int) -> list[tuple[str, str, int]]:
    """Counts the calls of an iteration; evaluation depends on the held-out files and is not counted.

    Args:
      prompts: of the iteration.

    Returns:
      (stage, stage of the program, calls) in order.
    """
    responses, way = config.sample.responses, PAIRING[config.pairs.kind]
    pairs = prompts * way.count(responses, config)
    candidates = prompts * PAIRING["all"].count(responses, config) if way.choose else pairs
    # In later iterations the models in different roles are different ones.
    numbers = roles(config, iteration=3)
    models = {numbers[role] for role in ("start", "implicit", "preference", *way.roles)}
    size = 2 * config.evaluate.batch_size
    answers = prompts * responses if way.choose else min(prompts * responses, 2 * pairs)
    sample, answer = config.sample, config.text.max_response_tokens
    admitted = sample.batch_size if answer <= SEGMENT else math.ceil(sample.batch_size / ADMISSIONS)
    found = [
        ("sample", "prefill", math.ceil(prompts / admitted)),
        ("sample", "decode", math.ceil(prompts / sample.batch_size) * math.ceil(answer / SEGMENT)),
        ("score", "score", len(models) * math.ceil(answers / size)),
        ("optimise", "optimise", math.ceil(pairs * config.optimise.epochs / config.optimise.batch_size)),
    ]
    if needs(config).judged:
        found.insert(3, ("score", "judge", math.ceil(candidates / config.evaluate.batch_size)))
    return found[2:] if config.data.pairs else found


def costs(config: Config, stages: Sequence[Stage], chip: Chip, devices: int, prompts: int) -> list[Cost]:
    """Returns the cost of every stage of an iteration whose program fits."""
    fitting = {stage.kind: stage for stage in stages if stage.fits}
    return [
        Cost(stage, kind, fitting[kind].name, count, count * max(fitting[kind].least(chip, devices).values()))
        for stage, kind, count in calls(config, prompts)
        if kind in fitting
    ]
