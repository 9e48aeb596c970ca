"""A model before the expressions of a corpus: where it looks for each, and what a box makes of it.

Ray tasks show the pictures, actors look. Axes: N expressions, C lenses, P proposals, G patches
along a side of the picture.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.data
import torch
from jaxtyping import Float32, UInt8

from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.metrics import (
    box_overlap,
    box_scores,
    energy_inside,
    inside_boxes,
    points_inside,
)
from albef_core.preprocess import UndecodableImage, decode_image, resize_square
from albef_core.tasks.grounding import enlarge, itc_looks, itc_maps, itm_looks, itm_maps
from albef_core.weights import LoadedModel, load_model
from pipelines.expressions import Expression
from pipelines.pairs import open_corpus
from pipelines.pictures import DECODE_CPUS, Block, hold_order

NO_CHOICE = -1


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One place in the model whose attention gives the heat map."""

    by: Literal["itm", "itc"]
    """The multimodal encoder's cross-attention, or the image encoder's self-attention."""
    layer: int
    head: int | None = None
    """None: the mean of all."""

    def __str__(self) -> str:
        heads = "mean of heads" if self.head is None else f"head {self.head}"
        return f"{self.by.upper()} layer {self.layer}, {heads}"


def choose_lenses(
    config: ModelConfig,
    *,
    by: Literal["itm", "itc"],
    layer: int | None = None,
    head: int | None = None,
    sweep: bool = False,
) -> list[Lens]:
    """List the places of a model that are asked: one, or with `sweep` all layers and heads.

    The default layer is the last of the multimodal encoder's lower half, as the paper's third of
    six, or the image encoder's last.

    Raises:
        InputError: the model has no such layer or head.
    """
    num_layers = config.fusion_layers if by == "itm" else config.image_layers
    num_heads = config.text_heads if by == "itm" else config.image_heads
    for flag, asked, count in (("layer", layer, num_layers), ("head", head, num_heads)):
        if asked is not None and asked >= count:
            raise InputError(
                f"--{flag} {asked}: by {by} this model has {flag}s 0 to {count - 1}. Choose one."
            )
    if sweep:
        heads = (None, *range(num_heads))
        return [Lens(by=by, layer=n, head=one) for n in range(num_layers) for one in heads]
    default = (num_layers - 1) // 2 if by == "itm" else num_layers - 1
    return [Lens(by=by, layer=default if layer is None else layer, head=head)]


def heat_maps(
    loaded: LoadedModel,
    pictures: UInt8[np.ndarray, "N S S 3"],
    texts: Sequence[str],
    lenses: Sequence[Lens],
) -> Float32[np.ndarray, "N C G G"]:
    """Look for each text in the picture of its place, with a model in eval mode.

    `pictures` have the model's resolution. All lenses are of the same attention.
    """
    device = loaded.model.temperature.device
    text = loaded.text_config
    ids = loaded.tokenizer.encode(
        [clean_caption(raw, max_words=text.max_words) for raw in texts],
        max_tokens=text.max_tokens,
        keep_sep=loaded.recipe.keep_sep,
    )
    token_ids = torch.from_numpy(ids).to(device)
    mask = token_ids != loaded.tokenizer.pad_id
    pixels = normalize(torch.from_numpy(pictures).to(device))
    layers = sorted({lens.layer for lens in lenses})
    is_itm = lenses[0].by == "itm"
    looks_of = itm_looks if is_itm else itc_looks
    maps: dict[Lens, torch.Tensor] = {}
    # One after the other by ITC: at full size each look takes 64 MB a pair.
    for some in [layers] if is_itm else [[layer] for layer in layers]:
        looks, _ = looks_of(loaded.model, pixels, token_ids, mask, layers=some)
        for layer, look in zip(some, looks, strict=True):
            maps |= {
                lens: itm_maps(look, mask, head=lens.head)
                if is_itm
                else itc_maps(look, head=lens.head)
                for lens in lenses
                if lens.layer == layer
            }
    return torch.stack([maps[lens] for lens in lenses], dim=1).cpu().numpy()


def score_maps(
    maps: Float32[np.ndarray, "C G G"], expression: Expression, *, height: int, width: int
) -> dict[str, Any]:
    """Score the maps of one expression, each enlarged to the picture's size in pixels.

    `box_share` is the box's share of the picture, what blind pointing reaches. One value a lens
    have `points`: whether the hottest pixel lies in the box; `energy`: the share of the heat there;
    `choice`: the number of the proposal with the highest score, `NO_CHOICE` where there is none;
    `overlap`: of that one with the box.
    """
    box, proposals = np.array(expression.box, float), np.array(expression.proposals, float)
    inside = inside_boxes(box[None], height=height, width=width)
    scores: dict[str, list[float]] = {"points": [], "energy": [], "choice": [], "overlap": []}
    for one in maps:
        # One at a time: a sweep's maps of a large photograph would take gigabytes.
        (heat,) = enlarge(torch.from_numpy(one)[None], height=height, width=width).numpy()
        scores["points"].append(points_inside(heat, inside))
        scores["energy"].append(energy_inside(heat, inside))
        choice = int(box_scores(heat, proposals).argmax()) if len(proposals) else NO_CHOICE
        overlap = box_overlap(box, proposals[choice][None])[0] if len(proposals) else 0.0
        scores["choice"].append(choice)
        scores["overlap"].append(overlap)
    return {"box_share": inside.mean(), **scores}


def grounded_blocks(
    expressions: Sequence[Expression],
    *,
    corpus: Path,
    model: Path,
    image_size: int,
    lenses: Sequence[Lens],
    batch_size: int,
    actors: int,
    on_gpu: bool,
) -> Iterator[Block]:
    """Look for every expression, in order; nothing is dropped.

    A block has what `score_maps` says, `number`, and `is_shown`: False, and all scores 0, where the
    picture does not decode.
    """
    items = [
        {
            "start": start,
            "expressions": json.dumps(
                [asdict(one) for one in expressions[start : start + batch_size]]
            ),
        }
        for start in range(0, len(expressions), batch_size)
    ]
    show: Any = _show  # Ray's own type of it lists every format of a batch
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        show,
        batch_size=None,
        num_cpus=DECODE_CPUS,
        fn_kwargs={"corpus": corpus, "image_size": image_size},
    )
    dataset = dataset.map_batches(
        _Grounder,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if on_gpu else 1,
        num_gpus=1 if on_gpu else 0,
        fn_constructor_kwargs={"model": model, "on_gpu": on_gpu, "lenses": tuple(lenses)},
    )
    hold_order(dataset, block_bytes=batch_size * 3 * image_size**2)
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy")
    return iter(blocks)


def _show(item: Block, *, corpus: Path, image_size: int) -> Block:
    expressions = json.loads(str(item["expressions"][0]))
    start = int(item["start"][0])
    found = [_picture(corpus, expression["row"], image_size) for expression in expressions]
    nothing = np.zeros((image_size, image_size, 3), dtype=np.uint8), image_size, image_size
    images, heights, widths = zip(*(one or nothing for one in found), strict=True)
    return {
        "number": np.arange(start, start + len(expressions)),
        "expression": np.array([json.dumps(one) for one in expressions], dtype=object),
        "images": np.stack(images),
        "height": np.array(heights),
        "width": np.array(widths),
        "is_shown": np.array([one is not None for one in found]),
    }


@lru_cache(maxsize=64)  # the expressions of one picture follow each other
def _picture(
    corpus: Path, row: int, image_size: int
) -> tuple[UInt8[np.ndarray, "S S 3"], int, int] | None:
    """Give a picture at the model's size, and its own height and width."""
    try:
        pixels = decode_image(open_corpus(corpus).read(row).image)
    except UndecodableImage:
        return None
    return resize_square(pixels, image_size), *pixels.shape[:2]


class _Grounder:
    """One process with the model."""

    def __init__(self, *, model: Path, on_gpu: bool, lenses: tuple[Lens, ...]) -> None:
        self._loaded = load_model(model, device="cuda" if on_gpu else "cpu")
        self._loaded.model.eval()
        self._lenses = lenses

    def __call__(self, block: Block) -> Block:
        expressions = [Expression(**json.loads(text)) for text in block["expression"]]
        texts = [expression.text for expression in expressions]
        maps = heat_maps(self._loaded, block["images"].copy(), texts, self._lenses)
        rows = zip(maps, expressions, block["height"], block["width"], strict=True)
        scores = [
            score_maps(own, expression, height=int(height), width=int(width))
            for own, expression, height, width in rows
        ]
        columns = {name: np.array([one[name] for one in scores]) for name in scores[0]}
        for name in columns:
            columns[name][~block["is_shown"]] = 0
        return {"number": block["number"], "is_shown": block["is_shown"], **columns}
