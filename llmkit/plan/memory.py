"""Memory of one device while it trains, term by term: what is held, divided by the processes that share it.

What the terms count is what this toolkit keeps: weights, gradients and the optimizer's memory in fp32, however matrix
products are computed, and under bf16 the copies that autocast makes of the matrices. `docs/plan.md` has the formulas.

Letters in formulas: `w` bytes of a number in the working precision (4 for fp32, else 2).
"""

from dataclasses import dataclass, fields
from typing import Literal

from llmkit.plan.parallel import Layout
from llmkit.plan.shape import ModelShape

Recompute = Literal["none", "selective", "full"]

LOSS_CHUNK_BYTES = {"cpu": 2**25}
"""Logits in fp32 that the loss has at one time, by device; `models/cross_entropy.py` keeps to it."""

LOSS_CHUNK_BYTES_ELSEWHERE = 2**28
FEWEST_LOSS_ROWS = 128

CPU_PROCESS_BYTES = 430_000_000
"""What a worker holds on CPU before its model (measured: 410 to 450 MB resident)."""


HEAP_SHARE = 0.85
"""What the C library's heap keeps of memory that was freed, as a share of activations and logits, on CPU.

Pieces under 32 MiB come from a heap whose holes are not given back, and the backward pass frees them in another order
than the forward pass took them. One number for all models, from the runs of `benchmarks.plan_memory`: with a heap that
gives everything back (MALLOC_MMAP_THRESHOLD_=65536) the same runs hold what the other terms say, but take longer."""

HEAP_SHARE_OF_MANY_LENGTHS = 1.15
"""The same where rows have many lengths: what was freed fits less often (from the `tuned-*` runs of the benchmark)."""

KERNELS_BYTES = 250_000_000
"""What oneDNN keeps on CPU of products in half precision, a kernel for each length (from the same runs)."""

_GIVEN_BACK = 32 * 2**20
"""Bytes from which glibc takes a piece from the system, and gives it back when it is freed (mallopt(3))."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while training.

    Attributes:
        weights: fp32 weights, and under bf16 the bf16 copies of the matrices that autocast keeps for the
            backward pass.
        gradients: fp32 gradients.
        optimizer: What the optimizer remembers: for AdamW two fp32 moments.
        activations: What the backward pass needs of one micro-batch (an estimate).
        logits: A chunk of logits, and the gradient of the output layer that the loss makes of them.
        process: The process before the model, on CPU.
        total: The sum of all that is on the device.
        copy: The copy of weights and optimizer that checkpoints are written from, where it lies in this memory.
        buffers: What processes send each other: buckets of gradients, gathered layers.
        teacher: Models that do not learn: a teacher, a reference.
        heap: What the process has freed and keeps, on CPU (an estimate).
        host: Of all that is above, what waits in the host's memory instead; it is not in `total`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int
    total: int
    copy: int = 0
    buffers: int = 0
    teacher: int = 0
    heap: int = 0
    host: int = 0

    @classmethod
    def of(cls, **terms: int) -> "Memory":
        """From its terms; `total` is their sum, without what is on the host."""
        known = {field.name: 0 for field in fields(cls)} | terms
        known["total"] = sum(known.values()) - known["host"] - known["total"]
        return cls(**known)

    def terms(self) -> dict[str, int]:
        """All but the sum."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "total"}

    def plus(self, **more: int) -> "Memory":
        """The same with more of some terms."""
        terms = self.terms()
        return Memory.of(**{name: size + more.get(name, 0) for name, size in terms.items()})

    def __add__(self, other: "Memory") -> "Memory":
        """Both, side by side."""
        return self.plus(**other.terms())

    def with_copy(self, size: int) -> "Memory":
        """The same with a copy of `size` bytes."""
        return self.plus(copy=size)


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
    num_trained: int | None = None,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    recompute: Recompute = "none",
    offload: bool = False,
    zeros: bool = False,
    many_lengths: bool = False,
    device: str = "cpu",
) -> Memory:
    """Memory of training at this micro-batch.

    An evaluation needs no more: the weights that an average (`train.ema`, schedule-free) replaces for that time are put
    aside in 4 bytes each, as many as the gradients take, which are free by then.

    Args:
        model: The model.
        context: Tokens a row.
        micro_batch: Rows at a time.
        precision: `fp32`, `bf16` or `fp8`.
        attention: `sdpa` and `flex` keep no scores; `compiled` and `eager` keep them for the backward pass.
        process: Bytes of the process before the model: interpreter, libraries, tokenizer, on CPU.
        decoder: Positions that the decoder of an encoder-decoder reads.
        state_bytes: What the optimizer remembers of a parameter.
        num_trained: Weights that learn; None: all.
        layout: Who shares what.
        recompute: What the backward pass computes again.
        offload: Whether shards wait on the host.
        zeros: Whether a mark of a byte says of each number of a matrix whether it learns (`train.keep_zeros`).
        many_lengths: Whether each micro-batch has rows of another length.
        device: Where the loss is computed.
    """
    learns = 1.0 if num_trained is None else num_trained / model.num_parameters
    held = held_parameters(model, layout)
    trained = round(held * learns)
    written = micro_batch * (decoder if model.num_encoder_layers else context)
    rows = micro_batch * activation_bytes(
        model, context, decoder, precision=precision, attention=attention, recompute=recompute, layout=layout
    )
    large = large_scores(model, context, micro_batch, precision, attention, recompute, layout)
    kept = {
        "weights": 4 * held,
        "gradients": 4 * trained,
        "optimizer": round(state_bytes * trained) + zeros * _matrices(model, layout),
    }
    here = dict.fromkeys(kept, 0) if offload else dict(kept)
    here["weights"] += _copies(model, layout, precision)
    logits = loss_bytes(model, written, precision=precision, device=device, learns=learns > _HEAD_LEARNS)
    return Memory.of(
        **here,
        activations=rows,
        logits=logits,
        heap=int((HEAP_SHARE_OF_MANY_LENGTHS if many_lengths else HEAP_SHARE) * (rows + logits - large))
        * bool(process),
        buffers=buffer_bytes(model, layout, trained, precision),
        process=process + KERNELS_BYTES * (process > 0 and many_lengths and precision != "fp32"),
        host=sum(kept.values()) if offload else 0,
    )


_HEAD_LEARNS = 0.5
"""Share of the weights that learn from which the output layer is taken to be among them: else it is an adapter, or a
few last layers."""


def held_parameters(model: ModelShape, layout: Layout) -> int:
    """Weights that one process holds: matrices of blocks divided by `tensor`, experts by `expert`, all by `shard`."""
    return -(-(model.num_parameters - block_matrices(model) + split_matrices(model, layout)) // layout.shard)


def split_matrices(model: ModelShape, layout: Layout) -> int:
    """Of the weights of blocks, those of a process before they are sharded."""
    experts = model.num_expert_parameters
    return (block_matrices(model) - experts) // layout.tensor + experts // layout.expert


def block_matrices(model: ModelShape) -> int:
    """Weights of the linear layers, without the output layer."""
    return max(0, model.num_matmul_parameters - _head(model))


def _head(model: ModelShape) -> int:
    """Weights of the output layer."""
    return model.vocab_size * (model.embedding_size or model.hidden_size)


def _matrices(model: ModelShape, layout: Layout) -> int:
    return split_matrices(model, layout) // layout.shard


def _copies(model: ModelShape, layout: Layout, precision: str) -> int:
    """bf16 copies of the blocks' matrices, from the forward pass to the backward; none of those that are gathered."""
    return 0 if precision == "fp32" or layout.shard > 1 else 2 * split_matrices(model, layout)


def loss_bytes(model: ModelShape, positions: int, *, precision: str, device: str, learns: bool = True) -> int:
    """The loss's own memory: a chunk of logits, and the output layer's gradient, both made in the forward pass.

    Of each chunk there are the logits in fp32, which become their own gradient, and under bf16 the product before and
    the gradient after in 2 bytes each. The gradient of the layer is fp32; under bf16 there is a copy of the layer and
    a chunk's share of its gradient beside it, in 2 bytes each.
    """
    half = precision != "fp32"
    layer = (4 * learns + (2 + 2 * learns) * half) * _head(model)
    return _chunk_bytes(model.vocab_size, positions, precision, device) + int(layer)


def _chunk_bytes(vocab_size: int, positions: int, precision: str, device: str) -> int:
    budget = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES_ELSEWHERE)
    rows = min(positions, max(FEWEST_LOSS_ROWS, budget // (4 * max(1, vocab_size))))
    return rows * vocab_size * (4 if precision == "fp32" else 8)


def at_positions(
    memory: Memory, before: int, after: int, *, vocab_size: int, precision: str, device: str
) -> Memory:
    """Memory that was counted for so many positions at a time, for another number of them.

    Args:
        memory: For `before` positions.
        before: Positions of a micro-batch.
        after: Those of another.
        vocab_size: Entries of the output layer.
        precision: `fp32`, `bf16` or `fp8`.
        device: Where the loss is computed.
    """
    rows = memory.activations * after // before - memory.activations
    old, new = (_chunk_bytes(vocab_size, positions, precision, device) for positions in (before, after))
    heap = memory.heap * (rows + new - old) // max(1, memory.activations + memory.logits)
    return memory.plus(activations=rows, logits=new - old, heap=heap)


def buffer_bytes(model: ModelShape, layout: Layout, trained: int, precision: str) -> int:
    """What is held to send and to receive: all gradients once more in buckets (DDP), or layers that are gathered.

    A sharded process gathers the block it computes and the next one `w` bytes wide, and holds the gradients of one as
    they were computed and once more, in fp32, to be shared out. Embeddings and output layer stay gathered for a whole
    micro-batch, with their gradients, in fp32.
    """
    if layout.data_size == 1:
        return 0
    if not layout.is_sharded:
        return 4 * trained
    block = split_matrices(model, layout) // max(1, model.num_layers + model.num_encoder_layers)
    rest = model.num_parameters - block_matrices(model)
    return (3 * _width(precision) + 4) * block + 8 * rest


def large_scores(
    model: ModelShape,
    context: int,
    micro_batch: int,
    precision: str,
    attention: str,
    recompute: Recompute,
    layout: Layout,
) -> int:
    """Bytes of the kept scores of attention that lie in pieces so large that the heap gives them back."""
    if attention not in ("eager", "compiled") or model.num_encoder_layers:
        return 0
    scores = micro_batch * model.num_heads // layout.tensor * context**2
    layers = model.num_layers if recompute == "none" else 1
    widths = [_width(precision), *([4] if attention == "eager" and _width(precision) != 4 else [])]
    return layers * sum(width * scores for width in widths if width * scores >= _GIVEN_BACK)


def activation_bytes(
    model: ModelShape,
    context: int,
    decoder: int,
    *,
    precision: str,
    attention: str,
    recompute: Recompute = "none",
    layout: Layout = Layout(),  # noqa: B008 - frozen
) -> int:
    """Bytes that the backward pass needs of one row, by what each operation of a block keeps.

    Two norms keep input and normalised value in fp32 and their output `w` bytes wide; attention keeps queries, keys,
    values and output; the MLP its inner tensors (gate, up, activation, product, or two without a gate). Scores, where
    kept, are `num_heads * context` wide: probabilities `w` wide, in eager mode also in fp32 where that is another, and
    there the block whose turn it is has them three times before they are probabilities. A block of a decoder with
    an encoder has one more attention, and the keys and values of the encoder's positions. `tensor` divides all that
    is inside of attention and MLP, `context` everything.

    `selective` keeps the block's input and the results of matrix products and of attention; `full` the input alone. Of
    both, the block whose turn it is has all.

    **Source**: the counting of Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4 and 5, for
    this block.
    """
    if model.kept_values is not None:
        return _recomputed_values(model, context, recompute) // layout.context
    layers = _Layers.of(model, layout, _width(precision), attention)
    sides = [
        (model.num_layers, decoder if model.num_encoder_layers else context, bool(model.num_encoder_layers))
    ]
    if model.num_encoder_layers:
        sides.append((model.num_encoder_layers, context, False))
    total = 0
    for number, length, crosses in sides:
        whole = layers.block(length, context if crosses else 0, "none")
        each = layers.block(length, context if crosses else 0, recompute)
        extra = whole if recompute != "none" else 0
        raw = (length + (context if crosses else 0)) * layers.raw
        total += length * (number * each + extra + raw + layers.last)
    keys = model.num_layers * context * layers.keys if model.num_encoder_layers and recompute != "full" else 0
    return (total + keys) // layout.context


def _recomputed_values(model: ModelShape, context: int, recompute: Recompute) -> int:
    """Of a model that is not made of transformer blocks."""
    assert model.kept_values is not None
    if recompute == "none":
        return context * 4 * model.kept_values
    return context * 4 * (model.num_layers * model.hidden_size + model.kept_values // model.num_layers)


@dataclass(frozen=True)
class _Layers:
    """Bytes that one position keeps in each part of a block.

    Attributes:
        norm: A norm: input and normalised value in fp32, output.
        hidden: The block's input.
        mixing: Queries, keys, values and output of attention.
        output: What attention's and the MLP's last product give.
        mlp: The MLP's inner tensors.
        products: Of these, the results of matrix products.
        score: A score for each position that is looked at, of all heads.
        raw: The same before it is a probability, where that takes tensors of their own: product, scaled, masked.
        keys: Keys and values of one position.
        last: The last norm.
    """

    norm: int
    hidden: int
    mixing: int
    output: int
    mlp: int
    products: int
    score: int
    raw: int
    keys: int
    last: int

    @classmethod
    def of(cls, model: ModelShape, layout: Layout, width: int, attention: str) -> "_Layers":
        kept = {"compiled": width, "eager": width if width == 4 else width + 4}.get(attention, 0)
        inner = width * model.intermediate_size // layout.tensor
        keys = 2 * width * model.head_dim * model.num_kv_heads // layout.tensor
        return cls(
            norm=model.hidden_size * (8 + width),
            hidden=4 * model.hidden_size,
            mixing=2 * width * model.head_dim * model.num_heads // layout.tensor + keys,
            output=width * model.hidden_size,
            mlp=inner * (4 if model.gated_mlp else 2),
            products=inner * (2 if model.gated_mlp else 1),
            score=kept * model.num_heads // layout.tensor,
            raw=3 * width * model.num_heads // layout.tensor if attention == "eager" else 0,
            keys=keys,
            last=model.hidden_size * (8 + width),
        )

    def block(self, length: int, across: int, recompute: Recompute) -> int:
        """One position of a block that looks at `length` positions, and at `across` of an encoder."""
        attentions = 2 if across else 1
        if recompute == "full":
            return self.hidden
        if recompute == "selective":
            return self.hidden + attentions * (self.mixing + self.output) + self.products + self.output
        scores = (length + across) * self.score
        return (1 + attentions) * self.norm + attentions * self.mixing + self.mlp + scores


def _width(precision: str) -> int:
    return 4 if precision == "fp32" else 2
