"""A Hugging Face hub on this machine: what the real client asks of it, for tests of what downloads and uploads.

Speaks the hub's file protocol (model info, HEAD and GET of `resolve`, ranges) and, for uploads, whoami, the creation of
repositories, preupload, git-LFS batches and commits. It can misbehave on request. Xet storage is not spoken.
"""

from __future__ import annotations

import base64
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
TOKENS = {"hf_writer": "write", "hf_reader": "read"}
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
        failing: the status that a kind of request is answered with, by `create`, `batch`, `put` or `commit`.
        blobs: what was uploaded by git-LFS, by its sha256.
        ways: how each file of a commit came, `regular` or `lfs`.
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
    failing: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        """Put a folder's files into a repository."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repositories[name] = files | more

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for, in order."""
        return [one.file for one in self.asked if one.method == "GET"]

    def env(self, home: Path, token: str = "") -> dict[str, str]:
        """The environment of a client: this hub, a cache of its own, and perhaps one of `TOKENS`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
        }

    def client(self, home: Path, code: str, *arguments: str, token: str = "") -> str:
        """What Python code prints in a process whose hub this is; the client reads its settings when it is imported."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            check=True,
            capture_output=True,
            env=environment(home / "ifprune", **self.env(home, token)),
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
        if parts == ["api", "whoami-v2"]:
            if (token := self._token()) is None:
                self._refuse(401, "", "Invalid username or password.")
            else:
                access = {"displayName": "test", "role": TOKENS[token]}
                self._answer({"name": "me", "type": "user", "auth": {"type": "access_token", "accessToken": access}})
        elif parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "", "no such page")

    def do_POST(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self._body()
        if parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[-1] == "verify":
            self._answer({})
        elif TOKENS.get(self._token() or "") != "write":
            self._refuse(403, "", "You don't have the rights to do that.")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": _way(file["path"]), "shouldIgnore": False} for file in files]
            self._answer({"files": modes})
        elif parts[-1] == "batch":
            self._batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body)["objects"])
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "", "no such page")

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.rsplit("/", 1)[-1]
        if self._fails("put"):
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.stub.blobs[oid] = data
        self._head(200, {"Content-Length": "0"})

    def _create(self, asked: dict[str, str]) -> None:
        if self._fails("create"):
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        page = f"{self.stub.endpoint}/{name}"
        if name in self.stub.repositories:
            self._answer({"error": "You already created this model repo", "url": page}, 409)
            return
        self.stub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self._answer({"url": page, "name": name, "id": "0"})

    def _batch(self, name: str, objects: list[dict[str, str | int]]) -> None:
        if self._fails("batch") or not self._known(name, "main"):
            return
        base = f"{self.stub.endpoint}/lfs"
        for one in objects:
            if one["oid"] not in self.stub.blobs:  # else it is there already: nothing to do
                hrefs = {"upload": f"{base}/{one['oid']}", "verify": f"{base}/verify"}
                one["actions"] = {kind: {"href": href} for kind, href in hrefs.items()}  # type: ignore[assignment]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, dict[str, str]]]) -> None:
        if self._fails("commit") or not self._known(name, "main"):
            return
        for line in lines[1:]:
            value = line["value"]
            regular = line["key"] == "file"
            data = base64.b64decode(value["content"]) if regular else self.stub.blobs[value["oid"]]
            self.stub.repositories[name][value["path"]] = data
            self.stub.ways[value["path"]] = "regular" if regular else "lfs"
        page = f"{self.stub.endpoint}/{name}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": page, "hookOutput": ""})

    def _fails(self, kind: str) -> bool:
        if status := self.stub.failing.get(kind):
            self._refuse(status, "", f"{kind} fails")
        return bool(status)

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token if token in TOKENS else None

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

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
        self._answer(info)

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


def _way(path: str) -> str:
    """How the hub wants a file, as its default .gitattributes say."""
    return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"


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
