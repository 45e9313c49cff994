"""Peak memory of this process."""

from __future__ import annotations

import sys


def peak_rss_mib() -> float | None:
    """Peak resident memory so far, in MiB; None where the system does not tell it this way (Windows)."""
    try:
        import resource  # noqa: PLC0415 - POSIX only, and the package must be importable elsewhere
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
