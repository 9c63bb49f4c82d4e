"""The ledger between a request and the engine's closing statistics."""

from __future__ import annotations

import pytest

from serve import turn


def test_a_request_is_settled_once() -> None:
    ledger = turn.Ledger()
    ledger.note("chatcmpl-1", "legal")
    assert ledger.settle("chatcmpl-1") == "legal"
    assert ledger.settle("chatcmpl-1") is None and ledger.settle(None) is None


def test_it_forgets_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "REMEMBERED", 2)
    ledger = turn.Ledger()
    for number in range(3):
        ledger.note(f"r{number}", "a")
    assert ledger.settle("r0") is None and ledger.settle("r2") == "a"
