"""The OpenAPI document: it is whole, and the server does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import contract
import pytest
from serverkit import KEY

from orchestrator.schema import Runtime
from runtime_server.app import create_app, default_sandboxes
from runtime_server.openapi import CODES
from runtime_server.wire import Code


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    config = Runtime()
    return create_app(config, key=KEY, sandboxes=default_sandboxes(config)).openapi()


def operations(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def test_every_route_says_what_it_answers(spec: dict[str, Any]) -> None:
    for name, operation in operations(spec):
        good = {status: said for status, said in operation["responses"].items() if status < "300"}
        assert good and "422" not in operation["responses"], name
        for status, said in good.items():
            assert (status == "204") == ("content" not in said), name
            for kind, body in said.get("content", {}).items():
                assert kind == "text/plain" or body.get("schema", {"": ""}) != {}, name
        assert {str(status) for status in CODES} < set(operation["responses"]), name


def test_every_code_belongs_to_a_status(spec: dict[str, Any]) -> None:
    assert {code for codes in CODES.values() for code in codes} == set(Code) - {Code.TIMEOUT}
    assert len(spec["components"]["securitySchemes"]) == 2 and len(spec["security"]) == 2


def test_every_body_has_an_example(spec: dict[str, Any]) -> None:
    schemas = spec["components"]["schemas"]
    for name, operation in operations(spec):
        content = operation.get("requestBody", {}).get("content", {})
        if body := content.get("application/json"):
            schema = body["schema"]
            ref = schema.get("$ref") or schema["anyOf"][0]["$ref"]
            assert schemas[ref.rpartition("/")[2]]["examples"], name


@pytest.mark.container
@pytest.mark.slow
def test_schemathesis_finds_nothing() -> None:
    done = contract.run(20, "--phases=examples,coverage,fuzzing", "--max-examples=5", "--no-shrink")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
