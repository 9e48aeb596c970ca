"""The state of a training: copied off the device, written to files, put back bit for bit.

A checkpoint is also a model folder: `albef_core.weights.load_model` reads it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.official import from_official
from albef_core.weights import apply_weights, official_state, read_official, read_tensors
from pipelines.config import TrainConfig
from pipelines.config_file import write_config

TEACHER_FILE = "teacher.safetensors"
TEACHER, QUEUES = "teacher.", "queues."
"""Of names in that file: the teacher's weights under official keys, the queues under
ours, because the official code keeps neither their ids nor what is valid."""

TRAINING_CONFIG = "training.json"
"""The config of the training, beside the model's own."""

Module = TypeVar("Module", bound=nn.Module)
SaveStudent = Callable[[Path, Any], None]
"""Writes the model folder of a student."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The parts of a training that change with every step."""

    student: nn.Module
    teacher: nn.Module | None
    queues: Queues | None
    optimizer: torch.optim.Optimizer

    def modules(self) -> list[nn.Module]:
        """List the student and, where there are any, teacher and queues."""
        return [part for part in (self.student, self.teacher, self.queues) if part is not None]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training as it was after one step, on the CPU; holds until its owner takes the next."""

    student: nn.Module
    teacher: nn.Module | None
    queues: Queues | None
    optimizer: dict[str, Any]
    """The optimizer's state dict."""
    number: int
    owner: "Snapshotter"

    def check(self) -> None:
        """Raise RuntimeError when a later snapshot has taken this one's memory."""
        if self.owner.num_taken != self.number:
            raise RuntimeError(
                "a later snapshot was taken while this one was still to be written;"
                " wait for the writer before `take`"
            )


class Snapshotter:
    """Copies a training into CPU memory of its own, the same for every snapshot.

    Fresh memory would cost more than the copy. So wait until the last snapshot is written before
    the next is taken; the other way round, the writing of the last one raises.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._student = _twin(state.student)
        self._teacher = None if state.teacher is None else _twin(state.teacher)
        self._queues = None if state.queues is None else _twin(state.queues)
        self._moments: dict[tuple[int, str], Tensor] = {}
        self.num_taken = 0

    @torch.no_grad()
    def take(self) -> Snapshot:
        """Copy every tensor of the training: the one part of a checkpoint that stops it."""
        self.num_taken += 1
        twins = [part for part in (self._student, self._teacher, self._queues) if part is not None]
        for twin, module in zip(twins, self._state.modules(), strict=True):
            for copied, tensor in zip(_tensors(twin), _tensors(module), strict=True):
                copied.copy_(tensor, non_blocking=True)
        optimizer = self._copy_optimizer()
        first = next(self._state.student.parameters())
        if first.is_cuda:
            torch.cuda.synchronize(first.device)
        return Snapshot(
            student=self._student,
            teacher=self._teacher,
            queues=self._queues,
            optimizer=optimizer,
            number=self.num_taken,
            owner=self,
        )

    def _copy_optimizer(self) -> dict[str, Any]:
        saved = self._state.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for index, tensors in saved["state"].items():
            moments[index] = {}
            for name, tensor in tensors.items():
                if (index, name) not in self._moments:
                    self._moments[index, name] = _room_for(tensor)
                moments[index][name] = self._moments[index, name]
                moments[index][name].copy_(tensor, non_blocking=True)
        return {"state": moments, "param_groups": copy.deepcopy(saved["param_groups"])}


def write_snapshot(
    snapshot: Snapshot, folder: Path, *, config: TrainConfig, text_layers: int, save: SaveStudent
) -> None:
    """Write a snapshot's files into a folder; training may go on meanwhile.

    `text_layers` is how many layers the text encoder has, which the official names count. Raises
    RuntimeError when the next snapshot is taken before all is written.
    """
    snapshot.check()
    save(folder, snapshot.student)
    if snapshot.teacher is not None:
        moving = official_state(snapshot.teacher, text_layers=text_layers, prefix=TEACHER)
        queues = {} if snapshot.queues is None else snapshot.queues.state_dict()
        moving |= {QUEUES + name: tensor for name, tensor in queues.items()}
        save_file(moving, folder / TEACHER_FILE)
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    write_config(config, folder / TRAINING_CONFIG)
    snapshot.check()


def restore(folder: Path, state: TrainState) -> None:
    """Put a training back where a checkpoint left it, bit for bit; its store has checked the files.

    Raises:
        InputError: they are of a training of other sizes.
    """
    weights = folder / "model.safetensors"
    apply_weights(state.student, read_official(weights), source=str(weights))
    queues: dict[str, Tensor] = {}
    if state.teacher is not None:
        source = folder / TEACHER_FILE
        teacher, queues = read_moving(source)
        apply_weights(state.teacher, teacher, source=str(source))
    # On the CPU: AdamW moves the moments itself, and its step counters must not live on a GPU.
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    try:
        if state.queues is not None:
            state.queues.load_state_dict(queues)
        state.optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:  # how torch reports other sizes and other groups
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}: does not fit this training ({reason})."
            " Go on with the config that it was made with: its training.json."
        ) from error


def read_moving(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint's teacher by our names, and its queues where it has any."""
    moving = read_tensors(file)
    queues = {k.removeprefix(QUEUES): v for k, v in moving.items() if k.startswith(QUEUES)}
    teacher = from_official({k: v for k, v in moving.items() if not k.startswith(QUEUES)})
    return {k.removeprefix(TEACHER): v for k, v in teacher.items()}, queues


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _room_for(tensor: Tensor) -> Tensor:
    # From pinned memory only does a GPU copy without a stop for each tensor.
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


def _twin(module: Module) -> Module:
    """Copy a module, its tensors without values and on the CPU."""
    rooms: dict[int, Any] = {id(buffer): _room_for(buffer) for buffer in module.buffers()}
    for parameter in module.parameters():
        rooms[id(parameter)] = nn.Parameter(_room_for(parameter), requires_grad=False)
    return copy.deepcopy(module, rooms)  # what `rooms` holds is taken instead of copied
