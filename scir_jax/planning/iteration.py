"""What an iteration costs: how often each program is called, and how long that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scir_jax.config import Config
from scir_jax.data.files import read_rows
from scir_jax.engine.chips import Chip
from scir_jax.errors import InputError
from scir_jax.loop.pairing import needs_frozen
from scir_jax.planning.stages import Stage

PROMPTS = 1000
"""an iteration, where neither the configuration nor a file says how many"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one stage of an iteration.

    Attributes:
      program: that is called.
      calls: how often.
      least: seconds at the least, all calls.
    """

    stage: str
    program: str
    calls: int
    least: float


def prompts_of(config: Config, given: int | None) -> tuple[int, str]:
    """Prompts of an iteration, and who says so."""
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
    """(stage, program, calls) of an iteration. Evaluation, which depends on the held-out files, is left out."""
    responses, size = config.sample.responses, config.evaluate.batch_size
    every = responses * (responses - 1) // 2
    chosen = min(config.pairs.per_prompt, every)
    pairs = prompts * {"all": every, "random": chosen, "best_worst": min(chosen, responses - 1)}[config.pairs.kind]
    judged = pairs if config.pairs.kind != "best_worst" else prompts * every
    # M_t, and the models that rewards and preferences refer to: in later iterations all are different.
    kinds = {"start", {"previous": "before"}.get(config.implicit.reference, config.implicit.reference)}
    kinds.add(config.preference.reference)
    if config.preference.labels == "cream":
        kinds.add("before")
    found = [
        ("sample", f"sample {responses} a prompt", math.ceil(prompts / config.sample.batch_size)),
        ("references", "score responses", len(kinds) * math.ceil(prompts * responses / (2 * size))),
        ("optimise", "SCIR step", math.ceil(pairs * config.optimise.epochs / config.optimise.batch_size)),
    ]
    if needs_frozen(config):
        found.insert(2, ("references", "judge pairs", math.ceil(judged / size)))
    return found[1:] if config.data.pairs else found


def costs(config: Config, stages: Sequence[Stage], chip: Chip, devices: int, prompts: int) -> list[Cost]:
    """The cost of every stage of an iteration whose program fits."""
    by_name = {stage.name: stage for stage in stages if stage.fits}
    return [
        Cost(stage, name, count, count * max(by_name[name].least(chip, devices).values()))
        for stage, name, count in calls(config, prompts)
        if name in by_name
    ]
