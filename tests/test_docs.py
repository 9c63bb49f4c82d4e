"""Holds README.md to the tree, the commands, the settings, the metrics and the Makefile.

Each failure lists exactly what README lacks, or what it promises that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGES = ("quant", "serve")


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, TyperCommand]]:
    """Every command of `quantserve` that does something, with its full name."""
    from serve.cli import app

    waiting = [("quantserve", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        if isinstance(command, TyperGroup):
            waiting += [(f"{name} {child}", found) for child, found in command.commands.items()]
        else:
            assert isinstance(command, TyperCommand)
            yield name, command


def options(command: TyperCommand) -> set[str]:
    """Long names of a command's options."""
    given = [p for p in command.params if isinstance(p, TyperOption) and not p.hidden]
    return {name for option in given for name in option.opts if name.startswith("--")} - {"--help"}


def negations(command: TyperCommand) -> set[str]:
    given = [p for p in command.params if isinstance(p, TyperOption)]
    return {name for option in given for name in option.secondary_opts}


def settings() -> set[str]:
    """The environment names that serve.settings reads."""
    from serve.settings import API_KEY, SERVER, Settings

    return {f"QUANTSERVE_{name.upper()}" for name in Settings.model_fields} | {SERVER, API_KEY}


def tree_of(readme: str, package: str) -> set[str]:
    """File names listed under `package/` in README's annotated tree."""
    listed: set[str] = set()
    inside = False
    for line in readme.splitlines():
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        if line.startswith(f"{package}/"):
            inside = True
        elif inside and not line.startswith((" ", "\t")):
            inside = False
        elif inside and not word.endswith("/"):
            listed.add(word)
    return listed


def words(text: str) -> set[str]:
    """Options as whole words: `--group` is not there because `--group-size` is."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def test_tree_lists_every_module_and_only_those(readme: str) -> None:
    for package in PACKAGES:
        files = [f for f in (ROOT / package).rglob("*") if f.suffix in {".py", ".jsonl", ".cpp"}]
        there = {file.name for file in files} - {"__init__.py"}
        told = tree_of(readme, package)
        assert told, f"README has no tree: a line that starts with `{package}/`, files below it"
        assert not there - told, f"README's tree lacks {package}/: {sorted(there - told)}"
        assert not told - there, f"README's tree invents in {package}/: {sorted(told - there)}"


def test_every_command_is_told(readme: str) -> None:
    lacking = [name for name, _ in commands() if name not in readme]
    assert not lacking, f"README does not show: {lacking}"


def test_every_option_is_told(readme: str) -> None:
    told = words(readme)
    lacking = {name: sorted(options(command) - told) for name, command in commands()}
    assert not any(lacking.values()), (
        f"README lacks options: { {k: v for k, v in lacking.items() if v} }"
    )


def test_no_option_is_invented(readme: str) -> None:
    """Looks at the shell lines that call quantserve; what follows `--` belongs to vLLM."""
    known = dict(commands())
    invented = []
    for line in readme.replace("\\\n", " ").splitlines():
        for name, command in known.items():
            if re.search(rf"(?<![\w/-]){name}(?![\w-])", line):
                ours = re.split(r"\s--\s", line.partition(name)[2])[0]
                ours = re.split(r"[|`;&#]", ours)[0]
                strangers = words(ours) - options(command) - negations(command) - {"--help"}
                invented += [f"{name}: {sorted(strangers)}"] if strangers else []
    assert not invented, f"README uses options that do not exist: {invented}"


def test_every_setting_is_told_and_none_invented(readme: str) -> None:
    told = set(re.findall(r"QUANTSERVE_[A-Z][A-Z0-9_]*", readme))
    assert not settings() - told, f"README lacks settings: {sorted(settings() - told)}"
    assert not told - settings(), f"README invents settings: {sorted(told - settings())}"


def test_metrics_named_in_readme_exist(readme: str) -> None:
    source = (ROOT / "serve" / "metrics.py").read_text(encoding="utf-8")
    told = {re.sub(r"_(total|bucket|sum|count)$", "", n) for n in _metrics(readme)}
    there = {re.sub(r"_total$", "", name) for name in _metrics(source)}
    assert not told - there, f"README names metrics that do not exist: {sorted(told - there)}"
    assert told, "README names none of our metrics"


def _metrics(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w/.-])quantserve_[a-z0-9_]*[a-z0-9]", text))


def test_every_form_of_tools_is_told(readme: str) -> None:
    from serve.forms import TOOLS

    rows = [[form.parser, " ".join(form.marks) or "-", *form.families] for form in TOOLS]
    there = [re.split(r" {2,}|\(model type |\.\.\.\)", line.strip()) for line in _forms(readme)]
    assert [list(filter(None, row)) for row in there] == rows


def _forms(readme: str) -> list[str]:
    block = readme.partition("<summary>Parsers of tool calls")[2].split("\n```")[1]
    return [re.sub(r"^(\S+) ", r"\1  ", line) for line in block.strip().splitlines()]


def test_the_table_of_adapters_is_the_one_that_is_tested(readme: str) -> None:
    """`tests.adapter_rows`, whose every case is merged and compared with PEFT."""
    from tests.adapter_rows import TABLE

    head = "| variant | `adapter merge`, `quantize --adapter` | served beside its base |"
    _, found, rest = readme.partition(f"{head}\n|---|---|---|")
    told = rest.partition("\n\n")[0].strip().splitlines()
    wanted = [f"| {row.variant} | {row.merged} | {row.served} |" for row in TABLE]
    assert found and told == wanted, "README's table of adapters is another than the tests':\n" + (
        "\n".join(wanted)
    )


def test_make_targets_exist(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    there = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    told = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= told, "README's two commands are `make demo` and `make test`"
    assert not told - there, f"README calls targets that do not exist: {sorted(told - there)}"


def test_local_links_lead_somewhere(readme: str) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", readme)
    broken = [link for link in links if not (ROOT / link).exists()]
    assert not broken, f"README links to nothing: {broken}"
