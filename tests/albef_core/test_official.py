"""Every key of every official model has one name of ours, and comes back from it."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from albef_core.config import ModelConfig, ObjectiveConfig, corrected
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.official import from_official, num_text_layers, our_name, to_official
from albef_core.teacher import Teacher
from albef_core.weights import model_config_of
from tests.albef_core.replay import read_json
from tests.golden_folder import GOLDEN, needs_golden

FULL_SIZE = GOLDEN / "full_size"
MODELS = ("pretrain", "vqa", "retrieval", "ve", "nlvr", "nlvr_pretrain")


def recorded_states() -> dict[str, dict[str, Tensor]]:
    """Give each official model's state dict, without the numbers."""
    states: dict[str, dict[str, Tensor]] = {}
    model = ""
    for line in (FULL_SIZE / "state_dict_keys.txt").read_text().splitlines():
        if line.startswith("## "):
            model = line.split()[1]
            states[model] = {}
        elif line:
            key, shape, dtype = line.split("\t")
            sizes = [int(size) for size in shape.strip("[]").split(",") if size.strip()]
            states[model][key] = torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    return states


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


def has_mlm_head(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("text_encoder.cls.") for key in state)


def there_and_back(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return to_official(
        from_official(state),
        text_layers=num_text_layers(state),
        has_mlm_head=has_mlm_head(state),
    )


@needs_golden
def test_all_six_official_models_are_recorded() -> None:
    assert recorded_states().keys() == set(MODELS)


@needs_golden
@pytest.mark.parametrize("model", MODELS)
def test_every_key_and_shape_comes_back_from_our_names(model: str) -> None:
    state = recorded_states()[model]
    assert shapes(there_and_back(state)) == shapes(state)


@needs_golden
@pytest.mark.parametrize("model", MODELS)
def test_only_what_is_repeated_or_counted_out_shares_or_lacks_a_name(model: str) -> None:
    state = recorded_states()[model]
    layers = num_text_layers(state)
    names = {key: our_name(key, text_layers=layers) for key in state}
    nameless = {key for key, name in names.items() if name is None}
    assert nameless == {key for key in state if key.endswith("embeddings.position_ids")}
    owners: dict[str, list[str]] = {}
    for key, name in names.items():
        if name is not None:
            owners.setdefault(name, []).append(key)
    shared = [keys for keys in owners.values() if len(keys) > 1]
    biases = [key for key in state if key.endswith("cls.predictions.bias")]
    assert sorted(shared) == sorted(
        [bias, bias.replace("predictions.bias", "predictions.decoder.bias")] for bias in biases
    )


@needs_golden
@pytest.mark.parametrize("model", ["pretrain", "retrieval"])
def test_our_modules_at_full_size_have_the_official_keys_and_shapes(model: str) -> None:
    recorded = recorded_states()[model]
    state, sizes = our_state(recorded)
    kept = {
        name: tensor
        for name, tensor in state.items()
        if has_mlm_head(recorded) or "mlm_head." not in name
    }
    if "idx_queue" in recorded:
        kept["queues.image_ids"] = torch.empty(
            recorded["idx_queue"].shape, dtype=torch.int64, device="meta"
        )
    ours = to_official(kept, text_layers=sizes.text_layers, has_mlm_head=has_mlm_head(recorded))
    assert shapes(ours) == shapes(recorded)


@needs_golden
@pytest.mark.parametrize("model", ["pretrain", "retrieval"])
def test_our_modules_at_full_size_have_the_official_number_of_parameters(model: str) -> None:
    recorded = recorded_states()[model]
    counts = read_json(FULL_SIZE / "models.json")[model]
    sizes = model_config_of(from_official(recorded), source=model)
    with torch.device("meta"):
        student = ALBEF(sizes)
        teacher = Teacher(sizes, student)

    def count(module: nn.Module) -> int:
        return sum(
            parameter.numel()
            for name, parameter in module.named_parameters()
            if has_mlm_head(recorded) or not name.startswith("mlm_head.")
        )

    assert count(student) == counts["parameters_trainable"]
    assert count(student) + count(teacher) == counts["parameters_unique"]


@needs_golden
def test_the_sizes_read_off_the_official_shapes_are_the_paper_s() -> None:
    states = recorded_states()
    assert model_config_of(from_official(states["pretrain"]), source="pretrain") == ModelConfig()
    for_retrieval = model_config_of(from_official(states["retrieval"]), source="retrieval")
    assert replace(for_retrieval, image_size=256) == ModelConfig()


@needs_golden
@pytest.mark.parametrize("task", ["retrieval", "grounding", "ve"])
def test_a_pre_trained_weight_keeps_its_name_in_the_tasks_that_it_starts(task: str) -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")[task]["loaded"]
    pretrained = recorded_states()["pretrain"]
    layers = num_text_layers(pretrained)
    for key, source in conversion.items():
        assert our_name(key, text_layers=layers) == our_name(source, text_layers=layers), key


def our_state(recorded: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ModelConfig]:
    """Student, teacher and queues at the recorded sizes, by our names and without numbers."""
    translated = from_official(recorded)
    sizes = model_config_of(translated, source="recording")
    num_slots = len(translated["queues.image.features"])
    with torch.device("meta"):
        student = ALBEF(sizes)
        teacher = Teacher(sizes, student)
        queues = Queues(sizes, ObjectiveConfig(num_slots=num_slots), corrected())
    state = dict(student.state_dict())
    state |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    state["queues.image.features"] = queues.image.features
    state["queues.text.features"] = queues.text.features
    state["queues.pointer"] = queues.image.pointer.reshape(1)
    return state, sizes


def test_names_say_which_half_of_bert_a_layer_belongs_to() -> None:
    key = "text_encoder.bert.encoder.layer.6.crossattention.self.key.weight"
    ours = "multimodal_encoder.layers.0.cross_attention.key.weight"
    assert our_name(key, text_layers=6) == ours
    key = "text_encoder_m.bert.encoder.layer.5.output.dense.bias"
    assert our_name(key, text_layers=6) == "teacher.text_encoder.layers.5.mlp.down.bias"
    key = "text_decoder.bert.encoder.layer.3.attention.output.LayerNorm.weight"
    assert our_name(key, text_layers=6) == "answer_decoder.layers.3.self_attention.norm.weight"


def test_queues_are_turned_so_that_a_row_is_a_feature() -> None:
    official = {"image_queue": torch.arange(6.0).reshape(2, 3)}
    ours = from_official(official)["queues.image.features"]
    assert ours.tolist() == [[0, 3], [1, 4], [2, 5]]
    back = to_official({"queues.image.features": ours}, text_layers=1)
    assert torch.equal(back["image_queue"], official["image_queue"])


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.lr",
        "text_encoder.bert.encoder.layer.0.attention.self.rotary.weight",
        "text_encoder.cls.predictions.gate.weight",
        "text_encoder_m.bert.pooler.dense.weight",
        "visual_encoder_n.norm.weight",
    ],
)
def test_an_unknown_key_is_named_in_full(key: str) -> None:
    with pytest.raises(KeyError) as unknown:
        from_official({key: torch.zeros(1)})
    assert unknown.value.args == (key,)
