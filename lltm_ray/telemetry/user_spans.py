"""`trace`: spans of a program's own work, around a block or a function, in its own OpenTelemetry providers.

```python
@trace(operation="execute_tool")
def search(query: str) -> list[str]: ...

with trace("answer", **{"app.customer": 7}) as span:
    done = client.chat(messages)
    span.record_tokens(input=done.usage.input_tokens, output=done.usage.output_tokens)
```

Unlike the spans of calls these are current while their block runs, so calls made within are their children.
Conventions: gen-ai-agent-spans.md of the sources that `semconv` pins; `plan` is of genai-dev.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar, cast, overload

from opentelemetry.trace import Span, SpanKind, use_span

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.content import Capture
from lltm_ray.telemetry.outlet import current_outlet, fail

F = TypeVar("F", bound=Callable[..., Any])


class Operation(NamedTuple):
    """A kind of work that the conventions know."""

    subject: str
    """Attribute that `name` gives; the span is called `{operation} {name}`."""
    kind: SpanKind = SpanKind.INTERNAL
    is_subject_required: bool = False
    has_provider: bool = False
    is_named_by_function: bool = False
    """A function without a name of its own choice gives its own."""
    attributes_of: str = ""
    """Operation whose attributes it has; empty: its own."""


OPERATIONS: Final = {
    "execute_tool": Operation(names.TOOL_NAME, is_subject_required=True, is_named_by_function=True),
    "invoke_agent": Operation(names.AGENT_NAME, has_provider=True, is_named_by_function=True),
    "invoke_workflow": Operation(names.WORKFLOW_NAME, is_named_by_function=True),
    "retrieval": Operation(names.DATA_SOURCE_ID, SpanKind.CLIENT, has_provider=True),
    "plan": Operation(names.AGENT_NAME, has_provider=True, attributes_of="invoke_agent"),
}
"""`gen_ai.operation.name` -> what is known of it."""


class UserSpan:
    """An open span of a program's own."""

    def __init__(self, span: Span, allowed: Mapping[str, str], capture: Capture | None) -> None:
        self.span = span
        """OpenTelemetry's own."""
        self._allowed = allowed
        self._capture = capture

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute by its full name, or by one of the operation's keywords.

        Content, such as `tool_call_result`, is kept only where content is captured.
        """
        attribute = self._allowed.get(name, name)
        if attribute in _CONTENT:
            capture = current_outlet().capture
            if capture is None:
                return
            value = capture.clean(value if isinstance(value, str) else json.dumps(value, default=str))
        self.span.set_attribute(attribute, value)

    def record_tokens(self, *, input: int | None = None, output: int | None = None, cached: int | None = None) -> None:  # noqa: A002 - the conventions' words
        """What the work used. Cached tokens are among the input's."""
        told = (
            (names.USAGE_INPUT_TOKENS, input),
            (names.USAGE_OUTPUT_TOKENS, output),
            (names.USAGE_CACHE_READ, cached),
        )
        for name, count in told:
            if count is not None:
                self.span.set_attribute(name, count)

    def record_evaluation(
        self, name: str, *, score: float | None = None, label: str | None = None, explanation: str | None = None
    ) -> None:
        """Add a `gen_ai.evaluation.result` event: how good the work was by the measure `name`.

        Raises:
            ConfigError: neither a score nor a label.
        """
        if score is None and label is None:
            raise ConfigError("score", score, "give a score, a label, or both")
        told = (
            (names.EVALUATION_NAME, name),
            (names.EVALUATION_SCORE_VALUE, score),
            (names.EVALUATION_SCORE_LABEL, label),
            (names.EVALUATION_EXPLANATION, explanation),
        )
        self.span.add_event("gen_ai.evaluation.result", {name: value for name, value in told if value is not None})


_CONTENT: Final = frozenset(each.name for each in names.ATTRIBUTES if each.requirement == "opt-in")


@dataclass(eq=False)
class Trace:
    """What `trace` gives: a decorator, or a context manager for one `with` (or `async with`) at a time."""

    name: str | None
    operation: str | None
    attributes: dict[str, Any]
    _open: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.operation is not None and self.operation not in OPERATIONS:
            raise ConfigError("operation", self.operation, f"must be one of {', '.join(OPERATIONS)}")
        self._allowed = _keywords(self.operation) if self.operation else {}
        if self.operation is not None:
            unknown = sorted(name for name in self.attributes if "." not in name and name not in self._allowed)
            if unknown:
                why = f"{self.operation} has {', '.join(sorted(self._allowed))}; names of your own have a dot"
                raise ConfigError("attributes", unknown, why)

    def __call__(self, function: F) -> F:
        """Trace every call of a function, coroutine function, generator or async generator."""
        own = self._of(function)
        own._check()
        if inspect.isasyncgenfunction(function):
            wrapper: Any = _async_generator(own, function)
        elif inspect.isgeneratorfunction(function):
            wrapper = _generator(own, function)
        elif inspect.iscoroutinefunction(function):

            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with own.opened() as span, _current(span):
                    return await function(*args, **kwargs)

        else:

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with own.opened() as span, _current(span):
                    return function(*args, **kwargs)

        return cast("F", functools.wraps(function)(wrapper))

    def __enter__(self) -> UserSpan:
        block = self._block()
        self._open.append(block)
        span: UserSpan = block.__enter__()
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)

    async def __aenter__(self) -> UserSpan:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    @contextmanager
    def _block(self) -> Iterator[UserSpan]:
        self._check()
        with self.opened() as span, _current(span):
            yield span

    @contextmanager
    def opened(self) -> Iterator[UserSpan]:
        """A span that ends with the block, not current in it."""
        outlet = current_outlet()
        known = OPERATIONS.get(self.operation or "")
        allowed = {short: outlet.profile.renamed.get(name, name) for short, name in self._allowed.items()}
        attributes = _kept(self._told(known), allowed, outlet.capture)
        kind = known.kind if known else SpanKind.INTERNAL
        own = UserSpan(
            outlet.tracer.start_span(self._title(), kind=kind, attributes=attributes), allowed, outlet.capture
        )
        try:
            yield own
        except GeneratorExit:
            raise
        except BaseException as error:
            fail(own.span, error)
            raise
        finally:
            own.span.end()

    def _title(self) -> str:
        return " ".join(filter(None, (self.operation, self.name)))

    def _told(self, known: Operation | None) -> dict[str, Any]:
        if known is None:
            return self.attributes
        told: dict[str, Any] = {names.OPERATION_NAME: self.operation}
        if self.name:
            told[known.subject] = self.name
        if known.has_provider:
            told[names.PROVIDER_NAME] = names.PROVIDER
        return told | self.attributes

    def _check(self) -> None:
        known = OPERATIONS.get(self.operation or "")
        if not self.name and (known is None or known.is_subject_required):
            what = f"the {known.subject} of {self.operation}" if known else "what the span is called"
            raise ConfigError("name", self.name, f"must be given: {what}")

    def _of(self, function: Callable[..., Any]) -> Trace:
        """With what a function tells of itself."""
        known, attributes = OPERATIONS.get(self.operation or ""), self.attributes
        name = self.name
        if not name and (known is None or known.is_named_by_function):
            name = function.__name__ if known else function.__qualname__
        if self.operation == "execute_tool" and (doc := inspect.getdoc(function)):
            attributes = {"tool_description": doc.partition("\n")[0]} | attributes
        return Trace(name, self.operation, attributes)


@overload
def trace(name: F) -> F: ...
@overload
def trace(name: str | None = None, *, operation: str | None = None, **attributes: Any) -> Trace: ...
def trace(name: Any = None, *, operation: str | None = None, **attributes: Any) -> Any:
    """A span around a block, or around each call of a function; `@trace` alone will do.

    Args:
        name: of the span; with an operation, of what it is about: the tool, the agent, the workflow, the data source. A
            function has one already.
        operation: one of `OPERATIONS`, with the conventions' attributes. None: a span of no kind.
        attributes: with an operation, its attributes by keyword (`tool_call_id` is `gen_ai.tool.call.id`); others, and
            all without one, by their own names: `**{"app.rows": 3}`.

    Raises:
        ConfigError: no such operation or attribute, or a name is missing that the conventions require.
    """
    if callable(name):
        return Trace(None, None, {})(name)
    return Trace(name, operation, attributes)


@functools.cache
def _keywords(operation: str) -> dict[str, str]:
    """Keyword -> attribute."""
    table = OPERATIONS[operation].attributes_of or operation
    own = [each.name for each in names.ATTRIBUTES if table in each.operations.split()]
    return {name.removeprefix("gen_ai.").replace(".", "_"): name for name in own if name.startswith("gen_ai.")}


def _kept(told: Mapping[str, Any], allowed: Mapping[str, str], capture: Capture | None) -> dict[str, Any]:
    """By the attributes' full names; content only through `capture`."""
    kept = {}
    for name, value in told.items():
        attribute = allowed.get(name, name)
        if attribute not in _CONTENT:
            kept[attribute] = value
        elif capture is not None:
            kept[attribute] = capture.clean(value if isinstance(value, str) else json.dumps(value, default=str))
    return kept


def _current(span: UserSpan) -> AbstractContextManager[Span]:
    return use_span(span.span, record_exception=False, set_status_on_exception=False)


def _generator(own: Trace, function: Callable[..., Any]) -> Callable[..., Any]:
    """One span from the first item to the end; current only while the generator itself runs."""

    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with own.opened() as span:
            source = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, source)
            while True:
                try:
                    with _current(span):
                        item = step()
                except StopIteration as end:
                    return end.value
                try:
                    step = functools.partial(source.send, (yield item))
                except GeneratorExit:
                    source.close()
                    raise
                except BaseException as error:  # noqa: BLE001 - the generator's to handle
                    step = functools.partial(source.throw, error)

    return wrapper


def _async_generator(own: Trace, function: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with own.opened() as span:
            source = function(*args, **kwargs)
            step: Callable[[], Any] = source.__anext__
            while True:
                try:
                    with _current(span):
                        item = await step()
                except StopAsyncIteration:
                    return
                try:
                    step = functools.partial(source.asend, (yield item))
                except GeneratorExit:
                    await source.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001 - the generator's to handle
                    step = functools.partial(source.athrow, error)

    return wrapper
