"""Tokens per second and MFU against counts made by hand."""

from types import SimpleNamespace

import pytest
import torch

from llmkit.models import peak
from llmkit.train import loop, watching


def test_speed_counts_steps_and_leaves_out_what_lies_between(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    clock = loop.Clock()
    for seconds in (2.0, 3.0):
        now[0] += seconds
        assert clock.lap(500) == seconds
        now[0] += 60.0  # an evaluation and a save
        clock.restart()
    assert clock.tokens_per_s() == 1000 / 5.0
    now[0] += 4.0
    clock.lap(1000)
    assert clock.tokens_per_s() == 250.0, "since the last question"


def test_mfu_is_flops_done_over_flops_possible(monkeypatch):
    monkeypatch.setattr(watching, "measure_peak_flops", lambda device, dtype: 2e12)
    plan = SimpleNamespace(precision="fp32", flops_per_token=6_000_000, world_size=2)
    figures = watching.speed_watcher(plan, torch.device("cpu"))(100_000.0)
    assert figures["mfu"] == pytest.approx(100_000 * 6e6 / (2 * 2e12))  # 0.15
    assert figures["memory_bytes"] > 50e6


def test_the_peak_is_the_fastest_product_in_flops(monkeypatch):
    times = iter([9.0, 0.5, 0.25, 0.5])
    ticks = iter([0.0, 0.0, 0.1, 0.2, 9.0])
    monkeypatch.setattr(peak, "_timed_product", lambda a, b: next(times))
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks))
    assert peak.measure_peak_flops(torch.device("cpu"), torch.float32, size=10) == 2 * 10**3 / 0.25
