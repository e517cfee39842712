"""groupnorm.torch.GroupNorm and Moments of tensors."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import groupnorm as gn  # noqa: E402
import groupnorm.torch as gnt  # noqa: E402

F = torch.nn.functional
nn = torch.nn


# ---- the module ------------------------------------------------------------------------------------------------------


def test_state_travels_in_both_directions():
    ours, theirs = gnt.GroupNorm(4, 16, activation="silu"), nn.GroupNorm(4, 16)
    assert isinstance(ours, nn.GroupNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(ours(x), F.silu(theirs(x)))
    theirs.load_state_dict(ours.state_dict())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(same(x), ours(x))


def test_kinds_of_module():
    assert gnt.GroupNorm(4, 16, affine=False).weight is None
    without_bias = gnt.GroupNorm(4, 16, bias=False)
    assert without_bias.weight is not None
    assert without_bias.bias is None
    without_bias.reset_parameters()
    assert gnt.GroupNorm(4, 16, device="meta").weight.is_meta
    empty = nn.utils.skip_init(gnt.GroupNorm, 4, 16)
    empty.reset_parameters()
    assert torch.equal(empty.weight, torch.ones(16))
    assert torch.equal(empty.bias, torch.zeros(16))
    shown = repr(gnt.GroupNorm(4, 16, activation="silu", inplace=True, bias=False))
    assert all(part in shown for part in ("4, 16", "activation='silu'", "inplace=True", "bias=False"))
    for bad in ({"num_groups": 3}, {"num_groups": 0}, {"activation": "nope"}, {"eps": -1}):
        with pytest.raises(gn.GroupNormError):
            gnt.GroupNorm(**{"num_groups": 4, "num_channels": 16} | bad)


def test_in_place_only_without_gradient():
    norm, x = gnt.GroupNorm(4, 16, inplace=True), torch.randn(2, 16, 5, 5)
    want = F.group_norm(x, 4)
    y = norm(x)
    assert y.data_ptr() != x.data_ptr()
    with torch.no_grad():
        y = norm(x)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, want)


def test_running_statistics_are_those_of_instance_norm():
    """With a group for each channel the two are one thing."""
    x = [torch.randn(4, 6, 5, 5) * 2 + 1 for _ in range(3)]
    ours = gnt.GroupNorm(6, 6, track_running_stats=True, affine=False)
    theirs = nn.InstanceNorm2d(6, track_running_stats=True)
    for batch in x:
        torch.testing.assert_close(ours(batch), theirs(batch))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 3
    torch.testing.assert_close(ours.eval()(x[0]), theirs.eval()(x[0]))
    ours.reset_parameters()
    assert torch.equal(ours.running_var, torch.ones(6))
    assert ours.num_batches_tracked == 0


def test_running_statistics_learn_nothing_from_an_empty_batch():
    norm = gnt.GroupNorm(2, 4, track_running_stats=True)
    assert norm(torch.empty(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert torch.equal(norm.running_mean, torch.zeros(2))
    assert norm.num_batches_tracked == 0


# ---- Moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles_give_what_the_whole_gives(dtype, gradient):
    x = torch.randn(2, 12, 20, 7, dtype=torch.float64).to(dtype).requires_grad_(gradient)
    weight, bias = torch.randn(12), torch.randn(12)
    tiles = x.split(6, 2)
    m = gnt.merge_moments(gnt.moments(tile, 3) for tile in tiles)
    assert m.mean.dtype == torch.float64
    assert torch.all(m.count == 4 * 140)
    y = torch.cat([gnt.normalize(tile, m, weight, bias, activation="silu") for tile in tiles], 2)
    want = gnt.group_norm(x, 3, weight, bias, activation="silu")
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    if gradient:
        dy = torch.randn(want.shape).to(dtype)
        (found,), (right,) = (torch.autograd.grad(result, x, dy) for result in (y, want))
        torch.testing.assert_close(found, right, rtol=2 * tolerance, atol=2 * tolerance)


def test_moments_with_a_mask():
    x, mask = torch.randn(3, 6, 5, 4), torch.rand(3, 5, 4) < 0.5
    mask[1] = False
    plain, followed = gnt.moments(x, 2, mask=mask), gnt.moments(x.requires_grad_(), 2, mask=mask)
    for a, b in ((plain.count, followed.count), (plain.mean, followed.mean), (plain.var, followed.var)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert torch.all(plain.count[1] == 0)
    assert torch.all((plain + plain).count == 2 * plain.count)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 3)], ids=str)
def test_moments_of_little_and_of_other_types(shape, gradient):
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_(gradient)
    m = gnt.moments(x, 2, mask=torch.ones(shape[0], *shape[2:], dtype=torch.bool))
    y = gnt.normalize(x, gnt.Moments(m.count.float(), m.mean.float(), m.m2.float()), activation="silu")
    assert not x.numel() or y.stride() == x.stride()
    torch.testing.assert_close(y, F.silu(gnt.group_norm(x.detach(), 2)))


def test_bad_moments():
    m = gnt.moments(torch.randn(2, 6, 4), 3)
    with pytest.raises(gn.ShapeError, match="different shapes"):
        m + gnt.moments(torch.randn(3, 6, 4), 3)
    with pytest.raises(gn.ShapeError, match="one row for each sample"):
        gnt.normalize(torch.randn(3, 6, 4), m)
    with pytest.raises(gn.DtypeError, match="count must be on x's device"):
        gnt.normalize(torch.randn(2, 6, 4), gnt.Moments(*(t.to("meta") for t in (m.count, m.mean, m.m2))))
    with pytest.raises(gn.GroupNormError, match="at least one"):
        gnt.merge_moments([])
    with pytest.raises(gn.GroupNormError, match="takes Moments"):
        gnt.merge_moments([1.0])
