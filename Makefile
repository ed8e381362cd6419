PY := .venv/bin/python
REPRODUCTIONS := smooth_diffusion interpolation degeneracy seeds reconstruction sheets inversions \
	independent shots seedselect walks relations texts levels adapt offset istd norms paths
LOWEST := tests/core/test_registry.py tests/diffusion/test_sit.py tests/cli/test_config.py \
	tests/networks/test_feature_networks.py

.PHONY: demo test test-slow test-lowest lint bench reproduce docs notebook wheel
demo: .venv/demo
	.venv/bin/latent-augment demo

test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-slow: .venv/dev
	$(PY) -m pytest -q -m slow

test-lowest: .venv/dev
	.ci/lowest $(LOWEST)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

bench: .venv/dev
	$(PY) scripts/benchmark.py all

reproduce: .venv/dev
	printf '%s\n' $(REPRODUCTIONS) | OMP_NUM_THREADS=1 xargs -P 2 -I{} \
		$(PY) scripts/reproduce/{}.py --quick --write
	$(PY) scripts/reproduce/claims.py

docs: .venv/docs
	$(PY) -m sphinx -q -W --keep-going -c docs -d runs/.book . runs/book
	cp runs/book/README.html runs/book/index.html

notebook: .venv/docs
	$(PY) scripts/make_notebook.py

wheel: .venv/dev
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

.venv/bin/python:
	python3 -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	.venv/bin/pip install -q -e '.[train]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml
	.venv/bin/pip install -q -e '.[dev]'
	touch $@ .venv/demo

.venv/docs: .venv/dev
	.venv/bin/pip install -q -e '.[docs]'
	touch $@
