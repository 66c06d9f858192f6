"""Several quantizations as Ray tasks."""

from threading import Event

import pytest
import ray

from lltm_ray.actors import quantize
from lltm_ray.actors.quantize import quantize_many
from lltm_ray.actors.quantize_job import QuantizeJob
from lltm_ray.errors import CancelledError, ConfigError, DiskFullError
from lltm_ray.models.quantize.plan import Options
from lltm_ray.models.random_weights import RandomShape, write_random
from tests.quantized import SMALL, digest, make, write_source
from tests.ray.conftest import until


def job(source, out, kind, threads=1):
    return QuantizeJob(source=str(source), out=str(out), options=Options(kind=kind, threads=threads), tool="embedded")


def test_a_job_that_fails_does_not_lose_the_others(ray_cluster, tmp_path):
    source = write_source(tmp_path / "source.gguf", SMALL["llama"])
    kinds = ("Q4_K_M", "IQ1_S", "Q8_0")
    one, two, three = quantize_many([job(source, tmp_path / f"{kind}.gguf", kind, threads=0) for kind in kinds])
    for outcome, kind in ((one, "Q4_K_M"), (three, "Q8_0")):
        make(source, tmp_path / "same.gguf", kind)
        assert digest(tmp_path / f"{kind}.gguf") == digest(tmp_path / "same.gguf")
        assert (outcome.done.kind, outcome.error, outcome.node) == (kind, None, ray.util.get_node_ip_address())
        assert outcome.job.options.threads == 1  # 4 CPUs for 3 jobs
    assert isinstance(two.error, ConfigError)
    assert two.done is None
    assert "importance matrix" in str(two.error)


def test_cancelling_cancels_all_and_leaves_nothing(ray_cluster, tmp_path):
    source, out, cancel, heard = tmp_path / "source.gguf", tmp_path / "out", Event(), []
    write_random(source, RandomShape(n_embd=1024, n_head=8, n_ff=4096, n_layer=8))  # seconds: word must get there
    out.mkdir()
    jobs = [job(source, out / f"{number}.gguf", "Q3_K_L", threads=3) for number in range(3)]  # one after the other

    def moved(which, name, done, total):
        heard.append((which.out, name, done, total))
        cancel.set()

    outcomes = quantize_many(jobs, progress=moved, cancel=cancel)
    assert [type(each.error) for each in outcomes] == [CancelledError] * 3
    assert 0 < heard[0][2] < heard[0][3]
    assert list(out.iterdir()) == []
    until(lambda: ray.available_resources().get("CPU") == 4)


def test_an_interrupt_is_no_other_error_even_if_the_board_has_died(ray_cluster, tmp_path, monkeypatch):
    source, out = tmp_path / "source.gguf", tmp_path / "out"
    write_random(source, RandomShape(n_embd=1024, n_head=8, n_ff=4096, n_layer=2))
    out.mkdir()

    def interrupt(jobs, refs, outcomes, board, **_):
        until(lambda: ray.get(board.read.remote()))
        ray.kill(board)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_many([job(source, out / "0.gguf", "Q3_K_L")])
    until(lambda: ray.available_resources().get("CPU") == 4)
    until(lambda: list(out.iterdir()) == [])


def test_jobs_that_could_never_be_done_are_refused_at_once(ray_cluster, tmp_path, monkeypatch):
    source = write_source(tmp_path / "source.gguf", SMALL["llama"])
    with pytest.raises(ConfigError, match="threads=64: no node of the cluster has so many CPUs; the largest has 4"):
        quantize_many([job(source, tmp_path / "out.gguf", "Q8_0", threads=64)])
    with pytest.raises(ConfigError, match="is given to two jobs"):
        quantize_many([job(source, tmp_path / "out.gguf", kind) for kind in ("Q8_0", "Q4_0")])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 60_000}))
    with pytest.raises(DiskFullError, match="are needed"):  # each of them alone would fit
        quantize_many([job(source, tmp_path / f"{kind}.gguf", kind) for kind in ("Q8_0", "Q6_K")])
