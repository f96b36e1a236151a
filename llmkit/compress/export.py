"""A model in the form of another runtime, run there before it is left behind; or in 16 bits.

What does not say there what the model says here is an error, and nothing is left.
"""

import copy
import inspect
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from llmkit.compress.alike import Alike, Inputs, compare, loss_of, probes_of
from llmkit.compress.gguf_export import (
    Tensor,
    Type,
    as_stored,
    check_family,
    read_back,
    tensors_of,
    write_gguf,
)
from llmkit.compress.gguf_words import words_of
from llmkit.compress.given import Given, Made
from llmkit.compress.onnx_export import write_onnx
from llmkit.compress.torch_export import write_torch
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.models.gguf_model import GgufModel, need_llama_cpp
from llmkit.models.lowrank import METHOD as LOW_RANK
from llmkit.models.rounded import roundings
from llmkit.models.runtime_model import RuntimeModel
from llmkit.models.runtimes import FILES, Runtime, load_runtime
from llmkit.recipe.architectures import kind_of_config
from llmkit.recipe.compression import Step
from llmkit.registry import ModelKind

TYPES: Mapping[str, tuple[str, ...]] = {
    "onnx": ("f32", "int8"),
    "gguf": ("q8_0", "f32", "f16", "q4_0"),
    "torch": ("f32",),
    "bf16": (),
    "fp16": (),
}
"""How each form stores weights; `auto` is the first."""

_CLOSE = 1e-3
"""The most that a number of an exported model may be off, as a share of the largest, or of 1: the order of sums."""
_RELATIVE = {"f32": 0.01, "f16": 0.01, "q8_0": 0.2, "q4_0": 0.2}
"""The most that llama.cpp may differ, as a share of the spread of logits: it keeps what it read in float16, and of
weights in blocks it rounds what they are multiplied with to 8 bits, too (measured: 0.066 with a trained model, 0.03
with random ones)."""
_DIVERGENCE = 0.05
"""The most that its probabilities may diverge from those of the same weights, in nats (measured: 0.004 and 0.0005)."""
_COSTLY = 0.3
"""From this share of the spread on, a person is told what rounding costs."""
_SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES: Mapping[Runtime, tuple[str, str]] = {
    "onnx": ("onnxruntime", "onnxruntime"),
    "gguf": ("llama.cpp of llama-cpp-python", "llama_cpp_python"),
    "torch": ("torch", "torch"),
}
_COMPOSES = (
    "the tokenizer brings text to NFC first and llama.cpp does not: text that is not in NFC gets other tokens"
)
_SAMPLE = (
    "It's 12345 naïve words: 日本語 — déjà vu!\n\n\tif x != 3:  # don't\n"
    "  two  blanks,   three \r\n\r\n1,234.5% of 2026年的中文文本：分词测试。🙂👩‍🚀 ÀÉ I'LL we're\u3000end  "
)


def apply(given: Given, step: Step) -> Made:
    """Export a model.

    Args:
        given: The model.
        step: `to` and `type`.

    Raises:
        UsageError: The architecture or its tokenizer has no such form.
        MissingError: A package is missing.
        RunError: The exported model does not say what the model says.
    """
    kind, form = _check(given.model, step)
    if step.to in ("bf16", "fp16"):
        return _in_sixteen(given, step.to, kind)
    runtime: Runtime = step.to  # type: ignore[assignment]  # `_check` has seen it
    folder = tempfile.TemporaryDirectory(prefix="llmkit-export-")
    try:
        made, facts, warnings = _made(given, runtime, form, kind, Path(folder.name))
    except BaseException:
        folder.cleanup()
        raise
    files = {path.name: path.stat().st_size for path in Path(folder.name).glob("model.*")}
    known = {"to": step.to, "type": form, "file_bytes": sum(files.values()), **facts}
    return Made(made, known, _moving(folder), warnings, standard=False)


def _check(model: PreTrainedModel, step: Step) -> tuple[ModelKind, str]:
    """The model's kind, and how weights are stored."""
    assert step.to is not None
    _check_weights(model, step.to)
    types, form = TYPES[step.to], step.type or "auto"
    if form != "auto" and form not in types:
        raise UsageError(
            f"export: `to: {step.to}` has no `type: {form}`",
            hint=f"it has {', '.join(types)}" if types else "leave `type` out",
        )
    name = type(model).__name__
    names = {"architectures": [name], "model_type": model.config.model_type}
    kind = kind_of_config({**names, "is_encoder_decoder": name.endswith("ForConditionalGeneration")})
    if step.to == "gguf" and kind != "causal":
        raise UsageError(
            "to: gguf: llama.cpp's form is there for models that predict the next token only",
            hint="`to: onnx` takes this one",
        )
    return kind, types[0] if form == "auto" and types else form


def _check_weights(model: PreTrainedModel, to: str) -> None:
    """Refuse weights that are not what a form holds."""
    known = getattr(model.config, "quantization_config", None) or {}
    kind = known.get("quant_method") if isinstance(known, Mapping) else known.quant_method
    if kind == LOW_RANK and to not in ("onnx", "torch"):
        raise UsageError(
            f"export: layers of this model are products of two smaller ones, which `to: {to}` cannot hold",
            hint="`to: onnx` and `to: torch` can",
        )
    if (known and kind != LOW_RANK) or roundings(model):
        raise UsageError(
            "export: the model is quantised already, which no other form keeps",
            hint="export the model that it was made from; `type` quantises: to: gguf, type: q8_0",
        )


def _made(
    given: Given, runtime: Runtime, form: str, kind: ModelKind, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any], list[str]]:
    """Write and run an export: the model that it stands for, what to say of it, and warnings."""
    given.told(f"writing {FILES[runtime]}")
    probes = probes_of(given, kind)
    given.model.config.save_pretrained(folder)
    if runtime == "gguf":
        return _gguf(given, form, probes, folder)
    inputs = _for_tracing(probes[0], given)
    if runtime == "torch":
        write_torch(given.model, kind, inputs, folder / FILES[runtime])
    else:
        write_onnx(given.model, kind, inputs, folder / FILES[runtime], int8=form == "int8")
    given.told("running it")
    other = load_runtime(folder).eval()
    alike = compare(given.model, other, probes, kind)
    if form == "int8":
        _refuse(alike, alike.largest < float("inf"), f"{FILES[runtime]} gives numbers that are not finite")
    else:
        limit = _CLOSE * max(1.0, alike.scale)
        _refuse(
            alike,
            alike.largest <= limit,
            f"{FILES[runtime]} differs by {alike.largest:.2g}, over {limit:.2g}",
        )
    facts = {"runtime": _version(runtime), "difference": alike.to_dict()}
    if form != "int8":
        facts["bound"] = {"largest_difference": limit}
    warnings = []
    if form == "int8" and alike.relative > _COSTLY:
        warnings.append(
            f"matrices of 8 bits change what the model says by {alike.relative:.0%} of its spread; `type: f32` "
            "says the same"
        )
    return given.model, facts | _losses(given, other, kind), warnings


def _gguf(
    given: Given, form: str, probes: list[dict[str, torch.Tensor]], folder: Path
) -> tuple[PreTrainedModel, dict[str, Any], list[str]]:
    """The same for llama.cpp; where it is not installed, the file is read back and its weights are compared."""
    model, file = given.model, folder / FILES["gguf"]
    check_family(model)
    tokenizer = AutoTokenizer.from_pretrained(given.place, trust_remote_code=False)
    words = words_of(tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    stored: Type = form  # type: ignore[assignment]  # one of TYPES["gguf"]
    tensors = tensors_of(model, stored)
    write_gguf(model, words, tensors, file, name=given.place.name)
    rounded = _rounded(model, file, tensors)
    facts: dict[str, Any] = {
        "stored": dict(Counter(one.type for one in tensors)),
        "chat_template": bool(words.template),
    }
    warnings = [_COMPOSES] if words.composes else []
    try:
        need_llama_cpp()
    except MissingError as error:
        cost = compare(model, rounded, probes, "causal")
        facts |= {"runtime": None, "difference": cost.to_dict()}
        warnings.append(
            f"model.gguf was read back and holds the right weights, but was not run: {error.message}"
        )
        return rounded, facts | _losses(given, rounded, "causal"), warnings
    given.told("running it in llama.cpp")
    other = load_runtime(folder).eval()
    assert isinstance(other, GgufModel)
    _check_tokens(tokenizer, other, probes, composes=words.composes)
    alike, limit = compare(rounded, other, probes, "causal"), _RELATIVE[form]
    held = alike.relative <= limit
    _refuse(alike, held, f"llama.cpp differs by {alike.relative:.2g} of the logits' spread, over {limit:g}")
    far = alike.kl or 0.0
    _refuse(alike, far <= _DIVERGENCE, f"llama.cpp diverges by {far:.2g} nats, over {_DIVERGENCE:g}")
    cost = compare(model, other, probes, "causal")
    facts |= {
        "runtime": _version("gguf"),
        "difference": cost.to_dict(),
        "bound": {"relative_difference": limit, "kl": _DIVERGENCE},
    }
    facts["from_its_weights"] = alike.to_dict()
    facts |= _losses(given, other, "causal")
    other.close()
    return rounded, facts, warnings


def _rounded(model: PreTrainedModel, file: Path, tensors: Sequence[Tensor]) -> PreTrainedModel:
    """A model with the weights that a file stands for.

    Raises:
        RunError: They are not the model's own, rounded.
    """
    found, own = read_back(file, tensors), model.state_dict()
    for one in tensors:
        if not torch.equal(found[one.source], as_stored(own[one.source], one)):
            raise RunError(
                f"export: {file.name}: {one.name} does not hold {one.source}",
                hint="this is a fault of the exporter: export the model in another form, such as `to: bf16`",
            )
    made = copy.deepcopy(model)
    made.load_state_dict(found, strict=False)
    made.tie_weights()
    return made


def _check_tokens(tokenizer: Any, other: GgufModel, probes: Sequence[Inputs], *, composes: bool) -> None:
    """Refuse a file by which llama.cpp reads other tokens than the model learned.

    Raises:
        RunError: It does.
    """
    texts = [tokenizer.decode(row.tolist()) for inputs in probes for row in inputs["input_ids"]]
    for text in [_SAMPLE, *texts]:
        text = unicodedata.normalize("NFC", text) if composes else text
        ours, theirs = tokenizer(text, verbose=False)["input_ids"], other.tokenize(text)
        if ours != theirs:
            pairs = enumerate(zip_longest(ours, theirs))
            place, (own, their) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            raise RunError(
                f"export: llama.cpp reads other tokens: token {place} of {text[:40]!r} is {their}, not {own}",
                hint="export the model in another form, such as `to: onnx`",
            )


def _in_sixteen(given: Given, to: str, kind: ModelKind) -> Made:
    """The model with weights of 16 bits, and how it differs."""
    model, dtype = given.model, _SIXTEEN[to]
    probes = probes_of(given, kind)
    made = copy.deepcopy(model)
    for name, value in made.named_parameters():
        value.data = value.data.to(dtype).float()
        if not bool(value.isfinite().all()):
            raise UsageError(
                f"to: {to}: {name} has numbers beyond its largest, {torch.finfo(dtype).max:g}",
                hint="to: bf16",
            )
    alike = compare(model, made, probes, kind)
    held = alike.largest < float("inf")
    _refuse(alike, held, f"with weights in {to} its answers are not finite")
    size = sum(value.numel() for value in made.parameters()) * 2
    facts = {"to": to, "file_bytes": size, "difference": alike.to_dict(), **_losses(given, made, kind)}
    return Made(made, facts, partial(_write_sixteen, made, dtype))


def _write_sixteen(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Save it; what is no weight, such as the frequencies of positions, stays as it is."""
    for value in model.parameters():
        value.data = value.data.to(dtype)
    model.save_pretrained(folder)
    for value in model.parameters():
        value.data = value.data.float()


def _for_tracing(inputs: Inputs, given: Given) -> dict[str, torch.Tensor]:
    """Inputs of two rows at least: of one, a program would be made for one row."""
    made = {name: value if len(value) > 1 else value.repeat(2, 1) for name, value in inputs.items()}
    names = AutoTokenizer.from_pretrained(given.place, trust_remote_code=False).model_input_names
    takes = inspect.signature(given.model.forward).parameters
    if "token_type_ids" in names and "token_type_ids" in takes and "token_type_ids" not in made:
        made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    return made


def _losses(given: Given, other: PreTrainedModel | RuntimeModel, kind: ModelKind) -> dict[str, float]:
    """The loss before and after, where it can be had."""
    before = loss_of(given.core, given.model, kind, given.batches)
    after = loss_of(given.core, other, kind, given.batches)
    if before is None or after is None:
        return {}
    return {"loss_before": before, "loss_after": after}


def _moving(folder: "tempfile.TemporaryDirectory[str]") -> Callable[[Path], None]:
    """Leave what is in a folder in another one."""

    def write(target: Path) -> None:
        try:
            for path in sorted(Path(folder.name).iterdir()):
                shutil.move(path, target / path.name)  # on one disk nothing is copied
        finally:
            folder.cleanup()

    return write


def _version(runtime: Runtime) -> str:
    """What ran it."""
    name, package = _PACKAGES[runtime]
    return f"{name} {version(package)}"


def _refuse(alike: Alike, held: bool, said: str) -> None:
    if not held:
        raise RunError(
            f"export: {said}: it does not say what the model says ({alike.places:,} places compared)",
            hint="this is a fault of the exporter for this model: export it in another form, such as `to: bf16`",
        )
