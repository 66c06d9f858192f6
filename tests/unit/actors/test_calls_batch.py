"""Batches of a driver: what is no prompt is told before anything is sent; errors of requests keep their places."""

import asyncio
from types import SimpleNamespace

import pytest

from lltm_ray.actors import calls as module
from lltm_ray.actors.calls import Calls
from lltm_ray.actors.fleet import Fleet
from lltm_ray.actors.observe import WatchedCalls
from lltm_ray.config import FleetConfig
from lltm_ray.errors import ConfigError, DeadlineError, OverloadedError, UpstreamError
from lltm_ray.records import Completion, FinishReason

USER = [{"role": "user", "content": "hi"}]


class Engine:
    """Answers with what it was asked; `fail` is refused, `slow` waits until it is cancelled, `leave` is cancelled,
    `crash` is a fault."""

    def __init__(self):
        self.chat, self.complete = (SimpleNamespace(remote=getattr(self, name)) for name in ("_chat", "_complete"))
        self.asked, self.given, self.cancelled = [], [], []

    async def _chat(self, messages, **given):
        return await self._complete(messages[0]["content"], **given)

    async def _complete(self, prompt, **given):
        self.asked.append(prompt)
        self.given.append(given)
        if prompt == "fail":
            raise UpstreamError(400, '{"error": {"message": "no"}}')
        if prompt == "full":
            raise OverloadedError("full", 1.0)
        if prompt == "leave":
            raise asyncio.CancelledError
        if prompt == "crash":
            raise ZeroDivisionError
        try:
            await asyncio.sleep(3600 if prompt == "slow" else 0)
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        return Completion(text=f"{prompt}!", finish_reason=FinishReason.STOP)


class Router:
    async def acquire(self, ask, exclude):
        return SimpleNamespace(engine=SimpleNamespace(name="engine-0"), lora=b"", row=SimpleNamespace(recover=int))

    def release(self, lease, served):
        pass


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(module.ray, "cancel", lambda call: None)  # what is awaited here is no call of Ray's
    return Engine()


@pytest.fixture(params=[Calls, WatchedCalls])
def batch(request, engine):
    directory = SimpleNamespace(wake=SimpleNamespace(remote=None))
    made = request.param(Fleet(config=FleetConfig(), run_id="", directory=directory))
    made._router, made._fleet.engines["engine-0"] = Router(), engine
    return lambda prompts, **given: made.batch(prompts, **{"timeout_s": 5} | given)


@pytest.mark.parametrize(
    ("prompt", "field", "why"),
    [
        (None, "prompts[2]", "must be text, or a list of token ids"),
        (5, "prompts[2]", "must be text, or a list of token ids"),
        ([], "prompts[2]", "must be text, or a list of token ids"),
        ([1, None], "prompts[2][1]", "must be a token id or text"),
        (["a", "b"], "prompts[2]", "a list of texts is many prompts"),
        ([{"content": "hi"}], "prompts[2][0].role", "must be a name"),
        ([*USER, "hi"], "prompts[2][1]", "is of type str: give a mapping"),
        (USER[0], "prompts[2]", "messages are chatted, and stand in a list"),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
async def test_what_is_no_prompt_is_told_with_its_place_before_anything_is_sent(
    batch, engine, prompt, field, why, keeps
):
    with pytest.raises(ConfigError) as caught:
        await batch(["one", USER, prompt, "fail"], return_exceptions=keeps)
    assert (caught.value.field, engine.asked) == (field, [])
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_token": 5}, "did you mean max_tokens"),
        ({"top_p": 7}, "must be from 0 to 1"),
        ({"timeout_s": 0}, "timeout_s=0: must be from"),
        ({"return_exception": True}, "did you mean return_exceptions"),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("prompts", [["one", USER], []])
async def test_a_parameter_that_is_wrong_for_all_is_raised_and_nothing_is_sent(
    batch, engine, prompts, given, said, keeps
):
    with pytest.raises(ConfigError, match=said):
        await batch(prompts, return_exceptions=keeps, **given)
    assert engine.asked == []


async def test_errors_stand_in_their_prompts_places_beside_all_answers_where_that_is_asked_for(batch):
    prompts = ["one", "fail", USER, "crash", "slow", [1, 2]]
    done = await batch(prompts, return_exceptions=True, timeout_s=0.5)
    assert [type(each) for each in done] == [
        *(Completion, UpstreamError, Completion, ZeroDivisionError, DeadlineError, Completion)
    ]
    assert [done[at].text for at in (0, 2, 5)] == ["one!", "hi!", "[1, 2]!"]
    assert await batch([], return_exceptions=True) == []


async def test_else_the_first_error_is_raised_with_its_place_and_the_others_are_cancelled(batch, engine):
    with pytest.raises(OverloadedError) as caught:
        await batch(["one", "slow", "full", *["slow"] * 20])
    assert caught.value.__notes__ == ["prompts[2] of the batch"]
    assert engine.cancelled == ["slow"] * engine.asked.count("slow")
    assert [each.text for each in await batch(["a", USER, "b"])] == ["a!", "hi!", "b!"]


async def test_a_batch_that_is_cancelled_cancels_its_requests(batch, engine):
    task = asyncio.ensure_future(batch(["slow", "slow"], return_exceptions=True, timeout_s=60))
    while len(engine.asked) < 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == ["slow", "slow"]


@pytest.mark.parametrize("keeps", [False, True])
async def test_a_request_that_is_cancelled_alone_is_no_answer_and_no_error_of_its_own(batch, engine, keeps):
    with pytest.raises(asyncio.CancelledError):
        await batch(["one", "leave"], return_exceptions=keeps)


async def test_what_extra_body_holds_reaches_every_request(batch, engine):
    extra = {"max_tokens": 3, "new_option": 1}
    await batch(["one", USER], temperature=0.5, stop=None, extra_body=extra)
    sent = {"temperature": 0.5, "max_tokens": 3, "extra_body": {"new_option": 1}}
    assert [{name: each.get(name) for name in (*sent, "stop")} for each in engine.given] == [sent | {"stop": None}] * 2
