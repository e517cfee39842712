"""Training: memory, automatic mixed precision, several processes, Opacus."""

import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

import groupnorm as gn  # noqa: E402
import groupnorm.torch as gnt  # noqa: E402

nn = torch.nn
F = torch.nn.functional


def run(program, *arguments):
    """What a program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_training_keeps_x_y_dx_dy_and_no_more(memory_format):
    """GroupNorm + SiLU, forward and backward: the peak is x, y, dx and dy; two operators of PyTorch keep one more."""
    program = f"""
        import pathlib, torch, groupnorm.torch as gnt
        torch.set_num_threads(1)

        def peak(norm):
            x = torch.randn(4, 64, 256, 256).to(memory_format=torch.{memory_format}).requires_grad_()  # 64 MB
            weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            y = norm(x, weight, bias)
            dy = torch.empty_like(y).fill_(1)
            y.backward(dy)
            return (status("VmHWM") - before) / (x.nbytes / 1024)

        def status(name):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name))

        def ours(x, weight, bias):
            return gnt.group_norm(x, 8, weight, bias, activation="silu")

        def stock(x, weight, bias):
            return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, weight, bias))

        small = torch.randn(1, 64, 8, 8).to(memory_format=torch.{memory_format})
        for norm in (ours, stock):
            norm(small.requires_grad_(), torch.ones(64, requires_grad=True), torch.zeros(64)).sum().backward()
        print(peak(ours), peak(stock))
    """
    ours, stock = map(float, run(program).split())
    assert ours < 3.15  # y, dy, dx beside x
    assert stock > ours + 0.8


def test_autocast_policies():
    x, weight, bias = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)
    assert gnt.get_autocast() == "keep"
    try:
        for policy, dtype in (("keep", torch.bfloat16), ("float32", torch.float32)):
            gnt.set_autocast(policy)
            assert gnt.get_autocast() == policy
            assert gnt.group_norm(x.bfloat16(), 4, weight, bias).dtype == torch.bfloat16
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = gnt.group_norm(x.bfloat16(), 4, weight, bias)
                assert y.dtype == dtype
                assert gnt.group_norm(x.double(), 4).dtype == torch.float64
                m = gnt.moments(x.bfloat16(), 4)
                assert gnt.normalize(x.bfloat16(), m).dtype == dtype
                with torch.no_grad():
                    assert gnt.GroupNorm(4, 8, inplace=True)(x.bfloat16()).dtype == dtype
                model = nn.Sequential(nn.Conv2d(8, 8, 1), gnt.GroupNorm(4, 8))
                assert model(x).dtype == dtype
                torch._dynamo.reset()
                assert torch.compile(model, backend="aot_eager", fullgraph=True)(x).dtype == dtype
            want = F.group_norm(x.bfloat16().float(), 4, weight, bias)
            torch.testing.assert_close(y, want.to(dtype))
    finally:
        gnt.set_autocast("keep")
    with pytest.raises(gn.OptionError, match="keep, float32"):
        gnt.set_autocast("bfloat16")


def test_many_gradients_at_once():
    """PyTorch's older vmap, which torch.autograd has of its own."""
    x = torch.randn(2, 4, 3, requires_grad=True)
    ours, stock = gnt.group_norm(x, 2, activation="tanh"), torch.tanh(F.group_norm(x, 2))
    dys = torch.randn(5, *x.shape)
    found, want = (torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0] for y in (ours, stock))
    torch.testing.assert_close(found, want)
    found, want = (
        torch.autograd.functional.jacobian(f, x, vectorize=True)
        for f in (lambda t: gnt.group_norm(t, 2), lambda t: F.group_norm(t, 2))
    )
    torch.testing.assert_close(found, want)


def test_gradients_of_16_bit_parameters_are_summed_in_float32():
    """Eight million ones: a sum in bfloat16 would stop at 256."""
    x = torch.randn(2, 2, 1500, 1400, dtype=torch.bfloat16)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    gnt.group_norm(x, 1, None, bias).backward(torch.ones_like(x))
    assert torch.equal(bias.grad, torch.full((2,), 2 * 1500 * 1400.0).bfloat16())


def test_checkpointing_of_a_converted_block():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
    gnt.convert(block)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    inputs = [x, *block.parameters()]
    want = torch.autograd.grad(block(x).square().sum(), inputs)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
        for tensor, gradient in zip(inputs, want, strict=True):
            assert torch.equal(tensor.grad, gradient)
            tensor.grad = None


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel over gloo: the same parameters after three steps as one process with the whole batch."""
    program = """
        import sys, torch, torch.distributed as dist, groupnorm.torch as gnt
        rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.SiLU(),
                                    torch.nn.Conv2d(8, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.ReLU())
        gnt.convert(model)
        data = torch.randn(3, 4, 3, 9, 9)
        wrapped = model
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for batch in data:
            mine = batch.chunk(world)[rank]
            optimizer.zero_grad()
            wrapped(mine).square().mean().backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/{world}-{rank}.pt")
        if world > 1:
            dist.destroy_process_group()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    both = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    run(program, "0", "1", str(tmp_path))
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, parameter in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_distributed_tensors(tmp_path):
    """A DTensor goes through PyTorch's own operations, however it is sharded, forward and backward."""
    program = """
        import sys, torch, torch.distributed as dist, groupnorm.torch as gnt
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        rank, folder = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        x, weight = torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(8)
        want = gnt.group_norm(x, 4, weight, activation="silu")
        want.square().sum().backward()
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            sharded = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
            y = gnt.group_norm(sharded, 4, distribute_tensor(weight, mesh, [Replicate()]), activation="silu")
            torch.testing.assert_close(y.full_tensor(), want)
            y.square().sum().backward()
            torch.testing.assert_close(sharded.grad.full_tensor(), x.grad, rtol=1e-4, atol=1e-4)
        dist.destroy_process_group()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_opacus_finds_per_sample_gradients(activation, monkeypatch):
    opacus = pytest.importorskip("opacus")
    from groupnorm.torch import per_sample

    calls, whole = [], per_sample.moments
    monkeypatch.setattr(per_sample, "moments", lambda *a: calls.append(a) or whole(*a))
    torch.manual_seed(0)
    norms = [gnt.GroupNorm(4, 8, activation=activation), gnt.GroupNorm(2, 8, bias=False)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 8, 3), norms[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(5, 3, 9, 9)
    want = []
    for sample in x:
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        want.append([parameter.grad.clone() for parameter in model.parameters()])
    model.zero_grad()
    sampled = opacus.GradSampleModule(model, loss_reduction="sum")
    sampled(x).square().sum().backward()
    assert len(calls) == 2
    for parameter, gradients in zip(model.parameters(), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(gradients), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_sample_gradients_of_any_type_and_on_every_road(dtype, activation):
    """For x far from 0, too, channels last, with a gradient that is expanded, and where a mode follows operations."""
    from torch.utils.flop_counter import FlopCounterMode

    from groupnorm.torch.per_sample import per_sample_gradients

    torch.manual_seed(0)
    norm = gnt.GroupNorm(4, 8, dtype=torch.promote_types(dtype, torch.float32), activation=activation)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (torch.randn(3, 8, 5, 6) + 20).to(dtype).to(memory_format=torch.channels_last)
    dy = torch.randn(3, 8, 1, 1).to(dtype).expand(x.shape)
    want = []
    for n in range(3):
        exact = gnt.GroupNorm(4, 8, dtype=torch.float64, activation=activation)
        exact.load_state_dict(norm.state_dict())
        want.append(
            torch.autograd.grad(exact(x[n : n + 1].double()), (exact.weight, exact.bias), dy[n : n + 1].double())
        )
    counting = FlopCounterMode(display=False)
    found = per_sample_gradients(norm, [x], dy)
    with counting:
        followed = per_sample_gradients(norm, [x], dy)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for parameter, gradients in zip((norm.weight, norm.bias), zip(*want, strict=True), strict=True):
        rounded = torch.stack(gradients).to(parameter.dtype)
        for one, times in ((found, 1), (followed, 50)):  # which takes the mean as one rounded number
            assert one[parameter].dtype == parameter.dtype
            torch.testing.assert_close(one[parameter], rounded, rtol=times * limit, atol=times * limit)


def test_gradients_that_are_to_be_differentiated_where_inputs_depend_on_each_other():
    """x made from the residual, or the same tensor: what goes from one to the other counts once."""
    x, dy = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5)
    weight = torch.randn(8, requires_grad=True)
    calls = (
        lambda: gnt.group_norm(2 * x, 4, residual=x),
        lambda: gnt.group_norm(x, 4, residual=x),
        lambda: gnt.group_norm(x, 4, weight, 2 * weight, scale=x.mean(2), activation="silu"),
    )
    for make in calls:
        y = make()
        (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (again,) = torch.autograd.grad(y, x, dy, create_graph=True)
        batch = torch.autograd.grad(y, x, torch.stack((dy, dy)), is_grads_batched=True)[0]
        torch.testing.assert_close(again, first)
        torch.testing.assert_close(batch, torch.stack((first, first)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_saved_tensors_that_come_back_with_other_strides(memory_format):
    """What a hook packs may be contiguous afterwards, as torch.autograd.graph.save_on_cpu leaves it."""
    x = torch.randn(3, 12, 7, 5).to(memory_format=memory_format)[:, :8].requires_grad_()
    scale = torch.randn(8, 3).t().requires_grad_()
    mask = torch.rand(3, 5, 7).swapaxes(1, 2) < 0.7

    def gradients():
        y = gnt.group_norm(x, 4, scale=scale, mask=mask)
        return torch.autograd.grad(y.square().sum(), (x, scale))

    want = gradients()
    pack = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    )
    with pack:
        got = gradients()
    for found in (got, gradients()):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_expanded_weights():
    """PyTorch's own per-sample gradients, of a converted model."""
    per_sample = pytest.importorskip("torch.nn.utils._per_sample_grad").call_for_per_sample_grads
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.GroupNorm(4, 8), nn.ReLU())
    x = torch.randn(3, 8, 5)
    per_sample(model)(x).sum().backward()
    want = [parameter.grad_sample for parameter in model.parameters()]
    for parameter in model.parameters():
        del parameter.grad_sample
    gnt.convert(model)
    per_sample(model)(x).sum().backward()
    for parameter, wanted in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_expanded_weights_with_a_residual_and_a_scale(activation):
    per_sample = pytest.importorskip("torch.nn.utils._per_sample_grad").call_for_per_sample_grads

    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            scale = x.mean(2)
            options = {"scale": scale, "shift": scale, "residual": x}
            if isinstance(self.norm, gnt.GroupNorm):
                return self.norm.normalized(x, activation, **options)
            y = self.norm(x) * (1 + scale[:, :, None]) + scale[:, :, None] + x
            return y if activation is None else F.relu(y)

    x, found = torch.randn(3, 8, 5), []
    for norm in (nn.GroupNorm(4, 8), gnt.GroupNorm(4, 8)):
        per_sample(Block(norm))(x).sum().backward()
        found.append([parameter.grad_sample for parameter in norm.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
