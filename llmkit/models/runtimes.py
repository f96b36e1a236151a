"""Models that another runtime runs: onnxruntime, llama.cpp, or a program of torch.export.

Each answers as the transformers model did that it was made from, so that what measures and times models need not know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from llmkit.errors import MissingError, UsageError
from llmkit.models.gguf_model import GgufModel
from llmkit.models.runtime_model import RuntimeModel, check_taken

Runtime = Literal["onnx", "gguf", "torch"]

FILES: Mapping[Runtime, str] = {"onnx": "model.onnx", "gguf": "model.gguf", "torch": "model.pt2"}
"""What a model's file is called, by what runs it."""


def runtime_of(folder: Path) -> Runtime | None:
    """What runs the model of a folder; None for one that transformers loads."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((runtime for runtime, name in FILES.items() if (folder / name).is_file()), None)


def load_runtime(folder: Path) -> RuntimeModel:
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
        check_taken(self.file, inputs, self.takes)
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
        check_taken(self.file, inputs, self.takes)
        words = dict(inputs)
        if "token_type_ids" in self.takes and "token_type_ids" not in words:
            words["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        missing = [name for name in self.takes if name not in words]
        if missing:
            raise UsageError(f"{self.file}: the exported model needs {', '.join(missing)}, too")
        found: Mapping[str, torch.Tensor] = self._run[0](**{name: words[name] for name in self.takes})
        return found
