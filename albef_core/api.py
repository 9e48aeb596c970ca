"""The model for use from Python: pictures and texts in, numpy arrays out.

    albef = Albef.load("runs/flickr/model")
    albef.match(["dog.jpg"], ["a dog on a beach"])

Axes beside the package's own: I images, T texts, P pairs, N words, G patches along a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from PIL import Image
from torch import Tensor

from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.errors import InputError
from albef_core.preprocess import UndecodableImage, decode_image, resize_square, upright_rgb
from albef_core.tasks.grounding import itm_looks
from albef_core.tasks.retrieval import EncodedImages, encode_texts, rerank
from albef_core.weights import LoadedModel, load_model

Picture = str | Path | Image.Image | np.ndarray
"""A file (JPEG, PNG, WebP or GIF), a PIL image, or an array (H, W, 3) of type uint8."""

BLANK = "[MASK]"
"""What `fill_mask` fills."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The best texts of each image and the best images of each text, the best first."""

    texts: Int64[np.ndarray, "I K"]
    """Positions in the list of texts."""
    text_scores: Float[np.ndarray, "I K"]
    """ITM logits of "matched"; what orders them."""
    images: Int64[np.ndarray, "T J"]
    """Positions in the list of images."""
    image_scores: Float[np.ndarray, "T J"]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where in the picture the model finds each word."""

    words: tuple[str, ...]
    """The words that the model has read: cleaned, and cut to its longest text."""
    maps: Float32[np.ndarray, "N G G"]
    """Heat of each patch for each word, at least 0, on one scale for all words of the text. For the
    size of the picture see `albef_core.tasks.grounding.enlarge`."""
    match: float
    """Probability that the whole text belongs to the picture."""


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What may stand in one blank, the most probable first."""

    words: tuple[str, ...]
    """Word pieces; one that goes on with the word before it starts with ##."""
    probabilities: Float32[np.ndarray, " K"]


class Albef:
    """A trained model that answers. Make one with `load`.

    Pictures are resized and texts cleaned as evaluation does. At most `batch_size` pictures, texts
    or pairs are computed at a time; it changes results by rounding only. Answers raise InputError
    for a picture that cannot be read, and where lists do not fit together.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 32) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        self._model = loaded.model.eval()
        self._device = self._model.temperature.device

    @classmethod
    def load(
        cls, source: str | Path, *, device: str | torch.device = "cpu", batch_size: int = 32
    ) -> "Albef":
        """Load a model folder, or an official pre-training or retrieval checkpoint.

        Raises:
            InputError: nothing is there, or it is no such model; the message names the file.
        """
        return cls(load_model(source, device=device), batch_size=batch_size)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Picture]) -> Float32[np.ndarray, "I D"]:
        """Give each image's unit vector, whose product with a text's is their cosine (ITC)."""
        parts = [
            self._model.encode_image(self._pixels(part))[1]
            for part in self._parts(check_list(images))
        ]
        return self._joined(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "T D"]:
        """Give each text's unit vector, whose product with an image's is their cosine (ITC)."""
        parts = [
            self._model.encode_text(*self._tokens(part))[1]
            for part in self._parts(check_list(texts))
        ]
        return self._joined(parts)

    @torch.inference_mode()
    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> Float32[np.ndarray, " P"]:
        """Give the probability that each text belongs to the image in its place (ITM)."""
        probabilities = [np.empty(0, np.float32)]
        for some_images, some_texts in self._pairs(images, texts):
            image_tokens, _ = self._model.encode_image(self._pixels(some_images))
            token_ids, mask = self._tokens(some_texts)
            text_tokens, _ = self._model.encode_text(token_ids, mask)
            fused = self._model.fuse(text_tokens, mask, image_tokens)
            logits = self._model.itm_head(fused[:, 0])
            probabilities.append(logits.softmax(dim=1)[:, 1].cpu().numpy())
        return np.concatenate(probabilities)

    @torch.inference_mode()
    def rank(self, images: Sequence[Picture], texts: Sequence[str], *, top_k: int = 16) -> Ranking:
        """Find each image's best texts and each text's best images (ALBEF section 5).

        The `top_k` nearest by ITC are put in order by ITM; K and J are `top_k`, or how many texts
        and images there are. Holds every token of all of them: 2 MB an image at full size.
        """
        images, texts = check_list(images), check_list(texts)
        if not len(images) or not len(texts):
            raise InputError(f"{len(images)} images and {len(texts)} texts: nothing to rank.")
        parts = [self._model.encode_image(self._pixels(part)) for part in self._parts(images)]
        tokens, features = (torch.cat(part) for part in zip(*parts, strict=True))
        scores = rerank(
            self._model,
            EncodedImages(tokens=tokens, features=features),
            encode_texts(self._model, *self._tokens(texts), batch_size=self.batch_size),
            top_k=top_k,
            batch_size=self.batch_size,
        )
        for_image = scores.image_to_text.topk(min(top_k, len(texts)), dim=1)
        for_text = scores.text_to_image.T.topk(min(top_k, len(images)), dim=1)
        return Ranking(
            texts=for_image.indices.cpu().numpy(),
            text_scores=for_image.values.cpu().numpy(),
            images=for_text.indices.cpu().numpy(),
            image_scores=for_text.values.cpu().numpy(),
        )

    def explain(
        self,
        images: Sequence[Picture],
        texts: Sequence[str],
        *,
        layer: int | None = None,
        head: int | None = None,
    ) -> list[Explanation]:
        """Show where in each image the words of the text in its place are found, by Grad-CAM.

        `layer` counts the multimodal encoder's from 0; default: the last one of its lower half, as
        the paper's third of six. `head` None: the mean of all heads. A word of several pieces has
        the mean of theirs.
        """
        num_layers = len(self._model.multimodal_encoder.layers)
        layer = (num_layers - 1) // 2 if layer is None else layer
        _check_index("layer", layer, num_layers)
        if head is not None:
            _check_index("head", head, self.loaded.model_config.text_heads)
        explanations = []
        for some_images, some_texts in self._pairs(images, texts):
            token_ids, mask = self._tokens(some_texts)
            pixels = self._pixels(some_images)
            (look,), logits = itm_looks(self._model, pixels, token_ids, mask, layers=[layer])
            matches = logits.softmax(dim=1)[:, 1].tolist()
            maps = look.token_maps(head=head).cpu().numpy()
            for row, match in enumerate(matches):
                words, word_maps = self._words(token_ids[row].tolist(), maps[row])
                explanations.append(Explanation(words=words, maps=word_maps, match=match))
        return explanations

    @torch.inference_mode()
    def fill_mask(
        self, images: Sequence[Picture], texts: Sequence[str], *, top_k: int = 5
    ) -> list[list[Guesses]]:
        """Guess the words behind each [MASK] of each text, with a look at its image (MLM).

        Returns, for each text, the guesses for each of its blanks in turn.

        Raises:
            InputError: a text has no [MASK] among the words that the model reads, or the model came
                without the head that names words.
        """
        if any(name.startswith("mlm_head.") for name in self.loaded.report.missing):
            raise InputError(
                f"{self.loaded.report.source}: has no MLM head, so it cannot fill in words."
                " Retrieval and grounding leave that head out: load a pre-trained model."
            )
        tokenizer, guesses = self.loaded.tokenizer, []
        for some_images, some_texts in self._pairs(images, texts):
            token_ids, mask = self._tokens(some_texts, with_blanks=True)
            is_blank = token_ids == tokenizer.mask_id
            for text, has_blank in zip(some_texts, is_blank.any(dim=1).tolist(), strict=True):
                if not has_blank:
                    raise InputError(
                        f"{text!r}: no {BLANK} among the {self.loaded.text_config.max_tokens}"
                        f" tokens that the model reads. Write {BLANK} for a word."
                    )
            image_tokens, _ = self._model.encode_image(self._pixels(some_images))
            text_tokens, _ = self._model.encode_text(token_ids, mask)
            fused = self._model.fuse(text_tokens, mask, image_tokens)
            shares = self._model.mlm_head(fused[is_blank]).softmax(dim=1)
            best = shares.topk(min(top_k, shares.shape[1]), dim=1)
            found = (
                Guesses(words=tuple(tokenizer.words(ids)), probabilities=probabilities)
                for ids, probabilities in zip(
                    best.indices.tolist(), best.values.cpu().numpy(), strict=True
                )
            )
            counts = is_blank.sum(dim=1).tolist()
            guesses.extend([next(found) for _ in range(count)] for count in counts)
        return guesses

    def _pixels(self, images: Sequence[Picture]) -> Float[Tensor, "B 3 R R"]:
        size = self.loaded.model_config.image_size
        squares = np.stack([resize_square(read_picture(image), size) for image in images])
        return normalize(torch.from_numpy(squares).to(self._device))

    def _tokens(
        self, texts: Sequence[str], *, with_blanks: bool = False
    ) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        text, tokenizer = self.loaded.text_config, self.loaded.tokenizer
        cleaned = [clean_caption(raw, max_words=text.max_words) for raw in texts]
        if with_blanks:
            # Cleaning has made it lower case, which the tokenizer takes for plain text.
            cleaned = [caption.replace(BLANK.lower(), BLANK) for caption in cleaned]
        ids = tokenizer.encode(
            cleaned, max_tokens=text.max_tokens, keep_sep=self.loaded.recipe.keep_sep
        )
        token_ids = torch.from_numpy(ids).to(self._device)
        return token_ids, token_ids != tokenizer.pad_id

    def _words(
        self, token_ids: list[int], maps: Float32[np.ndarray, "L G G"]
    ) -> tuple[tuple[str, ...], Float32[np.ndarray, "N G G"]]:
        """Join the pieces of words, and average their maps."""
        tokenizer = self.loaded.tokenizer
        around = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
        words: list[str] = []
        pieces: list[list[int]] = []
        for place, piece in enumerate(tokenizer.words(token_ids)):
            if token_ids[place] in around:
                continue
            if piece.startswith("##") and words:
                words[-1] += piece.removeprefix("##")
                pieces[-1].append(place)
            else:
                words.append(piece)
                pieces.append([place])
        means = [maps[places].mean(axis=0) for places in pieces]
        return tuple(words), np.array(means, np.float32).reshape(-1, *maps.shape[1:])

    def _parts(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Deal a list out in batches."""
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def _pairs(
        self, images: Sequence[Picture], texts: Sequence[str]
    ) -> Iterator[tuple[Sequence[Picture], Sequence[str]]]:
        images, texts = check_list(images), check_list(texts)
        if len(images) != len(texts):
            raise InputError(
                f"{len(images)} images and {len(texts)} texts are no pairs. Give as many of both."
            )
        return zip(self._parts(images), self._parts(texts), strict=True)

    def _joined(self, features: list[Tensor]) -> Float32[np.ndarray, "N D"]:
        nothing = np.empty((0, self.loaded.model_config.feature_size), np.float32)
        return np.concatenate([nothing, *(part.cpu().numpy() for part in features)])


def check_list(items: Any) -> Any:
    """Refuse a single image or text where a list of them belongs."""
    if isinstance(items, str | Path | Image.Image):
        raise InputError(f"{str(items)!r}: images and texts come in lists. Put it in one.")
    return items


def read_picture(image: Picture) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture upright and in RGB.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f"a picture of shape {image.shape} and type {image.dtype}: pixels are an array of"
                " (height, width, 3) and type uint8. Convert it."
            )
        return image
    try:
        return decode_image(Path(image).read_bytes())
    except (OSError, UndecodableImage) as error:
        raise InputError(f"{image}: cannot be read as a picture ({error}).") from error


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InputError(f"{name} {index}: the model has {name}s 0 to {count - 1}. Choose one.")
