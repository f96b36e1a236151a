"""What a teacher costs at every step, and what one that was asked once does (`distil.cache`): CPU seconds and bytes.

    python -m benchmarks.teacher [--rounds 7] [--top-k 32] [--json] [--smoke]

A student of 2 layers learns from a teacher of 12 (SmolLM2-135M's widths for the teacher, a third of them for the
student), both with random weights: times do not depend on what weights say. A step is forward, backward and the reading
of what is kept; in each round all three ways take the same rows in turn, and ratios are taken within a round.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.pretrain import spread
from llmkit.data.loader import MicroBatches
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.taught import TaughtBatches, TaughtStore
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import LossModule, Objective
from llmkit.objectives.clm import CausalLM
from llmkit.objectives.distil import Distilled
from llmkit.objectives.taught import Taught
from llmkit.recipe.objectives import Cache, Distil
from llmkit.report.console import make_reporter
from llmkit.train.teaching import Asking, teach

WIDTHS = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 12}
NARROW = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3, "num_hidden_layers": 2}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


class Numbers:
    """A stream of random ids."""

    name = "numbers"

    def __init__(self, size: int, entries: int) -> None:
        self.ids = np.random.default_rng(1).integers(0, entries, size)
        self.num_tokens = size

    def read(self, start: int, stop: int) -> Any:
        return self.ids[start:stop]

    def document_starts(self, start: int, stop: int) -> Any:
        return np.zeros(0, np.int64)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Time per step with a teacher, with what it said, and without."
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), 2 if given.smoke else given.rounds, given.top_k, small=given.smoke)
    for name, value in figures.items():
        print(json.dumps({name: value}) if given.json else f"{name:24} {value}")
    return 0


def measure(folder: Path, rounds: int, top_k: int, *, small: bool) -> dict[str, Any]:
    """CPU seconds of a step in each way, ratios within rounds, bytes on disk."""
    entries, context, rows = (500, 32, 2) if small else (8192, 256, 8)
    teacher = _model(TINY if small else WIDTHS, entries, context).requires_grad_(False).eval()
    student = _model(TINY if small else NARROW, entries, context)
    settings = Distil(teacher="t")
    kept = Distil(teacher="t", cache=Cache(top_k=top_k))
    ways: Mapping[str, Objective] = {
        "alone": CausalLM(),
        "asked": Distilled(CausalLM(), teacher, settings, "causal"),
        "kept": Taught(CausalLM(), kept, top_k=top_k, outputs=entries),
    }
    num_rows = rows * (rounds + 1)
    data = Rows([Numbers(num_rows * context + 1, entries)], context)
    plain = MicroBatches(
        data,
        RowOrder(data.sizes, None, 1),
        rows_per_step=rows,
        micro_batch_size=rows,
        encode=CausalLM().encode,
    )
    store = TaughtStore(folder / "kept", "row", num_rows, (1 << 16) // context, top_k, entries)
    taught = ways["kept"]
    assert isinstance(taught, Taught)
    asking = Asking(store, taught, plain, bf16=False, stop=lambda: 0)
    started = time.process_time()
    teach(asking, lambda: teacher, Accelerator(cpu=True), make_reporter(quiet=True), num_bytes=1)
    asked_s = time.process_time() - started
    sources = {"alone": plain, "asked": plain, "kept": TaughtBatches(plain, store)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, objective in ways.items():
            module = LossModule(student, objective, bf16=False).train()
            started = time.process_time()
            ((_, examples),) = sources[name].of_step(number)
            module(objective.collate(examples)).total.backward()
            seconds[name].append(time.process_time() - started)
            student.zero_grad()
    steps = {name: values[1:] for name, values in seconds.items()}
    size = sum(path.stat().st_size for path in store.folder.rglob("*.npy"))
    return {
        "seconds a step": {name: round(float(np.median(values)), 3) for name, values in steps.items()},
        "kept / asked": spread([a / b for a, b in zip(steps["kept"], steps["asked"], strict=True)]),
        "kept / alone": spread([a / b for a, b in zip(steps["kept"], steps["alone"], strict=True)]),
        "asking once, a step's rows": round(asked_s / (rounds + 1), 3),
        "bytes a token": round(size / (num_rows * context), 1),
    }


def _model(fields: Mapping[str, int], entries: int, context: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **fields, vocab_size=entries, max_position_embeddings=context)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    choose_heads(model, "causal")
    return model


if __name__ == "__main__":
    raise SystemExit(main())
