"""Shapes of published models, as fields of transformers' configurations: to plan with and to train from scratch.

No weights come with them. The vocabulary is the published one: a tokenizer with fewer entries fits too. Tests build
each on the meta device and compare its parameters with the published number.
"""

from collections.abc import Mapping
from typing import Any

_Fields = dict[str, Any]
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _decoder(
    model_type: str,
    vocab_size: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> _Fields:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
        **more,
    }


def _llama3(
    hidden: int, inner: int, layers: int, heads: int, *, factor: float = 8.0, tied: bool = False
) -> _Fields:
    return _decoder(
        "llama", 128_256, hidden, inner, layers, heads, 8,
        max_position_embeddings=131_072, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={**_LLAMA3_ROPE, "factor": factor},
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> _Fields:
    return _decoder(
        "qwen3", 151_936, hidden, inner, layers, heads, 8,
        head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip


def _smollm2(hidden: int, inner: int, heads: int, kv_heads: int, layers: int) -> _Fields:
    return _decoder(
        "llama", 49_152, hidden, inner, layers, heads, kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": _smollm2(576, 1536, 9, 3, 30),
    "smollm2-360m": _smollm2(960, 2560, 15, 5, 32),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14_336, 32, 32),
    "llama-3.1-70b": _llama3(8192, 28_672, 80, 64),
    "mistral-7b": _decoder(
        "mistral", 32_768, 4096, 14_336, 32, 32, 8,
        max_position_embeddings=32_768, sliding_window=None, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
}  # fmt: skip
"""By name.

**Source**: the models' own configurations and cards; Llama Team 2024, "The Llama 3 Herd of Models", table 3; Jiang et
al. 2023, "Mistral 7B", table 1 (the vocabulary is that of version 0.3); Qwen Team 2025, "Qwen3 Technical Report",
table 1.
"""
