"""What the familiar calls refuse, or pass on, before any fleet or server runs."""

import logging

import pytest

from lltm_ray._loop import Loop
from lltm_ray.driver import Cluster
from lltm_ray.errors import ConfigError, EngineNotReadyError, FleetError, UpstreamError
from lltm_ray.llamacpp.process import ServerProcess, ServerSpec
from lltm_ray.records import Completion, Embeddings
from lltm_ray.sdk.engine import InferenceEngine
from lltm_ray.sdk.server import ServerManager


class Running:
    """A fleet that serves `tiny` and remembers what was asked of it."""

    def __init__(self, broken=False):
        self.broken, self.closed, self.asked, self.models = broken, False, [], [self]
        self.name, self.engines = "tiny", ()

    def status(self):
        if self.broken:
            raise FleetError("no status")
        return self

    def chat(self, prompt, **params):
        self.asked.append((prompt, params))
        if isinstance(prompt, Exception):
            raise prompt
        return Completion(text=f"{prompt}!")

    complete = stream = chat

    def embed(self, texts, **params):
        self.asked.append(params)
        return Embeddings(vectors=())

    def close(self):
        self.closed = True


@pytest.fixture
def join(monkeypatch):
    def join(running):
        monkeypatch.setattr(Cluster, "connect", lambda name, address=None: running)
        return InferenceEngine()

    return join


def test_one_text_is_no_batch():
    with pytest.raises(ConfigError, match="prompts='one': must be a list"):
        InferenceEngine().batch_infer("one")


def test_a_stream_of_a_raw_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"raw=True.*infer\(raw=True\)"):
        InferenceEngine().infer_stream("x", raw=True)


def test_settings_that_a_running_fleet_does_not_take_are_named_in_a_warning(join, caplog):
    engine = join(Running())
    with caplog.at_level(logging.WARNING):
        engine.load_model("tiny")
        assert not caplog.records
        engine.load_model("tiny", n_parallel=2, engines=3)
    assert "engine, engines" in caplog.text
    engine.unload_model()


def test_embeddings_are_asked_of_the_model_that_was_loaded(join):
    running = Running()
    engine = join(running)
    engine.load_model("tiny")
    engine.embed("x")
    engine.embed("x", model="other")
    assert running.asked == [{"model": "tiny"}, {"model": "other"}]


@pytest.fixture
def loaded(join):
    running = Running()
    engine = join(running)
    engine.load_model("tiny")
    return engine, running


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, **params: engine.infer("hi", **params),
        lambda engine, **params: engine.infer("hi", raw=True, **params),
        lambda engine, **params: engine.generate("hi", **params),
        lambda engine, **params: engine.chat([{"role": "user", "content": "hi"}], **params),
        lambda engine, **params: engine.infer_stream("hi", **params),
        lambda engine, **params: engine.batch_infer(["hi", "ho"], **params),
    ],
)
def test_a_misspelt_option_is_refused_before_anything_is_asked(loaded, call):
    engine, running = loaded
    for wrong, meant in (("temprature", "temperature"), ("max_token", "max_tokens"), ("timeout", "timeout_s")):
        with pytest.raises(ConfigError, match=rf"^{wrong}=1: .* did you mean {meant}\?.* extra_body=\{{'{wrong}': "):
            call(engine, **{wrong: 1})
    assert running.asked == []
    assert engine.get_metrics()["throughput"]["total_requests"] == 0
    call(engine, temperature=0.5, extra_body={"temprature": 1})
    assert running.asked[0][1].items() >= {"temperature": 0.5, "extra_body": {"temprature": 1}}.items()


@pytest.mark.parametrize("name", ["infer", "batch_infer"])
def test_options_are_those_of_the_route_that_is_asked(loaded, name):
    engine, running = loaded
    ask, prompt = getattr(engine, name), "hi" if name == "infer" else ["hi"]
    with pytest.raises(ConfigError, match=r"^promt=1: /completion has no such option; did you mean prompt\?"):
        ask(prompt, raw=True, promt=1)
    with pytest.raises(ConfigError, match=r"^tols=1: /v1/chat/completions has no such option; did you mean tools\?"):
        ask(prompt, tols=1)
    assert running.asked == []
    ask(prompt, promt=1)
    ask(prompt, raw=True, tols=1)
    assert [params.keys() & {"promt", "tols"} for _, params in running.asked] == [{"promt"}, {"tols"}]


@pytest.mark.parametrize(("raw", "own"), [(False, "messages"), (True, "prompt")])
def test_what_a_call_sets_itself_is_refused_before_anything_is_asked(loaded, raw, own):
    engine, running = loaded
    for name in (own, "stream", "model", "max_tokens"):
        with pytest.raises(ConfigError, match=rf"^extra_body\['{name}'\]=1: is set by the call itself"):
            engine.infer("hi", raw=raw, extra_body={name: 1})
    assert running.asked == []


def test_a_wrong_call_is_raised_and_a_failed_request_kept(loaded):
    engine, _ = loaded
    with pytest.raises(ConfigError, match="n=2"):
        engine.infer(ConfigError("n", 2, "one answer a call"))
    failed = engine.infer(UpstreamError(503, "busy"))
    assert (failed.success, failed.error_message) == (False, "llama-server answered 503: busy")
    with pytest.raises(UpstreamError):
        _ = failed.text


def test_a_batch_loses_no_answer_to_a_prompt_that_fails(loaded):
    engine, _ = loaded
    found = engine.batch_infer(["a", ConfigError("messages", 7, "are none"), UpstreamError(503, "busy"), "b"])
    assert [one.received for one in found] == ["a!", "", "", "b!"]
    assert [type(one.error) for one in found] == [type(None), ConfigError, UpstreamError, type(None)]
    assert engine.get_metrics()["throughput"]["failed_requests"] == 2


@pytest.mark.parametrize(("broken", "model"), [(True, "tiny"), (False, "qwen")])
def test_a_fleet_that_cannot_be_used_is_let_go(join, broken, model):
    running = Running(broken)
    engine = join(running)
    with pytest.raises((FleetError, ConfigError)):
        engine.load_model(model)
    assert running.closed
    assert (engine.is_loaded, engine.served_name) == (False, "")


def test_layers_on_a_gpu_need_a_gpu():
    with pytest.raises(ConfigError, match=r"gpu_layers=4.*gpus=1"):
        ServerManager().start_server("tiny", gpu_layers=4)


def test_a_server_between_two_processes_has_no_client(tmp_path):
    async def make():
        spec = ServerSpec(
            name="server",
            argv=lambda port: [],
            host="127.0.0.1",
            model_path="",
            api_key="",
            key_file=tmp_path / "key",
            log_path=tmp_path / "log",
        )
        return ServerProcess(spec)

    manager = ServerManager()
    manager._loop = Loop("ServerManager", "start_server again")
    manager._process = manager._loop.run(make())
    with pytest.raises(EngineNotReadyError, match="no process now"):
        _ = manager.client
    manager.stop_server()
