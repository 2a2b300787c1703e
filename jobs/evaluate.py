"""Measure a run against judgements, alone or beside another run; or models on evaluation sets.

    python jobs/evaluate.py --run s3://bucket/run --qrels qrels.tsv --metrics ndcg@10,recall@100
    python jobs/evaluate.py --model EMBEDDER --reranker RERANKER --datasets beir/scifact,beir/mine

A run or judgements may be a published table, TREC text, TSV, JSON lines or Parquet; judgements also
a folder in the layout of BEIR. The table goes to stderr, the summary to stdout.
"""

from qbatch.cli import run
from qbatch.pipelines.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    run(EvaluateConfig, evaluate)
