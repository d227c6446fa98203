"""Conversations of several turns, from the data files to the rows of both judge layouts and through a run."""

import dataclasses
import json

import pytest

from scir_jax import train
from scir_jax.config import cli
from scir_jax.data.files import read_rows
from scir_jax.data.pairs import Pair, from_row, to_row
from scir_jax.data.pipelines import iterator, pair_batches
from scir_jax.run import pairing
from scir_jax.run.setup import prepare
from tests.chat_templates import turns
from tests.data.small_data import read_of, rows_of
from tests.run.data_files import CONVERSATION, write

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.mark.parametrize("layout", ["judge", "judge_continuation"])
def test_several_turns_in_both_layouts(make, world_dir, tmp_path, layout):
    rows = [{"prompt": CONVERSATION, "chosen": "ba", "rejected": [{"role": "assistant", "content": "ab"}]}]
    path = write(tmp_path / "pairs.jsonl", *rows)
    encoder, inputs, programs, _ = make(
        data=dict(prompts=path, pairs=path, eft=path),
        generative=dict(templates=(str(world_dir / f"{layout}.yaml"),)),
        text=dict(max_prompt_tokens=64, max_response_tokens=12),
        replay=dict(weight=0.0),
    )
    context = "<s><|user|>copy ab=<|assistant|>ab</s><|user|>reverse ab=<|assistant|>"
    shown = "user: copy ab=\n\nassistant: ab\n\nuser: reverse ab="
    questions = {
        "judge": "<s><|user|>judge {x}{a};{x}{b}<|assistant|>",
        "judge_continuation": context + "{a}</s><|user|>judge {x}{b}<|assistant|>",
    }

    def tokens(text):
        return tuple(encoder.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(a, b):
        return tokens(questions[layout].format(x=shown, a=a, b=b))

    (prompt,) = inputs.prompts
    assert prompt.ids == tokens(context) and prompt.quote == encoder.chat.encode_text(shown)
    (pair,) = inputs.given_pairs
    assert pair.prompt == prompt and (pair.a.ids, pair.b.ids) == (tokens("ba</s>"), tokens("ab</s>"))
    first, second = inputs.targets["eft"]
    assert first.ids == (*question("ba", "ab"), *tokens("1"))
    assert second.ids == (*question("ab", "ba"), *tokens("2"))
    # DPO: what an iteration writes, read again as the training step takes it.
    items, (choice,), *_ = pairing.given_pairs(inputs, 1, 1)
    cached = dict.fromkeys(programs.optimise_spec.pairs.cached, (-1.0, -1.0))
    made = Pair(items[choice.a][0], items[choice.a][1], items[choice.b][1], choice.label, cached=cached)
    row = json.loads(json.dumps(to_row(made, 0)))
    assert row["messages"] == CONVERSATION and row["prompt"] == shown
    spec = dataclasses.replace(programs.optimise_spec, pairs=dataclasses.replace(programs.optimise_spec.pairs, pairs=1))
    (batch,) = iterator(
        pair_batches(spec, encoder, [from_row(row, "pairs:1")], inputs.targets, epochs=1, seed=0, seeds={}).dataset
    )
    by_place = {int(place): (where, ids) for where, ids in rows_of(batch)[0] for place in where}
    for side, (y, other) in enumerate((("ba", "ab"), ("ab", "ba"))):
        ((answers, verdicts),) = read_of(batch)
        _, places, scored = answers[side]
        assert scored == tokens(f"{y}</s>")
        where, ids = by_place[int(places[0])]
        assert ids[: list(where).index(places[0]) + 1] == tokens(context)
        where, ids = by_place[verdicts[0][side][1]]
        assert ids == question(y, other) and where[-1] == verdicts[0][side][1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["judge", "judge_continuation"])
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
    chat = prepare(cli.parse("train", "", ["--config", str(config)])[0]).encoder.chat
    responses = [row for _, row in read_rows(folder / "responses.jsonl")]
    assert len(responses) == 3 * len(words)
    for row in responses:
        assert row["messages"] == conversations[row["prompt_number"]]
        assert tuple(row["prompt_ids"]) == chat.prompt(row["messages"])
    pairs = [row for _, row in read_rows(folder / "pairs.jsonl")]
    assert pairs and all(row["messages"] in conversations for row in pairs)
    assert len(read_rows(folder / "decisions.jsonl")) == len(pairs)
