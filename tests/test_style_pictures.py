"""Pictures in the style of others: subbands that add up, transfers of whole pictures, files, and the command."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import groupnorm as gn
from groupnorm.analysis import features, image_transfer, pictures, subbands
from groupnorm.analysis.style import style
from groupnorm.cli import app, main


def photo(height=64, width=48, *, seed=0):
    return features.stand_in(height, width) if seed == 0 else features.stand_in(height, width)[::-1, ::-1] ** 2


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (37, 53), (64, 150)])
def test_subbands_add_up_to_the_picture(size):
    picture = np.random.default_rng(0).random((*size, 3), np.float32)
    found = subbands.split(picture)
    assert found.shape == (1, subbands.CHANNELS, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(subbands.join(found), picture, atol=2e-6)
    names = subbands.subband_names()
    assert len(set(names)) == len(names) == subbands.CHANNELS


def test_grey_pictures_have_no_colour_at_all():
    """Roundings would be two thirds of every relative distance."""
    grey = np.random.default_rng(0).random((70, 50, 1), np.float32).repeat(3, 2)
    maps = subbands.split(grey)
    assert np.ptp(maps[:, : subbands.CHANNELS // 3]) > 0
    assert np.all(maps[:, subbands.CHANNELS // 3 :] == 0)


def test_a_subband_holds_what_its_name_says():
    columns = np.arange(256)
    picture = np.broadcast_to(0.5 + 0.3 * np.sin(columns * 2 * np.pi * 3 / 16), (256, 256))
    picture = np.repeat(picture[..., None], 3, 2).astype(np.float32)  # upright grey stripes
    var = style(subbands.split(picture)).var[0]
    names = subbands.subband_names()
    assert names[int(var.argmax())] == "luminance, 1/8 to 1/4 cycle, 0°"
    chroma = [not name.startswith("luminance") for name in names]
    assert var[chroma].max() < 1e-12
    mean = style(subbands.split(picture)).mean[0]
    assert [name for name, m in zip(names, mean, strict=True) if abs(m) > 0.01] == ["luminance, below"]


@pytest.mark.parametrize(
    "picture",
    [np.ones((40, 40)), np.ones((40, 40, 4)), np.ones((31, 40, 3)), np.full((40, 40, 3), 200.0),
     np.ones((40, 40, 3), np.uint8), np.full((40, 40, 3), np.nan), np.full((40, 40, 3), -0.1)],
)  # fmt: skip
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(gn.GroupNormError, match="picture must"):
        subbands.split(picture)


def test_join_takes_only_subbands():
    with pytest.raises(gn.ShapeError, match="make them with split"):
        subbands.join(np.ones((1, 3, 8, 8)))


def test_a_picture_in_its_own_style_is_itself():
    picture = photo()
    for groups in (60, 15, 1):
        np.testing.assert_allclose(
            image_transfer.transfer_image(picture, picture, num_groups=groups), picture, atol=1e-4
        )
    np.testing.assert_allclose(image_transfer.transfer_image(picture, photo(seed=1), strength=0), picture, atol=2e-6)


def test_instance_norm_takes_over_more_of_a_style_than_group_norm_and_layer_norm():
    content, other = photo(96, 80), photo(seed=1)
    found = image_transfer.study(content, other)
    by_groups = {r.num_groups: r.to_style.variance for r in found.results}
    assert by_groups[60] < by_groups[15] < by_groups[1]
    assert by_groups[60] < found.apart.variance
    mean = found.results[0].picture.mean((0, 1))
    np.testing.assert_allclose(mean, other.mean((0, 1)), atol=0.02)  # the style's colour
    for r in found.results:
        assert r.picture.shape == content.shape
        assert 0 <= r.picture.min() <= r.picture.max() <= 1
        assert 0 <= r.clipped < 0.5
    assert found.kept[60].variance < 0.25 < found.kept[15].variance  # eps counts: small pictures have no coarse bands
    assert found.kept_by_batch_norm.variance == pytest.approx(1)


def test_a_flat_picture_does_not_blow_up_its_rounding():
    got = image_transfer.transfer_image(np.full((40, 40, 3), 0.3), photo(), num_groups=60)
    assert got.std((0, 1)).max() < 0.01


def test_pictures_of_all_kinds_are_read(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    colours = np.random.default_rng(0).random((40, 50, 4)).astype(np.float32)
    image.imsave(tmp_path / "alpha.png", colours)
    stored = np.round(colours * 255) / 255
    want = stored[..., :3] * stored[..., 3:] + 1 - stored[..., 3:]
    np.testing.assert_allclose(pictures.read_picture(tmp_path / "alpha.png"), want, atol=0.005)
    Image = pytest.importorskip("PIL.Image")
    grey = (np.arange(2000).reshape(40, 50) * 32).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    np.testing.assert_allclose(pictures.read_picture(tmp_path / "deep.png")[..., 1], grey / 65535, atol=1e-4)
    Image.fromarray(np.full((40, 50), 51, np.uint8)).save(tmp_path / "grey.jpg")
    (tmp_path / "grey.jpg").rename(tmp_path / "wrong.png")  # the content counts, not the name
    got = pictures.read_picture(tmp_path / "wrong.png")
    assert got.shape == (40, 50, 3)
    np.testing.assert_allclose(got, 0.2, atol=0.01)


def test_a_large_picture_is_reduced_by_means():
    picture = np.random.default_rng(0).random((50, 101, 3), np.float32)
    got = pictures.reduced(picture, 40)
    assert got.shape == (16, 33, 3)
    np.testing.assert_allclose(got[1, 2], picture[3:6, 6:9].mean((0, 1)), rtol=1e-5)
    assert pictures.reduced(picture, 101) is picture


# ---- the command -----------------------------------------------------------------------------------------------------


def save(path, picture):
    pytest.importorskip("matplotlib.image").imsave(path, picture)
    return str(path)


def test_command_with_shipped_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "picture.png"
    result = CliRunner().invoke(app, ["style", "--output", str(output)])
    assert result.exit_code == 0, result.output
    for said in ("instance norm, G = 60", "group norm, G = 15", "layer norm, G = 1", "batch norm", "keeps"):
        assert said in result.stdout
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_command_with_files_as_json(tmp_path):
    content, other = save(tmp_path / "a.png", photo()), save(tmp_path / "b.png", photo(seed=1))
    output = tmp_path / "c.png"
    options = ["--groups", "3", "--strength", "0.5", "--json", "--output", str(output)]
    result = CliRunner().invoke(app, ["style", content, other, *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["num_groups"] for r in found["results"]] == [60, 3, 1]
    assert found["content"] == {"name": "a.png", "size": [64, 48]}
    assert found["results"][0]["to_style"]["variance"] < found["apart"]["variance"]
    assert found["kept"]["60"]["mean"] < 0.01
    assert output.is_file()


def test_command_with_one_picture_twice(tmp_path):
    path = save(tmp_path / "a.png", photo())
    result = CliRunner().invoke(app, ["style", path, path, "--json", "-o", str(tmp_path / "c.png")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept"]["15"]["mean"] is None


def test_command_with_flat_pictures_is_still_json(tmp_path):
    content, other = (save(tmp_path / f"{v}.png", np.full((40, 40, 3), v)) for v in (0.0, 1.0))
    result = CliRunner().invoke(app, ["style", content, other, "--json", "-o", str(tmp_path / "c.png")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["apart"]["mean_std_loss"] == pytest.approx(np.sqrt(3), rel=1e-3)  # black and white, on the grey axis


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.png", "a.png"], "missing.png: cannot be read (No such file"),
        (["a.png", "text.png"], "text.png: is no picture"),
        (["a.png", "cut.png"], "cut.png: is no picture"),
        (["a.png", "."], "cannot be read"),
        (["a.png", "tiny.png"], "tiny.png must be at least 32"),
        (["a.png"], "only a.png"),
        (["--groups", "7"], "must divide the 60 subbands: got 7"),
        (["--groups", "0"], "got 0"),
        (["--strength", "2"], "between 0"),
        (["--output", "/nowhere/x.png"], "/nowhere"),
        (["--output", "x.jpg"], ".png"),
        (["--output", "."], ".png"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = save(tmp_path / "a.png", photo())
    save(tmp_path / "tiny.png", photo(20, 20))
    (tmp_path / "text.png").write_text("no picture")
    with open(whole, "rb") as file:
        (tmp_path / "cut.png").write_bytes(file.read()[:900])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["style", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("groupnorm: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", photo())
    output = tmp_path / "c.png"
    output.write_bytes(b"old")

    def broken(file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("groupnorm.analysis.style_picture.draw_style", broken)
    with pytest.raises(SystemExit) as exit_:
        main(["style", path, path, "-o", str(output)])
    assert exit_.value.code == 2
    assert output.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "c.png"]


def test_pictures_that_cannot_be_meant_are_refused(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0).random((64, 64, 3))
    fine = image.fromarray((255 * numbers).astype(np.uint8))
    fine.save("fine.png")
    image.new("RGB", (20_000, 3), "red").save("wide.png")
    image.fromarray((1e9 * numbers[..., 0]).astype(np.int32)).save("numbers.tiff")
    image.fromarray(np.full((64, 64), np.nan, np.float32)).save("nan.tiff")
    wider = "wider than a byte"
    cases = [("wide.png", "out.png", "too narrow"), ("numbers.tiff", "out.png", wider), ("nan.tiff", "out.png", wider),
             ("fine.png", "fine.png", "is one of the pictures")]  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    for content, output, said in cases:
        with pytest.raises(SystemExit) as exit_:
            main(["style", content, "fine.png", "--output", output])
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert said in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
