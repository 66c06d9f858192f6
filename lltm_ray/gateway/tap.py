"""What a stream of llama-server tells beside its text, for another engine to go on from there.

Events of /v1/completions and /completion tell their token when asked (`verbose`); a chat's tell theirs only through
`logprobs` (the id) and `timings` (the position). `ask_details` adds what must be asked for, `StreamTap` takes it out of
the answer again. llama.cpp sends no event for half a character and a chat sends none without text, so ids have gaps;
the positions show where. Facts as read in llama.cpp's server-task.cpp and server-context.cpp (`process_token`).
"""

from __future__ import annotations

import json
from typing import Any

from lltm_ray.gateway import events
from lltm_ray.gateway.continuable import ask_details, asks_ids, is_eligible, is_exact, kind_of
from lltm_ray.gateway.told import Told

__all__ = ("LIMIT_BYTES", "StreamTap", "ask_details", "is_eligible", "is_exact", "kind_of")

LIMIT_BYTES = 4 * 2**20
"""Text and ids kept of one stream; a longer one cannot be continued."""
_PENDING_EVENTS = 512
_DONE = b"data: [DONE]\n\n"

_read_value = json.JSONDecoder().raw_decode


class StreamTap:
    """Takes one stream's bytes in any pieces, gives the client's, and remembers what they told.

    Args:
        path: the request's route, one that `kind_of` knows.
        body: its parsed JSON.
        details: whether the stream was asked for with `ask_details`.
        limit_bytes: text and ids remembered at most.
        told: what was told before, where this stream goes on with a reply.
    """

    def __init__(
        self,
        path: str,
        body: dict[str, Any],
        *,
        details: bool = True,
        limit_bytes: int = LIMIT_BYTES,
        told: Told | None = None,
    ) -> None:
        self.kind = kind_of(path)
        self.told = told or Told(limit_bytes)
        self.is_started = self.is_finished = self.is_done = self.has_role = False
        self.is_plain = True
        self.id_slot, self._prompt_tokens = -1, 0
        self.error = ""
        """Why the stream itself says that it failed."""
        self._head = self._held = b""
        self._contents: list[bytes] = []
        self._ids: list[bytes] = []
        self._counts: list[bytes] = []
        self._middle = 0  # bytes between a chat event's choice and its timings: the same in all
        self._before = self._after = b"\0"  # what stands around the text of a bare chat's last usual event
        self._timings: bytes | dict[str, Any] = b""
        self._keeps_timings = bool(body.get("timings_per_token"))
        options = body.get("stream_options")
        self._has_usage = self.kind == "chat" and isinstance(options, dict) and bool(options.get("include_usage"))
        self._is_bare = not (asks_ids(self.kind, body) and (details or self.kind == "native"))
        ways = {"text": self._take_text, "native": self._take_native, "chat": self._take_chat}
        bare = self._take_bare_chat if self.kind == "chat" else self._take_events
        self._take = bare if self._is_bare else ways[self.kind or "native"]

    def feed(self, part: bytes) -> bytes:
        """The client's bytes of the events that this part makes whole; the rest is held back."""
        if part.startswith(self._before) and part.endswith(self._after) and not self._held:
            content = part[len(self._before) : -len(self._after)]  # the event before, but for its text
            if content.find(b'"') < 0 and content.find(b"\n") < 0 and len(self._contents) < _PENDING_EVENTS:
                self._contents.append(content)  # above, `in` would raise and catch an error inside
                return part
        data = self._held + part if self._held else part
        if data[-2:] == b"\n\n":
            self._held = b""
        else:
            end = data.rfind(b"\n\n") + 2
            if end == 1:
                self._held = data
                return b""
            data, self._held = data[:end], data[end:]
        if not self.is_started:
            self.is_started = True
            self._head = data[: data.index(b"\n\n")]
        sent = self._take(data)
        if len(self._contents) > _PENDING_EVENTS:
            self.digest()
        return sent

    def rest(self) -> bytes:
        """What the body's end left: bytes that are no whole event, or an end whose usage never came; normally none."""
        held, self._held = self._held, b""
        self._has_usage = False
        return self._take_events(held) if held.endswith(b"\n\n") else held

    def ending(self) -> bytes:
        """What a client that has the final event still lacks: `[DONE]`, or nothing."""
        return _DONE if self.is_finished and not self.is_done and self.kind != "native" else b""

    def adopt(self, other: StreamTap) -> None:
        """The client's stream goes on with what another tap took of the same request."""
        if not self.is_started:
            self.is_started, self._head = other.is_started, other._head
        self.is_finished, self.is_done = other.is_finished, other.is_done
        self.is_plain &= other.is_plain
        self._prompt_tokens = self._prompt_tokens or other.prompt_tokens

    # --- what it told

    def digest(self) -> None:
        """Sort in what was only put aside.

        Raises:
            DivergedError: see `Told.add`.
        """
        if self._contents:
            contents, ids, counts = self._contents, self._ids, self._counts
            self._contents, self._ids, self._counts = [], [], []
            self.told.add_many(contents, ids, counts)

    @property
    def position(self) -> int:
        """As `delivered_tokens`, for every part: without sorting anything in, so events without text count too."""
        return int(self._counts[-1]) if self._counts else self.told.position + len(self._contents)

    @property
    def delivered_tokens(self) -> int:
        """Position of the last token whose event was passed on; without details, the number of events with text."""
        self.digest()
        return self.told.position

    @property
    def text(self) -> str:
        """The reply's text so far."""
        self.digest()
        return self.told.text

    @property
    def known_ids(self) -> list[int]:
        """Ids of the reply's first tokens, up to the first that was not told."""
        self.digest()
        return self.told.ids.tolist()

    @property
    def timings(self) -> dict[str, Any] | None:
        """llama.cpp's last `timings`."""
        if isinstance(self._timings, bytes) and self._timings:
            self._timings = _read_value(self._timings[len(b',"timings":') :].decode("utf-8"))[0]
        return self._timings if isinstance(self._timings, dict) else None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt; 0: not told."""
        if not self._prompt_tokens and self.timings:
            self._prompt_tokens = self.timings["cache_n"] + self.timings["prompt_n"]
        return self._prompt_tokens

    @property
    def head(self) -> dict[str, Any]:
        """The first event's `id`, `created`, `model` and the like; empty where there was none."""
        try:
            head = json.loads(self._head.partition(b":")[2])
        except ValueError:
            return {}
        return head if isinstance(head, dict) else {}

    @property
    def can_continue(self) -> tuple[bool, str]:
        """Whether another engine can go on; else why not."""
        self.digest()
        if self.error:
            return False, self.error
        if not self.is_plain:
            return False, "it holds reasoning or tool calls, which cannot be taken up in their middle"
        if self.told.is_too_long:
            return False, "it is longer than what is kept for a continuation"
        return True, ""

    # --- the fast way: one expression a part, which must match every event in it

    def _take_text(self, data: bytes) -> bytes:
        start = data.find(events.TEXT_START)
        found = events.TEXT_EVENT.match(data, start) if start >= 0 and _is_single(data) else None
        if found is None:
            return self._take_texts(data)
        content, id_, position, prompt = found.groups()
        self._contents.append(content)
        self._ids.append(id_)
        self._counts.append(position)
        if not self._prompt_tokens:
            self._prompt_tokens = int(prompt)
        return data[:start] + data[found.end() :]

    def _take_texts(self, data: bytes) -> bytes:
        pieces = events.TEXT_EVENT.split(data)
        if data.count(b"\n") // 2 * 5 + 1 != len(pieces):
            return self._take_events(data)
        self._contents += pieces[1::5]
        self._ids += pieces[2::5]
        self._counts += pieces[3::5]
        self._prompt_tokens = int(pieces[-2])
        return b"".join(pieces[::5])

    def _take_native(self, data: bytes) -> bytes:
        found = events.NATIVE_EVENT.findall(data)
        if data.count(b"\n") != 2 * len(found):
            return self._take_events(data)
        for content, id_, position, _ in found:
            self._contents.append(content)
            self._ids.append(id_)
            self._counts.append(position)
        if not self._prompt_tokens:
            self._prompt_tokens = int(found[0][3])
        return data

    def _take_chat(self, data: bytes) -> bytes:
        start = data.find(events.CHAT_START) + 20
        end = data.find(events.CHAT_ID, start)  # what is looked for here has quotes, which a text's own would escape
        created = data.find(b'}],"created":', end)
        timings = created + self._middle
        if not data.startswith(b',"timings":{', timings):
            timings = data.find(b',"timings":{', created)
            self._middle = timings - created
        position = data.find(b',"predicted_n":', timings) + 15
        if start == 19 or end < 0 or created < 0 or timings < 0 or position == 14 or not _is_single(data):
            return self._take_chats(data)
        id_ = end + 32
        token = data.find(b",", id_)
        content = data[start:end]
        self._contents.append(content)
        # A parser that holds text back or rewords it makes the delta differ from the token's own text.
        self._ids.append(data[id_:token] if data.startswith(b',"token":"%b","bytes"' % content, token) else b"")
        self._counts.append(data[position : data.index(b",", position)])
        close = data.index(b"}", position) + 1
        self._timings = data[timings:close]
        if self._keeps_timings:
            return data[: end + 2] + data[created:]
        return data[: end + 2] + data[created:timings] + data[close:]

    def _take_chats(self, data: bytes) -> bytes:
        pieces = events.CHAT_EVENT.split(data)
        if data.count(b"\n") // 2 * 8 + 1 != len(pieces):
            return self._take_events(data)
        contents = pieces[2::8]
        self._ids += pieces[3::8] if contents == pieces[4::8] else [b""] * len(contents)
        self._contents += contents
        self._counts += pieces[7::8]
        self._timings = pieces[-3]
        kept = [pieces[0]]
        for at in range(1, len(pieces), 8):
            kept += (pieces[at], pieces[at + 4], pieces[at + 5] if self._keeps_timings else b"", pieces[at + 7])
        return b"".join(kept)

    def _take_bare_chat(self, data: bytes) -> bytes:
        start = data.find(events.CHAT_START) + 20
        end = data.find(b'"}}],"created":', start)
        if start != 19 and end > 0 and _is_single(data) and data.find(b'","', start, end) < 0:
            self._contents.append(data[start:end])
            self._before, self._after = data[:start], data[end:]
            return data
        return self._take_events(data) if start == 19 else self._take_many_bare(data)

    def _take_many_bare(self, data: bytes) -> bytes:
        """A part with many events: the usual ones at once and untouched, those before and after them one by one."""
        start = data.rfind(b"\n", 0, data.find(events.CHAT_START)) + 1
        end = data.find(events.REASON, start)
        end = len(data) if end < 0 else data.rfind(b"\n", 0, end) + 1
        usual = data[start:end]
        contents = events.BARE_CONTENT.findall(usual)
        if 2 * len(contents) != usual.count(b"\n"):
            return self._take_events(data)
        head = self._take_events(data[:start]) if start else b""
        self._contents += contents
        return head + usual + self._take_events(data[end:]) if start or end < len(data) else data

    # --- the slow way: the first and last events, and any part that holds an unusual one

    def _take_events(self, data: bytes) -> bytes:
        whole = [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
        sent: list[bytes] = []
        for index, event in enumerate(whole):
            if self._has_usage and events.REASON in event and index + 1 == len(whole):
                self._held = event + self._held  # the client gets a chat's end and its usage both, or neither
                break
            sent.append(self._take_event(event))
        return b"".join(sent)

    def _take_event(self, event: bytes) -> bytes:
        if event == _DONE:
            self.is_finished = self.is_done = True
            return event
        if self._is_bare and self._is_edge(event):
            return event
        name, _, value = event.partition(b":")
        if name not in (b"data", b"error"):
            return event
        text = value.strip().decode("utf-8", "replace")
        try:
            found = json.loads(text)
            if name == b"error" or "error" in found:
                self.error = "the engine itself had answered with an error"
                return event
            self.digest()
            return self._take_chat_event(event, text, found) if self.kind == "chat" else self._take_told(event, found)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            self.error = "the stream held what is no event of llama-server's"
            return event

    def _is_edge(self, event: bytes) -> bool:
        """Whether it was a chat's start, end or counts, as llama-server writes them: it is noted, and not parsed."""
        is_end = event.startswith(events.BARE_END) and b'"delta":{}}],"created":' in event
        if not (is_end or event.startswith(events.BARE_COUNTS) or self._is_start(event)):
            return False
        at = event.find(b',"timings":{')
        if at > 0:
            self._timings = event[at : event.index(b"}", at) + 1]
        if is_end:
            self.digest()
            self._note("", None, None, reason=True)
        return True

    def _is_start(self, event: bytes) -> bool:
        found = events.BARE_START.match(event)
        if found is None:
            return False
        self.has_role = True
        if found[1]:
            self._contents.append(found[1])
        return True

    def _take_told(self, event: bytes, found: dict[str, Any]) -> bytes:
        verbose = found if self.kind == "native" else found.get("__verbose")
        if verbose is None:
            choice = found["choices"][0]
            self._note(choice["text"], None, None, reason=choice["finish_reason"])
            return event
        self._timings = verbose.get("timings", self._timings)
        self._prompt_tokens = verbose["tokens_evaluated"]
        if verbose["stop"]:
            self.id_slot = verbose["id_slot"]
        ids = verbose["tokens"]
        id_ = ids[0] if len(ids) == 1 else None
        if verbose["stop"] or verbose["tokens_predicted"]:
            self._note(verbose["content"], id_, verbose["tokens_predicted"], reason=verbose["stop"])
        return event if self.kind == "native" else _without(event, b"__verbose")

    def _take_chat_event(self, event: bytes, text: str, found: dict[str, Any]) -> bytes:
        self._timings = found.get("timings", self._timings)
        if not found["choices"]:
            return event
        choice = found["choices"][0]
        delta, reason = choice["delta"], choice["finish_reason"]
        self.has_role |= "role" in delta
        self.is_plain &= not (delta.get("reasoning_content") or delta.get("tool_calls"))
        told = (choice.get("logprobs") or {}).get("content") or [{}]
        content = delta.get("content") or ""
        if content or reason:
            is_same = not self._is_bare and told[0].get("token") == content
            count = None if self._is_bare else (found.get("timings") or {}).get("predicted_n", self.told.seen_tokens)
            self._note(content, told[0].get("id") if is_same else None, count, reason=reason)
        if self._is_bare:
            return event
        event = _without(event, b"logprobs")
        return event if reason or self._keeps_timings else _without(event, b"timings")

    def _note(self, content: str, id_: int | None, count: int | None, *, reason: object) -> None:
        if not reason:
            self.told.add(content, id_, count)
            return
        self.is_finished = True
        self.told.finish(content, count)


def _is_single(data: bytes) -> bool:
    """Whether whole events are one: one character is found ten times faster than two are counted."""
    return data.find(b"\n") == len(data) - 2


def _without(event: bytes, name: bytes) -> bytes:
    """An event without one of its members, whose name no text can hold: its quotes would be escaped."""
    start = event.find(b',"%b":' % name)
    if start < 0:
        return event
    tail = event[start + len(name) + 4 :].decode("utf-8")
    _, end = _read_value(tail)
    return event[:start] + tail[end:].encode("utf-8")
