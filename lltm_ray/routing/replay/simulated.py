"""One llama-server, simulated: slots, prompt cache and speed. No clock: every method is told the time.

Caches follow llama.cpp's own rules, written here once more by the longest common prefix and nothing else, so that the
router's model of them (`residency`, `slots`) is judged by something that does not share its code. Content is a string
of 8-byte block ids. Time: prompts are computed one after the other in batches; meanwhile each decoding request gets one
token a batch, otherwise all of them one token a step, and a step takes longer the more there are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf
from typing import Generic, TypeVar

from lltm_ray.config import LLAMA_CPP_SIMILARITY_RATIO, SIMILARITY_RATIO
from lltm_ray.errors import ConfigError

__all__ = ["BLOCK_BYTES", "EngineSpec", "SimulatedEngine", "Task", "common_blocks"]

BLOCK_BYTES = 8
"""A block's id."""
SLOT_KEEP_RATIO, RAM_KEEP_RATIO = 0.5, 0.25
"""The constants of llama.cpp's `get_available_slot` and `server_prompt_cache::load`."""
_NONE_S, _NONE_TOKENS = 1e-9, 1e-6
"""What is left over from rounding."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """A simulated engine. The defaults are a 1.3 B model in Q4_K_M on one H200, measured with `llama-batched-bench`.

    That gave 783 generated tokens/s with 1 sequence, 9,666 with 32, 13,004 with 64, and 42,300 prompt tokens/s.

    Raises:
        ConfigError: a value that is out of its range.
    """

    slots: int = 4
    prefill_tokens_s: float = 42_300.0
    prefill_overhead_s: float = 0.002
    """For each prompt, whatever its length."""
    decode_first_s: float = 1.28e-3
    """Seconds a step with one decoding request."""
    decode_step_s: float = 0.06e-3
    """What each further one adds."""
    batch_tokens: int = 2048
    """`--batch-size`: while a prompt is computed, others get one token for each batch of it."""
    ram_tokens: int = 262_144
    """Room of the host-memory prompt cache: llama-server's default of 8 GiB at 32 KiB a token; 0 is off."""
    similarity_ratio: float | None = None
    """`--slot-prompt-similarity`; None: llama.cpp's, or in a replay as a fleet with that policy starts its engines."""

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_tokens_s", "decode_first_s", "batch_tokens"):
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(name, getattr(self, name), "must be above 0")
        for name in ("prefill_overhead_s", "decode_step_s", "ram_tokens", "slot_ratio"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(name, getattr(self, name), "must not be below 0")

    @property
    def slot_ratio(self) -> float:
        """The similarity ratio that counts."""
        return LLAMA_CPP_SIMILARITY_RATIO if self.similarity_ratio is None else self.similarity_ratio

    def under(self, policy: str) -> EngineSpec:
        """As a fleet that routes by this policy starts its engines, if nobody says otherwise."""
        if policy != "residency" or not self.ram_tokens or self.similarity_ratio is not None:
            return self
        return replace(self, similarity_ratio=SIMILARITY_RATIO)

    def prefill_s(self, tokens: int) -> float:
        """Seconds to compute so many prompt tokens."""
        return self.prefill_overhead_s + tokens / self.prefill_tokens_s

    def token_s(self, decoding: int, *, is_prefilling: bool) -> float:
        """Seconds a generated token with so many requests decoding."""
        if is_prefilling:
            return self.batch_tokens / self.prefill_tokens_s
        return self.decode_first_s + (decoding - 1) * self.decode_step_s

    def requests_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Requests a second that keep all slots busy, if so many prompt tokens are computed and so many generated."""
        alone_s = self.prefill_s(round(prompt_tokens))
        together_s = output_tokens * self.token_s(self.slots, is_prefilling=False) / self.slots
        return 1.0 / (alone_s + together_s)


@dataclass(slots=True, eq=False)
class Task(Generic[T]):
    """A request on an engine."""

    payload: T
    key: bytes
    """Block ids of the prompt."""
    reply: bytes
    """Block ids of the reply: what the slot holds after it is key + reply."""
    prompt_tokens: int
    output_tokens: int
    slot: int = -1
    cached_tokens: int = 0
    begin_s: float = 0.0
    """When its prompt began to be computed."""
    began_s: float = 0.0
    """When its first token came."""
    ended_s: float = 0.0
    has_ended: bool = False

    def tokens_of(self, blocks: int) -> int:
        """Tokens of the first blocks of its prompt."""
        whole = len(self.key) // BLOCK_BYTES
        return self.prompt_tokens * blocks // whole if whole else 0


@dataclass(slots=True, eq=False)
class _Content:
    """What a slot or the prompt cache holds."""

    blocks: bytes
    tokens: int
    saved_in: _Content | None = None
    """What held all of it in the prompt cache, when last looked."""


@dataclass(slots=True, eq=False)
class _Slot:
    content: _Content | None = None
    is_busy: bool = False
    last_used: int = 0


@dataclass(slots=True)
class _Ram:
    """The prompt cache in host memory, oldest first."""

    limit_tokens: int
    entries: dict[_Content, None] = field(default_factory=dict)
    by_start: dict[bytes, dict[_Content, None]] = field(default_factory=dict)
    used_tokens: int = 0

    def save(self, content: _Content) -> None:
        if content.saved_in in self.entries or not 0 < content.tokens <= self.limit_tokens:
            return
        kin = self.by_start.get(content.blocks[:BLOCK_BYTES], {})
        for entry in kin:
            if entry.blocks.startswith(content.blocks):
                content.saved_in = entry
                return
        for entry in [entry for entry in kin if content.blocks.startswith(entry.blocks)]:
            self.remove(entry)
        while self.used_tokens + content.tokens > self.limit_tokens:
            self.remove(next(iter(self.entries)))
        copy = content.saved_in = _Content(content.blocks, content.tokens)
        self.entries[copy] = None
        self.by_start.setdefault(copy.blocks[:BLOCK_BYTES], {})[copy] = None
        self.used_tokens += copy.tokens

    def remove(self, entry: _Content) -> None:
        del self.entries[entry]
        start = entry.blocks[:BLOCK_BYTES]
        del self.by_start[start][entry]
        if not self.by_start[start]:
            del self.by_start[start]
        self.used_tokens -= entry.tokens

    def best(self, task: Task[T], keep: float, similarity: float) -> _Content | None:
        """The entry that beats the slot's own content in both ratios, and each better one in its turn."""
        found = None
        for entry in self.by_start.get(task.key[:BLOCK_BYTES], ()):
            tokens = task.tokens_of(common_blocks(entry.blocks, task.key))
            kept, similar = tokens / entry.tokens, tokens / task.prompt_tokens
            if kept >= RAM_KEEP_RATIO and kept > keep and similar > similarity:
                found, keep, similarity = entry, kept, similar
        return found


class SimulatedEngine(Generic[T]):
    """One server. After `start` and `advance` the next thing happens at `next_s`.

    Args:
        name: of the engine.
        spec: its size and speed.
    """

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self.name = name
        self.spec = spec
        self.version = 0
        """Changes whenever `next_s` may have changed."""
        self._slots = [_Slot() for _ in range(spec.slots)]
        self._ram = _Ram(spec.ram_tokens)
        self._prefills: deque[Task[T]] = deque()
        self._left_s = 0.0
        self._decoding: list[tuple[float, int, Task[T]]] = []
        self._tokens = 0.0
        self._at_s = 0.0
        self._serial = 0
        self._deferred: deque[Task[T]] = deque()

    @property
    def next_s(self) -> float:
        """When the next prompt is done or the next request ends; infinite if it is idle."""
        due_s = self._left_s if self._prefills else inf
        if self._decoding:
            due_s = min(due_s, (self._decoding[0][0] - self._tokens) * self._token_s())
        return self._at_s + max(0.0, due_s)

    def start(self, task: Task[T], now_s: float) -> None:
        """Take a request on `task.slot`; -1 is llama.cpp's own choice. It waits there if that slot is busy."""
        self._move_to(now_s)
        if not self._launch(task):
            self._deferred.append(task)

    def advance(self, now_s: float) -> list[Task[T]]:
        """Let happen what is due: tasks whose first token came just now, or which ended (`has_ended`), or both."""
        self._move_to(now_s)
        happened = []
        if self._prefills and self._left_s <= _NONE_S:
            task = self._prefills.popleft()
            task.began_s = now_s
            happened.append(task)
            self._serial += 1
            heappush(self._decoding, (self._tokens + max(0, task.output_tokens - 1), self._serial, task))
            self._next_prefill()
        while self._decoding and self._decoding[0][0] <= self._tokens + _NONE_TOKENS:
            task = heappop(self._decoding)[2]
            self._end(task)
            if task.began_s < now_s or task not in happened:
                happened.append(task)
        self._tokens = self._tokens if self._decoding else 0.0
        for _ in range(len(self._deferred)):
            waiting = self._deferred.popleft()
            if not self._launch(waiting):
                self._deferred.append(waiting)
        return happened

    # --- time

    def _token_s(self) -> float:
        return self.spec.token_s(len(self._decoding), is_prefilling=bool(self._prefills))

    def _move_to(self, now_s: float) -> None:
        passed_s, self._at_s = now_s - self._at_s, now_s
        self.version += 1
        if self._decoding:
            self._tokens += passed_s / self._token_s()
        if self._prefills:
            self._left_s -= passed_s

    def _next_prefill(self) -> None:
        if self._prefills:
            task = self._prefills[0]
            task.begin_s = self._at_s
            self._left_s = self.spec.prefill_s(task.prompt_tokens - task.cached_tokens)

    # --- slots

    def _launch(self, task: Task[T]) -> bool:
        slot = self._slot_for(task)
        if slot is None:
            return False
        slot.is_busy = True
        self._publish()
        self._prefills.append(task)
        if len(self._prefills) == 1:
            self._next_prefill()
        return True

    def _slot_for(self, task: Task[T]) -> _Slot | None:
        """`get_available_slot`: choose, and exchange the slot's content with the prompt cache."""
        slots = [self._slots[task.slot]] if task.slot >= 0 else self._slots
        idle = [slot for slot in slots if not slot.is_busy]
        if not idle:
            return None
        ratio = self.spec.slot_ratio
        chosen, best, most = None, 0, ratio * task.prompt_tokens
        for slot in idle if ratio else ():
            tokens = 0 if slot.content is None else task.tokens_of(common_blocks(slot.content.blocks, task.key))
            if tokens > most:
                chosen, best, most = slot, tokens, float(tokens)
        is_pinned = task.slot >= 0
        if chosen is None:
            chosen = idle[0] if is_pinned else min(reversed(idle), key=lambda slot: slot.last_used)
        content = chosen.content
        keeps = content is not None and best >= SLOT_KEEP_RATIO * content.tokens
        if is_pinned:
            keeps |= content is None or not ratio
        if not keeps and self.spec.ram_tokens:
            self._exchange(chosen, task)
        found = chosen.content
        tokens = 0 if found is None else task.tokens_of(common_blocks(found.blocks, task.key))
        task.cached_tokens = max(0, min(tokens, task.prompt_tokens - 1))
        chosen.content = None
        task.slot = self._slots.index(chosen)
        return chosen

    def _exchange(self, slot: _Slot, task: Task[T]) -> None:
        keep, similarity = -1.0, 0.0
        if slot.content is not None:
            tokens = task.tokens_of(common_blocks(slot.content.blocks, task.key))
            keep, similarity = tokens / slot.content.tokens, tokens / task.prompt_tokens
            self._ram.save(slot.content)
        entry = self._ram.best(task, keep, similarity)
        if entry is not None:
            self._ram.remove(entry)
            slot.content = entry

    def _publish(self) -> None:
        """`cache_idle_slots`: whenever a task starts, what idle slots hold is copied to the prompt cache."""
        for slot in self._slots:
            if not slot.is_busy and slot.content is not None:
                self._ram.save(slot.content)

    def _end(self, task: Task[T]) -> None:
        task.ended_s, task.has_ended = self._at_s, True
        slot = self._slots[task.slot]
        self._serial += 1
        slot.is_busy, slot.last_used = False, self._serial
        tokens = task.prompt_tokens + max(0, task.output_tokens - 1)
        slot.content = _Content(task.key + task.reply, tokens) if task.key else None


def common_blocks(a: bytes, b: bytes) -> int:
    """How many first blocks two strings of block ids share."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // BLOCK_BYTES
    low, high = 0, size // BLOCK_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[BLOCK_BYTES * low : BLOCK_BYTES * middle] == b[BLOCK_BYTES * low : BLOCK_BYTES * middle]:
            low = middle
        else:
            high = middle - 1
    return low
