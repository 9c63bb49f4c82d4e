"""`bench.budget`: a mixture is held against the line between its uniform neighbours."""

from __future__ import annotations

import pytest

from bench import budget
from bench.budget import Point
from tests.test_rivals import row


def point(name: str, bits: float, kl: float) -> Point:
    found = row(name, kl).found
    assert found is not None
    return Point(name, bits, 1.0, found)


def test_a_mixture_stands_beside_the_line_between_its_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = [point("g64", 4.25, 0.05), point("g32", 4.5, 0.04)]
    points += [point("mixed-4.375", 4.375, 0.0405), point("mixed-5", 5.0, 0.02)]
    budget._table(points)
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["| mixed-4.375"].endswith("| 0.0450 | 0.90 |")
    assert lines["| mixed-5"].endswith("|  |  |"), "there is no line beyond the neighbours"
    assert lines["| g64"].endswith("|  |  |")
