"""Linear layer and cross-entropy as one operation that never holds more logits than a chunk of rows.

The gradient is taken in the forward pass, chunk by chunk, while the logits are still in the cache; so logits are
made once, and neither they nor their gradient are ever kept. To torch.compile the operation is opaque.

Shape suffixes: N rows (positions), R rows that have a target, C rows of one chunk, H hidden size, V vocabulary.

**Source**: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2 (gradient in the
forward pass, chunked); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

NOT_LEARNED = -100
"""The target of a row that is not in the loss."""

_CHUNK_BYTES = {"cpu": 2**25}
"""Logits in float32 that exist at one time: on CPU what stays in a server's last-level cache (measured: 256 to 1024
rows of 16k logits are equally fast, 64 rows 1.25 times slower)."""
_CHUNK_BYTES_ELSEWHERE = 2**28
_FEWEST_ROWS = 128
_ENTRIES_MULTIPLE = {"cuda": 128}
"""The number of entries that matrix products are computed for is a multiple of this: the matrix units of a GPU read
rows of a round length several times faster."""


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    gather: bool | None = None,
    num_targets: torch.Tensor | None = None,
    multiple: int | None = None,
) -> torch.Tensor:
    """The sum of -log softmax(hidden @ weight.T + bias)[target] over the rows that have a target, in nats.

    Equal to `F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")`, for less time and memory.
    Matrix products are in the autocast type where autocast is on, else in the type of `hidden_NH`; softmax and sum
    are in float32.

    Args:
        hidden_NH: What the head reads.
        weight_VH: The head; may be tied to the embedding.
        targets_N: Vocabulary ids; -100 for a row that is not in the loss.
        bias: The head's bias, V long.
        label_smoothing: The share of each target's probability that is spread evenly over the vocabulary.
        z_loss: Adds so many times the square of each row's log-normaliser (log of the sum of exp of its logits).
        chunk_rows: Rows whose logits exist at one time; by default what suits the device.
        gather: Leave rows without a target out of the computation. That asks how many there are, which on a GPU
            waits for the device; so by default it is done on CPU only, and elsewhere such rows count as zeros. Ask
            for it where few rows have a target.
        num_targets: How many rows have a target, on the host: then gathering them waits for nothing.
        multiple: Fill the head up with entries that have no probability, to a multiple of this; the result is the
            same. By default on GPUs, where the head is copied to another type anyway.

    Returns:
        A scalar in float32 (in float64 for float64 input).

    **Source**: smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
    z-loss: Chowdhery et al., "PaLM", 2022, section 5.
    """
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "chunk_rows": chunk_rows or _chunk_rows(weight_VH),
        "gather": hidden_NH.device.type == "cpu" if gather is None else gather,
        "num_targets": num_targets,
        "multiple": _multiple(hidden_NH, weight_VH) if multiple is None else multiple,
        "compute_dtype": _compute_dtype(hidden_NH),
    }
    learns = [t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias)]
    if not (torch.is_grad_enabled() and any(learns)):
        return _row_nll(hidden_NH, weight_VH, targets_N, bias, **options).sum()
    total, *_ = _total_with_gradients(hidden_NH, weight_VH, targets_N, bias, learns=learns, **options)
    return total


def nll_of_logits(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """The same sum for logits that exist already; see `linear_cross_entropy`."""
    wide_NV = logits_NV.float() if logits_NV.dtype != torch.float64 else logits_NV
    total = functional.cross_entropy(
        wide_NV, targets_N, ignore_index=NOT_LEARNED, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        squares_N = torch.logsumexp(wide_NV, 1).square()
        total = total + z_loss * squares_N.masked_fill(targets_N == NOT_LEARNED, 0.0).sum()
    return total


def linear_nll(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    gather: bool | None = None,
) -> torch.Tensor:
    """Each row's -log softmax(hidden @ weight.T + bias)[target] in nats, without gradient; see `linear_cross_entropy`.

    Returns:
        N values in float32 (in float64 for float64 input), 0 where there is no target.
    """
    with torch.no_grad():
        return _row_nll(
            hidden_NH,
            weight_VH,
            targets_N,
            bias,
            label_smoothing=0.0,
            z_loss=0.0,
            chunk_rows=chunk_rows or _chunk_rows(weight_VH),
            gather=hidden_NH.device.type == "cpu" if gather is None else gather,
            num_targets=None,
            multiple=_multiple(hidden_NH, weight_VH),
            compute_dtype=_compute_dtype(hidden_NH),
        )


def _chunk_rows(weight_VH: torch.Tensor) -> int:
    budget = _CHUNK_BYTES.get(weight_VH.device.type, _CHUNK_BYTES_ELSEWHERE)
    return max(_FEWEST_ROWS, budget // (4 * weight_VH.shape[0]))


def _multiple(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> int:
    copied = _compute_dtype(hidden_NH) != weight_VH.dtype
    return _ENTRIES_MULTIPLE.get(weight_VH.device.type, 1) if copied else 1


def _filled(weight_VH: torch.Tensor, dtype: torch.dtype, multiple: int) -> torch.Tensor:
    """The weight in `dtype`, with rows of zeros up to a multiple."""
    size = -(-len(weight_VH) // multiple) * multiple
    if size == len(weight_VH):
        return weight_VH.to(dtype)
    filled = weight_VH.new_zeros(size, weight_VH.shape[1], dtype=dtype)
    filled[: len(weight_VH)] = weight_VH
    return filled


def _compute_dtype(hidden_NH: torch.Tensor) -> torch.dtype:
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device) and hidden_NH.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype


@dataclass(frozen=True)
class _Rows:
    """The rows that are computed, and where they stand among all.

    Attributes:
        hidden: R rows in the type that is computed with.
        targets: R vocabulary ids; -100 only where rows were not gathered.
        index: Where the R rows stand among the N; None when they are all.
        masked: Whether `targets` may hold -100.
    """

    hidden_RH: torch.Tensor
    targets_R: torch.Tensor
    index_R: torch.Tensor | None
    masked: bool

    @classmethod
    def take(
        cls,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        *,
        gather: bool,
        count: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> "_Rows":
        if not gather:
            return cls(hidden_NH.to(dtype), targets_N, None, masked=True)
        index = places_of(targets_N, count)
        if len(index) == len(targets_N):
            return cls(hidden_NH.to(dtype), targets_N, None, masked=False)
        return cls(hidden_NH[index].to(dtype), targets_N[index], index, masked=False)

    def put_back(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows computed for the R -> the type and length of `like`, zero where nothing was computed."""
        if self.index_R is None:
            return rows.to(like.dtype)
        full = torch.zeros((len(like), *rows.shape[1:]), dtype=like.dtype, device=rows.device)
        return full.index_copy_(0, self.index_R, rows.to(like.dtype))


class _Chunks:
    """Goes through the rows chunk by chunk; the buffer of logits is made once and used again.

    Args:
        rows: The rows.
        weight_VH: The head, perhaps with more rows than there are entries.
        bias_V: Its bias.
        chunk_rows: Rows of a chunk.
        entries: Entries of the vocabulary; the logits of further ones are minus infinity.
    """

    def __init__(
        self,
        rows: _Rows,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        *,
        chunk_rows: int,
        entries: int,
    ) -> None:
        self._rows = rows
        self._entries = entries
        self._weight_HV = weight_VH.t()
        self._bias_V = bias_V
        self._chunk_rows = max(1, min(chunk_rows, len(rows.targets_R)))
        self._wide = torch.promote_types(weight_VH.dtype, torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Pairs of the chunk's place and its logits, which the next chunk overwrites."""
        hidden, num_rows = self._rows.hidden_RH, len(self._rows.targets_R)
        narrow = hidden.new_empty(self._chunk_rows, self._weight_HV.shape[1])
        wide = narrow if narrow.dtype == self._wide else narrow.to(self._wide)
        for start in range(0, num_rows, self._chunk_rows):
            place = slice(start, min(start + self._chunk_rows, num_rows))
            size = place.stop - place.start
            torch.mm(hidden[place], self._weight_HV, out=narrow[:size])
            logits_CV = wide[:size]
            if wide is not narrow:
                logits_CV.copy_(narrow[:size])
            if self._bias_V is not None:
                logits_CV[:, : self._entries] += self._bias_V
            if self._entries < logits_CV.shape[1]:
                logits_CV[:, self._entries :] = -torch.inf
            yield place, logits_CV


@dataclass(frozen=True)
class _Form:
    """What is asked of a row: `label_smoothing`, `z_loss` as `linear_cross_entropy` takes them; of how many entries."""

    smoothing: float
    z: float
    entries: int

    def losses(
        self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *, masked: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn logits into probabilities in place; return each row's loss, its usable target, its log-normaliser.

        The log-normaliser is max - log p(argmax), where p(argmax) >= 1/V never underflows. The loss is that minus the
        target's logit, and with smoothing some of the mean of the logits in its stead.
        """
        index_C1 = (targets_C.clamp(min=0) if masked else targets_C).unsqueeze(1)
        aim_C1 = logits_CV.gather(1, index_C1)
        if self.smoothing:
            aim_C1.lerp_(logits_CV[:, : self.entries].mean(1, keepdim=True), self.smoothing)
        max_C1 = logits_CV.amax(1, keepdim=True)
        torch.softmax(logits_CV, 1, out=logits_CV)
        log_normaliser_C1 = max_C1 - logits_CV.amax(1, keepdim=True).log_()
        loss_C1 = log_normaliser_C1 - aim_C1
        if self.z:
            loss_C1 += self.z * log_normaliser_C1.square()
        loss_C = loss_C1.squeeze(1)
        if masked:
            loss_C = loss_C.masked_fill_(targets_C == NOT_LEARNED, 0.0)
        return loss_C, index_C1, log_normaliser_C1

    def by_logits(
        self, softmax_CV: torch.Tensor, index_C1: torch.Tensor, log_normaliser_C1: torch.Tensor
    ) -> torch.Tensor:
        """The gradient by the logits, in place: softmax minus what the target is to be, and the z-loss's."""
        if self.z:
            softmax_CV.mul_(1 + 2 * self.z * log_normaliser_C1)
        if self.smoothing:
            softmax_CV[:, : self.entries].sub_(self.smoothing / self.entries)
        return softmax_CV.scatter_add_(1, index_C1, softmax_CV.new_full(index_C1.shape, self.smoothing - 1.0))


@torch.library.custom_op("llmkit::linear_nll", mutates_args=())
def _row_nll(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    gather: bool,
    num_targets: torch.Tensor | None,
    multiple: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Each row's loss, no gradient."""
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rows = _Rows.take(hidden_NH, targets_N, gather=gather, count=num_targets, dtype=compute_dtype)
        nll_R = _new_like(targets_N, len(rows.targets_R), compute_dtype)
        weight, entries = _filled(weight_VH, compute_dtype, multiple), len(weight_VH)
        form = _Form(label_smoothing, z_loss, entries)
        for place, logits_CV in _Chunks(rows, weight, bias_V, chunk_rows=chunk_rows, entries=entries):
            nll_R[place], *_ = form.losses(logits_CV, rows.targets_R[place], masked=rows.masked)
        return rows.put_back(nll_R, _new_like(targets_N, len(targets_N), compute_dtype))


@torch.library.custom_op("llmkit::linear_cross_entropy", mutates_args=())
def _total_with_gradients(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    learns: list[bool],
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    gather: bool,
    num_targets: torch.Tensor | None,
    multiple: int,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses and its gradients by hidden, weight and bias; empty where not asked for."""
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rows = _Rows.take(hidden_NH, targets_N, gather=gather, count=num_targets, dtype=compute_dtype)
        weight, entries = _filled(weight_VH, compute_dtype, multiple), len(weight_VH)
        wide = torch.promote_types(compute_dtype, torch.float32)
        total = hidden_NH.new_zeros((), dtype=wide)
        grad_RH = torch.empty_like(rows.hidden_RH) if learns[0] else None
        grad_VH = torch.zeros_like(weight, dtype=wide) if learns[1] else None
        grad_V = weight_VH.new_zeros(len(weight_VH), dtype=wide) if learns[2] else None
        form = _Form(label_smoothing, z_loss, entries)
        for place, logits_CV in _Chunks(rows, weight, bias_V, chunk_rows=chunk_rows, entries=entries):
            targets_C = rows.targets_R[place]
            loss_C, *of_row = form.losses(logits_CV, targets_C, masked=rows.masked)
            total += loss_C.sum()
            form.by_logits(logits_CV, *of_row)
            if rows.masked:
                logits_CV.mul_((targets_C != NOT_LEARNED).unsqueeze(1))
            if grad_V is not None:
                grad_V += logits_CV[:, :entries].sum(0)
            error_CV = logits_CV.to(compute_dtype)
            if grad_RH is not None:
                torch.mm(error_CV, weight, out=grad_RH[place])
            if grad_VH is not None:
                _add_product(grad_VH, error_CV.t(), rows.hidden_RH[place])
        return (
            total,
            _or_empty(None if grad_RH is None else rows.put_back(grad_RH, hidden_NH), hidden_NH),
            _or_empty(None if grad_VH is None else grad_VH[:entries].to(weight_VH.dtype), weight_VH),
            _or_empty(None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype), weight_VH),
        )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Total += a @ b, added up in the type of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def places_of(targets_N: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """Where the targets are.

    Args:
        targets_N: `NOT_LEARNED` where there is none.
        count: How many there are, on the host: else the device is asked, and waited for.
    """
    mask_N = targets_N != NOT_LEARNED
    found = mask_N.nonzero() if count is None else torch.nonzero_static(mask_N, size=int(count))
    return found.squeeze(1)


def _or_empty(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _new_like(targets_N: torch.Tensor, length: int, compute_dtype: torch.dtype) -> torch.Tensor:
    dtype = torch.promote_types(compute_dtype, torch.float32)
    return torch.empty(length, dtype=dtype, device=targets_N.device)


@_row_nll.register_fake
def _(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    gather: bool,
    num_targets: torch.Tensor | None,
    multiple: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    return hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.promote_types(compute_dtype, torch.float32))


@_total_with_gradients.register_fake
def _(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    learns: list[bool],
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    gather: bool,
    num_targets: torch.Tensor | None,
    multiple: int,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden_NH.new_empty((), dtype=torch.promote_types(compute_dtype, torch.float32)),
        torch.empty_like(hidden_NH, memory_format=torch.contiguous_format)
        if learns[0]
        else hidden_NH.new_empty(0),
        torch.empty_like(weight_VH, memory_format=torch.contiguous_format)
        if learns[1]
        else weight_VH.new_empty(0),
        torch.empty_like(bias_V) if learns[2] and bias_V is not None else weight_VH.new_empty(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, *gradients = output
    ctx.learns = inputs[4]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)


def _scale_gradients(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    # Not in place: backward may run again, and nothing else may see scaled values.
    by_hidden, by_weight, by_bias = (
        gradient * grad_total.to(gradient.dtype) if learns else None
        for gradient, learns in zip(ctx.saved_tensors, ctx.learns, strict=True)
    )
    return by_hidden, by_weight, None, by_bias, *(None,) * 8


_total_with_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
