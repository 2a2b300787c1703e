"""Rerank the candidates of many queries with Qwen3-Reranker or any cross-encoder.

    python jobs/rerank_candidates.py --run s3://bucket/run --queries s3://bucket/queries \
        --corpus s3://bucket/corpus --output s3://bucket/reranked --model Qwen/Qwen3-Reranker-0.6B

Or --candidates for rows that bring their texts. Killed or failed, the same command goes on where it
stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates

if __name__ == "__main__":
    run(RerankCandidatesConfig, rerank_candidates)
