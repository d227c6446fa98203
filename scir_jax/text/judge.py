"""Judge questions as token ids: which of two answers is better? Or: how many points is one answer worth?

Two layouts compare. `standalone`: a prompt of its own that shows the conversation and both answers. `continuation`: the next
user turn of the very conversation that holds answer a, so that one causal row gives log pi(a | prompt) and the
verdict. A third one, `pointwise`, is a prompt of its own that shows one answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from scir_jax.errors import InputError
from scir_jax.text.chat import Chat, Literal
from scir_jax.text.tokens import THINKING, Ids

# {name} is a field, {{name}} the same in braces; all other braces are text as they stand.
_FIELD = re.compile(r"\{\{([a-z_][a-z0-9_]*)\}\}|\{([a-z_][a-z0-9_]*)\}")
POINTWISE = "pointwise"
_FIELDS = {
    "standalone": ("prompt", "response_a", "response_b"),
    "continuation": ("prompt", "response_a", "response_b"),
    POINTWISE: ("prompt", "response"),
}
_NEEDED = {
    "standalone": {"prompt", "response_a", "response_b"},
    "continuation": {"response_b"},
    POINTWISE: {"prompt", "response"},
}


@dataclass(frozen=True)
class Template:
    """A judge template.

    Attributes:
      question: text with {prompt}, {response_a}, {response_b}; in the continuation layout response a is the
        conversation's last answer and {response_a} may not occur; in the pointwise layout with {prompt} and {response}.
        Plain text: it spells no control tokens.
      answer_prefix: text of the judge's own turn before the verdict; it may spell control tokens. One with a thinking
        block takes the place of the empty block that is written for a model that thinks.
      verdicts: the letters for "a is better" and "b is better"; in the pointwise layout the points, numbers.
      system: who the judge is; a system message where that is possible, else at the beginning of the question.
    """

    name: str
    layout: str
    question: str
    answer_prefix: str
    verdicts: tuple[str, ...]
    system: str = ""


def load_template(name: str, *, pointwise: bool = False) -> Template:
    """Reads a built-in template by name, or one from a YAML file.

    Args:
      pointwise: one that gives points to one answer is wanted, else one that compares two.

    Raises:
      InputError: the file is missing, has other keys, lacks a field, or is of the other sort.
    """
    built_in = resources.files("scir_jax.text") / "templates" / f"{name}.yaml"
    path = built_in if built_in.is_file() else Path(name)
    if not path.is_file():
        names = sorted(
            p.name[:-5] for p in (resources.files("scir_jax.text") / "templates").iterdir() if p.name.endswith(".yaml")
        )
        raise InputError(f"judge template {name!r}: neither a file nor one of {', '.join(names)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        template = Template(name=name, **{**content, "verdicts": tuple(map(str, content["verdicts"]))})
        texts = (template.layout, template.question, template.answer_prefix, template.system)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        keys = ", ".join(f.name for f in dataclasses.fields(Template)[1:-1])
        raise InputError(
            f"judge template {name}: must be a YAML mapping with the keys {keys} (and system, if wanted)"
        ) from None
    if template.layout not in _NEEDED:
        raise InputError(
            f"judge template {name}: layout must be standalone, continuation or pointwise, not {template.layout!r}"
        )
    if pointwise != (template.layout == POINTWISE):
        wanted = "give points to one answer" if pointwise else "compare two answers"
        raise InputError(
            f"judge template {name}: its layout is {template.layout}, but here one is needed that can {wanted}; those of "
            "layout pointwise belong into generative.pointwise, the others into generative.templates"
        )
    if pointwise:
        _check_points(template)
    elif len(template.verdicts) != 2 or template.verdicts[0] == template.verdicts[1]:
        raise InputError(f"judge template {name}: verdicts must be two different letters")
    fields = {piece for piece in split_fields(template.question) if isinstance(piece, Field)}
    known = _FIELDS[template.layout]
    if unknown := fields - set(known):
        raise InputError(
            f"judge template {name}: the question has the unknown field {{{min(unknown)}}}; the fields are "
            f"{', '.join(f'{{{field}}}' for field in known)}; write {{{{{min(unknown)}}}}} for the word in braces"
        )
    if missing := _NEEDED[template.layout] - fields:
        raise InputError(f"judge template {name}: the question lacks {{{'}, {'.join(sorted(missing))}}}")
    if template.layout == "continuation" and "response_a" in fields:
        raise InputError(f"judge template {name}: response_a is the conversation's own answer, not a field")
    for key in ("system", "answer_prefix"):
        if found := [piece for piece in split_fields(getattr(template, key)) if isinstance(piece, Field)]:
            raise InputError(
                f"judge template {name}: {key} has the field {{{found[0]}}}, which only the question may have; "
                f"write {{{{{found[0]}}}}} for the word in braces"
            )
    return template


def _check_points(template: Template) -> None:
    try:
        points = [float(verdict) for verdict in template.verdicts]
    except ValueError:
        points = []
    if len(set(points)) < 2 or len(set(points)) != len(template.verdicts) or not all(map(math.isfinite, points)):
        raise InputError(
            f"judge template {template.name}: verdicts must be different numbers, the points; two at least"
        )


class Field(str):
    """The name of a field in a question."""


def split_fields(text: str) -> list[str]:
    """Splits a template's text into constant texts and `Field`s in turn, with {{name}} written out as {name}."""
    pieces: list[str] = [""]
    end = 0
    for match in _FIELD.finditer(text):
        pieces[-1] += text[end : match.start()]
        if match[2] is None:
            pieces[-1] += f"{{{match[1]}}}"
        else:
            pieces += [Field(match[2]), ""]
        end = match.end()
    pieces[-1] += text[end:]
    return pieces


@dataclass(frozen=True)
class Judge:
    """A template compiled for one tokenizer.

    Attributes:
      parts: constant ids and slots in turn; the last ids ask for the verdict.
      answer_tokens: how many tokens at the end are the template's answer_prefix and the verdict.
      system: where the template's system text went: "message", "question" (folded in front of it), or "" without one.
    """

    template: Template
    parts: tuple[Ids | str, ...]
    verdict_ids: Ids
    stop_ids: Ids
    answer_tokens: int
    system: str = ""

    @property
    def fixed_tokens(self) -> int:
        return sum(len(part) for part in self.parts if not isinstance(part, str))

    def slots(self, name: str) -> int:
        """Counts the slots of a name."""
        return sum(part == name for part in self.parts)

    def opening(self, prompt: int) -> int:
        """Counts the tokens of a question before the first quoted answer.

        Args:
          prompt: tokens of the quoted prompt.
        """
        before = itertools.takewhile(lambda part: part not in ("response_a", "response_b"), self.parts)
        return sum(prompt if part == "prompt" else len(part) for part in before)

    def pointwise_row(self, prompt: Ids, answer: Ids) -> Ids:
        """Returns the ids up to and without the points.

        Args:
          prompt, answer: plain texts, encoded.
        """
        values = {"prompt": prompt, "response": answer}
        return Chat.flatten([values[part] if isinstance(part, str) else part for part in self.parts])

    def row(self, *, conversation: Ids, prompt: Ids, a: Ids, b: Ids, a_text: Ids, b_text: Ids) -> Ids:
        """Returns the ids up to and without the verdict.

        Args:
          conversation: the prompt as sampled from, up to the assistant's header.
          prompt: the prompt's plain text, encoded.
          a, b: response ids as sampled, with a stop token unless cut.
          a_text, b_text: the responses as quoted text.
        """
        values = {"prompt": prompt, "response_a": a_text, "response_b": b_text}
        row = Chat.flatten([values[part] if isinstance(part, str) else part for part in self.parts])
        if self.template.layout == "standalone":
            return row
        # The end of turn is there once: sampled (and scored) with the response, or put behind a cut one.
        ended = bool(a) and a[-1] in self.stop_ids
        return conversation + (a if ended else a + self.stop_ids[:1]) + row


def compile_judge(template: Template, chat: Chat) -> Judge:
    """Finds a template's constant ids and its verdict ids.

    Raises:
      InputError: the verdicts do not differ in exactly one token, the last.
    """
    names: list[str] = []

    def slot(name: str) -> Ids:
        names.append(name)
        return (-len(names),)  # negative: no token has this id

    question = [
        slot(piece) if isinstance(piece, Field) else piece for piece in split_fields(template.question) if piece
    ]
    system = "".join(split_fields(template.system))
    placed = ""
    if system:
        # A conversation's system message was written before its judge came.
        placed = "message" if template.layout != "continuation" and chat.allows_system else "question"
    if placed == "question":
        question = [system + "\n\n", *question]
    messages: list[dict] = [{"role": "user", "content": question}]
    if template.layout == "continuation":
        messages = [{"role": "user", "content": [(-1001,)]}, {"role": "assistant", "content": [(-1002,)]}, *messages]
    elif placed == "message":
        messages = [{"role": "system", "content": system}, *messages]

    def row(*suffix: str) -> Ids:
        return chat.flatten(chat.pieces(messages, generation_prompt=True, suffix=(Literal(lead), *suffix)))

    prefix = "".join(split_fields(template.answer_prefix))
    lead = "" if chat.lead.strip() and any(mark in prefix for block in THINKING for mark in block) else chat.lead
    if chat.opened and prefix.startswith(chat.opened):
        prefix = prefix.removeprefix(chat.opened).removeprefix("\n")
    rows = [row(Literal(prefix), verdict) for verdict in template.verdicts]
    for verdict, ids in zip(template.verdicts, rows):
        if ids[-1] == chat.tokenizer.unk_token_id:
            raise InputError(f"judge template {template.name}: verdict {verdict!r} is not a token of the model")
    for (a, one), (b, other) in itertools.combinations(zip(template.verdicts, rows), 2):
        if one[:-1] != other[:-1] or one[-1] == other[-1]:
            raise InputError(
                f"judge template {template.name}: the verdicts {a!r} and {b!r} must differ in exactly one token, the last, "
                f"but end in {list(one[-3:])} and {list(other[-3:])}; choose other letters or another answer_prefix"
            )
    for verdict, token in zip(template.verdicts, (ids[-1] for ids in rows)):
        if token in chat.control_ids:
            raise InputError(f"judge template {template.name}: verdict {verdict!r} is not a token of the model")
    answer_tokens = 1
    if prefix:  # from where the row departs from one without it: a space before it may be part of its first token
        first = rows[0]
        answer_tokens = len(first) - next((i for i, (x, y) in enumerate(zip(first, row())) if x != y), len(row()))
    flat = rows[0][:-1]
    if template.layout == "continuation":
        flat = flat[flat.index(-1002) + 1 :]
        # `Judge.row` writes the end of the answer's turn.
        stop = next((i for i, token in enumerate(flat) if token in chat.stop_ids or token < 0), 0)
        if flat[stop] in chat.stop_ids:
            flat = flat[stop + 1 :]
    parts: list[Ids | str] = []
    constant: list[int] = []
    for token in flat:
        if token < 0:
            parts += [tuple(constant), names[-token - 1]]
            constant = []
        else:
            constant.append(token)
    parts.append(tuple(constant))
    return Judge(template, tuple(parts), tuple(ids[-1] for ids in rows), chat.stop_ids, answer_tokens, placed)
