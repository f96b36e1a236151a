"""Several adapters in one model: computing together, each with its weight; as one adapter; or in the model's weights.

What is added up is each adapter's product of thin matrices, as it changes a layer's weight. PEFT's own way of adding
weights the thin matrices apart from each other, and the product of sums holds products of one adapter's with another's.

Shape suffixes: R ranks of all adapters, I inputs of a layer, O outputs.

**Source**: sums: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2; `ties`: Yadav et al.,
"TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, section 4; `dare`: Yu et al., "Language Models
are Super Mario", ICML 2024, section 3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.models.adapter_files import adapter_tensors, import_peft, read_config
from llmkit.models.adapters import activate, adapted_layers, add_adapter, load_adapter
from llmkit.models.merging import unload

Method = Literal["linear", "ties", "dare"]
JOINED = "joined"


def put_adapters(model: PreTrainedModel, adapters: Sequence[tuple[Path, float]]) -> dict[str, float]:
    """Put saved adapters into a plain model; it computes with all of them together, each times its weight.

    Args:
        model: The base; changed in place.
        adapters: Folders in PEFT's form, and how much each counts.

    Returns:
        What each is called in the model, with its weight.

    Raises:
        MissingError: PEFT is not installed, or there is no adapter in a folder.
        UsageError: One belongs to another model, or has what cannot be added up.
    """
    for folder, weight in adapters if len(adapters) > 1 or adapters[0][1] != 1 else ():
        _check_adds_up(folder, weight)
    names = {f"adapter_{number}": weight for number, (_, weight) in enumerate(adapters)}
    for name, (folder, _) in zip(names, adapters, strict=True):
        load_adapter(model, folder, name=name)
    for layer in _lora_layers(model):
        for name in set(names) & set(layer.scaling):
            layer.scaling[name] *= names[name]
    activate(model, [*names])
    return names


def _check_adds_up(folder: Path, weight: float) -> None:
    """See that an adapter is nothing but products of thin matrices.

    Raises:
        UsageError: It is more.
    """
    config: Any = read_config(folder)
    whole = sorted(config.modules_to_save or ())
    more = {
        "learns the lengths of rows (DoRA)": config.use_dora,
        f"brings modules that learned whole ({', '.join(whole)})": bool(whole),
        "learns biases": config.bias != "none" or getattr(config, "lora_bias", False),
    }
    why = next((what for what, is_so in more.items() if is_so), None)
    if why is not None:
        times = "" if weight == 1 else f", or taken {weight:g} times"
        raise UsageError(
            f"{folder}: this adapter {why}, which cannot be added to another's{times}",
            hint="add adapters of `method: lora` or `rslora` without `whole`, of a task without a new head; "
            "one such adapter alone can be merged",
        )


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora.layer import LoraLayer

    return [layer for layer in adapted_layers(model) if isinstance(layer, LoraLayer)]


# --- as one adapter ---------------------------------------------------------------------------------------------


def join_adapters(model: PreTrainedModel, names: Mapping[str, float], *, base: str) -> None:
    """Add an adapter `JOINED` that does what all of them do together, exactly: their thin matrices beside each other.

    Its rank is the sum of theirs; where one has no part in a layer, there are zeros.

    Args:
        model: From `put_adapters`; what computes stays as it was.
        names: From there.
        base: The folder or name of the base, kept with the adapter.
    """
    peft = import_peft()
    configs: dict[str, Any] = {name: model.peft_config[name] for name in names}
    layers = set(_lora_layers(model))
    places = {name: layer for name, layer in model.named_modules() if layer in layers}
    rank = sum(config.r for config in configs.values())
    joined = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1: the weights are in the matrices
        target_modules=sorted(places),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs.values()),
        task_type=next(iter(configs.values())).task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    add_adapter(joined, model, JOINED)
    tensors = adapter_tensors(model, JOINED)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
        for layer in places.values():
            _fill(layer, {name: config.r for name, config in configs.items()})


def _fill(layer: Any, ranks: Mapping[str, int]) -> None:
    """The thin matrices of a layer's adapters beside each other: A [R, I] as they are, B [O, R] times their scales."""
    start = 0
    for name, rank in ranks.items():
        if name in layer.lora_A:
            rows = slice(start, start + rank)
            layer.lora_A[JOINED].weight[rows] = layer.lora_A[name].weight
            layer.lora_B[JOINED].weight[:, rows] = layer.scaling[name] * layer.lora_B[name].weight
        start += rank


# --- in the weights ---------------------------------------------------------------------------------------------


def merge_by(
    model: PreTrainedModel, names: Mapping[str, float], method: Method, *, density: float, seed: int
) -> None:
    """Put what the adapters make together into the model's weights, by `ties` or `dare`; it is a plain one afterwards.

    Args:
        model: From `put_adapters`.
        names: From there.
        method: `ties` keeps the largest changes of each adapter and, of these, at each place the ones of the sign that
            weighs more, and takes their mean; `dare` keeps a random share of each adapter's changes, enlarged by as
            much as is left out, and adds them up.
        density: The share of each adapter's changes that is kept, of each layer.
        seed: Decides which, with `dare`.
    """
    how: Callable[..., torch.Tensor] = _ties if method == "ties" else _dare
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in _lora_layers(model):
            deltas = [layer.get_delta_weight(name) for name in names if name in layer.lora_A]
            base = layer.get_base_layer().weight
            base += how(torch.stack(deltas), density, chance).to(base.dtype)
    unload(model, merge=False)


def _ties(deltas_NOI: torch.Tensor, density: float, _: torch.Generator) -> torch.Tensor:
    size = deltas_NOI[0].numel()
    kept = max(1, round(density * size))
    flat_NX = deltas_NOI.flatten(1)
    limit_N1 = flat_NX.abs().kthvalue(size - kept + 1, dim=1, keepdim=True).values
    trimmed_NX = torch.where(flat_NX.abs() >= limit_N1, flat_NX, 0.0)
    elected_X = trimmed_NX.sum(0).sign()
    agrees_NX = (trimmed_NX.sign() == elected_X) & (trimmed_NX != 0)
    mean_X = (trimmed_NX * agrees_NX).sum(0) / agrees_NX.sum(0).clamp(min=1)
    return mean_X.view_as(deltas_NOI[0])


def _dare(deltas_NOI: torch.Tensor, density: float, chance: torch.Generator) -> torch.Tensor:
    kept = torch.rand(deltas_NOI.shape, generator=chance).to(deltas_NOI.device) < density
    return (deltas_NOI * kept).sum(0) / density
