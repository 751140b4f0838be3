"""The OpenAPI document is true: schemathesis asks what it allows and forbids, and reads the answers by it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ifprune_mlx.serving.http import app
from ifprune_mlx.serving.http.openapi import document
from tests.ifprune_mlx.serving.http.serving import Served

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance"
)


def test_it_is_served(served: Served) -> None:
    assert served.get("/openapi.json").json() == document("checkpoint", False)


def test_every_path_of_it_is_there_and_no_other() -> None:
    found = re.findall(r'Route\("([^"]+)"', Path(app.__file__ or "").read_text(encoding="utf-8"))
    assert {path.replace(":path", "") for path in found} == set(document("checkpoint", False)["paths"])


def test_schemathesis_finds_no_lie_and_no_server_error(served: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--checks", CHECKS]
    limits = ["--max-examples", "15", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--max-time", "40"]
    limits += ["--request-timeout", "60"]
    environment = {"PATH": "/usr/bin:/bin", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [*command, *limits], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert served.get("/health").status_code == 200
