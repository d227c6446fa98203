"""Self-Consistent Internal Rewards (SCIR) for language models, in JAX."""

import os

# Importing transformers would warn that torch is absent, which is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
