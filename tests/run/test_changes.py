"""What may change under a run that has begun."""

import pytest

from scir_jax.config.files import to_dict
from scir_jax.config.schema import Config
from scir_jax.run.changes import compare


def changed(key, before, now):
    """(may it, may it not) of one setting."""
    section, name = key.split(".")
    configs = [to_dict(Config()) for _ in range(2)]
    configs[0][section][name], configs[1][section][name] = before, now
    found = compare(*configs)
    assert all(change == (key, before, now) for change in (*found.allowed, *found.refused))
    return bool(found.allowed), bool(found.refused)


@pytest.mark.parametrize(
    "key, before, now",
    [
        ("run.iterations", 2, 3),
        ("evaluate.samples", 2, 8),
        ("evaluate.grader", None, "a:b"),
        ("checkpoint.every", 100, 5),
        ("run.wandb", False, True),
        ("data.heldout_pairs", None, "a.jsonl"),
        ("data.heldout_prompts", "a.jsonl", "b.jsonl"),
        ("data.prompts", "a.jsonl", "there/b.jsonl"),
        ("model.path", "a", "b"),
        ("lora.adapter", "a", "b"),
        ("generative.templates", ["standalone", "a/judge.yaml"], ["standalone", "b/judge.yaml"]),
        ("implicit.reference", "models/a", "models/b"),
    ],
)
def test_harmless(key, before, now):
    assert changed(key, before, now) == (True, False)


@pytest.mark.parametrize(
    "key, before, now",
    [
        ("run.iterations", 3, 2),
        ("run.seed", 0, 1),
        ("run.start_from", "a", "b"),
        ("data.heldout_pairs", "a.jsonl", None),
        ("data.prompts", None, "a.jsonl"),
        ("data.eft", "a.jsonl", None),
        ("data.holdout", 0, 2),
        ("lora.adapter", None, "a"),
        ("generative.templates", ["a/judge.yaml"], ["a/other.yaml"]),
        ("generative.templates", ["a", "b"], ["b", "a"]),
        ("generative.templates", ["a"], ["a", "a"]),
        ("implicit.reference", "previous", "base"),
        ("implicit.reference", "models/a", "base"),
        ("preference.reference", "start", "models/a"),
        ("optimise.learning_rate", 1e-6, 2e-6),
        ("training.accumulate", 1, 2),
        ("text.max_prompt_tokens", 8, 16),
    ],
)
def test_what_gives_other_results(key, before, now):
    assert changed(key, before, now) == (False, True)


@pytest.mark.parametrize(
    "key, before, now",
    [("run.directory", "a", "b"), ("run.until", None, "sft"), ("mesh.fsdp", 1, 4), ("run.proposed", {}, {"a.b": "c"})],
)
def test_what_is_not_compared(key, before, now):
    assert changed(key, before, now) == (False, False)
