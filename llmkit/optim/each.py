"""An optimizer made of one function that updates one parameter."""

from collections.abc import Callable
from typing import Any, overload

import torch

State = dict[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, State, dict[str, Any]], None]
"""(parameter, its gradient, what is remembered of it, its group) -> changes the first and the third in place.

What is remembered are tensors only, so that checkpoints hold all of it. It is empty before the first update.
"""


class EachParameter(torch.optim.Optimizer):
    """Updates each parameter that has a gradient by one function.

    Args:
        groups: With all settings that the function reads.
        update: The function.
    """

    def __init__(self, groups: list[dict[str, Any]], update: Update) -> None:
        self.update = update
        super().__init__(groups, {})
        self.register_load_state_dict_post_hook(_restore_types)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter."""
        assert closure is None, "nothing here evaluates the loss again"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return None


def _restore_types(optimizer: torch.optim.Optimizer) -> None:
    """Codes are bytes: loading makes all of a parameter's state the parameter's type, which holds them exactly."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if name.endswith("_codes"):
                state[name] = tensor.to(torch.uint8)
