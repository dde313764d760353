"""The benchmarks' table: every benchmark with rows is in it, a failure is shown, and Markdown stays in its cells."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.bench.__main__ import main
from tests.bench.rows import Row, markdown
from tests.bench.together import NAMES, measure_all
from tests.conftest import ROOT


def test_every_benchmark_with_rows_is_in_the_table() -> None:
    files = {file.stem for file in (ROOT / "tests/bench").glob("*.py") if "\ndef rows(" in file.read_text(encoding="utf-8")}
    assert {"start_up", "pipeline"} <= files <= set(NAMES)


def test_a_benchmark_that_fails_is_a_row_that_misses_its_bar(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = measure_all(["nowhere"])
    assert (row.what, row.met) == ("nowhere", False)
    assert "No module named 'tests.bench.nowhere'" in row.ours
    assert "Traceback" in capfd.readouterr().err


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["storag"])
    assert caught.value.code == 2
    assert "there is no benchmark 'storag'; there are: evaluate, tune" in capsys.readouterr().err


def test_markdown_has_one_line_per_row_and_shows_what_is_missed() -> None:
    rows = [
        Row(what="a | b", ours="1 s", theirs="2\ns", ratio=0.5, bar="1.1", met=True),
        Row(what="c", ours="", theirs="", ratio=float("nan"), bar="", met=False),
    ]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| what | ours | theirs | ratio | bar | met |"
    assert lines[2:] == ["| a &#124; b | 1 s | 2 s | 0.50 | 1.1 | yes |", "| c |  |  |  |  | NO |"]


def test_help_answers_without_measuring() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--markdown" in done.stdout
