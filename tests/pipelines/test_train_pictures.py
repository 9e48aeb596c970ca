"""What a training's pictures show: the pairs of one real step, in their right places."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from albef_core.batch import PairBatch, normalize
from albef_core.config import ModelConfig, ObjectiveConfig, corrected
from albef_core.feature_queue import Queues
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF
from albef_core.objectives.itm import Negatives
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import pretraining_step
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from pipelines.pairs import FeedBatch, FeedSpec, prepare_block
from pipelines.presets import tiny
from pipelines.tracking import Tracker, open_run
from pipelines.train_pictures import (
    caption_targets,
    hard_negative_similarity,
    hardest_pairs,
    log_pictures,
    pairs_at,
    word_targets,
)

NUM_PAIRS = 6


@pytest.fixture
def batch(spec: FeedSpec) -> FeedBatch:
    spec = replace(spec, batch_size=NUM_PAIRS, mask_share=0.4)
    block = prepare_block(spec, step=0, start=0, stop=NUM_PAIRS)
    names = ("images", "token_ids", "masked_ids", "mlm_labels", "image_keys")
    return FeedBatch(
        step=0,
        epoch=0,
        **{name: block[name] for name in names},
        image_ids=block["image_ids"].tolist(),
        captions=block["captions"].tolist(),
        bad_ids=[],
    )


@pytest.fixture
def tokenizer(spec: FeedSpec) -> Tokenizer:
    return Tokenizer.load(spec.tokenizer)


@pytest.fixture
def outcome(batch: FeedBatch, tokenizer: Tokenizer) -> PretrainingStep:
    return step_of(batch, tokenizer)


def step_of(batch: FeedBatch, tokenizer: Tokenizer, *, is_ruined: bool = False) -> PretrainingStep:
    """One step of an untrained model; its vocabulary has spare rows, as BERT's may have."""
    sizes = replace(tiny().model, image_size=32, vocab_size=tokenizer.vocab_size + 8)
    torch.manual_seed(0)
    student = ALBEF(ModelConfig(**vars(sizes)))
    nn.init.constant_(student.mlm_head.decoder.bias[-8:], 100.0)
    if is_ruined:
        nn.init.constant_(student.text_encoder.norm.weight, torch.nan)
    pairs = PairBatch(
        images=normalize(torch.tensor(batch.images)),
        token_ids=torch.tensor(batch.token_ids),
        attention_mask=torch.tensor(batch.token_ids != tokenizer.pad_id),
        masked_ids=torch.tensor(batch.masked_ids),
        mlm_labels=torch.tensor(batch.mlm_labels).long(),
        image_ids=torch.tensor(batch.image_keys),
    )
    return pretraining_step(
        student,
        Teacher(sizes, student),
        Queues(sizes, ObjectiveConfig(num_slots=8), corrected()),
        pairs,
        alpha=0.4,
        recipe=corrected(),
    )


def test_the_hardest_pairs_are_those_whose_wrong_halves_matching_believes_most(
    outcome: PretrainingStep,
) -> None:
    # Rows: six true pairs, six wrong images, six wrong texts; the second column says "matched".
    logits = torch.zeros(3 * NUM_PAIRS, 2)
    logits[:NUM_PAIRS, 1] = torch.arange(NUM_PAIRS)  # true pairs have no say
    logits[NUM_PAIRS + 4, 1] = 3
    logits[2 * NUM_PAIRS + 1, 1] = 2
    logits[2 * NUM_PAIRS + 2, 1] = 1
    step = replace(outcome, itm=replace(outcome.itm, logits=logits))
    assert hardest_pairs(step, count=3) == [4, 1, 2]


def test_pairs_are_found_by_their_places_in_the_global_batch(batch: FeedBatch) -> None:
    found = pairs_at({12, 10}, batch, places=range(10, 16))
    assert {place: caption for place, (_, caption) in found.items()} == {
        10: batch.captions[0],
        12: batch.captions[2],
    }
    assert (found[12][0] == batch.images[2]).all()


def test_words_are_shown_with_their_own_caption_the_surest_first(
    batch: FeedBatch, outcome: PretrainingStep, tokenizer: Tokenizer
) -> None:
    targets = word_targets(batch, outcome, tokenizer, count=4)
    assert len(targets) == 4
    surest = [target.probabilities[0] for target in targets]
    assert surest == sorted(surest, reverse=True)
    rows, columns = (batch.mlm_labels != NOT_SCORED).nonzero()
    true_words = [
        tokenizer.words(batch.token_ids[row, [column]])[0]
        for row, column in zip(rows, columns, strict=True)
    ]
    for target in targets:
        assert target.true_word in true_words
        row = next(r for r in range(NUM_PAIRS) if (batch.images[r] == target.image).all())
        told = target.masked_caption.replace("[MASK]", target.true_word.removeprefix("##"))
        assert told.replace(" ", "") == "".join(
            word.removeprefix("##")
            for word in tokenizer.words(batch.token_ids[row])
            if word not in ("[CLS]", "[SEP]", "[PAD]")
        )
        # Spare rows of the vocabulary are no words, however sure of them the model is.
        assert len(target.words) == 5
        assert 0 < sum(target.probabilities) <= 1


def test_captions_are_shown_nearest_first(batch: FeedBatch, outcome: PretrainingStep) -> None:
    for row, target in enumerate(caption_targets(batch, outcome, count=3)):
        cosines = (outcome.teacher_image_features[row] @ outcome.teacher_text_features.T).tolist()
        best = sorted(range(NUM_PAIRS), key=lambda index: -cosines[index])[:5]
        assert target.captions == [batch.captions[index] for index in best]
        assert target.true_caption == batch.captions[row]
        assert target.similarities == pytest.approx([cosines[index] for index in best])


def test_the_similarity_of_hard_negatives_is_their_mean_cosine(outcome: PretrainingStep) -> None:
    negatives = Negatives(
        images=torch.tensor([1, 2, 3, 4, 5, 0]),
        texts=torch.tensor([2, 3, 4, 5, 0, 1]),
        exist=torch.ones(NUM_PAIRS, dtype=torch.bool),
    )
    step = replace(outcome, itm=replace(outcome.itm, negatives=negatives))
    images, texts = outcome.teacher_image_features, outcome.teacher_text_features
    to_texts = (outcome.image_features * texts[negatives.texts]).sum(dim=1)
    to_images = (outcome.text_features * images[negatives.images]).sum(dim=1)
    found = hard_negative_similarity(step, torch.tensor(tiny().objective.temperature))
    torch.testing.assert_close(found, (to_texts.mean() + to_images.mean()).detach() / 2)


def test_both_pictures_reach_the_run(
    batch: FeedBatch,
    outcome: PretrainingStep,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run("test", None, run_name="r", params={}, tags={})
    tracker = Tracker(run)
    log_pictures(tracker, batch, outcome, tokenizer, places=range(NUM_PAIRS), step=12)
    # Without a tracker the worker only answers the others.
    log_pictures(None, batch, outcome, tokenizer, places=range(NUM_PAIRS), step=13)
    tracker.close()
    files = MlflowClient(run.uri).list_artifacts(run.run_id, "pictures")
    assert [file.path for file in files] == [
        "pictures/hard-negatives-00000012.png",
        "pictures/pseudo-targets-00000012.png",
    ]


def test_a_batch_that_was_skipped_has_pictures_too(
    batch: FeedBatch,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run("test", None, run_name="r", params={}, tags={})
    tracker, outcome = Tracker(run), step_of(batch, tokenizer, is_ruined=True)
    assert outcome.loss.isnan()
    log_pictures(tracker, batch, outcome, tokenizer, places=range(NUM_PAIRS), step=12)
    tracker.close()
    files = MlflowClient(run.uri).list_artifacts(run.run_id, "pictures")
    assert len(files) == 2
