"""Precompute what a search box or a "related items" row will show: one row a key, ready to load.

    python jobs/precompute.py --index s3://bucket/index --output s3://bucket/related \
        --mode items --max-similarity .98 --same category --diversity .3
    python jobs/precompute.py --index s3://bucket/index --output s3://bucket/answers \
        --queries s3://bucket/query-log --top-k 20

The next night only partitions with other content are written, and the manifest lists a delta with
the keys that changed. Killed or failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.precompute import PrecomputeConfig, precompute

if __name__ == "__main__":
    run(PrecomputeConfig, precompute)
