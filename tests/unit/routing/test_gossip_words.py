"""What routers tell each other of slots, and what servers show of them; the words are real, the engines need not be."""

import pickle
import time

import pytest

from lltm_ray.records import EngineInfo, EngineState, Timings
from lltm_ray.routing.gossip import MARGIN_S, MOST_NEWS, Board, SlotDigest, SlotSample
from lltm_ray.routing.hearsay import Hearsay, hash_cuts
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.prompt import find_cuts, prompt_key, reply_key
from lltm_ray.routing.router import Router, Served
from lltm_ray.routing.served import SlotShare

SALT = b"s" * 32
CHAT = "/v1/chat/completions"


def engine(name="a", *, slots=4, pid=1, ram_tokens=0):
    return EngineInfo(
        name=name,
        model="m",
        state=EngineState.READY,
        url=f"http://{name}:{pid}",
        slots_total=slots,
        server_pid=pid,
        cache_ram_tokens=ram_tokens,
    )


def pair(*engines):
    """Two routers that share the engines' slots."""
    routers = [Router(8, 5.0) for _ in range(2)]
    for index, router in enumerate(routers):
        router.update(engines, share=SlotShare(index, 2))
    return routers


def chat(*texts):
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return prompt_key(CHAT, {"messages": messages})


FIRST, ANSWER = "tell me of the sea " * 40, "it is wide and wet " * 4


async def claim(router, key, **ask):
    return await router.acquire(Ask(model="m", key=key, **ask))


async def serve(router, key, answer=ANSWER):
    """One request from claim to release; every byte is a token."""
    lease = await claim(router, key)
    cached = lease.cached_tokens
    told = Timings(cache_n=cached, prompt_n=len(key) - cached, prompt_ms=5.0, predicted_n=len(answer) + 1)
    router.release(lease, Served(timings=told, reply=reply_key(CHAT, answer)))
    return lease


async def exchange(board, routers):
    for number, router in enumerate(routers):
        board.post(str(number), await router.gossip.news(SALT))
    for number, router in enumerate(routers):
        await router.gossip.hear(board.read(str(number), 0)[1], SALT)


def sample(lease, **more):
    """As the server shows the slot, long after all that happened here."""
    state = {"is_busy": False, "tokens": 0, "task_id": 1, "at_unix_nano": time.time_ns() + 10**9} | more
    return SlotSample(engine=lease.engine.name, server_pid=lease.engine.server_pid, slot=lease.slot, **state)


async def test_a_turn_at_the_other_router_goes_on_in_the_same_slot():
    one, other = pair(engine())
    first = await serve(one, chat(FIRST))
    await exchange(Board(), (one, other))
    lease = await claim(other, chat(FIRST, ANSWER, "go on"))
    assert lease.slot == first.slot
    assert lease.cached_tokens > 0.9 * len(chat(FIRST))


async def test_without_a_word_it_finds_nothing():
    one, other = pair(engine())
    await serve(one, chat(FIRST))
    lease = await claim(other, chat(FIRST, ANSWER, "go on"))
    assert lease.cached_tokens == 0


async def test_a_lent_slot_counts_against_the_share_of_who_uses_it():
    one, other = pair(engine())
    await serve(one, chat(FIRST))
    await exchange(Board(), (one, other))
    leases = [await claim(other, chat(FIRST, ANSWER, "go on")), await claim(other, chat("new"))]
    row = other.snapshot()["engines"]["a"]
    assert (row["slots_busy"], row["slots_total"]) == (2, 2)
    for lease in leases:
        other.release(lease)
    assert other.snapshot()["engines"]["a"]["slots_busy"] == 0
    assert {(await claim(other, chat(str(number)))).slot for number in range(2)} == SlotShare(1, 2).of("a", 4)


async def test_another_conversation_is_not_put_where_the_other_routers_slots_share_only_its_beginning():
    one, other = pair(engine())
    system = "you are a helpful sailor " * 40
    await serve(one, chat(system, ANSWER, FIRST))
    await exchange(Board(), (one, other))
    lease = await claim(other, chat(system, ANSWER, "something else"))
    assert lease.slot in SlotShare(1, 2).of("a", 4)


async def test_the_owner_hears_who_went_on_in_its_slot_and_keeps_new_conversations_out_of_it():
    board, (one, other) = Board(), pair(engine(slots=4))
    first = await serve(one, chat(FIRST))
    await exchange(board, (one, other))
    second = chat(FIRST, ANSWER, "go on")
    await serve(other, second)
    await exchange(board, (one, other))
    assert (await serve(one, chat("another one " * 40))).slot != first.slot
    third = await claim(one, chat(FIRST, ANSWER, "go on", ANSWER, "and on"))
    assert third.slot == first.slot
    assert third.cached_tokens > 0.95 * len(second)


async def test_a_slot_that_the_other_router_uses_now_is_given_out_last_and_then_unnamed():
    one, other = pair(engine(slots=4))
    await serve(one, chat(FIRST))
    await exchange(board := Board(), (one, other))
    running = await claim(other, chat(FIRST, ANSWER, "go on"))
    await exchange(board, (one, other))
    slots = [(await claim(one, chat(str(number)))).slot for number in range(2)]
    assert running.slot not in slots
    assert slots[1] == -1, "llama.cpp knows which one is idle"


async def test_a_router_believes_itself_about_what_it_used_since():
    one, other = pair(engine())
    first = await serve(one, chat(FIRST))
    stale = await one.gossip.news(SALT)
    await other.gossip.hear(stale, SALT)
    lease = await serve(other, chat(FIRST, ANSWER, "go on"))
    await other.gossip.hear(stale, SALT)
    again = await claim(other, chat(FIRST, ANSWER, "go on", ANSWER, "and on"))
    assert (first.slot, again.slot) == (lease.slot, lease.slot)
    assert again.cached_tokens > len(chat(FIRST, ANSWER, "go on"))


async def test_words_of_an_earlier_server_are_not_believed():
    one, other = pair(engine())
    await serve(one, chat(FIRST))
    news = await one.gossip.news(SALT)
    other.update([engine(pid=2)])
    await other.gossip.hear(news, SALT)
    assert (await claim(other, chat(FIRST, ANSWER, "go on"))).cached_tokens == 0


async def test_what_left_its_slot_is_still_looked_for_in_host_memory():
    board, (one, other) = Board(), pair(engine(slots=2, ram_tokens=100_000))
    await serve(one, chat(FIRST))
    await exchange(board, (one, other))
    await serve(one, chat("quite another one " * 40))
    await exchange(board, (one, other))
    lease = await claim(other, chat(FIRST, ANSWER, "go on"))
    assert lease.choice.cached_tokens > 0.9 * len(chat(FIRST))


async def test_news_are_told_once_and_again_if_nobody_could_be_told():
    one, _ = pair(engine())
    await serve(one, chat(FIRST))
    news = await one.gossip.news(SALT)
    assert await one.gossip.news(SALT) == []
    one.gossip.untell(news)
    assert [each.marks for each in await one.gossip.news(SALT)] == [each.marks for each in news]


async def test_news_are_bounded_and_the_rest_follows():
    one = Router(8, 5.0)
    one.update([engine(f"e{number}", slots=2) for number in range(MOST_NEWS)])
    for number in range(MOST_NEWS + 5):
        await claim(one, chat(str(number)))
    assert [len(await one.gossip.news(SALT)) for _ in range(3)] == [MOST_NEWS, 5, 0]


async def test_a_digest_holds_no_text_and_few_bytes_and_depends_on_the_salt():
    one, _ = pair(engine())
    await serve(one, chat(FIRST))
    (digest,) = await one.gossip.news(SALT)
    raw = pickle.dumps(digest)
    assert (b"sea" in raw, b"wide" in raw, len(raw) < 600) == (False, False, True)
    assert not set(hash_cuts(chat(FIRST), SALT)) & set(hash_cuts(chat(FIRST), b"other" * 4))


# --- samples


async def test_a_slot_that_the_server_shows_empty_predicts_nothing():
    one, _ = pair(engine())
    lease = await serve(one, chat(FIRST))
    await one.gossip.hear([sample(lease)], SALT)
    assert (await claim(one, chat(FIRST, ANSWER, "go on"))).cached_tokens == 0


@pytest.mark.parametrize(("more", "is_known"), [(0, True), (5, True), (-300, False), (400, False)])
async def test_a_slot_that_holds_another_number_of_tokens_holds_something_else(more, is_known):
    one, _ = pair(engine())
    lease = await serve(one, chat(FIRST))
    tokens = len(chat(FIRST)) + len(ANSWER) + more
    await one.gossip.hear([sample(lease, tokens=tokens)], SALT)
    assert bool((await claim(one, chat(FIRST, ANSWER, "go on"))).cached_tokens) == is_known


async def test_another_task_in_a_slot_is_somebody_elses_even_if_it_is_as_long():
    one, _ = pair(engine())
    lease = await serve(one, chat(FIRST))
    tokens = len(chat(FIRST)) + len(ANSWER)
    await one.gossip.hear([sample(lease, tokens=tokens, task_id=7)], SALT)
    await one.gossip.hear([sample(lease, tokens=tokens, task_id=9)], SALT)
    assert (await claim(one, chat(FIRST, ANSWER, "go on"))).cached_tokens == 0


async def test_a_sample_from_before_the_last_claim_is_ignored():
    one, _ = pair(engine())
    lease = await serve(one, chat(FIRST))
    await one.gossip.hear([sample(lease, at_unix_nano=time.time_ns() + int(MARGIN_S * 5e8))], SALT)
    running = await claim(one, chat(FIRST, ANSWER, "go on"))
    assert running.cached_tokens > 700
    await one.gossip.hear([sample(running)], SALT)
    told = Timings(cache_n=running.cached_tokens, prompt_n=60, predicted_n=9)
    one.release(running, Served(timings=told, reply=reply_key(CHAT, ANSWER)))
    assert one.held("a")[0].tokens > 700, "a sample of a running claim says nothing"


async def test_a_slot_that_is_busy_with_somebody_else_is_free_again_when_it_is_idle():
    one = Router(8, 5.0)
    one.update([engine(slots=2)])
    lease = await serve(one, chat("x"))
    await one.gossip.hear([sample(lease, is_busy=True)], SALT)
    first = await claim(one, chat("one"))
    assert first.slot != lease.slot
    one.release(first)
    await one.gossip.hear([sample(lease, task_id=3, tokens=50)], SALT)
    assert {(await claim(one, chat(str(number)))).slot for number in range(2)} == {0, 1}


async def test_a_slot_is_free_again_though_its_last_word_came_while_the_server_chose_slots():
    one = Router(8, 5.0)
    one.update([engine(slots=2)])
    leases = [await serve(one, chat("x")), await claim(one, b"", can_pin=False)]
    assert leases[1].slot == -1
    one._engines["a"].taken.add(leases[0].slot)
    await one.gossip.hear([sample(leases[0])], SALT)
    one.release(leases[1])
    assert one.hold_slot("a", leases[0].slot) is not None


# --- moves


async def test_a_slot_that_somebody_else_uses_is_neither_held_nor_moved_to():
    one = Router(8, 5.0)
    one.update([engine(slots=2)])
    lease = await serve(one, chat(FIRST))
    await one.gossip.hear([sample(lease, is_busy=True)], SALT)
    assert one.hold_slot("a", lease.slot) is None
    free = one.claim_slot("m", exclude=(), tokens=0)
    assert {free.slot, lease.slot} == {0, 1}
    assert one.claim_slot("m", exclude=(), tokens=0) is None


async def test_a_routers_own_word_is_nobody_elses():
    for _ in range(200):  # whether a float is rounded up is chance
        board, (one, _) = Board(), pair(engine())
        lease = await serve(one, chat(FIRST))
        board.post("one", await one.gossip.news(SALT))
        await one.gossip.hear(board.read("one", 0)[1], SALT)
        assert [each.slot for each in one.held("a")] == [lease.slot]


async def test_what_another_router_left_in_a_slot_is_held_by_that_one_alone_once_the_engine_is_closed():
    board, (one, other) = Board(), pair(engine())
    first = await serve(one, chat(FIRST))
    assert [each.slot for each in one.held("a")] == [first.slot]
    await exchange(board, (one, other))
    await serve(other, chat(FIRST, ANSWER, "go on"))
    await exchange(board, (one, other))
    assert (one.held("a"), other.held("a"), other.hold_slot("a", first.slot)) == ((), (), None)
    for router in (one, other):
        router.close_engine("a")
    assert one.held("a") == ()
    (held,) = other.held("a")
    assert (held.slot, held.key.startswith(chat(FIRST))) == (first.slot, True)
    lease = other.hold_slot("a", first.slot)
    other.erased("a", first.slot)
    other.release(lease)
    assert (other.held("a"), other.in_flight("a")) == ((), 0)


# --- the parts


def test_the_board_hands_on_what_is_new_and_not_a_readers_own():
    board = Board()
    old, new = (
        SlotDigest(engine="a", server_pid=1, slot=0, at_unix_nano=at, tokens=at, size_bytes=9, marks=((9, b"h"),))
        for at in (1, 2)
    )
    board.post("one", [old])
    version, told = board.read("two", 0)
    assert told == [old]
    board.post("one", [new])
    assert board.read("two", version)[1] == [new]
    assert board.read("one", version)[1] == []
    assert board.read("one", 0)[1] == [new], "a router that was started anew knows nothing of its former life"


def test_cuts_are_where_a_later_turn_goes_on():
    key = chat("a" * 300, "b" * 30, "c")
    assert find_cuts(key, 9) == [len(chat("a" * 300)), len(chat("a" * 300, "b" * 30)), len(key)]
    assert find_cuts(key, 1) == [len(key)]
    assert find_cuts(b"plain text " * 60, 2) == [256, 512]
    assert find_cuts(b"short", 2) == []


def test_hearsay_is_bounded_and_forgets_what_it_heard_first(monkeypatch):
    monkeypatch.setattr("lltm_ray.routing.hearsay.MOST_MARKS", 3)
    hearsay = Hearsay()
    keys = [chat(f"{number} " * 50) for number in range(5)]
    for slot, key in enumerate(keys):
        marks = hash_cuts(key, b"")
        hearsay.take(
            SlotDigest(
                engine="a", server_pid=1, slot=slot, at_unix_nano=slot, tokens=90, size_bytes=len(key), marks=marks
            )
        )
    assert [bool(list(hearsay.find(key, 0))) for key in keys] == [False, False, True, True, True]
    assert len(hearsay) == 3
