"""Group norm beside instance, layer and batch norm: each identity against plain NumPy and against PyTorch; the noise of
batch statistics against its law and against brute force; and the command.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import groupnorm as gn
from groupnorm.analysis import compare, features
from groupnorm.analysis.batch_noise import PUBLISHED, PUBLISHED_NORMS, batch_noise, group_dependence
from groupnorm.cli import app, main

SHAPES = [((5, 12, 7, 9), 4), ((2, 6, 33), 6), ((1, 8, 3, 4, 5), 1), ((3, 5, 2), 5)]


def draw(shape, *, shift=0.0, dtype=np.float32):
    x = np.random.default_rng(0).standard_normal(shape) * np.geomspace(0.2, 5, shape[1]).reshape(
        1, -1, *[1] * (len(shape) - 2)
    )
    return (x + shift).astype(dtype)


def affine(channels):
    random = np.random.default_rng(1)
    return random.standard_normal(channels).astype(np.float32), random.standard_normal(channels).astype(np.float32)


def plain(x, axes, eps=1e-5):
    wide = x.astype(np.float64)
    return (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + eps)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shift", [0, 1000])
def test_every_identity_holds(shape, groups, dtype, shift):
    found = compare.identities(draw(shape, dtype=dtype, shift=shift), groups, *affine(shape[1]))
    assert len(found) == 7
    for identity in found:
        assert identity.holds, identity
        assert identity.largest > 0 or np.prod(shape[2:]) < 3  # the sides are computed in different ways


def test_an_operator_that_is_slightly_wrong_breaks_every_identity(monkeypatch):
    exact = gn.group_norm
    monkeypatch.setattr(compare, "group_norm", lambda *a, **k: exact(*a, **k) * np.float32(1 + 1e-5))
    assert not any(identity.holds for identity in compare.identities(draw((5, 12, 7, 9)), 4, *affine(12)))


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_definitions_are_those_of_plain_numpy(shape, groups):
    """The other side of the identities: PyTorch's words for the axes, without this package."""
    x = draw(shape, dtype=np.float64)
    spatial = tuple(range(2, x.ndim))
    got = compare.batch_norm(x)
    np.testing.assert_allclose(got, plain(x, (0, *spatial)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gn.group_norm(x, shape[1]), plain(x, spatial), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gn.group_norm(x, 1), plain(x, (1, *spatial)), rtol=1e-10, atol=1e-12)
    grouped = plain(x.reshape(shape[0], groups, -1), (2,)).reshape(shape)
    np.testing.assert_allclose(gn.group_norm(x, groups), grouped, rtol=1e-10, atol=1e-12)


def test_differences_from_group_norm():
    x = draw((5, 12, 7, 9), dtype=np.float64)
    found = {kind.name: kind for kind in compare.kinds(x, 4)}
    ours = plain(x.reshape(5, 4, -1), (2,)).reshape(x.shape)
    others = [("instance norm, G = 12", (2, 3), 60, False), ("layer norm, G = 1", (1, 2, 3), 5, False),
              ("batch norm, training", (0, 2, 3), 12, True)]  # fmt: skip
    for name, axes, pairs, batch in others:
        kind = found[name]
        assert kind.difference == pytest.approx(np.sqrt(np.mean((plain(x, axes) - ours) ** 2)), rel=1e-8)
        assert (kind.statistics, kind.uses_batch) == (pairs, batch)
    assert found["group norm, G = 4"].difference == 0
    assert found["group norm, G = 4"].statistics == 20


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pytorchs_layers_give_the_same(shape, groups, dtype):
    pytest.importorskip("torch")
    found = compare.beside_torch(draw(shape, dtype=dtype), groups, *affine(shape[1]))
    assert [row.other for row in found] == [
        "torch: group_norm", "torch: instance_norm", "torch: layer_norm", "torch: batch_norm, training"
    ]  # fmt: skip
    for row in found:
        assert row.largest < (2e-5 if dtype == np.float32 else 1e-13)
        assert row.fraction is None
        assert row.holds


def test_batch_norm_has_weight_and_bias_by_channel():
    x, (weight, bias) = draw((5, 4, 7, 3), dtype=np.float64), affine(4)
    want = plain(x, (0, 2, 3)) * weight[:, None, None] + bias[:, None, None]
    np.testing.assert_allclose(compare.batch_norm(x, weight, bias), want, rtol=1e-6, atol=1e-6)


def test_zero_weights_and_biases_break_nothing():
    zeros = np.zeros(8, np.float32)
    found = compare.identities(np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32), 4, zeros, zeros)
    assert all(row.holds for row in found)


def test_nearest_groups():
    assert compare.nearest_groups(64) == 32
    assert compare.nearest_groups(48) == 24  # 48 is farther
    assert compare.nearest_groups(7) == 7
    assert compare.nearest_groups(37) == 37
    assert compare.nearest_groups(48, 7) == 6  # 6 and 8 are as near
    assert compare.nearest_groups(1) == 1


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.ones((2, 3, 4), int), "int64"),
        (np.ones((2, 3)), "(N, C, *positions)"),
        (np.ones((2, 3, 1)), "two positions"),
        (np.ones((0, 3, 4)), "(0, 3, 4)"),
        (np.full((2, 3, 4), np.nan), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, said):
    with pytest.raises(gn.GroupNormError) as raised:
        compare.check_features(x)
    assert said in str(raised.value)


def test_wrong_groups_are_refused():
    with pytest.raises(gn.ShapeError, match="try 4 or 6"):
        compare.identities(draw((2, 12, 5)), 5, *affine(12))


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_batches_put_together():
    """The same draws by brute force: batches are made, and normalised by their own and by all samples' statistics."""
    x = draw((9, 3, 4, 5), dtype=np.float64)
    x += np.random.default_rng(2).standard_normal((9, 3, 1, 1))
    (got,) = batch_noise(x, (4,), draws=200, seed=3)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    off_mean, off_var, off_y = [], [], []
    for batch in np.random.default_rng(3).integers(0, 9, (200, 4)):
        there = x[batch]
        m, v = there.mean((0, 2, 3)), there.var((0, 2, 3))
        off_mean.append((m - mean) / np.sqrt(var))
        off_var.append(v / var - 1)
        own = (there[0] - m[:, None, None]) / np.sqrt(v + 1e-5 * var)[:, None, None]
        off_y.append(own - (there[0] - mean[:, None, None]) / np.sqrt(1.00001 * var)[:, None, None])
    for value, brute in ((got.mean, off_mean), (got.var, off_var), (got.output, off_y)):
        assert value == pytest.approx(np.sqrt(np.mean(np.square(brute))), rel=1e-10)


def test_noise_is_the_same_in_small_parts(monkeypatch):
    x = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float32)
    whole = batch_noise(x, draws=100)
    monkeypatch.setattr("groupnorm.analysis.batch_noise._AT_ONCE", 500)
    assert batch_noise(x, draws=100) == whole


def test_noise_falls_with_the_root_of_the_batch():
    x = features.filtered(features.stand_in(256, 256), 32)
    assert x.shape == (64, features.CHANNELS, 32, 32)
    found = batch_noise(x)
    assert [row.size for row in found] == [1, 2, 4, 8, 16, 32]
    for row in found:
        assert row.mean == pytest.approx(row.mean_by_law, rel=0.06)  # 2000 draws of 48 channels
        assert row.mean_by_law == pytest.approx(found[0].mean / np.sqrt(row.size))
    for name in ("mean", "var", "output"):
        values = [getattr(row, name) for row in found]
        assert values == sorted(values, reverse=True)
    assert batch_noise(x, (2, 8))[1].mean_by_law == pytest.approx(batch_noise(x, (2, 8))[0].mean / 2)


def test_noise_of_equal_samples_is_none():
    x = np.repeat(draw((1, 3, 50), dtype=np.float64), 6, 0)
    x[:, 1] = 7  # a constant channel has no noise either
    for row in batch_noise(x, (1, 4)):
        assert max(row.mean, row.var, row.output) < 1e-12


def test_group_statistics_do_not_depend_on_the_batch():
    for shape, groups in SHAPES:
        assert group_dependence(draw(shape), groups) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: batch_noise(draw((1, 3, 5))), "two samples"),
        (lambda: batch_noise(np.ones((4, 3, 5))), "constant"),
        (lambda: batch_noise(draw((4, 3, 5)), (0,)), "at least 1"),
        (lambda: batch_noise(draw((4, 3, 5)), draws=0), "at least 1"),
    ],
)
def test_wrong_arguments_of_noise(call, said):
    with pytest.raises(gn.GroupNormError, match=said):
        call()


def test_published_errors_are_those_of_the_paper():
    assert list(PUBLISHED["batch norm"].values()) == [23.6, 23.7, 24.8, 27.3, 34.7]
    assert list(PUBLISHED["group norm, G = 32"].values()) == [24.1, 24.2, 24.0, 24.2, 24.1]
    assert all(list(errors) == [32, 16, 8, 4, 2] for errors in PUBLISHED.values())
    assert list(PUBLISHED_NORMS.values()) == [23.6, 24.1, 25.3, 28.4]


def test_squares_of_a_picture_are_those_of_its_maps():
    picture = features.stand_in(96, 80)
    squares, corners = features.filtered(picture, 32), features.feature_maps(picture, 32)
    assert squares.shape == (6, features.CHANNELS, 32, 32)  # 3 rows of 2
    np.testing.assert_array_equal(squares[0], corners[0])
    np.testing.assert_array_equal(squares[4][:, :, 16:], corners[2][:, :, 16:])  # the bottom left one


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_with_the_photograph(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "noise.png"
    result = CliRunner().invoke(app, ["compare", "--seconds", "0.01", "--output", str(output)])
    assert result.exit_code == 0, result.output
    for said in (
        "instance norm, G = 48",
        "batch norm in training",
        "groupnorm, G = 24",
        "0.295",
        "34.7",
        "differ by 0",
        "Wu and He",
    ):
        assert said in result.stdout
    assert "BROKEN" not in result.stdout
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["noise.png"]


def test_command_as_json():
    result = CliRunner().invoke(app, ["compare", "--shape", "6,8,5,5", "--groups", "2", "--seconds", "0.001", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["holds"]
    assert found["shape"] == [6, 8, 5, 5]
    assert {"groupnorm, G = 2", "groupnorm, G = 8", "groupnorm, G = 1"} <= set(found["times_s"])
    assert all(time_s > 0 for time_s in found["times_s"].values())
    assert found["published"]["by_batch"]["batch norm"]["2"] == 34.7
    assert found["group_dependence"] == 0
    assert len(found["noise"]) == 6
    assert found["picture"] is None


def test_command_with_a_file(tmp_path):
    np.save(tmp_path / "x.npy", draw((1, 12, 8, 8), dtype=np.float16))  # one sample: no batches, no noise
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "x.npy"), "--seconds", "0.001", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["features"], found["num_groups"], found["noise"]) == ("x.npy", 12, [])


@pytest.mark.parametrize("kind", ["bfloat16", "fortran", "swapped"])
def test_files_that_other_programs_write(tmp_path, kind):
    x = draw((3, 6, 4, 5))
    stored = {"bfloat16": x.astype("bfloat16").view("V2"), "fortran": np.asfortranarray(x), "swapped": x.astype(">f4")}
    np.save(tmp_path / "x.npy", stored[kind])
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "x.npy"), "--seconds", "0.001", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shape"] == [3, 6, 4, 5]


def test_features_that_overflow_are_refused():
    with pytest.raises(gn.GroupNormError, match="ordinary size"):
        compare.check_features(np.full((2, 4, 3), 1e38, np.float32))


def test_command_tells_what_is_broken(monkeypatch):
    exact = gn.group_norm
    monkeypatch.setattr(compare, "group_norm", lambda *a, **k: exact(*a, **k) * np.float32(1 + 1e-5))
    result = CliRunner().invoke(app, ["compare", "--shape", "6,8,5,5", "--seconds", "0.001"])
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.npy"], "gone.npy: cannot be read (No such file"),
        (["."], "expected one of .npy, .npz, .safetensors"),
        (["damaged.npy"], "is not a dictionary; the file is corrupt"),
        (["text.npy"], "text.npy: starts with"),
        (["cut.npy"], "cut.npy: holds 72 bytes of data, expected 384"),
        (["objects.npy"], "objects.npy: holds pickled Python objects"),
        (["integers.npy"], "i8"),
        (["one.npy", "--output", "x.png"], "two or more"),
        (["one.npy", "--shape", "2,3,4"], "not both"),
        (["--shape", "2"], "2x320x64x64"),
        (["--shape", "2,3"], "positions"),
        (["--shape", "99999999,99999999"], "too large"),
        (["--shape", "4,6,5", "--groups", "4"], "must divide the 6 channels: got 4; try 3"),
        (["--shape", "4,6,5", "--groups", "0"], "got 0; try 1"),
        (["--seconds", "0"], "--seconds"),
        (["--shape", "4,6,5", "--output", "/nowhere/x.png"], "/nowhere"),
        (["--shape", "4,6,5", "--output", "x.pdf"], ".png"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", draw((1, 6, 4, 4)))
    Path("damaged.npy").write_bytes(b"\x93NUMPY\x01\x00\x28\x00" + b"{'descr': '<f4', 'shape': (2,".ljust(40))
    np.save("integers.npy", np.ones((2, 6, 4), np.int64))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "one.npy").read_bytes()[:200])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("groupnorm: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before
