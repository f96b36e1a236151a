"""Checkpoints: complete, hashed, verified when loaded, and never the last good one removed.

A checkpoint is a folder `step_00001000` with `model.safetensors` (the weights that learn and the buffers, by name),
`optimizer.safetensors` (the optimizer's tensors by parameter name) and `state.json` (the `TrainState` and the
run's identity). No generator state: everything random is a function of (seed, step, micro-batch). Weights that do not
learn are built anew; the identity holds the hash of the base's weights files, so that another base is refused.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmkit.durable import (
    foreign_write,
    read_manifest,
    remove_folder,
    verify_folder,
    write_folder,
    write_json,
)
from llmkit.errors import CorruptError, RunError
from llmkit.optim import like, parameter_names
from llmkit.train.state import TrainState
from llmkit.train.steps import checkpoint_path, saved_steps

FORMAT = 1
"""The form of a checkpoint, in its manifest."""

Tensors = Mapping[str, torch.Tensor]
Form = tuple[torch.Size, torch.dtype]
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_AS_FAST = ("fused", "foreign", "capturable")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `checkpoints/` of the run folder.
        identity: What a resumed run must share with the saved one: data, order, model, schedule.
        plan: The numbers the run was begun with, which a resumed one takes over.
    """

    folder: Path
    identity: Mapping[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)

    def write(
        self,
        weights: Tensors,
        moments: Tensors,
        state: TrainState,
        *,
        before_writing: Callable[[], None] = lambda: None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write the checkpoint of `state`; one that is whole already stays as it is. One process calls this.

        Args:
            weights: As of `model_tensors`, on the host.
            moments: As of `optimizer_tensors`, on the host.
            state: The state they belong to.
            before_writing: Called first; what it raises stops the save.
            before_publishing: Called when all is written and nothing is visible yet.
        """
        before_writing()
        path = self.path(state.step)
        if is_whole(path):
            return path
        with write_folder(path, facts={"step": state.step, "format": FORMAT}) as temporary:
            for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
                with foreign_write(temporary / name):
                    save_file(dict(tensors), temporary / name)
            write_json(temporary / "state.json", self.record(state))
            before_publishing()
        return path

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
        """What `write` takes, where it is now."""
        return model_tensors(model), optimizer_tensors(model, optimizer)

    def record(self, state: TrainState) -> dict[str, Any]:
        """What `state.json` holds."""
        return {"state": state.to_dict(), "identity": dict(self.identity), "plan": dict(self.plan)}

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return checkpoint_path(self.folder, step)

    def remove(self, step: int) -> None:
        """Remove the checkpoint of a step."""
        remove_folder(self.path(step))

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file beside the checkpoints, with a hash of its own under `sha256`."""
        write_json(self.folder / name, {**content, "sha256": _hash_of(content)})

    def read_note(self, name: str) -> dict[str, Any] | None:
        """What `write_note` wrote; None where nothing is.

        Raises:
            CorruptError: It is damaged.
            RunError: It cannot be read at the moment.
        """
        path = self.folder / name
        try:
            held = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from error
        except ValueError as error:
            raise CorruptError(f"{path}: not JSON ({error})") from error
        if not isinstance(held, dict) or held.pop("sha256", None) != _hash_of(held):
            raise CorruptError(f"{path}: its own hash does not match")
        return held

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint, or None when there is none at all.

        A damaged one is named through `warn` and the one before it is tried.

        Raises:
            CorruptError: There are checkpoints, and every one of them is damaged.
            RunError: One cannot be read at the moment. It is not passed over: it may be whole, and to go on from the
                one before it would remove it.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                verify(path)
            except CorruptError as error:
                warn(f"checkpoint {path.name} is damaged and not used: {error}")
            else:
                return path
        if steps:
            raise CorruptError(
                f"{self.folder}: every checkpoint is damaged, the newest is {self.path(steps[-1]).name}",
                hint="start over with --fresh, or restore a copy",
            )
        return None

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        """Fill `model` and `optimizer` from a verified checkpoint.

        Raises:
            RunError: The recipe has changed in what matters, or tensors are missing or left over.
        """
        state = self.read_state(path)
        _fill_model(model, load_file(path / "model.safetensors"), path)
        moments = load_file(path / "optimizer.safetensors")
        check_moments(_forms(moments), model, optimizer, state, path)
        fill_optimizer(model, optimizer, moments)
        return state

    def read_state(self, path: Path) -> TrainState:
        """The state in a verified checkpoint.

        Raises:
            RunError: It has another form, or the recipe has changed in what matters.
        """
        _check_format(path)
        saved = json.loads((path / "state.json").read_bytes())
        check_identity(self.folder.parent, saved["identity"], self.identity)
        return TrainState(**saved["state"])

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, whole or not."""
        return saved_steps(self.folder)


def check_identity(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on from a run that was another run.

    Raises:
        RunError: Shows each setting that differs, before and now.
    """
    changes = [
        f"  {key}: {_shown(saved.get(key))} -> {_shown(wanted.get(key))}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != _as_json(wanted.get(key))
    ]
    if changes:
        raise RunError(
            f"{folder}: the recipe has changed since this run was begun:\n" + "\n".join(changes),
            hint="Start over with --fresh, give the changed recipe another `name`, or change it back.",
        )


def _check_format(path: Path) -> None:
    found = read_manifest(path).get("format", 1)
    if found != FORMAT:
        raise RunError(
            f"{path}: a checkpoint in form {found}, and this version of llmkit reads {FORMAT}",
            hint="go on with the version that began the run, or start over with --fresh",
        )


def verify(path: Path, *, only: Collection[str] | None = None) -> None:
    """Compare a checkpoint, or some of its files, with its manifest.

    Raises:
        CorruptError: It is damaged, or has the name of another step's.
        RunError: It cannot be read at the moment, which says nothing of what it holds.
    """
    try:
        _compare(path, only=only)
    except CorruptError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno not in _GONE:
            raise _unreadable(path, cause) from error
        raise


def _compare(path: Path, *, only: Collection[str] | None = None) -> None:
    step = verify_folder(path, only=only).get("step")
    if not isinstance(step, int) or checkpoint_path(path.parent, step) != path:
        raise CorruptError(f"{path}: holds the checkpoint of step {step}, which its name does not say")


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be read now ({error.strerror or error})",
        hint="Nothing was changed: run the same command again when the disk answers. If it never will, move this "
        "away; the run then goes on from what is left.",
    )


def is_whole(path: Path) -> bool:
    """Whether the folder is complete and undamaged, and can be read."""
    try:
        _compare(path)
    except CorruptError:
        return False
    return True


def saved_record(folder: Path) -> Mapping[str, Any]:
    """What the newest checkpoint that is not damaged says of its run; empty where there is none.

    Raises:
        RunError: One cannot be read at the moment.
    """
    checkpoints = Checkpoints(folder / "checkpoints", {})
    for step in reversed(checkpoints.steps()):
        path = checkpoints.path(step)
        try:
            verify(path, only={"state.json"})
        except CorruptError:  # `newest` names it when it comes to loading
            continue
        record: Mapping[str, Any] = json.loads((path / "state.json").read_bytes())
        return record
    return {}


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that learn and saved buffers by name, each once: a tied weight has one name."""
    return {name: place.contiguous() for name, place in _places(model).items()}


def _places(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same as they lie in the model: what is written to them reaches it."""
    saved = set(model.state_dict())
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {**learning, **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items() if name in saved}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as `<state>.<parameter name>`."""
    names = parameter_names(model, optimizer)
    return {
        f"{kind}.{names[index]}": tensor.detach().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for kind, tensor in entry.items()
    }


def _fill_model(model: nn.Module, tensors: Tensors, path: Path) -> None:
    places = _places(model)
    _check_names("model.safetensors", set(tensors), set(places), path)
    for name, place in places.items():
        if (place.shape, place.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise RunError(
                f"{path}/model.safetensors: {name} is {_form(tensors[name])}, the model has {_form(place)}"
            )
        place.copy_(tensors[name])


def _form(tensor: torch.Tensor) -> str:
    return _shown_form((tensor.shape, tensor.dtype))


def _shown_form(form: Form) -> str:
    return f"{list(form[0])} of {str(form[1]).removeprefix('torch.')}"


def _forms(tensors: Tensors) -> dict[str, Form]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_moments(
    saved: Mapping[str, Form],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    path: Path,
) -> None:
    """See that saved tensors are all that the optimizer holds by then, each of the right shape and type.

    Args:
        saved: Shape and type of each, as `optimizer_tensors` names them.
        model: The model.
        optimizer: Its optimizer, fresh or used.
        state: The state they belong to. Before the first update an optimizer holds nothing, and of a parameter that
            begins to learn later nothing before that step.
        path: The checkpoint, for the error.

    Raises:
        RunError: Some are missing, left over, or of another form.
    """
    if not saved and state.step == state.skipped:
        return
    wanted = _moment_forms(model, optimizer, state.step)
    # Steps that were skipped leave no trace, and which they were is not known: what began to learn since may lack it.
    spared = _late_names(model, optimizer) if state.skipped else set()
    needed = {name for name in wanted if name in saved or name.partition(".")[2] not in spared}
    _check_names("optimizer.*safetensors", set(saved), needed, path)
    for name, form in wanted.items():
        if name in saved and saved[name] != form:
            raise RunError(
                f"{path}: {name} is {_shown_form(saved[name])}, the optimizer makes {_shown_form(form)}"
            )


def _late_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """The parameters that do not learn from the first step on."""
    late = {id(p) for group in optimizer.param_groups if group.get("from_step") for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in late}


def _moment_forms(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Form]:
    """What the optimizer holds after `step` updates: one of its kind makes it, of tensors without content."""
    groups = [
        {
            **group,
            **dict.fromkeys(group.keys() & set(_AS_FAST), False),  # those forms need a real device
            "params": [_stand_in(p, learns=group.get("from_step", 0) < step) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    twin = like(optimizer, groups)
    twin.step()
    stand_ins = (parameter for group in groups for parameter in group["params"])
    return {
        f"{kind}.{name}": (tensor.shape, tensor.dtype)
        for name, parameter in zip(parameter_names(model, optimizer), stand_ins, strict=True)
        for kind, tensor in twin.state[parameter].items()
    }


def _stand_in(parameter: nn.Parameter, *, learns: bool) -> nn.Parameter:
    """A parameter of this shape, whole if this one is a shard, on the meta device; with a gradient if it learns."""
    made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    made.grad = torch.empty_like(made) if learns else None
    return made


def fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give the optimizer the tensors that `check_moments` has found right."""
    index_of = {name: index for index, name in enumerate(parameter_names(model, optimizer))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        state.setdefault(index_of[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_names(file: str, saved: set[str], wanted: set[str], path: Path) -> None:
    if saved != wanted:
        raise RunError(
            f"{path}/{file}: missing {sorted(wanted - saved)[:5]}, not wanted {sorted(saved - wanted)[:5]}"
        )


def _hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))


def _shown(value: object) -> str:
    text = "(not set)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
