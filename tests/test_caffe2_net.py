"""Nets of Caffe2's GroupNorm: running them, and the gradient operators that are added to them."""

import numpy as np
import pytest

from groupnorm import DtypeError, GroupNormError, OptionError, ShapeError, caffe2, reference

pytest.importorskip("google.protobuf")

F = np.float32
EPS = float(F(1e-5))


def norm(inputs, outputs, name="", **arguments):
    return caffe2.create_operator("GroupNorm", inputs.split(), outputs.split(), name=name, **arguments)


def chain():
    """X -> h -> Y, in different groups and orders, with their own gammas and betas."""
    return caffe2.NetDef(name="chain", op=[
        norm("X g1 b1", "h mu1 rsig1", "first", group=2, is_test=0),
        norm("h g2 b2", "Y mu2 rsig2", "second", group=5, order="NHWC", epsilon=0.125, is_test=0),
    ])  # fmt: skip


def branches():
    """X -> h; h -> Y and h -> Z; X -> W as well; all with one gamma, and every beta is that gamma's blob or b."""
    return caffe2.NetDef(op=[
        norm("X g b", "h mu0 rsig0", group=2),
        norm("h g b", "Y mu1 rsig1", group=4),
        norm("h g g", "Z mu2 rsig2", group=1),
        norm("X g b", "W mu3 rsig3", group=8),
    ])  # fmt: skip


def blobs(shape=(2, 8, 3, 4), names=("g", "b"), seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape[1], F) for name in names}
    return {"X": rng.standard_normal(shape, F), **arrays}


def near(got, wanted):
    assert got.dtype == F
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= 2e-6 * np.linalg.norm(wanted)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_chain_runs():
    given = blobs((2, 6, 3, 5), ("g1", "b1")) | blobs((2, 5), ("g2", "b2"), 1) | blobs((2, 6, 3, 5), ())
    before = dict(given)
    got = caffe2.run_net(chain(), given)
    assert given == before  # the workspace is left as it is
    assert set(got) == {"X", "g1", "b1", "g2", "b2", "h", "mu1", "rsig1", "Y", "mu2", "rsig2"}
    h, mu, rsig = reference.group_norm(given["X"], 2, given["g1"], given["b1"], eps=EPS)
    for name, wanted in (("h", h), ("mu1", mu), ("rsig1", rsig)):
        np.testing.assert_allclose(got[name], wanted, atol=1e-5)
    wanted = reference.group_norm(got["h"], 5, given["g2"], given["b2"], eps=0.125, layout="NHWC")
    for name, right in zip(("Y", "mu2", "rsig2"), wanted, strict=True):
        np.testing.assert_allclose(got[name], right, atol=1e-5)


def test_a_gradient_operator_runs():
    given = blobs() | {"dY": blobs(seed=1)["X"]}
    forward = norm("X g b", "Y m s", group=4, order="NCHW", is_test=0)
    gradient = caffe2.create_operator("GroupNormGradient", ["dY", "X", "g", "b", "m", "s"], ["dX", "dg", "db"], group=4)
    got = caffe2.run_net(caffe2.NetDef(op=[forward, gradient]), given)
    wanted = reference.group_norm_backward(given["dY"], given["X"], 4, given["g"], given["b"], eps=EPS)
    for name, right in zip(("dX", "dg", "db"), wanted, strict=True):
        near(got[name], right)


def test_one_output_and_names_that_are_written_again():
    net = caffe2.NetDef(op=[norm("X g b", "Y", group=2), norm("Y g b", "X", group=2)])
    given = blobs()
    once = caffe2.GroupNormOp(2)(given["X"], given["g"], given["b"])[0]
    got = caffe2.run_net(net, given)
    assert np.array_equal(got["X"], caffe2.GroupNormOp(2)(once, given["g"], given["b"])[0])


def test_an_empty_net_and_an_empty_batch():
    assert caffe2.run_net(caffe2.NetDef(), {"X": 1}) == {"X": 1}
    net, _ = caffe2.add_gradient_operators(branches(), ["Y", "Z", "W"])
    got = caffe2.run_net(net, blobs((0, 8, 3, 4)))
    assert got["X_grad"].shape == (0, 8, 3, 4)
    assert np.array_equal(got["g_grad"], np.zeros(8))


@pytest.mark.parametrize(
    ("op", "error", "message"),
    [
        (("Conv", ["X"], ["Y"]), OptionError, r"operator 1 \(Conv, name 'bad'\): only GroupNorm, GroupNormGradient"),
        (("", ["X"], ["Y"]), OptionError, r"operator 1 \(no type, name 'bad'\)"),
        (("GroupNorm", ["X", "g", "no"], ["Y"]), GroupNormError, "there is no blob 'no': neither the workspace nor"),
        (("GroupNorm", ["X", "g", "b"], ["Y"], {"group": 2.0}), OptionError, r"group must be an int \(i\)"),
        (("GroupNorm", ["X", "g", "b"], ["Y"], {"group": "2"}), OptionError, r"got a string \(s\)"),
        (("GroupNorm", ["X", "g", "b"], ["Y"], {"order": 1}), OptionError, r"order must be a string \(s\)"),
        (("GroupNorm", ["X", "g", "b"], ["Y"], {"order": "CHWN"}), OptionError, "got 'CHWN'"),
        (("GroupNorm", ["X", "g"], ["Y"]), OptionError, "inputs: got 2"),
        (("GroupNorm", ["X", "g", "b"], ["Y", "m"]), OptionError, "outputs: got 2"),
        (("GroupNorm", ["X", "g", "b"], ["Y"], {"group": 3}), ShapeError, "group must divide .* 3 and 8 channels"),
        (("GroupNorm", ["X", "g", "b"], ["Y"]), ShapeError, "got group = 32 and 8 channels"),
        (("GroupNorm", ["X", "X", "b"], ["Y"], {"group": 2}), ShapeError, "gamma must have one element"),
        (("GroupNorm", ["double", "g", "b"], ["Y"], {"group": 2}), DtypeError, "X must be float32: got float64"),
        (("GroupNormGradient", list("XXgb"), list("abc"), {"group": 2}), OptionError, "inputs: got 4"),
        (("Sum", ["X", "g"], ["Y"]), ShapeError, r"one shape: got \(2, 8, 3, 4\) and, as input 1, \(8,\)"),
        (("Sum", [], ["Y"]), OptionError, "Sum must have inputs and 1 output"),
        (("Sum", ["X"], ["Y", "Z"]), OptionError, "Sum must have inputs and 1 output"),
        (("ConstantFill", [], ["Y"], {"shape": [2]}), OptionError, "must have 1 input, 1 output.*got 0, 1 and shape"),
        (("ConstantFill", ["X"], ["Y"], {"value": 1}), OptionError, r"value must be a float \(f\): got an int"),
    ],
)  # fmt: skip
def test_errors_name_the_operator(op, error, message):
    kind, inputs, outputs, *arguments = op
    bad = caffe2.create_operator(kind, inputs, outputs, name="bad", **(arguments[0] if arguments else {}))
    net = caffe2.NetDef(op=[norm("X g b", "h", group=2), bad])
    with pytest.raises(error, match=message) as caught:
        caffe2.run_net(net, blobs() | {"double": np.ones((2, 8))})
    assert str(caught.value).startswith(f"operator 1 ({kind or 'no type'}, name 'bad'): ")
    assert "\n" not in str(caught.value)


def test_definitions_are_checked_before_anything_runs():
    net = caffe2.NetDef(op=[norm("X g missing", "Y"), caffe2.create_operator("Relu", ["Y"], ["Z"])])
    with pytest.raises(OptionError, match=r"operator 1 \(Relu, no name\)"):
        caffe2.run_net(net, blobs())


def test_num_groups_is_warned_of():
    given = blobs((2, 32, 3))
    with pytest.warns(caffe2.IgnoredArgumentWarning, match="num_groups"):
        got = caffe2.run_net(caffe2.NetDef(op=[norm("X g b", "Y m s", num_groups=8)]), given)
    assert got["m"].shape == (2, 32)
    with pytest.warns(caffe2.IgnoredArgumentWarning) as caught:
        caffe2.add_gradient_operators(caffe2.NetDef(op=[norm("X g b", "Y m s", num_groups=8)]), ["Y"])
    assert len(caught) == 1


# ---- the gradient of one operator ------------------------------------------------------------------------------------


def test_the_gradient_maker():
    op = norm("a/X g b", "Y m s", "gn", group=4, order="NHWC", epsilon=0.5, is_test=0)
    op.device_option.device_type, op.device_option.device_id, op.engine, op.debug_info = 1, 2, "CUDNN", "there"
    made = caffe2.get_group_norm_gradient(op)
    wanted = caffe2.create_operator(
        "GroupNormGradient", ["Y_grad", "a/X", "g", "b", "m", "s"], ["a/X_grad", "g_grad", "b_grad"],
        group=4, order="NHWC", epsilon=0.5, is_test=0,
    )  # fmt: skip
    wanted.device_option.device_type, wanted.device_option.device_id, wanted.engine = 1, 2, "CUDNN"
    wanted.is_gradient_op = True
    assert made == wanted
    assert made.name == ""
    assert caffe2.operator_from_definition(made) == caffe2.GroupNormGradientOp(4, "NHWC")
    assert op.type == "GroupNorm"  # what was given is left as it is
    plain = caffe2.get_group_norm_gradient(norm("X g b", "Y m s"))
    assert {field.name for field, _ in plain.ListFields()} == {"type", "name", "input", "output", "is_gradient_op"}


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (("X g b", "Y"), "the gradient needs mean and inv_std, which the operator does not give: got 1 output"),
        (("X g b", "Y m"), "outputs: got 2"),
        (("X g", "Y m s"), "inputs: got 2"),
    ],
)
def test_the_gradient_maker_refuses(op, message):
    with pytest.raises(OptionError, match=rf"operator \(GroupNorm, name 'gn'\): .*{message}"):
        caffe2.get_group_norm_gradient(norm(*op, "gn", group=2))


def test_the_gradient_maker_refuses_other_operators():
    for kind in ("GroupNormGradient", "Relu", ""):
        with pytest.raises(OptionError, match=r"operator \(.*no name\): the operator must be GroupNorm"):
            caffe2.get_group_norm_gradient(caffe2.create_operator(kind, ["X"], ["Y"]))


# ---- the gradient of a net -------------------------------------------------------------------------------------------


def rows(net, start=0):
    return [(op.type, " ".join(op.input), " ".join(op.output)) for op in net.op[start:]]


def test_a_chain_is_gone_through_backwards():
    net = chain()
    before = chain()
    new, gradients = caffe2.add_gradient_operators(net, {"Y": "dY"})
    assert net == before
    assert list(new.op[:2]) == list(net.op)
    assert rows(new, 2) == [
        ("GroupNormGradient", "dY h g2 b2 mu2 rsig2", "h_grad g2_grad b2_grad"),
        ("GroupNormGradient", "h_grad X g1 b1 mu1 rsig1", "X_grad g1_grad b1_grad"),
    ]
    assert gradients == {name: f"{name}_grad" for name in ("X", "h", "g1", "b1", "g2", "b2")} | {"Y": "dY"}

    given = blobs((2, 6, 3, 5), ("g1", "b1")) | blobs((2, 5), ("g2", "b2"), 1) | blobs((2, 6, 3, 5), ())
    given["dY"] = blobs((2, 6, 3, 5), (), 2)["X"]
    got = caffe2.run_net(new, given)
    h, _, _ = reference.group_norm(given["X"], 2, given["g1"], given["b1"], eps=EPS)
    dh, dg2, db2 = reference.group_norm_backward(given["dY"], h, 5, given["g2"], given["b2"], eps=0.125, layout="NHWC")
    dX, dg1, db1 = reference.group_norm_backward(dh, given["X"], 2, given["g1"], given["b1"], eps=EPS)
    for blob, wanted in {"h": dh, "g2": dg2, "b2": db2, "X": dX, "g1": dg1, "b1": db1}.items():
        near(got[gradients[blob]], wanted)


def test_branches_are_summed():
    new, gradients = caffe2.add_gradient_operators(branches(), {"Y": "dY", "Z": "dZ", "W": "dW"})
    # Caffe2's names: the gradient that is made first keeps its name, the others get numbers, and Sum works in place.
    assert rows(new, 4) == [
        ("GroupNormGradient", "dW X g b mu3 rsig3", "X_grad g_grad b_grad"),
        ("GroupNormGradient", "dZ h g g mu2 rsig2", "h_grad _g_grad_autosplit_0 _g_grad_autosplit_1"),
        ("GroupNormGradient", "dY h g b mu1 rsig1", "_h_grad_autosplit_0 _g_grad_autosplit_2 _b_grad_autosplit_0"),
        ("Sum", "h_grad _h_grad_autosplit_0", "h_grad"),
        ("GroupNormGradient", "h_grad X g b mu0 rsig0", "_X_grad_autosplit_0 _g_grad_autosplit_3 _b_grad_autosplit_1"),
        ("Sum", "X_grad _X_grad_autosplit_0", "X_grad"),
        ("Sum", "g_grad _g_grad_autosplit_0 _g_grad_autosplit_1 _g_grad_autosplit_2 _g_grad_autosplit_3", "g_grad"),
        ("Sum", "b_grad _b_grad_autosplit_0 _b_grad_autosplit_1", "b_grad"),
    ]
    given = blobs() | {name: blobs(seed=i)["X"] for i, name in enumerate(("dY", "dZ", "dW"), 1)}
    got = caffe2.run_net(new, given)

    X, g, b = (given[name].astype(float) for name in ("X", "g", "b"))

    def vjp(dy, x, groups, bias):
        return reference.group_norm_backward(dy, x, groups, g, bias, eps=EPS)

    h, _, _ = reference.group_norm(X, 2, g, b, eps=EPS)
    of_W, of_Y, of_Z = vjp(given["dW"], X, 8, b), vjp(given["dY"], h, 4, b), vjp(given["dZ"], h, 1, g)
    dh = of_Y[0] + of_Z[0]
    of_h = vjp(dh, X, 2, b)
    near(got[gradients["h"]], dh)
    near(got[gradients["X"]], of_W[0] + of_h[0])
    near(got[gradients["g"]], of_W[1] + of_Y[1] + of_Z[1] + of_Z[2] + of_h[1])
    near(got[gradients["b"]], of_W[2] + of_Y[2] + of_h[2])


def test_gradients_of_ones():
    new, gradients = caffe2.add_gradient_operators(chain(), ["Y"])
    assert rows(new, 2)[0] == ("ConstantFill", "Y", "Y_autogen_grad")
    assert gradients["Y"] == "Y_autogen_grad"
    given = blobs((2, 6, 3, 5), ("g1", "b1")) | blobs((2, 5), ("g2", "b2"), 1) | blobs((2, 6, 3, 5), ())
    got = caffe2.run_net(new, given)
    assert np.array_equal(got["Y_autogen_grad"], np.ones((2, 6, 3, 5)))
    assert np.array_equal(got["b2_grad"], np.full(5, 36))
    assert caffe2.add_gradient_operators(chain(), {"Y": None}) == (new, gradients)


@pytest.mark.parametrize("name", ["dh", "h_grad", None])
def test_a_gradient_is_given_for_a_blob_that_is_also_read(name):
    new, gradients = caffe2.add_gradient_operators(chain(), {"Y": "dY", "h": name})
    given = blobs((2, 6, 3, 5), ("g1", "b1")) | blobs((2, 5), ("g2", "b2"), 1) | blobs((2, 6, 3, 5), ())
    given["dY"] = blobs((2, 6, 3, 5), (), 2)["X"]
    dh = np.ones((2, 6, 3, 5), F) if name is None else blobs((2, 6, 3, 5), (), 3)["X"]
    got = caffe2.run_net(new, given | ({} if name is None else {name: dh}))
    h, _, _ = reference.group_norm(given["X"], 2, given["g1"], given["b1"], eps=EPS)
    through = reference.group_norm_backward(given["dY"], h, 5, given["g2"], given["b2"], eps=0.125, layout="NHWC")[0]
    near(got[gradients["h"]], through + dh)
    near(
        got["X_grad"], reference.group_norm_backward(through + dh, given["X"], 2, given["g1"], given["b1"], eps=EPS)[0]
    )
    assert [op.type for op in new.op].count("Sum") == 1


def test_what_no_gradient_reaches_gets_none():
    net = branches()
    net.op.add().CopyFrom(norm("Y g b", "unused", group=2))  # one output: no gradient could be made
    new, gradients = caffe2.add_gradient_operators(net, {"Y": "dY"})
    assert [op.input[0] for op in new.op[5:] if op.type == "GroupNormGradient"] == ["dY", "h_grad"]
    assert set(gradients) == {"Y", "h", "X", "g", "b"}
    assert rows(caffe2.add_gradient_operators(net, {"h": "dh"})[0], 5) == [
        ("GroupNormGradient", "dh X g b mu0 rsig0", "X_grad g_grad b_grad")
    ]


def test_external_inputs_are_kept_true():
    net = chain()
    net.external_input.extend(["X", "g1", "b1", "g2", "b2"])
    new, _ = caffe2.add_gradient_operators(net, {"Y": "dY"})
    assert list(new.external_input) == ["X", "g1", "b1", "g2", "b2", "dY"]
    assert list(caffe2.add_gradient_operators(net, ["Y"])[0].external_input) == list(net.external_input)
    assert list(caffe2.add_gradient_operators(net, {"Y": "g1"})[0].external_input) == list(net.external_input)


def test_the_sum_is_on_the_device_of_its_gradients():
    net = branches()
    for op in net.op:
        op.device_option.device_type = 1
    new, _ = caffe2.add_gradient_operators(net, {"Y": "dY", "Z": "dZ"})
    assert {op.device_option.device_type for op in new.op} == {1}


@pytest.mark.parametrize(
    ("ops", "outputs", "error", "message"),
    [
        ([("Relu", "X", "Y")], ["Y"], OptionError, r"operator 0 \(Relu, no name\): gradients are made for nets of"),
        ([("GroupNorm", "X g b", "Y")], ["Y"], OptionError, r"operator 0 .*the gradient needs mean and inv_std"),
        ([("GroupNorm", "X g b", "Y m s")], ["V"], GroupNormError, "no blob 'V' .*its blobs are X, Y, b"),
        ([("GroupNorm", "X g b", "Y m s")], [], OptionError, "outputs must name at least one blob"),
        ([("GroupNorm", "X g b", "Y m s")], "Y", OptionError, r"got the string 'Y'; pass \['Y'\]"),
        ([("GroupNorm", "X g b", "Y m s")], ["m"], OptionError, "mean and inv_std carry no gradient .* for m;"),
        ([("GroupNorm", "X g b", "X m s")], ["X"], OptionError, "blob 'X' is written after it was written or read"),
        ([("GroupNorm", "X g b", "Y m s"), ("GroupNorm", "Z g b", "Y n t")], ["Y"], OptionError, "'Y' is written"),
        ([("GroupNorm", "X g b", "Y m s"), ("GroupNorm", "m g b", "Z n t")], ["Z"], OptionError,
         "operator 0 .*mean and inv_std carry no gradient"),
        ([("GroupNorm", "X g b", "X_grad m s")], ["X_grad"], OptionError, "'X_grad' would overwrite a blob"),
        ([("GroupNorm", "X g b", "Y m s")], {"Y": "X_grad"}, OptionError, "'X_grad' would overwrite a blob"),
    ],
)  # fmt: skip
def test_nets_that_have_no_gradient_here(ops, outputs, error, message):
    net = caffe2.NetDef(op=[caffe2.create_operator(k, i.split(), o.split()) for k, i, o in ops])
    with pytest.raises(error, match=message):
        caffe2.add_gradient_operators(net, outputs)
