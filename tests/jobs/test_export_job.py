import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from albef_core.config import ModelConfig, ObjectiveConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.tasks.folder import load_task, save_task
from albef_core.tasks.vqa import VqaModel
from albef_core.teacher import Teacher, frozen_copy
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model, official_state, read_official, save_model
from pipelines.export import export

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.learn(["a red square", "the blue circle"] * 5, vocab_size=60)
CONFIG = ModelConfig(
    image_size=32, image_width=64, image_layers=1, image_heads=1, image_mlp_ratio=2.0,
    text_width=64, text_heads=1, text_mlp_width=32, text_layers=1, fusion_layers=1,
    vocab_size=TOKENIZER.vocab_size, max_positions=16, feature_size=8,
)  # fmt: skip


def save(folder: Path, config: ModelConfig = CONFIG, *, model: ALBEF | None = None) -> ALBEF:
    torch.manual_seed(0)
    model = model or ALBEF(config)
    save_model(
        folder,
        model,
        model_config=config,
        text_config=TextConfig(),
        recipe=Recipe(),
        tokenizer=TOKENIZER,
    )
    return model


def run_job(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/export.py", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "250", "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_an_exported_model_gives_the_same_features_when_loaded_again(tmp_path: Path) -> None:
    model = save(tmp_path / "model").eval()

    done = run_job("--model", tmp_path / "model", "--out", tmp_path / "out" / "ALBEF.pth")

    assert done.returncode == 0, done.stderr
    assert "student: 0.2 million weights" in done.stdout
    assert "teacher and queues: the source has none" in done.stdout
    loaded = load_model(tmp_path / "out" / "ALBEF.pth")
    ids = [own.encode(["a red circle"], max_tokens=9, keep_sep=True)
           for own in (TOKENIZER, loaded.tokenizer)]  # fmt: skip
    assert ids[0].tolist() == ids[1].tolist()
    pictures, token_ids = torch.rand(2, 3, 32, 32), torch.from_numpy(ids[0]).repeat(2, 1)
    with torch.inference_mode():
        for method, inputs in (
            ("encode_image", (pictures,)),
            ("encode_text", (token_ids, token_ids != TOKENIZER.pad_id)),
        ):
            ours = getattr(model, method)(*inputs)
            again = getattr(loaded.model.eval(), method)(*inputs)
            torch.testing.assert_close(ours, again, rtol=0, atol=0)


@pytest.mark.slow
def test_a_checkpoint_s_teacher_and_queues_go_with_it(tmp_path: Path) -> None:
    student = save(tmp_path / "checkpoint")
    teacher = Teacher(CONFIG, student)
    with torch.no_grad():
        teacher.image_projection.weight.add_(1)
    queues = Queues(CONFIG, ObjectiveConfig(num_slots=4), Recipe())
    queues.push(torch.rand(3, 8), torch.rand(3, 8), torch.arange(3))
    moving = official_state(teacher, text_layers=CONFIG.text_layers, prefix="teacher.")
    moving |= {f"queues.{name}": tensor for name, tensor in queues.state_dict().items()}
    save_file(moving, tmp_path / "checkpoint" / "teacher.safetensors")

    done = run_job("--model", tmp_path / "checkpoint", "--out", tmp_path / "ALBEF.pth")

    assert done.returncode == 0, done.stderr
    assert "4 slots, 75% in use" in done.stdout
    saved = torch.load(tmp_path / "ALBEF.pth", weights_only=True)["model"]
    assert saved["image_queue"].shape == saved["text_queue"].shape == (8, 4)
    assert saved["queue_ptr"].tolist() == [3]
    state = read_official(tmp_path / "ALBEF.pth")
    for name, tensor in teacher.state_dict().items():
        assert state[f"teacher.{name}"].equal(tensor), name
    assert state["queues.image.features"].equal(queues.image.features)
    assert state["queues.text.features"].equal(queues.text.features)


def test_a_task_s_checkpoint_goes_with_its_teacher_and_its_list_of_answers(tmp_path: Path) -> None:
    student = VqaModel(CONFIG)
    save_task(
        tmp_path / "checkpoint",
        student,
        task="vqa",
        model_config=CONFIG,
        text_config=TextConfig(),
        recipe=Recipe(),
        tokenizer=TOKENIZER,
        answers=("red", "blue"),
    )
    teacher = frozen_copy(VqaModel(CONFIG))
    moving = official_state(teacher, text_layers=CONFIG.text_layers, prefix="teacher.")
    save_file(moving, tmp_path / "checkpoint" / "teacher.safetensors")
    out = tmp_path / "out" / "vqa.pth"

    exported = export(str(tmp_path / "checkpoint"), out)

    assert [line.split(":")[0] for line in exported.inside] == ["student", "teacher (`*_m`)"]
    assert "answers: 2, in answer_list.json beside it" in exported.not_inside
    assert exported.next_command == (
        f"python jobs/evaluate.py vqa --model {out} --answer-list {out.parent / 'answer_list.json'}"
        " --corpus DIR"
    )
    assert json.loads((out.parent / "answer_list.json").read_text()) == ["red", "blue"]
    state = read_official(out)
    for prefix, model in (("", student), ("teacher.", teacher)):
        for name, tensor in model.state_dict().items():
            assert state[prefix + name].equal(tensor), prefix + name
    assert load_task(out).task == "vqa"


def test_a_retrieval_model_is_exported_without_the_head_that_it_did_not_train(
    tmp_path: Path,
) -> None:
    model = ALBEF(CONFIG)
    model.drop_mlm_head()
    save(tmp_path / "checkpoint", model=model)
    queues = Queues(CONFIG, ObjectiveConfig(num_slots=4), Recipe())
    queues.push(torch.rand(3, 8), torch.rand(3, 8), torch.tensor([7, 8, 7]))
    teacher = Teacher(CONFIG, model)
    moving = official_state(teacher, text_layers=CONFIG.text_layers, prefix="teacher.")
    moving |= {f"queues.{name}": tensor for name, tensor in queues.state_dict().items()}
    save_file(moving, tmp_path / "checkpoint" / "teacher.safetensors")

    exported = export(str(tmp_path / "checkpoint"), tmp_path / "retrieval.pth")

    assert exported.next_command.startswith("python jobs/evaluate.py retrieval --model")
    saved = torch.load(tmp_path / "retrieval.pth", weights_only=True)["model"]
    assert not any("cls.predictions" in key or ".bert." in key for key in saved)
    assert saved["idx_queue"].tolist() == [[7, 8, 7, -100]]
    assert not hasattr(load_model(tmp_path / "retrieval.pth").model, "mlm_head")


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("there.pth", "is there already"),
        ("ALBEF.safetensors", r"is a \.pth file\. Name it so"),
        ("other/ALBEF.pth", "is another model's vocabulary"),
    ],
)
def test_nothing_is_overwritten(out: str, sentence: str, tmp_path: Path) -> None:
    save(tmp_path / "model")
    (tmp_path / "there.pth").write_text("kept")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("[PAD]\n")

    with pytest.raises(InputError, match=sentence):
        export(str(tmp_path / "model"), tmp_path / out)

    assert (tmp_path / "there.pth").read_text() == "kept"
    assert not (tmp_path / "other" / "ALBEF.pth").exists()


def test_heads_of_another_width_are_refused_because_the_file_cannot_say_so(tmp_path: Path) -> None:
    save(tmp_path / "model", dataclasses.replace(CONFIG, image_heads=2))

    with pytest.raises(InputError, match="its image attention heads are 32 wide"):
        export(str(tmp_path / "model"), tmp_path / "ALBEF.pth")

    assert not (tmp_path / "ALBEF.pth").exists()
