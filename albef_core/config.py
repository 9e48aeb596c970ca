"""What a user can turn in the science: sizes, text, objectives, recipe, optimizer."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Literal

from albef_core.errors import InputError


def check_counts(config: object, *names: str, least: int = 1) -> None:
    """Refuse a count below `least`, naming its flag."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{_flag(name)} is a count of at least {least}, got {value}.")


def check_range(config: object, *names: str, low: float = 0.0, high: float = inf) -> None:
    """Refuse a number outside [low, high], an infinite one, and NaN, naming its flag."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high or value == inf:
            bounds = f"is at least {low:g}" if high == inf else f"lies between {low:g} and {high:g}"
            raise InputError(f"{_flag(name)} {bounds}, got {value}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the three encoders; the defaults are the paper's `base` (section 3.1)."""

    image_size: int = 256
    """Height and width of the input picture in pixels. The paper: 256 in pre-training, 384
    after."""
    patch_size: int = 16
    """Height and width of a ViT patch in pixels."""
    image_width: int = 768
    """Hidden width of the image encoder."""
    image_layers: int = 12
    """Transformer blocks of the image encoder."""
    image_heads: int = 12
    """Attention heads of the image encoder."""
    image_mlp_ratio: float = 4.0
    """Width of the image encoder's MLP over its hidden width."""
    text_width: int = 768
    """Hidden width of the text and the multimodal encoder."""
    text_heads: int = 12
    """Attention heads of the text and the multimodal encoder."""
    text_mlp_width: int = 3072
    """Width of the MLP in the text and the multimodal encoder."""
    text_layers: int = 6
    """Layers of the text encoder. The paper: the first 6 of BERT-base."""
    fusion_layers: int = 6
    """Layers of the multimodal encoder, each with cross-attention. The paper: the last 6 of
    BERT-base."""
    vocab_size: int = 30522
    """Word pieces that the embeddings hold; 0: as many as the tokenizer has."""
    max_positions: int = 512
    """Longest text, in tokens, that has a position embedding."""
    feature_size: int = 256
    """Length D of the joint feature in which ITC compares images and texts."""
    dropout: float = 0.1
    """Dropout of hidden states and attention in the text and the multimodal encoder."""

    def __post_init__(self) -> None:
        check_counts(self, "image_size", "patch_size", "image_width", "image_layers", "image_heads")
        check_counts(self, "text_width", "text_heads", "text_mlp_width", "text_layers")
        check_counts(self, "fusion_layers", "max_positions", "feature_size")
        check_counts(self, "vocab_size", least=0)
        check_range(self, "image_mlp_ratio", low=1e-3)
        if self.image_size % self.patch_size:
            raise InputError(
                f"--image-size {self.image_size} is not a multiple of --patch-size"
                f" {self.patch_size}. Choose a multiple."
            )
        for name in ("image", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise InputError(
                    f"--{name}-width {width} is not a multiple of --{name}-heads {heads}."
                    " Choose a multiple."
                )
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is a share in [0, 1), got {self.dropout}.")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a raw caption becomes token ids (the published data code)."""

    tokenizer: str = "bert-base-uncased"
    """A name on the Hugging Face hub, a folder or file (vocab.txt or tokenizer.json), or `corpus`:
    a WordPiece vocabulary learned from the training corpus's own captions."""
    max_words: int = 30
    """A cleaned caption is cut to this many words."""
    max_tokens: int = 25
    """... and then to this many tokens, [CLS] and [SEP] included. The paper: 25."""
    corpus_vocab_size: int = 4000
    """Most word pieces in a vocabulary learned with `--tokenizer corpus`."""

    def __post_init__(self) -> None:
        check_counts(self, "max_words")
        # [CLS], one word piece, [SEP]; and the five special pieces with one beside them.
        check_counts(self, "max_tokens", least=3)
        check_counts(self, "corpus_vocab_size", least=6)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Each deviation from the published code, one field each; `paper_2021` has every one off.

    The defaults are `corrected`. Every field but `negatives` is True where the flaw is mended.
    """

    image_id_positives: bool = True
    """ITC targets and ITM negatives know image ids, because two captions of one photograph are not
    each other's negatives; the published code takes only the diagonal as positive."""
    global_keys: bool = True
    """ITC compares with the pairs of all workers, so that the loss does not depend on how many
    there are; the published code compares with the worker's own batch."""
    negatives: Literal["global", "local"] = "global"
    """Hard negatives come from the global batch, so that they are as hard however many workers
    share it; the published code draws them from the worker's own pairs, `local`."""
    global_mlm_mean: bool = True
    """MLM is averaged over all masked words of the global batch, so that every word counts alike;
    the published code averages the workers' averages."""
    empty_queue: bool = True
    """Queues start empty and masked, because random unit vectors are negatives that teach nothing;
    the published code starts with them."""
    keep_sep: bool = True
    """Captions end in [SEP] as BERT was trained to expect; the published tokenizer drops it."""
    words_only: bool = True
    """The random tokens of masking are words, because a random [PAD] or [CLS] inside a caption
    never occurs; the published code draws from the whole vocabulary."""
    guard_empty: bool = True
    """A batch with nothing masked has MLM loss 0, and a row without a possible negative is left
    out of ITM; the published code returns NaN or stops."""
    per_step_schedule: bool = True
    """Warm-up and cosine move every step over the run; the published code steps warm-up every 100
    iterations of epoch 0 (twice the paper's length) and the cosine once an epoch, never reaching
    its floor."""
    quiet_teacher: bool = True
    """The teacher runs without dropout, because noise in a target only blurs it; the published
    teacher never leaves train mode."""
    saturate_pixels: bool = True
    """RandAugment keeps within 0 to 255; the published AutoContrast and Sharpness overflow 8 bits,
    which turns channels white and leaves specks."""
    decay_weights_only: bool = True
    """Weight decay spares the temperature, position embeddings and the class token, because
    pulling them to zero means nothing; the published code decays all but 1-d tensors and biases."""
    count_first_token_once: bool = True
    """VQA ranks answers by their likelihood, in which each token counts once; the published code
    multiplies it by the probability of the first token, which the likelihood holds already."""
    loaded_teacher: bool = True
    """NLVR2's teacher starts from the pre-trained weights as its student does; the published code
    copies the student before it loads them, so that the teacher starts without pre-training."""

    def __post_init__(self) -> None:
        if self.negatives == "global" and not self.global_keys:
            raise InputError(
                "--recipe: negatives=global draws from what ITC compares, so it needs"
                " global_keys=true. Set that, or negatives=local."
            )


def corrected() -> Recipe:
    """The default: every known flaw of the published code mended."""
    return Recipe()


def paper_2021() -> Recipe:
    """The published code exactly (salesforce/ALBEF b9727e4), quirks included."""
    return Recipe(
        image_id_positives=False,
        global_keys=False,
        negatives="local",
        global_mlm_mean=False,
        empty_queue=False,
        keep_sep=False,
        words_only=False,
        guard_empty=False,
        per_step_schedule=False,
        quiet_teacher=False,
        saturate_pixels=False,
        decay_weights_only=False,
        count_first_token_once=False,
        loaded_teacher=False,
    )


RECIPES = {"corrected": corrected, "paper-2021": paper_2021}


def format_recipe(recipe: Recipe) -> str:
    """Write a recipe as `--recipe` takes it: the nearest named one, then the fields that differ."""

    def differences(name: str) -> list[str]:
        named, own = asdict(RECIPES[name]()), asdict(recipe)
        return [f"{field}={str(own[field]).lower()}" for field in own if own[field] != named[field]]

    name = min(RECIPES, key=lambda name: len(differences(name)))
    return ",".join([name, *differences(name)])


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The teacher and momentum distillation (section 3.3)."""

    alpha: float = 0.4
    """Weight of the teacher's soft targets in the losses, 0 to 1. The paper: 0.4."""
    alpha_ramp_epochs: float = 1.0
    """Epochs over which alpha rises linearly from 0. The paper: 1."""
    teacher_momentum: float = 0.995
    """Decay of the teacher's moving average per step. The paper: 0.995."""

    def __post_init__(self) -> None:
        check_range(self, "alpha", "teacher_momentum", high=1.0)
        check_range(self, "alpha_ramp_epochs")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(DistillConfig):
    """The three losses of pre-training and its queues (section 3.2), beside the teacher."""

    num_slots: int = 65536
    """Slots Q of each feature queue. The paper: 65,536."""
    temperature: float = 0.07
    """Starting temperature of ITC; learned, and kept in [0.001, 0.5]."""
    mask_share: float = 0.15
    """Share of tokens that MLM masks: 80 % become [MASK], 10 % a random word, 10 % stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "mask_share", high=1.0)
        check_range(self, "temperature", low=0.001, high=0.5)
        check_counts(self, "num_slots")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate (the paper's implementation details)."""

    lr: float = 1e-4
    """Peak learning rate. The paper: 1e-4 for batch 512."""
    min_lr: float = 1e-5
    """Where the cosine ends. The paper: 1e-5."""
    warmup_lr: float = 1e-5
    """Where the warm-up of the published code starts (stepwise schedule only)."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: 1,000, as in the paper; 2,000 where the recipe has
    `per_step_schedule` false, as in the published code."""
    weight_decay: float = 0.02
    """Decoupled weight decay; none on biases and norms. The paper: 0.02."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.999
    """AdamW's decay of the gradient's square."""
    clip_norm: float = 0.0
    """Gradients are clipped to this total norm; 0 leaves them (the paper)."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < inf:
            raise InputError(f"--lr is a positive rate, got {self.lr}.")
        check_counts(self, "warmup_steps", least=0)
        check_range(self, "warmup_lr", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} is a share in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"--min-lr lies between 0 and --lr ({self.lr}), got {self.min_lr}.")
