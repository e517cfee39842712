"""What a style is: statistics against plain NumPy, merges against the whole, transfers against the specification."""

import ml_dtypes
import numpy as np
import pytest

import groupnorm as gn
from groupnorm.analysis.style import Style, merge_styles, style, transfer
from groupnorm.analysis.style_distance import distance, kept, kept_by_batch_norm

SIZES = [((2, 6, 5, 7), 3), ((1, 6, 33), 1), ((3, 4, 2, 3, 4), 4), ((2, 5, 1), 5)]


def maps(shape, *, shift=0.0, dtype=np.float64, seed=0):
    """Channels of different means and spreads that depend on each other."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape)
    x = x + 0.5 * np.roll(x, 1, 1)
    each = (1, shape[1], *(1,) * (len(shape) - 2))
    spread = np.geomspace(0.5, 4, shape[1]).reshape(each)
    return ((x + random.standard_normal(each) + shift) * spread).astype(dtype)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "groups"), SIZES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_statistics_are_those_of_plain_numpy(shape, groups, layout, shift, dtype):
    x = maps(shape, shift=shift, dtype=dtype)
    given = x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    got = style(given, groups, layout=layout)
    rows = x.astype(np.float64).reshape(*shape[:2], -1)
    np.testing.assert_allclose(got.mean, rows.mean(2), rtol=1e-12)
    centred = rows - rows.mean(2, keepdims=True)
    want = centred @ centred.swapaxes(1, 2) / rows.shape[2]
    np.testing.assert_allclose(got.gram, want, rtol=1e-9, atol=1e-12 * (1 + np.abs(rows).max()))
    np.testing.assert_allclose(got.var, rows.var(2), rtol=1e-9, atol=1e-12 * (1 + np.abs(rows).max()))
    m = gn.moments(x.astype(np.float64), groups)
    np.testing.assert_allclose(got.group_mean, m.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.group_var, m.var, rtol=1e-9)
    assert got.count.tolist() == [rows.shape[2]] * shape[0]


def test_correlation_is_numpys():
    x = maps((1, 5, 200))
    np.testing.assert_allclose(style(x).correlation[0], np.corrcoef(x[0]), rtol=1e-10)


def test_long_samples_are_done_in_pieces(monkeypatch):
    monkeypatch.setattr("groupnorm.analysis.style._PIECE", 7)
    x = maps((2, 4, 50), shift=1000, dtype=np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(style(x).var, wide.var(2), rtol=1e-9)
    np.testing.assert_allclose(style(x).mean, wide.mean(2), rtol=1e-13)


def test_a_rough_first_mean_is_made_up_for(monkeypatch):
    def rough(x, groups, *, layout):
        m = gn.moments(x, groups, layout=layout)
        return gn.Moments(m.count, m.mean + 0.1, m.m2)

    monkeypatch.setattr("groupnorm.analysis.style.moments", rough)
    x = maps((2, 4, 50))
    np.testing.assert_allclose(style(x).mean, x.mean(2), rtol=1e-11)
    np.testing.assert_allclose(style(x).var, x.var(2), rtol=1e-11)


@pytest.mark.parametrize("shift", [0, 1000])
def test_styles_of_tiles_merge_to_that_of_the_whole(shift):
    x = maps((2, 6, 9, 11), shift=shift)
    whole = style(x, 3)
    tiles = [x[:, :, rows, columns] for rows in (slice(0, 2), slice(2, 9)) for columns in (slice(0, 10), slice(10, 11))]
    tiles.append(x[:, :, :0])  # an empty one adds nothing
    for pieces in (tiles, tiles[::-1]):
        got = merge_styles(style(tile, 3) for tile in pieces)
        np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(got.comoment, whole.comoment, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(got.group_var, whole.group_var, rtol=1e-11)
        assert (got.count == whole.count).all()
        assert got.num_groups == 3


def test_a_constant_channel_has_no_variance_and_no_correlation():
    x = maps((1, 3, 40), dtype=np.float32)
    x[0, 1] = 0.1
    got = style(x)
    assert got.var[0, 1] == 0
    assert (got.correlation[0, 1] == 0).all()


def test_infinity_stays_in_its_channel():
    x = maps((1, 3, 40))
    x[0, 1, 3] = np.inf
    got = style(x)
    np.testing.assert_allclose(got.var[0, [0, 2]], x[0, [0, 2]].var(1))
    assert not np.isfinite(got.mean[0, 1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: style(maps((2, 6, 5)), 4), "try 3 or 6"),
        (lambda: style(np.ones((2, 6, 5), int)), "int64"),
        (lambda: style(np.ones(3)), "batch and a channel"),
        (lambda: style(np.ones((2, 3, 4)), layout="CHW"), "CHW"),
        (lambda: style(maps((2, 6, 5))) + style(maps((2, 4, 5))), "cannot be merged"),
        (lambda: style(maps((2, 6, 5)), 2) + style(maps((2, 6, 5)), 3), "same N, C and num_groups"),
        (lambda: merge_styles([]), "empty list"),
        (lambda: merge_styles([1.0]), "float"),
        (lambda: Style(np.ones(2), np.ones((2, 3)), np.ones((2, 3, 4)), 1), "(N, C, C)"),
        (lambda: transfer(maps((2, 6, 5)), style(maps((1, 4, 5)))), "4"),
        (lambda: transfer(maps((2, 6, 5)), style(maps((3, 6, 5)))), "1 or 2 samples"),
        (lambda: transfer(maps((2, 6, 5)), style(maps((1, 6, 5))), 5), "try 3 or 6"),
        (lambda: transfer(maps((2, 6, 5)), style(maps((1, 6, 5))), strength=1.5), "between 0"),
        (lambda: transfer(maps((2, 6, 5)), style(maps((1, 6, 5))), eps=-1), "eps"),
        (lambda: transfer(maps((2, 6, 5)), maps((2, 6, 5))), "must be a Style"),
        (lambda: distance(style(maps((1, 6, 5))), style(maps((1, 4, 5)))), "same N and C"),
        (lambda: distance(style(maps((1, 6, 5))), 3), "two styles"),
        (lambda: kept(style(maps((1, 6, 5))), style(maps((1, 6, 5))), 4), "try 3 or 6"),
    ],
)
def test_wrong_arguments_are_told(call, said):
    with pytest.raises(gn.GroupNormError) as raised:
        call()
    assert said in str(raised.value)


def test_adding_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        style(maps((1, 6, 5))) + 1


# ---- transfer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shift", [0, 1000])
def test_after_adain_channels_have_the_statistics_of_the_style(layout, shift):
    x, other = maps((2, 6, 9, 11), shift=shift), maps((1, 6, 4, 30), seed=1)
    target = style(other)
    given = x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y = transfer(given, target, eps=0, layout=layout)
    got = style(y, layout=layout)
    np.testing.assert_allclose(got.mean, np.repeat(target.mean, 2, 0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.var, np.repeat(target.var, 2, 0), rtol=1e-9)
    np.testing.assert_allclose(got.correlation, style(x).correlation, atol=1e-8)  # what AdaIN does not touch


def test_eps_shrinks_the_variance_by_what_it_should():
    x, target = maps((1, 6, 99)), style(maps((1, 6, 30), seed=1))
    got, v = style(transfer(x, target, eps=0.3)), style(x).var
    np.testing.assert_allclose(got.var, (target.var + 0.3) * v / (v + 0.3), rtol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_get_the_mean_and_variance_of_the_styles_groups(groups):
    x, other = maps((2, 6, 9, 11)), maps((2, 6, 4, 30), seed=1)  # a style for each sample
    y = transfer(x, style(other), groups, eps=0)
    got, want = gn.moments(y, groups), gn.moments(other, groups)
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-10)
    std, mean = (np.repeat(a, 6 // groups, 1) for a in (np.sqrt(want.var), want.mean))
    plain, *_ = gn.reference.group_norm(x, groups, eps=0)
    np.testing.assert_allclose(y, plain * std[..., None, None] + mean[..., None, None], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "unit"), [(np.float64, 2**-53), (np.float32, 2**-24), (np.float16, 2**-11)])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_with_its_own_style_the_content_comes_back(dtype, unit, groups):
    x = maps((2, 6, 9, 11), dtype=dtype)
    y = transfer(x, style(x), groups)
    assert y.dtype == x.dtype
    wide = x.astype(np.float64)
    largest = np.abs(wide).max((1, 2, 3), keepdims=True)
    assert (np.abs(y - wide) <= 24 * unit * largest).all()


def test_strength_mixes_the_features():
    x, target = maps((1, 6, 99)), style(maps((1, 6, 30), seed=1))
    full = transfer(x, target, 3)
    np.testing.assert_array_equal(transfer(x, target, 3, strength=0), x)
    np.testing.assert_allclose(transfer(x, target, 3, strength=0.25), 0.75 * x + 0.25 * full, rtol=1e-12)


def test_a_small_spread_is_not_rounded_away():
    x = maps((1, 4, 99), dtype=np.float32)
    target = style(1e-5 * maps((1, 4, 99), seed=1) + 3e-6)
    got = style(transfer(x, target, eps=0))
    np.testing.assert_allclose(got.var, target.var, rtol=1e-5)


# ---- distances -------------------------------------------------------------------------------------------------------


def test_distance_of_written_out_styles():
    a = Style(np.array([4.0]), np.array([[1.0, 0.0]]), 4 * np.array([[[1.0, 0.5], [0.5, 4.0]]]), 2)
    b = Style(np.array([9.0]), np.array([[3.0, 0.0]]), 9 * np.array([[[3.0, 0.0], [0.0, 4.0]]]), 2)
    got = distance(a, b)  # p = (2, 4)
    assert got.mean == pytest.approx(np.sqrt((4 / 2 + 0) / 2))
    assert got.variance == pytest.approx(np.sqrt((1**2 + 0) / 2))
    assert got.gram == pytest.approx(np.sqrt((1 + 0 + 2 * 0.25 / 8) / 4))
    assert got.correlation == pytest.approx(np.sqrt(2 * 0.25**2 / 4))
    # raw second moments: a [[2, .5], [.5, 4]], b [[12, 0], [0, 4]]
    assert got.gram_loss == pytest.approx((100 + 2 * 0.25) / 16)
    assert got.mean_std_loss == pytest.approx(2 + np.sqrt(3) - 1)


def test_gram_loss_is_that_of_gatys():
    a, b = maps((1, 6, 50)), maps((1, 6, 50), seed=1)
    raw = [f[0] @ f[0].T for f in (a, b)]
    want = ((raw[0] - raw[1]) ** 2).sum() / (4 * 6**2 * 50**2)  # N_l = 6 maps of M_l = 50 positions
    assert distance(style(a), style(b)).gram_loss == pytest.approx(want, rel=1e-10)


def test_distance_is_symmetric_zero_to_itself_and_free_of_units():
    a, b = maps((2, 6, 50)), maps((2, 6, 70), seed=1)
    d = distance(style(a), style(b))
    back = distance(style(b), style(a))
    units = np.geomspace(1e-3, 1e3, 6)[:, None]
    other = distance(style(a * units + 5 * units), style(b * units + 5 * units))
    for name in ("mean", "variance", "gram", "correlation"):
        assert getattr(d, name) > 0.01
        assert getattr(back, name) == pytest.approx(getattr(d, name), rel=1e-12)
        assert getattr(other, name) == pytest.approx(getattr(d, name), rel=1e-8)
        assert getattr(distance(style(a), style(a)), name) == 0


def test_constant_channels_have_a_distance():
    a, b = np.zeros((1, 2, 9)), np.zeros((1, 2, 9))
    assert distance(style(a), style(b)).mean == 0
    b[0, 1] = 1
    assert distance(style(a), style(b)).mean == np.inf
    assert distance(style(a), style(b)).variance == 0


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_what_a_group_norm_keeps_is_what_its_output_has(groups):
    a, b = maps((2, 6, 60), shift=1), maps((2, 6, 90), seed=1)
    got = kept(style(a), style(b), groups)
    before = distance(style(a), style(b))
    after = distance(*(style(gn.group_norm(x, groups)) for x in (a, b)))
    for name in ("mean", "variance", "gram", "correlation"):
        assert getattr(got, name) == pytest.approx(getattr(after, name) / getattr(before, name), rel=1e-8, abs=1e-8)
    assert got.correlation == pytest.approx(1, rel=1e-10)  # no norm touches it
    if groups == 6:  # instance norm takes all that is a channel's own
        assert got.mean < 1e-12
        assert got.variance < 1e-4
    else:
        assert got.variance > 0.1


def test_batch_norm_keeps_everything():
    a, b = maps((2, 6, 60), shift=1), maps((2, 6, 60), seed=1)
    got = kept_by_batch_norm(style(a), style(b))
    batch = np.concatenate([a, b])
    rows = np.moveaxis(batch, 1, 0).reshape(1, 6, -1)
    y = np.moveaxis(gn.group_norm(rows, 6).reshape(6, 4, 60), 0, 1)
    after, before = distance(style(y[:2]), style(y[2:])), distance(style(a), style(b))
    for name in ("mean", "variance", "gram", "correlation"):
        assert getattr(got, name) == pytest.approx(1, rel=1e-10)
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-8)


def test_nothing_is_kept_of_no_difference():
    a = style(maps((1, 6, 60)))
    assert np.isnan(kept(a, a, 3).mean)


def test_no_samples_and_wrong_arguments():
    features = np.random.default_rng(0).standard_normal((2, 6, 5), np.float32)
    for layout, empty in (("NCHW", features[:0]), ("NHWC", features[:0].transpose(0, 2, 1))):
        assert style(empty, layout=layout).mean.shape == (0, 6)
    for strength in (None, "a", 2):
        with pytest.raises(gn.OptionError, match="strength"):
            transfer(features, style(features), strength=strength)
    for pieces in (None, 5):
        with pytest.raises(gn.GroupNormError, match="merge_styles"):
            merge_styles(pieces)
    with pytest.raises(gn.DtypeError, match="numbers"):
        Style("a", "b", "c", 1)


def test_no_samples_have_nothing_to_keep():
    none = style(np.zeros((0, 4, 5), np.float32), 2)
    assert np.isnan(kept_by_batch_norm(none, none).mean)
    assert np.isnan(kept(none, none, 2).mean)
