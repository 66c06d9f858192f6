"""Every error the product raises on purpose.

::

    LltmRayError                 500
    ├── ConfigError              400   a setting or request field is wrong
    │   └── SessionNotFoundError 404   no conversation is kept under this name
    ├── AuthenticationError      401   no key, or not one of ours
    ├── MissingExtraError        501   an optional package is not installed
    ├── ModelError               500
    │   ├── ModelNotFoundError   404
    │   ├── ModelFormatError     422   not a GGUF, truncated, or hostile
    │   ├── ModelDownloadError   502   the hub or a mirror failed us
    │   └── ModelDoesNotFitError 507
    ├── EngineError              500
    │   ├── EngineStartError     503   the server ended, or was not ready in time
    │   ├── EngineExitedError    503   the server died while in use
    │   ├── EngineNotReadyError  503   carries `retry_after_s` where an engine may come
    │   └── ServerBinaryError    500   no usable llama-server, or a bad download
    ├── RequestTooLargeError     413
    ├── OverloadedError          429   carries `retry_after_s`
    ├── DeadlineError            504   the request's own deadline passed
    ├── UpstreamError            as sent by llama-server, passed on unchanged
    ├── PlacementError           507   the cluster has no room for a share
    ├── CacheFullError           507   a paged KV cache has no free block
    ├── NativeError              500   CUDA, cuBLAS or a tensor operation failed
    │   ├── DeviceError          400   no such device, or operands on different ones
    │   ├── DeviceMemoryError    507   no room for a tensor
    │   ├── ShapeError           400   shapes or strides that do not fit
    │   └── DTypeError           400   a type or value that the operation does not take
    ├── ToolError                500   a program of llama.cpp failed; carries its last lines
    ├── DiskFullError            507   no room for a file
    ├── CancelledError           499   stopped on request before it was done
    ├── ExtractionError          502   a model's answer could not be read as entities and relations
    ├── CollectiveError          503   a rank of a group is dead, late, or not in the same call
    └── FleetError               409   no such fleet, or one of that name runs already

All of them pickle with their fields, so they cross actor borders whole.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


def _rebuild(cls: type[LltmRayError], message: str, fields: dict[str, Any]) -> LltmRayError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


class LltmRayError(Exception):
    """Base of all errors; `str(error)` is one sentence a user can act on."""

    http_status: int = 500
    code: ClassVar[str] = "server_error"
    retry_after_s: float | None = None
    """When another try may succeed; None: at no time that is known."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    @property
    def message(self) -> str:
        """The sentence alone, also where a subclass of another library changes `str()`."""
        return str(Exception.__str__(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))

    def as_dict(self) -> dict[str, Any]:
        """The error body that llama-server and OpenAI clients expect."""
        return {"error": {"message": self.message, "type": self.code, "code": self.http_status}}


class ConfigError(LltmRayError):
    """A setting, flag or request field that cannot be used."""

    http_status = 400
    code = "invalid_request_error"
    field: str
    value: Any
    why: str

    def __init__(self, field: str, value: Any, why: str) -> None:
        shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "…"
        super().__init__(f"{field}={shown}: {why}", field=field, value=value, why=why)


class SessionNotFoundError(ConfigError):
    """No conversation is kept under this name, for who asks."""

    http_status = 404
    code = "not_found_error"

    def __init__(self, name: str) -> None:
        super().__init__("name", name, "no such session; `lltm-ray sessions list` shows them")


class AuthenticationError(LltmRayError):
    """The request carries no key, or one that is not ours."""

    http_status = 401
    code = "authentication_error"


class MissingExtraError(LltmRayError):
    """A feature needs an optional package."""

    http_status = 501
    code = "not_supported_error"

    def __init__(self, feature: str, extra: str, install: str = "") -> None:
        install = install or f"pip install 'lltm_ray[{extra}]'"
        super().__init__(f"{feature} is not installed: {install}", feature=feature, extra=extra, install=install)


class ModelError(LltmRayError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """No file, catalogue entry or served model has this name."""

    http_status = 404
    code = "model_not_found"
    why: str

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"model {model!r} not found: {why}", model=model, why=why)


class ModelFormatError(ModelError):
    """The file is not a GGUF that can be trusted; `offset_bytes` is where reading stopped."""

    http_status = 422
    code = "model_format_error"
    offset_bytes: int

    def __init__(self, path: str, offset_bytes: int, why: str) -> None:
        super().__init__(f"{path}: byte {offset_bytes}: {why}", path=path, offset_bytes=offset_bytes, why=why)


class ModelDownloadError(ModelError):
    """A model could not be fetched; the message says what to do about it."""

    http_status = 502
    code = "model_download_error"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"cannot download {model!r}: {why}", model=model, why=why)


class ModelDoesNotFitError(ModelError):
    """The share's memory is too small for the model at its smallest useful setting."""

    http_status = 507
    code = "model_does_not_fit"
    need_bytes: int
    free_bytes: int

    def __init__(self, model: str, need_bytes: int, free_bytes: int, remedy: str) -> None:
        super().__init__(
            f"{model} needs {need_bytes / 2**20:,.1f} MiB but its share has {free_bytes / 2**20:,.1f} MiB: {remedy}",
            model=model,
            need_bytes=need_bytes,
            free_bytes=free_bytes,
            remedy=remedy,
        )


class EngineError(LltmRayError):
    """An engine, or the server below it, failed."""


class EngineStartError(EngineError):
    """The server ended or was not ready before its deadline."""

    http_status = 503
    code = "engine_start_error"
    exit_code: int | None
    log_tail: str

    def __init__(self, why: str, exit_code: int | None = None, log_tail: str = "") -> None:
        tail = f"\n--- last lines of the server's log ---\n{log_tail}" if log_tail else ""
        super().__init__(f"the server did not start: {why}{tail}", why=why, exit_code=exit_code, log_tail=log_tail)


class EngineExitedError(EngineError):
    """The server ended while a request was on it; without a name of the engine, also that the connection broke."""

    http_status = 503
    code = "engine_exited"
    exit_code: int | None

    def __init__(self, engine: str, exit_code: int | None = None) -> None:
        told = "" if exit_code is None else f" (exit code {exit_code})"
        ended = f"engine {engine} ended" if engine else "llama-server ended, or the connection to it broke"
        super().__init__(ended + told, engine=engine, exit_code=exit_code)


class EngineNotReadyError(EngineError):
    """No engine can take the request now."""

    http_status = 503
    code = "unavailable_error"
    state: str
    retry_after_s: float | None = 5.0
    """As long as a small model takes to load; None where no engine will come."""

    def __init__(self, engine: str, state: str) -> None:
        super().__init__(f"{f'engine {engine}' if engine else 'llama-server'} is {state}", engine=engine, state=state)


class ServerBinaryError(EngineError):
    """No usable llama-server was found, or a downloaded one cannot be trusted."""

    code = "server_binary_error"


class RequestTooLargeError(LltmRayError):
    """The request's body or headers pass the gateway's limit."""

    http_status = 413
    code = "invalid_request_error"

    def __init__(self, part: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"request {part} of {size_bytes} bytes is over the limit of {limit_bytes} bytes",
            part=part,
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


class OverloadedError(LltmRayError):
    """Every slot is busy and the queue is full."""

    http_status = 429
    code = "overloaded_error"
    retry_after_s: float

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(f"{why}; retry in {retry_after_s:.0f} s", why=why, retry_after_s=retry_after_s)


class DeadlineError(LltmRayError):
    """The request's deadline passed before it was answered."""

    http_status = 504
    code = "timeout_error"

    def __init__(self, what: str, limit_s: float) -> None:
        super().__init__(f"{what} took longer than {limit_s:g} s", what=what, limit_s=limit_s)


class UpstreamError(LltmRayError):
    """llama-server's own error: `http_status` and `body` are the server's as they came, its message is in ours."""

    code = "upstream_error"
    body: str

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"llama-server answered {status}: {_told(body)[:2000]}", http_status=status, body=body)


_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))
"""What could steer a terminal, in a message or in a body that has none."""


def _told(body: str) -> str:
    """The message of an error body, in the shapes that servers have for it; all of one that has none."""
    try:
        told = json.loads(body)
    except (ValueError, TypeError, RecursionError):
        told = body
    for name in ("error", "message"):
        told = told.get(name, told) if isinstance(told, dict) else told
    return (told if isinstance(told, str) and told.strip() else str(body)).translate(_CONTROLS)


class PlacementError(LltmRayError):
    """The cluster cannot give an engine its share."""

    http_status = 507
    code = "placement_error"

    def __init__(self, need: str, largest_free: str) -> None:
        super().__init__(
            f"no room for an engine that needs {need}; the largest free share is {largest_free}",
            need=need,
            largest_free=largest_free,
        )


class CacheFullError(LltmRayError):
    """A paged KV cache has not the blocks that were asked for; `free_blocks` says what it has."""

    http_status = 507
    code = "cache_full"


class CollectiveError(LltmRayError):
    """A call of a group of ranks did not come to its end; `missing` names the ranks that are dead or did not come."""

    http_status = 503
    code = "collective_error"
    operation: str
    missing: tuple[int, ...]

    def __init__(self, why: str, operation: str = "", missing: tuple[int, ...] = ()) -> None:
        ranks = ", ".join(map(str, missing))
        message = f"{why}; missing: rank{'s' if len(missing) > 1 else ''} {ranks}" if missing else why
        super().__init__(message, operation=operation, missing=missing)


class FleetError(LltmRayError):
    """The named fleet is missing, or runs already."""

    http_status = 409
    code = "fleet_error"


class ToolError(LltmRayError):
    """A program of llama.cpp did not do its work; the message has its own words."""

    code = "tool_error"


class DiskFullError(LltmRayError):
    """The disk has no room for a file that is to be written."""

    http_status = 507
    code = "disk_full"


class CancelledError(LltmRayError):
    """Stopped on request before it was done."""

    http_status = 499
    code = "cancelled"


class ExtractionError(LltmRayError):
    """A model's answer could not be read; says at which character of which text."""

    http_status = 502
    code = "extraction_failed"

    def __init__(self, text: int, start: int, why: str) -> None:
        super().__init__(f"text {text}, from character {start}: {why}", text=text, start=start, why=why)


class NativeError(LltmRayError):
    """A device, a library below it, or an operation on tensors failed; the message has CUDA's own words."""


class DeviceError(NativeError):
    """No such device, or operands that are not on the same one."""

    http_status = 400
    code = "invalid_request_error"


class DeviceMemoryError(NativeError):
    """A device, or the host, has no room for a tensor."""

    http_status = 507
    code = "device_memory_error"


class ShapeError(NativeError):
    """Shapes, strides or axes that do not fit the operation."""

    http_status = 400
    code = "invalid_request_error"


class DTypeError(NativeError):
    """An element type, or a value of it, that the operation does not take."""

    http_status = 400
    code = "invalid_request_error"
