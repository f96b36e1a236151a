"""A process that holds one model and times it when it is asked: `python -m llmkit.evaluate.speed_worker`.

Requests come as lines of JSON on stdin, each gets a line on stdout; the end of stdin is the end. The model is alone in
its process, so what the process takes of memory is the model's.

Shape suffixes: B rows, T positions.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from llmkit.errors import LlmkitError, UsageError
from llmkit.evaluate.model import load_model
from llmkit.models.build import kind_of, max_length
from llmkit.models.runtime_model import RuntimeModel
from llmkit.models.runtimes import load_runtime, runtime_of
from llmkit.registry import ModelKind

WRITES: tuple[ModelKind, ...] = ("causal", "seq2seq")
"""The kinds of models that write text."""

Clock = Callable[[], float]

_WEIGHTS = ("safetensors", "gguf", "onnx*", "pt2", "pte", "bin", "pt")
_FIRST_ID = 3
"""Ids below are special ones in most vocabularies."""
_STEP_ID = 7919
"""A prime, so that ids go through the whole vocabulary before they come again."""


@dataclass(frozen=True)
class Times:
    """How long a batch took.

    Attributes:
        seconds: From the first to the last of the work.
        first_s: Until the first new token of each row was there; None for a model that does not write.
    """

    seconds: float
    first_s: float | None = None


class TimedModel:
    """A model that is given batches and says how long each took.

    Args:
        model: The network, on its device, in evaluation mode.
        kind: What it does: models that write are timed while they write.
        bf16: Matrix products in bfloat16.
        clock: Seconds; by default the monotonic ones.
    """

    def __init__(
        self,
        model: PreTrainedModel | RuntimeModel,
        kind: ModelKind,
        *,
        bf16: bool = False,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._model = model
        self._writes = kind in WRITES
        self._bf16 = bf16
        self._clock = clock
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = 0  # heads for whole texts look where the padding begins
        start = getattr(model.config, "decoder_start_token_id", None)
        # No end of text: each row gets as many new tokens as were asked for.
        model.generation_config = GenerationConfig(
            pad_token_id=0, eos_token_id=None, decoder_start_token_id=start, use_cache=True, do_sample=False
        )

    @torch.inference_mode()
    def time(self, batch: int, length: int, new_tokens: int) -> Times:
        """Time one batch.

        Args:
            batch: Rows.
            length: Tokens of each.
            new_tokens: Tokens that a model which writes adds to each.
        """
        device = self._model.device
        ids_BT = batch_ids(batch, length, self._vocab_size(), self._taken()).to(device)
        if self._model.config.is_encoder_decoder and not self._writes:
            ids_BT[:, -1] = self._model.config.eos_token_id  # BART's heads read there what a text is like
        words: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        seen: list[float] = []
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            start = self._now()
            if self._writes:
                watch = StoppingCriteriaList([_Watch(lambda: seen.append(self._now()))])
                self._model.generate(**words, max_new_tokens=new_tokens, stopping_criteria=watch)
            else:
                self._model(**words)
            end = self._now()
        return Times(end - start, seen[0] - start if seen else None)

    def _now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return self._clock()

    def _vocab_size(self) -> int:
        embeddings = self._model.get_input_embeddings()
        return int(self._model.config.vocab_size if embeddings is None else embeddings.weight.shape[0])

    def _taken(self) -> frozenset[int]:
        """Ids with a meaning of their own: heads look for the padding, or for the end of text."""
        config = self._model.config
        names = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
        found = (getattr(config, name, None) for name in names)
        return frozenset(number for number in found if isinstance(number, int))


class _Watch(StoppingCriteria):
    """Stops nothing; told of the first new token."""

    def __init__(self, told: Callable[[], None]) -> None:
        self._told: Callable[[], None] | None = told

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self._told is not None:
            self._told()
            self._told = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def batch_ids(batch: int, length: int, vocab_size: int, taken: frozenset[int] = frozenset()) -> torch.Tensor:
    """Token ids [B, T], the same each time, from all over the vocabulary.

    Args:
        batch: B.
        length: T.
        vocab_size: Ids are below this.
        taken: Ids that do not come up.
    """
    first = min(_FIRST_ID, vocab_size - 1)
    usable = [number for number in range(first, vocab_size) if number not in taken] or [first]
    places_BT = (torch.arange(batch * length) * _STEP_ID + 1) % len(usable)
    return torch.tensor(usable)[places_BT].view(batch, length)


def facts_of(folder: Path, model: PreTrainedModel | RuntimeModel, kind: ModelKind) -> dict[str, Any]:
    """What a model is without being timed.

    Returns:
        `kind`; `writes`; `longest`, the tokens that it reads at most, or None; `num_parameters`; `file_bytes`, the size
        of its weights on disk.
    """
    foreign = isinstance(model, RuntimeModel)
    return {
        "kind": kind,
        "writes": kind in WRITES,
        "longest": max_length(model.config),
        "num_parameters": model.num_parameters() if foreign else sum(p.numel() for p in model.parameters()),
        "file_bytes": weight_bytes(folder),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights on disk; of several formats that are there the first that llmkit would read counts."""
    for suffix in _WEIGHTS:
        sizes = [path.stat().st_size for path in folder.glob(f"*.{suffix}")]
        if sizes:
            return sum(sizes)
    return 0


def high_water_bytes() -> int:
    """The most memory that this process ever had, in bytes.

    Not `getrusage` on Linux: there a process begins with its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Server:
    """Answers requests about one model: `load` first, then `time` as often as is asked, and `memory`."""

    def __init__(self) -> None:
        self._timed: TimedModel | None = None
        self._device = "cpu"
        self._before = 0
        self._peak = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request gets.

        Args:
            request: `do`, and what belongs to it.
        """
        if request["do"] == "load":
            return self._load(request)
        if request["do"] == "memory":
            return {"memory_bytes": self._peak}
        assert self._timed is not None
        times = self._timed.time(request["batch"], request["length"], request["new_tokens"])
        self._peak = self._memory()
        return {"seconds": times.seconds, "first_s": times.first_s}

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folder, self._device = Path(request["folder"]), str(request["device"])
        self._before = psutil.Process().memory_info().rss
        model = self._loaded(folder, request)
        kind = request.get("kind") or kind_of(str(folder))
        facts = facts_of(folder, model, kind)
        model.to(torch.device(self._device)).eval()
        self._peak = self._memory()
        self._timed = TimedModel(model, kind, bf16=request["bf16"])
        return facts

    def _loaded(self, folder: Path, request: Mapping[str, Any]) -> PreTrainedModel | RuntimeModel:
        """The model; one of another runtime is run by that."""
        if runtime_of(folder) is None:
            model = load_model(folder, trusted=request["trusted"], kind=request.get("kind"))
            return model.to(torch.bfloat16) if request.get("half") else model
        if self._device != "cpu":
            raise UsageError(f"{folder}: an exported model is timed on CPU", hint="--device cpu")
        return load_runtime(folder)

    def _memory(self) -> int:
        """The most that there was; the kernel's own mark may fall by some pages."""
        if self._device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated())
        return max(self._peak, high_water_bytes() - self._before)


def serve(requests: TextIO, answers: TextIO, server: Server) -> None:
    """Answer each line until there are no more; what a person can act on is an answer, too."""
    for line in requests:
        try:
            found = server.answer(json.loads(line))
        except LlmkitError as error:
            words = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
            found = {"error": words}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def main() -> None:
    """Serve the process that started this one; what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        logging.set_verbosity_error()
        serve(sys.stdin, answers, Server())


if __name__ == "__main__":
    main()
