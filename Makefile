.PHONY: demo test test-axolotl test-swift test-llamafactory test-lm-eval format clean

demo:  ## install in .venv and run the demo
	bash scripts/demo.sh

test:  ## install in .venv and run every check
	bash scripts/test.sh

test-axolotl:  ## Axolotl's own commands with the plugin, in environments of their own
	bash scripts/test_axolotl.sh

test-swift:  ## the same for ms-swift
	bash scripts/test_swift.sh

test-llamafactory:  ## the same for LLaMA-Factory
	bash scripts/test_llamafactory.sh

test-lm-eval:  ## the same for lm-evaluation-harness
	bash scripts/test_lm_eval.sh

format:  ## apply the formatter and the linter's fixes
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove the environment and what the demo wrote
	rm -rf .venv .venv-* qtuning-demo build *.egg-info
