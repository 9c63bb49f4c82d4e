"""Families of models in vLLM: each says what its artifact's weights say.

One of every way in which they differ from another; `python -m bench.families` has all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import families as bench
from tests.engine import Engines, engines
from tests.families import FAMILIES

pytestmark = [pytest.mark.e2e, pytest.mark.arithmetic]

CHOSEN = {
    "cohere2": "parallel blocks, a norm without bias, windows, rotation in some layers",
    "deepseek_v3": "latent attention, shared experts, dense first blocks",
    "falcon": "one head of keys, no adapters",
    "gemma2": "1 + w norms around each part, soft caps",
    "glm": "gate and up fused in the files, a part of each head rotated; transformers' code",
    "glm4": "the same in vLLM's own code, which looks for the parts",
    "gpt_neox": "fused queries by head, LayerNorm with bias; blocks in another place",
    "olmo2": "norms behind the layers; transformers' code",
    "olmoe": "experts",
    "opt": "learned positions, no gate",
    "phi3": "everything fused in the files",
    "stablelm": "fused by vLLM without a word of it; no adapters",
}
LIMITS = {"w4a16": 0.005, "w8a8": 0.3}  # nats; rounded inputs tip, a wrong layer shows as 1


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with engines(tmp_path_factory.mktemp("engines") / "log") as found:
        yield found


@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_is_served_as_its_weights_say(family: str, warm: Engines, tmp_path: Path) -> None:
    row = bench.measure(family, warm, tmp_path, models=tuple(LIMITS))
    assert not row.faults
    assert row.w4a16 is not None and row.w4a16 < LIMITS["w4a16"]
    assert row.w8a8 is not None and row.w8a8 < LIMITS["w8a8"]


def test_readme_has_what_was_found_of_every_family() -> None:
    found = bench.kept()
    assert [row.family for row in found.rows] == list(FAMILIES)
    for row in found.rows:
        assert row.parent is not None and row.parent < LIMITS["w4a16"], row
        assert row.w4a16 is not None and row.w4a16 < LIMITS["w4a16"], row
        assert row.w8a8 is not None and row.w8a8 < LIMITS["w8a8"], row
    assert "\n".join(bench.table(found)) in bench.README.read_text()
