"""A model over a whole split: sums, then metrics. Training, `llmkit eval` and the tests use this same code."""

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator

from llmkit.objectives.base import Batch, LossModule


def sum_over(core: LossModule, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Add up loss and targets over this process's batches, and then over all processes.

    No logits are gathered and no batch is padded to another's size, so nothing is counted twice; the result
    does not depend on the number of processes.

    Args:
        core: Model and objective; its compiled form is passed by, for batches of every size come here.
        batches: This process's share, on the device.
        accelerator: For the reduction.

    Returns:
        `total` (nats), `num_targets`, and the objective's further sums.
    """
    training = core.training
    core.eval()
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for batch in batches:
            loss = core.forward(batch)
            for name, value in {
                **loss.sums,
                "total": loss.total,
                "num_targets": batch["num_targets"],
            }.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
    core.train(training)
    return _reduce(sums, accelerator)


def _reduce(sums: Mapping[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    # A process may have had no batch at all; it still takes part, with zeros.
    names = sorted({"total", "num_targets", *sums})
    zero = torch.zeros((), dtype=torch.float64)
    values = torch.stack([sums.get(name, zero) for name in names])
    return dict(zip(names, accelerator.reduce(values, "sum").tolist(), strict=True))
