"""The launchers: what they print, what they refuse, and what they do with stand-ins for gcloud, Slurm and GPUs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cluster import NASTY, needed

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
PLACE = ["--zone=us-east5-a", "--project=p"]
SLICE = ["--name", "scir", "--zone=us-east5-a", "--project", "p"]
TYPE = ["--accelerator-type", "v6e-16"]

pytestmark = [pytest.mark.slow, needed]


def creations(cluster):
    return [call for call in cluster.calls("gcloud") if call[3] == "create"]


# --- help and errors ---


@pytest.mark.parametrize(
    "script, words",
    {
        "tpu_vm.sh": "create install start status logs stop resume delete --name --zone --project --accelerator-type "
        "--runtime-version --spot --create-flag --repository --revision --directory --mount --env --worker "
        "--internal-ip --watch --retries --poll --timeout --env-file --dry-run --help",
        "gpu.sh": "--gpus --venv --extra --memory-fraction --deterministic --env --retries --wait --dry-run --help",
        "slurm.sh": "--nodes --gpus-per-node --process-per-gpu --time --partition --account --cpus-per-task --name "
        "--sbatch --requeue --grace --retries --setup --venv --deterministic --env --logs --dry-run --help",
    }.items(),
)
def test_help_names_everything_that_the_script_takes(cluster, script, words):
    text = cluster.run(script, "--help").stdout
    assert all(re.search(rf"(?m)(^|[ ,]){word}\b", text) for word in words.split())
    taken = re.search(
        r"parse_options (.*?)\"\$@\"", (ROOT / "launch" / script).read_text().replace("\\\n", " "), re.DOTALL
    )
    options = set(re.findall(r"[a-z-]+", taken[1]))
    assert {f"--{option}" for option in options} | {"--help"} == {w for w in words.split() if w.startswith("--")}
    assert f"launch/{script}" in text.partition("example")[2]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "command, message",
    {
        "tpu_vm.sh": "no command; one of: create install",
        "tpu_vm.sh crate": "unknown command crate; did you mean create?",
        "tpu_vm.sh create": "create needs --name",
        "tpu_vm.sh create --name a": "create needs --zone",
        "tpu_vm.sh create --name a --zone b": "create needs --accelerator-type",
        "tpu_vm.sh create --name a --zone b --accelerator-type h100-8": "unknown type, give --runtime-version",
        "tpu_vm.sh create --name a --zone b --accelerator-type v5e-16": "v5litepod-16",
        "tpu_vm.sh create --name": "--name needs a value",
        "tpu_vm.sh create --name --zone b": "--name needs a value",
        "tpu_vm.sh create --spot=yes": "--spot takes no value",
        "tpu_vm.sh create --accelerator v6e-8": "did you mean --accelerator-type?",
        "tpu_vm.sh create --qqq": "unknown option --qqq; --help lists them",
        "tpu_vm.sh create -n a": "unknown option -n",
        "tpu_vm.sh create b --name a --zone b": "b: unexpected",
        "tpu_vm.sh start --name a --zone b": "options of the training after --",
        "tpu_vm.sh stop --name a --zone b -- --x 1": "takes no options of the training",
        "tpu_vm.sh start --config x": "--config: options of the training come after --",
        "tpu_vm.sh stop --name a --zone b --poll soon": "--poll soon",
        "tpu_vm.sh stop --name a --zone b --timeout 0": "--timeout 0: expected 1 or more",
        "tpu_vm.sh stop --env-file nothing.env": "nothing.env: no such file",
        "tpu_vm.sh start --env bad": "expected NAME=VALUE",
        "gpu.sh": "options of the training are missing",
        "gpu.sh --run.directory x": "come after --",
        "gpu.sh --gpus all -- --x 1": "--gpus all: expected numbers",
        "gpu.sh --extra rocm -- --x 1": "expected cuda12 or cuda13",
        "gpu.sh --memory-fraction 92 -- --x 1": "expected a share",
        "gpu.sh --retries -1 -- --x 1": "--retries -1",
        "slurm.sh -- --x 1": "--nodes N is missing",
        "slurm.sh --nodes 2 -- --x 1": "--gpus-per-node N is missing",
        "slurm.sh --nodes 0 --gpus-per-node 8 -- --x 1": "--nodes 0: expected 1 or more",
        "slurm.sh --nodes two --gpus-per-node 8 -- --x 1": "--nodes two",
        "slurm.sh --nodes 2 --gpus-per-node 8": "options of the training are missing",
        "slurm.sh --nodes 2 --gpus-per-node 8 -- --x 1": "has no bin/python",
        "slurm.sh --nodes 2 --gpu-per-node 8 -- --x 1": "did you mean --gpus-per-node?",
    }.items(),
)
def test_mistakes_are_one_sentence(cluster, command, message):
    result = cluster.run(*command.split(" "), code=2)
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "program, command",
    {
        "gcloud": ["tpu_vm.sh", "status", *SLICE],
        "git": ["tpu_vm.sh", "install", *SLICE],
        "nvidia-smi": ["gpu.sh", "--", "--x", "1"],
        "sbatch": ["slurm.sh", "--nodes", "1", "--gpus-per-node", "1", "--", "--x", "1"],
    }.items(),
)
def test_a_missing_program_is_said_with_what_to_do(cluster, program, command):
    (cluster.bin / program).unlink()
    message = cluster.run(*command, code=2).stderr
    assert re.fullmatch(rf"error: {program} is not on PATH: \w[^\n]+ --dry-run [^\n]+\n", message)
    assert cluster.dry(*command)


def test_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([program, "-x", *map(str, SCRIPTS)], check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


# --- Cloud TPU ---


@pytest.mark.parametrize(
    "kind, runtime",
    {
        "v4-32": "tpu-ubuntu2204-base",
        "v5litepod-16": "v2-alpha-tpuv5-lite",
        "v5p-32": "v2-alpha-tpuv5",
        "v6e-8": "v2-alpha-tpuv6e",
        "tpu7x-16": "v2-alpha-tpu7-ubuntu2404",
    }.items(),
)
@pytest.mark.parametrize("spot", [False, True])
def test_create_is_printed(cluster, kind, runtime, spot):
    options = [*SLICE, "--accelerator-type", kind, "--create-flag=--network=n 1", *["--spot"][:spot]]
    create, describe = cluster.dry("tpu_vm.sh", "create", *options)
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [
        *queued, "create", "scir", "--node-id=scir", *PLACE, f"--accelerator-type={kind}",
        f"--runtime-version={runtime}", *["--spot"][:spot], "--network=n 1", "--quiet",
    ]  # fmt: skip
    assert describe == [*queued, "describe", "scir", *PLACE, "--format=value(state.state)"]
    create, _ = cluster.dry("tpu_vm.sh", "create", *options, "--runtime-version", "mine")
    assert "--runtime-version=mine" in create


def test_every_command_reaches_every_worker(cluster):
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "scir", *PLACE]
    for command in ("install", "start", "status", "stop"):
        train = ["--", "--config", "c.yaml"] if command == "start" else []
        printed = cluster.dry("tpu_vm.sh", command, *SLICE, *train)
        remote = [c for c in printed if "ssh" in c]
        assert remote and all(c[: len(ssh) + 1] == [*ssh, "--worker=all"] for c in remote)
        assert remote[-1][-1].startswith("--command=") and "--internal-ip" not in remote[-1]
    (logs,) = cluster.dry("tpu_vm.sh", "logs", *SLICE, "--worker", "3", "--internal-ip")
    assert logs == [*ssh, "--worker=3", "--internal-ip", "--quiet", "--command=tail -n 100 -F scir_jax/launch.log"]
    (delete,) = cluster.dry("tpu_vm.sh", "delete", *SLICE)
    assert delete[3:] == ["queued-resources", "delete", "scir", *PLACE, "--force", "--quiet"]


def test_a_dry_resume_prints_all_steps(cluster):
    printed = cluster.dry("tpu_vm.sh", "resume", *SLICE, *TYPE, "--watch", "--", "--config", "c.yaml")
    assert [c[3] if c[0] == "git" else c[4] if c[0] == "gcloud" else c[0] for c in printed] == [
        "mkdir", "archive", "describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh",
    ]  # fmt: skip


def test_settings_from_environment_and_file(cluster):
    (cluster.project / "my.env").write_text("TPU_NAME=from-file\nTPU_ZONE=z1\nTPU_SPOT=1\nTPU_TYPE=v6e-8\n")
    environment = {"TPU_NAME": "from-environment", "TPU_PROJECT": "p1"}
    for options, name in ([], "from-file"), (["--name", "from-option"], "from-option"):
        arguments = ["create", "--env-file", "my.env", *options, "--dry-run"]
        out = cluster.run("tpu_vm.sh", *arguments, **environment).stdout.splitlines()[0].split(" ")
        assert out[5] == name and {"--zone=z1", "--project=p1", "--spot", "--accelerator-type=v6e-8"} <= set(out)


def test_train_options_survive_printing_ssh_and_the_shell_of_the_worker(cluster):
    home = cluster.directory / "host-0"
    shutil.copytree(ROOT / "launch", home / "scir_jax" / "launch")
    (home / "scir_jax" / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(cluster.bin / "python3", home / "scir_jax" / ".venv" / "bin" / "python")
    mount = 'echo "it\'s mounted" > mounted && test 1 = 1'
    options = ["--env", "GREETING=hello 'world'", "--mount", mount]
    *_, start = cluster.dry("tpu_vm.sh", "start", *SLICE, *options, "--", *NASTY)
    command = start[-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", command], cwd=home, env={**cluster.environment, "FAKE_HOST": "host-0"}, check=True)
    cluster.wait_for((home / "scir_jax" / "launch.exit").exists, "the run to end")
    assert cluster.calls("train") == [["train", "-m", "scir_jax.train", *NASTY, "--run.distributed", "true"]]
    assert (cluster.directory / "train.env").read_text() == "GREETING=hello 'world'\n"
    assert (home / "scir_jax" / "mounted").read_text() == "it's mounted\n"


def test_create_waits_until_active_and_goes_on_waiting(cluster):
    cluster.plan("create.json", [["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    out = cluster.run("tpu_vm.sh", "create", *SLICE, *TYPE).stdout
    assert re.findall(r"scir: (\w+)", out) == ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cluster.plan("upcoming.json", ["PROVISIONING", "ACTIVE"])
    cluster.run("tpu_vm.sh", "create", *SLICE, *TYPE)
    assert len(creations(cluster)) == 1


def test_create_that_fails_or_takes_too_long(cluster):
    cluster.plan("create.json", [["PROVISIONING", "FAILED"]])
    assert "scir is FAILED" in cluster.run("tpu_vm.sh", "create", *SLICE, *TYPE, code=1).stderr
    cluster.plan("state.json", "WAITING_FOR_RESOURCES")
    message = cluster.run("tpu_vm.sh", "create", *SLICE, *TYPE, "--timeout", "1", code=1).stderr
    assert "still WAITING_FOR_RESOURCES after 1 s" in message
    cluster.plan("state.json", "ERROR")
    assert "active account" in cluster.run("tpu_vm.sh", "create", *SLICE, *TYPE, code=1).stderr
    assert len(creations(cluster)) == 1


def test_install_start_status_stop(cluster):
    cluster.commit()
    cluster.plan("state.json", "ACTIVE")
    for host in ("host-0", "host-1"):
        cluster.plan(f"plan-{host}", "serve\nserve\n")

    def status():
        return cluster.run("tpu_vm.sh", "status", *SLICE).stdout.splitlines()

    train = ["start", *SLICE, "--", *NASTY]
    assert status() == ["ACTIVE", "worker host-0: not installed", "worker host-1: not installed"]
    assert "run install first" in cluster.run("tpu_vm.sh", *train, code=1).stderr
    cluster.run("tpu_vm.sh", "install", *SLICE)
    assert cluster.calls("install") == [["install", "-m", "pip", "install", "-q", "-e", ".[tpu,gcs]"]] * 2
    assert status()[1:] == ["worker host-0: not running", "worker host-1: not running"]
    cluster.run("tpu_vm.sh", *train)
    assert status()[1:] == ["worker host-0: running", "worker host-1: running"]
    assert "a run is on already" in cluster.run("tpu_vm.sh", *train, code=1).stderr
    cluster.wait_for(lambda: len(cluster.calls("train")) == 2, "both hosts")
    assert cluster.calls("train") == [["train", "-m", "scir_jax.train", *NASTY, "--run.distributed", "true"]] * 2
    cluster.wait_for((cluster.directory / "serving").exists, "the signal handler")
    out = cluster.run("tpu_vm.sh", "stop", *SLICE).stdout
    assert out.splitlines() == ["worker host-0: stopped with 143", "worker host-1: stopped with 143"]
    assert cluster.run("tpu_vm.sh", "stop", *SLICE).stdout == out
    cluster.run("tpu_vm.sh", *train)
    assert status()[1:] == ["worker host-0: running", "worker host-1: running"]
    cluster.run("tpu_vm.sh", "delete", *SLICE)
    assert "NOT_FOUND" in cluster.run("tpu_vm.sh", "status", *SLICE, code=1).stderr


def test_what_is_installed(cluster):
    cluster.commit()
    cluster.plan("state.json", "ACTIVE")
    (cluster.project / "untracked").write_text("data")
    cluster.run("tpu_vm.sh", "install", *SLICE, FAKE_OLD_PYTHON="1")
    home = cluster.directory / "host-1" / "scir_jax"
    assert (home / "launch" / "gpu.sh").exists() and not (home / "untracked").exists()
    assert [c[1:3] for c in cluster.calls("install")][:3] == [["-m", "pip"], ["-m", "uv"], ["-m", "pip"]]
    (cluster.project / "launch" / "gpu.sh").write_text("changed")
    assert "uncommitted changes" in cluster.run("tpu_vm.sh", "install", *SLICE, code=2).stderr
    repository = ["--repository", str(cluster.project), "--directory", "of mine", "--revision"]
    cluster.run("tpu_vm.sh", "install", *SLICE, *repository, "HEAD")
    cluster.run("tpu_vm.sh", "install", *SLICE, *repository, "HEAD")
    home = cluster.directory / "host-0" / "of mine"
    assert (home / "launch.installed").exists() and "changed" not in (home / "launch" / "gpu.sh").read_text()
    assert cluster.run("tpu_vm.sh", "install", *SLICE, *repository, "nothing", code=128)


def test_resume_after_preemption_recreates_with_the_same_parameters(cluster):
    cluster.commit()
    options = [*SLICE, *TYPE, "--spot", "--create-flag=--network=n"]
    cluster.run("tpu_vm.sh", "create", *options)
    cluster.plan("state.json", "SUSPENDED")
    cluster.plan("plan-host-0", "serve\n")
    cluster.plan("plan-host-1", "serve\n")
    cluster.plan("create.json", [["PROVISIONING", "ACTIVE"]])
    (before,) = creations(cluster)
    (cluster.directory / "gcloud.calls").unlink()
    out = cluster.run("tpu_vm.sh", "resume", *options, "--", *NASTY).stdout
    assert "worker host-1: running" in out
    assert cluster.verbs() == [
        "describe", "delete", "create", "describe", "status", "scp", "install", "start", "describe", "status",
    ]  # fmt: skip
    assert creations(cluster) == [before]
    assert len(cluster.calls("train")) == 2
    (cluster.directory / "gcloud.calls").unlink()
    cluster.run("tpu_vm.sh", "resume", *options, "--", *NASTY)
    assert cluster.verbs() == ["describe", "status"]


def test_watch_outlives_preemption_and_crash_and_ends_with_the_run(cluster):
    cluster.commit()
    cluster.plan("create.json", [["FAILED"], ["ACTIVE"] * 4 + ["SUSPENDING", "SUSPENDED"], ["PROVISIONING", "ACTIVE"]])
    cluster.plan("plan-host-0", "serve\nexit 4\nexit 0\n")
    cluster.plan("plan-host-1", "serve\nexit 139\nexit 0\n")
    out = cluster.run("tpu_vm.sh", "resume", "--watch", *SLICE, *TYPE, "--", "--config", "c.yaml").stdout
    assert [v for v in cluster.verbs() if v not in ("describe", "status")] == [
        "create", "delete", "create", "scp", "install", "start", "delete", "create", "scp", "install", "start", "start",
    ]  # fmt: skip
    assert len(cluster.calls("train")) == 6
    assert "worker host-0: exited with 4\nworker host-1: exited with 139" in out and "the run is done" in out


@pytest.mark.parametrize("ends, code", [(("exit 4", "exit 2"), 2), (("exit 3", "exit 4"), 3)])
def test_watch_ends_where_only_the_user_can_help(cluster, ends, code):
    cluster.commit()
    for host, end in enumerate(ends):
        cluster.plan(f"plan-host-{host}", f"{end}\n")
    cluster.run("tpu_vm.sh", "resume", "--watch", *SLICE, *TYPE, "--", "--config", "c.yaml", code=code)
    assert cluster.verbs().count("start") == 1


def test_watch_gives_up_after_many_crashes(cluster):
    cluster.commit()
    for host in range(2):
        cluster.plan(f"plan-host-{host}", "exit 20\n" * 9)
    options = ["--watch", *SLICE, *TYPE, "--retries", "2", "--", "--config", "c.yaml"]
    assert "given up after 3 failures" in cluster.run("tpu_vm.sh", "resume", *options, code=1).stderr
    assert len(cluster.calls("train")) in (6, 8)


def test_watch_ends_when_the_run_is_stopped_and_starts_a_stopped_one(cluster):
    cluster.commit()
    for host in range(2):
        cluster.plan(f"plan-host-{host}", "serve\nexit 0\n")
    options = ["resume", "--watch", *SLICE, *TYPE, "--", "--config", "c.yaml"]
    watch = cluster.start("tpu_vm.sh", *options)
    cluster.wait_for((cluster.directory / "serving").exists, "the run")
    cluster.wait_for(lambda: len(cluster.calls("train")) == 2, "both hosts")
    cluster.run("tpu_vm.sh", "stop", *SLICE)
    watch.communicate(timeout=30)
    assert watch.returncode == 143
    cluster.run("tpu_vm.sh", *options)
