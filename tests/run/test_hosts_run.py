"""The run on two hosts: as one process would do it, also where a host is lost, or where others go on with it."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from scir_jax.config.files import to_yaml
from scir_jax.config.schema import Config
from scir_jax.data.jsonl import AppendOnly
from scir_jax.engine.hosts.hosts import SEEN
from scir_jax.errors import InputError
from scir_jax.run import sampling
from scir_jax.run.directory import RunDirectory
from tests.forks import quick
from tests.hosts import run_hosts
from tests.run.runs import content, lines
from tests.run.test_resume import newest, without_times
from tests.strikes import COMMIT, STORE, Strike

LOSS = {"loss", "sft", "sft/ift", "sft/eft", "preference", "consistency"}
LOST = "; this host stops; start the same command on all hosts again to go on"
# Every host calls these once a step or a batch.
WORLD_STEP, STEP = "scir_jax.run.base_model:put_batch", "scir_jax.run.training:put_batch"
BATCH = "scir_jax.run.sampling:sample_rows"
TWO, ONE = dict(hosts=2, mesh=(2, 2, 2)), dict(hosts=1, mesh=(1, 2, 1))
SETTINGS = {
    "world": dict(steps=3, documents=16, comparisons=16),
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
    """A directory that all processes of pytest use."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hosts_run"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def start(shared, world_dir, tiny_config, tmp_path_factory):
    """start(directory, world, hosts, mesh, ...) runs or resumes a run -> how its processes ended.

    Args:
      strike: of one host alone, and that host.
      alone: no other process uses the programs of `compiled` meanwhile: what one host compiles the other takes.
      compiled: directory of compiled programs.
    """
    files = (tmp_path_factory.mktemp("configurations") / f"{number}.yaml" for number in itertools.count())

    def run(
        directory, world, hosts=2, mesh=(2, 2, 2), strike=None, alone=False, compiled=shared / "compiled", **overrides
    ):
        host_struck, strike = strike or (0, Strike())
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

        env = quick(int(np.prod(mesh)) // hosts, JAX_SHARE_BINARY_BETWEEN_HOSTS=str(int(alone)))
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
            ended_well(start(run, world, **TWO, alone=True))
    return directory


def names(run: Path) -> set[str]:
    """Its files, but for those within checkpoints, which depend on the processes, and names of models there."""
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    models = {str(p.relative_to(run)) for p in (run / "checkpoints").iterdir()}
    return {name for name in files if not name.startswith("checkpoints/")} | models


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
        (first / "heldout_responses.jsonl", 8, 1),
        (run / "iteration_00" / "heldout_responses.jsonl", 8, 1),
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
        for key in found.keys() - ({"rewards/accuracies"} if tie else set()):
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
    read = [name for name in sorted(names(run)) if name.startswith("iteration_") and not name.endswith("seconds.json")]
    assert len(read) == 7
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
        if name.startswith(("iteration_", "export/")) and not name.endswith("seconds.json"):
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
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * untrained, err_msg=name)


# In order: every one comes later in the run than the one before it; with the newest result that is there then.
LOSSES = [
    ("M0", 1, Strike(STEP, 4)),  # SFT, after a checkpoint
    ("M0", 1, Strike(STORE, (1,))),
    ("evaluation of M1", 0, Strike(BATCH, 3)),  # the second batch
    ("pairs 1", 0, Strike(COMMIT)),  # the first checkpoint is not committed
    ("pairs 1", 1, Strike(STEP, 6, "after")),  # after checkpoints
]


@pytest.mark.slow
def test_a_host_is_killed_again_and_again(uninterrupted, start, tmp_path):
    """The other one ends by itself with one sentence; in the end the run is that of hosts that were left alone."""
    run, world = tmp_path / "run", uninterrupted / "world"
    for there, host, strike in LOSSES:
        one_lost(start(run, world, **TWO, strike=(host, dataclasses.replace(strike, ahead=False))), host)
        assert newest(run) == there
    ended_well(start(run, world, **TWO))
    same_bytes(run, uninterrupted / "run")


@pytest.mark.slow
def test_other_hosts_and_meshes_go_on(uninterrupted, start, tmp_path):
    """Two hosts are stopped while sampling, one process goes on and is stopped in training, two hosts end the run."""
    run, world = tmp_path / "run", uninterrupted / "world"
    stop = dict(signal=signal.SIGTERM, ahead=False)
    steps = [
        (dict(**TWO, strike=(1, Strike(BATCH, 2, **stop))), "iteration 1: sample"),
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
    settings = dict(lora=dict(rank=2, targets=("q_proj", "down_proj")), optimise=dict(epochs=2, learning_rate=0.03))
    run = tmp_path / "run"
    ended_well(
        start(
            run,
            uninterrupted / "world",
            mesh=(1, 2, 1),
            alone=True,
            compiled=tmp_path / "compiled",
            sft=dict(epochs=2.0, learning_rate=0.03),
            **settings,
        )
    )
    rows_once(run)
    whole = names(uninterrupted / "run")
    assert names(run) - whole == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
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
    """Judging, evaluating again and exporting, against one process with one device, which the run's mesh does not fit."""
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
            assert all(line.startswith("[Gloo]") for one in done[1:] for line in one.out.splitlines()), done
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


# --- refused before the first step -----------------------------------------------------------------------------------

# Every host in a directory of its own.
ELSEWHERE = """
import os, sys
os.chdir(sys.argv[1])
sys.argv = ["train", *sys.argv[2:]]
from scir_jax import train
from scir_jax.run import command
command.main(train.main)
"""


@pytest.fixture
def refused(tmp_path, world_dir, tiny_config):
    """refused(run directory, arguments of host 1, **overrides) -> the last line of both hosts, each in its folder."""
    folders = [tmp_path / f"host{host}" for host in range(2)]
    for folder in folders:
        folder.mkdir()

    def run(directory, arguments=(), **overrides):
        config = tiny_config(
            world_dir,
            run=dict(directory=str(directory), distributed=True, host_timeout=20.0),
            world=dict(directory=None),
            **overrides,
        )
        file = tmp_path / "refused.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        done = run_hosts(
            lambda host: ["-c", ELSEWHERE, folders[host], "--config", file, *(arguments if host else ())],
            2,
            forked=True,
        )
        for one in done:
            assert one.code == 2, done
            assert "Traceback" not in one.err and "compile" not in one.err, done
        return [one.last for one in done]

    return run


def test_different_configurations(refused, tmp_path):
    lines = refused(tmp_path / "run", ["--optimise.batch_size", "16", "--run.seed", "3"])
    for line in lines:
        assert line == (
            "error: host 1 has run.seed 3, optimise.batch_size 16, host 0 has 0, 8: "
            "start all hosts with the same configuration"
        )
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_its_own(refused, tmp_path):
    lines = refused("runs/own")
    assert lines[0] == f"error: host 1: {lines[1].removeprefix('error: ')}"
    assert re.match(r"error: runs/own is not the directory of that name on host 0 \(.+\): give one on a file", lines[1])
    assert not list((tmp_path / "host0" / "runs" / "own").glob(".seen*"))


def test_a_file_that_one_host_lacks(refused, tmp_path, world_dir):
    shutil.copy(world_dir / "prompts.jsonl", tmp_path / "host0")
    lines = refused(tmp_path / "run", data=dict(prompts="prompts.jsonl"))
    assert lines[0] == f"error: host 1: {lines[1].removeprefix('error: ')}"
    assert "prompts.jsonl" in lines[1]


@pytest.mark.slow
def test_other_data_of_the_same_lengths(refused, tmp_path, world_dir):
    text = (world_dir / "prompts.jsonl").read_text()
    lines = text.splitlines()
    (tmp_path / "host0" / "prompts.jsonl").write_text(text)
    (tmp_path / "host1" / "prompts.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    for line in refused(tmp_path / "run", data=dict(prompts="prompts.jsonl")):
        assert re.match(
            r'error: host 1 has sha256\.data\.prompts "[0-9a-f]{64}", host 0 has "[0-9a-f]{64}": start', line
        )
        assert line.endswith("start all hosts with the same files and versions")


def test_what_was_left_in_a_run_directory(tmp_path):
    """A host that is killed while others look for its directory leaves a file there, which is no one else's."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    (directory.path / f"{SEEN}0").touch()
    assert directory.open(Config()) is False
    directory.close()
    (directory.path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds files of something else \(notes.txt\)"):
        directory.open(Config())


# --- rows and parts -------------------------------------------------------------------------------------------------

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (2, 1, 4), (1, 1, 8), (4, 1, 2)]
ROWS = """
import json
import numpy as np
from scir_jax.config.schema import MeshConfig
from scir_jax.engine.hosts import hosts
hosts.start(True, wait=60)
import jax
from scir_jax.engine.mesh import batch_sharding, batch_shards, local_rows, make_mesh, owned_rows, put_batch, replicated
for sizes in MESHES:
    mesh = make_mesh(MeshConfig(*sizes))
    for size in (batch_shards(mesh), 3 * batch_shards(mesh)):
        whole = {"ids": 10 * np.arange(size)[:, None] + np.arange(3), "rows": (np.arange(size, dtype=np.int32),)}
        rows = local_rows(mesh, size)
        batch = put_batch(jax.tree.map(lambda x: x[rows], whole), mesh)
        shards = []
        for array, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(whole)):
            assert array.shape == expected.shape and array.sharding == batch_sharding(mesh)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
        gathered = jax.jit(lambda x: x, out_shardings=replicated(mesh))(batch["ids"])
        np.testing.assert_array_equal(gathered, whole["ids"])
        print(json.dumps([sizes, size, rows.tolist(), owned_rows(mesh, size).tolist()]))
hosts.finish()
"""


def test_rows_of_hosts():
    """Of four hosts with two devices each: what they hold, what of it is theirs alone, and that it becomes a batch."""
    done = run_hosts(f"MESHES = {MESHES}\n{ROWS}", 4, forked=True)
    ended_well(done)
    # Collectives write lines of their own.
    answers = [[json.loads(text) for text in one.out.splitlines() if text.startswith("[[")] for one in done]
    assert [len(answer) for answer in answers] == [2 * len(MESHES)] * 4
    for cases in zip(*answers):
        (sizes, size, *_), *others = cases
        assert all(case[:2] == [sizes, size] for case in others)
        data, fsdp, tensor = sizes
        for host, (_, _, local, _) in enumerate(cases):
            # Devices are numbered along the mesh, tensor the fastest.
            shards = {device // tensor for device in (2 * host, 2 * host + 1)}
            assert local == [row for row in range(size) if row // (size // (data * fsdp)) in shards], (sizes, host)
        owned = [case[3] for case in cases]
        assert sorted(itertools.chain(*owned)) == list(range(size)), sizes
        for host, rows in enumerate(owned):
            assert set(rows) <= set(cases[host][2])
            assert not any(set(rows) & set(case[2]) for case in cases[:host]), "the first that holds a row has it"


def part(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_parts_of_responses_are_put_together(tmp_path):
    """Whole batches of what hosts wrote, however many there were, each row once; torn lines and half batches go."""
    path, size, responses = tmp_path / "responses.jsonl", 4, 2
    place = {number: i for i, number in enumerate((7, 3, 9, 1, 5, 8, 2, 6, 0, 4))}
    rows = [{"prompt_number": n, "sample": s, "response": f"{n}.{s}"} for n in place for s in range(responses)]

    def gathered(*parts) -> tuple[int, list]:
        for old in tmp_path.iterdir():
            old.unlink()
        for host, content in enumerate(parts):
            part(tmp_path / f"responses.jsonl.partial{f'-{host}' if host else ''}", content)
        done = sampling._gather_parts(path, place, size, responses)
        left = list(tmp_path.iterdir())
        assert left in ([], [tmp_path / "responses.jsonl.partial"])
        return done, lines(left[0]) if left else []

    one, two, three = rows[:8], rows[8:16], rows[16:]
    assert gathered() == (0, [])
    assert gathered(rows) == (3, rows)
    assert gathered(rows[::2], rows[1::2]) == (3, rows)
    assert gathered(one[:4] + two[:4], one[4:] + two[4:], three) == (3, rows)
    assert gathered(one + two[:4], two[4:7]) == (1, one), "the second batch is not whole"
    assert gathered([], one) == (1, one), "the first host wrote nothing"
    assert gathered(one[:4], two) == (0, [])
    # Ended after the rows of the others were taken over, before their files were removed.
    assert gathered(one + two, one[4:] + two[4:]) == (2, one + two)
    assert gathered(one, one[4:]) == (1, one)
    part(tmp_path / "responses.jsonl.partial-2", two)
    with (tmp_path / "responses.jsonl.partial-2").open("a") as file:
        file.write('{"prompt_number": 0, "sam')
    assert sampling._gather_parts(path, place, size, responses) == 2
    assert AppendOnly(tmp_path / "responses.jsonl.partial").rows() == one + two
