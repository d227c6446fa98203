"""Conversations as data files write them, checked and brought to one form: a list of role and content."""

from __future__ import annotations

import re
from typing import Any

from scir_jax.errors import InputError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def short(value: Any) -> str:
    """Writes a value of a file for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def prompt_text(messages: Messages) -> str:
    """Writes a prompt as one text for a judge's question: the user's words, or the turns with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def prompt_messages(value: Any, where: str) -> Messages:
    """Checks a prompt: a text (one user's turn, taken as it is), or a list of messages that ends with a user's turn.

    Args:
      where: names the row and its column in errors.

    Raises:
      InputError: the value is neither, or it is empty.
    """
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: is empty")
        _text(value, where)
        return [{"role": "user", "content": value}]
    messages = check_messages(value, where)
    last = messages[-1]
    if last["role"] != "user":
        advice = "; a prompt is what the model answers: leave the last turn out" if last["role"] == "assistant" else ""
        raise InputError(f"{where}: must end with a user's message, ends with {last['role']}'s{advice}")
    if not last["content"].strip():
        raise InputError(f"{where}: is empty")
    return messages


def answer_text(value: Any, where: str) -> str:
    """Checks an answer: a text, or a list with one assistant's message.

    Raises:
      InputError: the value is neither.
    """
    if isinstance(value, str):
        return _text(value, where)
    messages = check_messages(value, where, ordered=False)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(f"{where}: expected a text or one assistant's message")
    return messages[0]["content"]


def check_messages(value: Any, where: str, *, ordered: bool = True) -> Messages:
    """Checks a list of messages: `role` and `content`, or ShareGPT's `from` and `value`. Other keys are left out.

    Args:
      ordered: roles must come as chat templates expect them: a system message first if any, then turn by turn.

    Raises:
      InputError: the value is no such list.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise InputError(f"{where}: expected a text or a list of messages, found {found}")
    messages = [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]
    if ordered:
        _check_order(messages, where)
    return messages


def hh_messages(text: str) -> Messages | None:
    """Reads the turns of a text as in Anthropic's HH files, "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Returns:
      The messages, or None for another text.
    """
    before, *turns = _HH_TURN.split("\n\n" + text.lstrip("\n"))
    if before or not turns:
        return None
    return [
        {"role": _HH_ROLES[name], "content": content.strip()}
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where}: expected an object with the texts 'role' and 'content'")
    if "from" in message and "role" not in message:
        role, content = message["from"], message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    else:
        role, content = message.get("role"), message.get("content")
    if message.get("tool_calls") or (isinstance(role, str) and role in _TOOL_ROLES):
        raise InputError(f"{where}: tool calls and tools' answers are not supported; leave such conversations out")
    if isinstance(content, list):
        raise InputError(f"{where}: content is a list of parts; only text is supported, give it as one string")
    if not isinstance(content, str):
        raise InputError(f"{where}: expected an object with the texts 'role' and 'content'")
    if role not in ROLES:
        advice = "; call it system" if role == "developer" else ""
        raise InputError(f"{where}: role must be one of {', '.join(ROLES)}, not {short(role)}{advice}")
    return {"role": role, "content": _text(content, f"{where}.content")}


def _check_order(messages: Messages, where: str) -> None:
    previous = "system"
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i:
            raise InputError(f"{where}[{i}]: a system message may only come first")
        if role == "assistant" and previous == "system":
            raise InputError(f"{where}[{i}]: the first turn must be a user's")
        if role == previous and i:
            raise InputError(f"{where}[{i}]: roles must alternate: {role} follows {previous}; join the two turns")
        previous = role


def _text(value: str, where: str) -> str:
    if value.isascii():
        return value
    try:
        value.encode()
        clean = "\ue000" not in value and "\ue001" not in value  # they mark contents in a rendered chat template
    except UnicodeEncodeError:
        clean = False
    if not clean:
        raise InputError(f"{where}: holds a lone surrogate or a private-use character; clean the text")
    return value
