"""The programs of a run whose weights and data are not here: every row as long as the limits of `text` allow."""

from __future__ import annotations

from jax.sharding import Mesh

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.pairs import Prompt
from scir_jax.engine.descriptions import Facts
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.engine.reward import RewardPrograms, compiled_length
from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.architecture import Architecture
from scir_jax.model.hf import weights
from scir_jax.run import hub
from scir_jax.run.models import adapters_of
from scir_jax.run.setup import rates
from scir_jax.text.judge import Field, Judge, Template, load_template, split_fields

CHARACTERS = 3
"""of a template's text make one token: fewer than in English text, so that rows are planned too long, not too short"""
CHAT_TOKENS = 32
"""that a chat template writes around a judge's question"""


def planned(config: Config, arch: Architecture, mesh: Mesh) -> Programs:
    """Makes a configuration's programs on a mesh, perhaps another machine's."""
    return Programs(config, arch, mesh, adapters_of(config.lora), facts(config, arch.max_positions))


def reward_programs(run: Programs) -> list[Program]:
    """Returns the program of the reward model that pairs.scorer names, for the longest row; none without one.

    Its tokenizer is assumed to make as many tokens of a text as the model's does.

    Raises:
      InputError: there is no such reward model, or it cannot be used on this mesh.
    """
    config, name = run.config, run.config.pairs.scorer
    if not config.run.iterations or not name or hub.is_function(name):
        return []
    directory = hub.configuration(name, "pairs.scorer")
    if not directory.is_dir():
        raise InputError(f"pairs.scorer {name!r}: is neither module:function nor a directory of a reward model")
    arch = families.read(weights.hf_config(directory), str(directory / "config.json"), reward=True)
    text = config.text
    tokens = compiled_length(text.max_prompt_tokens + text.max_response_tokens, arch.max_positions)
    try:
        return [RewardPrograms.beside(run, arch).program(tokens)]
    except InputError as error:
        raise InputError(f"pairs.scorer {directory}: {error}") from None


def facts(config: Config, context: int) -> Facts:
    """Assumes what the programs depend on from the limits of the configuration.

    Args:
      context: tokens that the model can take.
    """
    judges = [assumed_judge(load_template(name)) for name in config.generative.templates]
    text, data = config.text, config.data
    pointwise = None
    if rates(config):
        pointwise = assumed_judge(load_template(config.generative.pointwise, pointwise=True))
    encoder = Encoder(text, None, judges, context, pointwise=pointwise)
    longest = (0,) * text.max_prompt_tokens
    prompts = [Prompt([], longest, longest)]
    question = max(encoder.lengths(prompts).judges)
    conversation = min(text.max_prompt_tokens + text.max_response_tokens, context)
    keys = ("ift", "eft", "heldout_prompts", "heldout_pairs")
    present = {key for key in keys if getattr(data, key)} | ({"heldout_prompts"} if data.holdout else set())
    if not present and not data.prompts and not data.pairs:
        # The paper's setting has them all.
        present = set(keys)
    return Facts(
        lengths=encoder.lengths(prompts, {"ift": conversation, "eft": question}),
        verdict_ids=tuple(judge.verdict_ids for judge in judges),
        continued=encoder.continued,
        stop_ids=(2,),
        pad_id=0,
        present=frozenset(present),
        point_ids=pointwise.verdict_ids if pointwise else (),
    )


def assumed_judge(template: Template) -> Judge:
    """Makes a judge with the slots of a template and about its length, for want of a tokenizer."""
    pieces = split_fields(template.question)
    constant = [template.system, template.answer_prefix, *(p for p in pieces if not isinstance(p, Field))]
    fixed = -(-sum(map(len, constant)) // CHARACTERS) + CHAT_TOKENS
    slots = (str(piece) for piece in pieces if isinstance(piece, Field))
    return Judge(template, ((0,) * fixed, *slots), tuple(range(len(template.verdicts))), (2,), 1)
