"""The launching commands of docs/launch.md and of the scripts' help, run with stand-ins for gcloud, Slurm and GPUs."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.documents import ROOT
from tests.fake_cluster import needed

pytestmark = [pytest.mark.slow, needed]


def launch(cluster, documented, **environment):
    """Runs a script with the document's words -> what it said, and the options of the training among them."""
    words = documented.words()
    train = words[words.index("--") + 1 :] if "--" in words else []
    return cluster.run(documented.command.program.removeprefix("launch/"), *words, **environment), train


def trained(train):
    """The calls of the training on both hosts."""
    return [["train", "-m", "scir_jax.train", *train, "--run.distributed", "true"]] * 2


@pytest.fixture
def slice_of_two(cluster):
    """A project that is a commit, a share that is not mounted, and the settings of docs/launch.md."""
    cluster.write("mountpoint", "exit 1")
    cluster.write("sudo", 'echo "sudo $*" >> "$FAKE/sudo.calls"')
    (text,) = re.findall(r"^```sh\n(TPU_NAME=.*?)^```", (ROOT / "docs" / "launch.md").read_text(), re.S | re.M)
    cluster.commit()
    (cluster.project / "scir.env").write_text(text)
    return cluster


@pytest.mark.documented("launch/tpu_vm.sh create", "launch/tpu_vm.sh install", "launch/tpu_vm.sh start")
@pytest.mark.documented("launch/tpu_vm.sh logs --env-file", "launch/tpu_vm.sh logs --name", "launch/tpu_vm.sh delete")
@pytest.mark.documented("launch/tpu_vm.sh resume --env-file", "mountpoint")
def test_a_slice_step_by_step_and_watched(documented, slice_of_two):
    create, install, start, logs, logs_by_name, delete, resume, mount = documented
    cluster = slice_of_two
    for host in range(2):
        cluster.plan(f"plan-host-{host}", "echo step 1\nexit 0\n")
    assert "ACTIVE" in launch(cluster, create)[0].stdout
    launch(cluster, install)
    _, train = launch(cluster, start)
    cluster.wait_for(lambda: len(list(cluster.directory.glob("host-*/scir_jax/launch.exit"))) == 2, "the end")
    assert train and cluster.calls("train") == trained(train)
    assert mount.words()[-1] == "}" and mount.command.line in (cluster.project / "scir.env").read_text()
    asked = ["apt-get -qy install nfs-common", "mkdir -p /shared", "mount -t nfs 10.0.0.2:/share /shared"]
    assert sorted(cluster.calls("sudo")) == sorted(["sudo", *one.split()] for one in asked * 2)
    for one in (logs, logs_by_name):  # which follow until they are stopped
        process = cluster.start("tpu_vm.sh", *one.words())
        assert process.stdout.readline() == "step 1\n"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    launch(cluster, delete)
    done, again = launch(cluster, resume)
    assert "the run is done" in done.stdout and cluster.calls("train")[2:] == trained(again)
    creations = [call for call in cluster.calls("gcloud") if call[3] == "create"]
    assert creations[0] == creations[1] and "--spot" in creations[0]


@pytest.mark.documented("launch/tpu_vm.sh resume --spot")
def test_a_slice_from_the_options_alone(documented, slice_of_two):
    done, train = launch(slice_of_two, *documented)
    assert "the run is done" in done.stdout and slice_of_two.calls("train") == trained(train)
    assert slice_of_two.calls("sudo") == [["sudo", *"mount -t nfs 10.0.0.2:/share /shared".split()]] * 2


@pytest.mark.documented("launch/slurm.sh --requeue", "launch/slurm.sh --dry-run")
def test_a_job_under_slurm(documented, cluster):
    submit, print_only = documented
    python = cluster.project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(cluster.bin / "python3", python)
    done, _ = launch(cluster, print_only)
    assert "#SBATCH --mem=0" in done.stdout and not cluster.calls("sbatch")
    done, train = launch(cluster, submit)
    assert "job 77; " in done.stdout
    variables = {**cluster.environment, "SLURM_JOB_ID": "77", "SCIR_LINGER": "0"}
    subprocess.run(["bash", cluster.directory / "batch.sh"], cwd=cluster.project, env=variables, check=True)
    assert cluster.calls("train") == trained(train)[:1]


@pytest.mark.documented("launch/gpu.sh -- --model models/NAME --prompts prompts.jsonl --run mine")
@pytest.mark.documented("launch/gpu.sh --deterministic -- --model models/NAME --prompts prompts.jsonl --run mine")
@pytest.mark.documented("launch/gpu.sh --gpus")
def test_one_machine(documented, cluster):
    environments = []
    for one in documented:
        _, train = launch(cluster, one)
        assert cluster.calls("train")[-1] == ["train", "-m", "scir_jax.train", *train]
        environments.append((cluster.directory / "train.env").read_text())
    assert ["deterministic" in text for text in environments] == [False, True, True]
    assert "CUDA_VISIBLE_DEVICES=0,1" in environments[2]
