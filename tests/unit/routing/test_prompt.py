"""Keys share beginnings where prompts do, and nowhere else."""

import pytest

from lltm_ray.routing.prompt import prompt_key, reply_key

CHAT = "/v1/chat/completions"


def turn(*texts):
    roles = ("system", "user", "assistant")
    order = [roles[0], *(roles[1 + index % 2] for index in range(len(texts) - 1))]
    return {"messages": [{"role": role, "content": text} for role, text in zip(order, texts, strict=True)]}


def test_a_conversation_s_next_turn_begins_with_its_last_turn_and_the_reply():
    first = prompt_key(CHAT, turn("be brief", "hello"))
    second = prompt_key(CHAT, turn("be brief", "hello", "hi there", "more"))

    assert second.startswith(first + reply_key(CHAT, "hi there"))


def test_text_goes_on_where_prompt_and_reply_ended():
    first = prompt_key("/v1/completions", {"prompt": "once upon"})

    assert prompt_key("/completion", {"prompt": "once upon a time"}) == first + reply_key("/completion", " a time")


def test_a_message_that_only_begins_like_another_shares_no_more_than_its_beginning():
    short = prompt_key(CHAT, turn("be brief"))
    longer = prompt_key(CHAT, turn("be brief, please"))

    assert not longer.startswith(short)
    assert longer.startswith(short[:-1])


def test_token_ids_are_packed_so_that_a_prefix_stays_one():
    first = prompt_key("/completion", {"prompt": [1, 2, 3]})

    assert prompt_key("/completion", {"prompt": [1, 2, 3, 4]}).startswith(first)
    assert not prompt_key("/completion", {"prompt": [1, 2, 4]}).startswith(first)


def test_tools_come_before_the_messages_as_templates_render_them():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    with_tools = prompt_key(CHAT, turn("be brief", "hello") | {"tools": tools})

    assert with_tools.startswith(b"tools")
    assert with_tools.endswith(prompt_key(CHAT, turn("be brief", "hello")))


def test_an_image_counts_by_its_digest_and_text_parts_by_their_text():
    image = {"type": "image_url", "image_url": {"url": "data:" + "A" * 10_000}}
    other = {"type": "image_url", "image_url": {"url": "data:" + "B" * 10_000}}

    def key(*parts):
        return prompt_key(CHAT, {"messages": [{"role": "user", "content": list(parts)}]})

    assert len(key(image)) < 100
    assert key(image) != key(other)
    assert key({"type": "text", "text": "hi"}) == prompt_key(CHAT, {"messages": [{"role": "user", "content": "hi"}]})


def test_another_adapter_is_another_prompt():
    plain = prompt_key(CHAT, turn("be brief"))
    adapted = prompt_key(CHAT, turn("be brief") | {"lora": [{"id": 0, "scale": 0.5}]})

    assert adapted != plain
    chosen = prompt_key(CHAT, turn("be brief"), (("pirate", None),))
    assert len({plain, adapted, chosen, prompt_key(CHAT, turn("be brief"), ())}) == 4
    assert prompt_key(CHAT, turn("be brief") | {"lora": [{"id": 0, "scale": 1}]}, (("pirate", None),)) == chosen


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "text"}),
        (CHAT, {"messages": "no list"} | {"messages": 7}),
        (CHAT, {"messages": ["no mapping"]}),
        (CHAT, ["no object"]),
        ("/completion", {"prompt": ["many", "prompts"]}),
        ("/completion", {"prompt": [2**40]}),
        ("/completion", {}),
    ],
)
def test_what_has_no_known_prompt_has_no_key(path, body):
    assert prompt_key(path, body) == b""


def test_lone_surrogates_are_no_reason_to_fail():
    assert prompt_key(CHAT, turn("\ud800"))
