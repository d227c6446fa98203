"""The embedded world: tasks, grader, tokenizer and files."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter

import jinja2
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from scir_jax.errors import InputError
from scir_jax.world import tasks
from scir_jax.world.files import is_complete, write_world
from scir_jax.world.grader import grade
from scir_jax.world.spec import WorldSpec
from scir_jax.world.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, UNK, USER, VOCABULARY

SMALL = WorldSpec(
    base_documents=300,
    base_comparisons=300,
    ift_documents=100,
    eft_comparisons=100,
    prompts=300,
    heldout_prompts=50,
    heldout_pairs=50,
)
TRAINING_FILES = ("base", "base_comparisons", "ift", "eft", "prompts")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "full"
    write_world(directory, WorldSpec())
    return directory


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "untrained")


def read(directory, name):
    text = (directory / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompt_of(row):
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Tasks


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("copy abcd=", "abcd"),
        ("reverse abcd=", "dcba"),
        ("upper abcd=", "ABCD"),
        ("upper-reverse abcd=", "DCBA"),
        ("rotate abcd=", "bcda"),
    ],
)
def test_answer(prompt, expected):
    assert tasks.answer(prompt) == expected
    assert tasks.make_prompt(*tasks.parse_prompt(prompt)) == prompt


@pytest.mark.parametrize(
    "prompt",
    ["", "abcd=", "copy abcd", "copy abck=", "copy  abc=", "copy abc=\n", "copy ABC=", "upper ="],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(InputError):
        tasks.answer(prompt)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_modes_produce_what_they_say(task):
    rng = np.random.default_rng(0)
    extra_lengths = set()
    for _ in range(200):
        word = tasks.sample_word(rng)
        assert 3 <= len(word) <= 6 and set(word) <= set(tasks.LETTERS)
        right = tasks.answer(tasks.make_prompt(task, word))
        body = {mode: tasks.sample_body(rng, task, word, mode) for mode in tasks.MODES}
        assert body["good"] == right
        assert body["lazy"] == (word[::-1] if task == "copy" else word)
        assert len(body["typo"]) == len(right)
        assert sum(a != b for a, b in zip(body["typo"], right)) == 1
        assert body["cut"] and right.startswith(body["cut"]) and body["cut"] != right
        assert body["ramble"].startswith(right)
        extra_lengths.add(len(body["ramble"]) - len(right))
        for mode in ("typo", "cut", "ramble"):
            assert body[mode].isupper() == right.isupper()
    assert extra_lengths == {1, 2, 3}


def test_sampled_answers_follow_the_probabilities():
    rng = np.random.default_rng(0)
    word, right = "abcdef", "FEDCBA"
    probabilities, marker = (0.3, 0.2, 0.25, 0.1, 0.15), 0.75
    count, marked, n = Counter(), 0, 20_000
    for _ in range(n):
        response = tasks.sample_answer(rng, "upper-reverse", word, probabilities, marker)
        marked += response.endswith("!")
        body = response.removesuffix("!")
        if body == right:
            count["good"] += 1
        elif body == word:
            count["lazy"] += 1
        elif len(body) == len(right):
            count["typo"] += 1
        else:
            count["cut" if len(body) < len(right) else "ramble"] += 1
    # Five standard errors are at most .018.
    assert marked / n == pytest.approx(marker, abs=0.02)
    assert [count[mode] / n for mode in tasks.MODES] == pytest.approx(probabilities, abs=0.02)


@pytest.mark.parametrize("mode", tasks.MODES)
def test_a_certain_mode_is_always_drawn(mode):
    rng = np.random.default_rng(0)
    probabilities = [float(mode == other) for other in tasks.MODES]
    for _ in range(50):
        body = tasks.sample_answer(rng, "upper", "abc", probabilities, 0.0)
        kind = {"good": body == "ABC", "lazy": body == "abc", "cut": body in ("A", "AB")}
        kind["ramble"] = body.startswith("ABC") and len(body) > 3
        kind["typo"] = not any(kind.values())
        assert kind[mode]


# Grader


@pytest.mark.parametrize(
    "response, quality, exact",
    [
        ("dcba!", 1.0, 1),
        ("dcba", 0.8, 1),
        ("dcbj!", 0.8, 0),
        ("dcbj", 0.6, 0),
        ("dc!", 0.6, 0),
        ("abcd!", 0.2, 0),
        ("!", 0.2, 0),
        ("", 0.0, 0),
        ("dcbahi", round(0.8 * 4 / 6, 9), 0),
        ("dcba!!", 0.64, 0),  # the body is "dcba!"
        ("!dcba", 0.0, 0),
        ("dc!ba!", 0.8 * 2 / 5, 0),
        ("dcba! ", round(0.8 * 4 / 6, 9), 0),
        ("DCBA!", 0.2, 0),
    ],
)
def test_grade(response, quality, exact):
    assert grade("reverse abcd=", response) == {"quality": pytest.approx(quality), "exact": exact}


def test_grade_agrees_with_the_definition_and_survives_any_text():
    rng = np.random.default_rng(0)
    alphabet = list("abcABC!!! =;1\n\0<|>") + ["é", "😀", "\ud800", "<unk>", "</s>"]
    for _ in range(2000):
        word = tasks.sample_word(rng)
        prompt = tasks.make_prompt(tasks.sample_task(rng), word)
        response = "".join(rng.choice(alphabet, size=rng.integers(0, 12)))
        right = tasks.answer(prompt)
        polite = response[-1:] == "!" and "!" not in response[:-1]
        body = response[:-1] if response[-1:] == "!" else response
        longer = max(len(body), len(right))
        padded = zip(body.ljust(longer, "\1"), right.ljust(longer, "\2"))
        expected = 0.8 * sum(a == b for a, b in padded) / longer + 0.2 * polite
        result = grade(prompt, response)
        assert result["quality"] == pytest.approx(expected, abs=1e-8)
        assert 0 <= result["quality"] <= 1
        assert result["exact"] == (body == right)


def test_equal_merit_compares_equal():
    # 0.8 * 3/4 and 0.8 * 2/4 + 0.2 differ in the last bit of a float.
    assert grade("copy abcd=", "abc")["quality"] == grade("copy abcd=", "ab!")["quality"]


# Tokenizer


def test_vocabulary(tokenizer):
    assert len(set(VOCABULARY)) == len(VOCABULARY) == len(tokenizer) == 40
    assert tokenizer.convert_ids_to_tokens(range(40)) == list(VOCABULARY)
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_round_trip_and_pieces(tokenizer):
    rng = np.random.default_rng(0)
    pieces = VOCABULARY[len(SPECIAL_TOKENS) :]
    assert tokenizer.encode("upper-reverse") == [VOCABULARY.index("upper-reverse")]
    for _ in range(300):
        left, right = ("".join(rng.choice(pieces, size=rng.integers(0, 20))) for _ in range(2))
        ids = tokenizer.encode(left + right)
        assert tokenizer.decode(ids) == left + right
        assert UNK not in tokenizer.convert_ids_to_tokens(ids)
        # "upper" is a proper prefix of a word, but no token starts with "-": nothing straddles.
        assert tokenizer.encode(left) + tokenizer.encode(right) == ids


def test_every_file_is_within_the_vocabulary(world, tokenizer):
    texts = set()
    for name in (*TRAINING_FILES, "heldout_prompts", "heldout_pairs"):
        for row in read(world, name)[:500]:
            texts.update([m["content"] for m in row.get("messages", [])] or row.values())
    ids = tokenizer(sorted(texts))["input_ids"]
    assert min(min(row) for row in ids) >= len(SPECIAL_TOKENS)


def test_unknown_characters(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aké")) == ["a", UNK, UNK]


def test_control_tokens_in_user_text_stay_text(tokenizer):
    control = {VOCABULARY.index(token) for token in SPECIAL_TOKENS if token != UNK}
    for text in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{text}b", split_special_tokens=True, add_special_tokens=False)
        assert len(ids) == len(text) + 2 and not control & set(ids)
    # Without the setting they are control tokens, also after a call with it.
    assert tokenizer.encode(ASSISTANT) == [VOCABULARY.index(ASSISTANT)]


def test_chat_template(tokenizer):
    user = {"role": "user", "content": "copy abc="}
    assistant = {"role": "assistant", "content": "abc!"}

    def render(*messages, generate=False):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)

    prompt = f"{BOS}{USER}copy abc="
    assert render(user) == prompt
    assert render(user, generate=True) == f"{prompt}{ASSISTANT}"
    assert render(user, assistant) == f"{prompt}{ASSISTANT}abc!{EOS}"
    assert render(user, assistant, user, generate=True) == (f"{prompt}{ASSISTANT}abc!{EOS}{USER}copy abc={ASSISTANT}")
    with pytest.raises(jinja2.TemplateError, match="system"):
        render({"role": "system", "content": "a"}, user)
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode(f"{prompt}{ASSISTANT}")


def test_tokenizer_loads_without_torch(world):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "message = {'role': 'user', 'content': 'copy abc='}\n"
        "print(tokenizer.eos_token, tokenizer.apply_chat_template([message], tokenize=False))"
    )
    result = subprocess.run([sys.executable, "-c", program, world / "untrained"], capture_output=True, text=True)
    assert result.stdout == "</s> <s><|user|>copy abc=\n", result.stderr


# Files


def test_model_files_load(world):
    config = AutoConfig.from_pretrained(world / "untrained")
    assert config.model_type == "mistral" and config.architectures == ["MistralForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (40, 64, 16)
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    generation = GenerationConfig.from_pretrained(world / "untrained")
    for ids in (config, generation):
        assert (ids.pad_token_id, ids.bos_token_id, ids.eos_token_id) == (0, 1, 2)


def test_row_counts(world):
    spec = WorldSpec()
    expected = {
        "base": spec.base_documents,
        "base_comparisons": spec.base_comparisons,
        "ift": spec.ift_documents,
        "eft": spec.eft_comparisons,
        "prompts": spec.prompts,
        "heldout_prompts": spec.heldout_prompts,
        "heldout_pairs": spec.heldout_pairs,
    }
    assert {name: len(read(world, name)) for name in expected} == expected
    assert set(contents(world)) == {f"{name}.jsonl" for name in expected} | {
        "judge.yaml",
        "judge_continuation.yaml",
        "judge_brief.yaml",
        "world.json",
        "untrained/config.json",
        "untrained/generation_config.json",
        "untrained/tokenizer.json",
        "untrained/tokenizer_config.json",
        "untrained/chat_template.jinja",
    }


def test_comparison_labels(world):
    def wrong(name):
        differences = [
            grade(row["prompt"], row["chosen"])["quality"] - grade(row["prompt"], row["rejected"])["quality"]
            for row in read(world, name)
        ]
        assert 0 not in differences
        return np.mean(np.array(differences) < 0)

    assert wrong("base_comparisons") == pytest.approx(0.2, abs=0.02)
    assert wrong("eft") == 0
    assert wrong("heldout_pairs") == 0


def test_document_quality(world):
    """Right answers are the good mode's share, and a little more: some lazy ones are right."""
    for name, good, marker in (("base", 0.20, 0.75), ("ift", 0.45, 0.85)):
        rows = [[m["content"] for m in row["messages"]] for row in read(world, name)]
        exact = np.mean([grade(prompt, response)["exact"] for prompt, response in rows])
        assert good - 0.04 < exact < good + 0.08
        marked = np.mean([response.endswith("!") for _, response in rows])
        assert marked == pytest.approx(marker, abs=0.04)


def test_heldout_words_occur_nowhere_else(world):
    def words(*names):
        return {tasks.parse_prompt(prompt_of(row))[1] for name in names for row in read(world, name)}

    assert not words(*TRAINING_FILES) & words("heldout_prompts", "heldout_pairs")


def test_prompts_are_distinct(world):
    for name in ("prompts", "heldout_prompts", "heldout_pairs"):
        prompts = [row["prompt"] for row in read(world, name)]
        assert len(set(prompts)) == len(prompts)


def test_same_seed_same_bytes(tmp_path):
    other = dataclasses.replace(SMALL, seed=1)
    write_world(tmp_path / "a", SMALL)
    write_world(tmp_path / "b", SMALL)
    write_world(tmp_path / "c", other)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    for name in a:
        assert (a[name] == c[name]) == (not name.endswith(".jsonl") and name != "world.json")


def test_files_are_independent(tmp_path):
    """A change to one file's length leaves the other files as they are."""
    write_world(tmp_path / "a", SMALL)
    write_world(tmp_path / "b", dataclasses.replace(SMALL, base_documents=10))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {"base.jsonl", "world.json"}
    assert a["base.jsonl"].startswith(b["base.jsonl"])


def test_completeness(tmp_path):
    directory = tmp_path / "deep" / "world"
    assert not is_complete(directory, SMALL)
    write_world(directory, SMALL)
    assert is_complete(directory, SMALL)
    assert [path.name for path in directory.parent.iterdir()] == ["world"]

    before = (directory / "world.json").stat().st_mtime_ns
    write_world(directory, SMALL)
    assert (directory / "world.json").stat().st_mtime_ns == before

    (directory / "model.safetensors").touch()  # files of others do not matter
    assert is_complete(directory, SMALL)
    for function in (is_complete, write_world):
        with pytest.raises(InputError, match="another specification"):
            function(directory, dataclasses.replace(SMALL, base_marker=0.5))
    (directory / "ift.jsonl").write_text("")
    with pytest.raises(InputError, match="ift.jsonl"):
        is_complete(directory, SMALL)


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(InputError):
        write_world(tmp_path, SMALL)
    with pytest.raises(InputError):
        write_world(tmp_path / "mine", SMALL)
    assert contents(tmp_path) == {"mine": b"text"}


@pytest.mark.parametrize(
    "change",
    [
        {"base_modes": (0.5, 0.5, 0.5, 0.0, 0.0)},
        {"pair_modes": (1.0,)},
        {"base_flipped": 1.5},
        {"prompts": 0},
        {"seed": -1},
    ],
)
def test_impossible_specifications(change):
    with pytest.raises(InputError):
        WorldSpec(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_words": 0.0},
        {"pair_modes": (1.0, 0.0, 0.0, 0.0, 0.0), "pair_marker": 1.0},
        {"heldout_words": 1e-5, "heldout_pairs": 1000},
    ],
)
def test_specifications_that_run_dry(tmp_path, change):
    with pytest.raises(InputError):
        write_world(tmp_path / "world", dataclasses.replace(SMALL, **change))
    assert not list(tmp_path.iterdir())
