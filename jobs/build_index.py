"""Build a sharded FAISS index of a published vectors table.

    python jobs/build_index.py --vectors s3://bucket/vectors --output s3://bucket/index

Recall is measured against exact search; below --target-recall nothing is published. Killed or
failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.build_index import BuildIndexConfig, build_index

if __name__ == "__main__":
    run(BuildIndexConfig, build_index)
