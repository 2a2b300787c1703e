"""Stages that say when, in which thread and how set up they ran; workers import them."""

import os
import threading
import time

import numpy as np
import pyarrow as pa


def read(batch: pa.Table) -> pa.Table:
    """Take a tenth of a second, and say when that was over."""
    time.sleep(0.1)
    return batch.append_column("read_at", [[time.time()]])


class Passing:
    """Computes nothing; four megabytes of vectors travel with the unit."""

    def __init__(self) -> None:
        self._made_in = threading.get_ident()

    def __call__(self, batch: pa.Table) -> pa.Table:
        batch = batch.append_column("same_thread", [[threading.get_ident() == self._made_in]])
        batch = batch.append_column("mmap_max", [[os.environ.get("MALLOC_MMAP_MAX_")]])
        return batch.append_column("vectors", [[np.zeros(2**20, np.float32).tobytes()]])


def write(batch: pa.Table) -> pa.Table:
    return batch.drop_columns(["vectors"]).append_column("written_at", [[time.time()]])
