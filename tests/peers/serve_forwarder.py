"""Plain Ray Serve, as one writes it first: `python serve_forwarder.py PORT ENGINE_URL...`.

It runs in an environment of its own and knows nothing of lltm_ray.
"""

import itertools
import signal
import sys

import httpx
import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

app = FastAPI()


@serve.deployment(max_ongoing_requests=512)
@serve.ingress(app)
class Forwarder:
    """Passes each request to the next engine and its answer back as it comes."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = itertools.cycle(urls)
        self.http = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=1024))

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> StreamingResponse:
        """One answer, streamed or not."""
        body, url = await request.body(), next(self.urls)
        kind = {"content-type": "application/json"}
        sent = self.http.build_request("POST", f"{url}/v1/chat/completions", content=body, headers=kind)
        answer = await self.http.send(sent, stream=True)
        kind = {"content-type": answer.headers.get("content-type", "application/json")}
        return StreamingResponse(answer.aiter_raw(), status_code=answer.status_code, headers=kind)


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Forwarder.bind(sys.argv[2:]), name="forward", route_prefix="/")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # not before: children would inherit it
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
