"""Stand-ins for gcloud, nvidia-smi, sbatch, srun, scontrol and python: they record their arguments and play a plan."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = """bash sh env basename cat chmod cp date dirname flock git grep gzip kill mkdir mkfifo nohup rm sed seq setsid
sleep sort tail tar touch tr true"""
# Words that quoting gets wrong if it can.
NASTY = ["--a", "it's", '--b=say "hi" $HOME `id` \\ * ;&|', "two  spaces", "", "new\nline", "-x", "[1, 'b']"]

needed = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "git", "flock", "setsid", "tar"))), reason="needs bash, git, flock, setsid, tar"
)

# Plans: `create.json` is a list with the states that follow each creation; the last one of a list stays.
GCLOUD = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
fake = Path(os.environ["FAKE"])
arguments = sys.argv[1:]
option = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
def load(name, default):
    return json.loads((fake / name).read_text()) if (fake / name).exists() else default
def store(name, value):
    (fake / name).write_text(json.dumps(value))
with open(fake / "gcloud.calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
state = load("state.json", "ABSENT")
workers = [fake / f"host-{i}" for i in range(2)]
def wipe():
    for worker in workers:
        subprocess.run(["bash", "-c", 'kill -KILL $(cat scir_jax/launch.pid) 2> /dev/null'], cwd=worker, env={})
        worker.rename(f"{worker}-gone-{time.time_ns()}")
        worker.mkdir()
verb = arguments[3]
if arguments[2] == "queued-resources":
    if verb == "create":
        plans = load("create.json", [["ACTIVE"]])
        store("upcoming.json", plans[0])
        store("create.json", plans[1:] or plans)
        store("state.json", "ACCEPTED")
    elif verb == "delete":
        wipe()
        store("upcoming.json", [])
        store("state.json", "ABSENT")
    else:
        upcoming = load("upcoming.json", [])
        if upcoming:
            state = upcoming.pop(0)
            store("upcoming.json", upcoming)
            store("state.json", state)
            if state == "SUSPENDED":
                wipe()
        if state == "ABSENT":
            sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
        if state == "ERROR":
            sys.exit("ERROR: (gcloud) You do not currently have an active account selected.")
        print("a notice that is not the state", file=sys.stderr)
        print(state)
    sys.exit(0)
if state != "ACTIVE":
    sys.exit("ERROR: (gcloud) the TPU is not READY")
chosen = workers if option["worker"] == "all" else [workers[int(option["worker"])]]
code = 0
for worker in chosen:
    if verb == "scp":
        shutil.copy(arguments[4], worker / arguments[5].partition(":")[2])
    else:  # gcloud cuts the command at spaces, ssh joins it again
        command = " ".join(option["command"].split(" "))
        environment = {**os.environ, "HOME": str(worker), "FAKE_HOST": worker.name}
        code = subprocess.run(["bash", "-c", command], cwd=worker, env=environment).returncode or code
sys.exit(code)
"""

# A run does what the next line of plan-HOST says: a shell command, or `serve`: until it is asked to stop.
PYTHON = """
# Two hosts record into one file: a call is written under a lock, or their words mix.
record() {
    { flock 9 && printf '%s\\0' "$@" | tr '\\n\\0' '\\a\\n' && printf '\\f\\n'; } >> "$FAKE/$1.calls" 9>> "$FAKE/$1.lock"
}
case "$*" in
    -c*) exit "${FAKE_OLD_PYTHON:-0}" ;;
    '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    '-m uv venv '*) mkdir -p .venv/bin && cp "$0" .venv/bin/python; record install "$@" ;;
    '-m pip --version') ;;
    '-m pip '*) record install "$@" ;;
    '-m scir_jax.train'*)
        record train "$@"
        env | grep -E '^(XLA_|CUDA_VISIBLE|JAX_|GREETING)' | sort > "$FAKE/train.env"
        plan="$FAKE/plan-${FAKE_HOST:-here}"
        now=$(sed -n 1p "$plan" 2> /dev/null) || true
        [ ! -e "$plan" ] || sed -i 1d "$plan"
        if [ "$now" = serve ]; then
            echo $$ >> "$FAKE/pids"
            # Waits by reading what never comes, never for a process: a SIGINT that comes just when bash begins to wait
            # for one sends bash into an endless loop instead of its trap.
            mkfifo "$FAKE/never-$$" && exec 3<> "$FAKE/never-$$"
            asked() { echo "$1" >> "$FAKE/asked"; read -r -t 0.2 -u 3; exit "$1"; }
            trap 'asked 143' TERM
            trap 'asked 130' INT
            : > "$FAKE/serving"
            i=0
            while [ $i -lt 300 ]; do read -r -t 0.1 -u 3; i=$((i + 1)); done
            exit 99
        fi
        eval "${now:-true}"
        ;;
    *) exit 98 ;;
esac
"""

SRUN = """
echo "srun $*" >> "$FAKE/srun.calls"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


class Cluster:
    """A project directory, a PATH with the stand-ins and nothing else, and two hosts."""

    def __init__(self, directory: Path):
        self.directory, self.bin, self.project = directory, directory / "bin", directory / "project"
        for path in (self.bin, self.project, directory / "host-0", directory / "host-1"):
            path.mkdir()
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.write("gcloud", GCLOUD, f"{sys.executable} -SE")
        self.write("python3", PYTHON)
        self.write("hostname", 'echo "${FAKE_HOST:-here}"')
        self.write("nvidia-smi", 'echo x >> "$FAKE/nvidia-smi.calls"; echo "${FAKE_DRIVER:-580.65.06}"')
        self.write("sbatch", 'cat > "$FAKE/batch.sh"; echo "sbatch $*" >> "$FAKE/sbatch.calls"; echo "77;cluster"')
        self.write("srun", SRUN)
        self.write("scontrol", 'echo "scontrol $*" >> "$FAKE/scontrol.calls"')
        shutil.copytree(ROOT / "launch", self.project / "launch")
        (self.project / ".gitignore").write_text("build/\n.venv/\n")
        self.environment = {"PATH": str(self.bin), "FAKE": str(directory), "HOME": str(directory), "TPU_POLL": "0.05"}

    def write(self, name: str, text: str, interpreter: str = "/usr/bin/env bash") -> None:
        (self.bin / name).write_text(f"#!{interpreter}\n{text}")
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = ["bash", str(self.project / "launch" / script), *arguments]
        variables = {**self.environment, **environment}
        return subprocess.Popen(
            command, cwd=self.project, env=variables, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # A shell started in the background ignores Ctrl-C, its children too, and bash cannot trap what it ignores.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, out, err)
        return subprocess.CompletedProcess(arguments, code, out, err)

    def dry(self, script: str, *arguments: str) -> list[list[str]]:
        """The commands that --dry-run prints, as the shell would split them; none may have been run."""
        out = self.run(script, *arguments, "--dry-run") if "--" not in arguments else None
        if out is None:
            cut = arguments.index("--")
            out = self.run(script, *arguments[:cut], "--dry-run", *arguments[cut:])
        assert not list(self.directory.glob("*.calls")) and not (self.project / "build").exists()
        words, line = [], ""
        for text in out.stdout.splitlines():
            line += text
            try:
                words.append(shlex.split(line, comments=True))
                line = ""
            except ValueError:  # a quoted text goes on in the next line
                line += "\n"
        return [w for w in words if w]

    def commit(self) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "x"]):
            subprocess.run(["git", *command], cwd=self.project, check=True, env=self.environment)

    def calls(self, name: str) -> list[list[str]]:
        path = self.directory / f"{name}.calls"
        text = path.read_text() if path.exists() else ""
        if name == "gcloud":
            return [json.loads(line) for line in text.splitlines()]
        if name in ("train", "install"):
            return [[w.replace("\a", "\n") for w in call.split("\n")[:-1]] for call in text.split("\f\n")[:-1]]
        return [line.split(" ") for line in text.splitlines()]

    def verbs(self) -> list[str]:
        """What gcloud was asked, without repetitions: create, describe, delete, scp, install, status, start, stop."""
        result: list[str] = []
        for call in self.calls("gcloud"):
            command = next((a for a in call if a.startswith("--command=")), "")
            verb = call[3] if call[3] != "ssh" else command.partition("worker.sh ")[2].split(" ")[0]
            if result[-1:] != [verb]:
                result.append(verb)
        return result

    def plan(self, name: str, value) -> None:
        (self.directory / name).write_text(json.dumps(value) if name.endswith(".json") else value)

    def wait_for(self, condition, what: str) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.02)

    def close(self) -> None:
        pids = self.directory / "pids"
        for pid in pids.read_text().split() if pids.exists() else []:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
