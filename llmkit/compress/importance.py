"""How much of what a model computes goes through each of its blocks, heads and channels.

Shape suffixes: B rows, T positions, H hidden size, O outputs, I inputs of a linear layer, U units.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.compress.calls import Call, Side, check_any, on_device
from llmkit.compress.structure import Site, block_names, weight_of
from llmkit.errors import UsageError
from llmkit.objectives.base import Batch, LossModule


@torch.no_grad()
def influences(core: LossModule, batches: Sequence[Batch]) -> list[list[float]]:
    """How far each block turns the states that pass through it, for each list of blocks.

    That is 1 - cosine of its input and its output, the mean over positions that are read.

    **Source**: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
    section 3.2 (block influence).

    Raises:
        UsageError: There is nothing to look at.
    """
    check_any(batches)
    found = []
    for number, names in enumerate(block_names(core.model)):
        side = Side(core, batches, number)
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
        current: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

        def told(
            name: str,
            states_BTH: torch.Tensor,
            call: Call,
            current: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = current,
        ) -> None:
            current[name] = states_BTH, call.is_read

        with ExitStack() as stack:
            for name in names:
                turned = partial(_turned, name, current, sums[name])
                stack.callback(core.model.get_submodule(name).register_forward_hook(turned).remove)
            side.run(told)
        if not all(count for _, count in sums.values()):
            raise UsageError(
                f"{names[0]}: no position that this model's blocks were given is read",
                hint="give more to look at: --learn FILES (compress.learn), compress.calibration.rows",
            )
        found.append([float(total / count) for total, count in sums.values()])
    return found


def _turned(
    name: str,
    current: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
    sum_2: torch.Tensor,
    _: nn.Module,
    __: tuple[Any, ...],
    output: Any,
) -> None:
    """Add what a block turned the states by, and how many positions they have."""
    before_BTH, is_read_BT = current[name]
    after_BTH = output[0] if isinstance(output, tuple) else output
    turned_BT = 1 - nn.functional.cosine_similarity(before_BTH.double(), after_BTH.double(), dim=-1)
    turned_N = turned_BT.flatten() if is_read_BT is None else turned_BT[is_read_BT]
    sum_2 += torch.tensor([float(turned_N.sum()), len(turned_N)], dtype=torch.float64)


def by_magnitude(site: Site) -> torch.Tensor:
    """The norm [U] of all weights that a unit has, in and out.

    **Source**: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1, with the square norm.
    """
    squares_U = weight_of(site.out).double().square().sum(0).unflatten(0, (site.num_units, -1)).sum(1)
    for layer, rows, fused in site.into.values():
        squares_O = weight_of(layer).double().square().sum(1)
        squares_U = squares_U + squares_O.view(fused, site.num_units, rows).sum((0, 2))
    return squares_U.sqrt()


def by_activation(site: Site, gram_II: torch.Tensor, count: float) -> torch.Tensor:
    """The root mean square [U] over positions of what a unit adds to the layer's output.

    Args:
        site: The layer that reads the units.
        gram_II: The sum over positions of the outer product of its input with itself.
        count: How many positions.

    **Source**: the norms of activations of Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), NeurIPS 2024, section 2.2, weighted by what reads them as in Sun et al., "A Simple and
    Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024, section 3.
    """
    weight_OUw = weight_of(site.out).double().unflatten(1, (site.num_units, site.width))
    number_U = torch.arange(site.num_units)
    gram_UwUw = gram_II.double().unflatten(0, (site.num_units, -1)).unflatten(2, (site.num_units, -1))
    own_Uww = gram_UwUw[number_U, :, number_U, :]
    squares_U = torch.einsum("ouv,uvw,ouw->u", weight_OUw, own_Uww, weight_OUw)
    return (squares_U.clamp(min=0) / count).sqrt()


def by_gradient(core: LossModule, batches: Sequence[Batch], sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """How much the loss would change without a unit, to first order [U], by the names of the sites.

    That is the sum over rows of |activation x gradient|.

    **Source**: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019, section 4.1; Molchanov et al.,
    "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, section 2.2.
    """
    check_any(batches)
    found = {site.name: torch.zeros(site.num_units, dtype=torch.float64) for site in sites}
    with ExitStack() as stack:
        stack.enter_context(_differentiable(core.model))
        for site in sites:

            def fed(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                states: torch.Tensor = args[0]

                def add(gradient: torch.Tensor) -> None:
                    product = (states.detach() * gradient).double()
                    rows_BI = product.reshape(len(product), -1, product.shape[-1]).sum(1)
                    rows_BU = rows_BI.unflatten(1, (site.num_units, -1)).sum(2)
                    found[site.name] += rows_BU.abs().sum(0).cpu()

                states.register_hook(add)

            stack.callback(site.out.register_forward_pre_hook(fed).remove)
        for batch in batches:
            core.objective.loss(core.model, on_device(batch, core.model.device)).total.backward()
    return found


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow from the embeddings on, weights get none, and the loss is the one of training without dropout."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    embedding = model.get_input_embeddings().weight
    model.requires_grad_(False)
    embedding.requires_grad_(True)
    model.training = True  # this module alone: those inside compute as in an evaluation
    try:
        yield
    finally:
        model.training = False
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        embedding.grad = None
