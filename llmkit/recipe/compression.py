"""The settings of making a model smaller: the steps, and training that repairs what they lost."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmkit.recipe.block import Block, Words
from llmkit.recipe.objectives import Teaching
from llmkit.recipe.training import Optim, Train
from llmkit.recipe.units import Amount, Count, Length, Part, Ratio, Several
from llmkit.registry import METHODS


class Repair(Train):
    """How long, how much at once, and how the weights move."""

    length: Length = Amount(200, "steps")
    """When training ends: `200 steps`, `2M tokens`, `1 epochs`, or a time, `20m`."""
    optim: Optim = Optim(lr=1e-4)
    """The optimizer; by default AdamW at 1e-4."""


class Recover(Block):
    """Training that repairs what a step lost, on what the model learned from.

    Weights that the step set to zero stay zero; what it rounded is trained as rounded.
    """

    train: Repair = Repair()
    """How long and how."""
    distil: Teaching | None = Teaching()
    """Learn from the model as it was before the first step, too; `null`: from the data alone."""


class Step(Block):
    """One way to make a model smaller. What a method does not read is an error."""

    method: Literal["quantize", "prune", "distil", "factorize", "export"]
    """`quantize` stores weights in fewer bits; `prune` takes weights, layers, heads or channels out; `distil` makes a
    student with fewer or narrower layers, which begins with the model's and learns from it; `factorize` makes linear
    layers products of two smaller ones; `export` writes the form of another runtime, and checks it by running it
    there."""
    format: Literal["int8", "int4", "w8a8", "fp8", "mixed"] | None = None
    """With `quantize`: what is stored. Weights of 8 or 4 bits (`int8`, the default, and `int4`); `w8a8`, weights and
    activations of 8 bits; `fp8`, both as 8-bit floats; `mixed`, 4 or 8 bits by how much each layer loses."""
    bits: Annotated[float, Field(ge=4, le=8)] | None = None
    """With `quantize`: bits of a weight. 8 and 4 are `int8` and `int4` where no `format` is given; with `mixed` the
    mean over all weights, by default 5."""
    solver: Literal["auto", "rtn", "gptq", "awq"] | None = None
    """With `quantize`: how weights are rounded. Each to the nearest (`rtn`), making up for the error in those that
    follow (`gptq`), or with the channels scaled that matter most (`awq`). `auto`, the default: `rtn` for `int8` and
    `fp8`, else `gptq`."""
    group: Several | Literal["auto", "row"] | None = None
    """With `quantize`: weights in a row that share a scale. `auto`, the default: with 4 bits the largest of 128, 64
    and 32 that divides all rows, else the whole `row`."""
    symmetric: bool | None = None
    """With `quantize`: scales without an offset; by default `true`."""
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    """With `w8a8`: how much of the activations' range is moved into the weights first (SmoothQuant's alpha), by default
    0.5; 0 leaves it out."""
    damping: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With `gptq` and `sparsegpt`: what is added to the Hessian's diagonal, as a share of its mean; by default 0.01."""
    what: Literal["weights", "layers", "heads", "channels"] | None = None
    """With `prune`: what goes. Single `weights`, the default (they become zero: the files are no smaller), whole
    `layers`, attention `heads`, or `channels` of feed-forward layers; the last three leave a smaller, faster model of
    the same architecture."""
    share: Part | None = None
    """With `prune` and `factorize`: how much goes, such as `50%` of the weights, or of the parameters of the layers
    that are factorised; needed."""
    by: Literal[
        "auto", "magnitude", "wanda", "sparsegpt", "activation", "gradient", "influence", "weights"
    ] | None = None  # fmt: skip
    """What matters least. With `prune`: weights by `magnitude`, `wanda` or `sparsegpt` (`auto`); heads and channels by
    `magnitude`, `activation` (`auto`) or `gradient`; layers by `influence` (`auto`). With `factorize`: what is to be
    kept of the `weights`, or of what they make of real inputs, `activation` (`auto`)."""
    pattern: Literal["free", "2:4", "4:8"] | None = None
    """With `prune` of weights: so many of each few in a row are zero; by default any (`free`)."""
    scope: Literal["layer", "global"] | None = None
    """With `prune` by magnitude: whether each `layer` gives its share, the default, or all together."""
    stages: Count | None = None
    """With `prune`: in how many steps the share is reached, each followed by `recover`; by default one."""
    layers: Count | None = None
    """With `distil`: layers of the student; by default as many as the teacher has."""
    choose: Literal["uniform", "influence", "first"] | None = None
    """With `distil`: which of the teacher's layers the student begins with: evenly spaced ones, the default, those that
    matter most, or the first."""
    channels: Ratio | None = None
    """With `distil`: the share of feed-forward channels that the student has, the most active; by default all."""
    to: Literal["onnx", "gguf", "torch", "bf16", "fp16"] | None = None
    """With `export`: the form, needed: `onnx` for onnxruntime, `gguf` for llama.cpp, `torch` for torch.export, or
    safetensors of 16 bits."""
    type: Literal["auto", "f32", "f16", "q8_0", "q4_0", "int8"] | None = None
    """With `export`: how weights are stored. `onnx` takes `f32` (`auto`) and `int8`, `gguf` `f32`, `f16`, `q8_0`
    (`auto`) and `q4_0`."""
    keep: Words | None = None
    """Linear layers that stay as they are, by name: patterns as in `train.optim.groups`. The output layer always
    stays."""
    recover: Recover | None = None
    """Train afterwards, so that what was lost comes back; `distil` always does."""

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, data: Any) -> Any:
        """What is not said is as the method has it."""
        return with_method_defaults(data) if isinstance(data, dict) else data


def with_method_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A step with what its method has where the recipe says nothing."""
    method = data.get("method")
    if not isinstance(method, str) or method not in METHODS:
        return dict(data)
    own = dict(METHODS[method].settings)
    given = {name: value for name, value in data.items() if value is not None}
    if method == "quantize" and "format" not in given and isinstance(given.get("bits"), int | float):
        own["format"] = {8: "int8", 4: "int4"}.get(given["bits"], "mixed")
    return own | given


class Calibration(Block):
    """What the steps look at: text or rows that the model learned from."""

    rows: Count = 128
    """So many rows of text or of the task."""
    tokens: Count | None = None
    """Tokens of each row of text at most; by default as many as the model was trained with, at most 2048."""


class Target(Block):
    """How small or fast the model must be; methods are tried from the mildest on."""

    size: Part | None = None
    """Its files, as a share of those of the model in 16 bits."""
    latency: Part | None = None
    """Its time for a batch, as a share of the model's in bf16."""
