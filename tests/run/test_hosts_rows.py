"""Rows of batches and of files that several hosts hold."""

import itertools
import json
from pathlib import Path

import pytest

from scir_jax.data.jsonl import AppendOnly
from scir_jax.run import sampling
from tests.hosts import run_hosts
from tests.run.runs import lines

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


@pytest.mark.slow
def test_rows_of_hosts():
    """Of four hosts with two devices each: what they hold, what of it is theirs alone, and that it becomes a batch."""
    done = run_hosts(f"MESHES = {MESHES}\n{ROWS}", 4, forked=True)
    assert all(one.code == 0 and "Traceback" not in one.err and "error" not in one.err for one in done), done
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
    """Whole prompts of what hosts wrote, however many there were, each row once; torn lines and half prompts go."""
    path, responses = tmp_path / "responses.jsonl", 2
    place = {number: i for i, number in enumerate((7, 3, 9, 1, 5, 8, 2, 6, 0, 4))}
    numbers = list(place)
    rows = [{"prompt_number": n, "sample": s, "response": f"{n}.{s}"} for n in place for s in range(responses)]

    def gathered(*parts) -> tuple[list, list]:
        for old in tmp_path.iterdir():
            old.unlink()
        for host, content in enumerate(parts):
            part(tmp_path / f"responses.jsonl.partial{f'-{host}' if host else ''}", content)
        done = sampling._gather_parts(path, place, responses)
        left = list(tmp_path.iterdir())
        assert left in ([], [tmp_path / "responses.jsonl.partial"])
        return done, lines(left[0]) if left else []

    one, two, three = rows[:8], rows[8:16], rows[16:]
    assert gathered() == ([], [])
    assert gathered(rows) == gathered(rows[::-1]) == (numbers, rows)
    assert gathered(rows[::2], rows[1::2]) == (numbers, rows)
    assert gathered(one[:4] + two[:4], one[4:] + two[4:], three) == (numbers, rows)
    assert gathered(one + two[:4], two[4:7]) == (numbers[:7], one + two[:6]), "the eighth prompt is not whole"
    assert gathered([], two) == (numbers[4:8], two), "the first host wrote nothing"
    assert gathered(one[:1], two[1:]) == (numbers[5:8], two[2:])
    # Ended after the rows of the others were taken over, before their files were removed.
    assert gathered(one + two, one[4:] + two[4:]) == (numbers[:8], one + two)
    assert gathered(one, one[4:]) == (numbers[:4], one)
    part(tmp_path / "responses.jsonl.partial-2", two)
    with (tmp_path / "responses.jsonl.partial-2").open("a") as file:
        file.write('{"prompt_number": 0, "sam')
    assert sampling._gather_parts(path, place, responses) == numbers[:8]
    assert AppendOnly(tmp_path / "responses.jsonl.partial").rows() == one + two
