"""The plan fits by construction, more memory never gives less, and the file it becomes is one that `up` reads."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray._roofline import SAMPLE_S
from lltm_ray.config import EngineConfig, FleetConfig
from lltm_ray.errors import ConfigError, ModelDoesNotFitError
from lltm_ray.llamacpp.tuning.file import to_toml
from lltm_ray.llamacpp.tuning.plan import MIB, WORKLOADS, Candidate, Facts, Workload, plan, usual
from lltm_ray.llamacpp.tuning.speed import expected_gain, expected_tokens_per_s

GIB = 2**30
KV_TOKEN_BYTES = 2**17


def memory(engine: EngineConfig, gpus: int) -> int:
    """A model of 4 GiB and 32 layers, as simple as it can be."""
    part = {"f16": 1.0, "q8_0": 34 / 64}[engine.cache_type_k]
    n_ctx = engine.n_ctx or 512 * engine.n_parallel
    return int(4 * GIB + n_ctx * KV_TOKEN_BYTES * part + max(1, gpus) * engine.n_ubatch * 2**18)


def facts(**changes) -> Facts:
    base = Facts(
        model="m",
        model_bytes=4 * GIB,
        n_params=2**31,
        n_layer=32,
        n_ctx_train=32_768,
        n_vocab=128_000,
        kv_token_bytes=KV_TOKEN_BYTES,
        memory=memory,
        budget_bytes=140 * GIB,
        host_bytes=128 * GIB,
        cores=16,
        gpus=1.0,
        can_quantize_cache=True,
    )
    return replace(base, **changes)


def slots(candidate: Candidate) -> int:
    return candidate.engines * candidate.engine.n_parallel


workloads = st.sampled_from(sorted(WORKLOADS)).map(WORKLOADS.__getitem__)
machines = st.builds(
    facts,
    budget_bytes=st.integers(5 * GIB, 200 * GIB),
    host_bytes=st.integers(GIB, 512 * GIB),
    cores=st.integers(1, 256),
    gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 8.0]),
    n_ctx_train=st.sampled_from([512, 1024, 8192, 131_072]),
    can_quantize_cache=st.booleans(),
    model_draft=st.sampled_from([None, "draft"]),
    draft_bytes=st.just(GIB),
)


@settings(max_examples=60, deadline=None)
@given(workloads, machines)
def test_every_candidate_is_valid_says_why_and_fits_its_share(workload, machine):
    try:
        found = plan(workload, machine)
    except ModelDoesNotFitError:
        assert machine.budget_bytes * min(1.0, machine.gpus or 1.0) < 100 * GIB
        return
    assert [each.name for each in found[:2]] == ["default", "guess"]
    assert len({each.name for each in found}) == len(found) <= 10
    for each in found[1:]:
        engine = each.engine
        assert each.fits(machine), each.name
        assert set(each.reasons) == {*each.changes, "engines"}
        assert all(reason and reason.isprintable() for reason in each.reasons.values())
        assert engine.n_ubatch <= engine.n_batch
        assert (engine.n_ctx or 0) // engine.n_parallel >= workload.fitted(machine.n_ctx_train).longest_tokens
        assert each.engines * each.gpu_share <= machine.gpus + 1e-9
        assert (each.gpu_share == 0) == (machine.gpus == 0)
        assert FleetConfig(engines=each.engines, gpu_share=each.gpu_share, engine=engine)


@settings(max_examples=60, deadline=None)
@given(workloads, machines, st.integers(0, 100 * GIB))
def test_more_memory_never_gives_fewer_slots_or_a_coarser_cache(workload, machine, more):
    try:
        guess = plan(workload, machine)[1]
    except ModelDoesNotFitError:
        return
    richer = plan(workload, replace(machine, budget_bytes=machine.budget_bytes + more))[1]
    assert slots(richer) >= slots(guess)
    if slots(richer) == slots(guess) and guess.engine.cache_type_k == "f16":
        assert richer.engine.cache_type_k == "f16"


def test_what_cannot_fit_is_refused_with_both_numbers():
    with pytest.raises(ModelDoesNotFitError, match=r"lltm-ray up") as caught:
        plan(WORKLOADS["chat"], facts(budget_bytes=GIB))
    assert caught.value.http_status == 507


def test_the_layers_count_not_only_the_file():
    """Two models of one size: the one whose cache takes four times as much gets fewer slots on the same GPU."""
    heavy = lambda engine, gpus: memory(engine, gpus) + 3 * (engine.n_ctx or 0) * KV_TOKEN_BYTES  # noqa: E731
    light, dear = (
        plan(WORKLOADS["batch"], facts(budget_bytes=12 * GIB, memory=each, can_quantize_cache=False))[1]
        for each in (memory, heavy)
    )
    assert slots(dear) < slots(light)


def test_a_large_gpu_gets_several_engines_and_a_cpu_divides_its_cores():
    batch = plan(WORKLOADS["batch"], facts())[1]
    assert (batch.engines, batch.gpu_share, batch.engine.n_parallel) == (4, 0.25, 16)
    assert "one CPU thread" in batch.reasons["engines"]
    host = plan(WORKLOADS["batch"], facts(gpus=0.0, cores=16))[1]
    assert (host.engines, host.gpu_share, host.engine.n_threads) == (2, 0.0, 8)


def test_the_cache_is_quantized_only_where_f16_costs_slots():
    roomy, tight = (plan(WORKLOADS["batch"], facts(budget_bytes=room * GIB))[1] for room in (140, 8.5))
    assert (roomy.engine.cache_type_k, roomy.engine.flash_attn) == ("f16", "auto")
    assert (tight.engine.cache_type_k, tight.engine.cache_type_v, tight.engine.flash_attn) == ("q8_0", "q8_0", "on")
    assert slots(tight) == slots(roomy)


def test_each_workload_gets_what_it_is_for():
    chosen = {name: plan(workload, facts())[1].engine for name, workload in WORKLOADS.items()}
    assert chosen["batch"].cache_ram_mib == chosen["embed"].cache_ram_mib == 0
    assert (chosen["chat"].cache_ram_mib or 0) * MIB >= 32 * WORKLOADS["chat"].longest_tokens * KV_TOKEN_BYTES / 4
    assert chosen["chat"].slot_prompt_similarity == 0.9
    assert chosen["rag"].cache_reuse
    assert chosen["chat"].cache_reuse is None
    assert chosen["embed"].embeddings
    assert chosen["embed"].n_ubatch == chosen["embed"].n_batch
    assert chosen["chat"].n_batch < chosen["batch"].n_batch


def test_drafts_are_tried_where_one_is_known_or_the_answer_quotes_the_prompt():
    def drafts(name, **changes):
        found = plan(WORKLOADS[name], facts(**changes))
        return {(each.engine.model_draft, each.engine.spec_type) for each in found} - {(None, None)}

    assert drafts("chat") == set()
    assert drafts("chat", model_draft="d") == {("d", None)}
    assert drafts("agent") == {(None, "ngram-simple")}
    assert drafts("embed", model_draft="d") == set()


def test_a_workload_too_long_for_the_model_keeps_its_shape():
    short = WORKLOADS["agent"].fitted(1024)
    assert short.longest_tokens <= 0.9 * 1024
    assert short.shared_tokens / short.question_tokens == pytest.approx(4, rel=0.1)
    assert WORKLOADS["chat"].fitted(32_768) is WORKLOADS["chat"]
    assert usual(WORKLOADS["batch"], facts(gpus=0.0, cores=2)).concurrency == 8
    with pytest.raises(ConfigError, match="goal"):
        Workload(name="w", goal="fast", question_tokens=1, answer_tokens=1, concurrency=1)


def test_expected_gains_are_those_of_the_measured_table():
    """The README's figures on an H200: 64 streams of 128 + 128 tokens, 1.3 B parameters in F16, vocabulary 152 k."""
    asked = Workload(name="table", goal="throughput", question_tokens=128, answer_tokens=128, concurrency=64)
    machine = facts(model_bytes=int(2.6e9), n_params=int(1.28e9), n_layer=16, n_vocab=152_000, kv_token_bytes=2**16)
    one, two, four = (
        Candidate(name=str(n), engines=n, gpu_share=1 / n, changes={"n_parallel": 64 // n}) for n in (1, 2, 4)
    )
    assert expected_gain(two, one, asked, machine) == pytest.approx(2978 / 1457, rel=0.25)
    assert expected_gain(four, one, asked, machine) == pytest.approx(4663 / 1457, rel=0.25)
    packed = replace(machine, model_bytes=int(0.8e9), cores=2, gpus=0.0)
    here = Candidate(name="here", changes={"n_parallel": 64})
    plain, small = (expected_tokens_per_s(here, asked, each) for each in (replace(packed, n_vocab=1), packed))
    assert 1 / small - 1 / plain == pytest.approx(152_000 * SAMPLE_S, rel=0.01)
    f16 = replace(packed, model_bytes=int(2.6e9), n_vocab=1)
    assert expected_tokens_per_s(here, asked, f16) == plain, "where computing is the limit, bytes do not count"
    drafting = replace(one, changes={"n_parallel": 64, "model_draft": "d"})
    assert expected_gain(drafting, one, asked, machine) is None
    assert expected_gain(two, one, WORKLOADS["chat"], machine) is None


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_file_reads_back_as_the_candidate_it_was_written_from(name, tmp_path):
    for at, each in enumerate(plan(WORKLOADS[name], facts(model_draft="tiny-draft", draft_bytes=GIB))):
        path = tmp_path / f"{at}.toml"
        path.write_text(to_toml(each, fleet=FleetConfig(), notes=["a note"]), encoding="utf-8")
        read = FleetConfig.from_toml(path)
        assert (read.model, read.engines, read.gpu_share, read.engine) == (
            "tiny", each.engines, each.gpu_share, each.engine,
        )  # fmt: skip
        assert all(f"# {reason}\n" in path.read_text(encoding="utf-8") for reason in each.reasons.values())


@given(st.text(min_size=1))
def test_no_model_name_or_note_breaks_the_file(text):
    written = to_toml(Candidate(name="c"), fleet=FleetConfig(model=text), notes=[text])
    assert tomllib.loads(written) == {"model": text, "engines": 1, "gpu_share": 0.0}
