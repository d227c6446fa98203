"""python -m scir_jax.plan: whether a run fits on a machine that need not be there, and what an iteration costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import check, resolve
from scir_jax.run import command

STAGES = ("prefill", "decode", "score", "judge", "rate", "reward", "sft", "optimise")
OPTIONS = {
    "topology": (
        str | None,
        None,
        "TPU slice to plan for: v5e:4x4, v5p:2x2x2, v6e-8, ...; the devices here by default",
    ),
    "batch": (
        str | None,
        None,
        "pairs per step (optimise.batch_size), or `largest`: look for the largest batches that fit",
    ),
    "prompts": (
        str | None,
        None,
        "a FILE of prompts, or the number of prompts of an iteration; by default sample.prompts, or the file's rows",
    ),
    "lengths": (
        str | None,
        None,
        "tokens of prompts and answers: MEAN:P95 of both, 180:480,300:800, or a run's responses.jsonl; by default all "
        "are as long as text allows",
    ),
    "programs": (
        str | None,
        None,
        "stages whose programs are compiled, with commas between them: prefill,decode,score,judge,reward,sft,optimise; all "
        "by default",
    ),
    "compilation_cache": (str | None, None, "directory in which compiled programs are kept for the next plan"),
    "efficiency": (float, 0.4, "share of the least time's speed that the estimate of an iteration assumes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own, given = cli.line("plan", __doc__, argv, options=OPTIONS, default_config=cli.QUICKSTART)

    import jax

    from scir_jax.errors import InputError
    from scir_jax.planning import machine, tables, workload
    from scir_jax.planning.architectures import architecture
    from scir_jax.planning.batches import largest
    from scir_jax.run import auto

    if not 0 < own["efficiency"] <= 1:
        raise InputError(f"--efficiency must be in (0, 1], not {own['efficiency']}")
    search = own["batch"] == "largest"
    if own["batch"] is not None and not search:
        if not own["batch"].isdigit() or not int(own["batch"]):
            raise InputError(f"--batch must be a number of pairs or `largest`, not {own['batch']!r}")
        batch = dataclasses.replace(config.optimise, batch_size=int(own["batch"]))
        config = dataclasses.replace(config, optimise=batch)
    count = int(own["prompts"]) if own["prompts"] and own["prompts"].isdigit() else None
    if own["prompts"] and count is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompts=own["prompts"]))
    kinds = own["programs"].split(",") if own["programs"] else list(STAGES)
    if unknown := [kind for kind in kinds if kind not in STAGES]:
        raise InputError(f"--programs: {unknown[0]!r} is none of {', '.join(STAGES)}")
    if own["compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", own["compilation_cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    if own["topology"]:
        # The compiler alone is asked: no device that may be here is taken.
        jax.config.update("jax_platforms", "cpu")
    target = machine.describe(own["topology"])
    config = auto.settle(resolve(config), given, target=machine.proposed_for(target), known=architecture)
    check(config)
    stated = workload.stated(own["lengths"], config) if own["lengths"] else None
    run = machine.plan(config, target)
    load = workload.workload(run, stated) if stated else None
    tables.show_machine(run, target, load)
    stages = tables.survey(run, target, load, kinds)
    if not stages:
        raise InputError(f"the configuration has no programs of {own['programs']}")
    tables.show_stages(run, stages, target)
    if target.chip is not None and any(stage.reason is None for stage in stages):
        if any(stage.kind == "optimise" for stage in stages):
            tables.show_save(run, target)
        tables.show_times(run, stages, target)
        tables.show_iteration(run, stages, target, load, count, own["efficiency"])
    if search:
        tables.show_largest(config, largest(config, target), target)
    return tables.verdict(run, stages, search)


if __name__ == "__main__":
    command.main(main)
