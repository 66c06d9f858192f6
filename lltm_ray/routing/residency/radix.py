"""A compressed radix tree over prompt keys that knows who holds what, and how many tokens a prefix has.

Edges are bytes, compared by C-speed `startswith` and slices. A `Sequence` is something a server keeps in a slot or in
its host memory ("RAM"); it ends at a node, and every node above it counts it for its engine while it is usable. Token
counts are exact where a reply told them (`marks` inside an edge, `exact` at its end) and linear in bytes between.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

NODE_BYTES = 1024
"""What a node costs besides its edge: the object, its three dicts and its marks (an estimate)."""
SEQUENCE_BYTES = 400
"""What a sequence costs: the object, its place in the ageing order and its share of the counts above it."""
_MARKS_MAX = 32
_CHUNK = 128
"""Bytes that are compared at once, as numbers; longer ones are halved first."""


@dataclass(slots=True, eq=False)
class Node:
    """One edge and where it ends. `depth` is in bytes from the root, `tokens` at that depth."""

    parent: Node | None
    edge: bytes
    depth: int
    tokens: float
    exact: bool = False
    marks: list[tuple[int, float]] = field(default_factory=list)
    """Exact (depth, tokens) strictly inside the edge, ascending."""
    reply: tuple[int, float] | None = None
    """(depth, tokens) where a reply begins that no later prompt has confirmed yet; the node's end lies beyond."""
    children: dict[int, Node] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    """Engine -> usable slots whose content goes through this node; the most recently used engine is last."""
    ram: dict[str, int] = field(default_factory=dict)
    """The same of RAM entries."""
    ram_ends: dict[str, Sequence] = field(default_factory=dict)
    """The RAM entry of an engine that ends exactly here; llama.cpp never keeps two equal ones."""
    slot_ends: dict[str, dict[Sequence, None]] = field(default_factory=dict)
    """The slots of an engine whose content ends exactly here."""
    refs: int = 0

    @property
    def key(self) -> bytes:
        """All edges from the root to its end."""
        edges, node = [self.edge], self.parent
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return b"".join(reversed(edges))

    def tokens_at(self, depth: int) -> float:
        """Tokens at a depth on this edge, linear between the exact positions around it."""
        parent = self.parent
        low = (0, 0.0) if parent is None else (parent.depth, parent.tokens)
        high = (self.depth, self.tokens)
        if self.marks:
            place = bisect_right(self.marks, (depth, math.inf))
            low = self.marks[place - 1] if place else low
            high = self.marks[place] if place < len(self.marks) else high
        if high[0] <= low[0]:
            return low[1]
        return low[1] + max(high[1] - low[1], 0.0) * (depth - low[0]) / (high[0] - low[0])


@dataclass(slots=True, eq=False)
class Sequence:
    """The content of one slot (`slot` >= 0) or of one RAM entry (-1)."""

    engine: str
    slot: int
    node: Node
    tokens: int
    """All that the server keeps, also what the key does not show."""
    serial: int = 0

    @property
    def is_ram(self) -> bool:
        """Whether it lies in host memory."""
        return self.slot < 0


Step = tuple[Node, int, float]
"""(node, matched depth in bytes, tokens there); only the last step may end inside its edge."""


class Tree:
    """The tree itself; `bytes` is its estimated size, `version` changes with its shape and what is usable."""

    def __init__(self) -> None:
        self.root = Node(None, b"", 0, 0.0, exact=True, refs=1)
        self.nodes = 0
        self.bytes = 0
        self.version = 0

    def walk(self, key: bytes) -> list[Step]:
        """The longest known prefix of a key, node by node; tokens never fall along it."""
        depth, tokens, size, children = 0, 0.0, len(key), self.root.children
        steps: list[Step] = []
        while depth < size:
            child = children.get(key[depth])
            if child is None:
                break
            if not key.startswith(child.edge, depth):
                depth += common_bytes(child.edge, key, depth)
                steps.append((child, depth, max(tokens, child.tokens_at(depth))))
                break
            depth, children = child.depth, child.children
            tokens = max(tokens, child.tokens)
            steps.append((child, depth, tokens))
        return steps

    def insert(self, key: bytes, tokens_per_byte: float) -> Node:
        """The node at the end of a key, made where it is missing; `hold` it before anything is released."""
        steps = self.walk(key)
        node, depth = (steps[-1][0], steps[-1][1]) if steps else (self.root, 0)
        if depth < node.depth:
            node = self._split(node, depth)
        if depth < len(key):
            leaf = Node(node, key[depth:], len(key), node.tokens + (len(key) - depth) * tokens_per_byte)
            node.children[key[depth]] = leaf
            self._grow(1, len(leaf.edge))
            return leaf
        return node

    def hold(self, sequence: Sequence) -> None:
        """Keep the sequence's node in the tree."""
        sequence.node.refs += 1
        self.bytes += SEQUENCE_BYTES

    def release(self, sequence: Sequence) -> None:
        """The opposite of `hold`: nodes that nobody needs go, chains grow together again."""
        node = sequence.node
        node.refs -= 1
        self.bytes -= SEQUENCE_BYTES
        while not node.refs and not node.children and node.parent is not None:
            del node.parent.children[node.edge[0]]
            self._grow(-1, -len(node.edge))
            node = node.parent
        if not node.refs and len(node.children) == 1:
            self._merge(node)

    def activate(self, sequence: Sequence) -> None:
        """Count the sequence as usable, and its engine as the one used last."""
        self.version += 1
        engine, is_ram = sequence.engine, sequence.is_ram
        if is_ram:
            sequence.node.ram_ends[engine] = sequence
        else:
            sequence.node.slot_ends.setdefault(engine, {})[sequence] = None
        node = sequence.node
        above = node.parent
        while above is not None:
            counts = node.ram if is_ram else node.slots
            counts[engine] = counts.pop(engine, 0) + 1
            node, above = above, above.parent

    def deactivate(self, sequence: Sequence) -> None:
        """Count it no more."""
        self.version += 1
        engine, is_ram = sequence.engine, sequence.is_ram
        ends = sequence.node.slot_ends
        if is_ram:
            del sequence.node.ram_ends[engine]
        elif len(ends[engine]) == 1:
            del ends[engine]
        else:
            del ends[engine][sequence]
        node = sequence.node
        above = node.parent
        while above is not None:
            counts = node.ram if is_ram else node.slots
            left = counts.pop(engine) - 1
            if left:
                counts[engine] = left
            node, above = above, above.parent

    def within(self, sequence: Sequence) -> Iterator[Sequence]:
        """Slots of its engine that hold the same, or its beginning."""
        node: Node | None = sequence.node
        while node is not None:
            yield from node.slot_ends.get(sequence.engine, ())
            node = node.parent

    def anchor(self, node: Node, depth: int, tokens: float, *, exact: bool = True) -> None:
        """A reply told how many tokens the first `depth` bytes on the way to `node` have.

        What contradicts it (tokens must not fall with depth) is forgotten, estimates above it are made anew.
        """
        while node.parent is not None and node.parent.depth >= depth:
            node = node.parent
        if node.parent is None:
            return
        if depth == node.depth:
            node.tokens, node.exact = tokens, exact
            if node.marks:
                node.marks = [mark for mark in node.marks if mark[1] <= tokens]
        else:
            kept = [mark for mark in node.marks if mark[0] != depth and (mark[0] < depth) == (mark[1] <= tokens)]
            node.marks = _thinned(sorted([*kept, (depth, tokens)]))
            if node.tokens < tokens:
                node.tokens, node.exact = tokens, False
        if node.marks and node.marks[0][0] < depth:
            return
        self._smooth(node.parent, depth, tokens)

    def mark_reply(self, node: Node, depth: int, tokens: float) -> None:
        """From `depth` on the way to `node` goes through a reply; what lies above is a prompt."""
        above: Node | None = node
        while above is not None:
            above.reply = (depth, tokens) if above.depth > depth else None
            above = above.parent

    def _smooth(self, node: Node, depth: int, tokens: float) -> None:
        estimates: list[Node] = []
        low = (0, 0.0)
        while node.parent is not None:
            if node.exact and node.tokens <= tokens:
                low = (node.depth, node.tokens)
                break
            node.exact = False
            estimates.append(node)
            if node.marks:
                node.marks = [mark for mark in node.marks if mark[1] <= tokens]
            if node.marks:
                low = node.marks[-1]
                break
            node = node.parent
        for each in estimates:
            each.tokens = low[1] + (tokens - low[1]) * (each.depth - low[0]) / (depth - low[0])

    def _split(self, node: Node, depth: int) -> Node:
        parent = node.parent
        assert parent is not None, "the root has no edge"  # noqa: S101 - for the type checker
        cut = depth - parent.depth
        marks = [mark for mark in node.marks if mark[0] < depth]
        exact = any(mark[0] == depth for mark in node.marks)
        upper = Node(parent, node.edge[:cut], depth, node.tokens_at(depth), exact=exact, marks=marks)
        upper.reply = node.reply if node.reply and node.reply[0] < depth else None
        upper.slots, upper.ram = dict(node.slots), dict(node.ram)
        parent.children[node.edge[0]] = upper
        upper.children[node.edge[cut]] = node
        node.parent, node.edge = upper, node.edge[cut:]
        node.marks = [mark for mark in node.marks if mark[0] > depth]
        self._grow(1, 0)
        return upper

    def _merge(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        (child,) = node.children.values()
        here = [(node.depth, node.tokens)] if node.exact else []
        child.marks = _thinned(node.marks + here + child.marks)
        child.parent, child.edge = parent, node.edge + child.edge
        parent.children[child.edge[0]] = child
        self._grow(-1, 0)

    def _grow(self, nodes: int, edge_bytes: int) -> None:
        self.nodes += nodes
        self.bytes += nodes * NODE_BYTES + edge_bytes
        self.version += 1


def common_bytes(edge: bytes, key: bytes, start: int) -> int:
    """How many first bytes of `edge` stand in `key` from `start` on; the two are known to differ somewhere."""
    low, high = 0, min(len(edge), len(key) - start)
    while high - low > _CHUNK:
        middle = (low + high + 1) // 2
        if edge[low:middle] == key[start + low : start + middle]:
            low = middle
        else:
            high = middle
    differing = int.from_bytes(edge[low:high]) ^ int.from_bytes(key[start + low : start + high])
    return high - (differing.bit_length() + 7) // 8


def _thinned(marks: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return marks if len(marks) <= _MARKS_MAX else [*marks[:-1:2], marks[-1]]
