"""Names of columns in the data files."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of columns in the data files, one or several: then the first that a row has."""

    prompt: tuple[str, ...] | str = ("prompt",)
    """a text or a list of messages"""
    messages: tuple[str, ...] | str = ("messages", "conversations")
    """a conversation, `role` and `content` or ShareGPT's `from` and `value`"""
    response: tuple[str, ...] | str = ("response", "completion")
    """the answer beside a prompt"""
    chosen: tuple[str, ...] | str = ("chosen",)
    """the better answer, alone or as the end of a conversation"""
    rejected: tuple[str, ...] | str = ("rejected",)
    """the worse answer, likewise"""
    response_a: tuple[str, ...] | str = ("response_a",)
    """the first answer of a pair with a label, or without"""
    response_b: tuple[str, ...] | str = ("response_b",)
    """the second answer"""
    label: tuple[str, ...] | str = ("label",)
    """1 where response_a is better, 0 where response_b is, or the probability that response_a is; also the column that
    external labels have in an iteration's pairs.jsonl"""

    def __post_init__(self) -> None:
        for column in fields(self):
            names = getattr(self, column.name)
            if isinstance(names, str):
                object.__setattr__(self, column.name, (names,))
