"""Keep the training pairs whose query and document belong together, each once.

    python jobs/filter_pairs.py --pairs s3://bucket/pairs --output s3://bucket/good-pairs \
        --model Qwen/Qwen3-Embedding-0.6B --min-cosine 0.7 --evaluation s3://bucket/beir/scifact

Also drops duplicates, near-duplicates, and pairs that ask what an evaluation will ask. Killed or
failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.filter_pairs import FilterPairsConfig, filter_pairs

if __name__ == "__main__":
    run(FilterPairsConfig, filter_pairs)
