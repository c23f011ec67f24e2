"""All GPU tests in one go, on a machine that may have nothing installed of ours:

    python3 -m tests.gpu            # WHEELS=folder: unpack the wheels in it first

Without a GPU: one line and exit code 0.
"""

from __future__ import annotations

import sys

from benchmarks.bare import prepare


def main() -> int:
    if (why := prepare()) is not None:
        print(f"GPU tests skipped: {why}")
        return 0
    import pytest

    files = ["tests/gpu", "tests/model/test_triton_kernels.py", "tests/model/test_sampler_device.py"]
    return int(
        pytest.main(
            ["-m", "not slow", "-W", "default", "-rs", "-s", "--durations=15", *files, *sys.argv[1:]]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
