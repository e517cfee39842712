"""Caffe2's definitions: the wire format, files of nets, arguments of operators, and messages of another copy."""

import os
import stat
import struct

import numpy as np
import pytest

from groupnorm import DtypeError, FileError, OptionError, caffe2

proto = pytest.importorskip("google.protobuf")

# A NetDef, byte by byte: each field is number << 3 | wire type (0 varint, 2 length and bytes, 5 four bytes), its value.
NET_BYTES = (
    b"\x0a\x01n"  # NetDef.name = 1: "n"
    b"\x12\x36"  # NetDef.op = 2, 54 bytes
    + b"\x0a\x01x\x0a\x01g\x0a\x01b"  # input = 1: "x", "g", "b"
    b"\x12\x01y"  # output = 2: "y"
    b"\x1a\x02gn"  # name = 3: "gn"
    b"\x22\x09GroupNorm"  # type = 4
    b"\x2a\x09\x0a\x05group\x18\x02"  # arg = 5, 9 bytes: name = 1, i = 3: 2
    b"\x2a\x08\x0a\x01e\x15" + struct.pack("<f", 0.5)  # arg = 5, 8 bytes: name = 1, f = 2: 0.5
    + b"\x32\x02\x08\x01"  # device_option = 6: device_type = 1: 1, CUDA
    b"\x48\x00"  # is_gradient_op = 9: false
    b"\x3a\x01x"  # NetDef.external_input = 7: "x"
    b"\x42\x01y"  # NetDef.external_output = 8: "y"
)  # fmt: skip


def norm(inputs="x g b", outputs="y", name="", **arguments):
    return caffe2.create_operator("GroupNorm", inputs.split(), outputs.split(), name=name, **arguments)


def a_net():
    op = norm("x g b", "y m s", "gn", group=2, epsilon=0.5, order="NHWC", is_test=0, ints=[1, 2], names=["a", "b"])
    op.arg.add(name="tensor").t.CopyFrom(caffe2.TensorProto(dims=[2], float_data=[1, 2], name="t"))
    op.arg[-1].t.segment.begin, op.arg[-1].t.segment.end = 0, 2
    op.arg.add(name="net").n.CopyFrom(caffe2.NetDef(name="inner"))
    op.device_option.device_type, op.device_option.device_id = 1, 3
    return caffe2.NetDef(name="näme", op=[op], type="dag", external_input=["x", "g", "b"], external_output=["y"])


# ---- the wire format -------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_net(tmp_path):
    (tmp_path / "n.pb").write_bytes(NET_BYTES)
    net = caffe2.load_net(tmp_path / "n.pb")
    [op] = net.op
    assert (net.name, list(net.external_input), list(net.external_output)) == ("n", ["x"], ["y"])
    assert (op.type, op.name, list(op.input), list(op.output)) == ("GroupNorm", "gn", ["x", "g", "b"], ["y"])
    assert [(a.name, a.i, a.f) for a in op.arg] == [("group", 2, 0), ("e", 0, 0.5)]
    assert (op.device_option.device_type, op.HasField("is_gradient_op"), op.is_gradient_op) == (1, True, False)
    caffe2.save_net(net, tmp_path / "again.pb")
    assert (tmp_path / "again.pb").read_bytes() == NET_BYTES


def test_a_tensor_is_packed_and_an_argument_is_not():
    floats = struct.pack("<2f", 1, 2)
    tensor = caffe2.TensorProto(dims=[2], float_data=[1, 2], int32_data=[3])
    assert tensor.SerializeToString() == b"\x08\x02\x1a\x08" + floats + b"\x22\x01\x03"
    assert caffe2.TensorProto().data_type == caffe2.TensorProto.FLOAT == 1
    argument = caffe2.Argument(floats=[1, 2], strings=[b"s"])
    assert argument.SerializeToString() == b"\x2d" + floats[:4] + b"\x2d" + floats[4:] + b"\x3a\x01s"


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("TensorProto", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]),
        ("Argument", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("DeviceOption", [1, 2, 3, 4, 5, 6]),
        ("OperatorDef", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("NetDef", [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_messages_are_those_of_caffe2(name, numbers):
    descriptor = getattr(caffe2, name).DESCRIPTOR
    assert (descriptor.full_name, [field.number for field in descriptor.fields]) == (f"caffe2.{name}", numbers)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pb", "net.pbtxt", "net.prototxt", "NET.PBTXT", "net"])
def test_round_trip(tmp_path, name):
    net, path = a_net(), tmp_path / name
    caffe2.save_net(net, path)
    assert caffe2.load_net(path) == net
    assert caffe2.load_net(str(path)) == net
    text = name.lower().endswith("txt")
    assert (b'type: "GroupNorm"' in path.read_bytes()) == text
    assert os.listdir(tmp_path) == [name]  # no temporary file


def test_text_as_people_write_it(tmp_path):
    (tmp_path / "n.pbtxt").write_text(
        'name: "n"  # a comment\n'
        'op {\n  input: "x" input: "g" input: "b"\n  output: "y"\n  type: "GroupNorm"\n'
        '  arg { name: "group" i: 4 }\n  arg { name: "order" s: "NHWC" }\n}\n'
    )
    [op] = caffe2.load_net(tmp_path / "n.pbtxt").op
    assert caffe2.operator_from_definition(op) == caffe2.GroupNormOp(group=4, order="NHWC")


def test_unknown_fields_survive(tmp_path):
    unknown = b"\xc2\xbb\x02\x03abc"  # field 5000, "abc"
    (tmp_path / "n.pb").write_bytes(NET_BYTES + unknown)
    net = caffe2.load_net(tmp_path / "n.pb")
    caffe2.save_net(net, tmp_path / "again.pb")
    assert (tmp_path / "again.pb").read_bytes() == NET_BYTES + unknown
    (tmp_path / "old.pbtxt").write_text("old")
    with pytest.raises(FileError, match=r"old\.pbtxt: the net has fields that this package does not know"):
        caffe2.save_net(net, tmp_path / "old.pbtxt")
    assert (tmp_path / "old.pbtxt").read_text() == "old"


def onnx_bytes():
    helper = pytest.importorskip("onnx").helper
    return helper.make_model(helper.make_graph([], "g", [], []), producer_name="someone").SerializeToString()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.pb", b"", "is empty"),
        ("n.pbtxt", b"", "is empty"),
        ("n.pb", NET_BYTES[:-1], "cannot be read as a binary NetDef: it is cut short"),
        ("n.pb", NET_BYTES[:40], "cannot be read as a binary NetDef"),
        ("n.pb", b'name: "n"\n', r"let its name end in \.pbtxt"),
        ("n.pb", b"\x93NUMPY\x01\x00", "NetDef"),
        ("n.pb", bytes(100), "cannot be read"),
        ("n.pb", b"\xc2\xbb\x02\x03abc", r"is not a NetDef \(no field of a NetDef is in it\)"),
        ("n.pb", b"\x12\x03\x0a\x01x", r"is not a NetDef \(operator 0 has no type\)"),
        ("n.pb", b"\x1a\x03dag", r"is not a NetDef \(neither a name nor an operator"),
        ("n.pb", b"\x12\x03\x22\x01\xff", "NetDef"),  # a type that is no UTF-8
        ("n.pb", b"\x12\x06\x22\x01T\x12\x01\xff", "NetDef"),  # nor is the name of an output
        ("n.pb", onnx_bytes, "NetDef"),
        ("n.pbtxt", NET_BYTES, "line 2"),
        ("n.pbtxt", b'name: "n"\nop {\n  typ: "x"\n}\n', r'line 3: .*"caffe2\.OperatorDef" has no field named "typ"'),
        ("n.pbtxt", b'name: "n"\nop {\n  type: 3\n}\n', "line 3: cannot be read as the text of a NetDef"),
        ("n.pbtxt", b'name: "n"\nop {\n', "line 2"),
        ("n.pbtxt", b'name: "n"\nnum_workers: x\n', "line 2"),
        ("n.prototxt", b'name: "n"\nname: "m"\n', "line 2"),
        ("n.pbtxt", b'name: "n"\n# \xff\n', "line 2 is not UTF-8 text"),
        ("n.pbtxt", b"# nothing\n", r"is not a NetDef \(no field"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(FileError, match=message) as caught:
        caffe2.load_net(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileError, match=r"no\.pb: cannot be read \(No such file"):
        caffe2.load_net(tmp_path / "no.pb")
    with pytest.raises(FileError, match=r"cannot be read \(Is a directory"):
        caffe2.load_net(tmp_path)
    with pytest.raises(FileError, match=r"n\.pb: there is no folder"):
        caffe2.save_net(a_net(), tmp_path / "missing" / "n.pb")
    (tmp_path / "folder.pb").mkdir()
    with pytest.raises(FileError, match=r"folder\.pb: is a folder"):
        caffe2.save_net(a_net(), tmp_path / "folder.pb")
    assert os.listdir(tmp_path) == ["folder.pb"]


def test_a_net_that_would_not_be_read_again(tmp_path):
    with pytest.raises(FileError, match="no field of a NetDef"):
        caffe2.save_net(caffe2.NetDef(), tmp_path / "n.pb")
    with pytest.raises(FileError, match="operator 1 has no type"):
        caffe2.save_net(caffe2.NetDef(op=[norm(), caffe2.OperatorDef()]), tmp_path / "n.pb")
    with pytest.raises(DtypeError, match=r"a caffe2\.NetDef message was expected: got OperatorDef"):
        caffe2.save_net(norm(), tmp_path / "n.pb")
    assert os.listdir(tmp_path) == []


def test_an_old_file_is_replaced_through_a_link(tmp_path):
    (tmp_path / "real.pb").write_bytes(b"old")
    (tmp_path / "link.pb").symlink_to(tmp_path / "real.pb")
    caffe2.save_net(a_net(), tmp_path / "link.pb")
    assert (tmp_path / "link.pb").is_symlink()
    assert caffe2.load_net(tmp_path / "real.pb") == a_net()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "real.pb").stat().st_mode) == 0o666 & ~mask


# ---- another copy of caffe2.proto ------------------------------------------------------------------------------------


def test_messages_of_another_copy(tmp_path):
    from groupnorm.caffe2.proto import _classes

    other = _classes.__wrapped__()  # a pool and classes of their own, as caffe2_pb2 would have
    net = other["NetDef"](name="n", op=[other["OperatorDef"](type="GroupNorm", input=list("xgb"), output=list("yms"))])
    assert not isinstance(net, caffe2.NetDef)
    caffe2.save_net(net, tmp_path / "n.pb")
    assert (tmp_path / "n.pb").read_bytes() == net.SerializeToString()
    assert isinstance(caffe2.get_group_norm_gradient(net.op[0]), caffe2.OperatorDef)
    ones = np.ones(32, np.float32)
    assert caffe2.run_net(net, {"x": np.ones((1, 32, 2), np.float32), "g": ones, "b": ones})["y"].shape == (1, 32, 2)
    with pytest.raises(DtypeError, match=r"a caffe2\.OperatorDef message was expected: got NetDef"):
        caffe2.get_group_norm_gradient(net)
    with pytest.raises(DtypeError, match="got str; make one with"):
        caffe2.run_net("n.pb", {})


# ---- arguments of operators ------------------------------------------------------------------------------------------


def test_arguments_are_read():
    op = norm(outputs="y m s", group=4, epsilon=0.25, order="NHWC", is_test=0, unknown=[1.0])
    assert caffe2.operator_from_definition(op) == caffe2.GroupNormOp(4, 0.25, "NHWC", False, 3)
    assert caffe2.operator_from_definition(norm()) == caffe2.GroupNormOp()
    gradient = caffe2.create_operator(
        "GroupNormGradient", list("abcdef"), list("xyz"), group=4, order="NHWC", epsilon="odd"
    )
    assert caffe2.operator_from_definition(gradient) == caffe2.GroupNormGradientOp(4, "NHWC")


def test_create_operator():
    op = caffe2.create_operator("T", ["a"], ["b"], name="n", i=1, flag=True, f=2.0, s="s", b=b"\xff", li=[1], lf=[1.0],
                                ls=["s"])  # fmt: skip
    held = {a.name: a for a in op.arg}
    assert (held["i"].i, held["flag"].i, held["f"].f, held["s"].s, held["b"].s) == (1, 1, 2.0, b"s", b"\xff")
    assert (list(held["li"].ints), list(held["lf"].floats), list(held["ls"].strings)) == ([1], [1.0], [b"s"])
    assert not held["i"].HasField("f")
    assert (list(op.input), list(op.output), op.name) == (["a"], ["b"], "n")
    device = caffe2.DeviceOption(device_type=1, device_id=2)
    op = caffe2.create_operator("T", "a", "b", control_input=["c"], device_option=device, engine="E", debug_info="d")
    assert (list(op.control_input), op.device_option, op.engine, op.debug_info) == (["c"], device, "E", "d")
    assert len(op.arg) == 0
    with pytest.raises(DtypeError, match="engine must be a string"):
        caffe2.create_operator("T", "a", "b", engine=1)
    op = caffe2.create_operator("T", "one", "blob", i=np.int64(1), f=np.float32(0.5))  # as in Caffe2, a single name
    assert (list(op.input), list(op.output), op.arg[0].i, op.arg[1].f) == (["one"], ["blob"], 1, 0.5)
    for value in (None, [1, "s"], {}, np.ones(2)):
        with pytest.raises(DtypeError, match="argument bad must be an int, a float, a string or a list"):
            caffe2.create_operator("T", [], [], bad=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": 2.0}, r"argument group must be an int \(i\): got a float \(f\)"),
        ({"group": "2"}, r"argument group must be an int \(i\): got a string \(s\)"),
        ({"group": [2]}, r"argument group must be an int \(i\): got a list of ints \(ints\)"),
        ({"group": []}, r"argument group must be an int \(i\): got no value"),
        ({"group": 0}, "group must be a whole number, at least 1: got 0"),
        ({"epsilon": 1}, r"argument epsilon must be a float \(f\): got an int \(i\)"),
        ({"epsilon": -1.0}, "epsilon must be a finite float32"),
        ({"order": 1}, r"argument order must be a string \(s\): got an int \(i\)"),
        ({"order": "NCWH"}, "order must be .* got 'NCWH'"),
        ({"order": b"\xff"}, r"got '\\\\xff'"),
        ({"is_test": 1.0}, r"argument is_test must be an int \(i\): got a float \(f\)"),
        ({"is_test": 0}, "is_test=0 must have 3 outputs: got 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(OptionError, match=message):
        caffe2.operator_from_definition(norm(**arguments))


def test_an_argument_that_stands_twice():
    op = norm(group=2)
    op.arg.add(name="group", i=2)
    assert caffe2.operator_from_definition(op).group == 2
    op.arg.add(name="group", i=4)
    with pytest.raises(OptionError, match="argument group stands twice, with different values"):
        caffe2.operator_from_definition(op)


def test_num_groups_is_ignored_and_said_to_be():
    with pytest.warns(caffe2.IgnoredArgumentWarning, match=r"GroupNorm, name 'gn'.*num_groups is ignored.*rename"):
        assert caffe2.operator_from_definition(norm(name="gn", num_groups=8)).group == 32
    assert issubclass(caffe2.IgnoredArgumentWarning, UserWarning)
    assert caffe2.operator_from_definition(norm(group=4, num_groups=8)).group == 4  # warnings are errors in tests


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (("Conv", "abc", "y"), "must be GroupNorm or GroupNormGradient: got 'Conv'"),
        (("GroupNorm", "ab", "y"), r"must have 3 \(X, gamma, beta\) inputs: got 2"),
        (("GroupNorm", "abc", "yz"), r"must have 1 \(Y\) or 3 \(Y, mean, inv_std\) outputs: got 2"),
        (("GroupNorm", "abc", ""), "outputs: got 0"),
        (("GroupNormGradient", "abc", "xyz"), r"must have 6 \(dY, X, gamma, beta, mu, inv_std\) inputs: got 3"),
        (("GroupNormGradient", "abcdef", "x"), r"must have 3 \(dX, dgamma, dbeta\) outputs: got 1"),
    ],
)
def test_blobs_are_counted(op, message):
    with pytest.raises(OptionError, match=message):
        caffe2.operator_from_definition(caffe2.create_operator(op[0], list(op[1]), list(op[2])))


def test_wrong_names_and_values_are_errors_of_the_package(tmp_path):
    for path in (None, 5, "zero\0byte.pb"):
        with pytest.raises(FileError):
            caffe2.load_net(path)
    (tmp_path / "deep.pbtxt").write_text("op { arg { n { " * 300)
    with pytest.raises(FileError, match="NetDef"):
        caffe2.load_net(tmp_path / "deep.pbtxt")
    caffe2.save_net(a_net(), str(tmp_path / "n.pb").encode())
    assert caffe2.load_net(str(tmp_path / "n.pb").encode()) == a_net()
    for wrong in ({"num_outputs": 3.0}, {"epsilon": 10**400}, {"order": np.array(["NCHW", "NHWC"])}):
        with pytest.raises(OptionError):
            caffe2.GroupNormOp(**wrong)
    with pytest.raises(OptionError, match="64 bits"):
        caffe2.create_operator("GroupNorm", ["X"], ["Y"], group=2**70)
    for arguments in ((5, ["X"], ["Y"]), ("GroupNorm", [1], ["Y"]), ("GroupNorm", None, ["Y"])):
        with pytest.raises(DtypeError):
            caffe2.create_operator(*arguments)
    for outputs in (None, {"Y": 5}, {"Y": ""}):
        with pytest.raises(OptionError, match="outputs"):
            caffe2.add_gradient_operators(a_net(), outputs)
    with pytest.raises(OptionError, match="workspace"):
        caffe2.run_net(a_net(), None)
    total = caffe2.NetDef(name="sum")
    total.op.append(caffe2.create_operator("Sum", ["a", "b"], ["c"]))
    for a in (None, "text", np.ones(2)):
        with pytest.raises(DtypeError):
            caffe2.run_net(total, {"a": a, "b": np.ones(2, np.float32)})
