"""Names found in a package's source as `import` would find them, without running a line of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.static_names import Packages, digest, mentioned, parameters

FILES = {
    "__init__.py": "raise RuntimeError('imported')",
    "shapes/__init__.py": """
        from .round import *
        from .round import Circle as Disc
        from shapes_elsewhere import Blob
        if True:
            LIMIT: int = 3
        else:
            from .gone import LIMIT
        try:
            import fast
        except ImportError:
            fast = None
    """,
    "shapes/round.py": """
        from abc import ABC
        from ..plain import Shape

        class Circle(Shape, ABC):
            radius: float = 1.0
            def __init__(self, radius):
                super().__init__()
                self.radius, self.area = radius, 0
            async def grow(self, by, /, times=1, *more, quietly=False, **rest):
                # nothing but this
                return await self.grow(by, name="bigger")
    """,
    "plain.py": """
        from toy import shapes
        class Shape:
            def __init__(self):
                self.name = "shape"
            @property
            def size(self): return 0
    """,
}


@pytest.fixture
def toy(tmp_path: Path) -> Packages:
    for name, text in FILES.items():
        file = tmp_path / "toy" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        lines = text.splitlines()
        file.write_text("\n".join(line.removeprefix("        ") for line in lines))
    return Packages({"toy": tmp_path / "toy"})


@pytest.mark.parametrize(
    ("place", "module"),
    {
        "toy": "toy",
        "toy.shapes": "toy.shapes",
        "toy.plain:Shape.size": "toy.plain",
        "toy.shapes:Circle": "toy.shapes.round",  # through a star
        "toy.shapes:Disc": "toy.shapes.round",  # under another name
        "toy.shapes:Disc.name": "toy.plain",  # set by the base class
        "toy.shapes:Disc.area": "toy.shapes.round",
        "toy.shapes:LIMIT": "toy.shapes",
        "toy.shapes:fast": "toy.shapes",
        "toy.shapes:Blob": "toy.shapes",  # of a package that is not here
        "toy.plain:shapes.Disc": "toy.shapes.round",
    }.items(),
)
def test_a_name_is_found_where_it_is_declared(toy: Packages, place: str, module: str) -> None:
    found = toy.find(place)
    assert found is not None and found.module == module


@pytest.mark.parametrize(
    "place",
    ["toy.gone", "toy:Circle", "toy.shapes:Square", "toy.shapes:Disc.colour", "absent",
     "toy.shapes:LIMIT.real"],
)  # fmt: skip
def test_what_is_not_declared_is_not_found(toy: Packages, place: str) -> None:
    assert toy.find(place) is None


def test_a_function_tells_its_parameters_and_what_it_uses(toy: Packages) -> None:
    found = toy.find("toy.shapes:Disc.grow")
    assert found is not None
    assert parameters(found.node) == ["self", "by", "times", "more", "quietly", "rest"]
    assert {"grow", "by", "name", "bigger"} <= mentioned(found.node)
    assert "shape" not in mentioned(found.node)
    assert digest(toy.source(found)) == digest(
        "async def grow(self, by, /, times=1, *more, quietly=False, **rest):\n"
        'return await self.grow(by, name="bigger")'
    ), "comments and indentation are no difference"


def test_modules_that_import_each_other_end() -> None:
    """Through the package that both belong to, as vLLM's do."""
    vllm = Packages.installed("vllm")
    assert vllm.find("vllm.lora.layers:NoSuchLayer") is None
