"""Every benchmark in turn: ``make bench`` or ``python -m tests.benchmarks``."""

from tests.benchmarks import bench_embed_engine, bench_embed_job, bench_index, bench_rerank

MINUTES_OF_INDEX = ["--rows", "100000", "--factory", "IVF1024,SQ8", "--queries", "8000"]

if __name__ == "__main__":
    bench_embed_engine.main()
    print()
    bench_embed_job.main()
    print()
    bench_rerank.main()
    print()
    bench_index.main([*MINUTES_OF_INDEX, "--shards", "4", "--files", "8"])
