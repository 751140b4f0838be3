"""A Hugging Face hub on this machine: what the real client asks of it, for tests of what downloads.

Speaks the hub's file protocol (model info, HEAD and GET of `resolve`, ranges) and can misbehave on request.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.cli.process import environment

COMMIT = "a1b2c3d4" * 5
_PIECE = 1 << 16


@dataclass
class Asked:
    """One request for a file."""

    method: str
    repository: str
    file: str
    range: str | None


@dataclass
class HubStub:
    """What the hub holds, how it misbehaves, and what it was asked.

    Attributes:
        repositories: the files of each repository, which have one commit, `COMMIT`, and one branch, `main`.
        sizes: of files, by repository and path, that the listing makes another size of.
        gated: repositories that everybody sees and nobody may download.
        cut: files that end after so many bytes, by path; each does once, and is whole when it is asked for again.
        stall: files that stop after so many bytes and keep the connection, by path, until `close`.
        stalled: set once one of them does.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        """Put a folder's files into a repository."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repositories[name] = files | more

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for, in order."""
        return [one.file for one in self.asked if one.method == "GET"]

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a client: this hub, and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
        }

    def client(self, home: Path, code: str, *arguments: str) -> str:
        """What Python code prints in a process whose hub this is; the client reads its settings when it is imported."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            check=True,
            capture_output=True,
            env=environment(home / "ifprune", **self.env(home)),
            timeout=120,
        )
        return done.stdout.decode()


@contextmanager
def serve() -> Iterator[HubStub]:
    """A running hub without repositories."""
    stub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    server.daemon_threads = True
    stub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        stub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: HubStub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "", "no such page")

    def _info(self, name: str, revision: str) -> None:
        if not self._known(name, revision):
            return
        files = self.stub.repositories[name]
        siblings = [
            {"rfilename": file, "size": self.stub.sizes.get((name, file), len(data)), "blobId": _etag(data)}
            for file, data in files.items()
        ]
        info = {"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}
        if name in self.stub.parameters:
            total = self.stub.parameters[name]
            info["safetensors"] = {"parameters": {"F32": total}, "total": total}
        body = json.dumps(info).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _file(self, name: str, revision: str, file: str) -> None:
        wanted = self.headers.get("Range")
        self.stub.asked.append(Asked(self.command, name, file, wanted))
        if not self._known(name, revision):
            return
        if name in self.stub.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        data = self.stub.repositories[name].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {
            "ETag": f'"{_etag(data)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(data) - start),
        }
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if wanted else 200, headers)
        if self.command == "HEAD":
            return
        end = self.stub.cut.pop(file, self.stub.stall.get(file, len(data)))
        try:
            for at in range(start, end, _PIECE):
                self.wfile.write(data[at : min(at + _PIECE, end)])
        except OSError:  # the client is gone
            self.close_connection = True
        if file in self.stub.stall:
            self.stub.stalled.set()
            self.stub.closing.wait(60)
        if end < len(data):
            self.close_connection = True

    def _known(self, name: str, revision: str) -> bool:
        if name not in self.stub.repositories:
            self._refuse(401 if name.startswith("private/") else 404, "RepoNotFound", "Repository not found")
            return False
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return False
        return True

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._head(status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Requests are kept in `asked`."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def command_lines(stub: HubStub, home: Path, lines: Sequence[Sequence[str | Path]]) -> list[tuple[int, str]]:
    """The exit code and stderr of each of several command lines, run in one process that the stub is the hub of."""
    code = (
        "import json, sys; from tests.cli.process import run_here; "
        "done = [run_here(*line) for line in json.loads(sys.argv[1])]; "
        "print(json.dumps([(one.returncode, one.stderr) for one in done]))"
    )
    given = json.dumps([[str(argument) for argument in line] for line in lines])
    return [(code, text) for code, text in json.loads(stub.client(home, code, given))]
