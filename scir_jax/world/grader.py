"""The hidden grader of the embedded world.

It is for evaluation. Training never calls it; the only trace of it in the training data is which of two responses is
called `chosen` in the comparison files.
"""

from __future__ import annotations

from scir_jax.world.tasks import MARKER, answer

CONTENT_WEIGHT = 0.8
MARKER_WEIGHT = 0.2


def grade(prompt: str, response: str) -> dict[str, float]:
    """Grades any text as a response to a prompt of this world.

    The body is the response without its last character if that is ``!``.

    quality  0.8 x (positions at which body and answer have the same letter / the longer of
             the two lengths) + 0.2 if the response holds exactly one ``!`` and ends with it.
             Any further ``!`` is a wrong letter of the body and forfeits the 0.2.
             Rounded to 9 decimals, so that responses of equal merit compare equal.
    exact    1.0 if the body equals the answer, else 0.0; the marker does not matter.

    Raises:
      InputError: `prompt` is not a prompt of this world. No `response` raises.
    """
    right = answer(prompt)
    body = response.removesuffix(MARKER)
    matching = sum(a == b for a, b in zip(body, right))
    polite = response.endswith(MARKER) and response.count(MARKER) == 1
    quality = CONTENT_WEIGHT * (matching / max(len(body), len(right))) + MARKER_WEIGHT * polite
    return {"quality": round(quality, 9), "exact": float(body == right)}
