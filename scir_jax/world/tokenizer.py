"""The tokenizer of the embedded world, as an ordinary Hugging Face fast tokenizer.

Each word of the vocabulary is one token, and so is each character outside of such words; nothing is added, merged or
normalised. So decode(encode(text)) == text for every text over the vocabulary, and two pieces of text encode separately
as they do together unless a word straddles the boundary.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scir_jax.world.tasks import LETTERS, MARKER, TASKS

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, USER, ASSISTANT)
WORDS = (*TASKS, "judge", "verdict")
# 1 and 2 are the judge's verdicts: letters would double as letters of answers.
CHARACTERS = (*LETTERS, *LETTERS.upper(), "=", MARKER, ";", " ", "\n", "1", "2")
VOCABULARY = (*SPECIAL_TOKENS, *WORDS, *CHARACTERS)  # a token's id is its position

# The assistant's header belongs to the assistant's turn, so a conversation that ends with a
# user turn plus the generation prompt is a prefix of the same conversation with its answer.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Unsupported role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif -%}
"""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer in memory.

    Args:
      max_length: the model's context, recorded for its users.
    """
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    # The first alternative that matches wins, so upper-reverse must come before upper.
    words = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, words), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # the default would put spaces between tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="right",
    )


def write_tokenizer(directory: Path, max_length: int) -> None:
    """Writes the tokenizer's files and generation_config.json into an existing directory."""
    build_tokenizer(max_length).save_pretrained(directory)
    generation = {
        "bos_token_id": VOCABULARY.index(BOS),
        "eos_token_id": VOCABULARY.index(EOS),
        "pad_token_id": VOCABULARY.index(PAD),
    }
    text = json.dumps(generation, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
