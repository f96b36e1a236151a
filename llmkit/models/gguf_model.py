"""Causal models that llama.cpp runs, through its own functions.

Shape suffixes: B rows, T positions, V vocabulary.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from llmkit.errors import MissingError, RunError, UsageError
from llmkit.models.runtime_model import RuntimeModel, check_taken


def need_llama_cpp() -> Any:
    """The library llama.cpp, as llama-cpp-python brings it.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingError(
            f"running a GGUF file needs llama-cpp-python ({error})",
            hint='pip install "llmkit[llamacpp]" (it is compiled, which takes minutes)',
        ) from error
    return llama_cpp


class GgufModel(RuntimeModel):
    """A causal model that llama.cpp runs.

    Raises:
        MissingError: llama-cpp-python is not installed.
        RunError: llama.cpp does not take the file.
    """

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__(file, config)
        self._cpp = need_llama_cpp()
        _be_quiet(self._cpp)
        asked = self._cpp.llama_model_default_params()
        asked.n_gpu_layers = 0
        self._model = self._cpp.llama_model_load_from_file(str(file).encode(), asked)
        if not self._model:
            raise RunError(f"{file}: llama.cpp does not take this file")
        self._words = self._cpp.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._cpp.llama_vocab_n_tokens(self._words))
        self._context: Any = None
        self._room = (0, 0)
        self._read: list[list[int]] = []

    def close(self) -> None:
        """Give its memory back."""
        if self._context:
            self._cpp.llama_free(self._context)
            self._context = None
        if self._model:
            self._cpp.llama_model_free(self._model)
            self._model = None

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # When Python ends, what llama.cpp is called by may be gone, and all memory goes anyway.
        if getattr(self, "_model", None) and not ending():
            self.close()

    def num_parameters(self) -> int:
        """Those of the file."""
        return int(self._cpp.llama_model_n_params(self._model))

    def tokenize(self, text: str) -> list[int]:
        """The ids that llama.cpp gives a text, with what it puts around it."""
        raw = text.encode()
        room = len(raw) + 8
        found = (self._cpp.llama_token * room)()
        count = self._cpp.llama_tokenize(self._words, raw, len(raw), found, room, True, True)
        return [int(number) for number in found[: max(0, count)]]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """See `RuntimeModel`; what stands after a row's end gets zeros."""
        check_taken(self.file, inputs, ("input_ids", "attention_mask"))
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        logits_BTV = torch.zeros(*ids_BT.shape, self._vocab_size)
        for row, (ids_T, mask_T) in enumerate(zip(ids_BT, mask_BT, strict=True)):
            length = int(mask_T.sum())
            if not bool(mask_T[:length].all()):
                raise UsageError(f"{self.file}: llama.cpp takes rows that are filled up on the right")
            if length:
                self._make_room(1, length)
                logits_BTV[row, :length] = self._decode(ids_T[None, :length].tolist(), 0, every=True)[0]
        return {"logits": logits_BTV}

    def last(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """See `RuntimeModel`; what was read of the same rows before is kept."""
        check_taken(self.file, inputs, ("input_ids", "attention_mask"))
        rows = inputs["input_ids"].tolist()
        length, before = len(rows[0]), len(self._read[0]) if self._read else 0
        goes_on = len(self._read) == len(rows) and before < length <= self._room[1]
        if not goes_on or any(row[:before] != old for row, old in zip(rows, self._read, strict=True)):
            self._make_room(len(rows), 2 * length)
            before = 0
        logits_B1V = self._decode([row[before:] for row in rows], before, every=False)
        self._read = rows
        return {"logits": logits_B1V}

    def _make_room(self, rows: int, length: int) -> None:
        """An empty memory for so many rows of such a length."""
        self._read = []
        if self._context and self._room[0] == rows and self._room[1] >= length:
            self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
            return
        if self._context:
            self._cpp.llama_free(self._context)
        asked = self._cpp.llama_context_default_params()
        asked.n_ctx = rows * max(length, 256)
        asked.n_batch = rows * max(length, 256)
        asked.n_seq_max = rows
        asked.n_threads = asked.n_threads_batch = torch.get_num_threads()
        self._context = self._cpp.llama_init_from_model(self._model, asked)
        if not self._context:
            raise RunError(f"{self.file}: llama.cpp found no memory for {rows} rows of {length} tokens")
        self._room = (rows, max(length, 256))

    def _decode(self, ids: Sequence[Sequence[int]], first: int, *, every: bool) -> torch.Tensor:
        """Logits [B, T, V] of all positions, or [B, 1, V] of each row's last; rows go on at position `first`."""
        total, wanted = sum(map(len, ids)), 0
        batch = self._cpp.llama_batch_init(total, 0, 1)
        try:
            batch.n_tokens = total
            for place, (row, position) in enumerate(
                (r, p) for r in range(len(ids)) for p in range(len(ids[r]))
            ):
                batch.token[place], batch.pos[place] = ids[row][position], first + position
                batch.seq_id[place][0], batch.n_seq_id[place] = row, 1
                batch.logits[place] = every or position == len(ids[row]) - 1
                wanted += int(batch.logits[place])
            code = self._cpp.llama_decode(self._context, batch)
            if code:
                raise RunError(f"{self.file}: llama.cpp gave up with code {code} after position {first}")
            found = np.ctypeslib.as_array(
                self._cpp.llama_get_logits(self._context), shape=(wanted, self._vocab_size)
            )
            return torch.from_numpy(found.copy()).view(len(ids), -1, self._vocab_size)
        finally:
            self._cpp.llama_batch_free(batch)


_quiet: list[Any] = []


def _be_quiet(cpp: Any) -> None:
    """llama.cpp tells hundreds of lines while it loads a file."""
    if not _quiet:
        _quiet.append(cpp.llama_log_callback(lambda level, text, data: None))
        cpp.llama_log_set(_quiet[0], ctypes.c_void_p(0))
