"""Holds the tree to its own rules: import edges, one door per outside thing, the size ratchet.

Reads the source with `ast`, except where a fresh interpreter shows what an import really loads.
The numbers may only be tightened.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("quant", "serve")
EVERYTHING = (*PRODUCT, "tests", "bench")

FUNCTION_P90, FUNCTION_MAX, FILE_MAX = 25, 40, 450
LOOSE_FUNCTION_MAX, LOOSE_FILE_MAX = 60, 500  # tests and benches tell a story from top to bottom
REPEATED_LINES = 8  # so many equal lines in two places are one function that was not written

BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "base", "manager", "misc"}

# vLLM 0.x moves its modules; every place that knows one is named here.
VLLM_DOORS = {
    "worker", "vllm_compat", "vllm_tools", "lora_cpu", "cpu_ops", "endpoints", "incoming", "stats",
    "tryout",
}  # fmt: skip
# Standard library and pydantic only.
LIGHT = (
    "quant.artifact", "quant.durable", "quant.errors", "quant.extras", "quant.foreign_json",
    "quant.interrupt", "quant.lora.adapter", "quant.lora.cell", "quant.lora.fitting",
    "quant.lora.folder", "quant.lora.served", "quant.lora.soft_prompt", "quant.lora.voice",
)  # fmt: skip
# The command line is one for both halves, and doctor says what both will do.
COMMANDS = ("quant.cli", "quant.usage")
BESIDE = {
    "serve.doctor_look": ("quant.room",),
    "serve.doctor_probe": ("quant.solver.devices",),
}
MATHS = (
    "quant.solver.budget", "quant.solver.columns", "quant.solver.descent",
    "quant.solver.gptq", "quant.solver.grid", "quant.solver.int8", "quant.solver.lowrank",
    "quant.solver.moments", "quant.solver.tiles", "quant.lora.combine",
    "quant.lora.nf4", "quant.packing",
)  # fmt: skip
MATHS_MAY_IMPORT = {
    "__future__", "collections", "contextlib", "dataclasses", "importlib", "math", "numba", "numpy",
    "torch", "triton", "typing",
}  # fmt: skip
PICKLERS = (
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "torch.distributed.checkpoint",  # its reader unpickles what it finds
)  # fmt: skip
UNPICKLER = "quant.intake.unpickle"
NETS = ["quant.cli", "serve.bodies"]
UNSAFE_CALLS = {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load"}


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    line: int


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file: where it is, its text and its tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def sources(*tops: str) -> list[Source]:
    files = sorted(file for top in tops for file in (ROOT / top).rglob("*.py"))
    texts = [(file, file.read_text(encoding="utf-8")) for file in files]
    return [Source(file, text, ast.parse(text, str(file))) for file, text in texts]


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file, `from a import b` as both `a` and `a.b`: b may be a module."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.at(node.lineno)}: imports are absolute"
            module = node.module or ""
            yield Import(module, node.lineno)
            yield from (Import(f"{module}.{alias.name}", node.lineno) for alias in node.names)


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last one, without what only states a contract.

    That is the docstring, and the signature of a command: there it is the table of its options.
    """
    end = function.end_lineno or function.lineno
    first = function.body[0]
    described = ast.get_docstring(function, clean=False) is not None
    calls = [d.func for d in function.decorator_list if isinstance(d, ast.Call)]
    command = any(dotted(call).endswith(".command") for call in calls)
    start = first.lineno - 1 if command else function.lineno
    return end - start + 1 - (((first.end_lineno or 0) - first.lineno + 1) * described)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or an empty string when it is not one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def under(module: str, *tops: str) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in tops)


def is_module(name: str) -> bool:
    """Of ours, and a file: the packages themselves hold no code."""
    return ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()


def loaded_by(module: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter after importing one module."""
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"import {module} failed:\n{done.stderr}"
    return {line.partition(".")[0] for line in done.stdout.splitlines()}


def test_quant_never_imports_serve() -> None:
    wrong = [s.at(i.line) for s in sources("quant") for i in imports(s) if under(i.module, "serve")]
    assert not wrong, f"quant imports serve at {wrong}"


def test_serve_sees_only_the_light_half_of_quant() -> None:
    wrong = []
    for source in sources("serve"):
        commands = source.name == "serve.variables" or source.name.endswith("cli")
        doors = (*LIGHT, *COMMANDS) if commands else (*LIGHT, *BESIDE.get(source.name, ()))
        for found in imports(source):
            if (
                under(found.module, "quant")
                and is_module(found.module)
                and found.module not in doors
            ):
                wrong.append(f"{source.at(found.line)} {found.module}")
    assert not wrong, f"serve imports more of quant than {LIGHT}: {wrong}"


def test_vllm_has_few_doors() -> None:
    wrong = [
        source.at(found.line)
        for source in sources(*PRODUCT)
        for found in imports(source)
        if under(found.module, "vllm")
        and not (
            under(source.name, "serve")
            and (source.path.stem in VLLM_DOORS or source.path.stem.startswith("kernels"))
        )
    ]
    assert not wrong, f"vllm imported outside its doors: {wrong}"


def test_prometheus_client_has_one_door() -> None:
    wrong = [
        source.at(found.line)
        for source in sources(*PRODUCT)
        for found in imports(source)
        if under(found.module, "prometheus_client") and source.name != "serve.metrics"
    ]
    assert not wrong, f"prometheus_client imported outside serve/metrics.py: {wrong}"


def test_environment_has_one_reader() -> None:
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
    wrong = []
    for source in sources(*PRODUCT):
        # The command tells torch's OpenMP how to wait, before it is loaded; what oneDNN was limited
        # to is told by its variable alone.
        if source.name in ("serve.settings", "quant.cli", "quant.solver.devices"):
            continue
        wrong += [source.at(i.line) for i in imports(source) if i.module in names]
        wrong += [
            source.at(node.lineno)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and dotted(node) in names
        ]
    assert not wrong, f"the environment is read outside serve/settings.py: {wrong}"


def test_maths_modules_take_and_return_tensors_only() -> None:
    wrong = []
    for source in sources("quant"):
        if source.name not in MATHS:
            continue
        for found in imports(source):
            ours = under(found.module, "quant.errors", "quant.interrupt", *MATHS)
            room = under(found.module, "quant") and not is_module(found.module)
            if not ours and not room and found.module.partition(".")[0] not in MATHS_MAY_IMPORT:
                wrong.append(f"{source.at(found.line)} {found.module}")
    assert not wrong, f"maths modules reach for files, settings or models: {wrong}"


def test_light_modules_need_no_torch() -> None:
    """Holds for whatever they import of ours, too."""
    allowed = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "quant"}
    trees = {source.name: source for source in sources("quant")}
    wrong, queue, seen = [], list(LIGHT), set(LIGHT)
    while queue:
        source = trees[queue.pop()]
        for found in imports(source):
            if found.module.partition(".")[0] not in allowed:
                wrong.append(f"{source.at(found.line)} {found.module}")
            if found.module in trees and found.module not in seen:
                seen.add(found.module)
                queue.append(found.module)
    assert not wrong, f"{LIGHT} need only the standard library and pydantic: {wrong}"


@pytest.mark.parametrize(
    "module", [*LIGHT, "quant.cli", "serve.cli", "serve.settings", "serve.adapters.store"]
)
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "transformers", "vllm", "accelerate", "numpy"} & loaded_by(module)
    assert not heavy, f"importing {module} loads {sorted(heavy)}; import them inside the command"


def test_nothing_unpickles() -> None:
    """But through one door, whose reader resolves names from its own tables."""
    wrong = []
    for source in sources(*PRODUCT):
        for found in imports(source):
            if under(found.module, *PICKLERS) and source.name != UNPICKLER:
                wrong.append(f"{source.at(found.line)} {found.module}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
                wrong.append(source.at(node.lineno))
            if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
                wrong += [source.at(node.value.lineno)] * (ast.unparse(node.value) != "False")
    assert not wrong, f"loads code instead of data: {wrong}"


def test_the_unpickler_imports_nothing_it_is_asked_for() -> None:
    (door,) = [source for source in sources("quant") if source.name == UNPICKLER]
    used = {dotted(n) for n in ast.walk(door.tree) if isinstance(n, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} <= {
        "pickle._Unpickler",
        "pickle._Unpickler.dispatch",
        "pickle.UnpicklingError",
    }, "the door uses pickle for more than to subclass its reader"
    readers = [
        node
        for node in ast.walk(door.tree)
        if isinstance(node, ast.ClassDef) and "pickle._Unpickler" in map(dotted, node.bases)
    ]
    assert len(readers) == 1, "one reader, or nobody knows which tables hold"
    methods = {f.name: f for f in readers[0].body if isinstance(f, ast.FunctionDef)}
    names = {
        inner.id if isinstance(inner, ast.Name) else inner.attr
        for inner in ast.walk(methods["find_class"])
        if isinstance(inner, ast.Name | ast.Attribute)
    }
    assert not names & {"super", "getattr", "__import__", "import_module", "eval", "modules"}
    assert not [i for i in imports(door) if under(i.module, "importlib", "builtins", "sys")]


def test_tests_build_real_things() -> None:
    wrong = [
        source.at(found.line)
        for source in sources("tests")
        for found in imports(source)
        if under(found.module, "unittest.mock", "mock", "pytest_mock")
    ]
    assert not wrong, f"mocks prove nothing: {wrong}"


def test_no_broad_except() -> None:
    """`except Exception` is allowed only to clean up and raise again, but for two nets: one where
    an exception that nobody foresaw becomes a line and an exit status, and one where whatever
    vLLM's checks of a body let fly becomes an answer."""
    wrong: list[str] = []
    nets: list[str] = []
    for source in sources(*EVERYTHING):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(k is None or dotted(k) in {"Exception", "BaseException"} for k in kinds)
            last = node.body[-1]
            if broad and not (isinstance(last, ast.Raise) and last.exc is None):
                known = source.name in NETS
                (nets if known else wrong).append(source.name if known else source.at(node.lineno))
    assert not wrong, f"broad except: {wrong}"
    assert sorted(nets) == NETS, "a net each"


def test_no_file_is_named_after_nothing() -> None:
    wrong = [s.name for s in sources(*EVERYTHING) if BANNED_NAMES & set(s.name.split("."))]
    assert not wrong, f"name the noun the module owns: {wrong}"


def test_every_module_says_what_it_owns() -> None:
    files = [s for s in sources(*EVERYTHING) if s.text.strip()]
    wrong = [s.name for s in files if not ast.get_docstring(s.tree)]
    assert not wrong, f"no module docstring: {wrong}"


def test_files_stay_small() -> None:
    wrong = []
    for source in sources(*EVERYTHING):
        limit = FILE_MAX if under(source.name, *PRODUCT) else LOOSE_FILE_MAX
        if (lines := source.text.count("\n")) > limit:
            wrong.append(f"{source.name}: {lines} lines, at most {limit}")
    assert not wrong, wrong


def test_functions_stay_small() -> None:
    wrong = []
    for source in sources(*EVERYTHING):
        limit = FUNCTION_MAX if under(source.name, *PRODUCT) else LOOSE_FUNCTION_MAX
        wrong += [
            f"{source.at(f.lineno)} {f.name}: {length(f)} lines, at most {limit}"
            for f in functions(source)
            if length(f) > limit
        ]
    assert not wrong, wrong


def test_nine_functions_in_ten_fit_the_budget() -> None:
    found = sorted(length(f) for source in sources(*PRODUCT) for f in functions(source))
    p90 = found[math.ceil(len(found) * 0.9) - 1] if found else 0
    assert p90 <= FUNCTION_P90, f"p90 of {len(found)} functions is {p90} lines"


def test_nothing_is_written_twice() -> None:
    seen: dict[tuple[str, ...], str] = {}
    wrong = set()
    for source in sources(*PRODUCT):
        lines = [(n, line.strip()) for n, line in enumerate(source.text.splitlines(), 1)]
        code = [
            (n, line)
            for n, line in lines
            if line and not line.startswith(("#", "from ", "import "))
        ]
        for start in range(len(code) - REPEATED_LINES + 1):
            window = tuple(line for _, line in code[start : start + REPEATED_LINES])
            here = source.at(code[start][0])
            first = seen.setdefault(window, here)
            if first != here:
                wrong.add(f"{here} repeats {first}")
    assert not wrong, sorted(wrong)


def asserts(node: ast.AST, claims: set[str]) -> bool:
    """True when this code can fail a test: an assert, or a call of something that asserts."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            name = dotted(inner.func).rpartition(".")[2]
            if name in claims or name.startswith("assert_"):
                return True
    return False


def test_every_test_can_fail() -> None:
    claims = {"raises", "warns", "fail"}
    everything = sources("tests")
    for _ in range(3):  # a test may call something that calls something that asserts
        claims |= {f.name for s in everything for f in functions(s) if asserts(f, claims)}
    wrong = [
        f"{source.at(f.lineno)} {f.name}"
        for source in everything
        for f in functions(source)
        if f.name.startswith("test_") and not asserts(f, claims - {f.name})
    ]
    assert not wrong, f"tests without an assertion: {wrong}"


def test_version_is_the_top_changelog_entry() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[?v?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert entries[:1] == [project["version"]]
