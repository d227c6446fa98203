"""What stages wrote is recorded, and what was changed since is named."""

import json

import numpy as np
import pytest

from scir_jax.errors import InputError
from scir_jax.run.ledger import Ledger

FILES = {
    "data.json": '{"prompts": {"rows": 3}}\n',
    "metrics.jsonl": '{"step": 1, "loss": 0.69}\n{"step": 2, "loss": 0.68}\n',
    "iteration_01/responses.jsonl": '{"prompt": "x", "response": "y"}\n' * 3,
    "iteration_01/pairs.jsonl": '{"label": 1}\n{"label": 0}\n',
    "iteration_02/responses.jsonl": '{"prompt": "x", "response": "z"}\n' * 3,
}


@pytest.fixture
def run(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    Ledger(tmp_path).record(FILES)
    return tmp_path


def test_unchanged_files_and_longer_metrics_are_taken(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.67}\n')
    (run / "iteration_02/responses.jsonl").unlink()  # a stage that is to be done again
    assert Ledger(run).verify() == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["flip", "cut", "lost line", "longer"])
def test_a_changed_file_is_named(run, name, kind):
    content = bytearray((run / name).read_bytes())
    if kind == "flip":
        content[np.random.default_rng(0).integers(len(content))] ^= 4
    elif kind == "cut":
        content = content[:-3]
    elif kind == "lost line":
        content = b"\n".join(content.split(b"\n")[1:])
    elif name == "metrics.jsonl":
        pytest.skip("it grows")
    else:
        content += b"{}\n"
    (run / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Ledger(run).verify()
    assert str(error.value).startswith(
        f"{run / name}: is not what files.json says"
    ) and f"--run.accept_replaced '[{name}]'" in str(error.value)
    # On purpose it is taken, once for all.
    assert Ledger(run).verify([name]) == [f"{run / name}: was replaced, and is taken as it is"]
    assert Ledger(run).verify() == []


def test_files_of_two_iterations_are_not_exchanged_unseen(run):
    one, two = (run / f"iteration_0{t}/responses.jsonl" for t in (1, 2))
    one.rename(run / "aside")
    two.rename(one)
    (run / "aside").rename(two)
    with pytest.raises(InputError, match="iteration_01/responses.jsonl: is not what files.json says"):
        Ledger(run).verify()


def test_what_the_user_puts_there_is_taken_with_a_sentence(run):
    name = "iteration_02/pairs.jsonl"
    (run / name).write_text("{}\n")
    assert Ledger(run).verify() == [
        f"{run / name}: has no record (it was put there, or the run was stopped just then); it is taken as it is"
    ]
    assert Ledger(run).verify() == []
    (run / name).write_text('{"label": 1}\n')
    assert Ledger(run).verify(editable=[name]) == [f"{run / name}: was replaced, and is taken as it is"]


def test_names_that_are_no_stages_files(run):
    with pytest.raises(
        InputError, match=r"run.accept_replaced: .*pairs.json is no file that a stage wrote; such files"
    ):
        Ledger(run).verify(["iteration_01/pairs.json"])


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({name: 3 for name in FILES}), '{"data.json": {"bytes": 2}}'])
def test_a_broken_ledger_is_named(run, text):
    (run / "files.json").write_text(text)
    with pytest.raises(InputError, match=r"files.json: was changed since it was written .*; restore it"):
        Ledger(run).verify()
