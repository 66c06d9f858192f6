"""Prints the CPU time of `bench` as a multiple of what a bare aiohttp client takes for the same requests."""

import asyncio
import sys
import time

import aiohttp
import uvloop

from lltm_ray.load.result import LoadPlan
from lltm_ray.load.run import run_load


async def bare(url, count):
    numbers = iter(range(count))

    async def work(http):
        for _ in numbers:
            async with http.post(url + "/v1/chat/completions", data=b'{"stream": true}') as response:
                async for piece in response.content.iter_any():
                    assert piece

    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(work(http) for _ in range(16)))


async def ours(url, count):
    result = await run_load(LoadPlan(url=url, model="m", requests=count))
    assert result.ok == count, result


def cpu_s(client, count):
    before = time.process_time()
    uvloop.run(client(sys.argv[1], count))
    return time.process_time() - before


cpu_s(bare, 100)
cpu_s(ours, 100)
print(min(cpu_s(ours, 700) for _ in range(3)) / min(cpu_s(bare, 700) for _ in range(3)))
