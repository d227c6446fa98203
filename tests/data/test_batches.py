"""Rows that are scored and judged, and prompts: what stands where, and the shapes that are announced."""

import numpy as np
import pytest

from scir_jax.data.batches import RowGroup, SlotSpec, pad
from scir_jax.data.encode import Row
from tests.data.small_data import fits

# --- rows -------------------------------------------------------------------------------------------------------------


def test_padding():
    rows = RowGroup((3,), 4).arrays([Row((5, 6, 7), 1, 2), Row((0, 0), judged=True), Row((), 0, 0)], pad_id=9)
    assert rows.ids.tolist() == [[5, 6, 7, 9], [0, 0, 9, 9], [9, 9, 9, 9]]
    assert rows.verdict.tolist() == [0, 1, 0]
    assert all(part.dtype == np.int32 for part in rows)
    assert pad((1, 2), 2, 0).tolist() == [1, 2]
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into 2"):
        pad((1, 2, 3), 2, 0)
    with pytest.raises(ValueError, match="does not fit"):
        RowGroup((2,), 2).arrays([Row((1,)), Row((1, 2, 3))], 0)


def test_rows_of_pairs_stand_side_by_side():
    group = RowGroup((2, 2), 3)
    rows = group.arrays([Row((i,) * n, i, 1, judged=i > 2) for i, n in ((1, 1), (2, 2), (3, 3), (4, 1))], 0)
    assert group.rows == 4 and rows.ids.shape == (2, 2, 3)
    assert rows.ids[:, :, 0].tolist() == [[1, 2], [3, 4]]
    assert rows.verdict.tolist() == [[0, 0], [2, 0]]


def test_prompts_come_into_slots():
    spec = SlotSpec(slots=6, prompts=4, tokens=(3, 5), answer_tokens=5, places=10, devices=2)
    prompts = [(7, (1, 2)), None, (0, (3, 4, 5)), None]
    made = spec.arrays(3, prompts, {1: (0, 0), 4: (0, 1), 5: (0, 0)}, pad_id=9)
    assert made.ids.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5], [9, 9, 9]]
    assert made.length.tolist() == [2, 1, 3, 1] and made.index.tolist() == [7, -1, 0, -1]
    assert made.source.tolist() == [-1, 0, -1, -1, 0, 0] and made.sample.tolist() == [-1, 0, -1, -1, 1, 0]
    assert all(part.dtype == np.int32 for part in made)
    fits(spec.abstract(3), made)
    half = spec.arrays(3, prompts, {1: (0, 0), 4: (0, 1)}, 9, lambda size: np.arange(size)[size // 2 :])
    assert half.index.tolist() == [0, -1] and half.source.tolist() == [-1, 0, -1]
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into 2"):
        spec.arrays(2, prompts, {}, 9)


@pytest.mark.parametrize("group", [RowGroup((5,), 8, 3), RowGroup((5, 2), 8, verdict=True), RowGroup((1,), 1)])
def test_shapes_of_rows(group):
    rows = [Row((1,), 0, 1)] * group.rows
    made = group.arrays(rows, 0)
    fits(group.abstract(), made)
    assert made.ids.shape == (*group.leading, group.tokens) and made.verdict.shape == group.leading
