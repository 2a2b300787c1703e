"""Let a language model write training pairs for the documents of a corpus.

    python jobs/synthesize_pairs.py --input s3://bucket/corpus --output s3://bucket/pairs \
        --model Qwen/Qwen3-32B --endpoint http://host:8000/v1 --languages English:3,German:1

Without --endpoint the model runs in the job's own actors. Small models need --response plain.
Killed or failed, the same command goes on where it stopped. --dry-run shows plan and prompts.
"""

from qbatch.cli import run
from qbatch.pipelines.synthesize_pairs import SynthesizePairsConfig, synthesize_pairs

if __name__ == "__main__":
    run(SynthesizePairsConfig, synthesize_pairs)
