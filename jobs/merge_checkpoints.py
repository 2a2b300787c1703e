"""Merge checkpoints of one training run into one model, in little memory.

    python jobs/merge_checkpoints.py --output merged \
        --checkpoints trained/checkpoints/step-00001000,trained/checkpoints/step-00001500

--method spherical-mean takes all at once, --base merges the differences from the model that was
trained. The merged model appears whole or not at all.
"""

from qbatch.cli import run
from qbatch.pipelines.merge_checkpoints import MergeCheckpointsConfig, merge_checkpoints

if __name__ == "__main__":
    run(MergeCheckpointsConfig, merge_checkpoints)
