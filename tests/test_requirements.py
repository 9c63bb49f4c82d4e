"""The pinned versions against what the pinned packages ask of each other."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).parent.parent / "requirements"


def pins(name: str) -> dict[str, Version]:
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    stated = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, _, version in stated}


FILES = {name: pins(name) for name in ("cpu.txt", "stores.txt", "dev.txt")}


def test_a_package_is_pinned_once() -> None:
    names = [package for packages in FILES.values() for package in packages]
    assert len(names) == len(set(names))


def needs(package: str, extra: str = "") -> list[Requirement]:
    """What an installed package asks for, with or without an extra of its own."""
    asked = map(Requirement, requires(package) or ())
    return [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("package", FILES["stores.txt"])
def test_the_drivers_of_all_object_stores_live_beside_each_other(package: str) -> None:
    have = FILES["cpu.txt"] | FILES["stores.txt"]
    for asked in needs(package):
        found = have.get(canonicalize_name(asked.name))
        assert found is not None, f"{package} needs {asked}, which is not pinned"
        assert asked.specifier.contains(found, prereleases=True), f"{package} needs {asked}"
