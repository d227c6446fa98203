"""The jitted training step: (state, batch, learning rate) -> (state, output), with explicit shardings, state donated.

Metrics and losses stay sums and counts until the global batch is complete, so micro-batches cannot change a result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from scir_jax.config.schema import TrainingConfig
from scir_jax.data.steps import TrainBatch
from scir_jax.engine import mesh as meshes
from scir_jax.engine.cost import flops
from scir_jax.engine.cost.flops import Work
from scir_jax.engine.losses import Loss, sft_terms
from scir_jax.engine.optimizer import make_optimizer, state_shardings
from scir_jax.engine.sampler import stream_key
from scir_jax.method.objective import Sums, divide
from scir_jax.model import lora
from scir_jax.model.decoder import Model, Params
from scir_jax.model.segments import spans

Array = jax.Array


class TrainState(NamedTuple):
    """The trained parameters, optimiser state, and the number of steps skipped in a row up to now (int32)."""

    params: Params
    opt_state: Any
    skipped: Array


class StepOutput(NamedTuple):
    """What a step gives beside the new state.

    Attributes:
      metrics: scalars by name.
      decisions: of each pair, with its index; empty outside SCIR training.
      work: what the rows asked for.
    """

    metrics: dict[str, Array]
    decisions: dict[str, Array]
    work: Work


class Trainer:
    """Makes states and steps for one model and one loss on one mesh."""

    def __init__(self, settings: TrainingConfig, loss: Loss, model: Model, mesh: Mesh):
        self.settings = settings
        self.loss = loss
        self.model = model
        self.mesh = mesh
        self.optimizer = make_optimizer(settings)
        trained, frozen = lora.split(meshes.param_shardings(model, mesh), model.lora)
        self._abstract = lora.split(model.abstract(), model.lora)[0]
        self._replicated = meshes.replicated(mesh)
        moments = state_shardings(self.optimizer, self._abstract, trained, self._replicated)
        self.state_shardings = TrainState(trained, moments, self._replicated)
        self._init = jax.jit(
            lambda params: TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32)),
            out_shardings=self.state_shardings,
            donate_argnums=0,
        )
        self.step = jax.jit(
            self._step,
            in_shardings=(
                self.state_shardings,
                frozen,
                meshes.batch_sharding(mesh),
                self._replicated,
                self._replicated,
            ),
            out_shardings=(self.state_shardings, self._replicated),
            donate_argnums=0,
        )

    def init(self, params: Params) -> TrainState:
        """Puts a fresh optimiser around the trained parameters, which are donated."""
        return self._init(params)

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes with their shardings, to restore a checkpoint into."""
        shapes = jax.eval_shape(self._init, self._abstract)
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, self.state_shardings
        )

    def dropout_key(self, seed: int, stage: int, step: int) -> Array | None:
        """Returns the key of a step's adapter dropout, or None where there is no dropout."""
        if self.model.lora is None or not self.model.lora.dropout:
            return None
        return jax.random.fold_in(stream_key(seed, "dropout", stage), step)

    def value(
        self, trained: Params, frozen: Params, batch: TrainBatch, key: Array | None = None
    ) -> tuple[Array, tuple[Sums, dict[str, Array]]]:
        """Computes the loss of a global batch, micro-batch by micro-batch, with its sums and the pairs' decisions.

        Args:
          key: key of the adapters' dropout; None drops nothing.
        """
        params = lora.join(trained, frozen)
        micro = self.settings.accumulate
        if micro == 1:
            sums, decisions = self.loss.sums(params, batch, key)
        else:
            # Checkpointed: the backward pass holds one micro-batch's activations at a time.
            body = jax.checkpoint(lambda part, part_key: self.loss.sums(params, part, part_key), prevent_cse=False)
            parts = self._parts(batch, key)
            _, (sums, decisions) = jax.lax.scan(lambda carry, part: (carry, body(*part)), None, parts)
            sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
            decisions = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), decisions)
        return self.loss.total(sums), (sums, decisions)

    def _parts(self, batch: TrainBatch, key: Array | None) -> tuple[TrainBatch, Array | None]:
        """Returns the micro-batches behind one another, [micro, ...], and their keys."""
        micro = self.settings.accumulate
        # Every micro-batch takes rows from all devices, each those that it has.
        split = jax.tree.map(lambda x: x.reshape(x.shape[0] // micro, micro, *x.shape[1:]).swapaxes(0, 1), batch)
        return split, None if key is None else jax.random.split(key, micro)

    def value_and_grad(
        self, trained: Params, frozen: Params, batch: TrainBatch, key: Array | None = None
    ) -> tuple[tuple[Array, tuple[Sums, dict[str, Array]]], Params]:
        """Computes `value` and the gradient of the loss with respect to the trained parameters."""
        if self.settings.accumulate == 1 or self.loss.counts is None:
            return jax.value_and_grad(self.value, has_aux=True)(trained, frozen, batch, key)
        counts = self.loss.counts(batch)

        def value(trained: Params, part: TrainBatch, part_key: Array | None) -> tuple[Array, Sums]:
            sums, _ = self.loss.sums(lora.join(trained, frozen), part, part_key)
            return self.loss.total({name: (total, counts[name]) for name, (total, _) in sums.items()}), sums

        def add(grads: Params, part: tuple[TrainBatch, Array | None]) -> tuple[Params, Sums]:
            (_, sums), more = jax.value_and_grad(value, has_aux=True)(trained, *part)
            return laid(jax.tree.map(jnp.add, grads, more)), sums

        def laid(grads: Params) -> Params:
            return jax.lax.with_sharding_constraint(grads, self.state_shardings.params)

        # The counts are known beforehand, so that no micro-batch is computed twice as it is where they are not.
        grads, sums = jax.lax.scan(add, laid(jax.tree.map(jnp.zeros_like, trained)), self._parts(batch, key))
        sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
        return (self.loss.total(sums), (sums, {})), grads

    def _step(
        self, state: TrainState, frozen: Params, batch: TrainBatch, learning_rate: Array, key: Array | None
    ) -> tuple[TrainState, StepOutput]:
        (loss, (sums, decisions)), grads = self.value_and_grad(state.params, frozen, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        # A step with a non-finite loss or gradient changes nothing but the count of such steps.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        sft = [divide(*sums[name]) for name in sft_terms(sums)]
        work = self._work(batch)
        metrics = {
            "loss": loss,
            **({"sft": sum(sft)} if sft else {}),
            **{
                name: jnp.where(count > 0, total / jnp.maximum(count, 1e-9), jnp.nan)
                for name, (total, count) in sums.items()
            },
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "tokens": work.tokens,
            "filled": work.tokens / sum(ids.size for ids in batch.rows.ids),
            "skipped": (~finite).astype(jnp.float32),
            "skipped_in_a_row": skipped,
        }
        return TrainState(params, opt_state, skipped), StepOutput(metrics, decisions, work)

    def step_flops(self, work: Work) -> int:
        """Counts the model FLOPs of a step over all devices."""
        return flops.of_step(self.model.arch, work, lora=self.model.lora, heads=self.loss.heads)

    def _work(self, batch: TrainBatch) -> Work:
        windows = {layer.window for layer in self.model.arch.layers}
        seen = {window: jnp.zeros((), jnp.float32) for window in windows}
        tokens = jnp.zeros((), jnp.float32)
        for segments_BT in batch.rows.segments:
            real_BT, before_BT = segments_BT > 0, spans(segments_BT).positions + 1
            tokens += real_BT.sum(dtype=jnp.float32)
            for window in windows:
                visible_BT = before_BT if window is None else jnp.minimum(before_BT, window)
                seen = {**seen, window: seen[window] + jnp.where(real_BT, visible_BT, 0).sum(dtype=jnp.float32)}
        learned = sum((marked.sum() for marked in batch.rows.learned.values()), jnp.zeros((), jnp.int32))
        pairs = batch.pairs
        return Work(
            tokens,
            sum(seen[layer.window] for layer in self.model.arch.layers),
            learned,
            jnp.zeros((), jnp.int32) if pairs is None else pairs.length.sum(),
            jnp.zeros((), jnp.int32)
            if pairs is None
            else (pairs.index >= 0).sum() * math.prod(pairs.verdict.shape[1:]),
        )
