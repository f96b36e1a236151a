"""A stand-in for the package torch_tpu where there is no TPU: tensors of device type `tpu` that the processor computes.

Every operation on them is done by the processor's kernel, so numbers are the processor's. What a compiler would have to
make anew is counted: an operation with shapes, types and settings that were not seen before. What asks the device for a
value, or has a result whose size depends on values, is counted too; `torch.tpu.seen` has both, a step at a time.
"""

from collections import Counter

import torch
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ASKS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount")
_HOST: dict[int, torch.Tensor] = {}  # by storage: what a tensor holds, on the host


class Seen:
    """What was computed, a step at a time."""

    def __init__(self) -> None:
        self.forms: set[str] = set()
        self.steps: list[dict] = []
        self.new: list[str] = []
        self.asked: Counter[str] = Counter()

    def note(self, op, args, kwargs) -> None:
        form = repr((str(op), _pytree.tree_map(_form, (args, kwargs))))
        if form not in self.forms:
            self.forms.add(form)
            self.new.append(form)
        name = op._schema.name.partition("::")[2]
        if name in ASKS or (name.startswith("index") and _holds_bools(args)):
            self.asked[name] += 1

    def step(self) -> None:
        self.steps.append({"new": self.new, "asked": dict(self.asked)})
        self.new, self.asked = [], Counter()


def _form(value):
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.device.type)
    return "float" if isinstance(value, float) else value


def _holds_bools(args) -> bool:
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in _pytree.tree_leaves(args[1:2]))


class _Module:
    """What torch asks of the module of a device."""

    seen = Seen()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # the generator is the processor's

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _OneNumber(torch.Tensor):
    """A number that is expanded; torch knows no strides of tensors that Python makes but those of whole ones."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def stride(self, dim=None):
        return (0,) * self.dim() if dim is None else 0


def _host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "tpu":
        return tensor
    held = _HOST[tensor.untyped_storage()._cdata]
    if held.shape == tensor.shape or held.numel() != tensor.numel():
        return held
    return held.reshape(tensor.shape)  # torch reshaped it without asking


def _device(host: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        made = torch._C._acc.create_empty_tensor(tuple(host.shape), host.dtype)
    _HOST[made.untyped_storage()._cdata] = host
    if host.numel() > 1 and not any(host.stride()):
        made.__class__ = _OneNumber
    return made


def _to_host(value):
    if isinstance(value, torch.Tensor):
        return _host(value)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "tpu" else value


def _tensors(values) -> list[torch.Tensor]:
    return [t for t in _pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]


def _compute(op, *args, **kwargs):
    _Module.seen.note(op, args, kwargs)
    asked = kwargs.get("device")
    host_args, host_kwargs = _pytree.tree_map(_to_host, (list(args), kwargs))
    pairs = list(zip(_tensors((args, kwargs)), _tensors((host_args, host_kwargs)), strict=True))
    for number, wanted in enumerate(op._schema.arguments[: len(host_args)]):
        if str(wanted.type) == "Tensor" and isinstance(host_args[number], int | float):
            host_args[number] = torch.tensor(host_args[number])
    name = op._schema.name
    with torch.inference_mode(False), torch.no_grad():
        if name in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
            found = host_args[0].reshape(
                host_args[1]
            )  # strides, which torch thinks it knows, are not the host's
        elif name == "aten::as_strided":
            found = op(host_args[0].contiguous(), *host_args[1:], **host_kwargs)
        elif name == "aten::_copy_from":
            host_args[1].copy_(host_args[0])
            return args[1]
        else:
            if name.startswith("aten::_fused"):  # which takes for granted that gradients lie as weights do
                host_args[1] = [gradient.contiguous() for gradient in host_args[1]]
            found = op(*host_args, **host_kwargs)
    for tensor, host in pairs:
        if tensor.shape != host.shape:  # it was made empty, to be filled
            tensor.data = _device(host)
    given = {id(host): tensor for tensor, host in pairs}
    stays = asked is not None and torch.device(asked).type != "tpu"

    def back(value):
        if not isinstance(value, torch.Tensor) or stays:
            return value
        return given[id(value)] if id(value) in given else _device(value)

    return _pytree.tree_map(back, found)


_setup_privateuseone_for_python_backend("tpu", backend_module=_Module())
torch.accelerator.synchronize = lambda device=None: None  # all is done when an operation returns
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_compute, "PrivateUse1")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
_ATEN.impl("_fused_sdp_choice", lambda *args, **kwargs: 0, "PrivateUse1")  # attention in plain operations
