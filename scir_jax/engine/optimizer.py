"""The optimiser of a stage: clipping, the update's direction, decoupled weight decay; learning rates stand apart."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.tree_util import DictKey, tree_flatten_with_path, tree_map_with_path
from optax.contrib import MuonDimensionNumbers

from scir_jax.config.schema import TrainingConfig
from scir_jax.model.decoder import Params

MUON_RMS = 0.2
"""root mean square of a matrix's update before the learning rate, about that of AdamW (arXiv 2502.16982)"""


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Makes the clipping and the optimiser, without the learning rate.

    The step takes the learning rate as an argument, so that another schedule compiles nothing. Norm scales and biases
    are not decayed.
    """

    def matrices(params):
        return tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)

    if config.optimizer == "adamw":
        scale = [optax.scale_by_adam(config.b1, config.b2, mu_dtype=config.moment_dtype)]
    elif config.optimizer == "muon":  # -1: its updates are to be subtracted, as all others
        settings = dict(adam_b1=config.b1, adam_b2=config.b2, mu_dtype=config.moment_dtype)
        scale = [
            optax.contrib.muon(-1.0, consistent_rms=MUON_RMS, muon_weight_dimension_numbers=layer_matrices, **settings)
        ]
    else:  # Adafactor (arXiv 1804.04235) without its own learning rate; an update's RMS over a parameter is at most 1
        scale = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        *scale,
        optax.add_decayed_weights(config.weight_decay, matrices) if config.weight_decay else optax.identity(),
    )


def layer_matrices(params: Params) -> Params:
    """Finds what Muon treats as matrices: the weights of layers and their adapters, each layer's apart.

    Returns:
      For each parameter which of its axes are inputs and which are outputs, or None: AdamW updates it.
    """

    def axes(path: tuple[Any, ...], param: Any) -> MuonDimensionNumbers | None:
        names = [part.key for part in path]
        if names[0] != "layers" or names[-1] in ("scale", "bias"):
            return None
        # [layer, *out, *inputs], where attention's output layer alone has two axes of inputs; B of an adapter has one.
        inputs = 2 if names[-2] == "o" and names[-1] != "lora_b" else 1
        places = range(1, param.ndim)
        return MuonDimensionNumbers(tuple(places[-inputs:]), tuple(places[:-inputs]))

    return tree_map_with_path(axes, params)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Params, shardings: Params, replicated: NamedSharding
) -> Any:
    """Lays an optimiser's state as the parameters lie.

    Args:
      params: shapes of the trained parameters.
      shardings: theirs.
      replicated: the sharding of all that has no parameter's shape: counts, and factored moments, which are small.
    """
    leaves, _ = tree_flatten_with_path(params)
    known = {
        (*(part.key for part in path), param.shape): sharding
        for (path, param), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        last = itertools.takewhile(lambda part: isinstance(part, DictKey), reversed(path))
        names = [part.key for part in last]
        return known.get((*reversed(names), leaf.shape), replicated)

    return tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params))


def learning_rates(config: TrainingConfig, peak: float, steps: int) -> np.ndarray:
    """Computes the learning rate of each step of a stage, [steps] float32."""
    warmup = min(int(np.ceil(config.warmup * steps)), steps - 1)
    rest = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final),
        "linear": lambda: optax.linear_schedule(peak, config.final * peak, rest),
    }[config.schedule]()
    # Warm-up ends at the peak, and its first step is not an idle one.
    schedule = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
