"""The programs of a run whose weights and data are not here: every row as long as the limits of `text` allow."""

from __future__ import annotations

from functools import cached_property

from jax.sharding import Mesh

from scir_jax.config import Config
from scir_jax.data.encode import Encoder, Prompt
from scir_jax.loop.computation import Computation, Facts
from scir_jax.loop.session import adapters_of
from scir_jax.model.architecture import Architecture
from scir_jax.text.judge import Field, Judge, Template, load_template, split_fields

CHARACTERS = 3
"""of a template's text make one token: fewer than in English text, so that rows are planned too long, not too short"""
CHAT_TOKENS = 32
"""that a chat template writes around a judge's question"""


class Planned(Computation):
    """A configuration's computation on a mesh, perhaps another machine's."""

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh):
        super().__init__(config, arch, mesh, adapters_of(config.lora))
        self.judges = [assumed_judge(load_template(name)) for name in config.generative.templates]

    @cached_property
    def facts(self) -> Facts:
        encoder = Encoder(self.config, None, self.judges, self.arch.max_positions)
        text = self.config.text
        longest = (0,) * text.max_prompt_tokens
        prompts = [Prompt([], longest, longest)]
        judged = max(encoder.shapes(prompts).judges)
        conversation = min(text.max_prompt_tokens + text.max_response_tokens, self.arch.max_positions)
        return Facts(
            shapes=encoder.shapes(prompts, conversation, judged),
            verdict_ids=tuple(judge.verdict_ids for judge in self.judges),
            continued=encoder.continued,
            stop_ids=(2,),
            pad_id=0,
        )

    @property
    def files(self) -> frozenset[str]:
        data = self.config.data
        return frozenset(key for key in ("ift", "eft", "heldout_prompts", "heldout_pairs") if getattr(data, key))


def assumed_judge(template: Template) -> Judge:
    """A judge with the slots of a template and about its length, for want of a tokenizer."""
    pieces = split_fields(template.question)
    constant = [template.system, template.answer_prefix, *(p for p in pieces if not isinstance(p, Field))]
    fixed = -(-sum(map(len, constant)) // CHARACTERS) + CHAT_TOKENS
    slots = (str(piece) for piece in pieces if isinstance(piece, Field))
    return Judge(template, ((0,) * fixed, *slots), (0, 1), (2,), 1)
