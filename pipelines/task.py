"""What a training learns, as the trainer sees it: models, inputs, a loss, curves, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from albef_core.feature_queue import Queues
from pipelines.feed import Spec

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from pipelines.validation import Validation


class Batch(Protocol):
    """One worker's share of one global step, as the feed makes it."""

    @property
    def image_ids(self) -> list[str]:
        """Images, one an item."""
        ...

    @property
    def captions(self) -> list[str]:
        """The texts as they are in the corpus."""
        ...

    @property
    def bad_ids(self) -> list[str]:
        """Images that were due and would not decode."""
        ...


class Outcome(Protocol):
    """What one step gives, beside what a task's own curves and pictures want."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """This worker's part: its mean over workers is the loss of the global batch."""
        ...


class Task(Protocol):
    """One worker's models and what they learn; `pretraining_task.py` is the first."""

    @property
    def student(self) -> nn.Module:
        """The model that learns."""
        ...

    @property
    def teacher(self) -> nn.Module | None:
        """Its moving average, where the task distills."""
        ...

    @property
    def queues(self) -> Queues | None:
        """Earlier features of the teacher, where the task contrasts with them."""
        ...

    @property
    def text_layers(self) -> int:
        """Layers of the text encoder, which the official names of weights count."""
        ...

    @property
    def spec(self) -> Spec[Any]:
        """What the feed makes for it."""
        ...

    @property
    def shown(self) -> Sequence[str]:
        """Curves beside the progress bar."""
        ...

    def longest(self, batch: Any) -> int:
        """Count the tokens of the longest text."""
        ...

    def forward(self, batch: Any, *, longest: int, alpha: float, seed: int) -> Any:
        """Move the teacher, if any, and give an `Outcome`; `longest` is the global batch's."""
        ...

    def accept(self, outcome: Any) -> None:
        """Do what only a step that is taken does; a batch that is not finite has none."""
        ...

    def curves(self, outcome: Any) -> dict[str, Float[Tensor, ""]]:
        """Give this worker's part of the curves, the losses among them."""
        ...

    def validate(self, corpus: Path) -> "Validation":
        """Measure on held-out examples (a collective); `val/error` is among the curves."""
        ...

    def draw(self, tracker: "Tracker | None", batch: Any, outcome: Any, *, step: int) -> None:
        """Log pictures of what is learned (a collective)."""
        ...

    def save(self, folder: Path, student: Any) -> None:
        """Write the model folder of a student: the task's own, or a copy of it."""
        ...
