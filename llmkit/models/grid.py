"""The numbers that a weight can be stored as: a few bits, with a scale for each group of a row.

They are those of the `compressed-tensors` format, to the last bit: what is rounded here is what is read from the file.

Shape suffixes: O outputs, I inputs of a linear layer, G groups of inputs with a scale of their own, J inputs of one
group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmkit.errors import UsageError

_LARGEST_FLOAT8 = 448.0
"""The largest 8-bit float with 4 bits of exponent and 3 of mantissa."""
SCALES = torch.bfloat16
"""The type of scales on disk. They are rounded to it before anything is rounded by them."""
GROUPS = (128, 64, 32)
"""The sizes of groups that are tried with 4 bits; other runtimes know them."""
_SIZES = (256, *GROUPS, 16, 8)
_FEW = 4


@dataclass(frozen=True)
class Grid:
    """What can be stored.

    Attributes:
        bits: Bits of a weight, 8 at most.
        columns: Inputs in a line that share a scale; None: a whole row.
        symmetric: Whether scales have no offset.
        float8: Whether the 8 bits are a float.

    **Source**: integers: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, section 2.1; floats: Micikevicius et al., "FP8 Formats for Deep
    Learning", 2022, section 3 (E4M3).
    """

    bits: int
    columns: int | None = None
    symmetric: bool = True
    float8: bool = False

    def fit(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale, and zero point where there is one, of each group of each row [O, G].

        Of integers without an offset, the largest weight of a group becomes the largest number, the smallest, or half a
        step beyond: what changes the group least. So weights that are such numbers already stay what they are.
        """
        weight_OGJ = weight_OI.detach().float().unflatten(1, (-1, self.columns or weight_OI.shape[1]))
        if self.symmetric:
            most_OG = weight_OGJ.abs().amax(2)
            if self.float8:
                return _scale(most_OG / _LARGEST_FLOAT8), None
            limit = 2 ** (self.bits - 1)
            return self._least(weight_OI.float(), most_OG, (limit - 0.5, limit - 1, limit)), None
        # Zero must be one of the numbers.
        low_OG, high_OG = weight_OGJ.amin(2).clamp(max=0), weight_OGJ.amax(2).clamp(min=0)
        scale_OG = _scale((high_OG - low_OG) / (2**self.bits - 1))
        least = -(2 ** (self.bits - 1))
        return scale_OG, (least - low_OG / scale_OG).round().clamp(least, -least - 1)

    def _least(
        self, weight_OI: torch.Tensor, most_OG: torch.Tensor, numbers: Sequence[float]
    ) -> torch.Tensor:
        """The scales that make the largest weight one of these numbers, whichever changes the group least."""
        best_OG, least_OG = _scale(most_OG / numbers[0]), torch.full_like(most_OG, torch.inf)
        for number in numbers:
            scale_OG = _scale(most_OG / number)
            gap_OI = self.rounded(weight_OI, scale_OG, None) - weight_OI
            error_OG = gap_OI.square().unflatten(1, (most_OG.shape[1], -1)).sum(2)
            best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
            least_OG = torch.minimum(error_OG, least_OG)
        return best_OG

    def codes(
        self, weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None
    ) -> torch.Tensor:
        """What stands in the file for each weight [O, I], in float32: whole numbers, or 8-bit floats."""
        weight_OGJ = weight_OI.unflatten(1, (scale_OG.shape[1], -1)) / scale_OG[..., None]
        if self.float8:
            clamped_OGJ = weight_OGJ.clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
            return clamped_OGJ.to(torch.float8_e4m3fn).float().flatten(1)
        if zero_OG is not None:
            weight_OGJ = weight_OGJ + zero_OG[..., None]
        limit = 2 ** (self.bits - 1)
        return weight_OGJ.clamp(-limit, limit - 1).round().flatten(1)

    def rounded(
        self, weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None
    ) -> torch.Tensor:
        """The nearest numbers that can be stored, in float32; the inputs fall into G groups of one size."""
        codes_OGJ = self.codes(weight_OI.float(), scale_OG, zero_OG).unflatten(1, (scale_OG.shape[1], -1))
        if zero_OG is not None:
            codes_OGJ = codes_OGJ - zero_OG[..., None]
        return (codes_OGJ * scale_OG[..., None]).flatten(1)

    def nearest(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The weight with scales that are fitted to it, each number to the nearest."""
        return self.rounded(weight_OI, *self.fit(weight_OI))


def _scale(exact_OG: torch.Tensor) -> torch.Tensor:
    """As it is on disk; where all is zero any will do."""
    stored_OG = exact_OG.to(SCALES).float()
    return torch.where(stored_OG == 0, torch.ones_like(stored_OG), stored_OG)


def round_inputs(states: torch.Tensor, *, float8: bool) -> torch.Tensor:
    """What a layer reads, each position rounded to 8 bits with a scale of its own.

    Args:
        states: Positions of any shape, the channels last.
        float8: To floats instead of integers.

    **Source**: Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
    Transformers", NeurIPS 2022, section 4.1 (token-wise quantisation of activations).
    """
    most = states.abs().amax(-1, keepdim=True)
    scale = most / (_LARGEST_FLOAT8 if float8 else 127.5)
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    if float8:
        clamped = (states / scale).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
        return clamped.to(torch.float8_e4m3fn).to(scale.dtype) * scale
    return (states / scale).clamp(-128, 127).round() * scale


def group_size(widths: Mapping[str, int], bits: int, group: int | str) -> int | None:
    """How many inputs in a line share a scale; None: a whole row.

    Args:
        widths: Name of a layer -> its inputs.
        bits: Bits of a weight.
        group: A number, `row`, or `auto`: with 4 bits the largest of 128, 64 and 32 that divides all rows, else `row`.

    Raises:
        UsageError: A layer's inputs do not fall into groups of one size.
    """
    if group == "row" or (group == "auto" and bits > _FEW):
        return None
    tried = GROUPS if group == "auto" else (int(group),)
    for size in tried:
        if not any(width % size for width in widths.values()):
            return size
    name, width = next((name, width) for name, width in widths.items() if width % tried[-1])
    divides = next((size for size in _SIZES if not any(w % size for w in widths.values())), None)
    raise UsageError(
        f"{name} has {width:,} inputs, which {' and '.join(map(str, tried))} "
        f"{'do' if len(tried) > 1 else 'does'} not divide into groups with a scale each",
        hint=f"keep: [{name.rpartition('.')[2]}], group: row" + (f", or group: {divides}" if divides else ""),
    )
