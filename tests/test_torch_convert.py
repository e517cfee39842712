"""groupnorm.torch.convert and revert: what is swapped, what is fused, and that nobody can tell."""

import copy
import functools
import pickle

import pytest

torch = pytest.importorskip("torch")

import groupnorm.torch as gnt  # noqa: E402
from groupnorm.torch import fusion, rewrite  # noqa: E402

F = torch.nn.functional
nn = torch.nn


def agree(model, *inputs, backward=True, **options):
    """Convert a copy; the outputs and the gradients of the two must be the same. Gives the copy and the report."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = copy.deepcopy(model)
    report = gnt.convert(ours, **options)
    for mode in (True, False):
        want, found = model.train(mode)(*inputs), ours.train(mode)(*inputs)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        if backward:
            dy = torch.randn_like(want)
            wanted = torch.autograd.grad(want, list(model.parameters()), dy, allow_unused=True)
            got = torch.autograd.grad(found, list(ours.parameters()), dy, allow_unused=True)
            for a, b in zip(got, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a - b).norm() <= 1e-4 * b.norm() + 1e-4
    return ours, report


def kernels(model, *inputs):
    """How often one kernel did a norm and an activation."""
    calls, whole = [], gnt.GroupNorm.normalized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gnt.GroupNorm, "normalized", lambda *a, **k: calls.append(a[2]) or whole(*a, **k))
        with torch.no_grad():
            model(*inputs)
    return [name for name in calls if name is not None]


# ---- Sequential ------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 12, 3), nn.GroupNorm(4, 12),
        nn.ReLU(inplace=True), nn.Sequential(nn.GroupNorm(12, 12), nn.GELU("tanh"), nn.Conv2d(12, 2, 1)),
        nn.GroupNorm(1, 2),
    )  # fmt: skip


def test_convert_and_revert():
    model, x = net(), torch.randn(2, 3, 9, 9)
    children, kept, keys, before = list(model), list(model.parameters()), list(model.state_dict()), repr(model)
    model[1].register_buffer("own", torch.ones(1), persistent=False)
    want = model(x)
    want.square().sum().backward()
    gradients = [p.grad.clone() for p in kept]
    report = gnt.convert(model)
    assert (report.count("swapped"), report.count("fused"), report.count("skipped")) == (4, 3, 0)
    assert "with the silu after it" in str(report)
    assert "4 swapped, 3 fused" in str(report)
    assert [change.name for change in report.changes] == ["1", "1", "4", "4", "6.0", "6.0", "7"]
    assert all(map(lambda a, b: a is b, model, children))
    assert type(model[2]) is nn.SiLU
    assert list(model.state_dict()) == keys
    assert all(map(lambda a, b: a is b, model.parameters(), kept))
    model.zero_grad()
    found = model(x)
    torch.testing.assert_close(found, want)
    assert kernels(model, x) == ["silu", "relu", "gelu_tanh"]
    found.square().sum().backward()
    for p, gradient in zip(kept, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4)
    assert gnt.convert(model).changes == []
    assert str(gnt.convert(model)).startswith("nothing to do")
    for same in (copy.deepcopy(model), *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5))):
        assert kernels(same, x) == ["silu", "relu", "gelu_tanh"]
        assert torch.equal(same(x), found)
    torch.testing.assert_close(model[:2](x), F.group_norm(children[0](x), 3, children[1].weight, children[1].bias))
    gnt.revert(model)
    assert repr(model) == before
    assert {type(m) for m in model.modules()} == {nn.Sequential, nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.ReLU, nn.GELU}
    assert torch.equal(model(x), want)
    assert gnt.revert(model).changes == []


def test_what_is_not_fused():
    class Own(nn.GroupNorm):
        pass

    watched, seen = nn.GroupNorm(2, 4), []
    handle = watched.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model = nn.Sequential(watched, nn.ReLU(), Own(2, 4), nn.ReLU(), nn.GroupNorm(2, 4), nn.LeakyReLU())
    x = torch.randn(2, 4, 3)
    want, first = model(x), seen[0]
    report = gnt.convert(model)
    assert (report.count("swapped"), report.count("fused"), report.count("skipped")) == (2, 0, 2)
    assert "hooks" in str(report)
    assert "Own is a class of its own" in str(report)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(seen[1], first)
    handle.remove()
    assert kernels(model, x) == ["relu"]


def test_dropouts_that_do_nothing_are_passed_over():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.0), nn.Identity(), nn.ReLU(), nn.GroupNorm(2, 4),
                          nn.Dropout2d(0.5), nn.SiLU())  # fmt: skip
    x = torch.randn(2, 4, 3, 3)
    gnt.convert(model)
    assert kernels(model, x) == ["relu"]
    assert kernels(model.eval(), x) == ["relu", "silu"]
    torch.testing.assert_close(model(x), gnt.revert(model) and model(x))


@pytest.mark.parametrize("hook", ["forward", "pre", "backward", "global", "method"])
def test_hooks_that_come_later_see_everything(hook):
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    gnt.convert(model)
    x, seen = torch.randn(2, 4, 3, 3, requires_grad=True), []
    if hook == "forward":
        handle = model[0].register_forward_hook(lambda m, i, y: seen.append(y.min()))
    elif hook == "pre":
        handle = model[1].register_forward_pre_hook(lambda m, i: seen.append(i[0].min()))
    elif hook == "backward":
        handle = model[1].register_full_backward_hook(lambda m, i, o: seen.append(-1))
    elif hook == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(y.min()))
    else:
        model[0].forward = lambda x: seen.append(-1) or x
        handle = None
    model(x).sum().backward()
    if handle is not None:
        handle.remove()
    assert seen
    assert seen[0] < 0


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.GroupNorm(8, 8)
        self.act, self.relu, self.conv = nn.SiLU(), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)


class TwoStatements(Block):
    def forward(self, x):
        h = self.norm1(x)
        h = self.act(h)
        h = self.conv(h)
        h = self.norm2(h)
        h = F.gelu(h, approximate="tanh")
        return h


class OneExpression(Block):
    def forward(self, x):
        """What it does:
            something.
        """  # fmt: skip
        x = self.conv(self.act(self.norm1(self.conv(torch.relu(self.norm2(x))))))
        return nn.functional.silu(self.norm3(x))


class OtherNames(Block):
    def forward(self, x):
        first = self.norm1(x)
        second = self.act(first)
        third = self.norm2(second)
        return self.conv(self.act(third))


class Residual(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x)
        out = self.norm1(out)
        out += x
        out = self.relu(out)
        out = self.norm2(out)
        out = x + out
        out = self.act(out)
        out = self.norm1(out)
        out = out + x
        out = self.act(out)
        return F.relu(self.norm3(self.conv(out)) + x, inplace=True)


class Branches(Block):
    def forward(self, x, mode="scale", factors=None):
        h = x
        if mode == "plain":
            h = self.norm1(h)
        elif mode == "scale":
            scale, shift = torch.chunk(self.factors if factors is None else factors, 2, dim=1)
            h = self.norm1(h)
            h = h * (1 + scale) + shift
        elif mode == "none":
            pass
        else:
            raise ValueError(mode)
        h = self.act(h)
        return self.conv(h)

    factors = torch.linspace(-1, 1, 2 * 16).reshape(2, 16, 1, 1)


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return function(self, *args) * self.factor

    return wrapper


class Decorated(Block):
    factor = 3

    @decorated
    @torch.enable_grad()
    def forward(self, x):
        x = self.norm1(x)
        x = self.act(x)
        return super().__call__ and x


CASES = [
    (TwoStatements, ["silu", "gelu_tanh"]),
    (OneExpression, ["relu", "silu", "silu"]),
    (OtherNames, ["silu", "silu"]),
    (Residual, ["relu", "silu", "silu", "relu"]),
    (Branches, ["silu"]),
    (Decorated, ["silu"]),
]


@pytest.mark.parametrize(("block", "activations"), CASES)
def test_blocks_are_fused(block, activations):
    x = torch.randn(2, 8, 5, 5)
    ours, report = agree(block(), x)
    assert kernels(ours, x) == activations
    assert report.count("fused") == (3 if block is Residual else len(activations))
    assert report.count("skipped") == 0
    assert isinstance(ours, block)
    assert type(ours).__name__ == block.__name__
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert kernels(same, x) == activations
        assert torch.equal(same(x), ours(x))
    assert gnt.convert(ours).changes == []
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
    gnt.revert(ours)
    assert type(ours) is block
    assert kernels(ours, x) == []


def test_every_branch_does_what_it_did():
    x = torch.randn(2, 8, 5, 5)
    model = Branches()
    ours = copy.deepcopy(model)
    gnt.convert(ours)
    for mode in ("plain", "scale", "none"):
        torch.testing.assert_close(ours(x, mode), model(x, mode))
    assert kernels(ours, x, "none") == []
    wide = torch.randn(1, 16, 5, 5)  # a scale for each position is nothing that the kernel knows
    torch.testing.assert_close(ours(x, "scale", wide), model(x, "scale", wide))
    with pytest.raises(ValueError, match="other"):
        ours(x, "other")


def test_a_block_may_change_afterwards():
    """Nothing is taken for granted that can be changed: the activation, the norm, the function that is called."""
    ours, x = TwoStatements(), torch.randn(2, 8, 5, 5)
    gnt.convert(ours)
    ours.act = nn.Tanh()
    assert kernels(ours, x) == ["tanh", "gelu_tanh"]
    ours.act = nn.LeakyReLU()
    assert kernels(ours, x) == ["gelu_tanh"]
    ours.norm2 = nn.Identity()
    want = F.gelu(ours.conv(F.leaky_relu(F.group_norm(x, 2))), approximate="tanh")
    torch.testing.assert_close(ours(x), want)


class SeenTwice(Block):
    def forward(self, x):
        h = self.norm1(x)
        a = self.act(h)
        return a + h


class SeenBeside(Block):
    def forward(self, x):
        h = self.norm1(x)
        h = torch.add(self.act(h), h)
        return h


class SeenLater(Block):
    def forward(self, x):
        for _ in range(2):
            h = self.norm1(x)
            y = self.act(h)
            x = self.conv(y)
        return h + y


class Between(Block):
    def forward(self, x):
        h = self.norm1(x)
        h = h * 2
        return self.act(h)


class Watched(Block):
    def forward(self, x):
        h = self.norm1(x)
        h = self.act(h)
        return locals()["h"]


class WithHandler(Block):
    def forward(self, x):
        h = x
        try:
            h = self.norm1(x)
            h = self.act(h)
        except RuntimeError:
            return h
        return h


class OtherOptions(Block):
    def forward(self, x):
        h = self.norm1(x)
        return F.gelu(h, approximate=self.kind)

    kind = "tanh"


@pytest.mark.parametrize("block", [SeenTwice, SeenBeside, SeenLater, Between, OtherOptions])
def test_blocks_that_are_left_alone(block):
    x = torch.randn(2, 8, 5, 5)
    ours, report = agree(block(), x)
    assert report.count("fused") == 0
    assert kernels(ours, x) == []
    assert type(ours) is block


@pytest.mark.parametrize("block", [Watched, WithHandler])
def test_blocks_of_which_only_torch_fx_is_sure(block):
    x = torch.randn(2, 8, 5, 5)
    ours, report = agree(block(), x)
    assert kernels(ours, x) == []
    ours, report = agree(block(), x, across_modules=True)
    assert kernels(ours, x) == ["silu"]
    assert "torch.fx" in str(report)
    assert type(ours) is block


class Defaults(Block):
    """Numbers take the place of tensors, and tensors of another type make the result of that type."""

    def forward(self, x, r=0, s=0.5, t=2.0):
        h = self.norm1(x)
        h = h * (1 + s) + t
        h = self.act(h)
        h = self.norm2(h)
        h = h + r
        return self.act(h)


def test_numbers_and_other_types_where_tensors_may_be():
    x, r = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    s, t = torch.randn(2, 8, 1, 1), torch.randn(2, 8, 1, 1)
    ours, report = agree(Defaults(), x)
    assert report.count("fused") == 2
    assert kernels(ours, x) == []
    assert kernels(ours, x, r, s, t) == ["silu", "silu"]
    assert kernels(ours, x, r.double(), s, t) == ["silu"]
    assert kernels(ours, x, r, s.double(), t) == []
    assert ours(x.bfloat16(), r, s, t).dtype == torch.float32


def test_a_class_that_is_patched_later_is_read_again(monkeypatch):
    x = torch.randn(2, 8, 5, 5)
    assert gnt.convert(Defaults()).count("fused") == 2
    monkeypatch.setattr(Defaults, "forward", lambda self, x: 3 * self.act(self.norm1(x)))
    agree(Defaults(), x)


def test_what_replaced_a_forward_stays():
    class Strict(Block):
        def __init_subclass__(cls, *, tag):
            pass

    class Tagged(Strict, tag=1):
        def forward(self, x):
            return self.act(self.norm1(x))

    x = torch.randn(2, 8, 5, 5)
    _, report = agree(Tagged(), x)
    assert "allows no subclass" in str(report)
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Identity(), nn.SiLU())
    model[1].forward = lambda h: 2 * h
    want = model(x)
    assert gnt.convert(model).count("fused") == 0
    torch.testing.assert_close(model(x), want)
    block = Block()
    block.forward = functools.partial(block.norm2)
    assert "its forward was replaced" in str(gnt.convert(block))


def test_source_that_is_not_what_runs_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "changing.py"
    text = "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n"
    text += "        x = self.n(x)\n        x = self.a(x)\n"
    path.write_text(text + "        return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import changing

    found = rewrite.rewrite(changing.M.forward, {"self.n"}, {"self.a": None}, fusion.norm_act)
    assert found[1] == {"self.n": "self.a"}
    path.write_text(text + "        return 2*x\n")
    with pytest.raises(rewrite.Unreadable, match="not what runs"):
        rewrite.rewrite(changing.M.forward, {"self.n"}, {"self.a": None}, fusion.norm_act)


def test_tracebacks_show_the_lines_of_the_file():
    class Broken(Block):
        def forward(self, x):
            x = self.norm1(x)
            x = self.act(x)
            return x.no_such_thing

    model = Broken()
    gnt.convert(model)
    assert hasattr(type(model), "unfused")
    with pytest.raises(AttributeError) as caught:
        model(torch.randn(1, 8, 2, 2))
    assert any("return x.no_such_thing" in str(entry.statement) for entry in caught.traceback)


# ---- whole graphs ----------------------------------------------------------------------------------------------------


class Apart(nn.Module):
    """The norm and the activation are in different modules, with something between them."""

    def __init__(self, options=""):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))
        self.tail = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 4, 1))
        self.options = options

    def forward(self, x):
        h = self.head(x)
        side = x.mean()
        y = self.tail(h)
        if self.options == "shared":
            y = self.tail[0](y)
        if self.options == "twice":
            y = y + h.mean()
        if self.options == "eval" and not self.training:
            y = y + h.mean()
        if self.options == "data" and side > 0:
            y = -y
        self.seen = side
        return y * side


def test_torch_fx_fuses_what_is_apart():
    x = torch.randn(2, 3, 5, 5)
    ours, report = agree(Apart(), x, across_modules=True)
    assert report.count("fused") == 1
    assert "torch.fx" in str(report)
    assert kernels(ours, x) == ["silu"]
    assert "seen" not in vars(copy.deepcopy(Apart()))
    assert gnt.convert(ours, across_modules=True).changes == []
    assert kernels(pickle.loads(pickle.dumps(ours)), x) == ["silu"]
    gnt.revert(ours)
    assert repr(ours) == repr(Apart())


@pytest.mark.parametrize("options", ["shared", "twice", "eval", "data"])
def test_torch_fx_leaves_alone_what_is_not_sure(options):
    x = torch.randn(2, 3, 5, 5)
    ours, report = agree(Apart(options), x, across_modules=True)
    assert report.count("fused") == 0
    assert kernels(ours, x) == []


def test_what_is_apart_is_left_alone_unless_asked():
    """A part of the model that is called alone must give what it gave."""
    model, x = Apart(), torch.randn(2, 3, 5, 5)
    want = model.head(x)
    assert gnt.convert(model).count("fused") == 0
    torch.testing.assert_close(model.head(x), want)


def test_tracing_leaves_nothing_behind():
    class Counts(Apart):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.scripted = torch.jit.script(nn.Linear(2, 2))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counts()
    before = set(vars(model))
    assert gnt.convert(model, across_modules=True).count("fused") == 1
    assert set(vars(model)) == before
    assert model.training
    assert model.calls == 0


def test_torch_fx_leaves_alone_a_norm_whose_forward_was_replaced():
    model, x = Apart(), torch.randn(2, 3, 5, 5)
    model.head[1].forward = lambda h: 2 * h
    want = model(x)
    report = gnt.convert(model, across_modules=True)
    assert [change.action for change in report.changes] == ["skipped"]
    torch.testing.assert_close(model(x), want)


def test_a_converted_model_can_be_traced():
    model, x = net(), torch.randn(2, 3, 9, 9)
    want = model(x)
    gnt.convert(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), want)


def test_modules_that_pickle_in_their_own_way():
    model, x = torch.fx.symbolic_trace(nn.Sequential(Apart(), nn.GroupNorm(2, 4), nn.ReLU())), torch.randn(2, 3, 5, 5)
    want = model(x)
    report = gnt.convert(model, across_modules=True)
    assert (report.count("swapped"), report.count("fused")) == (2, 2)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x), want)
    gnt.revert(model)
    assert torch.equal(model(x), want)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_what_somebody_gave_a_batch_norm_stays():
    """Hooks of every kind, parameters and attributes."""
    norm, seen = nn.BatchNorm2d(8), []
    norm.register_forward_hook(lambda module, args, kwargs, out: seen.append("forward"), with_kwargs=True)
    norm.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    norm.tag, norm.extra = "mine", nn.Parameter(torch.ones(1))
    model, weight = nn.Sequential(norm), norm.weight
    gnt.convert(model, batch_norm=True)
    assert (norm.tag, norm.weight is weight, norm.num_channels) == ("mine", True, 8)
    assert set(norm.state_dict()) == {"weight", "bias", "extra"}
    model(torch.randn(2, 8, 3, 3, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]
    assert copy.deepcopy(model)[0].tag == "mine"


@pytest.mark.parametrize("bad", [None, "model", torch.zeros(3)])
def test_what_is_no_model_is_refused(bad):
    for function in (gnt.convert, gnt.revert):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function(bad)


def test_a_single_norm_and_a_shared_one():
    norm = nn.GroupNorm(2, 4)
    gnt.convert(norm)
    assert type(norm) is gnt.GroupNorm
    shared = nn.GroupNorm(2, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.SiLU()))
    x = torch.randn(2, 4, 3)
    want = model(x)
    report = gnt.convert(model)
    assert (report.count("swapped"), report.count("fused")) == (1, 2)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_becomes_a_group_norm(affine):
    """Where the data are as the running statistics say, the GroupNorm gives what the BatchNorm gave."""
    torch.manual_seed(0)
    batch_norm = nn.BatchNorm2d(8, affine=affine)
    with torch.no_grad():
        batch_norm.running_mean.normal_()
        batch_norm.running_var.uniform_(0.5, 2)
        if affine:
            batch_norm.weight.normal_()
            batch_norm.bias.normal_()
    noise = torch.randn(1, 8, 400, 400)
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True)
    x = noise * batch_norm.running_var.sqrt()[:, None, None] + batch_norm.running_mean[:, None, None]
    want = batch_norm.eval()(x)
    model = nn.Sequential(batch_norm, nn.ReLU())
    report = gnt.convert(model, batch_norm=True)
    assert report.count("replaced") == 1
    assert type(model[0]) is gnt.GroupNorm
    torch.testing.assert_close(model(x), want.relu(), rtol=1e-3, atol=1e-3)
    model(x).sum().backward()


def test_tracing_does_not_call_train():
    """A module's train may do more than set flags; and a compiled one keeps its own."""

    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.after, self.calls = nn.GroupNorm(2, 4), nn.ReLU(), 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

        def forward(self, x):
            return self.after(self.norm(x))

    model = nn.Sequential(Merging(), torch.jit.script(nn.Dropout()))
    before = model[0].calls
    gnt.convert(model, across_modules=True)
    assert model[0].calls == before
    assert all(module.training for module in model.modules())


def test_batch_norms_that_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4))
    model[0].forward = functools.partial(torch.relu)
    report = gnt.convert(model, batch_norm=True)
    assert [(change.name, change.action) for change in report.changes] == [
        ("0", "skipped"), ("1", "skipped"), ("2", "replaced"),
    ]  # fmt: skip


def test_names_that_are_taken():
    norm = nn.GroupNorm(2, 4)
    norm.activation = nn.ReLU()
    report = gnt.convert(nn.Sequential(norm))
    assert report.count("skipped") == 1
    assert type(norm) is nn.GroupNorm
    assert isinstance(norm.activation, nn.ReLU)


def test_nothing_is_fused_into_a_norm_that_has_an_activation():
    model = nn.Sequential(gnt.GroupNorm(2, 4, activation="silu"), nn.ReLU())
    assert gnt.convert(model).count("fused") == 0


def test_a_norm_that_was_parametrized_afterwards_is_reported():
    model = nn.Sequential(nn.GroupNorm(2, 4))
    gnt.convert(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert gnt.revert(model).count("skipped") == 1


def test_a_dropout_that_acts_in_training_is_passed_over_in_eval():
    """Converted while it trains, as a model is when it is made."""
    norm, x = torch.nn.GroupNorm(4, 8), torch.randn(3, 8, 5)
    model = torch.nn.Sequential(norm, torch.nn.Dropout(0.2), torch.nn.ReLU())
    assert gnt.convert(model).count("fused") == 1
    torch.manual_seed(0)
    found = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, F.relu(F.dropout(F.group_norm(x, 4), 0.2, True)))
    model.eval()
    calls = []
    norm.normalized = lambda *arguments: calls.append(arguments[1:]) or gnt.GroupNorm.normalized(norm, *arguments)
    torch.testing.assert_close(model(x), F.relu(F.group_norm(x, 4)))
    assert calls == [("relu",)]


def test_a_norm_that_works_in_place_is_not_fused():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = gnt.GroupNorm(4, 8, inplace=True), torch.nn.ReLU()

        def forward(self, x):
            v = self.norm(x)
            v = self.act(v)
            return v + x

    x, block = torch.randn(3, 8, 5), Block()
    with torch.no_grad():
        want = block(x.clone())
        assert gnt.convert(block).count("fused") == 0
        torch.testing.assert_close(block(x.clone()), want)


def test_a_sequential_with_an_order_of_its_own_is_left_alone():
    class Backwards(torch.nn.Sequential):
        def __iter__(self):
            return reversed(list(super().__iter__()))

    model, x = Backwards(torch.nn.GroupNorm(4, 8), torch.nn.ReLU()), torch.randn(3, 8, 5)
    want = model(x)
    assert "order" in str(gnt.convert(model))
    torch.testing.assert_close(model(x), want)


def test_forwards_that_were_replaced_in_pytorchs_classes_stay(monkeypatch):
    model, x = torch.nn.Sequential(torch.nn.GroupNorm(4, 8), torch.nn.SiLU()), torch.randn(3, 8, 5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.SiLU, "forward", lambda self, x: 3 * x)
        assert gnt.convert(model).count("fused") == 0
        torch.testing.assert_close(model(x), 3 * F.group_norm(x, 4))
    gnt.revert(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: 2 * x)
        assert "replaced" in str(gnt.convert(model))
        torch.testing.assert_close(model(x), F.silu(2 * x))


def test_batch_norms_whose_weight_is_computed_are_left_alone():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.BatchNorm1d(8))
    from torch.nn.utils import prune

    prune.l1_unstructured(model[1], "weight", 0.5)
    report = gnt.convert(model, batch_norm=True)
    assert (report.count("replaced"), report.count("skipped")) == (1, 1)
    assert type(model[1]) is torch.nn.BatchNorm1d


def test_modules_that_work_in_place_can_be_traced():
    x = torch.randn(3, 8, 5)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(gnt.GroupNorm(4, 8, inplace=True)))
    torch.testing.assert_close(traced(x), F.group_norm(x, 4))
