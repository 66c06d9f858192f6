"""What a named session refuses before it asks the gateway."""

import pytest

from lltm_ray._sessions import SessionInfo
from lltm_ray.actors.sessions import Session, Sessions
from lltm_ray.errors import ConfigError, EngineNotReadyError


@pytest.fixture
def sessions():
    made = Sessions("http://127.0.0.1:1")
    yield made
    made.close()


@pytest.mark.parametrize("text", ["", " \n", None, 5, [{"role": "user", "content": "hi"}]])
def test_a_message_that_says_nothing_is_refused_and_leaves_no_trace(sessions, text):
    session = Session(sessions, sessions._client, SessionInfo(name="alice", model=""), [])
    for ask in (session.ask, lambda given: next(session.stream(given))):
        with pytest.raises(ConfigError, match=r"^text=.*: must be a text that is not blank"):
            ask(text)
    assert session.messages == []


def test_a_message_is_sent_and_what_fails_leaves_no_trace(sessions):
    session = Session(sessions, sessions._client, SessionInfo(name="alice", model=""), [])
    with pytest.raises(EngineNotReadyError, match=r"^llama-server is not listening at http"):
        session.ask("hi")
    assert session.messages == []


def test_sessions_that_are_closed_are_told_to_be(sessions):
    sessions.close()
    with pytest.raises(EngineNotReadyError, match="this client is closed"):
        sessions.list()
