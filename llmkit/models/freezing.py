"""Which parameters of a model learn, how fast, and from which step on: by layer, counted from below, or by name.

Layer 0 is the embeddings, 1 the layer above them, and so on; the head stands above the last layer. Both sides of an
encoder-decoder are counted alike, each from its own embeddings.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.models.layers import block_lists
from llmkit.models.names import alternatives, matches, near_names
from llmkit.recipe.parts import HEAD, Freeze, Unfreeze


@dataclass(frozen=True)
class Depth:
    """Where in a model a parameter is.

    Attributes:
        layer: 0 in the embeddings, 1 in the lowest layer; of the head one more than of the top layer.
        below_head: 0 in the head, 1 in the top layer, and most in the embeddings.
    """

    layer: int
    below_head: int


@dataclass(frozen=True)
class Counts:
    """How many numbers of a model learn, and how many never change."""

    trained: int
    frozen: int

    @property
    def share(self) -> float:
        """The part that learns."""
        return self.trained / max(1, self.trained + self.frozen)


@dataclass(frozen=True, order=True)
class Pace:
    """How a parameter learns beside the others.

    Attributes:
        lr_ratio: Its learning rate as a share of the head's.
        from_step: The first step that it learns in, counted from 0; up to then it stays as it is.
    """

    lr_ratio: float = 1.0
    from_step: int = 0


def count_learning(model: nn.Module) -> Counts:
    """Count what learns and what does not; a tied weight once, a quantised one by the numbers that it stands for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Counts(trained, sum(_numbers(p) for p in model.parameters() if not p.requires_grad))


def _numbers(parameter: nn.Parameter) -> int:
    """Two numbers of 4 bits are kept in a byte, and the shape that they had beside them (bitsandbytes)."""
    state = getattr(parameter, "quant_state", None)
    shape: torch.Size | None = getattr(state, "shape", None)
    return parameter.numel() if shape is None else shape.numel()


def depths_of(model: PreTrainedModel) -> dict[str, Depth]:
    """Where each parameter is, by name; a tied one by the first of its names.

    Norms above the top layer count to it. Poolers count to the head: like it they turn states into what the task needs,
    and are often new. An output layer that shares its weights with the embeddings counts to these.

    Raises:
        UsageError: The model has no layers that could be told apart.
    """
    lists = block_lists(model)
    top = max(len(blocks) for blocks in lists)
    inside = {
        id(parameter): Depth(number, len(blocks) - number + 1)
        for blocks in lists
        for number, block in enumerate(blocks, 1)
        for parameter in block.parameters()
    }
    outside = _Outside(model, inside, Depth(0, top + 1), Depth(top, 1), Depth(top + 1, 0))
    return {name: inside.get(id(p)) or outside.depth(name, p) for name, p in model.named_parameters()}


class _Outside:
    """Where parameters are that no layer holds."""

    def __init__(
        self,
        model: PreTrainedModel,
        inside: Mapping[int, Depth],
        embeddings: Depth,
        top: Depth,
        head: Depth,
    ) -> None:
        self._heads = head_parameters(model)
        self._owners = dict(model.named_modules())
        self._tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        order = list(model.named_parameters())
        first = next(number for number, (_, p) in enumerate(order) if id(p) in inside)
        self._before = {id(p) for _, p in order[:first]}
        self._embeddings, self._top, self._head = embeddings, top, head

    def depth(self, name: str, parameter: nn.Parameter) -> Depth:
        if id(parameter) in self._tables:
            return self._embeddings
        if id(parameter) in self._heads:
            return self._head
        if id(parameter) in self._before or any("emb" in part for part in name.split(".")):
            return self._embeddings
        owner = self._owners[name.rpartition(".")[0]]
        is_norm = all(p.ndim == 1 for p in owner.parameters(recurse=False))
        return self._top if is_norm else self._head


def head_parameters(model: nn.Module) -> set[int]:
    """What turns hidden states into predictions, by `id`.

    Of each transformers model in it that is all outside the body, and the output layer, tied to the embeddings or not.
    """
    found: set[int] = set()
    for module in model.modules():
        body = getattr(module, "base_model", None)
        if not isinstance(body, nn.Module):
            continue
        if body is not module:
            inside = {id(p) for p in body.parameters()}
            found |= {id(p) for p in module.parameters()} - inside
        head: Any = getattr(module, "get_output_embeddings", None)
        output = head() if head is not None else None
        found |= {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    return found


def apply_freezing(model: PreTrainedModel, spec: Freeze | None) -> Counts:
    """Take what `spec` names out of learning, for good; all else is as it was.

    Frozen layers still drop out in training, as transformers does it. What learns is decided before an optimizer or a
    wrapper for several processes is made.

    Args:
        model: The network; its `requires_grad` flags change.
        spec: The recipe's `freeze`; None only counts.

    Raises:
        UsageError: A pattern fits no parameter, there are fewer layers than are to be frozen, or nothing is left.
    """
    if spec is not None:
        stays = _frozen_by(model, spec)
        for name, parameter in model.named_parameters():
            if stays(name):
                parameter.requires_grad_(False)
    counts = count_learning(model)
    if counts.trained == 0:
        raise UsageError("freeze: nothing is left to learn", hint=_tied_hint(model))
    return counts


def _tied_hint(model: PreTrainedModel) -> str:
    if getattr(model.config, "tie_word_embeddings", False):
        return "the output layer shares its weights with the embeddings; `all_but: embed*|norm*` keeps these learning"
    return "name fewer parameters, such as `all_but: head|norm*`"


def _frozen_by(model: PreTrainedModel, spec: Freeze) -> Callable[[str], bool]:
    names = [name for name, _ in model.named_parameters()]
    if spec.all_but is not None:
        learning = _named(model, spec.all_but, names, "freeze.all_but")
        return lambda name: name not in learning
    frozen = set() if spec.match is None else _named(model, spec.match, names, "freeze.match")
    if spec.layers is not None:
        frozen |= _lowest(model, spec.layers)
    return lambda name: name in frozen


def _lowest(model: PreTrainedModel, layers: int) -> set[str]:
    depths = depths_of(model)
    sides = sorted(len(blocks) for blocks in block_lists(model))
    if layers > sides[0]:
        raise UsageError(
            f"freeze.layers is {layers}, and this {model.config.model_type} has {sides[0]} layers"
            + (" on one side" if len(sides) > 1 else ""),
            hint="`all_but: head` freezes all of them",
        )
    return {name for name, depth in depths.items() if depth.layer <= layers and depth.below_head > 0}


def _named(model: PreTrainedModel, pattern: str, names: list[str], key: str) -> set[str]:
    """The parameters that a pattern means; every alternative must mean one."""
    heads = head_parameters(model)
    chosen: set[str] = set()
    for part in alternatives(pattern):
        found = {name for name in names if matches(part, name)}
        if part == HEAD:
            found |= _head_names(model, heads)
        if not found and part == HEAD:
            raise UsageError(
                f"{key}: this {model.config.model_type} has no head of its own", hint=_tied_hint(model)
            )
        if not found:
            raise UsageError(
                f"{key}: {part!r} matches no parameter",
                hint=f"near names: {', '.join(near_names(part, names))}",
            )
        chosen |= found
    return chosen


def _head_names(model: PreTrainedModel, heads: set[int]) -> set[str]:
    """All of the head; where layers cannot be told apart, all outside the body."""
    try:
        return {name for name, depth in depths_of(model).items() if depth.below_head == 0}
    except UsageError:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return {name for name, p in model.named_parameters() if id(p) in heads - tables}


def paces_of(
    model: PreTrainedModel, *, lr_decay: float = 1.0, unfreeze: Unfreeze | None = None, every: int = 0
) -> dict[int, Pace]:
    """How each parameter learns by its depth, by `id`; empty where all learn alike.

    The head learns at the full rate, the top layer at `lr_decay` times it, the layer below at the square of it, and
    the embeddings slowest. With `unfreeze` the head (and `start` layers) learn from the first step, and every so many
    steps so many layers more, from the top down.

    Args:
        model: The network, frozen and with its adapters as it will be.
        lr_decay: The rate of a layer as a share of that of the one above it.
        unfreeze: The recipe's `unfreeze`.
        every: The steps that its `every` stands for.

    Raises:
        UsageError: The model has no layers that could be told apart.

    **Source**: rates by layer: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL
    2018, section 3.2 (there 1 / 2.6), and Clark et al., "ELECTRA", ICLR 2020, appendix B; thawing: the former, section
    3.3.
    """
    if lr_decay == 1.0 and unfreeze is None:
        return {}
    depths = depths_of(model)
    return {
        id(p): Pace(lr_decay ** depths[name].below_head, _thaw_step(depths[name], unfreeze, every))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _thaw_step(depth: Depth, unfreeze: Unfreeze | None, every: int) -> int:
    waiting = 0 if unfreeze is None else depth.below_head - unfreeze.start
    if unfreeze is None or depth.below_head == 0 or waiting <= 0:
        return 0
    return -(-waiting // unfreeze.layers) * every


def describe_thawing(model: PreTrainedModel, unfreeze: Unfreeze, every: int, num_steps: int) -> Iterator[str]:
    """A line for each step at which more begins to learn, and one for what never does."""
    waves: dict[int, set[int]] = {}
    for name, depth in depths_of(model).items():
        if model.get_parameter(name).requires_grad:
            waves.setdefault(_thaw_step(depth, unfreeze, every), set()).add(depth.layer)
    top = max(depth.layer for depth in depths_of(model).values() if depth.below_head)
    late = sorted({layer for step, layers in waves.items() if step >= num_steps for layer in layers})
    for step in sorted(step for step in waves if step < num_steps):
        names = ", ".join(_layer_name(layer, top) for layer in sorted(waves[step], reverse=True))
        yield f"from step {step:,}: {names}"
    if late:
        yield f"never in these {num_steps:,} steps: {', '.join(_layer_name(layer, top) for layer in late)}"


def _layer_name(layer: int, top: int) -> str:
    return "the embeddings" if layer == 0 else "the head" if layer > top else f"layer {layer}"


def frozen_hash(model: nn.Module) -> str:
    """The SHA-256 of all that does not learn, names and shapes included; empty where everything learns.

    A checkpoint holds only what learns, so a run that goes on from one must have this in common with it.
    """
    frozen = sorted((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, parameter in frozen:
        value = parameter.detach()
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
