"""The shapes that ship with llmkit, by family and size, as fields of transformers' configurations.

A family has up to four common sizes, of about 1 (`tiny`), 6 (`mini`), 25 (`small`) and 90 million (`base`) parameters
besides its embeddings, which are 128, 256, 512 and 768 wide in every family; so families compare with each other at the
same size. Vocabulary and context come from the recipe.
"""

from collections.abc import Callable, Mapping
from operator import floordiv
from typing import Any

from llmkit.errors import UsageError
from llmkit.plan.published import PUBLISHED
from llmkit.recipe.architectures import OWN, preset_of_family
from llmkit.recipe.schema import Model
from llmkit.registry import nearest

_Fields = dict[str, Any]
_WIDTHS = {"tiny": 128, "mini": 256, "small": 512, "base": 768}
_LAYERS = {"tiny": 4, "mini": 6, "small": 8, "base": 12}
_HEADS = {"tiny": 4, "mini": 4, "small": 8, "base": 12}
_LAYERS_A_SIDE = {"tiny": 2, "mini": 3, "small": 4, "base": 6}


def _gated(hidden: int) -> int:
    """The width of a gated MLP: 8/3 of the model's, to the nearest multiple of 64.

    That keeps the parameters of a plain MLP of 4 (**Source**: Shazeer 2020, "GLU Variants Improve Transformer", section
    2).
    """
    return 64 * round(hidden * 8 / 3 / 64)


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, *, tied: bool = True) -> _Fields:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _gated(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": tied,
    }


def _qwen3(size: str) -> _Fields:
    """As Qwen3: two query heads to a key head, norms on both."""
    hidden, heads = _WIDTHS[size], _HEADS[size]
    return {**_llama(hidden, _LAYERS[size], heads, heads // 2), "model_type": "qwen3"}


def _gpt2(size: str) -> _Fields:
    sizes = {"n_embd": _WIDTHS[size], "n_layer": _LAYERS[size], "n_head": _HEADS[size]}
    return {"model_type": "gpt2", **sizes}


def _mamba2(size: str) -> _Fields:
    """Twice as many layers as a transformer, each of half a block's parameters."""
    hidden = _WIDTHS[size]
    return {
        "model_type": "mamba2",
        "hidden_size": hidden,
        "num_hidden_layers": 2 * _LAYERS[size],
        "head_dim": 32 if hidden < 512 else 64,
        "num_heads": 2 * hidden // (32 if hidden < 512 else 64),
        "state_size": 64 if hidden < 512 else 128,
        "n_groups": 1,
        "chunk_size": 64,
        "tie_word_embeddings": True,
    }


def _bert_like(model_type: str, size: str, **more: Any) -> _Fields:
    return {
        "model_type": model_type,
        "hidden_size": _WIDTHS[size],
        "intermediate_size": 4 * _WIDTHS[size],
        "num_hidden_layers": _LAYERS[size],
        "num_attention_heads": _HEADS[size],
        **more,
    }


def _t5(size: str) -> _Fields:
    """As T5 1.1, with a gated MLP and no dropout, but with tied embeddings (few parameters are left otherwise)."""
    hidden = _WIDTHS[size]
    return {
        "model_type": "t5",
        "d_model": hidden,
        "d_kv": hidden // _HEADS[size],
        "d_ff": _gated(hidden),
        "num_layers": _LAYERS_A_SIDE[size],
        "num_decoder_layers": _LAYERS_A_SIDE[size],
        "num_heads": _HEADS[size],
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
    }


def _bart(size: str) -> _Fields:
    sides = ("encoder", "decoder")
    return {
        "model_type": "bart",
        "d_model": _WIDTHS[size],
        **{f"{side}_layers": _LAYERS_A_SIDE[size] for side in sides},
        **{f"{side}_attention_heads": _HEADS[size] for side in sides},
        **{f"{side}_ffn_dim": 4 * _WIDTHS[size] for side in sides},
    }


_CELL_WIDTHS = {
    "rnn": {"tiny": 512, "mini": 1024, "small": 2048, "base": 4096},
    "lstm": {"tiny": 256, "mini": 512, "small": 1024, "base": 2048},
    "gru": {"tiny": 320, "mini": 576, "small": 1216, "base": 2304},
}


def _recurrent(cell: str, size: str) -> _Fields:
    return {
        **OWN[cell],
        "embedding_size": _WIDTHS[size],
        "hidden_size": _CELL_WIDTHS[cell][size],
        "num_hidden_layers": 2 if size == "tiny" else 3,
    }


def _cnn(size: str) -> _Fields:
    layers = {"tiny": 8, "mini": 12, "small": 12, "base": 20}
    return {**OWN["cnn"], "hidden_size": _WIDTHS[size], "num_hidden_layers": layers[size], "kernel_size": 4}


_MAKERS = {
    "gpt2": _gpt2,
    "qwen3": _qwen3,
    "mamba2": _mamba2,
    "bert": lambda size: _bert_like("bert", size),
    "roberta": lambda size: _bert_like("roberta", size, type_vocab_size=1, layer_norm_eps=1e-5),
    "modernbert": lambda size: _bert_like("modernbert", size, intermediate_size=_gated(_WIDTHS[size])),
    "electra": lambda size: _bert_like("electra", size, embedding_size=_WIDTHS[size]),
    "t5": _t5,
    "bart": _bart,
    "rnn": lambda size: _recurrent("rnn", size),
    "lstm": lambda size: _recurrent("lstm", size),
    "gru": lambda size: _recurrent("gru", size),
    "cnn": _cnn,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpt-tiny": _llama(128, 4, 4, 4),
    "gpt-mini": _llama(256, 6, 4, 4),
    "gpt-small": _llama(512, 8, 8, 8),
    "gpt-base": _llama(768, 12, 12, 12),
    "gpt-medium": _llama(1024, 24, 16, 16),
    "gpt-large": _llama(1536, 24, 12, 12),
    "gpt-1b": _llama(2048, 22, 16, 8, tied=False),
    **{f"{family}-{size}": make(size) for family, make in _MAKERS.items() for size in _WIDTHS},
}
"""Shapes by name. The `gpt` presets are llama's: about 1 M, 7 M, 30 M, 124 M, 350 M, 760 M and 1.2 B parameters."""


ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    "bart": {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    },
}
"""Other names of fields, by architecture, as transformers takes them."""

_Following = Mapping[str, tuple[tuple[str, ...], Callable[..., int]]]


def _four_times(hidden: int) -> int:
    return 4 * hidden


def _same(number: int) -> int:
    return number


_HEAD = (("hidden_size", "num_attention_heads"), floordiv)
_PLAIN_MLP: _Following = {"intermediate_size": (("hidden_size",), _four_times)}
_GATED_MLP: _Following = {"intermediate_size": (("hidden_size",), _gated)}
_FOLLOWING: Mapping[str, _Following] = {
    "llama": {"head_dim": _HEAD, "num_key_value_heads": (("num_attention_heads",), _same), **_GATED_MLP},
    "qwen3": {
        "head_dim": _HEAD,
        "num_key_value_heads": (("num_attention_heads",), lambda heads: heads if heads % 2 else heads // 2),
        **_GATED_MLP,
    },
    "mamba2": {"num_heads": (("hidden_size", "head_dim"), lambda hidden, width: 2 * hidden // width)},
    "bert": _PLAIN_MLP,
    "roberta": _PLAIN_MLP,
    "modernbert": _GATED_MLP,
    "electra": {**_PLAIN_MLP, "embedding_size": (("hidden_size",), _same)},
    "t5": {
        "d_kv": (("d_model", "num_heads"), floordiv),
        "d_ff": (("d_model",), _gated),
        "num_decoder_layers": (("num_layers",), _same),
    },
    "bart": {f"{side}_ffn_dim": (("d_model",), _four_times) for side in ("encoder", "decoder")},
}
"""Architecture -> field of its presets -> the fields that it follows from, and how."""


def preset_fields(preset: str) -> Mapping[str, Any]:
    """The fields of a preset, or of a published shape.

    Raises:
        UsageError: There is no such preset; the message lists them and the nearest one.
    """
    if preset in PUBLISHED:
        return PUBLISHED[preset]
    if preset not in PRESETS:
        guess = nearest(preset, PRESETS)
        raise UsageError(
            f"unknown preset {preset!r}; known: {', '.join(PRESETS)}",
            hint=f"did you mean {guess!r}?" if guess else "",
        )
    return PRESETS[preset]


def model_fields(spec: Model) -> dict[str, Any] | None:
    """The configuration that a recipe's `model` block writes out, `model_type` included; None for a model by name.

    Raises:
        UsageError: `config` names another `model_type` than `architecture`.
    """
    if spec.architecture is not None:
        return architecture_fields(spec.architecture, spec.config or {})
    if spec.config is not None:
        return dict(spec.config)
    return dict(preset_fields(spec.preset)) if spec.preset is not None else None


def architecture_fields(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an architecture: its family's `mini` preset, where there is one, under `config`.

    What follows from the width and the heads (their widths, those of keys, the MLP's width) follows from those that
    `config` gives, unless it gives it too.

    Raises:
        UsageError: `config` names another `model_type`.
    """
    own = OWN.get(architecture, {"model_type": architecture})
    for key, value in own.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"model.config.{key} is {config[key]!r}, but model.architecture is {architecture!r}",
                hint=f"leave `{key}` out of `config`",
            )
    preset = PRESETS.get(preset_of_family(architecture, "mini"), {})
    aliases = ALIASES.get(architecture, {})
    given = {aliases.get(key, key): value for key, value in config.items()} if preset else dict(config)
    merged = {**preset, **given, **own}
    for name, (causes, follow) in _FOLLOWING.get(architecture, {}).items():
        numbers = [merged[cause] for cause in causes]
        whole = all(isinstance(number, int) and number > 0 for number in numbers)
        if name not in given and whole and not given.keys().isdisjoint(causes):
            merged[name] = follow(*numbers)
    return merged
