"""Checkpoints of sharded models: every process writes its own pieces, the first one publishes the whole.

For models whose parameters are DTensors: `fully_shard`, tensor parallelism, or both. torch.distributed.checkpoint
plans who writes which piece (each once, however often it is replicated) and who reads which (so that every
sharding loads from every other). The pieces of process r lie in `model.rank-0000r.safetensors` and
`optimizer.rank-0000r.safetensors`, each file with the offsets of its pieces in its header, as torch's
`HuggingFaceStorageReader` knows them. Manifest, names and `state.json` are those of other checkpoints.

Storage is written and read here, not by torch's own classes: its plain writer pickles, its safetensors reader casts
to another type without a word, and where a shard is gone it leaves what was in memory.

**Source**: `torch.distributed.checkpoint`, the interfaces `StorageWriter`, `StorageReader`, `SavePlanner`.
"""

import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from llmkit.durable import foreign_write, naming_full_disks, write_folder, write_json
from llmkit.durable.calls import sync_path
from llmkit.errors import LlmkitError, LostWorkerError, RunError
from llmkit.train.checkpoint import (
    FORMAT,
    Checkpoints,
    Tensors,
    check_moments,
    fill_optimizer,
    is_whole,
    model_tensors,
    optimizer_tensors,
)
from llmkit.train.devices import naming_lost_workers
from llmkit.train.state import TrainState
from llmkit.train.together import Together, check_seen

T = TypeVar("T")
_PARTS = ("model", "optimizer")
_OFFSETS = "DCP_SHARDING_INFO"


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter or buffer is a DTensor."""
    return any(isinstance(tensor, DTensor) for tensor in _sharded_state(model).values())


class ShardedWriter:
    """One process's part in saving a sharded run: a writer for `Saver`, on every process.

    All processes make it at the same time and then save at the same steps. `tensors` belongs to the training thread;
    `write` may run in another one: it talks to the others through a process group of its own.

    Args:
        checkpoints: Where, and the identity of the run.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._all = Together()
        self._group, self._rank = self._all.group, self._all.rank
        self._plan = SavePlan([])
        self._whole: Tensors = {}

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
        """This process's pieces of weights and of the optimizer's tensors, by name, to be copied and given to `write`.

        Not to be called while a `write` is under way.
        """
        _sharded_state(model)
        weights, moments = model_tensors(model), optimizer_tensors(model, optimizer)
        tensors = _keyed(weights, moments)
        self._plan = create_default_local_save_plan(tensors, is_coordinator=self._rank == 0)
        self._whole = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
        return _local(weights), _local(moments)

    def write(
        self,
        weights: Tensors,
        moments: Tensors,
        state: TrainState,
        *,
        before_writing: Callable[[], None] = lambda: None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write the checkpoint of `state` together with all other processes; a whole one stays as it is.

        It is published when every process has brought its pieces to the disk. If one cannot, none is published and
        every process raises.

        Args:
            weights: As of `tensors`, on the host.
            moments: As of `tensors`, on the host.
            state: The state they belong to.
            before_writing: Called on every process first; what it raises stops the save on all.
            before_publishing: Called on the first process when all is written and nothing is visible yet.

        Raises:
            RunError: A process could not write, or was lost.
        """
        path = self._checkpoints.path(state.step)
        with ExitStack() as stack:
            self._together(before_writing)
            folder = self._together(lambda: self._begin(stack, path, state))[0]
            if folder is None:
                return path
            written = self._together(lambda: self._write_pieces(folder, _keyed(weights, moments)))
            self._together(lambda: self._publish(stack, folder, written, state, before_publishing))
        return path

    def close(self) -> None:
        """Wait for the others; before the process group is destroyed, and after the last `write`."""
        self._all.close()

    def _begin(self, stack: ExitStack, path: Path, state: TrainState) -> Path | None:
        """The temporary folder, on the first process; None where the checkpoint is whole already."""
        if self._rank or is_whole(path):
            return None
        facts = {"step": state.step, "format": FORMAT, "num_shards": dist.get_world_size()}
        return stack.enter_context(write_folder(path, facts=facts))

    def _write_pieces(self, folder: Path, tensors: Tensors) -> dict[str, int]:
        """Write this process's pieces; return names and sizes of its files."""
        writer = _PieceWriter(folder, self._rank)
        planner = _PiecePlanner(self._plan, tensors)
        with _naming_failures(f"saving to {folder}"):
            save(dict(tensors), storage_writer=writer, planner=planner, process_group=self._group)
        if writer.error is not None:
            raise writer.error
        return writer.sizes

    def _publish(
        self,
        stack: ExitStack,
        folder: Path,
        written: list[dict[str, int]],
        state: TrainState,
        before_publishing: Callable[[], None],
    ) -> None:
        if self._rank:
            return
        for rank, sizes in enumerate(written):
            check_seen(folder, rank, sizes)
        _check_complete(_PieceReader(folder).metadata.state_dict_metadata, self._whole, folder)
        write_json(folder / "state.json", self._checkpoints.record(state))
        before_publishing()
        stack.close()

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do one's part, wait for all others, and return all results; raise everywhere what failed anywhere."""
        return self._all.do(work, f"saving to {self._checkpoints.folder}")


def load_checkpoint(
    checkpoints: Checkpoints, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Fill `model` and `optimizer` from a verified checkpoint, whatever sharding either has: none, or any.

    Where processes train together, all of them call it. Each reads what it holds.

    Raises:
        RunError: The recipe has changed in what matters; tensors are missing or left over, or have another shape or
            type; or files disagree on what they hold.
    """
    if not is_sharded(model) and (path / "model.safetensors").exists():
        return checkpoints.load(path, model, optimizer)
    state = checkpoints.read_state(path)
    fill(path, model, optimizer, state)
    return state


def fill(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Fill model and optimizer with the tensors of a checkpoint, which was made in `state`.

    Raises:
        RunError: Tensors are missing or left over, have another shape or type, or are not there in full.
    """
    reader = _PieceReader(path)
    saved: Mapping[str, Any] = reader.metadata.state_dict_metadata
    stored = _sharded_state(model).keys()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {**learning, **dict(model.named_buffers())}
    weights = {name: tensor.detach() for name, tensor in held.items() if name in stored}
    _check_complete(_part_of(saved, "model"), _keyed(weights, {}), path)
    moments = _places_of_moments(_part_of(saved, "optimizer"), model, optimizer, state, path)
    places = _keyed(weights, moments)
    _check_complete(saved, places, path)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _naming_failures(f"loading {path}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: so it should be
        load(places, storage_reader=reader, planner=planner)
    fill_optimizer(model, optimizer, moments)


class _PiecePlanner(DefaultSavePlanner):
    """Writes what was planned from the live tensors, from their copies on the host."""

    def __init__(self, plan: SavePlan, pieces: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._own_plan = plan
        self._pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = self._own_plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index.fqn]


class _PieceWriter(StorageWriter):
    """Writes the pieces of one process as safetensors files and brings them to the disk.

    Attributes:
        sizes: Bytes of each file written.
        error: What went wrong. Kept, not raised: an exception that cannot be pickled would never reach the others.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self.sizes: dict[str, int] = {}
        self.error: Exception | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            with naming_full_disks(self._folder):
                for part in _PARTS:
                    self._write_part(part, plan, planner)
        except Exception as raised:
            self.error = raised
        return _done([])

    def _write_part(self, part: str, plan: SavePlan, planner: SavePlanner) -> None:
        pieces: dict[str, torch.Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            of, _, name = item.index.fqn.partition("/")
            if of == part:
                assert name not in pieces, "one piece of a tensor on a process"
                assert item.index.offset is not None
                piece = planner.resolve_data(item)
                assert isinstance(piece, torch.Tensor)
                pieces[name] = piece
                offsets[name] = {"saved_offsets": list(item.index.offset)}
        if not pieces:
            return
        path = self._folder / f"{part}.rank-{self._rank:05d}.safetensors"
        metadata = {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS: json.dumps(offsets)}
        with foreign_write(path):
            save_file(pieces, path, metadata=metadata)
        sync_path(path)  # by who wrote it: another machine's fsync knows nothing of it
        self.sizes[path.name] = path.stat().st_size

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """All that a reader needs stands in the files' headers."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _PieceReader(StorageReader):
    """Reads the pieces in a checkpoint's files; a file without offsets holds whole tensors.

    Attributes:
        metadata: Shape, type and pieces of every tensor, under `model/<name>` and `optimizer/<name>`.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[MetadataIndex, Path] = {}
        tensors: dict[str, Any] = {}
        for part in _PARTS:
            for file in sorted(folder.glob(f"{part}.*safetensors")):
                with safe_open(file, framework="pt") as opened:
                    self._add(tensors, part, file, opened)
        self.metadata = Metadata(tensors)

    def _add(self, tensors: dict[str, Any], part: str, file: Path, opened: Any) -> None:
        offsets = json.loads((opened.metadata() or {}).get(_OFFSETS, "{}"))
        for name in opened.keys():  # noqa: SIM118, not a mapping
            piece = opened.get_slice(name)
            sizes = piece.get_shape()
            start = offsets[name]["saved_offsets"] if offsets else [0] * len(sizes)
            key = f"{part}/{name}"
            self._files[MetadataIndex(key, start)] = file
            dtype = opened.get_slice(name)[tuple(slice(0, 0) for _ in sizes)].dtype
            tensor = tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(sizes), [])
            )
            if tensor.properties.dtype != dtype:
                raise RunError(f"{file}: {name} is {dtype}, in another file {tensor.properties.dtype}")
            ends = [at + size for at, size in zip(start, sizes, strict=True)]
            tensor.size = torch.Size(max(a, b) for a, b in zip(tensor.size, ends, strict=True))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[Path, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self._files[item.storage_index]].append(item)
        for file, items in wanted.items():
            with safe_open(file, framework="pt") as opened:
                for item in items:
                    piece = opened.get_slice(item.storage_index.fqn.partition("/")[2])
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    place = planner.resolve_tensor(item).detach()
                    place.copy_(piece[tuple(slice(start, start + length) for start, length in spans)])
                    planner.commit_tensor(item, place)
        return _done(None)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _sharded_state(model: nn.Module) -> dict[str, Any]:
    """The state dict; asking for it brings parameters that FSDP has gathered for a forward pass back to shards.

    Without this `named_parameters` gives whole parameters after an evaluation, which no optimizer knows.
    """
    return model.state_dict()


def _keyed(weights: Tensors, moments: Tensors) -> dict[str, torch.Tensor]:
    parts = zip(_PARTS, (weights, moments), strict=True)
    return {f"{part}/{name}": tensor for part, tensors in parts for name, tensor in tensors.items()}


def _local(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def _part_of(saved: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: entry for key, entry in saved.items() if key.startswith(f"{part}/")}


def _places_of_moments(
    saved: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    path: Path,
) -> dict[str, torch.Tensor]:
    """An empty place for each saved tensor of the optimizer, sharded as its parameter where it has its shape."""
    forms = {key.partition("/")[2]: (entry.size, entry.properties.dtype) for key, entry in saved.items()}
    check_moments(forms, model, optimizer, state, path)
    parameters = dict(model.named_parameters())
    places = {}
    for place, (size, dtype) in forms.items():
        like = parameters[place.partition(".")[2]].detach()
        same = like.shape == size
        places[place] = torch.empty_like(like, dtype=dtype) if same else torch.empty(size, dtype=dtype)
    return places


def _check_complete(saved: Mapping[str, Any], wanted: Tensors, path: Path) -> None:
    """Whether the files hold all that is wanted, whole, and nothing else."""
    if saved.keys() != wanted.keys():
        missing, spare = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        raise RunError(f"{path}: missing {missing[:5]}, not wanted {spare[:5]}")
    for key, entry in saved.items():
        place = wanted[key]
        if entry.size != place.shape:
            raise RunError(f"{path}: {key} is {list(entry.size)}, the model has {list(place.shape)}")
        if entry.properties.dtype != place.dtype:
            raise RunError(f"{path}: {key} is {entry.properties.dtype}, the model has {place.dtype}")
        held = sum(math.prod(piece.sizes) for piece in entry.chunks)
        if held != place.numel():
            raise RunError(f"{path}: of the {place.numel():,} numbers of {key} the files hold {held:,}")


@contextmanager
def _naming_failures(doing: str) -> Iterator[None]:
    """Around collectives: torch's errors become ours; of a lost process, one that says it is not this one's fault."""
    try:
        with naming_lost_workers():
            yield
    except LostWorkerError as error:
        raise LostWorkerError(f"{error.message}, while {doing}", hint=error.hint) from error
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, LlmkitError):
            raise reason from error
        raise RunError(f"{doing}: process {rank} failed: {type(reason).__name__}: {reason}") from error


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
