"""The OpenAPI document is true: schemathesis asks what it allows and forbids, and reads the answers by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.routing import APIRoute

from ifprune_mlx.serving.http.app import make_api
from tests.ifprune_mlx.serving.http.serving import Served

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance"
)


def api(*, with_key: bool) -> Any:
    service: Any = SimpleNamespace(name="checkpoint")
    metrics: Any = None
    return make_api(service, metrics, with_key=with_key)


def test_it_is_served(served: Served) -> None:
    assert served.get("/openapi.json").json() == api(with_key=False).openapi()


def test_every_path_of_it_is_there_and_no_other() -> None:
    made = api(with_key=False)
    found = {route.path_format for route in made.routes if isinstance(route, APIRoute)}
    assert found == set(made.openapi()["paths"])
    assert found == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/ifprune/tasks",
        "/v1/ifprune/selections/{hash}",
        "/metrics",
        "/health",
    }


@pytest.mark.parametrize("with_key", [False, True])
def test_it_says_where_a_key_is_needed(with_key: bool) -> None:
    document = api(with_key=with_key).openapi()
    schemes = document.get("components", {}).get("securitySchemes", {})
    assert schemes == ({"key": {"type": "http", "scheme": "bearer"}} if with_key else {})
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation.get("security", []) == ([{"key": []}] if with_key and path != "/health" else [])


def test_errors_have_the_form_of_their_api() -> None:
    for path, methods in api(with_key=False).openapi()["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status == "200":
                    continue
                name = "AnthropicError" if path.startswith("/v1/messages") else "Error"
                assert response["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
                assert status != "422"


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
