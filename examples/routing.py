"""A conversation over HTTP: where each turn went, what it found cached there, and why.

Run: python examples/routing.py        (no GPU, no network)
"""

import requests

import lltm_ray

TURNS = ["What is a slot?", "And what is a KV cache?", "Who decides where a prompt goes?"]

with lltm_ray.Cluster.start(model="tiny", engines=2, gpu_share=0.0, cpu_share=0.5, gateway={"port": 0}) as cluster:
    messages, seen = [], ""
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = requests.post(
            f"{cluster.endpoint}/v1/chat/completions",
            json={"messages": messages, "max_tokens": 32},
            headers={"X-Session-ID": "a conversation"},
            timeout=60,
        )
        told, seen = answer.json(), answer.headers["x-request-id"]
        messages.append(told["choices"][0]["message"])
        where = f"{answer.headers['x-lltm-engine']}, slot {answer.headers['x-lltm-slot']}"
        timings = told["timings"]
        print(f"{where}: {timings['cache_n']} of {timings['cache_n'] + timings['prompt_n']} prompt tokens were cached")
    why = requests.get(f"{cluster.endpoint}/lltm/explain/{seen}", timeout=60).json()
    print(f"the last one: {why['why']} ({why['policy']}); {why['delivered_tokens']} tokens delivered")
