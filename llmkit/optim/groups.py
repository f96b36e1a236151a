"""Which parameters are treated how: weight decay, learning rates of their own, Muon's matrices, by names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmkit.errors import UsageError
from llmkit.models.freezing import Pace, head_parameters
from llmkit.models.names import matches, near_names
from llmkit.optim.kept import hold_zeros
from llmkit.recipe.training import Group, Optim

_ALIKE = Pace()
_RATES = ("A_log", "D", "dt_bias")
"""What state-space models call the rates by which their states decay and are read: shaped like a matrix in some, and
exponents or step sizes in all of them."""
_SPARED_MARK = "_no_weight_decay"
"""What models set on parameters that must not decay."""


_Treatment = tuple[int | None, bool, bool, bool, Pace]
"""An entry of `optim.groups`, whether it decays, is Muon's, is stored transposed, and its pace."""


@dataclass(frozen=True)
class _Parameter:
    """A trained parameter: every name it goes by (a tied one has several), and what it is in the network."""

    value: nn.Parameter
    names: tuple[str, ...]
    is_embedding: bool
    is_hidden: bool
    is_spared: bool
    is_transposed: bool

    @property
    def decays(self) -> bool:
        """Matrices decay; norms, biases, embeddings and what the model spares do not."""
        return self.value.ndim >= 2 and not self.is_embedding and not self.is_spared


def parameter_groups(
    model: nn.Module, spec: Optim, *, l1: float = 0.0, paces: Mapping[int, Pace] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one treatment each: `params`, `weight_decay`, `lr_ratio`, `l1`, `muon`.

    Matrices decay; norms, biases and embeddings do not, nor what a state-space model decays its state by. An embedding
    tied to the output head counts as an embedding. Muon's matrices that are stored as inputs by outputs (GPT-2's) are
    `transposed`. The first entry of `optim.groups` that matches a parameter rules over it; what the entry leaves open
    is as for all. Its rate and that of the parameter's layer are multiplied. What begins to learn later says
    `from_step`.

    Args:
        model: The network; every trained part of it.
        spec: The recipe's `optim` block.
        l1: The strength of the L1 penalty, for all that decays by default.
        paces: How parameters learn by their layers, by `id`: see `paces_of`. Those left out learn like the head.

    Raises:
        UsageError: A pattern matches no parameter.
    """
    paces = paces or {}
    parameters = list(_parameters_of(model))
    entry_of = {id(p.value): _entry_of(p, spec.groups) for p in parameters}
    _check_all_used(spec.groups, set(entry_of.values()), parameters)
    treatments = [  # two at least, in this order, where nothing else is asked for
        (number, decays, muon, transposed, pace)
        for number, decays, (muon, transposed), pace in product(
            (None, *range(len(spec.groups))),
            (True, False),
            ((True, False), (True, True), (False, False)),
            sorted({_ALIKE, *paces.values()}, reverse=True),
        )
    ]
    groups: dict[_Treatment, list[nn.Parameter]] = {treatment: [] for treatment in treatments}
    for p in parameters:
        muon = spec.name == "muon" and p.is_hidden
        pace = paces.get(id(p.value), _ALIKE)
        groups[entry_of[id(p.value)], p.decays, muon, muon and p.is_transposed, pace].append(p.value)
    return [
        _group(params, spec, spec.groups[number] if number is not None else None, decays, muon, l1, pace)
        | ({"transposed": True} if transposed else {})
        | ({"from_step": pace.from_step} if pace.from_step else {})
        for (number, decays, muon, transposed, pace), params in groups.items()
        if params
    ]


def _group(
    params: list[nn.Parameter],
    spec: Optim,
    entry: Group | None,
    decays: bool,
    muon: bool,
    l1: float,
    pace: Pace,
) -> dict[str, Any]:
    weight_decay = spec.weight_decay if decays else 0.0
    if entry is not None and entry.weight_decay is not None:
        weight_decay = entry.weight_decay
    lr_ratio = pace.lr_ratio * (entry.lr_ratio if entry is not None else 1.0)
    if muon and spec.muon_lr is not None:
        lr_ratio *= spec.muon_lr / spec.lr
    group = {
        "params": params,
        "weight_decay": weight_decay,
        "lr_ratio": lr_ratio,
        "l1": l1 if decays else 0.0,
    }
    group["match"] = entry.match if entry is not None else None
    return {**group, "muon": muon} if spec.name == "muon" else group


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, each with its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def hold_back(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take away the gradients of what does not learn yet, and of zeros to be kept, before they are clipped.

    The step then leaves these parameters alone, weight decay included, and the optimizer's memory of them begins at the
    first step that they learn in. The backward pass computes their gradients all the same: so the processes of a run
    always exchange the same ones.

    Args:
        optimizer: As made from `parameter_groups`, wrapped or not.
        step: Steps made so far.
    """
    for group in optimizer.param_groups:
        if group.get("from_step", 0) > step:
            for p in group["params"]:
                p.grad = None
    hold_zeros(optimizer)


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order of its state dict's integer keys."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each group: how many numbers it has and how they are treated."""
    return [_described(group) for group in optimizer.param_groups]


def _described(group: dict[str, Any]) -> str:
    count = sum(p.numel() for p in group["params"])
    size = f"{len(group['params']):,} parameters ({count:,} numbers)"
    facts = [f"weight decay {group['weight_decay']:g}"]
    if group.get("lr_ratio", 1.0) != 1.0:
        facts.insert(0, f"{group['lr_ratio']:g} x lr")
    if group.get("from_step"):
        facts.append(f"from step {group['from_step']:,}")
    if "muon" in group:
        facts.insert(0, "Muon" if group["muon"] else "AdamW")
    return f"{group.get('match') or 'all others'}: {size}, {', '.join(facts)}"


def _parameters_of(model: nn.Module) -> Iterator[_Parameter]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    heads = head_parameters(model)
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for p in model.parameters():
        if p.requires_grad:
            is_embedding = id(p) in embeddings
            spared = getattr(p, _SPARED_MARK, False) or names[id(p)][0].rsplit(".", 1)[-1] in _RATES
            hidden = p.ndim == 2 and not is_embedding and not spared and id(p) not in heads
            yield _Parameter(p, tuple(names[id(p)]), is_embedding, hidden, bool(spared), id(p) in transposed)


def _entry_of(parameter: _Parameter, entries: Sequence[Group]) -> int | None:
    matching = (i for i, entry in enumerate(entries) if any(matches(entry.match, n) for n in parameter.names))
    return next(matching, None)


def _check_all_used(
    entries: Sequence[Group], used: set[int | None], parameters: Sequence[_Parameter]
) -> None:
    for number, entry in enumerate(entries):
        if number not in used:
            names = [name for parameter in parameters for name in parameter.names]
            taken = any(matches(entry.match, name) for name in names)
            raise UsageError(
                f"train.optim.groups: {entry.match!r} matches "
                + ("only what entries before it have taken" if taken else "no trained parameter"),
                hint="put it before them"
                if taken
                else f"near names: {', '.join(near_names(entry.match, names))}",
            )
