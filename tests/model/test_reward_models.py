"""Reward models of every family against transformers' AutoModelForSequenceClassification, and those refused."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from scir_jax.data.batches import Rows
from scir_jax.engine.reward import compiled_length, rewards
from scir_jax.errors import InputError
from scir_jax.model import decoder, families
from scir_jax.model.hf import weights
from tests.families import FOREMOST, LENGTHS, TOLERANCE, Case, random_rows, randomised
from tests.processes import quick_jit


def reference_of(case: Case, outputs: int = 1):
    config = case.hf_config(num_labels=outputs, pad_token_id=0)
    auto = transformers.AutoModelForSequenceClassification
    return randomised(auto.from_config(config, attn_implementation="eager").eval(), case.family)


@pytest.mark.parametrize("case", FOREMOST.values(), ids=str)
def test_scores_are_those_of_transformers(case, tmp_path):
    reference = reference_of(case)
    reference.save_pretrained(tmp_path)
    ids_BT, valid_BT = random_rows()
    ids_BT = np.where(ids_BT == 0, 1, ids_BT)
    found = {}
    # Rows of one length each, padded on the right, and on the left: all with the same scores.
    for side in ("right", "left"):
        padded = np.zeros_like(ids_BT)
        for row, (ids, length) in enumerate(zip(ids_BT, LENGTHS)):
            padded[row, slice(length) if side == "right" else slice(-length, None)] = ids[:length]
        mask = torch.tensor(padded != 0, dtype=torch.long)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            read = reference(torch.tensor(padded, dtype=torch.long), attention_mask=mask, position_ids=positions)
        found[side] = read.logits[:, 0].numpy()
    np.testing.assert_allclose(found["left"], found["right"], atol=TOLERANCE)

    arch, params = weights.load(tmp_path, reward=True)
    assert arch.parameter_count() == sum(p.numel() for p in reference.parameters())
    last = np.array(LENGTHS, np.int32) - 1
    rows = Rows(ids_BT, last)
    ours = quick_jit(lambda params: rewards(decoder.define(arch), params, rows))(jax.device_put(params))
    assert ours.shape == (len(LENGTHS),) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, found["right"], atol=TOLERANCE)
    assert np.ptp(found["right"]) > 100 * TOLERANCE


def test_two_outputs_are_refused_and_a_language_model_too(tmp_path):
    case = FOREMOST["llama"]
    reference_of(case, outputs=2).save_pretrained(tmp_path / "two")
    config = weights.hf_config(tmp_path / "two")
    with pytest.raises(InputError, match="config.json: the score head has 2 outputs, but a reward model gives one"):
        families.read(config, str(tmp_path / "two" / "config.json"), reward=True)
    # What config.json leaves out the tensors say.
    (tmp_path / "two" / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}}))
    with pytest.raises(InputError, match=r"score.weight has shape \[2, 32\]"):
        weights.load(tmp_path / "two", reward=True)
    language = json.loads(case.hf_config(architectures=["LlamaForCausalLM"]).to_json_string())
    with pytest.raises(InputError, match="LlamaForSequenceClassification"):
        families.read(language, "config.json", reward=True)
    with pytest.raises(InputError, match="architectures is .'LlamaForSequenceClassification'.; supported are"):
        families.read(config, "config.json")


def test_compiled_lengths_are_few_and_hold_their_rows():
    found = [compiled_length(tokens, 10_000) for tokens in range(1, 5000)]
    assert sorted(set(found)) == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(length >= tokens for tokens, length in enumerate(found, start=1))
    assert compiled_length(700, 720) == 720
