"""The method: pure functions of arrays. No model, no files, no devices.

Each way of doing a thing is an entry in a table: `rewards.REWARDS`, `consistency.KINDS`, `labels.LABELS`,
`selection.SELECTION`, `preference.LOSSES`, `pairing.PAIRING`. What a training step must compute follows from the
entries that the configuration names (`objective.needs`).

Axes: P pairs, R columns of reward models, C columns of one reward model, G judge templates, S single verdicts, 2 the
two answers (or the two orders) of a pair. A reward model's prediction is a logit for each pair; sigmoid(logit) is its
probability that the first answer is better.
"""
