"""Muon for hidden matrices and AdamW for all else, as one optimizer."""

from collections.abc import Callable
from typing import Any, overload

import torch

from llmkit.optim.each import EachParameter
from llmkit.optim.rules import muon


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the groups with `muon: True`, torch's AdamW on the others.

    Both work on this optimizer's own groups and state, so it saves, loads and steps as one.

    Args:
        groups: Each with `muon`, `lr`, `weight_decay`, and AdamW's and Muon's further settings.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()

    def _join(self) -> None:
        """Let both parts work on the groups and the state as they are now."""
        matrices = [group for group in self.param_groups if group["muon"]]
        others = [group for group in self.param_groups if not group["muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(EachParameter(matrices, update=muon))
        if others:
            # AdamW's settings are in the groups; a group made for tensors without content says `fused: False`.
            fused = all(group.get("fused", True) for group in others)
            self._parts.append(torch.optim.AdamW(others, fused=fused))
        for part in self._parts:
            part.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by each part."""
        assert closure is None, "nothing here evaluates the loss again"
        for part in self._parts:
            part.step()
        return None
