"""`groupnorm advise`: its tables, its JSON, and that whatever a model's module does is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from groupnorm.analysis import advisor, model_layers
from groupnorm.cli import app, main
from groupnorm.errors import EngineError
from stand_in_machine import roofline_of

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(advisor, "roofline", roofline_of({}))


def invoke(*arguments):
    result = CliRunner().invoke(app, ["advise", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_prints_the_choices_and_their_reasons():
    text = invoke("320", "--spatial", "64x64", "--task", "diffusion", "--layout", "NHWC").stdout
    flat = " ".join(text.split())
    assert "2x320x64x64 float32 for diffusion: 32 groups of 10 channels" in flat
    for part in ("Choices, best first", "unet/config.json", "34.7 %", "What BN -> GN costs", "Traps", "alignment"):
        assert part in flat
    assert max(map(len, text.splitlines())) <= 120


def test_the_command_as_json():
    found = json.loads(invoke("256", "--batch", "8", "--spatial", "7,7", "--dtype", "bfloat16", "--json").stdout)
    assert found["num_groups"] == found["choices"][0]["num_groups"] == 32
    assert found["spatial"] == [7, 7]
    assert found["norms"][1] == {"norm": "BN", "error_percent": 24.8, "note": found["norms"][1]["note"]}
    assert found["cost"]["saved_bytes"] == 8 * 256 * 49 * 2 + 8 * 8 * 32
    assert json.loads(invoke("1", "--spatial", "1", "--json").stdout)["num_groups"] is None


def test_the_command_answers_for_primes():
    result = invoke("7", "--spatial", "8x8")
    assert result.exit_code == 0
    assert "prime" in result.stdout


def test_the_command_has_help():
    text = invoke("--help").stdout
    assert "--json" in text
    assert "groupnorm advise" in text.partition("Example")[2]


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "CHANNELS"),
    (["0"], "channels must be at least 1"),
    (["--", "-5"], "channels must be at least 1"),
    (["many"], "channels"),
    (["99999999999999999999"], "at most"),
    (["64", "--spatial", "8x"], "64x64"),
    (["64", "--spatial", "0"], "spatial must be at least 1"),
    (["64", "--batch", "0"], "batch must be at least 1"),
    (["64", "--task", "speech"], "dp-sgd"),
    (["64", "--dtype", "int8"], "bfloat16"),
    (["64", "--layout", "CHWN"], "NHWC"),
    (["64", "--machine", "abacus"], "abacus"),
    (["64", "--input", "1,64,8,8"], "--model"),
    (["64", "--model", "a:b"], "either"),
])  # fmt: skip
def test_an_error_is_one_line_and_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["advise", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("groupnorm: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


# ---- --model ---------------------------------------------------------------------------------------------------------

NETS = """
import sys
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.GroupNorm(4, 32))

class Nets:
    Small = staticmethod(lambda: nn.Sequential(nn.GroupNorm(2, 8)))

model = build()
number = 3
def needs(argument): return model
def raises(): raise RuntimeError("no\\nweights [here]")
def leaves(): sys.exit("bye")
def gives_a_number(): return 3
def stops(): raise GeneratorExit
class Speechless(Exception):
    def __str__(self): raise ValueError
def says_nothing(): raise Speechless
def prints():
    print("building")
    return build()
class Leaving(nn.GroupNorm):
    def forward(self, x): sys.exit(3)
def leaves_when_run(): return Leaving(2, 8)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from groupnorm.analysis import model_advice

    monkeypatch.setattr(model_advice, "roofline", roofline_of({}))
    (tmp_path / "advised_nets.py").write_text(NETS, encoding="utf-8")
    (tmp_path / "advised_broken.py").write_text("import advised_nowhere\n", encoding="utf-8")
    (tmp_path / "advised_wrong.py").write_text("def build(:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    for name in ("advised_nets", "advised_broken", "advised_wrong"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["advised_nets:stops"], "GeneratorExit"),
        (["advised_nets:says_nothing"], "Speechless"),
        (["advised_nets:leaves_when_run", "--input", "2,8,4"], "SystemExit"),
        (["advised_nets:build", "--machine", "abacus"], "abacus"),
        (["advised_nets:build", "--spatial", "8x8"], "--spatial is for one layer"),
        (["advised_nets:build", "--dtype", "int8"], "--dtype is for one layer"),
        (["advised_nets:build", "--layout", "foo"], "--layout is for one layer"),
    ],
)
def test_whatever_a_model_does_is_one_line(nets, arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["advise", "--model", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_what_a_model_prints_is_not_among_the_answers(nets, capsys):
    with pytest.raises(SystemExit):
        main(["advise", "--model", "advised_nets:prints", "--input", "2,3,34,34", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert "building" in captured.err


@pytest.mark.parametrize("spec", ["advised_nets:build", "advised_nets:model"])
def test_a_model_is_advised_on_layer_by_layer(nets, spec):
    text = " ".join(invoke("--model", spec, "--input", "2,3,34,34").stdout.split())
    assert "1 BatchNorm2d 64 32x32 2 2048 - 32" in text
    assert "4 GroupNorm 32 30x30 8 7200 4 8" in text
    assert "BatchNorm with 2 samples: 34.7 %" in text


def test_a_model_as_json(nets):
    found = json.loads(invoke("--model", "advised_nets:build", "--input", "2x3x34x34", "--batch", "8", "--json").stdout)
    assert [layer["name"] for layer in found["layers"]] == ["1", "4"]
    assert found["layers"][0]["shape"] == [8, 64, 32, 32]
    assert found["machine"] == "a computer"


def test_a_factory_inside_a_class_without_an_input(nets):
    text = invoke("--model", "advised_nets:Nets.Small").stdout
    assert "no example inputs" in text


@pytest.mark.parametrize(("arguments", "said"), [
    (["advised_nets"], "module:factory"),
    ([":build"], "module:factory"),
    (["advised_missing:build"], "ModuleNotFoundError: No module named 'advised_missing'"),
    (["advised_broken:build"], "ModuleNotFoundError: No module named 'advised_nowhere'"),
    (["advised_wrong:build"], "SyntaxError"),
    ([".relative:build"], "cannot be imported: TypeError"),
    (["advised_nets:missing"], "has no missing"),
    (["advised_nets:raises"], "RuntimeError: no weights [here]"),
    (["advised_nets:leaves"], "SystemExit: bye"),
    (["advised_nets:needs"], "TypeError"),
    (["advised_nets:number"], "type int, neither"),
    (["advised_nets:gives_a_number"], "type int, no torch.nn.Module"),
    (["advised_nets:build", "--input", "2,3,oops"], "1,3,224,224"),
    (["advised_nets:build", "--input", "2,3,0,8"], "1,3,224,224"),
    (["advised_nets:build", "--input", "2,3," + 5000 * "9"], "1,3,224,224"),
    (["advised_nets:build", "--input", "999999,999999,9,9"], "more than"),
    (["advised_nets:build", "--input", "2,5,8,8"], "the model raised RuntimeError"),
    (["advised_nets:build", "--batch", "0"], "batch must be"),
    (["advised_nets:build", "--task", "speech"], "dp-sgd"),
    (["advised_nets:build", "--input", "2,3,34,34", "--machine", "abacus"], "abacus"),
])  # fmt: skip
def test_a_model_that_cannot_be_had_is_one_line(nets, arguments, said, capsys):
    test_an_error_is_one_line_and_exit_code_2(["--model", *arguments], said, capsys)


def test_the_current_folder_is_searched_by_the_installed_command_too(nets, tmp_path):
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from groupnorm.cli.model_factory import make_model\n"
        "print(type(make_model('advised_nets:build')).__name__)"
    )
    run = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{code}"],
                         capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)  # fmt: skip
    assert run.stdout.strip() == "Sequential"


def test_without_pytorch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match="pip install torch"):
        model_layers.import_torch()
