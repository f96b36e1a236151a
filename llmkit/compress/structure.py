"""What can be taken out of an architecture, where its weights are, and the smaller model that is left.

The smaller model is one of the same architecture, built from its configuration: whatever loads the one loads the other.

Shape suffixes: O outputs, I inputs of a linear layer, U units (heads, or channels of a feed-forward layer).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from llmkit.compress.families import Attention, family_of
from llmkit.errors import UsageError
from llmkit.models.layers import block_lists

Linear: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True)
class Site:
    """A layer whose inputs come from units that can go: the end of a feed-forward layer, or of attention.

    Attributes:
        name: The full name of the linear layer that reads the units.
        side: The list of blocks that it is in.
        block: The block's number in it.
        num_units: How many there are.
        out: The linear layer.
        into: Name -> linear layer that makes the units, and how many rows in a line a unit has in each of its parts.
        tables: Names of tables with a column for each unit.
        joint: Whether the same units must go in all blocks.
    """

    name: str
    side: int
    block: int
    num_units: int
    out: Linear
    into: Mapping[str, tuple[Linear, int, int]]
    tables: tuple[str, ...] = ()
    joint: str = ""

    @property
    def width(self) -> int:
        """Inputs of `out` that a unit has."""
        return weight_of(self.out).shape[1] // self.num_units


def weight_of(layer: Linear) -> torch.Tensor:
    """A linear layer's weight as outputs by inputs [O, I]; it shares memory with the layer's own."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def block_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of the model's blocks, for each list of them."""
    names = {module: name for name, module in model.named_modules()}
    return [[names[block] for block in blocks] for blocks in block_lists(model)]


def feed_sites(model: PreTrainedModel) -> list[Site]:
    """The feed-forward layers of a model; a unit is a channel.

    Raises:
        UsageError: Nothing is known of the architecture.
    """
    feed = family_of(model.config).feed
    found = []
    for side, block, place, name in _places(model, (feed.place,)):
        into = {
            f"{name}{part}": (place.get_submodule(part), 1, feed.fused)
            for part in feed.into
            if _has(place, part)
        }
        out: Any = place.get_submodule(feed.out)
        found.append(Site(f"{name}{feed.out}", side, block, weight_of(out).shape[1], out, into))
    return found


def head_sites(model: PreTrainedModel) -> list[Site]:
    """The attention layers of a model; a unit is a key/value head with the queries that share it.

    Where all queries share one, a unit is a head without it.

    Raises:
        UsageError: The architecture's heads cannot be taken out.
    """
    attention = family_of(model.config, heads=True).attention
    assert attention is not None
    num_heads, num_units, size = _head_counts(model.config, attention)
    found = []
    for side, block, place, name in _places(model, attention.places):
        rows = {attention.query: size * num_heads // num_units}
        if num_units == _groups(model.config, attention):
            rows |= dict.fromkeys(attention.shared, size)
        into = {f"{name}{part}": (place.get_submodule(part), count, 1) for part, count in rows.items()}
        own = name.removesuffix(".").rpartition(".")[2]
        joint = f"{side}.{own}" if attention.bias and own == attention.places[0] else ""
        tables = (f"{name}{attention.bias}.weight",) if attention.bias and _has(place, attention.bias) else ()
        out: Any = place.get_submodule(attention.out)
        found.append(Site(f"{name}{attention.out}", side, block, num_units, out, into, tables, joint))
    return found


def _groups(config: PretrainedConfig, attention: Attention) -> int:
    return int(getattr(config, attention.groups or attention.heads))


def _head_counts(config: PretrainedConfig, attention: Attention) -> tuple[int, int, int]:
    """Heads, units and the size of a head."""
    heads, groups = int(getattr(config, attention.heads)), _groups(config, attention)
    size = getattr(config, attention.size, None) or config.hidden_size // heads
    return heads, heads if groups == 1 else groups, int(size)


def _places(model: PreTrainedModel, ends: Sequence[str]) -> Iterator[tuple[int, int, nn.Module, str]]:
    """The modules whose names in their blocks end so: with the list, the block's number, and the name with a dot."""
    for side, names in enumerate(block_names(model)):
        for number, name in enumerate(names):
            block = model.get_submodule(name)
            for inner, module in block.named_modules():
                if any(inner == end or (end and inner.endswith(f".{end}")) for end in ends):
                    yield side, number, module, f"{name}.{inner}." if inner else f"{name}."


def _has(module: nn.Module, name: str) -> bool:
    return any(inner == name for inner, _ in module.named_modules())


def with_layers(model: PreTrainedModel, kept: Sequence[Sequence[int]]) -> PreTrainedModel:
    """The model with some of its blocks only.

    Args:
        model: Of a known architecture.
        kept: The numbers of the blocks that stay, for each list of blocks.
    """
    family, names = family_of(model.config), block_names(model)
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    for side, numbers in enumerate(kept):
        prefix = names[side][0].rpartition(".")[0] + "."
        state = dict(_renumbered(state, prefix, numbers))
    if len(kept) == 1:
        for field, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == len(names[0]) and field in _BY_LAYER:
                setattr(config, field, [value[number] for number in kept[0]])
    for field, numbers in zip(family.depth, kept, strict=False):
        setattr(config, field, len(numbers))
    return _rebuilt(model, config, state)


_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Fields of configurations with an entry for each layer."""


def _renumbered(
    state: Mapping[str, torch.Tensor], prefix: str, kept: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    new = {old: number for number, old in enumerate(kept)}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            yield name, tensor
            continue
        old, _, rest = name.removeprefix(prefix).partition(".")
        if int(old) in new:
            yield f"{prefix}{new[int(old)]}.{rest}", tensor


def with_channels(model: PreTrainedModel, kept: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model with some of the channels of its feed-forward layers only.

    Args:
        model: Of a known architecture.
        kept: By the name of each site, the numbers of the channels that stay; as many in each.
    """
    feed, config, sites = family_of(model.config).feed, copy.deepcopy(model.config), feed_sites(model)
    for side, field in enumerate(feed.width):
        setattr(config, field, next(len(kept[site.name]) for site in sites if site.side == side))
    return _rebuilt(model, config, _narrowed(model, sites, kept))


def with_heads(model: PreTrainedModel, kept: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model with some of its attention heads only.

    Args:
        model: Of an architecture whose heads can go.
        kept: By the name of each site, the numbers of the units that stay; as many in each.

    Raises:
        UsageError: The architecture has no model with so many heads.
    """
    count = len(next(iter(kept.values())))
    return _rebuilt(model, with_head_count(model.config, count), _narrowed(model, head_sites(model), kept))


def with_head_count(config: PretrainedConfig, num_units: int) -> PretrainedConfig:
    """The configuration of a model with so many units of heads, each of the size that it has.

    Raises:
        UsageError: The architecture has no such model.
    """
    attention = family_of(config, heads=True).attention
    assert attention is not None
    heads, units, size = _head_counts(config, attention)
    made = copy.deepcopy(config)
    setattr(made, attention.size, size)
    setattr(made, attention.heads, heads // units * num_units)
    if attention.groups and _groups(config, attention) > 1:
        setattr(made, attention.groups, num_units)
    try:
        made.validate()
    except (ValueError, StrictDataclassError) as error:
        raise UsageError(
            f"a {config.model_type} with {heads // units * num_units} of its {heads} heads cannot be "
            f"({' '.join(str(error).split())})"
        ) from error
    return made


def _narrowed(
    model: PreTrainedModel, sites: Sequence[Site], kept: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights with those of the units that stay only."""
    state = dict(model.state_dict())
    for site in sites:
        units_U = kept[site.name]
        index = spread(units_U, site.width)
        _take(state, site.name, site.out, index, inputs=True)
        for name, (layer, rows, fused) in site.into.items():
            own = spread(units_U, rows)
            parts = [own + part * site.num_units * rows for part in range(fused)]
            _take(state, name, layer, torch.cat(parts), inputs=False)
        for name in site.tables:
            state[name] = state[name][:, units_U]
    return state


def spread(units_U: torch.Tensor, width: int) -> torch.Tensor:
    """The numbers of the rows of some units, each of which has `width` in a line."""
    return (units_U[:, None] * width + torch.arange(width)).flatten()


def _take(
    state: dict[str, torch.Tensor], name: str, layer: Linear, index: torch.Tensor, *, inputs: bool
) -> None:
    """Leave the weights and biases of some inputs, or outputs, of a linear layer."""
    across = 1 if inputs != isinstance(layer, Conv1D) else 0
    weight = f"{name}.weight"
    state[weight] = state[weight].index_select(across, index)
    if not inputs and layer.bias is not None:
        state[f"{name}.bias"] = state[f"{name}.bias"][index]


def _rebuilt(
    model: PreTrainedModel, config: PretrainedConfig, state: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """A model of this configuration with these weights, used as `model` is."""
    build: Callable[..., PreTrainedModel] = type(model)
    with no_init_weights():  # every weight follows; buffers that are not saved are computed all the same
        made = build(config)
    made.tie_weights()
    made.load_state_dict(state, strict=True)
    if model.can_generate():
        made.generation_config = model.generation_config
    for name, value in vars(model).items():
        if name.startswith("llmkit_"):  # how llmkit uses it
            setattr(made, name, value)
    made.train(model.training)
    return made


def check_plain(model: PreTrainedModel) -> None:
    """Refuse a model whose linear layers are not plain numbers.

    Raises:
        UsageError: It is quantised, or made of smaller factors, already.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return
    known = settings if isinstance(settings, dict) else settings.to_dict()
    raise UsageError(
        f"the model's weights are stored as {known.get('quant_method', 'other than plain numbers')} already",
        hint="do this step before that one, on the model that it was made from",
    )
