"""Which road a call takes, and that all lead to the same place: transforms, modes, subclasses, other devices."""

import pytest

torch = pytest.importorskip("torch")

import groupnorm.torch as gnt  # noqa: E402
from groupnorm.errors import GroupNormError  # noqa: E402
from groupnorm.torch import call  # noqa: E402

nn = torch.nn
F = torch.nn.functional


class Tagged(torch.Tensor):
    """A subclass that only adds something, as MONAI's MetaTensor."""


@pytest.fixture
def launches(monkeypatch):
    """Names of the engine's calls: forward, backward, moments, normalize."""
    seen = []
    for name in ("forward", "backward", "moments", "normalize"):
        whole = getattr(call, name)

        def spied(*arguments, _name=name, _whole=whole):
            seen.append(_name)
            return _whole(*arguments)

        monkeypatch.setattr(call, name, spied)
    return seen


def operations(run):
    """What a mode of dispatch sees while `run` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


# ---- gradients that transforms and modes ask for ---------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu"])
def test_vmap_over_the_gradients_of_one_forward(activation):
    x, weight = torch.randn(2, 8, 5, requires_grad=True), torch.randn(8, requires_grad=True)
    y, vectors = gnt.group_norm(x, 4, weight, activation=activation), torch.randn(3, 2, 8, 5)
    found = torch.vmap(lambda v: torch.autograd.grad(y, (x, weight), v, retain_graph=True))(vectors)
    for i, v in enumerate(vectors):
        for many, one in zip(found, torch.autograd.grad(y, (x, weight), v, retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one)


def test_tangents_of_a_gradient_go_through():
    from torch.autograd import forward_ad

    x, dy, tangent = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    y = gnt.group_norm(x, 4)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent), retain_graph=True)
        found = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(found, torch.autograd.grad(y, x, tangent)[0])  # backward is linear in dy


def test_modes_see_one_operator_forward_and_backward():
    x, weight, bias = torch.randn(2, 8, 5, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(8)
    want = torch.autograd.grad(gnt.group_norm(x, 4, weight, bias, activation="silu").sum(), (x, weight))
    found = []
    seen = operations(
        lambda: found.extend(
            torch.autograd.grad(gnt.group_norm(x, 4, weight, bias, activation="silu").sum(), (x, weight))
        )
    )
    assert [name for name in seen if "groupnorm" in name] == [
        "groupnorm.group_norm.default",
        "groupnorm.group_norm_backward.default",
    ]
    torch.testing.assert_close(found, list(want))


def test_fake_tensors_have_the_strides_of_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for x in (torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last), torch.randn(2, 5, 8).transpose(1, 2)):
        with FakeTensorMode() as mode:
            y = gnt.group_norm(mode.from_tensor(x), 4)
        assert y.stride() == F.group_norm(x, 4).stride()


@pytest.mark.parametrize("before", [False, True])
def test_traces_hold_what_was_computed(before):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, other = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    traced = make_fx(lambda t: gnt.group_norm(t, 4, activation="relu"), pre_dispatch=before)(x)
    assert "groupnorm" in traced.code
    torch.testing.assert_close(traced(other), F.relu(F.group_norm(other, 4)))


# ---- tensors of other classes, on other devices, with other strides --------------------------------------------------


def test_subclasses_that_add_something_reach_the_engine(launches):
    x = torch.randn(2, 8, 5)
    tagged = x.as_subclass(Tagged).requires_grad_()
    y = gnt.GroupNorm(4, 8, activation="relu")(tagged)
    assert type(y) is Tagged
    y.square().sum().backward()
    assert launches == ["forward", "backward"]
    plain = x.clone().requires_grad_()
    F.relu(F.group_norm(plain, 4)).square().sum().backward()
    torch.testing.assert_close(tagged.grad.as_subclass(torch.Tensor), plain.grad, rtol=1e-4, atol=1e-5)
    out = torch.empty(2, 8, 5).as_subclass(Tagged)
    with torch.no_grad():
        assert gnt.group_norm(tagged, 4, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.as_subclass(torch.Tensor), F.group_norm(x, 4))


def test_moments_of_subclasses(launches):
    x = torch.randn(2, 8, 5)
    found = gnt.moments(x.as_subclass(Tagged), 4)
    torch.testing.assert_close(found.mean.as_subclass(torch.Tensor), x.double().view(2, 4, -1).mean(2))
    y = gnt.normalize(x.as_subclass(Tagged), found)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.group_norm(x, 4))
    assert launches == ["moments", "normalize"]


@pytest.mark.filterwarnings("ignore")
def test_meta_tensors_of_monai_train_a_converted_block(launches):
    data = pytest.importorskip("monai.data")
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())
    gnt.convert(model)
    y = model(data.MetaTensor(torch.randn(2, 1, 9, 9)))
    assert type(y) is data.MetaTensor
    y.square().sum().backward()
    assert launches == ["forward", "backward"]


def test_other_devices_get_the_kernels_that_pytorch_has_there():
    x = torch.randn(2, 8, 5, 6, device="meta")
    norm = gnt.GroupNorm(4, 8, device="meta")
    assert "aten.native_group_norm.default" in operations(lambda: norm(x))


@pytest.mark.parametrize("shape", [(1, 8, 5, 6), (1, 8, 3, 4, 5)])
def test_expanded_samples_have_strides_as_in_pytorch(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=last).expand(3, *shape[1:])
    y, want = gnt.group_norm(x, 4), F.group_norm(x, 4)
    torch.testing.assert_close(y, want)
    assert y.stride() == want.stride()
    z = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(gnt.group_norm(z, 4).sum(), z)
    assert dx.stride() == z.stride()


def test_strides_do_not_depend_on_the_road():
    x, mask = torch.randn(2, 5, 8).transpose(1, 2), torch.ones(2, 5, dtype=torch.bool)
    want = F.group_norm(x, 4).stride()
    assert gnt.group_norm(x, 4).stride() == want
    assert gnt.group_norm(x.to("meta"), 4).stride() == want
    assert gnt.group_norm(x.to("meta"), 4, mask=mask.to("meta")).stride() == want


def test_pytorchs_autocast_policy_knows_devices_without_autocast():
    try:
        gnt.set_autocast("float32")
        assert gnt.group_norm(torch.empty(2, 8, 5, device="meta", dtype=torch.bfloat16), 4).dtype == torch.bfloat16
    finally:
        gnt.set_autocast("keep")


# ---- what is kept and computed for backward --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_without_activation_is_not_kept(dtype):
    x, residual = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = gnt.group_norm(x, 4, residual=residual)
    assert x.data_ptr() in kept
    assert residual.data_ptr() not in kept
    dy = torch.randn(2, 8, 5)
    want = torch.autograd.grad(F.group_norm(x, 4) + residual, (x, residual), dy)
    found = torch.autograd.grad(y, (x, residual), dy, retain_graph=True)
    again = torch.autograd.grad(y, (x, residual), dy, create_graph=True)
    compiled = torch.compile(lambda a, r: gnt.group_norm(a, 4, residual=r), backend="aot_eager")(x, residual)
    for gradients in (found, again, torch.autograd.grad(compiled, (x, residual), dy)):
        assert gradients[1].dtype == dtype
        torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_residual_gets_no_gradient_where_the_mask_is_false(compiled):
    x, residual = torch.randn(2, 8, 5), torch.randn(2, 8, 5, requires_grad=True)
    mask = torch.rand(2, 5) < 0.5
    run = lambda r: gnt.group_norm(x, 4, residual=r, mask=mask)  # noqa: E731
    if compiled:
        run = torch.compile(run, backend="aot_eager")
    dy = torch.randn(2, 8, 5)
    (found,) = torch.autograd.grad(run(residual), residual, dy)
    torch.testing.assert_close(found, torch.where(mask[:, None], dy, 0.0))


@pytest.mark.parametrize("again", [False, True])
def test_only_the_residual_needs_a_gradient(again, launches):
    residual, dy = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5)
    y = gnt.group_norm(torch.randn(2, 8, 5), 4, residual=residual)
    (found,) = torch.autograd.grad(y, residual, dy, create_graph=again)
    torch.testing.assert_close(found, dy)
    assert launches == ["forward"]


def test_one_value_per_channel_on_other_devices():
    x = torch.empty(1, 8, device="meta")
    assert gnt.group_norm(x, 8).shape == x.shape
    assert gnt.group_norm(x, 8, torch.empty(8, device="meta"), torch.empty(8, device="meta")).shape == x.shape


def test_wrong_calls_in_modes_get_the_same_errors():
    for wrong in ((torch.randn(2, 8, 5).to_sparse(), 4), (torch.randn(2, 8, 5), 4.5), (torch.randn(2, 8, 5), 4, 3)):
        with pytest.raises(GroupNormError) as plain:
            gnt.group_norm(*wrong)
        with pytest.raises(GroupNormError) as followed:
            operations(lambda wrong=wrong: gnt.group_norm(*wrong))
        assert (type(followed.value), str(followed.value)) == (type(plain.value), str(plain.value))


def test_the_operator_computes_the_gradients_that_are_needed():
    x, weight, bias = torch.randn(2, 8, 5), torch.randn(8), torch.randn(8)
    y, stats = torch.ops.groupnorm.group_norm(x, 4, weight, bias, 1e-5, None, None, None, None, None)
    backward = torch.ops.groupnorm.group_norm_backward
    needs = [False, True, False, False, False, False]
    arguments = (y, x, stats, 4, weight, bias, 1e-5, None, None, None, None, None)
    found = backward(*arguments, needs)
    assert [tensor.numel() for tensor in found] == [0, 8, 0, 0, 0, 0]
    torch.testing.assert_close(found[1], backward(*arguments, [True] * 3 + [False] * 3)[1])
    torch.library.opcheck(backward, (*arguments, needs), test_utils=("test_schema", "test_faketensor"))


def test_frozen_parameters_cost_nothing_in_compiled_training():
    norm = gnt.GroupNorm(4, 8).requires_grad_(False)
    seen = []

    def backend(graph, examples):
        from torch._dynamo.backends.common import aot_autograd

        def keep(module, _):
            seen.append(module.code)
            return module.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, examples)

    x = torch.randn(2, 8, 5, requires_grad=True)
    torch.compile(norm, backend=backend)(x).sum().backward()
    assert "[True, False, False, False, False, False]" in seen[1]


def test_saved_tensors_that_come_back_in_another_type():
    """Packed into 16 bits and left so: less is known, and nothing is read beyond its end."""
    x, dy = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5)
    want = torch.autograd.grad(gnt.group_norm(x, 4), x, dy)[0]
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8)
    for packed in (lambda t: t.bfloat16(), lambda t: t if t is weight or t.shape == (8,) else t.bfloat16()):
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
            y = gnt.group_norm(x, 4, weight, bias)
        found = torch.autograd.grad(y, x, dy)[0]
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)


def test_numbers_in_tensors_that_change():
    x, groups = torch.randn(2, 8, 5), torch.tensor(4)
    gnt.moments(x, groups)
    groups.fill_(2)
    assert gnt.moments(x, groups).mean.shape == (2, 2)
    eps, found = torch.tensor(1.0), gnt.moments(x, 4)
    gnt.normalize(x, found, eps=eps)
    eps.fill_(1e-5)
    torch.testing.assert_close(gnt.normalize(x, found, eps=eps), F.group_norm(x, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_per_sample_gradients_of_small_weights(dtype):
    """1 + (weight - 1) is 0 in 16 bits, and ReLU would let nothing through."""
    from groupnorm.torch.per_sample import per_sample_gradients

    norm = gnt.GroupNorm(4, 8, dtype=dtype, activation="relu")
    nn.init.constant_(norm.weight, 2.0**-12)
    x, dy = torch.randn(3, 8, 5).to(dtype), torch.randn(3, 8, 5).to(dtype)
    found = per_sample_gradients(norm, [x], dy)[norm.weight]
    for n in range(3):
        y = norm(x[n : n + 1])
        torch.testing.assert_close(found[n], torch.autograd.grad(y, norm.weight, dy[n : n + 1])[0])
