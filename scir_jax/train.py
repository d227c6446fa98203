"""python -m scir_jax.train: the whole run, M0 -> M1 -> M2 -> ..., in one command."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from scir_jax.bucket.objects import in_bucket, shown
from scir_jax.config import cli
from scir_jax.config.checks import check, resolve, until_of
from scir_jax.config.files import to_dict
from scir_jax.config.names import differing
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from scir_jax.run import command

if TYPE_CHECKING:
    from scir_jax.run.runs import Run


def run(*configs: Config | str | Path | Mapping[str, Any], **settings: Any) -> Run:
    """Runs or resumes a run, with the settings of the command's line.

    Args:
      configs: configuration files or their names ("quickstart", "methods/srlm") and mappings of settings
        ({"run.seed": 1, "lora": {"rank": 8}}), of which later ones win; the quickstart where there are none. Or one
        Config, which stands alone.
      settings: more of them, sections: lora=dict(rank=8).

    Returns:
      The finished run.

    Raises:
      InputError, Interrupted: as `train`.
    """
    if any(isinstance(config, Config) for config in configs):
        if len(configs) > 1 or settings:
            raise InputError("a Config has all settings of a run; give no others beside it")
        return train(configs[0])  # type: ignore[arg-type]
    argv: list[str] = []
    for config in (*configs, settings):
        argv += cli.arguments(config) if isinstance(config, Mapping) else ["--config", str(config)]
    line = _parse(argv)
    return train(line.config, line.given)


def train(config: Config, given: Collection[str] | None = None) -> Run:
    """Runs or resumes the run of a configuration.

    Args:
      given: keys of the settings that are not to be proposed where run.auto is set; by default those that differ from
        the defaults.

    Returns:
      The run: finished, unless run.until ends it before.

    Raises:
      InputError: something of the configuration, the model or the data cannot be used.
      Interrupted: on Ctrl-C or SIGTERM, after everything was saved.
    """
    import jax

    from scir_jax.engine.hosts import hosts
    from scir_jax.run import auto, console
    from scir_jax.run.directory import RunDirectory
    from scir_jax.run.runs import Run

    command.join(config)
    config = auto.settle(resolve(config), differing(config) if given is None else given, begun=True)
    check(config)
    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", _cache(config.run.compilation_cache))
    directory = RunDirectory(config.run.directory)
    try:
        resumed = hosts.decide(lambda: directory.open(config))
        directory.share()
        with console.Stopper() as stopper:
            rows, report = _train(config, directory, stopper, resumed)
    finally:
        directory.close()
    run = Run(directory.path, distributed=config.run.distributed)
    if not rows:
        console.say(f"stopped after {config.run.until}, as run.until says; the same command without it goes on")
        return run
    after = " (after SFT)" if config.sft.epochs and not config.run.start_from else ""
    console.print_table(rows, f"{shown(directory.path)}: M1{after} to {rows[-1]['model']}", run.marked)
    console.say(f"report: {report}")
    return run


def _train(config: Config, directory, stopper, resumed: bool) -> tuple[list[dict], str]:
    import jax

    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.checkpoint import ModelStore
    from scir_jax.engine.hosts import hosts
    from scir_jax.model.hf import adapters
    from scir_jax.report.page import write_report
    from scir_jax.run import choice, console, counts, iteration, preflight
    from scir_jax.run.base_model import build_world
    from scir_jax.run.card import write_card
    from scir_jax.run.changes import ADDED
    from scir_jax.run.export import export_adapter, export_model
    from scir_jax.run.ledger import OWN, Ledger, written_by_hand
    from scir_jax.run.manifest import manifest
    from scir_jax.run.metrics import Metrics, NoMetrics
    from scir_jax.run.models import Models
    from scir_jax.run.scorer import open_scorer
    from scir_jax.run.setup import prepare, templates_of

    if config.world.directory:
        build_world(config, stopper)
    hosts.together(lambda: directory.keep_models(config))
    encoder, inputs, programs, parameters = hosts.together(lambda: prepare(config))
    scorer = hosts.together(lambda: open_scorer(config, encoder, programs))
    adapted = programs.model.lora
    console.say(
        f"{'resuming' if resumed else 'starting'} {directory.path}: "
        f"{programs.arch.parameter_count():,} parameters, "
        f"{f'{adapted}, ' if adapted else ''}{config.model.dtype}, "
        f"{programs.mesh.size} {jax.default_backend()} device(s)"
        f"{f' on {hosts.count()} hosts' if hosts.count() > 1 else ''}"
    )
    data = hosts.together(lambda: preflight.check_inputs(config, inputs, programs))
    templates = templates_of(encoder)
    if hosts.count() > 1:
        # Hosts may have disks of their own. The weights are left out, since a host may read only its part of them.
        hosts.same(hosts.together(lambda: manifest(config, templates, weights=False)), "files and versions")
    hosts.same(data, "data")

    ledger = Ledger(directory.path)

    def record() -> None:
        for sentence in ledger.verify(config.run.accept_replaced, written_by_hand(config, directory)):
            console.say(sentence)
        made_of = manifest(config, templates)
        if adapted:
            preflight.check_frozen(config, made_of["sha256"])
        directory.check_manifest(made_of)
        write_json(directory.path / "data.json", data)
        ledger.record(OWN)

    hosts.decide(record)
    for change in directory.changes:
        console.say(f"changed since the run began: {change.key}, from {change.before!r} to {change.now!r}")
    if any(change.key in ADDED for change in directory.changes):
        console.say(f"models that are evaluated already: python -m scir_jax.evaluate --run {directory.path} --again")

    def metrics_here() -> Metrics:
        if not hosts.first():
            return NoMetrics()
        settings = config.run
        where = dict(tensorboard=settings.tensorboard, wandb=settings.wandb, trackio=settings.trackio)
        return Metrics(directory.path, config=to_dict(config), **where)

    metrics = hosts.together(metrics_here)
    models = Models(ModelStore(directory.checkpoints), programs, parameters)
    last = config.run.iterations + 1
    try:
        # A run that ended early is finished without its last model.
        if not hosts.decide(lambda: models.store.exists(last) or directory.best is not None):
            prompts = [*inputs.prompts, *(pair.prompt for pair in inputs.given_pairs)]
            preflight.check_memory(config, programs, scorer.programs(prompts) if scorer else ())
        stages = iteration.recipe(config, encoder, inputs, programs, models, directory, metrics, stopper, scorer)
        if not iteration.run_stages(stages, directory, stopper, until_of(config)):
            return [], ""
        rows = iteration.rows(directory, config.run.iterations)
    finally:
        metrics.close()
    best = choice.best(rows, config.evaluate.select, early_stop=config.evaluate.early_stop)["model"]
    number = int(best.removeprefix("M"))
    hosts.decide(
        lambda: directory.summarise(rows, best, config.evaluate.select, to_dict(config), counts.table(directory.path))
    )
    if not hosts.decide((directory.path / "export" / "config.json").exists):
        export_model(config, programs, directory, number, directory.path / "export")
    if adapted and not hosts.decide((directory.path / "adapter" / adapters.WEIGHTS).exists):
        export_adapter(config, programs, directory, number, directory.path / "adapter")
    for name in ("export", "adapter") if adapted else ("export",):
        hosts.decide(lambda: write_card(directory.path / name, config, directory, number))
    return rows, hosts.decide(lambda: str(write_report(directory.path)))


def _cache(name: str) -> str:
    """Returns where compiled programs are kept: a directory, or a place in a bucket, which JAX reads by itself."""
    return name if in_bucket(name) else str(Path(name).absolute())


def _parse(argv: Sequence[str] | None) -> cli.Line:
    return cli.line("train", __doc__, argv, default_config=cli.QUICKSTART)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    started = time.monotonic()
    line = _parse(argv)
    train(line.config, line.given)
    from scir_jax.run import console

    console.say(f"total {time.monotonic() - started:.0f} s")
    return 0


class _Callable(ModuleType):
    """A module that is called like its function `run`: the name scir_jax.train can only be one of both."""

    def __call__(self, *configs: Config | str | Path | Mapping[str, Any], **settings: Any) -> Run:
        return run(*configs, **settings)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    command.main(main)
