"""The data files of a run: what is left out and told, statistics, limits of length, conversations of several turns."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from scir_jax import judge, sample, train
from scir_jax.config import cli
from scir_jax.config.schema import ColumnsConfig
from scir_jax.data import statistics
from scir_jax.data.encode import Encoder, middle_cut
from scir_jax.data.files import read_rows
from scir_jax.data.pipelines import iterator, pairs_dataset
from scir_jax.data.statistics import FileStatistics
from scir_jax.data.tally import Tally
from scir_jax.errors import InputError
from scir_jax.run import inputs, pairing
from scir_jax.run.directory import manifest
from scir_jax.run.iteration import Run, _label_columns, check_inputs
from scir_jax.run.session import Session

pytestmark = pytest.mark.usefixtures("cheap_compilation")


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def turns(*contents, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


@pytest.fixture
def make(world_dir, tiny_config):
    """make(**sections) -> Session of the tiny model."""
    return lambda **sections: Session(tiny_config(world_dir, **sections))


def refused(make, message, **sections):
    with pytest.raises(InputError) as error:
        check_inputs(make(**sections))
    assert str(error.value).startswith(message) and "\n" not in str(error.value), error.value


# --- bad rows ---------------------------------------------------------------------------------------------------------

GOOD = [{"prompt": f"copy {'ab' * i}="} for i in range(1, 9)]
# The tiny model's chat template takes no system message, which is found where the row is encoded.
BAD = [{"prompt": turns("copy a=", system="x")}, '{"prompt": "copy', {"prompt": ""}]


def test_rows_that_the_chat_template_refuses(make, tmp_path):
    path = write(tmp_path / "prompts.jsonl", *GOOD, *BAD[:1])
    data = dict(prompts=path)
    refused(make, f"{path}:9: ", data=data)
    refused(make, f"{path}:9: ", data=data, text=dict(long_prompts="drop"))
    session = make(data=dict(prompts=path, on_bad_row="skip"))
    assert [p.where for p in session.data.prompts] == [f"{path}:{i}" for i in range(1, 9)]
    (example,) = session.data.tallies["prompts"].examples
    assert example.startswith(f"{path}:9: ") and "refuses a conversation of (system, user)" in example


def test_more_bad_rows_than_allowed_wherever_they_are_found(make, tmp_path):
    bad = [BAD[0]] * 6 + [BAD[1]] * 5
    path = write(tmp_path / "prompts.jsonl", *GOOD, *bad)
    refused(
        make,
        f"{path}: 11 of 19 rows are bad, data.max_bad_rows=0.01 allows 10",
        data=dict(prompts=path, on_bad_row="skip"),
    )
    path = write(tmp_path / "prompts.jsonl", *GOOD, *bad[1:])
    assert len(make(data=dict(prompts=path, on_bad_row="skip")).data.prompts) == 8
    path = write(tmp_path / "prompts.jsonl", *bad[2:])
    refused(make, f"{path}: no row is left of 9: 5 x broken JSON", data=dict(prompts=path, on_bad_row="skip"))


@pytest.mark.parametrize("key", ["ift", "eft", "heldout_pairs", "pairs", "heldout_prompts"])
def test_every_file_may_hold_bad_rows(make, tmp_path, key):
    answers = {"chosen": "ab", "rejected": "ba", "response": "ab"}
    rows = [{**row, **answers} if isinstance(row, dict) else row for row in (*GOOD, *BAD)]
    path = write(tmp_path / "rows.jsonl", *rows)
    refused(make, f"{path}:1", data={key: path})
    session = make(data={key: path, "on_bad_row": "skip"})
    content = check_inputs(session)["files"][key]
    assert (content["rows"], content["used"], sum(content["left_out"].values())) == (11, 8, 3)


def test_what_is_left_out_is_told_before_training(command, write_config, world_dir, tmp_path, monkeypatch):
    def stages(self):
        raise InputError("the stages begin")

    monkeypatch.setattr(Run, "run", stages)
    long = {"prompt": f"copy {'a' * 100}="}
    path = write(tmp_path / "prompts.jsonl", *GOOD, *BAD, long, long)
    tie = {"prompt": "copy a=", "response_a": "a", "response_b": "b", "label": 0.5}
    eft = write(tmp_path / "eft.jsonl", {**tie, "label": 1}, tie)
    config = write_config(
        data=dict(prompts=path, eft=eft, on_bad_row="skip"), text=dict(long_prompts="drop"), sft=dict(eft_batch_size=0)
    )
    done = command(train.main, "--config", config)
    assert done.code == 2 and done.err.rstrip().endswith("the stages begin")
    lines = done.err.splitlines()
    assert "eft: 1 of 2 rows left out: 1 x tie (label 0.5)" in lines
    (told,) = [line for line in lines if line.startswith("prompts: ")]
    assert told.startswith("prompts: 5 of 13 rows left out: 2 x prompt longer than text.max_prompt_tokens=32, 1 x ")
    assert told.endswith(f"(first: {path}:10: broken JSON at column 12: Unterminated string starting at)")
    content = json.loads((tmp_path / "run" / "data.json").read_text())
    assert content["files"]["prompts"]["used"] == 8 and content["files"]["eft"]["left_out"] == {"tie (label 0.5)": 1}
    # A corrected configuration may still take the directory.
    assert command(train.main, "--config", write_config()).err.rstrip().endswith("the stages begin")


def test_commands_tell_what_they_leave_out(command, world_dir, tmp_path):
    common = ("--model.path", world_dir / "model", "--text.max_prompt_tokens", 32, "--text.max_response_tokens", 4)
    output = tmp_path / "out.jsonl"
    path = write(tmp_path / "prompts.jsonl", *GOOD[:2], *BAD)
    run = (
        sample.main,
        *common,
        "--data.prompts",
        path,
        "--output",
        output,
        "--sample.responses",
        1,
        "--sample.batch_size",
        2,
    )
    done = command(*run)
    assert done.code == 2 and f"{path}:4: broken JSON" in done.err
    done = command(*run, "--data.on_bad_row", "skip")
    assert done.code == 0 and "prompts: 3 of 5 rows left out" in done.err and len(read_rows(output)) == 2
    rows = [{**row, "question": row["prompt"], "chosen": "ab", "rejected": "b", "prompt": 3} for row in GOOD[:2]]
    path = write(
        tmp_path / "pairs.jsonl",
        rows[0],
        "{",
        {"question": "copy " + "a" * 90 + "=", "chosen": "a", "rejected": "b"},
        rows[1],
    )
    run = (
        judge.main,
        *common,
        "--generative.templates",
        json.dumps([str(world_dir / "judge.yaml")]),
        "--evaluate.batch_size",
        2,
    )
    run = (*run, "--input", path, "--output", output, "--data.columns.prompt", "question")
    assert f"{path}:2: broken JSON" in command(*run).err
    done = command(*run, "--data.on_bad_row", "skip", "--text.long_prompts", "drop")
    assert (
        "input: 2 of 4 rows left out: " in done.err and "1 x prompt longer than text.max_prompt_tokens=32" in done.err
    )
    written = [row for _, row in read_rows(output)]
    assert [row["question"] for row in written] == [row["question"] for row in rows]
    assert all(row["prompt"] == 3 and 0 < row["p_generative"] < 1 for row in written)


# --- statistics -------------------------------------------------------------------------------------------------------


def percentiles(lengths):
    """Of n values the p-th percentile, by counting: the smallest that at least the share p do not exceed."""
    ordered = sorted(lengths)
    place = {f"p{p}": int(np.ceil(p / 100 * (len(ordered) - 1))) for p in (50, 90, 99)}
    return {**{k: ordered[i] for k, i in place.items()}, "max": ordered[-1]}


def test_statistics(make, world_dir, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [{"prompt": f"copy {'a' * n}="} for n in rng.integers(1, 60, 40)]
    pairs = [{**p, "chosen": "b" * int(n), "rejected": "c"} for p, n in zip(prompts, rng.integers(0, 30, 40))]
    ift = [{"messages": turns("copy a=", "a" * int(n), "copy b=", "b")} for n in rng.integers(0, 20, 30)]
    data = {
        key: write(tmp_path / f"{key}.jsonl", *rows)
        for key, rows in (("prompts", prompts), ("eft", pairs), ("ift", ift))
    }
    data |= dict(pairs=data["eft"], heldout_prompts=None, heldout_pairs=None)
    session = make(data=data)
    content = check_inputs(session)
    assert content["shapes"] == dataclasses.asdict(session.shapes)
    assert list(content["files"]) == ["prompts", "ift", "eft", "pairs"]
    chat, found = session.chat, content["files"]
    lengths = np.array([len(chat.prompt(turns(row["prompt"]))) for row in prompts])
    answers = np.array([[len(chat.answer(row[k])) for k in ("chosen", "rejected")] for row in pairs])
    for key in ("prompts", "eft", "pairs"):
        assert found[key]["rows"] == found[key]["used"] == 40 and found[key]["path"] == data[key]
        assert found[key]["prompt_tokens"] == percentiles(lengths), "before they are cut"
        assert found[key]["prompts_cut"] == pytest.approx((lengths > 32).mean())
    cut = np.minimum(lengths, 32)
    assert found["prompts"]["padding"] == pytest.approx(1 - cut.mean() / 32) and found["prompts"]["row_tokens"] == 32
    assert found["prompts"]["answer_tokens"] is None and found["prompts"]["answers_cut"] is None
    for key in ("eft", "pairs"):
        assert found[key]["answer_tokens"] == percentiles(answers.ravel())
        assert found[key]["answers_cut"] == pytest.approx((answers > 12).mean())
    rows = cut[:, None] + np.minimum(answers, 12)
    assert found["pairs"]["padding"] == pytest.approx(1 - rows.mean() / session.shapes.scored)
    judged = [len(ids) for ids, _ in session.data.eft_rows]
    assert len(judged) == 80 and found["eft"]["padding"] == pytest.approx(1 - np.mean(judged) / session.shapes.eft)
    whole = [len(chat.prompt(m["messages"][:3])) + len(chat.answer("b")) for m in ift]
    learned = [len(chat.answer(m["messages"][1]["content"])) + len(chat.answer("b")) for m in ift]
    assert found["ift"]["answer_tokens"] == percentiles(learned) and found["ift"]["answers_cut"] == 0
    assert found["ift"]["prompt_tokens"] == percentiles(np.subtract(whole, learned))
    assert found["ift"]["row_tokens"] == session.shapes.ift >= max(whole)


def shown(files):
    out = io.StringIO()
    Console(file=out, width=100).print(statistics.table(files))
    return out.getvalue()


def test_the_table_fits_into_100_columns():
    tally = Tally("x")
    tally.rows = tally.used = 1_234_567
    prompts = [1024] * 60 + [4096] * 35 + [12_345] * 5 + [123_456]
    answers = [1000] * 60 + [2000] * 35 + [4096] * 5 + [65_432]
    big = FileStatistics(tally, prompts, answers, 1, 101, [5000, 8000], 16_384)
    none = FileStatistics(tally, [7], [], 0, 0, [7], 0)
    text = shown({"heldout_prompts": big, "prompts": none})
    assert max(map(len, text.splitlines())) <= 100
    cells = [line.split() for line in text.splitlines() if line.split()[:1] in (["heldout_prompts"], ["prompts"])]
    assert " ".join(cells[0]) == (
        "heldout_prompts 1234567 1234567 1024/4096/12345/123456 1 % 1000/2000/4096/65432 100 % 16384 61 %"
    )
    assert cells[1] == ["prompts", "1234567", "1234567", "7/7/7/7", "0", "%", "-", "-", "-", "-"]
    assert "…" not in text


def test_a_share_above_nothing_is_not_0_percent():
    assert [statistics._percent(s) for s in (0.0, 1e-4, 0.01, 0.011, 1.0, None)] == [
        "0 %",
        "1 %",
        "1 %",
        "2 %",
        "100 %",
        "-",
    ]


def test_each_row_is_encoded_once(make, world_dir, monkeypatch):
    session = make(
        data=dict(pairs=str(world_dir / "eft.jsonl")),
        generative=dict(templates=(str(world_dir / "judge.yaml"), str(world_dir / "judge_continuation.yaml"))),
    )
    calls = {"prompt": 0, "response": 0}
    for name in calls:
        original = getattr(Encoder, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Encoder, name, counted)
    check_inputs(session)
    rows = {
        key: len(read_rows(world_dir / f"{key}.jsonl"))
        for key in ("prompts", "eft", "heldout_prompts", "heldout_pairs")
    }
    assert calls == {
        "prompt": rows["prompts"] + rows["heldout_prompts"] + rows["heldout_pairs"] + 2 * rows["eft"],
        "response": 2 * rows["heldout_pairs"] + 4 * rows["eft"],
    }
    before = dict(calls)
    pairing.given_answers(session, 1)
    assert calls == before


def test_many_rows_have_a_progress_bar(make, monkeypatch, capsys):
    make().data.prompts  # noqa: B018
    assert "tokens of" not in capsys.readouterr().err
    monkeypatch.setattr(inputs, "SHOW_PROGRESS", 24)
    session = make()
    assert len(session.data.prompts) == 24 and "tokens of data.prompts" in capsys.readouterr().err
    assert session.data.heldout_prompts and "tokens of" not in capsys.readouterr().err


# --- limits of length -------------------------------------------------------------------------------------------------


def test_middle_cut_keeps_the_end():
    ids = tuple(range(10))
    assert middle_cut(ids, 6, 5) == (0, 5, 6, 7, 8, 9) and middle_cut(ids, 6, 2) == (0, 1, 2, 7, 8, 9)
    assert middle_cut(ids, 3, 5) == (7, 8, 9) and middle_cut(ids, 1) == (9,) and middle_cut(ids, 10, 20) == ids


@pytest.mark.parametrize("limit", [5, 6, 7, 12])
def test_a_cut_prompt_keeps_the_assistants_header(make, limit):
    encoder = make(text=dict(max_prompt_tokens=limit)).encoder
    prompt = encoder.prompt(turns("copy abcdefghijklmnop="))
    user, assistant = encoder.chat.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert len(prompt.conversation) == limit and prompt.cut and prompt.tokens == 22
    assert prompt.conversation[1] == user and prompt.conversation[-1] == assistant
    assert prompt.conversation[-2] == encoder.chat.encode_text("=")[0]
    assert not encoder.prompt(turns("a")).cut


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_limit_below_the_templates_own_tokens(make, tmp_path, limit):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "copy a="})
    message = (
        f"{path}:1: text.max_prompt_tokens={limit} leaves no room beside the chat template's own 3 tokens; raise it"
    )
    refused(make, message, data=dict(prompts=path), text=dict(max_prompt_tokens=limit))


def test_what_does_not_fit_is_named_by_its_row(make, world_dir, tmp_path):
    rows = [*GOOD, {"prompt": f"copy {'a' * 250}="}, *GOOD]
    path = write(tmp_path / "prompts.jsonl", *rows)
    limits = dict(max_prompt_tokens=300)
    refused(
        make,
        f"{path}:9: a prompt of 256 and a response of 12 tokens exceed the model's context of 256; lower",
        data=dict(prompts=path),
        text=limits,
    )
    rows[8] = {"prompt": f"copy {'a' * 150}="}
    path = write(tmp_path / "prompts.jsonl", *rows)
    refused(make, f"{path}:9: judge template ", data=dict(prompts=path), text=limits)
    refused(
        make,
        f"{path}:9: the prompt 'copy aaa",
        data=dict(prompts=path, on_bad_row="skip"),
        text=dict(long_prompts="error"),
    )
    pair = {"prompt": f"copy {'a' * 250}=", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "eft.jsonl", pair)
    refused(make, f"{path}:1: a prompt of 256", data=dict(eft=path), text=limits)


def test_conversations_end_with_the_models_context(make, tmp_path):
    messages = turns("copy a=", "a", "copy b=", "b" * 300)
    late = turns("a" * 255, "b")
    path = write(tmp_path / "ift.jsonl", {"messages": messages}, {"messages": late})
    session = make(data=dict(ift=path))
    content = check_inputs(session)
    ((ids, marks),) = session.data.ift_rows
    (whole,) = session.encoder.conversation_rows(messages)
    assert len(whole[0]) > 300 and (ids, marks) == (whole[0][:256], whole[1][:256])
    ift = content["files"]["ift"]
    assert ift["left_out"] == {"no answer begins within the model's context of 256": 1} and ift["answers_cut"] == 1.0
    assert ift["answer_tokens"]["max"] == 303 and ift["row_tokens"] == 256


def test_both_answers_of_a_pair_are_cut_alike(make, world_dir):
    session = make(text=dict(max_prompt_tokens=100, max_response_tokens=60))
    prompt = f"copy {'a' * 80}="
    encoder = session.encoder
    conversation = encoder.prompt(turns(prompt))
    a, b = (encoder.response(c * 100) for c in "bc")
    assert a.cut and b.cut and len(a.ids) == len(b.ids) == 60 and not set(a.ids + b.ids) & set(session.chat.stop_ids)
    for first, second in ((a, b), (b, a)):
        ids = encoder.judge_row(session.judges[0], conversation, first, second).ids
        counts = [ids.count(y.text[0]) for y in (first, second)]
        assert counts[0] == counts[1] < 60 and len(ids) + 1 <= 256


# --- several turns ----------------------------------------------------------------------------------------------------

CONVERSATION = turns("copy ab=", "ab", "reverse ab=")


def tokens(session, text):
    return tuple(session.chat.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("layout", ["judge", "judge_continuation"])
def test_several_turns_in_both_layouts(make, world_dir, tmp_path, layout):
    rows = [{"prompt": CONVERSATION, "chosen": "ba", "rejected": [{"role": "assistant", "content": "ab"}]}]
    path = write(tmp_path / "pairs.jsonl", *rows)
    session = make(
        data=dict(prompts=path, pairs=path, eft=path),
        generative=dict(templates=(str(world_dir / f"{layout}.yaml"),)),
        text=dict(max_prompt_tokens=64, max_response_tokens=12),
    )
    context = "<s><|user|>copy ab=<|assistant|>ab</s><|user|>reverse ab=<|assistant|>"
    shown = "user: copy ab=\n\nassistant: ab\n\nuser: reverse ab="
    questions = {
        "judge": "<s><|user|>judge {x}{a};{x}{b}<|assistant|>",
        "judge_continuation": context + "{a}</s><|user|>judge {x}{b}<|assistant|>",
    }
    (prompt,) = session.data.prompts
    assert prompt.conversation == tokens(session, context) and prompt.text == session.chat.encode_text(shown)
    (pair,) = session.data.given_pairs
    assert pair.prompt == prompt and (pair.a.ids, pair.b.ids) == (tokens(session, "ba</s>"), tokens(session, "ab</s>"))

    def question(a, b):
        return tokens(session, questions[layout].format(x=shown, a=a, b=b))

    (first, _), (second, _) = session.data.eft_rows
    assert first == (*question("ba", "ab"), *tokens(session, "1")) and second == (
        *question("ab", "ba"),
        *tokens(session, "2"),
    )
    # DPO: what an iteration writes, read again as the training step takes it.
    answers, records = pairing.given_answers(session, 1)
    for answer in answers:
        answer.logps = dict.fromkeys(("start", "preference", "implicit"), -1.0)
    row = json.loads(json.dumps(pairing._row(0, records[0], answers, 0.0)))
    assert row["messages"] == CONVERSATION and row["prompt"] == shown
    dataset = pairs_dataset(
        [("pairs:1", row)], session.encoder, session.shapes,
        rewards=2, need_label=None, batch_size=1, epochs=1, seed=0, ift=None, eft=None,
    )  # fmt: skip
    (batch,) = iterator(dataset)
    responses = batch.pairs.responses
    for side, (y, other) in enumerate((("ba", "ab"), ("ab", "ba"))):
        start, length = int(responses.start[0, side]), int(responses.length[0, side])
        ids = tuple(responses.ids[0, side])
        assert ids[:start] == tokens(session, context) and ids[start : start + length] == tokens(session, f"{y}</s>")
        judged = responses if layout == "judge_continuation" else batch.pairs.judges[0]
        expected = question(y, other)
        assert tuple(judged.ids[0, side])[: len(expected)] == expected and judged.verdict[0, side] == len(expected) - 1


@pytest.mark.parametrize("layout", [pytest.param("judge", marks=pytest.mark.slow), "judge_continuation"])
def test_a_run_on_conversations_of_several_turns(command, write_config, world_dir, tmp_path, layout):
    words = ("ab", "ba", "abc", "cab", "bac", "bb", "cc", "ac")
    conversations = [turns(f"copy {w}=", w, f"reverse {w}=") for w in words]
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": m} for m in conversations))
    eft = write(
        tmp_path / "eft.jsonl", *({"prompt": m, "chosen": m[1]["content"], "rejected": "a"} for m in conversations)
    )
    ift = write(tmp_path / "ift.jsonl", *({"messages": turns("copy a=", "a", "copy b=", "b")} for _ in words))
    config = write_config(
        data=dict(prompts=prompts, eft=eft, ift=ift, heldout_prompts=None, heldout_pairs=eft),
        text=dict(max_prompt_tokens=64, max_response_tokens=6),
        generative=dict(templates=(str(world_dir / f"{layout}.yaml"),)),
        sample=dict(prompts=None, responses=3),
    )
    done = command(train.main, "--config", config)
    assert done.code == 0, done.err
    folder = tmp_path / "run" / "iteration_01"
    session = Session(cli.parse("train", "", ["--config", str(config)])[0])
    responses = [row for _, row in read_rows(folder / "responses.jsonl")]
    assert len(responses) == 3 * len(words)
    for row in responses:
        assert row["messages"] == conversations[row["prompt_number"]]
        assert tuple(row["prompt_ids"]) == session.chat.prompt(row["messages"])
    pairs = [row for _, row in read_rows(folder / "pairs.jsonl")]
    assert pairs and all(row["messages"] in conversations for row in pairs)
    assert len(read_rows(folder / "decisions.jsonl")) == len(pairs)


# --- sources of a run -------------------------------------------------------------------------------------------------


def test_labels_of_given_pairs_have_the_name_that_columns_say(make, tmp_path):
    row = {"prompt": "copy a=", "response_a": "a", "response_b": "b", "teacher": 0.25, "label": 1}
    path = write(tmp_path / "pairs.jsonl", row)
    columns = ColumnsConfig(label="teacher")
    session = make(data=dict(pairs=path, columns=columns), preference=dict(labels="external"))
    (pair,) = session.data.given_pairs
    assert pair.comparison.label == 0.25
    # They are copied into pairs.jsonl, under the name that the run gives them.
    assert _label_columns(session.config) == ("label",)
    assert _label_columns(
        dataclasses.replace(session.config, data=dataclasses.replace(session.config.data, pairs=None))
    ) == ("teacher",)
    assert _label_columns(make().config) is None


def test_the_manifest_knows_the_files_of_a_directory(tiny_config, world_dir, tmp_path):
    directory = tmp_path / "prompts"
    directory.mkdir()
    for i in range(2):
        shutil.copy(world_dir / "prompts.jsonl", directory / f"train-{i}.jsonl")
    config = tiny_config(world_dir, data=dict(prompts=str(directory)))
    before = manifest(config, {})["sha256"]["data.prompts"]
    assert len(Session(config).data.prompts) == 48
    (directory / "README.md").write_text("nothing")
    assert manifest(config, {})["sha256"]["data.prompts"] == before
    with (directory / "train-1.jsonl").open("a") as file:
        file.write("\n")
    assert manifest(config, {})["sha256"]["data.prompts"] != before


def test_another_engines_responses_are_named_by_their_rows(make, tmp_path):
    path = tmp_path / "responses.jsonl"
    write(path, {"prompt": "copy a=", "response": "a"}, {"prompt": turns("copy a=", system="x"), "response": "a"})
    with pytest.raises(InputError, match=f"^{path}:2: .* refuses a conversation of"):
        pairing.read_answers(make(), path)
    write(path, {"prompt": "copy a=", "response": "a"}, {"messages": CONVERSATION, "prompt": "x", "response": "a"})
    answers = pairing.read_answers(make(text=dict(max_prompt_tokens=64)), path)
    assert [answer.prompt.messages for answer in answers] == [turns("copy a="), CONVERSATION]
