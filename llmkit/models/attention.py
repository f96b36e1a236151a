"""Attention kernels for training rows, registered with transformers, and the choice among them by measuring.

A recipe knows four names; each is exact and differs in speed and memory only:

- `sdpa`: torch's fused kernel. Isolated documents get one call each where that is possible, else a mask.
- `compiled`: matmul, softmax, matmul in plain torch, for torch.compile to fuse. Causal rows are cut into blocks of
  queries that meet only the keys up to their end. Keeps the probabilities for the backward pass (T^2 memory).
- `eager`: transformers' own plain code.
- `flex`: torch's FlexAttention, which passes over whole blocks of positions that do not see each other. For packed
  rows on an NVIDIA GPU: elsewhere it has no backward pass.

Rows whose documents may see each other need no mask at all. transformers cannot know that inside a compiled model
and would then always build one; so the rows have implementations of their own (`sdpa_rows`, `compiled_rows`). With
padding, a cache or a sliding window every implementation here takes transformers' mask as usual.

Where documents are kept apart, transformers asks the device whether there is more than one in a row, which makes a GPU
wait at every micro-batch, and a compiled block meet two kinds of masks. So on a GPU the mask is made here, from the
positions alone: see `documents_mask`.

Shape suffixes: B rows, A attention heads, K key/value heads, T queries, S keys, D head size.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmkit.errors import UsageError
from llmkit.models.layers import WEIGHTS

IMPLEMENTATIONS = ("sdpa", "eager", "compiled", "flex")
"""The names a recipe can use."""

_NUM_BLOCKS = 4
"""Blocks of queries in `compiled`: 4 leave 5/8 of the square. Measured forward and backward on CPU in fp32, 8 x 512, 6
heads of 64: 1 block 199 ms, 2: 122, 4: 102, 8: 108 and twice the time to compile."""
_SHORTEST_BLOCKED = 256
_MOST_SCORE_BYTES = 2**29
_PROBE_RUNS = 3
_PROBE_DOCUMENTS = 4


def kernels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Of `IMPLEMENTATIONS`, those that the architecture can use; none where it has no attention."""
    if model._supports_attention_backend:
        return IMPLEMENTATIONS
    # Its own code adds something that other kernels would leave out, such as T5's position bias.
    return ("sdpa", "eager") if model._supports_sdpa else ()


def use_attention(model: PreTrainedModel, name: str, *, isolate: bool) -> None:
    """Make `model` use an attention kernel for training; one without attention stays as it is.

    Args:
        model: Any model.
        name: One of `kernels_of(model)`.
        isolate: Whether documents that share a row are kept apart: those that `position_ids`, given to the model
            without a mask, show by restarting. False: rows are seen as a whole, whatever their `position_ids`.

    Raises:
        UsageError: The model cannot use that kernel.
    """
    known = kernels_of(model)
    if not known:
        return
    if name not in known:
        raise UsageError(
            f"{model.config.model_type} cannot use the attention kernel {name!r}",
            hint=f"machine.attention={known[0]}, or auto",
        )
    model.set_attn_implementation(
        _implementation(name, isolate=isolate) if known == IMPLEMENTATIONS else name
    )


def _implementation(name: str, *, isolate: bool) -> str:
    if name == "eager":
        return name
    return name + ("_documents" if isolate else "_rows")


def whole_rows_mask(model: PreTrainedModel, input_ids_BT: torch.Tensor) -> torch.Tensor | None:
    """What says of rows on a GPU that nothing in them is filled up or kept apart, lest the device be asked for that.

    Args:
        model: Whose attention is set.
        input_ids_BT: What it reads.

    Returns:
        A mask [B, T] of a single number, which the masks here know by that; None on a processor, and where the
        model's attention is not one of those here.
    """
    name = str(getattr(model.config, "_attn_implementation", ""))
    if not name.endswith("_rows") or input_ids_BT.device.type == "cpu":
        return None
    return torch.ones((1, 1), dtype=torch.bool, device=input_ids_BT.device).expand_as(input_ids_BT)


def _is_whole(padding: torch.Tensor | None) -> bool:
    return padding is not None and padding.numel() > 1 and not any(padding.stride())


def documents_mask(model: PreTrainedModel, position_ids_BT: torch.Tensor) -> torch.Tensor | BlockMask | None:
    """What each position of packed rows sees: those of its own document up to its own place; the device is not asked.

    Args:
        model: Whose attention is set.
        position_ids_BT: 0 where a document starts, and one more with each position.

    Returns:
        A mask [B, 1, T, T] in the form that the kernel takes; None where transformers is to make it: on a processor,
        where one call a document needs none, with other kernels, and where layers see windows of the past only.
    """
    name = str(getattr(model.config, "_attn_implementation", ""))
    if not name.endswith("_documents") or position_ids_BT.device.type == "cpu" or _sees_windows(model):
        return None
    return packed_mask(position_ids_BT, in_blocks=name.startswith("flex"))


def packed_mask(position_ids_BT: torch.Tensor, *, in_blocks: bool) -> torch.Tensor | BlockMask:
    """The mask of `documents_mask` [B, 1, T, T] by positions alone, or FlexAttention's form of it."""
    documents_BT = (position_ids_BT.diff(dim=1, prepend=position_ids_BT[:, :1] - 1) != 1).cumsum(1)
    if in_blocks:
        return block_mask(documents_BT)
    return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()


def _sees_windows(model: PreTrainedModel) -> bool:
    """Whether some layers need a mask of their own, or the model is not one that looks at the past only."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(kinds or window) or not getattr(config, "is_causal", True)


def block_mask(documents_BT: torch.Tensor) -> BlockMask:
    """The mask of `packed_mask` for FlexAttention: which blocks of positions meet, and what is seen within them."""
    num_rows, length = documents_BT.shape

    def sees(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents_BT[row, query] == documents_BT[row, key])

    compiled = documents_BT.device.type == "cuda"
    return create_block_mask(
        sees, num_rows, None, length, length, device=documents_BT.device, _compile=compiled
    )


def flex_documents_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """FlexAttention where the mask is one of blocks; rows that are seen as a whole, or padded, go to SDPA.

    Args:
        module: The attention layer.
        query: [B, A, T, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        attention_mask: As of `documents_mask`, or as SDPA takes it.
        dropout: Of the weights; must be 0, for FlexAttention has none.
        scaling: By default D ** -0.5.
        options: As for `sdpa`.

    Returns:
        [B, T, A, D], and None in place of the weights.

    Raises:
        UsageError: The model drops attention weights.

    **Source**: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024.
    """
    if not isinstance(attention_mask, BlockMask):
        return document_sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if dropout:
        raise UsageError(
            f"machine.attention is flex, which cannot drop attention weights, and this model drops {dropout:.0%}",
            hint="machine.attention=sdpa, or dropout: 0",
        )
    query, key, value = (_as_computed(states) for states in (query, key, value))
    attend: Any = _compiled_flex() if _compiles_flex(query) else flex_attention
    mixed = attend(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed.transpose(1, 2).contiguous(), None


def _as_computed(states: torch.Tensor) -> torch.Tensor:
    """In autocast's type, where it is on, as SDPA takes them: norms of queries and keys leave these in fp32."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _compiles_flex(query: torch.Tensor) -> bool:
    """Not compiled, FlexAttention makes all scores; in a block that is being compiled it is compiled with that."""
    return query.device.type == "cuda" and not torch.compiler.is_compiling()


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def matmul_softmax_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling * query @ key^T + mask) @ value in plain operations.

    Args:
        module: The attention layer; its `is_causal` counts where the argument is None.
        query: [B, A, T, D].
        key: [B, K, S, D]; K divides A.
        value: [B, K, S, D].
        attention_mask: None, or [B, 1 or A, T, S]: bool (True: is seen) or to be added.
        dropout: The probability that a weight is dropped.
        scaling: By default D ** -0.5.
        is_causal: Without a mask: whether queries see the keys up to their own position only.

    Returns:
        [B, T, A, D], and None in place of the weights.
    """
    groups = query.shape[1] // key.shape[1]
    key_BATD, value_BATD = _repeated(key, groups), _repeated(value, groups)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    if attention_mask is not None or not causal or length == 1:
        mixed = _mix(query, key_BATD, value_BATD, attention_mask, dropout, scaling)
    else:
        blocks = [
            _mix(
                query[:, :, start:stop],
                key_BATD[:, :, :stop],
                value_BATD[:, :, :stop],
                _causal_mask(start, stop, query.device),
                dropout,
                scaling,
            )
            for start, stop in pairwise(_block_ends(length))
        ]
        mixed = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return mixed.transpose(1, 2).contiguous(), None


def tap_attention(model: PreTrainedModel, *, isolate: bool) -> None:
    """Make every attention layer of `model` leave its weights, for `layers.attention_weights`.

    Args:
        model: One whose attention goes through transformers' interface.
        isolate: See `use_attention`.

    Raises:
        UsageError: It does not.
    """
    if kernels_of(model) != IMPLEMENTATIONS:
        raise UsageError(
            f"the attention of {model.config.model_type} cannot be looked at",
            hint="leave `distil.attention` out",
        )
    model.set_attn_implementation("tapped" + ("_documents" if isolate else "_rows"))


def _tapped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As `matmul_softmax_attention`, in one piece; the weights, before dropout, stay with the module."""
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = _causal_mask(0, query.shape[2], query.device)
    weights_BATS = _weights(query, _repeated(key, groups), attention_mask, scaling)
    setattr(module, WEIGHTS, weights_BATS)
    weights_BATS = weights_BATS.to(value.dtype)
    if dropout:
        weights_BATS = functional.dropout(weights_BATS, p=dropout)
    return torch.matmul(weights_BATS, _repeated(value, groups)).transpose(1, 2).contiguous(), None


def _repeated(states_BKSD: torch.Tensor, groups: int) -> torch.Tensor:
    return states_BKSD if groups == 1 else states_BKSD.repeat_interleave(groups, dim=1)


def _block_ends(length: int) -> list[int]:
    blocks = _NUM_BLOCKS if length >= _SHORTEST_BLOCKED else 1
    return [length * i // blocks for i in range(blocks + 1)]


def _causal_mask(start: int, stop: int, device: torch.device) -> torch.Tensor:
    queries, keys = torch.arange(start, stop, device=device), torch.arange(stop, device=device)
    return queries[:, None] >= keys[None, :]


def _mix(
    query_BATD: torch.Tensor,
    key_BASD: torch.Tensor,
    value_BASD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    weights_BATS = _weights(query_BATD, key_BASD, mask, scaling).to(value_BASD.dtype)
    if dropout:
        weights_BATS = functional.dropout(weights_BATS, p=dropout)
    return torch.matmul(weights_BATS, value_BASD)


def _weights(
    query_BATD: torch.Tensor, key_BASD: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    scores_BATS = torch.matmul(query_BATD, key_BASD.transpose(2, 3)).float() * scaling
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: the rows of left padding see nothing, and must not become NaN.
        scores_BATS = scores_BATS.masked_fill(~mask, torch.finfo(scores_BATS.dtype).min)
    elif mask is not None:
        scores_BATS = scores_BATS + mask
    return torch.softmax(scores_BATS, dim=-1)


_UNIT = 32
"""Of documents one by one in half precision: lengths are rounded up to a multiple of it. For every other length oneDNN
makes kernels of its own and keeps them, about 5 MB a length (torch 2.13), a gigabyte in all."""


def document_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA with one causal call a document where transformers' mask says that rows are packed; no score is wasted.

    On CPU and not compiled only: elsewhere finding the documents would wait for the device or break the graph, and
    the mask, which says the same, is used. So it is where the architecture does not hand `position_ids` down.

    Args:
        module: The attention layer.
        query: [B, A, T, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        attention_mask: None when there is one document a row, else bool [B, 1, T, S].
        position_ids: [B or 1, T], 0 where a document starts.
        sliding_window: The mask also holds a window: then it is used.
        options: As for `sdpa` (dropout, scaling, ...).

    Returns:
        [B, T, A, D], and None in place of the weights.

    **Source**: Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021, section 3.2.
    """
    splits = (
        attention_mask is not None
        and position_ids is not None
        and sliding_window is None
        and query.shape[2] == key.shape[2] == position_ids.shape[1]
        and query.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )
    if not splits:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert position_ids is not None
    pieces = []
    unit = 1 if query.dtype == torch.float32 else _UNIT
    for row, start, stop in _documents(position_ids.expand(query.shape[0], -1)):
        wide = start + unit * math.ceil(
            (stop - start) / unit
        )  # what comes later no position of the document sees
        q, k, v = (states[row : row + 1, :, start:wide] for states in (query, key, value))
        pieces.append(sdpa_attention_forward(module, q, k, v, None, **options)[0][0, : stop - start])
    return torch.cat(pieces).unflatten(0, (query.shape[0], query.shape[2])), None


def _documents(position_ids_BT: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of each document, in order. One starts wherever positions do not go on by one."""
    length = position_ids_BT.shape[1]
    for row, restarts in enumerate((position_ids_BT.diff(dim=1) != 1).unbind()):
        starts = [0, *(restarts.nonzero().flatten() + 1).tolist(), length]
        for start, stop in pairwise(starts):
            yield row, start, stop


def _mask_of_documents(*, allow_is_causal_skip: bool = True, **facts: Any) -> torch.Tensor | None:
    padding = facts.get("attention_mask")
    if _is_whole(padding):
        padding = facts["attention_mask"] = None
    if padding is not None and padding.device.type != "cpu":
        # Whether nothing is filled up would have to be asked of the device.
        return sdpa_mask(**{**facts, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    # A skipped mask means "causal", which `matmul_softmax_attention` takes for a square only.
    return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip and _is_square(facts), **facts)


def _mask_of_rows(*, local_size: int | None = None, **facts: Any) -> torch.Tensor | None:
    plain = (
        _is_square(facts)
        and (facts.get("attention_mask") is None or _is_whole(facts["attention_mask"]))
        and not facts.get("use_vmap", False)
        and (local_size is None or local_size >= facts["kv_length"])
    )
    return None if plain else _mask_of_documents(local_size=local_size, **facts)


def _is_square(facts: dict[str, Any]) -> bool:
    offsets = (facts.get("q_offset", 0), facts.get("kv_offset", 0))
    return bool(facts["q_length"] == facts["kv_length"] and offsets == (0, 0))


for _suffix, _mask in (("_documents", _mask_of_documents), ("_rows", _mask_of_rows)):
    AttentionInterface.register(f"tapped{_suffix}", _tapped_attention)
    AttentionMaskInterface.register(f"tapped{_suffix}", _mask)
AttentionInterface.register("flex_documents", flex_documents_attention)
AttentionMaskInterface.register("flex_documents", _mask_of_documents)
AttentionInterface.register(
    "flex_rows", sdpa_attention_forward
)  # the flash kernel sees whole rows as fast as anything
AttentionMaskInterface.register("flex_rows", _mask_of_rows)
for _name, _kernel in (("sdpa", document_sdpa_attention), ("compiled", matmul_softmax_attention)):
    AttentionInterface.register(f"{_name}_documents", _kernel)
    AttentionMaskInterface.register(f"{_name}_documents", _mask_of_documents)
    AttentionInterface.register(
        f"{_name}_rows", sdpa_attention_forward if _name == "sdpa" else matmul_softmax_attention
    )
    AttentionMaskInterface.register(f"{_name}_rows", _mask_of_rows)


def drops_attention(config: Any) -> bool:
    """Whether a model's configuration has it drop attention weights while it learns, however it names that."""
    return any(
        isinstance(value, int | float) and value > 0
        for name, value in config.to_dict().items()
        if "att" in name and ("dropout" in name or "pdrop" in name)
    )


def choose_attention(
    *,
    device: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    seq_len: int,
    head_dim: int,
    compiled: bool,
    isolate: bool,
    drops: bool = False,
) -> tuple[str, str, dict[str, float]]:
    """Time forward and backward of one layer's attention with each kernel that is in question; choose the fastest.

    Not compiled that takes well under a second; compiled, some seconds of compiling when nothing is kept from before.

    Args:
        device: `cpu`, `cuda`, ...; on a GPU only isolated documents leave a choice: SDPA's flash kernels see whole
            rows, and take no mask.
        dtype: The type of queries, keys and values.
        batch: Rows of a micro-batch.
        heads: Attention heads.
        kv_heads: Key/value heads.
        seq_len: Tokens in a row.
        head_dim: The size of a head.
        compiled: Whether the model will be compiled.
        isolate: Whether documents in a row are kept apart.
        drops: Whether the model drops attention weights, which FlexAttention cannot.

    Returns:
        The name, the reason as text, and the seconds of each kernel that was measured.
    """
    if device not in _IN_QUESTION or (device == "cuda" and not isolate):
        return "sdpa", f"SDPA has fused kernels on {device}", {}
    if device == "cuda" and drops:
        return "sdpa", "the model drops attention weights, which FlexAttention cannot", {}
    score_bytes = 4 * batch * heads * seq_len**2
    if device == "cpu" and score_bytes > _MOST_SCORE_BYTES:
        return "sdpa", f"keeping the scores would take {score_bytes / 2**20:.0f} MiB a layer", {}

    def states(heads: int) -> torch.Tensor:
        return torch.randn(batch, seq_len, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)

    query, key, value = states(heads), states(kv_heads), states(kv_heads)
    positions = _probe_positions(batch, seq_len).to(device) if isolate else None
    seconds, failed = {}, ""
    for name, kernel in _IN_QUESTION[device]:
        try:
            seconds[name] = _seconds(name, kernel, (query, key, value), positions, compiled=compiled)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if device == "cpu" or name == "sdpa":
                raise
            failed = f"; {name} does not work here ({str(error).splitlines()[0]})"
    name = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
    mode = "compiled" if compiled else "not compiled"
    return name, f"measured on {batch} x {seq_len}, {mode}: {times} a layer{failed}", seconds


_IN_QUESTION: dict[str, tuple[tuple[str, Callable[..., Any]], ...]] = {
    "cpu": (("sdpa", document_sdpa_attention), ("compiled", matmul_softmax_attention)),
    "cuda": (("sdpa", document_sdpa_attention), ("flex", flex_documents_attention)),
}
"""The kernels that are measured, by device."""


def _probe_positions(batch: int, seq_len: int) -> torch.Tensor:
    """Rows of a few equally long documents."""
    length = -(-seq_len // _PROBE_DOCUMENTS)
    return (torch.arange(seq_len) % length).expand(batch, -1)


def _seconds(
    name: str,
    kernel: Callable[..., tuple[torch.Tensor, None]],
    states: tuple[torch.Tensor, ...],
    position_ids: torch.Tensor | None,
    *,
    compiled: bool,
) -> float:
    """The best of a few runs, forward and backward, after one to warm up."""
    module = torch.nn.Module()
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]  # type: ignore[assignment]

    documents = None
    if position_ids is not None:
        documents = (position_ids.diff(dim=1, prepend=position_ids[:, :1]) < 0).cumsum(1)
    blocks = block_mask(documents) if name == "flex" and documents is not None else None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask: torch.Tensor | BlockMask | None = blocks
        if blocks is None and documents is not None:
            mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
        return kernel(module, query, key, value, mask, position_ids=position_ids, is_causal=True)[0]

    run = torch.compile(attend, dynamic=False) if compiled else attend
    inputs = tuple(state.detach().requires_grad_() for state in states)
    times = []
    for _ in range(1 + _PROBE_RUNS):
        start = _now(states[0].device)
        output = run(*inputs)
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        times.append(_now(states[0].device) - start)
    return min(times[1:])


def _now(device: torch.device) -> float:
    """Seconds: of a processor those of the process, so that other programs do not count; of a GPU when it is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
