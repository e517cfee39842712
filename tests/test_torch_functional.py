"""groupnorm.torch.group_norm against PyTorch's own, in float64 where numbers are compared."""

import itertools
import warnings

import pytest

torch = pytest.importorskip("torch")

import groupnorm as gn  # noqa: E402
import groupnorm.torch as gnt  # noqa: E402
from groupnorm.torch import composite  # noqa: E402

F = torch.nn.functional
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(dtype=torch.float32, memory_format=torch.contiguous_format, shape=(3, 12, 7, 5), seed=0):
    """x, weight, bias, scale, shift and residual of one type."""
    generator = torch.Generator().manual_seed(seed)
    n, c = shape[:2]
    shapes = (shape, (c,), (c,), (n, c), (n, c), shape)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    if len(shape) == 4:
        tensors[0], tensors[5] = (tensors[i].to(memory_format=memory_format) for i in (0, 5))
    return tensors


def expected(x, groups, weight, bias, scale, shift, residual, activation):
    x, weight, bias, scale, shift, residual = (t.double() for t in (x, weight, bias, scale, shift, residual))
    z = F.group_norm(x, groups, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None] + residual
    return z if activation is None else composite.ACTIVATIONS[activation](z)


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(dtype, memory_format, activation):
    tensors = [t.requires_grad_() for t in make(dtype, FORMATS[memory_format])]
    x, weight, bias, scale, shift, residual = tensors
    y = gnt.group_norm(x, 3, weight, bias, activation=activation, scale=scale, shift=shift, residual=residual)
    assert y.dtype == dtype
    assert y.stride() == F.group_norm(x, 3).stride()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = expected(wide[0], 3, *wide[1:], activation)
    assert error(y, want) < TOLERANCE[dtype]
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(y, tensors, dy)
    for got, right, tensor in zip(found, torch.autograd.grad(want, wide, dy.double()), tensors, strict=True):
        assert got.dtype == dtype
        assert got.shape == tensor.shape
        assert error(got, right) < TOLERANCE[dtype]


def test_types_may_differ():
    x, weight, bias, scale, _, residual = make(torch.bfloat16)
    y = gnt.group_norm(x, 3, weight.float(), bias.double(), scale=scale.half(), residual=residual.float())
    want = expected(x, 3, weight, bias, scale, torch.zeros(3, 12), residual, None)
    assert y.dtype == torch.bfloat16
    assert error(y, want) < 1e-2


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 9), (2, 6, 3, 4), (2, 6, 2, 3, 4), (1, 6, 1, 1), (3, 1, 5, 5),
                                   (0, 6, 3, 3), (2, 6, 0, 3)], ids=str)  # fmt: skip
def test_shapes(shape):
    x = torch.randn(shape)
    groups = min(3, shape[1])
    y = gnt.group_norm(x, groups)
    assert y.shape == x.shape
    if x.numel():
        torch.testing.assert_close(y, torch.group_norm(x.double(), groups).float())
    x.requires_grad_()
    (dx,) = torch.autograd.grad(gnt.group_norm(x, groups).sum(), x)
    assert dx.shape == x.shape


VIEWS = {
    "every second channel": lambda t: t[:, ::2],
    "some channels": lambda t: t[:, 4:10],
    "crop": lambda t: t[:, :, 1:6, 1:4],
    "transposed": lambda t: t.transpose(2, 3),
    "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "every second sample": lambda t: t[::2],
    "channels and width exchanged": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last, some channels": lambda t: t.to(memory_format=torch.channels_last)[:, 2:8],
    "flipped": lambda t: t.flip(3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_those_of_pytorch(view):
    x = VIEWS[view](make()[0])
    want = F.group_norm(x, 2)
    y = gnt.group_norm(x, 2)
    torch.testing.assert_close(y, want)
    assert y.stride() == want.stride()
    out = torch.full_like(want, float("nan"))
    assert gnt.group_norm(x, 2, out=out) is out
    torch.testing.assert_close(out, want)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    dy = torch.randn(want.shape).transpose(0, 1).contiguous().transpose(0, 1)
    (found,), (right,) = (torch.autograd.grad(f(leaf, 2), leaf, dy) for f in (gnt.group_norm, F.group_norm))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_channels_last_3d():
    x = torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    y = gnt.group_norm(x, 3)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, F.group_norm(x, 3))


def test_mask():
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5, 4) < 0.6
    y = gnt.group_norm(x, 3, mask=mask, activation="silu")
    want = torch.from_numpy(gn.group_norm(x.detach().numpy(), 3, mask=mask.numpy(), activation="silu"))
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    composed = composite.group_norm(x, 3, None, None, 1e-5, "silu", None, None, None, mask)
    torch.testing.assert_close(dx, torch.autograd.grad(composed, x, dy)[0])


def test_out_and_in_place():
    x = torch.randn(2, 6, 5, 5)
    want = F.group_norm(x, 3)
    assert gnt.group_norm(x, 3, out=x) is x
    torch.testing.assert_close(x, want)
    with pytest.raises(ValueError, match="out cannot be given"):
        gnt.group_norm(x.requires_grad_(), 3, out=torch.empty(2, 6, 5, 5))
    followed = torch.empty(2, 6, 5, 5, requires_grad=True) * 2  # its gradient would be that of what it held
    with pytest.raises(ValueError, match="out cannot be given"):
        gnt.group_norm(x.detach(), 3, out=followed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_live_as_long_as_they_are_used(dtype):
    """They lie in memory that is lent, and taken again for the next result."""
    x = torch.randn(8, 32, 128, 128).to(dtype)  # 8 MiB in bfloat16
    views = [gnt.group_norm(x * (i + 1), 4).view(-1)[-5:] for i in range(4)]
    want = F.group_norm(x, 4).view(-1)[-5:]
    for view in views:
        torch.testing.assert_close(view, want, rtol=2e-2, atol=2e-2)


def test_threads_follow_pytorch():
    before = torch.get_num_threads()
    try:
        x = torch.randn(4, 32, 64, 64)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gnt.group_norm(x, 8))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_every_order_and_mode(activation):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, weight, bias):
        return gnt.group_norm(x, 2, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(f, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


def test_only_what_is_needed():
    x, weight, bias, *_ = make()
    for needed in itertools.product((False, True), repeat=3):
        tensors = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
        y = gnt.group_norm(tensors[0], 3, *tensors[1:])
        assert y.requires_grad == any(needed)
        if any(needed):
            y.sum().backward()
        assert [t.grad is not None for t in tensors] == list(needed)


def test_what_is_saved_for_backward():
    """x itself, and nothing else of its size."""
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gnt.group_norm(x, 8, activation="silu")
    assert sum(t.numel() for t in saved) == x.numel() + 2 * 2 * 8
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_twice_through_one_graph_and_checkpointing():
    x, weight, bias, *_ = (t.requires_grad_() for t in make())
    y = gnt.group_norm(x, 3, weight, bias, activation="silu")
    first = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(map(torch.equal, first, second))
    again = torch.utils.checkpoint.checkpoint(
        lambda x: gnt.group_norm(x, 3, weight, bias, activation="silu"), x, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], first[0])


def test_transforms_of_torch_func():
    weight, bias = torch.randn(8), torch.randn(8)
    x = torch.randn(5, 2, 8, 3, 3)
    torch.testing.assert_close(
        torch.vmap(lambda t: gnt.group_norm(t, 4, weight, bias))(x),
        torch.stack([F.group_norm(t, 4, weight, bias) for t in x]),
    )

    samples = torch.randn(7, 8, 5, 5)

    def loss(norm):
        return lambda weight, x: norm(x[None], 4, weight, bias).square().sum()

    found, want = (
        torch.vmap(torch.func.grad(loss(norm)), (None, 0))(weight, samples) for norm in (gnt.group_norm, F.group_norm)
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    small = torch.randn(1, 8, 2)  # PyTorch's own group_norm fails under jacrev
    want = torch.autograd.functional.jacobian(lambda x: F.group_norm(x, 4), small)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda x: gnt.group_norm(x, 4))(small), want, rtol=1e-4, atol=1e-4)


# ---- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator_is_declared_truthfully(memory_format):
    tensors = [t.requires_grad_() for t in make(memory_format=FORMATS[memory_format])]
    x, weight, bias, scale, shift, residual = tensors
    mask = torch.rand(3, 7, 5) < 0.7
    for arguments in (
        (x, 3, weight, bias, 1e-5, "silu", scale, shift, residual, mask),
        (x.detach(), 3, None, None, 1e-5, None, None, None, None, None),
    ):
        torch.library.opcheck(torch.ops.groupnorm.group_norm.default, arguments)


def test_compiled_and_exported():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(6, 6, 3), gnt.GroupNorm(3, 6, activation="silu"), torch.nn.Conv2d(6, 6, 3)
    )
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    want = net(x)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    y = compiled(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (3, 4, 7):
            compiled(torch.randn(n, 6, 9, 9, requires_grad=True))
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), want)
    assert any(node.target is torch.ops.groupnorm.group_norm.default for node in exported.graph.nodes)


@pytest.mark.parametrize("training", [True, False])
def test_every_module_compiles_whole(training):
    torch._dynamo.reset()
    x = torch.randn(3, 6, 5, 5)
    for options in ({"inplace": True}, {"track_running_stats": True}):
        norm = gnt.GroupNorm(3, 6, activation="silu", **options).train(training)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            before = {name: t.clone() for name, t in norm.state_dict().items()}
            want = norm(x.clone())
            after = {name: t.clone() for name, t in norm.state_dict().items()}
            norm.load_state_dict(before)
            torch.testing.assert_close(compiled(x.clone()), want)
        for name, t in norm.state_dict().items():
            torch.testing.assert_close(t, after[name])


# ---- types and errors ------------------------------------------------------------------------------------------------


def test_autocast_keeps_the_type():
    x, weight, bias, *_ = make(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gnt.group_norm(x, 3, weight, bias).dtype == torch.bfloat16
        assert gnt.group_norm(x.float(), 3, weight, bias).dtype == torch.float32


def test_meta_tensors():
    y = gnt.group_norm(torch.empty(2, 6, 3, 3, device="meta"), 3, torch.ones(6, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 6, 3, 3)


X = torch.randn(2, 8, 4, 4)
BAD = {
    "groups that do not divide": ((X, 5), "num_groups must divide"),
    "no groups": ((X, 0), "at least 1"),
    "groups of half": ((X, 2.5), "whole number"),
    "weight of another size": ((X, 4, torch.ones(3)), "weight must have the shape"),
    "integers": ((X.int(), 4), "x must be of type"),
    "complex numbers": ((X.to(torch.complex64), 4), "x must be of type"),
    "one axis": ((X[0, 0, 0], 1), "batch and a channel axis"),
    "sparse": ((X.to_sparse(), 4), "dense tensor"),
    "nested": ((torch.nested.nested_tensor([X[0], X[1]]), 4), "dense tensor"),
    "an array": ((X.numpy(), 4), "must be a tensor"),
    "negative eps": ((X, 4, None, None, -1.0), "eps must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(gn.GroupNormError, match=message):
            gnt.group_norm(*arguments)


@pytest.mark.parametrize("shape", [(2, 8, 1, 16), (2, 8, 1, 4, 5), (2, 8, 3, 1, 4)], ids=str)
def test_mask_with_an_axis_of_length_1(shape):
    x, mask = torch.randn(shape, requires_grad=True), torch.rand(shape[0], *shape[2:]) < 0.6
    y = gnt.group_norm(x, 4, mask=mask)
    want = composite.group_norm(x, 4, None, None, 1e-5, None, None, None, None, mask)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, want)), atol=1e-4, rtol=1e-4)
    assert torch.equal(gnt.moments(x.detach(), 4, mask=mask).count, mask.flatten(1).sum(1)[:, None].expand(-1, 4) * 2.0)


def test_large_results_may_be_changed_in_place():
    """They lie in recycled memory, and are no views of it for autograd."""
    x = torch.randn(4, 64, 128, 128, requires_grad=True)
    y = gnt.group_norm(x, 8)
    assert not y._is_view()
    F.relu_(y).sum().backward()
    with torch.no_grad():
        features = gnt.group_norm(x, 8)
    features += torch.ones(1, requires_grad=True)
    features.detach_()


def test_an_eps_that_changes():
    x, eps = torch.randn(2, 8, 5), torch.tensor(1e-5)
    gnt.group_norm(x, 4, eps=eps)
    eps.fill_(1.0)
    torch.testing.assert_close(gnt.group_norm(x, 4, eps=eps), F.group_norm(x, 4, eps=1.0))


def test_fields_of_moments_are_contiguous():
    x = torch.randn(2, 8, 5)
    for m in (gnt.moments(x, 4), gnt.moments(x.requires_grad_(), 4)):
        assert all(field.is_contiguous() for field in (m.count, m.mean, m.m2))
