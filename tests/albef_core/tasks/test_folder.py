"""Official files of tasks: all of their keys are written, and they are read for what they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.tasks.entailment import EntailmentModel
from albef_core.tasks.folder import MODELS, TaskName, load_task
from albef_core.tasks.nlvr2 import Nlvr2Model
from albef_core.tasks.text_assignment import AssignmentModel
from albef_core.tasks.vqa import VqaModel
from albef_core.teacher import frozen_copy
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model, save_official, task_of_model
from tests.albef_core.tasks.recording import Recording
from tests.golden_folder import GOLDEN, needs_golden

TOKENIZER = Tokenizer.learn(["red and blue"], vocab_size=30)


@needs_golden
@pytest.mark.parametrize(
    ("folder", "make", "has_teacher"),
    [
        ("ve", EntailmentModel, True),
        ("vqa", VqaModel, True),
        ("nlvr", Nlvr2Model, True),
        ("nlvr_pretrain", AssignmentModel, False),
    ],
)
def test_every_key_of_an_official_file_is_written_as_it_was(
    folder: str, make: type[nn.Module], has_teacher: bool, tmp_path: Path
) -> None:
    recording = Recording(GOLDEN / folder)
    student = make(recording.sizes)
    teacher = frozen_copy(student) if has_teacher else None
    recording.load(student=student, teacher=teacher)
    save_official(tmp_path / "task.pth", student, teacher, None, recording.sizes)
    written = torch.load(tmp_path / "task.pth", weights_only=True)["model"]
    assert written.keys() == recording.official.keys()
    for key, tensor in recording.official.items():
        assert torch.equal(written[key], tensor), key


@pytest.fixture
def official_file(
    tmp_path: Path, head_wide_config: ModelConfig, randomize: Callable
) -> Callable[[TaskName], tuple[Path, nn.Module]]:
    """Give a function that writes a task's official file, and the model that is in it."""

    def write(task: TaskName) -> tuple[Path, nn.Module]:
        model = randomize(MODELS[task](head_wide_config))
        file = tmp_path / f"{task}.pth"
        teacher = None if task == "text-assignment" else frozen_copy(model)
        save_official(file, model, teacher, None, head_wide_config)
        TOKENIZER.save(tmp_path)
        return file, model

    return write


@pytest.mark.parametrize("task", MODELS)
def test_an_official_file_is_read_for_the_task_whose_head_it_has(
    task: TaskName, official_file: Callable, head_wide_config: ModelConfig
) -> None:
    file, model = official_file(task)
    loaded = load_task(file)
    assert loaded.task == task_of_model(file) == task
    assert loaded.model_config.fusion_layers == head_wide_config.fusion_layers
    assert not loaded.recipe.keep_sep, "the published code leaves [SEP] out"
    assert loaded.answers == ()
    own = loaded.model.state_dict()
    assert own.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(own[name], weight), name
    with pytest.raises(InputError, match=f"fine-tuned for {task}, which cannot do this"):
        load_model(file)


def test_a_file_of_no_task_is_refused(tmp_path: Path, head_wide_config: ModelConfig) -> None:
    torch.save({"model": {"temp": torch.tensor(0.07)}}, tmp_path / "ALBEF.pth")
    with pytest.raises(InputError, match="not fine-tuned for any of"):
        load_task(tmp_path / "ALBEF.pth")
