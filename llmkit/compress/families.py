"""Where the architectures that can be made narrower or shallower have what can be taken out."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from llmkit.errors import UsageError


@dataclass(frozen=True)
class Feed:
    """The feed-forward layer of a block.

    Attributes:
        place: Its module, by the end of its name in the block; empty: the block itself.
        into: The linear layers that make the channels; those that a model does not have are passed over.
        out: The one that reads them.
        fused: Matrices that a layer of `into` holds, one after the other.
        width: The configuration's number of channels, for each list of blocks.
    """

    place: str
    into: tuple[str, ...]
    out: str
    width: tuple[str, ...]
    fused: int = 1


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Attributes:
        places: Its modules, by the ends of their names in the block.
        query: The linear layer that makes the queries.
        shared: Those that make keys and values.
        out: The one that reads what the heads give.
        heads: The configuration's number of heads.
        groups: That of key/value heads; empty: each head has its own.
        size: Numbers of a head.
        bias: A table with a column for each head, which all blocks share: their heads go alike.
    """

    places: tuple[str, ...]
    query: str
    shared: tuple[str, ...]
    out: str
    heads: str
    groups: str
    size: str
    bias: str = ""


@dataclass(frozen=True)
class Family:
    """Where an architecture has what can be taken out.

    Attributes:
        depth: The configuration's number of blocks, for each list of them.
        feed: Its feed-forward layers.
        attention: Its attention, where a head's size does not follow from how many there are.
        pinned: Whether the first block has what the others have not, so that it stays.
    """

    depth: tuple[str, ...]
    feed: Feed
    attention: Attention | None = None
    pinned: bool = False


_HEADS = Attention(
    ("self_attn",),
    "q_proj",
    ("k_proj", "v_proj"),
    "o_proj",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_LLAMA = Family(
    ("num_hidden_layers",),
    Feed("mlp", ("gate_proj", "up_proj"), "down_proj", ("intermediate_size",)),
    _HEADS,
)
_BERT = Family(
    ("num_hidden_layers",), Feed("", ("intermediate.dense",), "output.dense", ("intermediate_size",))
)
_T5_HEADS = Attention(
    ("SelfAttention", "EncDecAttention"),
    "q",
    ("k", "v"),
    "o",
    "num_heads",
    "",
    "d_kv",
    bias="relative_attention_bias",
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Family(("n_layers",), Feed("ffn", ("lin1",), "lin2", ("hidden_dim",))),
    "modernbert": Family(
        ("num_hidden_layers",), Feed("mlp", ("Wi",), "Wo", ("intermediate_size",), fused=2), pinned=True
    ),
    "gpt2": Family(("n_layer",), Feed("mlp", ("c_fc",), "c_proj", ("n_inner",))),
    "t5": Family(
        ("num_layers", "num_decoder_layers"),
        Feed("DenseReluDense", ("wi", "wi_0", "wi_1"), "wo", ("d_ff", "d_ff")),
        _T5_HEADS,
        pinned=True,
    ),
    "bart": Family(
        ("encoder_layers", "decoder_layers"),
        Feed("", ("fc1",), "fc2", ("encoder_ffn_dim", "decoder_ffn_dim")),
    ),
}
"""By `model_type`."""


def family_of(config: PretrainedConfig, *, heads: bool = False) -> Family:
    """Where an architecture has its parts.

    Args:
        config: The model's.
        heads: Whether heads are to be taken out.

    Raises:
        UsageError: Nothing is known of it, or its heads cannot go; the message says whose can.
    """
    known = FAMILIES.get(config.model_type)
    if known is None:
        raise UsageError(
            f"{config.model_type}: nothing says where this architecture has its layers and channels",
            hint=f"it can be done with {', '.join(sorted(FAMILIES))}",
        )
    if heads and known.attention is None:
        able = sorted(name for name, family in FAMILIES.items() if family.attention is not None)
        raise UsageError(
            f"heads of a {config.model_type} cannot be taken out: in its configuration a head's size follows from how "
            "many there are",
            hint=f"it can be done with {', '.join(able)}; take `what: channels` or `what: layers` here",
        )
    return known
