"""What rows mean: TRL's formats, those common on the hub, other names of columns, and what is refused."""

import json

import pytest

from scir_jax.config import cli
from scir_jax.config.files import to_yaml
from scir_jax.config.schema import ColumnsConfig
from scir_jax.data import records
from scir_jax.data.tally import ALWAYS_ALLOWED, PromptTooLong, Tally
from scir_jax.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TOOL = {"role": "tool", "content": "7"}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(read, path, *arguments):
    with pytest.raises(InputError) as error:
        read(path, *arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message.removeprefix(str(path))


def prompt_of(tmp_path, row, **columns):
    return records.read_prompts(write(tmp_path, row), ColumnsConfig(**columns))[0][1]


def conversation_of(tmp_path, row, **columns):
    return records.read_conversations(write(tmp_path, row), ColumnsConfig(**columns))[0][1]


def comparison_of(tmp_path, row, **columns):
    c = records.read_comparisons(write(tmp_path, row), ColumnsConfig(**columns))[0]
    return c.messages, c.a, c.b, c.label


# --- formats ----------------------------------------------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "tools": None, "id": 3},
        {"messages": [{**USER, "name": None, "tool_calls": None}, {**ASSISTANT, "tool_calls": []}], "tools": "[]"},
        {"prompt": "q", "response": "a", "completion": "other"},
        {"prompt": "q", "completion": "a", "response": None, "messages": None},
        {"prompt": [USER], "completion": [ASSISTANT], "label": 1},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [USER, ASSISTANT]},
        {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
    ],
    ids=lambda row: "-".join(row),
)
def test_conversation_formats(tmp_path, row):
    assert conversation_of(tmp_path, row) == [USER, ASSISTANT]


def test_alpaca_with_input(tmp_path):
    row = {"instruction": "Add", "input": "1 and 2", "output": "3"}
    both = [{"role": "user", "content": "Add\n\n1 and 2"}]
    assert conversation_of(tmp_path, row) == [*both, {"role": "assistant", "content": "3"}]
    assert prompt_of(tmp_path, row) == both
    assert comparison_of(tmp_path, {**row, "chosen": "3", "rejected": "4"}) == (both, "3", "4", 1.0)


def test_sharegpt_with_system(tmp_path):
    row = {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT, HUMAN, GPT]}
    assert conversation_of(tmp_path, row) == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]


HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q: Human: more\n\nAssistant: {}"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HH.format("good"), "rejected": HH.format("bad")},
        {"chosen": HH.format("good\n"), "rejected": HH.format("bad").lstrip()},
        {
            "chosen": [USER, ASSISTANT, {**USER, "content": "q: Human: more"}, BETTER],
            "rejected": [USER, ASSISTANT, {**USER, "content": "q: Human: more"}, WORSE],
        },
        {
            "prompt": [USER, ASSISTANT, {**USER, "content": "q: Human: more"}],
            "chosen": [BETTER],
            "rejected": "bad",
            "score_chosen": 3,
        },
    ],
    ids=["hh", "hh with other white space", "implicit prompt", "explicit prompt"],
)
def test_multi_turn_preferences(tmp_path, row):
    messages = [USER, ASSISTANT, {**USER, "content": "q: Human: more"}]
    assert comparison_of(tmp_path, row) == (messages, "good", "bad", 1.0)


def test_texts_of_prompts_are_taken_as_they_are(tmp_path):
    text = "\n\nHuman: q\n\nAssistant:"
    assert prompt_of(tmp_path, {"prompt": text}) == [{"role": "user", "content": text}]


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns(tmp_path):
    assert prompt_of(tmp_path, {"question": "q", "prompt": "p"}, prompt="question") == [USER]
    assert prompt_of(tmp_path, {"question": None, "prompt": "q"}, prompt=("question", "prompt")) == [USER]
    assert conversation_of(tmp_path, {"question": "q", "answer": "a"}, prompt="question", response="answer") == [
        USER,
        ASSISTANT,
    ]
    assert conversation_of(tmp_path, {"turns": [USER, ASSISTANT], "messages": 3}, messages=("turns",)) == [
        USER,
        ASSISTANT,
    ]
    row = {"question": "q", "best": "good", "worst": "bad"}
    assert comparison_of(tmp_path, row, prompt="question", chosen="best", rejected="worst") == (
        [USER],
        "good",
        "bad",
        1.0,
    )
    row = {"prompt": "q", "x": "good", "y": "bad", "teacher": 0.25, "label": 1}
    columns = dict(response_a="x", response_b="y", label="teacher")
    assert comparison_of(tmp_path, row, **columns) == ([USER], "good", "bad", 0.25)
    path = write(tmp_path, {"prompt": "q"})
    message = refused(records.read_prompts, path, ColumnsConfig(prompt=("question", "text")))
    assert message.startswith(
        ":1: lacks the key 'question' (or 'text'); has 'prompt'; name the column of the prompts in"
    )


def test_columns_of_the_configuration(tmp_path):
    def parse(*arguments):
        return cli.parse("train", "", [str(a) for a in arguments])[0].data.columns

    assert parse("--data.columns.prompt", "question").prompt == ("question",)
    assert parse("--data.columns.prompt", '["question", "prompt"]').prompt == ("question", "prompt")
    file = tmp_path / "columns.yaml"
    file.write_text("data: {columns: {chosen: best, messages: [turns, messages]}}")
    columns = parse("--config", file, "--data.columns.label=teacher")
    assert columns == ColumnsConfig(chosen="best", messages=("turns", "messages"), label="teacher")
    with pytest.raises(InputError, match="unknown option --data.columns.promt; did you mean 'data.columns.prompt'"):
        parse("--data.columns.promt", "x")
    file.write_text("data: {columns: {chosn: best}}")
    with pytest.raises(InputError, match="unknown key 'data.columns.chosn'; did you mean 'data.columns.chosen'"):
        parse("--config", file)
    for value in ("null", "best", "[best]"):
        file.write_text(f"data: {{columns: {value}}}")
        with pytest.raises(InputError, match="'data.columns' must be a mapping of keys"):
            parse("--config", file)


def test_columns_are_written_as_they_are_read(tmp_path):
    config = cli.parse("train", "", ["--data.columns.prompt=question"])[0]
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert cli.parse("train", "", ["--config", str(file)])[0] == config


# --- refusals ---------------------------------------------------------------------------------------------------------

NO_TOOLS = "tool calls and tools' answers are not supported; leave such conversations out"
UNPAIRED = "which this method cannot use; give pairs: prompt, chosen, rejected (or response_a, response_b, label)"
ALL = ("prompts", "conversations", "comparisons")


@pytest.mark.parametrize(
    "kind, row, message",
    [
        (
            "prompts",
            {"text": "x"},
            "lacks the key 'prompt'; has 'text'; a plain text has no turns: convert it to 'messages', or to",
        ),
        ("comparisons", {"text": "x"}, "lacks the key 'chosen'; has 'text'; a plain text has no turns"),
        (
            "prompts",
            {"messages": [USER]},
            "lacks the key 'prompt'; has 'messages'; name the column of the prompts in data.columns.prompt",
        ),
        (
            "prompts",
            {f"c{i}": i for i in range(30)},
            "lacks the key 'prompt'; has 'c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6', 'c7', ...;",
        ),
        (
            "prompts",
            {"prompt": [USER, ASSISTANT]},
            "prompt: must end with a user's message, ends with assistant's; a prompt is what the model answers:",
        ),
        ("prompts", {"prompt": [USER, {**TOOL}, USER]}, f"prompt[1]: {NO_TOOLS}"),
        ("prompts", {"prompt": [USER, {"role": "function", "content": "7"}, USER]}, f"prompt[1]: {NO_TOOLS}"),
        (
            "prompts",
            {"prompt": [USER], "tools": [{"name": "f"}]},
            "has 'tools', which are not supported; leave such rows out",
        ),
        (
            "conversations",
            {"messages": [USER, ASSISTANT], "tools": '[{"name": "f"}]'},
            "has 'tools', which are not supported",
        ),
        (
            "conversations",
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            f"messages[1]: {NO_TOOLS}",
        ),
        (
            "conversations",
            {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
            f"conversations[1]: {NO_TOOLS}",
        ),
        (
            "conversations",
            {"conversations": [HUMAN, {"from": "bing", "value": "x"}]},
            "conversations[1]: role must be one of system, user, assistant, not 'bing'",
        ),
        (
            "conversations",
            {"conversations": [HUMAN, {"from": ["gpt"], "value": "x"}]},
            "conversations[1]: role must be one of system, user, assistant, not ['gpt']",
        ),
        (
            "conversations",
            {"conversations": [HUMAN, {"from": "gpt"}]},
            "conversations[1]: expected an object with the texts",
        ),
        (
            "prompts",
            {"prompt": [{"role": "developer", "content": "x"}, USER]},
            "prompt[0]: role must be one of system, user, assistant, not 'developer'; call it system",
        ),
        (
            "prompts",
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
            "prompt[0]: content is a list of parts; only text",
        ),
        ("prompts", {"prompt": [USER, USER]}, "prompt[1]: roles must alternate: user follows user; join the two turns"),
        ("prompts", {"instruction": ""}, "instruction: is empty"),
        ("conversations", {"instruction": "x"}, "lacks the key 'output'; has 'instruction'"),
        (
            "conversations",
            {"prompt": "q", "completion": "a", "label": True},
            f"is an unpaired preference row (an answer with a true/false label), {UNPAIRED}",
        ),
        (
            "comparisons",
            {"prompt": "q", "completion": "a", "label": False},
            f"is an unpaired preference row (one answer and its label), {UNPAIRED}",
        ),
        (
            "comparisons",
            {"chosen": "good", "rejected": "bad"},
            "lacks the key 'prompt'; has 'chosen', 'rejected'; it may be left out where chosen and rejected are",
        ),
        ("comparisons", {"chosen": HH.format("x"), "rejected": "bad"}, "lacks the key 'prompt'"),
        (
            "comparisons",
            {"chosen": "Once " + HH.format("x"), "rejected": "Once " + HH.format("y")},
            "lacks the key 'prompt'",
        ),
        (
            "comparisons",
            {"chosen": HH.format("x"), "rejected": "\n\nHuman: z\n\nAssistant: y"},
            "chosen and rejected must share all messages but the last",
        ),
        (
            "comparisons",
            {"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"},
            "chosen and rejected must share all",
        ),
        (
            "comparisons",
            {
                "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: x",
                "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: y",
            },
            "chosen[1]: roles must alternate",
        ),
        (
            "comparisons",
            {"chosen": "\n\nHuman: q\n\nHuman: r", "rejected": "\n\nHuman: q\n\nHuman: s"},
            "chosen: expected a text or one assistant's message",
        ),
        (
            "comparisons",
            {"prompt": [USER, ASSISTANT], "chosen": "x", "rejected": "y"},
            "prompt: must end with a user's message",
        ),
        (
            "comparisons",
            {"prompt": [USER], "chosen": [USER, BETTER], "rejected": [SYSTEM, USER, WORSE]},
            "rejected does not begin with the prompt",
        ),
        ("comparisons", {"prompt": "q", "chosen": "x", "rejected": "y", "tools": [1]}, "has 'tools'"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) and value not in ALL else None,
)
def test_refusals(tmp_path, kind, row, message):
    read = getattr(records, f"read_{kind}")
    good = {"prompt": "q", "response": "a", "chosen": "x", "rejected": "y"}
    assert refused(read, write(tmp_path, good, row)).startswith(f":2: {message}")


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_counted(tmp_path):
    bad = [
        '{"prompt": "a',
        '{"prompt": "a", "prompt": "b"}',
        {"prompt": ""},
        {"prompt": [USER, USER]},
        {"prompt": " "},
        "[1]",
    ]
    path = write(tmp_path, {"prompt": "q"}, *bad, {"prompt": "r"})
    tally = Tally(str(path), "skip", 0.01)
    assert [where for where, _ in records.read_prompts(path, tally=tally)] == [f"{path}:1", f"{path}:8"]
    assert tally.rows == 8 and tally.bad == 6 and tally.left_out.total() == 6
    assert tally.left_out["prompt: is empty"] == 2
    assert {key.split(":")[0] for key in tally.left_out} == {"prompt", "broken JSON", "expected a JSON object"}
    assert [e.removeprefix(f"{path}:")[0] for e in tally.examples] == ["2", "3", "4"]
    for kept in (Tally(str(path)), None):
        assert refused(records.read_prompts, path, ColumnsConfig(), kept).startswith(":2: broken JSON")


def test_rows_that_differ_only_in_place_have_one_reason(tmp_path):
    rows = [{"prompt": [USER] * (i + 2)} for i in range(3)] + [
        {"prompt": [{"role": f"r{i}", "content": ""}]} for i in range(3)
    ]
    rows += ['{"a' + " " * i for i in range(3)]
    tally = Tally("x", "skip", 0.01)
    records.read_prompts(write(tmp_path, *rows, {"prompt": [USER]}), tally=tally)
    assert sorted(tally.left_out.values()) == [3, 3, 3]


@pytest.mark.parametrize("share, rows, allowed", [(0.0, 100, 10), (0.01, 2000, 20), (0.5, 100, 50), (1.0, 30, 29)])
def test_too_many_bad_rows(tmp_path, share, rows, allowed):
    assert ALWAYS_ALLOWED == 10

    def read(bad):
        path = write(tmp_path, *[{"prompt": ""}] * bad, *[{"prompt": "q"}] * (rows - bad))
        return records.read_prompts(path, tally=Tally(str(path), "skip", share))

    assert len(read(allowed)) == rows - allowed
    if allowed < rows - 1:
        with pytest.raises(InputError) as error:
            read(allowed + 1)
        message = str(error.value).replace(str(tmp_path), "")
        assert message == (
            f"/rows.jsonl: {allowed + 1} of {rows} rows are bad, data.max_bad_rows={share:g} allows {allowed}; "
            "the first: "
            "/rows.jsonl:1: prompt: is empty; /rows.jsonl:2: prompt: is empty; /rows.jsonl:3: prompt: is empty"
        )


def test_tally():
    tally = Tally("file", "skip", 1.0)
    tally.rows = 3
    with tally.row("file:2"):
        raise InputError("the template refuses; sorry")
    assert tally.examples == ["file:2: the template refuses; sorry"] and tally.left_out == {"the template refuses": 1}
    with pytest.raises(PromptTooLong, match="^file:3: too long$"), tally.row("file:3"):
        raise PromptTooLong("too long")
    with pytest.raises(ZeroDivisionError), tally.row("file:3"):
        raise ZeroDivisionError
    tally.leave_out("too long")
    tally.leave_out("too long")
    with pytest.raises(InputError, match="^file: no row is left of 3: 2 x too long, 1 x the template refuses$"):
        tally.finish(0)
    tally.finish(1)
    assert tally.used == 1
    with pytest.raises(InputError, match="^file:2: sorry$"), Tally("file").row("file:2"):
        raise InputError("file:2: sorry")
