"""Caffe2's nets as ONNX models: run by onnxruntime beside `run_net`, and what is refused."""

import numpy as np
import pytest

from groupnorm import DtypeError, GroupNormError, OptionError, ShapeError, caffe2

pytest.importorskip("google.protobuf")
onnx = pytest.importorskip("onnx")
F = np.float32


def norm(inputs, outputs, name="", **arguments):
    return caffe2.create_operator("GroupNorm", inputs.split(), outputs.split(), name=name, **arguments)


def data(shape, C, names=("g", "b"), seed=0):
    rng = np.random.default_rng(seed)
    return {"X": rng.standard_normal(shape, F) + F(0.5), **{name: rng.standard_normal(C, F) for name in names}}


def run(model, feeds):
    """Outputs by name, from onnxruntime, on what the model's inputs need of the feeds."""
    session = pytest.importorskip("onnxruntime").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    feeds = {given.name: feeds[given.name] for given in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def check(net, workspace, **options):
    """The model's outputs are those of run_net; returns the model."""
    model = caffe2.to_onnx(net, **options)
    wanted = caffe2.run_net(net, workspace)
    got = run(model, workspace)
    assert got
    for name, array in got.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    return model


def kinds(model):
    return [node.op_type for node in model.graph.node]


def outputs(model):
    return [output.name for output in model.graph.output]


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_rank_order_and_number_of_outputs(order, spatial, count):
    shape = (2, 6, *spatial) if order == "NCHW" else (2, *spatial, 6)
    net = caffe2.NetDef(op=[norm("X g b", " ".join(["Y", "m", "s"][:count]), group=3, epsilon=0.01, order=order)])
    shapes = {} if len(shape) == 4 else {"X": [None, *(f"d{i}" for i in range(1, len(shape)))]}
    model = check(net, data(shape, 6), shapes=shapes)
    assert outputs(model) == ["Y", "m", "s"][:count]
    assert ("Transpose" in kinds(model)) == (order == "NHWC" and spatial != ())


def test_the_node_is_that_of_opset_21():
    model = caffe2.to_onnx(caffe2.NetDef(name="n", op=[norm("X g b", "Y", group=4, epsilon=0.25)]))
    [node] = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (node.op_type, list(node.input), list(node.output)) == ("GroupNormalization", ["X", "g", "b"], ["Y"])
    assert attributes == {"num_groups": 4, "epsilon": 0.25, "stash_type": onnx.TensorProto.FLOAT}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert (model.graph.name, model.producer_name, model.ir_version) == ("n", "groupnorm", 10)
    dims = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert dims == {"X": ["X_0", "X_1", "X_2", "X_3"], "g": ["g_0"], "b": ["b_0"]}  # symbolic, rank 4
    assert {i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.output)} == {1}


def test_later_opsets():
    net = caffe2.NetDef(op=[norm("X g b", "Y m s", group=2)])
    model = check(net, data((2, 4, 3, 3), 4), opset=22)
    assert model.opset_import[0].version == 22
    for opset in (18, 20, 10_000, "21", None, 21.5):
        with pytest.raises(OptionError, match="opset must be 21 to "):
            caffe2.to_onnx(net, opset=opset)


def test_sizes_and_constants_of_other_kinds():
    net = caffe2.NetDef(op=[norm("X g b", "Y", group=2)])
    net.external_output.append("Y")
    workspace = data((2, 4, 3, 3), 4)
    swapped = {name: workspace[name].astype(">f4") for name in ("g", "b")}
    model = check(net, workspace, shapes={"X": np.array([2, 4, 3, 3])}, constants=swapped)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [2, 4, 3, 3]
    with pytest.raises(ShapeError, match="must divide the channels"):
        caffe2.to_onnx(net, shapes={"X": np.array([2, 5, 3, 3])})
    with pytest.raises(ShapeError, match="batch and a channel axis"):
        caffe2.to_onnx(net, shapes={"X": ()})
    with pytest.raises(ShapeError, match="whole numbers"):
        caffe2.to_onnx(net, shapes={"X": (2, 4.5, 3, 3)})


def test_a_chain_with_constants():
    net = caffe2.NetDef(op=[
        norm("X g b", "h m1 s1", "first", group=2, order="NHWC", is_test=0),
        norm("h g b2", "Y m2 s2", "second", group=4, order="NHWC", is_test=0),
    ])  # fmt: skip
    net.external_input.extend(["b2", "X", "g", "b"])
    net.external_output.extend(["Y", "s1"])
    workspace = data((2, 3, 5, 8), 8, ("g", "b", "b2"))
    workspace["g"] = workspace["g"].reshape(2, 4)  # any rank
    constants = {name: workspace[name] for name in ("g", "b")}
    model = check(net, workspace, constants=constants, shapes={"X": ["N", "H", "W", 8]})
    assert outputs(model) == ["Y", "s1"]
    assert [i.name for i in model.graph.input] == ["b2", "X"]  # in the order of external_input
    assert {i.name: list(i.dims) for i in model.graph.initializer if i.name in constants} == {"g": [8], "b": [8]}
    assert [[d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim] for o in model.graph.output] == [
        ["N", "H", "W", 8], ["N", 2],
    ]  # fmt: skip
    whole = check(net, workspace, constants=workspace)  # a whole workspace: what is normalized stays an input
    assert [i.name for i in whole.graph.input] == ["X"]


def test_a_gamma_of_rank_four_as_an_input():
    net = caffe2.NetDef(op=[norm("X g b", "Y", group=2)])
    workspace = data((2, 4, 3, 3), 4)
    workspace["g"] = workspace["g"].reshape(1, 4, 1, 1)
    check(net, workspace, shapes={"g": [1, 4, 1, 1]})


def test_statistics_are_computed_only_where_somebody_reads_them():
    net = caffe2.NetDef(op=[norm("X g b", "Y m s", group=2)])
    net.external_output.append("Y")
    assert kinds(caffe2.to_onnx(net)) == ["GroupNormalization"]
    net.op.add().CopyFrom(norm("m g2 b2", "Z", group=1))  # reads the mean, (N, 2)
    net.external_output.append("Z")
    workspace = data((3, 4, 3, 3), 4) | {"g2": np.ones(2, F), "b2": np.zeros(2, F)}
    check(net, workspace)


def test_statistics_are_exact_where_the_mean_is_large():
    net = caffe2.NetDef(op=[norm("X g b", "Y m s", group=2)])
    workspace = data((2, 4, 16, 16), 4)
    workspace["X"] += F(3000)
    got, wanted = run(caffe2.to_onnx(net), workspace), caffe2.run_net(net, workspace)
    np.testing.assert_allclose(got["s"], wanted["s"], rtol=1e-4)  # a float32 of 3000^2 has a step of 1


def test_names_that_are_taken():
    net = caffe2.NetDef(op=[norm("X Y/nchw m/axis", "Y m s", group=2, order="NHWC")])
    check(net, data((2, 3, 3, 4), 4, ("Y/nchw", "m/axis")))


@pytest.mark.parametrize(
    ("ops", "options", "error", "message"),
    [
        ([], {}, OptionError, "the net has no operators"),
        ([("Relu", "X", "Y")], {}, OptionError, r"operator 0 \(Relu, no name\): only GroupNorm is exported"),
        ([("GroupNormGradient", "d X g b m s", "x y z")], {}, OptionError, "gradients have no ONNX operator"),
        ([("GroupNorm", "X g b", "Y m")], {}, OptionError, "operator 0 .* outputs: got 2"),
        ([("GroupNorm", "X g b", "X")], {}, OptionError, "blob 'X' is written after it was written or read"),
        ([("GroupNorm", "X g b", "Y")], {"shapes": {"V": [1]}}, OptionError, "shapes names V, which the net does not"),
        ([("GroupNorm", "X g b", "Y")], {"shapes": {"X": [4]}}, ShapeError, r"operator 0 .*got the shape \(4,\)"),
        ([("GroupNorm", "X g b", "Y")], {"shapes": {"X": [1, 48, 2]}}, ShapeError, "group = 32 and 48 channels"),
        (
            [("GroupNorm", "X g b", "Y")],
            {"shapes": {"X": [1, 64, 2], "b": [2, 4]}},
            ShapeError,
            r"'b' must have one element for each of the 64 channels of 'X': got the shape \(2, 4\)",
        ),
        ([("GroupNorm", "X g b", "Y")], {"constants": {"g": np.ones(4)}}, DtypeError, "constant 'g' must be float32"),
    ],
)
def test_what_is_refused(ops, options, error, message):
    net = caffe2.NetDef(op=[caffe2.create_operator(k, i.split(), o.split()) for k, i, o in ops])
    with pytest.raises(error, match=message):
        caffe2.to_onnx(net, **options)


def test_an_output_that_no_operator_writes():
    net = caffe2.NetDef(op=[norm("X g b", "Y m s", group=2)], external_output=["V"])
    with pytest.raises(GroupNormError, match="external_output names 'V', which no operator writes; it may be one of Y"):
        caffe2.to_onnx(net)


def test_without_onnx(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(GroupNormError, match="to_onnx needs onnx, which is not installed"):
        caffe2.to_onnx(caffe2.NetDef(op=[norm("X g b", "Y")]))
