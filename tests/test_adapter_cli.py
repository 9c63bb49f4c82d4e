"""`quantserve adapter` as a user runs it: what is printed, the exit status, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quant import cli as quant_cli
from quant.lora import adapter as lora
from quant.lora.adapter import CONFIG
from serve import cli
from tests import tiny, variants
from tests.lora import write_lora

UP = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Ran:
    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.base_folder(tmp_path_factory.mktemp("base"), layers=1)


@pytest.fixture
def legal(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "legal", {UP: (128, 64)})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(*words: object) -> Ran:
        capsys.readouterr()  # what making the fixtures printed
        with pytest.raises(SystemExit) as left:
            quant_cli.main(lambda: cli.app(["adapter", *map(str, words)]))
        out = capsys.readouterr()
        return Ran(int(left.value.code or 0), out.out, out.err)

    return ran


def test_every_command_explains_itself() -> None:
    for command in ("check", "merge", "export"):
        told = CliRunner().invoke(cli.app, ["adapter", command, "--help"])
        assert told.exit_code == 0 and len(told.stdout) > 500


def test_check_prints_a_line_for_each_path(run: Any, legal: Path, base: Path) -> None:
    told = run("check", legal, "--base", base)
    assert told.status == 0
    rows = dict(line.split(maxsplit=1) for line in told.stdout.splitlines())
    assert rows["variant"] == "plain LoRA" and rows["rank"] == "4" and rows["scaling"] == "1"
    assert rows["targets"] == "up_proj x1" and rows["base"] == "tests"
    assert rows["merge"] == "yes: in float32" and rows["swap"] == "yes: as it is"
    assert rows["travels"] == "weights only"


def test_check_says_what_travels_and_what_cannot(run: Any, legal: Path, base: Path) -> None:
    (legal / "generation_config.json").write_text('{"top_p": 0.9, "num_beams": 4}')
    (legal / "chat_template.jinja").write_text("{{ messages }}")
    told = run("check", legal, "--base", base)
    assert "travels  chat template, top_p 0.9; ignored: num_beams" in told.stdout.splitlines()
    (legal / "chat_template.jinja").write_text("{% if %}")
    (found,) = run("check", legal, "--base", base, "--json").lines
    assert found["merge"]["works"] and not found["swap"]["works"]
    assert "chat template" in found["swap"]["reason"]


def test_check_exits_with_two_when_nothing_works(run: Any, tmp_path: Path, base: Path) -> None:
    wide = write_lora(tmp_path / "wide", {UP: (128, 32)})
    told = run("check", wide, "--base", base, "--json")
    assert told.status == 2 and told.stderr.count("\n") == 1
    found, fault = told.lines
    assert (fault["event"], fault["status"]) == ("error", 2)
    assert not found["merge"]["works"] and not found["swap"]["works"]
    assert "expected 128x64, found 128x32" in found["swap"]["reason"]


def test_merge_takes_weights_and_a_method(
    run: Any, legal: Path, base: Path, tmp_path: Path
) -> None:
    other = write_lora(tmp_path / "a=b", {UP: (128, 64)}, seed=1)
    out = tmp_path / "out"
    words = ("merge", base, "--adapter", f"{legal}=0.5", "--adapter", other, "--out", out)
    told = run(*words, "--method", "cat", "--json")
    assert told.status == 0, told.stderr
    *steps, last = told.lines
    assert last["changed"] == 1 and last["folder"] == str(out)
    assert [line["done"] for line in steps if line["event"] == "measured"] == [
        *range(1, last["tensors"] + 1)
    ]
    both = variants.loaded(out)
    shutil.rmtree(out)
    assert run(*words).stdout.startswith(f"{out}: 1 of ")
    torch.testing.assert_close(variants.loaded(out), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--adapter", "{legal}=heavy"), "expected FOLDER or FOLDER=WEIGHT"),
        (("--adapter", "{legal}=nan"), "a finite weight"),
        (("--adapter", "{legal}=inf"), "a finite weight"),
        (("--adapter", "=1"), "expected FOLDER=WEIGHT"),
        (("--adapter", "gone"), "gone does not exist"),
        (("--adapter", "{legal}", "--method", "ties", "--density", "2"), "--density 2"),
        (("--adapter", "{legal}", "--density", "0.5"), "means nothing to --method linear"),
        (("--adapter", "{legal}", "--adapter", "{legal}"), "is given twice"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    run: Any, legal: Path, base: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    given = [word.format(legal=legal) for word in words]
    told = run("merge", base, "--out", tmp_path / "out", *given)
    assert told.status == 2 and reason in told.stderr
    assert [line for line in told.stderr.splitlines() if not line.startswith("quantserve: ope")] \
        == [told.stderr.splitlines()[-1]]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"legal"}


def test_a_base_that_is_gone_is_one_line(run: Any, legal: Path, tmp_path: Path) -> None:
    told = run("merge", tmp_path / "gone", "--adapter", legal, "--out", tmp_path / "out")
    assert told.status == 2 and "gone does not exist" in told.stderr
    told = run("check", legal, "--base", tmp_path / "gone")
    assert told.status == 2 and told.stderr.count("\n") == 1


def test_export_says_what_the_server_needs(run: Any, base: Path, tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", {UP: (128, 64)}, rank=32)
    tiny.edit_json(wide / CONFIG, use_rslora=True)
    out = tmp_path / "out"
    told = run("export", wide, "--base", base, "--out", out, "--dtype", "float16")
    assert told.status == 0, told.stderr
    assert "rank 32, 1 modules, float16" in told.stdout and "--max-lora-rank 32" in told.stdout
    assert lora.read(out).rank == 32
    told = run("export", wide, "--base", base, "--out", tmp_path / "again", "--json")
    assert told.lines[-1]["dtype"] == "bfloat16" and told.lines[-1]["rank"] == 32
    told = run("export", wide, "--base", base, "--out", out)
    assert told.status == 2 and "exists already" in told.stderr


def test_export_refuses_what_cannot_be_plain(run: Any, base: Path, tmp_path: Path) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, use_dora=True)
    told = run("export", folder, "--base", base, "--out", tmp_path / "out")
    assert told.status == 2 and told.stderr.count("\n") == 1
    assert "DoRA" in told.stderr and "use `quantserve adapter merge`" in told.stderr
    assert not (tmp_path / "out").exists()
