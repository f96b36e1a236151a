"""Who shares what: rows, weights and layers, over all processes of a run. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Layout:
    """How many processes share each thing; the product of all is the number of processes.

    Ranks count with `tensor` fastest, then `context`, `expert`, `shard`, `replicate` slowest: who talks most sits
    on one machine.

    Attributes:
        replicate: Groups that hold the model once each and read different rows.
        shard: Processes that share weights, gradients and optimizer of a copy, and read different rows.
        tensor: Processes that share every layer, and read the same rows.
        expert: Processes that share the experts of a layer.
        context: Processes that share every row.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.replicate * self.shard * self.tensor * self.expert * self.context

    @property
    def data_size(self) -> int:
        """Processes, or groups of them, that read different rows."""
        return self.replicate * self.shard

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.world_size != self.replicate

    @property
    def readers(self) -> int:
        """Processes that read the same rows."""
        return self.world_size // self.data_size

    def data_rank(self, rank: int) -> int:
        """Which of `data_size` shares of the rows a process reads."""
        return rank // self.readers

    def speaks(self, rank: int) -> bool:
        """Whether a process counts what was read: the first of those that read the same."""
        return rank % self.readers == 0

    def to_dict(self) -> dict[str, int]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, int]) -> "Layout":
        """What `to_dict` gave."""
        return cls(**plain)
