"""Self-Consistent Internal Rewards (SCIR) for language models, in JAX."""
