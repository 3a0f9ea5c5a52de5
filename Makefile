.PHONY: demo test test-axolotl test-swift test-llamafactory test-lm-eval test-ray test-vllm test-quantizers bench-cpu bench-gpu bench-quality bench-docs format clean

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

test-ray:  ## states by workers of Ray Data, in an environment of its own
	bash scripts/test_ray.sh

test-vllm:  ## serving and states in vLLM on a CPU, in an environment of its own
	bash scripts/test_vllm.sh

test-quantizers:  ## every quantization that a CPU can run, in environments beside the first
	bash scripts/test_quantizers.sh

PYTHON ?= .venv/bin/python

bench-cpu:  ## what can be measured without a GPU, in about 17 minutes on 2 idle cores, and docs/benchmarks.md
	$(PYTHON) -m benchmarks.saved_for_backward --base llama-3-8b
	$(PYTHON) -m benchmarks.grid cpu --device cpu
	$(PYTHON) -m benchmarks.curve --minutes 5 --test-rows 16 --evaluate-every 6
	$(PYTHON) -m benchmarks.generation --device cpu
	$(PYTHON) -m benchmarks.loss --device cpu --repeats 2
	$(PYTHON) -m benchmarks.page

bench-gpu:  ## every GPU grid, nine minutes at a time (status 75 means that runs are left), and docs/benchmarks.md
	for grid in table1 memory-table figure4 long step-time; do \
	    status=75; \
	    while [ $$status -eq 75 ]; do \
	        status=0; $(PYTHON) -m benchmarks.grid $$grid --device cuda --minutes 9 || status=$$?; \
	    done; \
	done
	$(PYTHON) -m benchmarks.generation --base llama-2-7b --four-bit --device cuda
	$(PYTHON) -m benchmarks.page

bench-docs:  ## docs/benchmarks.md, docs/quality.md and the tables of docs/models.md and docs/pruning.md from the rows
	$(PYTHON) -m benchmarks.page
	$(PYTHON) -m benchmarks.quality.page
	$(PYTHON) -m benchmarks.models_page
	$(PYTHON) -m benchmarks.pruning_page

DATA ?= data

bench-quality:  ## what each method learns, and the ablations; DATA is the folder of the tasks' files
	$(PYTHON) -m benchmarks.quality.train --task gsm8k --data $(DATA) --methods side=1e-3 lora=1e-3 qlora=1e-3 \
	    --rows 160 --evaluate-every 10 --validation-rows 32 --test-rows 60
	$(PYTHON) -m benchmarks.quality.ablations --data $(DATA) --rows 320 --validation-rows 32
	$(PYTHON) -m benchmarks.quality.page

format:  ## apply the formatter and the linter's fixes
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove the environment and what the demo wrote
	rm -rf .venv .venv-* qtuning-demo build *.egg-info
