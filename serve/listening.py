"""The one socket: bound once, by the parent; its real address, and what encrypts it."""

from __future__ import annotations

import socket
import ssl

from serve.errors import SettingsError
from serve.given_files import check_plain
from serve.settings import Settings

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening, inheritable socket. SettingsError when the address cannot be had."""
    listener = None
    try:
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)  # fmt: skip
        family, *_, address = min(infos, key=lambda info: info[0] != socket.AF_INET)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as fault:
        if listener is not None:
            listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {fault.strerror}") from fault
    listener.setblocking(False)  # noqa: FBT003 - the socket API
    listener.set_inheritable(True)
    return listener


def address(listener: socket.socket, settings: Settings) -> str:
    """Where it is really reached: the port that was bound, brackets for IPv6, the scheme."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def encryption(settings: Settings) -> ssl.SSLContext | None:
    """What the socket speaks, if not plain HTTP. SettingsError names a file that does not do."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("ssl_keyfile without ssl_certfile: give both")
        return None
    for path in (settings.ssl_certfile, settings.ssl_keyfile):
        check_plain(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of ours, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=lambda: "")
    except OSError as fault:  # ssl.SSLError is one
        files = ", ".join(str(f) for f in (settings.ssl_certfile, settings.ssl_keyfile) if f)
        raise SettingsError(f"no TLS with {files}: {fault.strerror or fault}") from fault
    return context
