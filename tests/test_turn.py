"""Whom an answer is for, and under which id it goes."""

from __future__ import annotations

from serve.adapters.canary import opening_of
from serve.turn import ID_LENGTH, Turn, tidy_id


def test_a_request_has_an_id_of_its_own_unless_the_client_gave_one() -> None:
    assert Turn().request_id and Turn().id != Turn().id
    made = Turn()
    assert made.request_id == made.id


def test_a_clients_id_is_taken_as_far_as_it_may_stand_in_a_log() -> None:
    assert tidy_id("3f2a-77:b/c=d@e+f.g_h") == "3f2a-77:b/c=d@e+f.g_h"
    assert tidy_id("a b\r\nc\x1b[31m\u00e9{}\"'") == "abc31m"
    assert len(tidy_id("x" * 100_000)) == ID_LENGTH
    assert tidy_id("") == tidy_id(None) == tidy_id(" \t") == ""


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
