"""What runs account, against counts by brute force from their files: by the tokenizer, and FLOPs weight by weight."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from scir_jax.run import counts
from scir_jax.run.counts import Counts
from tests.run.runs import EPOCHS, ITERATIONS, content, lines

pytestmark = pytest.mark.usefixtures("shared_programs")


class Brute:
    """Counts the rows of a model directory one by one.

    Attributes:
      flops: of all forward passes so far.
    """

    def __init__(self, model):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.config = content(model / "config.json")
        tensors = load_file(model / "model.safetensors")
        self.matrices = sum(x.size for name, x in tensors.items() if ".layers." in name and x.ndim == 2)
        self.head = tensors["lm_head.weight"].size
        self.flops = 0

    def conversation(self, text):
        """The tokens of a conversation as the tokenizer's own chat template writes it."""
        messages = [{"role": "user", "content": text}]
        return len(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def plain(self, text):
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, tokens, before=0, logits=0.0):
        """Goes forward over tokens behind `before` others, and takes so many logits of the whole vocabulary."""
        pairs = sum(before + t + 1 for t in range(tokens))
        heads = self.config["num_attention_heads"] * self.config["head_dim"] * self.config["num_hidden_layers"]
        self.flops += 2 * self.matrices * tokens + 4 * heads * pairs + 2 * self.head * logits
        return tokens

    def answers(self, rows):
        """Sampled answers: each prompt is read once."""
        prompts = {row["prompt_number"]: len(row["prompt_ids"]) for row in rows}
        for tokens in prompts.values():
            self.row(tokens)
        return sum(self.row(n, len(r["prompt_ids"]), n) for r in rows for n in [len(r["response_ids"])])

    def scored(self, prompt, answer):
        return self.row(prompt + answer, logits=answer)

    def judged(self, prompt, a, b):
        """The judge's question in both orders, with the prompt before each answer; tokens of the texts."""
        # Two columns of the head are read off each.
        share = 2 / self.config["vocab_size"]
        return sum(self.row(self.conversation("judge ;") + 2 * prompt + a + b, logits=share) for _ in range(2))

    def spent(self):
        flops, self.flops = self.flops, 0
        return round(flops)


def test_a_run_accounts_every_token_of_its_files(whole, world_dir):
    brute = Brute(world_dir / "model")
    metrics = lines(whole.path / "metrics.jsonl")
    heldout = lines(world_dir / "heldout_pairs.jsonl")
    first = [row for row in lines(whole.path / "iteration_00" / "heldout_responses.jsonl") if not row["greedy"]]
    expected = {}
    for t in range(ITERATIONS + 1):
        folder = whole.path / f"iteration_{t:02d}"
        steps = [row for row in metrics if row["iteration"] == t]
        assert all(sum(v for k, v in row.items() if k.startswith("tokens/")) == row["tokens"] for row in steps)
        assert all(row["flops"] == pytest.approx(row["teraflops"] * row["seconds"] * 1e12) for row in steps)
        trained = Counts(flops=sum(int(row["flops"]) for row in steps))
        tokens = sum(int(row["tokens"]) for row in steps)
        if t == 0:
            expected[t, "sft"] = trained + Counts(trained_replay=tokens)
        else:
            generated = brute.answers(lines(folder / "responses.jsonl"))
            expected[t, "sample"] = Counts(generated=generated, flops=brute.spent())
            pairs = lines(folder / "pairs.jsonl")
            used = {
                (len(pair["prompt_ids"]), tuple(pair["prompt_ids"]), tuple(pair[f"response_{side}_ids"]))
                for pair in pairs
                for side in "ab"
            }
            # Under M_t, the start and DPO's reference, and under M_{t-1}, the implicit reward's.
            scored = sum(brute.scored(n, len(answer)) for n, _, answer in used for _ in range(2))
            expected[t, "score"] = Counts(scored=scored, flops=brute.spent())
            decisions = lines(folder / "decisions.jsonl")
            assert len(decisions) == EPOCHS * len(pairs)
            policy = judge = 0
            for decision in decisions:
                pair = pairs[decision["pair"]]
                policy += sum(len(pair["prompt_ids"]) + pair[f"length_{side}"] for side in "ab")
                judge += brute.judged(*(len(pair[f"{text}_ids"]) for text in ("prompt_quote", "quote_a", "quote_b")))
            brute.spent()
            expected[t, "optimise"] = trained + Counts(
                trained_policy=policy, trained_judge=judge, trained_replay=tokens - policy - judge
            )
            assert tokens > policy + judge
        scored = judged = 0
        for pair in heldout:
            answers = [brute.plain(pair[name]) for name in ("chosen", "rejected")]
            # Under the model and under its reference; an answer ends with the stop token.
            scored += sum(brute.scored(brute.conversation(pair["prompt"]), n + 1) for n in answers for _ in range(2))
            judged += brute.judged(brute.plain(pair["prompt"]), *answers)
        rows = lines(folder / "heldout_responses.jsonl")
        generated = sum(brute.answers([row for row in rows if row["greedy"] == greedy]) for greedy in (False, True))
        if t and whole.config.evaluate.divergence:
            mine = [row for row in rows if not row["greedy"]]
            assert len(mine) == len(first)
            scored += sum(brute.scored(len(row["prompt_ids"]), len(row["response_ids"])) for row in mine)
        expected[t, "evaluate"] = Counts(generated, scored, judged, flops=brute.spent())
    summary = content(whole.path / "summary.json")
    assert summary["costs"] == counts.table(whole.path) and len(summary["settings"]) == 64
    found = {(row["iteration"], row["stage"]): row for row in summary["costs"]["stages"]}
    start = found.pop((0, "start"))
    assert start["seconds"] > 0 and {start[name] for name in counts.FIELDS} == {None}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert {name: row[name] for name in counts.FIELDS} == vars(expected[key]), key
        assert row["seconds"] > 0 and row["memory"] > 2**26 and row["memory_of"] == "process"
    total = summary["costs"]["total"]
    assert {name: total[name] for name in counts.FIELDS} == vars(sum(expected.values(), Counts()))
    assert total["memory"] == max(row["memory"] for row in found.values())
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in (start, *found.values())))


def test_a_kill_between_a_result_and_its_time_loses_no_count(tmp_path):
    """A stage keeps its counts before its result is there, and its seconds behind it."""
    folder = tmp_path / "iteration_01"
    folder.mkdir()
    counts.put(folder / counts.COUNTS, "sample", vars(Counts(generated=7, flops=3)))
    counts.put(folder / counts.COUNTS, "sample", vars(Counts(generated=9, flops=4)))
    (row,) = counts.table(tmp_path)["stages"]
    assert (row["generated"], row["flops"], row["seconds"], row["memory"]) == (9, 4, None, None)
    counts.put(folder / counts.SECONDS, "score", 2.5)
    found = counts.table(tmp_path)
    assert [row["stage"] for row in found["stages"]] == ["sample", "score"]
    assert found["total"] == {**vars(Counts(generated=9, flops=4)), "seconds": 2.5, "memory": None, "memory_of": None}
    assert json.loads((folder / counts.SECONDS).read_text()) == {"score": 2.5}


def test_counts_add_up():
    one, other = Counts(1, 2, 3, 4, 5, 6, 7), Counts(10, 20, 30, 40, 50, 60, 70)
    assert one + other == Counts(*np.arange(1, 8) * 11) and one * 3 == Counts(*np.arange(1, 8) * 3)
