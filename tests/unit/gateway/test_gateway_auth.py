import logging

import pytest

from lltm_ray.errors import AuthenticationError, ConfigError
from lltm_ray.gateway.auth import ApiKeys


def key_file(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_are_read_one_a_line_without_comments_and_blanks(tmp_path):
    keys = ApiKeys.from_file(key_file(tmp_path, "# team a\n alpha \n\nbeta\n"))
    assert len(keys) == 2
    keys.check([(b"authorization", b"Bearer alpha")])
    keys.check([(b"authorization", b"bearer beta")])
    keys.check([(b"x-api-key", b"beta")])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer gamma")],
        [(b"authorization", b"Basic alpha")],
        [(b"authorization", b"alpha")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"\xff\xfe")],
        [(b"authorization", b"Bearer # team a")],
    ],
)
def test_anything_but_one_of_the_keys_is_refused_in_llama_servers_words(headers):
    with pytest.raises(AuthenticationError) as caught:
        ApiKeys(["alpha"]).check(headers)
    assert caught.value.as_dict() == {
        "error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}
    }


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_keys_is_refused_since_it_would_open_the_gateway(tmp_path, text):
    with pytest.raises(ConfigError, match="holds no key"):
        ApiKeys.from_file(key_file(tmp_path, text))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.from_file(tmp_path / "none")


def test_a_file_that_others_can_read_is_warned_about_without_showing_its_keys(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        keys = ApiKeys.from_file(key_file(tmp_path, "alpha\n", 0o644))
    assert "chmod 600" in caplog.text
    assert "alpha" not in caplog.text + repr(vars(keys))


def test_no_keys_leave_the_gateway_open():
    assert not ApiKeys()
    ApiKeys().check([])
