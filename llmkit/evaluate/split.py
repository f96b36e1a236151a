"""A model over a whole split: sums, then metrics. Training, `llmkit eval` and the tests use this same code."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmkit.objectives.base import TARGETS, Batch, LossModule

ROW_NUMBERS = "row_numbers"
"""In a batch: the number of each of its rows in their part, where what is found of them is kept."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


def sum_over(
    core: LossModule,
    batches: Iterable[Batch | None],
    reduce: Reduce = torch.clone,
    between: Callable[[], object] = lambda: None,
    found: dict[int, Any] | None = None,
    spare: Batch | None = None,
) -> dict[str, float]:
    """Add up loss and targets over this process's batches, and then over all processes.

    No logits are gathered and no batch is padded to another's size, so nothing is counted twice; the result
    does not depend on the number of processes.

    Args:
        core: Model and objective; its compiled form is passed by, for batches of every size come here.
        batches: This process's share, on the device; None where it has no batch left and others have.
        reduce: A vector of sums -> the same over all processes; by default there is one process.
        between: Called before each batch; what it raises ends the measurement.
        found: Takes what the model says of each row that this process measures, by the row's number.
        spare: Where processes share the weights: what one computes, and does not count, while it has no batch left, for
            the others cannot without it.

    Returns:
        `total` (nats, of `num_targets`), every count of the batches, and the objective's further sums.
    """
    training = core.training
    core.eval()
    sums: dict[str, torch.Tensor] = {}
    try:
        for batch in batches:
            between()
            if batch is None and spare is not None:
                _measure(core, spare, None)
            for name, value in _measure(core, batch, found).items() if batch is not None else ():
                # In float64, on the host: not every device has it.
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    finally:
        core.train(training)
    # A process may have had no batch at all; it still takes part, with zeros for every sum the objective has.
    names = sorted({"total", TARGETS, *core.objective.sums})
    unnamed = sorted(set(sums) - set(names))
    assert not unnamed, (
        f"{type(core.objective).__name__}.sums lacks {unnamed}"
    )  # else the processes would not meet
    values = torch.stack([sums.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
    return dict(zip(names, reduce(values).tolist(), strict=True))


@torch.inference_mode()
def _measure(core: LossModule, batch: Batch, found: dict[int, Any] | None) -> dict[str, torch.Tensor]:
    loss = core.forward(batch)
    if found is not None and loss.found:
        found |= dict(zip(batch[ROW_NUMBERS].tolist(), loss.found, strict=True))
    counts = {name: count for name, count in batch.items() if name.startswith("num_")}
    return {**loss.sums, "total": loss.totals[TARGETS], **counts}
