"""What is frozen at the start of an iteration is what its first step computes, wherever the answers come from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from scir_jax import train
from scir_jax.config.files import to_yaml
from scir_jax.config.schema import (
    Config,
    ConsistencyConfig,
    DataConfig,
    EvaluateConfig,
    GenerativeConfig,
    ModelConfig,
    OptimiseConfig,
    PairsConfig,
    PreferenceConfig,
    RewardsConfig,
    RunConfig,
    TextConfig,
)
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.model.hf import weights
from scir_jax.run import preflight
from scir_jax.text.chat import load_tokenizer
from tests import small_model
from tests.run.runs import lines, logit, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs", "no_page")]

EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nA, or B?\n</think>\n\nLast."
PROMPTS = [
    "Name a style.",
    "Name a colour.",
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nHi\n</think>\n\nHello!"},
        {"role": "user", "content": "A style."},
    ],
]
ANSWERS = ["Blue, of course!", "", THOUGHT, "correctness first, completeness second and style last " * 4]
# Two columns, the first in the rows of the answers themselves.
TEMPLATES = {
    "continuation": "Or: {response_b}",
    "standalone": "{prompt} A: {response_a} B: {response_b}",
}
BATCH = 4


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A model whose chat template writes an empty thinking block before an answer, as a run's M0, and another M1."""
    directory = tmp_path_factory.mktemp("started")
    small_model.write_model("qwen3", directory / "model")
    _, params = weights.load(directory / "model")
    store, rng = ModelStore(directory / "run" / "checkpoints"), np.random.default_rng(0)
    store.save(0, params)
    store.save(1, jax.tree.map(lambda x: np.asarray(x * (1 + 0.1 * rng.standard_normal(x.shape)), x.dtype), params))
    return directory


@pytest.fixture
def config(started, tmp_path, monkeypatch):
    """Labels that are frozen, and a penalty that asks both reward models in every step."""
    # The sampler, which is never called, need not be compiled.
    monkeypatch.setattr(preflight, "check_memory", lambda *_: None)
    models = ("generative", "implicit")
    templates = [tmp_path / f"{layout}.yaml" for layout in TEMPLATES]
    for path, (layout, question) in zip(templates, TEMPLATES.items(), strict=True):
        template = dict(layout=layout, question=question, answer_prefix="", verdicts=["A", "B"])
        path.write_text(json.dumps(template), encoding="utf-8")
    return Config(
        run=RunConfig(str(tmp_path / "run"), iterations=1, start_from=str(started / "run"), tensorboard=False),
        model=ModelConfig(path=str(started / "model")),
        data=DataConfig(prompts=str(write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS]))),
        text=TextConfig(max_prompt_tokens=64, max_response_tokens=24),
        pairs=PairsConfig(kind="all"),
        generative=GenerativeConfig(tuple(map(str, templates))),
        rewards=RewardsConfig(models, weights=dict.fromkeys(models, 1.0)),
        consistency=ConsistencyConfig(weight=1.0),
        preference=PreferenceConfig(labels="consensus", update="frozen"),
        optimise=OptimiseConfig(batch_size=BATCH, learning_rate=1e-2),
        evaluate=EvaluateConfig(batch_size=4),
    )


def run_of(config, tmp_path, **settings):
    config = dataclasses.replace(config, **settings)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert train.main(["--config", str(file)]) == 0
    return tmp_path / "run" / "iteration_01"


def check(folder, model):
    """Returns the pairs."""
    pairs, decisions = lines(folder / "pairs.jsonl"), lines(folder / "decisions.jsonl")
    differences = {}
    for row in decisions:
        frozen = pairs[row["pair"]]["frozen_logits"]
        assert frozen.keys() == {"generative", "implicit"} and len(frozen["generative"]) == len(TEMPLATES)
        found = [logit(p) for p in (*row["p_generative"], row["p_implicit"])]
        difference = np.abs(np.subtract([*frozen["generative"], *frozen["implicit"]], found)).max()
        differences.setdefault(row["step"], []).append(difference)
        assert row["label"] == float(np.mean(frozen["generative"]) + frozen["implicit"][0] > 0)
    assert len(differences[1]) == BATCH and max(differences[1]) < 1e-4
    assert max(differences[2]) > 1e-2
    columns = np.array([[*p["frozen_logits"]["generative"], *p["frozen_logits"]["implicit"]] for p in pairs])
    assert (np.abs(columns).max(axis=0) > 0.1).all() and (np.abs(columns) < 6).all()

    tokenizer = load_tokenizer(model)
    for pair in pairs:
        for side in "ab":
            text, spoken = (tokenizer.decode(pair[f"{name}_{side}_ids"]) for name in ("response", "quote"))
            given = pair[f"response_{side}"]
            assert text.startswith(THOUGHT if given == THOUGHT else EMPTY + given[:20])
            assert spoken.startswith("Last." if given == THOUGHT else given[:20]) and "think" not in spoken
    return pairs


def test_given_pairs(config, started, tmp_path):
    rows = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "response_a": ANSWERS[i % 4], "response_b": ANSWERS[(i + 1 + i // 4) % 4]}
        for i in range(2 * BATCH)
    ]
    given = write_lines(tmp_path / "pairs.jsonl", rows)
    folder = run_of(config, tmp_path, data=dataclasses.replace(config.data, pairs=str(given)))
    pairs = check(folder, started / "model")
    assert [(p["response_a"], p["response_b"]) for p in pairs] == [(r["response_a"], r["response_b"]) for r in rows]


def test_another_engines_answers_without_ids(config, started, tmp_path):
    folder = run_of(config, tmp_path, run=dataclasses.replace(config.run, iterations=0))
    folder.mkdir()
    write_lines(
        folder / "responses.jsonl", [{"prompt": prompt, "response": text} for prompt in PROMPTS for text in ANSWERS]
    )
    run_of(config, tmp_path)
    pairs = check(folder, started / "model")
    assert len(pairs) == len(PROMPTS) * 6 and {pair["response_a"] for pair in pairs} == set(ANSWERS)
