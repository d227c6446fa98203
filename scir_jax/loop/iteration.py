"""The order of a run's stages. A stage whose file or model is there is not done again: that is all of resuming."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax import options
from scir_jax.config import Config
from scir_jax.data import pipelines, records, statistics
from scir_jax.data.files import read_rows
from scir_jax.engine import hosts
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.metrics import AppendOnly, Metrics
from scir_jax.errors import InputError
from scir_jax.loop import console, evaluation, pairing, sampling, scoring
from scir_jax.loop.directory import RunDirectory
from scir_jax.loop.models import Models
from scir_jax.loop.session import Session, adapters_of
from scir_jax.loop.training import train_stage
from scir_jax.method.objective import reward_names


class Run:
    """M0 -> M1 -> ... in one run directory."""

    def __init__(self, session: Session, directory: RunDirectory, metrics: Metrics, stopper: console.Stopper):
        self.session = session
        self.config = session.config
        self.directory = directory
        self.metrics = metrics
        self.stopper = stopper
        self.store = ModelStore(directory.checkpoints)
        self.models = Models(self.store, session)
        self.grader = evaluation.load_grader(session.config.evaluate.grader)

    def run(self) -> list[dict]:
        """All stages that are not done yet; returns the rows of the final table."""
        if self.config.run.start_from:
            self._start_from(Path(self.config.run.start_from))
        if not hosts.decide(lambda: self.store.exists(0)):
            self.store.save(0, self.session.initial_params())
        self.stopper.check("start-up")
        self._timed(0, "sft", lambda: self.store.exists(1), self.sft)
        self._timed(0, "evaluate", lambda: self._evaluated(0), lambda: self.evaluate(0))
        for t in range(1, self.config.run.iterations + 1):
            folder = self.directory.iteration(t)
            responses = None if self.config.data.pairs else folder / "responses.jsonl"
            if responses is not None:
                self._timed(
                    t,
                    "sample",
                    responses.exists,
                    lambda: sampling.run_sampling(self.session, self.models.load(t), t, responses, self.stopper),
                )
            pairs = folder / "pairs.jsonl"
            self._timed(
                t,
                "references",
                pairs.exists,
                lambda: pairing.run_pairing(self.session, self.models, t, responses, pairs, self.stopper),
            )
            self._timed(t, "optimise", lambda: self.store.exists(t + 1), lambda: self.optimise(t))
            self._timed(t, "evaluate", lambda: self._evaluated(t), lambda: self.evaluate(t))
        return self.rows()

    def _start_from(self, other: Path) -> None:
        source = ModelStore(RunDirectory(other).checkpoints)
        here, there = hosts.decide(lambda: [[s.exists(n) for n in (0, 1)] for s in (self.store, source)])
        for number in (0, 1):
            if here[number]:
                continue
            if not there[number]:
                raise InputError(f"run.start_from {other}: holds no model M{number}")
            self.store.save(number, source.load(number, self.session.abstract_trained))

    def sft(self) -> None:
        """M0 -> M1; without IFT and EFT, or with sft.epochs 0, M1 is M0."""
        session, config = self.session, self.config.sft
        ift, eft = self._replay_parts(config.ift_batch_size, config.eft_batch_size, stream=1)
        lengths = [
            len(rows) / size
            for rows, size, part in (
                (session.data.ift_rows, config.ift_batch_size, ift),
                (session.data.eft_rows, config.eft_batch_size, eft),
            )
            if part is not None
        ]
        steps = int(np.ceil(config.epochs * max(lengths, default=0)))
        if not steps:
            self.store.save(1, self.models.take(0))
            return
        train_stage(
            session,
            self.directory,
            self.metrics,
            self.stopper,
            name=stage_name(0),
            stage="sft",
            iteration=0,
            title="SFT",
            dataset=pipelines.sft_dataset(ift, eft, steps),
            peak=config.learning_rate,
            flops=session.flops["SFT step"].model,
            params=lambda: self.models.take(0),
            frozen=lambda: session.frozen,
            save=lambda params: self.store.save(1, params),
        )

    def optimise(self, t: int) -> None:
        """SCIR training M_t -> M_{t+1} on the iteration's pairs."""
        session, config = self.session, self.config
        folder = self.directory.iteration(t)
        replay = config.replay
        ift = eft = None
        if replay.weight:
            ift, eft = self._replay_parts(replay.ift_batch_size, replay.eft_batch_size, stream=10 + t)
        dataset = pipelines.pairs_dataset(
            read_rows(folder / "pairs.jsonl"),
            session.encoder,
            session.shapes,
            rewards=len(reward_names(config)),
            need_label=_label_columns(config),
            batch_size=config.optimise.batch_size,
            epochs=config.optimise.epochs,
            seed=self._seed(100 + t),
            ift=ift,
            eft=eft,
            share=session.local_rows,
        )
        train_stage(
            session,
            self.directory,
            self.metrics,
            self.stopper,
            name=stage_name(t),
            stage="optimise",
            iteration=t,
            title=f"iteration {t}: optimise",
            dataset=dataset,
            peak=config.optimise.learning_rate,
            flops=session.flops["SCIR step"].model,
            params=lambda: self.models.take(t),
            frozen=lambda: session.frozen,
            decisions=AppendOnly(folder / "decisions.jsonl") if hosts.first() else None,
            save=lambda params: self.store.save(t + 1, params),
        )

    def evaluate(self, t: int) -> None:
        """evaluation.json of M_{t+1}."""
        session = self.session
        folder = self.directory.iteration(t)
        number = t + 1
        reference = self.models.implicit_reference(t)
        # A model that is its own reference has an implicit reward of 1/2 everywhere.
        load_reference = (lambda: self.models.load(reference)) if reference != number else None
        pairs, labels = evaluation.labelled_pairs(session.data.heldout_pairs)
        total = evaluation.response_batches(session)
        total += scoring.score_batches(session, len(pairs), with_reference=load_reference is not None)
        values: dict = {"model": f"M{number}"}
        with console.stage(f"evaluate M{number}", total) as bar:

            def advance() -> None:
                bar.advance()
                self.stopper.check(f"evaluation of M{number}")

            if pairs:
                scores = scoring.score_pairs(
                    session,
                    pairs,
                    model=lambda: self.models.load(number),
                    reference=load_reference,
                    advance=advance,
                )
                values |= evaluation.pair_metrics(session, scores, labels)
            if session.data.heldout_prompts:
                rows = evaluation.evaluate_responses(session, self.models.load(number), t, self.stopper, bar)
                against = None
                if t:
                    path = self.directory.iteration(0) / "heldout_responses.jsonl"
                    against = [row for _, row in read_rows(path)]
                values |= evaluation.response_metrics(rows, self.grader, against)
                if hosts.first():
                    records.write_rows(folder / "heldout_responses.jsonl", rows)
        if t:
            values |= evaluation.decision_metrics(folder, self.grader)
        values = evaluation.clean(values)
        self.metrics.evaluation(values)
        if hosts.first():
            records.write_json(folder / "evaluation.json", values)
        hosts.barrier(f"evaluated M{number}")

    def rows(self) -> list[dict]:
        """The final table: a row a model, its seconds those of its iteration's stages."""
        result = []
        for t in range(self.config.run.iterations + 1):
            row = evaluation.read_json(self.directory.iteration(t) / "evaluation.json")
            timings = self.directory.iteration(t) / "seconds.json"
            seconds = evaluation.read_json(timings) if timings.exists() else {}
            result.append({**row, "seconds": round(sum(seconds.values()), 1)})
        return result

    def _evaluated(self, t: int) -> bool:
        return (self.directory.iteration(t) / "evaluation.json").exists()

    def _timed(self, t: int, stage: str, done, do) -> None:
        """Runs a stage unless it is done, and keeps its time (of the last try) in seconds.json."""
        if hosts.decide(done):
            # Left where a process was killed between saving the model and removing the checkpoints that led to it.
            if stage in ("sft", "optimise") and hosts.first():
                shutil.rmtree(self.directory.checkpoints / stage_name(t), ignore_errors=True)
            return
        started = time.monotonic()
        do()
        if hosts.first():
            path = self.directory.iteration(t) / "seconds.json"
            seconds = evaluation.read_json(path) if path.exists() else {}
            records.write_json(path, {**seconds, stage: round(time.monotonic() - started, 2)})
        hosts.barrier(f"{stage} {t}")

    def _replay_parts(self, ift_size: int, eft_size: int, stream: int):
        session = self.session
        pad_id = session.chat.pad_id

        def part(rows, tokens: int, size: int, seed: int):
            return pipelines.targets_dataset(rows, tokens, size, pad_id, seed, session.local_rows)

        ift = part(session.data.ift_rows, session.shapes.ift, ift_size, self._seed(stream))
        eft = part(session.data.eft_rows, session.shapes.eft, eft_size, self._seed(stream + 1000))
        return ift, eft

    def _seed(self, stream: int) -> int:
        return int(np.random.SeedSequence([self.config.run.seed, 2, stream]).generate_state(1)[0])


def stage_name(iteration: int) -> str:
    """The directory of a training stage's checkpoints."""
    return f"iteration_{iteration:02d}" if iteration else "sft"


def _label_columns(config: Config) -> tuple[str, ...] | None:
    """The columns of pairs.jsonl of which one must hold an external label."""
    if config.preference.labels != "external":
        return None
    return ("label",) if config.data.pairs else config.data.columns.label  # the labels of data.pairs are copied there


def check_inputs(session: Session) -> dict[str, Any]:
    """Reads and checks everything that the run will need, before anything is computed, and shows what it holds.

    Returns:
      The content of data.json.
    """
    config, data = session.config, session.data
    if config.run.iterations and not data.prompts and not data.given_pairs:
        raise InputError("no prompts to train on: set data.prompts (or data.pairs)")
    if config.data.pairs and len(data.given_pairs) < config.run.iterations:
        raise InputError(
            f"{config.data.pairs}: {len(data.given_pairs)} pairs are too few for run.iterations={config.run.iterations}"
        )
    if config.preference.labels == "external" and not config.data.pairs:
        name = config.data.columns.label[0]
        console.say(
            f"labels come from the column {name!r} that you add to each iteration's pairs.jsonl; "
            "the run stops there until it is present"
        )
    _check_start(session)
    console.show(statistics.table(data.statistics()))
    data.tell_left_out()
    return data.to_dict()


def _check_start(session: Session) -> None:
    """Refuses to start from models with other adapters, whose parameters may well have the shapes of this run's."""
    config = session.config.run
    recorded = Path(config.start_from or "") / "config.yaml"
    if (
        not config.start_from
        or not recorded.is_file()
        or ModelStore(RunDirectory(config.directory).checkpoints).exists(1)
    ):
        return
    other, _ = options.parse("train", "", ["--config", str(recorded)])
    theirs, ours = adapters_of(other.lora), session.model.lora
    # Their dropout need not be ours: it is no part of a model.
    if (theirs and theirs.computes) != (ours and ours.computes):
        raise InputError(
            f"run.start_from {config.start_from}: its models have {theirs or 'no adapters'}, this run's have "
            f"{ours or 'none'}; set lora as it is there"
        )
