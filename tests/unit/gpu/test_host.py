"""Cores and memory, as a container allows them."""

import os

from lltm_ray.gpu.host import available_ram_bytes, usable_cores


def test_a_machine_without_control_groups_gives_what_it_has(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert 0 < available_ram_bytes(tmp_path) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_container_gives_its_quota(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert usable_cores(tmp_path) == 1
    assert available_ram_bytes(tmp_path) == 600_000


def test_a_container_without_limits_gives_what_the_machine_has(tmp_path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400000\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert available_ram_bytes(tmp_path, meminfo) == 1_024_000
