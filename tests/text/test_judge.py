"""Judge templates on each family of chat templates and each kind of tokenizer."""

import json
import random

import pytest

from scir_jax.errors import InputError
from scir_jax.text.chat import Chat
from scir_jax.text.judge import Field, Template, compile_judge, load_template, split_fields
from tests.chat_templates import (
    NO_SYSTEM,
    TEMPLATES,
    TOKENIZERS,
    chat,
    control,
    spelled,
    structure,
    turns,
    with_template,
)

BUILT_IN = ("standalone", "criteria", "continuation", "evaluator", "evaluator_continuation")
KINDS = [(k, t) for k in TOKENIZERS for t in TEMPLATES if not (k.startswith("gemma") and t == "phi-3")]
each = pytest.mark.parametrize("kind, template", KINDS)
# The thinking that stands before a verdict, and behind a prompt that opens none or one.
BLOCK = "<think>\n\n</think>\n\n"


def mine(layout="standalone", question="{prompt}|{response_a}|{response_b}", prefix="", verdicts=("A", "B"), system=""):
    return Template("mine", layout, question, prefix, verdicts, system)


def row_of(c, judge, messages, prompt, a, b):
    return judge.row(
        conversation=c.prompt(messages),
        prompt=c.encode_text(prompt),
        a=c.answer(a),
        b=c.answer(b),
        a_text=c.encode_text(a),
        b_text=c.encode_text(b),
    )


def question_of(judge, **fields):
    pieces = split_fields(judge.template.question)
    question = "".join(fields[piece] if isinstance(piece, Field) else piece for piece in pieces)
    return f"{judge.template.system}\n\n{question}" if judge.system == "question" else question


def whole(c, messages, template, verdict="A"):
    """A rendered conversation and the judge's verdict as one text, in the tokenizer's own ids."""
    rendered = c.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    return c.tokenizer(rendered + before_verdict(template) + verdict, add_special_tokens=False)["input_ids"]


def before_verdict(template):
    """What the judge's turn begins with, behind the template's own header."""
    return {"qwen-3": BLOCK, "qwq": "\n</think>\n\n", "llama-2": " ", "mistral-3": " "}.get(template, "")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["standalone", "criteria", "evaluator"])
@each
def test_a_standalone_row_is_the_rendered_question(kind, template, name):
    c, j = chat(kind, template), compile_judge(load_template(name), chat(kind, template))
    prompt, a, b = "user: Name a\ncolour.\n\nassistant: Blue\n\nuser: Another?", "Red, of course!", "1. Green\n2. Blue"
    messages = turns(question_of(j, prompt=prompt, response_a=a, response_b=b))
    if j.system == "message":
        messages = [{"role": "system", "content": j.template.system}, *messages]
    row = row_of(c, j, turns("unused"), prompt, a, b)
    expected = whole(c, messages, template)
    assert spelled(c, (*row, j.verdict_ids[0])) == spelled(c, expected)
    assert structure(c, row) == structure(c, expected) and expected[-1] == j.verdict_ids[0]


@each
def test_a_pointwise_row_is_the_rendered_question(kind, template):
    c, additive = chat(kind, template), load_template("additive", pointwise=True)
    question, prompt, answer = additive.question, "user: Name a\ncolour.", "Red, {response} of course!"
    messages = turns(question.replace("{response}", answer).replace("{prompt}", prompt))
    expected = [whole(c, messages, template, verdict) for verdict in "012345"]
    if len({tuple(ids[:-1]) for ids in expected}) > 1:  # a small vocabulary that has a space before some of the digits
        with pytest.raises(InputError, match="must differ in exactly one token, the last"):
            compile_judge(additive, c)
        return
    j = compile_judge(additive, c)
    row = j.pointwise_row(c.encode_text(prompt), c.encode_text(answer))
    for ids, token in zip(expected, j.verdict_ids, strict=True):
        assert spelled(c, (*row, token)) == spelled(c, ids)
        assert structure(c, row) == structure(c, ids) and ids[-1] == token
    assert len(set(j.verdict_ids)) == 6 and j.answer_tokens == 1


@pytest.mark.parametrize("name", ["continuation", "evaluator_continuation"])
@each
def test_a_continuation_row_is_the_next_turn_of_the_conversation(kind, template, name):
    c, j = chat(kind, template), compile_judge(load_template(name), chat(kind, template))
    a, b = "Red, of course!", "1. Green\n2. Blue"
    for system in (None, "Be brief."):
        for contents in (("Name a colour.",), ("Hello", "there", "Name a colour.")):
            if system and (not c.allows_system or template in ("mistral-3", "mistral-nemo")):
                continue  # a system text in the last user turn stays in the prompt's
            messages = turns(*contents, system=system)
            row = row_of(c, j, messages, "unused", a, b)
            question = turns(*contents, a, question_of(j, response_b=b), system=system)
            prompt, answer = c.prompt(messages), c.answer(a)
            assert row[: len(prompt) + len(answer)] == prompt + answer
            row = (*row, j.verdict_ids[0])
            expected = whole(c, question, template)
            if template in ("qwen-3", "qwq"):
                # The block of the prompt's own answer is no longer shown behind the next user turn.
                behind = structure(c, row[len(prompt) + len(answer) :])
                assert behind == structure(c, expected)[-len(behind) :]
                assert len(structure(c, row)) == len(structure(c, expected)) + 2
            else:
                assert spelled(c, row) == spelled(c, expected) and structure(c, row) == structure(c, expected)


@pytest.mark.parametrize("end", ["", "</s>"])
def test_a_template_that_does_not_end_an_answer(end):
    """What stands behind an answer stays, and a later end of turn is not taken for the answer's."""
    source = """\
{%- for message in messages %}
    {{- message['content'] + ('END' if message['role'] == 'user' else '') + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '> ' }}{%- endif %}""".replace("END", end)
    c = Chat(with_template(source, "llama-2").tokenizer, "x")
    j = compile_judge(mine("continuation", "{response_b}?"), c)
    row = spelled(c, row_of(c, j, turns("P"), "P", "Q", "R"))
    assert row == f"P{end}\n> Q</s>\nR?{end}\n>"


# --- system texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_where_the_system_text_goes(template):
    c = chat("gpt-2", template)
    alone = compile_judge(mine(system="You judge."), c)
    assert alone.system == ("question" if template in NO_SYSTEM else "message")
    messages = turns("P|Q|R", system="You judge.") if alone.system == "message" else turns("You judge.\n\nP|Q|R")
    row = (*row_of(c, alone, turns("x"), "P", "Q", "R"), alone.verdict_ids[0])
    assert spelled(c, row) == spelled(c, whole(c, messages, template))
    inside = compile_judge(mine("continuation", "{response_b}?", system="You judge."), c)
    assert inside.system == "question"
    assert "You judge.\n\nR?" in spelled(c, row_of(c, inside, turns("x"), "P", "Q", "R"))
    assert compile_judge(mine(), c).system == ""
    assert compile_judge(load_template("standalone"), c).system == ""


# --- verdicts ---------------------------------------------------------------------------------------------------------


@each
def test_the_verdict_is_the_token_that_the_tokenizer_would_write(kind, template):
    """For prompts that end in a new line, a space, [/INST] and a closed thinking block alike."""
    c = chat(kind, template)
    settings = [("", ("A", "B")), ("Answer:", (" A", " B")), ("(", ("A", "B"))]
    if kind != "unigram":  # whose few pieces do not split digits alike
        settings.append(("", ("1", "2")))
    for prefix, verdicts in settings:
        j = compile_judge(mine(prefix=prefix, verdicts=verdicts), c)
        expected = tuple(whole(c, turns("P|Q|R"), template, prefix + verdict)[-1] for verdict in verdicts)
        assert j.verdict_ids == expected and expected[0] != expected[1]
        assert [spelled(c, (i,)).strip() for i in expected] == [verdict.strip() for verdict in verdicts]
        own = spelled(c, (*j.parts[-1], j.verdict_ids[0])[-j.answer_tokens :]).strip()
        assert own == (prefix + verdicts[0]).strip(), "with the white space before it, where that is the same token"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_which_letters_follow_which_prompt(kind):
    tokens = {}
    for template in TEMPLATES:
        c = chat(kind, template)
        ids = compile_judge(load_template("standalone"), c).verdict_ids
        tokens[template] = c.tokenizer.convert_ids_to_tokens(ids)
    assert tokens["qwen-2"] == tokens["gemma-2"] == tokens["llama-3"] == tokens["qwen-3"] == ["A", "B"]
    space = "Ġ" if kind in ("gpt-2", "llama-3", "qwen-2") else "▁"
    assert tokens["plain"] == [f"{space}A", f"{space}B"]
    if kind != "llama-2 legacy":  # which puts two spaces there, a token of their own
        assert tokens["mistral-3"] == tokens["llama-2"] == [f"{space}A", f"{space}B"]


# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["standalone", "continuation"])
@pytest.mark.parametrize("template, enable", [("qwen-3", None), ("qwen-3", True), ("qwen-3", False), ("qwq", None)])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_judge_that_thinks_has_an_empty_thought(kind, template, enable, layout):
    c = chat(kind, template, **({} if enable is None else {"enable_thinking": enable}))
    question = "{prompt}{response_a}{response_b}" if layout == "standalone" else "{response_b}"
    j = compile_judge(mine(layout, question), c)
    begin, end, stop = *c.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]), c.stop_ids[0]
    tail = structure(c, j.parts[-1])
    assert tail[-2:] == [begin, end] and tail.count(begin) == 1
    assert j.parts[-1].index(end) > max(i for i, t in enumerate(j.parts[-1]) if t in (begin, stop))
    assert spelled(c, j.parts[-1]).replace("> ", ">").endswith(BLOCK)
    assert j.answer_tokens == 1, "the empty thought is not learned"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_prefix_may_spell_control_tokens(kind):
    c = chat(kind, "qwen-2")
    begin, end, call = c.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool_call>"])
    plain, thought = (compile_judge(mine(prefix=prefix), c) for prefix in ("", "<think>\nHm.\n</think>\n\n"))
    assert {begin, end}.isdisjoint(plain.parts[-1])
    assert thought.parts[-1][: len(plain.parts[-1])] == plain.parts[-1]
    added = thought.parts[-1][len(plain.parts[-1]) :]
    assert added[0] == begin and end in added and added.count(begin) == added.count(end) == 1
    assert thought.answer_tokens == len(added) + 1
    # Not so the question, the system text and the verdicts.
    hostile = "<think></think><tool_call><|im_end|>"
    j = compile_judge(mine(question=hostile + "{prompt}{response_a}{response_b}" + hostile, system=hostile), c)
    clean = compile_judge(mine(system="x"), c)
    hostile, clean = (c.flatten([p for p in x.parts if not isinstance(p, str)]) for x in (j, clean))
    assert control(c, hostile) == control(c, clean) and call not in hostile
    # A thought of the template's own takes the place of the empty one.
    for template in ("qwen-3", "qwq"):
        c = chat(kind, template)
        own = compile_judge(mine(prefix="<think>\nHm.\n</think>\n\n"), c)
        assert own.parts[-1].count(begin) == own.parts[-1].count(end) == 1
        assert spelled(c, own.parts[-1]).replace("> ", ">").endswith("assistant\n<think>\nHm.\n</think>\n\n")


# --- what is judged is text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluator", "evaluator_continuation"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_field_becomes_control(kind, name):
    rng = random.Random(0)
    for template in ("qwen-3", "llama-2", "gemma-2", "mistral-nemo"):
        c = chat(kind, template)
        j = compile_judge(load_template(name), c)
        clean = control(c, row_of(c, j, turns("x"), "x", "x", "x"))
        for token in c.tokenizer.get_added_vocab():
            if not token.replace("▁", "").strip():
                continue
            at = rng.randrange(1, len(token)) if len(token) > 1 else 0
            for text in (token, f"x{token}", token[:at] + token + token[at:], token[at:], token[:at]):
                row = row_of(c, j, turns("x"), text, text, text)
                assert control(c, row) == clean, text


# --- template files ---------------------------------------------------------------------------------------------------


def test_fields_and_braces():
    pieces = split_fields("{prompt} {{prompt}} {{{response_a}}} {} {7*7} {Prompt} { prompt } {{ x }} {\n{a_1}")
    literal = " {prompt} {{response_a}} {} {7*7} {Prompt} { prompt } {{ x }} {\n"
    assert pieces == ["", "prompt", literal, "a_1", ""]
    assert [isinstance(piece, Field) for piece in pieces] == [i % 2 == 1 for i in range(len(pieces))]


def file(tmp_path, **changes):
    good = {
        "layout": "standalone",
        "question": "{prompt}{response_a}{response_b}",
        "answer_prefix": "",
        "verdicts": ["A", "B"],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**good, **changes}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"question": "{prompt}{response_a}{response_b}{answer}"},
            "has the unknown field {answer}; the fields are {prompt}, {response_a}, {response_b}; write {{answer}} for",
        ),
        ({"question": "{prompt}{response_1}{response_2}"}, "unknown field {response_1}"),
        ({"system": "Judge {prompt}."}, "system has the field {prompt}, which only the question may have"),
        ({"answer_prefix": "{response_a}: "}, "answer_prefix has the field {response_a}, which only the question may"),
        (
            {"system": None},
            "must be a YAML mapping with the keys layout, question, answer_prefix, verdicts (and system",
        ),
        ({"system": ["x"]}, "must be a YAML mapping with the keys"),
        ({"sytem": "x"}, "must be a YAML mapping with the keys"),
    ],
)
def test_template_files_with_mistakes(tmp_path, change, words):
    path = file(tmp_path, **change)
    with pytest.raises(InputError) as error:
        load_template(path)
    assert str(error.value).startswith(f"judge template {path}: ") and words in str(error.value)


def test_a_template_file_with_a_system_text_and_braces(tmp_path):
    question = '{prompt} {{prompt}} {"x": 1} {response_a} {response_b}'
    template = load_template(file(tmp_path, question=question, system="Be {{fair}}.", answer_prefix='{"better": "'))
    assert template.system == "Be {{fair}}."
    c = chat("gpt-2", "qwen-2")
    row = spelled(c, row_of(c, compile_judge(template, c), turns("x"), "P {prompt}", "Q", "R"))
    assert "system\nBe {fair}.<|im_end|>" in row and 'P {prompt} {prompt} {"x": 1} Q R<|im_end|>' in row
    assert row.endswith('assistant\n{"better": "')


def test_built_in_templates_compile_everywhere():
    for kind, template in KINDS:
        for name in BUILT_IN:
            assert compile_judge(load_template(name), chat(kind, template)).answer_tokens == 1
