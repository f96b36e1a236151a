"""FLOPs and speed by formula: FLOPs are counted, speed is estimated. `memory` and `cost` have the rest."""

from llmkit.hardware import Hardware
from llmkit.plan.shape import ModelShape

CPU_FLOPS_PER_CORE = {"fp32": (30e9, 130e9), "bf16": (80e9, 300e9)}
"""Training FLOP/s per core, low to high.

Measured on a server processor with a 17 M llama: 62e9 with plain fp32 and 226e9 with bf16 and compiled
kernels, where bare matrix products reach 81-178e9 and 360e9.
"""

GPU_UTILISATION = (0.15, 0.50)
"""Share of the peak that training reaches, low to high. Published runs of 0.1-8 B models: 0.33 to 0.50."""

FP8_GAIN = 1.28
"""How much faster 8-bit products make a step at best. Source: torchtitan's figures for 8 B parameters."""

NARROW_GPU_UTILISATION = (0.03, 0.30)
"""The same below a width of 1024, where kernels are too small to fill the device."""

COMPILE_GAIN = {("cpu", "fp32"): 1.08, ("cpu", "bf16"): 1.5, ("cuda", "fp32"): 1.2, ("cuda", "bf16"): 1.3}
"""How many times faster a compiled step is, by device and precision. In fp32 a processor spends its time in
matrix products, which compiling leaves as they are; in bf16 these are short and the rest counts."""

COMPILE_COST_S = {"cpu": 65.0, "cuda": 60.0}
"""Seconds that compiling takes with a cold cache."""


def flops_per_token(model: ModelShape, context: int, decoder: int = 0) -> int:
    """FLOPs of training on one token: `6 M + 12 L Q T`; of an encoder-decoder, a row's over its `context`.

    M are the weights that a token is multiplied with (linear layers and the LM head, not the embedding
    look-up), 2 FLOPs each in the forward pass and 4 in the backward. `L` layers of attention with `Q =
    num_heads * head_dim` compare each of `T` tokens with all `T`: `2 Q T` for the scores and `2 Q T` for the
    mix of values forward, twice that backward. That half of it lies above the causal diagonal is not taken
    off, as in most published figures, so MFU compares with them; nor is it where a model looks at near tokens only.

    An encoder's `T` positions meet its own weights and its own attention. Each of the `D` positions of the decoder
    meets the others, and compares itself with those `D` and with the encoder's `T`. A model without attention has
    the first term alone. The output layer is counted at every position, also where few of them are targets.

    Args:
        model: The model.
        context: Tokens a row; of an encoder-decoder, those that its encoder reads.
        decoder: Positions that its decoder reads.

    **Source**: PaLM (Chowdhery et al. 2022), appendix B; Chinchilla (Hoffmann et al. 2022), appendix F.
    """
    pairs = 12 * model.num_heads * model.head_dim
    if not model.num_encoder_layers:
        return 6 * model.num_matmul_parameters + pairs * model.num_layers * context
    encoder = 6 * model.num_encoder_parameters + pairs * model.num_encoder_layers * context
    weights = 6 * (model.num_matmul_parameters - model.num_encoder_parameters)
    one = weights + pairs * model.num_layers * (decoder + context)
    return encoder + one * decoder // context


def training_rate(
    hardware: Hardware, model: ModelShape, *, world_size: int, precision: str, nodes: int = 1
) -> tuple[float, float] | None:
    """FLOP/s that training here may reach over all processes, low and high; None where the device is unknown.

    Processes on the CPU of one machine share its cores, so more of them are not faster.
    """
    if hardware.device == "cpu":
        low, high = CPU_FLOPS_PER_CORE["fp32" if precision == "fp32" else "bf16"]
        cores = hardware.cores * min(nodes, world_size)
        return low * cores, high * cores
    if hardware.peak_flops is None:
        return None
    # The peak is the bf16 one where there is bf16; fp32 is 1/2 to 1/16 of it, an eighth is taken.
    peak = hardware.peak_flops * (1 / 8 if precision == "fp32" and hardware.bf16 else 1)
    low, high = GPU_UTILISATION if model.hidden_size >= 1024 else NARROW_GPU_UTILISATION
    best = high * (FP8_GAIN if precision == "fp8" else 1)
    return low * peak * world_size, best * peak * world_size


def compile_saves(device: str, precision: str, seconds: float) -> float:
    """Seconds that compiling takes off a run of `seconds`, its own cost not counted."""
    return seconds * (1 - 1 / COMPILE_GAIN[device, "bf16" if precision == "fp8" else precision])
