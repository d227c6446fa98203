"""Judge questions as token ids: which of two answers is better?

Two layouts. `standalone`: a prompt of its own that shows the conversation and both answers. `continuation`: the next
user turn of the very conversation that holds answer a, so that one causal row gives log pi(a | prompt) and the
verdict.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from scir_jax.errors import InputError
from scir_jax.text.chat import Chat, Ids

_FIELD = re.compile(r"\{(prompt|response_a|response_b)\}")
_NEEDED = {"standalone": {"prompt", "response_a", "response_b"}, "continuation": {"response_b"}}


@dataclass(frozen=True)
class Template:
    """A judge template.

    Attributes:
      question: text with {prompt}, {response_a}, {response_b}; in the continuation layout response a is the
        conversation's last answer and {response_a} may not occur.
      answer_prefix: text of the judge's own turn before the verdict.
      verdicts: the letters for "a is better" and "b is better".
    """

    name: str
    layout: str
    question: str
    answer_prefix: str
    verdicts: tuple[str, str]


def load_template(name: str) -> Template:
    """A built-in template by name, or one from a YAML file.

    Raises InputError for a file that is missing, has other keys, or lacks a field.
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
        if not all(isinstance(text, str) for text in (template.layout, template.question, template.answer_prefix)):
            raise TypeError
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        keys = ", ".join(f.name for f in dataclasses.fields(Template)[1:])
        raise InputError(f"judge template {name}: must be a YAML mapping with the keys {keys}") from None
    if template.layout not in _NEEDED:
        raise InputError(f"judge template {name}: layout must be standalone or continuation, not {template.layout!r}")
    if len(template.verdicts) != 2 or template.verdicts[0] == template.verdicts[1]:
        raise InputError(f"judge template {name}: verdicts must be two different letters")
    fields = set(_FIELD.findall(template.question))
    if missing := _NEEDED[template.layout] - fields:
        raise InputError(f"judge template {name}: the question lacks {{{'}, {'.join(sorted(missing))}}}")
    if template.layout == "continuation" and "response_a" in fields:
        raise InputError(f"judge template {name}: response_a is the conversation's own answer, not a field")
    return template


@dataclass(frozen=True)
class Judge:
    """A template compiled for one tokenizer.

    Attributes:
      parts: constant ids and slots in turn; the last ids ask for the verdict.
      answer_tokens: how many tokens at the end are the judge's own, the verdict included.
    """

    template: Template
    parts: tuple[Ids | str, ...]
    verdict_ids: tuple[int, int]
    stop_ids: Ids
    answer_tokens: int

    @property
    def fixed_tokens(self) -> int:
        return sum(len(part) for part in self.parts if not isinstance(part, str))

    def slots(self, name: str) -> int:
        return sum(part == name for part in self.parts)

    def row(self, *, conversation: Ids, prompt: Ids, a: Ids, b: Ids, a_text: Ids, b_text: Ids) -> Ids:
        """Ids up to and without the verdict.

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

    Raises InputError unless the two verdicts differ in exactly one token, the last.
    """
    names: list[str] = []

    def slot(name: str) -> Ids:
        names.append(name)
        return (-len(names),)  # negative: no token has this id

    pieces = _FIELD.split(template.question)
    question = [slot(piece) if i % 2 else piece for i, piece in enumerate(pieces) if piece or i % 2]
    messages: list[dict] = [{"role": "user", "content": question}]
    if template.layout == "continuation":
        messages = [{"role": "user", "content": [(-1001,)]}, {"role": "assistant", "content": [(-1002,)]}, *messages]
    first, second = (
        chat.flatten(chat.pieces(messages, generation_prompt=True, suffix=chat.lead + template.answer_prefix + verdict))
        for verdict in template.verdicts
    )
    if len(first) != len(second) or first[:-1] != second[:-1] or first[-1] == second[-1]:
        a, b = template.verdicts
        raise InputError(
            f"judge template {template.name}: the verdicts {a!r} and {b!r} must differ in exactly one token, the last, "
            f"but end in {list(first[-3:])} and {list(second[-3:])}; choose other letters or another answer_prefix"
        )
    for verdict, token in zip(template.verdicts, (first[-1], second[-1])):
        if token in chat.control_ids | {chat.tokenizer.unk_token_id}:
            raise InputError(f"judge template {template.name}: verdict {verdict!r} is not a token of the model")
    answer_tokens = max(len(first) - len(chat.flatten(chat.pieces(messages, generation_prompt=True))), 1)
    flat = first[:-1]
    if template.layout == "continuation":
        flat = flat[flat.index(-1002) + 1 :]
        stop = next((i for i, token in enumerate(flat) if token in chat.stop_ids), None)
        if stop is not None:
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
    return Judge(template, tuple(parts), (first[-1], second[-1]), chat.stop_ids, answer_tokens)
