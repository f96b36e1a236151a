"""Models that another runtime runs: onnxruntime, llama.cpp, or a program of torch.export.

Each answers as the transformers model did that it was made from, so that what measures and times models need not know.
Documents that share a row without seeing each other are asked one by one; other positions than 0, 1, ... are refused.

Shape suffixes: B rows, D documents, T positions, V vocabulary.
"""

import ctypes
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.utils.generic import ModelOutput

from llmkit.errors import MissingError, RunError, UsageError

Runtime = Literal["onnx", "gguf", "torch"]

FILES: Mapping[Runtime, str] = {"onnx": "model.onnx", "gguf": "model.gguf", "torch": "model.pt2"}
"""What a model's file is called, by what runs it."""


def runtime_of(folder: Path) -> Runtime | None:
    """What runs the model of a folder; None for one that transformers loads."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((runtime for runtime, name in FILES.items() if (folder / name).is_file()), None)


def load_runtime(folder: Path) -> "RuntimeModel":
    """A model that another runtime runs, on CPU.

    Args:
        folder: Holds the file, and `config.json`.

    Raises:
        MissingError: There is no such file, or its runtime is not installed.
    """
    runtime = runtime_of(folder)
    if runtime is None:
        raise MissingError(
            f"{folder}: no model for another runtime", hint=f"it would be {', '.join(FILES.values())}"
        )
    made: Mapping[Runtime, type[RuntimeModel]] = {"onnx": OnnxModel, "gguf": GgufModel, "torch": TorchModel}
    return made[runtime](folder / FILES[runtime], AutoConfig.from_pretrained(folder, trust_remote_code=False))


def need_onnxruntime() -> Any:
    """The package onnxruntime.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(
            f"running an ONNX file needs onnxruntime ({error})", hint='pip install "llmkit[onnx]"'
        ) from error
    return onnxruntime


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


class RuntimeModel(nn.Module, GenerationMixin):
    """What all of them have: it is asked as a transformers model is, and writes as one does.

    Args:
        file: The model's file.
        config: That of the transformers model that it was made from.
    """

    main_input_name = "input_ids"
    base_model_prefix = "inside"
    _is_stateful = False
    _supports_attention_backend = False
    _supports_sdpa = False

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__()
        self.file = file
        self.config = config
        self.generation_config = _writing_settings(file.parent, config)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def base_model(self) -> "RuntimeModel":
        """Itself: nothing inside can be asked alone."""
        return self

    def get_input_embeddings(self) -> None:
        """None: they are out of reach."""

    def get_output_embeddings(self) -> None:
        """None: the model's own logits are taken."""

    def get_experts_implementation(self) -> dict[str, str]:
        """None: what computes experts is the runtime's."""
        return {}

    def num_parameters(self) -> int:
        """How many numbers the file holds as weights."""
        raise NotImplementedError

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the runtime makes of inputs [B, T]; by name."""
        raise NotImplementedError

    def last(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The logits [B, 1, V] of each row's last position."""
        return {"logits": self.run(inputs)["logits"][:, -1:]}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **more: torch.Tensor | None,
    ) -> ModelOutput:
        """As the transformers model's.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 where a row is filled up; None: nowhere.
            use_cache: Of no meaning here.
            logits_to_keep: 1: the logits of each row's last position only; 0: all.
            return_dict: Of no meaning here.
            more: `token_type_ids`, `decoder_input_ids`.

        Raises:
            UsageError: There is something that the file does not take.
        """
        given = {name: value for name, value in more.items() if value is not None}
        positions = given.pop("position_ids", None)
        if positions is not None and not _is_plain(positions):
            if attention_mask is not None or given or not _restart(positions):
                raise UsageError(
                    f"{self.file}: an exported model takes no positions, and these are not 0, 1, 2, ...",
                    hint="measure it on rows that are not packed",
                )
            return self._by_document(input_ids, positions.expand_as(input_ids))
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ask = self.last if logits_to_keep else self.run
        with torch.inference_mode():
            found = ask({"input_ids": input_ids, "attention_mask": mask_BT, **given})
        return ModelOutput(found)

    def _by_document(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> ModelOutput:
        """Documents that share a row do not see each other: each of them is asked alone, as many as rows at once."""
        starts = (positions_BT == 0).nonzero().tolist()
        rows, length = ids_BT.shape
        ends = [
            after if own == row else length
            for (row, _), (own, after) in zip(starts, [*starts[1:], [rows, 0]], strict=True)
        ]
        spans = sorted(
            ((row, first, end) for (row, first), end in zip(starts, ends, strict=True)),
            key=lambda span: span[1] - span[2],
        )
        whole: dict[str, torch.Tensor] = {}
        for number in range(0, len(spans), rows):
            some = spans[number : number + rows]
            width = max(end - first for _, first, end in some)
            alone_DT, mask_DT = ids_BT.new_zeros(len(some), width), ids_BT.new_zeros(len(some), width)
            for place, (row, first, end) in enumerate(some):
                alone_DT[place, : end - first] = ids_BT[row, first:end]
                mask_DT[place, : end - first] = 1
            for name, value in self.forward(alone_DT, mask_DT).items():
                into = whole.setdefault(name, value.new_zeros(rows, length, *value.shape[2:]))
                for place, (row, first, end) in enumerate(some):
                    into[row, first:end] = value[place, : end - first]
        return ModelOutput(whole)

    @torch.inference_mode()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **settings: Any
    ) -> torch.Tensor:
        """Write, by the code and the settings of transformers; nothing but the last logits is asked for each token.

        Args:
            input_ids: [B, T].
            attention_mask: 0 where a row is filled up: on the left where the model goes on from what it reads. Such
                rows are gone on from one by one, since exported models count positions from a row's first column.
            settings: As transformers has them.

        Returns:
            What a model reads and goes on with; of an encoder-decoder what it writes.
        """
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        settings["use_cache"] = False
        if self.config.is_encoder_decoder:
            # The encoder cannot be asked alone: in the place of what it makes of a text stands the text.
            settings["encoder_outputs"] = ModelOutput(last_hidden_state=input_ids)
        if self.config.is_encoder_decoder or bool(mask_BT.all()):
            written: torch.Tensor = super().generate(input_ids=input_ids, attention_mask=mask_BT, **settings)
            return written
        if not bool((mask_BT.diff(dim=1) >= 0).all()):
            raise UsageError(f"{self.file}: what is gone on from is filled up on the left")
        width, rows = input_ids.shape[1], []
        for row_T, mask_T in zip(input_ids, mask_BT.bool(), strict=True):
            alone_1T = row_T[None, mask_T]
            own: torch.Tensor = super().generate(
                input_ids=alone_1T, attention_mask=torch.ones_like(alone_1T), **settings
            )
            rows.append(torch.cat([row_T, own[0, alone_1T.shape[1] :]]))
        longest, pad = max(map(len, rows)), settings.get("pad_token_id")
        pad = self.generation_config.pad_token_id if pad is None else pad
        filled_BT = input_ids.new_full((len(rows), max(longest, width)), 0 if pad is None else int(pad))
        for number, row_T in enumerate(rows):
            filled_BT[number, : len(row_T)] = row_T
        return filled_BT

    def can_generate(self) -> bool:
        """Whatever gives logits can."""
        return True

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` is given for the next token."""
        asked = {"input_ids": input_ids}
        if encoder_outputs is not None:
            asked = {"input_ids": encoder_outputs["last_hidden_state"], "decoder_input_ids": input_ids}
        return {**asked, "attention_mask": attention_mask, "logits_to_keep": 1}


def _writing_settings(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """How a model writes where nothing else is said."""
    said = folder / "generation_config.json"
    if said.is_file():
        found: GenerationConfig = GenerationConfig.from_dict(json.loads(said.read_bytes()))
        return found
    return GenerationConfig.from_model_config(config)


def _is_plain(positions_BT: torch.Tensor) -> bool:
    return bool((positions_BT == torch.arange(positions_BT.shape[-1], device=positions_BT.device)).all())


def _restart(positions_BT: torch.Tensor) -> bool:
    """Whether rows are documents one after the other, whose positions count from 0 in each."""
    goes_on = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    starts = positions_BT[:, 1:] == 0
    return bool((positions_BT[:, :1] == 0).all() and (goes_on | starts).all())


class OnnxModel(RuntimeModel):
    """A model that onnxruntime runs.

    Raises:
        MissingError: onnxruntime is not installed.
    """

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__(file, config)
        onnxruntime = need_onnxruntime()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        self.takes = tuple(one.name for one in self._session.get_inputs())
        self.gives = tuple(one.name for one in self._session.get_outputs())

    def num_parameters(self) -> int:
        """All numbers of the file's matrices and vectors; of quantised ones their scales, too."""
        import onnx

        graph = onnx.load(str(self.file), load_external_data=False).graph
        return sum(int(np.prod(one.dims)) for one in graph.initializer if len(one.dims))

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """See `RuntimeModel`."""
        _check_taken(self.file, inputs, self.takes)
        words = {name: inputs[name].cpu().numpy().astype(np.int64) for name in inputs}
        if "token_type_ids" in self.takes and "token_type_ids" not in words:
            words["token_type_ids"] = np.zeros_like(words["input_ids"])
        found = self._session.run(None, words)
        return {name: torch.from_numpy(value) for name, value in zip(self.gives, found, strict=True)}


class TorchModel(RuntimeModel):
    """A program that `torch.export` wrote; torch alone runs it."""

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__(file, config)
        program = torch.export.load(file)
        self._run = [program.module()]  # in a list: it is no part of this module
        self.takes = tuple(program.call_spec.in_spec.child(1).context)
        self._size = sum(value.numel() for value in program.state_dict.values())

    def num_parameters(self) -> int:
        """Those of the program."""
        return self._size

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """See `RuntimeModel`."""
        _check_taken(self.file, inputs, self.takes)
        words = dict(inputs)
        if "token_type_ids" in self.takes and "token_type_ids" not in words:
            words["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        missing = [name for name in self.takes if name not in words]
        if missing:
            raise UsageError(f"{self.file}: the exported model needs {', '.join(missing)}, too")
        found: Mapping[str, torch.Tensor] = self._run[0](**{name: words[name] for name in self.takes})
        return found


def _check_taken(file: Path, inputs: Mapping[str, torch.Tensor], takes: Sequence[str]) -> None:
    more = sorted(set(inputs) - set(takes))
    if more:
        raise UsageError(
            f"{file}: the exported model does not take {', '.join(more)}", hint=f"it takes {', '.join(takes)}"
        )


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
        _check_taken(self.file, inputs, ("input_ids", "attention_mask"))
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
        _check_taken(self.file, inputs, ("input_ids", "attention_mask"))
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
