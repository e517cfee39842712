"""Out of Python: Inductor, torch.export and its files, ONNX, torch.jit.trace."""

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import groupnorm.torch as gnt  # noqa: E402
from groupnorm.torch import call  # noqa: E402

nn = torch.nn
F = torch.nn.functional


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    gnt.convert(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("convolutions", [True, False])
def test_inductor(memory_format, convolutions):
    """No graph break, nothing compiled again for another batch or size, the same results and gradients."""
    torch._dynamo.reset()
    model = net() if convolutions else nn.Sequential(nn.Softsign(), gnt.GroupNorm(2, 4, activation="silu"))
    model = model.to(memory_format=memory_format)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    sizes = (9, 9, 9) if convolutions else (9, 12, 7)  # Inductor compiles a convolution for one size
    for n, size in zip((2, 3, 5), sizes, strict=True):
        x = torch.randn(n, 4, size, size).to(memory_format=memory_format).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=n > 2):
            found = compiled(x)
        want = model(x)
        torch.testing.assert_close(found, want)
        assert found.stride() == want.stride()
        dy = torch.randn_like(want)
        inputs = [x, *model.parameters()]
        for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, want)), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.slow
def test_inductor_keeps_one_kernel_for_norm_and_activation():
    torch._dynamo.reset()
    model, x = net(), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        _, code = torch._inductor.utils.run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert "".join(code).count("groupnorm.group_norm.default(") == 2
    assert "sigmoid" not in "".join(code)


@pytest.mark.slow
def test_inductor_brings_nothing_into_another_layout(monkeypatch):
    """It lays tensors between convolutions channels last: both directions take them so, and results come back as they
    would from the model itself.
    """
    torch._dynamo.reset()
    seen = []

    def watch(name, place):
        plain = getattr(call, name)

        def watched(*given):
            seen.append((name, given[place].is_contiguous(memory_format=torch.channels_last)))
            return plain(*given)

        monkeypatch.setattr(call, name, watched)

    watch("forward", 1)
    watch("backward", 2)
    model, x = net(), torch.randn(2, 4, 9, 9)
    compiled = torch.compile(nn.Sequential(model, nn.Conv2d(8, 8, 1)), fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        y = compiled(x)
        y.sum().backward()
    assert seen == [("forward", True)] * 2 + [("backward", True)] * 2
    assert y.is_contiguous()


def test_export_to_a_file_and_back():
    model, x = net(), torch.randn(2, 4, 9, 9)
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (x, torch.randn(5, 4, 12, 7)):
        torch.testing.assert_close(loaded(other), model(other))


def test_traced():
    model, x = net(), torch.randn(2, 4, 9, 9)
    traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for again in (traced, torch.jit.load(file)):
        torch.testing.assert_close(again(torch.ones(3, 4, 5, 6)), model(torch.ones(3, 4, 5, 6)))


# ---- ONNX ------------------------------------------------------------------------------------------------------------

MODELS = {
    "plain": (lambda: gnt.GroupNorm(4, 8), ["GroupNormalization"]),
    "without bias": (lambda: gnt.GroupNorm(4, 8, bias=False, eps=1e-3), ["GroupNormalization"]),
    "without both": (lambda: gnt.GroupNorm(4, 8, affine=False), ["GroupNormalization"]),
    "with gelu": (lambda: gnt.GroupNorm(4, 8, activation="gelu"), ["GroupNormalization", "Gelu"]),
    "in a model": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), *net()[1:]), ["GroupNormalization"] * 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_has_the_operator(name, caplog):
    """opset 21 has GroupNormalization with weights for each channel; ONNX Runtime gives what we give."""
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    make, operators = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=2)}
    file = io.BytesIO()
    torch.onnx.export(model, (torch.randn(2, 8, 5, 6),), file, dynamo=True, opset_version=21, dynamic_shapes=(sizes,),
                      verbose=False)  # fmt: skip
    graph = onnx.load_from_string(file.getvalue())
    assert graph.opset_import[0].version == 21
    found = [node.op_type for node in graph.graph.node]
    assert [kind for kind in found if kind in operators] == operators
    session = runtime.InferenceSession(file.getvalue())
    for x in (torch.randn(2, 8, 5, 6), 3 * torch.randn(4, 8, 9, 6) + 1):
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def second_derivative(model, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((model(x) ** 3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


class Own(torch.Tensor):
    """A class of somebody's own."""


def test_what_exported_and_traced_models_may_be_asked_for():
    """A second derivative, and a tensor of another class."""
    model, x = nn.Sequential(gnt.GroupNorm(4, 8, activation="silu")), torch.randn(2, 8, 5)
    want = second_derivative(model, x)
    for out in (torch.export.export(model, (x,)).module(), torch.jit.trace(model, (x,))):
        torch.testing.assert_close(second_derivative(out, x), want)
        y = out(x.as_subclass(Own))
        torch.testing.assert_close(y.as_subclass(torch.Tensor), model(x))


@pytest.mark.slow
def test_transforms_are_compiled():
    x, weight = torch.randn(2, 8, 5), torch.randn(8)
    ramp = torch.arange(5.0)
    gradient = torch.func.grad(lambda x: (gnt.group_norm(x, 4).square() * ramp).sum())
    torch.testing.assert_close(torch.compile(gradient)(x), gradient(x), rtol=1e-4, atol=1e-4)
    for_one = torch.func.grad(lambda w, x: gnt.group_norm(x[None], 4, w, w).square().sum())
    each = torch.func.vmap(for_one, in_dims=(None, 0))
    torch.testing.assert_close(torch.compile(each)(weight, x), each(weight, x), rtol=1e-4, atol=1e-4)
