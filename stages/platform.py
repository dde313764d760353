"""What the numbers depend on besides inputs, settings and code: the processor's instructions and the builds of the numeric libraries.

Two machines that agree in all of it write the same bytes; two that do not may round differently. So the stages that compute put `describe()` into
the JSON that they write, as `platform`, package gathers the records in the provenance, and whoever mixes platforms is told.
Nothing here names a machine, and nothing heavy is imported for it: a library that is not loaded is named by its version alone.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.files import read_json

Platform = dict[str, str]
"""What it is -> how it is here, in words."""

RECORDS = {
    "select": Path("models/select/leaderboard.json"),
    "tune": Path("models/tune/summary.json"),
    "export": Path("models/export/summary.json"),
    "evaluate": Path("models/evaluate/scores.json"),
    "guard": Path("models/guard/result.json"),
    "redteam": Path("models/redteam/result.json"),
}
"""Stage -> where its `platform` is written."""
INSTRUCTIONS = {
    *("sse4_2", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm"),
}
"""Processor flags by which the kernels of torch, MKL, oneDNN, OpenBLAS, OpenVINO and ctranslate2 are chosen."""
SWITCHES = {
    "torch": ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"),
    "ctranslate2": ("CT2_FORCE_CPU_ISA", "CT2_USE_MKL", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"),
    "openvino": ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"),
    "llama-cpp-python": (),
    "numpy": ("NPY_DISABLE_CPU_FEATURES", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"),
    "vllm": (),
}
"""Distribution that computes -> environment variables that make it choose other kernels."""
ENGINES = {
    "openvino": ("openvino", "numpy"), "ctranslate2": ("ctranslate2", "numpy"), "llamacpp": ("llama-cpp-python", "numpy"), "transformers": ("torch",),
    "vllm": ("vllm", "torch"), "upstream": (),
}  # fmt: skip
"""Engine -> the distributions that compute in it."""
CACHE = Path(".dvc/cache/files/md5")

log = logging.getLogger(__name__)


def describe(*libraries: str) -> Platform:
    """This platform, as far as the named distributions see it: torch, ctranslate2, openvino, llama-cpp-python, numpy, vllm."""
    processor, flags = _processor()
    found = {
        "system": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "processor": processor,
        "instructions": " ".join(sorted(INSTRUCTIONS & flags)),
    }
    for name in libraries:
        found |= {switch: os.environ[switch] for switch in SWITCHES[name] if switch in os.environ}
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {key: value for key, value in (found | _loaded(libraries)).items() if value}


def _processor() -> tuple[str, set[str]]:
    """Vendor, and flags as Linux names them; elsewhere only what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return platform.processor(), set()
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    return (vendor[1] if vendor else platform.processor()), set(flags[1].split() if flags else ())


def _loaded(libraries: tuple[str, ...]) -> Platform:
    """What only a loaded library can say of the kernels it chose."""
    found: Platform = {}
    loaded = {name: sys.modules[name] for name in libraries if name in sys.modules}
    if "torch" in loaded:
        torch = loaded["torch"]
        found["torch kernels"] = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            found["torch device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if "ctranslate2" in loaded:
        found["ctranslate2 types"] = " ".join(sorted(loaded["ctranslate2"].get_supported_compute_types("cpu")))
    if "numpy" in loaded:
        found["numpy instructions"] = " ".join(loaded["numpy"].show_config(mode="dicts")["SIMD Extensions"]["found"])
    return found


def differences(one: Mapping[str, str], other: Mapping[str, str], names: tuple[str, str] = ("here", "there")) -> list[str]:
    """In what two platforms differ, in words; what only one of them knows is not compared, but for a set environment variable."""
    both = one.keys() & other.keys()
    switches = {switch for name in SWITCHES.keys() & both for switch in SWITCHES[name]}
    keys = both | (switches & (one.keys() | other.keys()))
    values = {key: (one.get(key, "not set"), other.get(key, "not set")) for key in sorted(keys)}
    return [f"{key}: {a} {names[0]}, {b} {names[1]}" for key, (a, b) in values.items() if a != b]


def read(path: Path) -> Platform | None:
    """The platform in a record; null: there is no record, or an older one."""
    return _platform(read_json(path)) if path.is_file() else None


def committed(path: Path) -> Platform | None:
    """The platform in a record of git's HEAD; null: neither git nor .dvc/cache has it.

    DVC's own file system does as much in 3.4 s (this: 0.02 s, on the same busy cores), and asks the remote for what is not here.
    """
    try:
        lock = _blob("dvc.lock")
        if text := _blob(path.as_posix()):
            return _platform(json.loads(text))
        for folder in path.parents:
            if entry := re.search(rf"^ *- path: {re.escape(folder.as_posix())}\n *hash: md5\n *md5: (\w+\.dir)$", lock, re.M):
                listing = json.loads(_object(entry[1]))
                digest = next(file["md5"] for file in listing if file["relpath"] == path.relative_to(folder).as_posix())
                return _platform(json.loads(_object(digest)))
    except (FileNotFoundError, StopIteration, ValueError):  # no git, not in the cache, or damaged there, which DVC tells whoever needs it
        return None
    return None


def _platform(record: object) -> Platform | None:
    found = record.get("platform") if isinstance(record, dict) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else None


def _blob(path: str) -> str:
    """A file of HEAD; empty where git has none."""
    return subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, text=True, encoding="utf-8", check=False).stdout


def _object(digest: str) -> str:
    """A file of DVC's cache."""
    return (CACHE / digest[:2] / digest[2:]).read_text(encoding="utf-8")


def record(stage: str, inputs: tuple[str, ...], *libraries: str) -> Platform:
    """Describe this platform for a stage's output, and warn when it is another one than that of HEAD's output or of an input.

    Args:
        stage: whose output it goes into.
        inputs: stages whose outputs this one reads.
        libraries: what this stage computes with.
    """
    here = describe(*libraries)
    there = {f"HEAD's {RECORDS[stage]}": committed(RECORDS[stage])} | {f"{RECORDS[name]}, an input,": read(RECORDS[name]) for name in inputs}
    said = [f"{what} was made on another platform ({'; '.join(found)})" for what, of in there.items() if of and (found := differences(here, of))]
    if said:
        log.warning("%s: the same inputs may give other last digits here, and so another digest", "; ".join(said))
    return here


def recorded() -> dict[str, Platform]:
    """Stage -> the platform on which its present output was made, of those that say so."""
    return {stage: found for stage, path in RECORDS.items() if (found := read(path))}


def mixed(platforms: Mapping[str, Mapping[str, str]]) -> list[str]:
    """In what the stages of one run differ from its first, in words."""
    first, *others = platforms or [""]
    return [what for stage in others for what in differences(platforms[stage], platforms[first], (f"in {stage}", f"in {first}"))]


def grouped(platforms: Mapping[str, Platform]) -> list[tuple[list[str], Platform]]:
    """The platforms as one description for all stages that nothing keeps apart, and the stages of each."""
    groups: list[tuple[list[str], Platform]] = []
    for stage, made_on in platforms.items():
        same = next((group for group in groups if not differences(group[1], made_on)), None)
        if same is None:
            groups.append(([stage], dict(made_on)))
        else:
            same[0].append(stage)
            same[1].update(made_on)
    return groups
