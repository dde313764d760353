"""Where tasks run: processes of this machine, or datatrove's executors for Ray and Slurm, behind one function that returns when all are done."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from conf.errors import ConfigError, DataError
from conf.schema import Preprocess

PRELOAD = ["stages.steps.clean", "stages.steps.deduplicate", "stages.steps.decontaminate", "stages.steps.chat", "stages.steps.split", "phonenumbers"]
POLL_SECONDS = 5.0


def make(steps: Sequence[PipelineStep], tasks: int, settings: Preprocess, logs: Path) -> PipelineExecutor:
    """Datatrove's executor for more than one machine that `conf/` names.

    Args:
        steps: the pipeline.
        tasks: how many times it runs, each with a rank of its own.
        settings: executor, workers, and what Slurm wants to know.
        logs: folder of marks of completion and logs; seen by all machines.

    Raises:
        ConfigError: what the executor needs is not installed.
    """
    workers = min(worker_count(settings), tasks)
    match settings.executor:
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
    raise ConfigError(f"preprocess.executor={settings.executor} has no executor of datatrove", "choose ray or slurm")


def worker_count(settings: Preprocess) -> int:
    """Processes at a time: TRUNKLINE_WORKERS, which says what this machine has, or else `preprocess.workers`.

    Raises:
        ConfigError: the variable is no positive whole number.
    """
    chosen = os.environ.get("TRUNKLINE_WORKERS")
    if not chosen:
        return settings.workers
    if not re.fullmatch("[1-9][0-9]{0,3}", chosen):
        raise ConfigError(
            f"TRUNKLINE_WORKERS={chosen!r} is no number of processes", "set it to a whole number from 1 to 9999, or unset it: preprocess.workers counts then"
        )
    return int(chosen)


def run_task(steps: Sequence[PipelineStep], rank: int, tasks: int) -> None:
    """Run the pipeline for one rank, as datatrove's executors do."""
    data: DocumentsPipeline = None
    for step in steps:
        data = step(data, rank, tasks)
    deque(data or (), maxlen=0)


def begin_worker() -> None:
    """A worker ends at Ctrl-C without a word, and at once when the stage is gone: nobody writes into the scratch of the next run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_here(steps: Sequence[PipelineStep], tasks: int, workers: int, name: str) -> None:
    """Run all ranks on this machine. (Datatrove's local executor waits for ever for a worker that was killed, and shows users its traceback.)

    Raises:
        DataError: a worker was killed.
    """
    if workers == 1:
        for rank in range(tasks):
            run_task(deepcopy(steps), rank, tasks)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        running = [pool.submit(run_task, steps, rank, tasks) for rank in range(tasks)]
        try:
            for task in running:
                task.result()
        except BrokenProcessPool as error:
            remedy = "most often memory ran out: run `dvc repro` again with fewer processes (TRUNKLINE_WORKERS=1)"
            raise DataError(f"a worker process was killed in the pass `{name}`", remedy) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def execute(steps: Sequence[PipelineStep], tasks: int, settings: Preprocess, logs: Path) -> None:
    """Run the pipeline once per rank, and wait for all.

    Raises:
        ConfigError: TRUNKLINE_WORKERS is wrong, or what the executor needs is missing.
        DataError: a task ended without being done.
    """
    if settings.executor == "local":
        run_here(steps, tasks, max(min(worker_count(settings), tasks), 1), logs.name)
        return
    executor = make(steps, tasks, settings, logs)
    if settings.executor == "ray":
        import ray

        ray.init(ignore_reinit_error=True)  # RAY_ADDRESS names the cluster; without it, a local one
    executor.run()
    if settings.executor == "slurm":
        wait_for_slurm(executor)
    if missing := executor.get_incomplete_ranks(skip_completed=True):
        written = logs / "logs" / f"task_{missing[0]:05d}.log"
        said = written.read_text(encoding="utf-8", errors="replace")[-2000:].strip() if written.exists() else "it wrote none"
        raise DataError(f"{len(missing)} of {tasks} tasks of {logs.name} failed; the log of task {missing[0]} ends:\n{said}", "mend that, and run `dvc repro`")


def wait_for_slurm(executor: PipelineExecutor) -> None:
    """Return when all ranks are done, or the job is no longer in Slurm's queue."""
    job = str(getattr(executor, "job_id", ""))
    while executor.get_incomplete_ranks(skip_completed=True):
        time.sleep(POLL_SECONDS)
        queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
        if not queue.stdout.strip():
            return
