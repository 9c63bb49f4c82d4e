"""Signals end a command between two of its steps: status 2, one line, and nothing is lost.

Every run is a process of its own that gets real signals, at random moments or at a chosen step on a
file.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from quant import cli, interrupt
from quant.interrupt import Interrupted
from tests import tiny, warm
from tests.dying import signal_at
from tests.lora import write_lora
from tests.test_pipeline import calibration_file
from tests.test_resume import Bench, done, gone_on, same

INTERRUPTS = 50
SECOND = ".model-00003-of-00004.safetensors.growing"  # block; the first part is outside of all
KINDS = (signal.SIGINT, signal.SIGTERM)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def untouched() -> Iterator[None]:
    """This process's own handlers, given back."""
    before = {number: signal.getsignal(number) for number in KINDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupt._State.asked = interrupt._State.looked = False


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("interrupts")
    tiny.model_folder(home / "parent", layers=3)
    calibration_file(home)
    return Bench(home)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """What a run makes that nobody disturbs."""
    (bench.home / "whole").mkdir()
    run = bench.ran("whole")
    assert run.status == 0, run.stderr
    return bench.target("whole")


def until_it_listens(pid: int) -> None:
    """Waits for the process to handle SIGTERM; Python itself does not."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        told = Path(f"/proc/{pid}/status").read_text()
        caught = re.search(r"^SigCgt:\s*(\w+)$", told, re.MULTILINE)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)
    pytest.fail("the process never handled SIGTERM")


def test_interrupts_at_random_moments_all_end_with_2_and_lose_nothing(
    bench: Bench, whole: Path
) -> None:
    """Each run goes on where the one before was stopped; whenever one comes to its end, its files
    are those of a run that nobody stopped, and the next one begins anew."""
    seed = random.SystemRandom().randrange(10**6)
    draw, stopped, longest = random.Random(seed), 0, 1.0
    (bench.home / "often").mkdir()
    for turn in range(4 * INTERRUPTS):
        run = warm.begin(*bench.words("often"), said=bench.home / "often" / f"run-{turn}")
        assert run.process.pid
        until_it_listens(run.process.pid)
        began = time.monotonic()
        run.process.join(draw.uniform(0, longest))
        if run.process.is_alive():
            os.kill(run.process.pid, draw.choice(KINDS))
        status = run.status()
        where = f"seed {seed}, run {turn}: status {status}: {run.stderr}"
        if bench.target("often").exists():
            longest = max(0.2, min(longest, time.monotonic() - began))
            assert status == 0 and not run.stderr and same(bench.target("often"), whole), where
            shutil.rmtree(bench.target("often"))
            continue
        stopped += 1
        told = r"quantserve: interrupted; (nothing was written|continues .+; --fresh .+)\n"
        assert status == 2 and re.fullmatch(told, run.stderr), where
        if stopped == INTERRUPTS:
            break
    assert stopped == INTERRUPTS, f"seed {seed}: {stopped} runs were interrupted"
    gone_on(bench, whole, "often")


@pytest.mark.parametrize("number", KINDS)
def test_the_flag_is_looked_at_between_steps_and_the_next_run_goes_on(
    number: signal.Signals, bench: Bench, whole: Path
) -> None:
    name, moment = f"between-{number.name}", ("os.rename", SECOND)
    (bench.home / name).mkdir()
    run = bench.ran(name, first=partial(signal_at, bench.kept(name), moment, [number]))
    assert run.status == 2
    line = "quantserve: interrupted; continues at block 2 of 3 when run again; --fresh starts over"
    assert run.stderr == f"{line}\n"
    assert done(gone_on(bench, whole, name)) == 1


def test_a_second_signal_ends_at_once_and_leaves_what_a_crash_does(
    bench: Bench, whole: Path
) -> None:
    moment = ("open", SECOND)
    (bench.home / "twice").mkdir()
    run = bench.ran("twice", first=partial(signal_at, bench.kept("twice"), moment, KINDS))
    assert run.status == 2
    assert run.stderr == "quantserve: interrupted; the same command goes on from what is on disk\n"
    assert done(gone_on(bench, whole, "twice")) == 1


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_a_signal_while_it_imports_is_one_line_too(delay: float, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "serve",
        "quantize",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until_it_listens(process.pid)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, b"")
    assert err == b"quantserve: interrupted; nothing was written\n"


def commands(bench: Bench, whole: Path, out: Path) -> dict[str, tuple[list[object], Path]]:
    """Others than `quantize`, and a folder with files that they read."""
    parent, home = bench.home / "parent", bench.home
    texts = ["--calibration", home / "texts.jsonl", "--length", 32]
    lora = (
        write_lora(home / "lora", {Q: (64, 64)}) if not (home / "lora").exists() else home / "lora"
    )
    return {
        "compare": (["compare", parent, whole, *texts, "--json"], whole),
        "inspect": (["inspect", whole, "--verify"], whole),
        "check": (["adapter", "check", lora, "--base", parent], lora),
        "merge": (["adapter", "merge", parent, "--adapter", lora, "--out", out], parent),
        "export": (["adapter", "export", lora, "--base", whole, "--out", out], lora),
        "ways": (["adapter", "compare", lora, "--parent", parent, "--base", whole, *texts,
                  "--json"], whole),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["compare", "inspect", "check", "merge", "export", "ways"])
def test_every_command_ends_with_2_and_one_line(
    name: str, bench: Bench, whole: Path, tmp_path: Path
) -> None:
    words, folder = commands(bench, whole, tmp_path / "out")[name]
    file = "adapter_model.safetensors" if folder.name == "lora" else "model.safetensors"
    before = {path: path.read_bytes() for path in whole.iterdir()}
    run = warm.begin(
        *map(str, words),
        said=tmp_path / "said",
        first=partial(signal_at, folder, ("open", file), [signal.SIGINT]),
    )
    assert run.status() == 2, run.stderr
    told = [line for line in run.stderr.splitlines() if not line.startswith("quantserve: opening")]
    assert told == ["quantserve: interrupted; nothing was written"]
    assert {path.name for path in tmp_path.iterdir()} == {"said"}
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_a_caller_of_the_library_keeps_its_own_handlers(untouched: None) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    interrupt.check()
    os.kill(os.getpid(), signal.SIGTERM)
    interrupt.check()
    assert heard == [signal.SIGTERM] and not interrupt.asked()


def test_every_thread_sees_the_flag_and_nothing_is_raised_before_one_looks(untouched: None) -> None:
    caught: list[type[BaseException]] = []

    def work() -> None:
        try:
            interrupt.check()
        except Interrupted as stopped:
            caught.append(type(stopped))

    with interrupt.listening("test"):
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert interrupt.asked()
    assert caught == [Interrupted] * 3
    interrupt.ignore()
    os.kill(os.getpid(), signal.SIGTERM)


def test_where_nothing_was_done_that_is_said(
    untouched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        interrupt.check()

    with pytest.raises(SystemExit) as left:
        cli.main(stopped)
    assert left.value.code == 2
    assert capsys.readouterr().err == "quantserve: interrupted; nothing was written\n"


@pytest.mark.parametrize("module", ["quant.interrupt", "serve.cli", "typer", "quant.artifact"])
def test_ctrl_c_in_the_first_second_is_one_line_wherever_it_comes(
    module: str, tmp_path: Path
) -> None:
    code = (
        "import importlib.abc, os, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from serve.__main__ import main\n"
        "main()"
    )
    words = ["quantize", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "quantserve: interrupted; nothing was written\n"


def test_a_signal_that_ends_it_at_once_is_an_object_for_programs_too() -> None:
    code = (
        "import os, signal; from quant import interrupt\n"
        "interrupt.listen('quantserve'); interrupt.tell_programs(True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    event = json.loads(done.stdout)
    assert (event["event"], event["kind"], event["status"]) == ("error", "Interrupted", 2)
