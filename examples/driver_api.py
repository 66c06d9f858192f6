"""The driver API: actor handles, routed calls, a batch over every slot, a stream that is left early.

Run: python examples/driver_api.py        (no GPU, no network; about 15 s, most of it Ray's start)
"""

import ray

import lltm_ray

HI = [{"role": "user", "content": "What is a slot?"}]

with lltm_ray.Cluster.start(model="tiny", engines=2, gpu_share=0.0, gateway={"port": 0}) as cluster:
    done = ray.get(cluster.engines[0].chat.remote(HI, max_tokens=16, temperature=0))
    print(f"{done.engine}: {done.usage.input_tokens} tokens in, {done.usage.output_tokens} out")
    print(f"prefill {done.timings.prompt_ms:.1f} ms, first token after {done.timings.ttft_s * 1e3:.1f} ms")

    answers = cluster.batch([f"number {index}" for index in range(32)], max_tokens=8)
    print(f"batch of {len(answers)} over {sorted({answer.engine for answer in answers})}")

    for count, event in enumerate(cluster.stream(HI, max_tokens=10_000)):
        print(event.text, end="")
        if count == 20:
            break  # frees the slot at once
    print()
    for engine in cluster.status().engines:
        print(engine.name, engine.state, engine.url, f"{engine.slots_total} slots")
