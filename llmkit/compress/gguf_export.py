"""A causal model as a GGUF file for llama.cpp, with its tokenizer and chat template inside.

Shape suffixes: O outputs of a layer, I its inputs, V vocabulary.

**Source**: the GGUF specification of ggml (its keys); blocks of 32 numbers as the `gguf` package rounds them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmkit.compress.gguf_words import Words
from llmkit.errors import MissingError, UsageError

Array = npt.NDArray[Any]
Type = Literal["f32", "f16", "q8_0", "q4_0"]

FAMILIES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
}
"""llama.cpp's names for architectures, by transformers' ones."""

_BLOCK = 32
_F16_MOST = 65504.0
_FLOAT_LAYERS = ("position_embd.weight",)
_ENDS = ("token_embd.weight", "output.weight")


def need_gguf() -> Any:
    """The package gguf.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingError(f"`to: gguf` needs gguf ({error})", hint='pip install "llmkit[gguf]"') from error
    return gguf


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: Its name there.
        source: Its name in the model.
        type: How its numbers are stored.
        heads: Of weights that turn with positions: into how many heads their rows fall; else 0.
        turned: The model holds it with inputs before outputs.
    """

    name: str
    source: str
    type: str
    heads: int = 0
    turned: bool = False


def check_family(model: PreTrainedModel) -> None:
    """Refuse what llama.cpp computes in another way.

    Raises:
        UsageError: The architecture has no exporter, or a setting is one that llama.cpp has not.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"to: gguf: there is no exporter for {config.model_type}",
            hint=f"there is one for {', '.join(FAMILIES)}; others go `to: onnx`, `torch` or `bf16`",
        )
    if config.model_type == "gpt2":
        wanted = {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
        }
    else:
        kinds = set(getattr(config, "layer_types", None) or ())
        wanted = {"hidden_act": ("silu", "swish")}
        if kinds - {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
            raise UsageError(
                f"to: gguf: some layers of this {config.model_type} see a window of the text only",
                hint="export it `to: onnx`, `torch` or `bf16`",
            )
    for name, values in wanted.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise UsageError(
                f"to: gguf: llama.cpp knows no {config.model_type} with `{name}: {value}`",
                hint=f"it knows {', '.join(map(str, values))}",
            )


def tensors_of(model: PreTrainedModel, kind: Type) -> list[Tensor]:
    """What the file will hold: matrices in the type that is asked for, the rest in float32.

    Of a matrix whose rows are no multiple of 32 the numbers are stored in float16, and those of embeddings and output
    layer in 8 bits where 4 are asked for.

    Raises:
        UsageError: A tensor has no place in llama.cpp's form of the architecture.
    """
    gguf, config = need_gguf(), model.config
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[config.model_type]]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    found = []
    for source, value in model.state_dict().items():
        if tied and source == "lm_head.weight":
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UsageError(
                f"to: gguf: llama.cpp's {FAMILIES[config.model_type]} has no place for {source}",
                hint="export it `to: onnx`, `torch` or `bf16`",
            )
        turned = config.model_type == "gpt2" and value.ndim == 2 and ".h." in source
        width = value.shape[0] if turned else value.shape[-1]
        stored = _type_of(name, value.ndim, width, kind)
        found.append(Tensor(name, source, stored, _heads_of(source, config), turned))
    return found


def _type_of(name: str, dimensions: int, width: int, kind: Type) -> str:
    if dimensions < 2 or name in _FLOAT_LAYERS:
        return "F32"
    if kind in ("q8_0", "q4_0") and width % _BLOCK:
        return "F16"
    if kind == "q4_0" and name in _ENDS:
        return "Q8_0"
    return kind.upper()


def _heads_of(source: str, config: PretrainedConfig) -> int:
    """llama.cpp turns pairs of neighbours in a `llama`, transformers pairs half a head apart."""
    if FAMILIES[config.model_type] != "llama":
        return 0
    layer = source.rpartition(".")[0]
    if layer.endswith("q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if layer.endswith("k_proj") else 0


def _laid(value: Array, tensor: Tensor) -> Array:
    """A tensor's numbers as the file has them."""
    if tensor.turned:
        value = value.T
    if tensor.heads:
        halves = value.reshape(tensor.heads, 2, -1, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


def _unlaid(value: Array, tensor: Tensor) -> Array:
    """The reverse of `_laid`."""
    if tensor.heads:
        halves = value.reshape(tensor.heads, -1, 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value.T if tensor.turned else value)


def write_gguf(
    model: PreTrainedModel, words: Words, tensors: Sequence[Tensor], file: Path, *, name: str
) -> None:
    """Write a model's file.

    Args:
        model: In float32; `check_family` has seen it.
        words: Its tokenizer.
        tensors: From `tensors_of`.
        file: Where to.
        name: What the model is called.

    Raises:
        UsageError: A weight is too large for float16.
    """
    gguf = need_gguf()
    writer = gguf.GGUFWriter(file, FAMILIES[model.config.model_type])
    writer.add_name(name)
    _add_sizes(writer, model)
    _add_words(writer, words)
    _add_turn_end(writer, model, words)
    common = max((one.type for one in tensors), key=[one.type for one in tensors if one.type != "F32"].count)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if common == "F32" else kinds[f"MOSTLY_{common}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    weights = model.state_dict()
    for one in tensors:
        kind = gguf.GGMLQuantizationType[one.type]
        value = _laid(weights[one.source].detach().float().cpu().numpy(), one)
        if one.type == "F16" and np.abs(value).max() > _F16_MOST:
            raise UsageError(
                f"to: gguf: {one.source} has numbers beyond float16's largest ({np.abs(value).max():.3g})",
                hint="type: f32",
            )
        writer.add_tensor(one.name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    factors = _rope_factors(model.config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    _add_positions(writer, config)


def _add_positions(writer: Any, config: PretrainedConfig) -> None:
    turning = _rope(config)
    writer.add_rope_freq_base(turning["rope_theta"])
    kind = turning.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(need_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(turning["factor"])
    elif kind not in ("default", "llama3"):
        raise UsageError(
            f"to: gguf: positions of the kind {kind!r} cannot be exported",
            hint="default, linear and llama3 can; others go `to: onnx`, `torch` or `bf16`",
        )


def _rope(config: PretrainedConfig) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.rope_parameters
    return found


def _rope_factors(config: PretrainedConfig) -> Array | None:
    """By what Llama 3's scaling divides each frequency; None where there is none of it."""
    if config.model_type == "gpt2" or _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / _rope(config)["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled.numpy()).astype(np.float32)


def _add_words(writer: Any, words: Words) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.entries)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    adders: Mapping[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, number in words.special.items():
        adders[role](number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.template:
        writer.add_chat_template(words.template)


def _add_turn_end(writer: Any, model: PreTrainedModel, words: Words) -> None:
    """Another token than the end of text that ends what the model writes, such as the end of an answer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    others = [number for number in ends if number is not None and number != words.special.get("eos")]
    if others:
        writer.add_eot_token_id(others[0])


def as_stored(value: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """A tensor of the model with its numbers rounded as they are stored."""
    gguf = need_gguf()
    kind = gguf.GGMLQuantizationType[tensor.type]
    plain = value.detach().float().cpu().numpy()
    rows = np.ascontiguousarray(plain.T if tensor.turned else plain)
    rounded = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    return torch.from_numpy(np.ascontiguousarray(rounded.T if tensor.turned else rounded))


def read_back(file: Path, tensors: Sequence[Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a file stands for, in float32, by the model's own names.

    Args:
        file: From `write_gguf`.
        tensors: As there.
    """
    gguf = need_gguf()
    stored = {one.name: one for one in gguf.GGUFReader(file).tensors}
    found = {}
    for one in tensors:
        value = gguf.quants.dequantize(stored[one.name].data, stored[one.name].tensor_type)
        found[one.source] = torch.from_numpy(_unlaid(np.array(value, dtype=np.float32), one))
    return found
