"""Small random models of every family and feature, made by transformers, and how far ours are from them.

Shapes: B rows, T tokens, P prompt tokens, R response tokens, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from scir_jax.errors import InputError
from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture
from scir_jax.model.hf import weights
from tests.caches import prefilled
from tests.processes import quick_jit

TOLERANCE = 1e-4
LENGTHS = (22, 3, 14)
PROMPTS = (9, 1, 4)  # of the same rows where they are decoded: beyond the windows, and from before them
WINDOW = 5

_SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large enough to be seen
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,  # torch gives the padding's embedding no gradient
}
# Dimensions turn a few times, about once and far less than once in the original length.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
}
_GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 8,
    "sliding_window": WINDOW,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_LINEAR_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
}
_FULL = {"layer_types": None, "use_sliding_window": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A configuration of a family, and for each of its features the changes that switch it off."""

    family: str  # model_type
    feature: str
    config: dict[str, Any]
    off: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.family} {self.feature}"

    def hf_config(self, **changes) -> transformers.PreTrainedConfig:
        values = {"model_type": self.family, **_SMALL, **self.config, **changes}
        return transformers.AutoConfig.for_model(**values)


def _case(family: str, feature: str, config: dict[str, Any], **off: dict[str, Any]) -> Case:
    return Case(family, feature, config, off)


CASES = (
    _case("llama", "grouped queries", {}, theta=_DEFAULT_ROPE, eps={"rms_norm_eps": 1e-6}),
    _case(
        "llama",
        "linear rope, tied head",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
        },
        rope={"rope_parameters": _SMALL["rope_parameters"]},
    ),
    _case(
        "llama",
        "llama3 rope, head_dim",
        {"rope_parameters": _LLAMA3, "head_dim": 16},
        rope=_DEFAULT_ROPE,
        smooth={"rope_parameters": {**_LLAMA3, "low_freq_factor": 3.999}},
    ),
    _case(
        "llama",
        "biases",
        {"attention_bias": True, "mlp_bias": True},
        attention={"attention_bias": False},
        mlp={"mlp_bias": False},
    ),
    _case("mistral", "window, head_dim", {"sliding_window": WINDOW, "head_dim": 12}, window={"sliding_window": None}),
    _case(
        "mistral",
        "no window, exact gelu",
        {"sliding_window": None, "hidden_act": "gelu"},
        theta=_DEFAULT_ROPE,
        tanh={"hidden_act": "gelu_pytorch_tanh"},
    ),
    _case("qwen2", "biases", {}, biases={"model_type": "llama"}),
    _case(
        "qwen2",
        "windows from a layer on, tied head",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        windows=_FULL,
        first={"max_window_layers": 0},
    ),
    _case(
        "qwen2",
        "layer_types",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
        windows=_FULL,
        order={"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    _case(
        "qwen3",
        "q/k norms, head_dim, tied head",
        {"head_dim": 12, "tie_word_embeddings": True},
        norms={"model_type": "llama"},
    ),
    _case(
        "qwen3",
        "biases, windows from a layer on",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        biases={"attention_bias": False},
        windows=_FULL,
        first={"max_window_layers": 0},
    ),
    _case(
        "gemma2",
        "caps, alternating windows",
        _GEMMA2,
        windows={"sliding_window": 64},
        attention_cap={"attn_logit_softcapping": None},
        final_cap={"final_logit_softcapping": None},
        scale={"query_pre_attn_scalar": 16},
        exact_gelu={"hidden_activation": "gelu"},
    ),
    _case(
        "gemma2",
        "no caps, biases, own head",
        {
            **_GEMMA2,
            "num_hidden_layers": 4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        biases={"attention_bias": False},
    ),
    _case(
        "gemma3_text",
        "5:1 windows, two rope bases",
        _GEMMA3,
        windows={"sliding_window": 64},
        local_rope={"rope_parameters": dict.fromkeys(_LINEAR_GLOBAL, _GEMMA3["rope_parameters"]["full_attention"])},
        global_rope={"rope_parameters": dict.fromkeys(_LINEAR_GLOBAL, _LINEAR_GLOBAL["sliding_attention"])},
        pattern={"layer_types": ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 3},
    ),
    _case(
        "gemma3_text",
        "linear global rope, final cap, biases",
        {
            **_GEMMA3,
            "num_hidden_layers": 4,
            "rope_parameters": _LINEAR_GLOBAL,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 2.0,
            "attention_bias": True,
        },
        final_cap={"final_logit_softcapping": None},
        biases={"attention_bias": False},
        linear={
            "rope_parameters": {**_LINEAR_GLOBAL, "full_attention": {"rope_type": "default", "rope_theta": 1000.0}}
        },
    ),
)
# The case of each family with the most that is its own.
FOREMOST = {case.family: case for case in (CASES[2], CASES[4], CASES[7], CASES[10], CASES[11], CASES[14])}


def random_reference(case: Case, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A transformers model in whose logits every part of it shows, unlike at initialisation."""
    model = transformers.AutoModelForCausalLM.from_config(case.hf_config(), attn_implementation="eager").eval()
    return randomised(model, case.family).to(dtype)


def randomised(model: transformers.PreTrainedModel, family: str) -> transformers.PreTrainedModel:
    """Gives a model of a family weights of which each shows in what it computes."""
    generator = torch.Generator().manual_seed(0)
    # Gemma stores a norm's scale less 1, and multiplies what it looks up in the embedding.
    centre, embedding = (0.0, 0.3) if family.startswith("gemma") else (1.0, 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = centre + 0.3 * normal
            elif name.endswith("bias"):
                value = 0.5 * normal
            elif "embed_tokens" in name:
                value = embedding * normal
            else:
                value = 1.5 * normal / parameter.shape[1] ** 0.5
            parameter.copy_(value)
    return model


def altered(reference: transformers.PreTrainedModel, config: transformers.PreTrainedConfig):
    """The same weights, as far as it has them, under another configuration."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(reference.state_dict(), strict=False)
    return model


def random_rows(vocab: int = _SMALL["vocab_size"]) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, T] int32, whose padding is not of one id, and valid [B, T])."""
    ids_BT = np.random.default_rng(0).integers(0, vocab, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    return ids_BT, np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


def torch_logits(model: transformers.PreTrainedModel, ids_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        ids = torch.tensor(ids_BT, dtype=torch.long)
        return model(ids, attention_mask=torch.tensor(valid_BT, dtype=torch.long)).logits.float().numpy()


@dataclasses.dataclass(frozen=True, eq=False)
class Imported:
    """A case's model on both sides; `directory` is where transformers saved it."""

    case: Case
    reference: transformers.PreTrainedModel
    directory: Path
    arch: Architecture
    params: decoder.Params
    expected: np.ndarray  # float32 [B, T, V]: the logits of random_rows

    @property
    def model(self) -> decoder.Model:
        return decoder.define(self.arch)


def import_case(case: Case, directory: Path) -> Imported:
    reference = random_reference(case)
    reference.save_pretrained(directory)
    arch, params = weights.load(directory)
    return Imported(case, reference, directory, arch, jax.device_put(params), torch_logits(reference, *random_rows()))


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite where anything is not finite."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def forward_difference(imported: Imported) -> float:
    """Of the logits at all tokens of right-padded rows."""
    ids_BT, valid_BT = random_rows()
    model = imported.model
    run = quick_jit(lambda params: model.logits(params, model.hidden(params, ids_BT)))
    return worst(np.asarray(run(imported.params))[valid_BT], imported.expected[valid_BT])


def decoding_difference(imported: Imported) -> float:
    """Of the logits of prompts and of the tokens after them, decoded with a cache to the ends of the rows."""
    ids_BT, valid_BT = random_rows()
    model, starts_B, rows_B = imported.model, np.array(PROMPTS, np.int32), np.arange(len(PROMPTS))
    prompt_BT = np.arange(max(LENGTHS)) < starts_B[:, None]
    prompts_BP = np.where(prompt_BT, ids_BT, 7)[:, : max(PROMPTS)]
    ids_BT = jnp.asarray(ids_BT)

    def run(params):
        hidden_BPD, cache = prefilled(model, params, prompts_BP, starts_B, max(LENGTHS))

        def step(cache, offset):
            positions_B = starts_B + offset
            hidden_BD, cache = model.decode(params, ids_BT[rows_B, positions_B], positions_B, cache)
            return cache, model.logits(params, hidden_BD)

        _, logits_RBV = jax.lax.scan(step, cache, jnp.arange(max(LENGTHS) - max(PROMPTS)))
        return model.logits(params, hidden_BPD), logits_RBV

    logits_BPV, logits_RBV = (np.asarray(x) for x in quick_jit(run)(imported.params))
    found = np.zeros_like(imported.expected)
    found[:, : max(PROMPTS)][prompt_BT[:, : max(PROMPTS)]] = logits_BPV[prompt_BT[:, : max(PROMPTS)]]
    decoded_BT = np.zeros_like(valid_BT)
    for offset, logits_BV in enumerate(logits_RBV):
        found[rows_B, starts_B + offset] = logits_BV
        decoded_BT[rows_B, starts_B + offset] = True
    seen_BT = (prompt_BT | decoded_BT) & valid_BT
    return worst(found[seen_BT], imported.expected[seen_BT])


def export_difference(imported: Imported, directory: Path) -> float:
    """Of the logits of an export that transformers loads, which must use all that is there and nothing else."""
    config = weights.hf_config(imported.directory)
    weights.save(directory, imported.arch, jax.device_get(imported.params), config=config, source=imported.directory)
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(exported) is type(imported.reference)
    return worst(torch_logits(exported.eval(), *random_rows()), imported.expected)


def refused(call, *parts: str) -> None:
    """Asserts that a call raises an InputError of one line that has all the parts."""
    with pytest.raises(InputError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
