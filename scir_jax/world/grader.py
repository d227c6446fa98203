"""The hidden grader of the embedded world.

It is for evaluation. Training never calls it, but for the method `oracle`, which shows what perfect labels would give;
the only trace of it in the training data is which of two responses is called `chosen` in the comparison files.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def rewards(conversations: Sequence[Sequence[dict[str, str]]], responses: Sequence[str]) -> list[float]:
    """Grades responses as a scorer of pairs does: the quality of each, for the conversation's last message.

    Raises:
      InputError: a message is not a prompt of this world.
    """
    return [grade(messages[-1]["content"], response)["quality"] for messages, response in zip(conversations, responses)]
