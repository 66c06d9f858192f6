"""What one server with unlimited slots would reuse, and what the undisturbed run answers.

For every request of a run: the longest prefix, in tokens, that it shares with the prompt and reply of any request that
was sent before it; at most all but its last token, which a server must compute to answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from .client import Client, Reply
from .engines import Server
from .workloads import Conversations, key


def tokens_of(server: Server, reply: Reply) -> tuple[array[int], array[int]]:
    """A prompt as the server sees it, and what its slot holds after the reply (all but the last token of that)."""
    prompt = server.get("/apply-template", {"messages": reply.messages})["prompt"]
    return _tokenize(server, prompt), _tokenize(server, prompt + reply.text)[:-1]


def _tokenize(server: Server, text: str) -> array[int]:
    told = server.get("/tokenize", {"content": text, "add_special": True, "parse_special": True})
    return array("i", told["tokens"])


def common(one: array[int], other: array[int]) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def ideal(server: Server, replies: Iterable[Reply]) -> tuple[int, int]:
    """Tokens that could have been reused, and tokens of all prompts, for the requests of one run."""
    earlier: list[array[int]] = []
    reusable = total = 0
    for reply in sorted((reply for reply in replies if reply.ok), key=lambda reply: reply.sent_s):
        prompt, left = tokens_of(server, reply)
        best = max((common(prompt, other) for other in earlier), default=0)
        reusable += min(best, len(prompt) - 1)
        total += len(prompt)
        earlier.append(left)
    return reusable, total


async def expected_texts(plan: Conversations, port: int) -> dict[str, str]:
    """The greedy reply to every prompt of a plan, from one server without other work."""
    client = Client((port,))
    await plan.recite(client)
    client.close()
    return {key(reply.messages): reply.text for reply in client.replies if reply.ok}
