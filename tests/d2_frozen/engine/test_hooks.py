"""What the progress line tells."""

import subprocess
import sys

import numpy as np

from d2_frozen.engine.hooks import peak_memory_mib


def test_peak_memory_is_that_of_this_process_not_of_its_parent() -> None:
    """A child of a process that holds 2 GiB has not used 2 GiB itself."""
    held = np.ones(2**31, np.uint8)
    code = "from d2_frozen.engine.hooks import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child = float(done.stdout.split()[-1])
    assert 0 < child < held.nbytes / 2**20 < peak_memory_mib()
