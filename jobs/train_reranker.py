"""Train a reranker on pairs of queries and documents with hard negatives.

    python jobs/train_reranker.py --model Qwen/Qwen3-Reranker-0.6B --output s3://bucket/reranker \
        --pairs s3://bucket/labelled --learning-rate 6e-6

Any causal language model whose tokenizer has the answers yes and no can be the start, and so can an
embedder that would share its embedding table with a head. The output is a model directory for
rerank_candidates.py. Killed or failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.train_reranker import TrainRerankerConfig, train_reranker

if __name__ == "__main__":
    run(TrainRerankerConfig, train_reranker)
