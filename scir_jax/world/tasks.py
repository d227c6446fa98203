"""The tasks of the embedded world, and answers of varying quality to them.

A prompt is ``"<task> <word>="``, for example ``"reverse abcd="``. A word is 3 to 6 letters
from a-j. The answer to a prompt is a string of letters from a-j or A-J. A response is an
answer, right or wrong, with or without the polite marker ``!`` at its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from scir_jax.errors import InputError

LETTERS = "abcdefghij"
MIN_LETTERS, MAX_LETTERS = 3, 6
MARKER = "!"
MAX_EXTRA_LETTERS = 3  # of a rambling answer

TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "upper-reverse": lambda word: word[::-1].upper(),
    "rotate": lambda word: word[1:] + word[:1],
}

# How an answer comes about. Probabilities of modes are always given in this order.
#   good    the right answer
#   typo    the right answer with one letter replaced by another of the same case
#   lazy    the word as it was given; for copy, where that would be right, the word reversed
#   cut     a proper, non-empty prefix of the right answer
#   ramble  the right answer followed by 1 to 3 more letters of the same case
# A lazy answer to a palindrome, or to rotate with a single repeated letter, is right by chance.
MODES = ("good", "typo", "lazy", "cut", "ramble")

_PROMPT = re.compile(rf"({'|'.join(TASKS)}) ([{LETTERS}]+)=")


def make_prompt(task: str, word: str) -> str:
    """Writes the prompt of a task and a word."""
    return f"{task} {word}="


def parse_prompt(prompt: str) -> tuple[str, str]:
    """Reads the task and the word of a prompt.

    Raises:
      InputError: it is not a prompt of this world.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise InputError(f"not a prompt of the embedded world: {prompt!r}")
    return match[1], match[2]


def answer(prompt: str) -> str:
    """Returns the right answer to a prompt, without the marker.

    Raises:
      InputError: it is not a prompt of this world.
    """
    task, word = parse_prompt(prompt)
    return TASKS[task](word)


def sample_word(rng: np.random.Generator) -> str:
    """Draws a word: its length uniform over 3 to 6, its letters uniform and independent."""
    length = MIN_LETTERS + _below(rng, MAX_LETTERS - MIN_LETTERS + 1)
    return "".join(LETTERS[_below(rng, len(LETTERS))] for _ in range(length))


def sample_task(rng: np.random.Generator) -> str:
    """Draws a task."""
    return tuple(TASKS)[_below(rng, len(TASKS))]


def sample_body(rng: np.random.Generator, task: str, word: str, mode: str) -> str:
    """Draws an answer of the given mode, without the marker."""
    right = TASKS[task](word)
    letters = LETTERS.upper() if right.isupper() else LETTERS
    if mode == "good":
        return right
    if mode == "typo":
        position = _below(rng, len(right))
        others = letters.replace(right[position], "")
        return right[:position] + others[_below(rng, len(others))] + right[position + 1 :]
    if mode == "lazy":
        return word[::-1] if task == "copy" else word
    if mode == "cut":
        return right[: 1 + _below(rng, len(right) - 1)]
    if mode == "ramble":
        extra = 1 + _below(rng, MAX_EXTRA_LETTERS)
        return right + "".join(letters[_below(rng, len(letters))] for _ in range(extra))
    raise ValueError(f"unknown answer mode {mode!r}")


def sample_answer(
    rng: np.random.Generator,
    task: str,
    word: str,
    mode_probabilities: Sequence[float],
    marker_probability: float,
) -> str:
    """Draws a response, whose mode and marker are independent.

    Args:
      mode_probabilities: in the order of `MODES`; they sum to one.
    """
    threshold, total = rng.random(), 0.0
    mode = MODES[-1]
    for candidate, probability in zip(MODES, mode_probabilities, strict=True):
        total += probability
        if threshold < total:
            mode = candidate
            break
    body = sample_body(rng, task, word, mode)
    return body + MARKER if rng.random() < marker_probability else body


def _below(rng: np.random.Generator, n: int) -> int:
    """Draws a uniform integer in [0, n), several times faster for one number than rng.integers."""
    return int(rng.random() * n)
