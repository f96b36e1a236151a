"""Memory that was freed goes back to the system when more is held than was planned, and only then."""

import ctypes

import psutil
import pytest
import torch

from llmkit.train.heap import Heap

MB = 2**20
pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not GNU's"
)


def resident():
    return psutil.Process().memory_info().rss


@pytest.fixture
def holes():
    """64 kB tensors, every tenth in use: what is free between them is not given back by itself."""
    every = [torch.zeros(16 * 1024) for _ in range(4000)]
    kept = every[::10]
    del every
    yield kept
    kept.clear()


def test_what_is_free_is_given_back_above_the_plan(holes):
    before = resident()
    Heap(before + 100 * MB).tidy()
    assert resident() > before - 20 * MB
    Heap(before - 10 * MB).tidy()
    assert resident() < before - 150 * MB
    assert all(not tensor.any() for tensor in holes)


def test_where_all_is_in_use_nothing_is_tried_again_soon(monkeypatch):
    heap, calls = Heap(1), []
    monkeypatch.setattr(heap, "_trim", calls.append)
    for _ in range(3):
        heap.tidy()
    assert calls == [0]
    more = torch.ones(int(0.5 * resident() / 4))
    heap.tidy()
    assert calls == [0, 0]
    assert more[0] == 1
