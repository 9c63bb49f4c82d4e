"""What an alias may be called, what the base is called, and how a version is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.adapters import names
from serve.errors import BadRequest
from serve.settings import Settings

DIGEST = "0123456789ab" + "c" * 52


@pytest.mark.parametrize(
    "alias",
    ["", ".", "..", "a/..", "../a", "a/../b", "a/./b", "/a", "a/", "a//b", "a@b", "a b", "a/canary",
     "x" * 201, "ä", "base", "none", "gone"],
)  # fmt: skip
def test_what_no_alias_can_be_is_named(alias: str) -> None:
    assert names.fault(alias, ["base"])
    with pytest.raises(BadRequest) as refusal:
        names.check(alias, ["base"])
    assert refusal.value.param == "alias"


@pytest.mark.parametrize("alias", ["legal", "team/legal-v2", "a.b", "...", "a/.b", "canary/x"])
def test_names_with_slashes_and_dots_are_taken(alias: str) -> None:
    assert names.fault(alias, ["base"]) is None


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, ("folder",)),
        ({"model_name": "mine"}, ("mine",)),
        ({"vllm_flags": ("--served-model-name", "a", "b_c", "--seed", "1")}, ("a", "b_c")),
        ({"vllm_flags": ("--served_model_name=a_b", "--seed", "1")}, ("a_b",)),
        ({"model_name": "mine", "vllm_flags": ("--seed", "1")}, ("mine",)),
    ],
)
def test_the_base_has_the_names_that_vllm_gives_it(
    tmp_path: Path, chosen: dict[str, object], found: tuple[str, ...]
) -> None:
    settings = Settings.model_validate({"artifact": tmp_path / "folder", **chosen})
    assert names.base_names(settings) == found


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (f"team/legal@{DIGEST[:12]}", ("team/legal", DIGEST[:12])),
        (f"legal@{DIGEST}", ("legal", DIGEST)),
        (f"legal@{DIGEST[:11]}", None),
        (f"legal@{DIGEST}0", None),
        ("legal@0123456789AB", None),
        ("legal@latest", None),
        (f"a@b@{DIGEST[:12]}", None),
        (f"@{DIGEST[:12]}", None),
        ("legal", None),
    ],
)
def test_a_version_is_asked_for_by_twelve_digits_or_more(
    model: str, found: tuple[str, str] | None
) -> None:
    assert names.asked(model) == (found or (model, ""))
