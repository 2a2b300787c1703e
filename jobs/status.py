"""List the releases of a night with their tables, counts and gates, and say which one serves.

python jobs/status.py --output s3://bucket/night
"""

from qbatch.cli import run
from qbatch.pipelines.status import StatusConfig, status

if __name__ == "__main__":
    run(StatusConfig, status)
