"""Chat templates with the features of real instruct models' ones, and small tokenizers of each kind.

The templates are written for these tests: what they have in common with a family's template is how they treat roles,
white space, system texts and thinking, not their wording. Every tokenizer has the control tokens of every template, so
that each can be tried with each.
"""

import functools
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scir_jax.text.chat import Chat, load_tokenizer

# System text folded into the first user turn, contents trimmed, a space on both sides of an answer.
LLAMA_2 = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles have to alternate') }}
    {%- endif %}
    {%- set text = message['content'] %}
    {%- if loop.first and system %}{%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text %}{%- endif %}
    {%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + text.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

# Headers, trimmed contents, and a system block with dates whether or not there is a system message.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- set system = '' %}{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set turns = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in turns %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Turns must alternate, so that a system message is refused; the prompt ends with the user's turn.
MISTRAL_1 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token + ' ' }}
    {%- else %}{{- raise_exception('only user and assistant roles') }}{%- endif %}
{%- endfor %}"""

# The system text stands in the last user turn; a space before answers.
MISTRAL_3 = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' and loop.last and system is not none %}
        {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

# No space anywhere.
MISTRAL_NEMO = MISTRAL_3.replace("'[INST] '", "'[INST]'").replace("' ' + message", "message")

# A default system text.
QWEN_2 = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Thinking is shown only behind the last user turn, and an empty block says that there was none.
QWEN_3 = """\
{%- set state = namespace(last=0) %}
{%- for message in messages if message['role'] == 'user' %}{%- set state.last = loop.index0 %}{%- endfor %}
{%- set turn = namespace(users=-1) %}
{%- for message in messages %}
    {%- if message['role'] != 'assistant' %}
        {%- if message['role'] == 'user' %}{%- set turn.users = turn.users + 1 %}{%- endif %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {%- set text = message['content'] %}{%- set thinking = '' %}
        {%- if '</think>' in text %}
            {%- set thinking = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if turn.users == state.last %}{{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- text + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# The prompt opens a thinking block; earlier answers are shown without theirs.
QWQ = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message['content'].split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# No system message, alternation, another name for the assistant, trimmed contents.
GEMMA_2 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# The system text in front of the first user turn.
GEMMA_3 = """\
{{- bos_token }}
{%- set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string %}{{- message['content'] | trim }}{%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# No control tokens but the end; the prompt ends with a space.
PLAIN = """\
{%- for message in messages %}
    {{- message['role'] | capitalize + ': ' + message['content'] }}
    {{- eos_token if message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant: ' }}{%- endif %}"""

# Control tokens that take the white space behind them.
PHI_3 = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

TEMPLATES = {
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "mistral-1": MISTRAL_1,
    "mistral-3": MISTRAL_3,
    "mistral-nemo": MISTRAL_NEMO,
    "qwen-2": QWEN_2,
    "qwen-3": QWEN_3,
    "qwq": QWQ,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
    "plain": PLAIN,
    "phi-3": PHI_3,
}
NO_SYSTEM = {"mistral-1", "gemma-2"}

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<mask>", "<｜end▁of▁sentence｜>", "♦"),
    *("[THINK]", "[/THINK]"),
)
NOT_SPECIAL = ("<tool_call>",)
MARKS = ("<think>", "</think>")  # not special either: text of a model
TAKES_SPACE = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

TEXT = [
    "Which answer is better? Reply with the letter A or B alone, nothing else.",
    "You are a helpful assistant. Judge correctness first, completeness second and style last.",
    "Hello there, how are you doing today?  I am  fine.\n\nAnd you?\n",
    "Name a colour. Blue, of course! user assistant system model Answer Today Date: 26 Jul 2024",
    "    def f(x):\n        return x + 1\n\n\nprint(f(10))  # über naïve 日本語",
] * 4

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(kind: str) -> Tokenizer:
    """Byte-level BPE with the splitting of GPT-2, Llama 3 or Qwen 2."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind != "gpt-2":
        split = SPLIT.replace("{1,3}", "") if kind == "qwen-2" else SPLIT
        levels = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(levels)
    if kind == "qwen-2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece(kind: str) -> Tokenizer:
    """BPE with ▁ for spaces and byte fallback: how a space comes before the first word is what differs."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Runs of spaces are tokens; letters and spaces only merge as "▁letters".
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁+(?=▁)|▁?[^▁\n.,?!:]+|[\n.,?!:]|▁"), "isolated")
    fixed = ["<unk>", "<s>", "</s>", *BYTES, "\n", "▁▁", "▁▁▁"]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)]
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        strip = []
        # Tokens of the vocabulary already; added so that they win over merges.
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("\n\n", "▁▁", "▁▁▁", "\n")])
    else:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As of T5: compatibility characters become plain ones, runs of spaces one space, new lines stay."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    alphabet = sorted({c for text in TEXT for c in text} | set("<>|_/[]{}\n0123456789"))
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        unk_token="<unk>",
        special_tokens=["<unk>", "<s>", "</s>", "<|im_end|>"],  # in the vocabulary too, with the best of scores
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


# Kind -> how it is built, and the class that its directory names.
TOKENIZERS = {
    "gpt-2": (lambda: byte_level("gpt-2"), None),
    "llama-3": (lambda: byte_level("llama-3"), None),
    "qwen-2": (lambda: byte_level("qwen-2"), "Qwen2Tokenizer"),
    "llama-2": (lambda: sentencepiece("first"), None),
    "llama-2 legacy": (lambda: sentencepiece("legacy"), None),
    "llama-2 always": (lambda: sentencepiece("always"), None),
    "llama-2 class": (lambda: sentencepiece("legacy"), "LlamaTokenizer"),
    "gemma": (lambda: sentencepiece("gemma"), None),
    "gemma class": (lambda: sentencepiece("gemma"), "GemmaTokenizer"),
    "unigram": (unigram, None),
}
LOSSLESS = [kind for kind in TOKENIZERS if kind != "unigram"]  # "qwen-2" composes accents, but loses nothing else


def save(kind: str, directory: Path) -> None:
    """Writes a tokenizer's directory, without a chat template."""
    build, class_name = TOKENIZERS[kind]
    tokenizer = build()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind in ("gpt-2", "llama-3", "qwen-2"):
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*names.values(), *CONTROL)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=True) for t in TAKES_SPACE])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*MARKS, *NOT_SPECIAL)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    if class_name:
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "tokenizer_class": class_name}), encoding="utf-8")


@functools.cache
def directory_of(kind: str) -> tempfile.TemporaryDirectory:
    directory = tempfile.TemporaryDirectory()
    save(kind, Path(directory.name))
    return directory


@functools.cache
def tokenizer(kind: str, template: str):
    """A tokenizer as it comes from its saved directory, with a chat template."""
    loaded = load_tokenizer(Path(directory_of(kind).name))
    loaded.chat_template = TEMPLATES[template]
    return loaded


def stops(kind: str) -> list[int]:
    """What a model's generation_config.json would name."""
    return tokenizer(kind, "plain").convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"])


@functools.cache
def chat(kind: str, template: str, **kwargs) -> Chat:
    return Chat(tokenizer(kind, template), f"{kind} {template}", stops(kind), kwargs)


def with_template(source: str, kind: str = "gpt-2", **kwargs) -> Chat:
    """A chat whose template is none of `TEMPLATES`; errors name it "x"."""
    made = tokenizer(kind, "plain")
    made = type(made)(tokenizer_object=made.backend_tokenizer, **made.special_tokens_map, chat_template=source)
    return Chat(made, "x", stops(kind), kwargs)


def turns(*contents, system=None):
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def reference(chat: Chat, messages, generation_prompt=True) -> list[int]:
    """What transformers makes of a conversation."""
    return chat.tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=generation_prompt,
        **{"date_string": "26 Jul 2024", **chat._kwargs},
    )


def spelled(chat: Chat, ids) -> str:
    """What ids say, with their control tokens."""
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def in_context(chat: Chat, ids) -> str:
    """What ids of text in the midst of a row say; a decoder may strip a space at the start of a whole text."""
    stop = chat.stop_ids[0]
    return spelled(chat, [stop, *ids]).removeprefix(chat.tokenizer.convert_ids_to_tokens(stop))


def control(chat: Chat, ids) -> list[int]:
    """The control tokens of a row, in order."""
    return [i for i in ids if i in chat.control_ids]


def structure(chat: Chat, ids) -> list[int]:
    """The control tokens of a row and the marks of its thinking blocks, in order."""
    return [i for i in ids if i in chat.control_ids.union(chat.tokenizer.convert_tokens_to_ids([*MARKS]))]
