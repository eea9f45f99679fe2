"""README, as a newcomer takes it: commands and code run as they stand, links lead somewhere."""

import re
import shlex
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebert_kernels import cli
from tests import ROOT
from tests.compress.toys import WORDS, make_teacher

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *ROOT.glob("docs/*.md"),
]


def blocks(text):
    """The code of a document, as (language, code)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_commands_and_code_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """In one folder, one after the other. What installs is left to those who install."""
    pytest.importorskip("onnxruntime", reason="exporting needs the extra 'export'")
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    make_teacher(Path("path/to/fine-tuned-bert"))
    library = Path("library")  # whose texts tell how alike graphs are; all of them take seconds
    library.mkdir()
    for name in ("argparse.py", "string.py", "typing.py"):
        (library / name).write_bytes((Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    lines = [" ".join(WORDS[(7 * row + place) % 40] for place in range(4)) for row in range(60)]
    Path("sentences.txt").write_text("\n".join(lines))
    ran = []
    for language, code in blocks(README):
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
            ran.append("python")
            continue
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["moebert"]:
                done = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
                assert done.exit_code == 0, done.output
                ran.append(words[1])
    assert ran == ["compress", "python", "python", "export"]
    assert "'quality'" not in capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    """Files that were moved, headings that were renamed."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", name).strip().lower().replace(" ", "-") for name in headings}
            assert heading in anchors, target


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150
