"""BANKING77 through the mirror: the real data, collected, cleaned and validated by the real `dvc repro`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_end_to_end import EVERYTHING, ran, sh, working_tree

DIGESTS = ("b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b", "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d")
MIRROR = Path(os.environ.get("TRUNKLINE_MIRROR", ROOT.parent / "shared" / "mirror"))


@pytest.mark.slow
@pytest.mark.skipif(not all((MIRROR / digest).is_file() for digest in DIGESTS), reason="no mirror with BANKING77: set TRUNKLINE_MIRROR")
def test_the_data_of_banking77_comes_from_the_mirror_and_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_MIRROR", str(MIRROR))
    tree = working_tree(tmp_path / "trunkline", "banking77")
    done = sh(tree, "dvc", "repro", "validate")
    assert ran(done) == EVERYTHING[:4]
    manifest = json.loads((tree / "data/collect/manifest.json").read_text())
    assert [manifest[name]["rows"] for name in ("banking77-train", "banking77-test")] == [10_003, 3_080]
    assert [manifest[name]["sha256"] for name in ("banking77-train", "banking77-test")] == list(DIGESTS)
    summary = json.loads((tree / "data/preprocess/summary.json").read_text())
    assert summary["rows"]["test"] == 3_080, "the official test set is kept whole"
    assert 8_500 < summary["rows"]["train"] < 9_500
    assert summary["reasons"]["contaminated:test"] > 0 or summary["reasons"]["duplicate:exact"] > 0
    assert json.loads((tree / "data/validate/result.json").read_text())["success"] is True
