"""What evaluations are asked for. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albef_core.config import check_counts
from albef_core.errors import InputError

Protocol = Literal["zero-shot", "zero-shot-after-coco", "fine-tuned"]
"""What a model that is evaluated on retrieval has learned from, beside its pre-training: nothing,
COCO's pairs (the paper's Table 3), or pairs such as those it is evaluated on."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What every evaluation of a model on a corpus has."""

    model: str
    """A run's model folder, an official checkpoint, or a registry URI such as
    `models:/albef-pretrain/1`."""
    corpus: Path
    """Corpus of held-out pictures, as written by jobs/ingest.py, with what the task asks."""
    json: Path | None = None
    """File for the results."""
    batch_size: int = 64
    """Pairs or examples per forward pass."""
    actors: int = 1
    """Processes that hold the model; each takes a GPU where the cluster has some."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    bootstrap: int = 1000
    """Resamplings behind the 95 % intervals."""
    seed: int = 0
    """Seed of the resampling."""
    experiment: str = "albef-evaluate"
    """MLflow experiment, where the model does not come from a run of its own."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "actors", "bootstrap")
        check_counts(self, "seed", least=0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Evaluate a model on retrieval."""

    top_k: int = 128
    """Candidates per query that ITM re-ranks. The paper: 128 on Flickr30k, 256 on COCO."""
    sweep_k: bool = False
    """Also measure with 1, 2, 4, ... candidates, up to --top-k, from the same judgments: accuracy
    against cost."""
    protocol: Protocol | None = None
    """What the model was fine-tuned on. Default: what its folder says; an official checkpoint does
    not say."""
    image_size: int | None = None
    """Height and width of the pictures in pixels. Default: the model's."""
    resize_positions: bool = False
    """Allow another --image-size than the model's: its position embeddings are interpolated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "top_k", "image_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateTaskConfig(EvaluationConfig):
    """Evaluate a fine-tuned model on examples with known answers."""

    answers: Literal["closed", "open"] = "closed"
    """Questions: choose from the model's list of answers, or write freely."""
    answer_list: Path | None = None
    """Questions: a JSON list of answers to choose from. Default: the model's own."""
    top_k: int = 128
    """Questions: answers of the list that are read in full. The paper: 128."""
    num_beams: int = 1
    """Questions: beginnings kept while writing freely; 1 is greedy."""
    predictions: Path | None = None
    """Questions: write the answers to this JSON file, as the VQA server takes them, and score
    nothing. For splits whose answers are not public."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "top_k", "num_beams")


@dataclass(frozen=True, kw_only=True)
class EvaluateGroundingConfig(EvaluationConfig):
    """Evaluate where a model looks for expressions in their pictures, against boxes."""

    batch_size: int = 16
    """Expressions per forward and backward pass. By ITC one takes 64 MB at full size."""
    by: Literal["itm", "itc"] = "itm"
    """Attention that is asked: the multimodal encoder's, for the match of picture and text; or the
    image encoder's, for their similarity."""
    layer: int | None = None
    """Layer that is asked, from 0. Default: by ITM the last of the lower half (the paper: the third
    of six), by ITC the last."""
    head: int | None = None
    """Head that is asked, from 0. Default: the mean of all."""
    sweep: bool = False
    """Score all layers and heads, and go on with the best. Chosen on this corpus, it flatters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "layer", "head", least=0)
        for name in ("layer", "head"):
            if self.sweep and getattr(self, name) is not None:
                raise InputError(
                    f"--sweep and --{name} {getattr(self, name)} contradict each other:"
                    " a sweep takes all. Give one of them."
                )
