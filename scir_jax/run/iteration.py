"""The recipe of a run. A stage whose file or model is there is not done again: that is all of resuming."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import read_json
from scir_jax.engine.checkpoint import ModelStore, remove
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.run import (
    answers,
    choice,
    command_sampling,
    console,
    constructing,
    evaluation,
    pairing,
    sampling,
    training,
)
from scir_jax.run.costs import Account, keep_time
from scir_jax.run.counts import COUNTS, SECONDS
from scir_jax.run.directory import RunDirectory
from scir_jax.run.inputs import Inputs
from scir_jax.run.ledger import Ledger
from scir_jax.run.metrics import Metrics
from scir_jax.run.models import ModelName, Models, copied, start_of
from scir_jax.run.places import sync
from scir_jax.run.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: what seconds.json calls it.
      iteration: 0 up to the evaluation of M1.
      done: says whether its result is there.
      run: makes it, and keeps in the account what that cost.
    """

    name: str
    iteration: int
    done: Callable[[], bool]
    run: Callable[[Account], None]


def recipe(
    config: Config,
    encoder: Encoder,
    inputs: Inputs,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    metrics: Metrics,
    stopper: console.Stopper,
    external: Scorer | None = None,
) -> Iterator[Stage]:
    """Yields the stages of a run in order: M0, SFT, M1; then for each iteration sample, score, optimise, evaluate.

    Where the judge learns from constructed pairs, a stage `construct` follows `sample`.

    Args:
      external: what pairs.scorer names.
    """
    store = models.store
    grader = evaluation.load_grader(config.evaluate.grader)
    training_needs = (config, encoder, inputs, programs, models, directory, metrics, stopper)

    def evaluate(t: int) -> Stage:
        done = (directory.iteration(t) / "evaluation.json").exists
        needs = (config, encoder, inputs, programs, models, directory, metrics, grader, stopper)
        return Stage("evaluate", t, done, partial(evaluation.evaluate_model, *needs, t))

    for ours, theirs in copied(config).items():
        copy = partial(copy_model, config, theirs, store, ours, programs)
        yield Stage("start", 0, partial(store.exists, ours), copy)
    yield Stage("start", 0, partial(store.exists, 0), lambda _: store.save(0, models.parameters.initial()))
    yield Stage("sft", 0, partial(store.exists, 1), partial(training.run_sft, *training_needs))
    yield evaluate(0)
    for t in range(1, config.run.iterations + 1):
        responses, pairs = (directory.iteration(t) / f"{name}.jsonl" for name in ("responses", "pairs"))
        if config.data.pairs:
            source = partial(pairing.given_pairs, inputs, directory.shares, t)
        else:
            prompts = sampling.iteration_prompts(config, inputs.prompts, directory.shares, t)
            sample = partial(_sample, config, encoder, programs, models, directory, prompts, t, responses, stopper)
            yield Stage("sample", t, responses.exists, sample)
            source = partial(
                answers.sampled_answers, encoder, programs.facts.lengths, programs.arch.vocab_size, responses
            )
        if config.judge.constructed_batch_size:
            built = directory.iteration(t) / constructing.NAME
            build = partial(_construct, config, encoder, programs, models, t, source, built, stopper)
            yield Stage("construct", t, built.exists, build)
        yield Stage(
            "score",
            t,
            pairs.exists,
            lambda account: pairing.make_pairs(
                config, encoder, programs, models, t, source(), pairs, stopper, account, external, inputs.eft
            ),
        )
        yield Stage("optimise", t, partial(store.exists, t + 1), partial(training.run_optimise, *training_needs, t))
        yield evaluate(t)
        # What follows runs when the stages before are done.
        if config.evaluate.early_stop and hosts.decide(lambda: choice.agree_on_being_wrong(rows(directory, t))):
            exported = f" and exports M{t}" if config.evaluate.select == choice.LAST else ""
            console.say(
                f"M{t + 1}: the reward models agree more often and are right less often than those of M{t}; the run "
                f"ends here{exported} (evaluate.early_stop)"
            )
            return


def _sample(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    prompts: Sequence[sampling.Numbered],
    t: int,
    path: Path,
    stopper: console.Stopper,
    account: Account,
) -> None:
    """Writes responses.jsonl of an iteration, by the run's own sampler or by sample.command."""
    if config.sample.command:
        needs = (config, encoder, programs, models, directory, prompts, t, path, stopper)
        command_sampling.sample_with_command(*needs, account)
    else:
        sampling.sample_iteration(config, encoder, programs, models.load(t), prompts, t, path, stopper, account)


def _construct(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    t: int,
    source: Callable[[], answers.Source],
    path: Path,
    stopper: console.Stopper,
    account: Account,
) -> None:
    """Writes constructed.jsonl of an iteration."""
    constructing.construct_pairs(config, encoder, programs, models, t, source(), path, stopper, account)


def run_stages(
    stages: Iterable[Stage], directory: RunDirectory, stopper: console.Stopper, until: tuple[str, int] | None = None
) -> bool:
    """Runs every stage that is not done, and keeps its time (of the last try) in seconds.json of its iteration.

    Args:
      until: name and iteration of the last stage to be run.

    Returns:
      Whether all stages are done.
    """
    for stage in stages:
        _run_stage(stage, directory, stopper)
        if until == (stage.name, stage.iteration):
            return False
    return True


def _run_stage(stage: Stage, directory: RunDirectory, stopper: console.Stopper) -> None:
    if hosts.decide(stage.done):
        # A process that was killed between saving the model and removing its checkpoints left these.
        if stage.name in ("sft", "optimise") and hosts.first():
            remove(directory.stage_checkpoints(stage.iteration))
        return
    # A directory that is there before M0 would be somebody else's to a run that begins again.
    started, folder = time.monotonic(), directory.path / f"iteration_{stage.iteration:02d}"
    stage.run(Account(folder / COUNTS, stage.name))
    keep_time(folder, stage.name, time.monotonic() - started)
    if hosts.first():
        Ledger(directory.path).record_stage(stage.name, stage.iteration)
    sync(directory.path)
    if stage.name == "start":
        stopper.check("start-up")


def rows(directory: RunDirectory, iterations: int) -> list[dict]:
    """Returns the table so far: one row per evaluated model, with the seconds of its iteration's stages."""
    result = []
    for t in range(iterations + 1):
        evaluation_file = directory.path / f"iteration_{t:02d}" / "evaluation.json"
        if not evaluation_file.exists():
            break
        row = read_json(evaluation_file)
        timings = directory.iteration(t) / SECONDS
        seconds = read_json(timings) if timings.exists() else {}
        result.append({**row, "seconds": round(sum(seconds.values()), 1)})
    return result


def copy_model(
    config: Config, theirs: ModelName, store: ModelStore, ours: ModelName, programs: Programs, _: Account
) -> None:
    """Copies a model of the run of run.start_from."""
    source = ModelStore(RunDirectory(start_of(config)[0]).checkpoints)
    store.save(ours, source.load(theirs, programs.abstract_trained))
