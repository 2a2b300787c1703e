"""Search a published index with many queries: texts, vectors, or every document of the corpus.

    python jobs/search_index.py --index s3://bucket/index --queries s3://bucket/queries \
        --output s3://bucket/run --top-k 100

Texts are embedded in the same job with the index's own model. Killed or failed, the same command
goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.search_index import SearchIndexConfig, search_index

if __name__ == "__main__":
    run(SearchIndexConfig, search_index)
