"""Adapters: thin matrices beside a model's linear layers, put into the model itself, which stays its own class.

PEFT makes the layers and its form is what is saved: `adapter_config.json` and `adapter_model.safetensors`, which plain
`PeftModel.from_pretrained(base, folder)` loads.

**Source**: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; rsLoRA:
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, theorem 3.2; DoRA: Liu et al.,
"DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, equation 5.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmkit.errors import UsageError
from llmkit.models.adapter_files import fill_adapter, import_peft, not_of_this_model, read_config
from llmkit.models.freezing import Counts, count_learning, depths_of, head_parameters
from llmkit.models.names import matches, near_names
from llmkit.models.quantized import bits_of, quantize_linear
from llmkit.recipe.parts import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig

_NO_TARGETS: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",)
)
"""Layers whose weights are read past the layer by the model's own kernels, by model type: an adapter has no effect."""


def inject_adapter(
    model: PreTrainedModel, spec: Adapter, *, seed: int, new: Sequence[str] = (), base: str | None = None
) -> Counts:
    """Put an adapter into a model: from now on it learns and the model does not.

    A new one changes nothing yet: the second of its thin matrices is zero. One that goes on from a folder (`start`) is
    as it was saved.

    Args:
        model: The network, its base already quantised where it is to be; changed in place, its class stays.
        spec: The recipe's `adapter`.
        seed: Decides the first thin matrices.
        new: Modules that begin at random, such as a new head: they learn whole, and are kept with the adapter.
        base: The name or folder of the base, kept with the adapter.

    Raises:
        MissingError: PEFT is not installed, or the folder to go on from has no adapter.
        UsageError: A pattern fits nothing, or what is gone on from has another shape.
    """
    config = adapter_config(model, spec, new=new, base=base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, model, spec.name)
    if spec.start is not None:
        _go_on_from(model, Path(spec.start), spec)
    return count_learning(model)


def quantize_base(model: PreTrainedModel, bits: int, *, device: torch.device) -> None:
    """Hold the linear layers of a model's body in few bits, before an adapter is put into it: QLoRA.

    Embeddings, norms and the head stay as they are.

    Args:
        model: The network, on any device; it is moved.
        bits: 4 or 8.
        device: An NVIDIA GPU; see `quantizing_needs`.

    Raises:
        UsageError: It has linear layers of another kind than torch's.
    """
    body = _body_modules(model)
    names = [name for name in _linear_layers(model) if name in body]
    quantize_linear(model, names, bits=bits, device=device)


def adapter_config(
    model: PreTrainedModel, spec: Adapter, *, new: Sequence[str] = (), base: str | None = None
) -> "LoraConfig":
    """PEFT's configuration of the adapter that a recipe asks for, its targets named one by one."""
    peft = import_peft()
    whole = _whole_modules(model, spec, new)
    targets = _targets(model, spec, whole)
    modules = dict(model.named_modules())
    ties = _are_tied(model, whole)
    return peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha_or_default,
        lora_dropout=spec.dropout,
        target_modules=_shortest(targets, modules),
        modules_to_save=sorted(whole) or None,
        use_rslora=spec.method == "rslora",
        use_dora=spec.method == "dora",
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in targets),
        ensure_weight_tying=ties,
        base_model_name_or_path=base,
        task_type=_task_type(model),
        inference_mode=False,
    )


def _inject(config: "LoraConfig", model: PreTrainedModel, name: str) -> None:
    peft = import_peft()
    with warnings.catch_warnings(), _telling_of_bits(model):
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # of models with both kinds of layers
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second one is meant
        peft.inject_adapter_in_model(config, model, adapter_name=name)


@contextmanager
def _telling_of_bits(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, PEFT finds the marks by which it takes its own layers for those that bitsandbytes holds."""
    held = {bits for module in model.modules() if (bits := bits_of(module))}
    marks = [f"is_loaded_in_{bits}bit" for bits in held]
    for mark in marks:
        setattr(model, mark, True)
    try:
        yield
    finally:
        for mark in marks:
            delattr(model, mark)


def _task_type(model: PreTrainedModel) -> str | None:
    """What PEFT calls the model's task, by the name of its class; None loads as well."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for ending, task in kinds.items() if type(model).__name__.endswith(ending)), None)


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _targets(model: PreTrainedModel, spec: Adapter, whole: set[str]) -> list[str]:
    """The layers that get an adapter, by their full names."""
    linear = [name for name in _linear_layers(model) if not _is_within(name, whole)]
    spared = _NO_TARGETS.get(model.config.model_type, ())
    if spec.targets == "auto":
        body = _body_modules(model)
        chosen = [name for name in linear if name in body and name.rpartition(".")[2] not in spared]
    else:
        chosen = [name for name in linear if matches(spec.targets, name)]
    if not chosen:
        raise UsageError(
            f"adapter.targets: {spec.targets!r} fits no linear layer of this {model.config.model_type}",
            hint=f"near names: {', '.join(near_names(spec.targets, linear))}" if linear else "it has none",
        )
    beside = [name for name in chosen if name.rpartition(".")[2] in spared]
    if beside:
        raise UsageError(
            f"adapter.targets: {beside[0]} of {model.config.model_type} cannot have an adapter: the model reads "
            "its weights past the layer",
            hint="targets: auto leaves it out",
        )
    return chosen


def _body_modules(model: PreTrainedModel) -> set[str]:
    """Modules whose weights are in a layer of the body; all outside the head where layers cannot be told apart."""
    try:
        inside = {name for name, depth in depths_of(model).items() if depth.layer and depth.below_head}
    except UsageError:
        heads = head_parameters(model)
        inside = {name for name, p in model.named_parameters() if id(p) not in heads}
    return {name.rpartition(".")[0] for name in inside}


def _whole_modules(model: PreTrainedModel, spec: Adapter, new: Sequence[str]) -> set[str]:
    """Modules that learn whole: the new ones, and the smallest that the pattern means."""
    own = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    chosen = {name for name in own if spec.whole is not None and matches(spec.whole, name)}
    if spec.whole is not None and not chosen:
        raise UsageError(
            f"adapter.whole: {spec.whole!r} fits no module with weights",
            hint=f"near names: {', '.join(near_names(spec.whole, sorted(own)))}",
        )
    return chosen | {name for name in own if _is_within(name, {*new})}


def _is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _shortest(targets: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names (`q_proj`) where these mean the same layers, as people write it; else full names."""
    endings = {name.rpartition(".")[2] for name in targets}
    meant = {name for name in modules if name.rpartition(".")[2] in endings}
    return sorted(endings) if meant == {*targets} else list(targets)


def _are_tied(model: PreTrainedModel, whole: set[str]) -> bool:
    """Whether what learns whole shares its weights with the embeddings or the output layer: then both get the same."""
    shared = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is getattr(shared, "weight", True)
    return tied and any(model.get_submodule(name) in (shared, output) for name in whole)


def modules_of(parameters: Sequence[str]) -> list[str]:
    """The modules that parameters belong to: what `new` of `inject_adapter` takes, from the names that were missing."""
    return sorted({name.rpartition(".")[0] for name in parameters})


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters in a model, in the order in which they came; none in a plain one."""
    return list(getattr(model, "peft_config", {}))


def load_adapter(model: PreTrainedModel, folder: Path, *, name: str = "default") -> None:
    """Put a saved adapter into a model; it does not learn.

    In a plain model it is the one that the model computes with. Beside others it waits for `using_adapter`, and what
    learns and what computes stays as it was.

    Args:
        model: The network; changed in place.
        folder: What `save_adapter`, or PEFT, wrote.
        name: What the adapter is called from now on.

    Raises:
        MissingError: PEFT is not installed, or there is no adapter in the folder.
        UsageError: It is none that can be read here, or does not belong to this model.
    """
    config = read_config(folder)
    if name in adapter_names(model):
        raise UsageError(f"the model has an adapter {name!r} already", hint="give this one another name")
    config.inference_mode = True
    with _as_before(model) if adapter_names(model) else nullcontext():
        try:
            _inject(config, model, name)
        except ValueError as error:  # what PEFT says of targets that are not there
            raise not_of_this_model(folder, model, str(error)) from error
        fill_adapter(model, folder, name)


def add_adapter(config: "LoraConfig", model: PreTrainedModel, name: str) -> None:
    """Put an empty adapter beside those of a model; what learns and what computes stays as it was."""
    with _as_before(model):
        _inject(config, model, name)


def _go_on_from(model: PreTrainedModel, folder: Path, spec: Adapter) -> None:
    saved, mine = read_config(folder), model.peft_config[spec.name]
    for field, key in (
        ("r", "rank"),
        ("lora_alpha", "alpha"),
        ("use_dora", "method"),
        ("use_rslora", "method"),
    ):
        if getattr(saved, field) != getattr(mine, field):
            raise UsageError(
                f"adapter.start: {folder} has {field} {getattr(saved, field)}, this recipe {getattr(mine, field)}",
                hint=f"set `adapter.{key}` as it is there",
            )
    fill_adapter(model, folder, spec.name)


@contextmanager
def using_adapter(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """While this lasts, the model computes with one adapter, or with None without any, as the base.

    What learns stays as it was. With None what an adapter replaces as a whole is as it was at first.

    Raises:
        UsageError: The model has no adapter of that name.
    """
    if name is not None and name not in adapter_names(model):
        known = ", ".join(adapter_names(model)) or "none"
        raise UsageError(f"the model has no adapter {name!r}", hint=f"it has: {known}")
    with _as_before(model):
        activate(model, () if name is None else (name,))
        yield


def activate(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Let the model compute with all of these adapters together from now on; with none, as the base."""
    for part in adapted_layers(model):
        there = part._get_available_adapters()
        part.set_adapter([name for name in names if name in there])
        part.enable_adapters(bool(names))


@contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is done in between, the same adapters compute and the same parameters learn afterwards."""
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    before = {id(part): (part.active_adapters, part.disable_adapters) for part in adapted_layers(model)}
    try:
        yield
    finally:
        for part in adapted_layers(model):
            active, disabled = before.get(id(part), ([], False))
            part.set_adapter(active)
            part.enable_adapters(not disabled)
        for p in model.parameters():
            p.requires_grad_(id(p) in learning)


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers with adapters, and the wrappers of modules that learn whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
