"""One training step side by side: scir_jax, plain careful loops in torch, and TRL, on the same model and pairs.

    python benchmarks/step.py --size 1m --steps 6

It makes a random Mistral and pairs of log-normal lengths, then runs each contestant in a process of its own, one after
another and again, and prints one row per contestant. Needs the extra [bench], for torch and TRL; without TRL (the extra
[test] has torch alone) its row is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from comparison import QUESTION, SIZES, alternate, make_case, parsed, write_figures

BETA, WEIGHT, RATE = 0.1, 1.0, 1e-5
OURS = ("dtype", "lora", "remat", "prompts")
KEYS = ("size", "batch", "steps", "longest", "groups", *OURS)
CONTESTANTS = (
    "trl dpo",
    "torch dpo",
    "scir_jax dpo",
    "torch scir",
    "scir_jax scir",
    "scir_jax scir continued",
    "torch scir one order",
    "scir_jax scir one order",
    "scir_jax scir continued one order",
)


# --- the case ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """The pairs of a case with cached log-probabilities, and the programs of scir_jax for them."""

    setup: object
    pairs: list


def load_case(
    directory: Path,
    batch: int,
    longest: int,
    *,
    dpo: bool,
    continued: bool,
    orders: str = "both",
    dtype: str = "float32",
    lora: int = 0,
    remat: str = "none",
    prompts: str = "auto",
) -> Case:
    """Encodes the pairs, and makes up the log-probabilities of a lagging reference."""
    from scir_jax.config.schema import (
        Config,
        ConsistencyConfig,
        DataConfig,
        EvaluateConfig,
        GenerativeConfig,
        ImplicitConfig,
        JudgeConfig,
        LoraConfig,
        ModelConfig,
        OptimiseConfig,
        PreferenceConfig,
        ReplayConfig,
        SelectionConfig,
        TextConfig,
    )
    from scir_jax.run import scoring
    from scir_jax.run.setup import prepare

    template = "judge_continuation.yaml" if continued else "judge.yaml"
    config = Config(
        model=ModelConfig(path=str(directory / "model"), dtype=dtype, remat=remat),
        lora=LoraConfig(rank=lora),
        data=DataConfig(pairs=str(directory / "pairs.jsonl")),
        text=TextConfig(
            max_prompt_tokens=longest * 2 // 5 + 8, max_response_tokens=longest * 3 // 5 + 8, share_prompts=prompts
        ),
        generative=GenerativeConfig(templates=(str(directory / template),)),
        judge=JudgeConfig(orders=orders),
        implicit=ImplicitConfig(beta=BETA),
        consistency=ConsistencyConfig(kind="kl", weight=0.0 if dpo else WEIGHT),
        selection=SelectionConfig(rule="all" if dpo else "agreement"),
        preference=PreferenceConfig(beta=BETA, **(dict(labels="external", update="frozen") if dpo else {})),
        replay=ReplayConfig(weight=0.0),
        optimise=OptimiseConfig(batch_size=batch),
        evaluate=EvaluateConfig(batch_size=8),
    )
    setup = prepare(config)
    given = setup.inputs.given_pairs
    items = [(pair.prompt, answer) for pair in given for answer in pair.answers]
    logps = scoring.score_answers(setup.encoder, setup.programs, setup.parameters.configured(), items)["logps"]
    logps = logps.astype(np.float64).reshape(-1, 2)
    lagging = logps + np.random.default_rng(1).normal(0, 5, logps.shape)
    pairs = [
        dataclasses.replace(
            pair,
            cached={
                "preference_logps": tuple(map(float, start)),
                "start_logps": tuple(map(float, start)),
                "implicit_logps": tuple(map(float, behind)),
            },
        )
        for pair, start, behind in zip(given, logps, lagging, strict=True)
    ]
    return Case(setup, pairs)


# --- contestants ------------------------------------------------------------------------------------------------------


def batches_of(case: Case):
    """Returns the steps' batches; all contestants take the pairs in their order."""
    from scir_jax.data.pipelines import pair_batches

    encoder, _, programs, _ = case.setup
    return pair_batches(programs.optimise_spec, encoder, case.pairs, {}, epochs=1, seed=0, seeds={}, way=programs.way)


def run_jax(case: Case, steps: int) -> dict:
    """Takes steps of scir_jax's own trainer; every shape is compiled before."""
    import jax

    from scir_jax.engine import forward
    from scir_jax.engine.cost import memory
    from scir_jax.engine.cost.chips import of_device
    from scir_jax.engine.mesh import put_batch

    _, _, programs, parameters = case.setup
    trainer, batches = programs.optimise, batches_of(case)
    needs = []
    for shape in batches.shapes:
        program = programs.optimise_program(shape)
        needs.append(memory.whole(program.known, program.compile(programs.mesh), programs.backend))
    state = trainer.init(parameters.configured())
    seconds, losses, tokens, filled, work = [], [], 0, [], []
    for step in range(steps + 1):
        started = time.monotonic()
        arrays = put_batch(batches.dataset[max(step - 1, 0)], programs.mesh)
        state, output = trainer.step(state, parameters.frozen, arrays, np.float32(RATE if step else 0), None)
        losses.append(float(output.metrics["loss"]))
        jax.block_until_ready(state)
        seconds.append(time.monotonic() - started)
        if step:
            tokens += int(output.work.tokens)
            filled.append(float(output.metrics["filled"]))
            work.append(trainer.step_flops(output.work))
    result = {"seconds": seconds[1:], "loss": losses[1], "tokens": tokens, "real": float(np.mean(filled))}

    def logps(params, rows):
        settings = dict(segmented=programs.way.segmented, answer_tokens=programs.optimise_spec.pairs.answers.scored)
        return forward.outputs(programs.model, params, rows, **settings, wanted=("logps",)).fresh["logps"]

    del state
    first = jax.jit(logps)(parameters.configured(), put_batch(batches.dataset[0], programs.mesh))
    result["logps"] = np.asarray(first, np.float64).mean(axis=0).tolist()
    device = programs.mesh.devices.flat[0]
    result["table_gib"] = max(need.total for need in needs) / 2**30
    if chip := of_device(device.device_kind):
        result["mfu"] = sum(work) / sum(seconds[1:]) / chip.flops / programs.mesh.size
    if stats := device.memory_stats():
        result["device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return result


def run_torch(case: Case, directory: Path, steps: int, *, dpo: bool, orders: str, groups: int) -> dict:
    """Takes steps in torch: the head at answers only, cached references.

    Args:
      groups: into which the rows of a step are divided by length, each padded to its longest row.
    """
    import torch
    import transformers

    encoder, dataset = case.setup.encoder, batches_of(case).dataset
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    seconds, losses, real, computed = [], [], 0, 0

    def hidden_of(rows: list) -> tuple[list[torch.Tensor], int]:
        """Returns the hidden states of each row, and how many places were computed."""
        found, places = [None] * len(rows), 0
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)) if groups > 1 else range(len(rows))
        for part in np.array_split(np.array(order), groups):
            longest = max(len(rows[i].ids) for i in part)
            ids, mask = torch.zeros(2, len(part), longest, dtype=torch.long)
            for place, i in enumerate(part):
                ids[place, : len(rows[i].ids)], mask[place, : len(rows[i].ids)] = torch.tensor(rows[i].ids), 1
            for i, hidden in zip(part, model.model(ids, attention_mask=mask).last_hidden_state, strict=True):
                found[i] = hidden
            places += ids.numel()
        return found, places

    for step in range(steps + 1):
        numbers = dataset[max(step - 1, 0)].pairs.index
        pairs = [case.pairs[i] for i in numbers]
        started = time.monotonic()
        rows = [row for pair in pairs for row in encoder.answer_rows(pair)]
        hidden, places = hidden_of(rows)
        picked = [hidden[i][row.start - 1 : row.start + row.length - 1] for i, row in enumerate(rows)]
        targets = torch.tensor([t for row in rows for t in row.ids[row.start : row.start + row.length]])
        logits = model.lm_head(torch.cat(picked))
        token_logps = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        logps = torch.stack([part.sum() for part in token_logps.split([row.length for row in rows])]).view(-1, 2)
        cached = {name: torch.tensor([pair.cached[name] for pair in pairs]) for name in pairs[0].cached}
        margin = (logps - cached["preference_logps"]) @ torch.tensor([1.0, -1.0])
        if not step:
            first = logps.mean(dim=0).tolist()
        else:
            real, computed = real + sum(len(row.ids) for row in rows), computed + places
        if dpo:
            loss = -torch.nn.functional.logsigmoid(BETA * margin).mean()
        else:
            judge = encoder.judges[0]
            # In one order every other pair shows its second answer as A.
            sides = [(i % 2,) if orders == "one" else (0, 1) for i in numbers]
            asked = [encoder.judge_rows(judge, pair) for pair in pairs]
            rows = [both[side] for both, shown in zip(asked, sides, strict=True) for side in shown]
            favour = torch.tensor([[1.0, -1.0][side] for shown in sides for side in shown])
            hidden, places = hidden_of(rows)
            if step:
                real, computed = real + sum(len(row.ids) for row in rows), computed + places
            last = torch.stack([hidden[i][len(row.ids) - 1] for i, row in enumerate(rows)])
            verdicts = last @ model.lm_head.weight[list(judge.verdict_ids)].T
            generative = ((verdicts[:, 0] - verdicts[:, 1]) * favour).view(len(pairs), -1).mean(dim=1)
            implicit = BETA * (logps - cached["implicit_logps"]) @ torch.tensor([1.0, -1.0])
            # The symmetric KL divergence of two Bernoulli variables, the mean of both directions.
            p, q = generative.sigmoid(), implicit.sigmoid()
            penalty = (p - q) * (generative - implicit) / 2
            agreed = (generative * implicit > 0).float()
            side = torch.sign(generative).detach()
            preference = -torch.nn.functional.logsigmoid(BETA * margin * side) * agreed
            loss = preference.sum() / agreed.sum().clamp(min=1) + WEIGHT * penalty.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step:
            optimizer.step()
        losses.append(loss.item())
        seconds.append(time.monotonic() - started)
    return {"seconds": seconds[1:], "loss": losses[1], "logps": first, "tokens": real, "real": real / computed}


def run_trl(case: Case, directory: Path, steps: int, batch: int) -> dict:
    """Takes steps of TRL's DPOTrainer with log-probabilities of the reference from before; the first is not timed."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        """Takes the ids as they are."""

        def _prepare_dataset(self, dataset, *arguments, **keywords):
            return dataset

    class Times(transformers.TrainerCallback):
        seconds, losses, logps = [], [], []

        def on_step_begin(self, *arguments, **keywords):
            self.started = time.monotonic()

        def on_step_end(self, *arguments, **keywords):
            self.seconds.append(time.monotonic() - self.started)

        def on_log(self, args, state, control, logs=None, **keywords):
            if "loss" in (logs or {}):
                self.losses.append(logs["loss"])
                self.logps.append([logs["logps/chosen"], logs["logps/rejected"]])

    order = [i for step in range(steps + 1) for i in batches_of(case).dataset[max(step - 1, 0)].pairs.index]
    pairs = [case.pairs[i] for i in order]
    rows = {
        "prompt_ids": [list(map(int, pair.prompt.ids)) for pair in pairs],
        "chosen_ids": [list(map(int, pair.a.ids)) for pair in pairs],
        "rejected_ids": [list(map(int, pair.b.ids)) for pair in pairs],
    }
    times = Times()
    settings = DPOConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps + 1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Given(
        model=transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory / "model"),
        callbacks=[times],
    )
    trainer.train()
    timed = pairs[batch:]
    real = sum(2 * len(pair.prompt.ids) + sum(pair.lengths) for pair in timed)
    longest = [
        max(len(pair.prompt.ids) + max(pair.lengths) for pair in timed[i : i + batch])
        for i in range(0, len(timed), batch)
    ]
    share = real / (2 * batch * sum(longest))
    first = {"loss": times.losses[0], "logps": times.logps[0]}
    return {"seconds": times.seconds[1:], **first, "tokens": real, "real": share}


def contestant(name: str, directory: Path, arguments: argparse.Namespace) -> dict:
    """Runs one contestant in this process."""
    dpo, continued = "dpo" in name, "continued" in name
    ours = {} if "torch" in name or "trl" in name else {key: getattr(arguments, key) for key in OURS}
    orders = "one" if "one order" in name else "both"
    way = dict(dpo=dpo, continued=continued, orders=orders)
    case = load_case(directory, arguments.batch, arguments.longest, **way, **ours)
    if name.startswith("trl"):
        result = run_trl(case, directory, arguments.steps, arguments.batch)
    elif name.startswith("torch"):
        result = run_torch(case, directory, arguments.steps, dpo=dpo, orders=orders, groups=arguments.groups)
    else:
        result = run_jax(case, arguments.steps)
    return result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


# --- the table --------------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs all contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m", help="of the model")
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contestant and repetition")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest prompt and answer together")
    parser.add_argument("--dtype", default="float32", help="of scir_jax's rows; the others compute in float32")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters in scir_jax's rows; 0: full fine-tuning")
    parser.add_argument("--remat", default="none", help="of scir_jax's rows")
    parser.add_argument("--prompts", default="auto", help="text.share_prompts of scir_jax's rows")
    parser.add_argument("--groups", type=int, default=1, help="of similar lengths, into which torch's rows are divided")
    words = "tokens of the continuing judge's question beside the other answer"
    parser.add_argument("--question", type=int, default=QUESTION, help=words)
    arguments = parsed(parser, CONTESTANTS, repeat=2)
    if arguments.run:
        print(json.dumps(contestant(arguments.run, arguments.case, arguments)))
        return 0
    if importlib.util.find_spec("trl") is None:
        arguments.only = [name for name in arguments.only if not name.startswith("trl")]
    with tempfile.TemporaryDirectory() as directory:
        make_case(
            Path(directory), arguments.size, arguments.batch * arguments.steps, arguments.longest, arguments.question
        )
        found = alternate(__file__, arguments, directory, KEYS)
    print(
        f"{'contestant':<34}{'s/step':>8}{'pairs/s':>9}{'tokens/s':>10}{'peak GiB':>10}{'real':>7}{'first loss':>12}"
        f"{'log p':>10}{'rejected':>10}"
        f"{'MFU':>7}{'table GiB':>10}{'device GiB':>11}"
    )
    for name, results in found.items():
        if results:
            seconds = float(np.median([s for result in results for s in result["seconds"]]))
            peak = max(result["peak_gib"] for result in results)
            last = results[-1]
            print(
                f"{name:<34}{seconds:>8.2f}{arguments.batch / seconds:>9.2f}"
                f"{last['tokens'] / sum(last['seconds']):>10,.0f}{peak:>10.2f}"
                f"{last['real']:>7.0%}{last['loss']:>12.5f}"
                f"{last['logps'][0]:>10.3f}{last['logps'][1]:>10.3f}{last.get('mfu', 0):>7.1%}"
                f"{last.get('table_gib', 0):>10.2f}{last.get('device_gib', 0):>11.2f}"
            )
    write_figures(arguments, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
