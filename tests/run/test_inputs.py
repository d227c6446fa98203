"""The data files of a run: what is left out and told, statistics, limits of length."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from scir_jax import judge, sample, train
from scir_jax.config.schema import ColumnsConfig
from scir_jax.data.encode import Encoder
from scir_jax.data.files import read_rows
from scir_jax.data.pairs import to_row
from scir_jax.errors import InputError
from scir_jax.run import answers, iteration, pairing, preflight
from scir_jax.run import inputs as run_inputs
from scir_jax.run.manifest import manifest
from scir_jax.run.scoring import taken
from scir_jax.run.training import read_pairs
from tests.chat_templates import turns
from tests.run.data_files import CONVERSATION, checked, refused, write

pytestmark = pytest.mark.usefixtures("cheap_compilation")


# --- bad rows ---------------------------------------------------------------------------------------------------------

GOOD = [{"prompt": f"copy {'ab' * i}="} for i in range(1, 9)]
# The tiny model's chat template takes no system message, which is found where the row is encoded.
BAD = [{"prompt": turns("copy a=", system="x")}, '{"prompt": "copy', {"prompt": ""}]


def test_rows_that_the_chat_template_refuses(make, tmp_path):
    path = write(tmp_path / "prompts.jsonl", *GOOD, *BAD[:1])
    data = dict(prompts=path)
    refused(make, f"{path}:9: ", data=data)
    refused(make, f"{path}:9: ", data=data, text=dict(long_prompts="drop"))
    inputs = make(data=dict(prompts=path, on_bad_row="skip")).inputs
    assert [p.where for p in inputs.prompts] == [f"{path}:{i}" for i in range(1, 9)]
    (example,) = inputs.tallies["prompts"].examples
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
    assert len(make(data=dict(prompts=path, on_bad_row="skip")).inputs.prompts) == 8
    path = write(tmp_path / "prompts.jsonl", *bad[2:])
    refused(make, f"{path}: no row is left of 9: 5 x broken JSON", data=dict(prompts=path, on_bad_row="skip"))


@pytest.mark.parametrize("key", ["ift", "eft", "heldout_pairs", "pairs", "heldout_prompts"])
def test_every_file_may_hold_bad_rows(make, tmp_path, key):
    answers = {"chosen": "ab", "rejected": "ba", "response": "ab"}
    rows = [{**row, **answers} if isinstance(row, dict) else row for row in (*GOOD, *BAD)]
    path = write(tmp_path / "rows.jsonl", *rows)
    refused(make, f"{path}:1", data={key: path})
    content = checked(make(data={key: path, "on_bad_row": "skip"}))["files"][key]
    assert (content["rows"], content["used"], sum(content["left_out"].values())) == (11, 8, 3)


def test_what_is_left_out_is_told_before_training(command, write_config, world_dir, tmp_path, monkeypatch):
    def stages(*_):
        raise InputError("the stages begin")

    monkeypatch.setattr(iteration, "run_stages", stages)
    monkeypatch.setattr(preflight, "check_memory", lambda *_: None)
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
    setup = make(data=data)
    inputs, content = setup.inputs, checked(setup)
    assert content["lengths"] == dataclasses.asdict(inputs.lengths)
    assert list(content["files"]) == ["prompts", "ift", "eft", "pairs"]
    chat, found = setup.encoder.chat, content["files"]
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
    assert found["pairs"]["padding"] == pytest.approx(1 - rows.mean() / inputs.lengths.scored)
    judged = [len(row.ids) for row in inputs.targets["eft"]]
    padding = 1 - np.mean(judged) / inputs.lengths.targets["eft"]
    assert len(judged) == 80 and found["eft"]["padding"] == pytest.approx(padding)
    whole = [len(chat.prompt(m["messages"][:3])) + len(chat.answer("b")) for m in ift]
    learned = [len(chat.answer(m["messages"][1]["content"])) + len(chat.answer("b")) for m in ift]
    assert found["ift"]["answer_tokens"] == percentiles(learned) and found["ift"]["answers_cut"] == 0
    assert found["ift"]["prompt_tokens"] == percentiles(np.subtract(whole, learned))
    assert found["ift"]["row_tokens"] == inputs.lengths.targets["ift"] >= max(whole)


def test_each_row_is_encoded_once(make, world_dir, monkeypatch):
    calls = {"prompt": 0, "answer": 0}
    for name in calls:
        original = getattr(Encoder, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Encoder, name, counted)
    setup = make(
        data=dict(pairs=str(world_dir / "eft.jsonl")),
        generative=dict(templates=(str(world_dir / "judge.yaml"), str(world_dir / "judge_continuation.yaml"))),
    )
    checked(setup)
    rows = {
        key: len(read_rows(world_dir / f"{key}.jsonl"))
        for key in ("prompts", "eft", "heldout_prompts", "heldout_pairs")
    }
    assert calls == {
        "prompt": rows["prompts"] + rows["heldout_prompts"] + rows["heldout_pairs"] + 2 * rows["eft"],
        "answer": 2 * rows["heldout_pairs"] + 4 * rows["eft"],
    }
    before = dict(calls)
    pairing.given_pairs(setup.inputs, 1, 1)
    assert calls == before


def test_many_rows_have_a_progress_bar(make, monkeypatch, capsys):
    make()
    assert "tokens of" not in capsys.readouterr().err
    monkeypatch.setattr(run_inputs, "SHOW_PROGRESS", 24)
    inputs = make().inputs
    shown = capsys.readouterr().err
    assert len(inputs.prompts) == 24 and "tokens of data.prompts" in shown
    assert inputs.heldout_prompts and "tokens of data.heldout_prompts" not in shown


def test_a_hosts_rows_of_a_batch_that_is_not_full():
    assert taken("abc", np.array([0, 2])) == ["a", "c"]
    assert taken("ab", np.arange(4)) == ["a", "b", "a", "a"]


# --- limits of length -------------------------------------------------------------------------------------------------


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
    setup = make(data=dict(ift=path))
    content = checked(setup)
    (row,) = setup.inputs.targets["ift"]
    (whole,) = setup.encoder.conversation_rows(messages)
    assert len(whole.ids) > 300 and row == (whole.ids[:256], whole.marks[:256], f"{path}:1")
    ift = content["files"]["ift"]
    assert ift["left_out"] == {"no answer begins within the model's context of 256": 1} and ift["answers_cut"] == 1.0
    assert ift["answer_tokens"]["max"] == 303 and ift["row_tokens"] == 256


# --- sources of a run -------------------------------------------------------------------------------------------------


def test_labels_of_given_pairs_have_the_name_that_columns_say(make, tmp_path):
    row = {"prompt": "copy a=", "response_a": "a", "response_b": "b", "teacher": 0.25, "label": 1}
    path = write(tmp_path / "given.jsonl", row)
    data = dict(columns=ColumnsConfig(label="teacher"))
    inputs = make(data=dict(pairs=path, **data), preference=dict(labels="external")).inputs
    (pair,) = inputs.given_pairs
    assert pair.label == 0.25
    # They are copied into pairs.jsonl, under the name that the run gives them.
    items, (choice,), _ = pairing.given_pairs(inputs, 1, 1)
    assert choice.label == 0.25
    file = tmp_path / "pairs.jsonl"
    write(file, {**to_row(pair, 0), "teacher": 0.75})
    assert read_pairs(inputs.config, file)[0].label == 0.25
    external = make(data=data, preference=dict(labels="external")).inputs.config
    assert read_pairs(external, file)[0].label == 0.75
    assert read_pairs(make(data=data).inputs.config, file)[0].label == 0.25


def test_labels_that_the_user_did_not_add_stop_the_run(make, tmp_path):
    inputs = make(data=dict(pairs=write(tmp_path / "given.jsonl", {**GOOD[0], "chosen": "a", "rejected": "b"}))).inputs
    rows = [to_row(dataclasses.replace(inputs.given_pairs[0], label=label), i) for i, label in enumerate((None, 0.0))]
    file = tmp_path / "pairs.jsonl"
    write(file, rows[1], *rows)
    plain = make().inputs.config
    external = make(
        data=dict(columns=ColumnsConfig(label=("teacher", "label"))), preference=dict(labels="external")
    ).inputs.config
    assert [pair.label for pair in read_pairs(plain, file)] == [0.0, None, 0.0]
    with pytest.raises(InputError) as error:
        read_pairs(external, file)
    assert str(error.value).startswith(f"{file}:2: lacks the external label 'teacher' (1 where response_a is better")
    write(file, *({**row, "teacher": 1} for row in rows))
    assert [pair.label for pair in read_pairs(external, file)] == [1.0, 1.0]
    write(file, rows[1], {**rows[1], "weight": -1})
    with pytest.raises(InputError, match=f"^{file}:2: weight: must be a number of at least 0, not -1$"):
        read_pairs(plain, file)


def test_the_manifest_knows_the_files_of_a_directory(make, world_dir, tmp_path):
    directory = tmp_path / "prompts"
    directory.mkdir()
    for i in range(2):
        shutil.copy(world_dir / "prompts.jsonl", directory / f"train-{i}.jsonl")
    inputs = make(data=dict(prompts=str(directory))).inputs
    config = inputs.config
    before = manifest(config, {})["sha256"]["data.prompts"]
    assert len(inputs.prompts) == 48
    (directory / "README.md").write_text("nothing")
    assert manifest(config, {})["sha256"]["data.prompts"] == before
    with (directory / "train-1.jsonl").open("a") as file:
        file.write("\n")
    assert manifest(config, {})["sha256"]["data.prompts"] != before


def test_another_engines_responses_are_named_by_their_rows(make, tmp_path):
    path = tmp_path / "responses.jsonl"

    def read(*rows, room=None, **sections):
        encoder, _, programs, _ = make(**sections)
        write(path, *rows)
        lengths = dataclasses.replace(programs.facts.lengths, **(room or {}))
        return answers.sampled_answers(encoder, lengths, programs.arch.vocab_size, path).items

    good = {"prompt": "copy a=", "response": "a"}
    with pytest.raises(InputError, match=f"^{path}:2: .* refuses a conversation of"):
        read(good, {"prompt": turns("copy a=", system="x"), "response": "a"})
    for key in ("response_ids", "prompt_ids"):
        row = {"prompt": "copy b=", "response": "a", "prompt_quote_ids": [1], key: [99_999]}
        with pytest.raises(InputError, match=f"^{path}:2: {key}: must be token ids from 0 to "):
            read(good, row)
    rows = (good, {"messages": CONVERSATION, "prompt": "x", "response": "a"})
    for short in (dict(prompt=12), dict(quote=12)):
        with pytest.raises(
            InputError, match=f"^{path}:2: the prompt has .* tokens, but the longest of this run's data"
        ):
            read(*rows, text=dict(max_prompt_tokens=64), room=dict(prompt=64, quote=64) | short)
    items = read(*rows, text=dict(max_prompt_tokens=64), room=dict(prompt=64, quote=64))
    assert [prompt.messages for prompt, _ in items] == [turns("copy a="), CONVERSATION]
