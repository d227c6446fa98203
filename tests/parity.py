"""Prints how far every family and feature is from transformers, in float32: python -m tests.parity"""

import sys
import tempfile
from pathlib import Path

from tests import families

COLUMNS = ("forward", "cached decoding", "export")


def measure(case: families.Case) -> tuple[float, ...]:
    """The largest absolute difference of a logit, a column each."""
    with tempfile.TemporaryDirectory() as directory:
        imported = families.import_case(case, Path(directory) / "theirs")
        return (
            families.forward_difference(imported),
            families.decoding_difference(imported),
            families.export_difference(imported, Path(directory) / "ours"),
        )


def table(rows: dict[families.Case, tuple[float, ...]]) -> str:
    """A Markdown table, a line a case."""
    cells = [("family", "feature", *COLUMNS)]
    cells += [(case.family, case.feature, *(f"{x:.1e}" for x in row)) for case, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells)


def main() -> int:
    """1 where a difference is beyond the tests' tolerance, else 0."""
    rows = {case: measure(case) for case in families.CASES}
    print(table(rows))
    return int(any(x > families.TOLERANCE for row in rows.values() for x in row))


if __name__ == "__main__":
    sys.exit(main())
