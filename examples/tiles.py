"""Decode a picture in strips with the GroupNorm statistics of the whole: Moments make the seams vanish.

    pip install '.[torch,plots]'
    python examples/tiles.py --strips 4 --output tiles.png

A picture that is too large for the memory is decoded in tiles. Convolutions allow that: a tile needs a few rows of its
neighbours and nothing more. GroupNorm does not: its mean and variance are those of the whole picture, and tiles that
take their own do not fit together. `moments` of each tile, `merge_moments` and `normalize` give every tile the
statistics of the whole, and gradients flow through them.

The decoder here has random weights and a last layer that is fitted to a photograph. It decodes the same latent whole,
in strips with their own statistics, and in strips with merged ones. The program prints how far the strips are from the
whole, draws it, and fails unless merged statistics give the whole picture and its gradient up to rounding.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import groupnorm.torch as gnt
from groupnorm.analysis.features import photograph
from groupnorm.errors import FileError, GroupNormError, OptionError

F = torch.nn.functional

CHANNELS = (64, 64, 48)  # of the latent, and after each block
GROUPS = 8
STRIDE = 4  # pixels of the picture for each row of the latent: a factor of 2 for each block

# Two float32 results differ by up to two roundings, and convolutions of another height may be computed by another
# algorithm, which rounds differently. One rounding is how far the whole in float32 is from the whole in float64.
ALLOWED_ROUNDINGS = 8


# ---- the decoder: each of its stages takes a list of strips, from top to bottom, and returns one ---------------------


class Decoder(torch.nn.Module):
    """Blocks of upsampling, 3x3 convolution, GroupNorm and SiLU, with seeded random weights; then a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3) for a, b in pairwise(CHANNELS))
        self.norms = torch.nn.ModuleList(gnt.GroupNorm(GROUPS, c, activation="silu") for c in CHANNELS[1:])
        self.head = torch.nn.Conv2d(CHANNELS[-1], 3, 1)
        for norm in self.norms:
            torch.nn.init.uniform_(norm.weight, 0.1, 0.4)
            torch.nn.init.normal_(norm.bias, 0.0, 0.1)
        self.requires_grad_(False)

    def forward(self, latent, strips, normalize):
        """The picture, (1, 3, H, W), from a latent cut into so many strips; `normalize` is one of those below."""
        features = self.features(latent.tensor_split(strips, dim=2), normalize)
        return torch.cat([self.head(strip) for strip in features], dim=2)

    def features(self, strips, normalize):
        """What the head is given."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            strips = convolve([F.interpolate(strip, scale_factor=2) for strip in strips], conv)
            strips = normalize(strips, norm)
        return strips


def convolve(strips, conv):
    """A 3x3 convolution: each strip borrows one row from either neighbour; around the picture there are zeros."""
    border = torch.zeros_like(strips[0][:, :, :1])
    above = [border] + [strip[:, :, -1:] for strip in strips[:-1]]
    below = [strip[:, :, :1] for strip in strips[1:]] + [border]
    taller = [torch.cat(rows, dim=2) for rows in zip(above, strips, below, strict=True)]
    return [F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1)) for strip in taller]


def own_statistics(strips, norm):
    """GroupNorm of each strip for itself: right only if there is one strip."""
    return [norm(strip) for strip in strips]


def merged_statistics(strips, norm):
    """GroupNorm of each strip with the statistics of all: what GroupNorm of the whole gives."""
    m = gnt.merge_moments(gnt.moments(strip, norm.num_groups) for strip in strips)
    return [gnt.normalize(strip, m, norm.weight, norm.bias, norm.eps, activation=norm.activation) for strip in strips]


# ---- the photograph: the latent comes from it, and the head is fitted to it ------------------------------------------


def encode(photo):
    """The latent of a photograph (1, 3, H, W): its averages over STRIDE x STRIDE pixels, and random filters of them."""
    filters = torch.randn(CHANNELS[0] - 3, 3, STRIDE, STRIDE, generator=torch.Generator().manual_seed(0))
    return torch.cat((F.avg_pool2d(photo, STRIDE), F.conv2d(photo, filters / STRIDE, stride=STRIDE)), dim=1)


def fit_head(decoder, latent, photo):
    """Choose the head with which the picture, decoded whole, is nearest to the photograph: linear least squares."""
    (features,) = decoder.features([latent], own_statistics)
    columns = F.pad(features[0].flatten(1).double().T, (0, 1), value=1.0)  # the last is for the bias
    solution = torch.linalg.lstsq(columns, photo[0].flatten(1).double().T, driver="gels").solution
    decoder.head.weight.copy_(solution[:-1].T[..., None, None])
    decoder.head.bias.copy_(solution[-1])


# ---- the comparison --------------------------------------------------------------------------------------------------


def decode(decoder, latent, photo, strips, normalize):
    """The picture, and the gradient of its squared distance to the photograph with respect to the latent."""
    latent = latent.clone().requires_grad_()
    picture = decoder(latent, strips, normalize)
    (gradient,) = torch.autograd.grad(F.mse_loss(picture, photo), latent)
    return picture.detach(), gradient


def row_jumps(picture):
    """Mean difference of each row to the row above it; 0 for the first row."""
    return F.pad(picture.diff(dim=2).abs().mean((0, 1, 3)), (1, 0))


def run(output, strips):
    """Decode, print the table, check, draw. Raises GroupNormError or OSError for what cannot be done."""
    if output.suffix != ".png" or not output.absolute().parent.is_dir():
        raise FileError(f"--output must be a .png in a folder that exists: got {output}")
    photo = torch.from_numpy(photograph()).permute(2, 0, 1)[None]
    decoder, latent = Decoder(), encode(photo)
    if not 2 <= strips <= latent.shape[2]:
        raise OptionError(f"--strips must be between 2 and {latent.shape[2]}, the latent's rows: got {strips}")
    fit_head(decoder, latent, photo)
    results = {
        "whole": decode(decoder, latent, photo, 1, own_statistics),
        "own statistics": decode(decoder, latent, photo, strips, own_statistics),
        "merged statistics": decode(decoder, latent, photo, strips, merged_statistics),
        "whole in float64": decode(decoder.double(), latent.double(), photo.double(), 1, own_statistics),
    }
    heights = [STRIDE * strip.shape[2] for strip in latent.tensor_split(strips, dim=2)]
    seams = np.cumsum(heights)[:-1]
    print(f"A picture of {sum(heights)} rows in {strips} strips, float32. Differences to the whole:")
    print(f"{'':20}{'largest':>10}{'mean':>10}{'gradient':>10}{'jump at seams':>16}")
    whole, whole_gradient = results["whole"]
    errors = {}
    for name, (picture, gradient) in results.items():
        difference, relative = (picture - whole).abs(), (gradient - whole_gradient).norm() / whole_gradient.norm()
        errors[name] = torch.stack((difference.max(), relative)).double()
        numbers = f"{difference.max():10.1e}{difference.mean():10.1e}{relative:10.1e}"
        print(f"{name:20}{numbers}{row_jumps(picture)[seams].mean():16.4f}")
    allowed = ALLOWED_ROUNDINGS * errors["whole in float64"]
    print("Allowed for merged statistics: picture {:.1e}, gradient {:.1e}".format(*allowed))
    if not (errors["merged statistics"] <= allowed).all():
        raise SystemExit("tiles.py: strips with merged statistics are not the whole")
    draw(output, *(picture for picture, _ in list(results.values())[:3]), seams)
    print(f"wrote {output}")


def draw(path, whole, own, merged, seams):
    """Write the pictures, the jumps between their rows, and the differences of the strips to the whole, as a PNG."""
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # which matplotlib brings

    with rc_context({"font.family": "DejaVu Sans", "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(12.4, 9.6), dpi=80, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(
            f"One picture, decoded whole and in {len(seams) + 1} strips (ticks mark the seams)", fontsize=15
        )
        upper, lower = figure.subplots(2, 3)
        titles = ("whole", "strips, each with its own statistics", "strips with merged statistics")
        for axes, picture, title in zip(upper, (whole, own, merged), titles, strict=True):
            axes.imshow(picture[0].permute(1, 2, 0).clamp(0, 1))
            axes.set_title(title)
        for axes, picture in zip(lower[1:], (own, merged), strict=True):
            difference = (picture - whole)[0].mean(0)
            limit = float(f"{difference.abs().quantile(0.99):.0e}")
            image = axes.imshow(difference, cmap=colormaps["RdBu_r"].resampled(17), vmin=-limit, vmax=limit)
            axes.set_title(f"difference to the whole, mean of RGB;\nthe colours end at ±{limit:g}")
            figure.colorbar(image, ax=axes, location="bottom", extend="both", shrink=0.9)
        for axes in (*upper, *lower[1:]):
            axes.set_xticks([])
            axes.set_yticks(seams, [""] * len(seams))
            axes.tick_params(axis="y", length=8, width=2, right=True)
        lines = (
            (whole, "whole", "#c4ccd4", 4),
            (own, "own statistics", "#d97706", 1),
            (merged, "merged", "#1f6feb", 1),
        )
        for picture, label, colour, width in lines:
            lower[0].plot(row_jumps(picture), range(picture.shape[2]), label=label, color=colour, linewidth=width)
        lower[0].set(ylabel="row", xlim=(0, None), ylim=(whole.shape[2], 0))
        lower[0].set_title("mean difference of each row\nto the row above it")
        lower[0].legend()
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize().save(path)  # 256 colours: a small file


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        """Print the message, exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tiles.png"), help="where the picture goes (%(default)s)")
    parser.add_argument("--strips", type=int, default=4, help="horizontal strips, at least 2 (%(default)s)")
    arguments = parser.parse_args()
    try:
        run(arguments.output, arguments.strips)
    except (GroupNormError, OSError) as error:
        parser.error(str(error))
