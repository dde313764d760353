"""Fetching: every kind of source, on real files, servers, databases and archives of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conf.errors import DataError, DigestMismatch, PolicyBreach, SourceError
from conf.schema import Access, Origin
from stages.sources import download, wheel
from stages.sources.download import backoff
from stages.sources.fetch import fetch
from stages.sources.policy import allows, check

ROOT = Path(__file__).parent.parent
STATED = {"licence": "MIT", "classification": "public"}
DATA = bytes(range(256)) * 8192  # 2 MiB: two chunks
WRONG = "0" * 64


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def origin(**keys: object) -> Origin:
    return TypeAdapter(Origin).validate_json(json.dumps(STATED | keys))


def get(source: Origin, retries: int = 2, timeout: float = 5.0, max_bytes: int = 10_000_000) -> list[Path]:
    return fetch("toy", source, retries=retries, timeout=timeout, max_bytes=max_bytes)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, no mirror, no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRUNKLINE_MIRROR", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "backoff", lambda state: 0.0)
    return tmp_path


# ---------------------------------------------------------------- http


class Site:
    """A web server whose answers a test writes; it keeps the Range of every request."""

    def __init__(self) -> None:
        self.ranges: list[str | None] = []
        self.answer: Callable[[BaseHTTPRequestHandler, int], None] = lambda handler, number: send(handler)
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.ranges.append(self.headers["Range"])
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    site.answer(self, len(site.ranges))

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/rows.jsonl"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def send(handler: BaseHTTPRequestHandler, data: bytes = DATA, cut: int | None = None, ranges: bool = True) -> None:
    """Answer with data from the asked offset on; `cut`: hang up after so many bytes."""
    asked = handler.headers["Range"] if ranges else None
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if start >= len(data):
        handler.send_response(416)
        handler.end_headers()
        return
    handler.send_response(206 if asked else 200)
    handler.send_header("Content-Length", str(len(data) - start))
    if asked:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.end_headers()
    handler.wfile.write(data[start : None if cut is None else start + cut])


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


def web(site: Site, sha256: str = digest(DATA)) -> Origin:
    return origin(kind="http", url=site.url, sha256=sha256)


def test_http_is_fetched_once_and_then_cached(site: Site) -> None:
    (path,) = get(web(site))
    assert path.read_bytes() == DATA and path.name == digest(DATA)
    assert get(web(site)) == [path] and len(site.ranges) == 1


def test_damaged_cache_is_fetched_again(site: Site) -> None:
    (path,) = get(web(site))
    path.write_bytes(b"altered")
    assert get(web(site))[0].read_bytes() == DATA and len(site.ranges) == 2


def test_broken_download_resumes_where_it_broke(site: Site) -> None:
    site.answer = lambda handler, number: send(handler, cut=1_500_000 if number == 1 else None)
    assert get(web(site))[0].read_bytes() == DATA
    assert site.ranges[0] is None and site.ranges[1] is not None and int(site.ranges[1].strip("bytes=-")) >= 1_000_000


def test_killed_download_resumes_in_the_next_run(site: Site) -> None:
    site.answer = lambda handler, number: send(handler, cut=1_500_000 if number == 1 else None)
    with pytest.raises(SourceError, match="in 1 attempts"):
        get(web(site), retries=0)
    assert not (download.DOWNLOADS / digest(DATA)).exists()  # never half a file under the final name
    assert get(web(site), retries=0)[0].read_bytes() == DATA
    assert site.ranges[1] is not None


def test_server_that_never_completes_is_told_with_address_and_bytes(site: Site) -> None:
    site.answer = lambda handler, number: send(handler, cut=(1 << 20) if number == 1 else 0)
    with pytest.raises(SourceError) as caught:
        get(web(site), retries=2)
    assert len(site.ranges) == 3
    assert site.url in str(caught.value) and "in 3 attempts" in str(caught.value)
    assert f"{1 << 20:,} of {len(DATA):,} bytes are here" in str(caught.value)


def test_server_without_ranges_is_read_from_the_start(site: Site) -> None:
    site.answer = lambda handler, number: send(handler, cut=1_500_000 if number == 1 else None, ranges=False)
    assert get(web(site))[0].read_bytes() == DATA


def test_stale_partial_is_dropped(site: Site) -> None:
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(b"x" * 1000)  # the start of another file
    assert get(web(site))[0].read_bytes() == DATA
    assert site.ranges == ["bytes=1000-", None]


def test_partial_longer_than_the_file_is_dropped(site: Site) -> None:
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(DATA + b"more")
    assert get(web(site))[0].read_bytes() == DATA


def test_longer_partial_is_cut_when_the_server_has_no_ranges(site: Site) -> None:
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(DATA + b"more")
    site.answer = lambda handler, number: send(handler, ranges=False)
    assert get(web(site))[0].read_bytes() == DATA


def test_whole_partial_needs_no_request(site: Site) -> None:
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(DATA)
    assert get(web(site))[0].read_bytes() == DATA and site.ranges == []


def test_busy_server_is_asked_again(site: Site) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number < 3:
            handler.send_response(503)
            handler.end_headers()
        else:
            send(handler)

    site.answer = answer
    assert get(web(site))[0].read_bytes() == DATA and len(site.ranges) == 3


def test_missing_page_is_not_asked_for_again(site: Site) -> None:
    site.answer = lambda handler, number: (handler.send_response(404), handler.end_headers())[1]
    with pytest.raises(SourceError, match=r"nothing at http.*HTTP 404"):
        get(web(site))
    assert len(site.ranges) == 1


def test_wrong_digest_names_both(site: Site) -> None:
    with pytest.raises(DigestMismatch) as caught:
        get(web(site, WRONG))
    assert WRONG in str(caught.value) and digest(DATA) in str(caught.value)
    assert list(download.DOWNLOADS.iterdir()) == []


@pytest.mark.parametrize("says", [True, False])
def test_too_large_is_refused(site: Site, says: bool) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if says:
            send(handler)
        else:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(DATA)

    site.answer = answer
    with pytest.raises(SourceError, match="max_source_bytes=1000000"):
        get(web(site), max_bytes=1_000_000)
    assert list(download.DOWNLOADS.iterdir()) == []


def test_no_network_names_the_address_and_the_mirror() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/rows.csv"
    with pytest.raises(SourceError) as caught:
        get(origin(kind="http", url=url, sha256=WRONG), retries=1)
    assert url in str(caught.value) and "TRUNKLINE_MIRROR" in str(caught.value) and WRONG in str(caught.value)


def test_credentials_in_the_address_are_refused() -> None:
    with pytest.raises(SourceError, match="may not hold credentials"):
        get(origin(kind="http", url="http://ann:secret@127.0.0.1/x", sha256=WRONG))


def test_backoff_doubles_and_obeys_the_server() -> None:
    from tenacity import Future, RetryCallState, Retrying

    def state(number: int, after: float = 0.0) -> RetryCallState:
        made = RetryCallState(Retrying(), None, (), {})
        made.attempt_number = number
        made.outcome = Future(number)
        made.outcome.set_exception(download.Interrupted("no", after=after))
        return made

    assert [backoff(state(number)) for number in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 32.0]
    assert backoff(state(1, after=9.0)) == 9.0


# ---------------------------------------------------------------- mirror


def test_mirror_folder_is_tried_first(here: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mirror").mkdir()
    (here / "mirror" / digest(DATA)).write_bytes(DATA)
    monkeypatch.setenv("TRUNKLINE_MIRROR", "mirror")
    assert get(web(site))[0].read_bytes() == DATA and site.ranges == []


def test_mirror_bucket_and_website(here: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe(f"/mirror/{digest(DATA)}", DATA)
    monkeypatch.setenv("TRUNKLINE_MIRROR", "memory://mirror")
    nowhere = origin(kind="http", url="http://127.0.0.1:9/x", sha256=digest(DATA))
    assert get(nowhere)[0].read_bytes() == DATA
    (download.DOWNLOADS / digest(DATA)).unlink()
    monkeypatch.setenv("TRUNKLINE_MIRROR", site.url.removesuffix("/rows.jsonl"))
    assert get(nowhere)[0].read_bytes() == DATA and len(site.ranges) == 1


def test_mirror_that_lacks_it_is_passed_over(here: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for mirror in ("nowhere", "memory://empty"):
        monkeypatch.setenv("TRUNKLINE_MIRROR", mirror)
        assert get(web(site))[0].read_bytes() == DATA
        (download.DOWNLOADS / digest(DATA)).unlink()
    assert len(site.ranges) == 2


def test_mirror_that_lacks_it_leaves_a_broken_download_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(DATA[:1000])
    monkeypatch.setenv("TRUNKLINE_MIRROR", "memory://empty")
    assert get(web(site))[0].read_bytes() == DATA and site.ranges == ["bytes=1000-"]


def test_altered_mirror_is_refused(here: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / digest(DATA)).write_bytes(b"altered")
    monkeypatch.setenv("TRUNKLINE_MIRROR", str(here))
    with pytest.raises(DigestMismatch, match="mirror's file was altered"):
        get(web(site))


# ---------------------------------------------------------------- fsspec


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}
    for key, value in environment.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    client.put_object(Bucket="data", Key="rows.jsonl", Body=DATA)
    yield "s3://data/rows.jsonl"
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3: str) -> None:
    source = origin(kind="fsspec", url=s3, sha256=digest(DATA))
    download.DOWNLOADS.mkdir(parents=True)
    (download.DOWNLOADS / f"{digest(DATA)}.partial").write_bytes(DATA[:1_234_567])  # resumes
    assert get(source)[0].read_bytes() == DATA
    with pytest.raises(SourceError, match="nothing at s3://data/none"):
        get(origin(kind="fsspec", url="s3://data/none", sha256=WRONG))
    with pytest.raises(DigestMismatch):
        get(origin(kind="fsspec", url=s3, sha256=WRONG))


def test_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        get(origin(kind="fsspec", url="nosuch://x/y", sha256=WRONG))


# ---------------------------------------------------------------- files


def test_one_file_and_several(here: Path) -> None:
    raw = here / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "b.txt").write_bytes(b"b")
    (raw / "a.txt").write_bytes(b"a")
    (raw / ".hidden").write_bytes(b"h")
    assert get(origin(kind="files", path="data/raw/a.txt", sha256=digest(b"a"))) == [Path("data/raw/a.txt")]
    both = subprocess.run("sha256sum data/raw/*.txt | sha256sum", shell=True, capture_output=True, text=True, check=True).stdout.split()[0]
    assert get(origin(kind="files", path="data/raw/*", sha256=both)) == [Path("data/raw/a.txt"), Path("data/raw/b.txt")]
    with pytest.raises(DigestMismatch):
        get(origin(kind="feedback", path="data/raw/a.txt", sha256=WRONG))
    with pytest.raises(SourceError, match="max_source_bytes=1\n"):
        get(origin(kind="files", path="data/raw/*", sha256=both), max_bytes=1)


def test_files_may_not_leave_the_repository(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_bytes(b"s")
    (here / "link.txt").symlink_to(outside)
    (here / "folder").symlink_to(outside.parent)
    climbs = "out of the repository"
    for path, reason in {"link.txt": "symbolic link", "folder/*.txt": "symbolic link", "../*": climbs, str(outside): climbs}.items():
        with pytest.raises(SourceError, match=reason):
            get(origin(kind="files", path=path, sha256=digest(b"s")))


def test_no_file_and_a_folder(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(SourceError, match="no file at nothing"):
        get(origin(kind="files", path="nothing", sha256=WRONG))
    with pytest.raises(SourceError, match="is a folder"):
        get(origin(kind="files", path="empty", sha256=WRONG))


# ---------------------------------------------------------------- wheel


def build(path: Path, members: dict[str, bytes]) -> str:
    """Write a wheel with members; returns its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = path.name.removesuffix("-py3-none-any.whl")
    name, version = info.split("-")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, zipfile.ZIP_DEFLATED)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=99\nRequires-Dist: nosuch\n"
        archive.writestr(f"{info}.dist-info/METADATA", metadata)
        archive.writestr(f"{info}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}.dist-info/RECORD", "")
    return digest(path.read_bytes())


MEMBERS = {"toy/data/a.jsonl": b"{}\n", "toy/data/b.jsonl": b"{}\n{}\n", "toy/data/deep/c.jsonl": b"", "toy/model.pkl": b"\x80\x04."}


@pytest.fixture
def shop(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package index in a folder, by the user's own pip configuration; returns the digest of its one wheel."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (here / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {here / 'shop'}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(here / "pip.conf"))
    return build(here / "shop" / "toyset-1.0-py3-none-any.whl", MEMBERS)


def test_wheel_is_fetched_by_pip_and_only_the_members_unpacked(here: Path, shop: str) -> None:
    source = origin(kind="wheel", package="toyset==1.0", sha256=shop, member="toy/data/*.jsonl")
    paths = get(source)
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl"] and paths[1].read_bytes() == b"{}\n{}\n"
    assert sorted(path.name for path in (here / wheel.UNPACKED).rglob("*") if path.is_file()) == ["a.jsonl", "b.jsonl"]
    (here / "shop" / "toyset-1.0-py3-none-any.whl").unlink()
    assert get(source) == paths  # from the cache
    assert [path.name for path in (here / download.DOWNLOADS).iterdir()] == [shop]


def test_wheel_refusals(here: Path, shop: str) -> None:
    for member, reason in {"toy/none": "no member toy/none", "toy/*.pkl": "toy/model.pkl is a pickle"}.items():
        with pytest.raises(SourceError, match=reason):
            get(origin(kind="wheel", package="toyset==1.0", sha256=shop, member=member))
    with pytest.raises(DigestMismatch) as caught:
        get(origin(kind="wheel", package="toyset==1.0", sha256=WRONG, member="toy/*"))
    assert shop in str(caught.value) and WRONG in str(caught.value)
    with pytest.raises(SourceError, match=r"pip cannot download nosuch==1.0.*\n.*TRUNKLINE_MIRROR"):
        get(origin(kind="wheel", package="nosuch==1.0", sha256=WRONG, member="*"), retries=0)


@pytest.mark.parametrize("member", ["../climb.txt", "/rooted.txt", "a/../../climb.txt", "..\\climb.txt", "C:/climb.txt"])
def test_member_that_climbs_is_refused(here: Path, member: str) -> None:
    pinned = build(here / "bad-1.0-py3-none-any.whl", {member: b"x"})
    with pytest.raises(SourceError, match="leads out of its folder"):
        wheel.unpack("toy", here / "bad-1.0-py3-none-any.whl", pinned, member, 1000)
    assert not list(here.rglob("climb.txt")) and not Path("/rooted.txt").exists()


def test_member_that_is_a_link_is_refused(here: Path) -> None:
    with zipfile.ZipFile(here / "x.whl", "w") as archive:
        entry = zipfile.ZipInfo("toy/link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(SourceError, match="leads out of its folder"):
        wheel.unpack("toy", here / "x.whl", WRONG, "toy/*", 1000)


@pytest.mark.parametrize("lie", [False, True])
def test_bomb_is_refused_by_declared_and_by_actual_size(here: Path, lie: bool) -> None:
    path = here / "bomb-1.0-py3-none-any.whl"
    pinned = build(path, {"toy/bomb.txt": b"0" * 5_000_000})
    if lie:  # the directory says 10 bytes
        path.write_bytes(path.read_bytes().replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(SourceError, match="cannot be unpacked" if lie else "max_source_bytes=1000000"):
        wheel.unpack("toy", path, pinned, "toy/*", 1_000_000)
    assert not [file for file in wheel.UNPACKED.rglob("*") if file.is_file()]


@given(st.lists(st.text("ab.*/", max_size=6), max_size=4).map("/".join))
def test_glob_stays_within_one_folder(path: str) -> None:
    assert not wheel.matches(path, "a/*") or path.count("/") == 1


# ---------------------------------------------------------------- sql


def table(here: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[object, ...]]) -> None:
    with contextlib.closing(sqlite3.connect(here / "shop.db")) as base, base:
        base.execute("create table tickets (id integer, body text, price real)")
        base.executemany("insert into tickets values (?, ?, ?)", rows)
    monkeypatch.setenv("SHOP_URL", f"sqlite:///{here / 'shop.db'}")


def tickets(sha256: str = WRONG, query: str = "select * from tickets") -> Origin:
    return origin(kind="sql", url_env="SHOP_URL", query=query, order_by="id", sha256=sha256)


def test_sql_is_streamed_in_order(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(here, monkeypatch, [(2, "zwei", 0.5), (1, "eins", None)])
    with pytest.raises(DigestMismatch) as caught:  # the first run prints the digest
        get(tickets())
    (path,) = get(tickets(caught.value.actual))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": 1, "body": "eins", "price": None}, {"id": 2, "body": "zwei", "price": 0.5}]


def test_sql_refusals(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="SHOP_URL is not set"):
        get(tickets())
    table(here, monkeypatch, [(1, "a", 1.0), (1, "b", 1.0)])
    with pytest.raises(DataError, match="row 2 has id=1, which is not unique"):
        get(tickets())
    with pytest.raises(SourceError, match="no such table"):
        get(tickets(query="select * from orders"))
    with pytest.raises(SourceError, match="syntax error"):
        get(tickets(query="drop table tickets"))
    monkeypatch.setenv("SHOP_URL", "nosuch://ann:secret@host/x")
    with pytest.raises(SourceError) as caught:
        get(tickets())
    assert "secret" not in str(caught.value)
    assert not list(Path(download.DOWNLOADS).glob("*"))


# ---------------------------------------------------------------- hub

HUB_FILES = {"data/rows.jsonl": b'{"text": "a"}\n', "weights.bin": b"\x80\x04.", "README.md": b"# toy\n"}
REVISION = "1" * 40
HUB = """
import json, sys
from pathlib import Path
from pydantic import TypeAdapter
from conf.errors import TrunklineError
from conf.schema import Origin
from stages.sources.fetch import fetch, file_name
origin = TypeAdapter(Origin).validate_json(sys.argv[1])
try:
    paths = fetch("toy", origin, retries=0, timeout=5.0, max_bytes=int(sys.argv[2]))
    print(json.dumps({file_name(origin, path): path.read_text() for path in paths}))
except TrunklineError as error:
    print(type(error).__name__, error)
"""


def ask_hub(here: Path, environment: dict[str, str], max_bytes: int = 10**9, **keys: object) -> str:
    """Fetch in a process of its own: huggingface_hub reads its environment when it is imported."""
    source = json.dumps(STATED | {"kind": "hub", "repo": "ann/toy", "revision": REVISION} | keys)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(here / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", HUB, source, str(max_bytes)], capture_output=True, text=True, cwd=here, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub() -> Iterator[str]:
    """What of the hub's interface a snapshot needs."""

    def blob(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            headers, content = {}, b""
            if path == f"/api/datasets/ann/toy/tree/{REVISION}":
                content = json.dumps([{"type": "file", "path": name, "size": len(data), "oid": blob(data)} for name, data in HUB_FILES.items()]).encode()
            elif path.startswith(f"/datasets/ann/toy/resolve/{REVISION}/"):
                content = HUB_FILES[path.split(f"/{REVISION}/")[1]]
                headers = {"ETag": f'"{blob(content)}"', "X-Repo-Commit": REVISION}
            self.send_response(200 if content else 404)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_hub_snapshot_without_its_pickles_then_offline(here: Path, hub: str) -> None:
    expected = {"README.md": "# toy\n", "data/rows.jsonl": '{"text": "a"}\n'}
    assert json.loads(ask_hub(here, {"HF_ENDPOINT": hub})) == expected
    assert json.loads(ask_hub(here, {"HF_HUB_OFFLINE": "1"}, files=["data/*.jsonl"])) == {"data/rows.jsonl": '{"text": "a"}\n'}
    (blob,) = [path for path in (here / "hf").rglob("rows.jsonl") if path.is_symlink()]
    blob.resolve().write_bytes(b"altered")
    assert ask_hub(here, {"HF_HUB_OFFLINE": "1"}).startswith("DigestMismatch")


def test_hub_refusals(here: Path, hub: str) -> None:
    assert "max_source_bytes=5" in ask_hub(here, {"HF_ENDPOINT": hub}, max_bytes=5)
    assert "no file that matches *.csv" in ask_hub(here, {"HF_ENDPOINT": hub}, files=["*.csv"])
    assert "names pickles" in ask_hub(here, {"HF_ENDPOINT": hub}, files=["*.bin"])


def test_hub_offline_says_so(here: Path) -> None:
    said = ask_hub(here, {"HF_HUB_OFFLINE": "1"})
    assert said.startswith("SourceError") and f"ann/toy at {REVISION}" in said and "HF_HUB_OFFLINE" in said and "TRUNKLINE_MIRROR" in said


# ---------------------------------------------------------------- policy


def test_policy_names_what_it_refuses() -> None:
    policy = {"training": Access(classifications=["public"], licences=["MIT", "CC-BY-*"])}
    check("a", "mit", "public", "training", policy)
    check("a", "CC-BY-4.0", "public", "training", policy)
    with pytest.raises(PolicyBreach) as caught:
        check("a", "GPL-3.0-only", "restricted", "training", policy)
    assert "licence GPL-3.0-only" in str(caught.value) and "classification restricted" in str(caught.value)
    with pytest.raises(PolicyBreach, match="nothing that may be used for serving"):
        check("a", "MIT", "public", "serving", policy)


@given(st.text("ABC-.*", max_size=6), st.text("ABC-.", max_size=6))
def test_only_a_star_matches_more_than_itself(entry: str, licence: str) -> None:
    if not entry.endswith("*"):
        assert allows(licence, [entry]) == (licence == entry)
