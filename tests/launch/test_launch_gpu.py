"""launch/gpu.sh and launch/slurm.sh: restarts, signals and what is submitted, with stand-ins for driver and Slurm."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.fake_cluster import NASTY, needed

pytestmark = [pytest.mark.slow, needed]


# --- one machine ---


def gpu(cluster, *arguments, code=0, plan="", **environment):
    cluster.plan("plan-here", plan)
    return cluster.run("gpu.sh", "--wait", "0", *arguments, code=code, **environment)


def test_gpu_command_is_printed(cluster):
    query, venv, install, train = cluster.dry("gpu.sh", "--gpus", "0,1", "--deterministic", "--", *NASTY)
    python = str(cluster.project / ".venv" / "bin" / "python")
    assert query == ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    assert venv == ["python3", "-m", "venv", str(cluster.project / ".venv")]
    assert install == [python, "-m", "pip", "install", "-q", "-e", f"{cluster.project}[cuda13]"]
    assert train == [
        "env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "CUDA_VISIBLE_DEVICES=0,1",
        "XLA_FLAGS=--xla_gpu_deterministic_ops=true", python, "-m", "scir_jax.train", *NASTY,
    ]  # fmt: skip
    *_, install, train = cluster.dry("gpu.sh", "--extra", "cuda12", "--memory-fraction", ".5", "--", "--x", "1")
    assert install[-1].endswith("[cuda12]") and train[:2] == ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=.5"]
    assert train[2:] == [python, "-m", "scir_jax.train", "--x", "1"]


@pytest.mark.parametrize(
    "driver, extra", [("525.60.13", "cuda12"), ("570.1", "cuda12"), ("580.65", "cuda13"), ("610", "cuda13")]
)
def test_gpu_installs_what_the_driver_can(cluster, driver, extra):
    gpu(cluster, "--", *NASTY, FAKE_DRIVER=driver, XLA_FLAGS="--xla_a=1")
    gpu(cluster, "--deterministic", "--env", "GREETING=a b", "--", *NASTY, XLA_FLAGS="--xla_a=1")
    assert [c[-1] for c in cluster.calls("install")] == [f"{cluster.project}[{extra}]"]
    assert cluster.calls("train") == [["train", "-m", "scir_jax.train", *NASTY]] * 2
    assert (cluster.directory / "train.env").read_text().splitlines() == [
        "GREETING=a b", "XLA_FLAGS=--xla_a=1 --xla_gpu_deterministic_ops=true", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
    ]  # fmt: skip


def test_gpu_refuses_an_old_driver(cluster):
    assert "driver 470 is too old" in gpu(cluster, "--", "--x", "1", code=2, FAKE_DRIVER="470.82").stderr
    assert not (cluster.project / ".venv").exists()


@pytest.mark.parametrize(
    "plan, code, starts",
    [
        (["exit 1", "kill -9 $$", "exit 0"], 0, 3),
        (["exit 1"] * 5, 1, 3),
        (["exit 2"], 2, 1),
        (["exit 3"], 3, 1),
        (["exit 130"], 130, 1),
        (["exit 1", "exit 143"], 143, 2),
    ],
)
def test_gpu_starts_again_after_a_crash_only(cluster, plan, code, starts):
    result = gpu(cluster, "--retries", "2", "--", "--x", "1", code=code, plan="\n".join(plan) + "\n")
    assert len(cluster.calls("train")) == starts
    assert result.stderr.count("crashed with exit code") == starts - 1


@pytest.mark.parametrize("number, whole_group, code", [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)])
def test_gpu_lets_the_run_save_once_when_it_is_stopped(cluster, number, whole_group, code):
    cluster.plan("plan-here", "serve\nexit 0\n")
    process = cluster.start("gpu.sh", "--wait", "0", "--", "--x", "1")
    cluster.wait_for((cluster.directory / "serving").exists, "the run")
    os.kill(-process.pid if whole_group else process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert (cluster.directory / "asked").read_text() == f"{code}\n"
    assert len(cluster.calls("train")) == 1


# --- Slurm ---

NODES = ["--nodes", "2", "--gpus-per-node", "4"]


def batch(cluster, *options, code=0, plan="", **environment):
    """Submits, runs what was submitted, and returns the arguments of the step and what scontrol was asked."""
    python = cluster.project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(cluster.bin / "python3", python)
    cluster.plan("plan-here", plan)
    assert "job 77; " in cluster.run("slurm.sh", *NODES, *options, "--", *NASTY).stdout
    assert cluster.calls("sbatch") == [["sbatch", "--parsable"]]
    variables = {**cluster.environment, "SLURM_JOB_ID": "77", "SCIR_LINGER": "0", **environment}
    process = subprocess.Popen(["bash", str(cluster.directory / "batch.sh")], cwd=cluster.project, env=variables)
    if "serve" in plan:
        cluster.wait_for((cluster.directory / "serving").exists, "the run")
        process.send_signal(signal.SIGUSR1 if "--requeue" in options else signal.SIGTERM)
        if "--requeue" not in options:  # Slurm sends SIGTERM to the run itself; the script must wait for it, no more
            os.kill(int((cluster.directory / "pids").read_text()), signal.SIGTERM)
    assert process.wait(timeout=30) == code
    assert cluster.calls("train") == [["train", "-m", "scir_jax.train", *NASTY, "--run.distributed", "true"]]
    return cluster.calls("srun")[0], cluster.calls("scontrol")


def test_slurm_submission_is_printed_as_it_is_made(cluster):
    options = [*NODES, "--time", "1:00:00", "--partition=gpu", "--account", "lab", "--sbatch=--mem=0", "--name", "a.b",
               "--cpus-per-task", "6", "--requeue", "--grace", "60", "--setup", "module load 'x y'"]  # fmt: skip
    out = cluster.run("slurm.sh", *options, "--dry-run", "--", *NASTY).stdout
    assert not cluster.calls("sbatch") and not (cluster.project / "logs").exists()
    subprocess.run(["bash", "-ec", out], cwd=cluster.project, env=cluster.environment, check=True, capture_output=True)
    assert (cluster.project / "logs").is_dir()
    text = (cluster.directory / "batch.sh").read_text()
    assert re.findall(r"(?m)^#SBATCH (.*)", text) == [
        "--job-name=a.b", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=6",
        "--time=1:00:00", "--partition=gpu", "--account=lab", "--mem=0",
        "--output=logs/a.b-%j.log", "--open-mode=append", "--requeue",
        "--signal=B:USR1@60",
    ]  # fmt: skip
    assert "\nmodule load 'x y'\n" in text and text.startswith("#!")


def test_slurm_one_process_a_node_drives_all_gpus(cluster):
    step, asked = batch(cluster, "--deterministic", "--env", "GREETING=a 'b'")
    assert {"--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0"} <= set(step)
    assert (cluster.directory / "train.env").read_text().splitlines() == [
        "GREETING=a 'b'", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "XLA_FLAGS=--xla_gpu_deterministic_ops=true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
    ]  # fmt: skip
    assert not asked and "#SBATCH --no-requeue" in (cluster.directory / "batch.sh").read_text()


def test_slurm_a_process_a_gpu(cluster):
    step, _ = batch(cluster, "--process-per-gpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert "--ntasks-per-node=4" in step
    assert (cluster.directory / "train.env").read_text() == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5\n"


@pytest.mark.parametrize("code, restarts, requeued", [
    (0, "0", False), (2, "0", False), (3, "0", False), (4, "0", True), (139, "19", True), (1, "20", False),
    (143, "0", False),
])  # fmt: skip
def test_slurm_requeues_after_a_crash_only(cluster, code, restarts, requeued):
    end = 0 if requeued else code
    _, asked = batch(cluster, "--requeue", code=end, plan=f"exit {code}\n", SLURM_RESTART_COUNT=restarts)
    assert asked == [["scontrol", "requeue", "77"]] * requeued


def test_slurm_saves_and_requeues_before_the_time_limit(cluster):
    _, asked = batch(cluster, "--requeue", plan="serve\n", SLURM_RESTART_COUNT="50")
    assert asked == [["scontrol", "requeue", "77"]]
    assert (cluster.directory / "asked").read_text() == "143\n"


def test_slurm_a_cancelled_job_saves_and_does_not_come_back(cluster):
    _, asked = batch(cluster, plan="serve\n", code=143)
    assert not asked and (cluster.directory / "asked").read_text() == "143\n"
