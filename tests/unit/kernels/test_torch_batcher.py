"""A batch against each request alone, without a cache, token for token; needs PyTorch."""

from __future__ import annotations

import random
import threading

import pytest

from lltm_ray.errors import CacheFullError, ConfigError
from lltm_ray.kernels.batcher import Batcher
from lltm_ray.kernels.paged_cache import CacheShape, PagedCache
from lltm_ray.kernels.reference_llama import LlamaShape, ReferenceLlama
from lltm_ray.kernels.sampling import Sampling, pick

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower on several
    yield ReferenceLlama(LlamaShape())
    torch.set_num_threads(threads)


@pytest.fixture
def batcher(model):
    import torch

    def make(n_blocks=400, block_size=4, model=model, **options):
        shape = CacheShape(n_layers=2, n_kv_heads=2, head_dim=16, n_blocks=n_blocks, block_size=block_size)
        return Batcher(model, PagedCache(shape, dtype=torch.float32), **options)

    return make


@pytest.fixture(scope="module")
def alone(model):
    """The likeliest answer to a prompt, computed anew for each token and without a cache."""
    import torch

    known = {}

    def answer(prompt, n):
        if (tuple(prompt), n) not in known:
            tokens = list(prompt)
            for _ in range(n):
                tokens.append(int(model.full(torch.tensor(tokens))[-1].argmax()))
            known[tuple(prompt), n] = tokens[len(prompt) :]
        return known[tuple(prompt), n]

    return answer


def prompts(count, seed=0):
    source = random.Random(seed)
    return [[source.randrange(256) for _ in range(source.choice([1, 2, 5, 30, 90]))] for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 64, "chunk_tokens": 64},
        {"max_running": 3, "chunk_tokens": 7},
        {"n_blocks": 40, "max_running": 8, "chunk_tokens": 16},
        {"block_size": 1, "chunk_tokens": 512},
        {"block_size": 16, "max_running": 1, "chunk_tokens": 1},
    ],
)
def test_each_answer_is_that_of_the_request_alone(batcher, alone, options):
    batch, asked = batcher(**options), prompts(16)
    streams = [batch.submit(prompt, max_tokens=10) for prompt in asked]
    batch.run()
    assert [stream.tokens for stream in streams] == [alone(prompt, 10) for prompt in asked]
    assert {stream.reason for stream in streams} == {"length"}
    assert batch.cache.tables.free_blocks == batch.cache.tables.n_blocks


def test_requests_run_together_in_one_step(batcher):
    batch = batcher()
    for prompt in prompts(32):
        batch.submit(prompt[:5], max_tokens=20)
    batch.run()
    assert batch.figures.steps == 20
    assert batch.figures.generated_tokens == 32 * 20


def test_a_request_joins_while_others_are_answered(batcher, alone):
    batch, (first, second) = batcher(), prompts(2, seed=5)
    one = batch.submit(first, max_tokens=20)
    for _ in range(6):
        batch.step()
    two = batch.submit(second, max_tokens=5)
    two.read()
    assert one.reason is None
    assert 6 < len(one.tokens) < 20
    assert (one.read(), two.tokens) == (alone(first, 20), alone(second, 5))


def test_a_long_prompt_is_read_in_chunks_and_holds_nobody_up(batcher, alone):
    batch = batcher(chunk_tokens=32, max_running=8)
    running = batch.submit([1, 2, 3], max_tokens=40)
    batch.step()
    long = batch.submit(list(range(200)), max_tokens=3)
    short = batch.submit([9, 8, 7], max_tokens=3)
    steps = []
    while long.reason is None:
        before = len(running.tokens)
        batch.step()
        steps.append(len(running.tokens) - before)
    assert set(steps) == {1}
    assert len(steps) > 6
    assert batch.figures.computed_tokens <= 33 * batch.figures.steps
    assert short.tokens == alone([9, 8, 7], 3)
    assert long.tokens == alone(list(range(200)), 3)
    assert len(running.tokens) < 40


def test_without_room_the_newest_waits_and_nothing_is_lost(batcher, alone):
    batch, asked = batcher(n_blocks=12, max_running=8, chunk_tokens=8), [[n] * 6 for n in range(1, 7)]
    streams = [batch.submit(prompt, max_tokens=24) for prompt in asked]
    ended = []
    while batch.step():
        ended += [stream.number for stream in streams if stream.reason and stream.number not in ended]
    assert batch.figures.preempted > 0
    assert ended[0] == 0
    assert [stream.tokens for stream in streams] == [alone(prompt, 24) for prompt in asked]


def test_an_equal_beginning_is_computed_once(batcher, alone):
    batch, beginning = batcher(), list(range(40))
    first = batch.submit([*beginning, 1], max_tokens=4)
    first.read()
    before = batch.figures.computed_tokens
    second = batch.submit([*beginning, 2], max_tokens=4)
    assert second.read() == alone([*beginning, 2], 4)
    assert batch.figures.shared_tokens == 40
    assert batch.figures.computed_tokens - before == 1 + 3


def test_a_stop_token_ends_an_answer_and_is_not_in_it(batcher, alone):
    whole = alone([5, 6], 10)
    stop = whole[4]
    stream = batcher().submit([5, 6], max_tokens=10, stop=[stop])
    assert stream.read() == whole[: whole.index(stop)]
    assert stream.reason == "stop"


def test_sampled_answers_depend_on_their_seed_alone(batcher):
    warm = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}

    def answers(seeds, **options):
        batch = batcher(**options)
        streams = [batch.submit([3, 4, 5], max_tokens=12, sampling=Sampling(**warm, seed=seed)) for seed in seeds]
        batch.run()
        return [tuple(stream.tokens) for stream in streams]

    together = answers(range(8))
    assert len(set(together)) == 8
    assert together == [answers([seed])[0] for seed in range(8)]
    assert together == answers(range(8), n_blocks=8, max_running=4, chunk_tokens=4)


def test_sampling_follows_the_probabilities_and_the_cut_offs():
    import torch

    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = random.Random(0)

    def shares(**options):
        sampling = Sampling(temperature=1.0, **options)
        n = 4000
        picked = pick(chances.log().expand(n, 4), [sampling] * n, [draws] * n)
        return [picked.count(token) / n for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(top_p=0.1) == [1, 0, 0, 0]
    for name, value in (("temperature", -1), ("top_p", 0), ("top_k", -1), ("temperature", float("nan"))):
        with pytest.raises(ConfigError, match=name):
            Sampling(**{name: value})


def test_streams_are_read_by_many_threads_at_once(batcher, alone):
    batch, asked, found = batcher(), prompts(8, seed=2), {}

    def read(number):
        found[number] = list(batch.submit(asked[number], max_tokens=15))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(8)] == [alone(prompt, 15) for prompt in asked]


def test_a_closed_stream_gives_its_blocks_back(batcher, alone):
    batch = batcher()
    one, two = batch.submit([1, 2], max_tokens=500), batch.submit([3, 4], max_tokens=6)
    next(one)
    one.close()
    assert two.read() == alone([3, 4], 6)
    assert one.reason == "closed"
    assert len(one.tokens) < 6
    assert batch.cache.tables.free_blocks == batch.cache.tables.n_blocks


def test_a_callback_hears_each_token_and_its_mistake_ends_its_request_alone(batcher, alone):
    batch, heard = batcher(), []

    def fail(token):
        raise ZeroDivisionError(token)

    good = batch.submit([1, 2], max_tokens=5, on_token=heard.append)
    bad = batch.submit([3, 4], max_tokens=5, on_token=fail)
    batch.run()
    assert heard == good.tokens == alone([1, 2], 5)
    assert len(bad.tokens) == 1
    next(bad)
    with pytest.raises(ZeroDivisionError):
        next(bad)


def test_a_callback_may_ask_for_more_but_not_drive_the_batch(batcher, alone):
    batch, more = batcher(), []
    asking = batch.submit([1, 2], max_tokens=3, on_token=lambda _: more.append(batch.submit([3, 4], max_tokens=2)))
    driving = batch.submit([5, 6], max_tokens=3, on_token=lambda _: batch.step())
    batch.run()
    assert asking.tokens == alone([1, 2], 3)
    assert [stream.tokens for stream in more] == [alone([3, 4], 2)] * 3
    with pytest.raises(ConfigError, match="must not drive the batch"):
        driving.read()


def test_a_models_error_ends_the_requests_of_the_step_and_the_batcher_goes_on(batcher, model, alone):
    class Sometimes:
        n_vocab, broken = 256, False

        def hidden(self, *given):
            if self.broken:
                raise ArithmeticError("broken")
            return model.hidden(*given)

        logits = staticmethod(model.logits)

    failing = Sometimes()
    batch = batcher(model=failing)
    one = batch.submit([1, 2], max_tokens=9)
    batch.step()
    failing.broken = True
    with pytest.raises(ArithmeticError):
        batch.step()
    assert one.reason == "error"
    assert next(one) == alone([1, 2], 1)[0]
    with pytest.raises(ArithmeticError):
        next(one)
    failing.broken = False
    assert batch.submit([1, 2], max_tokens=3).read() == alone([1, 2], 3)
    assert batch.cache.tables.free_blocks == batch.cache.tables.n_blocks


def test_what_can_never_be_answered_is_refused(batcher):
    batch = batcher(n_blocks=4)
    with pytest.raises(CacheFullError, match="never fit a cache of 16"):
        batch.submit([1] * 10, max_tokens=8)
    assert len(batch.submit([1] * 10, max_tokens=7).read()) == 7
    for prompt in ([], [256], [1, -1]):
        with pytest.raises(ConfigError, match="prompt"):
            batch.submit(prompt, max_tokens=1)
    with pytest.raises(ConfigError, match="max_tokens"):
        batch.submit([1], max_tokens=0)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        batcher(max_running=8, chunk_tokens=4)
