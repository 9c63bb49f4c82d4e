"""The ledger between a request and the engine's closing statistics."""

from __future__ import annotations

import pytest

from serve import turn
from serve.adapters.canary import opening_of
from serve.turn import Turn


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


def test_whom_an_answer_is_for_is_said_by_whoever_knows_best() -> None:
    named = Turn(session="s", user="u", caller="team", opening="o")
    assert named.identity == "s"
    named.session = ""
    assert named.identity == "u"
    assert Turn(caller="team", opening="a").identity != Turn(caller="team", opening="b").identity
    assert Turn(caller="team", opening="a").identity == Turn(caller="team", opening="a").identity
    assert Turn(caller="team").identity == "team"
    assert Turn().identity != Turn().identity


def test_a_conversation_that_goes_on_is_the_same_and_another_is_not() -> None:
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "hi"}]
    later = [*first, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "ok"}]
    assert opening_of({"messages": first}) == opening_of({"messages": later}) != ""
    assert opening_of({"messages": [system, {"role": "user", "content": "ho"}]}) != opening_of(
        {"messages": first}
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]
    openings = [opening_of({"messages": parts}), opening_of({"prompt": [1, 2]}),
                opening_of({"prompt": "hi"}), opening_of({"input": first})]  # fmt: skip
    assert len(set(openings)) == 4 - 1, "a prompt and a message of the same words begin alike"
    assert opening_of({}) == opening_of({"messages": []}) == opening_of({"messages": 7}) == ""
