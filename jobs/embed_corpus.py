"""Embed a corpus into a published vectors table.

    python jobs/embed_corpus.py --input s3://bucket/corpus --output s3://bucket/vectors \
        --model Qwen/Qwen3-Embedding-0.6B

Killed or failed, the same command goes on where it stopped. --dry-run tells plan, time and cost.
"""

from qbatch.cli import run
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus

if __name__ == "__main__":
    run(EmbedCorpusConfig, embed_corpus)
