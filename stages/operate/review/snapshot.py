"""The files of a revision, or of this tree: those in git, and those that DVC keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from conf.errors import DataError
from stages.intact import forget_index
from stages.operate.git import file_at

ENGINE = "models/export/engine"


class Snapshot:
    """One state of the repository; what was read is kept."""

    def __init__(self, revision: str | None) -> None:
        """Args: revision: a commit; null: this tree, as it lies here."""
        self.revision = revision
        self.name = revision[:12] if revision else "this tree"
        self._texts: dict[str, str | None] = {}

    @cached_property
    def _files(self) -> Any:
        from dvc.api import DVCFileSystem

        files = DVCFileSystem(".", rev=self.revision) if self.revision else DVCFileSystem(".")
        forget_index(files.repo)
        return files

    def text(self, path: str) -> str | None:
        """A file's text; None: this state has no such file.

        Raises:
            DataError: DVC keeps it, and it is neither in the cache nor on the remote.
        """
        if path not in self._texts:
            self._texts[path] = self._read(path)
        return self._texts[path]

    def _read(self, path: str) -> str | None:
        if self.revision and (kept := file_at(self.revision, path)) is not None:
            return kept
        with self._told(path):
            return str(self._files.read_text(path, encoding="utf-8")) if self._files.exists(path) else None

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """Tell in a sentence that DVC cannot give a file or folder."""
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError

        try:
            yield
        except (DvcException, DataIndexDirError, OSError, ValueError) as error:
            what = f"{path} of {self.name} cannot be read: {type(error).__name__}: {error}"
            raise DataError(what, "`dvc fetch` it, with the credentials of the DVC remote; or `dvc push` where it was made") from error

    def json(self, path: str) -> Any:
        """A JSON file; None: there is none.

        Raises:
            DataError: it cannot be had, or is no JSON.
        """
        if (text := self.text(path)) is None:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} of {self.name} is no JSON: {error}", "run `trunkline repro`") from error

    def rows(self, path: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file; none where there is no such file.

        Raises:
            DataError: it cannot be had, or is no JSONL.
        """
        try:
            return [json.loads(line) for line in (self.text(path) or "").split("\n") if line]
        except ValueError as error:
            raise DataError(f"{path} of {self.name} is no JSONL: {error}", "run `trunkline repro`") from error

    def copy(self, path: str, to: Path) -> None:
        """Copy a folder that DVC keeps.

        Raises:
            DataError: it cannot be had.
        """
        with self._told(path):
            self._files.get(path, str(to), recursive=True)

    @cached_property
    def params(self) -> Mapping[str, Any]:
        """The values of params.yaml; empty where there is none.

        Raises:
            DataError: it cannot be read.
        """
        try:
            value = yaml.load(self.text("params.yaml") or "", Loader=yaml.CSafeLoader)
        except yaml.YAMLError as error:
            raise DataError(f"params.yaml of {self.name} cannot be read: {' '.join(str(error).split())}", "`python -m conf` composes it anew") from error
        return value if isinstance(value, Mapping) else {}

    @cached_property
    def lock(self) -> Mapping[str, Any]:
        """Stage -> its entry in dvc.lock, every value as text (a digest may be digits alone); empty where there is none.

        Raises:
            DataError: it cannot be read.
        """
        try:
            value = yaml.load(self.text("dvc.lock") or "", Loader=yaml.CBaseLoader)
            return dict(value["stages"]) if value else {}
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise DataError(f"dvc.lock of {self.name} cannot be read: {error}", "`git checkout` it, or remove it and run `trunkline repro`") from error

    def inputs(self, stage: str) -> dict[str, str]:
        """Path -> digest of what a stage read when it last ran; empty: it never did."""
        return {dep["path"]: dep.get("md5", "") for dep in self.lock.get(stage, {}).get("deps", [])}

    def outputs(self, stage: str) -> dict[str, str]:
        """Path -> digest of what a stage wrote when it last ran."""
        return {out["path"]: out.get("md5", "") for out in self.lock.get(stage, {}).get("outs", [])}

    @property
    def served(self) -> str | None:
        """Digest of the engine in the Bento; None: nothing was ever packaged."""
        return self.inputs("package").get(ENGINE)

    @property
    def measured(self) -> str | None:
        """Digest of the engine that evaluate measured."""
        return self.inputs("evaluate").get(ENGINE)

    @property
    def model(self) -> dict[str, Any]:
        """What answers: engine, guard's classifier, and the service's code and settings. Equal: the same answers."""
        read = {path: md5 for stage in ("evaluate", "redteam", "package") for path, md5 in self.inputs(stage).items()}
        package = {path for path in self.inputs("package") if path.endswith(".py")}  # what the Bento holds: personal data and patterns too
        code = {path: md5 for path, md5 in read.items() if path.startswith("stages/serve/") or path in package}
        guard = {path: md5 for path, md5 in self.outputs("guard").items() if path.endswith(("guard.json", "weights.safetensors"))}
        command = self.lock.get("package", {}).get("cmd")
        return {"engine": self.measured, "served": self.served, "guard": guard, "serve": self.params.get("serve"), "code": code, "command": command}
