"""Hosts of one run: what they say to each other, how they end together, and how they end when one is lost."""

import json
import signal
import socket
import time
from pathlib import Path

import jax
import pytest

from scir_jax.engine.hosts import coordination, hosts, liveness
from scir_jax.errors import InputError
from tests.hosts import Kill, free_port, run_hosts
from tests.processes import runs

HOST = socket.gethostname()
AGAIN = "; this host stops; start the same command on all hosts again to go on"

# As a command does it: body() is what comes after the cluster was found.
MAIN = """
import json, os, sys, time
from pathlib import Path
from scir_jax.engine.hosts import coordination, hosts, liveness
from scir_jax.errors import InputError, Interrupted

# Shorter, since nothing here takes long.
coordination.SLICE_MS, hosts.FILE_SECONDS, liveness.GRACE_SECONDS = 200, 0.5, 0.5

def main(body, watch=60):
    try:
        hosts.start(True, wait=60)
        hosts.watch(watch, 0.3)
        body(hosts.index())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        hosts.finish(error)
        sys.exit(2)
    except BaseException as error:
        if hosts.lost(error):
            hosts.stop(error)
        hosts.finish(error)
        raise
    hosts.finish()

def refusal(run):
    try:
        run()
    except InputError as error:
        return str(error)

def raising(message):
    raise InputError(message)
"""


@pytest.mark.slow
def test_hosts_talk_and_end_in_silence(tmp_path):
    (tmp_path / "apart0").mkdir()
    code = """
def body(index):
    result = {"place": [hosts.index(), hosts.count(), hosts.first()]}
    result["gather"] = hosts.gather({"host": index, "text": "ä" * 10, "none": None})
    result["large"] = [len(text) for text in hosts.gather("x" * (5_000_000 if index == 1 else 1))]
    result["decide"] = hosts.decide(lambda: [index, time.sleep(0.5 * (index == 0))])
    result["decide refused"] = refusal(lambda: hosts.decide(lambda: raising(f"no {index}")))
    result["together"] = hosts.together(lambda: Path(str(index))).name
    result["together refused"] = refusal(lambda: hosts.together(lambda: raising(f"no {index}") if index else None))
    result["all refused"] = refusal(lambda: hosts.together(lambda: raising("no world")))
    config = {"optimise": {"batch_size": 8, "kind": "dpo"}, "run": {"seed": 1}}
    hosts.same(config, "configuration")
    other = {"optimise": {"batch_size": 16, "kind": "dpo"}, "run": {"seed": 1}}
    if index == 2:
        other = {"optimise": {"batch_size": 8, "kind": "dpo"}, "run": {}}
    result["same"] = refusal(lambda: hosts.same(other, "configuration"))
    result["vote"] = [hosts.vote(False), hosts.vote(index == 2), hosts.vote(True)]
    hosts.shares(Path("DIRECTORY/all/of/us"))
    hosts.barrier("removed")
    result["left"] = sorted(os.listdir("DIRECTORY/all/of/us"))
    result["shares"] = refusal(lambda: hosts.shares(Path(f"DIRECTORY/apart{min(index, 1)}")))
    votes = hosts.Votes()
    import jax
    busy = jax.jit(lambda x: x @ x)
    result["votes"] = []
    for step in range(6):
        busy(jax.numpy.ones((200, 200)))
        result["votes"].append(votes.cast(index == 1 and step in (2, 5)))
    result["settled"] = [votes.settle(), votes.settle()]
    try:
        hosts.barrier("here" if index else "there")
    except RuntimeError as error:
        result["barrier"] = str(error)
    hosts.barrier("end")
    print("RESULT", json.dumps(result), flush=True)
    time.sleep(index / 4)

main(body)
"""
    done = run_hosts(MAIN + code.replace("DIRECTORY", str(tmp_path)), 3, forked=True)
    for one in done:
        assert (one.code, one.err) == (0, "")
    results = [json.loads(one.out.split("RESULT ")[1].splitlines()[0]) for one in done]
    for index, result in enumerate(results):
        expected = {
            "place": [index, 3, index == 0],
            "gather": [{"host": host, "text": "ä" * 10, "none": None} for host in range(3)],
            "large": [1, 5_000_000, 1],
            "decide": [0, None],
            "decide refused": "no 0",
            "together": str(index),
            "together refused": "no 1" if index == 1 else "host 1: no 1",
            "all refused": "no world",
            "same": "host 2 has optimise.batch_size 8, run.seed none, host 0 has 16, 1: "
            "start all hosts with the same configuration",
            "vote": [False, True, True],
            "left": [],
            "shares": f"host 1: {tmp_path}/apart1 is not the directory of that name on host 0 ({HOST}): "
            "give one on a file system that all hosts share",
            "votes": [False, False, False, True, False, False],
            "settled": [True, False],
            "barrier": "the hosts are at different places of the program: "
            "host 0 at barrier 'there', host 1 at barrier 'here', host 2 at barrier 'here'",
        }
        if index == 1:
            expected["shares"] = expected["shares"].removeprefix("host 1: ")
        assert result == expected
    assert list((tmp_path / "apart0").iterdir()) == []


@pytest.mark.slow
def test_an_error_of_all_hosts_ends_all_with_its_own_code():
    code = """
def body(index):
    hosts.decide(lambda: raising("no such model"))

main(body)
"""
    for one in run_hosts(MAIN + code, 2, forked=True):
        assert (one.code, one.err) == (2, "error: no such model\n")


@pytest.mark.slow
def test_an_interrupted_run_ends_all_hosts_in_order():
    code = """
def body(index):
    time.sleep(index)
    raise Interrupted("saved", 15)

try:
    main(body)
except Interrupted:
    sys.exit(143)
"""
    for one in run_hosts(MAIN + code, 2, forked=True):
        assert (one.code, one.err) == (143, "")


@pytest.mark.parametrize(("count", "failing"), [(2, 1), *(pytest.param(3, n, marks=pytest.mark.slow) for n in (0, 1))])
def test_an_error_of_one_host_ends_the_others_and_names_it(count, failing):
    code = """
import subprocess

def body(index):
    hosts.barrier("begin")
    if index == FAILING:
        raise ValueError("no luck\\ntoday")
    started = subprocess.Popen(["sleep", "60"], start_new_session=True)
    print(started.pid, flush=True)
    with liveness.ends_with_us(started.pid):
        hosts.barrier("never")

main(body, watch=12)
"""
    done = run_hosts(MAIN + code.replace("FAILING", str(failing)), count, forked=True)
    failed = done.pop(failing)
    assert failed.code == 1
    assert failed.last == "today"
    for one in done:
        assert (one.code, one.err) == (4, f"error: host {failing} ({HOST}) stopped: ValueError: no luck today{AGAIN}\n")
        # What it had started is killed, and gone when the system gets to it.
        ends, status = time.monotonic() + 10, Path("/proc", one.out.strip(), "status")
        while runs(status) and time.monotonic() < ends:
            time.sleep(0.05)
        assert not runs(status)


LOSS = """
import numpy as np

def body(index):
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather(np.ones(3))
    if index == LOST:
        print("lost now", flush=True)
        time.sleep(600)
    if index == 2:
        hosts.barrier("never")
    multihost_utils.process_allgather(np.ones(3))

main(body, watch=4)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "lost", "how"),
    [
        (2, 1, signal.SIGKILL),
        (2, 0, signal.SIGKILL),
        (2, 1, signal.SIGSTOP),
        (3, 1, signal.SIGKILL),
        (3, 0, signal.SIGKILL),
        (3, 0, signal.SIGSTOP),
    ],
)
def test_a_lost_host_ends_the_others(count, lost, how):
    done = run_hosts(MAIN + LOSS.replace("LOST", str(lost)), count, forked=True, kill=[Kill(lost, "lost now", how)])
    assert done.pop(lost).code == -signal.SIGKILL
    for one in done:
        assert one.code == 4
        assert one.last.startswith("error: ") and one.last.endswith(AGAIN)
        assert f"host {lost} ({HOST})" in one.last
        assert one.err.count(AGAIN) == 1


@pytest.mark.slow
def test_a_cluster_that_does_not_come_together_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        addresses = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", f"127.0.0.1:{taken.getsockname()[1]}"]
        code = """
address, index = json.loads(sys.argv[1])
os.environ.update(JAX_COORDINATOR_ADDRESS=address, JAX_PROCESS_ID=str(index), JAX_NUM_PROCESSES="2")
start = hosts.start
hosts.start = lambda distributed, wait: start(distributed, wait=1)
main(None)
"""
        places = list(zip(addresses, (1, 0, 0)))
        done = run_hosts(lambda host: ["-c", MAIN + code, json.dumps(places[host])], 3, forked=True)
    expected = [
        f"error: the coordinator at {addresses[0]} could not be reached for 1 s: "
        "start the same command on the first host too, and open its port to the others",
        f"error: not all 2 hosts came to the coordinator at {addresses[1]} within 1 s: "
        "start the same command on every host, each with an index of its own",
        f"error: the coordinator cannot listen on port {addresses[2].split(':')[1]} of this host, the first "
        "(Address already in use): end what uses it, or set another in JAX_COORDINATOR_ADDRESS on all hosts",
    ]
    assert [(one.code, one.last) for one in done] == [(2, text) for text in expected]
    assert all("Check failure" not in one.err for one in done)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ADDRESS": "a:1", "COUNT": "2"}, "JAX_PROCESS_ID must be set beside JAX_COORDINATOR_ADDRESS and"),
        ({"INDEX": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set beside JAX_PROCESS_ID"),
        ({"ADDRESS": "10.0.0.1", "COUNT": "2", "INDEX": "0"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: expected HOST:PORT"),
        ({"ADDRESS": "a:70000", "COUNT": "2", "INDEX": "0"}, "JAX_COORDINATOR_ADDRESS=a:70000: expected HOST:PORT"),
        ({"ADDRESS": "a:1", "COUNT": "two", "INDEX": "0"}, "JAX_NUM_PROCESSES=two: expected a whole number from 1"),
        ({"ADDRESS": "a:1", "COUNT": "0", "INDEX": "0"}, "JAX_NUM_PROCESSES=0: expected a whole number from 1"),
        ({"ADDRESS": "a:1", "COUNT": "2", "INDEX": "-1"}, "JAX_PROCESS_ID=-1: expected a whole number from 0"),
        ({"ADDRESS": "a:1", "COUNT": "2", "INDEX": "2"}, "JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES=2"),
    ],
)
def test_variables_that_cannot_be_are_refused(variables, words, monkeypatch):
    for name in ("ADDRESS", "COUNT", "INDEX"):
        monkeypatch.delenv(getattr(coordination, name), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(getattr(coordination, name), value)
    with pytest.raises(InputError) as refused:
        hosts.start(True)
    assert str(refused.value).startswith(words)
    assert hosts.count() == 1


def test_variables_that_are_set():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(coordination.ADDRESS, "[::1]:1234")
        patch.setenv(coordination.COUNT, " 4 ")
        patch.setenv(coordination.INDEX, "3")
        assert coordination.arguments() == dict(coordinator_address="[::1]:1234", num_processes=4, process_id=3)
        # Slurm and TPU slices know the rest.
        patch.delenv(coordination.COUNT)
        patch.setenv(coordination.INDEX, "")
        assert coordination.arguments() == dict(coordinator_address="[::1]:1234")


def test_one_process_is_its_only_host(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("touched a device"))
    hosts.start(False)
    hosts.watch(1)
    assert (hosts.count(), hosts.index(), hosts.first()) == (1, 0, True)
    hosts.barrier("x")
    assert hosts.gather((1, {"a": None})) == [[1, {"a": None}]]
    assert hosts.decide(lambda: (1, 2)) == [1, 2]
    value = object()
    assert hosts.together(lambda: value) is value
    hosts.same({"a": 1}, "configuration")
    hosts.shares(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    votes = hosts.Votes()
    assert [votes.cast(True), votes.cast(False), votes.settle()] == [True, False, False]
    assert hosts.vote(True) and not hosts.vote(False)
    error = InputError("no")

    def fail():
        raise error

    for run in (hosts.decide, hosts.together):
        with pytest.raises(InputError) as raised:
            run(fail)
        assert raised.value is error
    assert not hosts.lost(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"))
    hosts.finish()
    hosts.finish(error)


def test_losses_are_told_from_other_errors(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [::1]:1")
    assert hosts.lost(gone)
    assert hosts.lost(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"))
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = gone
    assert hosts.lost(wrapped)
    assert not hosts.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"))
    assert not hosts.lost(ValueError("Connection closed by peer"))
    wrapped.__cause__ = wrapped
    assert not hosts.lost(wrapped)


class Texts:
    """A store in this process, of the second of three hosts."""

    count, index = 3, 1

    def __init__(self):
        self.texts = {}

    def put(self, key, text, overwrite=False):
        assert overwrite or key not in self.texts
        self.texts[key] = text

    def entries(self, directory):
        return {key.split("/")[-1]: text for key, text in self.texts.items() if key.startswith(f"{directory}/")}


def test_silence_is_measured_up_to_the_last_answer(monkeypatch):
    now = 100.0
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now)
    watch = liveness.Watch(Texts(), ["a", "b", "c"], timeout=60, interval=5)
    assert watch.silence(60) is None
    now = 159.0
    watch._answered, watch._heard = 159.0, [159.0, 100.0, 120.0]
    assert watch.silence(60) is None
    assert watch.silence(30) == "host 2 (c) has not been heard of for 30 s"
    now = 185.0
    assert watch.silence(30) == "host 2 (c) has not been heard of for 30 s"
    now = 189.0
    assert watch.silence(30) == "the coordinator, host 0 (a), has not answered for 30 s"
    watch.stood_still(1000.0)
    now = 1180.0
    assert watch.silence(30) == "host 2 (c) has not been heard of for 30 s"
    watch._heard[0] = 1100.0
    assert watch.silence(30) == "host 0 (a) and host 2 (c) have not been heard of for 30 s"
    watch._left = {2: liveness.Farewell(None, True)}
    assert watch.silence(30) == "host 0 (a) has not been heard of for 30 s"


def test_who_leaves_in_order_gives_the_others_time():
    store = Texts()
    watch = liveness.Watch(store, ["a", "b", "c"], timeout=60, interval=5)

    def heard(**farewells):
        watch._left = {int(name[1:]): farewell for name, farewell in farewells.items()}
        return watch.departure()

    assert heard() == heard(_0=liveness.Farewell(None, True)) == (None, 0)
    assert heard(_1=liveness.Farewell("itself")) == (None, 0)
    assert heard(_2=liveness.Farewell("no luck")) == ("host 2 (c) stopped: no luck", liveness.GRACE_SECONDS)
    saved = liveness.Farewell("saved", True)
    assert heard(_0=saved) == ("host 0 (a) stopped: saved", 60)
    assert heard(_0=saved, _2=liveness.Farewell("no luck"))[0] == "host 2 (c) stopped: no luck"
    watch.leaving = True
    assert heard(_0=saved) == (None, 0)
    followed = liveness.Farewell("host 2 (c) is gone", followed=True)
    assert heard(_0=followed) == ("host 2 (c) is gone", liveness.GRACE_SECONDS)
    liveness.say_farewell(store, saved)
    assert liveness.farewells(store) == {1: saved}
    assert not liveness.others_left(store)
