"""The driver dies, and the same command goes on: two real processes, each with its own Ray."""

import random
from pathlib import Path

import pytest

from benchmarks.kill import PLANS, differing_tensors, disturb, loss_difference, workers_flags
from benchmarks.training_process import Training
from tests.conftest import SmallCorpus

EVERY, STEPS = 5, 30
SIZES = "--image-size 32 --image-width 32 --image-layers 1 --text-width 32 --num-slots 24"
FLAGS = ("--batch-size", "16", "--dropout", "0.1", "--checkpoint-every", str(EVERY))


@pytest.mark.cluster
@pytest.mark.slow
def test_after_kill_9_of_the_driver_the_same_command_goes_on_bit_for_bit(
    small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    def new(name: str) -> Training:
        flags = (*FLAGS, *SIZES.split(), *workers_flags(2))
        return Training(root=tmp_path / name, corpus=small_corpus.folder, steps=STEPS, flags=flags)

    undisturbed, killed, seed = new("undisturbed"), new("killed"), str(random.randrange(10**6))
    undisturbed.end(undisturbed.start())
    (plan,) = PLANS["driver"]
    (moment,) = disturb(killed, plan, every=EVERY, seed=seed)
    assert EVERY <= moment.went_on_from < STEPS, seed
    assert loss_difference(killed, undisturbed) == 0, (seed, moment)
    assert not differing_tensors(killed, undisturbed), (seed, moment)
