"""The promise about y for data on which sums go wrong easily: strided rows, masks, a border far from the rest."""

import numpy as np
import pytest

import groupnorm as gn
from groupnorm import reference

U = 2.0**-24


def worst(x, num_groups, *, layout="NCHW", mask=None):
    """The largest error of y as a fraction of what is promised (docs/numerics.md)."""
    y = gn.group_norm(x, num_groups, layout=layout, mask=mask)
    want, mean, rstd = reference.group_norm(x, num_groups, layout=layout, mask=mask)
    arrays = (x, y, want, np.ones(x.shape) if mask is None else np.broadcast_to(mask[:, None], x.shape))
    if layout == "NHWC":
        arrays = tuple(np.moveaxis(array, -1, 1) for array in arrays)
    x, y, want, real = (array.astype(np.float64).reshape(len(x), num_groups, -1) for array in arrays)
    mean, rstd = mean[:, :, None], rstd[:, :, None]
    allowed = 4 * U * (1 + np.abs(mean) * rstd) * (np.abs((x - mean) * rstd) + 1)
    return (real * np.abs(y - want) / allowed).max()


@pytest.mark.parametrize(("length", "samples"), [(64, 64), (512, 300), (1024, 64), (5000, 20)])
@pytest.mark.parametrize("loc", [0.0, 1.0])
def test_rows_that_lie_across_memory(length, samples, loc):
    """One element of a row at a time: 1024 of them were added up in one float32."""
    x = (np.random.default_rng(0).standard_normal((length, samples)) + loc).astype(np.float32).T
    assert worst(x, 1) < 1
    assert worst(x[:, :, None, None], 1) < 1


@pytest.mark.parametrize("positions", [3, 17, 63, 65, 113, 127, 191, 300])
def test_rows_with_gaps_and_an_outlier(positions):
    x = np.random.default_rng(0).standard_normal((20, 32, positions)).astype(np.float32)
    x[:, 0, -1] = 300
    assert worst(x[:, ::2], 2) < 1


@pytest.mark.parametrize("loc", [0.0, 1.0, 2.0, 3.9, 100.0])
@pytest.mark.parametrize("shape", [(64, 1024), (64, 256, 3), (16, 64, 50), (4, 32, 999)])
def test_masked_rows_far_from_zero(shape, loc):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(shape) + loc).astype(np.float32)
    assert worst(x, 1, mask=np.ones((shape[0], *shape[2:]), bool)) < 1
    mask = generator.random((shape[0], *shape[2:])) < 0.7
    mask[0] = True
    assert worst(x, 1, mask=mask) < 1
    if len(shape) > 2:
        mask[:, : shape[2] // 2] = False  # the first sixteen, too
        assert worst(x, 1, mask=mask) < 1


def test_masked_constants_are_exact():
    x = np.full((3, 8, 50), 1234.567, np.float32)
    mask = np.random.default_rng(0).random((3, 50)) < 0.5
    y = gn.group_norm(x, 2, None, np.arange(8, dtype=np.float32), mask=mask)
    assert np.array_equal(y, np.where(mask[:, None], np.arange(8, dtype=np.float32)[:, None], 0))


@pytest.mark.parametrize("far", [4.0, 6.0, 10.0, 30.0])
@pytest.mark.parametrize("positions", [100, 136, 300, 600])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_border_far_from_the_rest(layout, positions, far):
    x = np.random.default_rng(0).standard_normal((20, positions, 64)).astype(np.float32)
    x[:, :8] += np.float32(far)
    if layout == "NCHW":
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    assert worst(x, 64, layout=layout) < 1


def test_a_given_float64_mean_is_taken_as_it_is():
    """Off by more than its own rounding, though by less than one of float32."""
    generator = np.random.default_rng(0)
    x, dy = generator.standard_normal((2, 4, 50)) + 1e6, generator.standard_normal((2, 4, 50))
    _, mean, rstd = gn.group_norm(x, 2, return_stats=True)
    mean = mean + 0.1
    weight = np.ones(4)
    found = gn.group_norm_backward(dy, x, 2, weight, mean=mean, rstd=rstd)
    want = reference.group_norm_backward(dy, x, 2, weight, mean=mean, rstd=rstd)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-8)
