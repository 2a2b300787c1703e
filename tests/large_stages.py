"""Stages whose units are large: eight megabytes come in, and travel on; workers import them."""

import time

import pyarrow as pa

NUM_BYTES = 8 * 2**20


def read(batch: pa.Table) -> pa.Table:
    return batch.append_column("content", pa.array([bytes(NUM_BYTES)], pa.large_binary()))


def read_slowly(batch: pa.Table) -> pa.Table:
    time.sleep(0.2)
    return read(batch)


class Passing:
    """Computes nothing."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def write(batch: pa.Table) -> pa.Table:
    (content,) = batch["content"].to_pylist()
    return batch.drop_columns(["content"]).append_column("num_bytes", [[len(content)]])


def write_slowly(batch: pa.Table) -> pa.Table:
    time.sleep(0.2)
    return write(batch)
