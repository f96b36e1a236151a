"""Memory that was freed goes back to the system when more is held than was planned, and only then."""

import ctypes
from types import SimpleNamespace

import psutil
import pytest
import torch

from llmkit.plan import Memory
from llmkit.train.heap import Heap, held_between

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


def test_rows_of_many_lengths_leave_room_for_the_next_micro_batch():
    memory = Memory.of(weights=100, activations=60, logits=20, heap=90)
    assert held_between(SimpleNamespace(memory=memory, micro_batch_tokens=0)) == 270
    assert held_between(SimpleNamespace(memory=memory, micro_batch_tokens=512)) == 230
