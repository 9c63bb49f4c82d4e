"""Who asks for a model that is not here learns which are."""

from __future__ import annotations

import pytest

from serve.unknown_model import COMPARED, SHOWN, unknown_model


def test_the_nearest_come_first() -> None:
    told = str(unknown_model("Pirat", ["base", "legal", "pirate", "team/pirate"]))
    assert told.startswith("the model 'Pirat' does not exist; expected one of pirate, team/pirate")
    assert "base" in told and "legal" in told and "more" not in told


def test_a_long_list_is_cut_and_says_where_the_rest_is() -> None:
    names = [f"adapter-{number}" for number in range(25)]
    told = str(unknown_model("adapter-7x", names))
    assert "expected one of adapter-7," in told and told.count("adapter-") == SHOWN + 1
    assert told.endswith("and 15 more, listed at /v1/models")


@pytest.mark.parametrize("asked", ["m" * 2_000_000, "\n\x00", "\ud800", 7, None, ["x"]])
def test_whatever_was_asked_for_the_answer_is_short_and_one_line(asked: object) -> None:
    names = ["base", *(f"{'long' * 45}-{number}" for number in range(2 * COMPARED))]
    fault = unknown_model(asked, names)
    told = str(fault)
    assert len(told) < 3000 and "\n" not in told and told.encode()
    assert (fault.status, fault.code, fault.param) == (404, "model_not_found", "model")
