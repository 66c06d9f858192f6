"""Rows with ordinary values, for tests to change."""

from typing import Any

from lltm_ray.telemetry.rows import AttemptRow, GpuRow, NodeRow, QueueRow, RequestRow, ServerRow, SlotRow

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def request_row(**changes: Any) -> RequestRow:
    row = RequestRow(
        trace_id=TRACE_ID,
        span_id=SPAN_ID,
        parent_span_id="",
        flags=1,
        state="",
        request_id="r-1",
        route="/v1/chat/completions",
        model_asked="tiny",
        model="tiny",
        tenant="",
        conversation="",
        status=200,
        error_type="",
        error="",
        arrived_unix_nano=1_700_000_000_000_000_000,
        ttft_s=0.05,
        total_s=0.25,
        delivered_tokens=10,
        bytes_sent=900,
        is_stream=True,
        parameters='{"stream":true,"max_tokens":10,"temperature":0.5}',
        response_id="chatcmpl-1",
        response_model="tiny",
        finish_reasons="length",
        policy="residency",
        why="most is cached here",
        content="",
    )
    return row._replace(**changes)


def attempt_row(**changes: Any) -> AttemptRow:
    row = AttemptRow(
        trace_id=TRACE_ID,
        request_span_id=SPAN_ID,
        span_id="00f067aa0ba902b7",
        number=1,
        engine="engine-0",
        server_pid=41,
        slot=2,
        asked_s=0.001,
        sent_s=0.011,
        headers_s=0.021,
        first_s=0.05,
        ended_s=0.249,
        predicted_cached_tokens=30,
        cached_tokens=32,
        computed_tokens=8,
        generated_tokens=10,
        delivered_tokens=10,
        prompt_ms=25.0,
        predicted_ms=190.0,
        draft_tokens=0,
        accepted_tokens=0,
        outcome="ok",
        is_estimate=False,
        is_continued=False,
    )
    return row._replace(**changes)


def gpu_row(**changes: Any) -> GpuRow:
    row = GpuRow(
        at_unix_nano=1_700_000_000_000_000_000,
        node="n1",
        gpu=0,
        uuid="GPU-1",
        name="NVIDIA Test",
        driver="1",
        utilization_ratio=0.5,
        encoder_ratio=None,
        decoder_ratio=None,
        memory_total_bytes=16 * 2**30,
        memory_used_bytes=4 * 2**30,
        power_w=70.0,
        power_limit_w=100.0,
        energy_j=1000.0,
        temperature_c=55.0,
        throttle=0,
        pcie_sent_bytes=None,
        pcie_received_bytes=None,
        ecc_corrected=None,
        ecc_uncorrected=None,
    )
    return row._replace(**changes)


def server_row(**changes: Any) -> ServerRow:
    row = ServerRow(
        at_unix_nano=1_700_000_000_000_000_000,
        node="n1",
        engine="engine-0",
        model="tiny",
        server_pid=41,
        gpu_uuids="",
        share=0.0,
        gpu_memory_bytes=None,
        gpu_memory_share_bytes=None,
        prompt_tokens=100.0,
        prompt_tokens_cached=50.0,
        prompt_seconds=1.0,
        predicted_tokens=200.0,
        predicted_seconds=2.0,
        decodes=150.0,
        draft_tokens=None,
        draft_accepted=None,
        busy_slots_per_decode=1.5,
        processing=1.0,
        deferred=0.0,
        slots_total=4,
        slots_busy=1,
        context_tokens=4096,
        context_used_tokens=512,
        cpu_s=3.0,
        memory_bytes=10**8,
        virtual_bytes=10**9,
        threads=4,
        open_files=30,
        restarts=0,
    )
    return row._replace(**changes)


def slot_row(**changes: Any) -> SlotRow:
    row = SlotRow(
        at_unix_nano=1_700_000_000_000_000_000,
        engine="engine-0",
        slot=2,
        is_processing=True,
        task=7,
        prompt_tokens=40,
        decoded_tokens=3,
        n_ctx=1024,
    )
    return row._replace(**changes)


def queue_row(**changes: Any) -> QueueRow:
    row = QueueRow(1_700_000_000_000_000_000, "gateway-0", "tiny", 3, 4, 1, 0.5)
    return row._replace(**changes)


def node_row(**changes: Any) -> NodeRow:
    row = NodeRow(1_700_000_000_000_000_000, "n1", "127.0.0.1", 2, 0.5, 2**34, 2**33, 1.5, "no NVIDIA driver is here")
    return row._replace(**changes)
