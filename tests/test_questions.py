"""Documents that show commands: what is run, what is written, what is refused; and that those of docs/ are commands."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from groupnorm.bench.questions import commands_in, fill
from groupnorm.cli import app
from groupnorm.errors import FileError

ROOT = Path(__file__).resolve().parents[1]
OPEN, CLOSE = "<!-- run: groupnorm {} -->", "<!-- /run -->"


def document(tmp_path, *lines):
    path = tmp_path / "page.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_command_is_run_and_its_output_shown(tmp_path):
    path = document(tmp_path, "before", OPEN.format("--version"), "old output", CLOSE, "after")
    assert fill(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["before", OPEN.format("--version")]
    assert lines[3:5] == ["```console", "$ groupnorm --version"]
    assert lines[5].startswith("groupnorm 0.")
    assert lines[-2:] == [CLOSE, "after"]
    assert "old output" not in lines
    assert not fill(path)
    assert [each.name for each in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((OPEN.format("--version"),), "no end"),
        ((OPEN.format("--version"), OPEN.format("info"), CLOSE), "no end"),
        ((CLOSE,), "without a marker"),
        ((OPEN.format("roofline 0x0"), CLOSE), "at least 1"),
    ],
)
def test_a_broken_document_stays_as_it_is(tmp_path, lines, said):
    path = document(tmp_path, *lines)
    before = path.read_bytes()
    with pytest.raises(FileError, match=said):
        fill(path)
    assert path.read_bytes() == before


def test_what_docs_show_are_commands_of_ours():
    commands = commands_in((ROOT / "docs" / "questions.md").read_text(encoding="utf-8"))
    assert {command.split()[1] for command in commands} >= {"roofline", "advise", "style", "compare"}
    for name in {command.split()[1] for command in commands}:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
