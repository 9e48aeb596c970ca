"""Captions to token ids: BERT's WordPiece, from the hub, from a file, or learned from captions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from huggingface_hub import hf_hub_download
from jaxtyping import Int32
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from albef_core.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TOKENIZER_FILE = "tokenizer.json"
_VOCABULARY_FILE = "vocab.txt"
_CONTINUED = "##"


class Tokenizer:
    """A WordPiece vocabulary and the ids of its special tokens. Make one with `load` or `learn`.

    Can be pickled, and gives the same ids in every process.
    """

    def __init__(self, backend: Backend, source: str):
        found = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
        ids = [number for number in found.values() if number is not None]
        if len(ids) < len(found):
            missing = [token for token, number in found.items() if number is None]
            raise InputError(
                f"{source}: the vocabulary lacks {' '.join(missing)}."
                " Use a BERT vocabulary, or `corpus` to learn one from the captions."
            )
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = frozenset(ids)
        self.vocab_size: int = backend.get_vocab_size()
        vocabulary = backend.get_vocab()
        self._pieces = sorted(vocabulary, key=vocabulary.__getitem__)

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Read a vocabulary from a folder, a vocab.txt, a tokenizer.json or the Hugging Face hub.

        Raises:
            InputError: Nothing readable is there, or the hub cannot be reached.
        """
        path = _local_file(source)
        try:
            if path.suffix == ".json":
                return cls(Backend.from_file(str(path)), str(source))
            return cls(_wordpiece(path.read_text(encoding="utf-8").splitlines()), str(source))
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(
                f"{path}: not a tokenizer file ({error})."
                " Pass a vocab.txt or a tokenizer.json of a BERT model."
            ) from error

    @classmethod
    def learn(cls, captions: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learn a lower-case WordPiece vocabulary of at most `vocab_size` pieces.

        It depends only on how often each word occurs, so the same captions give the same ids. The
        rarest letters are left out (their words are [UNK]) when letters alone would fill more than
        half of the vocabulary.
        """
        blank = _wordpiece(SPECIAL_TOKENS)
        words = _count_words(blank, captions)
        letters = Counter[str]()
        for word, count in words.items():
            letters.update(dict.fromkeys(word, count))
        by_frequency = sorted(letters, key=lambda letter: (-letters[letter], letter))
        kept = sorted(by_frequency[: max(0, vocab_size - len(SPECIAL_TOKENS)) // 4])
        if not kept:
            raise InputError(
                f"No vocabulary of {vocab_size} pieces can be learned from {words.total()} words."
                " Give more captions or a larger vocabulary."
            )
        # The trainer numbers continued letters in random order and breaks ties by number; naming
        # them beforehand makes it deterministic.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL_TOKENS, *(_CONTINUED + letter for letter in kept)],
            show_progress=False,
        )
        learner = Backend(models.WordPiece(unk_token="[UNK]"))
        learner.train_from_iterator(_repeat_words(words, set(kept)), trainer)
        vocabulary = learner.get_vocab()
        return cls(_wordpiece(sorted(vocabulary, key=vocabulary.__getitem__)), "captions")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which `load` reads back, and vocab.txt for other programs."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / _TOKENIZER_FILE))
        pieces = self.words(range(self.vocab_size))
        (folder / _VOCABULARY_FILE).write_text("\n".join(pieces) + "\n", encoding="utf-8")

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int,
        keep_sep: bool,
        pad_to_max: bool = False,
    ) -> Int32[np.ndarray, "B L"]:
        """Turn texts into ids: [CLS], the pieces, and with `keep_sep` a final [SEP].

        Each text is cut to `max_tokens` ids, [CLS] and [SEP] included. Shorter ones are padded to
        the longest, or to `max_tokens` with `pad_to_max`. Without `keep_sep` the ids are those of
        the published tokenizer. A special token written out in the text, as "[SEP]", counts as one.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ending = [self.sep_id] if keep_sep else []
        room = max_tokens - 1 - len(ending)
        rows = [[self.cls_id, *encoding.ids[:room], *ending] for encoding in encodings]
        length = max_tokens if pad_to_max else max(map(len, rows), default=0)
        token_ids = np.full((len(rows), length), self.pad_id, np.int32)
        for padded, row in zip(token_ids, rows, strict=True):
            padded[: len(row)] = row
        return token_ids

    def words(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """Name the pieces, one for each id; a piece within a word starts with ##."""
        return [self._pieces[token_id] for token_id in ids]


def _local_file(source: str | Path) -> Path:
    """Find tokenizer.json or vocab.txt on disk, else on the hub."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in (_TOKENIZER_FILE, _VOCABULARY_FILE)]
        for file in found:
            if file.is_file():
                return file
        raise InputError(
            f"{path}: neither {_TOKENIZER_FILE} nor {_VOCABULARY_FILE} is in this folder."
            " Pass the folder of a BERT model."
        )
    return _hub_file(str(source))


def _hub_file(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, _TOKENIZER_FILE))
    except Exception as error:  # the hub client passes on whatever its transport raises
        raise InputError(
            f"{name}: no such file or folder here, and no tokenizer from the Hugging Face hub"
            f" ({type(error).__name__}). Pass a local folder or vocab.txt."
        ) from error


def _wordpiece(pieces: Sequence[str]) -> Backend:
    """Assemble BERT's lower-case tokenizer over pieces listed in the order of their ids."""
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in SPECIAL_TOKENS if token in vocabulary]
    )
    return backend


def _count_words(backend: Backend, captions: Iterable[str]) -> Counter[str]:
    """Count the words that the normalizer and the pre-tokenizer leave."""
    words = Counter[str]()
    for caption in captions:
        text = backend.normalizer.normalize_str(caption)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return words


def _repeat_words(words: Counter[str], letters: set[str]) -> Iterator[str]:
    """Repeat every word of known letters as often as it was counted."""
    known = (item for item in words.items() if letters.issuperset(item[0]))
    return chain.from_iterable(repeat(word, count) for word, count in known)
