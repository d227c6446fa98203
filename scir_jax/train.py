"""python -m scir_jax.train: the whole run, M0 -> M1 -> M2 -> ..., in one process."""

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

    from scir_jax.data.records import write_json
    from scir_jax.engine.metrics import Metrics
    from scir_jax.loop import console
    from scir_jax.loop.base_model import build_world
    from scir_jax.loop.directory import RunDirectory, manifest
    from scir_jax.loop.export import export_adapter, export_model
    from scir_jax.loop.iteration import Run, check_inputs
    from scir_jax.loop.programs import check_memory
    from scir_jax.loop.session import Session, check, resolve
    from scir_jax.model import adapters
    from scir_jax.report import write_report

    config = resolve(config)
    check(config)
    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.run.compilation_cache).absolute()))
    directory = RunDirectory(config.run.directory)
    resumed = directory.open(config)
    try:
        with console.Stopper() as stopper:
            if config.world.directory:
                build_world(config, stopper)
            session = Session(config)
            console.say(
                f"{'resuming' if resumed else 'starting'} {directory.path}: "
                f"{session.arch.parameter_count():,} parameters, "
                f"{f'{session.model.lora}, ' if session.model.lora else ''}{config.model.dtype}, "
                f"{session.mesh.size} {jax.default_backend()} device(s)"
            )
            data = check_inputs(session)
            directory.check_manifest(manifest(config, {t.name: dataclasses.asdict(t) for t in session.templates}))
            write_json(directory.path / "data.json", data)
            metrics = Metrics(
                directory.path,
                tensorboard=config.run.tensorboard,
                wandb=config.run.wandb,
                config=options.to_dict(config),
            )
            try:
                run = Run(session, directory, metrics, stopper)
                if not run.store.exists(config.run.iterations + 1):
                    check_memory(session)
                rows = run.run()
            finally:
                metrics.close()
            write_json(directory.path / "summary.json", {"rows": rows})
            if not (directory.path / "export").exists():
                export_model(session, directory, config.run.iterations + 1, directory.path / "export")
            if session.model.lora and not (directory.path / "adapter" / adapters.WEIGHTS).exists():
                export_adapter(session, directory, config.run.iterations + 1, directory.path / "adapter")
            report = write_report(directory.path)
    finally:
        directory.close()
    console.print_table(rows, f"{directory.path}: M1 (after SFT) to M{config.run.iterations + 1}")
    console.say(f"report: {report}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    config, _ = options.parse("train", __doc__, argv, default_config=options.QUICKSTART)
    train(config)
    from scir_jax.loop import console

    console.say(f"total {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    options.main(main)
