"""Token streams in memory, and what loader workers do in tests: without torch, for other processes import it."""

import os
import signal
import time

import numpy as np

from llmkit.data.loader import MicroBatches
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.errors import DataError


class Memory:
    """A token stream in memory; documents end with 0."""

    def __init__(self, tokens, name="memory"):
        self.tokens = np.asarray(tokens, dtype=np.uint16)
        self.name = name
        self.num_tokens = len(self.tokens)
        self.starts = np.array([i for i in range(len(tokens)) if i == 0 or self.tokens[i - 1] == 0])

    def read(self, start, stop):
        assert 0 <= start < stop <= self.num_tokens
        return self.tokens[start:stop]

    def document_starts(self, start, stop):
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def stream_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return Memory(np.concatenate([[*generator.integers(1, 900, size=n), 0] for n in lengths]))


def batches(seed=9, world_size=1, rank=0, **options):
    """Eight micro-batches of two rows a step, from two weighted sources."""
    rows = Rows([stream_of([30] * 20), stream_of([11] * 30, seed=1)], stride=7)
    return MicroBatches(
        rows,
        RowOrder(rows.sizes, [1, 2], seed),
        rows_per_step=16,
        micro_batch_size=2,
        world_size=world_size,
        rank=rank,
        **options,
    )


def masked(row):
    """An encoding with chance in it, as a masking objective has it."""
    hidden = np.random.default_rng(int(row["seed"])).random(len(row["ids"])) < 0.3
    return {"input_ids": np.where(hidden, -1, row["ids"]), "seed": row["seed"]}


def doubled(step):
    return 2 * step


def who(step):
    """Which process this is, and the signals that do not reach it."""
    return os.getpid(), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def refusing_seven(step):
    if step == 7:
        raise DataError("books.txt:3: not text", hint="mend it")
    return step


def bug(step):
    return {}["no such key"]


def endless(step_or_row):
    time.sleep(3600)


def large(step):
    """More than a pipe holds."""
    return np.full(4_000_000, step)
