"""What `dvc repro` would do, stage by stage, without running anything: DVC's own objects, with the hashes that inputs will have.

A stage is taken in DVC's order. As long as every input is known (a file of this tree, a value, an output that stays or is
restored), the very combination is looked up in dvc.lock and in the run-cache, as DVC does. Behind a stage that runs, its outputs
are unknown: a later stage *runs* if no recorded combination has what is known of its inputs, and *may run* otherwise.

An output that is in neither the workspace nor the cache is fetched where a remote is configured (`dvc repro --pull --allow-missing`,
as CI calls it), and made anew where there is none; the remote's run-cache is looked into as well. Nothing is written but DVC's own table of file hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conf.errors import DataError
from stages.operate.differences import ABSENT, Difference, differences
from stages.operate.remote_runs import Runs, remote_runs
from stages.operate.run_cache import is_entry

if TYPE_CHECKING:
    from dvc.dependency.param import ParamsDependency
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

Outcome = Literal["runs", "may run", "restored", "unchanged"]


@dataclass(kw_only=True)
class StageOutlook:
    """What would happen to one stage."""

    stage: str
    outcome: Outcome = "unchanged"
    params: list[Difference] = field(default_factory=list)
    """Values that differ from those of its last run."""
    reasons: list[str] = field(default_factory=list)
    """Everything else that differs, one sentence each."""
    fetch: int = 0
    """Bytes of outputs to bring from the remote."""
    recorded: bool = False
    """Whether dvc.lock has this very run: what it reads is what it read last, wherever its outputs are."""


def outlook(root: Path, values: Mapping[str, Any]) -> list[StageOutlook]:
    """The stages of `root/dvc.yaml` in DVC's order.

    Args:
        root: of the repository.
        values: what params.yaml will hold: the parameters of every stage.

    Raises:
        DataError: DVC cannot read dvc.yaml, dvc.lock or params.yaml.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    try:
        with Repo(str(root)) as repo:
            return _Walk(repo, values).all(plan_repro(repo.index.graph, list(repo.index.stages)))
    except DvcException as error:
        raise DataError(f"DVC stopped: {error}", "mend the file, or `git checkout` it; what a merge left half-done is marked with <<<<<<<") from error


class _Walk:
    """One walk over the pipeline: what each output will be, as far as that is known."""

    def __init__(self, repo: Repo, values: Mapping[str, Any]) -> None:
        self.repo, self.values = repo, values
        self.remote = bool(repo.config.get("remote"))
        self.runs = Path(repo.stage_cache.cache_dir)
        self.unasked = ""
        """Why the remote's run-cache could not be looked into."""
        self.makes: dict[str, Any] = {}
        """Path of an output -> its hash, or None where only running tells."""
        self.outcomes: dict[str, Outcome] = {}
        self.maker: dict[str, str] = {}
        self.recorded: dict[str, Any] = {}
        """Path of an output -> its hash in dvc.lock."""

    def all(self, stages: list[PipelineStage]) -> list[StageOutlook]:
        """Walk."""
        found = []
        for stage in stages:
            found.append(self.one(stage))
            self.outcomes[stage.name] = found[-1].outcome
        return found

    def one(self, stage: PipelineStage) -> StageOutlook:
        """One stage, and what its outputs will be."""
        told = StageOutlook(stage=stage.name)
        self.recorded |= {out.def_path: out.hash_info for out in stage.outs}
        never = not any(out.hash_info for out in stage.outs)
        if never:
            told.reasons.append("it has never run")
        else:
            told.reasons += ["its command changed"] * stage.cmd_changed
            told.reasons += [f"{out.def_path} is a new output" for out in stage.outs if not out.hash_info]
        unknown = [dep for dep in stage.deps if not self.settle(dep, told)]
        moved = never or bool(told.reasons or told.params)
        told.recorded = not moved and not unknown
        if unknown:
            told.reasons += [f"{dep.def_path} is made by {self.source(dep)}, which {self.outcomes[self.source(dep)]}" for dep in unknown]
            told.outcome = "may run" if (not moved or self.compatible(stage, unknown)) else "runs"
        else:
            gone = [] if moved else [f"{out.def_path}: {next(iter(status.values()))}" for out in stage.outs if (status := out.status())]
            told.reasons += gone
            if moved or (gone and not self.remote):
                told.outcome = self.restorable(stage, told) if self.recall(stage) else "runs"
            elif gone:
                told.outcome = self.restorable(stage, told)
        if told.outcome == "runs" and self.unasked:
            told.reasons.append(f"whether another machine has run it is unknown: {self.unasked}")
        for out in stage.outs:
            self.maker[out.def_path] = stage.name
            self.makes[out.def_path] = None if told.outcome in ("runs", "may run") else out.hash_info
        return told

    def settle(self, dep: Any, told: StageOutlook) -> bool:
        """Give a dependency the hash it will have, and note how it differs from the recorded one; False: only running tells."""
        from dvc.dependency.param import ParamsDependency
        from dvc_data.hashfile.meta import Meta

        if isinstance(dep, ParamsDependency):
            self.settle_params(dep, told)
            return True
        before = dep.hash_info
        path = self.origin(dep)
        if path is not None:
            after = self.makes[path]
            if after is None:
                return False
            if dep.def_path != path:
                after = self.inside(path, after, dep)
                if after is None:
                    return False
        elif dep.exists:
            after = dep.get_hash()
        else:
            told.reasons.append(f"{dep.def_path} is missing")
            return True
        if before != after:
            told.reasons.append(f"{dep.def_path} changed" if before else f"{dep.def_path} is a new dependency")
        dep.hash_info, dep.meta = after, Meta()  # the recorded meta holds the recorded hash too
        return True

    def settle_params(self, dep: ParamsDependency, told: StageOutlook) -> None:
        """The values that a stage will read, against those it read last."""
        from dvc_data.hashfile.hash_info import HashInfo

        before = dep.hash_info.value if dep.hash_info and isinstance(dep.hash_info.value, dict) else {}
        after = dict(self.values) if not dep.params else {key: value for key in dep.params if (value := lookup(self.values, key)) is not ABSENT}
        told.params += differences(before, after)
        dep.hash_info = HashInfo("params", after)  # type: ignore[arg-type]

    def origin(self, dep: Output) -> str | None:
        """The output that a dependency is, or lies in."""
        return next((path for path in self.makes if dep.def_path == path or dep.def_path.startswith(f"{path}/")), None)

    def source(self, dep: Output) -> str:
        """The stage that makes a dependency."""
        return self.maker[self.origin(dep) or ""]

    def inside(self, path: str, tree: Any, dep: Output) -> Any:
        """Hash of a file or folder within an output folder, from its listing; None: the listing is neither here nor on the remote.

        The listing that dvc.lock names need not be had: what lies in it is recorded.
        """
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        keys = tuple(dep.def_path[len(path) + 1 :].split("/"))
        for store in (self.repo.cache.local, None if tree == self.recorded[path] else self.far_store):
            try:
                folder = Tree.load(store, tree) if store else None
            except (FileNotFoundError, ObjectFormatError):
                continue
            if folder is not None:
                _, found = folder.get(keys) or (None, None)
                if found is None and (part := folder.get_obj(store, keys)) is not None:
                    found = part.hash_info
                return found or dep.hash_info
        return dep.hash_info if tree == self.recorded[path] else None

    @cached_property
    def far_store(self) -> Any:
        """Objects of the remote; None where there is none, or where it cannot be asked."""
        return self.repo.cloud.get_remote_odb(None, "plan") if self.remote and self.far is not None and not self.unasked else None

    def recall(self, stage: PipelineStage) -> bool:
        """Give the outputs the hashes that the run-cache has for exactly these inputs; False: it has none."""
        from dvc.stage.cache import _get_cache_hash
        from dvc.stage.serialize import to_single_stage_lockfile
        from dvc.utils.serialize import parse_yaml
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.meta import Meta

        if stage.always_changed or any(out.persist for out in stage.outs) or not all(dep.hash_info for dep in stage.deps):
            return False  # DVC keeps such a stage out of the run-cache
        key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
        found = sorted((path for path in (self.runs / key[:2] / key).glob("*") if is_entry(path.name)), key=lambda path: path.stat().st_mtime)
        entry = self.repo.stage_cache._load_cache(key, found[-1].name) if found else None
        if entry is None and (texts := self.far.get(key)):
            entry = parse_yaml(texts[-1], key)
        if entry is None:
            return False
        recorded = {out["path"]: out for out in entry["outs"] if "md5" in out}
        if not recorded.keys() >= {out.def_path for out in stage.outs}:
            return False
        for out in stage.outs:
            kept = recorded[out.def_path]
            out.hash_info, out.meta, out.obj = HashInfo("md5", kept["md5"]), Meta(size=kept.get("size")), None
        return True

    def restorable(self, stage: PipelineStage, told: StageOutlook) -> Outcome:
        """Whether the outputs, of known hashes, can be had: from the cache, or from a remote."""
        absent = [out for out in stage.outs if self.absent(out)]
        if absent and not self.remote:
            told.reasons.append(f"{', '.join(out.def_path for out in absent)} is not in the cache, and no remote is configured")
            return "runs"
        told.fetch = sum(out.meta.size or 0 for out in absent if out.meta)
        return "restored"

    def absent(self, out: Output) -> bool:
        """Whether an output's content is not in the cache (the run-cache keeps that of outputs with `cache: false` too)."""
        from dvc_data.hashfile import check, load
        from dvc_objects.errors import ObjectFormatError

        try:
            check(self.repo.cache.local, load(self.repo.cache.local, out.hash_info))
        except (FileNotFoundError, ObjectFormatError):
            return True
        return False

    def compatible(self, stage: PipelineStage, unknown: list[Any]) -> bool:
        """Whether a recorded run has all that is known of the inputs."""
        from dvc.dependency.param import ParamsDependency
        from dvc.utils.serialize import parse_yaml

        hashes = [dep.hash_info.value for dep in stage.deps if dep not in unknown and not isinstance(dep, ParamsDependency)]
        params: Any = next((dep.hash_info.value for dep in stage.deps if isinstance(dep, ParamsDependency)), {})
        for text in self.entries():
            if f"cmd: {stage.cmd}\n" in text and all(value in text for value in hashes):
                entry = parse_yaml(text, "run-cache")
                if next(iter(entry.get("params", {"": {}}).values())) == params:
                    return True
        return False

    @cached_property
    def far(self) -> Runs:
        """What only the remote's run-cache has; none where there is no remote, or where it cannot be asked."""
        try:
            return remote_runs(self.repo, self.runs) if self.remote else {}
        except DataError as error:
            self.unasked = error.what
            return {}

    def entries(self) -> Iterator[str]:
        """Every entry of the run-cache, here and on the remote."""
        yield from (path.read_text(encoding="utf-8") for path in self.runs.glob("*/*/*") if is_entry(path.name))
        for texts in self.far.values():
            yield from texts


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; `ABSENT` if there is none, for null is a value."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value
