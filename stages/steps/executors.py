"""Where tasks run: datatrove's executors for this machine, Ray and Slurm, behind one function that returns when all are done."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from conf.errors import ConfigError, DataError
from conf.schema import Preprocess

PRELOAD = ["stages.steps.clean", "stages.steps.deduplicate", "stages.steps.chat", "stages.steps.split"]
POLL_SECONDS = 5.0


def make(steps: Sequence[PipelineStep], tasks: int, settings: Preprocess, logs: Path) -> PipelineExecutor:
    """The executor that `conf/` names.

    Args:
        steps: the pipeline.
        tasks: how many times it runs, each with a rank of its own.
        settings: executor, workers, and what Slurm wants to know.
        logs: folder of marks of completion and logs; seen by all machines.

    Raises:
        ConfigError: what the executor needs is not installed.
    """
    workers = min(settings.workers, tasks)
    match settings.executor:
        case "local":
            from datatrove.executor.local import LocalPipelineExecutor
            from multiprocess import get_context

            get_context("forkserver").set_forkserver_preload(PRELOAD)
            return LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(logs))
        case "ray":
            if find_spec("ray") is None:
                raise ConfigError("preprocess.executor=ray: the package ray is not installed", "`pip install 'ray[default]'`, or set executor: local")
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(logs))
        case "slurm":
            if settings.slurm is None or shutil.which("sbatch") is None:
                raise ConfigError("preprocess.executor=slurm: there is no sbatch on this machine", "run on a login node of the cluster, or set executor: local")
            from datatrove.executor.slurm import SlurmPipelineExecutor

            slurm = settings.slurm
            return SlurmPipelineExecutor(
                list(steps), tasks=tasks, workers=workers, logging_dir=str(logs), job_name=f"trunkline-{logs.name}", time=slurm.time,
                partition=slurm.partition, qos=slurm.qos, mem_per_cpu_gb=slurm.memory_gb, env_command=f"cd {Path.cwd()} && export PYTHONHASHSEED=0",
                venv_path=os.environ.get("VIRTUAL_ENV"),
            )  # fmt: skip
    raise ConfigError(f"preprocess.executor={settings.executor} is unknown", "choose local, ray or slurm")


def execute(steps: Sequence[PipelineStep], tasks: int, settings: Preprocess, logs: Path) -> None:
    """Run the pipeline once per rank, and wait for all.

    Raises:
        DataError: a task ended without being done.
    """
    executor = make(steps, tasks, settings, logs)
    if settings.executor == "ray":
        import ray

        ray.init(ignore_reinit_error=True)  # RAY_ADDRESS names the cluster; without it, a local one
    executor.run()
    if settings.executor == "slurm":
        wait_for_slurm(executor)
    if missing := executor.get_incomplete_ranks(skip_completed=True):
        raise DataError(f"{len(missing)} of {tasks} tasks of {logs.name} failed, the first is {missing[0]}", f"read {logs}/logs/task_{missing[0]:05d}.log")


def wait_for_slurm(executor: PipelineExecutor) -> None:
    """Return when all ranks are done, or the job is no longer in Slurm's queue."""
    job = str(getattr(executor, "job_id", ""))
    while executor.get_incomplete_ranks(skip_completed=True):
        time.sleep(POLL_SECONDS)
        queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
        if not queue.stdout.strip():
            return
