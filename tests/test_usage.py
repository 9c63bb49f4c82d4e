"""`quant.usage`: every command explains itself alike, and what is typed wrong is one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.testing import CliRunner

from quant import cli, usage
from quant.errors import UsageError
from serve import cli as serve_cli
from serve.settings import Settings
from tests.test_docs import commands

PAGES = sorted(name for name, _ in commands())


def page(name: str) -> str:
    shown = CliRunner().invoke(serve_cli.app, [*name.split()[1:], "--help"])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def groups() -> dict[str, TyperGroup]:
    root = typer.main.get_command(serve_cli.app)
    assert isinstance(root, TyperGroup)
    found = {"quantserve": root}
    return found | {n: each for n, each in root.commands.items() if isinstance(each, TyperGroup)}


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_an_example_that_can_be_typed(name: str) -> None:
    _, found, examples = page(name).partition("\nExamples:\n")
    assert found and name.split()[-1] in examples
    command = dict(commands())[name]
    known = {word for each in command.params for word in (*each.opts, *each.secondary_opts)}
    for line in examples.replace("\\\n", " ").splitlines():
        ours = line.partition(" -- ")[0]
        assert f"{line} ".startswith(f"  {name} ")
        assert set(re.findall(r"--[a-z][a-z-]+", ours)) <= known


@pytest.mark.parametrize("name", PAGES)
def test_values_are_readable_words(name: str) -> None:
    shown = page(name)
    assert (
        "<" not in shown.replace("|<", "")
        and "list[" not in shown
        and "{" not in (shown.partition("\n")[0])
    )


@pytest.mark.parametrize("name", PAGES)
def test_many_options_stand_in_groups(name: str) -> None:
    """No group is longer than a screen's third."""
    sections = re.split(r"\n(?=[A-Z][\w ]+:\n)", page(name))
    options = [each for each in sections if re.search(r"^  --", each, re.MULTILINE)]
    assert all(len(re.findall(r"^  --", each, re.MULTILINE)) <= 9 for each in options)


def test_serve_names_the_variable_of_every_setting() -> None:
    shown = page("quantserve serve")
    told = set(re.findall(r"QUANTSERVE_[A-Z0-9_]+", shown))
    unsaid = {"QUANTSERVE_ARTIFACT", "QUANTSERVE_VLLM_FLAGS"}  # arguments
    assert told >= {f"QUANTSERVE_{name.upper()}" for name in Settings.model_fields} - unsaid


@pytest.mark.parametrize("name", groups())
def test_a_group_alone_shows_its_page_and_succeeds(name: str) -> None:
    shown = CliRunner().invoke(serve_cli.app, [name] if name != "quantserve" else [])
    assert shown.exit_code == 0
    assert all(f"\n  {each} " in shown.stdout for each in groups()[name].commands)


def test_the_version() -> None:
    shown = CliRunner().invoke(serve_cli.app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"quantserve {version('quantserve')}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quantise"], "No such command 'quantise'. Did you mean 'quantize'?"),
        (["quantize", "--adaptor", "x"], "No such option: --adaptor (Possible options: --adapter)"),
        (["quantize"], "Missing argument 'SOURCE'"),
        (["quantize", "demo"], "Missing option '--out'"),
        (["quantize", "demo", "--out", "x", "--samples", "many"], "'--samples'"),
        (["adapter", "merge", "a", "--method", "sum"], "'--method'"),
        (["adapter", "check"], "Missing argument 'ADAPTER'"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_typed_wrong_is_one_line(
    *, words: list[str], told: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, *(["--json"] if as_json else [])]
    with pytest.raises(SystemExit) as left:
        cli.main(lambda: serve_cli.app(words))
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert err.startswith("quantserve: ") and told in err and err.count("\n") == 1
    events = [json.loads(line) for line in out.splitlines()]
    if as_json:
        (event,) = events
        assert (event["event"], event["status"]) == ("error", 2) and told in event["message"]
    else:
        assert not events


def test_what_nobody_foresaw_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        usage.Asked.json = True
        raise ZeroDivisionError("by zero")

    with pytest.raises(SystemExit):
        cli.main(failing)
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["kind"], event["status"]) == ("error", "ZeroDivisionError", 1)
    usage.Asked.json = False


@pytest.mark.parametrize("shell", usage.SHELLS)
def test_a_shell_gets_a_script_that_asks_us(shell: str) -> None:
    shown = CliRunner().invoke(serve_cli.app, ["completion", shell])
    assert shown.exit_code == 0 and usage.COMPLETE in shown.stdout and "quantserve" in shown.stdout


def test_another_shell_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'tcsh' is not known; take one of bash, zsh, fish"):
        usage.completion("tcsh")


def test_commands_and_options_are_completed() -> None:
    def offered(words: str) -> set[str]:
        asked = {
            usage.COMPLETE: "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "serve"],
            env=os.environ | asked, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return set(done.stdout.split())

    assert offered("quantserve qua") == {"quantize"}
    assert {"--scheme", "--samples", "--seed"} <= offered("quantserve quantize --s")


def test_a_caller_without_the_console_script_gets_the_error_itself() -> None:
    command = typer.main.get_command(serve_cli.app)
    assert isinstance(command, TyperGroup | TyperCommand)
    with pytest.raises(UsageError):
        command.main(["quantise"], standalone_mode=False)
    assert any(isinstance(each, TyperOption) for each in command.params)
