"""Give training pairs hard negatives: documents an index finds that do not answer the query.

    python jobs/mine_negatives.py --pairs s3://bucket/good-pairs --index s3://bucket/index \
        --corpus s3://bucket/corpus --output s3://bucket/mined --judge Qwen/Qwen3-Reranker-0.6B

Killed or failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.mine_negatives import MineNegativesConfig, mine_negatives

if __name__ == "__main__":
    run(MineNegativesConfig, mine_negatives)
