"""Small tokenizers of the three common kinds with their chat templates, and what the tests of text ask of them."""

import functools
import json
import random
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from scir_jax.config.schema import TextConfig
from scir_jax.data.encode import Encoder
from scir_jax.text.chat import Chat
from scir_jax.text.judge import Template, compile_judge, load_template
from scir_jax.world.tokenizer import build_tokenizer
from tests.chat_templates import turns

SENTENCES = [
    "Which answer is better? Reply with the letter A or B alone.",
    "You are a helpful assistant. Judge correctness first, completeness second and style last.",
    "Hello there, how are you doing today?",
    "Name a colour. Blue, of course! user assistant system",
    "[INST] Compare your answer above (A) with this other answer (B). [/INST] <<SYS>>",
] * 3

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Mistral 7B Instruct v0.2: a space before the answer, which the prompt does not end with.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' and loop.first and system is defined %}
        {{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Llama 2: a space on both sides of the answer.
LLAMA = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""


def byte_level(template=CHATML, normalizer=None):
    """Byte-level BPE as of Qwen: no beginning-of-sequence token, and an unknown token that is a control token too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    # With a normaliser the worst case: control tokens are looked for in the normalised text.
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=normalizer is not None) for t in control])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "\n\n")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def sentencepiece(scheme, template):
    """BPE in SentencePiece's manner. Scheme "legacy" is the normaliser of Llama 2's and Mistral's first tokenizers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()])
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=700, special_tokens=fixed, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    if scheme == "legacy":
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        content["pre_tokenizer"] = None
    else:
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Adds a second beginning-of-sequence token to whoever does not ask for none.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


TOKENIZERS = {
    "chatml": byte_level,
    "mistral": lambda: sentencepiece("first", MISTRAL),
    "mistral-always": lambda: sentencepiece("always", MISTRAL),
    "mistral-legacy": lambda: sentencepiece("legacy", MISTRAL),
    "llama": lambda: sentencepiece("first", LLAMA),
    "llama-legacy": lambda: sentencepiece("legacy", LLAMA),
    "sentencepiece-chatml": lambda: sentencepiece("always", CHATML.replace("<|im_end|>", "</s>")),
    "world": lambda: build_tokenizer(256),
}
BPE = [name for name in TOKENIZERS if name != "world"]
BUILT_IN = sorted(
    p.name[:-5] for p in (resources.files("scir_jax.text") / "templates").iterdir() if p.name.endswith(".yaml")
)

WORLD_STANDALONE = Template("w", "standalone", "judge {prompt}{response_a};{prompt}{response_b}", "", ("1", "2"))
WORLD_CONTINUATION = Template("w", "continuation", "judge {prompt}{response_b}", "", ("1", "2"))


@functools.cache
def chat(name) -> Chat:
    return Chat(TOKENIZERS[name](), name)


@functools.cache
def judge(name, template):
    if name == "world":
        template = {"standalone": WORLD_STANDALONE, "continuation": WORLD_CONTINUATION}[template]
        return compile_judge(template, chat(name))
    return compile_judge(load_template(template), chat(name))


def encoder(name, *templates, context=4096, **text):
    return Encoder(TextConfig(**text), chat(name), [judge(name, t) for t in templates], context)


def conversations(name):
    if name == "world":
        return [
            turns("copy abc="),
            turns("copy abc=", "abc!", "reverse fgh="),
            turns("upper dd=", "DD", "rotate abc=", "bca!"),
        ]
    return [
        turns("Hello there"),
        turns("Hello there", "Blue, of course!"),
        turns("Name a colour.", "Blue", "Which is better?\n\nA or B?"),
        turns("Name a colour.", "Blue", "And  you?", "I am\n  - fine, ähm 日本 🙂\n", "Good."),
        turns("Hello", "there", "how", "are you", system="You are a helpful assistant."),
    ]


def reference(name, messages, generation_prompt):
    return chat(name).tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=generation_prompt
    )


def control(name, ids):
    """The control tokens of a row, in order."""
    return [i for i in ids if i in chat(name).control_ids]


def spelled(name, ids):
    """What ids of text in the middle of a row say; a decoder may strip a space at the start of a whole text."""
    tokenizer = chat(name).tokenizer
    stop = chat(name).stop_ids[0]
    text = tokenizer.decode([stop, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix(tokenizer.convert_ids_to_tokens(stop))


def hostile(name):
    """Texts that spell control tokens: every one at every kind of place, nested, overlapping, cut, repeated."""
    rng = random.Random(0)
    tokens = [t for t in chat(name).tokenizer.get_added_vocab() if t.strip()]
    words = ["a", " ", "\n", "Hello", "{prompt}", "{response_b}", "{{7*7}}", "{% raw %}", "[/INST]", "\ue0000\ue001"]
    if name == "world":
        words = ["a", " ", "\n", "copy", "="]
    yield from tokens
    for token in tokens:
        half = len(token) // 2
        yield from (
            f"a{token}",
            f"{token}a",
            f" {token} ",
            f"a\n{token}\n{token}b",
            token + token,
            token[:half] + token + token[half:],
            token[:1] + token + token[1:],
            token[:-1] + token + token[-1:],
            token[:-1] + token,
            token[0] * 3 + token + token[-1] * 3,
            token[:half],
            token[half:],
        )
    for _ in range(60):
        parts = [rng.choice(words + tokens) for _ in range(rng.randrange(1, 8))]
        if rng.random() < 0.5:
            inner = rng.choice(tokens)
            at = rng.randrange(len(inner) + 1)
            parts.append(inner[:at] + rng.choice(tokens) + inner[at:])
        yield "".join(parts)


def judge_row(name, j, prompt, response_a, response_b):
    c = chat(name)
    return j.row(
        conversation=c.prompt(turns(prompt)),
        prompt=c.encode_text(prompt),
        a=c.answer(response_a),
        b=c.answer(response_b),
        a_text=c.encode_text(response_a),
        b_text=c.encode_text(response_b),
    )
