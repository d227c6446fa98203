"""The method: pure functions of arrays. No model, no files, no devices.

Axes: P pairs, R reward models, 2 the two responses (or the two orders) of a pair. A reward model's prediction is a
logit per pair; sigmoid(logit) is its probability that the first response is better.
"""
