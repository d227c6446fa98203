"""One compiled program: a jitted function with its abstract arguments, its cost, and the memory known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from scir_jax.engine import mesh as meshes
from scir_jax.engine.cost.flops import Flops
from scir_jax.engine.cost.memory import Memory


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      name: shown to users.
      stage: what it is for: "prefill", "decode", "score", "judge", "rate", "sft", "optimise" or "reward".
      function: jitted.
      arguments: abstract.
      flops: of one call over all devices.
      known: bytes per device that are known without compiling.
      tokens: token places of one call over all devices, padding included; of a sampler those of the prompts.
      streamed: bytes that each device reads from its memory in one call at the least; counted for samplers only.
    """

    name: str
    stage: str
    function: Any
    arguments: tuple
    flops: Flops
    known: Memory
    tokens: int
    streamed: int = 0

    def compile(self, mesh: Mesh) -> jax.stages.Compiled:
        """Compiles the program for a mesh, which may be one of other machines' devices.

        Calls on the run's own mesh find what was compiled.
        """
        # Abstract arguments get the shardings that the real ones have; otherwise the first call would compile again.
        sharding = meshes.batch_sharding(mesh)

        def place(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return leaf

        return self.function.lower(*jax.tree.map(place, self.arguments)).compile()
