"""Object stores that run on this machine and speak the real protocols over HTTP.

moto for S3, gcp-storage-emulator for Google Cloud Storage, Microsoft's Azurite for Azure Blob. Each
yields the environment by which a user of its driver names endpoint and credentials.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

AZURITE = Path(__file__).parent.parent / ".cache/azurite/node_modules/.bin/azurite-blob"
# Azurite's own, printed in its documentation: it knows no other account.
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
START_TIMEOUT_S = 300


@contextmanager
def s3() -> Iterator[Mapping[str, str]]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@contextmanager
def gs() -> Iterator[Mapping[str, str]]:
    port = _free_port()
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    # Else the driver looks for Google's own metadata server first, to learn the kind of bucket.
    yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "NO_GCE_CHECK": "true"}
    server.stop()


@contextmanager
def az() -> Iterator[Mapping[str, str]]:
    if not AZURITE.exists():
        pytest.skip("no Azurite: tests/setup-azurite.sh installs it where there is npm")
    port = _free_port()
    # The driver speaks a newer version of the protocol than Azurite has heard of.
    flags = ("--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--blobPort", str(port))
    server = subprocess.Popen([AZURITE, *flags], stdout=subprocess.DEVNULL)
    try:
        _wait(server, port)
        yield {
            "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;"
            f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
        }
    finally:
        server.terminate()
        server.wait()


STORES: Mapping[str, Callable[[], AbstractContextManager[Mapping[str, str]]]] = {
    "s3": s3, "gs": gs, "az": az,
}  # fmt: skip


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        assert server.poll() is None, f"Azurite ended with {server.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"Azurite was not up after {START_TIMEOUT_S} s")
