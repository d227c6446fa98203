"""A whole run of a small model of each family under its ready configuration: chat template, judge, adapters, export."""

import jax
import numpy as np
import pytest
import torch
import transformers

from scir_jax import judge, sample
from scir_jax.model import decoder
from scir_jax.model.hf import weights
from tests import small_model
from tests.run.runs import content, lines, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs", "no_page")]
# family -> its configuration, and another layout than the configuration's
CASES = {
    "llama": ("llama-3.1-8b", "evaluator_continuation"),
    "mistral": ("mistral-7b-v0.3", None),
    "qwen2": ("qwen2.5-7b", "continuation"),
    "qwen3": ("qwen3-8b", None),
    "gemma2": ("gemma-2-9b", "evaluator_continuation"),
    "gemma3": ("gemma-3-1b", None),
}
ANSWERS = ["--sample.responses", "2"]
FILES = ("ift", "eft", "heldout_prompts", "heldout_pairs")
# Small batches, and as many answers for evaluation as for training, so that one sampler is enough.
SMALL = ["--run.iterations", "1", "--run.tensorboard", "false", "--sft.epochs", "1", "--training.accumulate", "2"]
SMALL += ["--sft.ift_batch_size", "8", "--sft.eft_batch_size", "8", "--replay.eft_batch_size", "4"]
SMALL += ["--optimise.batch_size", "8", *ANSWERS, "--evaluate.samples", "2", "--evaluate.greedy", "false"]


@pytest.mark.documented("train one-gpu")
@pytest.mark.parametrize("family", CASES)
def test_a_run_under_the_familys_configuration(family, documented, command, tmp_path, monkeypatch):
    (train,) = documented
    monkeypatch.chdir(tmp_path)
    small_model.write_model(family, tmp_path / "model")
    small_model.write_data(tmp_path, rows=8)
    for key, rows in (("eft", 4), ("heldout_pairs", 8)):
        write_lines(tmp_path / f"{key}.jsonl", lines(tmp_path / f"{key}.jsonl")[:rows])
    name, template = CASES[family]
    ready = ["--model.path", tmp_path / "model", "--model.dtype", "float32"]
    shared = ["--text.max_prompt_tokens", "200", "--text.max_response_tokens", "24"]
    judging = ["--generative.templates", f"[{template}]"] if template else []
    if family != "llama":  # fewer shapes to compile
        shared += ["--text.packing", "off"]
    files = [part for key in FILES for part in (f"--data.{key}", tmp_path / f"{key}.jsonl")]
    run = tmp_path / "runs" / "mine"
    done = train(*ready, *shared, *judging, *files, *SMALL, instead={"models/qwen3-8b": f"models/{name}"})
    assert done.code == 0, done.err
    rows = content(run / "summary.json")["rows"]
    assert [row["model"] for row in rows] == ["M1", "M2"]
    assert all(0 <= row["agreement"] <= 1 and row["verdict_mass"] > 0 for row in rows)
    # Prompts of several turns went through sampling, judging and training.
    pairs = lines(run / "iteration_01" / "pairs.jsonl")
    assert {len(row["messages"]) for row in pairs} == {1, 3}
    decisions = lines(run / "iteration_01" / "decisions.jsonl")
    assert {row["pair"] for row in decisions} == set(range(len(pairs)))
    first = [row for row in lines(run / "metrics.jsonl") if row["stage"] == "optimise"][0]
    assert first["preference"] == pytest.approx(np.log(2), abs=1e-4)

    # The export is what training ended with, to our decoder and to transformers.
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        run / "export", dtype=torch.float32, attn_implementation="eager"
    )
    arch, params = weights.load(run / "export")
    model = decoder.define(arch)
    ids = np.asarray([row["prompt_ids"][:20] for row in lines(run / "iteration_01" / "responses.jsonl")][:3])
    ours = jax.jit(lambda params: model.logits(params, model.hidden(params, ids)))(params)
    with torch.no_grad():
        np.testing.assert_allclose(ours, reference(torch.tensor(ids)).logits.numpy(), atol=1e-4)
    _, base = weights.load(tmp_path / "model")
    assert not np.array_equal(params["layers"]["mlp"]["up"]["weight"], base["layers"]["mlp"]["up"]["weight"])
    np.testing.assert_array_equal(params["embed"], base["embed"])

    if family not in ("mistral", "qwen2"):  # tests/model/test_hf_adapters.py has all families' adapters
        return
    # Base model with adapter and merged export answer and judge alike.
    reading = ["--config", f"models/{name}", "--model.remat", "full", *shared]
    merged = ["--model.path", run / "export"]
    adapted = ["--model.path", tmp_path / "model", "--lora.adapter", run / "adapter"]
    texts, judged = [], []
    for number, which in enumerate((merged, adapted)):
        output = tmp_path / f"answers-{number}.jsonl"
        greedy = ["--sample.batch_size", "8", "--sample.temperature", "0", *ANSWERS]
        prompts = ["--data.prompts", tmp_path / "prompts.jsonl", "--output", output]
        done = command(sample.main, *reading, *which, *prompts, *greedy)
        assert done.code == 0, done.err
        texts.append([row["response_ids"] for row in lines(output)])
        output = tmp_path / f"judged-{number}.jsonl"
        pairs = ["--input", tmp_path / "heldout_pairs.jsonl", "--evaluate.batch_size", "8", "--output", output]
        done = command(judge.main, *reading, *judging, *which, *pairs, "--reference", tmp_path / "model")
        assert done.code == 0, done.err
        judged.append([(row["p_generative"], row["p_implicit"]) for row in lines(output)])
    assert texts[0] == texts[1]
    np.testing.assert_allclose(judged[0], judged[1], atol=1e-4)
