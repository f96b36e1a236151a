"""Every optimizer that is not refused on shards: what it does to them is what it does to the whole."""

import functools
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from worlds import together

from llmkit.optim import averaged, make_optimizer
from llmkit.plan.sharing import WHOLE_MATRICES
from llmkit.recipe.schema import Optim

STEPS = 4
NAMES = [name for name in get_args(Optim.model_fields["name"].annotation) if name not in WHOLE_MATRICES]
SHAPES = {"wide": (96, 80), "odd": (5, 7), "bias": (80,)}


class Weights(nn.Module):
    """Some matrices and a vector; the network that they would be in does not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        for name, (rows, columns) in (("wide", SHAPES["wide"]), ("odd", SHAPES["odd"])):
            setattr(self, name, nn.Linear(columns, rows, bias=name == "wide"))


def learned(name, mesh, **more):
    """The weights after some updates by given gradients, and what they are judged by."""
    model = Weights()
    if mesh is not None:
        for module in model.children():
            for key, p in list(module.named_parameters()):
                module._parameters[key] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
    optimizer = make_optimizer(model, Optim(name=name, lr=1e-2), **more)
    for step in range(STEPS):
        for number, p in enumerate(model.parameters()):
            grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (number + step + 1)).view(p.shape)
            p.grad = grad if mesh is None else distribute_tensor(grad, mesh, [Shard(0)])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    with averaged(optimizer):
        return [whole(p).detach().clone().numpy() for p in model.parameters()]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _on_shards(rank, name, more):
    return learned(name, init_device_mesh("cpu", (2,)), **more)


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in NAMES), ("adamw", {"ema": 0.5}), ("adamw", {"l1": 0.01})]
)
def test_an_optimizer_does_to_shards_what_it_does_to_the_whole(tmp_path, name, more):
    expected = learned(name, None, **more)
    for found in together(tmp_path, 2, functools.partial(_on_shards, name=name, more=more)):
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-6)
