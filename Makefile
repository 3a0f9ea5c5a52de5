.PHONY: demo test format clean

demo:  ## install in .venv and run the demo
	bash scripts/demo.sh

test:  ## install in .venv and run every check
	bash scripts/test.sh

format:  ## apply the formatter and the linter's fixes
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove the environment and what the demo wrote
	rm -rf .venv qtuning-demo build *.egg-info
