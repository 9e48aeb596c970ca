import pytest
import torch

from albef_core.precision import full_precision, no_autocast


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened_and_the_rest_passes(
    before: torch.dtype, after: torch.dtype
) -> None:
    values = torch.tensor([0.1, -3.0], dtype=before)
    wide = full_precision(values)
    assert wide.dtype == after
    assert torch.equal(wide.double(), values.double())


def test_a_product_inside_no_autocast_is_not_rounded_to_bfloat16() -> None:
    rows = torch.tensor([[1.0, 2.0**-10]])
    device = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rows @ rows.T
        with no_autocast(device):
            exact = rows @ rows.T
        again = rows @ rows.T
    assert exact.dtype == torch.float32
    assert exact.item() == 1 + 2.0**-20
    assert rounded.dtype == again.dtype == torch.bfloat16
