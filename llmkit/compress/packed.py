"""Quantised weights on disk, in the format of `compressed-tensors`: plain transformers loads it, and so does vLLM.

Shape suffixes: O outputs, I inputs of a linear layer, G groups of inputs with a scale of their own.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.compress.solvers import Rounded
from llmkit.models.grid import SCALES, Grid
from llmkit.models.unpacked import FORMAT, check_package

_CONFIG = "config.json"
_PACKED = "pack-quantized"


@dataclass(frozen=True)
class Stored:
    """A layer's weight as it will be stored.

    Attributes:
        grid: What it was rounded to.
        rounded: The numbers.
    """

    grid: Grid
    rounded: Rounded


def write_packed(
    folder: Path,
    model: PreTrainedModel,
    layers: Mapping[str, Stored],
    *,
    inputs: bool,
    dtype: torch.dtype,
    packs: bool = True,
) -> None:
    """Leave a quantised model's weights and configuration in a folder.

    Args:
        folder: Where.
        model: What the artefact computes; it is not changed.
        layers: Name -> its stored weight, of all linear layers that are quantised.
        inputs: Whether what they read is to be rounded to 8 bits, each position with a scale of its own.
        dtype: The type of everything else.
        packs: Whether several weights may be stored in one number; see `takes_packed`.

    Raises:
        MissingError: The package is not installed.
    """
    check_package()
    state = _of_type(model.state_dict(), dtype)
    for name, stored in layers.items():
        del state[f"{name}.weight"]
        packed = _packed(stored, _format(stored.grid, inputs=inputs, packs=packs))
        state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    model.save_pretrained(folder, state_dict=state)
    known = json.loads((folder / _CONFIG).read_bytes())
    known["dtype"] = str(dtype).removeprefix("torch.")
    known["quantization_config"] = _settings(model, layers, inputs=inputs, packs=packs)
    (folder / _CONFIG).write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _of_type(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in the type, those that were one still one: so tied weights are saved once."""
    found: dict[str, torch.Tensor] = {}
    known: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tensor.shape
        if key not in known:
            known[key] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        found[name] = known[key]
    return found


def takes_packed(model: PreTrainedModel, layers: Iterable[str]) -> bool:
    """Whether transformers can load packed weights of this architecture.

    A layer has no `weight` then until it is unpacked, and some architectures (T5, ModernBERT) ask each block for those
    of its layers when a model is set up. Found by trying, without memory for the numbers.

    Args:
        model: The model; it is not changed.
        layers: The names of the layers that would be packed.
    """
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    for name in layers:
        del empty.get_submodule(name).weight
    try:
        for module in empty.modules():
            empty._init_weights(module)
    except AttributeError:
        return False
    return True


def _packed(stored: Stored, form: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by the last part of their names."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid, rounded = stored.grid, stored.rounded
    codes_OI = grid.codes(rounded.weight_OI.float(), rounded.scale_OG, rounded.zero_OG)
    found = {"weight_scale": rounded.scale_OG.to(SCALES)}
    if grid.float8:
        return found | {"weight": codes_OI.to(torch.float8_e4m3fn)}
    codes_OI = codes_OI.to(torch.int8)
    if rounded.zero_OG is not None:
        found["weight_zero_point"] = rounded.zero_OG.to(torch.int8)
    if form != _PACKED:
        return found | {"weight": codes_OI}
    return found | {
        "weight_packed": pack_to_int32(codes_OI, grid.bits),
        "weight_shape": torch.tensor(codes_OI.shape),
    }


def _settings(
    model: PreTrainedModel, layers: Mapping[str, Stored], *, inputs: bool, packs: bool
) -> dict[str, Any]:
    """What `config.json` says of the format."""
    from compressed_tensors.quantization import QuantizationConfig

    names: dict[Grid, list[str]] = {}
    for name, stored in layers.items():
        names.setdefault(stored.grid, []).append(name)
    groups = {}
    for number, (grid, own) in enumerate(names.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(names) == 1 else [_pattern(model, name) for name in own],
            "weights": _weights(grid),
            "input_activations": _activations(grid) if inputs else None,
            "format": _format(grid, inputs=inputs, packs=packs),
        }
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    made = QuantizationConfig(
        config_groups=groups,
        quant_method=FORMAT,
        format=_format(next(iter(names)), inputs=inputs, packs=packs),
        quantization_status="compressed",
        ignore=[_pattern(model, name) for name in linear if name not in layers],
    )
    return json.loads(made.model_dump_json())


def _pattern(model: PreTrainedModel, name: str) -> str:
    """What means this layer in other classes of the architecture too, whose body has another name or none."""
    inner = name.removeprefix(f"{model.base_model_prefix}.")
    if inner == name and "." not in name:
        return name
    return rf"re:(.*\.)?{re.escape(inner)}$"


def _format(grid: Grid, *, inputs: bool, packs: bool) -> str:
    if grid.float8:
        return "float-quantized"
    # transformers cannot load packed weights whose scales have an offset.
    return "int-quantized" if inputs or not grid.symmetric or not packs else _PACKED


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "float" if grid.float8 else "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.columns is None else "group",
        "group_size": grid.columns,
    }


def _activations(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float" if grid.float8 else "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
