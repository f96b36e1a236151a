"""What a step must know of all its rows before gradients: of a task that compares them with each other."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from llmkit.objectives.base import LooksAhead
from llmkit.train.parallel import readable
from llmkit.train.state import mix_seed

if TYPE_CHECKING:
    from llmkit.train.loop import MicroBatch, Training


def look_ahead(run: "Training", step: int, micro_batches: "Sequence[MicroBatch]") -> "Sequence[MicroBatch]":
    """The micro-batches with what the task says of them when it has seen all of the step, on every process.

    Each is computed once without gradients, by the same seed, so that dropout is as in the step itself. A step of a
    single micro-batch needs none of this: it sees itself.

    Args:
        run: The parts.
        step: Steps made so far.
        micro_batches: This process's share of the step.
    """
    objective, accelerator = run.core.objective, run.accelerator
    world, rank = accelerator.num_processes // run.readers, accelerator.process_index // run.readers
    if not (isinstance(objective, LooksAhead) and objective.looks_ahead) or world * len(micro_batches) == 1:
        return micro_batches
    seen: list[Mapping[str, torch.Tensor]] = []
    device = accelerator.device.type
    for index, batch in micro_batches:
        torch.manual_seed(mix_seed(run.seed, step, index))
        bf16 = torch.autocast(device, dtype=torch.bfloat16, enabled=run.core.bf16)
        with torch.no_grad(), bf16, readable(run.core):
            mine = objective.glimpse(run.core.model, batch)
        seen += _of_all(accelerator, mine)[:: run.readers]
    settled = objective.settle(seen, run.core.criterion)
    return [
        (index, {**batch, **settled[number * world + rank]})
        for number, (index, batch) in enumerate(micro_batches)
    ]


def _of_all(accelerator: Accelerator, mine: Mapping[str, torch.Tensor]) -> list[Mapping[str, torch.Tensor]]:
    """The same of every process, in their order; the first dimensions may differ."""
    if accelerator.num_processes == 1:
        return [mine]
    sizes = torch.tensor([[len(tensor) for tensor in mine.values()]], device=accelerator.device)
    sizes_by_rank = accelerator.gather(sizes).tolist()
    gathered = {}
    for name, tensor in mine.items():
        filled = accelerator.pad_across_processes(tensor, dim=0)
        whole = accelerator.gather(filled.contiguous())
        gathered[name] = whole.reshape(accelerator.num_processes, -1, *tensor.shape[1:])
    return [
        {name: gathered[name][rank, :size] for name, size in zip(mine, of_rank, strict=True)}
        for rank, of_rank in enumerate(sizes_by_rank)
    ]
