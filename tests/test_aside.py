"""`solver.aside`: tensors that wait in a file, and come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.errors import SpaceError
from quant.solver import aside
from quant.solver.aside import Holdings, Kept, Shelf
from tests.test_checkpoint import no_file_larger_than

LINEAR = nn.Linear(64, 64).requires_grad_(requires_grad=False)


@pytest.fixture(autouse=True)
def everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "_LEAST", 0)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with aside.shelf(tmp_path) as made:
        yield made
    assert not list(tmp_path.iterdir())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forward(hidden: Tensor) -> tuple[Tensor, ...]:
    """What code of any kind may hold: its input, views of what nobody else has, a bool mask."""
    normed = functional.layer_norm(hidden, (64,))
    turned = normed.view(-1, 64).T
    out = hidden + LINEAR(turned.T).view_as(hidden)
    return hidden, turned, out, out > 0, out[0, 1:]


def held_bytes(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def test_what_a_forward_holds_leaves_memory_and_comes_back(shelf: Shelf) -> None:
    given = drawn(2, 8, 64)
    expected = forward(given)
    weight = LINEAR.weight.clone()
    with Holdings(shelf) as holdings:
        found = forward(given.clone())
        for _ in range(2):
            with holdings.aside():
                assert held_bytes(found) == [0] * len(found)
                assert torch.equal(LINEAR.weight, weight) and torch.equal(given, expected[0])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        after = found[2] * 2
        with holdings.aside():
            assert held_bytes((after,)) == [0]
    assert torch.equal(after, expected[2] * 2)


def test_what_is_dropped_is_not_written(shelf: Shelf, tmp_path: Path) -> None:
    with Holdings(shelf) as holdings:
        kept = drawn(10) + 1
        forward(drawn(2, 8, 64))
        with holdings.aside():
            assert shelf._end == kept.nbytes == kept.numel() * 4


def test_others_can_look_at_what_lies_there(shelf: Shelf) -> None:
    expected = forward(drawn(2, 8, 64))
    with Holdings(shelf) as holdings:
        found = forward(drawn(2, 8, 64))
        for place in (0, 1):
            assert shelf.shown(found[place]) is found[place]
        with holdings.aside():
            shown = [shelf.shown(tensor) for tensor in found]
    for ours, theirs in zip(shown, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    shown[2].zero_()
    assert torch.equal(found[2], expected[2])


def test_the_file_grows_only_by_what_lies_there_at_once(shelf: Shelf) -> None:
    with Holdings(shelf) as holdings:
        found = forward(drawn(2, 8, 64))
        ends = []
        for _ in range(3):
            with holdings.aside():
                ends.append(shelf._end)
        assert ends[0] > 0 and len(set(ends)) == 1
    assert found[0].untyped_storage().nbytes() > 0


def test_what_is_kept_is_read_anew_and_leaves_its_place_to_others(shelf: Shelf) -> None:
    states = drawn(3, 4)
    kept = Kept(states.T, shelf)
    assert torch.equal(kept.tensor(), states.T)
    kept.tensor().zero_()
    assert torch.equal(kept.tensor(), states.T)
    end = shelf._end
    kept = Kept(states + 1, shelf)
    kept = Kept(states + 2, shelf)
    assert torch.equal(kept.tensor(), states + 2)
    assert shelf._end == 2 * end  # the first one's place was free when the third came


def test_what_the_host_holds_lies_in_no_folder(tmp_path: Path) -> None:
    with aside.hosted() as shelf:
        kept = Kept(drawn(3, 4), shelf)
        link = Path(f"/proc/self/fd/{shelf._file}").readlink()
        assert link.is_relative_to("/memfd:activations (deleted)") and shelf._end == 48
        assert torch.equal(kept.tensor(), drawn(3, 4))


def test_without_a_shelf_it_stays_what_it_was() -> None:
    states = drawn(3, 4)
    assert Kept(states, None).tensor() is states


def test_a_full_disk_is_said_and_loses_nothing(shelf: Shelf, tmp_path: Path) -> None:
    with Holdings(shelf) as holdings, no_file_larger_than(1000):
        found = drawn(1000) + 1
        reason = rf"{tmp_path} cannot hold activations"
        with pytest.raises(SpaceError, match=reason), holdings.aside():
            pytest.fail("it does not fit")
    assert torch.equal(found, drawn(1000) + 1)
