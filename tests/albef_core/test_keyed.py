"""Keyed random numbers: the same for a row wherever it stands, and as random as others."""

import pytest
import torch

from albef_core.keyed import KeyedDropout, Stream, row_keys, uniforms

SEED = 2**63 - 12345


def keys_of(rows: torch.Tensor, *, seed: int = SEED, stream: Stream = Stream.TEXT) -> torch.Tensor:
    return row_keys(rows, seed=seed, stream=stream)


def test_a_row_has_the_same_key_in_any_company() -> None:
    together = keys_of(torch.arange(100))
    alone = torch.cat([keys_of(torch.tensor([row])) for row in range(100)])
    assert torch.equal(together, alone)


def test_rows_streams_and_seeds_have_keys_of_their_own() -> None:
    rows = torch.arange(5000)
    keys = torch.cat(
        [keys_of(rows, seed=seed, stream=s) for seed in (0, 1, 2**40) for s in list(Stream)[:3]]
    )
    # Of 45,000 random 32-bit numbers a quarter of a pair is expected to coincide.
    assert len(keys.unique()) >= len(keys) - 3


def test_uniforms_fill_the_line_evenly() -> None:
    numbers = uniforms(keys_of(torch.arange(100_000)))
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    shares = numbers.mul(20).long().bincount(minlength=20) / len(numbers)
    # Five standard deviations of a share of 100,000 draws.
    assert (shares - 0.05).abs().max() < 0.0035


@pytest.mark.parametrize("shape", [(64, 25, 48), (64, 4, 12, 17)])
def test_dropout_drops_its_share_along_every_axis_and_keeps_the_mean(shape: tuple) -> None:
    dropout = KeyedDropout(0.1, site=7)
    dropped = dropout(torch.ones(shape), keys_of(torch.arange(shape[0])))
    is_zero = (dropped == 0).double()
    assert dropped[dropped != 0].unique().tolist() == pytest.approx([1 / 0.9])
    for dim in range(len(shape)):
        others = [d for d in range(len(shape)) if d != dim]
        count = is_zero.numel() // shape[dim]
        deviation = (0.09 / count) ** 0.5
        assert (is_zero.mean(others) - 0.1).abs().max() < 5 * deviation, dim
    assert is_zero.mean().item() == pytest.approx(0.1, abs=5 * (0.09 / is_zero.numel()) ** 0.5)


def test_masks_of_neighboring_rows_places_and_sites_are_unrelated() -> None:
    x, keys = torch.ones(400, 30, 40), keys_of(torch.arange(400))
    kept = KeyedDropout(0.5, site=1).kept(x, keys).double() - 0.5
    other = KeyedDropout(0.5, site=2).kept(x, keys).double() - 0.5
    for pair in (
        kept[1:] * kept[:-1],
        kept[:, 1:] * kept[:, :-1],
        kept[..., 1:] * kept[..., :-1],
        kept * other,
    ):
        # A product of two fair signs of size 1/2 has mean 0 and deviation 1/4.
        assert pair.mean().abs() < 5 * 0.25 / pair.numel() ** 0.5


def test_a_mask_does_not_depend_on_the_padding_or_the_company() -> None:
    dropout, keys = KeyedDropout(0.3, site=3), keys_of(torch.arange(8))
    mask = dropout.kept(torch.ones(8, 2, 20, 33), keys)
    part = dropout.kept(torch.ones(3, 2, 12, 17), keys[4:7])
    assert torch.equal(part, mask[4:7, :, :12, :17])


def test_without_keys_every_call_drops_something_else() -> None:
    dropout, x = KeyedDropout(0.5, site=0), torch.ones(4, 100)
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(dropout.eval()(x), x)
