"""Train an embedder on pairs of queries and documents with hard negatives.

    python jobs/train_embedder.py --model Qwen/Qwen3-Embedding-0.6B --output s3://bucket/trained \
        --pairs s3://bucket/synthetic,s3://bucket/labelled --learning-rate 1e-5,5e-6 --epochs 1,2

The output is a model directory for embed_corpus.py and sentence-transformers, with the last
checkpoints for merge_checkpoints.py. Killed or failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.train_embedder import TrainEmbedderConfig, train_embedder

if __name__ == "__main__":
    run(TrainEmbedderConfig, train_embedder)
