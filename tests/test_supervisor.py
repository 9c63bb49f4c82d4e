"""The real supervisor over a stand-in worker: somebody answers, whatever is done to the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path

import httpx
import psutil

from serve import supervisor
from tests.supervised import Parent, supervised
from tests.test_listening import write_certificate


class Stream(threading.Thread):
    """A client that reads events to their end; `told` is the last one, "" where it was cut."""

    def __init__(self, parent: Parent, name: str = "never") -> None:
        super().__init__()
        parent.worker()  # is there
        self._address = f"{parent.url}/do/stream/{name}"
        self.begun, self.told = threading.Event(), ""
        self.start()
        assert self.begun.wait(60)

    def run(self) -> None:
        with httpx.stream("GET", self._address, timeout=300) as reply:
            for line in reply.iter_lines():
                self.told = line or self.told
                self.begun.set()

    def last(self) -> str:
        self.join(60)
        return self.told


def alone(parent: Parent) -> None:
    """The parent answers: alive, not ready, and whoever asks for more may come back."""
    assert parent.ask("/livez").status_code == 200
    assert parent.ask("/readyz").status_code == parent.ask("/health").status_code == 503
    refused = parent.ask("/v1/chat/completions", "POST", json={})
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "server_not_ready"


def test_it_answers_while_a_worker_loads_and_then_leaves_that_to_the_worker(
    tmp_path: Path,
) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "load").write_text("1")
    with supervised(tmp_path) as parent:
        alone(parent)
        assert parent.worker()["orders"][0] == "past 0 none"
        parent.until_said("ready after")
        assert f"{parent.url}/v1" in parent.said() and ":0/" not in parent.said()


def test_a_first_start_that_fails_ends_it_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "dies").write_text("ValueError: group 48 has no kernel")
    with supervised(tmp_path) as parent:
        assert parent.process.wait(60) == 2
        assert "did not start: ValueError: group 48 has no kernel" in parent.said()


def test_it_answers_in_the_pause_between_two_workers(tmp_path: Path) -> None:
    with supervised(tmp_path, pauses_s=[600.0]) as parent:
        os.kill(parent.worker()["pid"], signal.SIGKILL)
        parent.until_said("starting another in 600 s")
        alone(parent)
        shown = parent.ask("/metrics").text
        assert 'quantserve_last_restart_info{reason="worker_died"} 1.0' in shown
        assert "quantserve_engine_restarts_total 1.0" in shown and "quantserve_ready 0.0" in shown
        assert "quantserve_build_info{" in shown
        assert "the worker ended (killed by signal 9, Killed)" in parent.said()


def test_a_new_worker_is_told_how_many_ended_and_why(tmp_path: Path) -> None:
    with supervised(tmp_path) as parent:
        old = parent.worker()
        os.kill(old["engine"], signal.SIGKILL)
        parent.until(lambda: parent.worker()["pid"] != old["pid"])
        assert parent.worker()["orders"][0] == "past 1 engine_died"


def test_an_engine_that_dies_ends_streams_with_a_word_and_nobody_waits(tmp_path: Path) -> None:
    with supervised(tmp_path, pauses_s=[600.0]) as parent:
        stream = Stream(parent)
        os.kill(parent.worker()["engine"], signal.SIGKILL)
        assert stream.last() == "data: error"
        parent.until_said("starting another")
        alone(parent)
        assert "the worker ended (the engine died)" in parent.said()


def test_a_stopped_engine_is_found_while_everybody_is_answered(tmp_path: Path) -> None:
    with supervised(tmp_path, pauses_s=[600.0]) as parent:
        stream, worker = Stream(parent), parent.worker()
        os.kill(worker["engine"], signal.SIGSTOP)
        parent.until(lambda: parent.ask("/readyz").status_code == 503, "for not ready")
        assert parent.ask("/livez").status_code == 200
        assert stream.last() == "data: error"
        parent.until_said("the engine was stopped by a signal for")
        parent.until_said("starting another")
        assert 'reason="engine_hung"' in parent.ask("/metrics").text


def test_a_stopped_engine_that_goes_on_is_ready_again(tmp_path: Path) -> None:
    with supervised(tmp_path, stopped_s=600.0) as parent:
        worker = parent.worker()
        os.kill(worker["engine"], signal.SIGSTOP)
        parent.until(lambda: parent.ask("/readyz").status_code == 503)
        os.kill(worker["engine"], signal.SIGCONT)
        parent.until(lambda: parent.ask("/readyz").status_code == 200)
        assert parent.worker()["pid"] == worker["pid"]


def test_a_stopped_worker_is_found_and_the_parent_answers_beside_it(tmp_path: Path) -> None:
    with supervised(tmp_path, stopped_s=4.0) as parent:
        worker = parent.worker()
        os.kill(worker["pid"], signal.SIGSTOP)
        alone(parent)
        assert "the worker takes no new connections; answering in its place" in parent.said()
        parent.until_said("the API was stopped by a signal for")
        assert parent.worker()["orders"][0] == "past 1 worker_hung"


def test_a_loop_that_computes_for_long_is_waited_for_and_others_are_answered(
    tmp_path: Path,
) -> None:
    with supervised(tmp_path) as parent:
        worker = parent.worker()
        parent.ask("/do/parse/4")
        alone(parent)
        assert parent.worker()["pid"] == worker["pid"], "the worker answers again, the same one"


def test_a_long_step_of_the_engine_is_no_hang(tmp_path: Path) -> None:
    with supervised(tmp_path, rest_s=1.0) as parent:
        worker = parent.worker()
        parent.ask("/do/compute/4")
        spent = psutil.Process(worker["engine"]).cpu_times
        before = sum(spent()[:2])
        parent.until(lambda: sum(spent()[:2]) > before + 3, "for the engine to compute")
        assert parent.ask("/readyz").status_code == 200
        assert parent.worker()["pid"] == worker["pid"]


def test_a_step_without_end_is_one(tmp_path: Path) -> None:
    with supervised(tmp_path, step_s=2.0) as parent:
        parent.worker()
        parent.ask("/do/compute/600")
        parent.until_said("the engine has taken no step for")


def test_a_worker_that_hangs_while_it_loads_is_found(tmp_path: Path) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "load").write_text("hang")
    with supervised(tmp_path, start_quiet_s=1.0) as parent:
        assert parent.process.wait(60) == 2
        assert "nothing was logged or computed for" in parent.said()


def test_a_drained_worker_lives_on_and_stays_drained(tmp_path: Path) -> None:
    with supervised(tmp_path, rest_s=0.5) as parent:
        stream, worker = Stream(parent, "enough"), parent.worker()
        parent.ask("/do/drain")
        assert parent.ask("/readyz").status_code == 503
        watched = psutil.Process(parent.process.pid).cpu_times
        before = sum(watched()[:2])
        parent.until(lambda: sum(watched()[:2]) > before + 0.1, "for some looks at the worker")
        (parent.files / "enough").touch()
        assert stream.last() == "data: [DONE]"
        assert parent.worker()["pid"] == worker["pid"] and "ended" not in parent.said()
        os.kill(worker["pid"], signal.SIGKILL)
        parent.until(lambda: parent.worker()["pid"] != worker["pid"])
        assert parent.ask("/readyz").status_code == 503, "nor does a new one admit anybody"


def test_sigterm_lets_streams_end_and_answers_until_then(tmp_path: Path) -> None:
    with supervised(tmp_path) as parent:
        stream = Stream(parent, "enough")
        parent.signal(signal.SIGTERM)
        parent.until_said("draining: up to 30 s")
        parent.until(lambda: parent.ask("/readyz").status_code == 503)
        assert parent.ask("/livez").status_code == 200
        (parent.files / "enough").touch()
        assert stream.last() == "data: [DONE]"
        assert parent.process.wait(60) == 0


def test_streams_longer_than_the_drain_are_told(tmp_path: Path) -> None:
    with supervised(tmp_path, drain_timeout=0.3) as parent:
        stream = Stream(parent)
        parent.signal(signal.SIGTERM)
        assert stream.last() == "data: error"
        assert parent.process.wait(60) == 0


def test_a_second_sigterm_is_at_once(tmp_path: Path) -> None:
    with supervised(tmp_path, drain_timeout=600) as parent:
        Stream(parent)
        worker = psutil.Process(parent.worker()["pid"])
        parent.signal(signal.SIGTERM)
        parent.until_said("draining")
        parent.signal(signal.SIGTERM)
        assert parent.process.wait(60) == 0
        worker.wait(60)


def test_sigterm_while_loading_is_at_once(tmp_path: Path) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "load").write_text("hang")
    with supervised(tmp_path, drain_timeout=600) as parent:
        parent.until_said("waiting for")
        parent.signal(signal.SIGTERM)
        assert parent.process.wait(60) == 0


LOGS = (b"x" * (3 << 20), b"\n" * 100_000, bytes(range(256)) * 1000, b"ERROR " + b"\xff\0" * 99)


def test_no_log_stops_the_worker_or_the_restart(tmp_path: Path) -> None:
    with supervised(tmp_path) as parent:
        worker = parent.worker()
        for logged in LOGS:
            (parent.files / "say").write_bytes(logged)
            for _ in range(3):
                parent.ask("/do/say")
        assert parent.worker()["pid"] == worker["pid"]
        os.kill(worker["pid"], signal.SIGKILL)
        parent.until(lambda: parent.worker()["pid"] != worker["pid"])
        assert len(parent.said()) < 2 << 20


def test_an_old_error_of_a_client_is_no_reason_for_an_end(tmp_path: Path) -> None:
    with supervised(tmp_path, recent_s=0.2) as parent:
        (parent.files / "say").write_bytes(b"ValueError: an empty conversation\n")
        parent.worker()
        parent.ask("/do/say")
        parent.until_said("empty conversation")
        Stream(parent, "stays").begun.wait()
        (parent.files / "stays").touch()
        parent.worker()
        os.kill(parent.worker()["pid"], signal.SIGKILL)
        parent.until_said("the worker ended (killed by signal 9, Killed)")


def test_a_spawn_that_fails_is_tried_again(tmp_path: Path) -> None:
    command = tmp_path / "python"
    with supervised(tmp_path, command=[str(command), "-m", "tests.stand_in_worker"]) as parent:
        parent.until_said("no process could be started: No such file or directory", 3)
        alone(parent)
        command.write_text(f'#!/bin/sh\nexec "{os.sys.executable}" "$@"\n')  # type: ignore[attr-defined]
        command.chmod(0o755)
        assert parent.worker()["orders"][0].endswith("spawn_failed")


def test_pauses_grow_for_workers_that_die_soon_however_long_they_loaded(tmp_path: Path) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "load").write_text("5")  # longer than steady, which a kill is not
    pauses = [0.01, 0.02, 0.03]
    with supervised(tmp_path, pauses_s=pauses, steady_s=4, tick_s=0.01) as parent:
        for wait in pauses[1:]:
            os.kill(parent.worker()["pid"], signal.SIGKILL)
            parent.until_said(f"starting another in {wait:g} s")


def test_orphans_are_buried(tmp_path: Path) -> None:
    with supervised(tmp_path) as parent:
        for _ in range(3):
            old = parent.worker()["pid"]
            os.kill(old, signal.SIGKILL)
            parent.until(partial(lambda pid: not psutil.pid_exists(pid), old))
        children = psutil.Process(parent.process.pid).children
        parent.until(lambda: [c.pid for c in children()] == [parent.worker()["pid"]], "for one")


def test_sighup_rereads_the_keys_here_and_has_the_worker_do_so(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a:metrics:sk-old-0123456789\n")
    with supervised(tmp_path, api_key_file=keys, pauses_s=[600.0]) as parent:
        worker = parent.worker()
        keys.write_text("a:metrics:sk-new-0123456789\nb:inference:sk-app-0123456789\n")
        parent.signal(signal.SIGHUP)
        parent.until(lambda: "reload" in parent.worker()["orders"])
        keys.write_text("nonsense")
        parent.signal(signal.SIGHUP)
        parent.until_said("the keys stay as they were")
        os.kill(worker["pid"], signal.SIGKILL)
        parent.until_said("starting another")

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return parent.ask("/metrics", headers=headers).status_code

        assert status("sk-new-0123456789") == 200 and status("sk-old-0123456789") == 401
        assert status("sk-app-0123456789") == 403 and parent.ask("/metrics").status_code == 401
        keys.write_text("a:metrics:sk-third-0123456789\n")  # and no signal: revoked is revoked
        assert status("sk-new-0123456789") == 401 and status("sk-third-0123456789") == 200


def test_the_address_is_the_one_that_was_bound(tmp_path: Path) -> None:
    with supervised(tmp_path, host="::1") as parent:
        assert parent.url.startswith("http://[::1]:") and parent.worker()["pid"]
        parent.until_said("ready after")
        assert f"{parent.url}/v1" in parent.said()


def test_https_is_spoken_by_the_parent_and_by_the_worker(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    tls = ("--ssl-certfile", str(cert), f"--ssl_keyfile={key}")
    with supervised(tmp_path, *tls, pauses_s=[600.0], rest_s=1.0) as parent:
        assert parent.url.startswith("https://127.0.0.1:")
        worker = parent.worker()
        parent.until_said("ready after")
        assert f"{parent.url}/v1" in parent.said() and "ended" not in parent.said()
        os.kill(worker["pid"], signal.SIGKILL)
        parent.until_said("starting another")
        alone(parent)


def test_a_folder_of_the_users_called_serve_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Python looks for `-m serve.worker` where the command is typed, first of all."""
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "__init__.py").write_text("print('theirs')")
    (tmp_path / "serve" / "errors.py").touch()
    *worker, _ = supervisor.WORKER
    done = subprocess.run([*worker, "serve.errors"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
