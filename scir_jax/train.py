"""python -m scir_jax.train: the whole run, M0 -> M1 -> M2 -> ..., in one command."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from scir_jax.config import cli
from scir_jax.config.checks import check, resolve, until_of
from scir_jax.config.files import to_dict
from scir_jax.config.names import differing
from scir_jax.config.schema import Config
from scir_jax.run import command


def train(config: Config, given: Collection[str] | None = None) -> list[dict]:
    """Runs or resumes the run of a configuration.

    Args:
      given: keys of the settings that are not to be proposed where run.auto is set; by default those that differ from
        the defaults.

    Returns:
      The rows of its final table (also in summary.json); none where run.until ends it before.

    Raises:
      InputError: something of the configuration, the model or the data cannot be used.
      Interrupted: on Ctrl-C or SIGTERM, after everything was saved.
    """
    import jax

    from scir_jax.engine.hosts import hosts
    from scir_jax.run import auto, console
    from scir_jax.run.directory import RunDirectory

    command.join(config)
    config = auto.settle(resolve(config), differing(config) if given is None else given, begun=True)
    check(config)
    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.run.compilation_cache).absolute()))
    directory = RunDirectory(config.run.directory)
    try:
        resumed = hosts.decide(lambda: directory.open(config))
        hosts.shares(directory.path)
        with console.Stopper() as stopper:
            rows, report = _train(config, directory, stopper, resumed)
    finally:
        if hosts.first():
            directory.close()
    if not rows:
        console.say(f"stopped after {config.run.until}, as run.until says; the same command without it goes on")
        return rows
    after = " (after SFT)" if config.sft.epochs and not config.run.start_from else ""
    console.print_table(rows, f"{directory.path}: M1{after} to M{config.run.iterations + 1}")
    console.say(f"report: {report}")
    return rows


def _train(config: Config, directory, stopper, resumed: bool) -> tuple[list[dict], str]:
    import jax

    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.checkpoint import ModelStore
    from scir_jax.engine.hosts import hosts
    from scir_jax.model.hf import adapters
    from scir_jax.report.page import write_report
    from scir_jax.run import console, iteration, preflight
    from scir_jax.run.base_model import build_world
    from scir_jax.run.changes import ADDED
    from scir_jax.run.directory import manifest
    from scir_jax.run.export import export_adapter, export_model
    from scir_jax.run.metrics import Metrics, NoMetrics
    from scir_jax.run.models import Models
    from scir_jax.run.setup import prepare, templates_of

    if config.world.directory:
        build_world(config, stopper)
    encoder, inputs, programs, parameters = hosts.together(lambda: prepare(config))
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

    def record() -> None:
        made_of = manifest(config, templates)
        if adapted:
            preflight.check_frozen(config, made_of["sha256"])
        directory.check_manifest(made_of)
        write_json(directory.path / "data.json", data)

    hosts.decide(record)
    for change in directory.changes:
        console.say(f"changed since the run began: {change.key}, from {change.before!r} to {change.now!r}")
    if any(change.key in ADDED for change in directory.changes):
        console.say(f"models that are evaluated already: python -m scir_jax.evaluate --run {directory.path} --again")

    def metrics_here() -> Metrics:
        if not hosts.first():
            return NoMetrics()
        settings = config.run
        return Metrics(directory.path, tensorboard=settings.tensorboard, wandb=settings.wandb, config=to_dict(config))

    metrics = hosts.together(metrics_here)
    models = Models(ModelStore(directory.checkpoints), programs, parameters)
    last = config.run.iterations + 1
    try:
        if not hosts.decide(lambda: models.store.exists(last)):
            preflight.check_memory(config, programs)
        stages = iteration.recipe(config, encoder, inputs, programs, models, directory, metrics, stopper)
        if not iteration.run_stages(stages, directory, stopper, until_of(config)):
            return [], ""
        rows = iteration.rows(directory, config.run.iterations)
    finally:
        metrics.close()
    if hosts.first():
        write_json(directory.path / "summary.json", {"rows": rows})
    if not hosts.decide((directory.path / "export").exists):
        export_model(config, programs, directory, last, directory.path / "export")
    if adapted and not hosts.decide((directory.path / "adapter" / adapters.WEIGHTS).exists):
        export_adapter(config, programs, directory, last, directory.path / "adapter")
    return rows, hosts.decide(lambda: str(write_report(directory.path)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    started = time.monotonic()
    line = cli.line("train", __doc__, argv, default_config=cli.QUICKSTART)
    train(line.config, line.given)
    from scir_jax.run import console

    console.say(f"total {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    command.main(main)
