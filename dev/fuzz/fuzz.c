// fuzz.c - libFuzzer targets for whatever reads files or words that somebody else may have written.
//
// dev/fuzz/run.sh builds it and runs all targets; by hand: FUZZ_TARGET=json build/fuzz/fuzz dev/fuzz/seeds/json
// With FUZZ_LARGE=1, and built without sanitizers, a part of each input is repeated until there is 1 MB: that shows what
// takes time or memory that grows faster than the input. The part is what stands between two bytes 30, or the middle
// third; each # in it becomes a number, 256 in the first copy, 257 in the second, and so on.
//
// The program ends when it refuses a file. Here exit() jumps back instead, and what was allocated, mapped and opened is
// taken back. An input fails when a sanitizer or a check here stops it, when it takes over a second of processor time,
// and when it takes over 100 MB.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <fcntl.h>
#include <glob.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ---- what the program gets instead of C's library ----

typedef struct HeapBlock { // stands before each block of memory: a ring
    struct HeapBlock *previous, *next;
    size_t size;
    size_t is_mapped;
} HeapBlock;

static HeapBlock blocks = {&blocks, &blocks, 0, 0}; // of this input
static size_t in_use;                               // bytes in it
static HeapBlock *classes; // the last tokenizer's table of characters, which the next one fills in the same way
static jmp_buf refused;
enum { CLASSES_SIZE = 0x110000, LARGE = 1 << 20, MEMORY_LIMIT = 100 << 20, UNDO_MAX = 64 };
static struct { // what else must be taken back
    enum { NOTHING, OPEN_FILE, DESCRIPTOR, MAPPING, GLOB, FOLDER } what;
    void *pointer;
    size_t size;
} undo[UNDO_MAX];

static void require(int ok, const char *what) {
    if (ok) return;
    dprintf(STDERR_FILENO + 100, "fuzz: %s\n", what); // standard error as it was at the start
    abort();
}

static void fuzz_free(void *pointer) {
    if (!pointer) return;
    HeapBlock *block = (HeapBlock *)pointer - 1;
    block->previous->next = block->next;
    block->next->previous = block->previous;
    in_use -= block->size;
    if (block->size == CLASSES_SIZE && !classes)
        classes = block;
    else if (block->is_mapped)
        munmap(block, block->size + sizeof *block);
    else
        free(block);
}

static void *enlist(HeapBlock *block, HeapBlock *after, size_t size, size_t is_mapped) {
    require(block != NULL && block != MAP_FAILED, "no memory");
    *block = (HeapBlock){after, after->next, size, is_mapped};
    block->next->previous = block->previous->next = block;
    in_use += size;
    require(in_use <= MEMORY_LIMIT, "the input takes over 100 MB");
    return block + 1;
}

static void *fuzz_realloc(void *pointer, size_t size) {
    HeapBlock *old = pointer ? (HeapBlock *)pointer - 1 : NULL, *after = old ? old->previous : &blocks;
    require(size <= MEMORY_LIMIT, "the input asks for over 100 MB");
    if (old && old->is_mapped) {
        void *copy = fuzz_realloc(NULL, size);
        memcpy(copy, pointer, size < old->size ? size : old->size);
        fuzz_free(pointer);
        return copy;
    }
    if (old) {
        after->next = old->next;
        old->next->previous = after;
        in_use -= old->size;
    }
    return enlist(realloc(old, size + sizeof *old), after, size, 0);
}

// Large arrays come fresh from the system, so that only the pages that are looked at cost time.
static void *map_block(size_t size) {
    require(size <= MEMORY_LIMIT, "the input asks for over 100 MB");
    if (size == CLASSES_SIZE && classes) {
        HeapBlock *kept = classes;
        classes = NULL;
        return enlist(kept, &blocks, size, 1);
    }
    void *block =
        mmap(NULL, size + sizeof(HeapBlock), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return enlist(block, &blocks, size, 1);
}

static void *fuzz_calloc(size_t count, size_t size) {
    require(size == 0 || count <= MEMORY_LIMIT / size, "the input asks for over 100 MB");
    return count * size >= LARGE ? map_block(count * size)
                                 : memset(fuzz_realloc(NULL, count * size), 0, count * size);
}

static void *fuzz_malloc(size_t size) { return fuzz_realloc(NULL, size); }

static int fuzz_posix_memalign(void **out, size_t alignment, size_t size) {
    (void)alignment; // only for speed
    *out = size >= LARGE ? map_block(size) : fuzz_realloc(NULL, size);
    return 0;
}

static void *fuzz_memset(void *bytes, int value, size_t size) { // what comes from map_block is 0 already
    HeapBlock *block = (HeapBlock *)bytes - 1;
    if (value == 0 && size >= LARGE && block->is_mapped && block->size == size) return bytes;
    return memset(bytes, value, size);
}

static int fuzz_vasprintf(char **out, const char *format, va_list arguments) {
    char *string = NULL;
    int size = vasprintf(&string, format, arguments);
    if (size >= 0) *out = memcpy(fuzz_realloc(NULL, (size_t)size + 1), string, (size_t)size + 1);
    free(string);
    return size;
}

static void __attribute__((noreturn)) fuzz_exit(int status) {
    require(status == 1 || status == 2, "ends with another status than 1 and 2");
    longjmp(refused, status);
}

static void *remember(int what, void *pointer, size_t size) {
    int i = 0;
    while (i < UNDO_MAX && undo[i].what != NOTHING) i++;
    require(i < UNDO_MAX, "too many open files");
    undo[i].what = what;
    undo[i].pointer = pointer;
    undo[i].size = size;
    return pointer;
}

static void forget(int what, void *pointer) {
    for (int i = 0; i < UNDO_MAX; i++)
        if (undo[i].what == (unsigned)what && undo[i].pointer == pointer) undo[i].what = NOTHING;
}

static FILE *fuzz_fopen(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    return file ? remember(OPEN_FILE, file, 0) : NULL;
}

static FILE *fuzz_fdopen(int descriptor, const char *mode) {
    FILE *file = fdopen(descriptor, mode);
    forget(DESCRIPTOR, (void *)(long)descriptor);
    return file ? remember(OPEN_FILE, file, 0) : NULL;
}

static int fuzz_fclose(FILE *file) {
    forget(OPEN_FILE, file);
    return fclose(file);
}

static int fuzz_open(const char *path, int flags, ...) {
    int descriptor = open(path, flags, 0600);
    if (descriptor >= 0) remember(DESCRIPTOR, (void *)(long)descriptor, 0);
    return descriptor;
}

static int fuzz_close(int descriptor) {
    forget(DESCRIPTOR, (void *)(long)descriptor);
    return close(descriptor);
}

static void *fuzz_mmap(void *at, size_t size, int protection, int flags, int descriptor, off_t offset) {
    void *mapping = mmap(at, size, protection, flags, descriptor, offset);
    return mapping == MAP_FAILED ? mapping : remember(MAPPING, mapping, size);
}

static int fuzz_munmap(void *mapping, size_t size) {
    forget(MAPPING, mapping);
    return munmap(mapping, size);
}

static int fuzz_glob(const char *pattern, int flags, int (*error)(const char *, int), glob_t *found) {
    int status = glob(pattern, flags, error, found);
    static glob_t copies[UNDO_MAX]; // `found` lies on the stack that is jumped out of
    static int used;
    glob_t *copy = &copies[used++ % UNDO_MAX];
    *copy = *found;
    if (status == 0) remember(GLOB, copy, (size_t)found->gl_pathv);
    return status;
}

static void fuzz_globfree(glob_t *found) {
    for (int i = 0; i < UNDO_MAX; i++)
        if (undo[i].what == GLOB && undo[i].size == (size_t)found->gl_pathv) undo[i].what = NOTHING;
    globfree(found);
}

static DIR *fuzz_opendir(const char *path) {
    DIR *folder = opendir(path);
    return folder ? remember(FOLDER, folder, 0) : NULL;
}

static int fuzz_closedir(DIR *folder) {
    forget(FOLDER, folder);
    return closedir(folder);
}

// After each input. Returns whether there was anything.
static int take_all_back(void) {
    int any = blocks.next != &blocks;
    while (blocks.next != &blocks) fuzz_free(blocks.next + 1);
    for (int i = 0; i < UNDO_MAX; i++) {
        any |= undo[i].what != NOTHING;
        if (undo[i].what == OPEN_FILE) fclose(undo[i].pointer);
        if (undo[i].what == DESCRIPTOR) close((int)(long)undo[i].pointer);
        if (undo[i].what == MAPPING) munmap(undo[i].pointer, undo[i].size);
        if (undo[i].what == GLOB) globfree(undo[i].pointer);
        if (undo[i].what == FOLDER) closedir(undo[i].pointer);
        undo[i].what = NOTHING;
    }
    return any;
}

#define free fuzz_free
#define malloc fuzz_malloc
#define realloc fuzz_realloc
#define calloc fuzz_calloc
#define posix_memalign fuzz_posix_memalign
#define memset fuzz_memset
#define vasprintf fuzz_vasprintf
#define exit fuzz_exit
#define fopen fuzz_fopen
#define fdopen fuzz_fdopen
#define fclose fuzz_fclose
#define open fuzz_open
#define close fuzz_close
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define glob fuzz_glob
#define globfree fuzz_globfree
#define opendir fuzz_opendir
#define closedir fuzz_closedir
#define TRAIN_GPT2_NO_MAIN
#include "../../train_gpt2.c"
#undef open
#undef close

// ---- inputs ----

typedef struct {
    const char *at, *end;
} Input;

static char folder[64]; // where files of inputs lie, in memory
static Tokenizer *good; // a tokenizer and a model that stay
static Model *small;
static bool large; // inputs of 1 MB

// Writes a file that an input has; the descriptor stays open.
static void put(const char *name, const char *head, size_t head_size, const char *bytes, size_t size) {
    static const char *names[16];
    static int descriptors[16];
    int i = 0;
    while (names[i] && names[i] != name) i++;
    if (!names[i]) {
        names[i] = name;
        descriptors[i] = open(path_of("%s/%s", folder, name), O_RDWR | O_CREAT, 0600);
    }
    size_t whole = head_size + size;
    require(pwrite(descriptors[i], head, head_size, 0) == (ssize_t)head_size &&
                pwrite(descriptors[i], bytes, size, (off_t)head_size) == (ssize_t)size &&
                ftruncate(descriptors[i], (off_t)whole) == 0,
            "a file cannot be written");
}

// The input up to its next NUL, which ends it.
static Input next_part(Input *input) {
    const char *stop = input->at < input->end ? memchr(input->at, 0, (size_t)(input->end - input->at)) : NULL;
    Input part = {input->at, stop ? stop : input->end};
    input->at = stop ? stop + 1 : input->end;
    return part;
}

static void put_part(const char *name, Input *input) {
    Input part = next_part(input);
    put(name, "", 0, part.at, (size_t)(part.end - part.at));
}

// The rest of the input as a safetensors file: JSON, NUL, data; the JSON's length is put before it. One that starts with
// a 1 is the bytes of the file, from the length on.
static void put_tensors(const char *name, Input *input) {
    bool raw = input->at < input->end && *input->at == 1;
    Input header = raw ? *input : next_part(input);
    uint64_t length = (uint64_t)(header.end - header.at);
    Text file = {0};
    text_append(&file, (const char *)&length, raw ? 0 : 8);
    text_append(&file, header.at + raw, length - raw);
    if (!raw) text_append(&file, input->at, (size_t)(input->end - input->at));
    put(name, "", 0, file.data, file.size);
    free(file.data);
}

// ---- targets ----

static void touch(const Json *node, int *count) {
    for (; node; node = node->next) {
        *count += node->key ? (int)strlen(node->key) : 1;
        if (node->kind == JSON_STRING) require(strlen(node->string) <= node->length, "a string without an end");
        touch(json_child(node), count);
    }
}

static void try_json(Input input) {
    int count = 0;
    Json *json = json_parse(input.at, (size_t)(input.end - input.at), "input");
    touch(json, &count);
    json_free(json);
}

// config.json, then model.safetensors: what loads must also compute.
static void try_model(Input input) {
    put_part("config.json", &input);
    put_tensors("model.safetensors", &input);
    Model *model = model_load(folder);
    model_set_training(model, &(Patterns){0}, &(Patterns){0});
    if (count_parameters(model, false) < 20000) {
        Batch batch = {0};
        Activations a = {0};
        batch_clear(&batch);
        for (int i = 0; i < model->config.n_positions && i < 3; i++)
            batch_add_row(&batch, i % model->config.vocab_size, i, i % model->config.vocab_size);
        batch_end_sequence(&batch);
        activations_reserve(&a, model, batch.rows, KEEP_NOTHING);
        model_forward(model, &a, &batch, NULL, (Dropout){0});
        classifier(model, &a, &batch, false, 0, false);
        activations_free(&a);
        batch_free(&batch);
    }
    model_free(model);
}

// Text must come back whole, if added tokens that drop white space are not looked for; cut text must have the ids of
// uncut text.
static void try_encoding(Tokenizer *t, const char *text, size_t size) {
    for (int added = large; added < 2; added++) { // a large text once: its time counts
        Ids whole = {0}, parts = {0};
        Text back = {0};
        t->plain = !added;
        tokenizer_encode(t, &whole, text, size);
        for (size_t i = 0; i < whole.size; i++) tokenizer_decode(t, &back, whole.data[i]);
        require(added || (back.size == size && (size == 0 || memcmp(back.data, text, size) == 0)),
                "decoding gives another text");
        for (size_t at = 0, cut, end = size / 3; at < size && !large; at += cut, end = end < at ? at : end) {
            cut = tokenizer_cut(t, text + at, end - at);
            if (cut == 0) end = end == size ? size : end + (size - end + 1) / 2;
            if (cut == 0 && end == size) cut = size - at;
            tokenizer_encode(t, &parts, text + at, cut);
        }
        require(large || (whole.size == parts.size &&
                          (size == 0 || !memcmp(whole.data, parts.data, whole.size * sizeof(int)))),
                "cut text has other ids");
        free(whole.data);
        free(parts.data);
        free(back.data);
    }
    require(utf8_whole(text, size) <= size && size - utf8_whole(text, size) < 4,
            "more than a character is kept back");
}

// The files of a tokenizer, as the first byte says, and a text. An empty part stands for an empty object.
static void try_tokenizer(Input input) {
    static const char *const files[3][6] = {{"merges"},
                                            {"pair/vocab.json", "pair/merges.txt", "pair/tokenizer_config.json",
                                             "pair/special_tokens_map.json", "pair/added_tokens.json",
                                             "pair/config.json"},
                                            {"whole/tokenizer.json", "whole/tokenizer_config.json", "whole/config.json"}};
    static const char none[] = "{}", *const paths[3] = {"merges", "pair", "whole"};
    int kind = input.at < input.end ? (unsigned char)*input.at++ % 3 : 0;
    for (int i = 0; i < 6 && files[kind][i]; i++) {
        Input part = next_part(&input);
        if (part.at == part.end && i > 0 && kind > 0 && i + kind != 2) part = (Input){none, none + 2};
        put(files[kind][i], "", 0, part.at, (size_t)(part.end - part.at));
    }
    Tokenizer *t = tokenizer_load(path_of("%s/%s", folder, paths[kind]));
    try_encoding(t, input.at, (size_t)(input.end - input.at));
    tokenizer_free(t);
}

// Reads a data file and packs all its examples; each token must be one of the vocabulary.
static void try_data(const char *name, Input input) {
    put(name, "", 0, input.at, (size_t)(input.end - input.at));
    Dataset *data = dataset_load(path_of("%s/%s", folder, name), good, 8, good->vocab_size);
    Batch batch = {0};
    size_t rows, targets, *order = dataset_order(data, 1, 0);
    dataset_size(data, &rows, &targets);
    for (size_t i = 0; i < data->count; i++) {
        dataset_batch(data, order, i, 1, &batch);
        require(batch.rows >= 1 && batch.rows <= 8, "an example of another length than 1 to --seq-len");
        for (int r = 0; r < batch.rows; r++)
            require(batch.token[r] >= 0 && batch.token[r] < good->vocab_size && batch.target[r] >= -1 &&
                        batch.target[r] < good->vocab_size,
                    "a token that the vocabulary does not have");
    }
    free(order);
    batch_free(&batch);
    dataset_free(data);
}

static void try_text(Input input) {
    if (!large) try_encoding(good, input.at, (size_t)(input.end - input.at));
    try_data("data.txt", input);
}

static void try_jsonl(Input input) { try_data("data.jsonl", input); }
static void try_shard(Input input) { try_data("data.bin", input); }

static bool same_words(const Patterns *a, const Patterns *b) {
    for (size_t i = 0; i < a->size && a->size == b->size; i++)
        if (strcmp(a->items[i], b->items[i]) != 0) return false;
    return a->size == b->size;
}

// What a checkpoint remembers of options must give the same options when it is read again.
static void check_options(const Options *options) {
    Patterns saved = options_to_save(options), words = {0};
    add_pattern(&words, "train_gpt2");
    for (size_t i = 0; i < saved.size; i++) add_pattern(&words, saved.items[i]);
    Options again;
    parse_options(&again, NULL, (int)words.size, (char **)words.items);
    Patterns saved_again = options_to_save(&again);
    require(same_words(&saved, &saved_again), "saved options give other options");
}

// A command line, a word a line.
static void try_options(Input input) {
    Patterns words = {0};
    Text text = {0};
    text_append(&text, input.at, (size_t)(input.end - input.at));
    add_pattern(&words, "train_gpt2");
    for (char *rest = text.data; rest && words.size < 10000;) add_pattern(&words, strsep(&rest, "\n"));
    Options options;
    parse_options(&options, NULL, (int)words.size, (char **)words.items);
    if (!options.generate && !options.eval) check_options(&options);
    warmup_of(&options, 1000, 100);
}

// trainer_state.json and optimizer.safetensors of a checkpoint of step 12.
static void try_state(Input input) {
    put_part("trainer_state.json", &input);
    put_tensors("optimizer.safetensors", &input);
    Options options;
    char *words[] = {"train_gpt2", "--resume", NULL};
    parse_options(&options, path_of("%s/trainer_state.json", folder), 2, words);
    check_options(&options);
    Run run = {.options = &options, .model = small};
    load_trainer_state(&run, folder, 12);
}

static void resume_log(Run *run) {
    run->log = lock_log(folder, true);
    begin_log(run);
    fclose(run->log);
}

// log.csv, as a resumed run finds it; the first byte is the step.
static void try_log(Input input) {
    Options options = {.out = folder};
    Run run = {.options = &options, .step = input.at < input.end ? (unsigned char)*input.at++ : 0};
    run.evaluated_step = run.step;
    put("log.csv", "", 0, input.at, (size_t)(input.end - input.at));
    resume_log(&run);
    Text once = read_file(path_of("%s/log.csv", folder));
    resume_log(&run);
    Text twice = read_file(path_of("%s/log.csv", folder));
    require(once.size == twice.size && memcmp(once.data, twice.data, once.size) == 0,
            "resumed twice: another log");
    require(once.size > 0 && once.data[once.size - 1] == '\n', "the log's last line has no end");
}

static const struct {
    const char *name;
    void (*run)(Input);
    bool leaves; // what it leaves is no leak: options, and the list of mapped files, live as long as the program
} targets[] = {
    {"json", try_json, false},  {"model", try_model, true},    {"tokenizer", try_tokenizer, false},
    {"text", try_text, false},  {"jsonl", try_jsonl, false},    {"shard", try_shard, true},
    {"state", try_state, true}, {"options", try_options, true}, {"log", try_log, true}};

// ---- the driver ----

static int target;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *wanted = getenv("FUZZ_TARGET");
    large = getenv("FUZZ_LARGE") != NULL;
    dup2(STDERR_FILENO, STDERR_FILENO + 100);
    while (target < 9 && (!wanted || strcmp(wanted, targets[target].name) != 0)) target++;
    require(target < 9,
            "FUZZ_TARGET: one of json model tokenizer text jsonl shard state options log expected");
    strcpy(folder, access("/dev/shm", W_OK) == 0 ? "/dev/shm/fuzz.XXXXXX" : "/tmp/fuzz.XXXXXX");
    require(mkdtemp(folder) != NULL, "no folder for files");
    make_folder(path_of("%s/pair", folder));
    make_folder(path_of("%s/whole", folder));
    static char buffer[1 << 16];
    setvbuf(stderr, buffer, _IOFBF, sizeof buffer); // messages go nowhere, and rarely
    static const char merges[] =
        "a a\naa a\nĠ a\nĠa b\na b\nab ab\nb c\nĊ Ċ\nĊĊ ĊĊ\naa aa\naaaa aaaa\nt e\ne x\nÃ ©\nĠ Ġ\nĠĠ Ġ\n";
    put("good", "", 0, merges, sizeof merges - 1);
    good = tokenizer_load(path_of("%s/good", folder));
    Ids ids = {0};
    tokenizer_encode(good, &ids, "aaaa", 4); // makes its encoder
    small = model_new((Config){.vocab_size = 3,
                               .n_positions = 2,
                               .n_layer = 1,
                               .n_head = 1,
                               .n_embd = 2,
                               .n_inner = 1,
                               .layer_norm_epsilon = 1e-5f,
                               .tie_word_embeddings = true});
    model_set_training(small, &(Patterns){0}, &(Patterns){0});
    static HeapBlock kept; // a ring of its own: these stay
    kept = blocks;
    kept.next->previous = kept.previous->next = &kept;
    blocks.next = blocks.previous = &blocks;
    in_use = 0;
    return 0;
}

static void run_target(Input input) {
    int status = setjmp(refused);
    if (status == 0) targets[target].run(input);
    if (take_all_back()) require(status != 0 || targets[target].leaves, "memory or files are left over");
    in_use = 0;
    mapped_files = NULL; // the program's list of them; its memory was just taken back
    mapped_count = mapped_capacity = 0;
}

// The input with its part repeated.
static Input repeat(const char *data, size_t size) {
    static char out[1 << 20];
    const char *end = data + size, *part = memchr(data, 30, size),
               *stop = part ? memchr(part + 1, 30, (size_t)(end - part - 1)) : NULL;
    if (!stop) part = data + size / 3, stop = data + 2 * (size / 3);
    const bool marked = *part == 30 && *stop == 30;
    size_t used = (size_t)(part - data), rest = (size_t)(end - stop) - marked;
    memcpy(out, data, used);
    part += marked;
    for (int number = 256; part < stop && used + 8 * (size_t)(stop - part) + rest < sizeof out; number++)
        for (const char *c = part; c < stop; c++)
            if (*c == '#')
                used += (size_t)sprintf(out + used, "%d", number);
            else
                out[used++] = *c;
    memcpy(out + used, end - rest, rest);
    return (Input){out, out + used + rest};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct timespec begin, stop;
    Input input = {(const char *)data, (const char *)data + size};
    if (large && size >= 3) input = repeat(input.at, size);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    run_target(input);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &stop);
    double seconds = (double)(stop.tv_sec - begin.tv_sec) + 1e-9 * (double)(stop.tv_nsec - begin.tv_nsec);
    require(seconds < 1, "the input takes over a second");
    return 0;
}
