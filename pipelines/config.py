"""One frozen dataclass per job, with every knob a user can turn. Standard library only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from albef_core.config import (
    DistillConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    check_counts,
    check_range,
)
from albef_core.errors import InputError

TaskName = Literal["retrieval", "grounding", "entailment", "vqa", "nlvr2", "text-assignment"]
"""What a pre-trained model can be fine-tuned for."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to a training picture (the published pre-training transform)."""

    crop_scale_min: float = 0.2
    """Smallest share of the picture's area that a random crop keeps; the largest is 1."""
    flip: bool = True
    """Mirror half of the pictures. Wrong where captions say left and right: the presets turn it
    off there."""
    rand_ops: int = 2
    """RandAugment operations per picture."""
    rand_level: int = 7
    """RandAugment's magnitude, 0 to 10."""

    def __post_init__(self) -> None:
        check_range(self, "crop_scale_min", low=0.001, high=1.0)
        check_counts(self, "rand_ops", least=0)
        check_range(self, "rand_level", high=10.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training has: data, length, workers, checkpoints, tracking."""

    corpus: Path
    """Corpus folder, as written by jobs/ingest.py."""
    val: Path | None = None
    """Corpus of held-out pictures, on which the student is measured at the end of every epoch: the
    curves `val/...`. The finished model is then that of the best checkpoint (--keep-best)."""
    val_at: tuple[int, ...] = ()
    """Pairs seen after which it is measured too."""
    val_model: Literal["student", "teacher"] = "student"
    """What is measured: the student, or its moving average."""
    storage: Path = Path("runs")
    """Folder for checkpoints and results of runs."""
    name: str = ""
    """Name of the run inside the storage; default: preset and time."""
    steps: int | None = None
    """Optimizer steps; or give --epochs."""
    epochs: int | None = None
    """Passes over the corpus; or give --steps. Default: the preset's."""
    batch_size: int = 512
    """Pairs in a global batch, over all workers. The paper: 512 in pre-training."""
    workers: int = 1
    """Train workers, each with its share of the batch; 0: none, the command's own process trains,
    which starts sooner and is nobody's to replace."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers train: `auto` takes GPUs where the cluster has them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 autocasts the encoders; similarities, softmax and losses stay in fp32."""
    seed: int = 0
    """Seed of the weights, the data order and every random choice."""
    init: str = ""
    """Start from a whole ALBEF checkpoint: a folder of ours, an official `ALBEF.pth` or a registry
    URI such as `models:/albef-pretrain/1`."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: DistillConfig = field(default_factory=DistillConfig)
    recipe: Recipe = field(default_factory=Recipe)
    optim: OptimConfig = field(default_factory=OptimConfig)
    micro_batch_size: int | None = None
    """Pairs that a worker holds activations of at once; the gradient stays that of the whole
    batch, for one more forward pass. Default: the worker's whole share."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, beside those by time and at the ends of epochs."""
    checkpoint_minutes: float = 15.0
    """Longest time without a checkpoint; 0: none by time."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_best: str | None = None
    """Curve whose lowest mean since the checkpoint before marks the best one, which is kept
    too; empty: none. Default: `val/error` where --val is given, else `train/loss/total`."""
    checkpoints: str = ""
    """Where checkpoints go: a folder or an fsspec URL such as `s3://bucket/run`. Default: the
    run's folder in --storage."""
    resume: str = ""
    """Go on from a checkpoint: `newest` (also without a value) for the newest good one in the
    storage, or a checkpoint's folder. The same --name goes on by itself."""
    force: bool = False
    """Go on although fields differ that change the objective."""
    min_workers: int | None = None
    """Go on with as few workers as this when some are lost, and take new ones as they come.
    Default: wait for all."""
    max_failures: int = 3
    """Times that lost workers are replaced before the run gives up."""
    step_timeout_s: float = 1800.0
    """Seconds without a finished step after which the stuck part is named and the workers start
    again from the newest checkpoint."""
    max_bad_steps: int = 10
    """Batches in a row with a loss or gradient that is not finite; each is skipped, one more
    stops the run."""
    log_every: int = 10
    """Steps between two points of the logged curves."""
    feed_cpus: float = 0.5
    """CPUs of one decoding task; each worker may run as many as the cluster has left."""
    feed_share: float | None = None
    """Share of the cluster's CPUs for decoding: workers leave it free, and no more is taken, so
    that other jobs find room. Default: all that workers leave."""
    worker_cpus: float = 0.5
    """CPUs that each train worker holds; leave some for decoding."""
    gpus_per_worker: float = 1.0
    """Share of a GPU that each train worker takes, where it trains on one."""
    accelerator_type: str = ""
    """Kind of GPU to train on by Ray's name, such as `A100` or `H100`; empty: any."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Train workers on few nodes, or on many; strict: all on one, or no two on one."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the pictures read will not decode."""
    experiment: str = "albef-pretrain"
    """MLflow experiment of the run."""
    register: str = "albef-pretrain"
    """Name in the MLflow model registry under which the finished model becomes a version; empty:
    none."""
    register_checkpoint: bool = True
    """Store the whole training state with the run of a registered model (some 3 times its size), so
    that anybody can go on from it."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"--steps {self.steps} and --epochs {self.epochs} contradict each other."
                " Give one of them."
            )
        if self.steps is None and self.epochs is None:
            raise InputError("The run has no length. Give --steps or --epochs.")
        check_counts(self, "steps", "epochs", "batch_size", "log_every")
        check_counts(self, "micro_batch_size", "checkpoint_every", "keep_last", "min_workers")
        if self.val_at and (min(self.val_at) < 1 or self.val is None):
            marks = " ".join(map(str, self.val_at))
            raise InputError(
                f"--val-at {marks}: takes numbers of pairs, 1 or more, and needs --val."
                " Correct them, or leave the flag out."
            )
        check_counts(self, "workers", "seed", "max_failures", "max_bad_steps", least=0)
        check_range(self, "checkpoint_minutes")
        check_range(self, "step_timeout_s", low=1.0)
        check_range(self, "feed_cpus", "worker_cpus", low=0.01)
        check_range(self, "gpus_per_worker", low=0.01, high=1.0)
        if self.feed_share is not None:
            check_range(self, "feed_share", low=0.01, high=0.99)
        check_range(self, "max_bad_share", high=1.0)
        if self.batch_size < self.workers:
            raise InputError(
                f"--batch-size {self.batch_size} leaves some of --workers {self.workers} without a"
                " pair. Take fewer workers, or a larger batch."
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise InputError(
                f"--min-workers {self.min_workers} is more than --workers {self.workers}."
                " Lower it: --workers is the most that are used."
            )

    @property
    def num_processes(self) -> int:
        """Processes that train: the workers, or this one alone."""
        return max(1, self.workers)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Pre-train ALBEF on a corpus; every size and rate of the paper is a field."""

    image_weights: str = "deit_base_patch16_224"
    """Starting weights of the image encoder where no --init is given: a timm name on the hub, a
    local file or folder, or `random`."""
    text_weights: str = "bert-base-uncased"
    """Starting weights of text and multimodal encoder where no --init is given: a hub name, a
    local file or folder, or `random`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    caption_policy: Literal["random", "all"] = "random"
    """Which of an image's captions an epoch takes: `random`, or `all` of them in turn, one an
    epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.max_tokens > self.model.max_positions:
            raise InputError(
                f"--max-tokens {self.text.max_tokens} is more than --max-positions"
                f" {self.model.max_positions}. Lower it, or raise that."
            )
        if not self.recipe.guard_empty and self.batch_size < 2 * self.num_processes:
            raise InputError(
                f"--batch-size {self.batch_size} with --workers {self.workers} leaves a worker one"
                " pair, which has no negative, and the recipe has guard_empty=false."
                " Take a larger batch."
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Say what a pre-training would take; nothing is trained, and no corpus needs to be there."""

    corpus: Path = Path()
    """Corpus folder, as written by jobs/ingest.py; or give --images."""
    images: int | None = None
    """Pictures of a corpus that is not there yet."""
    on: str = ""
    """GPU to plan for, by Ray's name, or `cpu`. Default: each that anything is known of."""
    price: float = 0.0
    """Price of an hour of one GPU or core, in any currency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "images")
        check_range(self, "price")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a pre-trained model for a task; the presets are the published recipes."""

    task: TaskName
    """What is learned; the command's first word."""
    from_scratch: bool = False
    """Take sizes and tokenizer of --init, but random weights: a measure of what pre-training is
    worth."""
    image_size: int | None = None
    """Height and width of the pictures in pixels. Default: 1.5 times that of --init, as the paper
    goes from 256 to 384; text assignment keeps that of --init."""
    dropout: float | None = None
    """Share of numbers dropped in the text and the multimodal encoder. Default: that of --init."""
    max_words: int = 50
    """Words of a text that are kept."""
    max_tokens: int = 50
    """Tokens of a text that are kept, [CLS] and [SEP] included."""
    num_slots: int = 65536
    """Slots of each feature queue (retrieval and grounding)."""
    num_answers: int = 3192
    """Most frequent answers of the corpus that a VQA model chooses among, 3,192 in the paper; it
    learns from all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "image_size", "max_words", "max_tokens", "num_slots", "num_answers")
        if self.dropout is not None:
            check_range(self, "dropout", high=0.999)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Draw where in a picture a model finds each word of a text."""

    model: str
    """A run's model folder, an official checkpoint, or a registry URI such as
    `models:/albef-pretrain/1`."""
    out: Path
    """The figure: a `.png`, `.pdf` or `.svg` file."""
    image: Path | None = None
    """One picture: JPEG, PNG, WebP or GIF; goes with --text."""
    text: str = ""
    """What is looked for in it."""
    corpus: Path | None = None
    """Or a corpus, as written by jobs/ingest.py: a page of its first pictures with their first
    caption."""
    num: int = 6
    """Pictures of that page."""
    layer: int | None = None
    """Layer of the multimodal encoder, from 0. Default: the last of its lower half (the paper: the
    third of six)."""
    head: int | None = None
    """Head that is asked, from 0. Default: the mean of all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""

    def __post_init__(self) -> None:
        check_counts(self, "num")
        check_counts(self, "layer", "head", least=0)
        if (self.image is None) == (self.corpus is None):
            raise InputError(
                "--image with --text is one picture, --corpus a page of them: give one of the two."
            )
        if (self.image is None) != (not self.text):
            raise InputError("--image and --text go together: a picture, and what to look for.")
        if self.out.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"--out {self.out}: a figure is a .png, .pdf or .svg file. Rename it.")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Turn a corpus into embeddings: Parquet files that go on where they were interrupted."""

    model: str
    """A run's model folder, an official checkpoint, or a registry URI such as
    `models:/albef-pretrain/1`."""
    corpus: Path
    """Corpus, as written by jobs/ingest.py."""
    out: Path
    """Folder of the embeddings; one of the same model and corpus is completed."""
    batch_size: int = 64
    """Pictures or captions per forward pass."""
    actors: int = 1
    """Processes that hold the model; each takes a GPU where the cluster has some, else a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "actors")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Rank the captions of a corpus by how little the model believes that they fit."""

    model: str
    """A run's checkpoint, whose teacher is asked (in a short run it lags behind), a model folder,
    an official checkpoint, or a registry URI such as `models:/albef-pretrain/1`."""
    corpus: Path
    """Corpus of captions, as written by jobs/ingest.py."""
    out: Path
    """New folder of the scores, the page of the worst and the cleaned corpus."""
    drop_worst: float = 0.0
    """Share of the captions to leave out of a cleaned corpus, the worst ones; 0: write none."""
    batch_size: int = 64
    """Pictures, captions or pairs per forward pass."""
    actors: int = 1
    """Processes that hold the model; each takes a GPU where the cluster has some, else a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    bootstrap: int = 1000
    """Resamplings behind the 95 % interval, where the wrong captions are known."""
    seed: int = 0
    """Seed of the resampling, and of the sample that similarities are compared with."""
    experiment: str = "albef-audit"
    """MLflow experiment, where the model does not come from a run of its own."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "actors", "bootstrap")
        check_counts(self, "seed", least=0)
        check_range(self, "drop_worst", high=1.0)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as a checkpoint that the official code reads."""

    model: str
    """A run's model folder or checkpoint (that has teacher and queues too), or a registry URI such
    as `models:/albef-pretrain/1`."""
    out: Path
    """The new file, `.pth`; must not exist."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """See the whole pipeline work on generated pictures, in minutes on a laptop."""

    out: Path = Path("quickstart")
    """Folder of corpora, run and `summary.json`; an earlier quickstart there is replaced."""
    num_images: int = 4000
    """Pictures to train on."""
    num_held_out: int = 500
    """Unseen pictures to evaluate on."""
    steps: int = 400
    """Optimizer steps of `tiny`."""
    batch_size: int = 32
    """Pairs in a global batch."""
    workers: int = 2
    """Train workers."""
    seed: int = 0
    """Seed of pictures, weights and training."""

    def __post_init__(self) -> None:
        check_counts(self, "num_images", "num_held_out", "steps", "batch_size", "workers")
        check_counts(self, "seed", least=0)
