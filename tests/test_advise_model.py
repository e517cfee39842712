"""`advise_model`: which layers it finds in models, the shapes it learns, and what it warns of."""

import dataclasses

import pytest

from stand_in_machine import roofline_of

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from groupnorm.analysis import advisor, model_advice  # noqa: E402
from groupnorm.analysis.model_advice import advise_model  # noqa: E402
from groupnorm.errors import OptionError, ShapeError  # noqa: E402
from groupnorm.torch import convert  # noqa: E402


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    for module in (advisor, model_advice):
        monkeypatch.setattr(module, "roofline", roofline_of({}))
    torch.manual_seed(0)


class Block(nn.Module):
    """The residual block of a ResNet."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), 1e-5

    def forward(self, x):
        return nn.functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight).movedim(-1, 1)


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))

    def forward(self, x):
        return x * self.weight[:, None, None]


def x_of(*shape):
    return torch.randn(shape)


def by_name(advice):
    return {layer.name: layer for layer in advice}


def network():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), Block(64, nn.BatchNorm2d), Block(64, lambda channels: nn.GroupNorm(16, channels))
    )


# ---- finding layers --------------------------------------------------------------------------------------------------


def test_every_norm_is_found_with_its_shape():
    advice = advise_model(network(), x_of(4, 3, 64, 64))
    found = by_name(advice)
    assert list(found) == ["0", "1.norm1", "1.norm2", "2.norm1", "2.norm2"]
    bn, gn = found["1.norm1"], found["2.norm2"]
    assert (bn.kind, bn.channels, bn.shape, bn.groups, bn.advised) == ("BatchNorm2d", 64, (4, 64, 32, 32), None, 32)
    assert (gn.kind, gn.groups, gn.advised, gn.D, gn.M) == ("GroupNorm", 16, 32, 4, 4 * 1024)
    assert (bn.D, bn.M, bn.after) == (2, 2 * 1024, "1.conv1")
    assert found["0"].kind == "Conv2d"
    assert found["0"].shape == (4, 64, 32, 32)
    assert bn.predicted_s == pytest.approx(2 * 8 * 4 * 64 * 1024 / 1e10)


@pytest.mark.parametrize(("norm", "shape", "groups"), [
    (nn.BatchNorm1d(64), (8, 64), None), (nn.BatchNorm3d(16), (2, 16, 4, 4, 4), None),
    (nn.SyncBatchNorm(16), (2, 16, 4, 4), None), (nn.InstanceNorm1d(16), (2, 16, 50), 16),
    (nn.InstanceNorm3d(16), (2, 16, 4, 4, 4), 16), (nn.GroupNorm(4, 16), (2, 16, 50), 4),
    (LayerNorm2d(32), (2, 32, 8, 8), None), (FrozenBatchNorm2d(32), (2, 32, 8, 8), None),
])  # fmt: skip
def test_kinds_of_norms(norm, shape, groups):
    (layer,) = advise_model(norm, x_of(*shape))
    assert (layer.name, layer.kind, layer.shape, layer.groups) == ("(model)", type(norm).__name__, shape, groups)
    assert layer.advised == advisor.advise(shape[1], shape[2:], shape[0]).num_groups


def test_layer_norms_of_transformers_are_left_alone():
    advice = advise_model(nn.Sequential(nn.LayerNorm(32), nn.GroupNorm(8, 32)), x_of(2, 32, 32))
    assert [layer.kind for layer in advice] == ["GroupNorm"]
    assert any("1 torch.nn.LayerNorm" in note for note in advice.notes)


def test_a_convolution_before_a_norm_is_named_by_it_and_one_without_is_listed():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 16, 3), nn.ReLU())
    norm, conv = advise_model(model, x_of(2, 4, 20))
    assert (norm.name, norm.after) == ("1", "0")
    assert (conv.name, conv.kind, conv.channels, conv.shape) == ("2", "ConvTranspose1d", 16, (2, 16, 20))


def test_channels_last_and_16_bits_are_seen():
    asked = []
    real = model_advice.advise

    def watch(*arguments, **options):
        asked.append(options)
        return real(*arguments, **options)

    model_advice.advise, restored = watch, real
    try:
        x = x_of(2, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
        advise_model(nn.GroupNorm(4, 16).bfloat16(), x)
    finally:
        model_advice.advise = restored
    assert [(options["dtype"], options["layout"]) for options in asked] == [("bfloat16", "NHWC")]


def test_a_shared_norm_counts_its_calls():
    norm = nn.GroupNorm(4, 16)
    once = advise_model(norm, x_of(2, 16, 8, 8))[0]
    (twice,) = advise_model(nn.Sequential(norm, nn.ReLU(), norm), x_of(2, 16, 8, 8))
    assert (once.calls, twice.calls) == (1, 2)
    assert twice.predicted_s == 2 * once.predicted_s


def test_a_norm_of_many_sizes_is_priced_by_each():
    """The head of a detector, shared by the levels of a pyramid: the smallest level has the noise."""
    norm = nn.GroupNorm(4, 16)
    sides = (32, 16, 2)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, *levels):
            return [self.norm(level) for level in levels]

    found = advise_model(Head(), tuple(x_of(2, 16, side, side) for side in sides))[0]
    alone = [advise_model(norm, x_of(2, 16, side, side))[0] for side in sides]
    assert (found.calls, found.shape, found.M) == (3, (2, 16, 2, 2), alone[-1].M)
    assert found.bound_s == pytest.approx(sum(one.bound_s for one in alone))
    assert any("elements per group" in warning for warning in found.warnings)


def test_lazy_modules_are_read_after_the_forward():
    model = nn.Sequential(nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d())
    (layer,) = advise_model(model, x_of(2, 3, 10, 10))
    assert (layer.kind, layer.channels, layer.after) == ("BatchNorm2d", 16, "0")
    assert list(advise_model(Block(8, lambda channels: nn.LazyBatchNorm2d()))) == []
    assert [layer.kind for layer in advise_model(nn.Sequential(nn.LazyBatchNorm2d(), nn.GroupNorm(2, 8)))] == [
        "GroupNorm"
    ]


def test_a_sample_without_a_batch_axis():
    (layer,) = advise_model(nn.InstanceNorm2d(16), x_of(16, 8, 8))
    assert layer.shape == (1, 16, 8, 8)


@pytest.mark.parametrize("inputs", [(x_of(2, 8, 5),), {"x": x_of(2, 8, 5)}, x_of(2, 8, 5)])
def test_example_inputs_come_in_three_forms(inputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x):
            return self.norm(input=x)

    assert advise_model(Net(), inputs)[0].shape == (2, 8, 5)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_another_batch_scales_every_layer(batch):
    advice = advise_model(network(), x_of(4, 3, 16, 16), batch=batch)
    assert {layer.shape[0] for layer in advice} == {batch}


def test_layers_that_are_not_reached_have_no_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)

        def forward(self, x):
            return self.used(x)

    advice = advise_model(Net(), x_of(2, 8, 5))
    assert [layer.shape for layer in advice] == [(2, 8, 5), None]
    assert any("not reached" in note and "unused" in note for note in advice.notes)


# ---- the model is left as it was -------------------------------------------------------------------------------------


def test_the_model_is_as_it_was():
    model = network().train()
    model[2].norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    advise_model(nn.Sequential(model, nn.Dropout()), torch.zeros(4, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_model_draws_does_not_move_the_random_numbers():
    class Noisy(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    state = torch.get_rng_state()
    advise_model(Noisy(2, 8), torch.zeros(2, 8, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_also_when_it_raises():
    model = network().train()
    with pytest.raises(OptionError, match="the model raised RuntimeError for the example inputs"):
        advise_model(model, x_of(4, 5, 64, 64))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- without example inputs ------------------------------------------------------------------------------------------


def test_without_inputs_groups_rest_on_the_channels():
    advice = advise_model(network())
    assert [layer.name for layer in advice] == ["1.norm1", "1.norm2", "2.norm1", "2.norm2"]
    assert all(layer.advised == 32 and layer.shape is layer.M is layer.predicted_s is None for layer in advice)
    assert advice.machine is None
    assert advice.notes[0].startswith("no example inputs: no spatial sizes")


def test_without_norms_the_convolutions_are_listed():
    advice = advise_model(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 48, 3)))
    assert [(layer.channels, layer.advised) for layer in advice] == [(64, 32), (48, 8)]
    assert any("no BatchNorm, GroupNorm or InstanceNorm" in note for note in advice.notes)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("channels", [7, 16, 32, 48, 64, 80, 128, 256, 512, 2048])
def test_a_conversion_takes_the_groups_that_are_advised(kind, channels):
    advised = advise_model(kind(channels))[0].advised
    shape = (2, channels) if kind is nn.BatchNorm1d else (2, channels, *[16] * (2 if kind is nn.BatchNorm2d else 3))
    if channels <= 256:
        assert advise_model(kind(channels), x_of(*shape))[0].advised == advised
    model = nn.Sequential(kind(channels))
    convert(model, batch_norm=True)
    assert model[0].num_groups == advised


# ---- what it warns of ------------------------------------------------------------------------------------------------


def warnings_of(model, *shape):
    advice = advise_model(model, x_of(*shape))
    return " | ".join(warning for layer in advice for warning in layer.warnings), " | ".join(advice.notes)


@pytest.mark.parametrize(("model", "shape", "said"), [
    (nn.GroupNorm(16, 16), (2, 16), "every output equals bias"),
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(16, 16)), (2, 16, 8, 8), "every output equals bias"),
    (nn.GroupNorm(8, 16), (2, 16), "+1 and -1"),
    (nn.GroupNorm(16, 16), (2, 16, 8, 8), "one channel per group is InstanceNorm"),
    (nn.GroupNorm(1, 16), (2, 16, 8, 8), "is the LayerNorm"),
    (nn.GroupNorm(1, 256), (2, 256, 8, 8), "G = 1 scores 1.18 points worse than G = 32"),
    (LayerNorm2d(16), (2, 16, 8, 8), "normalizes each position"),
    (nn.Sequential(nn.GroupNorm(4, 16), nn.GroupNorm(4, 16), nn.GroupNorm(4, 16, eps=1e-3)), (2, 16, 8, 8),
     "eps 0.001: most norms here have 1e-05"),
])  # fmt: skip
def test_warnings_of_layers(model, shape, said):
    assert said in warnings_of(model, *shape)[0]


def test_a_good_layer_has_no_warnings():
    assert warnings_of(nn.GroupNorm(32, 256), 2, 256, 8, 8)[0] == ""


@pytest.mark.parametrize(("model", "shape", "said"), [
    (nn.BatchNorm2d(64), (2, 64, 8, 8), "BatchNorm with 2 samples: 34.7 %, GroupNorm 24.1 %"),
    (nn.BatchNorm2d(64), (64, 64, 2, 2), "nothing published for 64"),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 8, 8), "BatchNorm layers behind a convolution: 1"),
    (FrozenBatchNorm2d(8), (2, 8, 8, 8), "keeps nothing for backward"),
    (nn.GroupNorm(4, 16, eps=1e-6), (2, 16, 8, 8), "eps is 1e-06, not PyTorch's 1e-05"),
    (nn.GroupNorm(4, 16), (2, 16, 8, 8), "weight decay cannot be seen"),
    (nn.Sequential(Block(8, nn.BatchNorm2d)), (2, 8, 8, 8), "hint: 0.norm2 may be the last norm of a residual block"),
])  # fmt: skip
def test_notes_on_models(model, shape, said):
    assert said in warnings_of(model, *shape)[1]


def test_no_hint_where_a_convolution_is_what_is_added():
    class PreBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3)
            self.norm2, self.conv2 = nn.GroupNorm(2, 8), nn.Sequential(nn.Conv2d(8, 8, 3))

    assert not any("hint" in note for note in advise_model(PreBlock()).notes)
    projected = Block(8, nn.BatchNorm2d)
    projected.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    assert any("norm2 may be the last" in note for note in advise_model(projected).notes)


def test_no_hint_where_the_last_weight_is_zero():
    block = Block(8, nn.BatchNorm2d)
    nn.init.zeros_(block.norm2.weight)
    assert "hint" not in warnings_of(block, 2, 8, 8, 8)[1]
    assert not any("hint" in note for note in advise_model(Block(8, nn.BatchNorm2d).to("meta")).notes)


# ---- the answer as a value, and bad input ----------------------------------------------------------------------------


def test_the_text_is_a_table_with_warnings_and_notes():
    advice = advise_model(network(), x_of(2, 3, 64, 64), task="detection", machine="H200")
    lines = str(advice).splitlines()
    assert lines[0].split() == ["layer", "kind", "channels", "spatial", "D", "M", "groups", "advised", "time"]
    assert lines[2].split()[:8] == ["1.norm1", "BatchNorm2d", "64", "32x32", "2", "2048", "-", "32"]
    assert "> " in lines[2]  # a bound, as the machine is no CPU
    assert advice.machine == "H200"
    assert len(lines) == 1 + len(advice) + len(advice.said()) + len(advice.notes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice[0].advised = 1


def test_a_warning_names_its_layers_once():
    model = nn.Sequential(*[nn.GroupNorm(1, 16) for _ in range(5)])
    text = str(advise_model(model, x_of(2, 16, 8, 8)))
    assert text.count("is the LayerNorm") == 1
    assert "(0, 1, 2 and 2 more)" in text


def test_a_task_is_passed_on():
    assert advise_model(nn.BatchNorm3d(64), x_of(1, 64, 8, 8, 8), task="medical")[0].advised == 8


@pytest.mark.parametrize(("arguments", "options", "error", "said"), [
    ((3,), {}, OptionError, "torch.nn.Module: got int"),
    ((nn.GroupNorm,), {}, OptionError, "pass the model itself"),
    ((nn.GroupNorm(2, 4),), {"task": "speech"}, OptionError, "dp-sgd"),
    ((nn.GroupNorm(2, 4),), {"batch": 0}, ShapeError, "batch must be"),
    ((nn.GroupNorm(2, 4),), {"batch": "2"}, ShapeError, "batch must be"),
    ((nn.GroupNorm(2, 4), "text"), {}, OptionError, "the model raised"),
    ((nn.GroupNorm(2, 4), torch.ones(2, 4, 3)), {"machine": "abacus"}, OptionError, "abacus"),
])  # fmt: skip
def test_bad_arguments(arguments, options, error, said):
    with pytest.raises(error, match=said):
        advise_model(*arguments, **options)
