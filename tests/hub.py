"""A fake Hugging Face hub: no real one can be reached, and none that runs here is published.

It answers the four requests by which huggingface_hub reads a repository (commit, tree, file, and
the place a large file is redirected to), with the hub's headers and error codes as that library
reads them. What the real hub does beside (Xet, rate limits, signed URLs) it does not do.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?")
TREE = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)(/(?P<inner>[^?]+))?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)")
LARGE = re.compile(r"/large/(?P<oid>[0-9a-f]{64})")
TOKEN = "hf_of_somebody_who_may"


@dataclass
class Hub:
    """Repositories by name; of each, commits by hash, and hashes by branch."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)  # shown to TOKEN alone
    gated: set[str] = field(default_factory=set)  # listed to all, its files read by TOKEN alone
    asked: list[str] = field(default_factory=list)

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """A commit of a folder's files; returns its hash."""
        plain = (file for file in folder.rglob("*") if file.is_file())
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in plain}
        told = json.dumps([*self.commits.get(repo, ()), *sorted(files)]).encode()
        commit = hashlib.sha1(told + b"".join(files.values())).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches[repo, branch] = commit
        return commit

    def at(self, repo: str, revision: str | None) -> str | None:
        known = self.commits.get(repo, {})
        named = self.branches.get((repo, revision or "main"))
        return named or (revision if revision in known else None)


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        if large := LARGE.match(self.path):
            self._large(large["oid"])
            return
        asked = TREE.match(self.path) or FILE.match(self.path) or COMMIT.match(self.path)
        if asked is None:
            self._answer(404)
            return
        repo, known = asked["repo"], self.headers.get("authorization") == f"Bearer {TOKEN}"
        commit = self.hub.at(repo, asked["revision"])
        if repo not in self.hub.commits or (repo in self.hub.private and not known):
            # Of one that may not be seen as of one that is not there.
            self._answer(404 if known else 401, X_Error_Code="RepoNotFound")
        elif commit is None:
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif asked.re is FILE and repo in self.hub.gated and not known:
            self._answer(403, X_Error_Code="GatedRepo")
        elif asked.re is FILE:
            self._file(repo, commit, asked["name"])
        else:
            files = self.hub.commits[repo][commit]
            told = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            if asked.re is TREE:
                self._tree(files, asked["inner"])
            else:
                self._answer(200, json.dumps(told).encode())

    def _tree(self, files: dict[str, bytes], inner: str | None) -> None:
        """What lies in one folder of the repository, other folders too."""
        start = f"{inner}/" if inner else ""
        below = {name: content for name, content in files.items() if name.startswith(start)}
        if not below:
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        told: dict[str, dict[str, object]] = {}
        for name, content in below.items():
            first, deeper, _ = name.removeprefix(start).partition("/")
            kind = "directory" if deeper else "file"
            size = 0 if deeper else len(content)
            about = {"type": kind, "path": start + first, "size": size, "oid": _oid(content)[:40]}
            told[first] = about
        self._answer(200, json.dumps(list(told.values())).encode())

    def _file(self, repo: str, commit: str, name: str) -> None:
        content = self.hub.commits[repo][commit].get(name)
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        oid = _oid(content)
        if name.endswith(".safetensors"):
            self._answer(302, X_Repo_Commit=commit, ETag=f'"{oid}"', Location=f"/large/{oid}")
        else:
            self._answer(200, content, X_Repo_Commit=commit, ETag=f'"{oid}"')

    def _large(self, oid: str) -> None:
        commits = [c for versions in self.hub.commits.values() for c in versions.values()]
        contents = [content for files in commits for content in files.values()]
        self._answer(200, next(content for content in contents if _oid(content) == oid))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *told: object) -> None:
        """`asked` keeps what there is to tell."""


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
