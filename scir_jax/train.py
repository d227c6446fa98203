"""python -m scir_jax.train: the whole run, M0 -> M1 -> M2 -> ..., in one command."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from scir_jax import options
from scir_jax.config import Config


def train(config: Config) -> list[dict]:
    """Runs or resumes the run of a configuration; returns the rows of its final table (also in summary.json).

    Raises:
      InputError, Interrupted.
    """
    import jax

    from scir_jax.engine import hosts
    from scir_jax.loop import console
    from scir_jax.loop.directory import RunDirectory
    from scir_jax.loop.session import check, resolve

    options.join(config)
    config = resolve(config)
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
    console.print_table(rows, f"{directory.path}: M1 (after SFT) to M{config.run.iterations + 1}")
    console.say(f"report: {report}")
    return rows


def _train(config: Config, directory, stopper, resumed: bool) -> tuple[list[dict], str]:
    import jax

    from scir_jax.data.records import write_json
    from scir_jax.engine import hosts
    from scir_jax.engine.metrics import Metrics, NoMetrics
    from scir_jax.loop import console
    from scir_jax.loop.base_model import build_world
    from scir_jax.loop.directory import manifest
    from scir_jax.loop.export import export_adapter, export_model
    from scir_jax.loop.iteration import Run, check_inputs
    from scir_jax.loop.programs import check_memory
    from scir_jax.loop.session import Session
    from scir_jax.model import adapters
    from scir_jax.report import write_report

    if config.world.directory:
        build_world(config, stopper)
    session = hosts.together(lambda: Session(config))
    console.say(
        f"{'resuming' if resumed else 'starting'} {directory.path}: "
        f"{session.arch.parameter_count():,} parameters, "
        f"{f'{session.model.lora}, ' if session.model.lora else ''}{config.model.dtype}, "
        f"{session.mesh.size} {jax.default_backend()} device(s)"
        f"{f' on {hosts.count()} hosts' if hosts.count() > 1 else ''}"
    )
    data = hosts.together(lambda: check_inputs(session))
    templates = {t.name: dataclasses.asdict(t) for t in session.templates}
    if hosts.count() > 1:
        # Where hosts have disks of their own. Of the weights a host may read its part only.
        hosts.same(hosts.together(lambda: manifest(config, templates, weights=False)), "files and versions")
    hosts.same(data, "data")

    def record() -> None:
        directory.check_manifest(manifest(config, templates))
        write_json(directory.path / "data.json", data)

    hosts.decide(record)

    def metrics_here() -> Metrics:
        if not hosts.first():
            return NoMetrics()
        return Metrics(
            directory.path,
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb,
            config=options.to_dict(config),
        )

    metrics = hosts.together(metrics_here)
    last = config.run.iterations + 1
    try:
        run = hosts.together(lambda: Run(session, directory, metrics, stopper))
        if not hosts.decide(lambda: run.store.exists(last)):
            check_memory(session)
        rows = run.run()
    finally:
        metrics.close()
    if hosts.first():
        write_json(directory.path / "summary.json", {"rows": rows})
    if not hosts.decide((directory.path / "export").exists):
        export_model(session, directory, last, directory.path / "export")
    if session.model.lora and not hosts.decide((directory.path / "adapter" / adapters.WEIGHTS).exists):
        export_adapter(session, directory, last, directory.path / "adapter")
    return rows, hosts.decide(lambda: str(write_report(directory.path)))


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    config, _ = options.parse("train", __doc__, argv, default_config=options.QUICKSTART)
    train(config)
    from scir_jax.loop import console

    console.say(f"total {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    options.main(main)
