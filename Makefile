# train_gpt2.c: build, train, test. `make help` lists the targets, `sh dev/deps.sh` installs what is missing.
#
# Settings, as in `make BLAS=none` (a changed setting rebuilds what it touches):
#   OPENMP=0     one core only
#   BLAS=...     openblas, accelerate (macOS), blis, none (built-in matmul); auto takes the best that is here
#   MPI=1        for many processes, on one machine or several; MPI=mpicc.mpich names a compiler of MPI
#   SANITIZE=1   programs in build/sanitize/ that stop at the first bad memory access or undefined operation
#   CC, CFLAGS, CPPFLAGS, LDFLAGS, PREFIX, DESTDIR as everywhere; NATIVE is -march=native where cc has it
CFLAGS   ?= $(if $(SANITIZER),-O1 -g,-O3) $(NATIVE)
OPENMP   ?= 1
BLAS     ?= auto
MPI      ?= 0
SANITIZE ?= 0
PREFIX   ?= /usr/local
.DEFAULT_GOAL := all

# What `make bench` measures: the lengths of a batch's sequences, and train_gpt2's options.
LENGTHS       ?= 64,64,64,64
BENCH_OPTIONS ?= --init d12

# What `make train` does: a small model, from nothing, on stories that data/stories makes up; and `make finetune`: the
# same model learns to answer questions: by the lower block's attention, which has to look for the person and the fact
# that is asked for; all else, where the knowledge is, stays as it is. So small a model wants larger rates than 5e-5.
#
#   make train SEED=2 OUT=out2                         another seed, and other folders: out2/, out2-finetuned/ (a model
#                                                      that is finished stays as it is)
#   make train TRAIN_OPTIONS="--learning-rate 1e-3"    and FINETUNE_OPTIONS: train_gpt2's options, by their long names,
#                                                      added to these; one that is among them takes its place
SEED := 1337
OUT  := out
TRAIN_DEFAULTS    := --seed=$(SEED) --init=d4 --n-layer=2 --n-head=8 --n-embd=128 --n-positions=64 --batch-size=16 \
                     --epochs=3 --learning-rate=2e-3 --schedule=cosine --warmup-steps=5% --beta2=0.95 --val-every=200
FINETUNE_DEFAULTS := --seed=$(SEED) --freeze='wte|wpe|mlp|h.1.' --batch-size=32 --seq-len=64 --epochs=4 \
                     --learning-rate=2e-3 --beta2=0.95 --val-every=125
TRAIN_OPTIONS     ?=
FINETUNE_OPTIONS  ?=
# $(call with,DEFAULTS,ADDED): the defaults that are not named among the added options, then these
with = $(filter-out $(foreach word,$(filter --%,$2),$(firstword $(subst =, ,$(word)))=%),$1) $2

STORIES   := build/data/stories_val.txt
QUESTIONS := build/data/questions_train.jsonl
HELD_OUT  := build/data/questions_held_out.jsonl

ifeq ($(SANITIZE),1)
O         := build/sanitize/
SANITIZER := -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
train_gpt2 tokenizer test_gpt2 data/stories: %: $(O)%
.PHONY: train_gpt2 tokenizer test_gpt2 data/stories
endif
PROGRAMS := $(addprefix $(O),train_gpt2 tokenizer test_gpt2 data/stories)
WARNINGS  = -Wall -Wextra
FLAGS     = -std=gnu11 -fno-math-errno $(WARNINGS) $(CFLAGS) $(SANITIZER) $(OPENMP_FLAGS) $(BLAS_FLAGS) $(MPI_FLAGS) \
            $(CPPFLAGS)
LIBS      = $(LDFLAGS) $(BLAS_LIBS) $(MPI_LIBS) $(OPENMP_LIBS) -lm

all: $(PROGRAMS) ## build train_gpt2, tokenizer, test_gpt2 and data/stories (the default)

# dev/flags.sh asks the compiler once and keeps the answer in a file that every program depends on.
CONFIG := $(if $(O),$(O),build/)config.mk
$(CONFIG): ;
DOWNLOADS := gpt2 gpt2-medium gpt2-large gpt2-xl tinyshakespeare
ifneq ($(filter-out help clean links fuzz $(DOWNLOADS),$(or $(MAKECMDGOALS),all)),)
PROBLEM := $(shell CC='$(CC)' CFLAGS='$(CFLAGS) $(CPPFLAGS)' LDFLAGS='$(LDFLAGS)' \
                   OPENMP='$(OPENMP)' BLAS='$(BLAS)' MPI='$(MPI)' sh dev/flags.sh $(CONFIG))
$(if $(PROBLEM),$(error $(PROBLEM)))
include $(CONFIG)
endif

$(PROGRAMS) $(O)dev/bench $(O)dev/tour $(O)dev/book/numbers: $(O)%: %.c $(CONFIG)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -o $@ $< $(LIBS)
$(O)dev/book/numbers: dev/tour.c
$(O)tokenizer $(O)test_gpt2 $(O)dev/bench $(O)dev/tour $(O)dev/book/numbers: train_gpt2.c
$(O)tokenizer $(O)test_gpt2 $(O)dev/bench $(O)dev/tour $(O)dev/book/numbers: WARNINGS += -Wno-unused-function
$(O)data/stories: LIBS = $(LDFLAGS) -lm

train: all $(STORIES) build/stories_tokenizer/merges.txt ## train a small model on made-up stories
	./$(O)train_gpt2 --tokenizer build/stories_tokenizer --train build/data/stories_train.txt --val $(STORIES) \
	    --out $(OUT) --resume $(call with,$(TRAIN_DEFAULTS),$(TRAIN_OPTIONS))
	@echo; echo "A story by the model, and how many sentences of two hundred stories are right:"; echo
	@./$(O)train_gpt2 --init $(OUT) --generate 60 --temperature 0.7
	@./$(O)train_gpt2 --init $(OUT) --generate 60 --temperature 0.7 --samples 200 | ./$(O)data/stories check

finetune: all $(STORIES) $(QUESTIONS) $(HELD_OUT) ## teach that model to answer questions about the stories
	[ -f $(OUT)/model.safetensors ] || $(MAKE) train
	./$(O)train_gpt2 --init $(OUT) --train $(QUESTIONS) --val $(HELD_OUT) --out $(OUT)-finetuned --resume \
	    $(call with,$(FINETUNE_DEFAULTS),$(FINETUNE_OPTIONS))
	@for model in $(OUT) $(OUT)-finetuned; do echo; echo "$$model: held-out questions, then the stories:"; \
	    ./$(O)train_gpt2 --init $$model --eval --val $(HELD_OUT) --quiet && \
	    ./$(O)train_gpt2 --init $$model --eval --val $(STORIES) --quiet || exit 1; done

demonstration: $(STORIES) $(QUESTIONS) $(HELD_OUT) build/stories_tokenizer/merges.txt
demonstration: all ## measure train and finetune with several SEEDS
	sh dev/demonstration.sh $(SEEDS)

build/data/stories_train.txt: STORY_OPTIONS = --seed 1 --megabytes 4
build/data/stories_val.txt:   STORY_OPTIONS = --seed 2 --megabytes 0.05
build/data/stories_%.txt: data/stories.c | $(O)data/stories
	@mkdir -p $(@D)
	./$(O)data/stories text $(STORY_OPTIONS) > $@.part && mv $@.part $@
build/data/questions_train.jsonl:    STORY_OPTIONS = --seed 1 --count 4000
build/data/questions_held_out.jsonl: STORY_OPTIONS = --seed 2 --count 400 --held-out
build/data/questions_%.jsonl: data/stories.c | $(O)data/stories
	@mkdir -p $(@D)
	./$(O)data/stories questions $(STORY_OPTIONS) > $@.part && mv $@.part $@
build/stories_tokenizer/merges.txt: build/data/stories_train.txt | $(O)tokenizer
	./$(O)tokenizer train --vocab-size 1024 --out $(@D) $<

test: all $(O)dev/tour ## run every test; needs no Python and no network
	./$(O)dev/tour --check dev/tour.md
	@# passive: threads that wait do not take the processor from others
	OMP_WAIT_POLICY=passive ./$(O)test_gpt2

test-mpi: all ## one model on several processes: Open MPI's and MPICH's, whichever are here
	sh dev/mpi_test.sh

links: ## repair the line numbers of README's links into train_gpt2.c
	sh dev/links.sh README.md

torture: $(O)train_gpt2 ## kills, errors, full disks, power cuts at every place of a run: MINUTES=5, or KILLS=n FAULTS=n
	PROGRAM=$(O)train_gpt2 python3 dev/torture/torture.py

fuzz: ## damaged files and words by the million, SECONDS=60 for each TARGET (needs clang)
	sh dev/fuzz/run.sh $(or $(SECONDS),60) $(TARGET)

bench: all $(O)dev/bench ## how close a step comes to the machine's limit, kernel by kernel
	./$(O)dev/bench $(LENGTHS) $(BENCH_OPTIONS)

tour: $(O)dev/tour ## walk one batch through the program; dev/tour.md explains what it prints
	./$(O)dev/tour

BOOK := build/book
book: $(O)dev/book/numbers ## make build/book/index.html: source, derivations and tour side by side; needs Python
	@mkdir -p $(BOOK)
	sh dev/venv.sh build/venv-book dev/book/requirements.txt
	./$(O)dev/book/numbers > $(BOOK)/numbers.json
	build/venv-book/bin/python dev/book/build.py --numbers $(BOOK)/numbers.json --out $(BOOK)/index.html

book-test: book ## check that page, in headless Chromium too where there is one
	@PYTHONDONTWRITEBYTECODE=1 build/venv-book/bin/python dev/book/test.py

recipe: all ## test each claim of the fine-tuning recipe: tables and pictures in build/recipe (needs gnuplot)
	sh dev/recipe/run.sh

plot: ## draw out/log.csv as out/log.png (needs gnuplot); OUT=... draws other runs
	sh dev/plot.sh $(OUT)

compare-test: all ## compare with PyTorch, live; makes itself a Python environment first
	sh dev/compare_test.sh

gpt2 gpt2-medium gpt2-large gpt2-xl: ## download that GPT-2 into a model folder of the same name
	sh data/gpt2.sh $@

tinyshakespeare: ## download tiny Shakespeare, as text and as tokens
	sh data/tinyshakespeare.sh --shards

compare: all ## results, speed and memory beside PyTorch's; COMPARE_OPTIONS="--model DIR --data FILE"
	SCRIPT=dev/compare_pytorch.py sh dev/compare_test.sh $(COMPARE_OPTIONS)

install: $(O)train_gpt2 $(O)tokenizer ## copy train_gpt2 and tokenizer to PREFIX/bin
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	install -m 755 $^ $(DESTDIR)$(PREFIX)/bin

clean: ## remove what was built; trained models in out/ stay
	rm -rf build train_gpt2 tokenizer test_gpt2 data/stories dev/bench dev/tour dev/book/numbers

show-blas: ## say which BLAS the programs are built with
	@echo $(BLAS_NAME)

help:
	@sed -n 's/^\([a-z][a-z0-9 -]*\):.*## /  make \1: /p' Makefile

.PHONY: all train finetune demonstration test test-mpi torture fuzz links bench tour book book-test recipe plot compare-test \
        compare $(DOWNLOADS) install clean show-blas help
