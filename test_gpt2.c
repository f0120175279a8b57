// test_gpt2.c - every test of the project: make test
//
//   ./test_gpt2                          all tests, a line each, and at the end `N passed, N failed`
//   ./test_gpt2 WORD...                  only the tests whose name contains one of the words
//   ./test_gpt2 --reference DIR...       compare with what PyTorch computed (dev/reference.py made DIR)
//   ./test_gpt2 --reference DIR --dump FILE.safetensors    the same, and write what we computed
//
// Reference values come from PyTorch or from arithmetic in double precision, never from our own output.

#define TRAIN_GPT2_NO_MAIN
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// Each call of the program that changes files, or brings them to the disk, can be made the last thing that the
// process does (FAULT=kill:N, the N-th call) or fail (FAULT=error:N): see test_faults.
static bool fault(void) {
    static long calls = 0, at = -1;
    static bool kills = false;
    if (at < 0) {
        const char *wanted = getenv("FAULT");
        at = wanted ? atol(strchr(wanted, ':') + 1) : 0;
        kills = wanted && wanted[0] == 'k';
    }
    if (++calls != at) return false;
    if (kills) raise(SIGKILL);
    errno = EIO;
    return true;
}
#define rename(from, to) (fault() ? -1 : rename(from, to))
#define unlink(path) (fault() ? -1 : unlink(path))
#define rmdir(path) (fault() ? -1 : rmdir(path))
#define mkdir(path, mode) (fault() ? -1 : mkdir(path, mode))
#define fsync(descriptor) (fault() ? -1 : fsync(descriptor))
#define ftruncate(descriptor, size) (fault() ? -1 : ftruncate(descriptor, size))
#define opendir(path) (fault() ? NULL : opendir(path))
#define fflush(file) ((file) != stdout && fault() ? EOF : fflush(file))

#include "train_gpt2.c"
#include <poll.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <sys/wait.h>

// What take_update() wants, out of options.
#define HYPERPARAMETERS(options) ((Hyperparameters[1]){hyperparameters_of(options)})

#pragma GCC diagnostic ignored "-Wunused-function"

// ---- harness ----

// Programs that end in die() free nothing, on purpose: no reports of leaks in what tests capture.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

static const char *current_test = "";
static int failures_of_test = 0;
static size_t checks_of_test = 0; // a test that makes none has failed: see main
static char self_path[4096];      // of this program, which also acts as the trainer: see run_trainer

// Records whether something holds; says what when it does not.
static void __attribute__((format(printf, 2, 3))) check(bool ok, const char *format, ...) {
    checks_of_test++;
    if (ok || ++failures_of_test > 5) return;
    va_list arguments;
    va_start(arguments, format);
    printf("    %s: ", current_test);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

static char *temporary_folder(void) {
    static char *folder = NULL;
    if (!folder && getenv("CHILD_FOLDER"))
        folder = getenv("CHILD_FOLDER"); // that of the process which started us
    if (!folder) {
        const char *parent = getenv("TMPDIR");
        folder = xprintf("%s/test_gpt2.XXXXXX", parent && *parent ? parent : "/tmp");
        if (!mkdtemp(folder)) die("%s: cannot be made: %s", folder, strerror(errno));
    }
    return folder;
}

static const char *child_text = "", *child_path = ""; // what a child process is to read

// Runs f in a new process of this program with its standard error captured; returns its exit status, or 128 + signal.
// f finds child_text and child_path as they are here, and nothing else: it is no forked copy of this process, for
// that would have none of its threads, and some OpenMP runtimes then wait for them for ever.
static int run_child(void (*f)(void), Text *stderr_text) {
    int ends[2], status;
    char place[32];
    fflush(stdout);
    if (pipe(ends) != 0) die("pipe: %s", strerror(errno));
    snprintf(place, sizeof place, "%td", (char *)f - (char *)run_child); // wherever the program is loaded
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        setenv("CHILD_TEXT", child_text, 1);
        setenv("CHILD_PATH", child_path, 1);
        setenv("CHILD_FOLDER", temporary_folder(), 1);
        setenv("OMP_NUM_THREADS", "1", 1);
        execl(self_path, self_path, "--child", place, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    FILE *file = fdopen(ends[0], "r");
    read_stream(stderr_text, file, "standard error of a test");
    fclose(file);
    if (waitpid(child, &status, 0) != child) die("waitpid: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Runs `train_gpt2 ARGUMENTS` (words of a shell command) in a process of its own; returns the exit status,
// and in `out` what it printed on both streams.
static int __attribute__((format(printf, 2, 3))) run_trainer(Text *out, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char *words = NULL;
    if (vasprintf(&words, format, arguments) < 0) die("out of memory");
    va_end(arguments);
    char *command = xprintf("'%s' --trainer %s 2>&1 </dev/null", self_path, words);
    fflush(stdout);
    FILE *pipe = popen(command, "r");
    out->size = 0;
    read_stream(out, pipe, command);
    int status = pclose(pipe);
    free(command);
    free(words);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// ---- references: what PyTorch computed for a model, a batch and some AdamW steps ----

// The worst deviation of one kind of value (logits, gradients, ...) over all tensors of that kind.
typedef struct {
    const char *kind;
    double absolute, relative;
    char where[128];
    size_t outside; // values outside the tolerance
    size_t compared;
} Worst;

// |ours - theirs| <= 1e-5 scale + 1e-4 |theirs|, scale being the tensor's largest magnitude
static void compare_values(Worst *worst, const char *name, const float *ours, const StoredTensor *theirs) {
    const float *expected = (const float *)theirs->data;
    double scale = 0;
    for (size_t i = 0; i < theirs->count; i++) scale = fabs(expected[i]) > scale ? fabs(expected[i]) : scale;
    for (size_t i = 0; i < theirs->count; i++) {
        double error = fabs((double)ours[i] - expected[i]);
        bool inside = error <= 1e-5 * scale + 1e-4 * fabs(expected[i]); // false for NaN
        if (!(error / (scale + 1e-30) <= worst->relative)) {
            worst->relative = error / (scale + 1e-30);
            snprintf(worst->where, sizeof worst->where, "%s", name);
        }
        if (!(error <= worst->absolute)) worst->absolute = error;
        worst->outside += !inside;
    }
    worst->compared += theirs->count;
}

// Compares updates: |(ours - initial) - (theirs - initial)| / |theirs - initial| <= 1e-3 in the L2 norm,
// since AdamW magnifies rounding where a gradient is nearly zero. What does not move in PyTorch must be the
// same to the bit.
static void compare_update(Worst *worst, const Tensor *tensor, const float *initial,
                           const StoredTensor *theirs) {
    const float *expected = (const float *)theirs->data;
    double difference = 0, moved = 0;
    for (size_t i = 0; i < theirs->count; i++) {
        difference += pow((double)tensor->value[i] - expected[i], 2);
        moved += pow((double)expected[i] - initial[i], 2);
        worst->absolute = fmax(worst->absolute, fabs((double)tensor->value[i] - expected[i]));
    }
    bool same = memcmp(tensor->value, expected, theirs->bytes) == 0;
    double relative = same ? 0 : sqrt(difference) / sqrt(moved);
    if (!(relative <= worst->relative)) {
        worst->relative = relative;
        snprintf(worst->where, sizeof worst->where, "%s", tensor->name);
    }
    worst->outside += !(relative <= 1e-3) || (tensor->frozen && !same);
    worst->compared += theirs->count;
}

static const StoredTensor *reference_tensor(const SafeTensors *file, const char *name, const char *dtype,
                                            size_t count, const char *path) {
    const StoredTensor *tensor = safetensors_find(file, name);
    if (!tensor) die("%s: tensor %s is missing", path, name);
    if (strcmp(tensor->dtype, dtype) != 0 || (count && tensor->count != count))
        die("%s: tensor %s must be %s with %zu elements", path, name, dtype, count);
    return tensor;
}

// Logits (R, V) of every row of a batch.
static void all_logits(const Model *model, Activations *a, const Batch *batch, float *logits) {
    const size_t V = (size_t)model->config.vocab_size;
    int rows[LOGIT_ROWS];
    activations_reserve(a, model, batch->rows, a->keep);
    model_forward(model, a, batch, NULL, (Dropout){0});
    for (int begin = 0, n; begin < batch->rows; begin += n) {
        n = batch->rows - begin < LOGIT_ROWS ? batch->rows - begin : LOGIT_ROWS;
        for (int i = 0; i < n; i++) rows[i] = begin + i;
        head_forward(model, a, rows, n);
        memcpy(logits + (size_t)begin * V, a->logits, (size_t)n * V * sizeof(float));
    }
}

// Packs a padded batch in Hugging Face's form; the mask may have its zeros left, right or in the middle.
//   input_ids, attention_mask (B, T); position_ids (B, T) or NULL: cumsum(attention_mask) - 1;
//   labels (B, T) or NULL, aligned with input_ids: row t is scored against labels[t + 1], -100 is not scored.
static void pack_padded(Batch *batch, const int64_t *input_ids, const int64_t *attention_mask,
                        const int64_t *position_ids, const int64_t *labels, int B, int T) {
    batch_clear(batch);
    for (int b = 0; b < B; b++) {
        int real = 0; // tokens of this sequence so far
        for (int t = 0; t < T; t++) {
            size_t i = (size_t)b * T + t;
            if (!attention_mask[i]) continue;
            bool scored = labels && t + 1 < T && labels[i + 1] >= 0;
            batch_add_row(batch, (int)input_ids[i], position_ids ? (int)position_ids[i] : real,
                          scored ? (int)labels[i + 1] : -1);
            real++;
        }
        batch_end_sequence(batch);
    }
}

// The way back: rows (R, width) of pack_padded's batch to their places in padded (B, T, width), zeros at PAD.
static void unpack_rows(float *padded, const float *rows, const int64_t *attention_mask, int B, int T,
                        size_t width) {
    size_t row = 0;
    for (size_t i = 0; i < (size_t)B * T; i++) {
        if (attention_mask[i])
            memcpy(padded + i * width, rows + row++ * width, width * sizeof(float));
        else
            memset(padded + i * width, 0, width * sizeof(float));
    }
}

// Splits a string of options at spaces and parses it as a command line.
static void options_from_text(Options *options, const char *text) {
    char *copy = xstrdup(text), *words[256] = {"train_gpt2"};
    int count = 1;
    for (char *word = strtok(copy, " "); word && count < 255; word = strtok(NULL, " ")) words[count++] = word;
    parse_options(options, NULL, count, words); // values are copied
    free(copy);
}

static void keep_tensor(StoredTensor **list, size_t *count, size_t *capacity, const char *prefix,
                        const char *name, const StoredTensor *shape, const float *data) {
    *list = grow(*list, *count + 1, capacity, sizeof **list);
    StoredTensor *kept = &(*list)[(*count)++];
    *kept = *shape;
    kept->name = xprintf("%s%s", prefix, name);
    kept->data = xmalloc(shape->bytes);
    memcpy(kept->data, data, shape->bytes);
}

// What is compared, in this order.
enum { LOGITS, LOSS, GRADIENTS, LOSSES, NORMS, RATES, UPDATES, KINDS };

// A reference folder at work: what PyTorch computed, our model and batches, and what we computed so far.
typedef struct {
    const char *folder;
    char *path; // of its reference.safetensors
    SafeTensors file;
    Options options;
    Model *model;
    int B, T, A; // sequences, their length, micro-batches
    Batch whole, *batches;
    const int64_t *mask; // (B, T)
    Activations activations;
    StoredTensor *kept; // ours, for --dump
    size_t kept_count, kept_capacity;
    Worst worst[KINDS];
} Reference;

// Packs the reference's sequences as one batch and as its micro-batches.
static void reference_batches(Reference *r) {
    const StoredTensor *ids = reference_tensor(&r->file, "input_ids", "I64", 0, r->path);
    if (ids->dims != 2) die("%s: input_ids must be [B, T]", r->path);
    const int B = r->B = (int)ids->shape[0], T = r->T = (int)ids->shape[1];
    const int A = r->A = (int)r->options.accumulate;
    const int64_t V = r->model->config.vocab_size, P = r->model->config.n_positions;
    static const char *const names[] = {"input_ids", "attention_mask", "position_ids", "labels"};
    const int64_t *data[4]; // of these names
    for (int i = 0; i < 4; i++)
        data[i] = (int64_t *)reference_tensor(&r->file, names[i], "I64", ids->count, r->path)->data;
    const int64_t *input_ids = data[0], *mask = r->mask = data[1], *positions = data[2], *labels = data[3];
    for (size_t i = 0; i < ids->count; i++)
        if (mask[i] && (input_ids[i] < 0 || input_ids[i] >= V || positions[i] < 0 || positions[i] >= P ||
                        labels[i] >= V))
            die("%s: token, position or label out of range at element %zu", r->path, i);
    if (T > P) die("%s: sequences of %d, but the model has %d positions", r->path, T, (int)P);
    if (B % A) die("%s: %d sequences do not make %d micro-batches", r->path, B, A);
    pack_padded(&r->whole, input_ids, mask, positions, labels, B, T);
    r->batches = xcalloc((size_t)A, sizeof *r->batches);
    for (int a = 0; a < A; a++) {
        size_t begin = (size_t)a * (B / A) * T;
        pack_padded(&r->batches[a], input_ids + begin, mask + begin, positions + begin, labels + begin, B / A,
                    T);
    }
}

static Reference reference_open(const char *folder, bool recompute) {
    static const char *const kinds[KINDS] = {"logits", "loss",  "gradients", "losses",
                                             "norms",  "rates", "updates"};
    Reference r = {.folder = folder, .path = xprintf("%s/reference.safetensors", folder)};
    for (int i = 0; i < KINDS; i++) r.worst[i].kind = kinds[i];
    r.file = safetensors_open(r.path);
    const Json *metadata = json_get(json_get(r.file.header, "__metadata__"), "options");
    options_from_text(&r.options, metadata && metadata->string ? metadata->string : "");
    r.options.recompute = recompute;
    r.activations.keep = recompute ? KEEP_INPUTS : KEEP_ALL;
    r.model = model_load(folder);
    model_set_training(r.model, &r.options.freeze, &r.options.no_decay);
    model_allocate_training(r.model, true);
    reference_batches(&r);
    return r;
}

static void reference_close(Reference *r) {
    for (size_t i = 0; i < r->kept_count; i++) {
        free((char *)r->kept[i].name);
        free(r->kept[i].data);
    }
    free(r->kept);
    for (int a = 0; a < r->A; a++) batch_free(&r->batches[a]);
    free(r->batches);
    batch_free(&r->whole);
    activations_free(&r->activations);
    model_free(r->model);
    safetensors_close(&r->file, false);
    free(r->path);
}

// Keeps `ours`, `count` floats, and returns PyTorch's tensor of that name.
static const StoredTensor *reference_keep(Reference *r, const char *name, const float *ours, size_t count) {
    const StoredTensor *theirs = reference_tensor(&r->file, name, "F32", count, r->path);
    keep_tensor(&r->kept, &r->kept_count, &r->kept_capacity, "", name, theirs, ours);
    return theirs;
}

static void reference_compare(Reference *r, int kind, const char *name, const float *ours, size_t count) {
    compare_values(&r->worst[kind], name, ours, reference_keep(r, name, ours, count));
}

// One pass over all sequences: logits, loss and gradients.
static void reference_pass(Reference *r) {
    const size_t V = (size_t)r->model->config.vocab_size, padded_size = (size_t)r->B * (size_t)r->T * V;
    float *packed = xfloats((size_t)r->whole.rows * V), *padded = xfloats(padded_size);
    all_logits(r->model, &r->activations, &r->whole, packed);
    unpack_rows(padded, packed, r->mask, r->B, r->T, V);
    reference_compare(r, LOGITS, "logits", padded, padded_size);
    free(packed);
    free(padded);

    const int targets = r->whole.targets;
    double total = 0;
    for (int a = 0; a < r->A; a++) {
        activations_reserve(&r->activations, r->model, r->batches[a].rows, r->activations.keep);
        total += model_forward_backward(r->model, &r->activations, &r->batches[a],
                                        targets ? 1.0f / (float)targets : 0, a > 0, (Dropout){0});
    }
    float loss = targets ? (float)(total / targets) : 0;
    reference_compare(r, LOSS, "loss", &loss, 1);
    for (int i = 0; i < r->model->tensor_count; i++) {
        const Tensor *tensor = &r->model->tensors[i];
        char *name = xprintf("grad.%s", tensor->name);
        if (tensor->gradient)
            reference_compare(r, GRADIENTS, name, tensor->gradient, tensor->size);
        else if (safetensors_find(&r->file, name))
            die("%s: has %s, which --freeze makes superfluous", r->path, name);
        free(name);
    }
}

// The updates, if the reference has some: loss, norm and rate of each, and where they took the weights.
static void reference_updates(Reference *r) {
    const StoredTensor *series = safetensors_find(&r->file, "losses");
    if (!series) return;
    const Options *o = &r->options;
    const size_t steps = series->count;
    float *initial = xfloats(count_parameters(r->model, false)), *at = initial, *values[3];
    for (int i = 0; i < r->model->tensor_count; at += r->model->tensors[i++].size)
        memcpy(at, r->model->tensors[i].value, r->model->tensors[i].size * sizeof(float));
    for (int i = 0; i < 3; i++) values[i] = xfloats(steps);
    const long total = o->steps ? o->steps : (long)steps, warmup = warmup_of(o, total, total);
    for (size_t s = 0; s < steps; s++) {
        double factor = schedule_factor((Schedule)o->schedule, (long)s, warmup, total, o->final_lr);
        Update update = take_update(r->model, &r->activations, r->batches, r->A, HYPERPARAMETERS(o), (long)s,
                                    factor * o->learning_rate);
        values[0][s] = (float)update.loss;
        values[1][s] = (float)update.norm;
        values[2][s] = (float)update.learning_rate;
    }
    static const char *const names[] = {"losses", "grad_norms", "learning_rates"};
    for (int i = 0; i < 3; i++) {
        reference_compare(r, LOSSES + i, names[i], values[i], steps);
        free(values[i]);
    }
    at = initial;
    for (int i = 0; i < r->model->tensor_count; at += r->model->tensors[i++].size) {
        const Tensor *tensor = &r->model->tensors[i];
        char *name = xprintf("param.%s", tensor->name);
        compare_update(&r->worst[UPDATES], tensor, at, reference_keep(r, name, tensor->value, tensor->size));
        free(name);
    }
    free(initial);
}

// Computes everything that the folder's reference.safetensors holds, compares, prints (unless `quiet`) the
// worst deviation of each kind, and returns whether all are inside the tolerance. With dump_path also writes
// it all.
static bool compare_reference(const char *folder, const char *dump_path, bool quiet, bool recompute) {
    Reference r = reference_open(folder, recompute);
    reference_pass(&r);
    reference_updates(&r);
    bool passed = r.worst[LOGITS].compared && r.worst[LOSS].compared && r.worst[GRADIENTS].compared;
    for (int i = 0; i < KINDS; i++) {
        const Worst *worst = &r.worst[i];
        passed = passed && worst->outside == 0;
        if (worst->compared && (!quiet || worst->outside))
            printf("    %-28s %-10s worst absolute %.2e, relative %.2e in %s%s\n", folder, worst->kind,
                   worst->absolute, worst->relative, worst->where, worst->outside ? "   OUTSIDE" : "");
    }
    if (dump_path) safetensors_write(dump_path, r.kept, r.kept_count);
    reference_close(&r);
    return passed;
}

static bool same_bits(const float *a, const float *b, size_t count) {
    return memcmp(a, b, count * sizeof(float)) == 0;
}

// ---- matmul ----

// Random operands. Storage ends exactly where the last row does, so that a sanitizer sees any read beyond; C
// has a guard zone behind it and between its rows. flags: transpose A 1, B 2, accumulate 4, wider rows 8.
typedef struct {
    size_t M, N, K, lda, ldb, ldc, size_c;
    bool transpose_a, transpose_b, accumulate;
    float *A, *B, *C;
    int kind;
} MatmulCase;

// The ways of section 17 and 18 to a product: in float32; in bfloat16 by the float32 product; by pairs; by AMX;
// and, for few rows without transpose A, with B from a copy, which may be packed.
enum { FLOAT32, ROUNDED, PAIRS, AMX, COPIED, PACKED };
static const char *const matmul_ways[] = {"float32", "rounded", "pairs", "AMX", "copies", "packed copies"};

static bool has_amx(void) {
    Options options = {.precision = BFLOAT16_CHOICE};
    choose_precision(&options);
    bool allowed = amx_allowed;
    amx_allowed = bfloat16_products = false;
    return allowed;
}

static float *random_floats(uint64_t stream, size_t count) {
    float *data = xmalloc(count * sizeof(float));
    for (size_t i = 0; i < count; i++) data[i] = 2 * random_uniform(stream, i) - 1;
    return data;
}

static MatmulCase matmul_case(uint64_t seed, size_t M, size_t N, size_t K, unsigned flags) {
    MatmulCase c = {.M = M, .N = N, .K = K, .accumulate = flags & 4};
    c.transpose_a = flags & 1;
    c.transpose_b = flags & 2;
    size_t extra = flags & 8 ? 1 + seed % 9 : 0, rows_a = flags & 1 ? K : M, rows_b = flags & 2 ? N : K;
    size_t columns_a = flags & 1 ? M : K, columns_b = flags & 2 ? K : N;
    c.lda = columns_a + extra;
    c.ldb = columns_b + extra * 2;
    c.ldc = N + extra * 3;
    c.size_c = M * c.ldc + 16;
    c.A = random_floats(random_stream(seed, 1), rows_a ? (rows_a - 1) * c.lda + columns_a : 0);
    c.B = random_floats(random_stream(seed, 2), rows_b ? (rows_b - 1) * c.ldb + columns_b : 0);
    c.C = random_floats(random_stream(seed, 3), c.size_c);
    return c;
}

// One product in the way of c->kind. amx_allowed must be set for AMX, outside of parallel regions.
static void matmul_case_run(MatmulCase *c) {
    const Product p = {
        c->C, c->A,           c->B,           c->ldc,        c->lda, c->ldb, c->M, c->N,
        c->K, c->transpose_a, c->transpose_b, c->accumulate, 0,      0,      0,    c->kind == ROUNDED};
    const bool few = p.M <= FEW && !p.transpose_a && p.K > 0;
    if (few && (c->kind == COPIED || c->kind == PACKED)) {
        const size_t size = p.N == 0 ? 0 : c->transpose_b ? (p.N - 1) * p.ldb + p.K : (p.K - 1) * p.ldb + p.N;
        const size_t panels = (p.N + TILE_COLUMNS - 1) / TILE_COLUMNS;
        PairProduct q = {.p = p, .whole_steps = (p.K + 1) / 2};
        q.panel_size = q.whole_steps * TILE_COLUMNS;
        q.b = xmalloc((panels * q.panel_size + size) * sizeof *q.b);
        const Copy copy = {p.B, size, (BFloat16 *)q.b, c->kind == PACKED ? q.panel_size : 0};
        for (size_t i = 0; i < size && c->kind == COPIED; i++)
            copy.to[i] = (BFloat16)(round_to_bfloat16(p.B[i]) >> 16);
        for (size_t panel = 0; panel < panels && c->kind == PACKED; panel++) pack_b(&q, panel);
        matmul_few_pairs(p, &copy);
        free(q.b);
    } else if (c->kind == FLOAT32 || c->kind == ROUNDED || p.K == 0)
        matmul_builtin(p);
    else
        matmul_pairs(p);
}

static void matmul_case_free(MatmulCase *c) {
    free(c->A);
    free(c->B);
    free(c->C);
}

// x as a product sees it: in bfloat16 the nearer one of the two neighbours of x that have eight digits in binary,
// or the even one; written without a bit of round_to_bfloat16.
static double matmul_operand(const MatmulCase *c, float x) {
    int exponent;
    double fraction = frexp(x, &exponent); // 0.5 .. 1
    return c->kind == FLOAT32 || x == 0 ? x : ldexp(nearbyint(ldexp(fraction, 8)), exponent - 8);
}

// The oracle: element (i, j) of op(A) · op(B), three plain loops in all, in double precision.
static double matmul_naive(const MatmulCase *c, size_t i, size_t j) {
    double sum = 0;
    for (size_t k = 0; k < c->K; k++)
        sum += matmul_operand(c, c->A[c->transpose_a ? k * c->lda + i : i * c->lda + k]) *
               matmul_operand(c, c->B[c->transpose_b ? j * c->ldb + k : k * c->ldb + j]);
    return sum;
}

// Runs a case and returns its worst error in units of K + 1 float roundings (operands are within -1..1);
// HUGE_VAL when something outside C was written.
static double matmul_case_error(MatmulCase *c) {
    float *before = xmalloc(c->size_c * sizeof(float));
    double worst = 0;
    memcpy(before, c->C, c->size_c * sizeof(float));
    matmul_case_run(c);
    for (size_t at = 0; at < c->size_c; at++) {
        size_t i = c->ldc ? at / c->ldc : c->M, j = c->ldc ? at % c->ldc : 0;
        double error = c->C[at] == before[at] ? 0 : HUGE_VAL, wanted = c->accumulate ? before[at] : 0;
        if (i < c->M && j < c->N)
            error = fabs(c->C[at] - wanted - matmul_naive(c, i, j)) * 0x1p24 / (double)(c->K + 1);
        if (!(error <= worst)) worst = isnan(error) ? HUGE_VAL : error; // so that a NaN stays the worst
    }
    free(before);
    return worst;
}

// 400 random shapes, from 0 to a few tiles, every tenth with one dimension beyond all blocks; each inside a
// parallel region and outside.
static void check_matmul_shapes(int kind) {
    static const size_t most[][3] = {{40, 60, 40}, {9, 60, 40}, {990, 20, 30}, {20, 990, 30}, {20, 40, 1700}};
    static double error[2][400];
    for (int parallel = 0; parallel < 2; parallel++) {
#pragma omp parallel for schedule(dynamic) if (parallel)
        for (int n = 0; n < 400; n++) {
            uint64_t stream = random_stream(11, (uint64_t)n);
            size_t size[3], form = n % 10 == 9 ? 2 + (size_t)n / 10 % 3 : (size_t)n % 2;
            for (uint64_t d = 0; d < 3; d++) size[d] = random_bits(stream, d) % (most[form][d] + 1);
            MatmulCase c = matmul_case((uint64_t)n, size[0], size[1], size[2], random_bits(stream, 3) % 16);
            c.kind = kind;
            error[parallel][n] = matmul_case_error(&c);
            matmul_case_free(&c);
        }
    }
    for (int n = 0; n < 400; n++)
        check(error[0][n] <= 2 && error[1][n] <= 2, "%s, random shape %d: errors of %g and %g",
              matmul_ways[kind], n, error[0][n], error[1][n]);
}

// Shapes beyond what is packed at a time in bfloat16: more than one piece in each direction.
static void check_matmul_pieces(int kind) {
    static const size_t shapes[][3] = {
        {2 * STRIPE + 5, 3, 9}, {3, 2 * STRIPE + 5, 9}, {3, 5, 4 * STRIPE + 7}};
    for (unsigned n = 0; n < 3 * 8; n++) {
        const size_t *shape = shapes[n / 8];
        MatmulCase c = matmul_case(n, shape[0], shape[1], shape[2], n % 8 | 8);
        c.kind = kind;
        double error = matmul_case_error(&c);
        check(error <= 2, "%s, pieces, flags %u: error of %g", matmul_ways[kind], n % 8, error);
        matmul_case_free(&c);
    }
}

// The same bits on 1, 2 and 5 threads, and inside a parallel region.
static void check_matmul_threads(int kind) {
    static const size_t shapes[][3] = {{61, 517, 801}, {1003, 97, 130}, {3, 1301, 515}, {51, 533, 1024}};
    int threads_before = omp_get_max_threads();
    for (unsigned n = 0; n < 4 * 8; n++) {
        const size_t *shape = shapes[n / 8];
        MatmulCase runs[4];
        for (int run = 0; run < 4; run++) {
            runs[run] = matmul_case(5, shape[0], shape[1], shape[2], n % 8);
            runs[run].kind = kind;
            omp_set_num_threads(run == 0 ? 1 : run == 1 ? 5 : 2);
#pragma omp parallel for if (run == 3)
            for (int once = 0; once < 2; once++)
                if (once == 0) matmul_case_run(&runs[run]);
            check(same_bits(runs[0].C, runs[run].C, runs[0].size_c),
                  "%s, shape %u, flags %u: other bits in run %d than on one thread", matmul_ways[kind], n / 8,
                  n % 8, run);
        }
        for (int run = 0; run < 4; run++) matmul_case_free(&runs[run]);
    }
    omp_set_num_threads(threads_before);
}

// A NaN in row r of A and an infinity in column s of B reach row r and column s of C, and no other element;
// what C held before a product that does not accumulate reaches nothing.
static void check_matmul_poison(int kind) {
    for (unsigned n = 0; n < 3 * 8; n++) {
        size_t M = n / 8 == 0 ? 3 : 53, N = n / 8 == 1 ? 1 : 77, K = 41, r = M - 2, s = N - 1, wrong = 0;
        MatmulCase clean = matmul_case(n, M, N, K, n % 8 | 8), c = matmul_case(n, M, N, K, n % 8 | 8);
        clean.kind = c.kind = kind;
        c.A[c.transpose_a ? 7 * c.lda + r : r * c.lda + 7] = NAN;
        c.B[c.transpose_b ? s * c.ldb + 9 : 9 * c.ldb + s] = INFINITY;
        for (size_t i = 0; i < c.size_c && !c.accumulate; i++) c.C[i] = NAN;
        matmul_case_run(&clean);
        matmul_case_run(&c);
        for (size_t i = 0; i < M; i++)
            for (size_t j = 0; j < N; j++) {
                float got = c.C[i * c.ldc + j];
                wrong += i == r ? !isnan(got) : j == s ? isfinite(got) : got != clean.C[i * c.ldc + j];
            }
        check(wrong == 0, "%s, flags %u: poison in %zu wrong elements", matmul_ways[kind], n % 8, wrong);
        matmul_case_free(&clean);
        matmul_case_free(&c);
    }
}

static void check_matmul_way(int kind) {
    amx_allowed = kind == AMX;
    check_matmul_shapes(kind);
    check_matmul_threads(kind);
    check_matmul_poison(kind);
    if (kind != FLOAT32) check_matmul_pieces(kind);
    amx_allowed = false;
}

static void test_matmul_float32(void) { check_matmul_way(FLOAT32); }
static void test_matmul_rounded(void) { check_matmul_way(ROUNDED); }
static void test_matmul_pairs(void) { check_matmul_way(PAIRS); }
static void test_matmul_copied(void) {
    check_matmul_way(COPIED);
    check_matmul_way(PACKED);
}
static void test_matmul_amx(void) {
    if (has_amx())
        check_matmul_way(AMX);
    else
        check(true, "no AMX here"); // dev/portability.sh has a build that emulates it
}

// Rounding to bfloat16: ties to even, infinities and NaN (of any payload) stay, the largest float overflows.
static void test_bfloat16_rounding(void) {
    static const uint32_t cases[][2] = {{0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f808001, 0x3f81},
                                        {0x3f818000, 0x3f82}, {0xbf818000, 0xbf82}, {0x7f800000, 0x7f80},
                                        {0xff800000, 0xff80}, {0x7f7fffff, 0x7f80}, {0x00000000, 0x0000},
                                        {0x80000000, 0x8000}, {0x00008000, 0x0000}, {0x00018000, 0x0002},
                                        {0x7f7f7fff, 0x7f7f}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float x;
        memcpy(&x, &cases[i][0], sizeof x);
        uint32_t got = round_to_bfloat16(x) >> 16;
        check(got == cases[i][1], "%08x becomes %04x, not %04x", cases[i][0], got, cases[i][1]);
    }
    for (uint32_t low = 1; low < 0x800000; low = low * 3 + 1)
        for (uint32_t sign = 0; sign < 2; sign++) {
            uint32_t bits = sign << 31 | 0x7f800000 | low;
            float x;
            memcpy(&x, &bits, sizeof x);
            check(isnan(float_of((BFloat16)(round_to_bfloat16(x) >> 16))), "NaN %08x becomes a number", bits);
        }
    for (uint64_t i = 0; i < 10000; i++) {
        MatmulCase c = {.kind = PAIRS};
        float x = ldexpf(2 * random_uniform(1, i) - 1, (int)(random_bits(2, i) % 100) - 50);
        check(float_of((BFloat16)(round_to_bfloat16(x) >> 16)) == (float)matmul_operand(&c, x),
              "%a is rounded wrongly", x);
    }
}
// ---- tokenizer ----

// Writes a vocabulary for tests: random merges over few characters, so that texts are full of them. Returns
// its folder. odd: <|endoftext|> is in the middle, and the merges are in reverse order, so that low ranks
// come late.
static char *random_vocabulary(uint64_t stream, int merges, bool odd) {
    static const char characters[] = "ababc \n'\xc3\xa9";
    Tokenizer *t = tokenizer_new((size_t)merges + 258, (size_t)merges);
    find_byte_ids(t, true, "");
    if (odd) name_add(t, END_OF_TEXT);
    for (uint64_t draw = 0; t->merge_count < merges;) {
        Merge *merge = &t->merges[odd ? merges - 1 - t->merge_count : t->merge_count];
        int sides[2];
        for (int side = 0; side < 2; side++) {
            int pick = (int)(random_bits(stream, draw++) % (uint64_t)(10 + t->vocab_size - 256 - odd));
            sides[side] = pick < 10 ? t->byte_ids[(unsigned char)characters[pick]] : 246 + odd + pick;
        }
        *merge = (Merge){sides[0], sides[1], -1};
        char *joined = xprintf("%s%s", t->names[sides[0]], t->names[sides[1]]);
        bool known = strlen(joined) >= 6;
        for (int i = 0; i < t->merge_count; i++)
            known = known || memcmp(&t->merges[odd ? merges - 1 - i : i], merge, sizeof *merge) == 0;
        if (!known && (odd || *name_slot(t, joined) < 0)) { // odd: two merges may make one token
            name_add(t, joined);
            t->merge_count++;
        }
        free(joined);
    }
    name_add(t, END_OF_TEXT);
    char *folder = xprintf("%s/vocabulary", temporary_folder());
    tokenizer_save(t, folder);
    tokenizer_free(t);
    return folder;
}

static Tokenizer *random_tokenizer(uint64_t stream) {
    char *folder = random_vocabulary(stream, 90, false);
    Tokenizer *t = tokenizer_load(folder);
    free(folder);
    return t;
}

// Random text over what the vocabulary above has merges for, and white space, quotes and broken UTF-8.
static Text random_text(uint64_t stream, size_t size) {
    static const char parts[] =
        "a\0b\0c\0aa\0 \0 \0\n\0'\0's\0s\0001\0\xc3\xa9\0\xe3\x80\x80\0\xff\0\xe2\x80\0're\0ab\0'l\0"
        "l\0!\0\xcc\x81\0\xc2\xa0\0<|endoftext|>\0<|end";
    Text text = {0};
    text_append(&text, "", 0);
    for (uint64_t i = 0; text.size < size; i++) {
        const char *part = parts + random_bits(stream, i) % (sizeof parts - 1); // somewhere inside one
        while (*part == 0 || (part > parts && part[-1] != 0)) part += *part == 0 ? 1 : -1;
        text_append(&text, part, strlen(part));
    }
    return text;
}

static bool same_ids(const Ids *a, const Ids *b) {
    return a->size == b->size && (a->size == 0 || memcmp(a->data, b->data, a->size * sizeof(int)) == 0);
}

static bool decodes_to(const Tokenizer *t, const Ids *ids, const Text *text) {
    Text back = {0};
    text_append(&back, "", 0);
    for (size_t i = 0; i < ids->size; i++) tokenizer_decode(t, &back, ids->data[i]);
    bool same = back.size == text->size && memcmp(back.data, text->data, text->size) == 0;
    free(back.data);
    return same;
}

static void test_unicode_classes(void) {
    Tokenizer *t = tokenizer_new(0, 0);
    int totals[4] = {0};
    for (unsigned code = 0; code < CODE_POINTS; code++) totals[t->classes[code]]++;
    // General_Category L and N of Unicode 16.0, and the 25 characters of
    // White_Space
    check(totals[CLASS_LETTER] == 141028, "%d letters", totals[CLASS_LETTER]);
    check(totals[CLASS_NUMBER] == 1911, "%d numbers", totals[CLASS_NUMBER]);
    check(totals[CLASS_SPACE] == 25, "%d kinds of white space", totals[CLASS_SPACE]);
    static const char kinds[] = "LLLLLLLLNNNNNNNOOOOOO"; // letters, numbers, others
    static const unsigned codes[] = {'A',     'z', 0xaa,  0xb5,  0xe9,   0x5d0,   0x1c89,
                                     0x31350, '0', 0xb2,  0xbd,  0x664,  0x2167,  0x3007,
                                     0x1d7ce, '_', 0x301, 0x93e, 0x200b, 0x1f600, 0x10ffff};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        check(t->classes[codes[i]] == (kinds[i] == 'L'   ? CLASS_LETTER
                                       : kinds[i] == 'N' ? CLASS_NUMBER
                                                         : CLASS_OTHER),
              "U+%04X has class %d", codes[i], t->classes[codes[i]]);
    tokenizer_free(t);
}

static void test_utf8(void) {
    for (unsigned code = 0; code < CODE_POINTS; code++) {
        char bytes[4];
        unsigned back = 0;
        int size = utf8_write(bytes, code), read = utf8_read(bytes, (size_t)size, &back);
        bool surrogate = code >= 0xd800 && code < 0xe000;
        check(surrogate ? read == 0 : read == size && back == code, "U+%04X is read as U+%04X", code, back);
        for (int cut = 0; cut < size && !surrogate; cut++)
            check(utf8_whole(bytes, (size_t)cut) == 0, "U+%04X cut after %d bytes waits", code, cut);
        check(utf8_whole(bytes, (size_t)size) == (size_t)size, "U+%04X is whole", code);
    }
    static const char *const bad[] = {
        "\x80", "\xc0\x80", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
        "\xff", "\xc3(",    "\xf0\x9f\x98"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        unsigned code;
        check(utf8_read(bad[i], strlen(bad[i]), &code) == 0, "case %zu is not valid", i);
    }
    check(utf8_whole("caf\xc3", 4) == 3 && utf8_whole("\xe0\x9f", 2) == 0 && utf8_whole("\xff", 1) == 1 &&
              utf8_whole("a\xf0\x9f\x98", 4) == 1,
          "only what may still become a character waits");
}

// GPT-2's expression taken literally, alternative by alternative, over classes
// of characters.
static size_t literal_piece(const Tokenizer *t, const char *text, size_t size) {
    static const char *const endings[] = {"'s", "'d", "'m", "'t", "'ll", "'ve", "'re"};
    for (int i = 0; i < 7; i++)
        if (size >= strlen(endings[i]) && memcmp(text, endings[i], strlen(endings[i])) == 0)
            return strlen(endings[i]);
    static const int order[] = {CLASS_LETTER, CLASS_NUMBER, CLASS_OTHER};
    size_t length, at, last = 0;
    for (int i = 0; i < 3; i++) {
        size_t from = text[0] == ' ';
        for (at = from; at < size && class_at(t, text, at, size, &length) == order[i];) at += length;
        if (at > from) return at;
    }
    for (at = 0; at < size && class_at(t, text, at, size, &length) == CLASS_SPACE; at += length) last = at;
    return at == size || last == 0 ? at : last;
}

static void test_pieces(void) {
    static const char cases[] = // a text a line, | between pieces; ~ stands for a newline
        "Hello| world|'s| end\nI|'ll|  | pay| $|100|!|~\n''|s\n'|S\n't|'re|nt\n '|s\n ~\na|~ |~|b\nx|   | "
        "y\na|  \n'|lL\n"
        "don|'t|'ve|'|vE\nI|'m|'d|mm\n\xc2\xa0|a\na|  |\xc2\xa0|b\na| "
        "|\xe3\x80\x80|b\ncaf\xc3\xa9|2\xc2\xbd\ne|\xcc\x81|e\n \xff\xfe|a\n"
        "\xe4\xbd\xa0\xe5\xa5\xbd|\xef\xbc\x8c|\xe4\xb8\x96\n";
    Tokenizer *t = tokenizer_new(0, 0);
    for (const char *line = cases, *next; *line; line = next) {
        Text wanted = {0}, text = {0}, found = {0};
        for (next = line; *next != '\n'; next++) {
            text_append(&wanted, *next == '~' ? "\n" : next, 1);
            text_append(&text, *next == '~' ? "\n" : next, *next != '|');
        }
        next++;
        for (size_t at = 0, end; at < text.size; at = end) {
            end = find_piece(t, text.data, at, text.size);
            text_append(&found, "|", at > 0);
            text_append(&found, text.data + at, end - at);
        }
        check(strcmp(found.data, wanted.data) == 0, "\"%s\" is cut as \"%s\"", wanted.data, found.data);
        free(wanted.data);
        free(text.data);
        free(found.data);
    }
    Text text = random_text(77, 300000);
    for (size_t at = 0, end, literal; at < text.size; at = end) {
        end = find_piece(t, text.data, at, text.size);
        literal = at + literal_piece(t, text.data + at, text.size - at);
        check(end == literal, "random text at %zu: piece ends at %zu, the expression says %zu", at, end,
              literal);
    }
    free(text.data);
    tokenizer_free(t);
}

// BPE as it is defined: look for the lowest rank among all neighbours, join the
// leftmost such pair, again.
static void literal_bpe(const Tokenizer *t, Ids *ids, const char *piece, size_t size) {
    size_t start = ids->size;
    for (size_t i = 0; i < size; i++) ids_push(ids, t->byte_ids[(unsigned char)piece[i]]);
    for (;;) {
        int best = -1;
        size_t where = 0;
        for (size_t i = start; i + 1 < ids->size; i++) {
            int rank = *merge_slot(t, ids->data[i], ids->data[i + 1]);
            if (rank >= 0 && (best < 0 || rank < best)) best = rank, where = i;
        }
        if (best < 0) return;
        ids->data[where] = t->merges[best].id;
        memmove(ids->data + where + 1, ids->data + where + 2, (ids->size - where - 2) * sizeof(int));
        ids->size--;
    }
}

static void test_encode_is_bpe(void) {
    for (int round = 0; round < 12; round++) {
        char *folder = random_vocabulary((uint64_t)round, 60 + 6 * round, round % 3 == 2);
        char *merges = xprintf("%s/merges.txt", folder);
        Tokenizer *t = tokenizer_load(round % 3 == 0 ? merges : folder);
        t->plain = true; // texts have <|endoftext|> in them
        check(t->end_of_text == (round % 3 == 2 ? 256 : t->vocab_size - 1), "end of text is %d",
              t->end_of_text);
        for (int run = 0; run < 200; run++) { // texts of all lengths, then long pieces of anything
            Text text = random_text((uint64_t)run + 1000, (size_t)run * 5);
            Ids ours = {0}, literal = {0};
            if (run % 2) {
                tokenizer_encode(t, &ours, text.data, text.size);
                for (size_t at = 0, end; at < text.size; at = end) {
                    end = find_piece(t, text.data, at, text.size);
                    literal_bpe(t, &literal, text.data + at, end - at);
                }
            } else if (text.size > 0) {
                for (size_t i = 0; i < text.size && run % 4; i++) // few letters: many merges meet
                    text.data[i] = "aaab"[random_bits((uint64_t)run, i) % 4];
                merge_piece(t, encoder_of_thread(t), &ours, text.data, text.size);
                literal_bpe(t, &literal, text.data, text.size);
            }
            check(same_ids(&ours, &literal), "round %d run %d: %zu ids, not %zu", round, run, ours.size,
                  literal.size);
            check(decodes_to(t, &ours, &text), "round %d run %d: other text", round, run);
            free(text.data);
            free(ours.data);
            free(literal.data);
        }
        free(folder);
        free(merges);
        tokenizer_free(t);
    }
}

static void push_piece_ends(const Tokenizer *t, Ids *ends, const char *text, size_t at, size_t size) {
    while (at < size) ids_push(ends, (int)(at = find_piece(t, text, at, size)));
}

static void test_encode_in_parts(void) {
    Tokenizer *t = random_tokenizer(5);
    Ids whole = {0}, parts = {0};
    int cuts = 0;
    for (int round = 0; round < 40; round++) { // at every place: what comes before the cut, then the rest
        Text text = random_text((uint64_t)round + 500, 200);
        Ids ends = {0}, part_ends = {0};
        push_piece_ends(t, &ends, text.data, 0, text.size);
        for (int special = 0; special < 2; special++) {
            whole.size = 0;
            t->plain = !special;
            tokenizer_encode(t, &whole, text.data, text.size);
            for (size_t place = 0; place <= text.size; place++) {
                size_t cut = tokenizer_cut(t, text.data, place);
                parts.size = 0;
                tokenizer_encode(t, &parts, text.data, cut);
                tokenizer_encode(t, &parts, text.data + cut, text.size - cut);
                check(cut <= place && same_ids(&whole, &parts), "round %d: cut at %zu of %zu gives other ids",
                      round, cut, place);
                cuts += cut > 0;
                part_ends.size = 0;
                push_piece_ends(t, &part_ends, text.data, 0, cut);
                push_piece_ends(t, &part_ends, text.data, cut, text.size);
                check(same_ids(&ends, &part_ends), "round %d: cut at %zu gives other pieces", round, cut);
            }
        }
        free(text.data);
        free(ends.data);
        free(part_ends.data);
    }
    check(cuts > 5000, "only %d places could be cut", cuts);

    Text text = random_text(9, 1500000);
    int threads = omp_get_max_threads();
    for (int n = 1; n <= 7; n += 2) {
        omp_set_num_threads(n);
        Ids *ids = n == 1 ? &whole : &parts;
        ids->size = 0;
        ids_push(ids, 77); // what is there stays
        tokenizer_encode(t, ids, text.data, text.size);
        check(n == 1 || same_ids(&whole, &parts), "%d threads give other ids", n);
    }
    omp_set_num_threads(4);
    int different = 0;
#pragma omp parallel for reduction(+ : different)
    for (int i = 0; i < 4; i++) { // several callers at once
        Ids ids = {0};
        ids_push(&ids, 77);
        tokenizer_encode(t, &ids, text.data, text.size);
        different += !same_ids(&whole, &ids);
        free(ids.data);
    }
    omp_set_num_threads(threads);
    check(different == 0, "%d of 4 threads that encode at once get other ids", different);
    free(text.data);
    free(whole.data);
    free(parts.data);
    tokenizer_free(t);
}

static void test_special_token(void) {
    static const char cases[] = // how often <|endoftext|> is in the text behind
        "1<|endoftext|>\0"
        "2a<|endoftext|><|endoftext|> b\0"
        "0<|endoftext|\0"
        "1<|<|endoftext|>|>\0"
        "0";
    Tokenizer *t = random_tokenizer(3);
    for (const char *c = cases; c < cases + sizeof cases; c += strlen(c) + 1)
        for (int special = 0; special < 2; special++) {
            Ids ids = {0};
            Text text = {0};
            text_append(&text, c + 1, strlen(c + 1));
            t->plain = !special;
            tokenizer_encode(t, &ids, text.data, text.size);
            int marks = 0;
            for (size_t k = 0; k < ids.size; k++) marks += ids.data[k] == t->end_of_text;
            check(marks == (special ? *c - '0' : 0), "\"%s\" has %d end-of-text ids", text.data, marks);
            check(decodes_to(t, &ids, &text), "\"%s\" is decoded to another text", text.data);
            free(ids.data);
            free(text.data);
        }
    tokenizer_free(t);

    Ids ids = {0}; // a vocabulary without it: text like any other
    Text text = {0};
    t = tokenizer_new(300, 0);
    find_byte_ids(t, true, "");
    tokenizer_encode(t, &ids, "a<|endoftext|>", 14);
    check(ids.size == 14 && ids.data[0] == 64, "%zu ids without <|endoftext|>", ids.size);
    int spelled = name_add(t, "<a b>"); // a token that no bytes spell stands for its name
    tokenizer_decode(t, &text, spelled);
    check(strcmp(text.data, "<a b>") == 0, "\"<a b>\" is decoded to \"%s\"", text.data);
    free(text.data);
    free(ids.data);
    tokenizer_free(t);
}

static void test_tokenizer_files(void) {
    char *folder = random_vocabulary(8, 80, true), *copy = xprintf("%s/copy", temporary_folder());
    Tokenizer *t = tokenizer_load(folder);
    tokenizer_save(t, copy);
    tokenizer_free(t);
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "vocab.json" : "merges.txt";
        char *one = xprintf("%s/%s", folder, name), *other = xprintf("%s/%s", copy, name);
        Text a = read_file(one), b = read_file(other);
        check(a.size == b.size && memcmp(a.data, b.data, a.size) == 0,
              "%s is not the same after load and save", name);
        check(strncmp(a.data, i ? "{\"!\":0,\"\\\"\":1," : "#version: 0.2\n", 14) == 0, "%s starts otherwise",
              name);
        free(a.data);
        free(b.data);
        free(one);
        free(other);
    }
    static const char tiny[] = "o w\r\nl ow\nĠ low"; // no first line, a DOS line, no last newline
    char *path = xprintf("%s/tiny.bpe", temporary_folder());
    write_file(path, tiny, sizeof tiny - 1);
    t = tokenizer_load(path);
    Ids ids = {0};
    tokenizer_encode(t, &ids, " low low<|endoftext|>", 21);
    check(t->vocab_size == 260 && t->end_of_text == 259, "%d tokens", t->vocab_size);
    check(ids.size == 3 && ids.data[0] == 258 && ids.data[1] == 258 && ids.data[2] == 259, "%zu ids",
          ids.size);
    const int *bytes = t->byte_ids;
    check(bytes['!'] == 0 && bytes['~'] == 93 && bytes[0xff] == 187 && bytes[0] == 188 && bytes[' '] == 220 &&
              bytes[0xad] == 255,
          "bytes are not in GPT-2's order");
    tokenizer_free(t);
    free(ids.data);
    free(path);
    free(folder);
    free(copy);
}

static void load_damaged(void) { tokenizer_free(tokenizer_load(child_path)); }

static void decode_damaged(void) {
    Text text = {0};
    Tokenizer *t = tokenizer_load(child_path);
    tokenizer_decode(t, &text, t->vocab_size);
}

// What is wrong with a vocabulary or its merges, and what the error says of it.
static const struct {
    const char *vocabulary, *merges, *expected; // how to change a good vocab.json ("from>to"), or NULL
} damaged_tokenizers[] = {
    {NULL, "#version: 0.2\na b\nab\n", "line 3: expected two tokens"},
    {NULL, "a b c\n", "line 1: expected two tokens"},
    {NULL, "a  b\n", "line 1: expected two tokens"},
    {NULL, "a b\nab c\nabd c\n", "line 3: expected tokens"},
    {NULL, "a b\na b\n", "line 2: expected a merge that makes a new token"},
    {NULL, "a b\nb c\nab c\na bc\n", "line 4: expected a merge that makes a new token"},
    {NULL, "a \xff\n", "line 1: expected tokens"},
    {"", "a b\n", "line 1: expected a merge that is new and makes a token of the vocabulary"},
    {"\"a\":64>\"a\":65", "", "\"b\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"a\":4194304", "", "\"a\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"a\":-1", "", "\"a\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"a\":1.5", "", "\"a\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"a\":1e99", "", "\"a\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"a\":\"64\"", "", "\"a\": expected it once, with an id from 0 to 4194303"},
    {"\"a\":64>\"b\":64", "", "\"b\": expected it once"},
    {"\"a\":64>\"aa\":64", "", "no token \"a\" for byte 97"},
    {"\"a\":64>\"a\":64,", "", "line 1, column"},
    {"{>[", "", "not valid JSON at line 1"},
    {"256}>256", "", "not valid JSON at line 1"},
    {"256}>257,\"ab\":256}", "a b\na b\n", "line 2: expected a merge that is new"},
    {NULL, NULL, "cannot be opened"},
};

static void test_damaged_tokenizers(void) {
    char *folder = xprintf("%s/damaged", temporary_folder()), *merges_path = xprintf("%s/merges.txt", folder);
    char *vocabulary_path = xprintf("%s/vocab.json", folder);
    make_folder(folder);
    write_file(merges_path, "", 0);
    Tokenizer *bytes = tokenizer_load(merges_path);
    tokenizer_save(bytes, folder);
    tokenizer_free(bytes);
    Text good = read_file(vocabulary_path);
    for (size_t i = 0; i < sizeof damaged_tokenizers / sizeof *damaged_tokenizers; i++) {
        Text bad = {0}, said = {0};
        const char *change = damaged_tokenizers[i].vocabulary, *to = change ? strchr(change, '>') : NULL;
        size_t from = to ? (size_t)(to - change) : 0;
        const char *place = to ? memmem(good.data, good.size, change, from) : good.data + good.size;
        text_append(&bad, good.data, (size_t)(place - good.data));
        text_append(&bad, to ? to + 1 : "", to ? strlen(to + 1) : 0);
        text_append(&bad, place + from, good.size - (size_t)(place - good.data) - from);
        write_file(vocabulary_path, bad.data, bad.size);
        if (damaged_tokenizers[i].merges)
            write_file(merges_path, damaged_tokenizers[i].merges, strlen(damaged_tokenizers[i].merges));
        child_path = change ? folder : damaged_tokenizers[i].merges ? merges_path : "/nowhere/vocab.bpe";
        int status = run_child(load_damaged, &said);
        check(status == 1, "case %zu ends with status %d", i, status);
        check(strstr(said.data, damaged_tokenizers[i].expected) && strstr(said.data, child_path),
              "case %zu says: %s", i, said.data);
        check(said.size > 0 && strchr(said.data, '\n') == said.data + said.size - 1,
              "case %zu does not say one line", i);
        free(bad.data);
        free(said.data);
    }
    write_file(merges_path, "a b\n", 4);
    child_path = merges_path;
    Text said = {0};
    check(run_child(decode_damaged, &said) == 1, "a wrong id is decoded");
    check(strstr(said.data, "258 is not in the vocabulary: expected 0 to 257"), "a wrong id: %s", said.data);
    free(said.data);
    free(good.data);
    free(folder);
    free(merges_path);
    free(vocabulary_path);
}

static void test_long_runs(void) {
    static const char *const units[] = {"a", " ", "ab", "\n", "'", "\xc3\xa9", "\xff", "bca"};
    Tokenizer *t = random_tokenizer(21);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        Text text = {0};
        while (text.size < 1000000) text_append(&text, units[i], strlen(units[i]));
        Ids ids = {0};
        double begin = now();
        tokenizer_encode(t, &ids, text.data, text.size);
        check(now() - begin < 5, "\"%s\" again and again takes %.1f s", units[i], now() - begin);
        check(decodes_to(t, &ids, &text), "\"%s\" again and again is lost", units[i]);
        free(text.data);
        free(ids.data);
    }
    tokenizer_free(t);
}

// Commands of the program in tokenizer.c, one after the other: exit status, and part of what is printed.
static const struct {
    const char *command; // in the temporary folder; $T is the program
    int status;
    const char *expected;
} tokenizer_commands[] = {
    {"printf 'low low\\n<|endoftext|>\\nlower low lowest\\n' > a.txt; $T train --vocab-size 261 --out v "
     "a.txt",
     0, "261 tokens"},
    {"cat v/merges.txt | tr '\\n' ';'", 0, "#version: 0.2;l o;lo w;Ġ low;e r;"},
    {"printf 'low low' | $T encode --tokenizer v | tr '\\n' ' '", 0, "257 258 "},
    {"head -c 99999 $T > x; $T encode --tokenizer v x | $T decode --tokenizer v | cmp - x && echo same", 0,
     "same"},
    {"printf 'low low' | $T encode --pad left --length 3 --tokenizer v/merges.txt", 0,
     "{\"input_ids\": [260, 257, 258], \"attention_mask\": [0, 1, 1]}\n"},
    {"printf 'low low' | $T encode --pad right --length 1 --tokenizer v", 0,
     "{\"input_ids\": [257], \"attention_mask\": [1]}\n"},
    {"$T shard --tokenizer v --val-fraction 0.7 --out s 'a.*'", 0,
     "s_train.bin: 4 tokens\ns_val.bin: 9 tokens\n2 doc"},
    {"printf 'a<|endoftext|>\\nb\\n<|endoftext|>\\r\\nc\\n' > b.txt; $T shard --tokenizer v --out s2 "
     "b.txt",
     0, "\n2 documents\n"}, // inside a line it separates nothing
    {"od -An -i -N12 s_val.bin && od -An -t u2 -j1024 s_train.bin", 0,
     "20240520           1           9\n   260   257   258   198\n"},
    {"printf 'low low' > c.txt; printf low > d.txt; $T count --tokenizer v c.txt d.txt | tr -s ' \\n' ' "
     "'",
     0, " 2 7 3.500 c.txt 1 3 3.000 d.txt 3 10 3.333 total "},
    {"$T info --tokenizer v", 0,
     "vocab_size 261\nmerges 4\nadded_tokens 1\nend_of_text 260\npad 260\n"
     "longest_token 260 <|endoftext|>\n"},
    {"printf 'low<|endoftext|>' | $T encode --tokenizer v | tr '\\n' ' '", 0, "257 260 "},
    {"printf 'low<|endoftext|>' | $T encode --plain --tokenizer v | wc -l | tr -d ' '", 0, "14\n"},
    // "1", then " 1" to " 3000", and the space at the end, each but the first twice
    {"{ seq 1 3000; seq 1 3000; } | tr '\\n' ' ' > n.txt; $T train --vocab-size 300 --out w n.txt", 0,
     " 3002 distinct pieces;"},
    {"printf '7\\n8 x' | $T decode --tokenizer v", 1, "line 2: expected ids"},
    // text for a model must be UTF-8; a chunk of 8 MB may end inside a character
    {"printf 'caf\\351 low\\n' > latin.txt; $T shard --tokenizer v --out s3 latin.txt", 1,
     "latin.txt: not UTF-8 at byte 3, line 1; probably ISO-8859-1: iconv"},
    {"$T train --vocab-size 300 --out w c.txt latin.txt", 1, "latin.txt: not UTF-8 at byte 3, line 1"},
    {"printf '\\377\\376l\\000' | $T train --vocab-size 300 --out w", 1,
     "-: not UTF-8 at byte 0, line 1; probably UTF-16LE"},
    {"$T encode --tokenizer v latin.txt | $T decode --tokenizer v | cmp - latin.txt && echo same", 0,
     "same\n"},
    {"printf '\\357\\273\\277low' > mark.txt; $T shard --tokenizer v --out s3 c.txt mark.txt", 0,
     "s3_train.bin: 5 tokens"},
    {"{ yes a | head -c 8388607; printf '\\303\\251 low'; } > long.txt; $T shard --tokenizer v --out s3 "
     "long.txt",
     0, "s3_train.bin: 8388611 tokens"},
    {"{ cat long.txt; printf '\\n\\303 '; } | $T shard --tokenizer v --out s3", 1,
     "-: not UTF-8 at byte 8388614, line 4194305;"},
    {"echo 7 261 | $T decode --tokenizer v", 1, "ids from 0 to 260"},
    {"$T count --tokenizer v nothing-*", 1, "nothing-*: no such file"},
    {"$T encode --tokenizer v --pad up --length 3", 2, "--pad up: expected left or right"},
    {"$T decode --length 3", 2, "--length does not apply to decode"},
    {"$T train --vocab-size 12x --out v", 2, "--vocab-size 12x: expected a whole number"},
    {"$T encode --tokeniser v", 2, "--tokeniser: there is no such option"},
    {"$T", 2, "expected a command"},
};

// The command-line program, which `make` builds beside this one.
static void test_tokenizer_program(void) {
    const char *slash = strrchr(self_path, '/');
    char *program = xprintf("%.*s/tokenizer", slash ? (int)(slash - self_path) : 1, slash ? self_path : ".");
    check(file_exists(program), "%s is not built; make builds it", program);
    for (size_t i = 0; i < sizeof tokenizer_commands / sizeof *tokenizer_commands && file_exists(program);
         i++) {
        char *full = realpath(program, NULL);
        char *command =
            xprintf("cd '%s'; T='%s'; { %s; } 2>&1", temporary_folder(), full, tokenizer_commands[i].command);
        FILE *pipe = popen(command, "r");
        Text out = {0};
        read_stream(&out, pipe, command);
        int status = pclose(pipe);
        check(WEXITSTATUS(status) == tokenizer_commands[i].status, "%s: status %d",
              tokenizer_commands[i].command, WEXITSTATUS(status));
        check(strstr(out.data, tokenizer_commands[i].expected), "%s: %s", tokenizer_commands[i].command,
              out.data);
        free(out.data);
        free(command);
        free(full);
    }
    free(program);
}

// ---- numerics: layers, model, optimizer and generation, against formulas in double precision ----

// Largest |ours - wanted|, relative to the largest |wanted|; HUGE_VAL when something is not a number.
static double deviation(const float *ours, const double *wanted, size_t count) {
    double worst = 0, scale = 1e-30;
    for (size_t i = 0; i < count; i++) {
        double error = fabs(ours[i] - wanted[i]);
        scale = fmax(scale, fabs(wanted[i]));
        if (!(error <= worst)) worst = isnan(error) ? HUGE_VAL : error;
    }
    return worst / scale;
}

static double *doubles(const float *from, size_t count) {
    double *to = xmalloc(count * sizeof *to);
    for (size_t i = 0; i < count; i++) to[i] = from[i];
    return to;
}

static double deviation_of_floats(const float *ours, const float *wanted, size_t count) {
    double *exact = doubles(wanted, count), result = deviation(ours, exact, count);
    free(exact);
    return result;
}

static Config tiny_config(int V, int P, int L, int NH, int C, int F, bool tied) {
    return (Config){.vocab_size = V,
                    .n_positions = P,
                    .n_layer = L,
                    .n_head = NH,
                    .n_embd = C,
                    .n_inner = F,
                    .layer_norm_epsilon = 1e-5f,
                    .tie_word_embeddings = tied};
}

// A model whose values are large enough that every layer matters, biases included. `freeze`: a regular
// expression or NULL; biases and layernorms are not decayed.
static Model *tiny_model(Config config, uint64_t seed, const char *freeze) {
    const char *no_decay[] = {"bias", "ln_"};
    Model *model = model_new(config);
    model->value_memory = allocate_values(model, 0);
    for (int i = 0; i < model->tensor_count; i++)
        for (size_t j = 0; j < model->tensors[i].size; j++)
            model->tensors[i].value[j] = 0.3f * random_normal(random_stream(seed, (uint64_t)i), j) +
                                         (tensor_table[model->tensors[i].kind].initial == ONES);
    model_set_training(model, &(Patterns){.items = &freeze, .size = freeze != NULL},
                       &(Patterns){no_decay, 2, 2});
    model_allocate_training(model, true);
    return model;
}

// Sequences of random tokens; about a quarter of the rows is not scored.
static Batch ragged_batch(uint64_t seed, int V, int sequences, const int *lengths) {
    Batch batch = {0};
    batch_clear(&batch);
    for (int s = 0; s < sequences; s++, batch_end_sequence(&batch))
        for (int t = 0; t < lengths[s]; t++) {
            uint64_t bits = random_bits(seed, (uint64_t)batch.rows);
            batch_add_row(&batch, (int)(bits % (uint64_t)V), t,
                          bits >> 62 ? (int)((bits >> 32) % (uint64_t)V) : -1);
        }
    return batch;
}

static void append_sequence(Batch *to, const Batch *from, int s) {
    for (int r = from->first_row[s]; r < from->first_row[s + 1]; r++)
        batch_add_row(to, from->token[r], from->position[r], from->target[r]);
    batch_end_sequence(to);
}

static float *logits_of(const Model *model, const Batch *batch) {
    Activations a = {0};
    float *logits = xfloats((size_t)batch->rows * (size_t)model->config.vocab_size);
    all_logits(model, &a, batch, logits);
    activations_free(&a);
    return logits;
}

// Gradients of the mean loss over all micro-batches; returns that mean.
static double gradients_of(Model *model, const Batch *batches, int count, Dropout dropout, bool recompute) {
    Activations a = {0};
    double loss = 0;
    int targets = 0;
    for (int i = 0; i < count; i++) targets += batches[i].targets;
    for (int i = 0; i < count; i++) {
        activations_reserve(&a, model, batches[i].rows, recompute ? KEEP_INPUTS : KEEP_ALL);
        loss += model_forward_backward(model, &a, &batches[i], 1.0f / (float)targets, i > 0, dropout);
    }
    activations_free(&a);
    return loss / targets;
}

static bool regex_found(const char *regex, const char *name) {
    return patterns_match(&(Patterns){&regex, 1, 1}, name);
}

// The gradients of `model` are those of `wanted` wherever it has any. Tolerance 0: to the bit.
static void check_gradients(const Model *model, const Model *wanted, double tolerance, const char *what) {
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        const float *other = wanted->tensors[i].gradient;
        if (!tensor->gradient) continue;
        double error = tolerance > 0 ? deviation_of_floats(tensor->gradient, other, tensor->size)
                                     : !same_bits(tensor->gradient, other, tensor->size);
        check(error <= tolerance, "%s: gradient of %s differs by %.1e", what, tensor->name, error);
    }
}

// ---- references ----

// In bfloat16 a reference is met to two or three digits: a hundredth of the largest logit and of the loss, a tenth
// of the largest gradient. dev/compare_bfloat16.py compares with PyTorch's bfloat16.
static void check_bfloat16_reference(const char *folder) {
    bfloat16_products = true;
    Reference r = reference_open(folder, false);
    reference_pass(&r);
    static const double most[KINDS] = {[LOGITS] = 2e-2, [LOSS] = 1e-2, [GRADIENTS] = 0.15};
    for (int i = 0; i < KINDS; i++) {
        const Worst *worst = &r.worst[i];
        check(!worst->compared || worst->relative <= most[i], "%s: %s deviate by %.1e in %s", folder,
              worst->kind, worst->relative, worst->where);
    }
    check(r.worst[LOGITS].compared && r.worst[LOGITS].relative > 1e-4, "%s: not in bfloat16", folder);
    reference_close(&r);
    bfloat16_products = false;
}

// Every folder of dev/fixtures, with activations kept, with --recompute, and on the built-in matmul.
static void test_references(void) {
    char *self = xstrdup(self_path), *slash = strrchr(self, '/');
    *(slash ? slash : self) = 0;
    const char *const places[] = {"", slash ? self : ".", "/", slash ? self : ".", "/../../"};
    glob_t found = {0};
    for (int i = 0; i < 3 && found.gl_pathc == 0; i++) { // here, beside the program, or above build/sanitize
        char *pattern = xprintf("%s%sdev/fixtures/*/reference.safetensors", places[i ? 2 * i - 1 : 0],
                                i ? places[2 * i] : "");
        globfree(&found);
        glob(pattern, 0, NULL, &found);
        free(pattern);
    }
    check(found.gl_pathc > 0, "dev/fixtures was not found here nor beside the program");
    MatmulKind usual = matmul_kind;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char *folder = xstrdup(found.gl_pathv[i]);
        *strrchr(folder, '/') = 0;
        check(compare_reference(folder, NULL, true, false), "%s: not what PyTorch computed", folder);
        check(compare_reference(folder, NULL, true, true), "%s: not what PyTorch computed, with --recompute",
              folder);
        matmul_kind = MATMUL_BUILTIN;
        check(compare_reference(folder, NULL, true, false), "%s: not what PyTorch computed, built-in matmul",
              folder);
        matmul_kind = usual;
        check_bfloat16_reference(folder);
        free(folder);
    }
    globfree(&found);
    free(self);
}

// ---- oracles: each layer's formula in plain loops and double precision, forward only ----

static void oracle_linear(double *y, const double *x, const double *weight, const double *bias, int R, int K,
                          int N) {
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            y[r * N + n] = bias[n];
            for (int k = 0; k < K; k++) y[r * N + n] += x[r * K + k] * weight[k * N + n];
        }
}

static void oracle_layernorm(double *y, const double *x, const double *weight, const double *bias, int R,
                             int C) {
    for (int r = 0; r < R; r++, x += C, y += C) {
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c] / C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
        for (int c = 0; c < C; c++)
            y[c] = (x[c] - mean) / sqrt(variance + (double)1e-5f) * weight[c] + bias[c];
    }
}

static void oracle_attention(double *out, const double *qkv, int sequences, const int *first_row,
                             Dropout dropout, int NH, int HS) {
    const int C = NH * HS;
    double *p = xmalloc((size_t)(first_row[sequences] + 1) * sizeof *p);
    for (int s = 0; s < sequences; s++)
        for (int i = first_row[s]; i < first_row[s + 1]; i++)
            for (int head = 0; head < NH; head++) {
                const double *q = qkv + (size_t)i * 3 * C + head * HS;
                double largest = -HUGE_VAL, sum = 0, *o = out + (size_t)i * C + head * HS;
                for (int j = first_row[s]; j <= i; j++) {
                    p[j] = 0;
                    for (int c = 0; c < HS; c++)
                        p[j] += q[c] * qkv[(size_t)j * 3 * C + C + head * HS + c] / sqrt(HS);
                    largest = fmax(largest, p[j]);
                }
                for (int j = first_row[s]; j <= i; j++) sum += p[j] = exp(p[j] - largest);
                memset(o, 0, (size_t)HS * sizeof *o);
                for (int j = first_row[s]; j <= i; j++) {
                    float keep = 1;
                    attention_dropout(&keep, dropout, i, NH, head, j - first_row[s], 1);
                    for (int c = 0; c < HS; c++)
                        o[c] += p[j] / sum * keep * qkv[(size_t)j * 3 * C + 2 * C + head * HS + c];
                }
            }
    free(p);
}

static double oracle_gelu(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

static double oracle_cross_entropy(const double *logits, int target, int V) {
    double largest = -HUGE_VAL, sum = 0;
    for (int v = 0; v < V; v++) largest = fmax(largest, logits[v]);
    for (int v = 0; v < V; v++) sum += exp(logits[v] - largest);
    return log(sum) + largest - logits[target];
}

// A layer with its inputs in double, and the weights that make one number of its output:
// loss = sum of dy · y.
typedef struct {
    enum { LINEAR, LAYERNORM, ATTENTION, GELU, CROSS_ENTROPY } kind;
    int R, K, N; // rows; channels in and out (attention: heads and head size)
    double *x, *weight, *bias, *y;
    const float *dy;
    const int *first_row, *target;
    int sequences;
    Dropout dropout;
} Layer;

static double layer_loss(const void *context) {
    const Layer *l = context;
    double loss = 0;
    size_t size = (size_t)l->R * (size_t)(l->kind == ATTENTION       ? l->K * l->N
                                          : l->kind == CROSS_ENTROPY ? 1
                                                                     : l->N);
    if (l->kind == LINEAR)
        oracle_linear(l->y, l->x, l->weight, l->bias, l->R, l->K, l->N);
    else if (l->kind == LAYERNORM)
        oracle_layernorm(l->y, l->x, l->weight, l->bias, l->R, l->N);
    else if (l->kind == ATTENTION)
        oracle_attention(l->y, l->x, l->sequences, l->first_row, l->dropout, l->K, l->N);
    for (size_t i = 0; i < size; i++) {
        if (l->kind == GELU)
            l->y[i] = oracle_gelu(l->x[i]);
        else if (l->kind == CROSS_ENTROPY)
            l->y[i] = oracle_cross_entropy(l->x + i * (size_t)l->N, l->target[i], l->N);
        loss += l->dy[i] * l->y[i];
    }
    return loss;
}

// Compares gradients with central differences (f(x + h) - f(x - h)) / 2h of an oracle, for single elements
// and along random directions in which every element moves, so that none is left out. In double precision
// with h = 1e-6 and values around 1 the differences are good to about 1e-9: what remains is the rounding
// (6e-8) of the float code under test. 1e-5 of the largest element allows for a few hundred roundings; the
// random signs of a direction let its sum grow with the square root of the size.
static void check_differences(const char *what, double (*loss)(const void *), const void *context, double *x,
                              size_t size, const float *gradient, int elements) {
    double *kept = xmalloc(size * sizeof *kept), scale = 1e-9;
    memcpy(kept, x, size * sizeof *kept);
    for (size_t i = 0; i < size; i++) // not fmax: gcc 12 for arm64 fails on it
        scale = fabsf(gradient[i]) > scale ? fabsf(gradient[i]) : scale;
    for (int n = 0; n < elements + 2; n++) {
        uint64_t stream = random_stream(17, (uint64_t)n);
        bool all = n >= elements;
        size_t one = random_bits(stream, size) % size;
        double f[2], ours = 0, wanted;
        for (int side = 0; side < 2; side++) {
            for (size_t i = all ? 0 : one; i < (all ? size : one + 1); i++) {
                double sign = random_bits(stream, i) & 1 ? 1 : -1;
                x[i] = kept[i] + (side ? 1e-6 : -1e-6) * sign;
                ours += side ? sign * gradient[i] : 0;
            }
            f[side] = loss(context);
        }
        memcpy(x, kept, size * sizeof *kept);
        wanted = (f[1] - f[0]) / 2e-6;
        check(fabs(ours - wanted) <= 1e-5 * scale * (all ? sqrt((double)size) : 1),
              "%s: derivative by %s %zu is %.7g, should be %.7g", what, all ? "direction" : "element",
              all ? (size_t)(n - elements) : one, ours, wanted);
    }
    free(kept);
}

// ---- layers ----

// The error promised above fast_exp, at a million places; limits and NaN.
static void test_exp(void) {
    double worst = 0;
    for (int i = 0; i <= 1000000; i++) {
        float x = -87.0f + 175.0f * 1e-6f * (float)i;
        double error = x <= 88 ? fabs(fast_exp(x) / exp(x) - 1) : 0;
        if (!(error <= worst)) worst = isnan(error) ? HUGE_VAL : error; // fmax would lose a NaN
    }
    check(worst < 2e-7, "relative error %.2e", worst);
    check(fast_exp(0) == 1, "exp(0) is %.9g", fast_exp(0));
    check(fast_exp(-1e30f) >= 0 && fast_exp(-INFINITY) < 2e-38f, "far below zero: %g", fast_exp(-INFINITY));
    check(fast_exp(1e30f) > 1e38f && isfinite(fast_exp(INFINITY)), "far above zero: %g", fast_exp(INFINITY));
    check(isnan(fast_exp(NAN)), "exp(NaN) is %g", fast_exp(NAN));
}

// Values and slopes in -8 .. 8 against the formula; far outside gelu is x or 0 and its slope 1 or 0.
static void test_gelu(void) {
    enum { N = 1601 };
    static const float far[] = {-1e6f, -300, -30, 30, 300, 1e6f};
    float x[N], y[N], slope[N], ones[N];
    for (int i = 0; i < N; i++) x[i] = 0.01f * (float)i - 8, ones[i] = slope[i] = 1;
    gelu_forward(y, x, N);
    Layer layer = {
        .kind = GELU, .R = N, .N = 1, .x = doubles(x, N), .y = xmalloc(N * sizeof(double)), .dy = ones};
    layer_loss(&layer);
    check(deviation(y, layer.y, N) < 2e-7, "forward differs by %.1e", deviation(y, layer.y, N));
    gelu_backward(slope, x, N);
    check(same_bits(x, y, N), "the backward pass does not give the forward values again");
    check_differences("gelu", layer_loss, &layer, layer.x, N, slope, 100);
    for (int i = 0; i < 6; i++) {
        float at = far[i], value, d = 1;
        gelu_forward(&value, &at, 1);
        gelu_backward(&d, &at, 1);
        check(fabsf(value - fmaxf(far[i], 0)) <= 1e-30f && fabsf(d - (far[i] > 0)) <= 1e-6f,
              "gelu(%g) = %g with slope %g", far[i], value, d);
    }
    free(layer.x);
    free(layer.y);
}

// Rows are sums, to the bit; gradients are summed by token and by position, and added to what was there.
static void test_embedding(void) {
    enum { V = 23, P = 17, C = 150, R = 200 };
    float *wte = random_floats(1, V * C), *wpe = random_floats(2, P * C), *dx = random_floats(3, R * C);
    float *x = xfloats(R * C), *table = random_floats(4, V * C);
    int token[R], position[R], wrong = 0;
    double *wanted = doubles(table, V * C);
    for (int r = 0; r < R; r++)
        token[r] = (int)(random_bits(5, (uint64_t)r) % V),
        position[r] = (int)(random_bits(6, (uint64_t)r) % P);
    embedding_forward(x, wte, wpe, token, position, R, C);
    embedding_backward(table, dx, token, R, C);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            wrong += x[r * C + c] != wte[token[r] * C + c] + wpe[position[r] * C + c];
            wanted[token[r] * C + c] += dx[r * C + c];
        }
    check(wrong == 0, "forward: %d elements are no sums", wrong);
    check(deviation(table, wanted, V * C) < 1e-6, "backward differs by %.1e",
          deviation(table, wanted, V * C));
    free(wte), free(wpe), free(dx), free(x), free(table), free(wanted);
}

// Linear and layernorm: forward, backward, gradients added or written, and each gradient that is not wanted.
static void test_linear_and_layernorm(void) {
    enum { R = 37, K = 70, N = 91 };
    static const int kinds[2] = {LINEAR, LAYERNORM};
    for (int kind = 0; kind < 2; kind++) {
        const int in = kind == 0 ? K : N, weights = kind == 0 ? K * N : N;
        const char *name = kind == 0 ? "linear" : "layernorm";
        float *x = random_floats(1, R * K + R * N), *weight = random_floats(2, K * N),
              *bias = random_floats(3, N);
        float *residual = random_floats(4, R * N), *dy = random_floats(5, R * N), *y = xfloats(R * N);
        float mean[R], rstd[R], *rebuilt = xfloats(R * N);
        Layer layer = {.kind = kinds[kind],
                       .R = R,
                       .K = in,
                       .N = N,
                       .x = doubles(x, (size_t)R * in),
                       .dy = dy,
                       .weight = doubles(weight, weights),
                       .bias = doubles(bias, N),
                       .y = doubles(dy, R * N)};
        const Tensor matrix = {.value = weight, .shape = {K, N}}, vector = {.value = bias};
        layer_loss(&layer);
        if (kind == 0) {
            linear_forward(y, residual, x, &matrix, &vector, R);
            for (int i = 0; i < R * N; i++) layer.y[i] += residual[i];
        } else {
            layernorm_forward(y, mean, rstd, x, weight, bias, 1e-5f, R, N);
            layernorm_forward(rebuilt, mean, rstd, x, weight, bias, 1e-5f, R, N);
            check(same_bits(y, rebuilt, R * N), "layernorm is rebuilt with other bits");
        }
        check(deviation(y, layer.y, R * N) < 1e-6, "%s differs by %.1e", name, deviation(y, layer.y, R * N));
        for (int wanted = 1; wanted < 8; wanted++)
            for (int accumulate = 0; accumulate < 2; accumulate++) {
                float *dx = xfloats((size_t)R * in), *dweight = xfloats(weights), *dbias = xfloats(N);
                for (int i = 0; i < R * in; i++)
                    dx[i] = kind == 0 ? NAN : 3; // linear writes it, layernorm adds to it
                for (int i = 0; i < weights; i++) dweight[i] = accumulate ? 5 : NAN;
                for (int i = 0; i < N; i++) dbias[i] = accumulate ? 7 : NAN;
                float *w = wanted & 2 ? dweight : NULL, *b = wanted & 4 ? dbias : NULL;
                if (kind == 0)
                    linear_backward(wanted & 1 ? dx : NULL, dy, x,
                                    &(Tensor){.value = weight, .gradient = w, .shape = {K, N}},
                                    &(Tensor){.value = bias, .gradient = b}, accumulate, R);
                else
                    layernorm_backward(dx, w, b, dy, x, mean, rstd, weight, accumulate, R, N);
                for (int i = 0; i < R * in; i++) dx[i] -= kind == 0 ? 0 : 3;
                for (int i = 0; i < weights; i++) dweight[i] -= accumulate ? 5 : 0;
                for (int i = 0; i < N; i++) dbias[i] -= accumulate ? 7 : 0;
                if (wanted & 1) check_differences(name, layer_loss, &layer, layer.x, (size_t)R * in, dx, 3);
                if (w) check_differences(name, layer_loss, &layer, layer.weight, weights, w, 3);
                if (b) check_differences(name, layer_loss, &layer, layer.bias, N, b, 3);
                free(dx), free(dweight), free(dbias);
            }
        free(x), free(weight), free(bias), free(residual), free(dy), free(y), free(rebuilt);
        free(layer.x), free(layer.weight), free(layer.bias), free(layer.y);
    }
}

// A linear layer whose matrix has an adapter, for finite differences of A and B.
typedef struct {
    Layer layer;
    const float *matrix;
    double *A, *B, scale;
    int rank;
} LoraLayer;

static double lora_loss(const void *context) {
    const LoraLayer *l = context;
    const int K = l->layer.K, N = l->layer.N, r = l->rank;
    for (int k = 0; k < K; k++)
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int j = 0; j < r; j++) sum += l->A[j * K + k] * l->B[n * r + j];
            l->layer.weight[k * N + n] = l->matrix[k * N + n] + l->scale * sum;
        }
    return layer_loss(&l->layer);
}

// An adapter: forward, dx, dA and dB by finite differences, added or written, and each that is not wanted.
static void test_lora_layer(void) {
    enum { R = 23, K = 30, N = 41 };
    for (int r = 1; r < 8; r += 6) {
        float *x = random_floats(1, R * K), *weight = random_floats(2, K * N), *bias = random_floats(3, N),
              *A = random_floats(4, r * K), *B = random_floats(5, N * r), *dy = random_floats(6, R * N),
              *y = xfloats(R * N), *dA = xfloats(r * K), *dB = xfloats(N * r), *dx = xfloats(R * K);
        LoraLayer lora = {.matrix = weight, .A = doubles(A, r * K), .B = doubles(B, N * r), .rank = r};
        lora.scale = 0.75;
        lora.layer = (Layer){.kind = LINEAR,
                             .R = R,
                             .K = K,
                             .N = N,
                             .x = doubles(x, R * K),
                             .dy = dy,
                             .weight = doubles(weight, K * N),
                             .bias = doubles(bias, N),
                             .y = doubles(dy, R * N)};
        for (int wanted = 0; wanted < 16; wanted++) { // dx, dA, dB; the last bit: added to what there is
            Tensor pair[2] = {{.value = A, .gradient = wanted & 2 ? dA : NULL, .shape = {r, K}},
                              {.value = B, .gradient = wanted & 4 ? dB : NULL, .shape = {N, r}}};
            const Tensor matrix = {.value = weight, .shape = {K, N}, .adapter = pair, .adapter_scale = 0.75f};
            const Tensor vector = {.value = bias};
            const bool add = wanted & 8;
            linear_forward(y, NULL, x, &matrix, &vector, R);
            lora_loss(&lora);
            check(deviation(y, lora.layer.y, R * N) < 2e-6, "rank %d differs by %.1e", r,
                  deviation(y, lora.layer.y, R * N));
            for (int i = 0; i < r * K; i++) dA[i] = add ? 5 : NAN;
            for (int i = 0; i < N * r; i++) dB[i] = add ? 7 : NAN;
            for (int i = 0; i < R * K; i++) dx[i] = NAN;
            linear_backward(NULL, dy, NULL, &matrix, &vector, add, R); // without x: no gradients
            check(add ? dA[0] == 5 && dB[0] == 7 : isnan(dA[0]) && isnan(dB[0]), "gradients without x");
            linear_backward(wanted & 1 ? dx : NULL, dy, x, &matrix, &vector, add, R);
            for (int i = 0; i < r * K; i++) dA[i] -= add ? 5 : 0;
            for (int i = 0; i < N * r; i++) dB[i] -= add ? 7 : 0;
            if (wanted & 1) check_differences("dx", lora_loss, &lora, lora.layer.x, R * K, dx, 3);
            if (wanted & 2) check_differences("dA", lora_loss, &lora, lora.A, r * K, dA, 3);
            if (wanted & 4) check_differences("dB", lora_loss, &lora, lora.B, N * r, dB, 3);
        }
        free(x), free(weight), free(bias), free(A), free(B), free(dy), free(y), free(dA), free(dB), free(dx);
        free(lora.A), free(lora.B), free(lora.layer.x), free(lora.layer.weight), free(lora.layer.bias);
        free(lora.layer.y);
    }
}

// Ragged sequences, one of them empty, over several tiles of queries and blocks of keys; head sizes from 1 to
// 64, with dropout and without, and scores so large that softmax picks one key.
static void test_attention(void) {
    static const struct {
        int NH, HS, sequences, lengths[5];
        float p, scale;
    } cases[] = {{2, 5, 4, {300, 0, 1, 70}, 0, 1},
                 {2, 4, 3, {270, 64, 65}, 0.3f, 2},
                 {3, 1, 4, {1, 2, 63, 130}, 0.1f, 3},
                 {1, 64, 2, {67, 40}, 0, 1},
                 {2, 16, 2, {128, 3}, 0, 12}};
    for (int n = 0; n < 5; n++) {
        const int NH = cases[n].NH, HS = cases[n].HS, C = NH * HS;
        Batch batch = ragged_batch(1, 2, cases[n].sequences, cases[n].lengths);
        const int R = batch.rows;
        int longest = 0;
        for (int s = 0; s < cases[n].sequences; s++)
            longest = cases[n].lengths[s] > longest ? cases[n].lengths[s] : longest;
        size_t size = attention_scratch(longest);
        float *qkv = random_floats(20 + n, (size_t)R * 3 * C), *dout = random_floats(30 + n, (size_t)R * C);
        float *out = xfloats((size_t)R * C), *dqkv = xfloats((size_t)R * 3 * C),
              *lse = xfloats((size_t)R * NH);
        float *scratch = xfloats(size * omp_get_max_threads());
        Dropout dropout = {cases[n].p, 99, NULL};
        for (int i = 0; i < R * 3 * C; i++) qkv[i] *= cases[n].scale, dqkv[i] = NAN;
        Layer layer = {.kind = ATTENTION,
                       .R = R,
                       .K = NH,
                       .N = HS,
                       .x = doubles(qkv, (size_t)R * 3 * C),
                       .dy = dout,
                       .y = xmalloc((size_t)R * C * sizeof(double)),
                       .first_row = batch.first_row,
                       .sequences = batch.sequences,
                       .dropout = dropout};
        const Keys keys = {qkv + C, qkv + 2 * C, 3 * (size_t)C, (size_t)HS, batch.first_row, 0};
        const Attention attention = {&batch, dropout, NH, HS, qkv, keys, out, lse, scratch, size};
        attention_forward(&attention);
        layer_loss(&layer);
        // exp() turns the rounding of a score into a relative error: as large a score as |q| |k| allows, half
        // an ulp
        double error = deviation(out, layer.y, (size_t)R * C), longest_q = 0, longest_k = 0;
        for (int i = 0; i < R * NH; i++) {
            double q = 0, k = 0;
            for (int c = 0; c < HS; c++) {
                const float *at = qkv + (size_t)(i / NH) * 3 * C + i % NH * HS + c;
                q += (double)at[0] * at[0], k += (double)at[C] * at[C];
            }
            longest_q = fmax(longest_q, q), longest_k = fmax(longest_k, k);
        }
        double bound = 1e-6 + 0x1p-24 * sqrt(longest_q * longest_k / HS);
        check(error < bound, "case %d: forward differs by %.1e, more than %.1e", n, error, bound);
        attention_backward(&attention, dqkv, dout);
        check_differences("attention", layer_loss, &layer, layer.x, (size_t)R * 3 * C, dqkv, 20);
        free(qkv), free(dout), free(out), free(dqkv), free(lse), free(scratch), free(layer.x), free(layer.y);
        batch_free(&batch);
    }
}

// Moderate logits, huge ones of both signs, and equal ones: a tie is not correct.
static void test_cross_entropy(void) {
    enum { R = 40, V = 301 };
    float *logits = random_floats(7, R * V), *backward = xfloats(R * V), loss[R], ones[R];
    int target[R];
    bool correct[R];
    for (int r = 0; r < R; r++) {
        target[r] = (int)(random_bits(8, (uint64_t)r) % V), ones[r] = 0.25f;
        for (int v = 0; v < V; v++) logits[r * V + v] *= r < 20 ? 5 : r < 30 ? 3e4f : r < 38 ? -1e30f : 0;
    }
    memcpy(backward, logits, R * V * sizeof(float));
    Layer layer = {.kind = CROSS_ENTROPY,
                   .R = R,
                   .N = V,
                   .x = doubles(logits, R * V),
                   .target = target,
                   .dy = ones,
                   .y = xmalloc(R * sizeof(double))};
    layer_loss(&layer);
    cross_entropy(backward, loss, correct, target, true, 0.25f, R, V);
    for (int r = 0; r < R; r++) {
        bool best = true;
        for (int v = 0; v < V; v++)
            best = best && (v == target[r] || logits[r * V + v] < logits[r * V + target[r]]);
        check(fabs(loss[r] - layer.y[r]) <= 1e-6 * (fabs(layer.y[r]) + 1),
              "row %d: loss %.8g, should be %.8g", r, loss[r], layer.y[r]);
        check(correct[r] == best, "row %d: correct is %d", r, correct[r]);
    }
    check(!correct[39], "a tie is correct");
    layer.R = 20; // the moderate rows: among huge logits a step of 1e-6 is nothing
    check_differences("cross-entropy", layer_loss, &layer, layer.x, 20 * V, backward, 100);
    for (int r = 20; r < R; r++) {
        double *x = layer.x + r * V, largest = -HUGE_VAL, sum = 0;
        for (int v = 0; v < V; v++) largest = fmax(largest, x[v]);
        for (int v = 0; v < V; v++) sum += x[v] = exp(x[v] - largest);
        for (int v = 0; v < V; v++) {
            double wanted = 0.25 * (x[v] / sum - (v == target[r])), ours = backward[r * V + v];
            check(fabs(ours - wanted) < 1e-7, "row %d: dlogit %g, should be %g", r, ours, wanted);
        }
    }
    memcpy(backward, logits, R * V * sizeof(float));
    float loss_only[R];
    cross_entropy(backward, loss_only, correct, target, false, 0, R, V);
    check(same_bits(loss, loss_only, R), "the loss depends on whether gradients are wanted");
    free(logits), free(backward), free(layer.x), free(layer.y);
}

// The share of zeros is p within 5 deviations; what is kept is scaled so that the mean stays; places, layers
// and streams agree as often as independent draws do: p² + (1 - p)².
static void test_dropout(void) {
    enum { R = 400, C = 250, N = R * C };
    float *ones = xfloats(N), *zeros = xcalloc(N, sizeof(float)), *y[8];
    for (int i = 0; i < N; i++) ones[i] = 1;
    for (int k = 0; k < 8; k++) y[k] = xfloats(N);
    for (int n = 0; n < 3; n++) {
        const float p = n == 0 ? 0.1f : n == 1 ? 0.5f : 0.9f;
        for (int k = 0; k < 8; k++) // 2 layers with 3 places each, then two other streams
            dropout_add(y[k], k % 2 ? zeros : NULL, ones,
                        dropout_at((Dropout){p, (uint64_t)(k < 6 ? 3 : k), NULL}, k < 6 ? k / 3 : 0,
                                   k < 6 ? k % 3 : 0),
                        R, C);
        for (int k = 0; k < 8; k++) {
            double dropped = 0, kept = 0, agree, same = p * p + (1 - p) * (1 - p);
            for (int i = 0; i < N; i++)
                y[k][i] == 0 ? dropped++ : (kept += fabs(y[k][i] - 1 / (1 - (double)p)) < 1e-6 / (1 - p));
            check(fabs(dropped - N * p) < 5 * sqrt(N * p * (1 - p)), "p = %g: %g of %d are zero", p, dropped,
                  N);
            check(dropped + kept == N, "p = %g: something is neither 0 nor 1 / (1 - p)", p);
            for (int other = 0; other < k; other++) {
                agree = 0;
                for (int i = 0; i < N; i++) agree += (y[k][i] == 0) == (y[other][i] == 0);
                check(fabs(agree - N * same) < 5 * sqrt(N * same * (1 - same)),
                      "masks %d and %d agree in %g of %d", k, other, agree, N);
            }
        }
    }
    for (int k = 0; k < 8; k++) free(y[k]);
    free(ones), free(zeros);
}

// Attention draws for each row, head and key anew: 27 places, in 64 streams none like another.
static void test_attention_dropout(void) {
    uint64_t drawn[27] = {0};
    static const int keys[3] = {0, 1, (1 << 20) - 1};
    for (int i = 0; i < 27; i++) {
        for (uint64_t stream = 0; stream < 64; stream++) {
            float p = 1;
            attention_dropout(&p, (Dropout){0.5f, stream, NULL}, i / 9, 3, i / 3 % 3, keys[i % 3], 1);
            check(p == 0 || p == 2, "attention's dropout makes 1 into %g", p);
            drawn[i] |= (uint64_t)(p > 0) << stream;
        }
        for (int j = 0; j < i; j++)
            check(drawn[i] != drawn[j], "attention draws %d and %d are the same", i, j);
    }
}

// Steps draw differently; the same step draws the same; without dropout the step does not matter. Rows draw by
// their numbers: in one batch or in two, the same examples get the same loss.
static void test_dropout_of_steps(void) {
    Model *model = tiny_model(tiny_config(19, 30, 2, 2, 8, 32, true), 1, NULL);
    Batch batches[2] = {ragged_batch(1, 19, 2, (int[]){20, 30}), ragged_batch(1, 19, 2, (int[]){20, 30})};
    Batch both = {0};
    batch_clear(&both);
    for (int s = 0; s < 4; s++) append_sequence(&both, &batches[0], s % 2);
    batches[1].number = xmalloc(50 * sizeof(size_t));
    for (size_t r = 0; r < 50; r++) batches[1].number[r] = 50 + r;
    Options options;
    double loss[2][2], twice = 0, once = 0;
    for (int p = 0; p < 2; p++) {
        Activations a = {0};
        options_from_text(&options, p ? "--dropout 0.2" : "");
        loss[p][0] = take_update(model, &a, batches, 1, HYPERPARAMETERS(&options), 5, 0).loss;
        loss[p][1] = take_update(model, &a, batches, 1, HYPERPARAMETERS(&options), 6, 0).loss;
        check(loss[p][0] == take_update(model, &a, batches, 1, HYPERPARAMETERS(&options), 5, 0).loss,
              "a step draws other masks again");
        twice = take_update(model, &a, batches, 2, HYPERPARAMETERS(&options), 5, 0).loss;
        once = take_update(model, &a, &both, 1, HYPERPARAMETERS(&options), 5, 0).loss;
        check(fabs(once - twice) < 1e-6, "loss %.9g in one batch, %.9g in two", once, twice);
        activations_free(&a);
    }
    check(loss[0][0] == loss[0][1], "without dropout the loss depends on the step");
    check(fabs(loss[1][0] - loss[1][1]) > 1e-4, "two steps draw the same masks");
    check(fabs(loss[1][0] - twice) > 1e-4, "two micro-batches draw the same masks");
    check(fabs(loss[1][0] - loss[0][0]) > 1e-4, "dropout changes nothing");
    Activations a = {0};
    options_from_text(&options, "--dropout 0.2 --seed 2");
    Update update = take_update(model, &a, batches, 1, HYPERPARAMETERS(&options), 5, 0);
    check(fabs(loss[1][0] - update.loss) > 1e-4, "dropout does not depend on the seed");
    activations_free(&a);
    batch_free(&batches[0]), batch_free(&batches[1]), batch_free(&both);
    model_free(model);
}

// ---- the whole model ----

typedef struct {
    const Model *model;
    const Batch *batch;
    Dropout dropout;
    double **value; // of each tensor
    double *logits; // (R, V)
} Oracle;

// GPT-2 from the formulas: the mean loss over scored rows; fills `logits`.
static double oracle_loss(const void *context) {
    const Oracle *o = context;
    const Config *config = &o->model->config;
    const Batch *batch = o->batch;
    const int R = batch->rows, C = config->n_embd, F = config->n_inner, V = config->vocab_size,
              L = config->n_layer;
    double *x = xmalloc((size_t)R * (3 * C + (F > 3 * C ? F : 3 * C)) * sizeof *x);
    double *normed = x + R * C, *out = normed + R * C, *wide = out + R * C, loss = 0, **value = o->value;
    for (int i = 0; i < R * C; i++)
        x[i] =
            (value[WTE][batch->token[i / C] * C + i % C] + value[WPE][batch->position[i / C] * C + i % C]) *
            dropout_factor(dropout_at(o->dropout, L, DROP_EMBEDDING), i);
    for (int l = 0; l < L; l++) {
        double **block = value + l * BLOCK_TENSORS; // block[ATTN_WEIGHT] is this layer's
        oracle_layernorm(normed, x, block[LN_1_WEIGHT], block[LN_1_BIAS], R, C);
        oracle_linear(wide, normed, block[ATTN_WEIGHT], block[ATTN_BIAS], R, C, 3 * C);
        oracle_attention(normed, wide, batch->sequences, batch->first_row,
                         dropout_at(o->dropout, l, DROP_ATTENTION), config->n_head, C / config->n_head);
        oracle_linear(out, normed, block[ATTN_PROJ_WEIGHT], block[ATTN_PROJ_BIAS], R, C, C);
        for (int i = 0; i < R * C; i++)
            x[i] += out[i] * dropout_factor(dropout_at(o->dropout, l, DROP_PROJECTION), i);
        oracle_layernorm(normed, x, block[LN_2_WEIGHT], block[LN_2_BIAS], R, C);
        oracle_linear(wide, normed, block[FC_WEIGHT], block[FC_BIAS], R, C, F);
        for (int i = 0; i < R * F; i++) wide[i] = oracle_gelu(wide[i]);
        oracle_linear(out, wide, block[FC_PROJ_WEIGHT], block[FC_PROJ_BIAS], R, F, C);
        for (int i = 0; i < R * C; i++)
            x[i] += out[i] * dropout_factor(dropout_at(o->dropout, l, DROP_MLP), i);
    }
    value += (L - 1) * BLOCK_TENSORS;
    oracle_layernorm(normed, x, value[LN_F_WEIGHT], value[LN_F_BIAS], R, C);
    const double *head = config->tie_word_embeddings ? o->value[WTE] : value[LM_HEAD];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) {
            o->logits[r * V + v] = 0;
            for (int c = 0; c < C; c++) o->logits[r * V + v] += normed[r * C + c] * head[v * C + c];
        }
        if (batch->target[r] >= 0)
            loss += oracle_cross_entropy(o->logits + r * V, batch->target[r], V) / batch->targets;
    }
    free(x);
    return loss;
}

// Logits, loss, and the gradient of every tensor; tied and not, with dropout (masks must be drawn again alike
// in the backward pass), --recompute, and more scored rows than fit into one chunk of logits.
static void test_model(void) {
    static const struct {
        int L, NH, C, F, lengths[4];
        bool tied, recompute;
        float dropout;
    } cases[] = {{2, 3, 12, 20, {9, 0, 1, 14}, true, false, 0},
                 {2, 2, 10, 40, {9, 5, 1, 14}, false, false, 0},
                 {3, 2, 8, 32, {6, 0, 1, 12}, true, true, 0.25f},
                 {2, 2, 8, 20, {6, 0, 1, 12}, false, false, 0.5f},
                 {1, 2, 4, 16, {160, 99, 130, 2}, true, false, 0}};
    for (int n = 0; n < 5; n++) {
        Model *model = tiny_model(
            tiny_config(17, 160, cases[n].L, cases[n].NH, cases[n].C, cases[n].F, cases[n].tied), n, NULL);
        Batch batch = ragged_batch(n, 17, 4, cases[n].lengths);
        Oracle oracle = {model,
                         &batch,
                         {0, 0, NULL},
                         xmalloc((size_t)model->tensor_count * sizeof(double *)),
                         xmalloc((size_t)batch.rows * 17 * sizeof(double))};
        for (int i = 0; i < model->tensor_count; i++)
            oracle.value[i] = doubles(model->tensors[i].value, model->tensors[i].size);
        oracle_loss(&oracle);
        float *logits = logits_of(model, &batch);
        double error = deviation(logits, oracle.logits, (size_t)batch.rows * 17);
        check(error < 5e-6, "case %d: logits differ by %.1e", n, error);
        oracle.dropout = (Dropout){cases[n].dropout, 5, NULL};
        double loss = gradients_of(model, &batch, 1, oracle.dropout, cases[n].recompute),
               wanted = oracle_loss(&oracle);
        check(fabs(loss - wanted) < 2e-6 * wanted, "case %d: loss %.8g, should be %.8g", n, loss, wanted);
        for (int i = 0; i < model->tensor_count; i++)
            check_differences(model->tensors[i].name, oracle_loss, &oracle, oracle.value[i],
                              model->tensors[i].size, model->tensors[i].gradient, n == 4 ? 1 : 6);
        for (int i = 0; i < model->tensor_count; i++) free(oracle.value[i]);
        free(oracle.value), free(oracle.logits), free(logits);
        batch_free(&batch);
        model_free(model);
    }
}

// `plain` with random adapters beside all matrices of its blocks from first_layer on, ready to be trained.
static Model *adapted_model(const Model *plain, int rank, int first_layer) {
    Model *model = model_new(plain->config);
    model->value_memory = allocate_values(model, 0);
    for (int i = 0; i < plain->tensor_count; i++)
        memcpy(model->tensors[i].value, plain->tensors[i].value, plain->tensors[i].size * sizeof(float));
    model->lora_rank = rank;
    model->lora_alpha = 1.5f;
    for (int i = 0; i < plain->tensor_count; i++)
        if (is_adaptable(&model->tensors[i]) && model->tensors[i].layer >= first_layer)
            model_add_adapter(model, &model->tensors[i]);
    model->adapter_memory = allocate_values(model, plain->tensor_count);
    for (int i = plain->tensor_count; i < model->tensor_count; i++)
        for (size_t j = 0; j < model->tensors[i].size; j++)
            model->tensors[i].value[j] = 0.5f * random_normal(random_stream(77, (uint64_t)i), j);
    model_set_training(model, &(Patterns){0}, &(Patterns){0});
    model_allocate_training(model, true);
    return model;
}

// From the gradient dW (K, N) of the merged matrix follow dA = scale · (dW B)ᵀ and dB = scale · (A dW)ᵀ.
static void check_adapter_gradients(const Tensor *weight, const float *dW, const char *what) {
    const Tensor *A = &weight->adapter[0], *B = &weight->adapter[1];
    const size_t K = A->shape[1], N = B->shape[0], r = A->shape[0];
    double *dA = xcalloc(A->size, sizeof *dA), *dB = xcalloc(B->size, sizeof *dB);
    for (size_t k = 0; k < K; k++)
        for (size_t n = 0; n < N; n++)
            for (size_t j = 0; j < r; j++) {
                dA[j * K + k] += (double)weight->adapter_scale * dW[k * N + n] * B->value[n * r + j];
                dB[n * r + j] += (double)weight->adapter_scale * dW[k * N + n] * A->value[j * K + k];
            }
    double of_A = deviation(A->gradient, dA, A->size), of_B = deviation(B->gradient, dB, B->size);
    check(of_A < 1e-5 && of_B < 1e-5, "%s: gradients beside %s differ by %.1e and %.1e", what, weight->name,
          of_A, of_B);
    free(dA), free(dB);
}

// A model with adapters is its merged model: logits and loss, and gradients by the chain rule, with dropout,
// recomputed, over two batches. What is frozen has no gradient, and blocks below the first adapter keep nothing.
static void test_lora_model(void) {
    for (int n = 0; n < 4; n++) {
        const bool recompute = n % 2, upper = n / 2;
        Model *plain = tiny_model(tiny_config(17, 16, 2, 2, 8, 20, true), 3, NULL),
              *model = adapted_model(plain, 3, upper);
        Model *merged = adapted_model(plain, 3, upper);
        const Batch batches[2] = {ragged_batch(1, 17, 3, (int[]){9, 0, 14}),
                                  ragged_batch(2, 17, 2, (int[]){3, 11})};
        const Dropout dropout = {.probability = upper ? 0.25f : 0, .stream = 5};
        model_merge(merged);
        check(merged->tensor_count == plain->tensor_count && merged->lora_rank == 0, "merged: adapters stay");
        for (int i = 0; i < plain->tensor_count; i++) {
            const Tensor *weight = &model->tensors[i], *with = &merged->tensors[i];
            check(!weight->gradient && !weight->exp_avg, "%s is frozen, and has a gradient", weight->name);
            check(!!weight->adapter == !same_bits(with->value, weight->value, weight->size), "merged: %s",
                  weight->name);
            memcpy(plain->tensors[i].value, with->value, with->size * sizeof(float));
        }
        float *logits = logits_of(model, batches), *wanted = logits_of(plain, batches);
        double error = deviation_of_floats(logits, wanted, (size_t)batches[0].rows * 17);
        check(error < 5e-6, "merged: logits differ by %.1e", error);
        double loss = gradients_of(model, batches, 2, dropout, recompute),
               same = gradients_of(plain, batches, 2, dropout, recompute);
        check(fabs(loss - same) < 2e-6 * same, "merged: loss %.8g, not %.8g", same, loss);
        for (int i = 0; i < plain->tensor_count; i++)
            if (model->tensors[i].adapter)
                check_adapter_gradients(&model->tensors[i], plain->tensors[i].gradient,
                                        recompute ? "recomputed" : "kept");
        check(model->lowest_trained == upper, "the lowest trained block is %d", model->lowest_trained);
        check(model->tensor_count - plain->tensor_count == (upper ? 8 : 16), "%d tensors of adapters",
              model->tensor_count - plain->tensor_count);
        free(logits), free(wanted);
        batch_free((Batch *)&batches[0]), batch_free((Batch *)&batches[1]);
        model_free(plain), model_free(model), model_free(merged);
    }
}

// NaN at a token or a position of sequence 1, and another token there, reach nothing before and no other
// sequence: to the bit. Nor does a row that is not seen by any scored row get a gradient.
static void test_poison(void) {
    enum { V = 31, AT = 100 };
    static const int places[] = {1, 63, 64, 65, 128, 149};
    MatmulKind usual = matmul_kind;
    for (int kind = 0; kind < 3; kind++) {
        matmul_kind = kind == 1 ? usual : MATMUL_BUILTIN;
        bfloat16_products = kind == 2;
        Model *model = tiny_model(tiny_config(V, 160, 2, 2, 8, 32, false), 3, NULL);
        Batch batch = ragged_batch(1, V - 1, 3, (int[]){40, 150, 90});
        const int first = batch.first_row[1], end = batch.first_row[2];
        float *clean = logits_of(model, &batch);
        for (int n = 0; n < 8; n++) {
            int t = n < 6 ? places[n] : AT, kept = batch.token[first + t], reached = 0;
            float *poison = n == 6 ? model_tensor(model, WTE, 0)->value + (V - 1) * 8
                                   : model_tensor(model, WPE, 0)->value + AT * 8,
                  value = *poison;
            if (n < 7) batch.token[first + t] = V - 1; // no other row has this token
            if (n >= 6) *poison = NAN;                 // no other row has token V - 1 or position AT
            float *logits = logits_of(model, &batch);
            check(same_bits(logits, clean, (size_t)(first + t) * V),
                  "case %d: what comes at %d is seen before", n, t);
            check(same_bits(logits + end * V, clean + end * V, (size_t)(batch.rows - end) * V),
                  "case %d: another sequence is touched", n);
            for (int r = first + t; r < end; r++)
                reached += n < 6 ? !same_bits(logits + r * V, clean + r * V, V) : isnan(logits[r * V]) != 0;
            check(reached == end - first - t, "case %d: only %d of %d rows see it", n, reached,
                  end - first - t);
            batch.token[first + t] = kept;
            *poison = value;
            free(logits);
        }
        for (int r = first + AT; r < end; r++) // positions from AT on: seen by nothing that is scored
            batch.targets -= batch.target[r] >= 0, batch.target[r] = -1;
        gradients_of(model, &batch, 1, (Dropout){0}, false);
        for (int t = AT - 20; t < 150; t++) {
            double sum = 0;
            for (int c = 0; c < 8; c++) sum += fabs(model_tensor(model, WPE, 0)->gradient[t * 8 + c]);
            check(t < AT ? sum > 0 : sum == 0, "position %d has gradient %g", t, sum);
        }
        free(clean);
        batch_free(&batch);
        model_free(model);
    }
    bfloat16_products = false;
    matmul_kind = usual;
}

// Padded batches (right, left, holes, none, all PAD; nonsense where PAD is) give what each sequence gives
// alone, and zeros at PAD; labels are shifted by columns.
static void test_padding(void) {
    enum { B = 5, T = 12, V = 23 };
    static const char *const masks[B] = {"111110000000", "000011111111", "011010011101", "111111111111",
                                         "000000000000"};
    int64_t ids[B * T], mask[B * T], labels[B * T], positions[B * T];
    Model *model = tiny_model(tiny_config(V, T + 5, 2, 2, 8, 32, true), 2, NULL);
    for (int i = 0; i < B * T; i++) {
        mask[i] = masks[i / T][i % T] == '1';
        ids[i] = mask[i] ? (int64_t)(random_bits(1, (uint64_t)i) % V) : -777;
        labels[i] = mask[i] && i % 3 ? (int64_t)(random_bits(2, (uint64_t)i) % V) : -100;
        positions[i] = mask[i] ? (int64_t)(random_bits(3, (uint64_t)i) % T) : -777;
    }
    for (int given = 0; given < 2; given++) {
        Batch batch = {0};
        pack_padded(&batch, ids, mask, given ? positions : NULL, labels, B, T);
        float *packed = logits_of(model, &batch), padded[B * T * V];
        for (int i = 0; i < B * T * V; i++) padded[i] = NAN;
        unpack_rows(padded, packed, mask, B, T, V);
        int row = 0, wrong = 0, targets = 0;
        for (int b = 0; b < B; b++) {
            Batch alone = {0};
            batch_clear(&alone);
            for (int i = b * T; i < (b + 1) * T; i++)
                if (mask[i]) {
                    int target = i + 1 < (b + 1) * T && labels[i + 1] >= 0 ? (int)labels[i + 1] : -1;
                    wrong += batch.target[row++] != target, targets += target >= 0;
                    batch_add_row(&alone, (int)ids[i], given ? (int)positions[i] : alone.rows, -1);
                }
            batch_end_sequence(&alone);
            float *logits = logits_of(model, &alone), expected[T * V] = {0};
            for (int t = 0, r = 0; t < T; t++)
                if (mask[b * T + t]) memcpy(expected + t * V, logits + r++ * V, V * sizeof(float));
            double error = deviation_of_floats(padded + b * T * V, expected, T * V);
            check(error < 2e-6, "sequence %d: logits differ by %.1e from those it has alone", b, error);
            for (int t = 0; t < T; t++)
                check(mask[b * T + t] || padded[(b * T + t) * V] == 0, "sequence %d: no zeros at PAD %d", b,
                      t);
            batch_free(&alone);
            free(logits);
        }
        check(wrong == 0 && targets == batch.targets && row == batch.rows, "%d targets are wrong", wrong);
        batch_free(&batch);
        free(packed);
    }
    model_free(model);
}

// The same sequences in 1, 2 or 4 uneven micro-batches, one of them without targets, give the same loss and
// gradients; an update without any target changes nothing.
static void test_accumulation(void) {
    static const char *const splits[] = {"abcdefgh", "fg|a|bcde|h", "abcde|fgh", "h|gf||edcba"};
    Config config = tiny_config(23, 40, 2, 2, 8, 32, true);
    Model *model = tiny_model(config, 2, NULL), *whole = tiny_model(config, 2, NULL);
    Batch all = ragged_batch(4, 23, 8, (int[]){30, 2, 17, 8, 40, 6, 3, 11});
    for (int r = all.first_row[5]; r < all.first_row[7]; r++) // sequences f and g
        all.targets -= all.target[r] >= 0, all.target[r] = -1;
    double loss = gradients_of(whole, &all, 1, (Dropout){0}, false);
    for (int n = 0; n < 4; n++) {
        Batch parts[4] = {0};
        int count = 0;
        batch_clear(&parts[count++]);
        for (const char *at = splits[n]; *at; at++)
            *at == '|' ? batch_clear(&parts[count++]) : append_sequence(&parts[count - 1], &all, *at - 'a');
        double parts_loss = gradients_of(model, parts, count, (Dropout){0}, false);
        check(fabs(parts_loss - loss) < 1e-6 * loss, "%s: loss %.8g, not %.8g", splits[n], parts_loss, loss);
        check_gradients(model, whole, 1e-5, splits[n]);
        for (int i = 0; i < count; i++) batch_free(&parts[i]);
    }
    Activations a = {0};
    Options options;
    options_from_text(&options, "--weight-decay 0.1");
    Batch silent[2] = {{0}, {0}};
    for (int s = 5; s < 7; s++) batch_clear(&silent[s - 5]), append_sequence(&silent[s - 5], &all, s);
    Update update = take_update(model, &a, silent, 2, HYPERPARAMETERS(&options), 0, 0.1);
    check(update.targets == 0 && update.loss == 0, "loss %g of no targets", update.loss);
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        bool still = same_bits(tensor->value, whole->tensors[i].value, tensor->size);
        for (size_t j = 0; j < tensor->size; j++)
            still = still && tensor->exp_avg[j] == 0 && tensor->exp_avg_sq[j] == 0;
        check(still, "%s was changed by an update without targets", tensor->name);
    }
    for (int n = 0; n < 2; n++) { // without targets gradients are zero, or stay when accumulated
        activations_reserve(&a, model, silent[0].rows, KEEP_ALL);
        double none = model_forward_backward(n ? whole : model, &a, &silent[0], 0, n == 1, (Dropout){0});
        check(none == 0, "loss %g without targets", none);
    }
    for (int i = 0; i < model->tensor_count; i++)
        for (size_t j = 0; j < model->tensors[i].size; j++)
            check(model->tensors[i].gradient[j] == 0, "%s: a gradient without targets",
                  model->tensors[i].name);
    gradients_of(model, &all, 1, (Dropout){0}, false);
    check_gradients(whole, model, 1e-9, "after a micro-batch without targets");
    for (int i = 0; i < 2; i++) batch_free(&silent[i]);
    activations_free(&a);
    batch_free(&all);
    model_free(model);
    model_free(whole);
}

// The row of logits whose highest value is target's alone.
static bool is_highest(const float *logits, int target, int V) {
    for (int v = 0; v < V; v++)
        if (v != target && logits[v] >= logits[target]) return false;
    return true;
}

// What an update says of two micro-batches, some of whose rows are not scored.
static void test_update_counts(void) {
    enum { V = 5 };
    Model *model = tiny_model(tiny_config(V, 40, 1, 2, 8, 32, true), 2, NULL);
    Batch batches[2] = {ragged_batch(4, V, 2, (int[]){30, 12}), ragged_batch(5, V, 1, (int[]){40})};
    size_t rows = 0, targets = 0, correct = 0;
    for (int i = 0; i < 2; i++) {
        float *logits = logits_of(model, &batches[i]);
        for (int r = 0; r < batches[i].rows; r++, rows++)
            if (batches[i].target[r] >= 0) {
                targets++;
                correct += is_highest(logits + r * V, batches[i].target[r], V);
            }
        free(logits);
    }
    Activations a = {0};
    Options options;
    options_from_text(&options, "");
    Update update = take_update(model, &a, batches, 2, HYPERPARAMETERS(&options), 0, 0);
    check(update.rows == rows && update.targets == targets && targets < rows, "%zu rows, %zu targets",
          update.rows, update.targets);
    check(correct > 0 && correct < targets && update.accuracy == (double)correct / (double)targets,
          "accuracy %g, should be %zu of %zu", update.accuracy, correct, targets);
    activations_free(&a);
    batch_free(&batches[0]), batch_free(&batches[1]);
    model_free(model);
}

// ---- optimizer ----

// Six updates against the formula in double precision, for gradients from 0 through 1e-8, where epsilon
// decides, to 30; with clipping and decay. Frozen tensors keep their bits.
static void test_adamw(void) {
    static const float sizes[] = {0, 1e-12f, 1e-8f, 3e-8f, 1e-5f, 1e-2f, 1, 30};
    Config config = tiny_config(23, 10, 1, 2, 8, 32, false);
    Model *model = tiny_model(config, 4, "wpe|mlp.c_fc.weight|ln_f.bias"),
          *before = tiny_model(config, 4, NULL);
    const Hyperparameters adam = {.beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .weight_decay = 0.1};
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        check(tensor->decay == !(strstr(tensor->name, "bias") || strstr(tensor->name, "ln_")),
              "%s: decay is %d", tensor->name, tensor->decay);
    }
    double *p[64] = {0}, *m[64] = {0}, *v[64] = {0};
    for (int i = 0; i < model->tensor_count; i++) {
        p[i] = doubles(model->tensors[i].value, model->tensors[i].size);
        m[i] = xcalloc(model->tensors[i].size, sizeof(double)),
        v[i] = xcalloc(model->tensors[i].size, sizeof(double));
    }
    for (long t = 1; t <= 6; t++) {
        const double rate = 0.01 / (double)t;
        const float clip = t == 4 ? 0.25f : 1;
        for (int i = 0; i < model->tensor_count; i++)
            for (size_t j = 0; model->tensors[i].gradient && j < model->tensors[i].size; j++)
                model->tensors[i].gradient[j] =
                    sizes[(j + (t > 3)) % 8] * (0.5f + random_uniform((uint64_t)t, j)) * (j % 3 ? 1 : -1);
        adamw_update(model, &adam, rate, t, clip);
        for (int i = 0; i < model->tensor_count; i++) {
            const Tensor *tensor = &model->tensors[i];
            for (size_t j = 0; !tensor->frozen && j < tensor->size; j++) {
                double g = (double)tensor->gradient[j] * clip, wd = tensor->decay ? adam.weight_decay : 0;
                m[i][j] = adam.beta1 * m[i][j] + (1 - adam.beta1) * g;
                v[i][j] = adam.beta2 * v[i][j] + (1 - adam.beta2) * g * g;
                p[i][j] -= rate * wd * p[i][j];
                p[i][j] -= rate * m[i][j] / (1 - pow(adam.beta1, (double)t)) /
                           (sqrt(v[i][j]) / sqrt(1 - pow(adam.beta2, (double)t)) + adam.epsilon);
                // each update rounds p two or three times (6e-8 p) and moves it by about `rate`, in a dozen
                // roundings
                double allowed = (double)t * (2e-7 * fabs(p[i][j]) + 2e-6 * rate);
                check(fabs(tensor->value[j] - p[i][j]) <= allowed,
                      "update %ld, %s %zu, gradient %g: %.9g, should be %.9g", t, tensor->name, j, g,
                      tensor->value[j], p[i][j]);
            }
            if (!tensor->frozen)
                check(deviation(tensor->exp_avg, m[i], tensor->size) < 1e-6 &&
                          deviation(tensor->exp_avg_sq, v[i], tensor->size) < 1e-6,
                      "%s: moments differ", tensor->name);
        }
    }
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        check(tensor->frozen == (regex_found("wpe|mlp.c_fc.weight|ln_f.bias", tensor->name)),
              "%s: frozen is %d", tensor->name, tensor->frozen);
        if (tensor->frozen)
            check(!tensor->gradient && !tensor->exp_avg && !tensor->exp_avg_sq &&
                      same_bits(tensor->value, before->tensors[i].value, tensor->size),
                  "%s is not frozen", tensor->name);
        free(p[i]), free(m[i]), free(v[i]);
    }
    model_free(model);
    model_free(before);
}

// An update whose loss is finite and whose gradient is not: says so, and changes nothing.
static void check_update_that_overflows(void) {
    // Channel 1 dominates, normalised it is 8. The logits are 1.5e38 · 1e-38 · 8 with both signs: a loss of
    // 24; but the gradient of ln_f.weight is 3e38 · 8: infinite.
    Model *model = tiny_model(tiny_config(23, 40, 1, 2, 64, 8, false), 2, NULL);
    float *head = model_tensor(model, LM_HEAD, 0)->value;
    for (size_t c = 0; c < 64; c++) {
        model_tensor(model, LN_F_WEIGHT, 0)->value[c] = c == 1 ? 1e-38f : 0;
        model_tensor(model, LN_F_BIAS, 0)->value[c] = 0;
    }
    for (size_t v = 0; v < 23; v++) {
        model_tensor(model, WTE, 0)->value[v * 64 + 1] = 1e3f;
        head[v * 64 + 1] = v < 22 ? -1.5e38f : 1.5e38f;
    }
    Batch batch = ragged_batch(1, 22, 1, (int[]){2});
    batch.target[0] = 5;
    batch.target[1] = -1;
    batch.targets = 1;
    Options options;
    options_from_text(&options, "");
    const Tensor *weight = model_tensor(model, LN_F_WEIGHT, 0);
    Update update = take_update(model, &(Activations){0}, &batch, 1, HYPERPARAMETERS(&options), 0, 1e-3);
    check(update.not_finite && strcmp(update.not_finite, "the gradient of transformer.ln_f.weight") == 0,
          "an overflow says: %s", update.not_finite ? update.not_finite : "nothing");
    check(isfinite(update.loss) && weight->value[1] == 1e-38f && weight->exp_avg[1] == 0,
          "an overflow changes %s", weight->name);
    batch_free(&batch);
    model_free(model);
}

// The norm of all gradients, the same on any number of threads; clipping as torch does it; what is not finite
// is named.
static void test_norm_and_clipping(void) {
    Model *model =
        tiny_model(tiny_config(3000, 10, 1, 2, 64, 8, true), 4, "wpe"); // wte: three blocks of NORM_BLOCK
    const Tensor *worst;
    double squares = 0, norm[6];
    int threads = omp_get_max_threads();
    for (int i = 0; i < model->tensor_count; i++)
        for (size_t j = 0; model->tensors[i].gradient && j < model->tensors[i].size; j++) {
            model->tensors[i].gradient[j] = 2 * random_uniform((uint64_t)i, j) - 1;
            squares += (double)model->tensors[i].gradient[j] * model->tensors[i].gradient[j];
        }
    for (int n = 1; n < 6; n++) {
        omp_set_num_threads(n);
        norm[n] = gradient_norm(model, &worst);
        check(norm[n] == norm[1] && !worst, "%d threads: norm %.17g, with one %.17g", n, norm[n], norm[1]);
    }
    omp_set_num_threads(threads);
    check(fabs(norm[1] / sqrt(squares) - 1) < 1e-12, "norm %.12g, should be %.12g", norm[1], sqrt(squares));
    static const double cases[][2] = {{0.5, 1},   {1, 1}, {1 - 1e-6, 1}, {2, 1},
                                      {1e6, 0.1}, {0, 1}, {5, 0},        {1e-9, 1e-9}};
    for (int i = 0; i < 8; i++) {
        double limit = cases[i][1], wanted = limit == 0 ? 1 : fmin(1, limit / (cases[i][0] + 1e-6));
        check(fabs(clip_factor(cases[i][0], limit) - wanted) <= 1e-7 * wanted,
              "norm %g, at most %g: factor %g", cases[i][0], limit, clip_factor(cases[i][0], limit));
    }
    model->tensors[9].gradient[3] = INFINITY;
    gradient_norm(model, &worst);
    check(worst == &model->tensors[9], "an infinite gradient in %s was not found", model->tensors[9].name);
    model->tensors[6].gradient[1] = NAN;
    gradient_norm(model, &worst);
    check(worst == &model->tensors[6], "NaN in the gradient of %s was not found", model->tensors[6].name);
    model_free(model);
    check_update_that_overflows();
}

// transformers' get_*_schedule_with_warmup, in its own form, at every step; and some values by hand.
static void test_schedule(void) {
    enum { N = 20 };
    static const long warmups[] = {0, 1, 7, N};
    static const double finals[] = {0, 0.1, 1};
    for (int kind = SCHEDULE_LINEAR; kind <= SCHEDULE_CONSTANT; kind++)
        for (int w = 0; w < 4; w++)
            for (int f = 0; f < 3; f++)
                for (long s = 0, W = warmups[w]; s <= N; s++) {
                    double left = W < N ? (double)(N - s) / (double)(N - W) : 0,
                           wanted = (double)s / (double)W;
                    if (s >= W) {
                        wanted = kind == SCHEDULE_LINEAR   ? left
                                 : kind == SCHEDULE_COSINE ? 0.5 - 0.5 * cos(acos(-1) * left)
                                                           : 1;
                        wanted = fmax(wanted, finals[f]);
                    }
                    double ours = schedule_factor((Schedule)kind, s, W, N, finals[f]);
                    check(fabs(ours - wanted) < 1e-12,
                          "schedule %d, step %ld of %d, %ld warm-up: %g, should be %g", kind, s, N, W, ours,
                          wanted);
                }
    static const struct {
        Schedule kind;
        long step, warmup;
        double final, factor;
    } known[] = {{SCHEDULE_LINEAR, 0, 4, 0, 0},     {SCHEDULE_LINEAR, 3, 4, 0.9, 0.75},
                 {SCHEDULE_LINEAR, 4, 4, 0, 1},     {SCHEDULE_LINEAR, 12, 4, 0, 0.5},
                 {SCHEDULE_LINEAR, 0, 0, 0, 1},     {SCHEDULE_LINEAR, 19, 0, 0, 0.05},
                 {SCHEDULE_COSINE, 12, 4, 0, 0.5},  {SCHEDULE_COSINE, 5, 0, 0, 0.85355339059327373},
                 {SCHEDULE_COSINE, 20, 4, 0, 0},    {SCHEDULE_CONSTANT, 19, 4, 0, 1},
                 {SCHEDULE_LINEAR, 18, 0, 0.3, 0.3}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        double ours = schedule_factor(known[i].kind, known[i].step, known[i].warmup, N, known[i].final);
        check(fabs(ours - known[i].factor) < 1e-15, "known value %zu: %.17g", i, ours);
    }
}

// ---- freezing, determinism ----

// For random choices of frozen tensors, and of whole lower parts, what is trained gets the same gradients to
// the bit as in the full run, with --recompute too; and frozen lower blocks keep no activations.
static void test_freezing(void) {
    for (int n = 0; n < 48; n++) {
        Config config = tiny_config(23, 40, 3, 2, 8, 20, n % 2);
        Batch batch = ragged_batch(6, 23, 4, (int[]){12, 3, 40, 1});
        Dropout dropout = {n % 3 ? 0.2f : 0, 8, NULL};
        Model *full = tiny_model(config, 6, NULL);
        gradients_of(full, &batch, 1, dropout, false);
        int lowest = (int)(random_bits(1, n) % 5) - 1, frozen = 0; // all below this block is frozen
        Text regex = {0};
        text_append(&regex, "^(nothing", 9);
        for (int i = 0; i < full->tensor_count; i++) {
            const Tensor *tensor = &full->tensors[i];
            int depth = kind_is_per_layer(tensor->kind) ? tensor->layer : tensor->kind < LN_1_WEIGHT ? -1 : 3;
            if (depth >= lowest && random_bits(random_stream(2, n), i) % 4 > (uint64_t)(n % 3)) continue;
            text_append(&regex, "|", 1);
            text_append(&regex, tensor->name, strlen(tensor->name));
            frozen++;
        }
        text_append(&regex, ")$", 2);
        Model *model = tiny_model(config, 6, regex.data);
        for (int recompute = 0; recompute < 2; recompute++) {
            gradients_of(model, &batch, 1, dropout, recompute);
            check_gradients(model, full, 0, recompute ? "frozen, recompute" : "frozen");
        }
        for (int i = 0; i < model->tensor_count; i++) frozen -= model->tensors[i].gradient == NULL;
        check(frozen == 0, "%d frozen tensors have gradients", frozen);
        free(regex.data);
        batch_free(&batch);
        model_free(model);
        model_free(full);
    }
    static const char *const lower[] = {NULL, "wte|wpe", "wte|wpe|h.0", "wte|wpe|h.[01]", "wte|wpe|h.[012]"};
    size_t size[2][5];
    for (int i = 0; i < 5; i++)
        for (int recompute = 0; recompute < 2; recompute++) {
            Activations a = {0};
            Model *model = tiny_model(tiny_config(23, 40, 3, 2, 8, 20, true), 6, lower[i]);
            size[recompute][i] =
                activations_lay_out(&a, model, 160, recompute ? KEEP_INPUTS : KEEP_ALL, NULL);
            check(i < 2 || size[recompute][i] < size[recompute][i - 1], "freezing %s saves nothing",
                  lower[i]);
            check(!a.memory, "measuring allocates");
            model_free(model);
        }
    // per row of 160: C = 8, F = 20, 2 heads; a block keeps 6C + 2 heads + F + 4, and its input
    check(size[0][1] == size[0][0] && size[0][1] - size[0][2] == 160 * (6 * 8 + 2 + 20 + 4),
          "a frozen block saves %zu floats", size[0][1] - size[0][2]);
    check(size[0][0] - size[1][0] == 2 * 160 * (5 * 8 + 2 + 20 + 4), "--recompute saves %zu",
          size[0][0] - size[1][0]);
}

// Two updates with dropout, over more rows than a block of the built-in matmul has.
static Model *updated_model(int threads) {
    Model *model = tiny_model(tiny_config(300, 320, 2, 2, 32, 128, true), 9, NULL);
    Batch batches[2] = {ragged_batch(1, 300, 3, (int[]){300, 250, 77}),
                        ragged_batch(2, 300, 2, (int[]){100, 1})};
    Activations a = {0};
    Options options;
    options_from_text(&options, "--dropout 0.1");
    int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    for (int step = 0; step < 2; step++)
        take_update(model, &a, batches, 2, HYPERPARAMETERS(&options), step, 1e-3);
    omp_set_num_threads(before);
    activations_free(&a);
    batch_free(&batches[0]), batch_free(&batches[1]);
    return model;
}

// Weights, gradients and moments after two updates: the same bits in each run, and with the built-in matmul
// on any number of threads.
static void test_determinism(void) {
    MatmulKind usual = matmul_kind;
    for (int n = 0; n < 6; n++) { // 4, 5: in bfloat16
        matmul_kind = n == 0 ? usual : MATMUL_BUILTIN;
        bfloat16_products = n >= 4;
        Model *one = updated_model(n < 2 ? omp_get_max_threads() : 1);
        Model *other = updated_model(n < 2 ? omp_get_max_threads() : n < 4 ? n : n - 2);
        check_gradients(one, other, 0, n < 2 ? "a second run" : "other threads");
        for (int i = 0; i < one->tensor_count; i++) {
            const Tensor *a = &one->tensors[i], *b = &other->tensors[i];
            check(same_bits(a->value, b->value, a->size) && same_bits(a->exp_avg, b->exp_avg, a->size) &&
                      same_bits(a->exp_avg_sq, b->exp_avg_sq, a->size),
                  "case %d: %s has other bits", n, a->name);
        }
        model_free(one);
        model_free(other);
    }
    bfloat16_products = false;
    matmul_kind = usual;
}

// ---- generation ----

// Three samples fed to the cache in chunks (a long one, single tokens, a middling one): the logits at every
// position are those of the full forward pass.
static void check_cache(double tolerance) {
    enum { S = 3, T = 110, P = 120, V = 23, C = 8, NH = 2 };
    static const int chunks[] = {70, 1, 1, 1, 25, 1, 11};
    Model *model = tiny_model(tiny_config(V, P, 2, NH, C, 32, true), 7, NULL);
    Batch full = ragged_batch(3, V, S, (int[]){T, T, T}), batch = {0};
    Activations a = {0};
    int first_key[S] = {0, 2 * NH * P, 4 * NH * P}, rows[S * 70];
    Cache cache = {.sequences = S,
                   .positions = P,
                   .NH = NH,
                   .HS = C / NH,
                   .first_key = first_key,
                   .memory = xfloats(2 * S * P * 2 * C)};
    bfloat16_products = false;
    float *wanted = logits_of(model, &full);
    bfloat16_products = tolerance > 1e-5;
    keep_copy(cache.memory, 2 * S * P * 2 * C);
    keep_packed_copies(model);
    check(copy_count == (tolerance > 1e-5 ? 10 : 0), "%zu copies", copy_count);
    double largest = 0;
    for (size_t n = 0; n < sizeof chunks / sizeof *chunks; n++) {
        int past = cache.past;
        batch_clear(&batch);
        for (int s = 0; s < S; s++, batch_end_sequence(&batch))
            for (int t = past; t < past + chunks[n]; t++) batch_add_row(&batch, full.token[s * T + t], t, -1);
        for (int i = 0; i < batch.rows; i++) rows[i] = i;
        activations_reserve(&a, model, batch.rows, KEEP_NOTHING);
        model_forward(model, &a, &batch, &cache, (Dropout){0});
        cache.past += chunks[n];
        head_forward(model, &a, rows, batch.rows);
        for (int s = 0; s < S; s++) {
            double error = deviation_of_floats(a.logits + s * chunks[n] * V, wanted + (s * T + past) * V,
                                               (size_t)chunks[n] * V);
            check(error < tolerance, "sample %d from position %d: logits differ by %.1e", s, past, error);
            largest = error > largest ? error : largest;
        }
    }
    check(tolerance == 1e-5 || largest > 1e-5, "no product was in bfloat16");
    drop_copies();
    bfloat16_products = false;
    free(wanted), free(cache.memory);
    batch_free(&full), batch_free(&batch);
    activations_free(&a);
    model_free(model);
}

static void test_cache(void) {
    check_cache(1e-5);
    check_cache(2e-2); // in bfloat16, keys and values and weights from copies
}

// Greedy generation without a cache: every token from a full forward pass over the window. A full window goes
// on from its last half, as does a prompt that is longer than the context. A penalty concerns the whole text.
static void generate_slowly(const Model *model, const Ids *prompt, int count, double penalty, Ids *output) {
    const int V = model->config.vocab_size, P = model->config.n_positions;
    Ids all = {0};
    size_t begin = 0;
    for (size_t i = 0; i < prompt->size; i++) ids_push(&all, prompt->data[i]);
    for (int n = 0; n < count; n++) {
        Batch batch = {0};
        batch_clear(&batch);
        if (all.size - begin > (size_t)P) begin = all.size - (size_t)(P > 1 ? P / 2 : 1);
        for (size_t i = begin; i < all.size; i++) batch_add_row(&batch, all.data[i], (int)(i - begin), -1);
        batch_end_sequence(&batch);
        float *logits = logits_of(model, &batch), *last = logits + (size_t)(batch.rows - 1) * V;
        int best = 0;
        for (int v = 0; v < V; v++)
            if (ids_have(&all, v)) last[v] = (float)(last[v] > 0 ? last[v] / penalty : last[v] * penalty);
        for (int v = 0; v < V; v++) best = last[v] > last[best] ? v : best;
        ids_push(&all, best);
        ids_push(output, best);
        free(logits);
        batch_free(&batch);
    }
    free(all.data);
}

static bool begin_alike(const Ids *a, const Ids *b, size_t count) {
    return a->size == count && b->size >= count &&
           (count == 0 || memcmp(a->data, b->data, count * sizeof(int)) == 0);
}

// Greedy text equals the slow one, for every sample, past the end of the context, and up to the token that
// ends it; random samples differ, and do not depend on how many there are.
static void test_generation(void) {
    enum { V = 31, COUNT = 50 };
    static const int cases[][2] = {
        {16, 3}, {16, 16}, {17, 40}, {1, 2}, {64, 5}}; // context, length of the prompt
    for (int n = 0; n < 5; n++) {
        Model *model = tiny_model(tiny_config(V, cases[n][0], 2, 2, 8, 32, n % 2), 10 + n, NULL);
        Ids prompt = {0}, slow = {0};
        Sample fast[3] = {0}, ended = {0}, drawn[4] = {0};
        for (int i = 0; i < cases[n][1]; i++) ids_push(&prompt, (int)(random_bits(n, i) % V));
        generate_slowly(model, &prompt, COUNT, 1, &slow);
        generate(model, NULL, &prompt, COUNT, 3, &(Ids){0}, &(Sampling){0, 0, 1, 1, NULL, 1, false}, fast);
        for (int s = 0; s < 3; s++)
            check(begin_alike(&fast[s].ids, &slow, COUNT), "case %d: sample %d differs from the slow way", n,
                  s);
        int end = slow.data[COUNT / 2];
        size_t length = 0;
        while (slow.data[length] != end) length++;
        generate(model, NULL, &prompt, COUNT, 1, &(Ids){&end, 1, 0}, &(Sampling){0, 0, 1, 1, NULL, 1, false},
                 &ended);
        check(begin_alike(&ended.ids, &slow, length), "case %d: %zu tokens before the end, not %zu", n,
              ended.ids.size, length);
        generate(model, NULL, &prompt, COUNT, 3, &(Ids){0}, &(Sampling){1, 0, 1, 1, NULL, 1, false}, drawn);
        generate(model, NULL, &prompt, COUNT, 1, &(Ids){0}, &(Sampling){1, 0, 1, 1, NULL, 1, false},
                 &drawn[3]);
        check(begin_alike(&drawn[3].ids, &drawn[0].ids, COUNT),
              "case %d: a sample depends on how many there are", n);
        check(!begin_alike(&drawn[0].ids, &drawn[1].ids, COUNT) &&
                  !begin_alike(&drawn[1].ids, &drawn[2].ids, COUNT),
              "case %d: samples are the same", n);
        free(prompt.data), free(slow.data), sample_free(&ended);
        for (int s = 0; s < 4; s++) sample_free(&drawn[s]), s < 3 ? sample_free(&fast[s]) : (void)0;
        model_free(model);
    }
}

// Greedy text with --repetition-penalty equals the slow one. Prompt and own tokens count, each once, those that
// have left the context too.
static void test_repetition(void) {
    enum { V = 31, COUNT = 40 };
    static const double penalties[] = {1, 1.02, 1.3, 5, 0.7};
    Model *model = tiny_model(tiny_config(V, 16, 2, 2, 8, 32, true), 21, NULL);
    Ids prompt = {0}, plain = {0};
    for (int i = 0; i < 7; i++) ids_push(&prompt, (int)(random_bits(3, (uint64_t)i / 2) % V));
    int different = 0;
    for (int n = 0; n < 5; n++) {
        Ids slow = {0};
        Sample fast[2] = {0};
        generate_slowly(model, &prompt, COUNT, penalties[n], &slow);
        generate(model, NULL, &prompt, COUNT, 2, &(Ids){0},
                 &(Sampling){0, 0, 1, 1, NULL, penalties[n], false}, fast);
        for (int s = 0; s < 2; s++)
            check(begin_alike(&fast[s].ids, &slow, COUNT), "penalty %g: sample %d differs", penalties[n], s);
        if (n == 0) plain = slow;
        different += !begin_alike(&plain, &slow, COUNT);
        for (int s = 0; s < 2; s++) sample_free(&fast[s]);
        if (n > 0) free(slow.data);
    }
    check(different >= 3, "only %d penalties changed the text", different);
    free(prompt.data), free(plain.data);
    model_free(model);
}

// The distribution that is asked for: softmax, the k most likely, and of those the fewest that together reach
// p (as transformers has it: those before which less than p lies).
static void wanted_probabilities(double *p, const float *logits, int V, const Sampling *sampling) {
    double largest = -HUGE_VAL, sum = 0;
    for (int v = 0; v < V; v++) largest = fmax(largest, logits[v]);
    for (int v = 0; v < V; v++) {
        int before = 0; // with top-k, what equals the k-th is kept as well
        for (int u = 0; u < V; u++)
            before +=
                logits[u] > logits[v] || (sampling->temperature == 0 && logits[u] == logits[v] && u < v);
        bool kept =
            sampling->temperature == 0 ? before == 0 : sampling->top_k == 0 || before < sampling->top_k;
        sum += p[v] =
            kept ? sampling->temperature == 0 ? 1 : exp((logits[v] - largest) / sampling->temperature) : 0;
    }
    double full[64], rest = 0;
    for (int v = 0; v < V; v++) full[v] = p[v] / sum;
    for (int v = 0; v < V; v++) {
        double before = 0;
        for (int u = 0; u < V; u++)
            before += logits[u] > logits[v] || (logits[u] == logits[v] && u < v) ? full[u] : 0;
        rest += p[v] = before < sampling->top_p ? full[v] : 0;
    }
    for (int v = 0; v < V; v++) p[v] /= rest;
}

// Draws at equal distances give each token its share, up to one draw at each end of it.
static void test_sampling(void) {
    enum { N = 20000, V = 10 };
    static const Sampling cases[] = {
        {1, 0, 1, 0, NULL, 1, false},    {0.7, 0, 1, 0, NULL, 1, false},   {1.5, 5, 1, 0, NULL, 1, false},
        {1, 0, 0.9, 0, NULL, 1, false},  {1, 0, 0.5, 0, NULL, 1, false},   {0.8, 6, 0.7, 0, NULL, 1, false},
        {1, 99, 1, 0, NULL, 1, false},   {1, 1, 1, 0, NULL, 1, false},     {0, 0, 1, 0, NULL, 1, false},
        {1, 0, 1e-9, 0, NULL, 1, false}, {2, 3, 0.999, 0, NULL, 1, false}, {1e-6, 0, 1, 0, NULL, 1, false},
        {1, 9, 0.5, 0, NULL, 1, false},  {0, 5, 0.5, 0, NULL, 1, false}};
    Candidate candidates[V];
    for (int set = 0; set < 5; set++) {
        float logits[V];
        // Random; one with ties; one with a long flat tail; eight alike, of which four reach exactly one
        // half.
        for (int v = 0; v < V; v++) {
            logits[v] = set < 2    ? 2 * random_normal((uint64_t)set, v)
                        : set == 2 ? (float)(v * 7 % 4)
                                   : logf(0.045f);
            if (set == 3 && (v == 3 || v == 7)) logits[v] = logf(v == 3 ? 0.2f : 0.4f);
            if (set == 4) logits[v] = v < 8 ? 0 : -INFINITY;
        }
        for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
            double wanted[V];
            int drawn[V] = {0}, best = 0;
            wanted_probabilities(wanted, logits, V, &cases[n]);
            for (int i = 0; i < N; i++)
                drawn[sample_token(logits, V, &cases[n], ((float)i + 0.5f) / N, candidates)]++;
            for (int v = 0; v < V; v++) {
                best = logits[v] > logits[best] ? v : best;
                check(fabs(drawn[v] - N * wanted[v]) <= (wanted[v] > 0 ? 2 : 0),
                      "logits %d, case %zu: token %d drawn %d times, not %.1f", set, n, v, drawn[v],
                      N * wanted[v]);
            }
            bool ties = set == 2 || set == 4;
            if (cases[n].temperature == 0 || (cases[n].top_k == 1 && !ties) || cases[n].top_p < 1e-6)
                check(drawn[best] == N, "logits %d, case %zu is not greedy", set, n);
        }
    }
}

// ---- the table of tensors ----

static void test_tensor_table(void) {
    // name, shape, D: decayed by default; of a model with V 11, P 7, C 6, F 10
    static const char *const expected[] = {"transformer.wte.weight 11 6 D",
                                           "transformer.wpe.weight 7 6 D",
                                           "transformer.h.0.ln_1.weight 6",
                                           "transformer.h.0.ln_1.bias 6",
                                           "transformer.h.0.attn.c_attn.weight 6 18 D",
                                           "transformer.h.0.attn.c_attn.bias 18",
                                           "transformer.h.0.attn.c_proj.weight 6 6 D",
                                           "transformer.h.0.attn.c_proj.bias 6",
                                           "transformer.h.0.ln_2.weight 6",
                                           "transformer.h.0.ln_2.bias 6",
                                           "transformer.h.0.mlp.c_fc.weight 6 10 D",
                                           "transformer.h.0.mlp.c_fc.bias 10",
                                           "transformer.h.0.mlp.c_proj.weight 10 6 D",
                                           "transformer.h.0.mlp.c_proj.bias 6",
                                           "transformer.ln_f.weight 6",
                                           "transformer.ln_f.bias 6",
                                           "lm_head.weight 11 6 D"};
    Options options;
    options_from_text(&options, "");
    for (int tied = 0; tied < 2; tied++) {
        Model *model = tiny_model(tiny_config(11, 7, 1, 2, 6, 10, tied), 1, NULL);
        model_set_training(model, &options.freeze, &options.no_decay);
        check(model->tensor_count == 17 - tied, "%d tensors", model->tensor_count);
        for (int i = 0; i < 17 - tied; i++) {
            const Tensor *t = &model->tensors[i];
            char *columns = t->dims == 2 ? xprintf(" %zu", t->shape[1]) : xstrdup("");
            char *line = xprintf("%s %zu%s%s", t->name, t->shape[0], columns, t->decay ? " D" : "");
            check(strcmp(line, expected[i]) == 0 &&
                      t->size == t->shape[0] * (t->dims == 2 ? t->shape[1] : 1) && !t->frozen,
                  "tensor %d is '%s', not '%s'", i, line, expected[i]);
            free(line), free(columns);
        }
        model_free(model);
    }
}

// Initial values of GPT-2: deviation 0.02, what writes into the stream 0.02 / sqrt(2L); and each tensor its
// own.
static void test_initial_values(void) {
    Model *model = model_new(tiny_config(300, 200, 2, 2, 64, 256, false));
    model_initialise(model, 3);
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *t = &model->tensors[i];
        bool matrix = t->dims == 2, constant = true;
        double square = 0, wanted = strstr(t->name, "c_proj") ? 0.01 : 0.02,
               value = strstr(t->name, "bias") ? 0 : 1;
        for (size_t j = 0; j < t->size; j++)
            square += (double)t->value[j] * t->value[j], constant = constant && t->value[j] == value;
        check(matrix ? fabs(sqrt(square / (double)t->size) / wanted - 1) < 0.05 : constant,
              "initial values of %s", t->name);
        check(!matrix || i == 0 || t->value[0] / wanted != model->tensors[0].value[0] / 0.02,
              "%s starts like wte", t->name);
    }
    model_free(model);
}

// The four sizes of GPT-2 have as many parameters as those that OpenAI published.
static void test_parameter_counts(void) {
    static const struct {
        int L, NH, C;
        size_t parameters;
    } sizes[] = {{12, 12, 768, 124439808},
                 {24, 16, 1024, 354823168},
                 {36, 20, 1280, 774030080},
                 {48, 25, 1600, 1557611200}};
    for (int i = 0; i < 4; i++) {
        Config config = tiny_config(50257, 1024, sizes[i].L, sizes[i].NH, sizes[i].C, 4 * sizes[i].C, true);
        Model *model = model_new(config);
        check(count_parameters(model, false) == sizes[i].parameters, "%d layers have %zu parameters",
              sizes[i].L, count_parameters(model, false));
        model_free(model);
    }
}

static void test_patterns(void) {
    static const struct {
        const char *regex, *name;
        bool found;
    } matches[] = {{"bias", "transformer.h.3.attn.c_attn.bias", true},
                   {"bias", "transformer.wte.weight", false},
                   {"ln_.+weight", "transformer.h.11.ln_2.weight", true},
                   {"ln_.+weight", "transformer.ln_f.weight", true},
                   {"\\.h\\.[01]\\.", "transformer.h.1.ln_1.bias", true},
                   {"\\.h\\.[01]\\.", "transformer.h.10.ln_1.bias", false},
                   {"wte|wpe", "transformer.wpe.weight", true},
                   {"^wte", "transformer.wte.weight", false},
                   {"(mlp|attn).c_proj.weight$", "transformer.h.0.mlp.c_proj.weight", true},
                   {"WTE", "transformer.wte.weight", false}};
    for (size_t i = 0; i < sizeof matches / sizeof *matches; i++)
        check(regex_found(matches[i].regex, matches[i].name) == matches[i].found, "'%s' and %s",
              matches[i].regex, matches[i].name);
    const char *two[] = {"nothing", "wpe"};
    check(patterns_match(&(Patterns){two, 2, 2}, "transformer.wpe.weight"), "the second of two patterns");
    check(!patterns_match(&(Patterns){0}, "transformer.wpe.weight"), "no pattern matches");
}

// Rows for the list of tests:
//
// ---- the program: files, data, the command line, whole runs ----
// Whole programs run in processes of their own. A shell expands the words of their command lines; it knows
// $D, the tests' folder, and $TINY, the options of a model that trains in no time.

// The path of a name in the tests' folder; the last 16 stay valid.
static const char *in_tests(const char *name) {
    static char paths[16][4400];
    static int next;
    char *path = paths[next++ % 16];
    snprintf(path, sizeof paths[0], "%s/%s", temporary_folder(), name);
    return path;
}

// Unlike write_file this does not wait for the disk.
static void put_file(const char *path, const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0)
        die("%s: %s", path, strerror(errno));
}

static void write_text(const char *name, const char *text) { put_file(in_tests(name), text, strlen(text)); }

// A number that tells apart what is in a file, or in a folder with all that is below it: names and bytes.
static uint64_t fingerprint(const char *path) {
    uint64_t sum = 0;
    if (is_folder(path)) {
        DIR *folder = opendir(path);
        for (struct dirent *entry; (entry = readdir(folder));) {
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
            char *inside = xprintf("%s/%s", path, entry->d_name);
            uint64_t name = 0;
            for (const char *c = entry->d_name; *c; c++) name = mix_bits(name ^ (unsigned char)*c);
            sum += mix_bits(name ^ fingerprint(inside)); // folders are listed in any order
            free(inside);
        }
        closedir(folder);
    } else if (file_exists(path)) {
        Text text = read_file(path);
        sum = mix_bits(text.size);
        for (size_t i = 0; i < text.size; i++) sum = mix_bits(sum ^ (unsigned char)text.data[i]);
        free(text.data);
    }
    return sum;
}

static bool same_files(const char *a, const char *b) {
    return file_exists(in_tests(a)) && fingerprint(in_tests(a)) == fingerprint(in_tests(b));
}

static size_t count_of(const char *text, const char *word) {
    size_t count = 0;
    for (const char *at = text; (at = strstr(at, word)); at += strlen(word)) count++;
    return count;
}

// Is this one line of ours that says `fragment`?
static bool one_error_line(const Text *text, const char *fragment) {
    return text->size > 0 && strchr(text->data, '\n') == text->data + text->size - 1 &&
           strncmp(text->data, "train_gpt2: ", 12) == 0 && strstr(text->data, fragment);
}

// Runs f in a child and checks that it ends with status 1 and one line that has `fragment`.
static void expect_death(void (*f)(void), const char *fragment, const char *what) {
    Text printed = {0};
    int status = run_child(f, &printed);
    check(status == 1 && one_error_line(&printed, fragment), "%.80s: status %d, '%s' expected in: %s", what,
          status, fragment, printed.data);
    free(printed.data);
}

// Runs the trainer and checks its status, and that all it prints is one line that has `fragment`.
static void expect_refusal(int wanted, const char *fragment, const char *words) {
    Text printed = {0};
    int status = run_trainer(&printed, "%s", words);
    check(status == wanted && one_error_line(&printed, fragment), "%s: status %d, not %d, or '%s' not in: %s",
          words, status, wanted, fragment, printed.data);
    free(printed.data);
}

// Runs the trainer, checks its status, and returns in `printed` (when it is not NULL) what it printed.
static void expect_run(int wanted, Text *printed, const char *words) {
    Text text = {0};
    int status = run_trainer(&text, "%s", words);
    check(status == wanted, "%s: status %d, not %d: %s", words, status, wanted, text.data);
    if (printed)
        *printed = text;
    else
        free(text.data);
}

// Starts the trainer without waiting. file_limit: no file may become larger; 0: no limit.
static pid_t start_trainer(rlim_t file_limit, const char *words) {
    char *command = xprintf("exec '%s' --trainer %s >$D/printed 2>&1 </dev/null", self_path, words);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGINT,
               SIG_DFL); // a shell in the background has it ignored, and then the trainer leaves it so
        signal(SIGHUP, SIG_DFL);
        if (file_limit) {
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){file_limit, file_limit});
            signal(SIGXFSZ, SIG_IGN);
        }
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    free(command);
    return child;
}

static int wait_for(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child) die("waitpid: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Has a child ended? It stays to be waited for.
static bool has_ended(pid_t child) {
    siginfo_t ended = {0};
    waitid(P_PID, (id_t)child, &ended, WEXITED | WNOHANG | WNOWAIT);
    return ended.si_pid != 0;
}

// Makes, once, what the runs need: a tokenizer of two merges (V = 259), texts, a model folder.
static void make_inputs(void) {
    static bool made = false;
    if (made) return;
    made = true;
    setenv("D", temporary_folder(), 1);
    char *tiny = xprintf(
        "--tokenizer %s/merges.txt --n-layer 1 --n-embd 16 --n-head 2 --n-positions 16 --batch-size 2 "
        "--learning-rate 1e-2 --matmul builtin",
        temporary_folder());
    setenv("TINY", tiny, 1);
    setenv("OMP_NUM_THREADS", "1", 1); // of programs that are started: more would only wait for one another
    free(tiny);
    write_text("merges.txt", "#version: 0.2\nt h\nth e\n");
    Text text = {0};
    static const char *const words[] = {"the cat", "a dog",    "the bird", " saw",
                                        " met",    " the hat", " a mat",   ".\n"};
    for (uint64_t i = 0; i < 120; i++)
        for (uint64_t part = 0; part < 4; part++) {
            static const int first[] = {0, 3, 5, 7}, choices[] = {3, 2, 2, 1};
            const char *word = words[first[part] + (int)(random_bits(part, i) % (uint64_t)choices[part])];
            text_append(&text, word, strlen(word));
        }
    put_file(in_tests("text.txt"), text.data, text.size);
    put_file(in_tests("val.txt"), text.data, 400);
    put_file(in_tests("short.txt"), text.data + 400, 330);
    free(text.data);
    write_text("empty.txt", "");
    write_text("table.csv", "a,b\n");
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = model_new((Config){tokenizer->vocab_size, 16, 1, 2, 16, 64, 1e-5f, true});
    model_initialise(model, 5);
    model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests("model"));
    model_free(model);
    tokenizer_free(tokenizer);
}

// ---- JSON ----

static void child_json(void) { json_free(json_parse(child_text, strlen(child_text), "here")); }
static void child_safetensors(void) { safetensors_open(child_path); }
static void child_model(void) { model_free(model_load(child_path)); }
static void child_config(void) { config_read(child_path); }

static void test_json_strings(void) {
    static const struct {
        const char *text, *string; // what the string means
    } strings[] = {
        {"\"\"", ""},
        {"\"a b\"", "a b"},
        {" \t\r\n\"x\" \n", "x"},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t"},
        {"\"\\u0041\\u00e9\\u20AC\"", "A\xc3\xa9\xe2\x82\xac"},
        {"\"\\ud83d\\ude00\"", "\xf0\x9f\x98\x80"},
        {"\"\\ud83d\"", "\xef\xbf\xbd"},
        {"\"\\ude00!\"", "\xef\xbf\xbd!"},
        {"\"\\ud83d\\u0041\"", "\xef\xbf\xbd"
                               "A"},
        {"\"\\ud83d\\ud83d\\ude00\"", "\xef\xbf\xbd\xf0\x9f\x98\x80"},
        {"\"\xc3\xa9\"", "\xc3\xa9"},
        {"\"\x7f\"", "\x7f"},
    };
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        Json *json = json_parse(strings[i].text, strlen(strings[i].text), "here");
        check(json->kind == JSON_STRING && json->length == strlen(strings[i].string) &&
                  strcmp(json->string, strings[i].string) == 0,
              "%s means '%s'", strings[i].text, json->string);
        json_free(json);
    }
    Json *json = json_parse("\"a\\u0000b\"", 10, "here");
    check(json->length == 3 && memcmp(json->string, "a\0b", 4) == 0, "a NUL inside a string");
    json_free(json);
}

// What is written is read again: every byte but NUL.
static void test_json_written(void) {
    char bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (char)(i + 1); // a NUL at the end
    char *written = NULL;
    size_t size;
    FILE *file = open_memstream(&written, &size);
    json_write_string(file, bytes, 127);
    fclose(file);
    for (size_t i = 0; i < size; i++)
        check((unsigned char)written[i] >= 0x20, "byte %d is written", written[i]);
    Json *json = json_parse(written, size, "here");
    check(json->length == 127 && memcmp(json->string, bytes, 127) == 0, "%s is read as %s", written,
          json->string);
    json_free(json);
    free(written);
}

static void test_json_values(void) {
    const char *text =
        "{\"n\": [0, -1, 2.5, 1e3, -2.5E-1, 9007199254740992], \"t\": true, \"f\":false,\"z\" : null , "
        "\"o\": {}, \"a\": [[], [{\"k\": \"v\"}]]}";
    Json *json = json_parse(text, strlen(text), "here");
    const double numbers[] = {0, -1, 2.5, 1000, -0.25, 9007199254740992.0};
    const Json *number = json_get(json, "n")->child;
    for (int i = 0; i < 6; i++, number = number->next)
        check(number && number->kind == JSON_NUMBER && number->number == numbers[i], "number %d", i);
    check(!number && json_get(json, "t")->kind == JSON_TRUE && json_get(json, "f")->kind == JSON_FALSE &&
              json_get(json, "z")->kind == JSON_NULL && !json_get(json, "o")->child && !json_get(json, "x"),
          "members");
    check(strcmp(json_get(json_get(json, "a")->child->next->child, "k")->string, "v") == 0, "nesting");
    check(json_number(json, "z", 7, "here") == 7 && json_number(json, "x", 8, "here") == 8, "defaults");
    json_free(json);
}

// What is not valid, and what the error says of it.
static const char *const wrong_json[][2] = {
    {"", "line 1, column 1: expected a value"},
    {"{", "column 2"},
    {"[1,", "column 4: expected a value"},
    {"[1 2]", "line 1, column 4: expected ',' or ']'"},
    {"{\n\"a\": 1,\n \"b\" 2}", "line 3, column 6: expected ':'"},
    {"[1,]", "column 4: expected a value"},
    {"[,1]", "column 2"},
    {"{\"a\":1,}", "column 8: expected a name"},
    {"{a:1}", "a name in double quotes"},
    {"{\"a\":1 \"b\":2}", "',' or '}'"},
    {"\"abc", "closing quote"},
    {"\"abc\\\"", "closing quote"},
    {"\"a\\", "closing quote"},
    {"\"\\x41\"", "after a backslash"},
    {"\"\\u12g4\"", "four hexadecimal digits"},
    {"\"\\ud83d\\u00\"", "four hexadecimal digits"},
    {"\"\\u12\"", "four"},
    {"\"a\nb\"", "control character"},
    {"\"a\n\"", "control character"},
    {"\"\x01\"", "control character"},
    {"tru", "a value"},
    {"nul", "a value"},
    {"True", "a value"},
    {"NaN", "a value"},
    {"+1", "a value"},
    {"-", "a number"},
    {"1e", "a number"},
    {"1.2.3", "a number"},
    {"--1", "a number"},
    {"01", "a number"},
    {"-01.5", "a number"},
    {"1.", "a number"},
    {"1.e5", "a number"},
    {"-.5", "a number"},
    {"0x10", "a number"},
    {"-inf", "a number"},
    {"1e+", "a number"},
    {"1-2", "a number"},
    {"1 1", "column 3: expected nothing more"},
    {"{}]", "nothing more"},
    {"'a'", "a value"},
    {"]", "a value"},
    {"{1:2}", "a name in double quotes"},
};

static void test_wrong_json(void) {
    for (size_t i = 0; i < sizeof wrong_json / sizeof *wrong_json; i++) {
        child_text = wrong_json[i][0];
        expect_death(child_json, "here: not valid JSON at line ", child_text);
        expect_death(child_json, wrong_json[i][1], child_text);
    }
    Text wide = {0}; // 500 values side by side are no nesting
    for (int i = 0; i < 500; i++) text_append(&wide, i ? ",[]" : "[[]", 3);
    text_append(&wide, "]", 1);
    json_free(json_parse(wide.data, wide.size, "here"));
    free(wide.data);
    char deep[1001] = {0};
    memset(deep, '[', 199);
    memset(deep + 199, ']', 199);
    json_free(json_parse(deep, 398, "here"));
    memset(deep, '[', 1000);
    child_text = deep;
    expect_death(child_json, "200 levels of nesting", "1000 brackets");
    const char *whole = "{\"a\": [1, -2.5e1, true], \"b\": {\"c\": \"\\u0041\\n\"}, \"d\": null}";
    for (size_t size = 0; size < strlen(whole); size++) { // cut anywhere: refused
        memcpy(deep, whole, size);
        deep[size] = 0;
        expect_death(child_json, "here: not valid JSON", deep);
    }
}

// ---- safetensors and model folders ----

// A file of this header and `size` bytes of data, all zero.
static void write_safetensors(const char *path, const char *header, size_t size) {
    Text bytes = {0};
    uint64_t length = strlen(header);
    char *zeros = xcalloc(size, 1);
    text_append(&bytes, (char *)&length, 8);
    text_append(&bytes, header, length);
    text_append(&bytes, zeros, size);
    put_file(path, bytes.data, bytes.size);
    free(bytes.data);
    free(zeros);
}

static void test_safetensors(void) {
    int64_t whole[6] = {1, -2, 3, INT64_MAX, INT64_MIN, 0};
    float floats[3] = {1.5f, -0.0f, INFINITY};
    const StoredTensor written[] = {{"ids", "I64", 2, {2, 3}, 6, 48, (char *)whole},
                                    {"f", "F32", 1, {3}, 3, 12, (char *)floats},
                                    {"scalar", "F32", 0, {0}, 1, 4, (char *)floats},
                                    {"none", "F32", 2, {0, 5}, 0, 0, (char *)floats}};
    const char *path = in_tests("some.safetensors");
    safetensors_write(path, written, 4);
    SafeTensors file = safetensors_open(path);
    check(file.count == 4 && (size_t)(file.tensors[0].data - file.mapping.data) % 64 == 0,
          "tensors, alignment");
    for (int i = 0; i < 4; i++) {
        const StoredTensor *read = safetensors_find(&file, written[i].name);
        check(read && strcmp(read->dtype, written[i].dtype) == 0 && read->dims == written[i].dims &&
                  memcmp(read->shape, written[i].shape, sizeof read->shape) == 0 &&
                  read->count == written[i].count && read->bytes == written[i].bytes &&
                  memcmp(read->data, written[i].data, read->bytes) == 0,
              "tensor %s comes back", written[i].name);
    }
    check(!safetensors_find(&file, "fi"), "a name that is not there");
    safetensors_close(&file, false);
}

static void test_wrong_safetensors(void) {
    const char *path = in_tests("some.safetensors");
    static const struct {
        const char *header;
        size_t size;
        const char *error;
    } wrong[] = {
        {"", 0, "not valid JSON"},
        {"[]", 0, "must be a JSON object"},
        {"{\"a\": 1}", 0, "tensor a"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", 4, "data_offsets expected"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": 1, \"data_offsets\": [0, 4]}}", 4, "tensor a"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0]}}", 4, "whole numbers"},
        {"{\"a\": {\"dtype\": \"F33\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 4, "F33"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 4]}}", 4, "tensor a: 4 bytes"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 3, "cut off"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 0]}}", 4, "tensor a"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 4]}}", 4, "whole numbers"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [0.5], \"data_offsets\": [0, 2]}}", 2, "whole numbers"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1e300], \"data_offsets\": [0, 4]}}", 4, "whole numbers"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4294967296, 4294967296], \"data_offsets\": [0, 0]}}", 0,
         "too large"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1,1,1,1,1,1,1,1,1], \"data_offsets\": [0, 4]}}", 4,
         "8 dimensions"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 8, "holes or overlaps"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 8]}}", 8, "holes or overlaps"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}, "
         "\"b\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}",
         8, "holes or overlaps"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        child_path = path;
        write_safetensors(path, wrong[i].header, wrong[i].size);
        expect_death(child_safetensors, wrong[i].error, wrong[i].header);
        expect_death(child_safetensors, path, wrong[i].header);
    }
    for (size_t i = 0; i < 3;
         i++) { // length of the header: more than the file, more than 100 MB, all bits set
        static const uint64_t lengths[] = {100, 100000001, UINT64_MAX};
        put_file(path, &lengths[i], 8);
        expect_death(child_safetensors, "its header should have", "length of the header");
    }
    put_file(path, "1234567", 7);
    expect_death(child_safetensors, "at least 8 expected", "7 bytes");
}

static Model *small_model(bool tied) {
    Model *model = model_new((Config){32, 8, 2, 2, 8, 24, 3e-5f, tied});
    model_initialise(model, 3);
    return model;
}

static bool same_values(const Model *a, const Model *b) {
    bool same = a->tensor_count == b->tensor_count;
    for (int i = 0; i < a->tensor_count && same; i++)
        same = strcmp(a->tensors[i].name, b->tensors[i].name) == 0 &&
               a->tensors[i].size == b->tensors[i].size &&
               memcmp(a->tensors[i].value, b->tensors[i].value, a->tensors[i].size * sizeof(float)) == 0;
    return same;
}

static void test_model_folder(void) {
    const char *folder = in_tests("small");
    for (int tied = 0; tied < 2; tied++) {
        Model *model = small_model(tied);
        model_save(model, NULL, &(KeptFiles){0}, NULL, folder);
        Model *loaded = model_load(folder);
        check(same_values(model, loaded), "values come back to the bit (tied: %d)", tied);
        check(memcmp(&model->config, &loaded->config, offsetof(Config, tie_word_embeddings)) == 0 &&
                  model->config.tie_word_embeddings == loaded->config.tie_word_embeddings,
              "configuration comes back");
        check(loaded->value_file.data && !loaded->value_memory, "F32 stays mapped");
        loaded->tensors[0].value[0] += 1; // a private mapping: the file must not change
        model_free(loaded);
        loaded = model_load(folder);
        check(same_values(model, loaded), "the file is not written to");
        model_free(loaded);
        model_free(model);
    }
    Model *model = small_model(true);
    model->config.layer_norm_epsilon = 1.2345678e-5f; // takes all its digits
    model_save(model, NULL, &(KeptFiles){0}, NULL, folder);
    check(config_read(in_tests("small/config.json")).layer_norm_epsilon == model->config.layer_norm_epsilon,
          "layer_norm_epsilon does not come back to the bit");
    model_free(model);
}

typedef struct {
    uint16_t bits;
    float value;
} Short;

// A tensor as F32 (`as` 0), F16 (1) or BF16 (2); the model's own values become what the 16 bits mean.
static StoredTensor short_tensor(const Tensor *tensor, int as) {
    enum { SHORTS = 9 };
    static const Short half[SHORTS] = {
        {0x3c00, 1},        {0xc000, -2},    {0x0001, 0x1p-24f},   {0x83ff, -1023 * 0x1p-24f},
        {0x0400, 0x1p-14f}, {0x7bff, 65504}, {0x3555, 0x555p-12f}, {0x8000, -0.0f},
        {0x7c00, INFINITY}};
    static const Short brain[SHORTS] = {{0x3f80, 1},         {0xc000, -2},        {0x0001, 0x1p-133f},
                                        {0x7f7f, 0xffp120f}, {0x8000, -0.0f},     {0x3eab, 0xabp-9f},
                                        {0x3f80, 1},         {0xff80, -INFINITY}, {0x0080, 0x1p-126f}};
    StoredTensor stored = stored_tensor(tensor, STORE_VALUE);
    if (as == 0) return stored;
    uint16_t *bits = xmalloc(2 * tensor->size);
    for (size_t j = 0; j < tensor->size; j++) {
        Short number = as == 1 ? half[j % SHORTS] : brain[j % SHORTS];
        bits[j] = number.bits;
        tensor->value[j] = number.value;
    }
    stored.dtype = as == 1 ? "F16" : "BF16";
    stored.data = (char *)bits;
    stored.bytes = 2 * tensor->size;
    return stored;
}

// The same in other clothes: bare names, 16 bits, stored masks, a head that is there but tied.
static void test_other_clothes(void) {
    static char mask[64];
    const char *folder = in_tests("small"), *weights = in_tests("small/model.safetensors");
    for (int n = 0; n < 8; n++) {
        const int tied = n / 4, dtype = n % 4; // F32, F16, BF16, and the three mixed
        Model *model = small_model(tied);
        model_save(model, NULL, &(KeptFiles){0}, NULL, folder);
        StoredTensor list[64];
        int count = 0;
        for (int i = 0; i < model->tensor_count; i++, count++) {
            list[count] = short_tensor(&model->tensors[i], dtype == 3 ? i % 3 : dtype);
            char *name = (char *)list[count].name;
            list[count].name = xstrdup(dtype == 2 ? name : without_prefix(name));
            free(name);
        }
        list[count++] = (StoredTensor){xstrdup("h.0.attn.bias"), "U8", 4, {1, 1, 8, 8}, 64, 64, mask};
        list[count++] = (StoredTensor){xstrdup("h.1.attn.masked_bias"), "F32", 0, {0}, 1, 4, mask};
        if (tied) {
            list[count] = stored_tensor(&model->tensors[WTE], STORE_VALUE);
            free((char *)list[count].name);
            list[count++].name = xstrdup("lm_head.weight");
        }
        safetensors_write(weights, list, (size_t)count);
        Model *loaded = model_load(folder);
        check(same_values(model, loaded), "other clothes %d (tied: %d)", dtype, tied);
        check((loaded->value_file.data != NULL) == (dtype == 0), "what is mapped, %d", dtype);
        model_free(loaded);
        for (int i = 0; i < count; i++) {
            free((char *)list[i].name);
            if (strcmp(list[i].dtype, "F16") == 0 || strcmp(list[i].dtype, "BF16") == 0) free(list[i].data);
        }
        model_free(model);
    }
}

// ---- a folder's own words ----

// Added tokens with each flag, on top of 256 bytes, "ow", "low", "Ġlow" and <|endoftext|>; é is a token
// already, the one of byte 0xe9.
#define FLAGS(l, r, w, n)                                                                                    \
    "\"lstrip\": " #l ", \"rstrip\": " #r ", \"single_word\": " #w ", \"normalized\": " #n "}"
static const struct {
    int id;
    const char *content, *flags;
} added_tokens[] = {
    {259, "<|endoftext|>", FLAGS(false, false, false, false)},
    {260, "[pad]", FLAGS(false, false, false, false)},
    {261, "[u]", FLAGS(false, false, false, false)},
    {262, "ab", FLAGS(false, false, false, true)},
    {263, "abc", FLAGS(false, false, false, true)},
    {264, "[L]", FLAGS(true, false, false, false)},
    {265, "[R]", FLAGS(false, true, false, true)},
    {266, "zebra", FLAGS(false, false, true, true)},
    {267, "low low", FLAGS(false, false, false, true)},
    {165, "é", FLAGS(false, false, false, true)},
};

// Writes a folder with these tokens: 0: tokenizer.json, 1: added_tokens_decoder in tokenizer_config.json.
static void make_added_folder(int layout) {
    const char *folder = in_tests(layout ? "added1" : "added0");
    char *list = NULL, *vocabulary;
    size_t size;
    FILE *file = open_memstream(&list, &size);
    write_text("tiny.bpe", "o w\nl ow\nĠ low");
    Tokenizer *t = tokenizer_load(in_tests("tiny.bpe"));
    tokenizer_save(t, folder);
    tokenizer_free(t);
    for (size_t i = 0; i < sizeof added_tokens / sizeof *added_tokens; i++)
        fprintf(file,
                layout ? "%s\"%d\": {\"content\": \"%s\", %s" : "%s{\"id\": %d, \"content\": \"%s\", %s",
                i ? ", " : "", added_tokens[i].id, added_tokens[i].content, added_tokens[i].flags);
    fclose(file);
    save_text(folder, "tokenizer_config.json",
              xprintf("{\"tokenizer_class\": \"GPT2Tokenizer\", \"eos_token\": \"<|endoftext|>\", "
                      "\"pad_token\": \"[pad]\"%s%s%s}",
                      layout ? ", \"added_tokens_decoder\": {" : "", layout ? list : "", layout ? "}" : ""));
    vocabulary = read_file(path_of("%s/vocab.json", folder)).data;
    if (!layout)
        save_text(
            folder, "tokenizer.json",
            xprintf(
                "{\"added_tokens\": [%s], \"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", "
                "\"add_prefix_space\": false, \"use_regex\": true}, \"post_processor\": {\"type\": "
                "\"TemplateProcessing\", \"single\": [{\"Sequence\": {\"id\": \"A\"}}]}, \"decoder\": "
                "{\"type\": "
                "\"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"dropout\": null, \"ignore_merges\": false, "
                "\"end_of_word_suffix\": \"\", \"vocab\": %s, \"merges\": [[\"o\", \"w\"], \"l ow\", \"Ġ "
                "low\"]}}",
                list, vocabulary));
    free(list);
    free(vocabulary);
}

// The ids are those of transformers 5.23 with tokenizers 0.23.3, run on the same folder.
static void test_added_tokens(void) {
    static const struct {
        const char *text, *ids;
    } cases[] = {
        {"[u]low ab<|endoftext|>", "261 257 220 262 259 "},
        {"abcab", "263 262 "},
        {"x [L] [R] \n low", "87 264 220 265 257 "},
        {"a zebra.", "64 220 266 13 "},
        {"zebras zebra_ zebra²", "89 68 65 81 64 82 220 89 68 65 81 64 62 220 266 126 110 "},
        {"a low low low", "64 220 267 258 "},
        {"[u]é [pad]", "261 165 220 260 "},
        {"[R][L]  [R] ", "265 264 220 220 265 "},
        {"ab", "262 "},
    };
    for (int layout = 0; layout < 2; layout++) {
        make_added_folder(layout);
        Tokenizer *t = tokenizer_load(in_tests(layout ? "added1" : "added0"));
        check(t->end_of_text == 259 && t->pad == 260 && t->vocab_size == 268, "end %d, pad %d",
              t->end_of_text, t->pad);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            Ids ids = {0};
            Text got = {0};
            tokenizer_encode(t, &ids, cases[i].text, strlen(cases[i].text));
            for (size_t k = 0; k < ids.size; k++) {
                char *id = xprintf("%d ", ids.data[k]);
                text_append(&got, id, strlen(id));
                free(id);
            }
            check(strcmp(got.data, cases[i].ids) == 0, "layout %d, %s: %s", layout, cases[i].text, got.data);
            free(ids.data);
            free(got.data);
        }
        for (int round = 0; round < 300;
             round++) { // wherever a text may be cut, the ids are those of the whole
            static const char *const parts[] = {" ",   "\n",  "a",     "ab",      "abc", "[u]",
                                                "[L]", "[R]", "zebra", "low low", "é",   "["};
            Text text = {0};
            Ids whole = {0};
            for (uint64_t n = 0; n < 12; n++) {
                const char *part = parts[random_bits((uint64_t)round, n) % 12];
                text_append(&text, part, strlen(part));
            }
            tokenizer_encode(t, &whole, text.data, text.size);
            for (size_t place = 0; place <= text.size; place++) {
                Ids cut_ids = {0};
                size_t cut = tokenizer_cut(t, text.data, place);
                tokenizer_encode(t, &cut_ids, text.data, cut);
                tokenizer_encode(t, &cut_ids, text.data + cut, text.size - cut);
                check(same_ids(&whole, &cut_ids), "'%s' cut at %zu has other ids", text.data, cut);
                free(cut_ids.data);
            }
            free(whole.data);
            free(text.data);
        }
        tokenizer_free(t);
    }
}

// Writes a folder with 259 tokens, 256 bytes, "ow", "low" and "Ġlow", and those of the small files that are not
// NULL.
static void make_small_files(const char *name, const char *config, const char *map, const char *added) {
    const char *const names[] = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"};
    const char *const texts[] = {config, map, added};
    write_text("tiny.bpe", "o w\nl ow\nĠ low");
    Tokenizer *t = tokenizer_load(in_tests("tiny.bpe"));
    tokenizer_save(t, in_tests(name));
    tokenizer_free(t);
    const char *folder = in_tests(name);
    Text vocabulary = read_file(path_of("%s/vocab.json", folder));
    char *end = strstr(vocabulary.data, ",\"<|endoftext|>\"");
    save_text(folder, "vocab.json", xprintf("%.*s}", (int)(end - vocabulary.data), vocabulary.data));
    for (int i = 0; i < 3; i++) {
        unlink(path_of("%s/%s", folder, names[i]));
        if (texts[i]) write_file(path_of("%s/%s", folder, names[i]), texts[i], strlen(texts[i]));
    }
    free(vocabulary.data);
}

// Tokens that a folder only names, or that the class of its tokenizer has by default. The ids are those of
// transformers 5.23 with tokenizers 0.23.3, run on the same folders.
static const struct {
    const char *config, *map, *added, *text;
    int ids[5], end, pad;
} named[] = {
    {"{\"pad_token\": \"Ⅳ\"}", NULL, NULL, "Ⅳ<|endoftext|>", {260, 259}, 259, 260},
    {"{\"bos_token\": null, \"eos_token\": null, \"unk_token\": null}", NULL, NULL, "<|", {27, 91}, -1, -1},
    {"{\"unk_token\": \"<|pad|>\"}",
     NULL,
     "{\"<|pad|>\": 259, \"<|pad|><|pad|>\": 260}",
     "<|pad|><|pad|>",
     {259, 259},
     261,
     261}, // a token with a task is special, so it is looked for first
    {NULL,
     "{\"additional_special_tokens\": [\"<r>\"]}",
     "{\"<r>\": 259, \"<r><r>\": 260}",
     "<r><r>",
     {260},
     261,
     261}, // but not one of this list
    {"{\"image_token\": \"<p>\", \"pad_token\": \"<q>\", \"z_token\": {\"content\": \"<z>\", \"lstrip\": "
     "true}, "
     "\"extra_special_tokens\": [\"<x>\"]}",
     NULL,
     NULL,
     "<p><q> <z><x>",
     {262, 260, 261, 263},
     259,
     260},
    {"{\"bos_token\": \"<a>\", \"eos_token\": {\"content\": \"<a>\", \"lstrip\": true}, \"unk_token\": "
     "\"<a>\"}",
     NULL,
     NULL,
     " <a> low",
     {259, 258},
     259,
     259}, // the third is the first, so the second's flags stay
    {"{\"bos_token\": {\"content\": \"<a>\", \"lstrip\": true}, \"eos_token\": {\"content\": \"<a>\", "
     "\"rstrip\": "
     "true}, \"unk_token\": \"<u>\"}",
     NULL,
     NULL,
     " <a> <u>",
     {220, 259, 260},
     259,
     259},
    {"{\"extra_special_tokens\": [\"<q>\"], \"additional_special_tokens\": [\"<no>\"]}",
     "{\"extra_special_tokens\": [\"<r>\", \"<q>\"]}",
     NULL,
     "<q><r>",
     {260, 261},
     259,
     259},
};

static void test_named_tokens(void) {
    for (size_t i = 0; i < sizeof named / sizeof *named; i++) {
        make_small_files("named", named[i].config, named[i].map, named[i].added);
        Tokenizer *t = tokenizer_load(in_tests("named"));
        Ids ids = {0}, wanted = {0};
        for (int k = 0; k < 5 && named[i].ids[k]; k++) ids_push(&wanted, named[i].ids[k]);
        tokenizer_encode(t, &ids, named[i].text, strlen(named[i].text));
        check(same_ids(&ids, &wanted), "%s: %zu ids, the first is %d", named[i].text, ids.size, ids.data[0]);
        check(t->end_of_text == named[i].end && t->pad == named[i].pad, "%s: end %d, pad %d", named[i].text,
              t->end_of_text, t->pad);
        free(ids.data);
        free(wanted.data);
        tokenizer_free(t);
    }
}

// Many added tokens take no longer than their number.
static void test_many_added_tokens(void) {
    make_added_folder(1);
    FILE *file = fopen(in_tests("added1/added_tokens.json"), "w");
    for (int i = 0; i < 20000; i++) fprintf(file, "%c\"<token %d>\": %d", i ? ',' : '{', i, 260 + i);
    fputs("}", file);
    fclose(file);
    unlink(in_tests("added1/tokenizer_config.json"));
    double start = now();
    Tokenizer *t = tokenizer_load(in_tests("added1"));
    check(now() - start < 2 && t->vocab_size == 20260, "20,000 added tokens take %.1f s", now() - start);
    Ids ids = {0};
    tokenizer_encode(t, &ids, "<token 19999><token 0>", 22);
    check(ids.size == 2 && ids.data[0] == 20259 && ids.data[1] == 260, "the last and the first of 20,000");
    free(ids.data);
    tokenizer_free(t);
}

static void child_tokenizer(void) { tokenizer_load(child_path); }

// What tokenizer.json and tokenizer_config.json ask for beyond GPT-2's rules is refused by name.
static void test_other_rules(void) {
    static const char *const changes[][3] = {
        {"\"use_regex\": true", "\"use_regex\": false", "pre_tokenizer: use_regex"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "pre_tokenizer: add_prefix_space"},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "normalizer"},
        {"[{\"Sequence\"", "[{\"SpecialToken\": {\"id\": \"x\"}}, {\"Sequence\"", "post_processor"},
        {"\"decoder\": {\"type\": \"ByteLevel\"}", "\"decoder\": {\"type\": \"Fuse\"}", "decoder"},
        {"\"ignore_merges\": false", "\"ignore_merges\": true", "ignore_merges"},
        {"\"end_of_word_suffix\": \"\"", "\"end_of_word_suffix\": \"x\"", "end_of_word_suffix"},
        {"\"dropout\": null", "\"dropout\": 0.1", "dropout"},
        {"\"BPE\"", "\"Unigram\"", "model: type"},
        {"\"id\": 262", "\"id\": 300", "none has 262"},
        {"\"id\": 165", "\"id\": 9", "but 165 in the vocabulary"},
    };
    make_added_folder(0);
    child_path = in_tests("added0");
    Text good = read_file(in_tests("added0/tokenizer.json"));
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        const char *place = strstr(good.data, changes[i][0]);
        save_text(in_tests("added0"), "tokenizer.json",
                  xprintf("%.*s%s%s", (int)(place - good.data), good.data, changes[i][1],
                          place + strlen(changes[i][0])));
        expect_death(child_tokenizer, changes[i][2], changes[i][1]);
    }
    write_file(in_tests("added0/tokenizer.json"), good.data, good.size);
    write_text("added0/tokenizer_config.json", "{\"add_prefix_space\": true}");
    expect_death(child_tokenizer, "add_prefix_space true is not supported", "a prefix space");
    free(good.data);
}

// Files of a tokenizer's folder that are JSON but not what they should be.
static void test_wrong_shapes(void) {
    static const char *const cases[][3] = {
        // the file: 0 tokenizer_config.json, 1 special_tokens_map.json, 2 added_tokens.json; what it holds
        {"0", "[1]", "tokenizer_config.json: expected an object"},
        {"1", "null", "special_tokens_map.json: expected an object"},
        {"2", "[1]", "added_tokens.json: expected an object"},
        {"2", "{\"<a>\": \"259\"}", "added token \"<a>\": expected an id"},
        {"2", "{\"<a>\": {\"id\": 259}}", "added token \"<a>\": expected an id"},
        {"2", "{\"a\\u0000b\": 259}", "a name without NUL"},
        {"0", "{\"added_tokens_decoder\": [1]}", "added_tokens_decoder: expected an object"},
        {"0", "{\"added_tokens_decoder\": {\"259\": \"<a>\", \"260\": 5}}", "expected a string, without NUL"},
        {"0", "{\"eos_token\": 5}", "expected a string, without NUL"},
        {"1", "{\"eos_token\": [\"<a>\"]}", "expected a string, without NUL"},
        {"0", "{\"extra_special_tokens\": \"<a>\"}", "expected a list"},
        {"0", "{\"extra_special_tokens\": [[\"<a>\"]]}", "expected a string, without NUL"},
        {"0", "{\"pad_token\": {\"content\": \"<a>\", \"lstrip\": \"yes\"}}",
         "\"lstrip\" must be true or false"},
        {"0", "{\"add_prefix_space\": 1}", "\"add_prefix_space\" must be true or false"},
    };
    char *folder = xstrdup(in_tests("shapes"));
    child_path = folder;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *text = cases[i][1];
        char file = cases[i][0][0];
        make_small_files("shapes", file == '0' ? text : NULL, file == '1' ? text : NULL,
                         file == '2' ? text : NULL);
        expect_death(child_tokenizer, cases[i][2], text);
    }
    make_small_files("shapes", NULL, NULL, NULL);
    write_text("shapes/config.json", "{\"eos_token_id\": \"2\"}");
    expect_death(child_tokenizer, "eos_token_id: expected a number", "an id that is a string");
    unlink(in_tests("shapes/config.json"));
    free(folder);
}

// Makes a folder for a model with `rows` in wte that always says `token`; 262 tokens: 256 bytes, three
// merges, <pad> <s> </s>, no <|endoftext|>.
static void make_own_folder(const char *name, int rows, int token, const char *generation_config) {
    const char *folder = in_tests(name);
    write_text("tiny.bpe", "o w\nl ow\nĠ low");
    Tokenizer *t = tokenizer_load(in_tests("tiny.bpe"));
    tokenizer_save(t, folder);
    Text vocabulary = read_file(path_of("%s/vocab.json", folder));
    char *end = strstr(vocabulary.data, ",\"<|endoftext|>\"");
    save_text(folder, "vocab.json",
              xprintf("%.*s,\"<pad>\":259,\"<s>\":260,\"</s>\":261}", (int)(end - vocabulary.data),
                      vocabulary.data));
    Model *model = model_new((Config){rows, 16, 1, 2, 16, 64, 1e-5f, true});
    model_initialise(model, 5);
    for (int i = 0; i < 16; i++) {
        model_tensor(model, LN_F_WEIGHT, 0)->value[i] = 0;
        model_tensor(model, LN_F_BIAS, 0)->value[i] = 3;
        model_tensor(model, WTE, 0)->value[16 * token + i] = 1; // the others are near 0
    }
    model_save(model, NULL, &(KeptFiles){0}, NULL, folder);
    save_text(
        folder, "config.json",
        xprintf("{\"model_type\": \"gpt2\", \"torch_dtype\": \"float16\", \"vocab_size\": %d, "
                "\"n_positions\": 16,\n\t\"n_embd\": 16, "
                "\"n_layer\": 1, \"n_head\": 2, \"eos_token_id\": 261, \"task\": {\"dtype\": \"kept\"}}",
                rows));
    save_text(folder, "generation_config.json", xstrdup(generation_config));
    model_free(model);
    tokenizer_free(t);
    free(vocabulary.data);
}

// The end of text is what the folder says; rows of wte without a token are never drawn; what is written is
// what was read, but for the weights.
static void test_own_words(void) {
    static const char *const files[] = {
        "vocab.json",        "merges.txt",       "generation_config.json", "tokenizer_config.json",
        "added_tokens.json", "model.safetensors"};
    Text printed = {0};
    make_inputs();
    make_own_folder("own", 262, 261, "{\"eos_token_id\": [7, 261], \"x\": 1}");
    write_text(
        "own.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"xyz\"}\n{\"prompt\": \"b\", \"completion\": \"uvw\"}\n");
    write_text("own/tokenizer_config.json", "{ \"eos_token\": \"</s>\",\"model_max_length\": 5 }");
    write_text("own/added_tokens.json", "{\"<pad>\": 259}");
    expect_run(0, &printed, "--init $D/own --eval --val $D/own.jsonl --quiet");
    check(strstr(printed.data, "of 8 tokens") != NULL, "two completions of three and their ends: %s",
          printed.data);
    expect_run(0, &printed, "--init $D/own --generate 5 --temperature 0 --prompt hi --quiet");
    check(strcmp(printed.data, "hi\n") == 0, "the end of text ends it: '%s'", printed.data);
    expect_run(0, &printed,
               "--init $D/own --train $D/own.jsonl --out $D/own-out --learning-rate 0 --steps 2 "
               "--val-fraction 0 --quiet");
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char *before = xprintf("own/%s", files[i]), *after = xprintf("own-out/%s", files[i]);
        check(same_files(before, after), "%s comes back to the byte", files[i]);
        free(before);
        free(after);
    }
    Text before = read_file(in_tests("own/config.json")), after = read_file(in_tests("own-out/config.json"));
    char *type = strstr(before.data, "float16");
    char *expected = xprintf("%.*sfloat32%s", (int)(type - before.data), before.data, type + 7);
    check(strcmp(expected, after.data) == 0, "config.json: %s", after.data);
    expect_run(0, &printed,
               "--init d4 --tokenizer $D/own --n-layer 1 --n-embd 8 --n-head 1 --n-positions 8 --train "
               "$D/own.jsonl --out $D/own-new --steps 1 --val-fraction 0 --quiet");
    check(same_files("own/tokenizer_config.json", "own-new/tokenizer_config.json") &&
              same_files("own/added_tokens.json", "own-new/added_tokens.json"),
          "a random start takes the tokenizer's files along");

    make_own_folder("padded", 320, 300, "{\"eos_token_id\": 261}");
    expect_run(0, &printed, "--init $D/padded --generate 40 --prompt hi --quiet");
    make_own_folder("second", 262, 7, "{\"eos_token_id\": [7, 261]}");
    expect_run(0, &printed, "--init $D/second --generate 5 --temperature 0 --prompt hi --quiet");
    check(strcmp(printed.data, "hi\n") == 0, "either end of text ends it: '%s'", printed.data);
    free(expected);
    free(before.data);
    free(after.data);
    free(printed.data);
}

// A tokenizer may have added tokens for which the model has no row: that is an error where a text has one.
static void test_tokens_beyond_model(void) {
    make_inputs();
    make_own_folder("beyond", 262, 7, "{}");
    write_text("beyond/tokenizer_config.json",
               "{\"image_token\": \"<p>\", \"eos_token\": \"</s>\"}"); // 262, 263
    write_text("beyond.jsonl", "{\"text\": \"abc\"}\n");
    write_text("beyond_p.jsonl", "{\"text\": \"abc\"}\n{\"prompt\": \"a<p>\", \"completion\": \"b\"}\n");
    expect_run(0, NULL, "--init $D/beyond --eval --val $D/beyond.jsonl --quiet");
    expect_run(0, NULL, "--init $D/beyond --generate 3 --prompt hi --quiet");
    expect_run(0, NULL, "--init $D/beyond --eval --val $D/beyond_p.jsonl --plain --quiet");
    expect_refusal(1,
                   "beyond_p.jsonl: holds the token \"<p>\", id 263, and the model's vocabulary ends at 261",
                   "--init $D/beyond --eval --val $D/beyond_p.jsonl --quiet");
    expect_refusal(1, "--prompt: holds the token \"<p>\"",
                   "--init $D/beyond --generate 3 --prompt 'a <p>' --quiet");
    write_text("beyond/tokenizer_config.json", "{\"eos_token\": \"<end>\"}");
    expect_refusal(1, "holds the token \"<end>\" (or a text ends with it)",
                   "--init $D/beyond --eval --val $D/beyond.jsonl --quiet");
    expect_run(0, NULL, "--init $D/beyond --generate 3 --quiet");
    Model model = {.config.vocab_size = 262};
    for (int end = -1; end < 264; end += 132)
        check(first_token(&(Run){.model = &model, .tokenizer = &(Tokenizer){.end_of_text = end}}) ==
                  (end == 131 ? 131 : 0),
              "a text begins with %d only if the model has it", end);
    make_own_folder("beyond", 261, 7, "{}"); // of the vocabulary itself each token must be there
    expect_refusal(1, "has 262 entries, the model only 261", "--init $D/beyond --generate 3 --quiet");
}

// Weights of others that data/convert.py reads.
static void test_for_convert(void) {
    make_inputs();
    make_folder(in_tests("nano"));
    write_text("nano/ckpt.pt", "x");
    expect_refusal(1, "python3 data/convert.py", "--init $D/nano --generate 1");
    expect_refusal(1, "python3 data/convert.py", "--init $D/nano/ckpt.pt --generate 1");
    for (int i = 0; i < 2; i++) {
        const char *prefix = i ? "module." : "_orig_mod.";
        make_own_folder("wrapped", 262, 7, "{}");
        Text file = read_file(in_tests("wrapped/model.safetensors"));
        char *found = memmem(file.data, file.size, "transformer.", 12); // of the same or a greater length
        memset(found, 'x', 12);
        memcpy(found, prefix, strlen(prefix));
        write_file(in_tests("wrapped/model.safetensors"), file.data, file.size);
        expect_refusal(1, "named by a wrapper of PyTorch's", "--init $D/wrapped --generate 1");
        free(file.data);
    }
}

// A head beside wte that differs from it is used although config.json says that they are tied, as
// transformers 5.23 does; and one that stands alone is wte.
static void test_stored_heads(void) {
    for (int only = 0; only < 2; only++) {
        Model *model = small_model(false);
        model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("heads"));
        Model *as_tied = small_model(true);
        save_config(&as_tied->config, -1, in_tests("heads"));
        StoredTensor list[64];
        size_t count = 0;
        for (int i = 0; i < model->tensor_count; i++)
            if (!only || i != WTE) list[count++] = stored_tensor(&model->tensors[i], STORE_VALUE);
        safetensors_write(in_tests("heads/model.safetensors"), list, count);
        int kept = dup(2), quiet = open("/dev/null", O_WRONLY);
        dup2(quiet, 2);
        Model *loaded = model_load(in_tests("heads"));
        dup2(kept, 2);
        close(kept);
        close(quiet);
        const Tensor *head = model_head(model);
        check(loaded->config.tie_word_embeddings == only, "tied: %d", only);
        check(memcmp(model_head(loaded)->value, head->value, head->size * sizeof(float)) == 0,
              "the stored head, %d", only);
        for (size_t i = 0; i < count; i++) free((char *)list[i].name);
        model_free(loaded);
        model_free(as_tied);
        model_free(model);
    }
}

// Saves the small model with one tensor changed in the list of what is written.
static void save_changed(StoredTensor change, const char *name) {
    Model *model = small_model(true);
    StoredTensor list[64] = {{0}};
    size_t count = 0;
    for (int i = 0; i < model->tensor_count; i++) {
        list[count] = stored_tensor(&model->tensors[i], STORE_VALUE);
        if (strcmp(list[count].name, name) == 0) {
            char *data = list[count].data;
            free((char *)list[count].name);
            if (!change.name) continue;
            list[count] = change;
            list[count].name = xstrdup(change.name);
            list[count].data = data;
        }
        count++;
    }
    safetensors_write(in_tests("small/model.safetensors"), list, count);
    for (size_t i = 0; i < count; i++) free((char *)list[i].name);
    model_free(model);
}

// Status 0: loaded, and the same as small_model(true) to the bit; 3: loaded, but something else.
static void child_same_model(void) {
    if (!same_values(model_load(child_path), small_model(true))) _exit(3);
}

// A weights file that ends too early.
static void test_cut_weights(void) {
    Model *model = small_model(true);
    const char *weights = in_tests("small/model.safetensors");
    model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("small"));
    model_free(model);
    child_path = in_tests("small");
    Text good = read_file(weights);
    uint64_t header;
    memcpy(&header, good.data, 8);
    for (size_t size = 0; size <= good.size; size += size < 8 + header ? 97 : 997) {
        size_t kept = size + 997 > good.size ? good.size - 1 : size; // the last time: one byte is missing
        put_file(weights, good.data, kept);
        const char *error = kept == 0           ? "expected a regular file that is not empty"
                            : kept < 8 + header ? "its header should have"
                                                : "the file is cut off";
        expect_death(child_model, weights, "cut off");
        expect_death(child_model, error, "cut off");
    }
    free(good.data);
}

// One byte of the header wrong: one line. Only in the metadata, which nobody reads, and among the spaces at
// the end it may be something else that is right; then the model is the same.
static void test_wrong_header(void) {
    const char *folder = in_tests("small"), *weights = in_tests("small/model.safetensors");
    Model *undamaged = small_model(true);
    model_save(undamaged, NULL, &(KeptFiles){0}, NULL, folder);
    model_free(undamaged);
    child_path = folder;
    Text good = read_file(weights), printed = {0};
    uint64_t header;
    memcpy(&header, good.data, 8);
    const char *metadata = memmem(good.data, good.size, "{\"format\":\"pt\"}", 15);
    int refused = 0, harmless = 0;
    for (uint64_t i = 0; i < 300; i++) {
        size_t at = i < 15 ? (size_t)(metadata - good.data) + i : random_bits(1, i) % (8 + header);
        char kept = good.data[at], wrong = i % 2 ? kept ^ (char)(1 << i / 2 % 8) : (char)random_bits(2, i);
        bool is_metadata = good.data + at >= metadata && good.data + at < metadata + 15;
        bool may_load = wrong == kept || is_metadata || (kept == ' ' && strchr("\t\r\n", wrong));
        good.data[at] = wrong;
        put_file(weights, good.data, good.size);
        printed.size = 0;
        int status = run_child(child_same_model, &printed);
        check((status == 0 && may_load) || (status == 1 && one_error_line(&printed, folder)),
              "byte %zu = %d: status %d, %s", at, wrong, status, status ? printed.data : "loaded");
        good.data[at] = kept;
        refused += status == 1;
        harmless += status == 0;
    }
    check(refused > 250 && harmless > 5, "%d headers were refused, %d loaded", refused, harmless);
    free(printed.data);
    free(good.data);
}

static void test_wrong_tensors(void) {
    const char *weights = in_tests("small/model.safetensors");
    Model *model = small_model(true);
    model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("small"));
    child_path = in_tests("small");
    const char *name = "transformer.h.1.mlp.c_fc.weight"; // [8, 24]
    save_changed((StoredTensor){name, "F32", 2, {24, 8}, 192, 768, NULL}, name);
    expect_death(child_model, "c_fc.weight has shape [24, 8], expected [8, 24]", "transposed");
    save_changed((StoredTensor){name, "F32", 1, {192}, 192, 768, NULL}, name);
    expect_death(child_model, "c_fc.weight has shape [192], expected [8, 24]", "flat");
    save_changed((StoredTensor){name, "I32", 2, {8, 24}, 192, 768, NULL}, name);
    expect_death(child_model, "c_fc.weight is I32; F32, F16 or BF16 expected", "integers");
    save_changed((StoredTensor){0}, name);
    expect_death(child_model, "transformer.h.1.mlp.c_fc.weight is missing", "missing");
    StoredTensor extra[64];
    for (int i = 0; i <= model->tensor_count; i++) {
        extra[i] = stored_tensor(&model->tensors[i % model->tensor_count], STORE_VALUE);
        if (i == model->tensor_count) memcpy((char *)extra[i].name, "transformer.xte", 15);
    }
    safetensors_write(weights, extra, (size_t)model->tensor_count + 1);
    expect_death(child_model, "tensor transformer.xte.weight is not one of this GPT-2's", "one too many");
    for (int i = 0; i <= model->tensor_count; i++) free((char *)extra[i].name);
    model_free(model);
    unlink(weights);
    expect_death(child_model, "model.safetensors: is missing", "no weights");
}

static void test_config(void) {
    const char *path = in_tests("config.json");
    write_text("config.json", "{\"model_type\": \"gpt2\"}");
    Config c = config_read(path);
    check(c.vocab_size == 50257 && c.n_positions == 1024 && c.n_layer == 12 && c.n_head == 12 &&
              c.n_embd == 768 && c.n_inner == 3072 && c.layer_norm_epsilon == 1e-5f && c.tie_word_embeddings,
          "defaults");
    write_text("config.json",
               "{\"model_type\": \"gpt2\", \"n_inner\": null, \"n_embd\": 30, \"n_head\": 3, \"n_layer\": 2,"
               "\"vocab_size\": 11, \"n_positions\": 7, \"layer_norm_epsilon\": 0.25, \"n_ctx\": 5,"
               "\"tie_word_embeddings\": false, \"activation_function\": \"gelu_new\","
               "\"scale_attn_weights\": true, \"scale_attn_by_inverse_layer_idx\": false}");
    c = config_read(path);
    check(c.vocab_size == 11 && c.n_positions == 7 && c.n_layer == 2 && c.n_head == 3 && c.n_embd == 30 &&
              c.n_inner == 120 && c.layer_norm_epsilon == 0.25f && !c.tie_word_embeddings,
          "values");
    write_text("config.json", "{\"model_type\": \"gpt2\", \"n_inner\": 100}");
    check(config_read(path).n_inner == 100, "n_inner");
    static const char *const wrong[][2] = {
        {"\"activation_function\": \"relu\"", "activation_function"},
        {"\"scale_attn_weights\": false", "scale_attn_weights"},
        {"\"scale_attn_by_inverse_layer_idx\": true", "scale_attn_by_inverse_layer_idx"},
        {"\"add_cross_attention\": true", "add_cross_attention"},
        {"\"n_layer\": 0", "n_layer"},
        {"\"n_layer\": 1000000000", "n_layer"},
        {"\"n_layer\": 1e300", "n_layer"},
        {"\"n_layer\": 1.5", "n_layer"},
        {"\"n_layer\": \"12\"", "n_layer"},
        {"\"n_head\": 7", "n_embd 768 is not a multiple of n_head 7"},
        {"\"n_head\": -12", "n_head"},
        {"\"n_embd\": 100000000", "n_embd"},
        {"\"vocab_size\": 999999999", "vocab_size"},
        {"\"n_positions\": 0", "n_positions"},
        {"\"n_inner\": 1e9", "n_inner"},
        {"\"layer_norm_epsilon\": 0", "layer_norm_epsilon"},
        {"\"layer_norm_epsilon\": 1e99", "layer_norm_epsilon"},
    };
    child_path = path;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char *text = xprintf("{\"model_type\": \"gpt2\", %s}", wrong[i][0]);
        write_text("config.json", text);
        expect_death(child_config, wrong[i][1], text);
        expect_death(child_config, path, text);
        free(text);
    }
    static const char *const types[] = {"{\"model_type\": \"llama\"}", "{\"model_type\": 2}", "{}", "[]",
                                        "3"};
    for (int i = 0; i < 5; i++) {
        write_text("config.json", types[i]);
        expect_death(child_config, "model_type must be \"gpt2\"", types[i]);
    }
}

// ---- data ----

// Loads data with the tests' tokenizer; what it warns of goes to the file "warnings".
static Dataset *load_quietly(const char *name, int seq_len) {
    make_inputs();
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    int kept = dup(2), file = open(in_tests("warnings"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(file, 2);
    Dataset *data = dataset_load(in_tests(name), tokenizer, seq_len, tokenizer->vocab_size);
    dup2(kept, 2);
    close(kept);
    close(file);
    tokenizer_free(tokenizer);
    return data;
}

// Spells all examples, with $ for <|endoftext|>, | where scored tokens begin or end, a space between
// examples, and compares. A byte's id is what GPT-2 gives it.
static void expect_examples(const Dataset *data, const char *expected, const char *what) {
    Text got = {0};
    text_append(&got, "", 0);
    for (size_t i = 0; i < data->count; i++) {
        text_append(&got, " ", i > 0);
        for (int t = 0; t < data->examples[i].size; t++) {
            int stored = dataset_token(data, &data->examples[i], t), id = stored < 0 ? ~stored : stored;
            bool now = t > 0 && stored >= 0,
                 before = t > 1 && dataset_token(data, &data->examples[i], t - 1) >= 0;
            const char c = id < 94     ? (char)(id + 33)
                           : id == 198 ? '/'
                           : id == 220 ? '_'
                           : id == 258 ? '$'
                                       : '?';
            text_append(&got, "|", now != before);
            text_append(&got, &c, 1);
        }
    }
    check(strcmp(got.data, expected) == 0, "%s: %s, expected %s", what, got.data, expected);
    free(got.data);
}

static void expect_data(const char *name, const char *text, int seq_len, const char *expected) {
    write_text(name, text);
    Dataset *data = load_quietly(name, seq_len);
    expect_examples(data, expected, text);
    dataset_free(data);
}

static void test_text_data(void) {
    expect_data("d.txt", "abc", 16, "$|abc");
    expect_data("d.txt", "ab\n<|endoftext|>\ncd\n", 16, "$|ab/$cd/");
    expect_data("d.txt", "<|endoftext|>\nab", 16, "$|ab");
    expect_data("d.txt", "ab\n<|endoftext|>", 16, "$|ab/");
    expect_data("d.txt", "ab\n<|endoftext|>\n\n<|endoftext|>\n<|endoftext|>\ncd", 16, "$|ab/$/$cd");
    expect_data("d.txt", "ab\n<|endoftext|>\r\ncd", 16, "$|ab/$cd");
    Dataset *data;
    // Not alone on their lines: tokens inside a document, as AutoTokenizer has it.
    expect_data("d.txt", "a <|endoftext|>\nb\n <|endoftext|>\n<|endoftext|>c\n", 64, "$|a_$/b/_$/$c/");
    expect_data("d.txt",
                "\xef\xbb\xbf"
                "ab",
                16, "$|ab"); // a byte order mark is passed over

    // Windows share a token; each token but the first is a target exactly once, whatever the sizes.
    expect_data("d.txt", "abcdefg", 3, "$|abc c|def f|g");
    expect_data("d.txt", "abcdef", 3, "$|abc c|def");
    expect_data("d.txt", "abcde", 3, "$|abc c|de");
    expect_data("d.txt", "abcdef", 6, "$|abcdef");
    expect_data("d.txt", "abc", 1, "$|a a|b b|c");
    for (int size = 1; size < 40; size += size < 20 ? 1 : 4) {
        char text[64] = "";
        for (int i = 0; i < size; i++) text[i] = (char)('A' + i);
        write_text("d.txt", text);
        for (int seq_len = 1; seq_len < 20; seq_len += 3) {
            data = load_quietly("d.txt", seq_len);
            Batch batch = {0};
            dataset_batch(data, NULL, 0, data->count, &batch);
            bool right = batch.rows == size && batch.targets == size && batch.sequences == (int)data->count;
            for (int i = 0; right && i < size; i++)
                right = batch.target[i] == 'A' + i - 33 && batch.position[i] == i % seq_len &&
                        batch.token[i] == (i == 0 ? 258 : 'A' + i - 34);
            check(right, "%d tokens in windows of %d", size, seq_len);
            batch_free(&batch);
            dataset_free(data);
        }
    }
}

// Several files, in the order of their names, each with windows of its own; and splitting off the end.
static void test_globs_and_splits(void) {
    make_inputs();
    Dataset *data;
    write_text("part-1.txt", "abcd");
    write_text("part-2.txt", "xy");
    expect_data("part-[3].txt", "abc", 3, "$|abc"); // a name, not a glob
    unlink(in_tests("part-[3].txt"));
    data = load_quietly("part-*.txt", 3);
    expect_examples(data, "$|abc c|d $|xy", "a glob");
    Dataset *part = dataset_split(data, 0.3);
    expect_examples(part, "$|xy", "the part split off");
    expect_examples(data, "$|abc c|d", "what is left");
    dataset_free(part);
    dataset_free(data);
    write_text("d.txt", "abcdefghij");
    data = load_quietly("d.txt", 1);
    part = dataset_split(data, 0.001);
    check(part->count == 1 && data->count == 9, "at least one example is split off");
    dataset_free(part);
    part = dataset_split(data, 0.4); // 3.6 of the 9 that are left
    check(part->count == 4 && data->count == 5, "split: %zu and %zu", data->count, part->count);
    dataset_free(part);
    dataset_free(data);
}

static void test_jsonl_data(void) {
    static const struct {
        const char *text;
        int seq_len;
        const char *expected, *warning;
    } cases[] = {
        {"{\"prompt\": \"ab\", \"completion\": \"cd\"}\n", 16, "ab|cd$", ""},
        {"{\"text\": \"abc\"}", 16, "$|abc$", ""}, // no newline at the end
        {"\n  \r\n{\"completion\": \"\\u0063d\", \"prompt\": \"\\n\"}\r\n\n{\"text\": \" \"}\n", 16,
         "/|cd$ $|_$", ""},
        {"{\"prompt\": \"\", \"completion\": \"cd\"}", 16, "$|cd$", ""},
        {"{\"text\": \"ab\"}\n{\"prompt\": \"ab\", \"completion\": \"\"}\n{\"text\": \"\"}", 16, "$|ab$",
         "d.jsonl:2: nothing"},
        {"{\"prompt\": \"abcdefgh\", \"completion\": \"xy\"}", 5, "fgh|xy$",
         "d.jsonl:1: 10 tokens are more than --seq-len 5: the beginning cut off"},
        {"{\"prompt\": \"abc\", \"completion\": \"tuvwxyz\"}", 5, "c|tuvwx",
         "10 tokens are more than --seq-len 5: the beginning and the end, with its end of text, cut off"},
        {"{\"prompt\": \"abc\", \"completion\": \"uvwxy\"}", 5, "c|uvwxy",
         "8 tokens are more than --seq-len 5: the beginning and the end, with its end of text, cut off"},
        {"{\"prompt\": \"ab\", \"completion\": \"wxy\"}", 5, "ab|wxy$", ""}, // just fits
        {"{\"text\": \"abcdef\"}", 3, "$|abc",
         "d.jsonl:1: 7 tokens are more than --seq-len 3: the end, with its end of text, cut off"},
        {"{\"text\": \"abcdef\"}\n{\"text\": \"\"}\n{\"text\": \"abcdef\"}\n{\"text\": \"a\"}", 3,
         "$|abc $|abc $|a$",
         "d.jsonl: 3 examples; cut to --seq-len 3: 2 lost the end of what is scored and the end of text, 0 "
         "the "
         "beginning of the prompt; 1 more skipped\n"},
        {"\xef\xbb\xbf{\"text\": \"a\"}\n", 16, "$|a$", ""},                              // a byte order mark
        {"{\"text\": null, \"prompt\": \"a\", \"completion\": \"b\"}\n", 16, "a|b$", ""}, // null is absent
        {"{\"prompt\": \"x\", \"completion\": \"b\", \"prompt\": \"a\"}", 16, "a|b$", ""}, // the last wins
        {"{\"prompt\": \"a<|endoftext|>b\", \"completion\": \"c\"}", 16, "a$b|c$", ""},    // the token
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"ab\"}, {\"role\": \"assistant\", \"content\": "
         "\"c\"}, "
         "{\"role\": \"user\", \"content\": \"d\"}, {\"role\": \"assistant\", \"content\": \"ef\"}]}",
         16, "ab$|c$|d$|ef$", ""},
        {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"ab\"}]}", 16, "$|ab$", ""},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"abc\"}, {\"role\": \"assistant\", \"content\": "
         "\"xyz\"}]}",
         4, "$|xyz$", "the beginning cut off"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n{\"text\": \"b\"}", 16, "$|b$",
         "d.jsonl:1: nothing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        expect_data("d.jsonl", cases[i].text, cases[i].seq_len, cases[i].expected);
        Text warnings = read_file(in_tests("warnings"));
        check(*cases[i].warning ? strstr(warnings.data, cases[i].warning) != NULL : warnings.size == 0,
              "%s: warned '%s', expected '%s'", cases[i].text, warnings.data, cases[i].warning);
        free(warnings.data);
    }
}

// The prompt is read but not scored; positions start at 0 for each example.
static void test_jsonl_rows(void) {
    write_text("d.jsonl", "{\"prompt\": \"ab\", \"completion\": \"c\"}\n{\"text\": \"d\"}\n");
    Dataset *data = load_quietly("d.jsonl", 16);
    Batch batch = {0};
    const size_t swapped[] = {1, 0};
    dataset_batch(data, swapped, 0, 2, &batch);
    const int token[] = {258, 67, 64, 65, 66}, position[] = {0, 1, 0, 1, 2},
              target[] = {67, 258, -1, 66, 258};
    check(batch.rows == 5 && batch.sequences == 2 && batch.targets == 4 && batch.first_row[1] == 2 &&
              memcmp(batch.token, token, sizeof token) == 0 &&
              memcmp(batch.position, position, sizeof position) == 0 &&
              memcmp(batch.target, target, sizeof target) == 0 && data->prompts,
          "rows of prompt and completion");
    batch_free(&batch);
    dataset_free(data);
}

static void child_data(void) {
    Tokenizer *tokenizer = tokenizer_load(child_text);
    dataset_load(child_path, tokenizer, 16, tokenizer->vocab_size);
}

// What is no JSONL or no UTF-8 is refused with what to do instead.
static void test_refused_data(void) {
    static const struct {
        const char *name, *text;
        size_t size;
        const char *said;
    } cases[] = {
        {"r.jsonl", "[{\"text\": \"a\"}]", 0, "a JSON array: expected an object a line"},
        {"r.jsonl", "{\n  \"text\": \"a\"\n}", 0, "an object that goes on in the next line"},
        {"r.jsonl", "{\"text\": \"a\",\n\"x\": 1}", 0, "jq -c . '"},
        {"r.jsonl", "{\"instruction\": \"a\", \"output\": \"b\"}", 0,
         "\"instruction\" and \"output\" are not the keys"},
        {"r.jsonl", "{\"prompt\": \"a\", \"completion\": 7}", 0, "is a number: expected a string, \"7\""},
        {"r.jsonl", "{\"prompt\": \"a\", \"completion\": null}", 0, "expected"},
        {"r.jsonl", "{\"prompt\": null, \"completion\": \"b\"}", 0, "expected"},
        {"r.jsonl", "{\"text\": \"a\", \"completion\": \"b\"}", 0,
         "only one of completion, text and messages"},
        {"r.jsonl", "{\"messages\": [{\"role\": \"user\"}]}", 0, "a message is {\"role\":"},
        {"r.jsonl", "{\"messages\": {}}", 0, "\"messages\" must be an array"},
        {"r.jsonl", "{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}", 0,
         "byte 27, line 2; probably ISO-8859-1: iconv -f ISO-8859-1 -t UTF-8"},
        {"r.txt", "\x93quoted\x94", 0, "byte 0, line 1; probably WINDOWS-1252: iconv -f WINDOWS-1252"},
        {"r.txt",
         "\xff\xfe"
         "a\0b\0",
         6, "iconv -f UTF-16LE"},
        {"r.txt", "a\0b\0", 4, "iconv -f UTF-16LE"},
        {"r.txt", "\0a\0b", 4, "iconv -f UTF-16BE"},
        {"r.txt", "ab\ncd \xf0\x9f\x98", 0, "byte 6, line 2"},
    };
    make_inputs();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_file(in_tests(cases[i].name), cases[i].text,
                 cases[i].size ? cases[i].size : strlen(cases[i].text));
        char *path = xstrdup(in_tests(cases[i].name)), *merges = xstrdup(in_tests("merges.txt"));
        child_path = path, child_text = merges;
        expect_death(child_data, cases[i].said, cases[i].text);
        free(path), free(merges);
    }
    write_text("part[1].txt", "ab"); // the name as it stands, though a glob finds the other
    write_text("part1.txt", "xyz");
    Dataset *data = load_quietly("part[1].txt", 16);
    expect_examples(data, "$|ab", "a name with brackets");
    dataset_free(data);
    unlink(in_tests("part[1].txt"));
    data = load_quietly("part[1].txt", 16);
    expect_examples(data, "$|xyz", "a glob with brackets");
    dataset_free(data);
}

static void test_dataset_order(void) {
    enum { COUNT_OF_EXAMPLES = 1003, GROUP = 4 };
    Dataset data = {.count = COUNT_OF_EXAMPLES, .examples = xcalloc(COUNT_OF_EXAMPLES, sizeof(Example))};
    for (size_t i = 0; i < data.count; i++) data.examples[i].size = 2 + (int)(i / 10); // rising
    size_t *orders[4];
    for (int i = 0; i < 4; i++) { // seeds and epochs (1, 0), (1, 0), (1, 1), (2, 0)
        orders[i] = dataset_order(&data, i == 3 ? 2 : 1, i == 2);
        char seen[COUNT_OF_EXAMPLES] = {0};
        size_t twice = 0;
        double rows = 0, squares = 0; // of updates: their mean and variance
        for (size_t j = 0; j < data.count; j++) twice += seen[orders[i][j]]++;
        for (size_t j = 0; j + GROUP <= data.count; j += GROUP) {
            double sum = 0;
            for (size_t k = j; k < j + GROUP; k++) sum += data.examples[orders[i][k]].size;
            rows += sum;
            squares += sum * sum;
        }
        const double updates = COUNT_OF_EXAMPLES / GROUP, mean = rows / updates;
        const double deviation = sqrt(squares / updates - mean * mean);
        check(twice == 0, "%zu examples twice in an epoch", twice);
        // Lengths drawn freely: sqrt(4) · 100 / sqrt(12) = 58 rows of deviation; grouped by length it is 116.
        check(deviation > 50 && deviation < 66, "updates' rows deviate by %.1f from their mean", deviation);
    }
    check(memcmp(orders[0], orders[1], data.count * sizeof(size_t)) == 0,
          "the same seed and epoch, the same order");
    for (int i = 2; i < 4; i++) {
        size_t same = 0;
        for (size_t j = 0; j < data.count; j++) same += orders[0][j] == orders[i][j];
        check(same < 30, "another %s, another order", i == 2 ? "epoch" : "seed");
        check(memcmp(orders[0] + 1000, orders[i] + 1000, 3 * sizeof(size_t)) != 0,
              "others are in the last, smaller group");
    }
    for (int i = 0; i < 4; i++) free(orders[i]);
    free(data.examples);
    // All orders are drawn alike: then one example of ten stands at its own place, on average.
    Dataset ten = {.count = 10};
    int unmoved = 0;
    for (long epoch = 0; epoch < 1000; epoch++) {
        size_t *order = dataset_order(&ten, 3, epoch);
        for (size_t i = 0; i < 10; i++) unmoved += order[i] == i;
        free(order);
    }
    check(abs(unmoved - 1000) < 5 * 32, "%d places unmoved in 1000 orders", unmoved);
}

static void test_shards(void) {
    make_inputs();
    uint16_t shard[512 + 6] = {0};
    int32_t header[3] = {20240520, 1, 6};
    const uint16_t tokens[6] = {258, 1, 2, 258, 3, 4};
    memcpy(shard, header, sizeof header);
    memcpy(shard + 512, tokens, sizeof tokens);
    put_file(in_tests("ids.bin"), shard, sizeof shard);
    Dataset *data = dataset_load(in_tests("ids.bin"), NULL, 3, 259);
    expect_examples(data, "$|\"#$ $|$%", "a shard");
    dataset_free(data);
    const char *words = "$TINY --quiet --out $D/none --train $D/wrong.bin";
    const struct {
        int at, value;
        size_t size;
        const char *error;
    } wrong[] = {{0, 20240521, sizeof shard, "not a token shard"},
                 {1, 2, sizeof shard, "not a token shard"},
                 {2, 7, sizeof shard, "promises 7 tokens, the file has 6"},
                 {2, -6, sizeof shard, "promises -6"},
                 {2, 6, sizeof shard - 2, "the file has 5"},
                 {2, 6, 1000, "not a token shard"},
                 {2, 0, 1024, "no example"},
                 {258, 259 << 16 | 3, sizeof shard, "token 5 is 259"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        memcpy(shard, header, sizeof header);
        memcpy(shard + 512, tokens, sizeof tokens);
        ((int32_t *)shard)[wrong[i].at] = wrong[i].value;
        put_file(in_tests("wrong.bin"), shard, wrong[i].size);
        expect_refusal(1, wrong[i].error, words);
    }
}

// ---- the command line ----

// The files that these command lines name.
static void make_wrong_inputs(void) {
    make_inputs();
    Model *model = model_load(in_tests("model"));
    model->config.n_embd = 8; // does not fit the weights
    model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("narrow"));
    model_free(model);
    Text weights = read_file(in_tests("model/model.safetensors")),
         config = read_file(in_tests("model/config.json"));
    make_folder(in_tests("cut"));
    write_text("cut/config.json", config.data);
    put_file(in_tests("cut/model.safetensors"), weights.data, weights.size / 2);
    free(weights.data);
    free(config.data);
    write_text("bad.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n");
    write_text("other.jsonl", "{\"text\": \"a\"}\n{\"prompt\": \"b\"}\n");
    write_text("d.txt", "abc");
    write_text("half.jsonl", "{\"prompt\": \"a\"}\n");
    make_folder(in_tests("folder.txt"));
    make_folder(in_tests("folder"));
    make_folder(in_tests("halfway"));
    make_folder(in_tests("halfway/checkpoint-000010"));
    make_folder(in_tests("pointer"));
    static const char *const others[] = {"array.json", "table.parquet", "notes.md", "text.txt.gz",
                                         "model.gguf"};
    for (int i = 0; i < 5; i++) write_text(others[i], i == 4 ? "GGUF" : "[1]");
    static const char *const pointers[] = {"pointer.txt", "pointer.bin", "pointer/model.safetensors"};
    for (int i = 0; i < 3; i++)
        write_text(pointers[i], "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n");
    Text kept = read_file(in_tests("model/config.json"));
    write_text("pointer/config.json", kept.data);
    free(kept.data);
}

// What is wrong on the command line or in a file that it names: exit status, part of the one line that is
// said.
static const struct {
    int status;
    const char *error, *words;
} wrong_input[] = {
    {2, "unknown option --lerning-rate; the nearest is --learning-rate, --help lists all",
     "--lerning-rate 1"},
    {2, "unknown option --learning_rate=1; the nearest is --learning-rate,", "--learning_rate=1"},
    {2, "unknown option --batchsize; the nearest is --batch-size,", "--batchsize 3"},
    {2, "unknown option --ferquency-of-printing-things; --help lists all", "--ferquency-of-printing-things"},
    {2, "unknown option --trian; the nearest is --train,", "--trian a.txt"},
    {2, "unknown option --something-else", "--something-else"},
    {2, "unknown option -Z", "-Z"},
    {2, "-train: a name is written with two dashes: --train", "-train $D/text.txt"},
    {2, "-steps=5: a name is written with two dashes: --steps", "-steps=5"},
    {2, "text.txt' is left over: if the shell has made several names of a pattern, quote it: --train '*.txt'",
     "--train $D/short.txt $D/text.txt"},
    {2, ".txt' is left over", "--val $D/*.txt"},
    {2, "unknown option -Z;", "-Z5"},
    {2, "unknown option -Z;", "-yZ"},
    {2, "--quiet takes no value", "--quiet=1"},
    {2, "--resume takes no value", "--resume=1"},
    {2, "'text.txt' is not an option", "text.txt"},
    {2, "--steps needs a value", "--steps"},
    {2, "--steps needs a value", "-x"},
    {2, "--steps needs a value", "-yx"},
    {2, "unknown option --;", "--"},
    {2, "'-' is not an option", "-"},
    {2, "--train is given twice", "--train a.txt --steps 3 -i b.txt"},
    {2, "--stop is given twice", "--generate 1 --stop a --stop b"},
    {2, "--epsilon 0: a number from 1e-30", "--epsilon 0"},
    {2, "--steps 1.5: a whole number from 1", "--steps 1.5"},
    {2, "--steps 0:", "--steps 0"},
    {2, "--steps ten:", "--steps ten"},
    {2, "--steps :", "--steps ''"},
    {2, "--steps 5x:", "-x 5x"},
    {2, "--learning-rate nan:", "--learning-rate nan"},
    {2, "--learning-rate -1:", "--learning-rate -1"},
    {2, "--dropout 1: a number from 0 to 0.99", "--dropout 1"},
    {2, "--top-p 1.1:", "--generate 1 --top-p 1.1"},
    {2, "--beta2 1:", "--beta2 1"},
    {2, "--steps 1e400:", "--steps 1e400"},
    {2, "--keep 0:", "--keep 0"},
    {2, "say one of linear|cosine|constant", "--schedule square"},
    {2, "say one of", "--schedule ''"},
    {2, "say one of", "--schedule 'linear|cosine'"},
    {2, "say one of auto|openblas|builtin", "--matmul mkl"},
    {2, "say one of float32|bfloat16", "--precision float16"},
    {2, "its products are built in", "$TINY --train $D/text.txt --precision bfloat16 --matmul openblas"},
    {2, "--temperature does not apply to training", "--temperature 1"},
    {2, "--eval does not apply to --generate", "--eval --generate 5"},
    {2, "--steps does not apply to --eval", "--eval --val $D/val.txt --steps 3"},
    {2, "--train does not apply to --generate", "--generate 3 --train $D/text.txt"},
    {2, "nothing to train on: say --train FILE", "$TINY --out $D/none"},
    {2, "--eval needs --val FILE", "--eval --init $D/model"},
    {2, "halfway holds checkpoints of an earlier run: --resume goes on with it; or choose another --out",
     "$TINY --train $D/text.txt --out $D/halfway"},
    {2, "--find-rate begins with --init, not with a checkpoint: leave out --resume",
     "$TINY --train $D/text.txt --find-rate --resume"},
    {2, "--find-rate does not apply to --eval", "--eval --val $D/val.txt --find-rate"},
    {1, "none.txt: no such file", "$TINY --train $D/none.txt"},
    {1, "none-*.txt: no such file", "$TINY --train '$D/none-*.txt'"},
    {1, "none/merges.txt: cannot be opened", "--tokenizer $D/none/merges.txt --train $D/text.txt"},
    {1, "none: no such model folder", "--init $D/none --train $D/text.txt"},
    {1, "gpt2: is not here; this downloads it: make gpt2", "--init gpt2 --generate 3"},
    {1, "gpt2-xl: is not here; this downloads it: make gpt2-xl",
     "--init openai-community/gpt2-xl --eval --val $D/val.txt"},
    {1,
     "distilgpt2: is not here; this downloads it: hf download distilbert/distilgpt2 --local-dir distilgpt2",
     "--init distilbert/distilgpt2 --chat"},
    {1, "d5: no such model folder", "--init d5 --train $D/text.txt"},
    {1, "model.safetensors: a file: --init takes the folder that it lies in",
     "--init $D/model/model.safetensors --generate 1"},
    {1, "model.gguf: a file for llama.cpp, which cannot be trained: --init takes the folder",
     "--init $D/model.gguf --generate 1"},
    {1, "folder.txt: has no config.json", "--init $D/folder.txt --generate 1"},
    {1, "halfway: has no model yet, but checkpoints, such as", "--init $D/halfway --generate 1"},
    {1, "pointer/model.safetensors: a pointer of Git LFS, not the file itself: git lfs pull fetches it",
     "--init $D/pointer --generate 1"},
    {1, "pointer.txt: a pointer of Git LFS", "$TINY --train $D/pointer.txt"},
    {1, "pointer.bin: a pointer of Git LFS", "$TINY --train $D/pointer.bin"},
    {1, "folder: a folder: name its files, as in '", "$TINY --train $D/folder"},
    {1, "array.json: a table; this makes examples of it: python3 data/convert.py '",
     "$TINY --train $D/array.json"},
    {1, "table.parquet: a table; this makes examples of it: python3 data/convert.py '",
     "$TINY --train $D/table.parquet"},
    {1, "notes.md: .txt, .jsonl or .bin expected; if it is plain text, give it such a name: cp '",
     "$TINY --train $D/notes.md"},
    {1, "text.txt.gz: packed: gunzip '", "$TINY --train $D/text.txt.gz"},
    {1, "half.jsonl:1: {\"prompt\": \"...\", \"completion\": \"...\"}, {\"text\"",
     "$TINY --train $D/half.jsonl"},
    {1, "cut off", "--init $D/cut --eval --val $D/val.txt"},
    {1, "transformer.wte.weight has shape [259, 16], expected [259, 8]",
     "--init $D/narrow --tokenizer $D/merges.txt --generate 1"},
    {1, "table.csv: a table; this makes examples of it: python3 data/convert.py '",
     "$TINY --train $D/table.csv"},
    {1, "folder.txt: a folder: name its files", "$TINY --train $D/folder.txt"},
    {1, "empty.txt: holds no example", "$TINY --train $D/empty.txt"},
    {1,
     "bad.jsonl:3: not valid JSON at line 1, "
     "column 13",
     "$TINY --train $D/bad.jsonl"},
    {1, "other.jsonl:2: {\"prompt\"", "$TINY --train $D/other.jsonl"},
    {1, "text needs a tokenizer", "--n-layer 1 --n-embd 16 --n-head 2 --matmul builtin --train $D/text.txt"},
    {2, "--seq-len 17: the model has only 16 positions", "$TINY --train $D/text.txt --seq-len 17"},
    {2, "--seq-len 17: the model has only 16 positions",
     "--init $D/model --eval --val $D/val.txt --seq-len 17"},
    {2, "regular expression '('", "$TINY --train $D/text.txt --freeze '('"},
    {2, "regular expression 'a['", "$TINY --train $D/text.txt --no-decay 'a['"},
    {2, "--freeze 'lnf' matches no tensor; near it are",
     "$TINY --train $D/text.txt --freeze wte --freeze lnf"},
    {2, "near it are transformer.h.*.attn.c_attn.weight, transformer.h.*.attn.c_attn.bias.",
     "$TINY --train $D/text.txt --no-decay atn.c_attn"},
    {2, "--freeze leaves nothing to train", "$TINY --train $D/text.txt --freeze ."},
    {2, "--warmup-steps 5x: steps, or a share", "$TINY --train $D/text.txt --warmup-steps 5x"},
    {2, "--epochs 0: less than one update", "$TINY --train $D/text.txt --epochs 0"},
    {1, "too few", "$TINY --train $D/d.txt"},
    {2, "for a random start, not for a model folder", "--init $D/model --n-layer 2 --train $D/text.txt"},
    {1, "n_embd 16 is not a multiple of n_head 3", "$TINY --n-head 3 --train $D/text.txt"},
    {1, "merges.txt: cannot be read: Not a directory", "$TINY --train $D/text.txt --out $D/merges.txt"},
};

static void test_wrong_input(void) {
    make_wrong_inputs();
    uint64_t before = fingerprint(temporary_folder());
    for (size_t i = 0; i < sizeof wrong_input / sizeof *wrong_input; i++) {
        bool trains = strstr(wrong_input[i].words, "$TINY") || strstr(wrong_input[i].words, "--train $D");
        bool elsewhere = trains && !strstr(wrong_input[i].words, "--out"); // ./out may hold a run
        char *words = xprintf("%s%s", wrong_input[i].words, elsewhere ? " --quiet --out $D/never" : "");
        check(!strstr(words, wrong_input[i].error), "'%s' is an echo of %s", wrong_input[i].error, words);
        expect_refusal(wrong_input[i].status, wrong_input[i].error, words);
        free(words);
    }
    check(fingerprint(temporary_folder()) == before, "wrong input changed files");
    Text usage;
    expect_run(2, &usage, "");
    check(count_of(usage.data, "\n") < 12 && strstr(usage.data, "--train FILE") &&
              strstr(usage.data, "--help"),
          "without a word: %s", usage.data);
    free(usage.data);
}

// Are two values of an option the same?
static bool same_option(const Option *option, const Options *a, const Options *b) {
    const char *x = (const char *)a + option->field, *y = (const char *)b + option->field;
    if (option->kind == FLAG) return *x == *y;
    if (option->kind == WORD) return strcmp(*(const char *const *)x, *(const char *const *)y) == 0;
    if (option->kind != LIST) return memcmp(x, y, 8) == 0; // long or double
    const Patterns *p = (const Patterns *)x, *q = (const Patterns *)y;
    bool same = p->size == q->size;
    for (size_t i = 0; same && i < p->size; i++) same = strcmp(p->items[i], q->items[i]) == 0;
    return same;
}

// The letters of the options, and the names that they are short for.
static const char letters[] =
    "e init i train j val o out y resume b batch-size t seq-len x steps l learning-rate u warmup-steps k "
    "schedule "
    "q final-lr c weight-decay v val-every m val-batches s sample-every g sample-tokens n save-every h help ";

// One option: by its name, by its letter, and as a checkpoint remembers it. Nothing else changes.
static void check_option(const Option *option) {
    char value[64] = "a[0-9],b", mode[32] = "", text[256];
    const bool flag = option->kind == FLAG;
    if (option->kind == COUNT) snprintf(value, sizeof value, "%g", option->least + 6);
    if (option->kind == REAL)
        snprintf(value, sizeof value, "%.17g", option->most / 1.37); // takes all its digits
    if (option->kind == CHOICE) snprintf(value, sizeof value, "%s", strrchr(option->argument, '|') + 1);
    if (!(option->modes & TRAIN))
        strcpy(mode, option->modes & EVAL ? "--eval" : option->modes & GENERATE ? "--generate 5" : "--chat");
    Options initial, by_name, by_letter, again;
    set_defaults(&initial);
    snprintf(text, sizeof text, "%s --%s%s%s", mode, option->name, flag ? "" : "=", flag ? "" : value);
    options_from_text(&by_name, text);
    check(!same_option(option, &initial, &by_name), "%s is not taken", text);
    for (const Option *other = option_table; other < option_table + OPTION_COUNT; other++)
        check(!other->name || other == option || strstr(mode, other->name) ||
                  same_option(other, &initial, &by_name),
              "%s changes --%s", text, other->name);
    if (option->letter) {
        char pair[64];
        snprintf(pair, sizeof pair, "%c %s ", option->letter, option->name);
        check(strstr(letters, pair) != NULL, "-%c is not short for --%s", option->letter, option->name);
        snprintf(text, sizeof text, "-%c %s", option->letter, flag ? "" : value);
        options_from_text(&by_letter, text);
        check(same_option(option, &by_name, &by_letter), "-%c is not --%s", option->letter, option->name);
    }
    text[0] = 0;
    Patterns saved = options_to_save(&by_name);
    for (size_t i = 0; i < saved.size; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s ", saved.items[i]);
    options_from_text(&again, text);
    check(same_option(option, option->modes & NOT_SAVED ? &initial : &by_name, &again),
          "--%s remembered as %s", option->name, text);
}

static void test_options(void) {
    Text help;
    make_inputs();
    expect_run(0, &help, "--help");
    size_t with_letter = 0;
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++) {
        if (!option->name) continue;
        char *row = xprintf(" --%s ", option->name);
        check(count_of(help.data, row) >= 1, "--help does not list%s", row);
        free(row);
        check_option(option);
        with_letter += option->letter != 0;
    }
    check(with_letter == count_of(letters, " ") / 2, "%zu options have a letter", with_letter);
    free(help.data);
    Options options;
    options_from_text(&options, "--freeze a --freeze b --no-decay x --no-decay y --steps 3 --steps 4");
    check(options.freeze.size == 2 && options.no_decay.size == 2 && options.steps == 4, "repeated options");
    options_from_text(&options, "--no-decay none");
    check(options.no_decay.size == 0, "--no-decay none");
    options_from_text(&options, "-x7 -y -b5");
    check(options.steps == 7 && options.resume && options.batch_size == 5, "-x7 -y -b5");
}

// On top of what a checkpoint remembers: what is said again replaces it, and is remembered in its place.
static void test_remembered_options(void) {
    Options options;
    make_inputs();
    write_text("state.json",
               "{\"options\": [\"--freeze=a\", \"--freeze=b\", \"--no-decay=x\", \"--steps=3\"]}");
    char *words[] = {"train_gpt2", "--freeze", "c", "--freeze=d", "--steps", "4"};
    parse_options(&options, in_tests("state.json"), 6, words);
    check(options.freeze.size == 2 && strcmp(options.freeze.items[0], "c") == 0 &&
              strcmp(options.freeze.items[1], "d") == 0 && options.no_decay.size == 1 &&
              strcmp(options.no_decay.items[0], "x") == 0 && options.steps == 4,
          "resumed: --freeze has %zu patterns, --no-decay %zu", options.freeze.size, options.no_decay.size);
    Text saved = {0};
    Patterns list = options_to_save(&options);
    for (size_t i = 0; i < list.size; i++) text_append(&saved, list.items[i], strlen(list.items[i]));
    check(strcmp(saved.data, "--steps=4--no-decay=x--freeze=c--freeze=d") == 0, "remembered: %s", saved.data);
    free(saved.data);
    unlink(in_tests("state.json"));
}

// --find-rate begins as training does with the same options, and writes its curve alone: a run in OUT stays as
// it was. A loss that explodes or overflows ends the search, and is no error.
static void test_find_rate(void) {
    static const char common[] =
        "$TINY --train $D/text.txt --dropout 0.1 --freeze wpe --accumulate 2 --quiet";
    Text said, log, curve;
    double rate[2], loss[2], loss_in_training[2];
    int last, fields = 0;
    make_inputs();
    char *words = xprintf(
        "%s --steps 3 --schedule constant --warmup-steps 0 --learning-rate 1e-7 --out $D/searched", common);
    expect_run(0, NULL, words);
    free(words);
    uint64_t before = fingerprint(temporary_folder());
    words = xprintf("%s --find-rate --out $D/searched", common);
    expect_run(0, &said, words);
    free(words);
    check(strstr(said.data, "\nsuggestion, a tenth of that rate: --learning-rate ") != NULL, "it says: %s",
          said.data);
    log = read_file(in_tests("searched/log.csv"));
    curve = read_file(in_tests("searched/find-rate.csv"));
    check(sscanf(curve.data, "step,learning_rate,loss\n1,%lf,%lf\n2,%lf,%lf\n", &rate[0], &loss[0], &rate[1],
                 &loss[1]) == 4 &&
              rate[0] == 1e-7 && fabs(rate[1] / 1e-7 - pow(1e7, 1.0 / 99)) < 1e-6,
          "find-rate.csv: %s", curve.data);
    for (int i = 0; i < 2; i++)
        fields += sscanf(strstr(log.data, i ? "\n2,0" : "\n1,0"), "%*d,%*f,train,%lf", &loss_in_training[i]);
    check(fields == 2 && loss[0] == loss_in_training[0] && loss[1] == loss_in_training[1],
          "losses %.9g %.9g, in training %.9g %.9g", loss[0], loss[1], loss_in_training[0],
          loss_in_training[1]);
    check(unlink(in_tests("searched/find-rate.csv")) == 0 && fingerprint(temporary_folder()) == before,
          "--find-rate writes more than its curve");
    free(said.data), free(log.data), free(curve.data);

    expect_run(0, &said,
               "$TINY --train $D/text.txt --find-rate --weight-decay 1e3 --quiet --out $D/exploded");
    check(strstr(said.data, "stopped after rate ") && strstr(said.data, "the loss has doubled"),
          "it says: %s", said.data);
    curve = read_file(in_tests("exploded/find-rate.csv"));
    last = count_of(curve.data, "\n") - 1;
    check(last > 20 && last < 100, "%d updates before a loss that explodes", last);
    free(said.data), free(curve.data);
    expect_run(0, &said, "$TINY --train $D/text.txt --find-rate --steps 7 --quiet --out $D/exploded");
    curve = read_file(in_tests("exploded/find-rate.csv"));
    check(strstr(curve.data, "\n7,1,") && count_of(curve.data, "\n") == 8, "7 updates: %s", curve.data);
    free(said.data), free(curve.data);
    expect_run(0, NULL,
               "$TINY --train $D/text.txt --steps 1 --quiet --out $D/exploded"); // nothing in its way
}

static void test_plan(void) {
    Text plan;
    make_inputs();
    uint64_t before = fingerprint(temporary_folder());
    expect_run(0, &plan, "$TINY --train $D/text.txt --plan --freeze wpe --steps 40 --out $D/never");
    check(strstr(plan.data, "transformer.wte.weight") && strstr(plan.data, "[259, 16]") &&
              strstr(plan.data, "transformer.h.0.mlp.c_proj.weight") &&
              strstr(plan.data, "parameters 7712, trained 7456,") && strstr(plan.data, "40 updates"),
          "--plan: %s", plan.data);
    check(strstr(plan.data, "freezing saves 0.0 MB") != NULL, "--plan does not say what freezing saves");
    check(fingerprint(temporary_folder()) == before, "--plan writes");
    free(plan.data);
    // A character of several tokens is shown as one, also at the beginning of what is scored.
    write_text("letters.jsonl", "{\"prompt\": \"é\", \"completion\": \"€éx\"}\n");
    expect_run(0, &plan, "$TINY --train $D/letters.jsonl --val-fraction 0 --plan --out $D/never");
    check(strstr(plan.data, "\n  not scored \"é\"\n  scored     \"€\" \"é\" \"x\" \"<|endoftext|>\"\n") !=
              NULL,
          "--plan: the first example's letters: %s", plan.data);
    free(plan.data);
    unlink(in_tests("letters.jsonl"));
    // Without data: batches of whole sequences. Weights of 16 bits stay in their file.
    expect_run(0, &plan, "$TINY --plan --batch-size 3 --seq-len 10 --freeze wpe --out $D/never");
    check(strstr(plan.data, "trained 7456,") && strstr(plan.data, "(30 rows)") &&
              !strstr(plan.data, "updates of") && strstr(plan.data, "\n--train FILE adds"),
          "--plan without --train: %s", plan.data);
    free(plan.data);
    expect_run(0, &plan, "$TINY --train $D/text.txt --plan --steps 40 --out $D/never");
    check(!strstr(plan.data, "freezing"), "--plan: nothing is frozen");
    check(strstr(plan.data, "evaluation every 2, checkpoint every 2\n") != NULL, "--plan: %s", plan.data);
    free(plan.data);
    long updates = 0, an_epoch = 0;
    expect_run(0, &plan, "$TINY --train $D/text.txt --plan --epochs 2.5 --batch-size 3 --out $D/never");
    const char *said = strstr(plan.data, " updates of ");
    while (said && said > plan.data && isdigit((unsigned char)said[-1])) said--;
    check(said && sscanf(said, "%ld updates of 1 x 3 examples, %ld an epoch", &updates, &an_epoch) == 2 &&
              updates == (5 * an_epoch + 1) / 2,
          "--epochs 2.5: %s", plan.data);
    free(plan.data);
    // A block of 128 channels has 198272 parameters; of three blocks, two keep 10 C + NH + 4 floats in 32
    // rows.
    const char *wide = "$TINY --n-layer 3 --n-embd 128 --train $D/text.txt --plan --out $D/never --freeze";
    for (int deep = 0; deep < 2; deep++) {
        char *words = xprintf("%s '%s'", wide, deep ? "h.[01]|w[tp]e" : "h.0");
        const char *saved = deep ? "freezing saves 1.7 MB of gradients, 3.5 of moments, 0.3 of activations"
                                 : "freezing saves 0.8 MB of gradients, 1.6 of moments, 0.0 of activations";
        expect_run(0, &plan, words);
        check(strstr(plan.data, saved) != NULL, "%s: %s", words, plan.data);
        free(plan.data);
        free(words);
    }
}

// The number of warm-up updates, of 200 in all, 80 an epoch.
static void test_warmup(void) {
    static const struct {
        const char *words;
        long steps, warmup;     // of the run; expected
    } cases[] = {{"", 200, 20}, // a random start: 10 %
                 {"--init some-folder", 200, 80},
                 {"--init some-folder", 80, 8}, // no longer than an epoch
                 {"--warmup-steps 7", 200, 7},
                 {"--warmup-steps 2.5%", 200, 5},
                 {"--warmup-steps 1.5ep", 200, 120},
                 {"--warmup-steps 5ep", 200, 200},
                 {"--warmup-steps 0 --init some-folder", 200, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Options options;
        options_from_text(&options, cases[i].words);
        long warmup = warmup_of(&options, cases[i].steps, 80);
        check(warmup == cases[i].warmup, "'%s': %ld updates, should be %ld", cases[i].words, warmup,
              cases[i].warmup);
    }
}

// The rows of the largest batch are those of the longest examples.
static void test_largest_batch(void) {
    Example examples[] = {{.size = 3}, {.size = 9}, {.size = 5}, {.size = 9}, {.size = 2}};
    Dataset data = {.examples = examples, .count = 5};
    static const int rows[] = {8, 16, 20, 22, 23, 23};
    for (int B = 1; B <= 6; B++)
        check(largest_batch(&data, B, 8) == rows[B - 1], "%d examples: %d rows, should be %d", B,
              largest_batch(&data, B, 8), rows[B - 1]);
}

// What freezing skips, against the products counted by hand for two blocks of 16 channels, V = 259: a block's
// matrices have 3072 weights, the head 4144; each has three products.
static void test_skipped_work(void) {
    const double all = 3 * (2 * 3072 + 4144);
    const struct {
        const char *freeze;
        double skipped;
    } cases[] = {{"bias|ln_", 0},
                 {"wpe", 0},
                 {"wte", 4144},
                 {"h.0.mlp.c_fc.weight", 16 * 64},
                 {"h.0", 3072}, // the embeddings below still need the gradient
                 {"h.0|w[tp]e", 4144 + 2 * 3072},
                 {"h.[01]|wte|wpe", 4144 + 4 * 3072}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text plan;
        char *words = xprintf("$TINY --n-layer 2 --train $D/text.txt --plan --out $D/never --freeze '%s'",
                              cases[i].freeze);
        char *share = xprintf("and %.0f %% of the products with weights", 100 * cases[i].skipped / all);
        expect_run(0, &plan, words);
        check(strstr(plan.data, share) != NULL, "--freeze %s: not '%s' in %s", cases[i].freeze, share,
              plan.data);
        free(plan.data);
        free(share);
        free(words);
    }
}

// What is printed between the two goes to the file "stdout" in the tests' folder.
static int begin_capture(void) {
    fflush(stdout);
    int kept = dup(1), file = open(in_tests("stdout"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(file, 1);
    close(file);
    return kept;
}

static Text end_capture(int kept) {
    fflush(stdout);
    dup2(kept, 1);
    close(kept);
    return read_file(in_tests("stdout"));
}

// Text as it streams: half a character waits for its other half, what may become --stop for what follows.
static void test_stream(void) {
    static const char *const parts[] = {"caf", "\xc3", "\xa9 th", "at t", "h"};
    static const char *const shown[] = {"caf", "caf", "caf\xc3\xa9 ", "caf\xc3\xa9 that ",
                                        "caf\xc3\xa9 that th"};
    Text text = {0};
    size_t printed = 0;
    int kept = begin_capture();
    for (int i = 0; i < 5; i++) {
        text_append(&text, parts[i], strlen(parts[i]));
        stream_text(&text, &printed, "the", i == 4);
        Text seen = read_file(in_tests("stdout"));
        check(strcmp(seen.data, shown[i]) == 0, "part %d: '%s', not '%s'", i, seen.data, shown[i]);
        free(seen.data);
    }
    free(end_capture(kept).data);
    free(text.data);
}

// 60 of 100 steps are left, each takes 2 seconds: two minutes.
static void test_time_left(void) {
    Options options;
    options_from_text(&options, "--steps 100");
    Run run = {.options = &options, .step = 40, .steps_per_epoch = 16};
    int kept = begin_capture();
    show_update(&run, &(Update){.loss = 1.25, .norm = 3, .learning_rate = 1e-4, .rows = 198}, 2);
    Text printed = end_capture(kept);
    const char *wanted =
        "step 40/100  loss 1.2500  0:02:00 left  epoch 2.50  lr 1.00e-04  norm 3.000  99 tok/s\n";
    check(strcmp(printed.data, wanted) == 0, "'%s', not '%s'", printed.data, wanted);
    free(printed.data);
}

// The progress line on a terminal of 40 and of 200 columns: one column stays free, what is over is cut, what
// was there before is covered, and no escape sequence is sent.
static void test_progress(void) {
    const char *lines[] = {
        "step 1/9  loss 1.2345  0:00:09 left  epoch 0.10  lr 1.00e-03  norm 1.000  99 tok/s", "step 2/9"};
    for (int columns = 40; columns <= 200; columns += 160) {
        int master = posix_openpt(O_RDWR | O_NOCTTY);
        if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) {
            check(false, "no pseudo-terminal: %s", strerror(errno));
            return;
        }
        int slave = open(ptsname(master), O_RDWR | O_NOCTTY), kept = dup(1);
        struct winsize window = {.ws_col = (unsigned short)columns, .ws_row = 24};
        ioctl(slave, TIOCSWINSZ, &window);
        fflush(stdout);
        dup2(slave, 1);
        for (int i = 0; i < 2; i++) show_progress(lines[i], true);
        end_progress();
        fflush(stdout);
        dup2(kept, 1);
        char got[1024], *expected = xprintf("\r%-*.*s\r%-*.*s\r\n", columns - 1, columns - 1, lines[0],
                                            columns - 1, columns - 1, lines[1]);
        size_t size = 0;
        while (size < strlen(expected)) {
            struct pollfd ready = {master, POLLIN, 0};
            ssize_t more = poll(&ready, 1, 2000) == 1 ? read(master, got + size, sizeof got - 1 - size) : 0;
            if (more <= 0) break;
            size += (size_t)more;
        }
        got[size] = 0;
        check(strcmp(got, expected) == 0, "%d columns: '%s', expected '%s'", columns, got, expected);
        free(expected);
        close(slave);
        close(master);
        close(kept);
    }
}

#if defined(__linux__) && defined(_OPENMP)
enum { MOST_THREADS = 256 };

// The cores that each of this team's threads may run on; returns how many threads there are.
static int read_affinities(cpu_set_t cores[MOST_THREADS]) {
    int threads = 0;
#pragma omp parallel reduction(+ : threads)
    {
        sched_getaffinity(0, sizeof *cores, &cores[omp_get_thread_num()]);
        threads += 1;
    }
    return threads;
}

static void run_on_busy_cores(void) {
    Run run = {0};
    omp_set_num_threads(2);
    for (int i = 0; i < 30; i++) watch_threads(&run, 1, 1.1); // more than half of two cores
    fprintf(stderr, "free\n");
    for (int i = 0; i < 30; i++) watch_threads(&run, 1, 0.9);
    run = (Run){0};
    omp_set_num_threads(8);
    for (int i = 0; i < 10; i++) watch_threads(&run, 1, 3.9);
    run = (Run){0};
    omp_set_num_threads(1);
    for (int i = 0; i < 30; i++) watch_threads(&run, 1, 0.1); // no fewer threads could help
}

// On a busy machine training says, once, that fewer threads may be faster.
static void test_busy_machine(void) {
    Text said = {0};
    check(run_child(run_on_busy_cores, &said) == 0, "a busy machine is no error");
    const char *other = said.data ? strstr(said.data, "8 threads have only 3.9 cores") : NULL;
    check(said.data && strncmp(said.data, "free\n", 5) == 0 && count_of(said.data, "\n") == 3 &&
              strstr(said.data, "2 threads have only 0.9 cores") && strstr(said.data, "--threads 1 may") &&
              other && strstr(other, "--threads 3 may"),
          "on busy cores it says: %s", said.data);
    free(said.data);
}

// As many threads as cores: each gets one of the allowed cores, and no two the same. Otherwise, and when
// OMP_PROC_BIND says what is wanted, all stay as they are.
static void test_pin_threads(void) {
    cpu_set_t allowed, last, own[MOST_THREADS], before[MOST_THREADS];
    const int threads_before = omp_get_max_threads();
    const char *bind = getenv("OMP_PROC_BIND");
    char *kept = bind ? xstrdup(bind) : NULL;
    sched_getaffinity(0, sizeof allowed, &allowed);
    const int cores = CPU_COUNT(&allowed) < MOST_THREADS ? CPU_COUNT(&allowed) : MOST_THREADS - 1;
    int highest = 0;
    for (int core = 0; core < CPU_SETSIZE; core++) highest = CPU_ISSET(core, &allowed) ? core : highest;

    for (int pinned = 0; pinned < 3;
         pinned++) { // bound by the environment; one thread too many; as it should be
        omp_set_num_threads(cores + (pinned == 1));
        pinned == 0 ? setenv("OMP_PROC_BIND", "false", 1) : unsetenv("OMP_PROC_BIND");
        int threads = read_affinities(before);
        pin_threads();
        check(read_affinities(own) == threads && threads == cores + (pinned == 1), "%d threads", threads);
        cpu_set_t together;
        CPU_ZERO(&together);
        for (int i = 0; i < threads; i++) {
            check(pinned == 2 ? CPU_COUNT(&own[i]) == 1 : CPU_EQUAL(&own[i], &before[i]),
                  "case %d: thread %d of %d may run on %d cores", pinned, i, threads, CPU_COUNT(&own[i]));
            CPU_OR(&together, &together, &own[i]);
        }
        check(pinned < 2 || CPU_EQUAL(&together, &allowed), "%d threads on %d of %d cores", threads,
              CPU_COUNT(&together), cores);
#pragma omp parallel
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
    // Only the last core is allowed: that is where one thread goes.
    CPU_ZERO(&last);
    CPU_SET(highest, &last);
    sched_setaffinity(0, sizeof last, &last);
    omp_set_num_threads(1);
    pin_threads();
    sched_getaffinity(0, sizeof *own, &own[0]);
    check(CPU_EQUAL(&own[0], &last), "one thread with one core allowed goes elsewhere");
    sched_setaffinity(0, sizeof allowed, &allowed);
    omp_set_num_threads(threads_before);
    kept ? setenv("OMP_PROC_BIND", kept, 1) : unsetenv("OMP_PROC_BIND");
    free(kept);
}
#endif

// ---- runs ----

typedef struct {
    long step;
    bool val;
    double loss;
} LogLine;

// Reads OUT/log.csv and checks its form: the header, ten columns, each step once and in order, seconds that
// never fall, and at an evaluation the rate of the update before. Returns how many lines. essence (unless
// NULL) gets what must be the same after a resume: all but the timing, and of evaluations all but the rate.
static size_t read_log(const char *out, LogLine lines[500], Text *essence) {
    char *path = xprintf("%s/log.csv", in_tests(out));
    Text text = file_exists(path) ? read_file(path) : (Text){0};
    const char *header =
        "step,epoch,split,loss,accuracy,learning_rate,grad_norm,tokens_per_second,seconds,exact_match\n";
    bool whole = text.data && strncmp(text.data, header, strlen(header)) == 0;
    size_t count = 0;
    long trained = 0, evaluated = -1;
    double seconds = 0;
    const char *rate = "0"; // of the last update
    for (char *at = text.data + strlen(header), *line;
         whole && (line = strsep(&at, "\n")) && *line && count < 500;) {
        char *rest = line, *field, *fields[16] = {0};
        int n = 0;
        while (n < 16 && (field = strsep(&rest, ","))) fields[n++] = field;
        LogLine *l = &lines[count++];
        whole = n == 10 && (strcmp(fields[2], "val") == 0 || strcmp(fields[2], "train") == 0);
        if (!whole) break;
        *l = (LogLine){atol(fields[0]), fields[2][0] == 'v', atof(fields[3])};
        whole = l->val ? l->step > evaluated && l->step == trained && !*fields[6] : l->step == trained + 1;
        whole = whole && atof(fields[8]) >= seconds && (!l->val || strcmp(fields[5], rate) == 0);
        seconds = atof(fields[8]);
        if (!l->val) rate = fields[5];
        *(l->val ? &evaluated : &trained) = l->step;
        for (int i = 0; i < (l->val ? 6 : 8) && essence; i++) { // the last of them is the exact match
            const char *kept = fields[i == (l->val ? 5 : 7) ? 9 : i];
            text_append(essence, kept, strlen(kept));
            text_append(essence, " ", 1);
        }
    }
    check(whole, "%s is not as it should be after %zu lines", path, count);
    free(path);
    free(text.data);
    return count;
}

// A model folder without tokenizer files works with token shards, and --generate says what is missing.
static void test_without_tokenizer(void) {
    make_inputs();
    Model *model = model_load(in_tests("model"));
    model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("bare"));
    model_free(model);
    uint16_t shard[512 + 200] = {0};
    const int32_t header[3] = {20240520, 1, 200};
    memcpy(shard, header, sizeof header);
    for (int i = 0; i < 200; i++) shard[512 + i] = (uint16_t)(i % 7);
    put_file(in_tests("sevens.bin"), shard, sizeof shard);
    expect_run(0, NULL,
               "--init $D/bare --train $D/sevens.bin --steps 2 --matmul builtin --quiet --out $D/bare-run "
               "--sample-every 1");
    expect_run(0, NULL, "--resume --steps 3 --quiet --out $D/bare-run");
    Text printed;
    expect_run(0, &printed, "--init $D/bare-run --eval --val $D/sevens.bin --matmul builtin");
    check(strstr(printed.data, "of 199 tokens  in ") && strstr(printed.data, "/sevens.bin\n"), "--eval: %s",
          printed.data);
    free(printed.data);
    char *missing = xprintf("%s: has no tokenizer (vocab.json and merges.txt); say --tokenizer FOLDER",
                            in_tests("bare-run"));
    expect_refusal(1, missing, "--init $D/bare-run --generate 3 --matmul builtin");
    expect_refusal(1, "text needs a tokenizer",
                   "--init $D/bare-run --eval --val $D/val.txt --matmul builtin");
    free(missing);
}

// Loss, accuracy and exact match against what the logits of each example alone give: nine examples, of which
// every third says what the model would, the next ones are random from their first scored row on, and the
// others end otherwise. With --val-batches 3 only the first six count.
static void test_evaluate(void) {
    enum { V = 11, COUNT_OF_EXAMPLES = 9, SIZE = 9 };
    Model *model = tiny_model(tiny_config(V, 40, 2, 2, 8, 32, true), 12, NULL);
    Source source = {0};
    Example examples[COUNT_OF_EXAMPLES];
    for (int e = 0; e < COUNT_OF_EXAMPLES; e++) {
        Ids prompt = {0}, greedy = {0};
        const int P = e % 2 ? 1 : 3; // tokens of the prompt
        for (int i = 0; i < P; i++) ids_push(&prompt, (int)(random_bits((uint64_t)e, (uint64_t)i) % V));
        generate_slowly(model, &prompt, SIZE - P, 1, &greedy);
        examples[e] = (Example){0, source.ids.size, SIZE, SIZE - P};
        for (int i = 0; i < P; i++) ids_push(&source.ids, ~prompt.data[i]); // not scored
        for (int i = 0; i < SIZE - P; i++) {
            bool other = e % 3 == 1 || (e % 3 == 2 && i == SIZE - P - 1);
            int shift = other ? 1 + (int)(random_bits((uint64_t)e, 50 + (uint64_t)i) % (V - 1)) : 0;
            ids_push(&source.ids, (greedy.data[i] + shift) % V);
        }
        free(prompt.data), free(greedy.data);
    }
    Dataset data = {.sources = &source, .examples = examples, .source_count = 1, .count = COUNT_OF_EXAMPLES};
    Batch batch = {0};
    Options options;
    options_from_text(&options, "--batch-size 2");
    Run run = {.options = &options, .model = model, .val = &data};
    double loss = 0;
    size_t targets = 0, correct = 0, exact = 0;
    for (size_t e = 0; e < COUNT_OF_EXAMPLES; e++) {
        size_t right = 0;
        dataset_batch(&data, NULL, e, 1, &batch);
        float *logits = logits_of(model, &batch);
        double *exactly = doubles(logits, (size_t)batch.rows * V);
        for (int r = 0; r < batch.rows; r++) {
            if (batch.target[r] < 0) continue;
            targets++;
            right += is_highest(logits + r * V, batch.target[r], V);
            loss += oracle_cross_entropy(exactly + r * V, batch.target[r], V);
        }
        correct += right;
        exact += right == (size_t)examples[e].targets;
        free(logits), free(exactly);
        if (e != 5 && e != 8) continue;
        options.val_batches = e == 5 ? 3 : 0;
        Evaluation result = evaluate(&run);
        check(fabs(result.loss - loss / (double)targets) < 1e-5, "loss %g, should be %g", result.loss,
              loss / (double)targets);
        check(result.accuracy == (double)correct / (double)targets && result.targets == targets,
              "accuracy %g of %zu, should be %zu of %zu", result.accuracy, result.targets, correct, targets);
        check(exact == (e + 1) / 3 && result.exact == (double)exact / (double)(e + 1) &&
                  result.examples == e + 1,
              "exact match %g of %zu, should be %zu of %zu", result.exact, result.examples, exact, e + 1);
    }
    free(source.ids.data);
    batch_free(&batch);
    activations_free(&run.activations);
    model_free(model);
}

// Weights in other formats: one line with the command that converts them.
static void test_other_formats(void) {
    static const char *const names[] = {"llmc.bin", "torch/pytorch_model.bin",
                                        "torches/pytorch_model.bin.index.json",
                                        "sharded/model.safetensors.index.json"};
    make_inputs();
    for (int i = 0; i < 4; i++) {
        char *init = xstrdup(names[i]);
        if (i > 0) {
            *strchr(init, '/') = 0;
            make_folder(in_tests(init));
        }
        write_text(names[i], "{}");
        char *command = xprintf("python3 data/convert.py %s FOLDER", in_tests(init));
        static const char *const ways[] = {"--generate 1", "--eval --val $D/val.txt",
                                           "--train $D/text.txt --out $D/never"};
        for (int way = 0; way < 3; way++) {
            char *words = xprintf("--init $D/%s %s", init, ways[way]);
            expect_refusal(1, command, words);
            free(words);
        }
        free(command);
        free(init);
    }
    make_folder(in_tests("both")); // one that holds both is a model folder
    Model *model = model_load(in_tests("model"));
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests("both"));
    tokenizer_free(tokenizer);
    model_free(model);
    write_text("both/pytorch_model.bin", "");
    expect_run(0, NULL, "--init $D/both --generate 1 --matmul builtin");
}

// Any piece of a sample's text as --stop: each sample ends before the first place where its own text has it,
// and what the prompt says does not count. Pieces begin and end inside tokens, and span several.
static void test_stop(void) {
    enum { S = 3, COUNT = 60 };
    make_inputs();
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = tiny_model(tiny_config(tokenizer->vocab_size, 100, 2, 2, 8, 32, true), 3, NULL);
    for (size_t i = 0; i < 8; i++) // 259 tokens: the first ones are plain characters, make others rare
        for (int v = 110; v < tokenizer->vocab_size - 4; v++)
            model_tensor(model, WTE, 0)->value[v * 8 + i] = 0;
    Ids prompt = {0};
    Sample whole[S] = {0};
    tokenizer_encode(tokenizer, &prompt, "the cat", 7);
    generate(model, tokenizer, &prompt, COUNT, S, &(Ids){0}, &(Sampling){1, 0, 1, 1, NULL, 1, false}, whole);
    int shortened = 0;
    for (int n = 0; n < 24; n++) {
        char stop[8] = "the cat";
        int length = 1 + n % 5;
        const Text *from = &whole[n % S].text;
        if (n > 0) snprintf(stop, sizeof stop, "%.*s", length, from->data + from->size / 2 + (size_t)n / 3);
        if (stop[0] == 0) continue;
        Sample ended[S] = {0};
        generate(model, tokenizer, &prompt, COUNT, S, &(Ids){0}, &(Sampling){1, 0, 1, 1, stop, 1, false},
                 ended);
        for (int s = 0; s < S; s++) {
            size_t wanted = 0, size = whole[s].text.size, stop_size = strlen(stop);
            while (wanted + stop_size <= size && memcmp(whole[s].text.data + wanted, stop, stop_size) != 0)
                wanted++;
            bool found = wanted + stop_size <= size;
            wanted = found ? wanted : size;
            shortened += found;
            check(ended[s].text.size == wanted && memcmp(ended[s].text.data, whole[s].text.data, wanted) == 0,
                  "'%s': sample %d has %zu bytes, not %zu", stop, s, ended[s].text.size, wanted);
            sample_free(&ended[s]);
        }
    }
    check(shortened > 24 && shortened < 24 * S, "%d samples ended early", shortened);
    for (int s = 0; s < S; s++) sample_free(&whole[s]);
    free(prompt.data);
    tokenizer_free(tokenizer);
    model_free(model);
}

// Trains, once, the model that the tests of runs look at: 30 updates and 4 evaluations in D/run. Returns what
// was printed then.
static const char *make_run(void) {
    static Text printed;
    make_inputs();
    if (!printed.data)
        expect_run(0, &printed,
                   "$TINY --train $D/text.txt --val $D/val.txt --steps 30 --val-every 10 --out $D/run");
    return printed.data;
}

static void test_run(void) {
    LogLine lines[500];
    Text printed;
    const char *progress = make_run();
    size_t count = read_log("run", lines, NULL);
    check(count == 34 && lines[33].val && lines[33].step == 30 && lines[1].loss > 5,
          "30 updates, 4 evaluations");
    check(lines[33].loss < 0.75 * lines[0].loss, "loss %g -> %g", lines[0].loss, lines[33].loss);
    check(count_of(progress, " tok/s\n") == 30 && count_of(progress, ":00 left") > 0, "a line a step: %s",
          progress);
    check(strstr(progress, "tok/s") && strstr(progress, "val loss") && !strchr(progress, '\r') &&
              !strchr(progress, '\033'),
          "progress in a pipe is plain lines: %s", progress);
    check(same_files("run/model.safetensors", "run/checkpoint-000030/model.safetensors"),
          "the result is the last state");
    expect_run(0, &printed, "--init $D/run --eval --val $D/val.txt --batch-size 2 --matmul builtin --quiet");
    double loss = NAN;
    check(sscanf(printed.data, "loss %lf perplexity", &loss) == 1 && fabs(loss - lines[33].loss) < 2e-6,
          "--eval: %s, the log's last line: %g", printed.data, lines[33].loss);
    free(printed.data);
    expect_run(0, &printed, "$TINY --train $D/text.txt --val-fraction 0 --steps 200 --out $D/forty");
    check(count_of(printed.data, " tok/s\n") == 40, "%zu lines of progress for 200 steps",
          count_of(printed.data, " tok/s\n"));
    free(printed.data);
    write_text("mixed.jsonl", "{\"text\": \"the cat saw the bird\"}\n{\"text\": \"\"}\n{\"text\": \"a\"}\n");
    expect_run(0, &printed, "--init $D/run --eval --val $D/mixed.jsonl --seq-len 5 --matmul builtin");
    check(strstr(printed.data, "mixed.jsonl (of 1 the end was cut off, of 0 the beginning; 1 skipped)\n") !=
              NULL,
          "--eval: %s", printed.data);
    free(printed.data);
    expect_run(0, &printed,
               "$TINY --train $D/text.txt --val $D/val.txt --steps 4 --val-every 4 --out $D/quiet --quiet "
               "--sample-every 2");
    check(!strstr(printed.data, "tok/s") && !strstr(printed.data, "machine") &&
              strstr(printed.data, "sample at step 2"),
          "--quiet prints: %s", printed.data);
    free(printed.data);
}

static void test_freeze_and_overfit(void) {
    Text printed;
    make_run();
    expect_run(0, NULL,
               "--init $D/run --train $D/text.txt --steps 3 --save-every 3 --freeze wte --val-fraction 0 "
               "--out $D/frozen --quiet --matmul builtin");
    Model *before = model_load(in_tests("run")), *after = model_load(in_tests("frozen"));
    for (int i = 0; i < before->tensor_count; i++) {
        const Tensor *t = &before->tensors[i];
        bool same = memcmp(t->value, after->tensors[i].value, t->size * sizeof(float)) == 0;
        check(same == (i == WTE), "--freeze wte: %s %s", t->name, same ? "stayed" : "moved");
    }
    model_free(before);
    model_free(after);

    expect_run(0, &printed,
               "--overfit $TINY --train $D/text.txt --steps 150 --val-every 150 --out $D/over --quiet");
    check(strstr(printed.data, "training accuracy 100.00 %") != NULL, "--overfit: %s", printed.data);
    check(!file_exists(in_tests("over/model.safetensors")), "--overfit saves a model");
    free(printed.data);
    expect_run(1, NULL, "--overfit $TINY --train $D/text.txt --steps 2 --out $D/over --quiet");
    expect_run(0, NULL,
               "$TINY --train $D/short.txt --batch-size 1048576 --accumulate 65536 --steps 1 --out $D/huge");
}

// --stop, streamed: pieces of the text that a seed gives; at last the text's end with more behind it, which
// is held back until the last token.
static void expect_stops(const Text *all, const char *seed) {
    int stops = 0;
    for (size_t n = 0; n <= 40; n += 4) {
        char stop[5] = "";
        const char *from = all->data + (n < 40 ? 7 + n : all->size - 3);
        for (int i = 0; i < (n < 40 ? 4 : 2) && isprint((unsigned char)from[i]) && from[i] != '\''; i++)
            stop[i] = from[i];
        if (n == 40) strcat(stop, "~~");
        const char *found = strstr(all->data + 7, stop);
        Text stopped;
        char *line = xprintf("--init $D/run --generate 60 --prompt 'the cat' --matmul builtin %s --stop '%s'",
                             seed, stop);
        expect_run(0, &stopped, line);
        char *wanted =
            found && stop[0] ? xprintf("%.*s\n", (int)(found - all->data), all->data) : xstrdup(all->data);
        check(strcmp(stopped.data, wanted) == 0, "--stop '%s': %s, not %s", stop, stopped.data, wanted);
        stops += strcmp(wanted, all->data) != 0;
        free(line), free(wanted), free(stopped.data);
    }
    check(stops >= 5, "--stop ended %d of 11 texts", stops);
}

// Without a prompt text begins behind the end of a text, as a document does; behind another token this model
// goes on otherwise.
static void test_no_prompt(void) {
    make_inputs();
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = tiny_model(tiny_config(tokenizer->vocab_size, 30, 2, 2, 8, 32, true), 3, NULL);
    model_save(model, NULL, &(KeptFiles){0}, NULL, in_tests("lively"));
    Text printed;
    expect_run(0, &printed,
               "--init $D/lively --tokenizer $D/merges.txt --generate 20 --temperature 0 --matmul builtin");
    for (int other = 0; other < 2; other++) {
        Ids prompt = {0};
        Sample sample = {0};
        ids_push(&prompt, other ? 0 : tokenizer->end_of_text);
        int kept = begin_capture();
        generate(model, tokenizer, &prompt, 20, 1, &(Ids){0}, &(Sampling){0, 0, 1, 1, NULL, 1, false},
                 &sample);
        free(end_capture(kept).data);
        bool same = printed.size == sample.text.size + 1 &&
                    memcmp(printed.data, sample.text.data, sample.text.size) == 0;
        check(same == !other, "without a prompt: %s; behind %d: %s", printed.data, prompt.data[0],
              sample.text.data);
        free(prompt.data);
        sample_free(&sample);
    }
    free(printed.data);
    tokenizer_free(tokenizer);
    model_free(model);
}

static void test_generate(void) {
    static const char *const variants[] = {"--seed 1",
                                           "--seed 1",
                                           "--seed 2",
                                           "--temperature 0 --seed 1",
                                           "--temperature 0 --seed 2",
                                           "--top-k 1 --seed 3",
                                           "--top-p 0 --seed 4"};
    Text texts[7], printed, again;
    make_run();
    for (int i = 0; i < 7; i++) {
        char *words =
            xprintf("--init $D/run --generate 60 --prompt 'the cat' --matmul builtin %s", variants[i]);
        expect_run(0, &texts[i], words);
        check(strncmp(texts[i].data, "the cat", 7) == 0 && texts[i].data[texts[i].size - 1] == '\n',
              "--generate starts with the prompt, ends a line: %s", texts[i].data);
        free(words);
    }
    check(strcmp(texts[0].data, texts[1].data) == 0, "the same seed, the same text");
    check(strcmp(texts[0].data, texts[2].data) != 0 && strcmp(texts[0].data, texts[3].data) != 0,
          "another seed");
    for (int i = 4; i < 7; i++)
        check(strcmp(texts[3].data, texts[i].data) == 0, "%s is not greedy", variants[i]);
    expect_stops(&texts[0], variants[0]);
    for (int i = 0; i < 7; i++) free(texts[i].data);
    expect_run(0, &printed, "--init $D/run --generate 9 --prompt a --samples 3 --matmul builtin");
    check(count_of(printed.data, "<|endoftext|>\n") == 2 && printed.data[0] == 'a', "--samples 3: %s",
          printed.data);
    free(printed.data);
    // Everything but --prompt - has no standard input; here a pipe gives the prompt.
    char *words = xprintf(
        "--help >/dev/null; printf 'the hat\\n' | '%s' --trainer --init $D/run --generate 9 --prompt - "
        "--temperature 0 --matmul builtin; true",
        self_path);
    expect_run(0, &printed, words);
    expect_run(0, &again, "--init $D/run --generate 9 --prompt 'the hat\n' --temperature 0 --matmul builtin");
    check(strcmp(printed.data, again.data) == 0 && again.size > 10, "--prompt -: %s, not %s", printed.data,
          again.data);
    free(words);
    free(printed.data);
    free(again.data);
}

// Runs `'test_gpt2' --trainer ARGUMENTS`, in words of a shell that may redirect its streams, for at most 60
// seconds. Its exit status; what it left in $D/said is returned.
static int __attribute__((format(printf, 2, 3))) run_shell(Text *said, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char *words = NULL;
    if (vasprintf(&words, format, arguments) < 0) die("out of memory");
    va_end(arguments);
    setenv("T", self_path, 1);
    put_file(in_tests("said"), "", 0);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        execl("/bin/sh", "sh", "-c", words, (char *)NULL);
        _exit(127);
    }
    int status = wait_for(child);
    free(words);
    *said = read_file(in_tests("said"));
    return status;
}

// A model in D/talker that never ends a text by itself when it is greedy, with a context of P tokens.
static Model *make_talker(int P) {
    make_inputs();
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = tiny_model(tiny_config(tokenizer->vocab_size, P, 2, 2, 8, 32, true), 3, NULL);
    for (size_t i = 0; i < 8; i++)
        model_tensor(model, WTE, 0)->value[(size_t)tokenizer->end_of_text * 8 + i] = 0;
    model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests("talker"));
    tokenizer_free(tokenizer);
    return model;
}

// --chat in a pipe: each answer is what greedy generation gives behind the whole talk, turns joined by the end of
// text; after /reset behind the new turn alone. A full context is said in one line.
static void test_talk(void) {
    static const char *const turns[] = {"the cat", "a dog?", "/reset", "the cat", "", "the bird", "a mat."};
    Model *model = make_talker(60);
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Text wanted = {0}, printed;
    Ids talk = {0};
    for (int i = 0; i < 7; i++) {
        if (turns[i][0] == '/') talk.size = 0;
        if (turns[i][0] == '/' || !turns[i][0]) continue;
        Ids answer = {0};
        tokenizer_encode(tokenizer, &talk, turns[i], strlen(turns[i]));
        ids_push(&talk, tokenizer->end_of_text);
        generate_slowly(model, &talk, 8, 1, &answer);
        for (size_t n = 0; n < answer.size; n++) {
            ids_push(&talk, answer.data[n]);
            tokenizer_decode(tokenizer, &wanted, answer.data[n]);
        }
        ids_push(&talk, tokenizer->end_of_text);
        text_append(&wanted, "\n", 1);
        free(answer.data);
    }
    const char *chat = "--chat --init $D/talker --generate 8 --temperature 0 --matmul builtin";
    char *words = xprintf("$T --trainer %s >$D/answers 2>$D/said", chat);
    int status =
        run_shell(&printed, "printf 'the cat\n\na dog?\r\n/reset\nthe cat\nthe bird\na mat.' | %s", words);
    Text answers = read_file(in_tests("answers"));
    check(status == 0 && printed.size == 0, "--chat: status %d, %s", status, printed.data);
    check(answers.size == wanted.size && memcmp(answers.data, wanted.data, wanted.size) == 0,
          "--chat answers %s, not %s", answers.data, wanted.data);
    free(printed.data), free(answers.data);
    status = run_shell(&printed, "printf 'the cat sat\nthe dog\nthe cat met the bird\na\n' | %s", words);
    check(status == 0 && one_error_line(&printed, "the context of 60 tokens is full: the oldest "),
          "a talk over 60 tokens: status %d, %s", status, printed.data);
    free(printed.data), free(words), free(wanted.data), free(talk.data);
    expect_refusal(2, "--generate 60: a context of 60 tokens has no room",
                   "--chat --init $D/talker --generate 60");
    expect_refusal(2, "--samples does not apply to --chat", "--chat --init $D/talker --samples 2");
    tokenizer_free(tokenizer);
    model_free(model);
}

// Which turns a full context of 100 tokens forgets: so many that half of it and an answer of 20 fit, of the newest
// turn at most the beginning. Rows: where turns begin, tokens of the talk, tokens that stay, where what stays begins.
static void test_talk_room(void) {
    static const struct {
        int begins[4], turns, size, left, first, stay;
    } cases[] = {
        {{0, 20, 45, 70}, 4, 80, 80, 0, 4}, // fits
        {{0, 20, 45, 70}, 4, 90, 45, 0, 2}, // 70 and the answer would fit, but are more than half
        {{0, 60}, 2, 95, 35, 0, 1},         // all but the newest turn
        {{0, 10}, 2, 95, 80, 80, 0},        // the newest turn is too long alone: its beginning goes
        {{15, 30, 60}, 3, 100, 40, 0, 1},   // what is left of an older turn goes as well
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Talk talk = {.cache = {.positions = 100, .past = 7}};
        for (int t = 0; t < cases[i].size; t++) ids_push(&talk.ids, t);
        for (int t = 0; t < cases[i].turns; t++) ids_push(&talk.begins, cases[i].begins[t]);
        int kept = dup(2), quiet = open("/dev/null", O_WRONLY);
        dup2(quiet, 2);
        talk_make_room(&talk, 20);
        dup2(kept, 2);
        close(kept);
        close(quiet);
        const int left = (int)talk.ids.size, begin = talk.begins.size ? talk.begins.data[0] : left;
        check(left == cases[i].left && talk.ids.data[0] == cases[i].size - left, "case %zu: %d tokens stay",
              i, left);
        check((int)talk.begins.size == cases[i].stay && begin == cases[i].first,
              "case %zu: %zu turns stay, from %d on", i, talk.begins.size, begin);
        check(talk.cache.past == (left < cases[i].size ? 0 : 7), "case %zu: %d keys stay", i,
              talk.cache.past);
        free(talk.ids.data), free(talk.begins.data);
    }
}

// A program on a pseudo-terminal that is its controlling one, so that a typed ^C becomes a signal.
typedef struct {
    int master;
    pid_t child;
    Text seen;
} Session;

// Reads until the terminal shows `text` (behind what was waited for before); false: it does not in 20 seconds.
static bool shows(Session *session, const char *text) {
    char buffer[4096];
    for (double end = now() + 20; now() < end;) {
        const char *found = session->seen.data ? strstr(session->seen.data, text) : NULL;
        if (found) {
            size_t rest = session->seen.size - (size_t)(found + strlen(text) - session->seen.data);
            memmove(session->seen.data, found + strlen(text), rest + 1);
            session->seen.size = rest;
            return true;
        }
        struct pollfd ready = {session->master, POLLIN, 0};
        ssize_t more = poll(&ready, 1, 1000) == 1 ? read(session->master, buffer, sizeof buffer) : 0;
        if (more < 0) return false; // the program has ended
        for (ssize_t i = 0; i < more; i++)
            if (buffer[i]) text_append(&session->seen, buffer + i, 1);
    }
    return false;
}

static void type(const Session *session, const char *keys) {
    check(write(session->master, keys, strlen(keys)) == (ssize_t)strlen(keys), "typing: %s", strerror(errno));
}

static Session start_session(const char *words) {
    Session session = {.master = posix_openpt(O_RDWR | O_NOCTTY)};
    if (session.master < 0 || grantpt(session.master) != 0 || unlockpt(session.master) != 0)
        die("no pseudo-terminal: %s", strerror(errno));
    char *name = xstrdup(ptsname(session.master)), *command = xprintf("exec $T --trainer %s", words);
    setenv("T", self_path, 1);
    fflush(stdout);
    session.child = fork();
    if (session.child == 0) {
        setsid();
        int terminal =
            open(name, O_RDWR); // becomes the controlling one on Linux; elsewhere the next line does it
        ioctl(terminal, TIOCSCTTY, 0);
        for (int i = 0; i < 3; i++) dup2(terminal, i);
        signal(SIGINT, SIG_DFL);
        alarm(60);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    free(name), free(command);
    return session;
}

// --chat on a terminal: a prompt, the terminal's own editing (a typed backspace), ^C that ends an answer and not the
// program, ^D that ends it; and ^C at the prompt, which does too.
static void test_talk_on_terminal(void) {
    model_free(make_talker(200000));
    const char *words = "--chat --init $D/talker --generate 190000 --temperature 0 --matmul builtin";
    for (int way = 0; way < 2; way++) {
        Session session = start_session(words);
        check(shows(&session, "/reset") && shows(&session, "> "), "no prompt: %s",
              session.seen.data ? session.seen.data : "");
        for (int turn = 0; turn < 2; turn++) {
            type(&session, turn ? "/resex\177t\nthe cat\n" : "the cats\177\n");
            check(shows(&session, "\r\n") && (!turn || shows(&session, "> ")), "no echo: %s",
                  session.seen.data);
            usleep(100000);
            type(&session, "\3");
            check(shows(&session, "\r\n> "), "^C does not end an answer: %.200s", session.seen.data);
        }
        type(&session, way ? "the\3" : "\4");
        shows(&session, "\1"); // which it never does: reads to the end
        int status = wait_for(session.child);
        check(status == (way ? 128 + SIGINT : 0), "%s: status %d, %s", way ? "^C" : "^D", status,
              session.seen.data ? session.seen.data : "");
        close(session.master);
        free(session.seen.data);
    }
}

// A signal ends an answer also while nobody reads it: the write that it interrupts goes on, and nothing is lost.
static void test_talk_unread(void) {
    int in[2], out[2], before = -1, waiting = 0;
    const char *command = "exec $T --trainer --chat --init $D/talker --generate 190000 --temperature 0";
    char buffer[4096], last = 0;
    model_free(make_talker(200000));
    setenv("T", self_path, 1);
    if (pipe(in) != 0 || pipe(out) != 0) die("no pipe: %s", strerror(errno));
#ifdef F_SETPIPE_SZ
    fcntl(out[1], F_SETPIPE_SZ, 4096);
#endif
    pid_t child = fork();
    if (child == 0) {
        dup2(in[0], 0), dup2(out[1], 1);
        signal(SIGINT, SIG_DFL); // a shell's background jobs ignore it
        close(in[0]), close(in[1]), close(out[0]), close(out[1]);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(in[0]), close(out[1]);
    check(write(in[1], "the cat\n", 8) == 8, "no turn: %s", strerror(errno));
    close(in[1]);
    for (int same = 0; same < 5; same = waiting && waiting == before ? same + 1 : 0, before = waiting) {
        usleep(20000); // until the pipe is full, when for 100 ms nothing comes
        ioctl(out[0], FIONREAD, &waiting);
    }
    kill(child, SIGINT);
    usleep(100000); // else the pipe may have room again before the signal arrives
    for (ssize_t size; (size = read(out[0], buffer, sizeof buffer)) > 0;) last = buffer[size - 1];
    int status = wait_for(child);
    check(status == 0 && last == '\n', "status %d, the last character is %d", status, last);
    close(out[0]);
}

// Prompts from a file, one a line, as one after the other; --answer-only leaves the prompt out.
static void test_prompts(void) {
    make_run();
    Text one, all, wanted = {0};
    static const char *const prompts[] = {"the cat", "", "a dog met"};
    write_text("prompts.txt", "\xef\xbb\xbfthe cat\n\na dog met\r\n");
    const char *words = "--init $D/run --generate 12 --temperature 0 --matmul builtin --answer-only";
    for (int i = 0; i < 3; i++) {
        char *line = xprintf("%s --prompt '%s'", words, prompts[i]);
        expect_run(0, &one, line);
        text_append(&wanted, one.data, one.size);
        free(line), free(one.data);
    }
    expect_run(0, &one, "--init $D/run --generate 12 --temperature 0 --matmul builtin --prompt 'the cat'");
    check(strncmp(one.data, "the cat", 7) == 0 && strncmp(one.data + 7, wanted.data, one.size - 7) == 0,
          "--answer-only: %s is not the end of %s", wanted.data, one.data);
    free(one.data);
    expect_run(0, &all, path_of("%s --prompts $D/prompts.txt", words));
    check(all.size == wanted.size && memcmp(all.data, wanted.data, all.size) == 0, "--prompts: %s, not %s",
          all.data, wanted.data);
    free(all.data), free(wanted.data);
    expect_run(0, &all, path_of("%s --prompts $D/prompts.txt --samples 2", words));
    check(count_of(all.data, "<|endoftext|>\n") == 5, "3 prompts, 2 samples each: %s", all.data);
    free(all.data);
    expect_refusal(2, "not both", "--init $D/run --generate 3 --prompt a --prompts $D/prompts.txt");
}

// Trains, once, D/asked: it answers the four questions of asked.jsonl by heart. Returns what was printed then.
static const char *make_asked(void) {
    static Text printed;
    make_inputs();
    if (printed.data) return printed.data;
    write_text(
        "asked.jsonl",
        "{\"prompt\": \"a\", \"completion\": \" cat\"}\n{\"prompt\": \"b\", \"completion\": \" the \"}\n"
        "{\"prompt\": \"c\", \"completion\": \"\\n\\\"d\\\"\"}\n"
        "{\"messages\": [{\"role\": \"user\", \"content\": \"f\"}, {\"role\": \"assistant\", \"content\": "
        "\"g\"}]}\n");
    write_text("others.jsonl", "{\"prompt\": \"a\", \"completion\": \" cut\"}\n{\"prompt\": \"c\", "
                               "\"completion\": \"\\n\\\"d\\\"\"}\n"
                               "{\"text\": \"cat\"}\n");
    expect_run(
        0, &printed,
        "$TINY --train $D/asked.jsonl --val $D/asked.jsonl --val $D/others.jsonl --steps 200 --val-every 200 "
        "--sample-every 100 --sample-tokens 9 --schedule constant --quiet --out $D/asked");
    return printed.data;
}

// --eval with several --val: a row for each, as alone, and one for all. In training they count together, and exact
// match stands in log.csv. --sample-every shows a held-out prompt with both answers.
static void test_several_val(void) {
    const char *printed = make_asked();
    check(count_of(printed, "--- held-out example ") == 2 &&
              strstr(printed, "--- held-out example 2 at step 200 ---\n"
                              "prompt    \"b\"\n"
                              "expected  \" the \"\n"
                              "given     \" the \"\n---\n"),
          "--sample-every: %s", printed);
    Text rows, one;
    double loss[3], exact[3], alone;
    unsigned tokens[3], examples[3];
    expect_run(0, &rows,
               "--init $D/asked --eval --val $D/asked.jsonl --val $D/others.jsonl --matmul builtin");
    const char *at = rows.data, *line;
    size_t length, width = 0;
    for (int i = 0; i < 3 && next_line(&at, rows.data + rows.size, &line, &length); i++) {
        int read =
            sscanf(line, "loss %lf perplexity %*f accuracy %*f %% of %u tokens exact match %lf %% of %u",
                   &loss[i], &tokens[i], &exact[i], &examples[i]);
        const char *in = strstr(line, "  in ");
        check(read == 4 && in && (i == 0 || (size_t)(in - line) == width), "row %d of %s", i, rows.data);
        if (read != 4 || !in) return;
        width = (size_t)(in - line);
    }
    check(tokens[2] == tokens[0] + tokens[1] && examples[0] == 4 && examples[1] == 3 && examples[2] == 7 &&
              fabs(loss[2] - (loss[0] * tokens[0] + loss[1] * tokens[1]) / tokens[2]) < 2e-6 &&
              exact[0] == 100 && fabs(exact[1] - 100. / 3) < 0.01 && fabs(exact[2] - 500. / 7) < 0.01,
          "rows: %s", rows.data);
    expect_run(0, &one, "--init $D/asked --eval --val $D/others.jsonl --matmul builtin");
    check(sscanf(one.data, "loss %lf", &alone) == 1 && alone == loss[1], "alone %s, among others %g",
          one.data, loss[1]);
    Text log = read_file(in_tests("asked/log.csv"));
    const char *last = strstr(log.data, "\n200,100,val,");
    check(last && fabs(atof(last + strlen("\n200,100,val,")) - loss[2]) < 1e-5 && strstr(last, ",0.714286\n"),
          "the log of a training with two --val: %s", last ? last : log.data);
    free(rows.data), free(one.data), free(log.data);
}

// --predictions: a JSON line for each example, consistent with --eval's figures; written whole or not at all.
static void test_predictions(void) {
    make_asked();
    Text printed, again;
    const char *words = "--init $D/asked --eval --val $D/asked.jsonl --val $D/others.jsonl --matmul builtin";
    expect_run(0, &printed, words);
    expect_run(0, &again, path_of("%s --predictions $D/said.jsonl", words));
    check(strcmp(printed.data, again.data) == 0, "--predictions changes --eval: %s", again.data);
    static const char *const wanted[][3] = {{"a", " cat", " cat"},       {"b", " the ", " the "},
                                            {"c", "\n\"d\"", "\n\"d\""}, {"f<|endoftext|>", "g", "g"},
                                            {"a", " cut", " cat"},       {"c", "\n\"d\"", "\n\"d\""},
                                            {NULL, "cat", NULL}};
    Text file = read_file(in_tests("said.jsonl"));
    const char *at = file.data, *line;
    size_t length, count = 0;
    double loss = 0, sum = 0, tokens = 0;
    for (; next_line(&at, file.data + file.size, &line, &length) && count < 7; count++) {
        Json *json = json_parse(line, length, "said.jsonl");
        const char *const *w = wanted[count];
        bool right = w[2] && strcmp(w[1], w[2]) == 0;
        check((w[0] ? json_is_text(json_get(json, "prompt"), w[0]) &&
                          json_is_text(json_get(json, "completion"), w[1]) &&
                          json_is_text(json_get(json, "prediction"), w[2])
                    : json_is_text(json_get(json, "text"), w[1]) && !json_get(json, "prediction")) &&
                  json_is_true(json, "exact_match", !right, "said.jsonl") == right,
              "line %zu: %.*s", count + 1, (int)length, line);
        static const int scored[] = {5, 4, 5, 2,
                                     5, 5, 4}; // with the end of text; "the" is one token, "he" is none
        sum += scored[count] * json_number(json, "loss", NAN, "said.jsonl");
        tokens += scored[count];
        json_free(json);
    }
    const char *total = strrchr(printed.data, '\n') ? strstr(printed.data, "others.jsonl\n") : NULL;
    check(count == 7 && total && sscanf(total, "others.jsonl\nloss %lf", &loss) == 1 &&
              fabs(loss - sum / tokens) < 2e-6,
          "%zu lines, mean loss %g, --eval: %s", count, sum / tokens, printed.data);
    uint64_t before = fingerprint(in_tests("said.jsonl"));
    expect_run(1, NULL, path_of("%s --val $D/none.jsonl --predictions $D/said.jsonl", words));
    check(fingerprint(in_tests("said.jsonl")) == before, "a failed --eval changed older predictions");
    unlink(in_tests("said.jsonl.tmp"));
    expect_refusal(2, "--predictions does not apply to training", "--predictions x --train $D/text.txt");
    free(file.data), free(printed.data), free(again.data);
}

// Waits until the log of a run has this many lines, or the run has ended.
static void wait_for_lines(const char *out, size_t lines, pid_t child) {
    char *path = xprintf("%s/log.csv", in_tests(out));
    for (size_t count = 0; count < lines && !has_ended(child);) {
        usleep(200);
        if (!file_exists(path)) continue;
        Text text = read_file(path);
        count = count_of(text.data, "\n");
        free(text.data);
    }
    free(path);
}

static const char RESUMABLE[] =
    "$TINY --train $D/short.txt --val-fraction 0.2 --steps 12 --val-every 3 --save-every 2 "
    "--dropout 0.1 --accumulate 2 --quiet --out $D/";

// Checks that a run which was interrupted ended as the one that was not.
static void expect_same_run(const char *out, const char *how) {
    Text whole = {0}, parts = {0};
    LogLine lines[500];
    char *model = xprintf("%s/model.safetensors", out);
    read_log("whole", lines, &whole);
    read_log(out, lines, &parts);
    check(same_files(model, "whole/model.safetensors"), "%s: other weights", how);
    check(whole.size == parts.size && memcmp(whole.data, parts.data, whole.size) == 0, "%s: another log",
          how);
    free(model);
    free(whole.data);
    free(parts.data);
}

// The run that nothing interrupts, once, in D/whole. Returns the seconds that it took.
static double make_whole_run(void) {
    static double duration;
    make_inputs();
    if (duration > 0) return duration;
    double begin = now();
    char *words = xprintf("%swhole", RESUMABLE);
    expect_run(0, NULL, words);
    free(words);
    return duration = now() - begin;
}

// Ends a run by a signal in its middle, and checks what it says and saves. One that was done before the
// signal came is started again.
static void stop_run(const char *out, int signal_number) {
    LogLine lines[500];
    char *words = xprintf("%s%s", RESUMABLE, out);
    int status = 0;
    for (int attempt = 0; attempt < 5 && status == 0; attempt++) {
        remove_folder(in_tests(out));
        pid_t child = start_trainer(0, words);
        wait_for_lines(out, 5, child);
        kill(child, signal_number);
        if (signal_number == SIGHUP) kill(child, signal_number); // shells and the system both send it
        status = wait_for(child);
    }
    Text printed = read_file(in_tests("printed"));
    size_t count = read_log(out, lines, NULL);
    check(status == 128 + signal_number && strstr(printed.data, "--resume goes on"),
          "signal %d: status %d, %s", signal_number, status, printed.data);
    long stopped = -1;
    const char *said = strstr(printed.data, "stopped at step ");
    check(said && sscanf(said, "stopped at step %ld", &stopped) == 1 && stopped < 12 && count > 3 &&
              stopped == lines[count - 1].step,
          "stopped in the middle, after %ld", stopped);
    char *saved = xstrdup(checkpoint_path(in_tests(out), stopped));
    check(is_folder(saved), "%s is not there", saved);
    uint64_t before = fingerprint(in_tests(out));
    expect_refusal(2, "--resume goes on with it", words);
    check(fingerprint(in_tests(out)) == before, "a refused run changed its folder");
    free(saved);
    free(words);
    free(printed.data);
}

static void test_resume(void) {
    static const struct {
        const char *out;
        int signal;
    } stops[] = {{"terminated", SIGTERM}, {"interrupted", SIGINT}, {"hung-up", SIGHUP}};
    make_whole_run();
    for (int i = 0; i < 3; i++) {
        stop_run(stops[i].out, stops[i].signal);
        // With --resume leftovers are swept away.
        make_folder(in_tests("leftover"));
        char *leftover = xprintf("%s/checkpoint-000099.tmp", in_tests(stops[i].out));
        check(rename(in_tests("leftover"), leftover) == 0, "no leftover to sweep");
        char *words = xprintf("--resume --quiet --threads 1 --out $D/%s", stops[i].out);
        expect_run(0, NULL, words);
        check(!file_exists(leftover), "the leftover is still there");
        free(leftover);
        expect_same_run(stops[i].out, words);
        expect_run(0, NULL, words); // once more: nothing left to do
        expect_same_run(stops[i].out, "resumed when done");
        free(words);
    }
}

static const char LORA[] = "--init $D/model --train $D/short.txt --val-fraction 0.2 --steps 12 --val-every 3 "
                           "--save-every 2 --dropout 0.1 "
                           "--accumulate 2 --batch-size 2 --learning-rate 1e-2 --matmul builtin --quiet "
                           "--lora-rank 3 --lora-target c_attn "
                           "--lora-target mlp.c_fc --out $D/";

// A run with adapters, once, in D/lora.
static void make_lora(void) {
    static bool made;
    make_inputs();
    if (!made) expect_run(0, NULL, path_of("%slora", LORA));
    made = true;
}

static double eval_loss(const char *folder) {
    Text printed;
    double loss = NAN;
    expect_run(0, &printed, path_of("--init $D/%s --eval --val $D/val.txt --quiet --matmul builtin", folder));
    check(sscanf(printed.data, "loss %lf", &loss) == 1, "--eval: %s", printed.data);
    free(printed.data);
    return loss;
}

// A run of adapters ended as D/lora did.
static void expect_same_lora(const char *out, const char *how) {
    static const char *const names[] = {"adapter_model.safetensors", "adapter_config.json", "vocab.json",
                                        "merged/model.safetensors", "merged/config.json"};
    for (int i = 0; i < 5; i++) {
        char *ours = xprintf("%s/%s", out, names[i]);
        check(same_files(ours, path_of("lora/%s", names[i])), "%s: another %s", how, ours);
        free(ours);
    }
}

// Adapters as files: PEFT's folder and a merged model beside it; the base is left alone; the same bits on any number
// of threads, recomputed, and resumed; they can be trained on, in bfloat16 too, and give way to another run.
static void test_lora_run(void) {
    make_inputs();
    const uint64_t before = fingerprint(in_tests("model"));
    make_lora();
    check(!file_exists(in_tests("lora/config.json")) && !file_exists(in_tests("lora/model.safetensors")),
          "an adapter's folder looks like a whole model");
    Model *base = model_load(in_tests("model")), *merged = model_load(in_tests("lora/merged"));
    for (int i = 0; i < base->tensor_count; i++) {
        const Tensor *tensor = &base->tensors[i];
        bool target = tensor->kind == ATTN_WEIGHT || tensor->kind == FC_WEIGHT;
        check(same_bits(tensor->value, merged->tensors[i].value, tensor->size) == !target, "merged: %s",
              tensor->name);
    }
    model_free(base), model_free(merged);
    const double start = eval_loss("model"), alone = eval_loss("lora"), whole = eval_loss("lora/merged");
    check(fabs(alone - whole) < 2e-6 && alone < start - 0.01, "loss %g of the base, %g, %g merged", start,
          alone, whole);
    expect_run(0, NULL, path_of("%slora-threads --threads 3", LORA));
    expect_same_lora("lora-threads", "3 threads");
    expect_run(0, NULL, path_of("%slora-recomputed --recompute", LORA));
    expect_same_lora("lora-recomputed", "recomputed");
    char *words = xprintf("%slora-stopped", LORA);
    pid_t child = start_trainer(0, words);
    wait_for_lines("lora-stopped", 5, child);
    kill(child, SIGTERM);
    wait_for(child);
    expect_run(0, NULL, "--resume --quiet --out $D/lora-stopped");
    expect_same_lora("lora-stopped", "resumed");
    Text parts = {0}, log = {0};
    LogLine lines[500];
    read_log("lora-stopped", lines, &parts);
    read_log("lora", lines, &log);
    check(parts.size == log.size && memcmp(parts.data, log.data, log.size) == 0, "resumed: another log");
    free(words), free(parts.data), free(log.data);
    expect_run(0, NULL, path_of("%slora-bfloat16 --precision bfloat16", LORA));
    check(fabs(eval_loss("lora-bfloat16") - alone) < 0.05, "bfloat16: loss %g", eval_loss("lora-bfloat16"));
    const char *on =
        "--train $D/short.txt --val-fraction 0 --steps 4 --matmul builtin --quiet --out $D/lora-on";
    expect_run(0, NULL, path_of("--init $D/lora %s", on));
    check(same_files("lora-on/adapter_config.json", "lora/adapter_config.json") &&
              !same_files("lora-on/adapter_model.safetensors", "lora/adapter_model.safetensors"),
          "an adapter that was trained on");
    check(fingerprint(in_tests("model")) == before, "a run with adapters changed its base");
    remove_folder(in_tests("lora-on/checkpoint-000004"));
    remove_folder(in_tests("lora-on/checkpoint-000003"));
    remove_folder(in_tests("lora-on/checkpoint-000002"));
    remove_folder(in_tests("lora-on/checkpoint-000001"));
    expect_run(0, NULL, path_of("--init $D/model %s", on));
    check(file_exists(in_tests("lora-on/config.json")) &&
              !file_exists(in_tests("lora-on/adapter_config.json")) &&
              !file_exists(in_tests("lora-on/adapter_model.safetensors")) &&
              !file_exists(in_tests("lora-on/merged/config.json")),
          "an adapter's files stay beside a later model");
}

// Writes D/bad: the adapter of D/lora, with `base` as its model and `more` in its configuration.
static void make_bad_adapter(const char *base, const char *rank, const char *more) {
    make_folder(in_tests("bad"));
    Text weights = read_file(in_tests("lora/adapter_model.safetensors"));
    put_file(in_tests("bad/adapter_model.safetensors"), weights.data, weights.size);
    free(weights.data);
    char *config = xprintf("{\"peft_type\": \"LORA\", \"base_model_name_or_path\": \"%s\", \"r\": %s, "
                           "\"lora_alpha\": 6%s}",
                           base, rank, more);
    write_text("bad/adapter_config.json", config);
    free(config);
}

// Adapters that are not computed here, or damaged, and options that do not fit: one line each, nothing is changed.
static void test_lora_refusals(void) {
    static const char *const unsupported[] = {"use_dora\": true",
                                              "use_rslora\": true",
                                              "bias\": \"all\"",
                                              "modules_to_save\": [\"x\"]",
                                              "rank_pattern\": {\"x\": 2}",
                                              "alpha_pattern\": {\"x\": 2}",
                                              "alora_invocation_tokens\": [5]",
                                              "init_lora_weights\": \"pissa\"",
                                              "use_bdlora\": {\"nblocks\": 2}"};
    static const struct {
        int status;
        const char *error, *words;
    } wrong[] = {
        {2, "--lora-alpha needs --lora-rank", "--init $D/model --lora-alpha 3"},
        {2, "--lora-target needs --lora-rank", "--init $D/model --lora-target mlp"},
        {2, "matches no matrix", "--init $D/model --lora-rank 2 --lora-target ln_1"},
        {2, "matches transformer.wte.weight", "--init $D/model --lora-rank 2 --lora-target wte"},
        {2, "begins at random", "--tokenizer $D/merges.txt --lora-rank 2"},
        {2, "is an adapter already, of rank 3", "--init $D/lora --lora-rank 2"},
        {2, "--out $D/model would replace", "--init $D/model --lora-rank 2 --out $D/model"},
        {2, "--out $D/model would replace", "--init $D/lora --out $D/model"},
        {2, "would replace", "--init $D/held/merged --lora-rank 2 --out $D/held"},
        {2, "would replace", "--init $D/held/merged --out $D/held"},
    };
    make_lora();
    const char *use = "--init $D/bad --eval --val $D/val.txt --quiet";
    for (int i = 0; i < 9; i++) {
        make_bad_adapter(in_tests("model"), "3", path_of(", \"%s", unsupported[i]));
        char *name = xprintf("%.*s", (int)strcspn(unsupported[i], "\""), unsupported[i]);
        expect_refusal(1, name, use);
        free(name);
    }
    make_bad_adapter(in_tests("nowhere"), "3", "");
    expect_refusal(1, "nowhere\", is not a model folder here", use);
    make_bad_adapter(in_tests("bad"), "3", ""); // itself
    write_text("bad/config.json", "{}");
    expect_refusal(1, "is not a model folder here", use);
    remove_folder(in_tests("bad"));
    make_bad_adapter(in_tests("model"), "2", "");
    expect_refusal(1, "[3, 16]", use);
    make_bad_adapter(in_tests("model"), "2.5", "");
    expect_refusal(1, "r must be a whole number", use);
    make_bad_adapter(in_tests("model"), "3", "");
    expect_run(0, NULL, use); // all but these is right
    SafeTensors file = safetensors_open(in_tests("lora/adapter_model.safetensors"));
    safetensors_write(in_tests("bad/adapter_model.safetensors"), file.tensors, file.count - 1);
    expect_refusal(1, "one of a pair", use);
    safetensors_close(&file, false);
    unlink(in_tests("bad/adapter_model.safetensors"));
    expect_refusal(1, "adapter_model.safetensors", use);
    make_folder(in_tests("held"));
    expect_run(
        0, NULL,
        "--init $D/model --train $D/short.txt --val-fraction 0 --steps 1 --quiet --out $D/held/merged");
    const uint64_t before = fingerprint(in_tests("model")), held = fingerprint(in_tests("held/merged"));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char *words = xprintf("--train $D/short.txt --steps 2 --quiet %s %s", wrong[i].words,
                              strstr(wrong[i].words, "--out") ? "" : "--out $D/never");
        char *error = xprintf("%s%s", strncmp(wrong[i].error, "--out $D/", 9) == 0 ? "--out " : "",
                              strncmp(wrong[i].error, "--out $D/", 9) == 0
                                  ? in_tests(wrong[i].error + strlen("--out $D/"))
                                  : wrong[i].error);
        expect_refusal(wrong[i].status, error, words);
        free(words), free(error);
    }
    check(!file_exists(in_tests("never")), "a refused run makes its folder");
    check(fingerprint(in_tests("model")) == before && fingerprint(in_tests("held/merged")) == held,
          "a refused run changed its base");
}

// Kills that cannot be caught: after so many lines of the log, then at any moment. A run that is done before
// it was killed three times begins anew.
static void test_kills(void) {
    const double duration = make_whole_run();
    char *words = xprintf("%skilled --resume", RESUMABLE);
    int kills = 0;
    for (int attempt = 0; attempt < 5 && kills < 3; attempt++) {
        remove_folder(in_tests("killed"));
        kills = 0;
        for (uint64_t i = 0; i < 8; i++) {
            pid_t child = start_trainer(0, words);
            if (i < 4)
                wait_for_lines("killed", 3 + 3 * (size_t)i, child);
            else
                usleep((useconds_t)(1e6 * duration * (0.2 + random_uniform((uint64_t)(1e9 * now()), i))));
            kill(child, SIGKILL);
            kills += wait_for(child) == 128 + SIGKILL;
        }
    }
    check(kills >= 3, "a run of 12 steps could be killed only %d times", kills);
    expect_run(0, NULL, words);
    free(words);
    words = xprintf("killed %d times", kills);
    expect_same_run("killed", words);
    free(words);

    words =
        xprintf("%sjust-saved", RESUMABLE); // killed when a checkpoint stands that knows of its evaluation
    int status = 0;
    for (int attempt = 0; attempt < 5 && status == 0; attempt++) {
        remove_folder(in_tests("just-saved"));
        pid_t child = start_trainer(0, words);
        while (!file_exists(in_tests("just-saved/checkpoint-000006")) && !has_ended(child)) usleep(100);
        kill(child, SIGKILL);
        status = wait_for(child);
    }
    check(status == 128 + SIGKILL, "just-saved ends with %d before it can be killed", status);
    free(words);
    expect_run(0, NULL, "--resume --quiet --out $D/just-saved");
    expect_same_run("just-saved", "killed after a checkpoint");
}

// A run whose validation loss rises from evaluation to evaluation, whatever the seed. The model learns that b
// follows a, and is asked whether the other letters and digits do. If b has the probability p, the others
// share 1 - p, and their mean loss is at least log(61) - log(1 - p): it rises without end as p comes near 1.
// (Of the three tokens a, b and <|endoftext|> --seq-len 1 leaves the first two.)
#define RISING                                                                                               \
    "$TINY --train $D/rising.jsonl --val $D/others.jsonl --seq-len 1 --schedule constant --warmup-steps 0 "  \
    "--val-every 10 --quiet "

static void make_rising(void) {
    make_inputs();
    Text train = {0}, others = {0};
    for (int i = 0; i < 8; i++) text_append(&train, "{\"prompt\": \"a\", \"completion\": \"b\"}\n", 35);
    for (int c = '0'; c <= 'z'; c++) {
        if (!isalnum(c) || c == 'b') continue;
        char *line = xprintf("{\"prompt\": \"a\", \"completion\": \"%c\"}\n", c);
        text_append(&others, line, strlen(line));
        free(line);
    }
    put_file(in_tests("rising.jsonl"), train.data, train.size);
    put_file(in_tests("others.jsonl"), others.data, others.size);
    free(train.data);
    free(others.data);
}

// The best checkpoint is kept besides the newest, and is the result; --patience ends what gets no better.
static void test_best_and_patience(void) {
    LogLine lines[500];
    make_rising();
    expect_run(0, NULL, RISING "--steps 50 --keep 1 --out $D/keep");
    size_t count = read_log("keep", lines, NULL), found, rising = 0;
    double last = 0; // loss of the evaluation before
    for (size_t i = 0; i < count; i++)
        if (lines[i].val) {
            rising += lines[i].loss > last;
            last = lines[i].loss;
        }
    check(count == 56 && rising == 6, "%zu of 6 losses rise", rising);
    long *steps = list_checkpoints(in_tests("keep"), &found);
    check(found == 2 && steps[0] == 10 && steps[1] == 50, "the best and the last stay: %zu", found);
    free(steps);
    check(same_files("keep/model.safetensors", "keep/checkpoint-000010/model.safetensors"),
          "the result is not the best state");
    check(!same_files("keep/model.safetensors", "keep/checkpoint-000050/model.safetensors"),
          "the last state is the best one");

    Text printed; // the second, third and fourth evaluation are no better than the first
    expect_run(0, &printed, RISING "--steps 99 --patience 3 --save-every 400 --out $D/patience");
    count = read_log("patience", lines, NULL);
    check(count == 45 && lines[count - 1].step == 40 && strstr(printed.data, "--patience"),
          "--patience 3 after %zu lines of the log: %s", count, printed.data);
    free(printed.data);
    expect_run(0, NULL, "--resume --quiet --out $D/patience");
    check(read_log("patience", lines, NULL) == count, "--patience ends a resumed run too");
}

// A run in bfloat16, and the same from its checkpoint in the middle: the precision comes from there.
static void test_resumed_bfloat16(void) {
    make_inputs();
    expect_run(
        0, NULL,
        "$TINY --train $D/text.txt --val-fraction 0 --steps 6 --save-every 3 --keep 9 --precision bfloat16 "
        "--quiet --out $D/halves");
    expect_run(0, NULL, "$TINY --train $D/text.txt --val-fraction 0 --steps 6 --quiet --out $D/whole-floats");
    check(system("cd $D && mkdir halves-2 && cp -r halves/checkpoint-000003 halves/log.csv halves-2") == 0,
          "no copy");
    Text printed = {0};
    expect_run(0, &printed, "--resume --out $D/halves-2");
    check(strstr(printed.data, "bfloat16 matmul") != NULL, "the banner does not say bfloat16: %s",
          printed.data);
    check(same_files("halves/model.safetensors", "halves-2/model.safetensors"), "resumed: other weights");
    check(!same_files("halves/model.safetensors", "whole-floats/model.safetensors"),
          "the weights of float32");
    free(printed.data);
}

// After --resume a tensor may be frozen that was not; the other way round its moments are missing.
static void test_resumed_freezing(void) {
    make_inputs();
    expect_run(0, NULL,
               "$TINY --train $D/text.txt --val-fraction 0 --steps 3 --freeze wte --quiet --out $D/thawed");
    expect_refusal(1, "a tensor that was frozen cannot be trained after --resume",
                   "--resume --steps 4 --freeze none --quiet --out $D/thawed");
    expect_run(0, NULL, "--resume --steps 4 --freeze wte --freeze wpe --quiet --out $D/thawed");
    Model *before = model_load(in_tests("thawed/checkpoint-000003"));
    Model *after = model_load(in_tests("thawed/checkpoint-000004"));
    for (int i = 0; i < before->tensor_count; i++) {
        const Tensor *a = &before->tensors[i], *b = &after->tensors[i];
        check(same_bits(a->value, b->value, a->size) == (i == WTE || i == WPE), "after --resume: %s",
              a->name);
    }
    model_free(before);
    model_free(after);
}

// A full disk while the second half of a run is saved: what the first one saved stays whole.
static void test_full_disk(void) {
    const char *const run = "$TINY --train $D/text.txt --val $D/val.txt --schedule constant --warmup-steps 0 "
                            "--quiet --val-every 4 --keep 1 ";
    make_inputs();
    char *half = xprintf("%s --steps 4 --out $D/full", run);
    char *whole = xprintf("%s --steps 8 --out $D/roomy", run);
    expect_run(0, NULL, half);
    expect_run(0, NULL, whole);
    free(half);
    free(whole);
    const uint64_t before = fingerprint(in_tests("full/checkpoint-000004"));
    check(before != 0, "no checkpoint after half of the run");
    for (rlim_t limit = 20000; limit <= 50000; limit += 30000) { // the weights fail, the moments fail
        int status = wait_for(start_trainer(limit, "--resume --steps 8 --quiet --out $D/full"));
        Text printed = read_file(in_tests("printed"));
        const char *error = strstr(printed.data, "train_gpt2: ");
        check(status == 1 && error && strchr(error, '\n') == printed.data + printed.size - 1 &&
                  strstr(error, limit < 30000 ? "model.safetensors: could not be written whole"
                                              : "optimizer.safetensors: could not be written whole"),
              "a full disk: status %d, %s", status, printed.data);
        check(fingerprint(in_tests("full/checkpoint-000004")) == before,
              "a full disk changed the older checkpoint");
        free(printed.data);
    }
    expect_run(0, NULL, "--resume --steps 8 --quiet --out $D/full");
    check(same_files("full/model.safetensors", "roomy/model.safetensors"),
          "goes on when there is room again");
}

// Weights that grow until they are no numbers: the run ends before it saves them.
static void test_diverging(void) {
    Text error;
    size_t found;
    make_inputs();
    expect_run(
        1, &error,
        "$TINY --train $D/text.txt --val-fraction 0 --steps 60 --save-every 1 --keep 1 --warmup-steps 0 "
        "--learning-rate 1e3 --weight-decay 1e3 --schedule constant --quiet --out $D/diverges");
    check(one_error_line(&error, " is not finite"), "not finite: %s", error.data);
    free(error.data);
    long *steps = list_checkpoints(in_tests("diverges"), &found);
    for (size_t i = 0; i < found; i++) {
        char *path = xstrdup(checkpoint_path(in_tests("diverges"), steps[i]));
        Model *saved = model_load(path);
        size_t bad = 0;
        for (int t = 0; t < saved->tensor_count; t++)
            for (size_t j = 0; j < saved->tensors[t].size; j++) bad += !isfinite(saved->tensors[t].value[j]);
        check(bad == 0, "%s holds %zu values that are not finite", path, bad);
        model_free(saved);
        free(path);
    }
    check(found == 1, "a last good checkpoint");
    free(steps);

    // A finite loss, a gradient that overflows: the softmax is sure of a wrong token, and the difference of
    // two rows of the head, each +-3e38, is none that a float holds.
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *steep = model_new((Config){tokenizer->vocab_size, 16, 1, 2, 16, 64, 1e-5f, false});
    model_initialise(steep, 5);
    for (size_t i = 0; i < steep->tensors[steep->tensor_count - 1].size; i++)
        model_tensor(steep, LM_HEAD, 0)->value[i] = random_bits(8, i) & 1 ? 3e38f : -3e38f;
    for (int i = 0; i < 16; i++) model_tensor(steep, LN_F_WEIGHT, 0)->value[i] = 1e-37f;
    model_save(steep, tokenizer, &(KeptFiles){0}, NULL, in_tests("steep"));
    model_free(steep);
    tokenizer_free(tokenizer);
    write_text("a.txt", "a");
    expect_refusal(1, ": step 1: the gradient of transformer.",
                   "--init $D/steep --train $D/a.txt --val-fraction 0 --steps 2 --quiet --matmul builtin "
                   "--out $D/steps");
    free(list_checkpoints(in_tests("steps"), &found));
    check(found == 0, "saved in spite of a gradient that is not finite");
}

// ---- whole runs: what is around the heart ----

// Two runs in one --out: the second is refused with the first's process id, in whatever state the first is; when
// it was killed the next one goes on at once.
static void test_lock(void) {
    make_inputs();
    const char *words =
        "$TINY --train $D/text.txt --val-fraction 0 --save-every 3 --quiet --out $D/locked --steps";
    char *first = xprintf("%s 100000", words), *second = xprintf("%s 300", words);
    pid_t child = start_trainer(0, first);
    wait_for_lines("locked", 9, child);
    char *refusal = xprintf("/locked: process %d is training there", (int)child);
    char *resumed = xprintf("%s 300 --resume", words);
    expect_refusal(1, refusal, second);
    expect_refusal(1, refusal, resumed);
    expect_refusal(1, refusal, "$TINY --train $D/text.txt --overfit --steps 3 --out $D/locked");
    kill(child, SIGKILL);
    wait_for(child);
    Text log = read_file(in_tests("locked/log.csv"));
    char *more = xprintf("%s %zu --resume", words, count_of(log.data, "\n") + 3);
    expect_run(0, NULL, more);
    free(log.data), free(more), free(refusal), free(resumed), free(first), free(second);
    // Started together, in a folder that is not there: one trains, the other leaves it alone.
    words = "$TINY --train $D/text.txt --val-fraction 0 --steps 40 --save-every 9 --quiet --out $D/together";
    expect_run(0, NULL,
               "$TINY --train $D/text.txt --val-fraction 0 --steps 40 --save-every 9 --quiet --out $D/alone");
    for (int i = 0; i < 4; i++) {
        remove_folder(in_tests("together"));
        pid_t first = start_trainer(0, words), second = start_trainer(0, words);
        int a = wait_for(first), b = wait_for(second);
        check((a == 0 && b > 0) || (b == 0 && a > 0), "two runs in one folder ended with %d and %d", a, b);
        check(same_files("together/model.safetensors", "alone/model.safetensors"),
              "two runs became a third one");
        LogLine lines[500];
        check(read_log("together", lines, NULL) == 40, "two runs in one log");
    }
}

// A number that tells apart which names a folder has.
static uint64_t names_in(const char *path) {
    uint64_t sum = 0;
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        uint64_t name = 0;
        for (const char *c = entry->d_name; *c; c++) name = mix_bits(name ^ (unsigned char)*c);
        sum += mix_bits(name);
    }
    if (folder) closedir(folder);
    return sum;
}

// What --out is after a fault, besides the model that was there before and the one that the run makes.
typedef enum { OLD_MODEL, NEW_MODEL, NO_MODEL, MIXED_MODEL } Outcome;

static Outcome outcome(const char *out) {
    static const char *const names[] = {"config.json", "model.safetensors", "vocab.json", "merges.txt"};
    int old = 0, new = 0;
    for (int i = 0; i < 4; i++) {
        uint64_t found = fingerprint(path_of("%s/%s", in_tests(out), names[i]));
        old += found == fingerprint(path_of("%s/%s", in_tests("old"), names[i]));
        new += found == fingerprint(path_of("%s/%s", in_tests("sound"), names[i]));
    }
    bool loads = file_exists(path_of("%s/config.json", in_tests(out)));
    return !loads ? NO_MODEL : new == 4 ? NEW_MODEL : old == 4 ? OLD_MODEL : MIXED_MODEL;
}

// Trains in $D/OUT, which holds an older model of another vocabulary; FAULT is "" or as in fault(). Returns the
// program's status.
static int run_with_fault(const char *out, const char *fault_at, bool resume, Text *said) {
    const char *begin = "rm -rf $O; mkdir $O; cp $D/old/*.* $O; rm $O/log.csv; touch $O/tokenizer.json;";
    return run_shell(
        said,
        "O=$D/%s; %s %s $T --trainer $TINY --train $D/short.txt --val-fraction 0.2 --steps 6 --val-every 2 "
        "--keep 1 --dropout 0.1 --quiet --out $O %s >$D/said 2>&1",
        out, resume ? "" : begin, fault_at, resume ? "--resume" : "");
}

// A run that is killed at one of its calls that change files, or in which that call fails: --out is the old model, the
// new one, or none at all; and --resume ends as the run that nothing happened to, without leftovers.
static void test_faults(void) {
    make_inputs();
    Text said, whole = {0};
    LogLine lines[500];
    write_text("other.txt", "#version: 0.2\na t\nb i\nbi r\n");
    expect_run(0, NULL,
               "$TINY --tokenizer $D/other.txt --train $D/short.txt --val-fraction 0 --steps 1 --quiet --out "
               "$D/old");
    int status = run_with_fault("sound", "", false, &said), calls = 1, ends[2] = {0}, outcomes[4] = {0};
    check(status == 0, "the sound run: %s", said.data);
    check(!file_exists(in_tests("sound/tokenizer.json")), "a tokenizer of an older model stays");
    free(said.data);
    read_log("sound", lines, &whole);
    for (int step = 256; step > 0;
         calls += status == 128 + SIGKILL ? step : 0, step /= 2) { // how many there are
        status = run_with_fault("hit", path_of("FAULT=kill:%d", calls + step), false, &said);
        free(said.data);
    }
    const uint64_t stream = (uint64_t)(1e9 * now()); // other ones at each run; half of them near the end
    for (int i = 0; i < 20; i++) {
        long n = 1 + (long)(random_bits(stream, i) % (uint64_t)calls);
        if (i % 4 > 1) n = calls - n % 24;
        bool kills = i % 2;
        char *fault_at = xprintf("FAULT=%s:%ld", kills ? "kill" : "error", n);
        status = run_with_fault("hit", fault_at, false, &said);
        check(kills ? status == 128 + SIGKILL
                    : status == 0 || (status == 1 && count_of(said.data, "train_gpt2: ") == 1),
              "%s of %d: status %d, %s", fault_at, calls, status, said.data);
        free(said.data);
        ends[kills] += status != 0;
        outcomes[outcome("hit")]++;
        status = run_with_fault("hit", "", true, &said);
        check(status == 0 && outcome("hit") == NEW_MODEL, "%s, resumed: %s", fault_at, said.data);
        Text parts = {0};
        read_log("hit", lines, &parts);
        check(whole.size == parts.size && memcmp(whole.data, parts.data, whole.size) == 0,
              "%s, resumed: another log", fault_at);
        check(names_in(in_tests("hit")) == names_in(in_tests("sound")), "%s, resumed: leftovers", fault_at);
        free(said.data), free(parts.data), free(fault_at);
    }
    check(calls > 60 && calls < 511 && ends[0] > 0 && ends[1] == 10, "%d calls, %d errors, %d kills", calls,
          ends[0], ends[1]);
    check(outcomes[MIXED_MODEL] == 0 && outcomes[NO_MODEL] > 0, "%d mixtures of two models, %d times none",
          outcomes[MIXED_MODEL], outcomes[NO_MODEL]);
    free(whole.data);
}

// A log that cannot be written ends the run. An evaluation that a signal cut short is made up for once, not at
// each --resume.
static void test_log(void) {
    make_inputs();
    int status = wait_for(
        start_trainer(2500, "$TINY --train $D/text.txt --val-fraction 0 --steps 300 --save-every 299 "
                            "--quiet --out $D/full-log"));
    Text printed = read_file(in_tests("printed"));
    check(status == 1 && one_error_line(&printed, "/full-log/log.csv: could not be written: "),
          "a log on a full disk: status %d, %s", status, printed.data);
    free(printed.data);

    Text text = {0}, whole = {0}, again = {0};
    for (int i = 0; i < 60; i++) text_append(&text, "the cat saw the hat.\nthe bird met a dog.\n", 41);
    put_file(in_tests("long.txt"), text.data, text.size);
    free(text.data);
    LogLine lines[500];
    const char *words =
        "$TINY --train $D/short.txt --val $D/long.txt --steps 3 --val-every 3 --batch-size 1 --quiet "
        "--out $D/cut-short";
    for (int attempt = 0; attempt < 5 && status != 128 + SIGTERM; attempt++) {
        remove_folder(in_tests("cut-short"));
        pid_t child = start_trainer(0, words);
        wait_for_lines("cut-short", 5, child); // header, evaluation, three updates
        kill(child, SIGTERM);
        status = wait_for(child);
    }
    check(status == 128 + SIGTERM && read_log("cut-short", lines, NULL) == 4,
          "not stopped in the last evaluation");
    expect_run(0, NULL, "--resume --quiet --out $D/cut-short");
    check(read_log("cut-short", lines, &whole) == 5 && lines[4].val, "the evaluation was not made up for");
    expect_run(0, NULL, "--resume --quiet --out $D/cut-short");
    size_t count = read_log("cut-short", lines, &again);
    check(count == 5 && strcmp(whole.data, again.data) == 0, "it was made up for again: %s", again.data);
    free(whole.data), free(again.data);
}

static const char ODD[] =
    "$TINY --train $D/text.txt --val-fraction 0 --steps 4 --save-every 2 --keep 1 --quiet "
    "--out $D/odd";

// --out that cannot be read is not an empty one; of a checkpoint that is a symbolic link only the link is deleted.
static void test_odd_folders(void) {
    make_inputs();
    Text said;
    expect_run(0, NULL, ODD);
    check(symlink("loop", in_tests("loop")) == 0, "symlink");
    expect_refusal(1, "/loop", "$TINY --train $D/text.txt --out $D/loop --resume --quiet");
#ifdef __linux__ // root reads everything, but for a root that gave up this right
    chmod(in_tests("odd"), 0333);
    uint64_t log = fingerprint(in_tests("odd/log.csv"));
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_CAPBSET_DROP, 1, 0, 0, 0); // CAP_DAC_OVERRIDE
        prctl(PR_CAPBSET_DROP, 2, 0, 0, 0); // CAP_DAC_READ_SEARCH
        execl("/bin/sh", "sh", "-c", path_of("exec '%s' --trainer %s --resume >$D/said 2>&1", self_path, ODD),
              (char *)NULL);
        _exit(127);
    }
    int status = wait_for(child);
    chmod(in_tests("odd"), 0755);
    said = read_file(in_tests("said"));
    check(status == 1 && one_error_line(&said, "/odd: cannot be read: Permission denied") &&
              fingerprint(in_tests("odd/log.csv")) == log,
          "--out that cannot be read: status %d, %s", status, said.data);
    free(said.data);
#endif

    run_shell(&said,
              "cp -r $D/odd/checkpoint-000004 $D/elsewhere; ln -s $D/elsewhere $D/odd/checkpoint-000001");
    free(said.data);
    uint64_t elsewhere = fingerprint(in_tests("elsewhere"));
    expect_run(0, NULL, "--resume --steps 6 --quiet --out $D/odd");
    check(fingerprint(in_tests("elsewhere")) == elsewhere, "files behind a link were deleted");
    check(!file_exists(in_tests("odd/checkpoint-000001")) && !file_exists(in_tests("odd/checkpoint-000004")),
          "the link is still there");
}

// A run that is finished says so; with other options it is refused, and changes nothing.
static void test_finished(void) {
    make_inputs();
    Text printed;
    remove_folder(in_tests("odd"));
    expect_run(0, NULL, ODD);
    expect_run(0, NULL, "--resume --steps 6 --quiet --out $D/odd");
    expect_run(0, &printed, "--resume --quiet --out $D/odd");
    check(strstr(printed.data, "/odd: finished already, 6 of 6 updates") != NULL, "finished: %s",
          printed.data);
    free(printed.data);
    static const struct {
        const char *error, *words;
    } others[] = {
        {"is finished (6 of 6 updates), so that --learning-rate 0.02 (was 0.01) would change nothing. To "
         "start anew",
         "--learning-rate 2e-2"},
        {"so that --train ", "--train $D/val.txt"},
        {"--val-fraction 0.5 (was 0), --steps 3 (was 6) would change nothing",
         "--steps 3 --val-fraction 0.5"},
        {"a run cannot change how it began: --init $D/model (was d4)", "--init $D/model"},
        {"a run cannot change how it began: --n-layer 2 (was 1)", "--steps 9 --n-layer 2"},
    };
    uint64_t before = fingerprint(in_tests("odd"));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        char *line = xprintf("--resume --quiet --out $D/odd %s", others[i].words);
        const char *place = strstr(others[i].error, "$D");
        char *error = place ? xprintf("%.*s%s%s", (int)(place - others[i].error), others[i].error,
                                      temporary_folder(), place + 2)
                            : xstrdup(others[i].error);
        expect_refusal(2, error, line);
        free(line), free(error);
    }
    check(fingerprint(in_tests("odd")) == before, "a refused run changed its folder");
    expect_run(0, &printed, "--resume --steps 7 --learning-rate 2e-2 --out $D/odd");
    check(strstr(printed.data,
                 "changed since that checkpoint: --steps 7 (was 6), --learning-rate 0.02 (was 0.01)\n") !=
              NULL,
          "changes are not said: %s", printed.data);
    free(printed.data);
}

// Numbers out of trainer_state.json are what they can be.
static void test_damaged_state(void) {
    make_inputs();
    remove_folder(in_tests("odd"));
    expect_run(0, NULL, ODD);
    const char *state = "odd/checkpoint-000004/trainer_state.json";
    Text good = read_file(in_tests(state));
    static const char *const numbers[][2] = {
        {"step", "2e52"},  {"best_step", "-1"},  {"stale", "1e300"},         {"evaluated_step", "5"},
        {"seconds", "-5"}, {"best_step", "0.5"}, {"evaluated_step", "null"}, {"seconds", "1e999"}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        const char *at = strstr(good.data, path_of("\"%s\": ", numbers[i][0])) + strlen(numbers[i][0]) + 4;
        char *bad =
            xprintf("%.*s%s%s", (int)(at - good.data), good.data, numbers[i][1], at + strcspn(at, ",\n"));
        write_text(state, bad);
        expect_refusal(1, "trainer_state.json: ", "--resume --steps 9 --quiet --out $D/odd");
        free(bad);
    }
    free(good.data);
}

// Output that goes nowhere: a closed stream's number is given to no file, a full device is an error, and a reader
// that goes away ends training as SIGTERM does: saved.
static void test_output(void) {
    make_inputs();
    Text said;
    LogLine lines[500];
    const char *run = "$TINY --train $D/text.txt --val $D/val.txt --steps 6 --out $D";
    int status = run_shell(&said, "$T --trainer %s/closed <&- >&- 2>&-", run);
    check(status == 0, "closed streams: status %d", status);
    free(said.data);
    check(read_log("closed", lines, NULL) == 6 + 7, "a log with other lines in it");
    if (file_exists("/dev/full")) {
        static const char *const ways[] = {"--init $D/closed --eval --val $D/val.txt",
                                           "--init $D/closed --generate 3", "--help"};
        for (int i = 0; i < 3; i++) {
            status = run_shell(&said, "$T --trainer %s >/dev/full 2>$D/said", ways[i]);
            check(status == 1 && one_error_line(&said, "standard output: not all could be written"),
                  "%s into a full device: status %d, %s", ways[i], status, said.data);
            free(said.data);
        }
        status = run_shell(&said, "$T --trainer %s/into-full >/dev/full 2>$D/said", run);
        check(status == 1 && file_exists(in_tests("into-full/model.safetensors")),
              "training into a full device");
        free(said.data);
    }
    run_shell(&said,
              "($T --trainer %s/head --steps 100000 --val-every 50; echo $? >$D/said) | head -n 9 >/dev/null",
              run);
    check(atoi(said.data) == 128 + SIGPIPE, "a reader that went away: status %s", said.data);
    free(said.data);
    size_t count = read_log("head", lines, NULL);
    check(
        count > 0 && count < 400 &&
            file_exists(in_tests(path_of("head/checkpoint-%06ld/trainer_state.json", lines[count - 1].step))),
        "%zu lines in the log, and what they speak of is not saved", count);
}

// A model file that is cut off while it is mapped ends the program with its name; one that is written over is
// noticed before anything is saved; one that is replaced does no harm.
static void test_changed_files(void) {
    make_inputs();
    static const struct {
        const char *change, *error;
    } changes[] = {
        {": >$D/mine/model.safetensors", "/mine/model.safetensors: can no longer be read: it was cut off"},
        {"printf x | dd of=$D/mine/model.safetensors bs=1 seek=9000 conv=notrunc 2>/dev/null",
         "/mine/model.safetensors: was changed while it was in use"},
        {"rm $D/mine/model.safetensors; cp $D/model/config.json $D/mine/model.safetensors", NULL}};
    Text said;
    for (int i = 0; i < 3; i++) {
        run_shell(&said, "rm -rf $D/mine $D/changed; cp -r $D/model $D/mine");
        free(said.data);
        // The next step finds a lost page. Were an evaluation to come before it, that would find the change.
        char *words =
            xprintf("--init $D/mine --train $D/text.txt --val $D/val.txt --steps 100000 --val-every %d "
                    "--freeze 'wte|wpe' --matmul builtin --quiet --out $D/changed",
                    i == 0 ? 100000 : 40);
        pid_t child = start_trainer(0, words);
        free(words);
        wait_for_lines("changed", 8, child);
        run_shell(&said, "%s", changes[i].change);
        free(said.data);
        if (!changes[i].error) {
            wait_for_lines("changed", 200, child);
            kill(child, SIGTERM);
        }
        int status = wait_for(child);
        Text printed = read_file(in_tests("printed"));
        const char *error = strstr(printed.data, "train_gpt2: ");
        bool named = changes[i].error && error && strstr(error, changes[i].error);
        check(changes[i].error ? status == 1 && named : status == 128 + SIGTERM, "%s: status %d, %s",
              changes[i].change, status, printed.data);
        free(printed.data);
    }
}

// Numbers that are not finite are an error wherever they come up. All logits alike are no hit.
static void test_not_finite(void) {
    make_inputs();
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = model_load(in_tests("model"));
    for (int i = 0; i < 3; i++) {
        float *ln_f = model_tensor(model, LN_F_WEIGHT, 0)->value;
        ln_f[3] = i == 0 ? NAN : i == 1 ? INFINITY : 0;
        if (i == 2)
            for (int t = 0; t < model->tensor_count; t++)
                memset(model->tensors[t].value, 0, model->tensors[t].size * sizeof(float));
        model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests(i == 2 ? "zeros" : "nan"));
        if (i == 2) break;
        expect_refusal(1, "val.txt: the loss is not finite, nor are all values of transformer.ln_f.weight",
                       "--init $D/nan --eval --val $D/val.txt --matmul builtin");
        expect_refusal(1, "logits are not finite", "--init $D/nan --generate 3 --prompt '' --matmul builtin");
        expect_refusal(1, "logits are not finite",
                       "--init $D/nan --generate 3 --prompt '' --temperature 0 --samples 2 --matmul builtin");
        expect_refusal(
            1, "the loss is not finite",
            "--init $D/nan --train $D/text.txt --val $D/val.txt --steps 2 --quiet --out $D/nan-run "
            "--matmul builtin");
        check(!file_exists(in_tests("nan-run/model.safetensors")), "a model of NaN was saved");
        expect_refusal(
            1, "--find-rate: nothing was learned: the loss is not finite",
            "--init $D/nan --train $D/text.txt --find-rate --quiet --out $D/nan-run --matmul builtin");
        remove_folder(in_tests("nan-run"));
    }
    model_free(model);
    tokenizer_free(tokenizer);
    Text printed;
    expect_run(0, &printed, "--init $D/zeros --eval --val $D/val.txt --matmul builtin");
    check(strstr(printed.data, "accuracy 0.000 %") != NULL, "all logits alike: %s", printed.data);
    free(printed.data);
    expect_run(1, &printed,
               "--init $D/zeros --train $D/text.txt --overfit --steps 1 --learning-rate 0 --val-fraction 0 "
               "--quiet --matmul builtin --out $D/zeros-run");
    free(printed.data);
    // The last update makes a weight so that no loss has seen: the last position's, which no sequence reaches.
    tokenizer = tokenizer_load(in_tests("merges.txt"));
    model = model_load(in_tests("model"));
    model_tensor(model, WPE, 0)->value[15 * 16] = 1e35f;
    model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests("steep-end"));
    model_free(model);
    tokenizer_free(tokenizer);
    expect_refusal(
        1, "step 1: transformer.wpe.weight is not finite",
        "--init $D/steep-end --train $D/text.txt --val-fraction 0 --steps 1 --warmup-steps 0 --seq-len 8 "
        "--weight-decay 1e3 --learning-rate 1e3 --quiet --out $D/last-step --matmul builtin");
    check(!file_exists(in_tests("last-step/model.safetensors")), "infinite weights were saved");
}

// Which matmul is taken follows from the machine and the BLAS, the same each time.
static void test_matmul_choice(void) {
    make_inputs();
    const Option *schedule = find_option("schedule", 8, 0), *matmul_option = find_option("matmul", 6, 0);
    check(strcmp(choice_word(schedule, SCHEDULE_LINEAR), "linear") == 0 &&
              strcmp(choice_word(schedule, SCHEDULE_COSINE), "cosine") == 0 &&
              strcmp(choice_word(schedule, SCHEDULE_CONSTANT), "constant") == 0 &&
              strcmp(choice_word(matmul_option, AUTO_CHOICE), "auto") == 0 &&
              strcmp(choice_word(matmul_option, OPENBLAS_CHOICE), "openblas") == 0 &&
              strcmp(choice_word(matmul_option, BUILTIN_CHOICE), "builtin") == 0,
          "the words of a choice do not stand in the order of its numbers");
#ifdef USE_OPENBLAS
    static const struct {
        const char *core;
        int parallel, threads,
            lanes; // lanes: with built-in vectors of more than these the built-in one is better
    } choices[] = {{"SkylakeX", 2, 4, 16}, {"Cooperlake", 2, 4, 16}, {"SapphireRapids", 2, 4, 16},
                   {"Zen", 2, 4, 8},       {"Haswell", 2, 4, 8},     {"Nehalem", 2, 4, 4},
                   {"Prescott", 2, 4, 4},  {"armv8", 2, 4, 4},       {"SkylakeX", 0, 4, 0},
                   {"SkylakeX", 1, 4, 0},  {"SkylakeX", 0, 1, 16}};
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++)
        check(builtin_is_better(choices[i].core, choices[i].parallel, choices[i].threads) ==
                  (LANES > choices[i].lanes),
              "the choice for %s", choices[i].core);
#endif
    // Eight equal commands at once, more threads than cores: one model.
    pid_t children[8];
    for (int i = 0; i < 8; i++)
        children[i] = start_trainer(
            0,
            path_of("--threads 2 --tokenizer $D/merges.txt --n-layer 1 --n-embd 64 --n-positions 64 "
                    "--batch-size 4 "
                    "--train $D/text.txt --val-fraction 0 --steps 3 --save-every 9 --quiet --out $D/equal-%d",
                    i));
    for (int i = 0; i < 8; i++) {
        check(wait_for(children[i]) == 0, "one of eight runs at once");
        check(same_files("equal-0/model.safetensors", path_of("equal-%d/model.safetensors", i)),
              "equal commands gave different models");
    }
}

// Fewer threads than asked for, and little memory: no waiting for ever.
static void test_scarce_machine(void) {
    make_inputs();
    Text said;
    const char *limits[] = {"OMP_THREAD_LIMIT=1", "OMP_MAX_ACTIVE_LEVELS=0"};
    for (int i = 0; i < 2; i++) {
        int status =
            run_shell(&said,
                      "%s OMP_NUM_THREADS=2 $T --trainer --tokenizer $D/merges.txt --n-layer 1 --n-embd 64 "
                      "--train $D/text.txt --val-fraction 0 --steps 1 --out $D/limited-%d >$D/said 2>&1",
                      limits[i], i);
        check(status == 0, "%s: status %d, %s", limits[i], status, said.data);
        free(said.data);
    }
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
    int status = run_shell(&said, "ulimit -v 100000; $T --trainer --help >$D/said 2>&1");
#ifdef USE_OPENBLAS
    check(status == 1 && one_error_line(&said, "address space: raise the limit"), "ulimit -v: status %d, %s",
          status, said.data);
#else
    check(status == 0, "ulimit -v: status %d, %s", status, said.data);
#endif
    free(said.data);
    status =
        run_shell(&said, "ulimit -v 800000; $T --trainer --init d48 --matmul builtin --plan >$D/said 2>&1");
    check(status == 0 && strstr(said.data, "weights 6230.4"), "--plan in little memory: status %d, %s",
          status, said.data);
    free(said.data);
#endif
}

static void test_denormals(void) {
    make_inputs();
#if defined(__SSE__) || defined(__aarch64__)
    Text said;
    // Logits that are denormal weights times huge ones: with denormals taken for 0 they are all 0, the loss log V.
    Tokenizer *tokenizer = tokenizer_load(in_tests("merges.txt"));
    Model *model = model_new((Config){tokenizer->vocab_size, 16, 1, 2, 16, 64, 1e-5f, false});
    model_initialise(model, 5);
    for (int c = 0; c < 16; c++) model_tensor(model, LN_F_WEIGHT, 0)->value[c] = 1e-39f;
    for (size_t i = 0; i < model_tensor(model, LM_HEAD, 0)->size; i++)
        model_tensor(model, LM_HEAD, 0)->value[i] *= 1e38f;
    model_save(model, tokenizer, &(KeptFiles){0}, NULL, in_tests("denormal"));
    double loss = 0, wanted = log(tokenizer->vocab_size);
    model_free(model);
    tokenizer_free(tokenizer);
    expect_run(0, &said, "--init $D/denormal --eval --val $D/val.txt --threads 2");
    const char *at = strstr(said.data, "loss ");
    check(at && sscanf(at, "loss %lf", &loss) == 1 && fabs(loss - wanted) < 1e-5, "denormals: %s, not %f",
          said.data, wanted);
    free(said.data);
#endif
}

// ---- documents ----

// Texts that explain the code name its functions (`like_this`) and tests ("like: this"): all of them exist.
static void test_documents(void) {
    static const char *const documents[] = {"dev/derivations.md", "dev/tour.md", "README.md"};
    Text code = read_file("train_gpt2.c"), list = read_file("test_gpt2.c");
    for (size_t i = 0; i < sizeof documents / sizeof *documents; i++) {
        Text text = read_file(documents[i]);
        int functions = 0, named_tests = 0;
        for (char *at = text.data; (at = strpbrk(at, "`\"")) != NULL; at++) {
            char *name = at + 1, quote = *at;
            size_t length = strcspn(name, "`\"\n");
            if (name[length] != quote) continue;
            name[length] = 0;
            at = name + length;
            if (quote == '"' && strstr(name, ": ")) {
                named_tests++;
                check(strstr(list.data, path_of("{\"%s\", test_", name)) != NULL,
                      "%s: there is no test \"%s\"", documents[i], name);
            } else if (quote == '`' && strchr(name, '_') &&
                       name[strspn(name, "abcdefghijklmnopqrstuvwxyz_")] == 0) {
                const char *found = code.data; // as a whole word: a function, a member, a key of config.json
                while ((found = strstr(found, name)) && !strchr("(,; [\"", found[length])) found++;
                functions++;
                check(found != NULL, "%s: there is no `%s` in train_gpt2.c", documents[i], name);
            }
        }
        check(functions > 10 && named_tests >= (i == 0 ? 10 : 0), "%s: names only %d functions and %d tests",
              documents[i], functions, named_tests);
        free(text.data);
    }
    free(code.data);
    free(list.data);
}

// What dev/outline.awk says of train_gpt2.c: where each function, type, table and row of an enum stands.
typedef struct {
    char kind[16], name[64]; // a part's prose: kind "prose"
    int first, last;         // lines; of prose: how many lines, and how many with prose
} Entry;

static const Entry *outline(size_t *count) {
    static Entry *entries;
    static size_t size, capacity;
    FILE *pipe = size ? NULL : popen("awk -f dev/outline.awk train_gpt2.c", "r");
    for (Entry e; pipe && fscanf(pipe, "%15s %63s %d %d", e.kind, e.name, &e.first, &e.last) == 4;) {
        entries = grow(entries, size + 1, &capacity, sizeof *entries);
        entries[size++] = e;
    }
    if (pipe) pclose(pipe);
    *count = size;
    return entries;
}

// The first entry of this name, or one that stands nowhere. kind: NULL for any but prose.
static Entry find_entry(const char *kind, const char *name) {
    size_t count;
    const Entry *entries = outline(&count);
    for (const Entry *e = entries; e < entries + count; e++)
        if (strcmp(e->name, name) == 0 && (kind ? strcmp(e->kind, kind) == 0 : strcmp(e->kind, "prose") != 0))
            return *e;
    return (Entry){0};
}

// The file reads from the model outward: what a reader wants stands early, and no function is too long to be
// seen as a whole.
static void test_layout(void) {
    size_t count;
    const Entry *entries = outline(&count);
    const int model = find_entry("function", "model_forward").first;
    int functions = 0, types = 0;
    for (const Entry *e = entries; e < entries + count; e++) {
        bool is_function = strcmp(e->kind, "function") == 0;
        functions += is_function && e->first < model;
        types += strcmp(e->kind, "type") == 0 && e->first < model;
        check(!is_function || e->last - e->first < 60, "%s has %d lines, more than 60", e->name,
              e->last - e->first + 1);
    }
    const int attention = find_entry("function", "attention_forward").first;
    const int step = find_entry("function", "take_update").last;
    const Entry prose = find_entry("prose", "I"); // Part I
    check(attention > 0 && attention <= 950, "attention_forward is in line %d, after 950", attention);
    check(model > 0 && model <= 1350, "model_forward is in line %d, after 1350", model);
    check(step > 0 && step <= 1550, "take_update ends in line %d, after 1550", step);
    check(functions <= 85 && types <= 25, "%d functions and %d types stand before model_forward", functions,
          types);
    check(4 * prose.last >= prose.first && prose.first > 0, "of %d lines of Part I only %d carry prose",
          prose.first, prose.last);
}

// Links into train_gpt2.c, [name](train_gpt2.c#L123), point at what they name; `make links` repairs them, and
// refuses a name that is nowhere.
static void test_links(void) {
    Text text = read_file("README.md");
    for (char *at = text.data, *link; (link = strstr(at, "](train_gpt2.c#L")); at = link + 1) {
        char name[64];
        const char *start = link;
        while (start > text.data && *start != '[' && *start != '\n') start--;
        snprintf(name, sizeof name, "%.*s", (int)(link - start - 1), start + 1);
        if (*name == '`') memmove(name, name + 1, strlen(name)), name[strcspn(name, "`")] = 0;
        int line = find_entry(NULL, name).first, said = atoi(link + strlen("](train_gpt2.c#L"));
        check(line > 0 && said == line, "README.md: [%s] is in line %d, not %d: make links", name, line,
              said);
    }
    free(text.data);

    const char *wrong =
        "a [warn](train_gpt2.c#L1), [`Batch`](train_gpt2.c#L0) [WTE](train_gpt2.c#L7)b\n[x](y)\n";
    char *wanted =
        xprintf("a [warn](train_gpt2.c#L%d), [`Batch`](train_gpt2.c#L%d) [WTE](train_gpt2.c#L%d)b\n[x](y)\n",
                find_entry("function", "warn").first, find_entry("type", "Batch").first,
                find_entry("row", "WTE").first);
    make_inputs();
    write_text("links.md", wrong);
    check(system("sh dev/links.sh $D/links.md") == 0, "links cannot be repaired");
    Text repaired = read_file(in_tests("links.md"));
    check(strcmp(repaired.data, wanted) == 0, "links become %s, not %s", repaired.data, wanted);
    free(repaired.data);
    write_text("links.md", "[nowhere](train_gpt2.c#L1)");
    uint64_t before = fingerprint(in_tests("links.md"));
    check(system("sh dev/links.sh $D/links.md 2>/dev/null") != 0 &&
              fingerprint(in_tests("links.md")) == before,
          "a name that is nowhere is linked");
    free(wanted);
}

// ---- the list of tests ----

static const struct {
    const char *name;
    void (*function)(void);
} tests[] = {
    {"matmul in float32: shapes, threads, NaN", test_matmul_float32},
    {"matmul in bfloat16: rounding", test_bfloat16_rounding},
    {"matmul in bfloat16: the float32 product rounds", test_matmul_rounded},
    {"matmul in bfloat16: pairs", test_matmul_pairs},
    {"matmul in bfloat16: AMX, where it is or is emulated", test_matmul_amx},
    {"matmul in bfloat16: few rows, from copies", test_matmul_copied},
    {"tokenizer: Unicode classes", test_unicode_classes},
    {"tokenizer: UTF-8, whole and broken", test_utf8},
    {"tokenizer: pieces by GPT-2's rules", test_pieces},
    {"tokenizer: encoding is byte pair encoding", test_encode_is_bpe},
    {"tokenizer: text in parts, any number of threads", test_encode_in_parts},
    {"tokenizer: <|endoftext|>", test_special_token},
    {"tokenizer: vocabulary files", test_tokenizer_files},
    {"tokenizer: damaged vocabularies end in one line", test_damaged_tokenizers},
    {"tokenizer: long runs in short time", test_long_runs},
    {"tokenizer: the program", test_tokenizer_program},
    {"references: all of dev/fixtures, also recomputed and built-in", test_references},
    {"layers: fast_exp", test_exp},
    {"layers: gelu", test_gelu},
    {"layers: embedding", test_embedding},
    {"layers: linear and layernorm", test_linear_and_layernorm},
    {"an adapter (LoRA): forward, gradients by finite differences", test_lora_layer},
    {"layers: attention", test_attention},
    {"layers: cross-entropy", test_cross_entropy},
    {"layers: dropout", test_dropout},
    {"layers: dropout in attention", test_attention_dropout},
    {"model: dropout of each step", test_dropout_of_steps},
    {"model: logits, loss and every gradient", test_model},
    {"adapters (LoRA): the merged model, gradients by the chain rule", test_lora_model},
    {"model: NaN and changes do not reach what is masked", test_poison},
    {"model: padded batches equal sequences alone", test_padding},
    {"model: micro-batches, and none with targets", test_accumulation},
    {"model: rows, targets and accuracy of an update", test_update_counts},
    {"optimizer: AdamW", test_adamw},
    {"optimizer: gradient norm and clipping", test_norm_and_clipping},
    {"optimizer: schedules", test_schedule},
    {"model: freezing", test_freezing},
    {"model: same bits in each run, on any number of threads", test_determinism},
    {"generation: cache", test_cache},
    {"generation: greedy, past the context, several samples", test_generation},
    {"generation: --stop, in tokens and across them", test_stop},
    {"generation: sampling", test_sampling},
    {"generation: --repetition-penalty", test_repetition},
    {"tensors: names, shapes, decay", test_tensor_table},
    {"tensors: initial values", test_initial_values},
    {"tensors: GPT-2's four sizes", test_parameter_counts},
    {"tensors: patterns of names", test_patterns},
    {"JSON: strings", test_json_strings},
    {"JSON: what is written is read again", test_json_written},
    {"JSON: numbers, nesting, members", test_json_values},
    {"JSON: errors with their place", test_wrong_json},
    {"safetensors: round trip", test_safetensors},
    {"safetensors: wrong headers", test_wrong_safetensors},
    {"model folder: round trip to the bit", test_model_folder},
    {"model folder: 16 bits, other names, tensors that are not read", test_other_clothes},
    {"model folder: added tokens, cut anywhere", test_added_tokens},
    {"model folder: tokens that are only named", test_named_tokens},
    {"model folder: a tokenizer's files in other shapes", test_wrong_shapes},
    {"model folder: tokens that the model does not have", test_tokens_beyond_model},
    {"model folder: weights for data/convert.py", test_for_convert},
    {"model folder: 20,000 added tokens", test_many_added_tokens},
    {"model folder: rules that are not GPT-2's", test_other_rules},
    {"model folder: its own end of text; written back as it came", test_own_words},
    {"model folder: heads beside wte and alone", test_stored_heads},
    {"model folder: cut weights end in one line", test_cut_weights},
    {"model folder: a wrong header ends in one line", test_wrong_header},
    {"model folder: wrong tensors end in one line", test_wrong_tensors},
    {"config.json: defaults, refused variants, sizes", test_config},
    {"text: documents, windows", test_text_data},
    {"text: globs, a split", test_globs_and_splits},
    {"JSONL: prompts and lengths", test_jsonl_data},
    {"JSONL: rows", test_jsonl_rows},
    {"data: what is refused", test_refused_data},
    {"order of examples: each once an epoch, whatever its length", test_dataset_order},
    {"token shards: llm.c's, and wrong ones", test_shards},
    {"command line: wrong input is one line, and changes nothing", test_wrong_input},
    {"command line: every option, its letter, --help", test_options},
    {"command line: options that a checkpoint remembers", test_remembered_options},
    {"--find-rate: as training begins, and nothing else is touched", test_find_rate},
    {"command line: --plan", test_plan},
    {"command line: warm-up in steps, percent and epochs", test_warmup},
    {"command line: rows of the largest batch", test_largest_batch},
    {"command line: --plan's share of work that freezing skips", test_skipped_work},
    {"command line: weights in other formats name the converter", test_other_formats},
    {"progress: cut to the terminal's width, no escape sequences", test_progress},
    {"progress: the time that is left", test_time_left},
    {"generation: text as it streams", test_stream},
    {"generation: without a prompt", test_no_prompt},
#if defined(__linux__) && defined(_OPENMP)
    {"threads: each has a core of its own, if there are as many", test_pin_threads},
    {"threads: on a busy machine fewer are suggested", test_busy_machine},
#endif
    {"a run: loss, accuracy and exact match of an evaluation", test_evaluate},
    {"a run: token shards and no tokenizer", test_without_tokenizer},
    {"a run: log, loss, --eval, progress, --quiet", test_run},
    {"a run: --freeze and --overfit", test_freeze_and_overfit},
    {"a run: --generate, --prompt -, --stop while text streams", test_generate},
    {"a run: --prompts, --answer-only", test_prompts},
    {"a run: several --val, held-out samples, exact match in the log", test_several_val},
    {"a run: --predictions", test_predictions},
    {"a talk: answers in a pipe, /reset, a full context", test_talk},
    {"a talk: which turns a full context forgets", test_talk_room},
    {"a talk: on a terminal, ^C and ^D", test_talk_on_terminal},
    {"a talk: ^C while nobody reads", test_talk_unread},
    {"resume: the same run to the bit after any signal", test_resume},
    {"adapters (LoRA): files, threads, recomputed, resumed, trained on", test_lora_run},
    {"adapters (LoRA): what is refused changes nothing", test_lora_refusals},
    {"resume: the same run to the bit after kills", test_kills},
    {"resume: a run in bfloat16, to the bit", test_resumed_bfloat16},
    {"resume: tensors that were not frozen, and that were", test_resumed_freezing},
    {"checkpoints: the best stays and is the result; --patience", test_best_and_patience},
    {"checkpoints: a full disk leaves the older one whole", test_full_disk},
    {"checkpoints: nothing that is not finite is saved", test_diverging},
    {"one run at a time: a lock on --out that any death releases", test_lock},
    {"faults: killed at a call that changes files, or that fails", test_faults},
    {"log.csv: a full disk, a signal in the last evaluation", test_log},
    {"--out: unreadable, a link in it", test_odd_folders},
    {"--out: a finished run, and other options", test_finished},
    {"--out: damaged trainer_state.json", test_damaged_state},
    {"output: closed, full, a reader that goes away", test_output},
    {"mapped files: cut off, written over, replaced", test_changed_files},
    {"not finite: an error in --eval, --generate and training", test_not_finite},
    {"the machine: --matmul auto takes the same each time", test_matmul_choice},
    {"the machine: fewer threads, little memory", test_scarce_machine},
    {"the machine: denormals count as 0", test_denormals},
    {"documents: the functions and tests that they name exist", test_documents},
    {"documents: the model stands early, functions are short", test_layout},
    {"documents: links point at what they name", test_links},
};

// test_gpt2 --reference DIR...: compares with each, and prints the deviations. --dump FILE (with one DIR only)
// writes what was computed; with --precision bfloat16 the deviations are those of rounded products.
static int compare_references(int count, char **words) {
    const char *dump = NULL, *folders[1000];
    int folder_count = 0, failed = 0;
    program_name = "test_gpt2";
    for (int i = 0; i < count; i++) {
        if (strcmp(words[i], "--dump") == 0 && i + 1 < count)
            dump = words[++i];
        else if (strcmp(words[i], "--precision") == 0 && i + 1 < count)
            choose_precision(&(Options){.precision = strcmp(words[++i], "bfloat16") == 0});
        else if (folder_count < 1000)
            folders[folder_count++] = words[i];
    }
    if (folder_count < 1 || (dump && folder_count > 1))
        die_usage("--reference DIR... [--precision bfloat16], or --reference DIR --dump FILE");
    for (int i = 0; i < folder_count; i++) failed += !compare_reference(folders[i], dump, false, false);
    printf("%d passed, %d failed\n", folder_count - failed, failed);
    return failed > 0;
}

int main(int argc, char **argv) {
    snprintf(self_path, sizeof self_path, "%s", argv[0]);
    if (argc > 1 && strcmp(argv[1], "--trainer") == 0) return train_gpt2_main(argc - 1, argv + 1);
    if (argc > 2 && strcmp(argv[1], "--child") == 0) {
        child_text = getenv("CHILD_TEXT");
        child_path = getenv("CHILD_PATH");
        ((void (*)(void))((char *)run_child + atol(argv[2])))();
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "--reference") == 0) return compare_references(argc - 2, argv + 2);
    int passed = 0, failed = 0;
    double started = now();
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        bool wanted = argc == 1;
        for (int j = 1; j < argc; j++) wanted = wanted || strstr(tests[i].name, argv[j]);
        if (!wanted) continue;
        double begin = now();
        current_test = tests[i].name;
        failures_of_test = 0;
        checks_of_test = 0;
        fflush(stdout);
        tests[i].function();
        check(checks_of_test > 0, "made no check at all");
        printf("%-6s %-60s %6.2f s\n", failures_of_test ? "FAILED" : "ok", tests[i].name, now() - begin);
        failures_of_test ? failed++ : passed++;
    }
    remove_folder(temporary_folder());
    printf("%.1f s\n%d passed, %d failed\n", now() - started, passed, failed);
    return failed > 0 || passed == 0;
}
