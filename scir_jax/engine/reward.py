"""The programs of a reward model from elsewhere: a decoder whose head gives one number at the last token of a row."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scir_jax.data.batches import SHORTEST, RowGroup, Rows
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import abstract_params
from scir_jax.engine.cost import flops, memory
from scir_jax.engine.cost.memory import Memory
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import backend_of, chosen, refusal
from scir_jax.model.decoder import Model, Params
from scir_jax.model.sharding import Layout


def rewards(model: Model, params: Params, rows: Rows) -> jax.Array:
    """Computes the reward [B] float32 of rows [B, ...]: the score head's output at the place `rows.verdict`."""
    hidden_BTD = model.hidden(params, rows.ids)
    at_BD = jnp.take_along_axis(hidden_BTD, rows.verdict[:, None, None], axis=1)[:, 0]
    return model.logits(params, at_BD)[:, 0]


def compiled_length(tokens: int, most: int | None = None) -> int:
    """Returns the compiled length of a row: 128, 256, 384, 512, 768, 1024, 1536 and so on, at the most `most`.

    It depends on the row alone, so that a reward does not depend on the row's company or on the iteration.
    """
    length = SHORTEST
    while length < tokens:
        power = 1 << (length.bit_length() - 1)
        length += max(SHORTEST, power // 2)
    return length if most is None else min(length, most)


class RewardPrograms:
    """A reward model on the run's mesh, and its one function, compiled for each length of rows that is met.

    Attributes:
      model, mesh: what they are made of.
      abstract: the parameters' shapes, in the dtype to compute with.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh,
        *,
        dtype: str,
        rows: int,
        attention: str = "auto",
        remaining: Memory = Memory(),
    ):
        """
        Args:
          arch: a reward model's.
          dtype: of the computation.
          attention: of scir_jax.model.decoder.define; one that this model does not allow becomes "auto".
          rows: B, rows of one call.
          remaining: what stays in a device's memory beside the reward model: a run's frozen weights.

        Raises:
          InputError: the mesh does not divide the model.
        """
        meshes.check_model(mesh, arch)
        self.mesh = mesh
        layout = Layout(mesh)
        if refusal(attention, backend_of(layout), dtype, arch.attention_cap):
            attention = "auto"
        self.model = decoder.define(arch, compute_dtype=dtype, attention=attention, layout=layout)
        self.abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=s.sharding), abstract_params(self.model, mesh)
        )
        self._rows, self._remaining = rows, remaining

    @classmethod
    def beside(cls, run: Programs, arch: Architecture) -> RewardPrograms:
        """Makes the programs of a reward model that scores a run's answers: on its mesh, beside its frozen weights.

        Args:
          arch: the reward model's.

        Raises:
          InputError: the mesh does not divide the model.
        """
        config = run.config
        return cls(
            arch,
            run.mesh,
            dtype=config.model.dtype,
            rows=2 * config.evaluate.batch_size,
            attention=config.model.attention,
            remaining=Memory(weights=memory.device_bytes(run.abstract_frozen)),
        )

    def group(self, tokens: int) -> RowGroup:
        """Returns the rows of one call, of a compiled length."""
        return RowGroup((self._rows,), tokens)

    @cached_property
    def scorer(self):
        """Jitted (params, Rows [B, ...]) -> rewards [B]."""
        shardings = (meshes.param_shardings(self.model, self.mesh), meshes.batch_sharding(self.mesh))
        return jax.jit(
            lambda params, rows: rewards(self.model, params, rows),
            in_shardings=shardings,
            out_shardings=meshes.replicated(self.mesh),
        )

    def program(self, tokens: int) -> Program:
        """Returns the function for rows of a compiled length as a program."""
        group = self.group(tokens)
        count = flops.inference(self.model.arch, [group], flash=self._flash)
        known = Memory(weights=memory.device_bytes(self.abstract) + self._remaining.weights)
        arguments: tuple[Any, ...] = (self.abstract, group.abstract())
        return Program(f"reward, {tokens} tokens", "reward", self.scorer, arguments, count, known, self._rows * tokens)

    def _flash(self, tokens: int) -> bool:
        arch, backend = self.model.arch, backend_of(self.model.layout)
        kind = chosen(
            self.model.attention,
            backend,
            self.model.compute_dtype,
            tokens=tokens,
            head_dim=arch.head_dim,
            cap=arch.attention_cap,
        )
        return kind != "xla"
