"""Two fleets side by side on one Ray: text from one, embeddings from the other, both over HTTP and the driver.

Run: python examples/two_fleets.py        (no GPU, no network)
"""

import math

import lltm_ray
from lltm_ray import LlamaClient

CHAT = {"model": "tiny", "engines": 1, "gpu_share": 0.0, "cpu_share": 0.5, "name": "chat", "gateway": {"port": 0}}
EMBED = CHAT | {"name": "embed", "engine": {"embeddings": True, "pooling": "mean"}}

with lltm_ray.Cluster.start(**CHAT) as chat, lltm_ray.Cluster.start(**EMBED) as embed:
    with LlamaClient(chat.endpoint) as client:
        print(client.chat([{"role": "user", "content": "hi"}], max_tokens=16).text)
    one, other = embed.embed(["a text", "another text"]).vectors
    cosine = sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
    print(f"{len(one)} dimensions, cosine {cosine:.3f}")
