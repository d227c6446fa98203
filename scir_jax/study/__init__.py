"""A study: methods against each other over seeds, each a run of its own, tuned alike."""
