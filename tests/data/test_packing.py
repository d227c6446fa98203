"""Where rows lie: nothing lost, nothing twice, few shapes, the least that brute force finds, little padding."""

import itertools

import numpy as np
import pytest

from scir_jax.data.packing import LENGTHS, SHAPES, Packing, RowSize, Shape, best_fit, coarse, deal, rungs


def items_of(rng, count):
    """Pairs of log-normal prompts and answers, each with its answers' rows and a judge's."""

    def tokens(mean, sigma, most):
        return int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 8, most))

    found = []
    for _ in range(count):
        x, a, b = tokens(180, 0.7, 1536), tokens(300, 0.75, 1024), tokens(300, 0.75, 1024)
        answers = (RowSize(0, x + y, y, answers=1) for y in (a, b))
        found.append((*answers, *[RowSize(1, x + a + b + 60, verdicts=1)] * 2))
    return found


def total(rows):
    return sum(row.tokens for row in rows)


@pytest.mark.parametrize("devices, micro", [(1, 1), (4, 1), (1, 4), (8, 2), (16, 2)])
def test_a_step_is_dealt_out_evenly(devices, micro):
    rng = np.random.default_rng(0)
    items = [*items_of(rng, 32), *(item[:1] for item in items_of(rng, 10))]
    dealt = deal(items, 32, devices, micro)
    assert [len(numbers) for numbers in dealt.pairs] == [32 // micro] * micro
    assert sorted(sum(dealt.pairs, [])) == list(range(32))
    everything = sorted((i, r) for i, item in enumerate(items) for r in range(len(item)))
    assert sorted(sum(dealt.cells, [])) == everything and len(dealt.cells) == devices * micro
    for cell, numbers in enumerate(dealt.cells):
        assert all(i in dealt.pairs[cell % micro] for i, _ in numbers if i < 32), "in its pair's micro-batch"
    loads = [sum(items[i][r].tokens for i, r in numbers) for numbers in dealt.cells]
    longest = max(row.tokens for item in items for row in item)
    assert max(loads) <= max(1.1 * np.mean(loads), longest), "no cell has much more than another"


def test_padding_is_dealt_out_too():
    assert deal([()] * 4, 4, 1, 2) == ([[0, 1], [2, 3]], [[], []])


def test_best_fit():
    assert best_fit([3, 5, 2, 5], 8) == [(0, 5), (0, 0), (1, 5), (1, 0)]
    assert best_fit([], 8) == []
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into a bin of 8"):
        best_fit([1, 9], 8)
    rng = np.random.default_rng(1)
    for _ in range(50):
        tokens = rng.integers(1, 100, rng.integers(1, 40)).tolist()
        taken = np.zeros((len(tokens), 100), int)
        for length, (number, offset) in zip(tokens, best_fit(tokens, 100), strict=True):
            assert offset + length <= 100
            taken[number, offset : offset + length] += 1
        assert taken.max() == 1 and taken.sum() == sum(tokens)
        used = int(taken.any(axis=1).sum())
        assert used <= 1.23 * max(sum(tokens) / 100, 1) + 1, "best fit decreasing needs at most 11/9 of the bins"


@pytest.mark.parametrize("seed", range(8))
def test_rungs_are_the_best(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, rng.integers(1, 9)).tolist()

    def cost(chosen):
        return sum(min(rung for rung in chosen if rung >= size) for size in sizes)

    for most in (1, 2, 3):
        found = rungs(sizes, most)
        assert len(found) <= most and found == sorted(set(found)) and found[-1] == max(sizes)
        values = sorted(set(sizes))[:-1]
        subsets = (c for n in range(most) for c in itertools.combinations(values, n))
        assert cost(found) == min(cost([*subset, max(sizes)]) for subset in subsets)


def test_coarse_sizes():
    assert [coarse(n) for n in (1, 8, 9, 256, 257, 4096, 4097, 10_000)] == [8, 8, 16, 256, 384, 4096, 4224, 10_240]
    sizes = np.arange(300, 100_000, 37)
    assert max(coarse(int(n)) / n for n in sizes if n > 4096) < 1.035


def placed(packing, shape, rows):
    """Asserts that no two rows lie on each other -> the tokens that lie there."""
    taken = [np.zeros(group, int) for group in shape.groups]
    for row, place in zip(rows, packing.places(shape, rows), strict=True):
        taken[place.group][place.bin, place.offset : place.offset + row.tokens] += 1
        assert place.offset + row.tokens <= shape.groups[place.group][1]
        assert packing.kind == "bins" or place.offset == 0
    assert max(part.max() for part in taken) <= 1
    return sum(part.sum() for part in taken)


KINDS = {"one bin": ("bins", 2**20), "bins": ("bins", 4096), "lengths": ("lengths", 0)}
LEAST = {"one bin": 0.92, "bins": 0.85, "lengths": 0.55}


@pytest.mark.parametrize("cells", [1, 8])
@pytest.mark.parametrize("name", KINDS)
def test_a_stage_fits_into_few_shapes(name, cells):
    """And little of them is padding: 32 rows a cell and more, of lengths as real data have them."""
    rng, (kind, size) = np.random.default_rng(2), KINDS[name]
    steps = []
    for number in range(40):
        pairs = items_of(rng, 8 * cells)
        if not number:
            pairs[4 * cells :] = [()] * (4 * cells)
        steps.append([[pairs[i][r] for i, r in cell] for cell in deal(pairs, len(pairs), cells, 1).cells])
    packing = Packing.of(kind, steps, Shape((), 1), size)
    assert len(packing.shapes) <= SHAPES
    real = computed = 0
    for step in steps:
        shape = packing.shape(step)
        assert shape in packing.shapes and (kind == "bins" or len(shape.groups) <= LENGTHS)
        for cell in step:
            assert placed(packing, shape, cell) == total(cell)
            assert sum(row.scored for row in cell) <= shape.scored
            assert sum(row.answers for row in cell) <= shape.answers
            assert sum(row.verdicts for row in cell) <= shape.verdicts
            real += total(cell)
        computed += cells * shape.tokens
    assert real / computed > LEAST[name]


@pytest.mark.parametrize("seed", range(6))
def test_every_step_finds_a_shape_that_holds_it(seed):
    """Of odd rows too, which need more bins than their tokens say, and of which one scores much and another nothing."""
    rng = np.random.default_rng(seed)

    def cell():
        rows = rng.choice([8, 40, 51, 60, 99], rng.integers(0, 12))
        return [RowSize(0, int(n), int(n) * int(rng.integers(2)), int(n % 2), int(n % 3)) for n in rows]

    steps = [[cell() for _ in range(2)] for _ in range(60)]
    for kind in ("bins", "lengths"):
        packing = Packing.of(kind, steps, Shape((), 1), 100)
        for step in steps:
            shape = packing.shape(step)
            for rows in step:
                counts = (
                    sum(row.scored for row in rows),
                    sum(row.answers for row in rows),
                    sum(r.verdicts for r in rows),
                )
                assert all(count <= most for count, most in zip(counts, shape[1:], strict=True))
                assert not rows or placed(packing, shape, rows) == total(rows)


def test_a_row_that_is_longer_than_a_bin_has_no_place():
    with pytest.raises(ValueError, match="a row of 101 tokens does not fit into a bin of 100"):
        Packing.of("bins", [[[RowSize(0, 101)]]], Shape((), 1), 100)


def test_unpacked_rows_lie_with_their_kind():
    shape = Shape(((2, 10), (2, 20)), 8)
    packing = Packing.of("off", [], shape)
    rows = [RowSize(0, 3), RowSize(0, 4), RowSize(1, 5), RowSize(1, 20)]
    assert packing.shapes == (shape,) and packing.shape([rows]) == shape
    assert [tuple(place) for place in packing.places(shape, rows)] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit"):
        packing.places(shape, [RowSize(0, 11)])
