"""What the familiar calls refuse, or pass on, before any fleet or server runs."""

import logging

import pytest

from lltm_ray._loop import Loop
from lltm_ray.driver import Cluster
from lltm_ray.errors import (
    ConfigError,
    EngineNotReadyError,
    FleetError,
    LltmRayError,
    ModelFormatError,
    ModelNotFoundError,
    ServerBinaryError,
    UpstreamError,
)
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
        if params["model"] == "nope":
            raise ModelNotFoundError("nope", "this fleet serves tiny")
        if isinstance(prompt, Exception):
            raise prompt
        return Completion(text=f"{prompt}!")

    complete = stream = chat

    def embed(self, texts, **params):
        self.asked.append(params)
        return Embeddings(vectors=())

    def close(self):
        self.closed = True

    stop = close


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
    assert "not used: engines, n_parallel" in caplog.text
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


every_call = pytest.mark.parametrize(
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


@every_call
def test_a_misspelt_option_is_refused_before_anything_is_asked(loaded, call):
    engine, running = loaded
    for wrong, meant in (("temprature", "temperature"), ("max_token", "max_tokens"), ("timeout", "timeout_s")):
        with pytest.raises(ConfigError, match=rf"^{wrong}=1: .* did you mean {meant}\?.* extra_body=\{{'{wrong}': "):
            call(engine, **{wrong: 1})
    assert running.asked == []
    assert engine.get_metrics()["throughput"]["total_requests"] == 0
    call(engine, temperature=0.5, extra_body={"temprature": 1})
    assert running.asked[0][1].items() >= {"temperature": 0.5, "extra_body": {"temprature": 1}}.items()


@every_call
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("max_tokens", "5", "must be int"),
        ("timeout_s", "5", "must be float"),
        ("timeout_s", -1, "must be from 0.001 to"),
        ("top_p", 7, "must be from 0 to 1"),
        ("temperature", -1, "must be from 0 to"),
        ("n", 0, "must be from 1 to"),
        ("model", 5, "must be str"),
        ("stop", 5, "must be str or list"),
    ],
)
def test_a_value_that_means_nothing_is_refused_before_anything_is_asked(loaded, call, name, value, why):
    engine, running = loaded
    with pytest.raises(ConfigError, match=rf"^{name}={value!r}: {why}"):
        call(engine, **{name: value})
    assert running.asked == []
    assert engine.get_metrics()["throughput"]["total_requests"] == 0


def test_messages_beside_a_prompt_are_refused_before_anything_is_asked(loaded):
    engine, running = loaded
    for ask in (engine.infer, engine.infer_stream):
        with pytest.raises(ConfigError, match=r"^messages=\[\]: is set by the call itself"):
            ask("hi", messages=[])
    assert running.asked == []


def test_none_is_not_given(loaded):
    engine, running = loaded
    engine.infer("hi", model=None, timeout_s=None, temperature=None)
    assert running.asked == [("hi", {"model": "tiny", "max_tokens": 128})]


@pytest.mark.parametrize("name", ["infer", "infer_stream", "chat"])
@pytest.mark.parametrize("raw", ["yes", 1, None])
def test_raw_is_true_or_false(loaded, name, raw):
    engine, running = loaded
    with pytest.raises(ConfigError, match=rf"^raw={raw!r}: must be bool"):
        getattr(engine, name)("hi", raw=raw)
    assert running.asked == []


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_empty_prompt_is_refused_by_name(loaded, blank):
    engine, running = loaded
    for ask in (engine.infer, engine.generate, engine.chat, engine.infer_stream):
        with pytest.raises(ConfigError, match=r"^prompt='.*': must be a text that is not blank"):
            ask(blank)
    with pytest.raises(ConfigError, match=r"^prompt="):
        engine.infer(blank, raw=True)
    assert running.asked == []
    whole, empty = engine.batch_infer(["hi", blank])
    assert (whole.text, type(empty.error)) == ("hi!", ConfigError)


@pytest.mark.parametrize("prompts", [None, 5, {"role": "user", "content": "hi"}])
def test_what_is_no_list_of_prompts_is_refused(loaded, prompts):
    engine, running = loaded
    with pytest.raises(ConfigError, match=r"^prompts=.*: must be a list of prompts"):
        engine.batch_infer(prompts)
    assert running.asked == []


def test_a_model_that_is_named_is_asked_and_one_that_nobody_serves_is_refused(loaded):
    engine, running = loaded
    assert engine.infer("hi", model="tiny:ada").success
    assert running.asked[-1][1]["model"] == "tiny:ada"
    for ask, prompt in ((engine.infer, "hi"), (engine.infer_stream, "hi"), (engine.batch_infer, ["hi", "ho"])):
        with pytest.raises(ModelNotFoundError, match="'nope' not found: this fleet serves tiny"):
            ask(prompt, model="nope")
    assert engine.get_metrics()["throughput"]["total_requests"] == 1


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


@pytest.fixture
def started(monkeypatch, tmp_path):
    """An engine with a fleet of its own, and what was started."""
    configs = []

    def connect(name, address=None):
        raise FleetError(f"no fleet {name!r}")

    def start(config, address=None):
        configs.append(config)
        return Running()

    monkeypatch.setattr(Cluster, "connect", connect)
    monkeypatch.setattr(Cluster, "start", start)
    monkeypatch.setattr("lltm_ray.sdk.engine.read_nodes", lambda: ["here"])
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = InferenceEngine()
    engine.load_model("tiny", n_parallel=2, ctx_size=1024, engine={"n_batch": 64})
    return engine, configs


def test_a_models_own_settings_stand_beside_those_of_the_fleet(started):
    _, (config,) = started
    assert (config.name, config.model, config.gateway.port) == ("default", "tiny", 0)
    assert (config.engine.n_parallel, config.engine.n_ctx, config.engine.n_batch) == (2, 1024, 64)


BAD = {
    "a misspelt name": ({"n_paralel": 4}, ConfigError, r"^n_paralel=4: unknown setting; did you mean n_parallel\?"),
    "another type": ({"n_parallel": "4"}, ConfigError, "^n_parallel='4': must be int"),
    "a wrong value": ({"ctx_size": -5}, ConfigError, "^n_ctx=-5: must be from"),
    "no table": ({"engine": 5, "n_parallel": 2}, ConfigError, "^engine=5: must be a table"),
    "a misspelt name in a table": (
        {"engine": {"n_batc": 1}},
        ConfigError,
        r"^engine\.n_batc=1: .*did you mean n_batch",
    ),
    "another fleet": ({"name": "other"}, ConfigError, r"^name='other': .*InferenceEngine\(name\)"),
    "no model": ({"model": 5}, ConfigError, "^model=5: must be str"),
    "an unknown model": ({"model": "tinny"}, ModelNotFoundError, "did you mean tiny"),
    "an unknown draft": ({"engine": {"model_draft": "tiny-draf"}}, ModelNotFoundError, "did you mean tiny-draft"),
    "no file": ({"model": "/none/m.gguf"}, ModelNotFoundError, "no such file"),
    "no GGUF": ({"model": __file__}, ModelFormatError, "byte 0"),
    "no server": ({"llama_server": "/none"}, ServerBinaryError, "'/none', which does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_load_that_is_refused_leaves_what_is_loaded(started, case):
    engine, configs = started
    settings, kind, words = BAD[case]
    before = engine.cluster
    with pytest.raises(LltmRayError, match=words) as caught:
        engine.load_model(**settings)
    assert type(caught.value) is kind
    assert engine.cluster is before
    assert not before.closed
    assert len(configs) == 1
    assert engine.infer("hi").text == "hi!"


@pytest.mark.parametrize("nodes", [["here", "there"], ["here"]])
def test_files_of_other_nodes_are_not_looked_for_but_names_are(started, monkeypatch, nodes):
    engine, configs = started
    if len(nodes) == 1:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("lltm_ray.sdk.engine.read_nodes", lambda: nodes)
    with pytest.raises(ModelNotFoundError, match="did you mean tiny"):
        engine.load_model("tinny")
    assert engine.is_loaded
    for model in ("/there/m.gguf", "nobody/has-it:m.gguf"):
        engine.load_model(model)
        assert (configs[-1].model, engine.served_name) == (model, "m")


def test_a_wrong_setting_or_name_is_refused_before_a_fleet_is_started(started):
    _, configs = started
    engine = InferenceEngine("fresh")
    for settings in ({"model": "tinny"}, {"n_paralel": 4}):
        with pytest.raises(LltmRayError, match="did you mean"):
            engine.load_model(**settings)
    assert len(configs) == 1


def test_a_fleet_that_was_joined_is_kept_when_it_does_not_serve_what_is_asked_for(loaded):
    engine, running = loaded
    with pytest.raises(ConfigError, match=r"^model='qwen': .*serves tiny"):
        engine.load_model("qwen")
    assert not running.closed
    assert engine.infer("hi").success
    running.broken = True
    with pytest.raises(FleetError, match="no status"):
        engine.load_model("qwen")
    assert running.closed, "one that does not answer is let go"


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
