"""The driver API on real engines: handles, routing, streams, errors."""

import json
import os
import subprocess
import sys
import threading
import urllib.request

import pytest
import ray

import lltm_ray
from lltm_ray.actors import calls
from lltm_ray.errors import ConfigError, DeadlineError, FleetError, UpstreamError
from lltm_ray.records import EngineState
from tests.ray.conftest import HI, post, until

GREEDY = {"temperature": 0, "seed": 7, "max_tokens": 24}


def slots(cluster):
    """As the servers tell them, by engine and number."""
    found = {}
    for engine in cluster.status().engines:
        asked = urllib.request.Request(f"{engine.url}/slots", headers={"authorization": f"Bearer {engine.api_key}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found |= {(engine.name, slot["id"]): slot for slot in json.load(answer)}
    return found


def busy(cluster):
    return sum(slot["is_processing"] for slot in slots(cluster).values())


def over_http(cluster, body):
    return post(f"{cluster.endpoint}/v1/chat/completions", body)["choices"][0]["message"]["content"]


@pytest.fixture
def until_cut_off(cluster):
    """Waits until no slot works any more; none may have come to its answer's own end since the test began."""
    tasks = {key: slot.get("id_task") for key, slot in slots(cluster).items()}

    def wait():
        until(lambda: not busy(cluster))
        since = [slot for key, slot in slots(cluster).items() if slot.get("id_task") != tasks[key]]
        assert all(slot["next_token"][0]["has_next_token"] for slot in since), since

    return wait


def test_every_path_gives_the_same_text(cluster):
    done = ray.get(cluster.engines[0].chat.remote(HI, **GREEDY))
    stream = cluster.engines[1].stream.options(num_returns="streaming").remote(HI, **GREEDY)
    texts = {
        "handle": done.text,
        "handle stream": "".join(ray.get(event).text for event in stream),
        "chat": cluster.chat(HI, **GREEDY).text,
        "stream": "".join(event.text for event in cluster.stream(HI, **GREEDY)),
        "batch": cluster.batch([HI], **GREEDY)[0].text,
        "http": over_http(cluster, {"messages": HI, **GREEDY}),
    }
    assert len(done.text) > 10
    assert set(texts.values()) == {done.text}, texts


def test_an_answer_tells_tokens_times_and_engine(cluster):
    done = ray.get(cluster.engines[1].chat.remote(HI, max_tokens=8, ignore_eos=True))
    assert done.engine == "engine-1"
    assert (done.usage.input_tokens > 0, done.usage.output_tokens) == (True, 8)
    assert done.timings.prompt_ms > 0
    assert 0 < done.timings.queue_s <= done.timings.ttft_s <= done.timings.total_s


def test_a_batch_keeps_its_order_and_uses_every_engine(cluster):
    prompts = [f"number {index}" for index in range(40)]
    answers = cluster.batch(prompts, temperature=0, max_tokens=8)
    assert [answer.text for answer in answers[:3]] == [
        cluster.complete(prompt, temperature=0, max_tokens=8).text for prompt in prompts[:3]
    ]
    assert {answer.engine for answer in answers} == {"engine-0", "engine-1"}


def test_a_batch_tells_which_prompt_failed_and_keeps_the_answers_to_the_others_where_asked_to(cluster):
    prompts = ["one", "word " * 100_000, HI]
    one, error, chat = cluster.batch(prompts, return_exceptions=True, **GREEDY)
    assert (one.text, chat.text) == (cluster.complete("one", **GREEDY).text, cluster.chat(HI, **GREEDY).text)
    assert (type(error), error.http_status) == (UpstreamError, 400)
    with pytest.raises(UpstreamError, match="do not fit a slot's context") as caught:
        cluster.batch(prompts, **GREEDY)
    assert caught.value.__notes__ == ["prompts[1] of the batch"]
    with pytest.raises(ConfigError, match=r"^prompts\[1\]=5: must be text"):
        cluster.batch(["one", 5], **GREEDY)


def test_leaving_a_stream_early_frees_its_slot(cluster, until_cut_off):
    stream = cluster.stream(HI, max_tokens=100_000, ignore_eos=True)
    assert next(stream).text is not None
    assert busy(cluster) == 1
    stream.close()
    until_cut_off()


def test_an_engine_that_ended_since_the_table_was_made_is_passed_over_and_keeps_no_claim(cluster, monkeypatch):
    def gone(fleet, name):
        raise ValueError(f"no actor {name}")

    monkeypatch.setattr(calls, "get_engine", gone)
    lost = cluster._fleet.engines.pop("engine-0")
    try:
        engines = {event.engine for _ in range(8) for event in cluster.stream(HI, max_tokens=2)}
        assert engines == {"engine-1"}
        assert {cluster.chat(HI, max_tokens=2).engine for _ in range(8)} == {"engine-1"}
        claims = cluster._calls._router.snapshot()["engines"]
        assert [row["slots_busy"] for row in claims.values()] == [0, 0]
    finally:
        cluster._fleet.engines["engine-0"] = lost


def test_a_deadline_cancels_the_request_and_frees_its_slot(cluster, until_cut_off):
    with pytest.raises(DeadlineError, match=r"0\.5 s"):
        cluster.chat(HI, max_tokens=100_000, ignore_eos=True, timeout_s=0.5)
    until_cut_off()


def test_llama_servers_own_error_arrives_with_status_and_body(cluster):
    with pytest.raises(UpstreamError) as caught:
        cluster.chat(HI, grammar="root ::= (")
    assert caught.value.http_status == 400
    assert '"error"' in caught.value.body


def test_a_text_is_one_message_of_the_user_wherever_messages_are_taken(cluster):
    text, handle = HI[0]["content"], cluster.engines[0]
    assert cluster.chat(text, **GREEDY).text == cluster.chat(HI, **GREEDY).text
    assert "".join(event.text for event in cluster.stream(text, max_tokens=4))
    assert cluster.count_tokens(text) == cluster.count_tokens(HI)
    assert ray.get(handle.count_tokens.remote(text)) == ray.get(handle.count_tokens.remote(HI))
    assert ray.get(handle.chat.remote(text, **GREEDY)).text == cluster.chat(HI, **GREEDY).text


def test_a_wrong_message_is_told_by_field_type_and_remedy(cluster):
    with pytest.raises(ConfigError, match=r"messages\[0\]"):
        cluster.chat([{"content": "no role"}])
    for ask in (cluster.chat, cluster.count_tokens, lambda given: next(cluster.stream(given))):
        with pytest.raises(ConfigError, match="messages=7: is of type int: give a text"):
            ask(7)
    with pytest.raises(ConfigError, match="prompts='hi': is of type str: give a list of prompts"):
        cluster.batch("hi")


def test_embeddings_need_a_fleet_that_serves_them(cluster):
    with pytest.raises(UpstreamError, match="embeddings"):
        cluster.embed("text")


def test_many_threads_share_one_cluster(cluster):
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(cluster.chat(HI, **GREEDY).text)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 16
    assert len(set(texts)) == 1


def test_a_second_fleet_of_the_same_name_is_refused(cluster):
    with pytest.raises(FleetError, match="runs already"):
        lltm_ray.Cluster.start(model="random", name=cluster.name, gpu_share=0.0, gateway=None)


def test_another_driver_finds_the_fleet_and_leaves_it_running(cluster):
    with lltm_ray.Cluster.connect(cluster.name) as other:
        assert other.endpoint == cluster.endpoint
        assert other.chat(HI, **GREEDY).text == cluster.chat(HI, **GREEDY).text
    assert {engine.state for engine in cluster.status().engines} == {EngineState.READY}


def test_another_process_finds_it_by_its_name_alone_and_joins_no_ray_for_one_that_is_not_there(cluster):
    script = """
import sys, lltm_ray, ray
for name in sys.argv[1:]:
    try:
        with lltm_ray.Cluster.connect(name) as found:
            print(found.endpoint)
    except lltm_ray.LltmRayError as error:
        print(type(error).__name__, ray.is_initialized(), error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", script, "nowhere", cluster.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    missing, found = done.stdout.splitlines()
    assert missing.startswith("FleetError False no fleet 'nowhere' runs on a Ray of this machine: start it")
    assert found == cluster.endpoint


def test_closing_frees_the_slots_of_calls_in_flight_and_tells_their_threads(cluster, until_cut_off):
    other, outcome = lltm_ray.Cluster.connect(cluster.name), []

    def call():
        try:
            outcome.append(other.chat(HI, max_tokens=100_000, ignore_eos=True))
        except FleetError as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: busy(cluster) or outcome)
    other.close()
    thread.join(60)
    assert "closed while the call ran" in str(outcome[0])
    until_cut_off()
    other.close()  # a second time does nothing
    with pytest.raises(FleetError, match="is closed"):
        other.chat(HI)


def test_a_call_ends_at_its_deadline_also_when_its_driver_does_not_cancel_it(cluster, until_cut_off):
    call = cluster.engines[0].chat.remote(HI, max_tokens=100_000, ignore_eos=True, timeout_s=0.5)
    with pytest.raises(DeadlineError):
        ray.get(call)
    until_cut_off()


def test_an_unknown_fleet_is_told_with_the_command_that_starts_one(ray_cluster):
    with pytest.raises(FleetError, match="lltm-ray up --name nowhere"):
        lltm_ray.Cluster.connect("nowhere")


def test_status_is_complete_and_holds_no_key(cluster):
    seen = cluster.status().public()
    for engine in seen["engines"]:
        wanted = (
            "name",
            "state",
            "model",
            "node_id",
            "gpu_ids",
            "share",
            "server_pid",
            "url",
            "slots_busy",
            "slots_total",
            "restarts",
        )
        assert set(wanted) <= set(engine)
        assert "api_key" not in engine
    assert seen["gateways"][0]["url"] == cluster.endpoint
