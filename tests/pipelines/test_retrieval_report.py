from io import BytesIO

import numpy as np

from albef_core.metrics import Estimate
from pipelines.evaluate import NamedCase
from pipelines.retrieval_findings import SweepPoint
from pipelines.retrieval_report import recall_against_k_figure, retrieval_cases_figure

PICTURE = np.full((8, 8, 3), 90, dtype=np.uint8)


def drawn(figure):
    """All text in a figure, after it was really drawn (a warning would be an error)."""
    figure.savefig(BytesIO(), format="png")
    texts = [text.get_text() for panel in figure.axes for text in panel.texts]
    return " | ".join([*texts, *(panel.get_title() for panel in figure.axes)])


def test_the_title_of_a_sweep_names_the_best_k_and_its_cost():
    recalls = {1: (0.2, 100), 2: (0.3, 200), 4: (0.25, 390)}
    points = [
        SweepPoint(
            top_k=k,
            num_pairs=cost,
            mean_recall=Estimate(value=value, low=value - 0.1, high=value - 0.01, chance=0.01),
        )
        for k, (value, cost) in recalls.items()
    ]
    figure = recall_against_k_figure(points, Estimate(value=0.22, low=0.2, high=0.24, chance=0.01))
    assert figure.get_suptitle() == "Mean recall is best with k = 2: 30.0 %, for 200 pairs"
    assert "k = 4" in drawn(figure)


def test_cases_show_what_came_first_and_where_the_truth_is():
    shared = {"image_id": "a", "text": "a $dog", "match": 0.9}
    cases = [
        NamedCase(
            direction="image to text", found_image_id="b", found_text="a cat", rank=3, **shared
        ),
        NamedCase(direction="text to image", found_image_id="b", found_text="", rank=1, **shared),
    ]
    figure = retrieval_cases_figure("worst", cases, [(PICTURE, PICTURE)] * 2)
    assert figure.get_suptitle() == "Where the model is surest and wrong"
    text = drawn(figure)
    for part in ("a cat", "a $dog", "first, with 90.0 % match", "true is number 4", "its picture"):
        assert part in text
    assert retrieval_cases_figure("best", [], []).get_suptitle().endswith("right")
