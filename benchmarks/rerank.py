"""Re-ranking of N images and 5N captions against the published loop: `python -m benchmarks.rerank`.

Needs neither ray nor mlflow. Prints one line of JSON for each N.

The published loop (salesforce/ALBEF, Retrieval.py) takes one query at a time: an image with its
best k captions, then a caption with its best k images; captions are padded to 30 tokens, and every
pair projects its image's keys and values. It is written out below on our layers, whose attention is
no slower than the published one. Its cost is linear in the queries, so only `--queries` of each
direction are timed and scaled up; ours is timed whole. Both alternate in rounds, and the reported
ratio is the median over rounds.

Weights are random. So are the encoded pictures and captions, at their real sizes: noise as tokens,
random directions as features, because features of random weights would send every query to the same
few candidates.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.tasks.retrieval import (
    EncodedImages,
    EncodedTexts,
    RetrievalScores,
    itc_similarity,
    rerank,
    wanted_pairs,
)
from benchmarks.step import machine_name
from pipelines.presets import PRETRAIN

Result = TypeVar("Result")
CAPTIONS_PER_IMAGE = 5
PADDED_TOKENS = 30
"""As the published evaluation pads."""
MEAN_TOKENS, TOKENS_DEVIATION, FEWEST_TOKENS = 13, 4, 5
"""Lengths as those of COCO's and Flickr's captions, [CLS] included."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    preset: Literal["tiny", "small", "base"] = "small"
    """Sizes of the model."""
    image_size: int = 192
    """Height and width of the pictures in pixels."""
    num_images: tuple[int, ...] = (250, 500, 1000)
    """The N to measure, each with 5N captions."""
    top_k: int = 32
    """Candidates of each query."""
    batch_size: int = 64
    """Pairs in a forward pass of ours; the published loop takes top_k."""
    queries: int = 20
    """Queries of each direction of which the published loop is timed."""
    rounds: int = 3
    """Times that both are timed, in turn."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


@torch.inference_mode()
def measure(
    options: Options, num_images: int, model: ALBEF, sizes: ModelConfig
) -> dict[str, object]:
    """Time both on one set of images and captions, and compare their scores."""
    images, texts = random_set(sizes, num_images, torch.device(options.device))
    k = min(options.top_k, num_images)
    num_texts = CAPTIONS_PER_IMAGE * num_images
    num_pairs = (num_images + num_texts) * k
    # Not counted in the published loop's time: that is scaled up, and this is done once.
    similarity = itc_similarity(images, texts)
    num_fused = len(wanted_pairs(similarity, top_k=k))
    generator = torch.Generator().manual_seed(1)
    sample = min(options.queries, num_images)
    image_queries = torch.randperm(num_images, generator=generator)[:sample].tolist()
    text_queries = torch.randperm(num_texts, generator=generator)[:sample].tolist()
    judge_texts = partial(published_texts, model, images, texts, similarity)
    judge_images = partial(published_images, model, images, texts, similarity)
    judge_texts(image_queries[:1], k)  # not counted: what the first call alone costs
    published, ours, difference = [], [], 0.0
    for _ in range(options.rounds):
        by_image, for_text = timed(lambda: judge_texts(image_queries, k))
        by_text, for_image = timed(lambda: judge_images(text_queries, k))
        published.append((by_image * num_images + by_text * num_texts) / sample)
        seconds, scores = timed(
            lambda: rerank(model, images, texts, top_k=k, batch_size=options.batch_size)
        )
        ours.append(seconds)
        difference = largest_difference(scores, for_text, for_image)
    seconds = statistics.median(ours)
    ratios = [theirs / own for theirs, own in zip(published, ours, strict=True)]
    return {
        "num_images": num_images,
        "num_texts": num_texts,
        "top_k": k,
        "pairs": num_pairs,
        "pairs_fused": num_fused,
        "seconds": round(seconds, 2),
        "seconds_per_1000_nk": round(1000 * seconds / (num_images * k), 3),
        "pairs_per_s": round(num_pairs / seconds, 1),
        "pairs_fused_per_s": round(num_fused / seconds, 1),
        "published_seconds_scaled_up": round(statistics.median(published), 2),
        "published_pairs_per_s": round(num_pairs / statistics.median(published), 1),
        "published_queries_timed": 2 * sample,
        "times_the_published_pairs_per_s": round(statistics.median(ratios), 2),
        "of_each_round": [round(ratio, 2) for ratio in ratios],
        "largest_difference_of_scores": difference,
    }


def published_texts(
    model: ALBEF,
    images: EncodedImages,
    texts: EncodedTexts,
    similarity: Tensor,
    queries: list[int],
    k: int,
) -> list[tuple[int, Tensor, Tensor]]:
    """Judge the best k captions of each image as published: its tokens repeated k times."""
    found = []
    for image in queries:
        best = similarity[image].topk(k).indices
        looked_at = images.tokens[image].repeat(k, 1, 1)
        fused = model.fuse(texts.tokens[best], texts.attention_mask[best], looked_at)
        found.append((image, best, model.itm_head(fused[:, 0])[:, 1]))
    return found


def published_images(
    model: ALBEF,
    images: EncodedImages,
    texts: EncodedTexts,
    similarity: Tensor,
    queries: list[int],
    k: int,
) -> list[tuple[int, Tensor, Tensor]]:
    """Judge the best k images of each caption as published: its tokens repeated k times."""
    found = []
    for text in queries:
        best = similarity[:, text].topk(k).indices
        tokens = texts.tokens[text].repeat(k, 1, 1)
        mask = texts.attention_mask[text].repeat(k, 1)
        fused = model.fuse(tokens, mask, images.tokens[best])
        found.append((text, best, model.itm_head(fused[:, 0])[:, 1]))
    return found


def largest_difference(
    scores: RetrievalScores,
    for_text: list[tuple[int, Tensor, Tensor]],
    for_image: list[tuple[int, Tensor, Tensor]],
) -> float:
    """Compare our scores with the published loop's, over the queries that it was timed on."""
    differences = [
        (scores.image_to_text[i, best] - found).abs().max() for i, best, found in for_text
    ]
    differences += [
        (scores.text_to_image[best, t] - found).abs().max() for t, best, found in for_image
    ]
    return float(f"{max(difference.item() for difference in differences):.1e}")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Do some work; give its seconds and what came of it."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def random_set(
    sizes: ModelConfig, num_images: int, device: torch.device
) -> tuple[EncodedImages, EncodedTexts]:
    """Make what the encoders would say of so many images, and of their captions."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    num_texts = CAPTIONS_PER_IMAGE * num_images
    num_tokens = 1 + (sizes.image_size // sizes.patch_size) ** 2
    lengths = (MEAN_TOKENS + TOKENS_DEVIATION * noise(num_texts)).round()
    lengths = lengths.clamp(FEWEST_TOKENS, PADDED_TOKENS)
    images = EncodedImages(
        tokens=noise(num_images, num_tokens, sizes.image_width),
        features=F.normalize(noise(num_images, sizes.feature_size), dim=-1),
    )
    texts = EncodedTexts(
        tokens=noise(num_texts, PADDED_TOKENS, sizes.text_width),
        attention_mask=torch.arange(PADDED_TOKENS, device=device) < lengths[:, None],
        features=F.normalize(noise(num_texts, sizes.feature_size), dim=-1),
    )
    return images, texts


def main(options: Options) -> None:
    """Measure every N and print what was found."""
    config = PRETRAIN[options.preset]()
    sizes = dataclasses.replace(
        config.model,
        image_size=options.image_size,
        vocab_size=config.model.vocab_size or config.text.corpus_vocab_size,
    )
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = ALBEF(sizes).to(device).eval()
    setting = dataclasses.asdict(options) | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine_name(device),
    }
    for num_images in options.num_images:
        print(json.dumps(setting | measure(options, num_images, model, sizes)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
