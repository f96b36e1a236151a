"""Checkpoints: complete, hashed, verified when loaded, and never the last good one removed.

A checkpoint is a folder `step_00001000` with `model.safetensors` (weights and buffers by name),
`optimizer.safetensors` (the optimizer's tensors by parameter name) and `state.json` (the `TrainState` and the
run's identity). No generator state: everything random is a function of (seed, step, micro-batch).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from llmkit.optim import parameter_names
from llmkit.train.state import TrainState

FORMAT = 1
"""The form of a checkpoint, in its manifest."""

Tensors = Mapping[str, torch.Tensor]
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `checkpoints/` of the run folder.
        identity: What a resumed run must share with the saved one: data, order, model, schedule.
    """

    folder: Path
    identity: Mapping[str, Any]

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
            write_json(temporary / "state.json", {"state": state.to_dict(), "identity": dict(self.identity)})
            before_publishing()
        return path

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
        """What `write` takes, where it is now."""
        return model_tensors(model), optimizer_tensors(model, optimizer)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step_{step:08d}"

    def remove(self, step: int) -> None:
        """Remove the checkpoint of a step."""
        remove_folder(self.path(step))

    def read_json(self, name: str) -> Any:
        """What a file beside the checkpoints holds; None where there is none."""
        path = self.folder / name
        return json.loads(path.read_bytes()) if path.is_file() else None

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint, or None when there is none at all.

        A damaged one is named through `warn` and the one before it is tried.

        Raises:
            CorruptError: There are checkpoints, and every one of them is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                verify_folder(path)
            except CorruptError as error:
                warn(f"checkpoint {path.name} is damaged and not used: {error}")
            else:
                return path
        if steps:
            raise CorruptError(
                f"{self.folder}: every checkpoint is damaged",
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
        _fill_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"), path)
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
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)


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


def is_whole(path: Path) -> bool:
    """Whether the folder is complete and undamaged."""
    try:
        verify_folder(path)
    except CorruptError:
        return False
    return True


def saved_identity(folder: Path) -> Mapping[str, Any] | None:
    """The identity in the newest readable checkpoint of a run folder; None where there is none."""
    for path in sorted((folder / "checkpoints").glob("step_*"), reverse=True):
        try:
            verify_folder(path, only={"state.json"})
        except CorruptError:  # `newest` names it when it comes to loading
            continue
        identity: Mapping[str, Any] = json.loads((path / "state.json").read_bytes())["identity"]
        return identity
    return None


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, each once: a tied weight has one name."""
    return {name: place.contiguous() for name, place in _places(model).items()}


def _places(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same as they lie in the model: what is written to them reaches it."""
    saved = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
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
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], path: Path
) -> None:
    names = parameter_names(model, optimizer)
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if name not in index_of:
            raise RunError(f"{path}/optimizer.safetensors: {key} belongs to no parameter of the model")
        state.setdefault(index_of[name], {})[kind] = tensor
    if tensors:
        _check_names("optimizer.safetensors", {names[i] for i in state}, set(names), path)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_names(file: str, saved: set[str], wanted: set[str], path: Path) -> None:
    if saved != wanted:
        raise RunError(
            f"{path}/{file}: missing {sorted(wanted - saved)[:5]}, not wanted {sorted(saved - wanted)[:5]}"
        )


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))


def _shown(value: object) -> str:
    text = "(not set)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
