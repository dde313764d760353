"""`dvc push` and `dvc pull` on S3 over a line that breaks: what arrived is whole, and the next try moves only what is missing."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.proxy import Proxy
from tests.toy import Toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 2**20
FILES = {f"part{number}.bin": 3 * MIB for number in range(8)} | {"large.bin": 30 * MIB}
TOTAL = sum(FILES.values())


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Proxy]]:
    """A client that is beside the proxy, and the proxy."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()  # it keeps what an earlier server of this process held
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="models")
    with Proxy(host, port) as proxy:
        yield client, proxy
        proxy.shutdown()
    server.stop()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: tuple[Any, Proxy]) -> Toy:
    """54 MiB in nine files of a tracked folder, with the remote behind the proxy."""
    toy = Toy(tmp_path / "toy", monkeypatch)
    made = random.Random(0)
    (toy.folder / "weights").mkdir()
    for name, size in FILES.items():
        (toy.folder / "weights" / name).write_bytes(made.randbytes(size))
    toy.dvc("add", "-q", "weights")
    toy.dvc("remote", "add", "-q", "-d", "store", "s3://models/trunkline")
    toy.dvc("remote", "modify", "store", "endpointurl", s3[1].address)
    toy.dvc("remote", "modify", "store", "verify", "true")
    toy.git("add", "-A")
    toy.git("commit", "-qm", "Track weights")
    return toy


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=False, capture_output=True, text=True)


def stored(client: Any) -> dict[str, tuple[Any, int]]:
    """Digest -> when it was written, and its size; each is what its name says."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for item in page.get("Contents", []):
            digest = "".join(item["Key"].split("/")[-2:])
            body = client.get_object(Bucket="models", Key=item["Key"])["Body"].read()
            assert hashlib.md5(body).hexdigest() == digest.removesuffix(".dir"), "half an object is on the remote"
            found[digest] = item["LastModified"], item["Size"]
    return found


def cached(folder: Path) -> dict[str, int]:
    """Digest -> size of every object in the cache; each is what its name says."""
    found = {}
    for path in (folder / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and len(path.name.removesuffix(".dir")) == 30:
            digest = path.parent.name + path.name
            assert hashlib.md5(path.read_bytes()).hexdigest() == digest.removesuffix(".dir"), "half an object is in the cache"
            found[digest] = path.stat().st_size
    return found


def test_a_push_that_was_cut_goes_on(toy: Toy, s3: tuple[Any, Proxy]) -> None:
    client, proxy = s3
    proxy.cut_after(int(0.6 * TOTAL))
    done = dvc(toy.folder, "push", "-j", "2", "weights.dvc")
    assert proxy.cut
    assert done.returncode != 0, "it does not call itself done"
    arrived = stored(client)
    assert 0 < len(arrived) < len(FILES)
    assert not any(digest.endswith(".dir") for digest in arrived), "the folder's listing comes last: it says that all is there"
    proxy.cut_after(None)
    assert dvc(toy.folder, "push", "-j", "2", "weights.dvc").returncode == 0
    whole = stored(client)
    assert len(whole) == len(FILES) + 1
    assert {digest: whole[digest] for digest in arrived} == arrived, "what had arrived was not written again"
    missing = sum(size for digest, (_, size) in whole.items() if digest not in arrived)
    assert missing <= proxy.up <= 1.05 * missing + MIB
    assert "in sync" in dvc(toy.folder, "status", "--cloud").stdout


def test_a_pull_that_was_cut_goes_on(toy: Toy, s3: tuple[Any, Proxy], tmp_path: Path) -> None:
    _, proxy = s3
    assert dvc(toy.folder, "push", "weights.dvc").returncode == 0
    toy.git("clone", "-q", str(toy.folder), str(tmp_path / "clone"))
    clone = tmp_path / "clone"
    proxy.cut_after(int(0.6 * TOTAL))
    done = dvc(clone, "pull", "-j", "2", "weights.dvc")
    assert proxy.cut
    assert done.returncode != 0
    arrived = cached(clone)
    assert 0 < len(arrived) < len(FILES)
    proxy.cut_after(None)
    assert dvc(clone, "pull", "-j", "2", "weights.dvc").returncode == 0
    missing = TOTAL - sum(arrived.values())
    assert missing <= proxy.down <= 1.05 * missing + MIB, f"{len(arrived)} files had arrived"
    assert {path.name: path.read_bytes() for path in (clone / "weights").iterdir() if path.suffix == ".bin"} == {
        name: (toy.folder / "weights" / name).read_bytes() for name in FILES
    }
    shutil.rmtree(clone / "weights")
    assert dvc(clone, "checkout", "weights.dvc").returncode == 0, "from the cache alone"
    assert set(cached(clone)) == set(cached(toy.folder))
