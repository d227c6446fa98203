"""Several processes as one: what they agree on, and what happens when one is lost."""
