"""The blocks that a network is a chain of, whatever its architecture."""

from collections.abc import Iterator

from torch import nn


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The layers that a network repeats, in its order: what is sharded, compiled or computed again as one.

    These are the members of its outermost `ModuleList`s that have weights: a decoder's layers, those of an encoder and
    of a teacher beside it. Lists within a layer (experts, the sublayers of T5) belong to it.
    """
    return list(_blocks(module))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _blocks(child)
