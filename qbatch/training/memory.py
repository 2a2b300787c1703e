"""What the C library does with the memory that a training step frees."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Keep freed memory for the next step, where the C library is glibc; others do as they like.

    A step on a CPU allocates gigabytes of activations and frees them. By default glibc gives each
    large one back to the kernel, which hands it out again page by page, full of zeros: four tenths
    of a small model's step. The process then stays as large as its largest step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
