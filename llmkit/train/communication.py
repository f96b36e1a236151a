"""What processes send each other of what they learn: gradients at every step, or changed weights every so many steps.

The loop knows neither: it asks an `Exchange` how many processes a gradient is the mean of, what to divide a loss by,
and tells it of every update. DDP sends gradients with the last micro-batch of a step, plain or by one of the hooks
here; for local steps the model is not wrapped, and `Meetings` brings the processes together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from llmkit.errors import RunError
from llmkit.objectives.base import LossModule
from llmkit.plan import Plan
from llmkit.recipe.machine import LocalSteps
from llmkit.train.checkpoint import Checkpoints, Tensors, check_moments, fill_optimizer
from llmkit.train.local_steps import Meetings
from llmkit.train.own import Held, OwnWriter
from llmkit.train.parallel import check_alike
from llmkit.train.powersgd import PowerSGD
from llmkit.train.state import TrainState


def _bf16(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook of torch under another name: by its own, DDP takes it on GPUs only, and gloo adds up bf16 as well."""
    return bf16_compress_hook(group, bucket)


HOOKS = {"fp16": fp16_compress_hook, "bf16": _bf16}
"""Of DDP, by `machine.communication.gradients`."""


class Exchange(Protocol):
    """How what processes learn comes together. Every process has the same."""

    def shares(self, processes: int) -> int:
        """Of `processes` that read different rows, those that a gradient after a backward pass is the mean of."""
        ...

    def counts(self, mine: Mapping[str, int], everyone: Mapping[str, int]) -> Mapping[str, int]:
        """The counts that sums of losses are divided by to learn from: of this process's rows, or of all."""
        ...

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """A gradient's norm, as all processes are told it."""
        ...

    def updated(self, step: int, *, good: bool) -> None:
        """Called after every update; all processes call it.

        Args:
            step: Steps made, this one with them.
            good: Whether weights were changed; not where numbers were not finite.
        """
        ...


class EveryStep:
    """Gradients meet at every step; what compresses them remembers what it has left out.

    Args:
        compressor: Where one is used.
    """

    def __init__(self, compressor: PowerSGD | None = None) -> None:
        self._compressor = compressor

    def shares(self, processes: int) -> int:
        """All of them."""
        return processes

    def counts(self, mine: Mapping[str, int], everyone: Mapping[str, int]) -> Mapping[str, int]:
        """Those of all."""
        return everyone

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """It is the same on all."""
        return norm

    def updated(self, step: int, *, good: bool) -> None:
        """After numbers that were not finite begin anew: what was left out of them would spoil every step to come."""
        if not good and self._compressor is not None:
            self._compressor.begin({})

    def own(self, rank: int, moments: Tensors) -> Tensors:
        """What this process has not sent yet; from the first process also the factors, which are the same on all."""
        assert self._compressor is not None
        return {
            name: tensor
            for name, tensor in self._compressor.tensors().items()
            if rank == 0 or name.startswith("error.")
        }

    def common(self, weights: Tensors) -> Tensors:
        """All of them."""
        return weights

    def begin(self, held: Held | None, rank: int, size: int) -> str:
        """Go on from a checkpoint, or anew; what a person should know of it.

        Args:
            held: What processes had for themselves; None for nothing.
            rank: This process's number.
            size: How many processes there are.
        """
        assert self._compressor is not None
        if held is None or not held.names(0, "error."):
            self._compressor.begin({})
            return ""
        errors = held.of_rank(rank) if held.size == size else held.mean("error.")
        factors = {name: t for name, t in held.of_rank(0).items() if name.startswith("factor.")}
        self._compressor.begin({**errors, **factors})
        if held.size == size:
            return ""
        return f"powersgd: what {held.size} processes had not sent yet is shared equally by {size}"


class ByMeetings:
    """Every process learns from its own rows; weights meet every so many steps.

    Args:
        meetings: The outer optimizer.
        reduce: Adds up over processes.
        size: How many processes there are.
    """

    def __init__(self, meetings: Meetings, reduce: Callable[[torch.Tensor], torch.Tensor], size: int) -> None:
        self._meetings = meetings
        self._reduce = reduce
        self._size = size
        self._apart = False

    def shares(self, processes: int) -> int:
        """None but this one."""
        return 1

    def counts(self, mine: Mapping[str, int], everyone: Mapping[str, int]) -> Mapping[str, int]:
        """Those of this process's rows."""
        return mine

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The mean of all processes' norms: not finite on all where it is not on one."""
        total: torch.Tensor = self._reduce(norm.detach().clone())
        return total / self._size

    def updated(self, step: int, *, good: bool) -> None:
        """Meet, where that is due."""
        self._apart = not self._meetings.due(step)
        if not self._apart:
            self._meetings.meet()

    def own(self, rank: int, moments: Tensors) -> Tensors:
        """This process's optimizer and, between meetings, its weights; from the first one the outer momentum."""
        own = {f"optimizer.{name}": tensor for name, tensor in moments.items()} if rank else {}
        if self._apart:
            own |= {f"weights.{name}": tensor for name, tensor in self._meetings.weights().items()}
        outer = self._meetings.velocity if rank == 0 else {}
        return {**own, **{f"outer.{name}": tensor for name, tensor in outer.items()}}

    def common(self, weights: Tensors) -> Tensors:
        """Those that all processes had after the last meeting."""
        return {**weights, **self._meetings.anchor} if self._apart else weights

    def begin(
        self,
        held: Held | None,
        rank: int,
        size: int,
        *,
        core: LossModule,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
    ) -> str:
        """Go on from a checkpoint whose common part is loaded, or begin; what a person should know of it.

        Args:
            held: What processes had for themselves; None for nothing.
            rank: This process's number.
            size: How many processes there are.
            core: Model and objective.
            optimizer: This process's.
            state: The checkpoint's.
        """
        self._meetings.begin()
        if held is None:
            return ""
        self._meetings.go_on({n: t for n, t in held.of_rank(0).items() if n.startswith("outer.")})
        from_rank = rank % held.size
        found = held.of_rank(from_rank)
        if from_rank:
            moments = _named(found, "optimizer.")
            forms = {name: (tensor.shape, tensor.dtype) for name, tensor in moments.items()}
            check_moments(forms, core.trained, optimizer, state, held.path)
            fill_optimizer(core.trained, optimizer, moments)
        apart = bool(held.names(0, "weights."))
        if apart and held.size == size:
            self._meetings.set_weights(_named(found, "weights."))
            self._apart = True
        elif apart:
            self._meetings.set_weights(_named(held.mean("weights."), "weights."))
            self._meetings.meet()
        if held.size == size:
            return ""
        met = "; they met first, for they were between two meetings" if apart else ""
        return (
            f"local_steps: {size} processes go on from the inner optimizers of {held.size}, which another number of "
            f"processes cannot do exactly{met}"
        )


def _named(tensors: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def local_steps_of(plan: Plan) -> LocalSteps | None:
    """How processes meet; None where gradients do at every step."""
    found = plan.communication.get("local_steps")
    return LocalSteps.model_validate(found) if found else None


class Communicator:
    """A run's way to exchange, from the preparation of its model to the writer of its checkpoints.

    Args:
        plan: Says which.
        accelerator: The processes.
        seed: The run's.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator, seed: int) -> None:
        self._local = local_steps_of(plan)
        self._communication = plan.communication
        self._layout = plan.layout
        self._accelerator = accelerator
        self._seed = seed
        self._compressor: PowerSGD | None = None

    def prepare(self, core: LossModule, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimizer as the accelerator prepares them, so that gradients travel as asked for.

        Raises:
            RunError: Processes have built different weights, or no gradients would travel.
        """
        if self._local is not None:
            core.to(self._accelerator.device)
            if self._accelerator.num_processes > 1:
                check_alike(core)
            return core, self._accelerator.prepare(optimizer)
        module, optimizer = self._accelerator.prepare(core, optimizer)
        if self._accelerator.num_processes > 1:
            self._register(module, core)
        return module, optimizer

    def _register(self, module: torch.nn.Module, core: LossModule) -> None:
        if not isinstance(module, DistributedDataParallel):
            raise RunError(
                f"gradients would not travel: accelerate made a {type(module).__name__} of the model"
            )
        gradients = self._communication.get("gradients", "fp32")
        if gradients in HOOKS:
            module.register_comm_hook(None, HOOKS[gradients])
        elif gradients == "powersgd":
            self._compressor = PowerSGD(
                _learning(core),
                rank=self._communication["rank"],
                seed=self._seed,
                world_size=self._accelerator.num_processes,
            )
            module.register_comm_hook(None, self._compressor.hook)

    def begin(
        self,
        core: LossModule,
        optimizer: torch.optim.Optimizer,
        saved: Path | None,
        state: TrainState,
        num_steps: int,
        note: Callable[[str], None],
    ) -> tuple[Exchange, Callable[[Checkpoints], OwnWriter] | None]:
        """The exchange as the run begins or goes on; and the maker of a writer, where processes have their own to save.

        To be called after the last backward pass on made-up rows, which must leave nothing behind.

        Args:
            core: Model and objective, what all have in common loaded.
            optimizer: Likewise.
            saved: The checkpoint that the run goes on from.
            state: Its state.
            num_steps: The run's length.
            note: Told what a person should know.
        """
        rank, size = self._accelerator.process_index, self._accelerator.num_processes
        held = Held.of(saved) if saved is not None else None
        if self._local is None and self._compressor is None:
            if held is not None and held.names(0, "error."):
                note(self._take_unsent(core, held))
            return EveryStep(), None
        exchange: EveryStep | ByMeetings
        if self._local is None:
            exchange = EveryStep(self._compressor)
            said = exchange.begin(held, rank, size)
        else:
            meetings = Meetings(
                _learning(core),
                every=self._local.every,
                lr=self._local.lr,
                momentum=self._local.momentum,
                num_steps=num_steps,
                world_size=size,
            )
            exchange = ByMeetings(meetings, lambda one: self._accelerator.reduce(one, "sum"), size)
            said = exchange.begin(held, rank, size, core=core, optimizer=optimizer, state=state)
        if said:
            note(said)
        return exchange, lambda checkpoints: OwnWriter(checkpoints, exchange)

    def _take_unsent(self, core: LossModule, held: Held) -> str:
        """Add to the next gradient what PowerSGD had not sent, where it sends no more; what to say of that."""
        if self._layout.is_sharded:
            return (
                f"powersgd: what {held.size} processes had not sent yet is lost, for the model is sharded now"
            )
        for name, parameter in _learning(core).items():
            error = held.mean(f"error.{name}").get(f"error.{name}")
            if error is not None:
                parameter.grad = error.to(parameter.device)
        return f"powersgd: what {held.size} processes had not sent yet goes into the next step"


def _learning(core: LossModule) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in core.trained.named_parameters() if p.requires_grad}
