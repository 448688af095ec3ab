"""Errors of the sandbox service, the same ones on both sides of the wire.

    SandboxError                every failure; carries a stable `code` (runtime_server.wire.Code)
    ├── BadRequest              the request makes no sense            400
    ├── Unauthorized            no key, or a wrong one                401
    ├── NotFound                no such sandbox, file or route        404
    ├── Conflict                not while it is paused, not twice     409
    ├── Gone                    the sandbox died or expired           410
    ├── TooLarge                body or file above the limit          413
    ├── Unavailable             draining, queue timeout, unreachable  503
    ├── Full                    no room left on a disk                507
    └── Internal                our fault                             500

What it does not do: no HTTP; `app` maps errors to answers and `client` maps answers to errors.
"""

from __future__ import annotations

from typing import Any

from runtime_server.wire import Code, Failure


class SandboxError(Exception):
    """Root. `str(error)` says what was wrong, what is allowed and what to do next."""

    status = 500
    default = Code.INTERNAL

    def __init__(self, message: str, code: Code | None = None, **detail: Any) -> None:
        super().__init__(message)
        self.code = self.default if code is None else code
        self.detail = detail

    @property
    def infrastructure(self) -> bool:
        """True when the policy cannot have caused it; the trainer masks such an episode."""
        return self.code.infrastructure

    def failure(self) -> Failure:
        return Failure(code=self.code, message=str(self), detail=self.detail)


class BadRequest(SandboxError):
    status, default = 400, Code.BAD_REQUEST


class Unauthorized(SandboxError):
    status, default = 401, Code.UNAUTHORIZED


class NotFound(SandboxError):
    status, default = 404, Code.NOT_FOUND


class Conflict(SandboxError):
    status, default = 409, Code.PAUSED


class Gone(SandboxError):
    status, default = 410, Code.SANDBOX_DIED


class TooLarge(SandboxError):
    status, default = 413, Code.TOO_LARGE


class Unavailable(SandboxError):
    status, default = 503, Code.UNREACHABLE


class Full(SandboxError):
    status, default = 507, Code.DISK_FULL


class Internal(SandboxError):
    status, default = 500, Code.INTERNAL


BY_STATUS: dict[int, type[SandboxError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        Unauthorized,
        NotFound,
        Conflict,
        Gone,
        TooLarge,
        Unavailable,
        Full,
        Internal,
    )
}


def from_failure(status: int, failure: Failure) -> SandboxError:
    """The error that a server's answer stands for; an unknown code counts as internal."""
    code = Code(failure.code) if failure.code in set(Code) else Code.INTERNAL
    return BY_STATUS.get(status, SandboxError)(failure.message, code, **failure.detail)
