"""What a user can get wrong: one clear sentence, nothing half written, and what was there stays."""

import json
import os
import shutil

import pytest

from scir_jax import evaluate, judge, sample, train
from scir_jax.config.checks import resolve
from scir_jax.run.pairing import given_pairs
from scir_jax.run.setup import prepare
from tests.run.runs import HEAD, NORM, RESPONSES, edit_json, edit_tensors, lines, refused, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

# --- data files -----------------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "copy abc="}\n'
BAD_PROMPTS = {
    "empty": (b"", "no rows"),
    "blank": (b"\n\n", "no rows"),
    "half line": (GOOD + b'{"prompt": "cop', ":2: broken JSON"),
    "text": (GOOD + b"copy abc=\n", ":2: broken JSON"),
    "nan": (GOOD + b'{"prompt": NaN}\n', ":2: broken JSON"),
    "list": (GOOD + b'["copy abc="]\n', ":2: expected a JSON object"),
    "bom": (b"\xef\xbb\xbf" + GOOD, ":1: starts with a byte-order mark"),
    "utf-16": (GOOD.decode().encode("utf-16"), ":1: starts with a byte-order mark"),
    "not utf-8": (GOOD + b'{"prompt": "\xff"}\n', ":2: not UTF-8"),
    "surrogate": (GOOD + b'{"prompt": "\\ud800"}\n', ":2: prompt: holds a lone surrogate"),
    "no key": (GOOD + b'{"text": "copy abc="}\n', ":2: lacks the key 'prompt'; has 'text'"),
    "number": (GOOD + b'{"prompt": 3}\n', ":2: prompt: expected a text or a list"),
    "no text": (GOOD + b'{"prompt": " "}\n', ":2: prompt: is empty"),
    "role": (GOOD + b'{"prompt": [{"role": "bot", "content": "x"}]}\n', ":2: prompt[0]: role must be one of"),
    "last": (
        GOOD + b'{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
        ":2: prompt: must end with a user's message",
    ),
    "deep": (GOOD + b"[" * 100_000 + b"\n", ":2: "),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_a_bad_row_is_named_by_file_and_line(kind, command, sampling, tmp_path):
    content, words = BAD_PROMPTS[kind]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    output = tmp_path / "out.jsonl"
    refused(command(sample.main, *sampling, "--data.prompts", file, "--output", output), f"{file}", words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl"]


@pytest.mark.parametrize("key", ["prompts", "ift", "eft", "heldout_prompts", "heldout_pairs", "pairs"])
@pytest.mark.parametrize("kind", ["missing", "directory", "broken"])
def test_each_data_file_is_read_before_the_run_begins(key, kind, command, tiny_run, tmp_path, no_stages):
    file = tmp_path / "file.jsonl"
    words = {"missing": "no such file", "directory": "is a directory", "broken": ":1: broken JSON"}[kind]
    if kind == "directory":
        file.mkdir()
    elif kind == "broken":
        file.write_text('{"prompt": "copy a\n')
    config = tiny_run()
    refused(command(train.main, "--config", config, f"--data.{key}", file), file, words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_corrected_configuration_may_take_the_same_directory(command, tiny_run, tmp_path, no_stages):
    """A mistake that was found before anything was computed costs no directory."""
    config = tiny_run()
    assert "no such file" in refused(command(train.main, "--config", config, "--data.prompts", tmp_path / "none.jsonl"))
    assert "the stages begin" in refused(command(train.main, "--config", config))


def test_rows_of_comparisons(command, judging, tmp_path):
    file, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    good = {"prompt": "copy abc=", "response_a": "abc", "response_b": "ab"}
    for bad, words in (
        ({"prompt": "copy abc=", "response_a": "abc"}, ":2: lacks the key 'response_b'"),
        ({"response_a": "abc", "response_b": "x"}, ":2: lacks the key 'prompt'"),
        ({**good, "response_b": 4}, ":2: response_b: expected a text"),
        ({**good, "label": 2}, ":2: label: must be a number from 0 to 1, not 2"),
        ({**good, "label": "a"}, ":2: label: must be a number from 0 to 1"),
        ({"prompt": "copy abc=", "chosen": "abc"}, ":2: lacks the key 'rejected'"),
        ({"chosen": "abc", "rejected": "ab"}, ":2: lacks the key 'prompt'"),
    ):
        write_lines(file, [good, bad])
        refused(command(judge.main, *judging, "--input", file, "--output", output), file, words)
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--output", "{tmp}/none/out.jsonl"), "none"),
        (("--output", "{tmp}"), "directory"),
        (("--output", "{tmp}/out.jsonl", "--evaluate.batch_size", "0"), "evaluate.batch_size"),
        (("--output", "{tmp}/out.jsonl", "--generative.templates", "[]"), "generative.templates"),
        (("--output", "{tmp}/out.jsonl", "--text.max_response_tokens", "0"), "text.max_response_tokens"),
        (
            ("--output", "{tmp}/out.jsonl", "--text.long_prompts", "drop", "--text.max_prompt_tokens", "3"),
            "max_prompt_tokens",
        ),
        (("--output", "{tmp}/out.jsonl", "--reference", "{tmp}/none"), "no such model directory"),
    ],
)
def test_judge_refuses(arguments, words, command, judging, world_dir, tmp_path):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    done = command(judge.main, *judging, "--input", world_dir / "heldout_pairs.jsonl", *arguments)
    refused(done, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--output", "{tmp}/none/out.jsonl"), "none does not exist"),
        (("--output", "{tmp}"), "directory"),
        (("--output", "{tmp}/out.jsonl", "--sample.prompts", "0"), "sample.prompts"),
        (("--output", "{tmp}/out.jsonl", "--sample.prompts", "-1"), "sample.prompts"),
        (("--output", "{tmp}/out.jsonl", "--sample.responses", "0"), "sample.responses"),
        (("--output", "{tmp}/out.jsonl", "--sample.temperature", "-1"), "temperature"),
        (("--output", "{tmp}/out.jsonl", "--sample.top_p", "0"), "top_p"),
        (("--output", "{tmp}/out.jsonl", "--text.max_response_tokens", "0"), "text.max_response_tokens"),
        (("--output", "{tmp}/out.jsonl", "--text.max_response_tokens", "300"), "context of 256"),
        (("--output", "{tmp}/out.jsonl", "--sample.temprature", "1"), "did you mean 'sample.temperature'"),
        (("--output", "{tmp}/out.jsonl", "--sample.responses", "two"), "responses"),
        (("--output", "{tmp}/out.jsonl", "--config", "{tmp}/none.yaml"), "no such file"),
    ],
)
def test_sample_refuses(arguments, words, command, sampling, world_dir, tmp_path):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    done = command(sample.main, *sampling, "--data.prompts", world_dir / "prompts.jsonl", *arguments)
    refused(done, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "nothing to evaluate on"),
        (("--run", "{tmp}/none"), "not a run directory"),
        (("--data.heldout_pairs", "{pairs}", "--output", "{tmp}/none/e.json"), "none"),
        (
            ("--data.heldout_pairs", "{pairs}", "--output", "{tmp}/e.json", "--evaluate.batch_size", "0"),
            "evaluate.batch_size",
        ),
        (
            ("--data.heldout_prompts", "{prompts}", "--output", "{tmp}/e.json", "--evaluate.samples", "0"),
            "evaluate.samples",
        ),
        (
            ("--data.heldout_prompts", "{prompts}", "--output", "{tmp}/e.json", "--evaluate.grader", "json:nothing"),
            "evaluate.grader",
        ),
    ],
)
def test_evaluate_refuses(arguments, words, command, judging, world_dir, tmp_path):
    names = dict(tmp=tmp_path, pairs=world_dir / "heldout_pairs.jsonl", prompts=world_dir / "heldout_prompts.jsonl")
    refused(command(evaluate.main, *judging, *(a.format(**names) for a in arguments)), words)
    assert not list(tmp_path.iterdir())


# --- model and templates --------------------------------------------------------------------------------------------


BROKEN_MODELS = {
    "no directory": (shutil.rmtree, "no such model directory"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json is missing"),
    "generation is not JSON": (lambda m: (m / "generation_config.json").write_text('{"a'), "not readable JSON"),
    "stop is no id": (
        lambda m: edit_json(m / "generation_config.json", eos_token_id="2"),
        "generation_config.json: eos_token_id must be a token's id or a list of them, not '2'",
    ),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), "not readable JSON"),
    "unknown architecture": (
        lambda m: edit_json(m / "config.json", model_type="mamba", architectures=["MambaForCausalLM"]),
        "mamba",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights found"),
    "pickled weights": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "only safetensors"),
    "cut weights": (lambda m: os.truncate(m / "model.safetensors", 5_000), "not a readable safetensors file"),
    "missing tensor": (lambda m: edit_tensors(m, lambda t: t.pop(NORM)), NORM),
    "extra tensor": (lambda m: edit_tensors(m, lambda t: t.update(extra=t[NORM].copy())), "extra"),
    "misshapen tensor": (
        lambda m: edit_tensors(m, lambda t: t.update({NORM: t[NORM][:-1].copy()})),
        f"{NORM} has shape [31]",
    ),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "no tokenizer"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer does not load"),
    "no chat template": (lambda m: (m / "chat_template.jinja").unlink(), "no chat template"),
    "template of no content": (lambda m: (m / "chat_template.jinja").write_text("<|user|>"), "leaves out the content"),
    "broken template": (lambda m: (m / "chat_template.jinja").write_text("{% for %}"), "chat template"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_model_directory(kind, command, tiny_run, broken, tmp_path):
    damage, words = BROKEN_MODELS[kind]
    damage(broken)
    config = tiny_run(model=dict(path=str(broken)))
    refused(command(train.main, "--config", config), broken, words)
    assert not (tmp_path / "run" / "checkpoints" / "M0").exists()


def test_a_tokenizer_larger_than_the_embedding(command, tiny_run, broken):
    edit_json(broken / "config.json", vocab_size=30)
    edit_tensors(broken, lambda t: t.update({k: t[k][:30].copy() for k in ("model.embed_tokens.weight", HEAD)}))
    config = tiny_run(model=dict(path=str(broken)))
    said = refused(command(train.main, "--config", config), broken, "the tokenizer has")
    assert "the embedding 30 rows" in said


def template(**changes) -> str:
    values = dict(
        layout="standalone", question="judge {prompt}{response_a};{response_b}", answer_prefix="", verdicts=["1", "2"]
    )
    return json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    "content, words",
    [
        (template(verdicts=["ab", "ba"]), "must differ in exactly one token, the last"),
        (template(verdicts=["1", "12"]), "must differ in exactly one token, the last"),
        (template(verdicts=["§", "%"]), "verdict"),
        (template(verdicts=["1", "§"]), "verdict"),
        (template(verdicts=["1", "1"]), "two different letters"),
        (template(verdicts=["1"]), "two different letters"),
        (template(layout="other"), "layout must be"),
        (template(question="judge {prompt}{response_a}"), "lacks {response_b}"),
        (template(question=None), "the keys layout, question"),
        ("- a\n- b\n", "must be a YAML mapping"),
        ("{", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        (template(question=3), "judge template"),
        (template(layout="continuation"), "response_a is the conversation's own answer"),
    ],
)
def test_a_bad_judge_template(content, words, command, judging, world_dir, tmp_path):
    file = tmp_path / "template.yaml"
    file.write_text(content, encoding="utf-8")
    arguments = ("--input", world_dir / "heldout_pairs.jsonl", "--output", tmp_path / "out.jsonl")
    refused(command(judge.main, *judging, *arguments, "--generative.templates", json.dumps([str(file)])), file, words)
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_longer_than_the_limit_and_the_context(command, sampling, tmp_path):
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "copy abc="}, {"prompt": "copy " + "a" * 400 + "="}])
    run = (sample.main, *sampling, "--data.prompts", file, "--output", tmp_path / "out.jsonl")
    refused(command(*run, "--text.max_prompt_tokens", 1000), f"{file}:2: a prompt of", "the model's context of 256")
    refused(
        command(*run, "--text.long_prompts", "error"), f"{file}:2: the prompt 'copy aaa", "text.max_prompt_tokens is 32"
    )
    refused(
        command(*run, "--text.long_prompts", "drop", "--text.max_prompt_tokens", 2),
        "no row is left of 2: 2 x prompt longer than text.max_prompt_tokens=2",
    )
    assert command(*run).code == 0
    rows = lines(tmp_path / "out.jsonl")
    assert [len(row["prompt_ids"]) for row in rows] == [9] * RESPONSES + [32] * RESPONSES
    assert command(*run, "--text.long_prompts", "drop").code == 0
    assert len(lines(tmp_path / "out.jsonl")) == RESPONSES


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(optimise=dict(batch_size=0)), "optimise.batch_size"),
        (dict(training=dict(accumulate=3)), "training.accumulate=3"),
        (dict(sample=dict(responses=1)), "sample.responses must be at least 2"),
        (dict(run=dict(iterations=-1)), "run.iterations"),
        (dict(rewards=dict(models=())), "rewards.models"),
        (dict(generative=dict(templates=())), "generative.templates"),
        (dict(preference=dict(labels="cream")), "preference.labels cream and pairs.kind cream belong together"),
        (dict(pairs=dict(kind="cream")), "preference.labels cream and pairs.kind cream belong together"),
        (
            dict(preference=dict(labels="consensus"), rewards=dict(weights={"likelihood": 1.0})),
            "rewards.weights.likelihood",
        ),
        (dict(preference=dict(labels="consensus"), rewards=dict(weights={"generative": 0.0})), "has no weight"),
        (dict(model=dict(path="{world}/model")), "world.directory is not set"),
        (dict(run=dict(start_from="/nonexistent")), "holds no model M0"),
        (dict(evaluate=dict(grader="scir_jax.none:grade")), "evaluate.grader"),
    ],
)
def test_settings_that_mean_nothing(values, words, command, tiny_run):
    assert words in refused(command(train.main, "--config", tiny_run(**values)))


def test_a_bin_that_is_shorter_than_a_row(command, tiny_run, tmp_path, world_dir):
    config = tiny_run(text=dict(packing="bins", bin_tokens=20))
    words = ("world", ".jsonl:", "which does not fit into a bin of text.bin_tokens 20; set it to ")
    refused(command(train.main, "--config", config), *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_few_given_pairs_are_found_before_training(command, tiny_run, world_dir, tmp_path):
    rows = lines(world_dir / "eft.jsonl")
    config = tiny_run(data=dict(pairs=str(write_lines(tmp_path / "few.jsonl", rows[:2]))), run=dict(iterations=3))
    refused(command(train.main, "--config", config), "2 pairs are too few for run.iterations=3")
    assert not (tmp_path / "run" / "checkpoints" / "M0").exists()


def test_given_pairs_are_shared_out_over_all_iterations(world_dir, tiny_config, tmp_path):
    rows = lines(world_dir / "eft.jsonl")[:4]
    config = tiny_config(
        world_dir, data=dict(pairs=str(write_lines(tmp_path / "pairs.jsonl", rows))), run=dict(iterations=3)
    )
    inputs = prepare(resolve(config)).inputs
    taken = [[answer.text for _, answer in given_pairs(inputs, 3, t).items] for t in (1, 2, 3)]
    assert sum(taken, []) == [text for row in rows for text in (row["chosen"], row["rejected"])]
    assert all(taken)
