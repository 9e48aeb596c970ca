import json
from pathlib import Path

import pytest

from albef_core.errors import InputError
from pipelines.expressions import Expression, collect_expressions
from pipelines.manifest import Manifest
from tests.conftest import picture_row, write_corpus


def corpus_of(folder: Path, *annotations: object) -> Manifest:
    rows = [
        picture_row(number) | {"annotations": None if said is None else json.dumps(said)}
        for number, said in enumerate(annotations)
    ]
    return write_corpus(folder, rows, rows_per_shard=2, rows_per_group=2)


def test_expressions_come_in_order_with_their_row_and_the_picture_s_proposals(
    tmp_path: Path,
) -> None:
    first = {"box": [1, 2, 3, 4], "expression": "The big dog."}
    second = {"box": [5.5, 6, 7, 8], "expression": "a cat"}
    manifest = corpus_of(
        tmp_path,
        None,
        {"objects": [first, second], "proposals": [[0, 0, 9, 9], [1, 1, 2, 2]]},
        {},
        {"objects": [second]},
    )

    found, bad = collect_expressions(manifest, max_words=30)

    both = [[0, 0, 9, 9], [1, 1, 2, 2]]
    rows = [(1, first, both), (1, second, both), (3, second, [])]
    assert found == [
        Expression(
            row=row,
            image_id=f"picture-{row:03d}",
            text=thing["expression"],
            box=thing["box"],
            proposals=proposals,
        )
        for row, thing, proposals in rows
    ]
    assert bad == {}


def test_what_cannot_be_scored_is_counted_and_things_without_a_name_are_no_mistake(
    tmp_path: Path,
) -> None:
    manifest = corpus_of(
        tmp_path,
        {
            "objects": [
                {"box": [1, 2, 3, 4], "expression": "a dog"},
                {"box": [1, 2, 3, 4], "expression": "?!"},
                {"expression": "a bird"},
                {"box": [1, 2, 0, 4], "expression": "a line"},
                {"box": [1.2, 2, 0.5, 4], "expression": "a thread"},
                {"box": [1, 2, 3, 4], "category": "cat"},
            ],
            "proposals": [[0, 0, 5, 0], [0, 0, 5, 5], [0, 0, -1, 5]],
        },
    )

    found, bad = collect_expressions(manifest, max_words=30)

    assert [(one.text, one.proposals) for one in found] == [("a dog", [[0, 0, 5, 5]])]
    assert bad == {
        "a proposal without area": 2,
        "an empty expression": 1,
        "no box": 1,
        "a box without a pixel": 2,
    }


def test_a_corpus_without_a_boxed_expression_is_refused_with_what_it_has(tmp_path: Path) -> None:
    manifest = corpus_of(tmp_path, {"objects": [{"expression": "a dog"}]}, None)

    with pytest.raises(InputError, match=r"none of its 2 pictures has .* a box, 1 with no box"):
        collect_expressions(manifest, max_words=30)
