"""What a checkpoint of a training state costs: seconds that the step waits, seconds until it is there, seconds to resume.

    python benchmarks/checkpoints.py --size 10m --places /scratch gs://BUCKET/try

One row per place. The state is float32 weights with AdamW's two moments, checksums included, as a run saves it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from comparison import SIZES, described


def state_of(size: str):
    """Makes a training state of a random model."""
    import jax
    import jax.numpy as jnp

    from scir_jax.model import decoder, families

    arch = families.read(described(size)[1], "config.json")
    params = jax.jit(decoder.define(arch).init)(jax.random.key(0))
    return {"params": params, "mu": jax.tree.map(jnp.ones_like, params), "nu": jax.tree.map(jnp.ones_like, params)}


def measure(state, place: str, repeat: int) -> dict[str, float]:
    """Saves a state again and again and loads it -> the medians, in seconds."""
    import jax
    from etils import epath

    from scir_jax.bucket.objects import in_bucket
    from scir_jax.engine.checkpoint import StageCheckpoints, remove

    root = epath.Path(place) if in_bucket(place) else Path(place)
    directory = root / "scir_jax-checkpoints"
    waits, wholes = [], []
    store = StageCheckpoints(directory, keep=1)
    for step in range(1, repeat + 2):
        started = time.monotonic()
        store.save(step, state, {})
        waits.append(time.monotonic() - started)
        store.wait()
        wholes.append(time.monotonic() - started)
    store.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    resumes = []
    for _ in range(repeat):
        started = time.monotonic()
        store = StageCheckpoints(directory, keep=1)
        _, found, _ = store.restore(abstract)
        jax.block_until_ready(found)
        resumes.append(time.monotonic() - started)
        store.close()
    remove(directory)
    # The first save compiles the checksums.
    return {"step waits": statistics.median(waits[1:]), "saved": statistics.median(wholes[1:])} | {
        "resumed": statistics.median(resumes)
    }


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="10m", help="of the model")
    parser.add_argument("--places", nargs="+", required=True, help="directories, or gs://BUCKET/PATH")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    arguments = parser.parse_args()
    import jax

    state = state_of(arguments.size)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{arguments.size}: a checkpoint has {size / 2**20:.0f} MiB")
    rows = {place: measure(state, place, arguments.repeat) for place in arguments.places}
    width = min(max(map(len, rows)), shutil.get_terminal_size().columns - 40)
    print(f"{'place':<{width}}  step waits s   saved s   resumed s")
    for place, row in rows.items():
        print(f"{place[-width:]:<{width}}  {row['step waits']:12.3f}  {row['saved']:8.2f}  {row['resumed']:10.2f}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"size": arguments.size, "bytes": size, "seconds": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
