"""Local steps: processes train by themselves and meet every so many steps, where an outer step brings them together.

Every process has its own weights and its own inner optimizer. At a meeting each sends how far it has moved from where
all began (the anchor); the mean of that is the outer gradient, the outer optimizer (plain, or with Nesterov momentum)
moves the anchor, and all go on from there. The state of the inner optimizer stays with its process.

**Source**: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, algorithm 1 (an outer learning rate of
1 without momentum); Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
algorithm 1; Sutskever et al., 2013, for the momentum, in the form of `torch.optim.SGD(nesterov=True)`.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

_MESSAGE_VALUES = 1 << 24
"""Numbers that are sent at a time: few messages, and little memory beside the model."""


class Meetings:
    """The outer optimizer of one process; every process has the same.

    Args:
        parameters: All that learn, by name; the same on every process at the beginning.
        every: Steps from one meeting to the next.
        lr: The outer learning rate.
        momentum: The outer momentum.
        num_steps: The last step is a meeting too.
        world_size: Processes that meet.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        every: int,
        lr: float,
        momentum: float,
        num_steps: int,
        world_size: int,
    ) -> None:
        self._parameters = dict(parameters)
        self._every = every
        self._lr = lr
        self._momentum = momentum
        self._num_steps = num_steps
        self._world_size = world_size
        self.anchor = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.anchor.items()} if momentum else {}

    def due(self, step: int) -> bool:
        """Whether processes meet when `step` steps have been made."""
        return step % self._every == 0 or step == self._num_steps

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights as they are for the anchor, and let the outer optimizer begin anew."""
        for name, parameter in self._parameters.items():
            self.anchor[name].copy_(parameter)
        for velocity in self.velocity.values():
            velocity.zero_()

    @torch.no_grad()
    def go_on(self, outer: Mapping[str, torch.Tensor]) -> None:
        """Take the outer momentum of a checkpoint, `outer.<name>`."""
        for name, velocity in self.velocity.items():
            if f"outer.{name}" in outer:
                velocity.copy_(outer[f"outer.{name}"])

    def weights(self) -> dict[str, torch.Tensor]:
        """This process's weights, by name."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give this process these weights; the anchor stays."""
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def meet(self) -> None:
        """The outer step: every process calls it, and all have the same weights then."""
        for names in self._messages():
            moved = [self.anchor[name] - self._parameters[name].detach() for name in names]
            message = torch.cat([one.reshape(-1) for one in moved])
            if self._world_size > 1:
                dist.all_reduce(message)
            message /= self._world_size
            start = 0
            for name in names:
                size = self.anchor[name].numel()
                self.step(name, message[start : start + size].view_as(self.anchor[name]))
                start += size

    @torch.no_grad()
    def step(self, name: str, gradient: torch.Tensor) -> None:
        """Move a parameter's anchor along the outer gradient, and the parameter with it.

        Args:
            name: The parameter's.
            gradient: How far processes have moved away from the anchor, in the mean and backwards; used up.
        """
        if self._momentum:
            velocity = self.velocity[name]
            velocity.mul_(self._momentum).add_(gradient)
            gradient = gradient.add_(velocity, alpha=self._momentum)
        anchor = self.anchor[name]
        anchor.sub_(gradient, alpha=self._lr)
        self._parameters[name].copy_(anchor)

    def _messages(self) -> Iterator[list[str]]:
        """The parameters' names, as many at a time as make a message."""
        names: list[str] = []
        values = 0
        for name, parameter in self._parameters.items():
            if names and values + parameter.numel() > _MESSAGE_VALUES:
                yield names
                names, values = [], 0
            names.append(name)
            values += parameter.numel()
        if names:
            yield names
