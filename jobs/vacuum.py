"""Remove what no kept release needs: old generations, and what killed nights left.

    python jobs/vacuum.py --output s3://bucket/night --dry-run
    python jobs/vacuum.py --output s3://bucket/night --keep 3 --min-age-hours 72

Safe beside readers of the releases that are kept; ends with code 5 while a night is running.
"""

from qbatch.cli import run
from qbatch.pipelines.vacuum import VacuumConfig, vacuum

if __name__ == "__main__":
    run(VacuumConfig, vacuum)
