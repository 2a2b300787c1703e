# One word per habit. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TOOLS := .venv-tools
ASSETS := $(PY) -m qbatch.quickstart.assets
PYTEST := $(PY) -m pytest

.PHONY: help venv assets quickstart test test-slow faults bundled-models training-example lint bench lock audit
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## install qbatch and its tested dependencies into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qbatch needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

assets: venv ## download the models and tokenizers that tests use
	@$(ASSETS) minilm qwen3-tokenizer >/dev/null || echo "some assets are missing: their tests skip"

quickstart: venv ## embed, index, search and rerank the bundled corpus, and measure the answers
	@$(PY) jobs/embed_corpus.py --config jobs/configs/quickstart-embed.toml && \
	  $(PY) jobs/build_index.py --config jobs/configs/quickstart-index.toml && \
	  $(PY) jobs/search_index.py --config jobs/configs/quickstart-search.toml && \
	  $(PY) jobs/rerank_candidates.py --config jobs/configs/quickstart-rerank.toml && \
	  $(PY) jobs/evaluate.py --config jobs/configs/quickstart-evaluate.toml && \
	  $(PY) -m qbatch.quickstart.answers --run quickstart-output/run --reranked quickstart-output/reranked

test: assets ## run the tests, two files at a time (minutes)
	@$(PYTEST) -n 2 --dist loadfile

test-slow: assets ## run the tests that take longer than a minute
	@$(ASSETS) debian-descriptions smollm2 qwen2.5-coder perlfaq >/dev/null || echo "some assets are missing: their tests skip"
	@$(PYTEST) -m slow --timeout=1800

faults: venv ## let 200 seeded faults happen in every job: no row may be lost or doubled
	@$(PY) -m tests.faults.harness --cases 200

bundled-models: venv ## train the bundled models again, from scratch (half an hour)
	@$(PY) -m qbatch.quickstart.training_texts --output bundled-models/texts
	@$(PY) jobs/train_embedder.py --config jobs/configs/bundled-weakly-trained.toml
	@$(PY) jobs/embed_corpus.py --input bundled-models/texts/corpus --output bundled-models/vectors \
	  --model bundled-models/weakly-trained --dtype float32
	@$(PY) jobs/build_index.py --vectors bundled-models/vectors --output bundled-models/index
	@for part in pairs/retrieval/descriptions reranking/pairs; do \
	  $(PY) jobs/mine_negatives.py --pairs bundled-models/texts/$$part.parquet \
	    --index bundled-models/index --corpus bundled-models/texts/corpus \
	    --output bundled-models/mined/$$part --last-rank 50 --max-ratio 0.9 || exit; done
	@$(PY) jobs/train_embedder.py --config jobs/configs/bundled-embedder.toml
	@$(PY) jobs/merge_checkpoints.py --output bundled-models/embedder \
	  --checkpoints "$$(ls -d bundled-models/trained/checkpoints/* | tail -n 2 | paste -sd ,)"
	@$(PY) -m qbatch.quickstart.starting_point --embedder bundled-models/embedder \
	  --output bundled-models/reranker-start
	@$(PY) jobs/train_reranker.py --config jobs/configs/bundled-reranker.toml
	@$(PY) -m tests.benchmarks.bundled_quality --sets bundled-models/texts/evaluation \
	  --embedder bundled-models/embedder --reranker bundled-models/reranker --dims 256 128
	@for kind in embedder reranker; do \
	  mkdir -p qbatch/quickstart/models/$$kind && tar -C bundled-models/$$kind -cf - \
	    --exclude=checkpoints --exclude=complete.json --exclude='report.*' . | \
	  tar -C qbatch/quickstart/models/$$kind -xf - || exit; done

training-example: venv ## write queries, filter, mine, train, merge and evaluate on the bundled corpus (minutes)
	@$(PY) -m qbatch.quickstart.assets smollm2 minilm >/dev/null
	@mkdir -p training-example/questions/qrels
	@sed 's/"doc_id"/"_id"/' qbatch/quickstart/corpus.jsonl > training-example/questions/corpus.jsonl
	@sed 's/"query_id"/"_id"/' qbatch/quickstart/queries.jsonl > training-example/questions/queries.jsonl
	@cp qbatch/quickstart/qrels.tsv training-example/questions/qrels/test.tsv
	$(PY) jobs/synthesize_pairs.py --config jobs/configs/example-synthesize.toml --model "$$($(ASSETS) smollm2)"
	$(PY) jobs/filter_pairs.py --config jobs/configs/example-filter.toml --model "$$($(ASSETS) minilm)"
	$(PY) jobs/embed_corpus.py --config jobs/configs/quickstart-embed.toml --output training-example/vectors \
	  --model "$$($(ASSETS) minilm)"
	$(PY) jobs/build_index.py --config jobs/configs/quickstart-index.toml \
	  --vectors training-example/vectors --output training-example/index
	$(PY) jobs/mine_negatives.py --config jobs/configs/example-mine.toml
	$(PY) jobs/train_embedder.py --config jobs/configs/example-train.toml --model "$$($(ASSETS) minilm)"
	$(PY) jobs/merge_checkpoints.py --output training-example/merged \
	  --checkpoints "$$(ls -d training-example/trained/checkpoints/* | tail -n 2 | paste -sd ,)"
	$(PY) jobs/evaluate.py --model "$$($(ASSETS) minilm)" --datasets training-example/questions --metrics ndcg@10,recall@10
	$(PY) jobs/evaluate.py --model training-example/merged --datasets training-example/questions --metrics ndcg@10,recall@10

lint: venv ## check style and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: venv ## measure speed against other tools, side by side
	@$(ASSETS) minilm qwen3-tokenizer debian-descriptions perlfaq >/dev/null
	@$(PY) -m tests.benchmarks

$(TOOLS)/.installed:
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	@touch $@

lock: $(TOOLS)/.installed ## write requirements.lock, the image's packages with their hashes, from constraints.txt
	@$(TOOLS)/bin/uv pip compile pyproject.toml --constraints constraints.txt --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.lock

audit: $(TOOLS)/.installed ## look for known vulnerabilities in the locked packages (asks pypi.org)
	@$(TOOLS)/bin/pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict
