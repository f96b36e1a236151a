"""FLOPs, memory and time by formula: FLOPs and fixed memory are counted, activations and time estimated."""

from dataclasses import dataclass, replace

from llmkit.hardware import Hardware
from llmkit.plan.shape import ModelShape

LOSS_CHUNK_TOKENS = 1024
"""Positions whose logits exist at one time in the chunked loss, for the memory estimate."""

CPU_FLOPS_PER_CORE = {"fp32": (30e9, 130e9), "bf16": (80e9, 300e9)}
"""Training FLOP/s per core, low to high.

Measured on a server processor with a 17 M llama: 62e9 with plain fp32 and 226e9 with bf16 and compiled
kernels, where bare matrix products reach 81-178e9 and 360e9.
"""

GPU_UTILISATION = (0.15, 0.50)
"""Share of the peak that training reaches, low to high. Published runs of 0.1-8 B models: 0.33 to 0.50."""

NARROW_GPU_UTILISATION = (0.03, 0.30)
"""The same below a width of 1024, where kernels are too small to fill the device."""

COMPILE_GAIN = {("cpu", "fp32"): 1.08, ("cpu", "bf16"): 1.5, ("cuda", "fp32"): 1.2, ("cuda", "bf16"): 1.3}
"""How many times faster a compiled step is, by device and precision. In fp32 a processor spends its time in
matrix products, which compiling leaves as they are; in bf16 these are short and the rest counts."""

CPU_PROCESS_BYTES = 430_000_000
"""What a worker holds on CPU before its model (measured: 410 to 450 MB resident)."""

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


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while training with replicated weights.

    Attributes:
        weights: fp32 weights, and under bf16 the bf16 copies of the matrices that autocast keeps for the
            backward pass.
        gradients: fp32 gradients.
        optimizer: What the optimizer remembers: for AdamW two fp32 moments.
        activations: What the backward pass needs of one micro-batch (an estimate).
        logits: One chunk of logits and its gradient.
        process: The process before the model, on CPU.
        total: The sum.
        copy: The copy of weights and optimizer that checkpoints are written from, where it lies in this memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int
    total: int
    copy: int = 0

    def learning(self, share: float) -> "Memory":
        """The same where only a share of the weights learns: the others have neither gradient nor moments."""
        gradients, optimizer = int(self.gradients * share), int(self.optimizer * share)
        spared = self.gradients - gradients + self.optimizer - optimizer
        return replace(self, gradients=gradients, optimizer=optimizer, total=self.total - spared)

    def with_frozen(self, num_parameters: int) -> "Memory":
        """The same with a second model of so many weights that does not learn."""
        return replace(self, weights=self.weights + 4 * num_parameters, total=self.total + 4 * num_parameters)

    def with_copy(self, size: int) -> "Memory":
        """The same with a copy of `size` bytes."""
        return replace(self, total=self.total + size, copy=size)


def training_memory(
    model: ModelShape,
    *,
    context: int,
    micro_batch: int,
    precision: str,
    attention: str,
    process: int = 0,
    decoder: int = 0,
    state_bytes: float = 8.0,
) -> Memory:
    """Memory of training at this micro-batch.

    An evaluation needs no more: the weights that an average (`train.ema`, schedule-free) replaces for that time are put
    aside in 4 bytes each, as many as the gradients take, which are free by then.

    Args:
        model: The model.
        context: Tokens a row.
        micro_batch: Rows at a time.
        precision: `fp32` or `bf16`.
        attention: `sdpa` keeps no scores; `compiled` and `eager` keep them for the backward pass.
        process: Bytes of the process before the model: interpreter, libraries, tokenizer, on CPU.
        decoder: Positions that the decoder of an encoder-decoder reads.
        state_bytes: What the optimizer remembers of a parameter.
    """
    parameters = model.num_parameters
    tokens = micro_batch * context
    weights = 4 * parameters + (2 * model.num_matmul_parameters if precision == "bf16" else 0)
    activations = micro_batch * activation_bytes(
        model, context, decoder, precision=precision, attention=attention
    )
    # One chunk: the logits in the working precision, and in fp32 for the softmax that becomes their gradient.
    written = micro_batch * decoder if model.num_encoder_layers else tokens
    logits = min(written, LOSS_CHUNK_TOKENS) * model.vocab_size * (_width(precision) + 4)
    gradients, optimizer = 4 * parameters, int(state_bytes * parameters)
    total = weights + gradients + optimizer + activations + logits + process
    return Memory(weights, gradients, optimizer, activations, logits, process, total)


def activation_bytes(model: ModelShape, context: int, decoder: int, *, precision: str, attention: str) -> int:
    """Bytes that the backward pass needs of one row, by what each operation of a block keeps.

    Two norms keep input and normalised value in fp32 and their output `w` bytes wide (`w`: 4 for fp32, 2 for
    bf16); attention keeps queries, keys, values and output; the MLP its inner tensors (gate, up, activation,
    product, or two without a gate). Scores, where kept, are `num_heads * context` wide: probabilities `w`
    wide, in eager mode also in fp32. A block of a decoder with an encoder has one more attention, and the keys and
    values of the encoder's positions.

    **Source**: the counting of Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4, for
    this block.
    """
    width, last = _width(precision), model.hidden_size * (8 + _width(precision))
    if model.kept_values is not None:
        return context * 4 * model.kept_values
    kept = {"sdpa": 0, "compiled": width, "eager": width + 4}[attention]
    once = model.hidden_size * (8 + width)
    mixing = 2 * width * model.head_dim * (model.num_heads + model.num_kv_heads)
    mlp = width * model.intermediate_size * (4 if model.gated_mlp else 2)

    def block(length: int) -> int:
        return 2 * once + mixing + mlp + model.num_heads * length * kept

    if not model.num_encoder_layers:
        return context * (model.num_layers * block(context) + last)
    encoder = context * (model.num_encoder_layers * block(context) + last)
    across = once + mixing + model.num_heads * context * kept
    keys = context * 2 * width * model.num_kv_heads * model.head_dim
    return encoder + decoder * (model.num_layers * (block(decoder) + across) + last) + model.num_layers * keys


def _width(precision: str) -> int:
    return 2 if precision == "bf16" else 4


def training_rate(
    hardware: Hardware, model: ModelShape, *, world_size: int, precision: str
) -> tuple[float, float] | None:
    """FLOP/s that training here may reach over all processes, low and high; None where the device is unknown.

    Processes on CPU share the cores, so more of them are not faster.
    """
    if hardware.device == "cpu":
        low, high = CPU_FLOPS_PER_CORE[precision]
        return low * hardware.cores, high * hardware.cores
    if hardware.peak_flops is None:
        return None
    # The peak is the bf16 one where there is bf16; fp32 is 1/2 to 1/16 of it, an eighth is taken.
    peak = hardware.peak_flops * (1 / 8 if precision == "fp32" and hardware.bf16 else 1)
    low, high = GPU_UTILISATION if model.hidden_size >= 1024 else NARROW_GPU_UTILISATION
    return low * peak * world_size, high * peak * world_size


def compile_saves(device: str, precision: str, seconds: float) -> float:
    """Seconds that compiling takes off a run of `seconds`, its own cost not counted."""
    return seconds * (1 - 1 / COMPILE_GAIN[device, precision])
