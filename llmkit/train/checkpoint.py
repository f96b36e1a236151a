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

from llmkit.durable import remove_folder, verify_folder, write_folder, write_json
from llmkit.errors import CorruptError, RunError
from llmkit.optim import parameter_names
from llmkit.train.state import TrainState

_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: `checkpoints/` of the run folder.
        keep: How many of the newest stay.
        identity: What a resumed run must share with the saved one: data, order, model, schedule.
    """

    folder: Path
    keep: int
    identity: Mapping[str, Any]

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
        """Write the checkpoint of `state`, then remove the oldest beyond `keep`. One process calls this.

        A whole checkpoint of this step stays as it is. Later ones, which were damaged and not gone on from, go.
        """
        path = self.folder / f"step_{state.step:08d}"
        if _is_whole(path):
            return path
        with write_folder(path, facts={"step": state.step}) as temporary:
            save_file(model_tensors(model), temporary / "model.safetensors")
            save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
            write_json(temporary / "state.json", {"state": state.to_dict(), "identity": dict(self.identity)})
        steps = self._steps()
        kept = [step for step in steps if step <= state.step][-self.keep :]
        for step in steps:
            if step not in kept:
                remove_folder(self.folder / f"step_{step:08d}")
        return path

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint, or None when there is none at all.

        A damaged one is named through `warn` and the one before it is tried.

        Raises:
            CorruptError: There are checkpoints, and every one of them is damaged.
        """
        steps = self._steps()
        for step in reversed(steps):
            path = self.folder / f"step_{step:08d}"
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
        saved = json.loads((path / "state.json").read_bytes())
        check_identity(self.folder.parent, saved["identity"], self.identity)
        _fill_model(model, load_file(path / "model.safetensors"), path)
        _fill_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"), path)
        return TrainState(**saved["state"])

    def _steps(self) -> list[int]:
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


def _is_whole(path: Path) -> bool:
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
    saved = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().contiguous() for name, t in tensors.items() if name in saved}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as `<state>.<parameter name>`."""
    names = parameter_names(model, optimizer)
    return {
        f"{kind}.{names[index]}": tensor.detach().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for kind, tensor in entry.items()
    }


def _fill_model(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    places = model_tensors(model)
    _check_names("model.safetensors", set(tensors), set(places), path)
    with torch.no_grad():
        for name, place in places.items():
            if place.shape != tensors[name].shape:
                raise RunError(
                    f"{path}/model.safetensors: {name} is {list(tensors[name].shape)}, "
                    f"the model has {list(place.shape)}"
                )
            place.copy_(tensors[name])


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
