"""The night: embed what changed, refresh the index, answer again, check all of it, release it.

    python jobs/reindex.py --config jobs/configs/night.toml --embed.model MODEL_DIR

Readers follow the newest release, whose tables belong together. A gate that fails releases nothing
and ends with code 7. Killed or failed, the same command goes on where it stopped.
"""

from qbatch.cli import run
from qbatch.pipelines.reindex import ReindexConfig, reindex

if __name__ == "__main__":
    run(ReindexConfig, reindex)
