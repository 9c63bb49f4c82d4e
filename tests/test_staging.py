"""The folder an artifact grows in: it appears whole or not at all, and one run at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from quant import durable, staging
from quant.artifact import MANIFEST
from quant.errors import SourceError, SpaceError, TargetExists
from tests import durability, dying
from tests.durability import Disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Disk]:
    yield from durability.watched(monkeypatch, tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


def write_artifact(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(text)
    (folder / "weights").write_text(text)
    return folder


def publish(target: Path, text: str = "new") -> None:
    with staging.staged(target) as folder:
        (folder / MANIFEST).write_text(text)


def left(target: Path) -> list[str]:
    """Everything beside and in the parent of the target, hidden or not."""
    return sorted(path.name for path in target.parent.iterdir())


def test_a_free_place_is_taken(target: Path) -> None:
    staging.check_target(target, force=False)
    target.mkdir(parents=True)
    staging.check_target(target, force=False)
    assert left(target) == ["model"] and os.listdir(target) == [], "a check writes nothing"


def test_what_is_not_ours_is_never_replaced(target: Path) -> None:
    target.mkdir(parents=True)
    file = target / "thesis.docx"
    file.write_text("three years of work")
    for place in (target, file):
        with pytest.raises(TargetExists, match=f"^{place} exists already"):
            staging.check_target(place, force=False)
        with pytest.raises(TargetExists, match=f"^{place} is not an artifact of ours"):
            staging.check_target(place, force=True)


def test_an_artifact_is_replaced_when_asked(target: Path) -> None:
    write_artifact(target)
    with pytest.raises(TargetExists, match="--force replaces an artifact"):
        staging.check_target(target, force=False)
    staging.check_target(target, force=True)


def test_a_dangling_link_is_not_free(target: Path) -> None:
    target.parent.mkdir()
    target.symlink_to("nowhere")
    with pytest.raises(TargetExists):
        staging.check_target(target, force=False)


def test_a_mount_point_is_refused_before_the_work() -> None:
    with pytest.raises(TargetExists, match=r"^/proc is a mount point"):
        staging.check_target(Path("/proc"), force=True)


def test_disk_that_is_there_is_enough(target: Path) -> None:
    staging.check_space(target, 1)
    assert not target.parent.exists()


def test_disk_that_is_not_there_is_told_in_megabytes(target: Path) -> None:
    place = target.parent.parent
    with pytest.raises(SpaceError, match=rf"^{target} needs 1,000,000,000,000 MB .*{place} has "):
        staging.check_space(target, 10**18)


def test_a_folder_appears_at_the_end_and_whole(target: Path) -> None:
    with staging.staged(target) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
        assert folder.parent.parent == target.parent and not target.exists()
    assert (target / "a" / "b").read_text() == "x"
    assert os.listdir(target) == ["a"]
    assert left(target) == ["model"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(target: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), staging.staged(target) as folder:
        (folder / "half").write_text("x")
        raise fault
    assert left(target) == []


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_artifact(target: Path, fault: type[BaseException]) -> None:
    write_artifact(target)
    with pytest.raises(fault), staging.staged(target):
        raise fault
    assert left(target) == ["model"]
    assert (target / MANIFEST).read_text() == "old"


def test_the_old_artifact_gives_way_to_the_new(target: Path) -> None:
    write_artifact(target)
    with staging.staged(target) as folder:
        (folder / MANIFEST).write_text("new")
        assert (target / MANIFEST).read_text() == "old"
    assert (target / MANIFEST).read_text() == "new"
    assert left(target) == ["model"] and os.listdir(target) == [MANIFEST]


def test_what_is_published_lies_on_the_disk(target: Path, disk: Disk) -> None:
    """Its files, its folders, and the name itself; also where it takes an older one's place."""
    for text in ("first", "second"):
        with staging.staged(target) as folder:
            (folder / "deep").mkdir()
            for name in (MANIFEST, "config.json", "deep/template.jinja"):
                (folder / name).write_text(text)
    assert disk.named == ["model", "coming", "model"] and not disk.unsafe and not disk.unsettled


def test_there_is_an_artifact_at_every_moment_of_its_replacement(target: Path) -> None:
    before = (write_artifact(target) / MANIFEST).stat().st_ino
    seen: list[int] = []
    dying.watched(target.parent, lambda *_: seen.append((target / MANIFEST).stat().st_ino))
    publish(target)
    after = (target / MANIFEST).stat().st_ino
    assert _held(target) == "new" and left(target) == ["model"]
    assert set(seen) == {before, after} and seen == sorted(seen, key=[before, after].index)


def _held(target: Path) -> str:
    return (target / MANIFEST).read_text() if (target / MANIFEST).exists() else "nothing"


def test_a_file_system_that_exchanges_nothing_renames_twice(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(target)
    monkeypatch.setattr(durable, "exchange", lambda *_: False)
    publish(target)
    assert (target / MANIFEST).read_text() == "new" and left(target) == ["model"]


def _dies_behind_the_exchange(target: Path) -> None:
    with staging.resumable(target) as stage:
        stage.take(anew=True)
        (stage.folder / MANIFEST).write_text("new")
        (stage.state / "journal").write_text("its own")
        dying.die_at(target.parent, ("open", "/out"))  # to sync the new name


def test_a_run_killed_behind_the_exchange_leaves_nothing_to_go_on_from(target: Path) -> None:
    """The folder beside its state is the old artifact then, which the state is not of."""
    write_artifact(target)
    run = multiprocessing.get_context("fork").Process(
        target=_dies_behind_the_exchange, args=(target,)
    )
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL and (target / MANIFEST).read_text() == "new"
    assert (target.parent / ".model.partial" / "artifact" / "weights").read_text() == "old"
    for text in ("half", "whole"):  # the second goes on with what the first did
        with suppress(KeyboardInterrupt), staging.resumable(target) as stage:
            assert stage.state.exists() == (text == "whole") == stage.folder.exists()
            stage.take(anew=False)
            (stage.folder / MANIFEST).write_text(text)
            stage.promise = "goes on"
            if text == "half":
                raise KeyboardInterrupt
    assert _held(target) == "whole" and left(target) == ["model"]


def test_a_disk_that_fails_at_the_end_is_one_line(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_artifact(target)
    monkeypatch.setattr(staging, "settle_all", full)
    with pytest.raises(SpaceError, match=rf"^{target} cannot be put in place: .*No space left"):
        publish(target)
    assert _held(target) == "old" and left(target) == ["model"]


def test_an_empty_folder_gives_way(target: Path) -> None:
    target.mkdir(parents=True)
    publish(target)
    assert os.listdir(target) == [MANIFEST] and left(target) == ["model"]


def test_a_link_gives_way_and_what_it_led_to_stays(target: Path, tmp_path: Path) -> None:
    old = write_artifact(tmp_path / "elsewhere")
    target.parent.mkdir()
    target.symlink_to(old)
    for text in ("first", "second"):
        staging.check_target(target, force=True)
        publish(target, text)
    assert not target.is_symlink() and (target / MANIFEST).read_text() == "second"
    assert left(target) == ["model"] and (old / MANIFEST).read_text() == "old"


def test_what_a_crash_in_between_left_is_cleared(target: Path) -> None:
    write_artifact(target.with_name(".model.replaced"), "older")
    write_artifact(target)
    publish(target)
    assert left(target) == ["model"] and (target / MANIFEST).read_text() == "new"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    partial = tmp_path / "file" / ".model.partial"
    with (
        pytest.raises(SourceError, match=rf"{partial} cannot be written: Not a directory"),
        staging.staged(tmp_path / "file" / "model"),
    ):
        pytest.fail("there is nowhere to write")


PROMISE = "continues when run again"


def cut_short(target: Path, fault: BaseException, promise: str | None = PROMISE) -> BaseException:
    """What came out of a run that did something and then failed."""
    with pytest.raises(type(fault)) as caught, staging.resumable(target) as stage:
        stage.take(anew=True)
        (stage.folder / "half").write_text("x")
        (stage.state / "journal").write_text("far")
        stage.promise = promise
        raise fault
    return caught.value


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SpaceError("full"), RuntimeError("a bug")])
def test_what_can_be_gone_on_with_survives_and_says_so(target: Path, fault: BaseException) -> None:
    assert cut_short(target, fault).__notes__ == [PROMISE]
    assert left(target) == [".model.partial"]
    with staging.resumable(target) as stage:
        stage.take(anew=False)
        assert (stage.state / "journal").read_text() == "far"
        assert (stage.folder / "half").read_text() == "x"
    assert os.listdir(target) == ["half"] and left(target) == ["model"]


@pytest.mark.parametrize(
    ("fault", "promise"), [(SourceError("bad"), PROMISE), (KeyboardInterrupt(), None)]
)
def test_a_refusal_and_a_run_that_did_nothing_leave_nothing(
    target: Path, fault: BaseException, promise: str | None
) -> None:
    assert not hasattr(cut_short(target, fault, promise), "__notes__")
    assert left(target) == []


def test_another_commands_work_is_left_alone_until_it_is_taken(target: Path) -> None:
    cut_short(target, KeyboardInterrupt())
    with pytest.raises(SourceError), staging.resumable(target):
        raise SourceError("refused before it began")
    with staging.resumable(target) as stage:
        assert (stage.state / "journal").read_text() == "far" and stage.bytes() == 4
        stage.take(anew=True)
        assert not list(stage.state.iterdir()) and not list(stage.folder.iterdir())
        assert stage.bytes() == 0
    assert os.listdir(target) == []


def hold(target: Path, ready: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with staging.staged(target) as folder:
        (folder / "theirs").write_text("x")
        (folder / "deep").mkdir()
        ready.send(folder)
        ready.recv()


@pytest.fixture
def other_run(target: Path) -> Iterator[OtherRun]:
    run = OtherRun(target)
    yield run
    run.process.kill()
    run.process.join()


class OtherRun:
    """Another process in the middle of writing `target`."""

    def __init__(self, target: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=hold, args=(target, theirs), daemon=True)
        self.process.start()
        self.folder: Path = self.pipe.recv()

    def finish(self) -> None:
        self.pipe.send("go on")
        self.process.join()

    def kill(self) -> None:
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def test_two_runs_do_not_write_one_target(target: Path, other_run: OtherRun) -> None:
    with pytest.raises(TargetExists, match=f"another process is writing {target} at this moment"):
        publish(target)
    assert (other_run.folder / "theirs").exists(), "the refused run took the other's work away"
    other_run.finish()
    assert other_run.process.exitcode == 0
    assert sorted(os.listdir(target)) == ["deep", "theirs"] and left(target) == ["model"]


def test_two_targets_are_written_at_once(target: Path, other_run: OtherRun) -> None:
    publish(target.with_name("another"))
    other_run.finish()
    assert left(target) == ["another", "model"]


def test_what_a_killed_run_left_is_cleared_by_the_next(target: Path, other_run: OtherRun) -> None:
    other_run.kill()
    assert left(target) == [".model.partial"]
    with staging.staged(target) as folder:
        assert folder == other_run.folder
        assert os.listdir(folder) == []
    assert os.listdir(target) == [] and left(target) == ["model"]


def test_ctrl_c_in_another_process_leaves_nothing(target: Path, other_run: OtherRun) -> None:
    assert other_run.process.pid
    os.kill(other_run.process.pid, signal.SIGINT)
    other_run.process.join()
    assert left(target) == []
