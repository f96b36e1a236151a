"""Models whose weights are stored in few bits, loaded as plain ones: what the file says, in float32.

Their linear layers are ordinary ones afterwards, so everything that is done to models can be done to them. Where the
format says that what a layer reads is rounded too, the layer does that.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import MissingError, UsageError
from llmkit.models.rounded import Rounding, set_rounding

FORMAT = "compressed-tensors"
"""What `config.json` calls the format."""
_LEFT = ("weight_scale", "weight_zero_point", "weight_shape", "weight_packed")
_MARKS = ("quantization_scheme", "quantization_status", "quantization_enabled", "forward")


def check_package() -> None:
    """Refuse to go on without the package that knows the format.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise MissingError(
            f"weights in few bits are stored by compressed-tensors ({error})",
            hint='pip install "llmkit[compress]"',
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of that package, which has no switch for them."""
    from tqdm import tqdm

    plain = tqdm.__init__

    def hidden(self: Any, *args: Any, **settings: Any) -> None:
        plain(self, *args, **{**settings, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = plain


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that the weights are stored in few bits, in the format of compressed-tensors."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == FORMAT


def unpack(model: PreTrainedModel) -> None:
    """Make a model that transformers loaded in this format a plain one, in place; it computes the same.

    Args:
        model: As transformers loaded it.

    Raises:
        UsageError: It rounds what llmkit does not: outputs, or inputs with stored scales.
    """
    quantizer: Any = model.hf_quantizer
    quantizer.compressor.decompress_model(model)
    for name, layer in model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is None:
            continue
        rounding = _rounding(name, scheme)
        for mark in _MARKS:
            layer.__dict__.pop(mark, None)
        for left in _LEFT:
            if hasattr(layer, left):
                delattr(layer, left)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(layer.weight.detach().float())
        if rounding is not None:
            set_rounding(layer, rounding)
    model.requires_grad_(True)  # what was decompressed does not say so, and would never learn
    del model.config.quantization_config
    del model.hf_quantizer
    model.is_quantized = False


def _rounding(name: str, scheme: Any) -> Rounding | None:
    """What a layer rounds besides its weights."""
    inputs = scheme.input_activations
    if inputs is None and scheme.output_activations is None:
        return None
    known = inputs is not None and (inputs.num_bits, inputs.strategy, inputs.dynamic, inputs.symmetric)
    if known != (8, "token", True, True) or scheme.output_activations is not None:
        raise UsageError(
            f"{name}: activations are rounded in a way that llmkit does not know",
            hint="those of 8 bits with a scale for each token, found anew each time, are known",
        )
    return Rounding(None, inputs=True, float8=inputs.type == "float")
