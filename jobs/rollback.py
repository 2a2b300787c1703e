"""Let an older release serve again, under a new number.

    python jobs/status.py --output s3://bucket/night
    python jobs/rollback.py --output s3://bucket/night --release 41

What was taken back is not released again until the corpus or the settings change.
"""

from qbatch.cli import run
from qbatch.pipelines.rollback import RollbackConfig, rollback

if __name__ == "__main__":
    run(RollbackConfig, rollback)
