.PHONY: check lint types test bench gpu

check: lint types test

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	pytest -n auto

bench:
	python tools/bench.py

gpu:
	python tools/gpu_check.py
