"""A training stage of 20 made-up pairs with replay, which the tests of training have in common."""

import dataclasses
import json
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config.schema import MeshConfig
from scir_jax.data.jsonl import AppendOnly
from scir_jax.data.pairs import Pair
from scir_jax.data.pipelines import pair_batches
from scir_jax.data.steps import BinRows, TrainBatch
from scir_jax.engine.checkpoint import ModelStore, StageCheckpoints
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import put_batch
from scir_jax.model import decoder, families, lora
from scir_jax.model.architecture import LINEARS
from scir_jax.model.hf import adapters, weights
from scir_jax.run import console
from scir_jax.run.costs import Account
from scir_jax.run.directory import RunDirectory
from scir_jax.run.metrics import Metrics
from scir_jax.run.setup import Setup, prepare
from scir_jax.run.training import TIMINGS, train_stage

STEPS = 5
ADAPTERS = lora.Lora(3, 6.0, tuple(LINEARS))
# Settings that modules have in common, so that the step is compiled once.
TRAINING = dict(weight_decay=0.1, clip=0.5, max_skipped=2)
# A step that takes nothing but the answers' rows: no judge, no replay.
ANSWERS_ALONE = dict(
    selection=dict(rule="all"),
    consistency=dict(weight=0.0),
    preference=dict(update="frozen", labels="generative"),
    replay=dict(weight=0.0),
)


def on_mesh(config, data: int, fsdp: int, tensor: int) -> Setup:
    return prepare(dataclasses.replace(config, mesh=MeshConfig(data, fsdp, tensor)))


def changed(config, **sections):
    """The configuration with other values: training=dict(accumulate=4)."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def made_up_pairs(setup: Setup) -> list[Pair]:
    """20 pairs with made-up log-probabilities of the start, some agreeing with the judge and some not."""
    rng = np.random.default_rng(0)

    def logps(pair):
        return tuple(map(float, -4.0 * np.array(pair.lengths) + rng.normal(0, 8, 2)))

    return [
        dataclasses.replace(
            pair, label=None, cached={f"{role}_logps": logps(pair) for role in ("start", "preference", "implicit")}
        )
        for pair in (*setup.inputs.eft, *setup.inputs.heldout_pairs)
    ]


def make_dataset(setup: Setup, change=None) -> grain.MapDataset:
    """STEPS batches of 8 pairs with replay; change(step, batch) may alter one."""
    spec, seeds = setup.programs.optimise_spec, {"ift": 1, "eft": 2}
    dataset = pair_batches(
        spec,
        setup.encoder,
        made_up_pairs(setup),
        setup.inputs.targets,
        epochs=2,
        seed=3,
        seeds=seeds,
        way=setup.programs.way,
    ).dataset
    assert len(dataset) == STEPS and spec.pairs.pairs == 8 and spec.targets
    if change is None:
        return dataset
    return grain.MapDataset.source(np.arange(STEPS)).map(lambda i: change(int(i), dataset[int(i)]))


def supervised_step(ids, mask) -> TrainBatch:
    """A step that learns the masked tokens of whole rows; ids and mask [B, T]."""
    rows, tokens = ids.shape
    marked = np.argwhere(np.asarray(mask)[:, 1:])
    places = (marked[:, 0] * tokens + marked[:, 1]).astype(np.int32)
    targets = jnp.asarray(ids).reshape(-1)[places + 1]
    segments = np.broadcast_to(np.arange(1, rows + 1, dtype=np.int32)[:, None], ids.shape)
    learned = {"ift": np.ones((1, len(places)), bool)}
    none = np.zeros((1, 0), np.int32)
    return TrainBatch(BinRows((ids,), (segments,), places[None], targets[None], learned, none, none, none), None)


def batch_of(setup: Setup, number: int = 0, change=None):
    """A batch of the dataset on the mesh."""
    return put_batch(make_dataset(setup, change)[number], setup.programs.mesh)


def broken(batch):
    """The batch with numbers for which no step is finite."""
    cached = {**batch.pairs.cached, "preference_logps": np.full_like(batch.pairs.cached["preference_logps"], np.nan)}
    return batch._replace(pairs=batch.pairs._replace(cached=cached))


def write_adapter(directory: Path, world_dir: Path, *, dropout: float = 0.0) -> Path:
    """A PEFT directory of random adapters of all layers, so that both matrices of each have gradients."""
    arch = families.read(weights.hf_config(world_dir / "model"), "config.json")
    settings = dataclasses.replace(ADAPTERS, dropout=dropout)
    abstract = lora.split(decoder.define(arch, lora=settings).abstract(), settings)[0]
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), abstract)
    adapters.save(directory, arch, settings, params, base_model="world")
    return directory


def dropping_config(tiny_config, world_dir: Path, directory: Path):
    """The configuration of random adapters that drop half of their inputs in training, with a bfloat16 moment."""
    adapter = write_adapter(directory, world_dir, dropout=0.5)
    return tiny_config(world_dir, lora=dict(adapter=str(adapter)), training=dict(moment_dtype="bfloat16", **TRAINING))


def whole(setup: Setup):
    """All parameters of M0."""
    return lora.join(setup.parameters.initial(), setup.parameters.frozen)


def heldout_items(setup: Setup) -> list:
    """(prompt, answer) of both answers of each held-out pair."""
    return [(pair.prompt, answer) for pair in setup.inputs.heldout_pairs for answer in pair.answers]


def host(tree):
    """A copy of arrays on the host, which no donation can touch."""
    return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def assert_same_bytes(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


class StopsAfter(console.Stopper):
    """A signal comes in during step `step` of a stage, counted from the stage's (new) start."""

    def __init__(self, step=None, error=None):
        self._asked, self._step, self._error = 0, step, error
        self._votes = hosts.Votes()

    @property
    def signal(self):
        self._asked += 1
        if self._step is None or self._asked < self._step:
            return None
        if self._error:
            raise self._error
        return 15


class Stage:
    """train_stage in one run directory, as often as it takes."""

    def __init__(self, setup: Setup, path, dataset=None):
        self.setup = setup
        self.run = RunDirectory(path)
        self.store = ModelStore(self.run.checkpoints)
        self.decisions = self.run.iteration(1) / "decisions.jsonl"
        self.dataset = make_dataset(setup) if dataset is None else dataset

    def __call__(self, stopper: console.Stopper) -> None:
        metrics_file = self.run.path / "metrics.jsonl"
        metrics = Metrics(self.run.path, tensorboard=False, wandb=False, config={})
        # The rows of a stage before this one.
        metrics.start_stage("sft", 0, 2)
        if not metrics_file.exists():
            for step in (1, 2):
                metrics.write("sft", 0, step, {"loss": 1.0})
        programs, parameters = self.setup.programs, self.setup.parameters
        try:
            train_stage(
                programs.config,
                programs.optimise,
                "optimise",
                self.run,
                metrics,
                stopper,
                iteration=1,
                dataset=self.dataset,
                peak=1e-3,
                params=parameters.initial,
                frozen=lambda: parameters.frozen,
                decisions=AppendOnly(self.decisions),
                save=lambda params: self.store.save(2, params),
                tokens=lambda number: {"policy": number + 1, "ift": 10},
                account=Account(self.run.iteration(1) / "costs.json", "optimise"),
            )
        finally:
            metrics.close()

    @property
    def left(self) -> bool:
        """Whether the stage's checkpoints are there."""
        return self.run.stage_checkpoints(1).exists()

    def checkpoint(self):
        checkpoints = StageCheckpoints(self.run.stage_checkpoints(1), 2)
        found = checkpoints.restore(self.setup.programs.optimise.abstract_state())
        checkpoints.close()
        return found

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl without the times, which agree with the program's costs."""
        rows = [json.loads(text) for text in (self.run.path / "metrics.jsonl").read_text().split("\n")[:-1]]
        program = self.setup.programs.optimise_program()
        for row in rows:
            if row["stage"] == "optimise":
                # The program's are of rows that are all the longest.
                share = row["seconds"] * row["teraflops"] * 1e12 / program.flops.model
                assert 0.3 < share < 1.0
                assert row["seconds"] * row["tokens_per_second"] == pytest.approx(row["tokens"])
                if self.setup.programs.way.kind == "off":
                    assert row["tokens"] == pytest.approx(row["filled"] * program.tokens)
                assert all(row.pop(name) > 0 for name in TIMINGS if name in row)
        return sorted(rows, key=lambda row: row["step"])

    def steps(self) -> list[dict]:
        """The rows of the stage itself."""
        return [row for row in self.rows() if row["stage"] == "optimise"]

    def params(self):
        return host(self.store.load(2, self.setup.programs.abstract_trained))


def assert_same_stage(stage: Stage, other: Stage) -> None:
    """Two stages have come to the same model by the same steps, to the bit."""
    assert_same_bytes(stage.params(), other.params())
    assert stage.rows() == other.rows()
    assert stage.decisions.read_bytes() == other.decisions.read_bytes()
    costs, expected = (json.loads((s.run.iteration(1) / "costs.json").read_text()) for s in (stage, other))
    policy = sum(range(1, len(stage.steps()) + 1))
    assert costs == expected and costs["optimise"]["trained_policy"] == policy
    assert not stage.left
