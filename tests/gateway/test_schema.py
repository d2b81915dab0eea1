"""Unmodified schemathesis sends what `/openapi.json` allows and forbids, and judges the answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import ROOT, WHOLE_RUN_S

pytest.importorskip("schemathesis")

#: Some fields depend on each other (`tool_choice` needs `tools`), which the schema does not say.
LEFT_OUT = "positive_data_acceptance"


def with_bounds(document: dict[str, Any]) -> dict[str, Any]:
    """The document, changed so that requests reach a model and answers end soon."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties:
            properties["model"] = {"type": "string", "enum": [MODEL]}
        for name, most in (
            ("max_tokens", 8),
            ("max_completion_tokens", 8),
            ("max_output_tokens", 8),
            ("n", 3),
            ("best_of", 3),
        ):
            field = properties.get(name, {})
            for option in field.get("anyOf", [field]):
                if option.get("type") == "integer":
                    option["maximum"] = most
    return document


def test_the_document_and_the_answers_agree(gateway: GatewayProcess, tmp_path: Path) -> None:
    file = tmp_path / "openapi.json"
    document = with_bounds(httpx.get(f"{gateway.url}/openapi.json").json())
    file.write_text(json.dumps(document))
    operations = sum(map(len, document["paths"].values()))
    # In a separate process, since its libraries' warnings are not ours.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", gateway.url),
            *("--phases", "fuzzing", "--max-examples", "10", "--generation-deterministic"),
            *("--exclude-checks", LEFT_OUT, "--request-timeout", "120"),
            # What it would do to the bus is tested elsewhere.
            *("--exclude-path", "/bus/drain", "--no-color"),
        ],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WHOLE_RUN_S,
    )
    assert done.returncode == 0 and f"Tested: {operations - 1}" in done.stdout, (
        done.stdout[:8000] + "\n...\n" + done.stdout[-4000:] + done.stderr[-4000:]
    )
    gateway.bus.wait_idle()


def test_the_error_for_a_wrong_method_lists_the_allowed_ones(
    gateway: GatewayProcess,
) -> None:
    for path, operations in httpx.get(f"{gateway.url}/openapi.json").json()["paths"].items():
        answer = httpx.request("PATCH", gateway.url + path.replace("{id}", "resp_x"))
        error = answer.json()["error"]
        assert answer.status_code == 405
        assert "does not take" in (error if path.startswith("/api/") else error["message"])
        allowed = set(answer.headers["allow"].lower().split(", "))
        assert set(operations) <= allowed <= {*operations, "head"}, path
