"""PowerSGD: of each gradient matrix two thin ones are sent, and what they leave out is added to the next gradient.

A hook of DDP. It differs from torch's own in three ways. What it remembers is kept by parameter, not by the number of a
bucket, which DDP cuts anew as it likes: so it can be saved, loaded and compared. All that it sends is sent from one
thread in one order, so processes never answer each other's messages. And a bucket takes two messages, not three: its
first factors travel with what is sent whole.

Shapes: a gradient of n rows and m columns (all dimensions but the first), factors P [n, r] and Q [m, r].

**Source**: Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, algorithms 1 and 2, with warm start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket

from llmkit.plan.communication import factor_rank
from llmkit.train.state import mix_seed

_FACTORS = 1 << 43  # keeps the seeds of first factors apart from those of micro-batches


@dataclass
class _Sent:
    """A bucket under way.

    Attributes:
        bucket: What DDP has handed over.
        done: What DDP waits for.
        thin: Its gradients that travel as factors, each with its parameter's number.
        whole: The others.
        message: What was sent first: the factors P, then the others.
        work: The sending of it.
    """

    bucket: GradBucket
    done: torch.futures.Future[torch.Tensor]
    thin: list[tuple[int, torch.Tensor]]
    whole: list[torch.Tensor]
    message: torch.Tensor
    work: Any


class PowerSGD:
    """Compresses the gradients of one process; `hook` is what DDP calls.

    Args:
        parameters: All that learn, by name; the same in the same order on every process.
        rank: The rank of what is sent.
        seed: Of the first factors.
        world_size: Processes whose gradients are averaged.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, rank: int, seed: int, world_size: int
    ) -> None:
        self._names = list(parameters)
        self._number = {id(parameter): number for number, parameter in enumerate(parameters.values())}
        self._rank = rank
        self._seed = seed
        self._world_size = world_size
        self._under_way: list[_Sent] = []
        self.errors: dict[int, torch.Tensor] = {}
        self.factors: dict[int, torch.Tensor] = {}
        for number, parameter in enumerate(parameters.values()):
            if factor_rank(parameter.shape, rank):
                self.errors[number] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                self.factors[number] = self._first_factor(number, parameter)

    def _first_factor(self, number: int, like: torch.Tensor) -> torch.Tensor:
        columns = like.numel() // like.shape[0]
        generator = torch.Generator().manual_seed(mix_seed(self._seed, _FACTORS, number))
        made = torch.randn(columns, factor_rank(like.shape, self._rank), generator=generator)
        return made.to(like.device, like.dtype)

    def begin(self, held: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave, or from nothing: what is not there begins anew."""
        for number, error in self.errors.items():
            name = self._names[number]
            error.zero_()
            if f"error.{name}" in held:
                error.copy_(held[f"error.{name}"])
            known = held.get(f"factor.{name}")
            self.factors[number].copy_(self._first_factor(number, error) if known is None else known)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is remembered: `error.<name>`, this process's own, and `factor.<name>`, the same on all."""
        errors = {f"error.{self._names[number]}": error for number, error in self.errors.items()}
        return errors | {f"factor.{self._names[number]}": q for number, q in self.factors.items()}

    def hook(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Send a bucket's first message; with the last bucket of a backward pass, finish all of them."""
        device = bucket.buffer().device
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=None if device.type == "cpu" else [device]
        )
        self._under_way.append(self._send_first(bucket, done))
        if bucket.is_last():
            under_way, self._under_way = self._under_way, []
            second = [self._send_second(sent) for sent in under_way]
            for sent, (message, work) in zip(under_way, second, strict=True):
                work.wait()
                self._restore(sent, message)
                sent.done.set_result(sent.bucket.buffer())
        return done

    def _send_first(self, bucket: GradBucket, done: torch.futures.Future[torch.Tensor]) -> _Sent:
        thin, whole, parts = [], [], []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            number = self._number[id(parameter)]
            if number not in self.errors:
                whole.append(gradient)
                continue
            gradient.add_(self.errors[number])
            self.errors[number].copy_(gradient)  # until it is known what is left out of it
            thin.append((number, gradient))
            parts.append((_matrix(gradient) @ _orthogonal(self.factors[number])).reshape(-1))
        message = torch.cat([*parts, *(gradient.reshape(-1) for gradient in whole)])
        work = dist.all_reduce(message, async_op=True)
        return _Sent(bucket, done, thin, whole, message, work)

    def _send_second(self, sent: _Sent) -> tuple[torch.Tensor, Any]:
        """Take the summed factors P, and send the factors Q that belong to them."""
        sent.work.wait()
        shapes = [(gradient.shape[0], self.factors[number].shape[1]) for number, gradient in sent.thin]
        *summed, rest = _cut(sent.message, shapes)
        for gradient, mean in zip(sent.whole, _cut(rest, [g.shape for g in sent.whole]), strict=False):
            gradient.copy_(mean / self._world_size)
        parts = []
        for (_, gradient), p in zip(sent.thin, summed, strict=True):
            p.copy_(_orthogonal(p))
            parts.append((_matrix(gradient).t() @ p).reshape(-1))
        message = torch.cat(parts) if parts else rest.new_zeros(0)
        work = dist.all_reduce(message, async_op=True) if parts else _Nothing()
        return message, work

    def _restore(self, sent: _Sent, message: torch.Tensor) -> None:
        """Make the gradient that all processes take of its factors, and remember what it leaves out of one's own."""
        factors = [self.factors[number] for number, _ in sent.thin]
        shapes = [
            (gradient.shape[0], q.shape[1]) for (_, gradient), q in zip(sent.thin, factors, strict=True)
        ]
        lefts = _cut(sent.message, shapes)
        rights = _cut(message, [q.shape for q in factors])
        for (number, gradient), p, q in zip(sent.thin, lefts, rights, strict=False):
            self.factors[number].copy_(q / self._world_size)
            gradient.copy_((p @ self.factors[number].t()).view(gradient.shape))
            self.errors[number].sub_(gradient)


class _Nothing:
    def wait(self) -> None:
        pass


def _matrix(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.reshape(gradient.shape[0], -1)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The same columns made orthogonal, of length 1; columns that depend on others become others."""
    return torch.linalg.qr(matrix).Q


def _cut(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Pieces of these shapes from the front, and last what is left."""
    found, start = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        found.append(flat[start : start + size].view(*shape))
        start += size
    return [*found, flat[start:]]
