"""Small reward models that transformers makes, and what they give to conversations there."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests import small_model
from tests.families import randomised


def write_reward_model(family: str, directory: Path, *, outputs: int = 1, pad_token: str | None = None) -> Path:
    """Writes a reward model with the tokenizer and the chat template of tests.small_model.

    Args:
      pad_token: the model's own; None: the end-of-text token.
    """
    small_model.write_model(family, directory)
    (directory / "model.safetensors").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    pad = tokenizer.convert_tokens_to_ids(pad_token) if pad_token else tokenizer.eos_token_id
    config = transformers.AutoConfig.for_model(
        **{
            **values,
            "architectures": None,
            "id2label": {i: f"LABEL_{i}" for i in range(outputs)},
            "pad_token_id": pad,
            "hidden_size": 32,
        }
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    randomised(model, family).save_pretrained(directory)
    return directory


def transformers_scores(directory: Path, conversations: list[list[dict]]) -> np.ndarray:
    """[conversations] the model's scores of a padded batch, as a user of transformers would get them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    options = dict(tokenize=True, return_dict=False, date_string="26 Jul 2024")
    rows = [tokenizer.apply_chat_template(conversation, **options) for conversation in conversations]
    pad, longest = model.config.pad_token_id, max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[:, 0].numpy()
