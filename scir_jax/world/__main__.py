"""python -m scir_jax.world: makes an embedded world and trains its base model.

A run does that by itself. With --ship true the base model becomes the one that travels with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scir_jax.config import cli
from scir_jax.run import command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own = cli.parse(
        "world",
        __doc__,
        argv,
        options={"ship": (bool, False, "copy the trained weights into the package")},
        default_config=cli.QUICKSTART,
    )
    from scir_jax.errors import InputError
    from scir_jax.run import console
    from scir_jax.run.base_model import build_world, spec_of, training_of
    from scir_jax.world import base

    if not config.world.directory:
        raise InputError("world.directory: say where to make the world")
    command.join(config)
    with console.Stopper() as stopper:
        build_world(config, stopper, retrain=True)
    if own["ship"]:
        weights = Path(config.world.directory) / "model" / base.WEIGHTS
        base.keep(weights, spec_of(config.world), training_of(config.world))
    return 0


if __name__ == "__main__":
    command.main(main)
