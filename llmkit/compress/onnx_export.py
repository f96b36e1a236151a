"""A model as an ONNX file, for any number of rows and any length; its matrices in 32-bit floats or 8-bit integers.

Matrices of 8 bits: onnxruntime quantises what they are multiplied with as it goes, so nothing is calibrated.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmkit.compress.torch_export import OUTPUTS, trace
from llmkit.errors import MissingError, UsageError
from llmkit.models.runtimes import need_onnxruntime
from llmkit.registry import ModelKind

_ONE_FILE_BYTES = 1_800_000_000
"""A larger model's weights lie in a file of their own: protobuf ends at 2 GB."""
_QUANTISED = ("MatMul", "Gemm")


def need_onnx() -> Any:
    """The package onnx, with all that writes such a file.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingError(
            f"`to: onnx` needs onnx and onnxscript ({error})", hint='pip install "llmkit[onnx]"'
        ) from error
    need_onnxruntime()
    return onnx


def write_onnx(
    model: PreTrainedModel, kind: ModelKind, inputs: Mapping[str, torch.Tensor], file: Path, *, int8: bool
) -> None:
    """Write a model as an ONNX file.

    Args:
        model: In evaluation mode, on CPU, in float32.
        kind: What it does.
        inputs: See `torch_export.trace`.
        file: Where to.
        int8: Matrices in 8 bits, but for the output layer of a model that writes or fills gaps.

    Raises:
        MissingError: A package is missing.
        UsageError: torch cannot write down what the model does.
    """
    need_onnx()
    with _quiet():
        try:
            program, made = _exported(model, kind, inputs)
        except torch.onnx.OnnxExporterError as error:
            if model.config._attn_implementation == "eager" or not model._supports_sdpa:
                raise _no_form(model, error) from error
            with _plain_attention(model):  # T5's fused kernel leaves strides behind that ONNX has not
                try:
                    program, made = _exported(model, kind, inputs)
                except torch.onnx.OnnxExporterError as second:
                    raise _no_form(model, second) from second
    assert made is not None
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    whole = file.with_name("whole.onnx") if int8 else file
    made.save(str(whole), external_data=size > _ONE_FILE_BYTES)
    if int8:
        _quantise(whole, file, kind, external=size > _ONE_FILE_BYTES)


def _exported(
    model: PreTrainedModel, kind: ModelKind, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.export.ExportedProgram, torch.onnx.ONNXProgram | None]:
    program = trace(model, kind, inputs)
    made = torch.onnx.export(
        program,
        (),
        kwargs=dict(inputs),
        input_names=list(inputs),
        output_names=list(OUTPUTS[kind]),
        dynamo=True,
    )
    return program, made


def _no_form(model: PreTrainedModel, error: Exception) -> UsageError:
    said = " ".join(str(error).split())[:200]
    return UsageError(
        f"export: {model.config.model_type} has no form in ONNX ({said})",
        hint="export it by `to: torch`, or as safetensors: `to: bf16`",
    )


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention in matrix products and a softmax."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _quantise(whole: Path, file: Path, kind: ModelKind, *, external: bool) -> None:
    """Matrices in 8 bits, each column with its own scale."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx = need_onnx()
    graph = onnx.load(str(whole), load_external_data=False).graph
    matrices = [node.name for node in graph.node if node.op_type in _QUANTISED]
    with _quiet():
        quantize_dynamic(
            str(whole),
            str(file),
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=matrices[-1:] if kind in ("causal", "seq2seq", "masked", "pairs") else [],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )
    for left in whole.parent.glob(f"{whole.name}*"):
        left.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of each step and of each package that they do without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
