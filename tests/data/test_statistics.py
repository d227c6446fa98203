"""The table of data files in tokens."""

import io

from rich.console import Console

from scir_jax.data import statistics
from scir_jax.data.statistics import FileStatistics
from scir_jax.data.tally import Tally


def shown(files):
    out = io.StringIO()
    Console(file=out, width=100).print(statistics.table(files))
    return out.getvalue()


def test_the_table_fits_into_100_columns():
    tally = Tally("x")
    tally.rows = tally.used = 1_234_567
    prompts = [1024] * 60 + [4096] * 35 + [12_345] * 5 + [123_456]
    answers = [1000] * 60 + [2000] * 35 + [4096] * 5 + [65_432]
    big = FileStatistics(tally, prompts, answers, 1, 101, [5000, 8000], 16_384)
    none = FileStatistics(tally, [7], [], 0, 0, [7], 0)
    text = shown({"heldout_prompts": big, "prompts": none})
    assert max(map(len, text.splitlines())) <= 100
    cells = [line.split() for line in text.splitlines() if line.split()[:1] in (["heldout_prompts"], ["prompts"])]
    assert " ".join(cells[0]) == (
        "heldout_prompts 1234567 1234567 1024/4096/12345/123456 1 % 1000/2000/4096/65432 100 % 16384 61 %"
    )
    assert cells[1] == ["prompts", "1234567", "1234567", "7/7/7/7", "0", "%", "-", "-", "-", "-"]
    assert "…" not in text


def test_a_share_above_nothing_is_not_0_percent():
    shares = {0.0: "0 %", 1e-4: "1 %", 0.01: "1 %", 0.011: "2 %", 1.0: "100 %", None: "-"}
    assert {share: statistics._percent(share) for share in shares} == shares
