"""The shape of the code: which way imports point, how large things get, what an import may do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qbatch"
JOBS = ROOT / "jobs"

FOUNDATION = {
    *("errors", "schema", "storage", "manifest", "vector_files", "tables", "release", "lease"),
}
LIBRARIES = {"corpus", "models", "index", "evaluation", "training", "report"}
ARROWS = {
    "cli": {"errors"},
    "corpus": FOUNDATION,
    "models": FOUNDATION,
    "index": FOUNDATION,
    "evaluation": FOUNDATION,
    "training": FOUNDATION | {"models"},
    "report": FOUNDATION,
    "pipelines": FOUNDATION | LIBRARIES | {"cli"},
    "quickstart": FOUNDATION | LIBRARIES,
    "reader": FOUNDATION | {"models", "index"},
    "__main__": FOUNDATION | {"cli", "models", "pipelines", "report"},
    "jobs": {"cli", "pipelines"},
    **dict.fromkeys(FOUNDATION, FOUNDATION),
}
"""What each part of the package may import, besides itself and the package's version."""

HOMES = {
    "ray": {"pipelines"},
    "faiss": {"index"},
    "torch": {"models", "training"},
    "transformers": {"models", "training"},
}
"""The only parts that may import these, not even inside a function elsewhere."""

LIGHT = (
    *("qbatch.schema.", "qbatch.storage.", "qbatch.manifest.", "qbatch.tables.", "qbatch.corpus."),
    *("qbatch.vector_files.", "qbatch.release.", "qbatch.lease.", "qbatch.reader."),
    *("qbatch.pipelines.embed_read.", "qbatch.pipelines.embed_write."),
    *("qbatch.evaluation.", "qbatch.pipelines.evaluate."),
    *("qbatch.models.rerank_tokens.", "qbatch.pipelines.rerank_pairs."),
    *("qbatch.pipelines.rerank_sources.", "qbatch.pipelines.rerank_lists."),
    *("qbatch.pipelines.rerank_shuffle.", "qbatch.pipelines.rerank_join."),
    *("qbatch.pipelines.rerank_read.", "qbatch.pipelines.rerank_write."),
    "qbatch.training.pairs.",
    *("qbatch.pipelines.pair_source.", "qbatch.pipelines.pair_decisions."),
    *("qbatch.training.near_duplicates.", "qbatch.training.synthesis.", "qbatch.models.chat."),
    *("qbatch.models.server.", "qbatch.models.remote_embedder."),
)
"""What listings, readers and CPU stages import; a thousand of their processes share machines."""

DRIVERS = [
    f"qbatch.pipelines.{name}"
    for name in ("embed", "build_index", "search_index", "rerank", "precompute", "reindex")
]
"""Jobs of the nightly work: what only their actors need is imported there."""

SET_BY_LIBRARIES = {"RAY_CLIENT_MODE", "TORCHINDUCTOR_CACHE_DIR"}
"""Environment variables that importing ray and torch.nn.attention.varlen sets."""

IMPORT_ALL = """
import importlib, json, logging, os, sys

def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        raise RuntimeError(f"an import does {event} {args}")

sys.addaudithook(forbid)
before = dict(os.environ)
handlers = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    ours = [log for log in logging.root.manager.loggerDict if log.split(".")[0] == "qbatch"]
    for log in (None, *ours):
        if logging.getLogger(log).handlers:
            handlers.setdefault(name, log or "root")
changed = sorted(k for k in before.keys() | os.environ if before.get(k) != os.environ.get(k))
heavy = sorted({"torch", "ray", "transformers", "faiss"} & set(sys.modules))
print(json.dumps({"handlers": handlers, "environment": changed, "heavy": heavy}))
"""


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *JOBS.glob("*.py")])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(path: Path) -> str:
    """Return "corpus" for qbatch/corpus/x.py, "schema" for qbatch/schema.py, "jobs" for a job."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "jobs" else parts[1]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, at any depth."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[str]:
    files = [p.relative_to(ROOT).with_suffix("") for p in sorted(PACKAGE.rglob("*.py"))]
    names = [".".join(f.parts) for f in files if f.name != "__main__"]
    return [name.removesuffix(".__init__") for name in names]


def test_sources_are_found():
    assert {part_of(p) for p in sources()} >= {"corpus", "models", "pipelines", "schema"}


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports_of(path)
        if name.startswith("qbatch.") and part_of(path) != "__init__"
        for target in [name.split(".")[1]]
        if target not in ARROWS[part_of(path)] | {part_of(path), "__version__"}
    ]
    assert wrong == []


def test_heavy_libraries_stay_in_their_homes():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports_of(path)
        if part_of(path) not in HOMES.get(name.split(".")[0], {part_of(path)})
    ]
    assert wrong == []


def test_modules_are_at_most_600_lines():
    lines = {str(p.relative_to(ROOT)): p.read_text("utf-8").count("\n") for p in sources()}
    assert {name: count for name, count in lines.items() if count > 600} == {}


def test_functions_are_at_most_60_lines():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for length in [node.end_lineno - node.lineno + 1]
        if length > 60
    ]
    assert wrong == []


def test_jobs_are_a_docstring_and_a_call():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for path in JOBS.glob("*.py"):
        tree = parse(path)
        assert ast.get_docstring(tree), f"{path.name} says nothing about itself"
        assert path.read_text("utf-8").count("\n") <= 40, f"{path.name} is too long"
        assert not any(isinstance(n, kinds) for n in ast.walk(tree)), f"{path.name} has logic"


def test_packages_below_the_root_have_empty_init_files():
    inits = [p for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE]
    assert [str(p.relative_to(ROOT)) for p in inits if p.stat().st_size] == []
    packages = {p.parent for p in PACKAGE.rglob("*.py")}
    assert packages == {p.parent for p in PACKAGE.rglob("__init__.py")}


def imported(names: list[str]) -> dict:
    """Import the modules in a fresh interpreter and return what that did to it."""
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_importing_has_no_side_effects():
    effects = imported(modules())
    assert effects["handlers"] == {}
    assert set(effects["environment"]) <= SET_BY_LIBRARIES


def test_light_modules_load_no_heavy_library():
    light = [m for m in modules() if f"{m}.".startswith(LIGHT)]
    assert len(light) > 5
    assert imported(light)["heavy"] == []


def test_drivers_load_no_model_library():
    """Two seconds, in which Ray could start; what they need of it they import later."""
    assert not {"torch", "transformers"} & set(imported(DRIVERS)["heavy"])
