"""Arrays in scratch: bare bytes. (`numpy.save` and `tofile` hide what the disk said when it is full.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(array.tobytes())


def map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """The values of a file, shape (n,), read where they are looked at."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
