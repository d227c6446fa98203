"""The run on two hosts: as one process would do it, also where a host is lost, or where others go on with it."""

import dataclasses
import itertools
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from scir_jax.config.files import to_yaml
from scir_jax.text.chat import load_tokenizer
from tests.forks import quick
from tests.gcs import Bucket
from tests.hosts import run_hosts
from tests.processes import shared_directory
from tests.run import engines
from tests.run.runs import content, lines
from tests.run.test_resume import newest, without_times
from tests.strikes import COMMIT_IN_BUCKET, STORE, Strike

LOSS = {"loss", "sft", "sft/ift", "sft/eft", "preference", "consistency"}
COUNTED = {"tokens", "tokens/policy", "tokens/judge", "filled", "flops", "trained_policy", "trained_judge"}
LOST = "; this host stops; start the same command on all hosts again to go on"
# Every host calls these once a step or a batch.
WORLD_STEP, STEP = "scir_jax.run.base_model:put_batch", "scir_jax.run.training:put_batch"
BATCH = "scir_jax.run.sampling:_keep"
# The words of Gloo's lines, which its threads may mix.
GLOO = set("Gloo Rank is connected to peer ranks Expected number of".split())
TWO, ONE = dict(hosts=2, mesh=(2, 2, 2)), dict(hosts=1, mesh=(1, 2, 1))
SETTINGS = {
    "world": dict(steps=3, documents=16, comparisons=16),
    "text": dict(max_prompt_tokens=32, max_response_tokens=12, packing="bins"),
    "sft": dict(epochs=2.0),
    "sample": dict(responses=3, prompts=13),  # the last batch is not full
    "optimise": dict(epochs=2),
    "evaluate": dict(greedy=False, samples=3, grader="scir_jax.world.grader:grade"),
}
WORLD = dict(
    base_documents=64,
    base_comparisons=64,
    ift_documents=24,
    eft_comparisons=12,
    prompts=24,
    heldout_prompts=8,
    heldout_pairs=16,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    head_dim=8,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return shared_directory(tmp_path_factory, "hosts_run")


@pytest.fixture(scope="module")
def start(shared, world_dir, tiny_config, tmp_path_factory):
    """start(directory, world, hosts, mesh, ...) runs or resumes a run -> how its processes ended.

    Args:
      strike: of one host alone, and that host; without one nothing is compiled ahead.
      alone: no other process uses the programs of `compiled` meanwhile: what one host compiles the other takes.
      compiled: directory of compiled programs.
      variables: of the environment.
    """
    files = (tmp_path_factory.mktemp("configurations") / f"{number}.yaml" for number in itertools.count())

    def run(
        directory,
        world,
        hosts=2,
        mesh=(2, 2, 2),
        strike=None,
        alone=False,
        compiled=shared / "compiled",
        variables=(),
        **overrides,
    ):
        host_struck, strike = strike or (0, Strike(ahead=False))
        lost = strike.place and strike.signal == signal.SIGKILL
        sections = SETTINGS | overrides
        config = tiny_config(
            world_dir,
            run=dict(
                iterations=1,
                tensorboard=False,
                directory=str(directory),
                compilation_cache=str(compiled),
                distributed=hosts > 1,
                host_timeout=8.0 if lost else 60.0,
            ),
            model=dict(path=f"{world}/model"),
            mesh=dict(zip(("data", "fsdp", "tensor"), mesh)),
            **sections | {"world": sections["world"] | dict(directory=str(world))},
        )
        file = next(files)
        file.write_text(to_yaml(config), encoding="utf-8")

        def command(host):
            # Where one is interrupted none compiles ahead.
            own = strike if host == host_struck else Strike(ahead=strike.ahead)
            return [*dataclasses.replace(own, world=WORLD).command, "--config", file]

        share = dict(JAX_SHARE_BINARY_BETWEEN_HOSTS=str(int(alone)))
        env = quick(int(np.prod(mesh)) // hosts, **share, **dict(variables))
        return run_hosts(command, hosts, env=env, seconds=240, forked=True)

    return run


def ended_well(done) -> None:
    for one in done:
        assert one.code == 0, done
        assert "Traceback" not in one.err and "error" not in one.err, one.err


def one_lost(done, host: int) -> None:
    """Of two hosts one was killed; the other ended by itself and said why."""
    killed, other = done[host], done[1 - host]
    assert killed.code == -signal.SIGKILL, done
    assert other.code == 4, done
    assert re.match(rf"error: .*host.*{LOST}$", other.last), other.err


@pytest.fixture(scope="module")
def uninterrupted(shared, start):
    """A run of two hosts from the embedded world on, in `run`, which makes `world`; once for all processes of pytest.

    Nothing but the first training of the world's model was interrupted.
    """
    directory = shared / "two"
    with FileLock(shared / "two.lock"):
        if not (directory / "run" / "report.html").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            run, world = directory / "run", directory / "world"
            one_lost(start(run, world, **TWO, strike=(1, Strike(WORLD_STEP, 2, ahead=False)), alone=True), 1)
            assert not (world / "model").exists() and not (run / "checkpoints").exists()
            ended_well(start(run, world, **TWO, strike=(0, Strike()), alone=True))
    return directory


def names(run: Path) -> set[str]:
    """Its files, but for the lock and those within checkpoints, which depend on processes, and names of models there."""
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    models = {str(p.relative_to(run)) for p in (run / "checkpoints").iterdir()}
    return {name for name in files if not name.startswith(("checkpoints/", ".lock"))} | models


def rows_once(run: Path) -> None:
    """The run's files have every row exactly once, in order."""
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
    steps = {stage: [r["stage_step"] for r in metrics if r["stage"] == stage] for stage in ("sft", "optimise")}
    assert steps == {stage: list(range(1, count + 1)) for stage, count in {"sft": 6, "optimise": 7}.items()}
    first = run / "iteration_01"
    pairs = [row["pair"] for row in lines(first / "pairs.jsonl")]
    assert pairs == list(range(26))
    decisions = lines(first / "decisions.jsonl")
    assert sorted(row["pair"] for row in decisions) == sorted(pairs * SETTINGS["optimise"]["epochs"])
    assert [row["step"] for row in decisions] == [step for step in range(1, 8) for _ in range(8 if step < 7 else 4)]
    for path, prompts, samples in (
        (first / "responses.jsonl", SETTINGS["sample"]["prompts"], SETTINGS["sample"]["responses"]),
        (first / "heldout_responses.jsonl", 8, SETTINGS["evaluate"]["samples"]),
        (run / "iteration_00" / "heldout_responses.jsonl", 8, SETTINGS["evaluate"]["samples"]),
    ):
        found = [(row["prompt_number"], row["sample"]) for row in lines(path)]
        assert len(found) == prompts * samples and len({number for number, _ in found}) == prompts
        assert [sample for _, sample in found] == list(range(samples)) * prompts
        assert all(found[i][0] == found[i - i % samples][0] for i in range(len(found)))


def sampled_as_scored(run: Path) -> None:
    """The sampler's log-probabilities of the responses are the scorer's, of every pair of the iteration."""
    folder = run / "iteration_01"
    sampled = {(r["prompt"], tuple(r["response_ids"])): r["logprob"] for r in lines(folder / "responses.jsonl")}
    for pair in lines(folder / "pairs.jsonl"):
        logps = [sampled[pair["prompt"], tuple(pair[f"response_{side}_ids"])] for side in "ab"]
        assert logps == pytest.approx(pair["cached"]["start_logps"], abs=1e-4), pair


def close(found, expected, where: str) -> None:
    """Equal JSON values, numbers with a point nearly so."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        # Where both responses are worth the same, the model being its own reference, rounding says which one wins.
        tie = abs(expected.get("rewards/margins", 1)) < 1e-6
        # Rows of a pair that lie on one device share their prompt, whose tokens are computed and counted once.
        packed = where.endswith("costs.json.optimise") or expected.get("stage") == "optimise"
        for key in found.keys() - ({"rewards/accuracies"} if tie else set()) - (COUNTED if packed else set()):
            close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected)):
            close(a, b, f"{where}[{number}]")
    elif isinstance(found, float):
        loss = where.rpartition(".")[2] in LOSS
        assert found == pytest.approx(expected, rel=1e-5 if loss else 1e-4, abs=1e-7 if loss else 1e-5), where
    else:
        assert found == expected, where


def same_but_for_rounding(run: Path, expected: Path) -> None:
    sampled_as_scored(run)
    sampled_as_scored(expected)
    assert names(run) == names(expected)
    assert not [name for name in names(run) if "partial" in name or "seen" in name or "tmp" in name]
    rows_once(run)
    read = [
        name
        for name in sorted(names(run))
        if name.startswith("iteration_") and not name.endswith(("seconds.json", "memory.json"))
    ]
    assert len(read) == 9
    for name in (*read, "metrics.jsonl"):
        if name.endswith(".jsonl"):
            found, wanted = ([without_times(row) for row in lines(place / name)] for place in (run, expected))
        else:
            found, wanted = (content(place / name) for place in (run, expected))
        close(found, wanted, name)
    found, wanted = (load_file(place / "export" / "model.safetensors") for place in (run, expected))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=5e-5, err_msg=name)


def same_bytes(run: Path, expected: Path) -> None:
    assert names(run) == names(expected)
    rows_once(run)
    for name in sorted(names(expected)):
        if name.startswith(("iteration_", "export/")) and not name.endswith(("seconds.json", "memory.json")):
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    found, wanted = ([without_times(row) for row in lines(place / "metrics.jsonl")] for place in (run, expected))
    assert found == wanted


@pytest.mark.slow
def test_two_hosts_are_as_one_process(uninterrupted, start, tmp_path):
    """From the world's files to the report; of the first host's and of one process's the files are the same."""
    world = uninterrupted / "world"
    ended_well(start(tmp_path / "run", tmp_path / "world", **ONE))
    same_but_for_rounding(tmp_path / "run", uninterrupted / "run")
    assert sorted(p.name for p in world.rglob("*")) == sorted(p.name for p in (tmp_path / "world").rglob("*"))
    found, expected = (load_file(place / "model" / "model.safetensors") for place in (tmp_path / "world", world))
    untrained = max(abs(expected[name]).max() for name in expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5 * untrained, err_msg=name)


# In order: every one comes later in the run than the one before it; with the newest result that is there then.
LOSSES = [
    ("M0", 1, Strike(STORE, (1,))),
    ("evaluation of M1", 0, Strike(BATCH, 2)),  # the second look
    ("pairs 1", 0, Strike(COMMIT_IN_BUCKET)),  # the first checkpoint is not committed
    ("pairs 1", 1, Strike(STEP, 6, "after")),  # after checkpoints
]


@pytest.mark.slow
def test_a_host_is_killed_again_and_again(uninterrupted, start, tmp_path):
    """The other one ends by itself with one sentence; in the end the run is that of hosts that were left alone.

    The hosts have a bucket in common, where those that were left alone had a disk.
    """
    world, bucket = uninterrupted / "world", Bucket(tmp_path)
    url, settings = f"gs://{bucket.name}/run", dict(**TWO, variables=bucket.environment)
    try:
        for number, (there, host, strike) in enumerate(LOSSES):
            one_lost(start(url, world, **settings, strike=(host, dataclasses.replace(strike, ahead=False))), host)
            assert newest(bucket.copy("run", tmp_path / str(number))) == there
        ended_well(start(url, world, **settings))
        run = bucket.copy("run", tmp_path / "end")
        assert not [name for name in bucket.objects() if "partial" in name or "lease" in name]
    finally:
        bucket.close()
    same_bytes(run, uninterrupted / "run")


@pytest.mark.slow
def test_other_hosts_and_meshes_go_on(uninterrupted, start, tmp_path):
    """Two hosts are stopped while sampling, one process goes on and is stopped in training, two hosts end the run."""
    run, world = tmp_path / "run", uninterrupted / "world"
    stop = dict(signal=signal.SIGTERM, ahead=False)
    steps = [
        (dict(**TWO, strike=(1, Strike(BATCH, 1, **stop))), "iteration 1: sample"),
        (dict(**ONE, strike=(0, Strike(STEP, 3, **stop))), "iteration 1: optimise"),
        (dict(**TWO, strike=(1, Strike(STEP, 2, **stop))), "iteration 1: optimise"),
    ]
    for number, (how, where) in enumerate(steps):
        for one in start(run, world, **how):
            assert one.code == 128 + signal.SIGTERM, one.err
            assert one.last == f"stopped in {where}; everything is saved: run the same command again to go on"
            assert "Traceback" not in one.err and "error" not in one.err
        folder = run / "iteration_01"
        if not number:
            parts = [len(lines(folder / f"responses.jsonl.partial{end}")) for end in ("", "-1")]
            assert parts == [12, 12], "the first batch, every host its half"
        else:
            assert not list(folder.glob("*.partial*"))
            step = len([row for row in lines(run / "metrics.jsonl") if row["stage"] == "optimise"])
            # Of several hosts the others hear of it one step later.
            assert step == (3 if number == 1 else 6) and (run / "checkpoints" / "iteration_01" / str(step)).is_dir()
    ended_well(start(run, world, **ONE))
    same_but_for_rounding(run, uninterrupted / "run")


@pytest.mark.slow
def test_adapters_on_two_hosts(uninterrupted, start, tmp_path):
    """Another engine samples, which looks for the exported M1."""
    settings = dict(lora=dict(rank=2, targets=("q_proj", "down_proj")), optimise=dict(epochs=2, learning_rate=0.03))
    run, engine = tmp_path / "run", tmp_path / "engine.py"
    tokenizer = load_tokenizer(uninterrupted / "world" / "model")
    letters = tokenizer.convert_tokens_to_ids(list("abcdef"))
    engine.write_text(f"IDS, STOP = {letters}, {tokenizer.eos_token_id}\n" + engines.MADE_UP)
    call = f"test -s {{model}}/model.safetensors && {sys.executable} -S {engine} {{prompts}} {{output}} {{responses}}"
    ended_well(
        start(
            run,
            uninterrupted / "world",
            mesh=(1, 2, 1),
            alone=True,
            compiled=tmp_path / "compiled",
            text=SETTINGS["text"] | dict(packing="off"),
            sft=dict(epochs=2.0, learning_rate=0.03),
            sample=SETTINGS["sample"] | dict(command=call),
            **settings,
        )
    )
    rows_once(run)
    whole = names(uninterrupted / "run")
    assert names(run) - whole == {
        "iteration_01/command.log",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert whole <= names(run)
    base = load_file(uninterrupted / "world" / "model" / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    config = content(run / "adapter" / "adapter_config.json")
    for name, merged in load_file(run / "export" / "model.safetensors").items():
        expected = base[name].astype(np.float64)
        if "q_proj" in name or "down_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (adapter[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            change = config["lora_alpha"] / config["r"] * b @ a
            assert abs(change).max() > 1e-4, name
            expected = expected + change
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_other_commands_on_two_hosts(uninterrupted, shared, tmp_path):
    """Judging, evaluating again and exporting, against one process with one device, which the mesh does not fit."""
    world, runs = uninterrupted / "world", {2: tmp_path / "two", 1: tmp_path / "one"}
    few = tmp_path / "pairs.jsonl"
    few.write_text("".join((world / "heldout_pairs.jsonl").read_text().splitlines(keepends=True)[:12]))
    for hosts, run in runs.items():
        shutil.copytree(uninterrupted / "run", run)
        for file in run.glob("iteration_*/evaluation.json"):
            file.unlink()
        several = ["--distributed"] if hosts > 1 else []
        pairs = ["--input", few, "--output", run / "judged.jsonl"]
        model = ["--config", run / "config.yaml", "--model.path", run / "export", "--reference", world / "model"]
        mesh = [] if hosts > 1 else ["--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "1"]
        for command in (
            ["scir_jax.judge", *model, *pairs, *mesh, "--run.distributed", str(hosts > 1).lower()],
            ["scir_jax.evaluate", "--run", run, "--again", *several],
            ["scir_jax.export", run, run / "M1", "--model", "M1", *several],
        ):
            env = quick(4 if hosts > 1 else 1, JAX_COMPILATION_CACHE_DIR=str(shared / "compiled"))
            done = run_hosts(["-m", *command], hosts, env=env, seconds=240, forked=True)
            ended_well(done)
            # What Gloo says of its connections apart, the first host speaks alone.
            for one in done[1:]:
                assert set(re.findall(r"[^\s\d:.\[\]]+", one.out)) <= GLOO, one.out
    judged, expected = (lines(runs[hosts] / "judged.jsonl") for hosts in (2, 1))
    assert len(judged) == len(expected) == 12
    for found, wanted in zip(judged, expected):
        assert found.keys() == wanted.keys() >= {"p_generative", "p_implicit"}
        for name in ("p_generative", "p_implicit", "logps"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, err_msg=name)
    for number in (0, 1):
        found, wanted = (content(runs[hosts] / f"iteration_{number:02d}" / "evaluation.json") for hosts in (2, 1))
        assert found.keys() == wanted.keys() and found["model"] == wanted["model"]
        for name in ("quality", "length", "generative_accuracy", "slot_bias"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    found, wanted = (load_file(runs[hosts] / "M1" / "model.safetensors") for hosts in (2, 1))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
