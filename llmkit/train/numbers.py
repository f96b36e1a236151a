"""What becomes of a loss or a gradient that is not finite: the run stops and names the rows, or leaves that step out.

On a processor every step is looked at before its update. A GPU would have to be waited for, so there the first
bad step is remembered on the device and looked at when figures are recorded or a checkpoint is due; with the policy
`skip` it is waited for at every step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from accelerate import Accelerator

from llmkit.errors import RunError

_ANOTHER_RUN = (
    "a lower `train.optim.lr` or a longer `warmup` makes another run: add --fresh, or give it another `name`"
)
_HINT = (
    "What was saved before is untouched. `pretrain.train.bad_numbers=skip` goes on from it without such steps; "
    f"{_ANOTHER_RUN}."
)


class Numbers:
    """Looks at losses and gradients.

    Args:
        accelerator: To agree with the other processes: all of them stop or skip at the same step.
        policy: The recipe's `bad_numbers`.
        max_skipped: The recipe's `max_skipped`.
        describe: A step, and micro-batches of it or None for all -> its rows in words.
        warn: Tells a person.
        hint: What else may have made numbers infinite.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        policy: Literal["stop", "skip"],
        max_skipped: int,
        describe: Callable[[int, Sequence[int] | None], Sequence[str]],
        warn: Callable[[str], None],
        hint: str = "",
    ) -> None:
        self._hint = f"{_HINT} {hint}".rstrip()
        self._accelerator = accelerator
        self._policy = policy
        self._max_skipped = max_skipped
        self._describe = describe
        self._warn = warn
        self._at_once = policy == "skip" or accelerator.device.type == "cpu"
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    def good(self, step: int, losses: Mapping[int, torch.Tensor], grad_norm: torch.Tensor) -> bool:
        """Whether the update of a step may be made; every process calls this and gets the same answer.

        Args:
            step: Steps made so far.
            losses: This process's parts of the step's loss by the number of their micro-batch.
            grad_norm: The norm of the gradient over all processes.

        Raises:
            RunError: They are not finite, and the policy is to stop.
        """
        if not self._at_once:
            bad = ~torch.isfinite(torch.stack([*losses.values(), grad_norm.detach()])).all()
            # A number in the program of a TPU would make another program of each step.
            at = torch.tensor(step).to(bad.device) if bad.device.type == "tpu" else step
            self._first_bad = torch.where((self._first_bad < 0) & bad, at, self._first_bad)
            return True
        loss = float(self._accelerator.reduce(sum(losses.values(), torch.zeros_like(grad_norm)), "sum"))
        if math.isfinite(loss) and math.isfinite(float(grad_norm)):
            return True
        norm = _word(float(grad_norm))
        said = f"step {step + 1}: the loss is {_word(loss)}, the gradient's norm {norm}"
        micro_batches = self._bad_micro_batches(losses)
        if self._policy == "stop":
            raise RunError(f"{said}: not finite{self._rows(step, micro_batches)}", hint=self._hint)
        first, *others = self._describe(step, micro_batches)
        self._warn(f"{said}: the step is skipped ({first}{', and others' if others else ''})")
        return False

    def look(self) -> None:
        """Raise for a bad step since the last look; waits for the device, and every process calls it.

        Raises:
            RunError: Names the first such step.
        """
        if self._at_once:
            return
        found = [
            int(step) for step in self._accelerator.gather(self._first_bad.reshape(1)).tolist() if step >= 0
        ]
        if found:
            step = min(found)
            raise RunError(
                f"step {step + 1}: the loss or the gradient is not finite{self._rows(step, None)}",
                hint=self._hint,
            )

    def count(self, skipped: int) -> None:
        """End the run when more steps were skipped than the recipe allows.

        Raises:
            RunError: They were.
        """
        if skipped > self._max_skipped:
            raise RunError(
                f"{skipped} steps had losses or gradients that were not finite, and `train.max_skipped` is "
                f"{self._max_skipped}",
                hint=f"What was saved before is untouched; {_ANOTHER_RUN}.",
            )

    def _bad_micro_batches(self, losses: Mapping[int, torch.Tensor]) -> list[int] | None:
        """Of all processes' micro-batches those with a bad loss; None when all losses are good."""
        mine = {number: bool(torch.isfinite(loss)) for number, loss in losses.items()}
        marks = torch.zeros(len(mine) * self._accelerator.num_processes, dtype=torch.int64)
        marks[[number for number, finite in mine.items() if not finite]] = 1
        bad = self._accelerator.reduce(marks, "sum").nonzero().flatten().tolist()
        return bad or None

    def _rows(self, step: int, micro_batches: Sequence[int] | None) -> str:
        where = f"micro-batch {', '.join(map(str, micro_batches))} of it" if micro_batches else "it"
        return f"; {where} holds" + "".join(f"\n  {row}" for row in self._describe(step, micro_batches))


def _word(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
