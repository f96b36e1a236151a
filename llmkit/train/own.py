"""What each process has for itself, in a checkpoint: `own.rank-00001.safetensors` beside what all have in common.

Processes that take local steps have an optimizer each, and between two meetings weights each; processes that compress
gradients each remember what they have not sent yet. All of it is saved with the checkpoint, every process its part, so
that the same number of processes goes on to the last bit. Another number of processes goes on from the means.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llmkit.durable import foreign_write, write_folder, write_json
from llmkit.durable.calls import sync_path
from llmkit.errors import RunError
from llmkit.train.checkpoint import (
    FORMAT,
    Checkpoints,
    Tensors,
    is_whole,
    model_tensors,
    optimizer_tensors,
)
from llmkit.train.state import TrainState
from llmkit.train.together import Together, check_seen

_OWN = "own/"


@dataclass(frozen=True)
class Held:
    """What the processes of a checkpoint had for themselves.

    Attributes:
        path: The checkpoint, verified.
        size: How many processes there were.
    """

    path: Path
    size: int

    @classmethod
    def of(cls, path: Path) -> "Held | None":
        """What is in this checkpoint; None: nothing.

        Raises:
            RunError: Of some process it is not there.
        """
        files = sorted(path.glob("own.rank-*.safetensors"))
        if not files:
            return None
        with safe_open(files[0], framework="pt") as opened:
            size = int((opened.metadata() or {}).get("processes", 0))
        if [file.name for file in files] != [_file(rank) for rank in range(size)]:
            raise RunError(f"{path}: what {size} processes had for themselves, in {len(files)} files")
        return cls(path, size)

    def of_rank(self, rank: int) -> dict[str, torch.Tensor]:
        """All that a process had."""
        return load_file(self.path / _file(rank))

    def names(self, rank: int, start: str) -> list[str]:
        """The names of a process's tensors that begin so."""
        with safe_open(self.path / _file(rank), framework="pt") as opened:
            return [name for name in opened.keys() if name.startswith(start)]  # noqa: SIM118, not a mapping

    def mean(self, start: str) -> dict[str, torch.Tensor]:
        """The mean over all processes of the tensors whose names begin so; one process's are in memory at a time."""
        sums: dict[str, torch.Tensor] = {}
        for rank in range(self.size):
            with safe_open(self.path / _file(rank), framework="pt") as opened:
                for name in self.names(rank, start):
                    tensor = opened.get_tensor(name)
                    sums[name] = sums[name].add_(tensor) if name in sums else tensor
        return {name: tensor / self.size for name, tensor in sums.items()}


class Owner(Protocol):
    """Has tensors that belong to one process, and knows what all processes have in common."""

    def own(self, rank: int, moments: Tensors) -> Tensors:
        """What is to be saved of this process only.

        Args:
            rank: Its number.
            moments: Its optimizer's tensors.
        """
        ...

    def common(self, weights: Tensors) -> Tensors:
        """The weights as all processes have them in common, in place of this process's."""
        ...


class OwnWriter:
    """One process's part in saving: a writer for `Saver`, on every process.

    Args:
        checkpoints: Where, and the identity of the run.
        owner: Of what is saved beside the rest.
    """

    def __init__(self, checkpoints: Checkpoints, owner: Owner) -> None:
        self._checkpoints = checkpoints
        self._owner = owner
        self._all = Together()

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
        """What this process writes, where it is now; what it has for itself is among the moments."""
        moments = optimizer_tensors(model, optimizer)
        own = {_OWN + name: tensor for name, tensor in self._owner.own(self._all.rank, moments).items()}
        if self._all.rank:
            return {}, own
        return self._owner.common(model_tensors(model)), {**moments, **own}

    def write(
        self,
        weights: Tensors,
        moments: Tensors,
        state: TrainState,
        *,
        before_writing: Callable[[], None] = lambda: None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write the checkpoint of `state` together with all other processes; a whole one stays as it is.

        Args:
            weights: As of `tensors`, on the host.
            moments: As of `tensors`, on the host.
            state: The state they belong to.
            before_writing: Called on every process first; what it raises stops the save on all.
            before_publishing: Called on the first process when all is written and nothing is visible yet.

        Raises:
            RunError: A process could not write, or was lost.
        """
        path, doing = self._checkpoints.path(state.step), f"saving to {self._checkpoints.folder}"
        with ExitStack() as stack:
            self._all.do(before_writing, doing)
            folder = self._all.do(lambda: self._begin(stack, path, state), doing)[0]
            if folder is None:
                return path
            sizes = self._all.do(lambda: self._write(folder, weights, moments), doing)
            self._all.do(lambda: self._publish(stack, folder, sizes, state, before_publishing), doing)
        return path

    def close(self) -> None:
        """Wait for the others; before the process group is destroyed, and after the last `write`."""
        self._all.close()

    def _begin(self, stack: ExitStack, path: Path, state: TrainState) -> Path | None:
        """The temporary folder, on the first process; None where the checkpoint is whole already."""
        if self._all.rank or is_whole(path):
            return None
        return stack.enter_context(write_folder(path, facts={"step": state.step, "format": FORMAT}))

    def _write(self, folder: Path, weights: Tensors, moments: Tensors) -> dict[str, int]:
        """Write this process's files; return their names and sizes."""
        own = {name.removeprefix(_OWN): t for name, t in moments.items() if name.startswith(_OWN)}
        files: dict[str, Tensors] = {_file(self._all.rank): own}
        if not self._all.rank:
            files["model.safetensors"] = weights
            files["optimizer.safetensors"] = {n: t for n, t in moments.items() if not n.startswith(_OWN)}
        for name, tensors in files.items():
            with foreign_write(folder / name):
                save_file(dict(tensors), folder / name, metadata={"processes": str(self._all.size)})
            sync_path(folder / name)  # by who wrote it: another machine's fsync knows nothing of it
        return {name: (folder / name).stat().st_size for name in files}

    def _publish(
        self,
        stack: ExitStack,
        folder: Path,
        sizes: list[dict[str, int]],
        state: TrainState,
        before_publishing: Callable[[], None],
    ) -> None:
        if self._all.rank:
            return
        for rank, wanted in enumerate(sizes):
            check_seen(folder, rank, wanted)
        write_json(folder / "state.json", self._checkpoints.record(state))
        before_publishing()
        stack.close()


def _file(rank: int) -> str:
    return f"own.rank-{rank:05d}.safetensors"
