"""Related packages of sixty thousand Debian packages, by MiniLM; a few of them reranked.

python -m pytest -m slow tests/pipelines/test_real_related.py -s      # prints what it found
"""

import json
import random
from pathlib import Path

import pytest

from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.precompute import PrecomputeConfig, precompute
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.tables import open_table
from tests import assets
from tests.candidate_tables import write_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("ray_cluster"),
]

NUM_PACKAGES, FILE_ROWS, NUM_CHANGED = 60_000, 2000, 600
FIRST_CHARACTERS = 60
"""Of a description's body, after the synopsis."""
TOP_K, NUM_RERANKED, NUM_SHOWN = 10, 300, 20

Related = dict[str, list[tuple[str, float]]]


def read_packages() -> dict[str, str]:
    """Return name and text of some English packages, in random order."""
    texts = {}
    for line in assets.debian_descriptions().open(encoding="utf-8"):
        row = json.loads(line)
        if row["lang"] == "en":
            start = " ".join(row["body"][:FIRST_CHARACTERS].split())
            name = row["id"].partition(":")[0]
            texts[name] = f"{name}: {row['synopsis']}. {start}"
    names = random.Random(0).sample(sorted(texts), NUM_PACKAGES)
    return {name: texts[name] for name in names}


def write_corpus(folder: Path, packages: dict[str, str]) -> None:
    rows = [{"doc_id": name, "text": text} for name, text in packages.items()]
    for i in range(0, len(rows), FILE_ROWS):
        write_lines(f"{folder}/{i // FILE_ROWS:03d}.jsonl", rows[i : i + FILE_ROWS])


def make_related(folder: Path) -> tuple[dict, dict]:
    """Run the three jobs; return the summaries of the first and the last."""
    embedded = embed_corpus(
        EmbedCorpusConfig(
            input=f"{folder}/corpus",
            output=f"{folder}/vectors",
            model=str(assets.minilm()),
            dtype="float32",
            unit_bytes=2**19,
        )
    )
    build_index(
        BuildIndexConfig(
            vectors=f"{folder}/vectors",
            output=f"{folder}/index",
            num_shards=8,
            target_recall=0.95,
            max_delta_share=0.1,
        )
    )
    related = precompute(
        PrecomputeConfig(
            index=f"{folder}/index",
            output=f"{folder}/related",
            mode="items",
            top_k=TOP_K,
        )
    )
    return embedded, related


def stored(folder: Path) -> Related:
    found: Related = {}
    for table in open_table(f"{folder}/related").iter_tables():
        for row in table.to_pylist():
            found[row["key"]] = [(item["doc_id"], item["score"]) for item in row["items"]]
    return found


@pytest.fixture(scope="module")
def first_night(ray_cluster, tmp_path_factory) -> tuple[Path, dict[str, str], Related]:
    folder = tmp_path_factory.mktemp("related")
    packages = read_packages()
    write_corpus(folder / "corpus", packages)
    make_related(folder)
    return folder, packages, stored(folder)


def show(packages: dict[str, str], found: Related, names: list[str]) -> None:
    for name in names:
        print(f"\n{packages[name][:90]}")
        for other, score in found[name][:3]:
            print(f"    {score:.2f}  {packages[other][:80]}")


def test_every_package_has_related_ones(first_night, capsys):
    _, packages, found = first_night
    with capsys.disabled():
        show(packages, found, random.Random(3).sample(sorted(found), NUM_SHOWN))
    assert found.keys() == packages.keys()
    for name, items in found.items():
        scores = [score for _, score in items]
        others = [other for other, _ in items]
        assert scores == sorted(scores, reverse=True)
        assert len(set(others) - {name}) == len(items) == TOP_K


def test_some_are_reranked_by_a_real_model(first_night, capsys):
    """The reranker writes every pair once and says something else than the retrieval."""
    folder, packages, found = first_night
    names = random.Random(1).sample(sorted(found), NUM_RERANKED)
    lists = [
        {
            "query_id": name,
            "query": packages[name],
            "documents": [{"doc_id": other, "text": packages[other]} for other, _ in found[name]],
        }
        for name in names
    ]
    write_lines(f"{folder}/lists.jsonl", lists)
    summary = rerank_candidates(
        RerankCandidatesConfig(
            candidates=f"{folder}/lists.jsonl",
            output=f"{folder}/reranked",
            model=str(assets.smollm2()),
            scorer="query-likelihood",
            dtype="float32",
        )
    )
    reranked: Related = {name: [] for name in names}
    table = open_table(f"{folder}/reranked").to_table()
    for row in table.sort_by([("query_id", "ascending"), ("rank", "ascending")]).to_pylist():
        reranked[row["query_id"]].append((row["doc_id"], row["log_odds"]))
    with capsys.disabled():
        print(json.dumps(summary))
        show(packages, reranked, names[:5])
    assert summary["pairs"] == sum(len(found[name]) for name in names)
    for name in names:
        assert sorted(d for d, _ in reranked[name]) == sorted(d for d, _ in found[name])
    assert any([d for d, _ in reranked[n]] != [d for d, _ in found[n]] for n in names)


def test_one_percent_of_changes_touches_few_keys(first_night, capsys):
    """The delta is exactly the keys whose items differ; other texts keep their vectors."""
    folder, packages, before = first_night
    changed = dict(packages)
    names = random.Random(2).sample(sorted(packages), 2 * NUM_CHANGED)
    for name, other in zip(names[:NUM_CHANGED], names[NUM_CHANGED:], strict=True):
        changed[name] = f"{packages[name]}, for use with {other}"
    write_corpus(folder / "corpus", changed)
    embedded, summary = make_related(folder)
    after = stored(folder)
    delta = open_table(f"{folder}/related").generation.details["delta"]
    with capsys.disabled():
        print(json.dumps({"embedded": embedded, "related": summary}))
    assert embedded["passages_embedded"] == NUM_CHANGED
    differs = [name for name in after if not is_same(before[name], after[name])]
    assert delta["changed_keys"] == len(differs)
    assert delta["removed_keys"] == 0
    assert NUM_CHANGED / 2 < len(differs) < NUM_PACKAGES / 4


def is_same(old: list[tuple[str, float]], new: list[tuple[str, float]]) -> bool:
    return [d for d, _ in old] == [d for d, _ in new] and all(
        abs(a - b) <= 1e-5 for (_, a), (_, b) in zip(old, new, strict=True)
    )
