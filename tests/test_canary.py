"""Who gets a canary: the same people every time, and only more of them as it grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.adapters.canary import share_of


@given(st.text(), st.text())
def test_a_share_is_fixed_and_in_range(alias: str, user: str) -> None:
    assert 0 <= share_of(alias, user) < 1
    assert share_of(alias, user) == share_of(alias, user)


def test_users_are_spread_evenly() -> None:
    shares = sorted(share_of("legal", f"user{n}") for n in range(10_000))
    worst = max(abs(share - place / 10_000) for place, share in enumerate(shares))
    assert worst < 0.02  # Kolmogorov-Smirnov at p = 0.0007


def test_another_alias_tries_out_other_users() -> None:
    users = [f"user{n}" for n in range(2000)]
    first = {user for user in users if share_of("legal", user) < 0.1}
    second = {user for user in users if share_of("chat", user) < 0.1}
    assert len(first & second) < len(first) / 2


def test_alias_and_user_do_not_run_together() -> None:
    assert share_of("ab", "c") != share_of("a", "bc")
