"""The OpenAPI document: what the framework knows of the routes, and what it cannot know.

What it is
    `document(app)`: bodies of answers, every failure with its codes, the two ways to send the key, the
    Idempotency-Key, streams, and an example of every body that is sent. `GET /openapi.json` serves it.

What it does not do
    The dialects of foreign clients are not in it. It changes no behaviour.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from runtime_server import wire
from runtime_server import wire_lifecycle as life
from runtime_server.errors import BY_STATUS
from runtime_server.wire import Code

Json = dict[str, Any]
REF = "#/components/schemas/{model}"
BYTES: Json = {"schema": {"type": "string", "format": "binary"}}
ANY, TAR, LINES, EVENTS = (
    "application/octet-stream",
    "application/x-tar",
    "application/x-ndjson",
    "text/event-stream",
)
BOX = "/v1/sandboxes/{identity}"
# Answers of routes that do not name them; a text is a media type, None is no body.
ANSWERS: dict[tuple[str, str], dict[int, type[BaseModel] | str | None]] = {
    ("get", "/health"): {200: wire.Health},
    ("get", "/metrics"): {200: "text/plain"},
    ("get", "/v1/capabilities"): {200: wire.Capabilities},
    ("get", "/v1/capacity"): {200: life.Capacity},
    ("post", "/v1/prefetch"): {200: life.Prefetched},
    ("post", "/v1/sandboxes"): {201: wire.Sandbox, 202: wire.Sandbox},
    ("get", "/v1/sandboxes"): {200: wire.SandboxList},
    ("get", BOX): {200: wire.Sandbox},
    ("delete", BOX): {204: None},
    ("post", f"{BOX}/exec"): {200: wire.ExecResult},
    ("post", f"{BOX}/renew"): {200: wire.Sandbox},
    ("post", f"{BOX}/kill"): {204: None},
    ("put", f"{BOX}/files"): {200: wire.FileInfo},
    ("get", f"{BOX}/files"): {200: ANY},
    ("post", f"{BOX}/snapshot"): {201: life.Snapshot},
    ("post", f"{BOX}/fork"): {201: life.Forked},
    ("post", f"{BOX}/pause"): {200: wire.Sandbox},
    ("post", f"{BOX}/resume"): {200: wire.Sandbox},
    ("get", "/v1/snapshots"): {200: life.SnapshotList},
    ("get", "/v1/snapshots/{identity}"): {200: life.Snapshot},
    ("delete", "/v1/snapshots/{identity}"): {204: None},
}
BODIES = {("put", f"{BOX}/files"): ANY}  # raw ones, which the framework does not see
EXAMPLES: dict[str, list[Json]] = {
    "CreateSandbox": [{"limits": {"cpus": 1, "memory_mb": 512}, "ttl_s": 600, "labels": {"task": "42"}}],
    "Exec": [{"command": "echo hello; exit 3", "timeout_s": 10}, {"command": ["ls", "-l", "/"]}],
    "Renew": [{"ttl_s": 600}],
    "StartProcess": [
        {"command": "for n in 1 2 3; do echo $n; sleep 1; done"},
        {"command": "cat", "stdin": True},
    ],
    "Input": [{"data": "a line\n"}, {"data": "AAH/", "encoding": "base64", "close": True}],
    "Signal": [{"signal": "SIGINT"}, {"signal": 10}],
    "Terminal": [{"columns": 120, "rows": 40}],
    "OpenSession": [{"name": "main", "env": {"CI": "1"}}],
    "Run": [{"command": "cd /tmp && export A=1", "timeout_s": 10}, {"command": "make", "stream": True}],
    "Rest": [{"timeout_s": 10}],
    "Interrupt": [{"grace_s": 1}],
    "TakeSnapshot": [{"labels": {"step": "prepared"}}],
    "Fork": [{"count": 2}],
    "Prefetch": [{"images": {}}],
}
CODES: dict[int, list[Code]] = {
    400: [Code.BAD_REQUEST, Code.FILE_ERROR, Code.ARCHIVE_REFUSED, Code.CREATE_FAILED],
    401: [Code.UNAUTHORIZED],
    404: [
        Code.NOT_FOUND,
        Code.SANDBOX_NOT_FOUND,
        Code.FILE_NOT_FOUND,
        Code.PROCESS_NOT_FOUND,
        Code.SESSION_NOT_FOUND,
        Code.SNAPSHOT_NOT_FOUND,
        Code.IMAGE_MISSING,
        Code.CREATE_FAILED,
    ],
    405: [Code.BAD_REQUEST],
    409: [
        Code.PAUSED,
        Code.SESSION_EXISTS,
        Code.SESSION_BUSY,
        Code.INPUT_CLOSED,
        Code.TOO_MANY,
        Code.STREAMED,
    ],
    410: [Code.SANDBOX_DIED, Code.OOM, Code.EXPIRED, Code.EVICTED, Code.INTERRUPTED, Code.SESSION_ENDED],
    413: [Code.TOO_LARGE],
    500: [Code.INTERNAL, Code.CREATE_FAILED, Code.DISK_FULL],
    503: [Code.SERVER_DRAINING, Code.QUEUE_TIMEOUT, Code.QUOTA, Code.NOT_READY, Code.UNREACHABLE],
    507: [Code.DISK_FULL],
}
KEY: Json = {
    "name": wire.IDEMPOTENCY_HEADER,
    "in": "header",
    "required": False,
    "description": "A call repeated with the same key has one effect, and the same answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": wire.KEY_MAX, "pattern": "^[!-~]+$"},
}


def document(app: FastAPI) -> Json:
    """Made once."""
    if app.openapi_schema is None:
        spec = get_openapi(title=app.title, version=app.version, routes=app.routes, description=_about())
        components = spec.setdefault("components", {})
        schemas: Json = components.setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas.update(_models())
        for name, examples in EXAMPLES.items():
            if name in schemas:
                schemas[name]["examples"] = examples
        components["responses"] = {_failure(status): _failed(status) for status in CODES}
        components["securitySchemes"] = {
            "ApiKey": {"type": "apiKey", "in": "header", "name": wire.API_KEY_HEADER},
            "Bearer": {"type": "http", "scheme": "bearer"},
        }
        spec["security"] = [{"ApiKey": []}, {"Bearer": []}]
        for path, methods in spec["paths"].items():
            for method, operation in methods.items():
                _complete(method, path, operation)
        app.openapi_schema = spec
    return app.openapi_schema


def methods_of(app: FastAPI, path: str) -> set[str]:
    """What may be done with this path: the framework names only those of the first route that has it."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return {method for route in routes for method in route.methods or ()}


def _about() -> str:
    return "Sandboxes for agents. Every answer that is no success has the body `Failed`, with a stable code."


def _models() -> Json:
    """Of the answers that no route names, and of the failure."""
    wanted: dict[str, type[BaseModel]] = {"Failed": wire.Failed}
    for answers in ANSWERS.values():
        wanted |= {m.__name__: m for m in answers.values() if isinstance(m, type)}
    _, made = models_json_schema([(m, "serialization") for _, m in sorted(wanted.items())], ref_template=REF)
    definitions: Json = made["$defs"]
    definitions["Failure"]["properties"]["code"]["enum"] = [code.value for code in Code]
    return definitions


def _failure(status: int) -> str:
    return f"Failure{status}"


def _failed(status: int) -> Json:
    kind = BY_STATUS.get(status)
    said = (kind.__doc__ or kind.__name__) if kind else "Not allowed"
    codes = ", ".join(f"`{code}`" for code in CODES[status])
    schema = {
        "allOf": [
            {"$ref": REF.format(model="Failed")},
            {"properties": {"error": {"properties": {"code": {"enum": [c.value for c in CODES[status]]}}}}},
        ]
    }
    return {"description": f"{said}: {codes}", "content": {"application/json": {"schema": schema}}}


def _complete(method: str, path: str, operation: Json) -> None:
    responses: Json = operation["responses"]
    responses.pop("422", None)
    if answers := ANSWERS.get((method, path)):
        responses.clear()
        responses.update({str(status): _answer(body) for status, body in answers.items()})
    _stream(path, responses)
    for status in CODES:
        responses[str(status)] = {"$ref": f"#/components/responses/{_failure(status)}"}
    if raw := BODIES.get((method, path)):
        operation["requestBody"] = {"required": True, "content": {raw: BYTES}}
    if method in ("post", "delete") and path.startswith("/v1/"):
        others = [p for p in operation.get("parameters", []) if p["name"] != wire.IDEMPOTENCY_HEADER]
        operation["parameters"] = [*others, KEY]
    if path == "/health":
        operation["security"] = [{"ApiKey": []}, {"Bearer": []}, {}]


def _answer(body: type[BaseModel] | str | None) -> Json:
    if body is None:
        return {"description": "Done"}
    if isinstance(body, str):
        return {"description": "The content", "content": {body: BYTES if body == ANY else {}}}
    schema = {"$ref": REF.format(model=body.__name__)}
    return {"description": "Done", "content": {"application/json": {"schema": schema}}}


def _stream(path: str, responses: Json) -> None:
    """The events of a stream, one to a line; or server-sent."""
    if not path.endswith(("/output", "/run")):
        return
    content: Json = responses["200"]["content"]
    if path.endswith("/output"):
        content["application/json"]["schema"]["description"] = "One line of the stream"
        responses["200"]["description"] = "Events: one JSON object a line, or server-sent"
        events = content.pop("application/json")["schema"]
    else:
        responses["200"]["description"] = "The result; with `stream`, events whose last has it"
        events = {"description": "As of …/output"}
    content[LINES] = {"itemSchema": events}
    content[EVENTS] = {"schema": {"type": "string"}}
