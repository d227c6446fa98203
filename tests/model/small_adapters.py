"""Small random models of four families with PEFT adapters, which the tests of adapters share."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers

from scir_jax.model import decoder, lora
from scir_jax.model.architecture import LINEARS
from scir_jax.model.hf import adapters, weights
from tests.processes import quick_jit

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
FAMILIES = {
    "llama": dict(head_dim=12, tie_word_embeddings=True),
    "qwen2": dict(use_sliding_window=False),
    "gemma2": dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=3.0),
    "mistral": dict(sliding_window=5, num_key_value_heads=1),
}
ALL = tuple(LINEARS)
ADAPTERS = {
    "llama": lora.Lora(3, 7.0, ALL),
    "qwen2": lora.Lora(4, 3.0, ("k_proj", "v_proj", "down_proj"), rslora=True),
    "gemma2": lora.Lora(2, 3.0, ("q_proj", "o_proj", "gate_proj", "up_proj")),
    "mistral": lora.Lora(1, 0.5, ALL, rslora=True, dropout=0.25),
}


def ids_of(rows=2, length=11):
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], (rows, length))


def random_tree(tree, seed):
    """Normal arrays in the places of `tree`, of a size that shows in the logits."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> its random model: directory, architecture, our parameters."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp("base") / family
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.uniform_(-0.4, 0.4).add_(0 if family == "gemma2" else 1)
                    else:
                        parameter.normal_(0, 0.5 if parameter.ndim == 1 else 1.3 * parameter.shape[-1] ** -0.5)
            model.save_pretrained(directory)
            arch, params = weights.load(directory)
            made[family] = SimpleNamespace(directory=directory, arch=arch, params=params)
        return made[family]

    return make


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """adapted(family) -> its random model with ADAPTERS[family]: exported adapter directory, joined parameters."""
    made = {}

    def make(family):
        if family not in made:
            base, settings = models(family), ADAPTERS[family]
            model = decoder.define(base.arch, lora=settings)
            trained = random_tree(lora.split(model.abstract(), settings)[0], 2)
            directory = tmp_path_factory.mktemp("adapter") / family
            adapters.save(directory, base.arch, settings, trained, base_model=str(base.directory))
            params = lora.join(trained, base.params)
            made[family] = SimpleNamespace(base=base, model=model, directory=directory, params=params, trained=trained)
        return made[family]

    return make


def torch_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def our_logits(model, params, ids):
    return np.asarray(quick_jit(lambda p: model.logits(p, model.hidden(p, ids)))(params))
