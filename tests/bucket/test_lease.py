"""One process writes a run in a bucket at a time."""

import json
import os
import subprocess
import sys
import time

import pytest

from scir_jax.bucket import lease as module
from scir_jax.bucket.lease import NAME, Lease
from scir_jax.errors import UNAVAILABLE, InputError
from tests.forks import ROOT

HOLD = """
import sys, time
from scir_jax.bucket.lease import Lease
from scir_jax.bucket.objects import Folder
lease = Lease(Folder(sys.argv[1]), float(sys.argv[2]))
lease.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(folder):
    """hold(seconds) -> a process that has the lease."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, folder.url, str(seconds)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
        )
        started.append(process)
        assert process.stdout.readline() == "held\n", process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def elsewhere(process: int = 1) -> bytes:
    return json.dumps({"host": "elsewhere", "process": process, "boot": "another", "processes": "x"}).encode()


def test_a_lease_is_taken_kept_and_given_up(folder):
    lease = Lease(folder, 6.0)  # a process that stands still for two thirds of it ends
    lease.acquire()
    before = folder.read_generation(NAME)[1]
    time.sleep(1.5)
    assert folder.read_generation(NAME)[1] != before, "it is renewed"
    lease.check()
    lease.release()
    assert folder.read(NAME) is None


def test_a_second_process_is_refused(folder, hold):
    hold(5.0)
    said = []
    with pytest.raises(InputError, match=f"^{folder.url}: process [0-9]+ on .* is running here; wait for it or choose"):
        Lease(folder, 5.0).acquire(said.append)
    assert len(said) == 1 and "has a lease on it; if that process is gone, the run goes on here in 5 s" in said[0]


def test_of_two_that_find_it_free_one_has_it(folder, monkeypatch):
    real, first = folder.write, Lease(folder, 30.0)

    def late(name, content, generation):
        monkeypatch.setattr(folder, "write", real)
        first.acquire()
        return real(name, content, generation)

    monkeypatch.setattr(folder, "write", late)
    with pytest.raises(InputError, match="another process took it just now"):
        Lease(folder, 30.0).acquire()
    first.release()


def test_what_stood_unchanged_is_taken_over(folder):
    folder.write(NAME, elsewhere())
    lease, started = Lease(folder, 3.0), time.monotonic()
    lease.acquire()
    assert time.monotonic() - started >= 3.0
    lease.release()


def test_the_lease_of_a_process_that_is_gone_is_free_at_once(folder, hold):
    process = hold(60.0)
    process.kill()
    process.wait()
    lease, started = Lease(folder, 60.0), time.monotonic()
    lease.acquire()
    assert time.monotonic() - started < 20
    lease.release()
    assert module._holder_is_gone(json.dumps({**module._machine(), "process": os.getpid()}).encode()) is False
    assert module._holder_is_gone(elsewhere()) is False and module._holder_is_gone(b"no json") is False


def test_who_lost_the_lease_ends_before_it_writes_more(folder, hold):
    process = hold(1.2)
    folder.write(NAME, elsewhere())
    assert process.wait(20) == UNAVAILABLE
    assert f"error: {folder.url}: the lease on it is lost (another process has it now)" in process.stderr.read()
    assert folder.read(NAME) == elsewhere(), "it is left to who has it"


def test_who_cannot_renew_it_ends_before_others_may_take_it(folder, hold, bucket):
    process = hold(6.0)
    bucket.faults(deny_at=1)
    started = time.monotonic()
    assert process.wait(20) == UNAVAILABLE and time.monotonic() - started < 6.0
    assert "the lease on it is lost (it could not be renewed in time)" in process.stderr.read()
