"""The rows of the embedded world's data files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from scir_jax.errors import InputError
from scir_jax.world import tasks
from scir_jax.world.grader import grade
from scir_jax.world.spec import Probabilities, WorldSpec

Rng: TypeAlias = np.random.Generator

# Draws in a row without a usable one before the specification is called impossible.
MAX_DRAWS = 10_000


def make_files(spec: WorldSpec) -> dict[str, list[dict]]:
    """Makes all data files: name -> rows.

    Each file draws from its own child of the seed, so the length of one file does not change the contents of another.

    Raises:
      InputError: the world of `spec` does not have such rows.
    """
    makers = {
        "base.jsonl": lambda rng: _documents(rng, spec, spec.base_documents, spec.base_modes, spec.base_marker),
        "base_comparisons.jsonl": lambda rng: _comparisons(
            rng, spec, _prompts(rng, spec, spec.base_comparisons), spec.base_flipped
        ),
        "ift.jsonl": lambda rng: _documents(rng, spec, spec.ift_documents, spec.ift_modes, spec.ift_marker),
        "eft.jsonl": lambda rng: _comparisons(rng, spec, _prompts(rng, spec, spec.eft_comparisons)),
        "prompts.jsonl": lambda rng: _prompt_rows(_distinct_prompts(rng, spec, spec.prompts)),
        "heldout_prompts.jsonl": lambda rng: _prompt_rows(
            _distinct_prompts(rng, spec, spec.heldout_prompts, heldout=True)
        ),
        "heldout_pairs.jsonl": lambda rng: _comparisons(
            rng, spec, _distinct_prompts(rng, spec, spec.heldout_pairs, heldout=True)
        ),
    }
    seeds = np.random.SeedSequence(spec.seed).spawn(len(makers))
    return {
        name: list(make(np.random.default_rng(seed))) for (name, make), seed in zip(makers.items(), seeds, strict=True)
    }


def is_heldout(word: str, share: float) -> bool:
    """Checks whether a word is reserved for the held-out files.

    A hash decides, not the seed: the held-out words of every world of the same share are the same, and no list of them
    is needed.
    """
    digest = hashlib.sha256(word.encode("ascii")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _prompts(rng: Rng, spec: WorldSpec, count: int, heldout: bool = False) -> Iterator[str]:
    """Yields prompts with a uniform task and a word from one side of the held-out split."""
    for _ in range(count):
        for _ in range(MAX_DRAWS):
            word = tasks.sample_word(rng)
            if is_heldout(word, spec.heldout_words) == heldout:
                break
        else:
            raise InputError(f"no word left with heldout_words = {spec.heldout_words}")
        yield tasks.make_prompt(tasks.sample_task(rng), word)


def _distinct_prompts(rng: Rng, spec: WorldSpec, count: int, heldout: bool = False) -> list[str]:
    prompts: dict[str, None] = {}  # a set that keeps its order
    for prompt in _prompts(rng, spec, MAX_DRAWS + 10 * count, heldout):
        if len(prompts) == count:
            break
        prompts[prompt] = None
    if len(prompts) < count:
        raise InputError(f"the world does not have {count} distinct prompts of the kind asked for")
    return list(prompts)


def _prompt_rows(prompts: list[str]) -> Iterator[dict]:
    return ({"prompt": prompt} for prompt in prompts)


def _documents(rng: Rng, spec: WorldSpec, count: int, modes: Probabilities, marker: float) -> Iterator[dict]:
    for prompt in _prompts(rng, spec, count):
        response = tasks.sample_answer(rng, *tasks.parse_prompt(prompt), modes, marker)
        yield {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
        }


def _comparisons(rng: Rng, spec: WorldSpec, prompts: Iterable[str], flipped: float = 0.0) -> Iterator[dict]:
    """Yields one comparison per prompt, chosen by the grader, the share `flipped` of them wrongly."""
    for prompt in prompts:
        task, word = tasks.parse_prompt(prompt)
        for _ in range(MAX_DRAWS):
            a, b = (tasks.sample_answer(rng, task, word, spec.pair_modes, spec.pair_marker) for _ in range(2))
            difference = grade(prompt, a)["quality"] - grade(prompt, b)["quality"]
            if difference != 0:
                break
        else:
            raise InputError("the answer modes of pairs never differ in quality")
        if (difference > 0) == (rng.random() < flipped):
            a, b = b, a
        yield {"prompt": prompt, "chosen": a, "rejected": b}
