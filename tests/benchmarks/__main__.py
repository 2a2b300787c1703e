"""Every benchmark in turn: ``make bench`` or ``python -m tests.benchmarks``."""

from tests.benchmarks import bench_embed_engine, bench_embed_job, bench_rerank

if __name__ == "__main__":
    bench_embed_engine.main()
    print()
    bench_embed_job.main()
    print()
    bench_rerank.main()
