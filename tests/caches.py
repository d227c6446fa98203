"""Caches of prompts, each row of the cache with a prompt of its own."""

from scir_jax.model.decoder import Model


def prefilled(model: Model, params, ids_BP, lengths_B, places: int):
    """Returns the hidden states of right-padded prompts and a cache of so many places that holds them."""
    hidden_BPD, prompts = model.prefill(params, ids_BP)
    caches = model.empty_cache(ids_BP.shape[0], places)
    return hidden_BPD, model.fill(caches, prompts, lengths_B, lambda new, old: new)
