"""`quantserve quantize` and `inspect` as a user runs them: the console script, its exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quant import artifact, cli
from quant.artifact import Manifest
from quant.solver import blocks
from tests import tiny, warm
from tests.lora import write_lora
from tests.test_artifact import older
from tests.warm import QUANTSERVE

SMALL = ("--samples", "8", "--length", "32")
Q = "model.layers.0.self_attn.q_proj"

# What a user gets wrong: extra words after SOURCE and --out, and what the one line must say.
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nowhere": ((), ("nowhere", "does not exist")),
    "corrupt": ((), ("model.safetensors", "truncated")),
    "unknown": ((), ("config.json", "not of a known architecture")),
    "quantized": ((), ("quantization_config", "remove the section")),
    "foreign-adapter": (("--adapter", "{home}/foreign"), (Q, "64x64", "64x48")),
    "pickle-adapter": (("--adapter", "{home}/pickle"), ("adapter_model.bin", "pickle")),
    "group-size": (("--group-size", "128"), ("group size 128 does not divide", "64")),
    "odd-group-size": (("--group-size", "48"), ("group_size", "32, 64, 128 or -1")),
    "fewer-orders": (("--refine", "-1"), ("refine", "greater than or equal to 0")),
    "few-bits": (("--bits-per-weight", "4.1"), ("4.1 bits per weight are too few", "take 4.2")),
    "three-bits": (("--scheme", "w3a16"), ("no kernel for weights of 1 to 3 bits", "w4a16")),
    "no-text": (("--calibration", "{home}/blank.jsonl"), ("blank.jsonl", "no usable line")),
    "bad-line": (("--calibration", "{home}/broken.jsonl"), ("broken.jsonl:3", "malformed")),
    "device": (("--device", "cuda:63"), ("cuda:63",)),
    "disk": (
        ("--calibration", "{home}/texts.jsonl"),
        ("cannot hold ", "File too large"),
    ),
    "taken": ((), ("out-taken exists already", "--force")),
}
OF_PARENT = set(MISTAKES) - {"nowhere", "corrupt", "unknown", "quantized"}


@dataclass(frozen=True)
class Ran:
    status: int
    stdout: str
    stderr: str


def ran(*words: str, said: Path, largest_file: int | None = None) -> Ran:
    run = warm.begin(*words, said=said, largest_file=largest_file)
    return Ran(run.status(), run.stdout, run.stderr)


def quantize_words(source: Path, out: Path, *more: str) -> tuple[str, ...]:
    cache = str(out.parent / "cache")
    return ("quantize", str(source), "--out", str(out), "--cache", cache, *SMALL, *more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the runs read."""
    home = tmp_path_factory.mktemp("cli")
    parent = tiny.model_folder(home / "parent")
    lines = [json.dumps({"text": f"the quick brown fox jumps over {n} dogs"}) for n in range(60)]
    (home / "texts.jsonl").write_text("\n".join(lines))
    (home / "broken.jsonl").write_text("\n".join([*lines[:2], '{"text": "never closed', *lines]))
    (home / "blank.jsonl").write_text('{"text": "  "}\n\n{"text": ""}\n')
    for name in ("corrupt", "unknown", "quantized"):
        shutil.copytree(parent, home / name)
    weights = (home / "corrupt" / "model.safetensors").read_bytes()
    (home / "corrupt" / "model.safetensors").write_bytes(weights[:-1000])
    tiny.edit_json(
        home / "unknown" / "config.json", model_type="novel", architectures=["NovelForCausalLM"]
    )
    tiny.edit_json(home / "quantized" / "config.json", quantization_config={"quant_method": "awq"})
    write_lora(home / "lora", {Q: (64, 64)})
    write_lora(home / "foreign", {Q: (64, 48)})
    shutil.copytree(home / "lora", home / "pickle")
    (home / "pickle" / "adapter_model.safetensors").rename(home / "pickle" / "adapter_model.bin")
    (home / "out-taken").mkdir()
    (home / "out-taken" / "precious.txt").write_text("mine")
    return home


@pytest.mark.usefixtures("cold")  # the solver's loops are compiled and kept: no file may grow here
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake: str, home: Path, tmp_path: Path) -> None:
    more, expected = MISTAKES[mistake]
    source = home / ("parent" if mistake in OF_PARENT else mistake)
    before = set(home.iterdir()) | {home / "cache"}
    run = ran(
        *quantize_words(source, home / f"out-{mistake}", "--json"),
        *(word.format(home=home) for word in more),
        said=tmp_path / "said",
        largest_file=60_000 if mistake == "disk" else None,
    )
    assert run.status == 2
    assert run.stderr.startswith("quantserve: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in expected), run.stderr
    last = json.loads(run.stdout.splitlines()[-1])
    assert (last["event"], last["status"]) == ("error", 2)
    assert run.stderr == f"quantserve: {last['message']}\n"
    assert set(home.iterdir()) <= before
    assert (home / "out-taken" / "precious.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def cold(home: Path) -> Ran:
    """One run without any help: a new interpreter, imports and all, and its own calibration."""
    words = quantize_words(home / "parent", home / "out-json", "--json")
    done = subprocess.run(
        [QUANTSERVE, *words], capture_output=True, text=True, timeout=300, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_json_is_a_line_per_event_and_the_manifest_last(cold: Ran, home: Path) -> None:
    assert (cold.status, cold.stderr) == (0, "")
    *events, last = [json.loads(line) for line in cold.stdout.splitlines()]
    assert Manifest.model_validate(last) == artifact.read(home / "out-json")
    layers = [event for event in events if event["event"] == "layer"]
    assert [event["done"] for event in layers] == list(range(1, 15))
    assert {event["total"] for event in layers} == {14}
    assert [event["name"] for event in layers] == [layer["name"] for layer in last["layers"]]
    stages = [event["message"] for event in events if event["event"] == "stage"]
    assert stages[0] == f"opening {home / 'parent'}"
    (needs,) = [event for event in events if event["event"] == "estimate"]
    assert 0 < needs["memory"] < needs["memory_free"] and 0 < needs["disk"] < needs["disk_free"]
    assert needs["seconds"] > 0 and events.index(needs) == 1
    assert any("writes 8 x 32 tokens" in stage for stage in stages)


def test_the_bar_goes_to_stderr_and_the_summary_to_stdout(home: Path, tmp_path: Path) -> None:
    out, lora, texts = tmp_path / "out", str(home / "lora"), str(home / "texts.jsonl")
    words = ("--adapter", lora, "--scheme", "w8a8", "--calibration", texts)
    run = ran(*quantize_words(home / "parent", out, *words), said=tmp_path / "said")
    assert run.status == 0
    told, following = run.stdout.splitlines()
    assert told.startswith(f"{out}: 0.2 MB -> 0.2 MB") and "14 layers" in told
    assert following == f"next: quantserve serve {out}"
    assert run.stderr.splitlines()[0] == f"quantserve: opening {home / 'parent'}"
    assert "14/14" in run.stderr
    shown = ran("inspect", str(out), "--layers", said=tmp_path / "shown")
    assert (shown.status, shown.stderr) == (0, "")
    assert all(line == line.rstrip() for line in shown.stdout.splitlines())
    facts = " ".join(shown.stdout.split())
    assert "LlamaForCausalLM" in facts and "w8a8, per channel" in facts
    assert "lora@" in facts and "x file" in facts
    assert all(f"model.layers.{place}.mlp.down_proj" in facts for place in (0, 1))


def test_a_mistake_at_the_bar_is_its_last_and_only_complaint(home: Path, tmp_path: Path) -> None:
    run = ran(*quantize_words(home / "corrupt", tmp_path / "out"), said=tmp_path / "said")
    opening, complaint = run.stderr.splitlines()
    assert run.status == 2 and opening == f"quantserve: opening {home / 'corrupt'}"
    assert "truncated" in complaint


@pytest.mark.usefixtures("cold")
def test_inspect_as_json_is_the_manifest(home: Path, tmp_path: Path) -> None:
    run = ran("inspect", str(home / "out-json"), "--json", said=tmp_path / "said")
    assert Manifest.model_validate_json(run.stdout) == artifact.read(home / "out-json")


@pytest.mark.usefixtures("cold")
def test_inspect_verifies_every_file(home: Path, tmp_path: Path) -> None:
    sound = ran("inspect", str(home / "out-json"), "--verify", said=tmp_path / "sound")
    assert (sound.status, sound.stderr) == (0, "")
    manifest = artifact.read(home / "out-json")
    assert manifest is not None
    read = sum(digest.bytes for digest in manifest.files.values())
    told = f"verified     {len(manifest.files)} files, {read:,} bytes: all as they were sealed"
    assert told in sound.stdout.splitlines()
    damaged = shutil.copytree(home / "out-json", tmp_path / "out")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    refused = ran("inspect", str(damaged), "--verify", said=tmp_path / "refused")
    assert refused.status == 2 and refused.stderr.count("\n") == 1
    assert "model.safetensors differs from what was sealed" in refused.stderr


def test_inspect_refuses_what_is_no_artifact(home: Path, tmp_path: Path) -> None:
    run = ran("inspect", str(home / "parent"), said=tmp_path / "said")
    assert run.status == 2 and run.stderr.count("\n") == 1
    assert "not an artifact of ours" in run.stderr


@pytest.fixture(scope="module")
def deep(home: Path) -> Path:
    """Deep enough that most of the work is still ahead when the signal comes."""
    return tiny.model_folder(home / "deep", layers=48)


def signalled(deep: Path, folder: Path, number: signal.Signals) -> Ran:
    """A run into `folder`/out that got a signal while it solved layers."""
    texts = ("--calibration", str(deep.parent / "texts.jsonl"))
    run = warm.begin(*quantize_words(deep, folder / "out", "--json", *texts), said=folder / "said")
    until = time.monotonic() + 300
    while run.stdout.count('"layer"') < 20:
        assert run.process.is_alive() and time.monotonic() < until, run.stderr
        time.sleep(0.01)
    assert run.process.pid is not None
    os.kill(run.process.pid, number)
    return Ran(run.status(), run.stdout, run.stderr)


def test_ctrl_c_exits_with_2_and_says_how_to_go_on(deep: Path, tmp_path: Path) -> None:
    run = signalled(deep, tmp_path, signal.SIGINT)
    told = r"quantserve: interrupted; continues at block \d+ of 48 when run again; --fresh .*\n"
    assert run.status == 2 and re.fullmatch(told, run.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"said", ".out.partial"}


def test_a_killed_run_leaves_no_target_and_the_next_one_succeeds(
    deep: Path, home: Path, tmp_path: Path
) -> None:
    assert signalled(deep, tmp_path, signal.SIGKILL).status == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    words = ("--calibration", str(home / "texts.jsonl"))
    after = ran(*quantize_words(home / "parent", tmp_path / "out", *words), said=tmp_path / "next")
    assert after.status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"said", "next", "out"}
    manifest = artifact.read(tmp_path / "out")
    assert manifest is not None and len(manifest.layers) == 14


def test_a_manifest_of_an_older_version_is_told_of_where_it_is_verified(tmp_path: Path) -> None:
    """On stderr: a program reads what --json says."""
    older(tiny.model_folder(tmp_path))
    done = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--verify", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["format"] == 1
    assert "is of an older version and carries no digest of itself" in done.stderr
    assert "older" not in CliRunner().invoke(cli.app, ["inspect", str(tmp_path)]).stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("", "--out", "{out}"), "an empty path was given"),
        (("~nobody-here/m", "--out", "{out}"), "~nobody-here/m is in a home that this system does"),
        (("x" * 5000, "--out", "{out}"), "x cannot be looked at: File name too long"),
        (("{parent}", "--out", "~nobody-here/x"), "~nobody-here/x is in a home"),
        (("{parent}", "--out", "x" * 300), "x cannot be looked at: File name too long"),
        (("{parent}", "--out", "{out}", "--cache", "~nobody-here"), "~nobody-here is in a home"),
    ],
    ids=["none", "home", "long", "target in a home", "long target", "cache in a home"],
)
def test_a_path_that_no_file_system_has_is_one_line(
    words: tuple[str, ...],
    told: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word.format(parent=home / "parent", out=tmp_path / "out") for word in words]
    with pytest.raises(SystemExit) as left:
        cli.main(lambda: cli.app(["quantize", *given]))
    *_, line = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and told in line
    assert not any(tmp_path.iterdir())


# What somebody else's code raises, at every stage of a run, and what the line has to tell of it.
UNFORESEEN: dict[str, tuple[str, Exception, tuple[str, ...]]] = {
    "a configuration": (
        "quant.intake.architecture.config",
        KeyError("model.embed_tokens"),
        ("KeyError: 'model.embed_tokens'",),
    ),
    "a skeleton": (
        "quant.solver.blocks.skeleton",
        RuntimeError("size mismatch:\n  copying a param with shape\n" + "long " * 1000),
        ("RuntimeError: size mismatch: copying a param with shape long",),
    ),
    "a tensor": (
        "quant.intake.stored.Stored.read",
        MemoryError(),
        ("unexpected MemoryError (", "while reading model.", "parent/model.safetensors"),
    ),
    "the estimate": ("quant.solver.preflight.memory", ZeroDivisionError("by zero"), ("by zero",)),
    "calibration": ("quant.calibration.prepare", RecursionError("maximum depth"), ("maximum",)),
    "a layer": (
        "quant.solver.layers.Layers._moments",
        AssertionError("a part"),
        ("AssertionError: a part", "while solving model.layers.0.self_attn.q_proj and", "block 1"),
    ),
    "the journal": ("quant.journal._keep", TypeError("no"), ("TypeError: no", "in `")),
    "the end": (
        "quant.checkpoint.verify",
        OverflowError("too large"),
        ("OverflowError: too large", "continues behind the last block when run again"),
    ),
}


@pytest.mark.parametrize("stage", UNFORESEEN)
def test_what_nobody_foresaw_is_one_line(
    stage: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, fault, expected = UNFORESEEN[stage]

    def planted(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(place, planted)
    texts = ("--calibration", str(home / "texts.jsonl"), "--json")
    with pytest.raises(SystemExit) as left:
        cli.main(lambda: cli.app(quantize_words(home / "parent", tmp_path / "out", *texts)))
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("quantserve: unexpected ") and said.count("\n") == 1, said
    assert len(said) < 1500 and "quantize`" in said and "--debug" in said
    assert all(word in said for word in expected), said


def plant() -> None:
    def planted(*_: object) -> None:
        raise RuntimeError("size mismatch")

    blocks.skeleton = planted  # type: ignore[assignment] # of this process, which ends with it


@pytest.mark.parametrize("place", ["nowhere", "in front", "behind"])
def test_a_traceback_is_there_for_who_asks(place: str, home: Path, tmp_path: Path) -> None:
    words: tuple[str, ...] = quantize_words(home / "parent", tmp_path / "out", "--json")
    words = {"nowhere": words, "in front": ("--debug", *words), "behind": (*words, "--debug")}[
        place
    ]
    run = warm.begin(*words, said=tmp_path / "said", first=plant)
    assert run.status() == 1
    *trace, line = run.stderr.splitlines()
    assert line.startswith("quantserve: unexpected RuntimeError: size mismatch (test_quant_cli.py:")
    assert bool(trace) == (place != "nowhere")
    if trace:
        assert trace[0] == "Traceback (most recent call last):"
        assert any("pipeline.py" in frame for frame in trace)
    assert {path.name for path in tmp_path.iterdir()} == {"said"}


def test_what_a_caller_knows_is_left_to_it() -> None:
    class Known(Exception):
        pass

    def failing() -> None:
        raise Known

    with pytest.raises(Known):
        cli.main(failing, known=(Known,))


def test_a_number_of_threads_that_the_user_gave_holds_in_every_loop() -> None:
    """numba's own default would raise torch's too, and with it what a run is known by."""
    code = (
        "from quant import cli; cli.hold_threads()\n"
        "import torch; from quant.solver import gptq\n"
        "from quant.solver.grid import full_range\n"
        "w, h = torch.randn(8, 32), torch.eye(32)\n"
        "factor, levels = gptq.factorize(h.clone(), 0.01, 32), full_range(4, torch.bfloat16)\n"
        "gptq.solve(w, h, factor, 32, levels); print(torch.get_num_threads())"
    )
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    printed = subprocess.check_output(
        [sys.executable, "-c", code], env=env | {"OMP_NUM_THREADS": "1"}, text=True
    )
    assert printed == "1\n"
