"""Settings that contradict each other are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from scir_jax.bucket.objects import in_bucket
from scir_jax.config.names import HUB
from scir_jax.config.schema import Config
from scir_jax.errors import InputError

POSITIVE = (
    "optimise.batch_size",
    "optimise.epochs",
    "training.accumulate",
    "training.max_skipped",
    "sample.responses",
    "sample.batch_size",
    "sample.prompts",
    "pairs.per_prompt",
    "generative.passes",
    "text.max_prompt_tokens",
    "text.max_response_tokens",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluate.batch_size",
    "evaluate.samples",
)

DIVIDED = (
    "optimise.batch_size",
    "sft.ift_batch_size",
    "sft.eft_batch_size",
    "replay.ift_batch_size",
    "replay.eft_batch_size",
    "judge.constructed_batch_size",
)
"""batch sizes that micro-batches divide"""

GIVEN = ("external", "cream", "dice")
"""preference.labels that the pairs have before a step"""
STAGES = ("sample", "score", "optimise", "evaluate")
"""of an iteration"""
REFERENCES = {"implicit.reference": ("previous", "sft", "base"), "preference.reference": ("start", "sft", "base")}
"""models of a run that may be references"""


def resolve(config: Config) -> Config:
    """Replaces {world} in paths by the world's directory.

    Raises:
      InputError: a path holds {world}, and world.directory is not set; a directory is empty, or in a bucket that cannot
        be read.
    """
    world = config.world.directory
    if not config.run.directory:
        raise InputError("run.directory is empty: name the run, --run NAME")
    for key, place in (
        ("run.directory", config.run.directory),
        ("run.start_from", config.run.start_from),
        ("world.directory", world),
        ("model.path", config.model.path),
    ):
        try:
            away = bool(place) and in_bucket(place)
        except InputError as error:
            raise InputError(f"{key} is {error}") from None
        if away and key == "world.directory":
            raise InputError(f"{key} is {place}: the world is made on a disk; give a directory")

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, tuple):
            return tuple(fill(v, key) for v in value)
        if isinstance(value, str) and "{world}" in value:
            if world is None:
                raise InputError(f"{key} is {value!r} but world.directory is not set; give a path")
            return value.replace("{world}", world)
        return value

    sections = {}
    for name in ("model", "lora", "data", "generative"):
        section = getattr(config, name)
        sections[name] = dataclasses.replace(
            section, **{f.name: fill(getattr(section, f.name), f"{name}.{f.name}") for f in dataclasses.fields(section)}
        )
    return dataclasses.replace(config, **sections)


def check(config: Config) -> None:
    """Refuses settings that contradict each other, before anything is loaded.

    Raises:
      InputError: two settings contradict each other, or one is out of its range.
    """
    models, labels = config.rewards.models, config.preference.labels
    if not (config.preference.weight or config.consistency.weight or config.replay.weight):
        raise InputError(
            "preference.weight, consistency.weight and replay.weight are all 0: there is nothing to train on"
        )
    if not models or len(set(models)) != len(models):
        raise InputError(f"rewards.models must name reward models, each once: {list(models)}")
    for name in ("cream", "dice"):
        if (labels == name) != (config.pairs.kind == name):
            raise InputError(f"preference.labels {name} and pairs.kind {name} belong together; set both or neither")
    if config.pairs.scorer and labels != "external":
        raise InputError(
            f"pairs.scorer labels the pairs, but preference.labels is {labels}; set it to external "
            "(--config methods/external), or leave pairs.scorer out"
        )
    if labels in ("cream", "dice") and config.data.pairs:
        raise InputError(f"preference.labels is {labels}, which ranks sampled responses; leave data.pairs out")
    target = config.consistency.target
    frozen_target = target not in ("mutual", "labels") and config.consistency.weight
    if labels in ("cream", "dice") and (config.selection.rule in ("certainty", "sampled") or frozen_target):
        raise InputError(
            f"pairs.kind {labels} asks the judge nothing before training, but selection.rule certainty and sampled, and "
            "a consistency.target other than mutual need its verdicts; take another pairs.kind"
        )
    _check_judge(config)
    for key, value in (
        ("selection.power", config.selection.power),
        ("selection.confidence", config.selection.confidence),
        ("preference.label_smoothing", config.preference.label_smoothing),
    ):
        if value < 0:
            raise InputError(f"{key} must not be negative, not {value}")
    for key, value in (
        ("consistency.sharpen", config.consistency.sharpen),
        ("preference.beta", config.preference.beta),
    ):
        if value <= 0:
            raise InputError(f"{key} must be positive, not {value}")
    weights = config.rewards.weights
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise InputError(f"rewards.weights.{name} must be a number, not {weight!r}")
    if config.consistency.target == "consensus" or labels == "consensus":
        if unknown := [name for name in weights if name not in models]:
            raise InputError(
                f"rewards.weights.{unknown[0]}: {unknown[0]} is not in rewards.models ({', '.join(models)})"
            )
        if not any(weights.values()):
            raise InputError(f"the consensus of {', '.join(models)} has no weight; set rewards.weights.{models[0]}")
    check_positive(config)
    _check_evaluation(config)
    if config.text.bin_tokens and (config.text.bin_tokens < 0 or config.text.packing in ("lengths", "off")):
        raise InputError(
            f"text.bin_tokens is {config.text.bin_tokens} and text.packing {config.text.packing}; it is the size of a "
            "bin, for packing bins or auto, or 0"
        )
    for key, value in (("run.iterations", config.run.iterations), ("data.holdout", config.data.holdout)):
        if value < 0:
            raise InputError(f"{key} must not be negative, not {value}")
    until_of(config)
    for key, names in REFERENCES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        on_hub = HUB.fullmatch(value) and not Path(value).exists()
        if value not in names and not on_hub and not (Path(value) / "config.json").is_file():
            raise InputError(
                f"{key} is {value!r}: it is one of {', '.join(names)}, a model directory, or OWNER/NAME of the hub, and "
                f"there is no {Path(value) / 'config.json'}"
            )
    check_sampling(config)
    if config.sample.command:
        missing = [place for place in ("{prompts}", "{output}") if place not in config.sample.command]
        if missing:
            raise InputError(
                f"sample.command must say where {missing[0]} stands: the file of prompts that it reads is {{prompts}}, "
                "the file of answers that it writes {output}"
            )
    if config.sample.responses < 2 and not config.data.pairs and config.run.iterations:
        raise InputError("sample.responses must be at least 2: a pair needs two responses")
    micro = config.training.accumulate
    for key in DIVIDED:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value % micro:
            raise InputError(f"{key}={value} does not divide into training.accumulate={micro} micro-batches")


def _check_judge(config: Config) -> None:
    """Refuses settings of what the judge learns from, and what is asked of it, that contradict each other."""
    if config.consistency.target == "labels" and config.preference.labels not in GIVEN:
        raise InputError(
            "consistency.target is labels, those that the pairs have from elsewhere, but preference.labels is "
            f"{config.preference.labels}; set that to one of {', '.join(GIVEN)}"
        )
    if config.consistency.target == "labels" and not config.consistency.weight:
        raise InputError(
            "consistency.target is labels, but consistency.weight is 0, so that they teach nothing; set it"
        )
    if config.consistency.target == "transitive" and config.consistency.weight:
        if config.pairs.kind not in ("all", "best_worst") or config.data.pairs:
            raise InputError(
                "consistency.target is transitive, for which all pairs of a prompt's answers are judged: set pairs.kind to "
                "all or best_worst, and leave data.pairs out"
            )
    dynamic = config.preference.update == "dynamic" and config.preference.labels != "external"
    if config.selection.rule == "sampled" and dynamic:
        raise InputError(
            "selection.rule is sampled, which draws pairs by their labels before training; set preference.update to frozen"
        )
    if not 0 <= config.pairs.offline < 1:
        raise InputError(f"pairs.offline must be at least 0 and below 1, not {config.pairs.offline}")
    if config.pairs.offline and (config.pairs.kind != "dice" or not config.data.eft):
        raise InputError("pairs.offline takes pairs from data.eft for pairs.kind dice; set both, or leave it out")
    judge = config.judge
    for key, value in (
        ("constructed_batch_size", judge.constructed_batch_size),
        ("constructed_weight", judge.constructed_weight),
        ("slot_penalty", judge.slot_penalty),
    ):
        if value < 0:
            raise InputError(f"judge.{key} must not be negative, not {value}")
    for key, asks in (
        ("judge.slot_penalty is set", judge.slot_penalty > 0),
        ("selection.rule is both_orders", config.selection.rule == "both_orders"),
    ):
        if asks and judge.orders == "one":
            raise InputError(f"{key}, for which a step asks the judge in both orders; leave judge.orders at both")
    if judge.constructed_batch_size and not judge.constructions:
        raise InputError("judge.constructions is empty; name at least one, or set judge.constructed_batch_size to 0")


def until_of(config: Config) -> tuple[str, int] | None:
    """Returns the name and the iteration of the stage that run.until names, or None without one.

    Raises:
      InputError: the run has no such stage.
    """
    if config.run.until is None:
        return None
    name, _, number = config.run.until.partition(":")
    iterations = config.run.iterations
    if name == "sft" and number in ("", "0"):
        return ("sft", 0)
    first = 0 if name == "evaluate" else 1
    if name not in STAGES or not number.isdigit() or not first <= int(number) <= iterations:
        raise InputError(
            f"run.until is {config.run.until!r}: this run's stages are sft, evaluate:0, and {', '.join(STAGES)} with "
            f"the number of an iteration, 1 to {iterations}, as in sample:1"
        )
    if name == "sample" and config.data.pairs:
        raise InputError(f"run.until is {config.run.until!r}, but with data.pairs nothing is sampled")
    return name, int(number)


def _check_evaluation(config: Config) -> None:
    """Refuses a choice of models by what no evaluation will tell."""
    evaluate, data = config.evaluate, config.data
    if evaluate.every < 0:
        raise InputError(f"evaluate.every must not be negative, not {evaluate.every}")
    by_pairs = evaluate.select in ("consensus", "generative_accuracy", "implicit_accuracy")
    for key, value, wanted in (
        ("evaluate.select", evaluate.select, by_pairs),
        ("evaluate.early_stop", "true", evaluate.early_stop),
        ("evaluate.every", evaluate.every, evaluate.every),
    ):
        if wanted and not data.heldout_pairs:
            raise InputError(f"{key} is {value}, which needs labelled pairs: set data.heldout_pairs")
    if evaluate.select != "last" and not by_pairs and not (evaluate.grader and data.heldout_prompts):
        raise InputError(
            f"evaluate.select is {evaluate.select}, which needs graded answers: set evaluate.grader and "
            "data.heldout_prompts"
        )
    if evaluate.select == "greedy_quality" and not evaluate.greedy:
        raise InputError("evaluate.select is greedy_quality, but evaluate.greedy is false; set it to true")


def check_positive(config: Config, *sections: str) -> None:
    """Refuses counts below 1 in the sections that a command reads (all by default).

    Raises:
      InputError: a count is below 1, or generative.templates is empty.
    """
    for key in POSITIVE:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if (not sections or section in sections) and value is not None and value < 1:
            raise InputError(f"{key} must be at least 1, not {value}")
    if (not sections or "generative" in sections) and not config.generative.templates:
        raise InputError("generative.templates is empty; name at least one judge template")


def check_sampling(config: Config) -> None:
    """Refuses settings of `sample` and `evaluate` that are out of their range.

    Raises:
      InputError: temperature or top_k is negative, or top_p is not in (0, 1].
    """
    for section, asked in (("sample", config.sample), ("evaluate", config.evaluate)):
        temperature, top_p, top_k = asked.temperature, asked.top_p, asked.top_k
        if (temperature or 0) < 0 or not 0 < (1 if top_p is None else top_p) <= 1 or (top_k or 0) < 0:
            raise InputError(f"{section}: temperature and top_k must not be negative, top_p must be in (0, 1]")
