"""Processes and devices: the process group, the accelerator, and proof that what was asked for runs."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

from llmkit.errors import LostWorkerError, RunError
from llmkit.launch.local import LISTENING
from llmkit.launch.workplace import MEETING
from llmkit.plan import Plan
from llmkit.train.accelerators import backend_of, open_device, placed

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)
"""The others wait so long while the first process exports or proves a large model. One that died is noticed at once,
by its connection; one that was stopped, by our launcher."""


def start_accelerator(plan: Plan) -> Accelerator:
    """Join the other processes of the run and set up this one's device.

    On one machine the processes meet through a file (`LLMKIT_RENDEZVOUS`), so that nothing listens on the
    network; under another launcher through the address it gives.

    Raises:
        MissingError: A package is not installed that torch needs for the device.
        RunError: Fewer processes joined than the plan counts on. accelerate, left alone on CPU, would let each
            train by itself.
    """
    open_device(plan.device, plan.world_size)
    if plan.world_size > 1:
        join_others(plan.device)
    with placed(plan.device) as cpu:
        accelerator = Accelerator(
            cpu=cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=plan.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
    if accelerator.num_processes != plan.world_size:
        raise RunError(f"{accelerator.num_processes} processes joined, the plan counts on {plan.world_size}")
    if accelerator.device.type != plan.device:
        raise RunError(f"the plan is for {plan.device}, but accelerate chose {accelerator.device}")
    return accelerator


def join_others(device: str) -> None:
    """Meet the other processes that the environment speaks of.

    Raises:
        RunError: They were not met.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    meeting = os.environ.get("LLMKIT_RENDEZVOUS")
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # While it waits for the others no Python handler runs: the signals must do what they do by themselves.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        torch.distributed.init_process_group(
            backend=backend_of(device),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=_TIMEOUT,
            **_meeting_of(meeting, world_size),
        )
    except torch.distributed.DistError as error:
        raise RunError(
            f"rank {os.environ['RANK']} could not meet the other {world_size - 1} processes: {error}",
            hint="were all of them started, with the same MASTER_ADDR and MASTER_PORT?",
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _meeting_of(meeting: str | None, world_size: int) -> dict[str, Any]:
    """Where processes meet: at another launcher's address, in a file, or where several nodes were started at rank 0's.

    There rank 0 has from our launcher an open socket, so that nobody can take its port before it listens.
    """
    if not meeting or not meeting.startswith(MEETING):
        return {"init_method": f"file://{meeting}" if meeting else "env://"}
    place, _, token = meeting.removeprefix(MEETING).partition("/")
    host, _, port = place.rpartition(":")
    first = os.environ["RANK"] == "0"
    distributed: Any = torch.distributed  # it gives the stores to everyone but type checkers
    store = distributed.TCPStore(
        host.strip("[]"),
        int(port),
        world_size,
        is_master=first,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=int(os.environ[LISTENING]) if first else None,
    )
    return {"store": distributed.PrefixStore(token, store)}


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Turn the error of a collective whose peer is gone into one that says so.

    gloo raises plain RuntimeErrors, and only their text tells: it begins with the place in gloo's transport.

    Raises:
        LostWorkerError: Another worker has ended, or was not heard of for as long as the process group waits.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's DistBackendError, and DistNetworkError and DistStoreError of the meeting place, are DistErrors.
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport/" not in str(error):
            raise
        reason = (
            re.sub(r"^\[[^\]]*\] ", "", str(error)).split(". ")[0].splitlines()[0]
        )  # without gloo's place
        raise LostWorkerError(
            f"lost the connection to another worker ({reason})",
            hint="What ended it stands above or in the run folder's logs; the newest checkpoint resumes.",
        ) from error


_LAST_MEETING: list[Any] = []
"""Keeps the last collective alive until the process ends."""


def leave() -> None:
    """Wait for the others and close the process group; without this, peers abort."""
    if torch.distributed.is_initialized():
        meeting = torch.distributed.barrier(async_op=True)
        assert meeting is not None
        meeting.wait()
        # Else gloo's own thread may be the last to let go of it, for which it needs Python's lock, while the main
        # thread holds that lock and waits for this very thread in the group's destructor: for ever.
        _LAST_MEETING.append(meeting)
        torch.distributed.destroy_process_group()


def from_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Let the first process decide, and all others take its decision."""
    decision = [decide() if accelerator.is_main_process else None]
    broadcast_object_list(decision)
    result: T = decision[0]  # type: ignore[assignment]
    return result


def any_says(accelerator: Accelerator, yes: bool) -> bool:
    """Whether any process says so: what each can only know of its own machine, and all must do alike."""
    return bool(accelerator.reduce(torch.tensor(int(yes), device=accelerator.device), "sum"))
