"""What an iteration costs: how often each program is called, and how long that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scir_jax.config.schema import Config
from scir_jax.data.files import read_rows
from scir_jax.engine.cost.chips import Chip
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import SEGMENT
from scir_jax.errors import InputError
from scir_jax.method.objective import needs
from scir_jax.method.pairing import PAIRING
from scir_jax.planning.stages import Stage
from scir_jax.planning.workload import Workload
from scir_jax.run import hub
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


def calls(run: Programs, prompts: int, load: Workload | None = None) -> list[tuple[str, str, int]]:
    """Counts the calls of an iteration; evaluation depends on the held-out files and is not counted.

    Args:
      prompts: of the iteration.
      load: what rows of stated lengths ask for; None: all are the longest.

    Returns:
      (stage, stage of the program, calls) in order.
    """
    config, spec, lengths = run.config, run.slot_spec, run.facts.lengths
    responses, way = config.sample.responses, PAIRING[config.pairs.kind]
    pairs = prompts * way.count(responses, config)
    offline = int(pairs * config.pairs.offline / (1 - config.pairs.offline))
    candidates = prompts * PAIRING["all"].count(responses, config) if way.choose else pairs
    # In later iterations the models in different roles are different ones.
    numbers = roles(config, iteration=3)
    models = {numbers[role] for role in ("start", "implicit", "preference", *way.roles)}
    size = 2 * config.evaluate.batch_size
    answers = prompts * responses if way.choose else min(prompts * responses, 2 * pairs)
    answers, pairs = answers + 2 * offline, pairs + offline
    longest = math.ceil(prompts * responses / spec.slots) * math.ceil(spec.answer_tokens / SEGMENT)
    found = [
        ("sample", "prefill", math.ceil(prompts / spec.prompts)),
        ("sample", "decode", load.looks(prompts * responses, spec.slots) if load else longest),
        ("score", "score", len(models) * math.ceil(answers / run.score_specs[-1].holds(lengths.scored))),
        ("optimise", "optimise", math.ceil(pairs * config.optimise.epochs / config.optimise.batch_size)),
    ]
    wanted = needs(config)
    if wanted.judged:
        # Once by M_t, once by the judge before it, and once for each pass with dropout.
        times = 1 + ("generative_before" in wanted.frozen) + (run.judge_passes if wanted.verdicts else 0)
        questions = candidates * 2 * len(lengths.judges)
        found.insert(
            3, ("score", "judge", times * math.ceil(questions / run.judge_specs[-1].holds(max(lengths.judges))))
        )
    scorer = config.pairs.scorer
    if scorer and not hub.is_function(scorer):
        found.insert(3, ("score", "reward", math.ceil(answers / size)))
    if wanted.pointwise:
        found.insert(-1, ("score", "rate", math.ceil(answers / size)))
    return found[2:] if config.data.pairs or config.sample.command else found


def costs(
    run: Programs, stages: Sequence[Stage], chip: Chip, devices: int, prompts: int, load: Workload | None = None
) -> list[Cost]:
    """Returns the cost of every stage of an iteration whose program fits.

    Args:
      load: what rows of stated lengths ask for; None: all are the longest.
    """
    shares = load.shares if load else {}
    fitting = {stage.kind: stage for stage in stages if stage.fits}
    return [
        Cost(
            stage,
            kind,
            fitting[kind].name,
            count,
            count * shares.get(kind, 1.0) * max(fitting[kind].least(chip, devices).values()),
        )
        for stage, kind, count in calls(run, prompts, load)
        if kind in fitting
    ]
