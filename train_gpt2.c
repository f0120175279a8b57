// train_gpt2.c - train, fine-tune, evaluate and sample GPT-2 on CPU cores, in one file made for reading.
//
//   make train_gpt2                                      with OpenBLAS, or without any library:
//   cc -O3 -march=native -fopenmp train_gpt2.c -lm       with the built-in matmul, also a whole fast program
//   ./train_gpt2 --help
//
// ---- the parts ----
//
//   I.   GPT-2           1 support   2 random numbers   3 parameters   4 batches   5 layers   6 model
//                        7 optimizer   8 one training step   9 LoRA
//   II.  Text            10 tokenizer: text <-> token ids   11 generation
//   III. Files and data  12 files and JSON   13 model folders, checkpoints   14 text, shards, JSONL examples
//   IV.  Running it      15 ranks, evaluation, log, the training loop   16 options and main
//   V.   Speed           17 how a product of matrices gets fast   18 with half the bits, faster
//                        19 the one matmul, and a fast exp
//
// Part I is the whole of GPT-2 and of one training step; read it from top to bottom. The other parts are
// chapters to open when you want them. dev/tour.md follows one batch through Part I with real numbers, and
// dev/derivations.md derives every gradient.
//
// ---- the letters ----
//
//   B   sequences (texts) in a batch         R   rows: all tokens of a batch, one row each
//   T   positions in a sequence              V   vocabulary: how many different tokens there are
//   P   positions that the model knows       C   channels: floats that describe a row (n_embd)
//   L   blocks, each the same few layers (n_layer)          F   channels inside a block's MLP (n_inner)
//   NH  attention heads                      HS  head size, C / NH
//   M, N, K   the sizes of any one product of matrices
//
// A shape such as (R, C) is row-major: R rows of C floats, one row after another.
//
// ---- the conventions ----
//
// - A d in front of a name means gradient: dx is d(loss)/dx, how much the loss grows when x grows. It has the
//   shape of x. X_forward computes a layer; X_backward receives the gradient of the layer's output and
//   computes the gradients of its inputs and weights.
// - NULL for an array means not wanted, or not there. Frozen tensors, those not trained, have gradient NULL.
// - A function whose name begins with a type's name works on that type: batch_clear(), model_free(). What a
//   function returns in fresh memory belongs to the caller: X_free() or free() releases it.
// - die() ends the program with one line on stderr. It is for whatever the outside world does wrong. assert()
//   is for our own mistakes only.
// - `#pragma omp parallel for` shares a loop's iterations out to all threads. Each thread writes rows or
//   columns of its own and sums in a fixed order, so these loops give the same result with any number of
//   threads. `omp simd` allows the compiler to work on several elements at once, 4 to 16 in one instruction.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <regex.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_in_parallel(void) { return 0; }
static void omp_set_num_threads(int n) { (void)n; }
#endif
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__)
#define USE_AMX
#include <sys/syscall.h>
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
#if defined(USE_ACCELERATE)
#include <Accelerate/Accelerate.h>
#elif defined(USE_CBLAS)
#include <cblas.h>
#endif

// #####################################################################################################
// PART I. GPT-2
// #####################################################################################################
// GPT-2 reads a text and says what comes next. Text is cut into tokens, pieces such as " the" or "ing", and
// each token has a number, its id. For each position the model computes V numbers, the logits: the higher the
// logit of a token, the likelier that token comes next. Softmax turns logits into probabilities:
//
//     p[v] = exp(logit[v]) / sum over w of exp(logit[w])
//
// The text itself says which token did come next. The loss at a position is -log(p[that token]): 0 if the
// model was sure of it, large if it was surprised. For example V = 3 and logits 2, 1, 0: exp gives 7.39,
// 2.72, 1.00, their sum is 11.11, and p = 0.665, 0.245, 0.090. If the first token came, the loss is
// -log(0.665) = 0.41; if the third came, it is 2.41. A model that knows nothing gives each token 1 / V: with
// GPT-2's V = 50257 its loss is log(50257) = 10.8 (log is the natural logarithm). Training makes the mean
// loss smaller, step by step:
//
//     forward     from token ids through all layers to the logits and the loss
//     backward    from the loss back through all layers: the gradient of each parameter, that is, how much
//                 the loss changes when this parameter changes
//     update      each parameter moves a little way against its gradient
//
// The parameters are the numbers that training changes: 124 million in the smallest GPT-2, kept in arrays
// called tensors. Fine-tuning is the same procedure. It only begins with parameters that somebody trained.
//
// The whole model on one page; sections 3 to 6 fill it in. Each token becomes a row x of C numbers:
//
//     embedding   x = the token's row of one table + the position's row of another
//     L blocks    x = x + attention(layernorm(x))   rows of one sequence exchange what they know
//                 x = x + mlp(layernorm(x))         each row is worked on alone
//     head        logits = layernorm(x) · headᵀ     V numbers for each row
//
// x is called the residual stream: blocks never replace it, they only add to it. A linear layer is y = xW +
// b, with a matrix W (the weight) and a vector b (the bias), which are learned. One whose y is added to the
// residual stream is called a projection. A layernorm brings a row's numbers to a common scale. An MLP
// (multi-layer perceptron) is linear, gelu, linear, where gelu is a simple curve.
//
// Three words have two meanings. The head is the last matrix, (V, C); an attention head is one of NH parts of
// attention. A block is one of the L; a block of keys is at most 256 keys. A layer is a step of the
// computation such as layernorm (section 5); in names that files share (n_layer, `layer`) it is a block.
//
// On a first reading, read the comment on matmul at the end of section 1, then go on at section 3.

// =====================================================================================================
// 1. Support
// =====================================================================================================
// C lacks two things: errors that say in one line what is wrong, and allocation that never returns NULL.

static const char *program_name = "train_gpt2";
static bool progress_line_open = false; // the terminal's last line has no newline yet

// Prints "program: message" on a line of its own.
static void __attribute__((format(printf, 1, 2))) warn(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "%s%s: ", progress_line_open ? "\n" : "", program_name);
    progress_line_open = false;
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

// die() ends the program with status 1: something outside is wrong. die_usage(), with 2: the command line is.
static void __attribute__((noreturn)) end_program(int status); // exit() of all its processes (Part IV)
#define die(...) (warn(__VA_ARGS__), end_program(1))
#define die_usage(...) (warn(__VA_ARGS__), end_program(2))

static void *xrealloc(void *pointer, size_t size) {
    void *result = realloc(pointer, size ? size : 1);
    if (!result) die("out of memory: %zu bytes were asked for", size);
    return result;
}

static void *xmalloc(size_t size) { return xrealloc(NULL, size); }

static void *xcalloc(size_t count, size_t size) {
    void *result = calloc(count ? count : 1, size ? size : 1);
    if (!result) die("out of memory: %zu x %zu bytes were asked for", count, size);
    return result;
}

// Returns count floats, not cleared, aligned to a cache line (64 bytes, what memory hands over at once).
static float *xfloats(size_t count) {
    void *result = NULL;
    if (count > SIZE_MAX / sizeof(float) || posix_memalign(&result, 64, count ? count * sizeof(float) : 64))
        die("out of memory: %.1f MB were asked for", (double)count * sizeof(float) / 1e6);
    return result;
}

// printf into fresh memory.
static char *__attribute__((format(printf, 1, 2))) xprintf(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char *result = NULL;
    if (vasprintf(&result, format, arguments) < 0) die("out of memory while formatting a line");
    va_end(arguments);
    return result;
}

static char *xstrdup(const char *string) { return xprintf("%s", string); }

// Makes room for `needed` elements in a growing array: capacity doubles, so appending is cheap.
static void *grow(void *data, size_t needed, size_t *capacity, size_t element_size) {
    if (needed <= *capacity) return data;
    size_t larger = *capacity ? *capacity * 2 : 64;
    *capacity = larger < needed ? needed : larger;
    if (*capacity > SIZE_MAX / element_size)
        die("out of memory: an array of %zu elements was asked for", needed);
    return xrealloc(data, *capacity * element_size);
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Several arrays often live in one block of memory. Each begins on a cache line: lengths are rounded up.
static size_t aligned_size(size_t floats) { return (floats + 15) / 16 * 16; }

typedef struct {
    float **array; // where the pointer to this part goes
    size_t size;   // floats
} Part;

// Divides `memory` into parts, one after another, and returns how many floats they take together. With memory
// NULL it only counts: so the size of a piece of memory and its layout come from the same list.
static size_t lay_out(float *memory, const Part *parts, size_t count) {
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        if (memory) *parts[i].array = memory + used;
        used += aligned_size(parts[i].size);
    }
    return used;
}

// ---- declared here, explained later ----
// Part I uses these functions before their code is shown. What they mean is all that one needs to know here.

// The product of two matrices: C = op(A) · op(B), or C += op(A) · op(B) with `accumulate`. op(A) is (M, K),
// op(B) is (K, N), C is (M, N). op(A) is A, or Aᵀ if transpose_a: then A is stored (K, M). The same for B.
//     for m < M, n < N:   C[m][n] = sum over k of op(A)[m][k] · op(B)[k][n]
// ldc, lda and ldb ("leading dimension") are the lengths of rows as stored. They are larger than what is used
// when a matrix is a part of a wider one. Matmul takes nearly all the time of training; Part V makes it fast.
//     y += x · w      x (R, K), w (K, N):             matmul(y, N, x, K, false, w, N, false, R, N, K, true)
//     dx = dy · wᵀ    dy (R, N), w stored (K, N):     matmul(dx, K, dy, N, false, w, N, true, R, K, N, false)
static void matmul(float *C, size_t ldc, const float *A, size_t lda, bool transpose_a, const float *B,
                   size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, bool accumulate);

static inline float fast_exp(float x);          // e to the power of x. Part V
static float largest_of(const float *x, int n); // the largest of x[0 .. n - 1]. Part V

// =====================================================================================================
// 2. Random numbers
// =====================================================================================================
// Training needs chance in three places: initial parameters, the order of examples (the texts to learn from),
// and dropout (section 5). Usual generators have a state that each draw changes. These have none. A random
// stream is an endless sequence of draws, named by a number, and its draw number `index` is a pure function of
// both. So any draw can be made again, by any thread, and after an interruption.

// A hash: each bit of x changes about half the bits of the result. (SplitMix64: Steele, Lea, Flood 2014.)
static uint64_t mix_bits(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// A different random stream for each pair, for instance (seed, number of the update).
static uint64_t random_stream(uint64_t seed, uint64_t purpose) { return mix_bits(mix_bits(seed) ^ purpose); }

static uint64_t random_bits(uint64_t stream, uint64_t index) {
    return mix_bits(stream + index * 0xd1342543de82ef95u);
}

// Uniform in [0, 1), a multiple of 2^-24: exactly representable.
static float random_uniform(uint64_t stream, uint64_t index) {
    return (float)(random_bits(stream, index) >> 40) * 0x1p-24f;
}

// Standard normal, by Box and Muller (1958).
static float random_normal(uint64_t stream, uint64_t index) {
    double u = ((double)(random_bits(stream, 2 * index) >> 11) + 0.5) * 0x1p-53; // never 0
    double v = (double)(random_bits(stream, 2 * index + 1) >> 11) * 0x1p-53;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v)); // 2 pi v
}

// =====================================================================================================
// 3. Parameters
// =====================================================================================================
// A model is a list of tensors. The rest of the program asks of each: what is it called in a file, what is
// its shape, how does it start? One table answers for all of GPT-2, and no other place lists tensors.

// What distinguishes one GPT-2 from another. A model's file config.json has these sizes under the same names.
typedef struct {
    int vocab_size, n_positions, n_layer, n_head, n_embd, n_inner;
    float layer_norm_epsilon; // eps of the layernorms
    bool tie_word_embeddings; // the head is the token embedding itself, see model_head
} Config;

// A row of the table. The names are those of Hugging Face, whose model files everybody uses; a * stands for
// the block's number. Shapes are spelled in letters, with Q = 3C for query, key and value side by side.
// Matrices are [in, out], as in y = xW + b; only the head is (V, C) and used transposed.
//
// Initial values: normal with deviation 0.02, as in Hugging Face's GPT-2. Each block adds two projections to
// the residual stream, 2L in all. To keep their sum small, their deviation is divided by sqrt(2L).
//
// The smallest GPT-2 has V = 50257, P = 1024, C = 768, F = 4C, L = NH = 12. wte has 38.60 million values, wpe
// 0.79, each block 12 C² + 13 C = 7.088 million: 38.60 + 0.79 + 12 · 7.088 = 124.4 million in all.
typedef enum { ZEROS, ONES, NORMAL, NORMAL_RESIDUAL, UNIFORM } Initial;

// clang-format off
enum {
    WTE, WPE,
    LN_1_WEIGHT, LN_1_BIAS, ATTN_WEIGHT, ATTN_BIAS, ATTN_PROJ_WEIGHT, ATTN_PROJ_BIAS,
    LN_2_WEIGHT, LN_2_BIAS, FC_WEIGHT, FC_BIAS, FC_PROJ_WEIGHT, FC_PROJ_BIAS,
    LN_F_WEIGHT, LN_F_BIAS, LM_HEAD, LORA_A, LORA_B, TENSOR_KINDS
};

static const struct {
    const char *name, *shape;
    Initial initial;
} tensor_table[TENSOR_KINDS] = {
    [WTE]              = {"transformer.wte.weight",               "VC", NORMAL},          // of tokens
    [WPE]              = {"transformer.wpe.weight",               "PC", NORMAL},          // of positions
    [LN_1_WEIGHT]      = {"transformer.h.*.ln_1.weight",          "C",  ONES},            // layernorm
    [LN_1_BIAS]        = {"transformer.h.*.ln_1.bias",            "C",  ZEROS},
    [ATTN_WEIGHT]      = {"transformer.h.*.attn.c_attn.weight",   "CQ", NORMAL},          // to q, k and v
    [ATTN_BIAS]        = {"transformer.h.*.attn.c_attn.bias",     "Q",  ZEROS},
    [ATTN_PROJ_WEIGHT] = {"transformer.h.*.attn.c_proj.weight",   "CC", NORMAL_RESIDUAL}, // out of attention
    [ATTN_PROJ_BIAS]   = {"transformer.h.*.attn.c_proj.bias",     "C",  ZEROS},
    [LN_2_WEIGHT]      = {"transformer.h.*.ln_2.weight",          "C",  ONES},            // layernorm
    [LN_2_BIAS]        = {"transformer.h.*.ln_2.bias",            "C",  ZEROS},
    [FC_WEIGHT]        = {"transformer.h.*.mlp.c_fc.weight",      "CF", NORMAL},          // into the MLP
    [FC_BIAS]          = {"transformer.h.*.mlp.c_fc.bias",        "F",  ZEROS},
    [FC_PROJ_WEIGHT]   = {"transformer.h.*.mlp.c_proj.weight",    "FC", NORMAL_RESIDUAL}, // out of the MLP
    [FC_PROJ_BIAS]     = {"transformer.h.*.mlp.c_proj.bias",      "C",  ZEROS},
    [LN_F_WEIGHT]      = {"transformer.ln_f.weight",              "C",  ONES},            // last layernorm
    [LN_F_BIAS]        = {"transformer.ln_f.bias",                "C",  ZEROS},
    [LM_HEAD]          = {"lm_head.weight",                       "VC", NORMAL},          // unless it is wte
    [LORA_A]           = {"*.lora_A.weight",                      "rK", UNIFORM},         // section 9: beside a
    [LORA_B]           = {"*.lora_B.weight",                      "Nr", ZEROS},           // matrix named *
};
// clang-format on
enum { BLOCK_TENSORS = LN_F_WEIGHT - LN_1_WEIGHT, LORA_ROOM = 4 * 2 }; // per layer

typedef struct Tensor {
    char *name; // Hugging Face's, in full
    int kind, layer;
    int dims;
    size_t shape[2], size;       // size: elements
    bool frozen, decay;          // decay: pulled towards 0, see below
    float *value;                // (size) in the model's own memory or mapped from its file
    float *gradient;             // (size) NULL when frozen, and so are the next two
    float *exp_avg, *exp_avg_sq; // (size) the optimizer's two moments, section 7
    struct Tensor *adapter;      // with LoRA (section 9) a matrix has two more beside it, adapter[0] and [1]
    float adapter_scale;
} Tensor;

// The bytes of a file, seen as memory. A write changes the memory only, never the file. Part III.
typedef struct {
    char *data;
    size_t size;
} Mapping;

static void unmap_file(Mapping *mapping);

typedef struct {
    Config config;
    int tensor_count;
    Tensor *tensors;
    int lowest_trained;  // the backward pass ends at this block; -1: at the embeddings; L: before any block
    float *value_memory; // holds all values; NULL when they are in value_file
    Mapping value_file;  // the model's file; a page is copied when training first writes to it
    float *training_memory; // holds gradients, and moments unless these are in moment_file
    Mapping moment_file;    // of a checkpoint, the saved state of an interrupted run
    int lora_rank;          // 0: no adapters, the next two are not used
    float lora_alpha, *adapter_memory;
} Model;

static bool kind_is_per_layer(int kind) { return kind >= LN_1_WEIGHT && kind < LN_F_WEIGHT; }

// Tensors stand in the order of the table, block after block: those of a block are t[LN_1_WEIGHT] to
// t[FC_PROJ_BIAS] with t = model->tensors + layer * BLOCK_TENSORS. For other kinds `layer` does not matter.
static Tensor *model_tensor(const Model *model, int kind, int layer) {
    if (!kind_is_per_layer(kind)) // kinds after the blocks: the enum counts one block already
        layer = kind < LN_1_WEIGHT ? 0 : model->config.n_layer - 1;
    return &model->tensors[layer * BLOCK_TENSORS + kind];
}

// The head (V, C). When it is tied, it is wte itself: the rows that turn tokens into vectors make the logits.
static Tensor *model_head(const Model *model) {
    return model_tensor(model, model->config.tie_word_embeddings ? WTE : LM_HEAD, 0);
}

// Makes the list of tensors, without values. Everything is trainable and nothing is decayed.
static Model *model_new(Config config) {
    const size_t C = (size_t)config.n_embd;
    const size_t size_of[] = {['V'] = (size_t)config.vocab_size,
                              ['P'] = (size_t)config.n_positions,
                              ['C'] = C,
                              ['F'] = (size_t)config.n_inner,
                              ['Q'] = 3 * C};
    Model *model = xcalloc(1, sizeof *model);
    model->config = config;
    model->lowest_trained = -1;
    model->tensors =
        xcalloc((size_t)config.n_layer * (BLOCK_TENSORS + LORA_ROOM) + TENSOR_KINDS, sizeof *model->tensors);
    for (int kind = 0; kind < LORA_A; kind++) {
        if (kind == LM_HEAD && config.tie_word_embeddings) continue;
        const char *name = tensor_table[kind].name, *shape = tensor_table[kind].shape;
        const char *star = strchr(name, '*');
        for (int layer = 0; layer < (star ? config.n_layer : 1); layer++) {
            Tensor *tensor = model_tensor(model, kind, layer);
            *tensor = (Tensor){.kind = kind, .layer = layer, .dims = (int)strlen(shape), .size = 1};
            tensor->name =
                star ? xprintf("%.*s%d%s", (int)(star - name), name, layer, star + 1) : xstrdup(name);
            for (int d = 0; d < tensor->dims; d++) {
                tensor->shape[d] = size_of[(int)shape[d]];
                tensor->size *= tensor->shape[d];
            }
            model->tensor_count++;
        }
    }
    return model;
}

static void model_free(Model *model) {
    for (int i = 0; i < model->tensor_count; i++) free(model->tensors[i].name);
    free(model->tensors);
    free(model->value_memory);
    free(model->adapter_memory);
    free(model->training_memory);
    unmap_file(&model->value_file);
    unmap_file(&model->moment_file);
    free(model);
}

// Places the values of the tensors from number `first` on in fresh memory, one behind another.
static float *allocate_values(Model *model, int first) {
    size_t total = 0;
    for (int i = first; i < model->tensor_count; i++) total += aligned_size(model->tensors[i].size);
    float *memory = xfloats(total);
    for (int i = first; i < model->tensor_count; memory += aligned_size(model->tensors[i++].size))
        model->tensors[i].value = memory;
    return memory - total;
}

// A model to be trained from nothing. The same seed gives the same values, up to the last digits of log().
static void model_initialise(Model *model, uint64_t seed) {
    model->value_memory = allocate_values(model, 0);
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *tensor = &model->tensors[i];
        Initial initial = tensor_table[tensor->kind].initial;
        float deviation =
            initial == NORMAL_RESIDUAL ? 0.02f / sqrtf(2.0f * (float)model->config.n_layer) : 0.02f;
        uint64_t stream = random_stream(seed, (uint64_t)i);
#pragma omp parallel for
        for (size_t j = 0; j < tensor->size; j++) {
            bool constant = initial == ZEROS || initial == ONES;
            tensor->value[j] = constant ? initial == ONES : deviation * random_normal(stream, j);
        }
    }
}

// ---- what is trained ----
// Fine-tuning may leave a part of the model as it is. A frozen tensor keeps its values, bit for bit, and
// saves time and memory: it has no gradient and no moments. The user names tensors by regular expressions,
// such as "wte|wpe" or "h\.[0-5]\.": POSIX extended ones, which may match any part of the name.
typedef struct {
    const char **items;
    size_t size, capacity;
} Patterns;

static bool patterns_match(const Patterns *patterns, const char *name); // Part IV

// Decides which tensors are frozen, which are decayed, and how deep the backward pass must go. Decay (section
// 7) pulls values towards 0, which keeps matrices and embeddings from growing without need. The patterns that
// no_decay has by default leave out biases, which are few, and layernorms, whose weight should stay near 1.
static void model_set_training(Model *model, const Patterns *freeze, const Patterns *no_decay) {
    model->lowest_trained = model->config.n_layer;
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *tensor = &model->tensors[i];
        bool beside_adapters = model->lora_rank > 0 && tensor->kind < LORA_A;
        tensor->frozen = beside_adapters || patterns_match(freeze, tensor->name);
        tensor->decay = !patterns_match(no_decay, tensor->name);
        bool embedding = tensor->kind <= WPE,
             after_blocks = tensor->kind >= LN_F_WEIGHT && tensor->kind <= LM_HEAD;
        int depth = embedding ? -1 : after_blocks ? model->config.n_layer : tensor->layer;
        if (!tensor->frozen && depth < model->lowest_trained) model->lowest_trained = depth;
    }
}

// Makes room for gradients and for the optimizer's moments (zero at first) of what is trained; without
// moments when they come from a checkpoint, the saved state of an interrupted run.
static void model_allocate_training(Model *model, bool with_moments) {
    size_t total = 0;
    for (int i = 0; i < model->tensor_count; i++)
        total += model->tensors[i].frozen ? 0 : aligned_size(model->tensors[i].size);
    size_t floats = with_moments ? 3 * total : total;
    free(model->training_memory);
    float *at = model->training_memory = xfloats(floats);
    memset(at, 0, floats * sizeof(float));
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *tensor = &model->tensors[i];
        tensor->gradient = tensor->exp_avg = tensor->exp_avg_sq = NULL;
        if (tensor->frozen) continue;
        tensor->gradient = at;
        if (with_moments) {
            tensor->exp_avg = at + total;
            tensor->exp_avg_sq = at + 2 * total;
        }
        at += aligned_size(tensor->size);
    }
}

// =====================================================================================================
// 4. Batches
// =====================================================================================================
// A batch is what the model looks at together: a few sequences of tokens. They differ in length. The usual
// remedy is to fill them up to a rectangle with a filler called PAD, and to hand the model two masks that it
// must combine: causal (a position must not see later ones, or it would read the answer) and PAD (no position
// may see filler). Here PAD never enters the model. A batch is a list of sequences packed row after row:
//
//     padded, B = 3, T = 5          packed, R = 9
//     I like tea . .                row       0 1    2    3   4    5    6  7      8
//     Hi . . . .                    token     I like tea  Hi  The  cat sat there  !
//     The cat sat there !           position  0 1    2    0   0    1    2  3      4
//     (. is PAD)                    first_row 0           3   4                     (9)
//
// Row i of sequence s sees rows first_row[s] .. i, and nothing else exists: both masks together have become a
// range. It costs no time, and nothing can leak through it.
//
// A row's target is the next token of its sequence: what the model should predict there. In the picture these
// are: like, tea, none | none | cat, sat, there, !, none. All rows are trained at once: row 1 must predict
// "tea" from "I like", and cannot see row 2. So one pass answers one question for each row. A row with a
// target is scored. When a model learns to answer questions, only the answer's tokens are targets.

typedef struct {
    int sequences, rows;
    int targets;    // how many rows are scored
    int *first_row; // (sequences + 1) the last one is `rows`
    int *token;     // (rows)
    int *position;  // (rows) counts the tokens of the sequence: 0, 1, 2, ...
    int *target;    // (rows) the token to predict here, or -1: not scored
    size_t *number; // (rows) tells rows of an update apart, in whichever batch they are; NULL: 0, 1, 2, ...
    size_t row_capacity, sequence_capacity;
} Batch;

static void batch_clear(Batch *batch) {
    batch->first_row = grow(batch->first_row, 1, &batch->sequence_capacity, sizeof(int));
    batch->sequences = batch->rows = batch->targets = batch->first_row[0] = 0;
}

static void batch_free(Batch *batch) {
    free(batch->first_row);
    free(batch->token);
    free(batch->position);
    free(batch->target);
    free(batch->number);
    *batch = (Batch){0};
}

// Appends a row to the sequence that is being built.
static void batch_add_row(Batch *batch, int token, int position, int target) {
    size_t row = (size_t)batch->rows++, capacity = batch->row_capacity;
    batch->token = grow(batch->token, row + 1, &batch->row_capacity, sizeof(int));
    if (batch->row_capacity > capacity) { // the other two keep pace
        batch->position = xrealloc(batch->position, batch->row_capacity * sizeof(int));
        batch->target = xrealloc(batch->target, batch->row_capacity * sizeof(int));
    }
    batch->token[row] = token;
    batch->position[row] = position;
    batch->target[row] = target;
    batch->targets += target >= 0;
}

// Ends the sequence that is being built; it may be empty.
static void batch_end_sequence(Batch *batch) {
    size_t needed = (size_t)batch->sequences + 2;
    batch->first_row = grow(batch->first_row, needed, &batch->sequence_capacity, sizeof(int));
    batch->first_row[++batch->sequences] = batch->rows;
}

// =====================================================================================================
// 5. Layers
// =====================================================================================================
// A layer turns rows x into rows y. Training needs it twice. Forward: y from x. Backward: dy, the gradient of
// the loss with respect to y, is given; the chain rule turns it into dx, for the layer below, and into the
// gradients of the layer's own weights. Both functions stand side by side, the formula above each.
//
// The chain rule with single numbers: y = w x + b with w = 2, x = 3, b = 1, so y = 7. The layer above reports
// dy = 0.5: when y grows by a tiny e, the loss grows by 0.5 e. Then
//     dx = dy · w = 1.0     x acts on y with slope w; dx becomes the dy of the layer below
//     dw = dy · x = 1.5     w acts on y with slope x: this is why the forward pass has to keep x
//     db = dy     = 0.5
// When a number is used in several places, the gradients of all its uses are added.
//
// Some gradients are overwritten, some added to:
// - A weight's or bias's: the first batch of an update overwrites it (`accumulate` is false), the others add.
// - The two embedding tables': always added to; they are cleared first (model_forward_backward).
// - dx of linear, attention and gelu: overwritten. dx of a layernorm: added to, since x also passes it by.

// ---- dropout ----
// A model trained for long on few examples learns them by heart. Dropout makes that harder. It hides numbers
// at random: each becomes 0 with probability p, and the others grow by 1 / (1 - p), which keeps the average
// as it was (Srivastava et al. 2014). It is used in training only, and it is off by default.
//   y = x · keep / (1 - p),   keep = 0 with probability p, else 1
// Which numbers are hidden is a pure function of random stream and index. So the backward pass draws the same
// choice again, and no mask is stored. The index counts from the row's number in the update.
typedef struct {
    float probability; // 0: no dropout
    uint64_t stream;
    const size_t *number; // Batch's
} Dropout;

static inline float dropout_factor(Dropout dropout, uint64_t index) {
    return random_uniform(dropout.stream, index) < dropout.probability ? 0 : 1 / (1 - dropout.probability);
}

static inline size_t row_number(Dropout d, int r) { return d.number ? d.number[r] : (size_t)r; }

// y = residual + dropout(x), where the residual is the stream that x joins; NULL for none. y may be x. All
// (R, C). Backward: dx = dropout(dy), which is the same function with the same Dropout.
static void dropout_add(float *y, const float *residual, const float *x, Dropout dropout, int R, int C) {
#pragma omp parallel for
    for (int r = 0; r < R; r++)
        for (size_t c = 0, i = (size_t)r * C, index = row_number(dropout, r) * C; c < (size_t)C; c++, i++)
            y[i] = (residual ? residual[i] : 0) + x[i] * dropout_factor(dropout, index + c);
}

// ---- embedding ----
// A token id is only a name: 995 is not more than 994. So the model keeps a vector of C numbers for each
// token in a table, wte, and learns these vectors like all its parameters. A second table, wpe, has a vector
// for each position, since nothing else tells the later layers where in the sequence a row stands.
//   x[r] = wte[token[r]] + wpe[position[r]]
//   x (R, C); wte (V, C); wpe (P, C); token, position (R)
static void embedding_forward(float *x, const float *wte, const float *wpe, const int *token,
                              const int *position, int R, int C) {
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        const float *t = wte + (size_t)token[r] * C, *p = wpe + (size_t)position[r] * C;
        for (int c = 0; c < C; c++) x[(size_t)r * C + c] = t[c] + p[c];
    }
}

// Many rows have the same token, and their gradients all add up in one row of dwte. If threads shared out the
// rows, two of them could add to the same place at once. So each thread takes columns of its own instead.
enum { COLUMN_SLAB = 64 };

// dtable[index[r]] += dx[r]: for wte by token, for wpe by position. It adds; see model_forward_backward.
//   dx (R, C); dtable (V or P, C); index (R)
static void embedding_backward(float *dtable, const float *dx, const int *index, int R, int C) {
#pragma omp parallel for
    for (int slab = 0; slab < C; slab += COLUMN_SLAB) {
        int end = slab + COLUMN_SLAB < C ? slab + COLUMN_SLAB : C;
        for (int r = 0; r < R; r++) {
            float *d = dtable + (size_t)index[r] * C;
            const float *from = dx + (size_t)r * C;
            for (int c = slab; c < end; c++) d[c] += from[c];
        }
    }
}

// ---- linear ----
static void lora_forward(float *y, const float *x, const Tensor *weight, int R); // section 9
static void lora_backward(float *dx, const float *dy, const float *x, const Tensor *weight, bool accumulate,
                          int R);

// The workhorse: each of the N outputs is a weighted sum of all K inputs plus a constant, the bias. Row r of
// y depends on row r of x only, and the weights are the same for all rows: one product of matrices.
//   y = residual + x · weight + bias, with residual NULL for none
//   y, residual (R, N); x (R, K); weight (K, N); bias (N)
// Bias and residual are written into y first, and the product is added to them.
static void linear_forward(float *y, const float *residual, const float *x, const Tensor *weight,
                           const Tensor *bias, int R) {
    const int K = (int)weight->shape[0], N = (int)weight->shape[1];
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        float *to = y + (size_t)r * N;
        const float *from = residual ? residual + (size_t)r * N : NULL, *b = bias->value;
        for (int n = 0; n < N; n++) to[n] = from ? from[n] + b[n] : b[n];
    }
    matmul(y, N, x, K, false, weight->value, N, false, R, N, K, true);
    if (weight->adapter) lora_forward(y, x, weight, R);
}

// Sums each column over all rows: the gradient of a bias, which acts on every row. With x, each dy[r, n] is
// first multiplied by the normalised x[r, n], which the layernorm below explains: the gradient of its weight.
//   out[n] = sum over r of dy[r, n],   or of dy[r, n] · (x[r, n] - mean[r]) · rstd[r]
//   dy, x (R, N); mean, rstd (R); out (N) is overwritten, or added to when accumulate
static void column_sums(float *out, const float *dy, const float *x, const float *mean, const float *rstd,
                        bool accumulate, int R, int N) {
#pragma omp parallel for
    for (int slab = 0; slab < N; slab += COLUMN_SLAB) {
        int width = N - slab < COLUMN_SLAB ? N - slab : COLUMN_SLAB;
        float sum[COLUMN_SLAB] = {0};
        for (int r = 0; r < R; r++) {
            const float *from = dy + (size_t)r * N + slab, *xr = x ? x + (size_t)r * N + slab : NULL;
            if (x)
                for (int n = 0; n < width; n++) sum[n] += from[n] * ((xr[n] - mean[r]) * rstd[r]);
            else
                for (int n = 0; n < width; n++) sum[n] += from[n];
        }
        for (int n = 0; n < width; n++) out[slab + n] = sum[n] + (accumulate ? out[slab + n] : 0);
    }
}

// From y = x · weight + bias follow
//   dx = dy · weightᵀ,   dweight = xᵀ · dy,   dbias = column sums of dy
//   dx (R, K) is overwritten; dweight, dbias are overwritten, or added to when accumulate.
// Without dx, x or bias (NULL), and without a gradient of weight or bias, that part is left out.
static void linear_backward(float *dx, const float *dy, const float *x, const Tensor *weight,
                            const Tensor *bias, bool accumulate, int R) {
    const int K = (int)weight->shape[0], N = (int)weight->shape[1];
    if (x && weight->gradient) matmul(weight->gradient, N, x, K, true, dy, N, false, K, N, R, accumulate);
    if (bias && bias->gradient) column_sums(bias->gradient, dy, NULL, NULL, NULL, accumulate, R, N);
    if (dx) matmul(dx, K, dy, N, false, weight->value, N, true, R, K, N, false);
    if (weight->adapter) lora_backward(dx, dy, x, weight, accumulate, R);
}

// ---- layernorm ----
// Numbers that pass through dozens of layers tend to grow or to fade, and then nothing can be learned from
// them. A layernorm brings each row to mean 0 and variance 1, whatever came in. Then it multiplies each
// channel by a weight and adds a bias, both learned and the same for all rows: the model chooses each
// channel's scale and centre (Ba, Kiros, Hinton 2016). rstd is the reciprocal standard deviation, 1 / (how
// far numbers lie from the mean); eps avoids a division by 0.
//   y = (x - mean) · rstd · weight + bias, per row;   rstd = 1 / sqrt(variance + eps)
// For x = 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, rstd 0.53; it becomes -1.07, -0.53, 0, 1.60.
//   x, y (R, C); mean, rstd (R) are kept for the backward pass; weight, bias (C)
// y is not kept: where the backward pass wants it, this function computes it again.
static void layernorm_forward(float *y, float *mean, float *rstd, const float *x, const float *weight,
                              const float *bias, float eps, int R, int C) {
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        const float *xr = x + (size_t)r * C;
        float *yr = y + (size_t)r * C;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += xr[c];
        float m = sum / (float)C;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; c++) squares += (xr[c] - m) * (xr[c] - m);
        float s = 1 / sqrtf(squares / (float)C + eps);
        for (int c = 0; c < C; c++) yr[c] = (xr[c] - m) * s * weight[c] + bias[c];
        mean[r] = m;
        rstd[r] = s;
    }
}

// Each x[c] acts on y directly, and on all of the row through mean and rstd: hence the two averages. With
// n = (x - mean) · rstd, y = n · weight + bias and g = dy · weight:
//   dx += rstd · (g - average(g) - n · average(g · n))
//   dweight = sum over rows of dy · n;   dbias = sum over rows of dy
// dx is added to, as x is also used elsewhere (section 6); dweight and dbias only when accumulate, or are NULL.
static void layernorm_backward(float *dx, float *dweight, float *dbias, const float *dy, const float *x,
                               const float *mean, const float *rstd, const float *weight, bool accumulate,
                               int R, int C) {
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        const float *xr = x + (size_t)r * C, *dyr = dy + (size_t)r * C;
        float *dxr = dx + (size_t)r * C;
        float m = mean[r], s = rstd[r], g_sum = 0, gn_sum = 0;
#pragma omp simd reduction(+ : g_sum, gn_sum)
        for (int c = 0; c < C; c++) {
            float g = dyr[c] * weight[c];
            g_sum += g;
            gn_sum += g * ((xr[c] - m) * s);
        }
        float g_average = g_sum / (float)C, gn_average = gn_sum / (float)C;
        for (int c = 0; c < C; c++)
            dxr[c] += s * (dyr[c] * weight[c] - g_average - (xr[c] - m) * s * gn_average);
    }
    if (dbias) column_sums(dbias, dy, NULL, NULL, NULL, accumulate, R, C);
    if (dweight) column_sums(dweight, dy, x, mean, rstd, accumulate, R, C);
}

// ---- attention ----
// Attention is the only layer in which rows see one another; every other layer treats each row alone. A row
// makes three vectors, each by a linear layer: a query (what am I looking for?), a key (what do I offer?) and
// a value (what do I pass on?). Its output is an average of the values of all rows that it sees, itself among
// them. A row whose key points in the direction of the query gets more weight in this average: the score of a
// pair is the dot product of query and key, and softmax turns the scores into weights that sum to 1.
//
// NH such computations run side by side, each with HS = C / NH channels of its own. They are called heads,
// and each can look for something else. Their outputs stand side by side in C channels; the projection after
// attention mixes them. For each head and row i, over the rows j <= i of the same sequence (Vaswani et al.
// 2017; the root keeps scores from growing with HS):
//   score[i, j] = scale · q[i] · k[j],   scale = 1 / sqrt(HS)
//   p[i, j] = exp(score[i, j]) / sum over m of exp(score[i, m])
//   out[i] = sum over j of p[i, j] v[j]
// For example HS = 4, and row 2 has q · k = 2, 0, -2 with the keys of rows 0, 1, 2. The scores are 1, 0, -1;
// exp gives 2.72, 1.00, 0.37, with sum 4.09; p = 0.665, 0.245, 0.090. If one channel of the three values is
// 10, 20, 30, that channel of out is 14.25. Row 0 sees only itself: there p = 1.
//
// All scores of one head would be T x T numbers: too many to keep. So the forward pass takes a tile, 64
// queries, at a time. Of each row's softmax it keeps one number, log_sum_exp = log(sum over m of exp(score[i,
// m])). From it the backward pass computes p again, as exp(score - log_sum_exp), for 64 queries and at most
// 256 keys at a time. The idea is FlashAttention's (Dao et al. 2022); its forward pass has key blocks, too.
//
// One row of qkv, for example with C = 4, NH = 2, HS = 2, where h0 and h1 are the heads:
//     q: h0 h0 h1 h1   k: h0 h0 h1 h1   v: h0 h0 h1 h1
// The head's query in row r is at qkv + r · 3C + head · HS, its key C floats after that, its value 2C after.
// So one head's queries are a matrix (rows, HS) with stored rows of 3C floats, and matmul takes it as it is.
enum { QUERY_TILE = 64, KEY_BLOCK = 256 };

// Where keys and values are. In training they stand in qkv, beside the queries, and a place is a row. When
// the model writes text, earlier calls have made most of them, and a cache holds them (section 11).
typedef struct {
    const float *key, *value;         // of head 0 at place 0
    size_t place_stride, head_stride; // floats from one place to the next, and from one head to the next
    const int *start;                 // (sequences) the place where each sequence begins
    int past;                         // keys that each sequence has from earlier calls; 0 in training
} Keys;

// What attention works on, forward and backward.
typedef struct {
    const Batch *batch;
    Dropout dropout; // acts on p, after the softmax
    int NH, HS;
    const float *qkv; // (R, 3C)
    Keys keys;
    float *out;          // (R, C)
    float *log_sum_exp;  // (R, NH)
    float *scratch;      // scratch_size floats for each thread
    size_t scratch_size; // at least attention_scratch()
} Attention;

// Floats of scratch that each thread needs when the longest sequence has `longest` keys.
static size_t attention_scratch(int longest) {
    size_t forward = (size_t)QUERY_TILE * longest, backward = (size_t)QUERY_TILE * (2 * KEY_BLOCK + 1);
    return aligned_size(forward > backward ? forward : backward);
}

// Multiplies p (keys) of one row and head by dropout's factors, those of keys first_key, first_key + 1, ...
// Each (row, head, key) has an index of its own: a sequence has at most 2^20 keys.
static void attention_dropout(float *p, Dropout dropout, int row, int NH, int head, int first_key, int keys) {
    if (dropout.probability == 0) return;
    uint64_t index = ((uint64_t)row_number(dropout, row) * NH + head) << 20 | (uint64_t)first_key;
    for (int j = 0; j < keys; j++) p[j] *= dropout_factor(dropout, index + (uint64_t)j);
}

// One tile of queries of one head: those of sequence s that begin at its row `begin`.
//   p: scratch for (queries, keys): q · k, then exp(score - largest), then that after dropout
// Threads take tiles, so this runs inside a parallel region: there matmul works on the calling thread alone.
static void attention_forward_tile(const Attention *a, int s, int head, int begin, float *p) {
    const int NH = a->NH, HS = a->HS, C = NH * HS;
    const int first = a->batch->first_row[s], T = a->batch->first_row[s + 1] - first;
    const int queries = T - begin < QUERY_TILE ? T - begin : QUERY_TILE;
    const int before = a->keys.past + begin, keys = before + queries; // keys before the tile, and in all
    const size_t ldk = a->keys.place_stride;
    const size_t to_start = a->keys.start[s] * ldk + head * a->keys.head_stride;
    const float *q = a->qkv + (size_t)(first + begin) * 3 * C + head * HS;
    const float *k = a->keys.key + to_start, *v = a->keys.value + to_start;
    const float scale = 1 / sqrtf((float)HS);
    float inverse_sum[QUERY_TILE];

    matmul(p, keys, q, 3 * C, false, k, ldk, true, queries, keys, HS, false); // q · kᵀ
    for (int i = 0; i < queries; i++) {
        const int row = first + begin + i, visible = before + i + 1; // the causal mask
        float *pi = p + (size_t)i * keys, largest = largest_of(pi, visible), sum = 0;
        // Each score loses the row's largest score before exp. p stays the same, since exp(largest) cancels
        // in the quotient, and no exponent is above 0: exp of a score above 88 would not fit into a float.
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < visible; j++) {
            pi[j] = fast_exp(scale * (pi[j] - largest));
            sum += pi[j];
        }
        attention_dropout(pi, a->dropout, row, NH, head, 0, visible);
        a->log_sum_exp[(size_t)row * NH + head] = scale * largest + logf(sum);
        inverse_sum[i] = 1 / sum; // divides out at the end: HS numbers instead of `visible`
    }

    // All queries of the tile see all keys before the tile: one product. The first tile has no such keys, and
    // then the product writes 0 to out. In the tile a query sees keys up to its own row: the loop skips others.
    float *out = a->out + (size_t)(first + begin) * C + head * HS;
    matmul(out, C, p, keys, false, v, ldk, false, queries, HS, before, false);
    for (int i = 0; i < queries; i++) {
        float *oi = out + (size_t)i * C;
        for (int j = before; j <= before + i; j++)
            for (int c = 0; c < HS; c++) oi[c] += p[(size_t)i * keys + j] * v[(size_t)j * ldk + c];
        for (int c = 0; c < HS; c++) oi[c] *= inverse_sum[i];
    }
}

// Fills a->out and a->log_sum_exp. All threads walk through the sequences; the tiles of each are shared out,
// the longest first, and no thread waits for the others (`nowait`).
static void attention_forward(const Attention *a) {
#pragma omp parallel
    for (int s = 0; s < a->batch->sequences; s++) {
        const int T = a->batch->first_row[s + 1] - a->batch->first_row[s];
        const int tiles = (T + QUERY_TILE - 1) / QUERY_TILE;
#pragma omp for schedule(dynamic) nowait
        for (int task = 0; task < tiles * a->NH; task++)
            attention_forward_tile(a, s, task % a->NH, (tiles - 1 - task / a->NH) * QUERY_TILE,
                                   a->scratch + omp_get_thread_num() * a->scratch_size);
    }
}

// The backward pass goes through out = p · v, the softmax and score = scale · q · kᵀ:
//   dv[j] = sum over i of p[i, j] dout[i];    dp[i, j] = dout[i] · v[j];    dscore = p (dp - mean_dp[i])
//   dq[i] = scale · sum over j of dscore[i, j] k[j];    dk[j] = scale · sum over i of dscore[i, j] q[i]
// Why mean_dp? The p of a row sum to 1: when one score rises, its p rises and all others fall. So what counts
// is how far dp lies above its weighted average, mean_dp[i] = sum over j of p[i, j] dp[i, j]. With p = 0.665,
// 0.245, 0.090 and dp = 1, 0, 0 it is 0.665, and dscore = 0.223, -0.163, -0.060. The average needs no p,
// because out is itself a sum over p: sum over j of p[i, j] (dout[i] · v[j]) = dout[i] · out[i].
// With dropout, out was made of p · factor: dv uses p · factor, and dp[i, j] = factor · (dout[i] · v[j]).
//
// This function does one tile of queries and one block of keys, which begin at rows `begin` and `block` of
// the sequence: it adds their part to dk and dv, and to dq, which the first block overwrites.
//   mean_dp (queries); p, dscore: scratch for (queries, keys); dscore holds dp at first
static void attention_backward_tile(const Attention *a, float *dqkv, const float *dout, int s, int head,
                                    int begin, int block, const float *mean_dp, float *p, float *dscore) {
    const int NH = a->NH, HS = a->HS;
    const int first = a->batch->first_row[s], T = a->batch->first_row[s + 1] - first;
    const int queries = T - begin < QUERY_TILE ? T - begin : QUERY_TILE;
    const int keys = (int)smaller((size_t)(begin + queries - block), KEY_BLOCK); // that some query sees
    const size_t C = (size_t)NH * HS, ld = 3 * C;
    const size_t to_q = (first + begin) * ld + head * HS;
    const size_t to_k = (first + block) * ld + head * HS + C, to_v = to_k + C;
    const float *q = a->qkv + to_q, *k = a->qkv + to_k, *v = a->qkv + to_v;
    const float *dout_tile = dout + (first + begin) * C + head * HS;
    const float scale = 1 / sqrtf((float)HS);

    matmul(p, keys, q, ld, false, k, ld, true, queries, keys, HS, false);             // q · kᵀ
    matmul(dscore, keys, dout_tile, C, false, v, ld, true, queries, keys, HS, false); // dp = dout · vᵀ
    for (int i = 0; i < queries; i++) {
        const int row = first + begin + i, seen = begin + i + 1 - block; // keys of this block that row i sees
        const int visible = seen < 0 ? 0 : seen < keys ? seen : keys;
        const float log_sum_exp = a->log_sum_exp[(size_t)row * NH + head], mean_dp_i = mean_dp[i];
        float *pi = p + i * keys, *dscore_i = dscore + i * keys;
        attention_dropout(dscore_i, a->dropout, row, NH, head, block, visible);
        for (int j = 0; j < visible; j++) {
            pi[j] = fast_exp(scale * pi[j] - log_sum_exp);
            dscore_i[j] = scale * pi[j] * (dscore_i[j] - mean_dp_i); // with the scale of dq and dk
        }
        attention_dropout(pi, a->dropout, row, NH, head, block, visible);
        for (int j = visible; j < keys; j++) pi[j] = dscore_i[j] = 0;
    }
    const bool add = block > 0;
    matmul(dqkv + to_v, ld, p, keys, true, dout_tile, C, false, keys, HS, queries, true); // dv += pᵀ · dout
    matmul(dqkv + to_k, ld, dscore, keys, true, q, ld, false, keys, HS, queries, true); // dk += dscoreᵀ · q
    matmul(dqkv + to_q, ld, dscore, keys, false, k, ld, false, queries, HS, keys,
           add); // dq = or += dscore · k
}

// Writes dqkv (R, 3C) from dout (R, C) and what attention_forward left. One thread does one head of one
// sequence, tile after tile, so that dk and dv are summed in a fixed order.
static void attention_backward(const Attention *a, float *dqkv, const float *dout) {
    const size_t NH = (size_t)a->NH, HS = (size_t)a->HS, C = NH * HS;
#pragma omp parallel
    for (int s = 0; s < a->batch->sequences; s++) {
        const int first = a->batch->first_row[s], T = a->batch->first_row[s + 1] - first;
#pragma omp for schedule(dynamic) nowait
        for (size_t head = 0; head < NH; head++) {
            float *p = a->scratch + omp_get_thread_num() * a->scratch_size;
            float *dscore = p + QUERY_TILE * KEY_BLOCK, *mean_dp = dscore + QUERY_TILE * KEY_BLOCK;
            for (int i = 0; i < T; i++) { // 0 at first: each tile adds its part
                float *dk = dqkv + (first + i) * 3 * C + C + head * HS, *dv = dk + C;
                for (size_t c = 0; c < HS; c++) dk[c] = dv[c] = 0;
            }
            for (int begin = 0; begin < T; begin += QUERY_TILE) {
                const int end = T - begin < QUERY_TILE ? T : begin + QUERY_TILE;
                for (int i = begin; i < end; i++) {
                    const size_t at = (first + i) * C + head * HS;
                    const float *out_i = a->out + at, *dout_i = dout + at;
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (size_t c = 0; c < HS; c++) sum += dout_i[c] * out_i[c];
                    mean_dp[i - begin] = sum;
                }
                for (int block = 0; block < end; block += KEY_BLOCK)
                    attention_backward_tile(a, dqkv, dout, s, (int)head, begin, block, mean_dp, p, dscore);
            }
        }
    }
}

// ---- gelu ----
// Layers that are all linear would together be only one linear layer. Between the two linear layers of an MLP
// stands a function that is not: gelu lets large x through, turns very negative x into 0, and is smooth
// between (Hendrycks, Gimpel 2016, in the tanh form that GPT-2 uses). With u = sqrt(2/pi) (x + 0.044715 x³):
//   gelu(x) = x/2 (1 + tanh(u)) = x · gate,   gate = 1 / (1 + exp(-2u))
static inline float gelu_gate(float x) {
    return 1 / (1 + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x))); // 1.5957691216 = 2 sqrt(2/pi)
}

static void gelu_forward(float *y, const float *x, size_t size) {
#pragma omp parallel for simd
    for (size_t i = 0; i < size; i++) y[i] = x[i] * gelu_gate(x[i]);
}

// dx = dy · gelu'(x),   gelu'(x) = gate + x · gate (1 - gate) · 2u'
// dy becomes dx in place. x becomes gelu(x), which the linear layer after it needs for the gradient of its
// weight: so gelu's output need not be stored.
static void gelu_backward(float *dy, float *x, size_t size) {
#pragma omp parallel for simd
    for (size_t i = 0; i < size; i++) {
        float gate = gelu_gate(x[i]), slope = 1.5957691216f * (1 + 3 * 0.044715f * x[i] * x[i]); // 2u'
        dy[i] *= gate + x[i] * gate * (1 - gate) * slope;
        x[i] *= gate;
    }
}

// ---- cross-entropy ----
// The loss of this part's opening, -log(softmax(logits)[target]), also called cross-entropy. Its gradient is
// simple: the probabilities, less 1 at the target. So logits of wrong tokens are pushed down by as much as
// they were believed, and the target's is pushed up. With p = 0.665, 0.245, 0.090 and the second token as
// target, dlogit = 0.665, -0.755, 0.090.
//   loss[r] = log(sum over v of exp(logit[r, v])) - logit[r, target[r]]
//   dlogit[r, v] = loss_scale · (softmax(logit[r])[v] - (v == target[r]))
//   With loss_scale = 1 / (targets of the update) this is the gradient of the mean loss (section 8).
//   correct[r]: the target's logit is higher than all others
//   logits (R, V) become dlogits when `backward`, and are of no use otherwise; target, loss, correct (R)
static void cross_entropy(float *logits, float *loss, bool *correct, const int *target, bool backward,
                          float loss_scale, int R, int V) {
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        float *row = logits + (size_t)r * V, largest = largest_of(row, V), sum = 0, wanted = row[target[r]];
        int count_of_largest = 0; // more than 1: a tie. The largest is subtracted as in attention.
#pragma omp simd reduction(+ : sum, count_of_largest)
        for (int v = 0; v < V; v++) {
            count_of_largest += row[v] == largest;
            row[v] = fast_exp(row[v] - largest);
            sum += row[v];
        }
        loss[r] = logf(sum) + (largest - wanted);
        correct[r] = wanted == largest && count_of_largest == 1;
        if (!backward) continue;
        float factor = loss_scale / sum;
        for (int v = 0; v < V; v++) row[v] *= factor;
        row[target[r]] -= loss_scale;
    }
}

// =====================================================================================================
// 6. Model
// =====================================================================================================
// The layers in the order that makes them GPT-2 (Radford et al. 2019), as on the first page of Part I.
//
// Since x is only added to, its gradient has one path back that no block weakens. For y = x + f(x) with dy =
// 0.5 and a slope of f of 0.1, dx = 0.5 + 0.1 · 0.5 = 0.55; with slope 0, 0.5 still arrives: so deep models train.
//
// The backward pass goes the same way back and needs what the forward pass computed. Of each block it finds
// x, qkv, attention's output, middle and hidden (10 C floats per row when F = 4C), log_sum_exp, means and
// rstds: these are kept, and called activations. It computes again what is cheap: the outputs of layernorms,
// p, gelu and dropout's choices. Logits exist for at most LOGIT_ROWS rows; their gradient replaces them.
enum { LOGIT_ROWS = 256 };

// What is kept for the backward pass. The sizes are for the smallest GPT-2 and 4 x 1024 rows.
//   KEEP_NOTHING   nothing: there is no backward pass
//   KEEP_ALL       all activations: 1.5 GB
//   KEEP_INPUTS    x of each block, and one whole block: 0.28 GB; block_backward computes the rest again
typedef enum { KEEP_NOTHING, KEEP_ALL, KEEP_INPUTS } Keep;

// What one block computes on its way forward.
typedef struct {
    float *x;                                 // (R, C) the residual stream before it: residual_at(layer)
    float *qkv;                               // (R, 3C) query, key and value side by side
    float *attention;                         // (R, C)
    float *middle;                            // (R, C) the residual stream between attention and MLP
    float *hidden;                            // (R, F) before gelu
    float *log_sum_exp;                       // (R, NH) of attention
    float *mean_1, *rstd_1, *mean_2, *rstd_2; // (R) of the two layernorms
} Block;

// Where a forward and a backward pass write, for up to `rows` rows: activations, gradients, scratch, results.
typedef struct {
    int rows;
    Keep keep;
    int first_kept;                      // blocks from here on are kept; frozen ones below share one buffer
    float *memory;                       // all arrays of floats below lie in here
    size_t memory_size, memory_capacity; // floats: what they take, and what there is
    // For each block that is kept:
    float *residual;   // (blocks + 1, R, C) the residual stream before each block, and after the last
    float *blocks;     // (blocks, block_size) what block_at() divides
    size_t block_size; // floats
    // For one block after another:
    float *normed;     // (R, C) a layernorm's output
    float *projected;  // (R, C) with dropout: what is about to join the residual stream
    float *d_residual; // (R, C)
    float *d_normed;   // (R, C) also d_attention
    // Four names of one buffer (R, the larger of F and 3C), since no two of them are needed at once:
    float *gelu, *d_hidden, *d_qkv, *d_selected;
    float *scratch; // for attention: scratch_size floats for each thread
    size_t scratch_size;
    // For the head, LOGIT_ROWS rows at a time:
    float *selected;        // (LOGIT_ROWS, C) their x
    float *mean_f, *rstd_f; // (LOGIT_ROWS)
    float *logits;          // (LOGIT_ROWS, V)
    // Results, for each scored row in order:
    int *scored; // which row it is
    float *loss;
    bool *correct; // the target had the highest logit
} Activations;

// Divides the memory of one block and returns its size in floats; with memory NULL only that.
static size_t block_lay_out(Block *b, const Config *config, int rows, float *memory) {
    const size_t R = (size_t)rows, C = (size_t)config->n_embd;
    const Part parts[] = {{&b->qkv, R * 3 * C},
                          {&b->attention, R * C},
                          {&b->middle, R * C},
                          {&b->hidden, R * config->n_inner},
                          {&b->mean_1, R},
                          {&b->rstd_1, R},
                          {&b->mean_2, R},
                          {&b->rstd_2, R},
                          {&b->log_sum_exp, R * config->n_head}};
    return lay_out(memory, parts, sizeof parts / sizeof *parts);
}

// The residual stream before a block, or after the last one: layer L.
static float *residual_at(const Activations *a, const Model *model, int layer) {
    size_t place = layer < a->first_kept ? 0 : (size_t)(layer - a->first_kept);
    return a->residual + place * a->rows * model->config.n_embd;
}

static Block block_at(const Activations *a, const Model *model, int layer) {
    const bool kept = a->keep == KEEP_ALL && layer >= a->first_kept;
    Block b = {.x = residual_at(a, model, layer)};
    block_lay_out(&b, &model->config, a->rows,
                  a->blocks + (kept ? (size_t)(layer - a->first_kept) : 0) * a->block_size);
    return b;
}

// Divides `memory` among all arrays for `rows` rows of a model whose training is set, and returns how many
// floats they take. With memory NULL no array is set.
static size_t activations_lay_out(Activations *a, const Model *model, int rows, Keep keep, float *memory) {
    const Config *config = &model->config;
    a->rows = rows;
    a->keep = keep;
    a->first_kept = keep == KEEP_NOTHING ? config->n_layer : model->lowest_trained;
    if (a->first_kept < 0) a->first_kept = 0; // -1: the embeddings are trained as well
    a->scratch_size = attention_scratch(config->n_positions);
    a->block_size = block_lay_out(&(Block){0}, config, rows, NULL);
    const size_t kept = (size_t)(config->n_layer - a->first_kept);
    const size_t whole_blocks =
        keep == KEEP_ALL && kept > 0 ? kept : 1; // one at least: all blocks write there
    const size_t R = (size_t)rows, C = (size_t)config->n_embd, F = (size_t)config->n_inner;
    const size_t chunk = smaller(R, LOGIT_ROWS), only_training = keep == KEEP_NOTHING ? 0 : R * C;
    const Part parts[] = {{&a->residual, (kept + 1) * R * C},
                          {&a->blocks, whole_blocks * a->block_size},
                          {&a->normed, R * C},
                          {&a->gelu, R * (F > 3 * C ? F : 3 * C)},
                          {&a->projected, only_training},
                          {&a->d_residual, only_training},
                          {&a->d_normed, only_training},
                          {&a->scratch, a->scratch_size * omp_get_max_threads()},
                          {&a->selected, chunk * C},
                          {&a->mean_f, chunk},
                          {&a->rstd_f, chunk},
                          {&a->logits, chunk * config->vocab_size},
                          {&a->loss, R}};
    size_t size = lay_out(memory, parts, sizeof parts / sizeof *parts);
    a->d_hidden = a->d_qkv = a->d_selected = a->gelu;
    return size;
}

// Allocates the memory, or uses it again if it is large enough.
static void activations_reserve(Activations *a, const Model *model, int rows, Keep keep) {
    a->memory_size = activations_lay_out(a, model, rows, keep, NULL);
    if (a->memory_size > a->memory_capacity) {
        free(a->memory);
        a->memory = xfloats(a->memory_capacity = a->memory_size);
    }
    activations_lay_out(a, model, rows, keep, a->memory);
    a->scored = xrealloc(a->scored, (size_t)rows * sizeof(int));
    a->correct = xrealloc(a->correct, (size_t)rows * sizeof(bool));
}

static void activations_free(Activations *a) {
    free(a->memory);
    free(a->scored);
    free(a->correct);
    *a = (Activations){0};
}

// When the model writes text, token by token, a cache holds the keys and values of earlier calls.
// cache_append adds those of this batch and says where all of them are. Section 11.
typedef struct Cache Cache;
static Keys cache_append(Cache *cache, const Batch *batch, const float *qkv, int layer);

// GPT-2 has dropout at four kinds of places. Each place in each block draws from a random stream of its own;
// the embedding, which is in no block, takes the layer number L.
enum { DROP_EMBEDDING, DROP_ATTENTION, DROP_PROJECTION, DROP_MLP, DROP_PLACES };

static Dropout dropout_at(Dropout dropout, int layer, int place) {
    dropout.stream = random_stream(dropout.stream, (uint64_t)layer * DROP_PLACES + place);
    return dropout;
}

// y = residual + dropout(x · weight + bias): the projections, which end attention and MLP.
//   y, residual, projected (R, C); x (R, K)
static void join_stream(float *y, const float *residual, const float *x, const Tensor *weight,
                        const Tensor *bias, float *projected, Dropout dropout, int R) {
    if (dropout.probability == 0) {
        linear_forward(y, residual, x, weight, bias, R);
    } else {
        linear_forward(projected, NULL, x, weight, bias, R);
        dropout_add(y, residual, projected, dropout, R, (int)weight->shape[1]);
    }
}

// The arguments of a block's attention, forward and backward alike.
static Attention block_attention(const Model *model, const Activations *a, const Batch *batch, const Block *b,
                                 int layer, Dropout dropout) {
    const size_t C = (size_t)model->config.n_embd, HS = C / (size_t)model->config.n_head;
    return (Attention){.batch = batch,
                       .dropout = dropout_at(dropout, layer, DROP_ATTENTION),
                       .NH = model->config.n_head,
                       .HS = (int)HS,
                       .qkv = b->qkv,
                       .keys = {b->qkv + C, b->qkv + 2 * C, 3 * C, HS, batch->first_row, 0},
                       .out = b->attention,
                       .log_sum_exp = b->log_sum_exp,
                       .scratch = a->scratch,
                       .scratch_size = a->scratch_size};
}

// One block, from residual_at(layer) to residual_at(layer + 1). Without `finish` it ends with hidden: the
// backward pass calls it so, to compute a block again. With a cache, the batch continues its sequences.
static void block_forward(const Model *model, Activations *a, const Batch *batch, int layer, Cache *cache,
                          Dropout dropout, bool finish) {
    const Config *config = &model->config;
    const int R = batch->rows, C = config->n_embd, F = config->n_inner;
    const float epsilon = config->layer_norm_epsilon;
    const Tensor *t = model->tensors + layer * BLOCK_TENSORS;
    const Block b = block_at(a, model, layer);

    // middle = x + dropout(attention(qkv) · c_proj + bias),   qkv = layernorm_1(x) · c_attn + bias
    layernorm_forward(a->normed, b.mean_1, b.rstd_1, b.x, t[LN_1_WEIGHT].value, t[LN_1_BIAS].value, epsilon,
                      R, C);
    linear_forward(b.qkv, NULL, a->normed, &t[ATTN_WEIGHT], &t[ATTN_BIAS], R);
    Attention attention = block_attention(model, a, batch, &b, layer, dropout);
    if (cache) attention.keys = cache_append(cache, batch, b.qkv, layer);
    attention_forward(&attention);
    join_stream(b.middle, b.x, b.attention, &t[ATTN_PROJ_WEIGHT], &t[ATTN_PROJ_BIAS], a->projected,
                dropout_at(dropout, layer, DROP_PROJECTION), R);

    // x = middle + dropout(gelu(hidden) · c_proj + bias),   hidden = layernorm_2(middle) · c_fc + bias
    layernorm_forward(a->normed, b.mean_2, b.rstd_2, b.middle, t[LN_2_WEIGHT].value, t[LN_2_BIAS].value,
                      epsilon, R, C);
    linear_forward(b.hidden, NULL, a->normed, &t[FC_WEIGHT], &t[FC_BIAS], R);
    if (!finish) return;
    gelu_forward(a->gelu, b.hidden, (size_t)R * F);
    join_stream(residual_at(a, model, layer + 1), b.middle, a->gelu, &t[FC_PROJ_WEIGHT], &t[FC_PROJ_BIAS],
                a->projected, dropout_at(dropout, layer, DROP_MLP), R);
}

// Embeddings and all blocks: fills residual_at(L).
static void model_forward(const Model *model, Activations *a, const Batch *batch, Cache *cache,
                          Dropout dropout) {
    const int R = batch->rows, C = model->config.n_embd, L = model->config.n_layer;
    const Tensor *t = model->tensors;
    float *x = residual_at(a, model, 0);
    embedding_forward(x, t[WTE].value, t[WPE].value, batch->token, batch->position, R, C);
    if (dropout.probability > 0) dropout_add(x, NULL, x, dropout_at(dropout, L, DROP_EMBEDDING), R, C);
    for (int layer = 0; layer < L; layer++) block_forward(model, a, batch, layer, cache, dropout, true);
}

// a->logits (count, V) = layernorm_f(residual[given rows]) · headᵀ, for at most LOGIT_ROWS rows. Leaves these
// rows of the stream in a->selected and their normalised form in a->normed.
static void head_forward(const Model *model, Activations *a, const int *rows, int count) {
    const int C = model->config.n_embd, V = model->config.vocab_size;
    const float *residual = residual_at(a, model, model->config.n_layer);
    const float *weight = model_tensor(model, LN_F_WEIGHT, 0)->value;
    const float *bias = model_tensor(model, LN_F_BIAS, 0)->value;
    for (int i = 0; i < count; i++)
        memcpy(a->selected + (size_t)i * C, residual + (size_t)rows[i] * C, (size_t)C * sizeof(float));
    layernorm_forward(a->normed, a->mean_f, a->rstd_f, a->selected, weight, bias,
                      model->config.layer_norm_epsilon, count, C);
    matmul(a->logits, V, a->normed, C, false, model_head(model)->value, C, true, count, V, C, false);
}

// The way back from dlogits (count, V), in a->logits, for the rows that head_forward was given last:
//   logits = normed · headᵀ:   dhead = dlogitsᵀ · normed,   dnormed = dlogits · head
// and on through layernorm_f. Writes these rows of a->d_residual.
static void head_backward(const Model *model, Activations *a, const int *rows, int count, bool accumulate) {
    const int C = model->config.n_embd, V = model->config.vocab_size;
    const Tensor *head = model_head(model), *ln_weight = model_tensor(model, LN_F_WEIGHT, 0);
    const Tensor *ln_bias = model_tensor(model, LN_F_BIAS, 0);
    if (head->gradient)
        matmul(head->gradient, C, a->logits, V, true, a->normed, C, false, V, C, count, accumulate);
    matmul(a->d_normed, C, a->logits, V, false, head->value, C, false, count, C, V, false);
    memset(a->d_selected, 0, (size_t)count * C * sizeof(float)); // layernorm_backward adds
    layernorm_backward(a->d_selected, ln_weight->gradient, ln_bias->gradient, a->d_normed, a->selected,
                       a->mean_f, a->rstd_f, ln_weight->value, accumulate, count, C);
    for (int i = 0; i < count; i++)
        memcpy(a->d_residual + (size_t)rows[i] * C, a->d_selected + (size_t)i * C, (size_t)C * sizeof(float));
}

// From the residual stream to the loss, and when `backward` the way back. Logits of a whole batch would be R
// x V floats, 820 MB for 4 x 1024 rows. So rows are taken LOGIT_ROWS at a time, all the way to the gradient.
// Rows that are not scored cost nothing here and get gradient 0.
//   Fills a->scored, a->loss and a->correct for each scored row; when `backward`, also the gradient of
//   loss_scale · (sum of losses) in a->d_residual, layernorm_f and head. Returns the sum of losses.
static double classifier(const Model *model, Activations *a, const Batch *batch, bool backward,
                         float loss_scale, bool accumulate) {
    const int C = model->config.n_embd, V = model->config.vocab_size;
    int targets[LOGIT_ROWS], count = 0;
    for (int r = 0; r < batch->rows; r++)
        if (batch->target[r] >= 0) a->scored[count++] = r;
    if (backward) memset(a->d_residual, 0, (size_t)batch->rows * C * sizeof(float));
    double total = 0;
    for (int begin = 0, n; begin < count; begin += n) {
        n = (int)smaller((size_t)(count - begin), LOGIT_ROWS);
        const int *rows = a->scored + begin;
        for (int i = 0; i < n; i++) targets[i] = batch->target[rows[i]];
        head_forward(model, a, rows, n);
        cross_entropy(a->logits, a->loss + begin, a->correct + begin, targets, backward, loss_scale, n, V);
        for (int i = 0; i < n; i++) total += a->loss[begin + i];
        if (backward) head_backward(model, a, rows, n, accumulate);
        accumulate = true; // the next rows' gradients are added to these
    }
    return total;
}

// Turns a->d_residual from the gradient of the block's output into that of its input, and writes (or adds to)
// the gradients of what is trained in the block. Each step differentiates the line of block_forward that is
// quoted. In y = x + f(x), dx = dy + (gradient through f): d_residual holds dy already, the rest is added.
static void block_backward(const Model *model, Activations *a, const Batch *batch, int layer, Dropout dropout,
                           bool accumulate) {
    const Config *config = &model->config;
    const int R = batch->rows, C = config->n_embd, F = config->n_inner;
    const Tensor *t = model->tensors + layer * BLOCK_TENSORS;
    const Block b = block_at(a, model, layer);
    float *d_projected = dropout.probability > 0 ? a->projected : a->d_residual; // d_residual after dropout
    if (a->keep == KEEP_INPUTS && layer < config->n_layer - 1) // the last block's are still there
        block_forward(model, a, batch, layer, NULL, dropout, false);

    // x = middle + dropout(gelu(hidden) · c_proj + bias): first d_hidden gets the gradient of gelu(hidden)
    if (dropout.probability > 0)
        dropout_add(d_projected, NULL, a->d_residual, dropout_at(dropout, layer, DROP_MLP), R, C);
    linear_backward(a->d_hidden, d_projected, NULL, &t[FC_PROJ_WEIGHT], &t[FC_PROJ_BIAS], accumulate, R);
    // then d_hidden becomes the gradient of hidden, and b.hidden becomes gelu(hidden), the input of c_proj
    gelu_backward(a->d_hidden, b.hidden, (size_t)R * F);
    linear_backward(NULL, d_projected, b.hidden, &t[FC_PROJ_WEIGHT], NULL, accumulate, R);
    // hidden = layernorm_2(middle) · c_fc + bias
    if (t[FC_WEIGHT].gradient || t[FC_WEIGHT].adapter)
        layernorm_forward(a->normed, b.mean_2, b.rstd_2, b.middle, t[LN_2_WEIGHT].value, t[LN_2_BIAS].value,
                          config->layer_norm_epsilon, R, C);
    linear_backward(a->d_normed, a->d_hidden, a->normed, &t[FC_WEIGHT], &t[FC_BIAS], accumulate, R);
    layernorm_backward(a->d_residual, t[LN_2_WEIGHT].gradient, t[LN_2_BIAS].gradient, a->d_normed, b.middle,
                       b.mean_2, b.rstd_2, t[LN_2_WEIGHT].value, accumulate, R, C);

    // middle = x + dropout(attention(qkv) · c_proj + bias): d_normed gets the gradient of attention(qkv)
    if (dropout.probability > 0)
        dropout_add(d_projected, NULL, a->d_residual, dropout_at(dropout, layer, DROP_PROJECTION), R, C);
    linear_backward(a->d_normed, d_projected, b.attention, &t[ATTN_PROJ_WEIGHT], &t[ATTN_PROJ_BIAS],
                    accumulate, R);
    const Attention attention = block_attention(model, a, batch, &b, layer, dropout);
    attention_backward(&attention, a->d_qkv, a->d_normed);
    // qkv = layernorm_1(x) · c_attn + bias
    if (t[ATTN_WEIGHT].gradient || t[ATTN_WEIGHT].adapter)
        layernorm_forward(a->normed, b.mean_1, b.rstd_1, b.x, t[LN_1_WEIGHT].value, t[LN_1_BIAS].value,
                          config->layer_norm_epsilon, R, C);
    linear_backward(a->d_normed, a->d_qkv, a->normed, &t[ATTN_WEIGHT], &t[ATTN_BIAS], accumulate, R);
    layernorm_backward(a->d_residual, t[LN_1_WEIGHT].gradient, t[LN_1_BIAS].gradient, a->d_normed, b.x,
                       b.mean_1, b.rstd_1, t[LN_1_WEIGHT].value, accumulate, R, C);
}

// Forward and backward through the whole model: the gradients of loss_scale · (sum of losses over the batch).
// Returns the sum of losses. Blocks below the lowest trained tensor are not visited on the way back.
//
// An update may be made of several batches, and then their gradients add up. The first batch overwrites each
// gradient (accumulate is false), the others add: no time is lost with clearing half a gigabyte. Only
// embedding_backward cannot overwrite, because it adds row by row. So wpe's gradient is cleared before it,
// and wte's too, unless the head is tied to wte: head_backward has already overwritten it with its own.
static double model_forward_backward(const Model *model, Activations *a, const Batch *batch, float loss_scale,
                                     bool accumulate, Dropout dropout) {
    const int R = batch->rows, C = model->config.n_embd, L = model->config.n_layer;
    const Tensor *wte = &model->tensors[WTE], *wpe = &model->tensors[WPE];
    if (batch->targets == 0) { // nothing is scored: loss and gradients are 0
        for (int i = 0; i < model->tensor_count; i++) {
            const Tensor *t = &model->tensors[i];
            if (t->gradient && !accumulate) memset(t->gradient, 0, t->size * sizeof(float));
        }
        return 0;
    }
    model_forward(model, a, batch, NULL, dropout);
    double loss = classifier(model, a, batch, true, loss_scale, accumulate);
    for (int layer = L - 1; layer >= model->lowest_trained && layer >= 0; layer--)
        block_backward(model, a, batch, layer, dropout, accumulate);

    // x = dropout(wte[token] + wpe[position])
    if ((wte->gradient || wpe->gradient) && dropout.probability > 0)
        dropout_add(a->d_residual, NULL, a->d_residual, dropout_at(dropout, L, DROP_EMBEDDING), R, C);
    if (wte->gradient) {
        if (!accumulate && wte != model_head(model)) memset(wte->gradient, 0, wte->size * sizeof(float));
        embedding_backward(wte->gradient, a->d_residual, batch->token, R, C);
    }
    if (wpe->gradient) {
        if (!accumulate) memset(wpe->gradient, 0, wpe->size * sizeof(float));
        embedding_backward(wpe->gradient, a->d_residual, batch->position, R, C);
    }
    return loss;
}

// =====================================================================================================
// 7. Optimizer
// =====================================================================================================
// Gradients say which way the loss falls, not how far to go. How far is first of all the learning rate, a
// small number that the user chooses. Three rules refine it:
// - Clipping. Now and then a batch has huge gradients, and one such step can ruin a model. If the norm of all
//   gradients together (the root of the sum of their squares) is too large, all are scaled down.
// - AdamW. The gradients of one tensor may be a thousand times those of another; one learning rate must suit
//   both. So AdamW divides by the usual size of a parameter's own gradient. It keeps two running averages for
//   each parameter, the moments: m of the gradient, v of its square; the root of v is the usual size. A step
//   is the learning rate times m / root of v: the whole rate while gradients agree, less when they do not.
// - The schedule. The learning rate rises from 0 (warm-up), while the averages are still young and a trained
//   model is easily spoiled, and then falls, so that the last steps settle the details.

// The settings of an update, besides model, data and learning rate.
typedef struct {
    double beta1, beta2, epsilon, weight_decay; // b1, b2, epsilon and decay of adamw_update
    double max_grad_norm;                       // 0: no clipping
    float dropout;                              // probability
    uint64_t seed;                              // of dropout
    Keep keep;                                  // KEEP_ALL, or KEEP_INPUTS to save memory
} Hyperparameters;

enum { NORM_PIECE = 1 << 16 };

// The norm of all gradients together. Each piece of fixed size is summed by one thread, in double; then the
// pieces are added in order. So the result does not depend on the number of threads. *not_finite gets the
// first tensor whose gradient is infinite or not a number, or NULL.
static double gradient_norm(const Model *model, const Tensor **not_finite) {
    double total = 0;
    *not_finite = NULL;
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        if (!tensor->gradient) continue;
        const float *g = tensor->gradient; // or compilers fetch the struct's member each time
        size_t pieces = (tensor->size + NORM_PIECE - 1) / NORM_PIECE;
        double *partial = xmalloc(pieces * sizeof(double)), squares = 0;
#pragma omp parallel for
        for (size_t b = 0; b < pieces; b++) {
            size_t end = smaller((b + 1) * NORM_PIECE, tensor->size);
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t j = b * NORM_PIECE; j < end; j++) sum += (double)g[j] * g[j];
            partial[b] = sum;
        }
        for (size_t b = 0; b < pieces; b++) squares += partial[b];
        free(partial);
        if (!isfinite(squares) && !*not_finite) *not_finite = tensor;
        total += squares;
    }
    return sqrt(total);
}

// The factor that brings the norm down to `largest` (0: no limit); clip_grad_norm_ of PyTorch adds 1e-6, too.
static float clip_factor(double norm, double largest) {
    return largest > 0 && norm + 1e-6 > largest ? (float)(largest / (norm + 1e-6)) : 1.0f;
}

// AdamW (Loshchilov, Hutter 2019), update number t = 1, 2, ..., in torch.optim.AdamW's order of operations:
//   p = p - lr · decay · p                              decay pulls each weight a little towards 0
//   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g²     the moments, exp_avg and exp_avg_sq
//   p = p - lr · (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)
// The moments begin at 0, so they are too small at first; dividing by 1 - b^t corrects that. Epsilon keeps
// the quotient finite. Decay acts on the weight itself. If it were added to the gradient, as older programs
// do, it would be divided by the root as well, and weights with large gradients would hardly decay. g is the
// gradient times `clip`. For example b1 = 0.9, b2 = 0.999, t = 1, g = 0.02: m = 0.002 and v = 4e-7. Corrected
// they are 0.02 and 0.0004, whose root is 0.02, so p moves by lr · 0.02 / 0.02 = lr. With g = 20 it would
// also move by lr. When g keeps changing sign, m stays near 0 but v does not, and p moves much less.
static void adamw_update(const Model *model, const Hyperparameters *h, double learning_rate, long t,
                         float clip) {
    const float b2 = (float)h->beta2, epsilon = (float)h->epsilon;
    const float one_minus_b1 = (float)(1 - h->beta1), one_minus_b2 = (float)(1 - h->beta2);
    const float corrected_rate = (float)(learning_rate / (1 - pow(h->beta1, (double)t)));
    const float root = (float)sqrt(1 - pow(h->beta2, (double)t)); // corrects the root of v
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        if (tensor->frozen) continue;
        float *p = tensor->value, *m = tensor->exp_avg, *v = tensor->exp_avg_sq;
        const float *gradient = tensor->gradient;
        const float shrink = tensor->decay ? (float)(1 - learning_rate * h->weight_decay) : 1.0f;
#pragma omp parallel for simd
        for (size_t j = 0; j < tensor->size; j++) {
            float g = gradient[j] * clip;
            m[j] += one_minus_b1 * (g - m[j]);
            v[j] = b2 * v[j] + one_minus_b2 * g * g;
            p[j] = p[j] * shrink - corrected_rate * m[j] / (sqrtf(v[j]) / root + epsilon);
        }
    }
}

typedef enum { SCHEDULE_LINEAR, SCHEDULE_COSINE, SCHEDULE_CONSTANT } Schedule;

// What part of the highest learning rate update `step` = 0, 1, ..., steps - 1 uses. It rises in a straight
// line from 0 during `warmup` updates. Then it falls in a straight line or half a cosine, but not below
// `final`; or it stays at 1. transformers' get_*_schedule_with_warmup do the same, without `final`. With a
// warm-up, the first update has rate 0: it only starts the moments.
static double schedule_factor(Schedule schedule, long step, long warmup, long steps, double final) {
    if (step < warmup) return (double)step / (double)warmup;
    double progress = steps > warmup ? (double)(step - warmup) / (double)(steps - warmup) : 1;
    if (progress > 1) progress = 1;
    double factor = schedule == SCHEDULE_LINEAR   ? 1 - progress
                    : schedule == SCHEDULE_COSINE ? 0.5 * (1 + cos(3.141592653589793 * progress))
                                                  : 1;
    return factor > final ? factor : final;
}

// =====================================================================================================
// 8. One training step
// =====================================================================================================
// Everything comes together: forward, backward, update. A step may look at more examples than memory allows
// at once. Then they come as several batches, called micro-batches, whose gradients add up first.

typedef struct {
    double loss;     // mean over the scored rows
    double accuracy; // share of scored rows whose target had the highest logit
    double norm, learning_rate;
    size_t rows, targets;
    const char *not_finite; // "the loss", or a gradient, that is infinite or not a number; else NULL
} Update;

static double sum_over_ranks(double x); // ranks: processes that share out an update's examples. Part IV
static void sum_gradients_over_ranks(const Model *model);

// Takes update `step` = 0, 1, ... on `count` micro-batches. The loss is the mean over all scored rows, those
// of all ranks: how examples fall into batches does not matter. When nothing is scored, nothing changes and
// targets is 0. Nor does a weight change when the loss or a gradient is not finite: no model recovers from that.
static Update take_update(const Model *model, Activations *a, const Batch *batches, long count,
                          const Hyperparameters *h, long step, double learning_rate) {
    Update update = {.learning_rate = learning_rate};
    double loss = 0;
    size_t correct = 0;
    for (long i = 0; i < count; i++) {
        update.targets += (size_t)batches[i].targets;
        update.rows += (size_t)batches[i].rows;
    }
    update.targets = (size_t)sum_over_ranks((double)update.targets);
    if (update.targets == 0) return update;

    // Forward and backward: the first micro-batch overwrites the gradients, the others add to them.
    const uint64_t stream = random_stream(h->seed, 0x64726f70u + (uint64_t)step); // "drop"
    for (long i = 0; i < count; i++) {
        const Dropout dropout = {h->dropout, stream, batches[i].number};
        activations_reserve(a, model, batches[i].rows, h->keep);
        loss += model_forward_backward(model, a, &batches[i], 1.0f / (float)update.targets, i > 0, dropout);
        for (int j = 0; j < batches[i].targets; j++) correct += a->correct[j];
    }
    sum_gradients_over_ranks(model);
    update.loss = sum_over_ranks(loss) / (double)update.targets;
    update.accuracy = sum_over_ranks((double)correct) / (double)update.targets;

    const Tensor *tensor = NULL; // whose gradient is not finite
    if (!isfinite(update.loss)) update.not_finite = "the loss";
    if (!update.not_finite) update.norm = gradient_norm(model, &tensor);
    if (tensor) update.not_finite = xprintf("the gradient of %s", tensor->name);
    if (update.not_finite) return update;

    adamw_update(model, h, learning_rate, step + 1, clip_factor(update.norm, h->max_grad_norm));
    return update;
}

// =====================================================================================================
// 9. LoRA
// =====================================================================================================
// To train all of a model takes four times its memory (values, gradients, two moments), and every task leaves
// a whole new model behind. But what fine-tuning adds to a matrix W turned out to be simple: a product of two
// thin matrices comes close to it. LoRA learns only these two, A and B, an adapter (Hu et al. 2021). W stays
// frozen, and beside it x takes a detour through r numbers per row. r, the rank, is 1 to 32 or so.
//   y = x W + b + scale · (x Aᵀ) Bᵀ,   scale = alpha / r
//   x (R, K); y (R, N); W (K, N); A (r, K); B (N, r)
// In the smallest GPT-2 c_attn's W has 768 · 2304 = 1.77 million values; A and B, with r = 8, have 8 · (768 +
// 2304) = 24,576. B begins at 0, so the detour adds nothing at first and the model begins as what it was. A
// begins at random: if both were 0, so would be both gradients, and nothing would ever move. The user chooses
// alpha, the weight of the detour; divided by r, it lets the learning rate stay when the rank changes.
//
// After training scale · (B A)ᵀ, (K, N), can be added to W itself. The merged model is as fast as before, and
// every program that knows GPT-2 can load it. Names, shapes, scale and initial values are those of PEFT, the
// library in which most adapters are made: it loads ours, and we load its.

// Adds an adapter, A and B without values, beside a matrix of a block.
static void model_add_adapter(Model *model, Tensor *weight) {
    const size_t r = (size_t)model->lora_rank,
                 size_of[] = {['K'] = weight->shape[0], ['N'] = weight->shape[1], ['r'] = r};
    weight->adapter = &model->tensors[model->tensor_count];
    weight->adapter_scale = model->lora_alpha / (float)r;
    for (int kind = LORA_A; kind <= LORA_B; kind++) {
        Tensor *tensor = &model->tensors[model->tensor_count++];
        const char *shape = tensor_table[kind].shape;
        *tensor = (Tensor){.kind = kind, .layer = weight->layer, .dims = 2};
        tensor->name = xprintf("%.*s%s", (int)(strlen(weight->name) - strlen(".weight")), weight->name,
                               tensor_table[kind].name + 1);
        for (int d = 0; d < 2; d++) tensor->shape[d] = size_of[(int)shape[d]];
        tensor->size = tensor->shape[0] * tensor->shape[1];
    }
}

// Gives new adapters their first values. A: uniform between -1 / sqrt(K) and 1 / sqrt(K), which PEFT calls
// "kaiming uniform with a = sqrt(5)". B: zero.
static void adapters_initialise(Model *model, uint64_t seed) {
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *tensor = &model->tensors[i];
        if (tensor->kind < LORA_A) continue;
        const float bound = 1 / sqrtf((float)tensor->shape[1]); // of A, whose shape[1] is K
        const uint64_t stream = random_stream(seed, (uint64_t)i);
        for (size_t j = 0; j < tensor->size; j++)
            tensor->value[j] = tensor->kind == LORA_B ? 0 : bound * (2 * random_uniform(stream, j) - 1);
    }
}

// h = scale · x Aᵀ (R, r), in fresh memory. The scale is applied here, where numbers are few.
static float *lora_down(const float *x, const Tensor *weight, int R) {
    const Tensor *A = &weight->adapter[0];
    const int K = (int)A->shape[1], r = (int)A->shape[0];
    float *h = xfloats((size_t)R * r);
    matmul(h, r, x, K, false, A->value, K, true, R, r, K, false);
    for (size_t i = 0; i < (size_t)R * r; i++) h[i] *= weight->adapter_scale;
    return h;
}

// y += h Bᵀ, with h (R, r) as above
static void lora_forward(float *y, const float *x, const Tensor *weight, int R) {
    const Tensor *B = &weight->adapter[1];
    const int N = (int)B->shape[0], r = (int)B->shape[1];
    float *h = lora_down(x, weight, R);
    matmul(y, N, h, r, false, B->value, r, true, R, N, r, true);
    free(h);
}

// From y += h Bᵀ with h = scale · x Aᵀ follow, with dh = scale · dy B (R, r),
//   dB = dyᵀ h,   dA = dhᵀ x,   dx += dh A
// dA and dB are overwritten, or added to when accumulate. x NULL: no dA and dB are wanted; dx NULL: no dx.
// A and B have no gradient when they are frozen.
static void lora_backward(float *dx, const float *dy, const float *x, const Tensor *weight, bool accumulate,
                          int R) {
    const Tensor *A = &weight->adapter[0], *B = &weight->adapter[1];
    const int K = (int)A->shape[1], r = (int)A->shape[0], N = (int)B->shape[0];
    float *dh = xfloats((size_t)R * r);
    matmul(dh, r, dy, N, false, B->value, r, false, R, r, N, false);
    for (size_t i = 0; i < (size_t)R * r; i++) dh[i] *= weight->adapter_scale;
    if (x && B->gradient) {
        float *h = lora_down(x, weight, R);
        matmul(B->gradient, r, dy, N, true, h, r, false, N, r, R, accumulate);
        free(h);
    }
    if (x && A->gradient) matmul(A->gradient, K, dh, r, true, x, K, false, r, K, R, accumulate);
    if (dx) matmul(dx, K, dh, r, false, A->value, K, false, R, K, r, true);
    free(dh);
}

// W += scale · (B A)ᵀ for each adapter. Then adapters leave the list of tensors, and a plain GPT-2 remains.
static void model_merge(Model *model) {
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *weight = &model->tensors[i];
        if (!weight->adapter) continue;
        const Tensor A = weight->adapter[0], B = weight->adapter[1];
        const size_t K = weight->shape[0], N = weight->shape[1], r = A.shape[0];
#pragma omp parallel for
        for (size_t k = 0; k < K; k++)
            for (size_t n = 0; n < N; n++) {
                float sum = 0;
                for (size_t j = 0; j < r; j++) sum += A.value[j * K + k] * B.value[n * r + j];
                weight->value[k * N + n] += weight->adapter_scale * sum;
            }
        weight->adapter = NULL;
    }
    while (model->tensors[model->tensor_count - 1].kind >= LORA_A)
        free(model->tensors[--model->tensor_count].name);
    model->lora_rank = 0;
}

// #####################################################################################################
// PART II. Text
// #####################################################################################################
// Part I knows only token ids. Here text becomes ids and ids become text again, and a trained model writes.

// =====================================================================================================
// 10. Tokenizer
// =====================================================================================================
// A model reads and writes token ids, numbers below V; people read and write text. The tokenizer turns one
// into the other. GPT-2's is a byte-level BPE (Radford et al. 2019; byte pair encoding: Sennrich et al. 2016)
// and works in two steps:
//
//   "Hello world's end"  ->  "Hello" " world" "'s" " end"         pieces, cut by fixed rules (find_piece)
//   " world"  ->  Ġ w o r l d  ->  Ġw or ld  ->  Ġwor ld  ->  Ġworld  ->  995         merges (merge_piece)
//
// The vocabulary starts with the 256 bytes. So every file can be encoded, valid UTF-8 or not, and decoding
// gives back the same bytes. Each merge joins two neighbouring tokens into a new one; merges that were
// learned earlier are done first. tokenizer.c learns them from text. Besides these there are added tokens,
// such as <|endoftext|>: they are cut out of the text before the first step.

// ---- growing arrays ----
// Token ids; and bytes, always followed by a NUL that is not counted.

typedef struct {
    int *data;
    size_t size, capacity;
} Ids;

typedef struct {
    char *data;
    size_t size, capacity;
} Text;

static void ids_push(Ids *ids, int id) {
    ids->data = grow(ids->data, ids->size + 1, &ids->capacity, sizeof(int));
    ids->data[ids->size++] = id;
}

static bool ids_have(const Ids *ids, int id) {
    for (size_t i = 0; i < ids->size; i++)
        if (ids->data[i] == id) return true;
    return false;
}

static void text_append(Text *text, const char *bytes, size_t size) {
    text->data = grow(text->data, text->size + size + 1, &text->capacity, 1);
    if (size) memcpy(text->data + text->size, bytes, size);
    text->size += size;
    text->data[text->size] = 0;
}

// ---- character classes ----
// The rules for pieces know four classes of characters: letters (\p{L}), numbers (\p{N}), white space (\s),
// and all others. Combining marks are among the others, and so is each byte that is not part of valid UTF-8.

enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CODE_POINTS = 0x110000 };

// Unicode 16.0, which tiktoken 0.14 and tokenizers 0.23 use; made by dev/unicode_table.py. Read in pairs:
// skip so many code points, then so many are letters, or numbers if negative. "48,-10,7,26": 48 to 57 are
// numbers (0-9), then come 7 others, then 65 to 90 are letters (A-Z).
// clang-format off
static const int letter_and_number_runs[] = {
    48,-10,7,26,6,26,47,1,7,-2,1,1,3,-1,0,1,1,-3,1,23,1,31,1,458,4,12,14,5,7,1,1,1,129,5,1,2,2,4,1,1,6,1,1,3,
    1,1,1,20,1,83,1,139,8,166,1,38,2,1,6,41,71,27,4,4,45,43,21,-10,4,2,1,99,1,1,15,2,7,2,0,-10,0,3,2,1,16,1,
    1,30,29,89,11,1,14,-10,0,33,9,2,4,1,5,22,4,1,9,1,3,1,23,25,7,11,5,24,1,6,17,42,58,54,3,1,18,1,7,10,4,-10,
    1,16,4,8,2,2,2,22,1,7,1,1,3,4,3,1,16,1,13,2,1,3,4,-10,0,2,2,-6,2,1,8,6,4,2,2,22,1,7,1,2,1,2,1,2,31,4,1,1,
    7,-10,2,3,16,9,1,3,1,22,1,7,1,2,1,5,3,1,18,1,15,2,4,-10,9,1,11,8,2,2,2,22,1,7,1,2,1,5,3,1,30,2,1,3,4,-10,
    1,1,0,-6,11,1,1,6,3,3,1,4,3,2,1,1,1,2,3,2,3,3,3,12,22,1,21,-13,18,8,1,3,1,23,1,16,3,1,26,3,2,1,2,2,4,-10,
    8,-7,1,1,4,8,1,3,1,23,1,10,1,5,3,1,31,2,1,2,4,-10,1,2,17,9,1,3,1,41,2,1,16,1,5,3,1,-7,0,3,4,-19,1,6,5,18,
    3,24,1,9,1,1,2,7,31,-10,17,48,1,2,12,7,9,-10,39,2,1,1,1,5,1,24,1,1,1,10,1,2,9,1,2,5,1,1,9,-10,2,4,32,1,
    31,-20,12,8,1,36,27,5,115,43,20,1,0,-10,6,6,4,4,3,1,3,2,7,3,4,13,12,1,1,-10,6,38,1,1,5,1,2,43,1,333,1,4,
    2,7,1,1,1,4,2,41,1,4,2,33,1,4,2,7,1,1,1,4,2,15,1,57,1,4,2,67,14,-20,3,16,16,86,2,6,3,620,2,17,1,26,5,75,
    3,-3,0,8,7,18,13,19,14,18,14,13,1,3,15,52,35,1,4,1,3,-10,6,-10,22,-10,6,89,7,5,2,34,1,1,5,70,10,31,39,-10,
    0,30,2,5,11,44,4,26,6,-11,37,23,9,53,43,-10,6,-10,13,1,93,47,17,8,3,-10,41,30,13,2,0,-10,0,44,26,36,
    28,-10,3,3,0,-10,0,36,2,11,5,43,2,3,41,4,1,6,1,2,3,1,5,192,64,278,2,6,2,38,2,6,2,8,1,1,1,1,1,1,1,31,2,53,
    1,7,1,1,3,3,1,7,3,4,2,6,4,13,5,3,1,7,115,-1,0,1,2,-6,5,1,0,-10,6,13,101,1,4,1,2,10,1,1,3,5,6,1,1,1,1,1,
    1,4,1,11,2,4,5,5,4,1,1,-51,0,2,0,-5,726,-60,78,-22,630,-30,1132,229,6,4,3,2,9,-1,2,38,1,1,5,1,2,56,7,1,
    16,23,9,7,1,7,1,7,1,7,1,7,1,7,1,7,1,7,80,1,469,2,0,-1,25,-9,7,5,2,-3,0,2,4,86,6,3,1,90,1,4,5,43,1,94,3,-4,
    10,32,48,16,32,-10,30,-8,1,-15,32,-10,39,-15,320,6592,64,22157,67,46,2,269,3,16,0,-10,0,2,20,47,16,31,
    2,70,0,-10,39,9,2,103,2,67,2,2,1,1,1,8,21,16,1,3,1,4,1,23,13,-6,10,52,14,50,28,-10,24,6,3,1,1,2,1,-10,
    0,28,10,23,25,29,7,47,28,1,0,-10,6,5,1,10,0,-10,0,5,1,41,23,3,1,8,4,-10,6,23,3,1,3,50,1,1,3,2,2,5,2,1,1,1,
    24,3,2,11,7,3,12,6,2,6,2,6,9,7,1,7,1,43,1,14,6,115,13,-10,6,11172,12,23,4,49,8452,366,2,106,38,7,12,5,5,1,
    1,10,1,13,1,5,1,1,1,2,1,2,1,108,33,363,18,64,2,54,40,12,116,5,1,135,19,-10,7,26,6,26,11,89,3,6,2,6,2,6,
    2,3,35,12,1,26,1,19,1,2,1,15,2,14,34,123,12,-45,12,-57,17,-2,244,29,3,49,16,-27,4,32,0,-4,9,20,0,-1,0,8,
    0,-1,5,38,10,30,2,36,4,8,1,-5,42,158,2,-10,6,36,4,36,4,40,8,52,12,11,1,15,1,7,1,2,1,11,1,15,1,7,1,2,3,52,
    12,311,9,22,10,8,24,6,1,42,1,9,69,6,2,1,1,44,1,2,3,1,2,23,2,-8,0,23,2,-7,0,31,8,-9,48,19,1,2,5,-5,0,22,
    0,-6,4,26,70,56,4,-2,0,2,0,-16,2,-46,0,1,15,4,1,3,1,29,10,-9,23,29,0,-2,1,29,0,-3,32,8,1,28,6,-5,16,54,
    10,22,2,-8,0,19,5,-8,0,18,23,-7,80,73,55,51,13,51,7,-6,0,36,12,-10,6,-10,0,28,9,23,218,-31,1,42,6,2,16,3,
    59,29,0,-10,0,1,8,22,11,-4,27,18,46,21,0,-7,20,23,12,53,26,-30,1,2,2,1,13,45,32,25,7,-10,9,36,15,-10,4,1,
    2,1,8,35,3,1,12,48,14,4,11,-10,0,1,1,1,4,-20,11,18,1,25,19,2,63,7,1,1,1,4,1,15,1,10,7,47,17,-10,11,8,2,2,
    2,22,1,7,1,2,1,5,3,1,18,1,12,5,30,10,1,1,2,1,1,38,1,1,25,1,1,1,44,53,18,4,5,-10,5,3,30,48,20,2,1,1,8,-10,
    166,47,41,4,36,48,20,1,11,-10,38,43,13,1,7,-10,6,-20,28,27,21,-12,4,7,185,44,116,64,0,-19,12,8,2,1,2,8,
    1,2,1,24,15,1,1,1,14,-10,70,8,2,39,16,1,1,1,28,1,10,40,7,1,21,1,11,46,19,1,18,73,199,33,15,-10,6,9,1,37,
    17,1,15,-29,5,30,112,7,1,2,1,38,21,1,9,-10,6,6,1,2,1,32,14,1,7,-10,310,19,15,1,1,13,1,34,28,-10,86,1,
    15,-21,43,922,102,-111,17,196,2636,97,15,1072,17,6,25,3995,5,583,6841,30,18,-10,1734,569,7,31,1,-10,6,79,
    1,-10,6,30,18,48,16,4,12,-10,1,-7,1,21,5,19,432,45,3,-10,198,64,0,-23,105,75,5,1,66,13,64,2,1,1,28,6136,
    8,1238,41,10,8935,4,1,7,1,2,1,291,15,1,29,3,2,1,14,4,8,396,2308,107,5,13,3,9,7,10,4182,-10,1478,-20,
    12,-20,108,-25,135,85,1,71,1,2,2,1,2,2,2,4,1,12,1,1,1,7,1,65,1,4,2,8,1,7,1,28,1,4,1,5,1,1,3,7,1,340,2,25,
    1,25,1,31,1,25,1,31,1,25,1,31,1,25,1,31,1,25,1,8,2,-50,1792,31,6,6,261,62,146,45,10,7,2,-10,4,1,321,30,
    18,44,4,-10,470,28,4,-10,214,30,2,1,0,-10,485,7,1,4,1,2,1,15,1,197,2,-9,48,68,7,1,4,-10,791,-59,1,-3,1,-4,
    76,-45,1,-15,194,4,1,27,1,2,1,1,2,1,1,10,1,4,1,1,1,1,6,1,4,1,1,1,1,1,1,3,1,2,1,1,2,1,1,1,1,1,1,1,1,1,1,2,
    1,1,2,4,1,7,1,4,1,4,1,1,1,10,1,17,5,3,1,5,1,17,580,-13,2787,-10,1030,42720,32,4154,6,222,2,5762,14,7473,
    15,622,2466,542,1506,4939,5,4192,
};
// clang-format on

// Most characters of words (\w) are letters or numbers. These are the exceptions: marks and the underscore
// are part of a word although they are neither, and a few numbers, such as ² (U+00B2), are not. Read in
// pairs: skip so many code points, then so many are exceptions.
// clang-format off
static const int word_exception_runs[] = {
    95,1,82,2,5,1,2,3,577,112,275,7,263,45,1,1,1,2,1,2,1,1,72,11,48,21,16,1,101,7,2,6,2,2,1,4,35,1,30,27,
    91,11,58,9,9,1,24,4,1,9,1,3,1,5,43,3,59,9,42,24,1,33,54,3,1,18,1,7,10,2,29,3,56,1,1,7,2,2,2,3,9,1,10,2,
    16,6,4,1,2,3,56,1,1,5,4,2,2,3,3,1,30,2,3,1,11,3,56,1,1,8,1,3,1,3,20,2,22,6,1,3,56,1,1,7,2,2,2,3,7,3,10,2,
    14,6,10,1,59,5,3,3,1,4,9,1,24,3,13,5,55,1,1,7,1,3,1,4,7,2,11,2,20,7,2,3,56,1,1,7,1,3,1,4,7,2,11,2,15,1,
    12,4,55,2,1,7,1,3,1,4,9,8,3,2,12,9,8,3,70,1,4,6,1,1,1,8,18,2,61,1,2,7,12,8,98,1,2,9,11,7,73,2,16,10,1,1,
    1,1,1,1,4,2,49,20,1,2,5,11,1,36,9,1,100,20,23,4,4,3,1,3,2,7,3,4,13,12,1,1,10,4,703,3,9,20,917,4,28,3,29,2,
    30,2,64,32,9,1,18,10,17,3,1,1,117,2,34,1,118,12,4,12,158,1,60,5,57,10,1,29,2,1,48,31,49,5,47,17,38,9,12,3,
    30,13,56,14,48,20,152,3,1,21,4,1,6,1,2,3,198,64,524,2,49,2,19,1,27,1,3,6,6,10,70,33,95,16,41,1,726,60,
    26,74,630,30,1371,3,11,1,129,1,96,32,554,6,105,2,247,4,138,10,30,8,1,15,32,10,39,15,29615,4,1,10,32,2,
    80,2,272,1,3,1,4,1,23,5,4,1,3,6,74,2,50,18,26,18,13,1,38,8,25,13,44,4,47,14,36,1,67,14,12,1,8,2,45,3,50,1,
    1,3,2,2,5,2,1,1,41,5,5,2,236,8,1,2,20272,1,737,16,16,16,3,2,24,3,239,1,455,45,65,4,17,2,113,1,226,28,36,4,
    82,5,1245,8,25,7,39,9,75,5,22,6,160,2,2,16,2,46,1,3,1,2,5,4,40,3,4,10,52,2,30,3,69,2,4,5,104,8,24,8,41,7,
    330,6,36,4,65,5,242,31,44,2,79,4,29,10,31,15,45,4,63,7,52,3,53,15,11,20,10,1,2,2,10,4,45,11,7,1,61,3,
    36,14,16,2,44,1,12,3,48,14,8,4,1,2,17,20,55,12,6,1,2,1,157,12,21,4,55,2,1,7,2,2,2,3,9,1,10,2,2,7,3,5,67,9,
    1,1,2,1,1,4,1,5,1,1,14,2,82,18,23,1,81,20,235,7,2,9,27,2,82,17,106,13,101,15,14,2,240,15,175,9,61,6,1,2,
    2,4,1,1,1,2,141,7,2,7,3,1,28,10,40,7,1,4,8,1,9,11,46,16,405,8,1,8,26,19,37,22,1,14,122,6,3,1,1,2,1,7,1,1,
    66,5,1,2,1,5,347,4,9,2,1,1,48,7,3,5,23,1,101,21,5227,1,6,15,11464,18,2496,5,59,7,36,7,798,23,184,1,1,55,
    7,4,81,1,11,2,19627,2,4705,46,2,23,542,5,3,6,8,8,2,7,30,4,148,3,123,20,12,20,108,25,1671,55,4,50,8,1,14,1,
    22,5,1,15,1360,7,1,17,2,7,1,2,1,5,100,1,160,7,375,1,61,4,508,4,254,2,727,16,109,7,806,59,1,3,1,4,76,45,
    1,15,962,13,35,26,6,26,6,26,790390,240,
};
// clang-format on

// Unfolds the table into one byte per code point. Pages that are never looked at cost no memory.
static unsigned char *classes_make(void) {
    static const unsigned short spaces[] = {0x09,   0x0a,   0x0b,   0x0c,   0x0d,   0x20,   0x85,
                                            0xa0,   0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004,
                                            0x2005, 0x2006, 0x2007, 0x2008, 0x2009, 0x200a, 0x2028,
                                            0x2029, 0x202f, 0x205f, 0x3000};
    unsigned char *classes = xcalloc(CODE_POINTS, 1), *at = classes;
    for (size_t i = 0; i < sizeof letter_and_number_runs / sizeof(int); i += 2) {
        int run = letter_and_number_runs[i + 1];
        at += letter_and_number_runs[i];
        memset(at, run > 0 ? CLASS_LETTER : CLASS_NUMBER, (size_t)abs(run));
        at += abs(run);
    }
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) classes[spaces[i]] = CLASS_SPACE;
    return classes;
}

// Writes a code point as UTF-8 and returns the number of bytes, 1 to 4.
static int utf8_write(char *out, unsigned code) {
    int extra = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char lead[4] = {0, 0xc0, 0xe0, 0xf0};
    for (int i = extra; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 63));
    out[0] = (char)(lead[extra] | code);
    return extra + 1;
}

// Reads one UTF-8 character (RFC 3629) and returns its length, 1 to 4, or 0 if the bytes are not valid.
static int utf8_read(const char *bytes, size_t size, unsigned *code) {
    static const unsigned smallest[5] = {0, 0, 0x80, 0x800, 0x10000}; // longer forms are not valid
    if (size == 0) return 0;
    unsigned char lead = (unsigned char)bytes[0];
    int length = lead < 0x80 ? 1 : lead < 0xc0 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf8 ? 4 : 0;
    if (length == 0 || (size_t)length > size) return 0;
    *code = length == 1 ? lead : lead & (0x7fu >> length);
    for (int i = 1; i < length; i++) {
        if ((bytes[i] & 0xc0) != 0x80) return 0;
        *code = *code << 6 | (bytes[i] & 0x3f);
    }
    bool surrogate = *code >= 0xd800 && *code < 0xe000;
    return *code < smallest[length] || *code >= CODE_POINTS || surrogate ? 0 : length;
}

// The length of the longest prefix that does not end inside a character: so much of it can be shown already.
// "caf\xc3" -> 3, since \xa9 may follow and make it é; "caf\xff" -> 4, since \xff never begins a character.
static size_t utf8_whole(const char *bytes, size_t size) {
    for (size_t back = 1; back <= 3 && back <= size; back++) {
        unsigned char c = (unsigned char)bytes[size - back];
        if ((c & 0xc0) == 0x80) continue; // not the first byte of a character
        size_t length = c < 0xc0 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf8 ? 4 : 1;
        return length > back ? size - back : size;
    }
    return size;
}

// Where the character that ends before text[at] starts (at > 0), and what it is. A byte that is not part of
// valid UTF-8 is a character of its own, U+FFFD.
static size_t previous_character(const char *text, size_t at, unsigned *code) {
    for (size_t length = 1; length <= 4 && length <= at; length++)
        if (utf8_read(text + at - length, length, code) == (int)length) return at - length;
    *code = 0xfffd;
    return at - 1;
}

// ---- the tokenizer ----

static const char END_OF_TEXT[] = "<|endoftext|>";
enum { END_OF_TEXT_SIZE = sizeof END_OF_TEXT - 1, SPELLING_CODES = 0x144 };

// Two tokens that may be joined, and the token that they make. A merge's rank is its place in merges.txt.
typedef struct {
    int left, right, id;
} Merge;

typedef struct Encoder Encoder;

// An added token is not made by merges: wherever its name stands in a text, it is cut out as a whole before
// the text is cut into pieces. Fine-tuned models have such tokens for the turns of a conversation, for
// instance.
typedef struct {
    int id;
    size_t size;         // bytes of its name
    bool single_word;    // it only counts where no character of a word touches it
    bool lstrip, rstrip; // white space on its left or right is dropped
    bool normalized;     // it is looked for in the second pass, in what the first pass has left
} AddedToken;

enum { PASSES = 2, MAX_THREADS = 1024 };

// The names of the added tokens form a tree (a trie) for each pass. A node stands for the bytes on the path
// from the root to it.
typedef struct {
    int parent, byte; // which node it comes from, and by which byte
    int token;        // the added token whose name ends here, or -1
} TrieNode;

typedef struct {
    int vocab_size, merge_count; // vocab_size: the largest id, plus 1
    int base_size;               // the same before the folder's added tokens come to the vocabulary
    int end_of_text;             // the id that ends a text, or -1
    int pad;                     // the id that fills up short examples, or -1
    bool plain;                  // added tokens in a text are ordinary text
    size_t names_capacity;
    char **names;                  // [vocab_size] each token as vocab.json spells it; NULL: no such token
    Merge *merges;                 // [merge_count] in order of rank
    int *name_slots, *merge_slots; // hash tables: name -> id, left and right -> rank; -1 in empty slots
    size_t name_mask, merge_mask;  // slots in each table, less 1
    short spelled[SPELLING_CODES]; // the byte that each character of a name spells, or -1
    int byte_ids[256];             // the token of each single byte
    unsigned char *classes;        // [CODE_POINTS]
    AddedToken *added;             // [added_count]
    TrieNode *nodes;               // [node_count] node 0 and 1 are the roots of the two passes
    size_t added_count, added_capacity, node_count, node_capacity, longest_added;
    int *node_slots; // hash table: parent and byte -> node; -1 in empty slots
    size_t node_mask;
    Ids firsts[PASSES];             // with which bytes the names that a pass looks for begin
    bool begins[PASSES][1 << 16];   // whether one begins with two bytes: [first + 256 * second]
    Encoder *encoders[MAX_THREADS]; // scratch memory of each thread
} Tokenizer;

// ---- cutting text into pieces ----

// The class of the character at text[at], and its length.
static inline int class_at(const Tokenizer *t, const char *text, size_t at, size_t size, size_t *length) {
    unsigned code = (unsigned char)text[at];
    int found = code < 0x80 ? 1 : utf8_read(text + at, size - at, &code);
    *length = found ? (size_t)found : 1;
    return found ? t->classes[code] : CLASS_OTHER;
}

// The first place at or behind text[at] whose character is not of this class.
static size_t run_end(const Tokenizer *t, const char *text, size_t at, size_t size, int class) {
    for (;;) {
        while (at < size && (unsigned char)text[at] < 0x80 && t->classes[(unsigned char)text[at]] == class)
            at++; // the fast path: ASCII
        size_t length;
        if (at == size || (unsigned char)text[at] < 0x80 || class_at(t, text, at, size, &length) != class)
            return at;
        at += length;
    }
}

// Where the piece that starts at text[at] ends. The rule is GPT-2's regular expression, first match wins:
//   '(?:[sdmt]|ll|ve|re)     an English ending, lower case: "'s", "'ll"
//    ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+     letters, or numbers, or others, with one U+0020 before them
//   \s+(?!\S)                white space, but its last character is left to what follows
//   \s+                      white space
// "I'll  pay $100!\n" -> "I" "'ll" " " " pay" " $" "100" "!" "\n"
static size_t find_piece(const Tokenizer *t, const char *text, size_t at, size_t size) {
    if (text[at] == '\'' && at + 1 < size) {
        char a = text[at + 1], b = at + 2 < size ? text[at + 2] : 0;
        if (a == 's' || a == 'd' || a == 'm' || a == 't') return at + 2;
        if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return at + 3;
    }
    size_t start = at + (text[at] == ' ' && at + 1 < size), length;
    int class = class_at(t, text, start, size, &length);
    if (class != CLASS_SPACE) return run_end(t, text, start + length, size, class);
    size_t end = run_end(t, text, start + length, size, CLASS_SPACE), last = end - 1;
    while ((text[last] & 0xc0) == 0x80) // to the byte where the last white space starts
        last--;
    return end < size && last > at ? last : end;
}

// ---- added tokens ----
// The rules are those of Hugging Face's tokenizers library. A text is searched in two passes, see
// `normalized`. In each the leftmost name wins, and of those that begin at the same place the longest. The
// search goes on behind it, even when it does not count because it touches a word (single_word).
//   "[user]hi resto_bombay" -> [user], "hi " as ordinary text, resto_bombay

// The slot that holds the node to which `byte` leads from `node`, or -1 when it leads nowhere.
static int *node_slot(const Tokenizer *t, int node, int byte) {
    uint64_t hash = ((uint64_t)(unsigned)node << 8 | (unsigned)byte) * 0x9e3779b97f4a7c15u;
    for (size_t i = (size_t)(hash >> 32) & t->node_mask;; i = (i + 1) & t->node_mask) {
        int next = t->node_slots[i];
        if (next < 0 || (t->nodes[next].parent == node && t->nodes[next].byte == byte))
            return &t->node_slots[i];
    }
}

// The longest added token of a pass whose name begins at text[at], or NULL.
static const AddedToken *added_token_at(const Tokenizer *t, int pass, const char *text, size_t at,
                                        size_t size) {
    const AddedToken *found = NULL;
    for (int node = pass; at < size && (node = *node_slot(t, node, (unsigned char)text[at])) >= 0; at++)
        if (t->nodes[node].token >= 0) found = &t->added[t->nodes[node].token];
    return found;
}

// Whether a cut at text[at] leaves all added tokens as they are. It does not if
//   a name begins before the cut and reaches it: the cut would split it, or the white space that rstrip drops;
//   a name that begins here depends on the character before it (single_word);
//   the text ends inside a name, which more text may complete.
static bool cut_spares_added(const Tokenizer *t, const char *text, size_t at, size_t size) {
    for (size_t start = at > t->longest_added ? at - t->longest_added : 0; start <= at; start++)
        for (int pass = 0; pass < PASSES && t->added_count > 0; pass++) {
            size_t end = start;
            for (int node = pass; (node = *node_slot(t, node, (unsigned char)text[end])) >= 0;) {
                int token = t->nodes[node].token;
                if (++end == size) return false;
                if (token >= 0 && (start < at ? end >= at : t->added[token].single_word)) return false;
            }
        }
    return true;
}

// The last place where a text can be cut without changing its ids: those of the two parts, put together, are
// those of the whole. 0 if there is no such place. It is before white space that follows something else: a
// piece always ends there, whatever comes before or after, and so does white space that an added token drops.
// "one two  th" -> 7: "one two" can be encoded now, "  th" must wait for more text.
static size_t tokenizer_cut(const Tokenizer *t, const char *text, size_t size) {
    for (size_t length, at = size; at-- > 1;) {
        unsigned before;
        if (class_at(t, text, at, size, &length) != CLASS_SPACE) continue;
        previous_character(text, at, &before);
        if (t->classes[before] != CLASS_SPACE && cut_spares_added(t, text, at, size)) return at;
    }
    return 0;
}

// Whether a character is part of a word.
static bool is_word_character(const Tokenizer *t, unsigned code) {
    bool usual = t->classes[code] == CLASS_LETTER || t->classes[code] == CLASS_NUMBER;
    unsigned at = 0; // the end of the runs that were looked at
    for (size_t i = 0; i < sizeof word_exception_runs / sizeof(int); i += 2) {
        at += (unsigned)word_exception_runs[i];
        if (code < at) return usual;
        at += (unsigned)word_exception_runs[i + 1];
        if (code < at) return !usual;
    }
    return usual;
}

// Whether the character before or behind text[start .. end - 1] is part of a word.
static bool touches_word(const Tokenizer *t, const char *text, size_t start, size_t end, size_t size) {
    unsigned code;
    if (start > 0 && (previous_character(text, start, &code), is_word_character(t, code))) return true;
    return end < size && utf8_read(text + end, size - end, &code) > 0 && is_word_character(t, code);
}

// ---- encoding ----

enum { CACHED_BYTES = 16, CACHED_IDS = 3, CACHE_SLOTS = 1 << 17 };

// Text repeats its words, so the ids of short pieces are kept. A piece's hash says in which slot; a new piece
// takes the place of an old one.
typedef struct {
    uint64_t piece[2];         // its bytes, filled up with zeros
    unsigned char size, count; // size 0: an empty slot
    int ids[CACHED_IDS];
} CacheSlot; // half a cache line; 4 MB of them for each thread

// A token of the piece that is being merged, with its neighbours; -1: it has none.
typedef struct {
    int id, previous, next;
} Symbol;

// What a thread needs to encode: the cache, and memory for one piece.
struct Encoder {
    CacheSlot cache[CACHE_SLOTS];
    Symbol *symbols;
    uint64_t *queue; // a binary heap of possible merges, each as rank << 32 | position of its left token
    size_t symbol_capacity, queue_capacity, queued;
};

// The encoder of the calling thread, made when the thread first asks for it.
static Encoder *encoder_of_thread(Tokenizer *t) {
    int thread = omp_get_thread_num();
    if (thread >= MAX_THREADS) die("at most %d threads can encode text: choose fewer", MAX_THREADS);
    Encoder **encoder = &t->encoders[thread];
    if (!*encoder) // aligned to a cache line, so that no slot lies in two
        *encoder = memset(xfloats(sizeof **encoder / sizeof(float)), 0, sizeof **encoder);
    return *encoder;
}

// The slot that holds the rank of a pair's merge, or -1 when the two are never joined.
static inline int *merge_slot(const Tokenizer *t, int left, int right) {
    uint64_t hash = ((uint64_t)(unsigned)left << 32 | (unsigned)right) * 0x9e3779b97f4a7c15u;
    for (size_t i = (size_t)(hash >> 32) & t->merge_mask;; i = (i + 1) & t->merge_mask) {
        int rank = t->merge_slots[i];
        if (rank < 0 || (t->merges[rank].left == left && t->merges[rank].right == right))
            return &t->merge_slots[i];
    }
}

// Adds an entry to the heap: queue[i] is never larger than queue[2i + 1] and queue[2i + 2].
static void queue_put(Encoder *encoder, uint64_t entry) {
    encoder->queue = grow(encoder->queue, encoder->queued + 1, &encoder->queue_capacity, sizeof(uint64_t));
    uint64_t *queue = encoder->queue;
    size_t at = encoder->queued++;
    for (; at > 0 && queue[(at - 1) / 2] > entry; at = (at - 1) / 2) queue[at] = queue[(at - 1) / 2];
    queue[at] = entry;
}

// Takes the smallest entry: of the lowest rank the leftmost one.
static uint64_t queue_take(Encoder *encoder) {
    uint64_t *queue = encoder->queue, smallest = queue[0], last = queue[--encoder->queued];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < encoder->queued; at = child) {
        if (child + 1 < encoder->queued && queue[child + 1] < queue[child]) child++;
        if (queue[child] >= last) break;
        queue[at] = queue[child];
    }
    queue[at] = last;
    return smallest;
}

// Queues the merge of a symbol with its next one, if there is such a merge.
static void queue_merge(const Tokenizer *t, Encoder *encoder, int position) {
    const Symbol *symbol = &encoder->symbols[position];
    int rank = symbol->next < 0 ? -1 : *merge_slot(t, symbol->id, encoder->symbols[symbol->next].id);
    if (rank < 0) return;
    queue_put(encoder, (uint64_t)rank << 32 | (unsigned)position);
}

// Joins the tokens of one piece: lowest rank first, leftmost first among equals, until no merge is left. An
// entry of the queue is out of date when another merge has taken one of its two tokens. A rank belongs to one
// pair of tokens only, so it is enough to check that the pair at this place still has it. Takes at most
// n log n steps.
// " low" with merges "o w", "l ow", "Ġ low": Ġ l o w -> Ġ l ow -> Ġ low -> Ġlow
static void merge_piece(const Tokenizer *t, Encoder *encoder, Ids *ids, const char *piece, size_t size) {
    if (size > INT_MAX)
        die("the text has %zu bytes without any place to cut them: expected less than 2 GB", size);
    Symbol *symbols = grow(encoder->symbols, size, &encoder->symbol_capacity, sizeof(Symbol));
    encoder->symbols = symbols;
    for (int i = 0, n = (int)size; i < n; i++)
        symbols[i] = (Symbol){t->byte_ids[(unsigned char)piece[i]], i - 1, i + 1 < n ? i + 1 : -1};
    for (int i = 0; i >= 0; i = symbols[i].next) queue_merge(t, encoder, i);
    while (encoder->queued > 0) {
        uint64_t entry = queue_take(encoder);
        int rank = (int)(entry >> 32), at = (int)(entry & INT_MAX);
        Symbol *left = &symbols[at];
        if (left->id < 0 || left->next < 0 || *merge_slot(t, left->id, symbols[left->next].id) != rank)
            continue;
        Symbol *right = &symbols[left->next];
        left->id = t->merges[rank].id;
        left->next = right->next;
        right->id = -1; // it is part of `left` now
        queue_merge(t, encoder, at);
        if (left->next >= 0) symbols[left->next].previous = at;
        if (left->previous >= 0) queue_merge(t, encoder, left->previous);
    }
    for (int i = 0; i >= 0; i = symbols[i].next) ids_push(ids, symbols[i].id);
}

// Appends the ids of text without added tokens.
static void encode_plain(const Tokenizer *t, Encoder *encoder, Ids *ids, const char *text, size_t size) {
    for (size_t at = 0, end; at < size; at = end) {
        end = find_piece(t, text, at, size);
        size_t n = end - at, before = ids->size;
        if (n > CACHED_BYTES) {
            merge_piece(t, encoder, ids, text + at, n);
            continue;
        }
        uint64_t key[2] = {0};
        if (size - at < CACHED_BYTES)
            memcpy(key, text + at, n);
        else { // faster: copy 16 bytes, then clear those behind the piece
            memcpy(key, text + at, CACHED_BYTES);
            key[0] &= n < 8 ? ~0ull >> (64 - 8 * n) : ~0ull;
            key[1] &= n > 8 ? ~0ull >> (128 - 8 * n) : 0;
        }
        uint64_t hash = (key[0] ^ key[1] * 0x9e3779b97f4a7c15u) + n;
        hash = (hash ^ hash >> 32) * 0x94d049bb133111ebu;
        CacheSlot *slot = &encoder->cache[(hash >> 32) % CACHE_SLOTS];
        if (slot->size == n && slot->piece[0] == key[0] && slot->piece[1] == key[1]) {
            for (int i = 0; i < slot->count; i++) ids_push(ids, slot->ids[i]);
            continue;
        }
        merge_piece(t, encoder, ids, text + at, n);
        if (ids->size - before <= CACHED_IDS) {
            slot->size = (unsigned char)n;
            slot->count = (unsigned char)(ids->size - before);
            memcpy(slot->piece, key, sizeof key);
            memcpy(slot->ids, ids->data + before, slot->count * sizeof(int));
        }
    }
}

// Appends the ids of a text from which the passes before `pass` have cut their added tokens.
static void encode_pass(const Tokenizer *t, Encoder *encoder, Ids *ids, const char *text, size_t size,
                        int pass) {
    while (pass < PASSES && t->firsts[pass].size == 0) pass++;
    if (pass == PASSES) {
        encode_plain(t, encoder, ids, text, size);
        return;
    }
    const Ids *firsts = &t->firsts[pass];
    const unsigned char *bytes = (const unsigned char *)text;
    size_t done = 0; // text[0 .. done - 1] is encoded
    for (size_t at = 0, end; at < size; at = end) {
        if (firsts->size == 1) { // the usual case: GPT-2 has one added token
            const char *found = memchr(text + at, firsts->data[0], size - at);
            at = found ? (size_t)(found - text) : size;
        }
        while (at + 1 < size && !t->begins[pass][bytes[at] | bytes[at + 1] << 8]) at++;
        const AddedToken *token = added_token_at(t, pass, text, at, size);
        end = at + (token ? token->size : 1);
        if (!token || (token->single_word && touches_word(t, text, at, end, size))) continue;
        size_t start = at, stop = end;
        for (unsigned code; token->lstrip && start > done; start = at) {
            at = previous_character(text, start, &code);
            if (t->classes[code] != CLASS_SPACE) break;
        }
        if (token->lstrip && start < done) start = done;
        if (token->rstrip) stop = run_end(t, text, end, size, CLASS_SPACE);
        if (start >= stop) continue; // white space that the token before it has taken
        if (start > done) encode_pass(t, encoder, ids, text + done, start - done, pass + 1);
        ids_push(ids, token->id);
        done = stop;
    }
    if (done < size) encode_pass(t, encoder, ids, text + done, size - done, pass + 1);
}

// Appends the ids of a text, as one thread.
static void encode_part(Tokenizer *t, Ids *ids, const char *text, size_t size) {
    encode_pass(t, encoder_of_thread(t), ids, text, size, t->plain || t->added_count == 0 ? PASSES : 0);
}

// Appends the ids of a text to `ids`: those that AutoTokenizer gives, or with t->plain those of tiktoken's
// encode_ordinary. The threads of a parallel region may call this with the same tokenizer at the same time.
// Outside of a parallel region a large text is cut into parts that the threads share; the ids are the same.
//   "Hello world" -> 15496 995 in GPT-2's vocabulary; "hello <|endoftext|>" -> 31373 220 50256
static void tokenizer_encode(Tokenizer *t, Ids *ids, const char *text, size_t size) {
    enum { PART_BYTES = 1 << 17 };
    size_t part_count = size / PART_BYTES;
    if (part_count < 2 || omp_get_max_threads() == 1 || omp_in_parallel()) {
        encode_part(t, ids, text, size);
        return;
    }
    Ids *parts = xcalloc(part_count, sizeof *parts);
    size_t *starts = xcalloc(part_count + 1, sizeof *starts);
    for (size_t i = 1; i < part_count; i++)
        starts[i] = starts[i - 1] + tokenizer_cut(t, text + starts[i - 1], i * PART_BYTES - starts[i - 1]);
    starts[part_count] = size;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < part_count; i++)
        encode_part(t, &parts[i], text + starts[i], starts[i + 1] - starts[i]);
    for (size_t i = 0; i < part_count; i++) {
        ids->data = grow(ids->data, ids->size + parts[i].size, &ids->capacity, sizeof(int));
        if (parts[i].size) memcpy(ids->data + ids->size, parts[i].data, parts[i].size * sizeof(int));
        ids->size += parts[i].size;
        free(parts[i].data);
    }
    free(parts);
    free(starts);
}

// ---- names, merges and added tokens ----

// Makes a hash table for `count` entries, at most half full; -1: an empty slot.
static int *slots_make(size_t count, size_t *mask) {
    if (count > INT_MAX / 4)
        die("a vocabulary of %zu tokens or merges is too large: expected at most %d", count, INT_MAX / 4);
    for (*mask = 1023; *mask < 2 * count;) *mask = 2 * *mask + 1;
    return memset(xmalloc((*mask + 1) * sizeof(int)), -1, (*mask + 1) * sizeof(int));
}

// Makes a tokenizer that has no tokens or merges yet, but room for so many. Free it with tokenizer_free.
static Tokenizer *tokenizer_new(size_t tokens, size_t merges) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    t->end_of_text = t->pad = -1;
    t->name_slots = slots_make(tokens, &t->name_mask);
    t->merge_slots = slots_make(merges, &t->merge_mask);
    t->node_slots = slots_make(0, &t->node_mask);
    t->merges = xcalloc(merges, sizeof *t->merges);
    t->classes = classes_make();
    t->nodes = grow(NULL, PASSES, &t->node_capacity, sizeof *t->nodes);
    for (int pass = 0; pass < PASSES; pass++) t->nodes[t->node_count++] = (TrieNode){-1, -1, -1};
    memset(t->spelled, -1, sizeof t->spelled);
    for (int byte = 0, hidden = 0x100; byte < 256; byte++) {
        bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
        t->spelled[printable ? byte : hidden++] = (short)byte;
    }
    return t;
}

static void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    for (int thread = 0; thread < MAX_THREADS; thread++) {
        if (!t->encoders[thread]) continue;
        free(t->encoders[thread]->symbols);
        free(t->encoders[thread]->queue);
        free(t->encoders[thread]);
    }
    for (int id = 0; id < t->vocab_size; id++) free(t->names[id]);
    free(t->names);
    free(t->merges);
    for (int pass = 0; pass < PASSES; pass++) free(t->firsts[pass].data);
    free(t->added);
    free(t->nodes);
    free(t->name_slots);
    free(t->merge_slots);
    free(t->node_slots);
    free(t->classes);
    free(t);
}

// The slot that holds the id of the token with this name, or -1 when there is none.
static int *name_slot(const Tokenizer *t, const char *name) {
    uint64_t hash = 0;
    for (const char *c = name; *c; c++) hash = (hash ^ (unsigned char)*c) * 0x9e3779b97f4a7c15u;
    for (size_t i = (size_t)(hash >> 32) & t->name_mask;; i = (i + 1) & t->name_mask) {
        int id = t->name_slots[i];
        if (id < 0 || strcmp(t->names[id], name) == 0) return &t->name_slots[i];
    }
}

// Gives this id to a name that has none. No other name may have the id; *slot is the name's.
static void name_set(Tokenizer *t, int *slot, const char *name, int id) {
    size_t known = (size_t)t->vocab_size;
    if ((size_t)id >= known) {
        t->names = grow(t->names, (size_t)id + 1, &t->names_capacity, sizeof *t->names);
        memset(t->names + known, 0, ((size_t)id + 1 - known) * sizeof *t->names);
        t->vocab_size = id + 1;
    }
    t->names[id] = xstrdup(name);
    *slot = id;
}

// Gives the next id to a name that has none yet; returns the name's id.
static int name_add(Tokenizer *t, const char *name) {
    int *slot = name_slot(t, name);
    if (*slot < 0) name_set(t, slot, name, t->vocab_size);
    return *slot;
}

static bool token_exists(const Tokenizer *t, int id) {
    return id >= 0 && id < t->vocab_size && t->names[id] != NULL;
}

// The node to which a byte leads from `node`; makes it if there is none yet.
static int node_add(Tokenizer *t, int node, int byte) {
    int *slot = node_slot(t, node, byte);
    if (*slot >= 0) return *slot;
    t->nodes = grow(t->nodes, t->node_count + 1, &t->node_capacity, sizeof *t->nodes);
    t->nodes[t->node_count] = (TrieNode){node, byte, -1};
    *slot = (int)t->node_count++;
    if (2 * t->node_count <= t->node_mask) return (int)t->node_count - 1;
    free(t->node_slots);
    t->node_slots = slots_make(t->node_count, &t->node_mask); // more than half full: twice as large
    for (int i = PASSES; i < (int)t->node_count; i++) *node_slot(t, t->nodes[i].parent, t->nodes[i].byte) = i;
    return (int)t->node_count - 1;
}

// Where the tree of a pass keeps the number of the added token with this name, or -1 if there is none.
static int *added_slot(Tokenizer *t, const char *name, int pass) {
    int node = pass;
    for (const char *c = name; *c; c++) node = node_add(t, node, (unsigned char)*c);
    return &t->nodes[node].token;
}

// Makes the token with the id token.id an added one. If it is one already, its flags are replaced.
static void token_add(Tokenizer *t, AddedToken token) {
    const char *name = t->names[token.id];
    int *other = added_slot(t, name, !token.normalized), known = *other;
    *other = -1;
    int *slot = added_slot(t, name, token.normalized);
    known = *slot >= 0 ? *slot : known >= 0 ? known : (int)t->added_count;
    if ((size_t)known == t->added_count)
        t->added = grow(t->added, ++t->added_count, &t->added_capacity, sizeof *t->added);
    token.size = strlen(name);
    t->added[known] = token;
    *slot = known;
    t->longest_added = token.size > t->longest_added ? token.size : t->longest_added;
    bool *begins = t->begins[token.normalized];
    unsigned char first = (unsigned char)name[0], second = (unsigned char)name[1];
    if (!ids_have(&t->firsts[token.normalized], first)) ids_push(&t->firsts[token.normalized], first);
    for (int byte = 0; byte < 256; byte++)
        if (token.size == 1 || byte == second) begins[first | byte << 8] = true;
}

// ---- decoding ----

// Appends the bytes of one id; ends the program if there is no such id. A token may end inside a UTF-8
// character: only the bytes of all ids together are the text. 995 -> " world" in GPT-2's vocabulary. The name
// of an added token need not be a spelling of bytes (it may have a space, say); then the name itself is the
// text.
static void tokenizer_decode(const Tokenizer *t, Text *text, int id) {
    if (id < 0 || id >= t->vocab_size)
        die("token id %d is not in the vocabulary: expected 0 to %d", id, t->vocab_size - 1);
    if (!t->names[id]) die("token id %d: the vocabulary has no token with this id", id);
    const char *name = t->names[id];
    size_t size = strlen(name), before = text->size;
    for (size_t at = 0, length; at < size; at += length) {
        unsigned code = UINT_MAX;
        length = (size_t)utf8_read(name + at, size - at, &code);
        if (length == 0 || code >= SPELLING_CODES || t->spelled[code] < 0) {
            text->size = before;
            text_append(text, name, size);
            return;
        }
        char byte = (char)t->spelled[code];
        text_append(text, &byte, 1);
    }
}

// =====================================================================================================
// 11. Generation
// =====================================================================================================
// A model gives the probabilities of the next token; text comes from drawing one, appending it and asking
// again. The model first runs once on the whole prompt. After that a batch has one row for each sample: its
// newest token. That row attends to all earlier ones, whose keys and values a cache keeps, so that nothing is
// computed twice. Such a batch does little arithmetic but reads every weight. So a token takes as long as one
// pass over the weights, and several samples at once cost little more than one.

typedef struct {
    double temperature;        // logits are divided by it; 0: always the most likely token
    int top_k;                 // only the k most likely tokens; 0: all
    double top_p;              // only the most likely tokens that together reach this probability; 1: all
    uint64_t seed;             // the same seed draws the same tokens
    const char *stop;          // a sample ends before this text; NULL: no such text
    double repetition_penalty; // above 1: what the text has already becomes less likely; 1: no change
    bool silent;               // a single sample is not printed while it is made
} Sampling;

// What follows the prompt in one sample: its tokens, and their text up to where it ends.
typedef struct {
    Ids ids;
    Text text;
} Sample;

// Keys and values of the tokens so far: (L, sequences, key and value, NH, positions, HS), so that what a head
// reads lies in one stretch of memory. Some samples end earlier, and a batch has only the others: so
// first_key says for each sequence of the batch where its keys begin.
struct Cache {
    int sequences, positions, past; // `past` positions are filled
    int NH, HS;
    float *memory;
    int *first_key; // (sequences of the batch) counted in rows of HS from where the layer's part begins
};

// With --precision bfloat16, arrays that are read again for each token are copied in half the size: Part V.
static void keep_copy(const float *from, size_t size);    // makes room for a copy of this array, empty yet
static void refresh_copy(const float *from, size_t size); // copies a part of it that has changed
static void keep_packed_copy(const float *B, bool transpose_b, size_t K, size_t N); // copies op(B) (K, N)
static void drop_copies(void);                                                      // frees all copies

// Keeps copies of all weights that products multiply by.
static void keep_packed_copies(const Model *model) {
    const Tensor *head = model_head(model);
    keep_packed_copy(head->value, true, head->shape[1], head->shape[0]);
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *t = &model->tensors[i];
        if (t->dims == 2 && kind_is_per_layer(t->kind))
            keep_packed_copy(t->value, false, t->shape[0], t->shape[1]);
    }
}

// Writes the keys and values of a batch behind those of the earlier tokens; returns where attention finds
// them all.
static Keys cache_append(Cache *cache, const Batch *batch, const float *qkv, int layer) {
    const size_t NH = (size_t)cache->NH, HS = (size_t)cache->HS, C = NH * HS;
    const size_t head_stride = cache->positions * HS,
                 values = cache->positions * C; // keys stand before values
    float *layer_part = cache->memory + (size_t)layer * cache->sequences * 2 * values;
    for (int s = 0; s < batch->sequences; s++)
        for (int r = batch->first_row[s], place = cache->past; r < batch->first_row[s + 1]; r++, place++)
            for (size_t head = 0; head < NH; head++) {
                float *to = layer_part + (cache->first_key[s] + place) * HS + head * head_stride;
                const float *key = qkv + ((size_t)r * 3 + 1) * C + head * HS;
                memcpy(to, key, HS * sizeof(float));
                memcpy(to + values, key + C, HS * sizeof(float));
                refresh_copy(to, HS);
                refresh_copy(to + values, HS);
            }
    return (Keys){layer_part, layer_part + values, HS, head_stride, cache->first_key, cache->past};
}

// An empty cache for `samples` samples of up to n_positions tokens. With it come copies of the weights that
// products multiply by. cache_free drops all copies, so only one cache may live at a time.
static Cache cache_new(const Model *model, int samples) {
    const Config *config = &model->config;
    const size_t size = (size_t)config->n_layer * samples * config->n_positions * 2 * config->n_embd;
    Cache cache = {.sequences = samples, .positions = config->n_positions, .NH = config->n_head};
    cache.HS = config->n_embd / config->n_head;
    cache.first_key = xmalloc((size_t)samples * sizeof(int));
    cache.memory = xfloats(size);
    keep_copy(cache.memory, size);
    keep_packed_copies(model);
    return cache;
}

static void cache_free(Cache *cache) {
    drop_copies();
    free(cache->first_key);
    free(cache->memory);
}

typedef struct {
    float probability; // not normalised
    int token;
} Candidate;

static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->probability != y->probability) return x->probability < y->probability ? 1 : -1;
    return (x->token > y->token) - (x->token < y->token);
}

// The k-th largest of x (n), 1 <= k <= n. The k largest so far are kept sorted; few of the rest get in.
static float kth_largest(const float *x, int n, int k) {
    float *kept = xmalloc((size_t)k * sizeof *kept), result;
    for (int i = 0, count = 0; i < n; i++) {
        if (count == k && x[i] <= kept[k - 1]) continue;
        int at = count < k ? count++ : k - 1;
        for (; at > 0 && kept[at - 1] < x[i]; at--) kept[at] = kept[at - 1];
        kept[at] = x[i];
    }
    result = kept[k - 1];
    free(kept);
    return result;
}

// Draws a token from softmax(logits / temperature), cut first to the top k (and those that equal the k-th),
// then to the top p, as transformers does. Ends the program when the logits are not finite.
//   logits (V); draw: uniform in [0, 1); candidates: room for V
static int sample_token(const float *logits, int V, const Sampling *sampling, float draw,
                        Candidate *candidates) {
    int best = 0, count = 0, kept = 0;
    bool finite = true;
    for (int v = 0; v < V; v++) {
        finite = finite && !isnan(logits[v]);
        if (logits[v] > logits[best]) best = v;
    }
    if (!finite || !isfinite(logits[best])) die("the model's logits are not finite: its weights are damaged");
    if (sampling->temperature == 0) return best;
    bool cut = sampling->top_k > 0 && sampling->top_k < V;
    float lowest = cut ? kth_largest(logits, V, sampling->top_k) : -INFINITY;
    double sum = 0, reached = 0;
    for (int v = 0; v < V; v++)
        if (logits[v] >= lowest && logits[v] > -INFINITY) {
            candidates[count] =
                (Candidate){(float)exp((logits[v] - logits[best]) / sampling->temperature), v};
            sum += candidates[count++].probability;
        }
    if (sampling->top_p < 1) {
        // Each token below `least` has less than (1 - p) / count of the sum, so all of them together have
        // less than 1 - p, and the others reach p without them: only the others need sorting.
        double least = sum * (1 - sampling->top_p) / count, wanted = sum * sampling->top_p;
        for (int i = 0; i < count; i++)
            if (candidates[i].probability >= least) candidates[kept++] = candidates[i];
        qsort(candidates, (size_t)kept, sizeof *candidates, compare_candidates);
        for (count = 0; count < kept && (count == 0 || reached < wanted); count++)
            reached += candidates[count].probability;
        sum = reached;
    }
    double left = draw * sum;
    for (int i = 0; i < count - 1; i++)
        if ((left -= candidates[i].probability) < 0) return candidates[i].token;
    return candidates[count - 1].token;
}

// Appends a token; false: its text completed `stop`, and the sample's text ends before that.
static bool sample_append(Sample *sample, int token, const Tokenizer *tokenizer, const char *stop) {
    Text *text = &sample->text;
    size_t length = stop ? strlen(stop) : 0, from = text->size > length ? text->size - length : 0;
    ids_push(&sample->ids, token);
    if (tokenizer) tokenizer_decode(tokenizer, text, token);
    const char *found = length ? memmem(text->data + from, text->size - from, stop, length) : NULL;
    if (found) text->size = (size_t)(found - text->data);
    return !found;
}

// Prints what is new in a text. Unless it is the `last` time, an end that depends on later tokens is held
// back: a part of a character, or what may be the beginning of `stop`.
static void stream_text(const Text *text, size_t *printed, const char *stop, bool last) {
    size_t size = text->size, part = stop && !last ? strlen(stop) : 0;
    while (part > 0 && (part > size || memcmp(text->data + size - part, stop, part) != 0)) part--;
    size = last ? size : utf8_whole(text->data, size - part);
    fwrite(text->data + *printed, 1, size - *printed, stdout);
    fflush(stdout);
    *printed = size;
}

// Makes the tokens that a text has already less likely, as transformers does: each one's logit, however often
// the token came, is divided by the penalty where it is positive and multiplied by it where it is negative.
static void penalise_repetition(float *logits, int V, double penalty, const Ids *prompt, const Ids *own) {
    if (penalty == 1) return;
    bool *done = xcalloc((size_t)V, sizeof *done);
    for (size_t i = 0; i < prompt->size + own->size; i++) {
        int token = i < prompt->size ? prompt->data[i] : own->data[i - prompt->size];
        float *logit = &logits[token];
        if (!done[token]) *logit = *logit < 0 ? *logit * (float)penalty : *logit / (float)penalty;
        done[token] = true;
    }
    free(done);
}

// Draws a token from logits (V). One that the tokenizer does not have is never drawn: the embedding may have
// more rows than there are tokens, to be a multiple of 64, say.
static int draw_token(float *logits, int V, const Tokenizer *tokenizer, const Sampling *sampling, float draw,
                      Candidate *candidates) {
    for (int v = 0; tokenizer && v < V; v++)
        if (v >= tokenizer->vocab_size || !tokenizer->names[v]) logits[v] = -INFINITY;
    return sample_token(logits, V, sampling, draw, candidates);
}

// Texts in the making: what generation keeps from one token to the next.
typedef struct {
    const Model *model;
    const Ids *prompt;
    Sample *outputs;
    int *running, alive; // which samples have not ended, and how many
    int *last_row;       // (alive) the row from which the next token of each comes
    size_t seen;         // tokens of each sample that the model has seen
    Cache *cache;
    Activations activations;
    Batch batch;
} Writing;

// Runs the model on what it has not seen yet of each running sample of `size` tokens: first of all the prompt,
// then one token at a time. When the context is full, it goes on with the last half of it, and reads that
// half anew: keys and values were made for the old positions.
static void read_on(Writing *w, size_t size) {
    const Config *config = &w->model->config;
    Cache *cache = w->cache;
    if (cache->past + (int)(size - w->seen) > config->n_positions) { // a longer prompt comes here, too
        cache->past = 0;
        w->seen = size - (size_t)(config->n_positions > 1 ? config->n_positions / 2 : 1);
    }
    batch_clear(&w->batch);
    for (int n = 0; n < w->alive; n++) {
        const int *own = w->outputs[w->running[n]].ids.data;
        for (size_t i = w->seen; i < size; i++)
            batch_add_row(&w->batch, i < w->prompt->size ? w->prompt->data[i] : own[i - w->prompt->size],
                          cache->past + (int)(i - w->seen), -1);
        batch_end_sequence(&w->batch);
        w->last_row[n] = w->batch.rows - 1;
        cache->first_key[n] = w->running[n] * 2 * config->n_head * config->n_positions;
    }
    activations_reserve(&w->activations, w->model, w->batch.rows, KEEP_NOTHING);
    model_forward(w->model, &w->activations, &w->batch, cache, (Dropout){0});
    cache->past += w->batch.first_row[1];
    w->seen = size;
}

static volatile sig_atomic_t stop_signal = 0; // the signal that asks for an end; 0: none has come

// Continues the prompt by up to `count` tokens. Each sequence of the cache makes one sample of its own, in
// outputs[0], outputs[1], ..., which are empty before. A sample ends at one of the ids in `ends`, at
// sampling->stop, or at a signal. Without a tokenizer there is no text, only ids; with one, a single sample is
// printed as it comes. The cache may hold the first tokens of the prompt already.
static void continue_prompt(const Model *model, const Tokenizer *tokenizer, const Ids *prompt, int count,
                            Cache *cache, const Ids *ends, const Sampling *sampling, Sample *outputs) {
    const int V = model->config.vocab_size, samples = cache->sequences;
    const bool print = samples == 1 && !sampling->silent;
    Writing w = {.model = model, .prompt = prompt, .outputs = outputs, .alive = samples, .cache = cache};
    w.seen = (size_t)cache->past;
    w.running = xmalloc((size_t)samples * sizeof(int));
    w.last_row = xmalloc((size_t)samples * sizeof(int));
    Candidate *candidates = xmalloc((size_t)V * sizeof *candidates);
    size_t printed = 0;
    for (int s = 0; s < samples; s++) {
        w.running[s] = s;
        text_append(&outputs[s].text, "", 0);
    }
    for (int made = 0; made < count && w.alive > 0 && !stop_signal; made++) {
        int still = 0;
        read_on(&w, prompt->size + (size_t)made);
        for (int n = 0; n < w.alive; n++) {
            const int s = w.running[n], left = w.alive - n;
            if (n % LOGIT_ROWS == 0)
                head_forward(model, &w.activations, w.last_row + n, left < LOGIT_ROWS ? left : LOGIT_ROWS);
            float *logits = w.activations.logits + (size_t)(n % LOGIT_ROWS) * V;
            penalise_repetition(logits, V, sampling->repetition_penalty, prompt, &outputs[s].ids);
            float draw = random_uniform(random_stream(sampling->seed, (uint64_t)s), (uint64_t)made);
            int token = draw_token(logits, V, tokenizer, sampling, draw, candidates);
            if (!ids_have(ends, token) && sample_append(&outputs[s], token, tokenizer, sampling->stop))
                w.running[still++] = s;
        }
        w.alive = still;
        if (print) stream_text(&outputs[0].text, &printed, sampling->stop, still == 0 || made == count - 1);
    }
    if (print) stream_text(&outputs[0].text, &printed, sampling->stop, true); // a signal may have come
    free(w.running);
    free(w.last_row);
    free(candidates);
    batch_free(&w.batch);
    activations_free(&w.activations);
}

// The same with a cache that is made for this prompt alone.
static void generate(const Model *model, const Tokenizer *tokenizer, const Ids *prompt, int count,
                     int samples, const Ids *ends, const Sampling *sampling, Sample *outputs) {
    Cache cache = cache_new(model, samples);
    continue_prompt(model, tokenizer, prompt, count, &cache, ends, sampling, outputs);
    cache_free(&cache);
}

static void sample_free(Sample *sample) {
    free(sample->ids.data);
    free(sample->text.data);
}

// A talk as DialoGPT, GPT-2's model for conversations, has it: turn, end of text, answer, end of text, ... All
// of it is the prompt of the next answer. The cache keeps the keys and values of what was said, so each answer
// only costs the new tokens.
typedef struct {
    Ids ids;
    Ids begins; // where the turns of the user begin in `ids`
    Cache cache;
} Talk;

static void talk_add(Talk *talk, const Ids *turn, int end_of_text) {
    for (size_t i = 0; i < turn->size; i++) ids_push(&talk->ids, turn->data[i]);
    ids_push(&talk->ids, end_of_text);
}

// Forgets the first `count` tokens; count = talk->ids.size: all.
static void talk_forget(Talk *talk, size_t count) {
    size_t kept = 0;
    talk->ids.size -= count;
    memmove(talk->ids.data, talk->ids.data + count, talk->ids.size * sizeof(int));
    for (size_t i = 0; i < talk->begins.size; i++)
        if (talk->begins.data[i] >= (int)count) talk->begins.data[kept++] = talk->begins.data[i] - (int)count;
    talk->begins.size = kept;
    talk->cache.past = 0;
}

// Makes room for an answer of `room` tokens when the context is full. The oldest turns go, each with its
// answer, until the rest takes no more than half of the context and the answer fits: so this does not happen
// again at the next turn. If the newest turn alone is too long, its beginning goes. The user is told.
static void talk_make_room(Talk *talk, size_t room) {
    const size_t P = (size_t)talk->cache.positions, size = talk->ids.size, turns = talk->begins.size;
    if (size + room <= P) return;
    size_t count = (size_t)talk->begins.data[0]; // tokens to forget
    for (size_t i = 1; i < turns && (size - count > P / 2 || size - count + room > P); i++)
        count = (size_t)talk->begins.data[i];
    if (size - count + room > P) count = size + room - P;
    warn("the context of %zu tokens is full: the oldest %zu tokens of the talk are forgotten", P, count);
    talk_forget(talk, count);
}

// Adds a turn to the talk, and the model's answer, which has up to `most` tokens and is printed as it comes.
static void talk_answer(Talk *talk, const Model *model, const Tokenizer *tokenizer, const Ids *turn, int most,
                        const Ids *ends, const Sampling *sampling) {
    Sample answer = {0};
    ids_push(&talk->begins, (int)talk->ids.size);
    talk_add(talk, turn, tokenizer->end_of_text);
    talk_make_room(talk, (size_t)most);
    continue_prompt(model, tokenizer, &talk->ids, most, &talk->cache, ends, sampling, &answer);
    talk_add(talk, &answer.ids, tokenizer->end_of_text);
    sample_free(&answer);
}

// #####################################################################################################
// PART III. Files and data
// #####################################################################################################
// What comes from the disk is never trusted, and what goes there is never left half written.

// =====================================================================================================
// 12. Files
// =====================================================================================================
// A run lasts for hours, and a disk may be full, a cable may be pulled, another program may change a file.
// Then the program must say so in one line and leave the last good files whole. That is what the first
// functions here see to. Then come the two formats that everything small is written in: JSON, and the files
// of a tokenizer.

// ---- names, lines, whole files ----

// printf for names of files. The name lives in an array of its own until the end of the block in which path_of
// stands, so it need not be freed; what must live longer is copied.
#define path_of(...) print_path((char[PATH_MAX]){""}, __VA_ARGS__)

static const char *__attribute__((format(printf, 2, 3))) print_path(char *path, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (vsnprintf(path, PATH_MAX, format, arguments) >= PATH_MAX)
        die("%.100s...: this name is too long", path);
    va_end(arguments);
    return path;
}

static bool file_exists(const char *path) { return access(path, F_OK) == 0; }

static bool is_folder(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static bool ends_with(const char *string, const char *ending) {
    size_t n = strlen(string), m = strlen(ending);
    return n >= m && strcmp(string + n - m, ending) == 0;
}

// Ends the program when a file's bytes are only a pointer, which git leaves in its place without Git LFS.
static void refuse_pointer(const char *path, const char *bytes, size_t size) {
    static const char begin[] = "version https://git-lfs";
    if (size >= sizeof begin - 1 && memcmp(bytes, begin, sizeof begin - 1) == 0)
        die("%s: a pointer of Git LFS, not the file itself: git lfs pull fetches it", path);
}

// Finds the line at *at, without its end, and moves *at behind it. Returns false at the end of the text.
static bool next_line(const char **at, const char *end, const char **line, size_t *length) {
    if (*at >= end) return false;
    const char *newline = memchr(*at, '\n', (size_t)(end - *at));
    *line = *at;
    *length = (size_t)((newline ? newline : end) - *line);
    *at = newline ? newline + 1 : end;
    *length -= *length > 0 && (*line)[*length - 1] == '\r';
    return true;
}

// Appends the rest of `file` to `text`; `path` only names it in errors.
static void read_stream(Text *text, FILE *file, const char *path) {
    char buffer[1 << 16];
    for (size_t got = 1; got > 0; text_append(text, buffer, got)) got = fread(buffer, 1, sizeof buffer, file);
    if (ferror(file)) die("%s: cannot be read: %s", path, strerror(errno));
}

// Reads a whole file, or standard input when path is "-". Free the result's data.
static Text read_file(const char *path) {
    Text text = {0};
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!file) die("%s: cannot be opened: %s", path, strerror(errno));
    read_stream(&text, file, path);
    if (file != stdin) fclose(file);
    return text;
}

// ---- mapped files ----
// Weights and token shards are not read but mapped (mmap): a page comes into memory when it is first used.
// But while a file is mapped, other programs can change it. So each mapping is remembered: when a page can no
// longer be read (SIGBUS), the error names the file, and check_mapped_files() finds out whether one was
// written to.

static struct MappedFile {
    char *path, *data;
    size_t size;
    struct stat status; // when it was mapped
} * mapped_files;
static size_t mapped_count, mapped_capacity;

#ifdef __APPLE__
#define st_mtim st_mtimespec
#endif

// The handler of SIGBUS. It only calls functions that are allowed in a signal handler.
static void lost_page(int signal_number, siginfo_t *info, void *context) {
    const char *address = info->si_addr;
    (void)context;
    for (size_t i = mapped_count; i > 0; i--) { // the newest first: addresses are used again
        const struct MappedFile *file = &mapped_files[i - 1];
        if (address < file->data || address >= file->data + file->size) continue;
        const char *const parts[] = {
            progress_line_open ? "\n" : "", program_name, ": ", file->path,
            ": can no longer be read: it was cut off while it was in use, or its disk "
            "fails. The last checkpoint stays\n"};
        for (int part = 0; part < 5; part++)
            if (write(2, parts[part], strlen(parts[part])) < 0) break;
        _exit(1);
    }
    signal(signal_number, SIG_DFL); // no file of ours: this ends the program as if there were no handler
}

// Ends the program when a mapped file has been written to. It is no harm if one was deleted or replaced by
// another of its name: the mapping keeps the old one.
static void check_mapped_files(void) {
    struct stat now;
    for (struct MappedFile *file = mapped_files; file < mapped_files + mapped_count; file++) {
        const struct stat *then = &file->status;
        if (file->data && stat(file->path, &now) == 0 && now.st_ino == then->st_ino &&
            now.st_dev == then->st_dev &&
            (now.st_size != then->st_size || now.st_mtim.tv_sec != then->st_mtim.tv_sec ||
             now.st_mtim.tv_nsec != then->st_mtim.tv_nsec))
            die("%s: was changed while it was in use, so nothing that was computed since can be trusted or "
                "saved. Put new files in place by renaming them",
                file->path);
    }
}

// The file of a mapping that is given up, or whose bytes have been copied, may change.
static void forget_mapping(const Mapping *mapping) {
    for (size_t i = 0; i < mapped_count; i++)
        if (mapped_files[i].data == mapping->data) mapped_files[i].data = NULL;
}

static void unmap_file(Mapping *mapping) {
    forget_mapping(mapping);
    if (mapping->data) munmap(mapping->data, mapping->size);
}

// Maps a file privately: what is written to the memory never reaches the file.
static Mapping map_file(const char *path) {
    int descriptor = open(path, O_RDONLY);
    struct stat status;
    if (descriptor < 0 || fstat(descriptor, &status) < 0)
        die("%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size == 0)
        die("%s: expected a regular file that is not empty", path);
    Mapping mapping = {NULL, (size_t)status.st_size};
    mapping.data = mmap(NULL, mapping.size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
    if (mapping.data == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(descriptor);
    mapped_files = grow(mapped_files, mapped_count + 1, &mapped_capacity, sizeof *mapped_files);
    mapped_files[mapped_count++] = (struct MappedFile){xstrdup(path), mapping.data, mapping.size, status};
    sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = lost_page, .sa_flags = SA_SIGINFO}, NULL);
    return mapping;
}

// ---- writing files that last ----

// Waits until what was written is on the disk itself, safe from a power cut. Some file systems cannot do this
// for folders (EINVAL); that is no error.
static bool sync_to_disk(int descriptor) {
#ifdef F_FULLFSYNC // macOS: its fsync() stops at the disk's own memory
    if (fcntl(descriptor, F_FULLFSYNC) == 0) return true;
#endif
    return fsync(descriptor) == 0 || errno == EINVAL;
}

// Brings the names in a folder to the disk: what was created, renamed or deleted there.
static void sync_folder(const char *path) {
    int descriptor = open(path, O_RDONLY);
    if (descriptor < 0 || !sync_to_disk(descriptor))
        die("%s: this folder could not be brought to the disk: %s", path, strerror(errno));
    close(descriptor);
}

// The folder that a path lies in. Free it.
static char *folder_of(const char *path) {
    const char *slash = strrchr(path, '/');
    return !slash ? xstrdup(".") : xprintf("%.*s", slash > path ? (int)(slash - path) : 1, path);
}

// Renames a file or folder, and brings the new name to the disk.
static void rename_for_good(const char *from, const char *to) {
    char *folder = folder_of(to);
    if (rename(from, to) != 0) die("%s: cannot be renamed to %s: %s", from, to, strerror(errno));
    sync_folder(folder);
    free(folder);
}

// Files are written under a temporary name, and get their own only when all bytes are on the disk: under a
// final name there is never half a file.
static FILE *create_file(const char *path) {
    FILE *file = fopen(path_of("%s.tmp", path), "wb");
    if (!file) die("%s.tmp: cannot be written: %s", path, strerror(errno));
    return file;
}

static void finish_file(FILE *file, const char *path) {
    if (ferror(file) || fflush(file) != 0 || !sync_to_disk(fileno(file)) || fclose(file) != 0)
        die("%s: could not be written whole: %s", path, strerror(errno));
    rename_for_good(path_of("%s.tmp", path), path);
}

static void write_file(const char *path, const void *bytes, size_t size) {
    FILE *file = create_file(path);
    fwrite(bytes, 1, size, file); // finish_file sees an error
    finish_file(file, path);
}

// Makes a folder and those above it.
static void make_folder(const char *path) {
    if (is_folder(path)) return;
    char *above = folder_of(path);
    make_folder(above);
    if (mkdir(path, 0777) < 0 && !is_folder(path))
        die("%s: folder cannot be made: %s", path, strerror(errno));
    sync_folder(above);
    free(above);
}

// Deletes a file, or a folder with all that is in it; of a symbolic link only the link. It is no error if
// there is none. If it cannot be deleted (the disk fails, or it belongs to somebody else), the program ends.
static void remove_folder(const char *path) {
    if (unlink(path) == 0 || errno == ENOENT) return;
    int reason = errno; // Linux says EISDIR of a folder, POSIX EPERM
    DIR *folder = opendir(path);
    if (!folder) die("%s: cannot be deleted: %s", path, strerror(errno == ENOTDIR ? reason : errno));
    for (struct dirent *entry; (entry = readdir(folder));) {
        char *inside = xprintf("%s/%s", path, entry->d_name);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) remove_folder(inside);
        free(inside);
    }
    closedir(folder);
    if (rmdir(path) != 0 && errno != ENOENT) die("%s: cannot be deleted: %s", path, strerror(errno));
}

// ---- JSON (RFC 8259) ----
// A text becomes a tree of nodes in one block of memory: a node for each value, then a copy of the text, in
// which each string is decoded in place (it is never longer than its spelling). `next` leads from a member of
// an object, or an element of an array, to the next one.

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonKind;

typedef struct Json {
    const char *key; // name of this member inside its object, or NULL
    struct Json *next;
    union { // by kind
        double number;
        const char *string; // UTF-8, NUL-terminated; length counts NULs inside
        struct Json *child; // the first member or element, or NULL
    };
    unsigned length;
    JsonKind kind;
} Json;

typedef struct {
    const char *source, *where; // the text as it came, and file, or file:line: both for errors
    char *text, *at;            // the copy, which a NUL ends, and where the reader is
    Json *free;                 // the next node that is not in use
} JsonReader;

static void __attribute__((noreturn)) json_die(const JsonReader *reader, const char *expected) {
    size_t line = 1;
    const char *start = reader->source, *stop = start + (reader->at - reader->text); // start: of the line
    for (const char *p = start; p < stop; p++)
        if (*p == '\n') line++, start = p + 1;
    die("%s: not valid JSON at line %zu, column %td: expected %s", reader->where, line, stop - start + 1,
        expected);
}

// The next character that is not white space; 0 at the end.
static char json_peek(JsonReader *reader) {
    reader->at += strspn(reader->at, " \t\r\n");
    return *reader->at;
}

static bool json_accept(JsonReader *reader, char wanted) {
    if (json_peek(reader) != wanted) return false;
    reader->at++;
    return true;
}

static unsigned json_hex4(JsonReader *reader) {
    char digits[5];
    snprintf(digits, sizeof digits, "%.4s", reader->at);
    if (strspn(digits, "0123456789abcdefABCDEF") != 4) json_die(reader, "four hexadecimal digits");
    reader->at += 4;
    return (unsigned)strtoul(digits, NULL, 16);
}

// The code point that a \u, already taken, and what follows it spell. A lone surrogate becomes U+FFFD.
static unsigned json_code_point(JsonReader *reader) {
    unsigned code = json_hex4(reader);
    if (code >= 0xd800 && code < 0xdc00 && strncmp(reader->at, "\\u", 2) == 0) {
        char *before = reader->at;
        reader->at += 2;
        unsigned low = json_hex4(reader);
        if (low >= 0xdc00 && low < 0xe000) return 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        reader->at = before;
    }
    return code >= 0xd800 && code < 0xe000 ? 0xfffd : code;
}

// Reads a string, its opening quote already taken.
static const char *json_string(JsonReader *reader, unsigned *length) {
    char *string = reader->at, *to = string;
    for (;;) {
        char *plain = reader->at;
        while ((unsigned char)*reader->at >= 0x20 && *reader->at != '"' && *reader->at != '\\') reader->at++;
        if (to != plain) memmove(to, plain, (size_t)(reader->at - plain));
        to += reader->at - plain;
        if (*reader->at == '"') {
            reader->at++;
            *to = 0;
            *length = (unsigned)(to - string);
            return string;
        }
        if (*reader->at != '\\')
            json_die(reader, *reader->at ? "an escape such as \\n in place of a control character"
                                         : "the string's closing quote");
        char escape = *++reader->at;
        const char *known = "\"\\/bfnrtu", *found = strchr(known, escape);
        if (!escape || !found)
            json_die(reader,
                     escape ? "one of \" \\ / b f n r t u after a backslash" : "the string's closing quote");
        reader->at++;
        if (escape == 'u')
            to += utf8_write(to, json_code_point(reader));
        else
            *to++ = "\"\\/\b\f\n\r\t"[found - known];
    }
}

static Json *json_value(JsonReader *reader, int depth);

// Reads the members or elements up to `close`, their opening bracket already taken.
static Json *json_children(JsonReader *reader, char close, int depth) {
    Json *first = NULL;
    for (Json **tail = &first; !json_accept(reader, close); tail = &(*tail)->next) {
        const char *key = NULL;
        unsigned length;
        if (first && !json_accept(reader, ',')) json_die(reader, close == '}' ? "',' or '}'" : "',' or ']'");
        if (close == '}') {
            if (!json_accept(reader, '"')) json_die(reader, "a name in double quotes");
            key = json_string(reader, &length);
            if (strlen(key) != length) json_die(reader, "a name without NUL before this");
            if (!json_accept(reader, ':')) json_die(reader, "':'");
        }
        *tail = json_value(reader, depth + 1);
        (*tail)->key = key;
    }
    return first;
}

static double json_digits(JsonReader *reader) {
    // strtod reads more than JSON allows: 0x1p3, infinity, 01, .5 and 5.
    const char *whole = reader->at + (*reader->at == '-'), *point = whole + strspn(whole, "0123456789");
    char *end;
    double number = strtod(reader->at, &end);
    if (end != reader->at + strspn(reader->at, "+-.eE0123456789") || point == whole ||
        (*whole == '0' && point > whole + 1) || (*point == '.' && !isdigit((unsigned char)point[1])))
        json_die(reader, "a number");
    reader->at = end;
    return number;
}

static Json *json_value(JsonReader *reader, int depth) {
    static const char *const words[] = {"null", "false", "true"}; // as JsonKind begins
    char c = json_peek(reader);
    Json *node = reader->free++;
    *node = (Json){.kind = JSON_NULL};
    if (depth > 200) json_die(reader, "at most 200 levels of nesting");
    if (c == '{' || c == '[') {
        reader->at++;
        node->kind = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        node->child = json_children(reader, c == '{' ? '}' : ']', depth);
    } else if (json_accept(reader, '"')) {
        node->kind = JSON_STRING;
        node->string = json_string(reader, &node->length);
    } else if (c == '-' || isdigit((unsigned char)c)) {
        node->kind = JSON_NUMBER;
        node->number = json_digits(reader);
    } else {
        while (strncmp(reader->at, words[node->kind], strlen(words[node->kind])) != 0)
            if (++node->kind > JSON_TRUE) json_die(reader, "a value");
        reader->at += strlen(words[node->kind]);
    }
    return node;
}

// How many values a text can have at most: each is the first one or follows one of these characters.
static size_t json_most_values(const char *text, size_t size) {
    size_t values = 1;
    for (size_t i = 0; i < size; i++) values += text[i] == ',' || text[i] == '[' || text[i] == '{';
    return values;
}

// Reads one JSON value that fills the text; ends the program with file, line and column when it is not valid.
static Json *json_parse(const char *text, size_t size, const char *where) {
    size_t values = json_most_values(text, size);
    if (size > INT_MAX) die("%s: %zu bytes of JSON are too many: expected less than 2 GB", where, size);
    Json *nodes = xmalloc(values * sizeof *nodes + size + 1);
    char *copy = (char *)(nodes + values);
    if (size) memcpy(copy, text, size);
    copy[size] = 0;
    JsonReader reader = {text, where, copy, copy, nodes};
    json_value(&reader, 1);
    json_peek(&reader);
    if (reader.at != copy + size) json_die(&reader, "nothing more");
    return nodes;
}

static Json *json_read_file(const char *path) {
    Text text = read_file(path);
    Json *node = json_parse(text.data, text.size, path);
    free(text.data);
    return node;
}

// Where a string of the tree `root` begins in the text that the tree was made from.
static size_t json_place(const Json *root, const Text *text, const char *string) {
    return (size_t)(string - (const char *)(root + json_most_values(text->data, text->size)));
}

// Frees the whole tree of a node that json_parse gave.
static void json_free(Json *root) { free(root); }

// The first member or element of a node, or NULL when it has none, is no object or array, or is NULL itself.
static const Json *json_child(const Json *node) {
    return node && (node->kind == JSON_OBJECT || node->kind == JSON_ARRAY) ? node->child : NULL;
}

// The member called `key`, or NULL (also when `object` is NULL or no object). Of two the last one counts, as
// in Python.
static const Json *json_get(const Json *object, const char *key) {
    const Json *found = NULL;
    if (!object || object->kind != JSON_OBJECT) return NULL;
    for (const Json *member = object->child; member; member = member->next)
        if (strcmp(member->key, key) == 0) found = member;
    return found;
}

// The text of a string; NULL when it is no string.
static const char *json_text(const Json *node) {
    return node && node->kind == JSON_STRING ? node->string : NULL;
}

static bool json_is_text(const Json *node, const char *text) {
    return json_text(node) && strcmp(node->string, text) == 0;
}

static bool json_is_null(const Json *node) { return !node || node->kind == JSON_NULL; }

// The number called `key`, or `otherwise` when it is missing or null. `where` names the file in errors.
static double json_number(const Json *object, const char *key, double otherwise, const char *where) {
    const Json *member = json_get(object, key);
    if (json_is_null(member)) return otherwise;
    if (member->kind != JSON_NUMBER) die("%s: \"%s\" must be a number", where, key);
    return member->number;
}

// The switch called `key`, or `otherwise` when it is missing or null. `where` names the file in errors.
static bool json_is_true(const Json *object, const char *key, bool otherwise, const char *where) {
    const Json *member = json_get(object, key);
    if (json_is_null(member)) return otherwise;
    if (member->kind != JSON_TRUE && member->kind != JSON_FALSE)
        die("%s: \"%s\" must be true or false", where, key);
    return member->kind == JSON_TRUE;
}

// Writes a string with its quotes; bytes that are not ASCII pass through.
static void json_write_string(FILE *file, const char *string, size_t length) {
    fputc('"', file);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)string[i];
        fprintf(file, c == '"' || c == '\\' ? "\\%c" : c < 0x20 ? "\\u%04x" : "%c", c);
    }
    fputc('"', file);
}

// ---- vocabulary files ----
// vocab.json: {"token": id, ...}. merges.txt: "#version: 0.2", then "left right" a line, in order of rank.
// Both spell a byte as a printable character: 33-126, 161-172 and 174-255 stand for themselves, the other 68,
// in rising order, are U+0100, U+0101, ...: a space (32) is Ġ (U+0120), a newline Ċ (U+010A).

// Finds the token of each byte, or adds it if `add`, in the order of the characters that spell bytes.
static void find_byte_ids(Tokenizer *t, bool add, const char *path) {
    for (unsigned code = 0; code < SPELLING_CODES; code++) {
        char name[5] = {0};
        int byte = t->spelled[code];
        if (byte < 0) continue;
        utf8_write(name, code);
        t->byte_ids[byte] = add ? name_add(t, name) : *name_slot(t, name);
        if (t->byte_ids[byte] < 0)
            die("%s: no token \"%s\" for byte %d: expected one for each of the 256 bytes", path, name, byte);
    }
}

enum { MOST_TOKENS = 1 << 22 };

// Reads {"token": id, ...}, in any order.
static void load_vocabulary(Tokenizer *t, const Json *json, const char *path) {
    if (!json || json->kind != JSON_OBJECT) die("%s: expected an object {\"token\": id, ...}", path);
    for (const Json *token = json->child; token; token = token->next) {
        double id = token->kind == JSON_NUMBER ? token->number : -1;
        int *slot = name_slot(t, token->key);
        if (!(id >= 0 && id < MOST_TOKENS) || id != floor(id) || token_exists(t, (int)id) || *slot >= 0)
            die("%s: token \"%s\": expected it once, with an id from 0 to %d that no other token has", path,
                token->key, MOST_TOKENS - 1);
        name_set(t, slot, token->key, (int)id);
    }
}

static size_t most_merges(const Text *lines) { return lines->size / 4 + 1; } // "a b\n" is the shortest line

// Reads a line of merges.txt, and writes NULs into it. Without a vocabulary the merge makes a token, which
// gets the next id. `where` is file and line.
static void load_merge(Tokenizer *t, char *line, size_t length, bool has_vocabulary, const char *where) {
    line[length] = 0; // in place of the line's end
    char *right = strchr(line, ' ');
    if (!right || right == line || !right[1] || strchr(right + 1, ' ') || strlen(line) != length)
        die("%s: expected two tokens with one space between them", where);
    *right++ = 0;
    Merge merge = {*name_slot(t, line), *name_slot(t, right), -1};
    if (merge.left < 0 || merge.right < 0)
        die("%s: expected tokens that %s, and \"%s\" is none", where,
            has_vocabulary ? "the vocabulary has" : "are bytes or made by a line above",
            merge.left < 0 ? line : right);
    char *joined = xprintf("%s%s", line, right);
    int *slot = merge_slot(t, merge.left, merge.right), known = *name_slot(t, joined);
    if (*slot >= 0 || (known >= 0) != has_vocabulary)
        die("%s: expected %s, and \"%s\" is not", where,
            has_vocabulary ? "a merge that is new and makes a token of the vocabulary"
                           : "a merge that makes a new token",
            joined);
    merge.id = name_add(t, joined);
    *slot = t->merge_count++;
    t->merges[*slot] = merge;
    free(joined);
}

static void load_merges(Tokenizer *t, Text *text, bool has_vocabulary, const char *path) {
    const char *at = text->data, *end = at + text->size, *line;
    char where[PATH_MAX + 32];
    for (size_t length, number = 1; next_line(&at, end, &line, &length); number++) {
        if ((length == 0 && at == end) || (number == 1 && strncmp(line, "#version", 8) == 0)) continue;
        snprintf(where, sizeof where, "%s: line %zu", path, number);
        load_merge(t, text->data + (line - text->data), length, has_vocabulary, where);
    }
}

// Whether a post_processor of tokenizer.json leaves the ids as they are.
static bool adds_no_token(const Json *processor) {
    const Json *type = json_get(processor, "type"), *single = json_child(json_get(processor, "single"));
    if (json_is_text(type, "TemplateProcessing"))
        return single && !single->next && json_get(single, "Sequence");
    const Json *part = json_child(json_get(processor, "processors"));
    while (json_is_text(type, "Sequence") && part && adds_no_token(part)) part = part->next;
    return json_is_null(processor) || json_is_text(type, "ByteLevel") ||
           (json_is_text(type, "Sequence") && !part);
}

// Ends the program, naming what it is, when tokenizer.json asks for anything but GPT-2's rules.
static void refuse_other_rules(const Json *json, const char *path) {
    const Json *model = json_get(json, "model"), *rules = json_get(json, "pre_tokenizer");
    const Json *prefix = json_get(model, "continuing_subword_prefix");
    const Json *suffix = json_get(model, "end_of_word_suffix"), *decoder = json_get(json, "decoder");
    const struct {
        const char *name, *wanted;
        bool other;
    } checks[] = {
        {"model: type", "\"BPE\"", !json_is_text(json_get(model, "type"), "BPE")},
        {"model: dropout", "null", json_number(model, "dropout", 0, path) != 0},
        {"model: continuing_subword_prefix", "\"\"", !json_is_null(prefix) && !json_is_text(prefix, "")},
        {"model: end_of_word_suffix", "\"\"", !json_is_null(suffix) && !json_is_text(suffix, "")},
        {"model: ignore_merges", "false", json_is_true(model, "ignore_merges", false, path)},
        {"normalizer", "null", !json_is_null(json_get(json, "normalizer"))},
        {"pre_tokenizer: type", "\"ByteLevel\"", !json_is_text(json_get(rules, "type"), "ByteLevel")},
        {"pre_tokenizer: add_prefix_space", "false", json_is_true(rules, "add_prefix_space", true, path)},
        {"pre_tokenizer: use_regex", "true", !json_is_true(rules, "use_regex", true, path)},
        {"post_processor", "null, or one that adds no token",
         !adds_no_token(json_get(json, "post_processor"))},
        {"decoder: type", "\"ByteLevel\"",
         !json_is_null(decoder) && !json_is_text(json_get(decoder, "type"), "ByteLevel")},
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (checks[i].other)
            die("%s: %s is not as GPT-2 has it: expected %s", path, checks[i].name, checks[i].wanted);
}

// The merges of tokenizer.json, [["Ġ", "t"], ...] or ["Ġ t", ...], as the lines of a merges.txt.
static Text merge_lines(const Json *merges, const char *path) {
    Text lines = {0};
    text_append(&lines, "", 0);
    if (!merges || merges->kind != JSON_ARRAY) die("%s: merges: expected an array", path);
    for (const Json *merge = merges->child; merge; merge = merge->next) {
        const Json *left = merge->kind == JSON_ARRAY ? merge->child : merge;
        const Json *right = left && left != merge ? left->next : NULL;
        if (!json_text(left) || (left != merge && (!json_text(right) || right->next)))
            die("%s: merges: expected two strings in each, or one with a space", path);
        text_append(&lines, left->string, left->length);
        if (right) text_append(&lines, " ", 1);
        if (right) text_append(&lines, right->string, right->length);
        text_append(&lines, "\n", 1);
    }
    return lines;
}

// ---- added tokens and the end of text ----
// A folder tells of its added tokens in several files, depending on which program wrote it, and when:
//   with ids: tokenizer_config.json (added_tokens_decoder), tokenizer.json (added_tokens), added_tokens.json
//   by name:  tokenizer_config.json and special_tokens_map.json say which token has which task ("eos_token":
//             "</s>") and list extra ones. A named token that has no id yet gets the next one.
// Which file counts, and in which order, is what AutoTokenizer does.

typedef struct {
    Json *tokenizer, *config, *map, *added; // tokenizer.json, tokenizer_config.json, special_tokens_map.json,
                                            // added_tokens.json; NULL: there is none, or it does not count
} TokenizerFiles;

// Reads a file that must hold an object {...}; NULL when there is no such file.
static Json *json_read_if_there(const char *path) {
    if (!file_exists(path)) return NULL;
    Json *json = json_read_file(path);
    if (json->kind != JSON_OBJECT) die("%s: expected an object {...}", path);
    return json;
}

// The content of an added token: a string, or an object that has it beside flags.
static const char *added_content(const Json *token, const char *path) {
    const Json *content = token->kind == JSON_OBJECT ? json_get(token, "content") : token;
    if (!json_text(content) || strlen(content->string) != content->length)
        die("%s: expected a string, without NUL, as \"content\" of each added token", path);
    return content->string;
}

// The flags in an object; special where `special` or the object says so.
static AddedToken added_flags(const Json *flags, bool special, const char *path) {
    special = special || json_is_true(flags, "special", false, path);
    return (AddedToken){.single_word = json_is_true(flags, "single_word", false, path),
                        .lstrip = json_is_true(flags, "lstrip", false, path),
                        .rstrip = json_is_true(flags, "rstrip", false, path),
                        .normalized = json_is_true(flags, "normalized", !special, path)};
}

// Makes `content` an added token with the flags that the object `flags` has. A number given as `id` must be
// its id; without one (-1) it keeps the one that it has or gets the next.
static void read_added(Tokenizer *t, const char *content, double id, const Json *flags, bool special,
                       const char *path) {
    int *slot = name_slot(t, content);
    AddedToken token = added_flags(flags, special, path);
    if (!*content) return;
    if (*slot >= 0 && id != -1 && id != *slot)
        die("%s: added token \"%s\" has the id %g, but %d in the vocabulary", path, content, id, *slot);
    if (*slot < 0) {
        id = id == -1 ? t->vocab_size : id;
        if (!(id >= 0 && id < MOST_TOKENS) || id != floor(id) || token_exists(t, (int)id))
            die("%s: added token \"%s\": expected an id from 0 to %d that no other token has", path, content,
                MOST_TOKENS - 1);
        name_set(t, slot, content, (int)id);
    }
    token.id = *slot;
    token_add(t, token);
}

static const char *const token_tasks[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                          "pad_token", "cls_token", "mask_token"};
enum { TASKS = sizeof token_tasks / sizeof *token_tasks };

// The token with this task, such as "eos_token", in special_tokens_map.json or else tokenizer_config.json;
// NULL when neither names it.
static const Json *named_token(const TokenizerFiles *files, const char *name) {
    const Json *token = json_get(files->map, name);
    return token ? token : json_get(files->config, name);
}

// A token that is named. In added_tokens.json, which has no flags, it is a special one if it is `known` so.
typedef struct {
    const Json *token;
    bool special, known;
} NamedToken;

typedef struct {
    NamedToken *items;
    size_t size, capacity;
} NamedTokens;

static void name_token(NamedTokens *named, const Json *token, bool special, bool known) {
    if (json_is_null(token)) return;
    named->items = grow(named->items, named->size + 1, &named->capacity, sizeof *named->items);
    named->items[named->size++] = (NamedToken){token, special, known};
}

// Names the tokens of a file with a task of their own, such as "image_token".
static void name_other_tasks(NamedTokens *named, const Json *file, bool strings, bool objects) {
    for (const Json *member = json_child(file); member; member = member->next) {
        int task = 0;
        while (task < TASKS && strcmp(member->key, token_tasks[task]) != 0) task++;
        if (task == TASKS && ends_with(member->key, "_token") &&
            ((strings && member->kind == JSON_STRING) || (objects && member->kind == JSON_OBJECT)))
            name_token(named, member, true, false);
    }
}

// Names the tokens of a list, or an object {"task": token, ...}.
static void name_extra(NamedTokens *named, const Json *list, bool special, bool known, const char *path) {
    if (!json_is_null(list) && list->kind != JSON_ARRAY && list->kind != JSON_OBJECT)
        die("%s: extra_special_tokens, additional_special_tokens: expected a list", path);
    for (const Json *token = json_child(list); token; token = token->next)
        name_token(named, token, special || list->kind == JSON_OBJECT || token->kind == JSON_STRING,
                   known && list->kind == JSON_ARRAY && (special || token->kind == JSON_STRING));
}

// The named tokens in AutoTokenizer's order: those with the usual tasks, with others, the extra ones.
static NamedTokens named_tokens(const TokenizerFiles *files, const char *path) {
    static const Json end = {.kind = JSON_STRING, .string = END_OF_TEXT, .length = END_OF_TEXT_SIZE};
    NamedTokens named = {0};
    const Json *class = json_get(files->config, "tokenizer_class");
    const bool defaults = !json_text(class) || strncmp(class->string, "GPT2", 4) == 0; // the class has them
    for (int i = 0; i < TASKS; i++) {
        const Json *token = named_token(files, token_tasks[i]);
        bool known = token && (token->kind == JSON_STRING || token == json_get(files->map, token_tasks[i]));
        name_token(&named, !token && i < 3 && defaults ? &end : token, true, known);
    }
    name_other_tasks(&named, files->config, false, true);
    name_other_tasks(&named, files->map, true, true);
    name_other_tasks(&named, files->config, true, false);

    const Json *extra = json_get(files->config, "extra_special_tokens");
    const Json *older = json_get(files->config, "additional_special_tokens"); // the same by its older name
    if (older && !json_child(extra)) extra = older;
    name_extra(&named, extra, false, true, path);
    name_extra(&named, json_get(files->map, "extra_special_tokens"), true, true, path);
    if (!extra && !json_get(files->map, "extra_special_tokens"))
        name_extra(&named, json_get(files->map, "additional_special_tokens"), true, false, path);
    return named;
}

static bool is_known_special(const NamedTokens *named, const char *content, const char *path) {
    for (size_t i = 0; i < named->size; i++)
        if (named->items[i].known && strcmp(added_content(named->items[i].token, path), content) == 0)
            return true;
    return false;
}

// Whether two named tokens are the same to AutoTokenizer: a string is never the same as an object.
static bool same_named(const NamedToken *a, const NamedToken *b, const char *path) {
    AddedToken x = added_flags(a->token, a->special, path), y = added_flags(b->token, b->special, path);
    return a->token->kind == b->token->kind &&
           strcmp(added_content(a->token, path), added_content(b->token, path)) == 0 &&
           x.single_word == y.single_word && x.lstrip == y.lstrip && x.rstrip == y.rstrip &&
           x.normalized == y.normalized;
}

// Makes the named token number `n` an added one, unless it is among the first `listed` ones, which came with
// their ids, or is the same as one that was named before it.
static void read_named(Tokenizer *t, const NamedTokens *named, size_t n, int listed, const char *path) {
    const NamedToken *token = &named->items[n];
    const char *content = added_content(token->token, path);
    int known = -1;
    for (int pass = 0; pass < PASSES && known < 0; pass++) known = *added_slot(t, content, pass);
    if (known >= 0 && known < listed) return;
    for (size_t i = 0; i < n && known >= 0; i++)
        if (same_named(&named->items[i], token, path)) return;
    read_added(t, content, -1, token->token, token->special, path);
}

// Reads all added tokens of a folder.
static void read_added_tokens(Tokenizer *t, const TokenizerFiles *files, const NamedTokens *named,
                              const char *folder) {
    const Json *decoder = json_get(files->config, "added_tokens_decoder");
    const Json *list = json_get(files->tokenizer, "added_tokens");
    if (decoder && decoder->kind != JSON_OBJECT) die("%s: added_tokens_decoder: expected an object", folder);
    if (!json_is_null(list) && list->kind != JSON_ARRAY) die("%s: added_tokens: expected an array", folder);
    for (const Json *token = json_child(files->added); token; token = token->next)
        read_added(t, token->key, token->kind == JSON_NUMBER ? token->number : -2, NULL,
                   is_known_special(named, token->key, folder), folder);
    for (const Json *token = json_child(list); token; token = token->next)
        read_added(t, added_content(token, folder), json_number(token, "id", -2, folder), token, false,
                   folder);
    for (const Json *token = json_child(decoder); token; token = token->next)
        read_added(t, added_content(token, folder), atof(token->key), token, false, folder);
    for (int id = t->base_size; id < t->vocab_size; id++) // tokenizers would give them other ids
        if (!t->names[id]) die("%s: added tokens: expected ids without a gap, and none has %d", folder, id);
    const int listed = (int)t->added_count;
    for (size_t i = 0; i < named->size; i++) read_named(t, named, i, listed, folder);
}

// Appends the ids that a config.json or generation_config.json has under `key`: a number, a list, or null.
// Numbers that cannot be ids, such as -1, mean that there is none.
static void read_ids(const Json *config, const char *key, Ids *ids) {
    const Json *node = json_get(config, key), *item = node && node->kind == JSON_ARRAY ? node->child : node;
    for (; item; item = item == node ? NULL : item->next) {
        if (item->kind != JSON_NUMBER && item->kind != JSON_NULL)
            die("config.json, generation_config.json: %s: expected a number, a list of numbers, or null",
                key);
        if (item->kind == JSON_NUMBER && item->number >= 0 && item->number < MOST_TOKENS)
            ids_push(ids, (int)item->number);
    }
}

// The id of a task: of the token that the tokenizer's files name, else what config.json says, else -1.
static int id_of_task(const Tokenizer *t, const TokenizerFiles *files, const Json *config, const char *task) {
    const Json *token = named_token(files, task);
    if (!json_is_null(token)) return *name_slot(t, added_content(token, task));
    Ids ids = {0};
    read_ids(config, path_of("%s_id", task), &ids);
    int id = ids.size > 0 && token_exists(t, ids.data[0]) ? ids.data[0] : -1;
    free(ids.data);
    return id;
}

// The files of a tokenizer in a folder, vocabulary first: one of three pairs; false when it has none of them.
static bool tokenizer_files(const char *folder, char files[2][PATH_MAX]) {
    static const char *const pairs[][2] = {
        {"tokenizer.json", "tokenizer.json"}, {"vocab.json", "merges.txt"}, {"encoder.json", "vocab.bpe"}};
    for (int i = 0; i < 3; i++) {
        print_path(files[0], "%s/%s", folder, pairs[i][0]);
        print_path(files[1], "%s/%s", folder, pairs[i][1]);
        if (file_exists(files[0]) && file_exists(files[1])) return true;
    }
    return false;
}

static size_t json_count(const Json *node) {
    size_t count = 0;
    for (const Json *child = json_child(node); child; child = child->next) count++;
    return count;
}

// Reads the small files beside the vocabulary, and refuses what changes GPT-2's rules.
static TokenizerFiles read_tokenizer_files(const char *folder, Json *tokenizer) {
    TokenizerFiles files = {tokenizer, json_read_if_there(path_of("%s/tokenizer_config.json", folder)), NULL,
                            NULL};
    static const char *const switches[] = {
        "add_prefix_space", "split_special_tokens", "add_bos_token",
        "add_eos_token"}; // tokenizer.json, if there is one, is above the last two
    for (int i = 0; i < (tokenizer ? 2 : 4); i++)
        if (json_is_true(files.config, switches[i], false, folder))
            die("%s/tokenizer_config.json: %s true is not supported", folder, switches[i]);
    if (tokenizer) refuse_other_rules(tokenizer, path_of("%s/tokenizer.json", folder));
    if (json_get(files.config, "added_tokens_decoder")) return files; // says it all
    files.map = json_read_if_there(path_of("%s/special_tokens_map.json", folder));
    files.added = json_read_if_there(path_of("%s/added_tokens.json", folder));
    return files;
}

// Loads the tokenizer of a folder, from whichever of its files are there.
static Tokenizer *load_tokenizer_folder(const char *folder) {
    char paths[2][PATH_MAX];
    if (!tokenizer_files(folder, paths))
        die("%s: expected vocab.json and merges.txt (or tokenizer.json) in this folder", folder);
    const bool one_file = strcmp(paths[0], paths[1]) == 0;
    Json *json = json_read_file(paths[0]), *config = json_read_if_there(path_of("%s/config.json", folder));
    TokenizerFiles files = read_tokenizer_files(folder, one_file ? json : NULL);
    const Json *vocabulary = one_file ? json_get(json_get(json, "model"), "vocab") : json;
    Text lines =
        one_file ? merge_lines(json_get(json_get(json, "model"), "merges"), paths[0]) : read_file(paths[1]);
    NamedTokens named = named_tokens(&files, folder);
    size_t added = json_count(json_get(files.tokenizer, "added_tokens")) + json_count(files.added) +
                   json_count(json_get(files.config, "added_tokens_decoder")) + named.size;
    Tokenizer *t = tokenizer_new(json_count(vocabulary) + added, most_merges(&lines));
    load_vocabulary(t, vocabulary, paths[0]);
    load_merges(t, &lines, true, paths[1]);
    find_byte_ids(t, false, folder);
    t->base_size = t->vocab_size;
    read_added_tokens(t, &files, &named, folder);
    t->end_of_text = id_of_task(t, &files, config, "eos_token");
    t->pad = id_of_task(t, &files, config, "pad_token");
    if (t->end_of_text < 0 && !named_token(&files, "eos_token")) t->end_of_text = *name_slot(t, END_OF_TEXT);
    if (t->pad < 0) t->pad = t->end_of_text;
    json_free(json);
    json_free(config);
    json_free(files.config);
    json_free(files.map);
    json_free(files.added);
    free(named.items);
    free(lines.data);
    return t;
}

// Loads a merges file alone. Its tokens have GPT-2's order: the 256 bytes by the characters that spell them
// ("!" is 0), the merges, <|endoftext|>.
static Tokenizer *load_merges_file(const char *path) {
    if (ends_with(path, ".bin") || ends_with(path, ".tiktoken"))
        die("%s: is not a merges file; python3 data/convert.py %s FOLDER makes a folder of it", path, path);
    Text lines = read_file(path);
    Tokenizer *t = tokenizer_new(256 + most_merges(&lines) + 1, most_merges(&lines));
    find_byte_ids(t, true, path);
    load_merges(t, &lines, false, path);
    t->base_size = t->vocab_size;
    read_added(t, END_OF_TEXT, -1, NULL, true, path);
    t->end_of_text = t->pad = *name_slot(t, END_OF_TEXT);
    free(lines.data);
    return t;
}

// Loads a tokenizer from a folder with tokenizer.json, or vocab.json and merges.txt, or OpenAI's encoder.json
// and vocab.bpe; or from a merges file alone. Whatever is wrong with a file ends the program with one line.
static Tokenizer *tokenizer_load(const char *path) {
    return is_folder(path) ? load_tokenizer_folder(path) : load_merges_file(path);
}

// Writes vocab.json and merges.txt into a folder, to the byte as Hugging Face's tokenizers writes them.
static void tokenizer_save(const Tokenizer *t, const char *folder) {
    make_folder(folder);
    const char *vocabulary = path_of("%s/vocab.json", folder), *merges = path_of("%s/merges.txt", folder);
    FILE *file = create_file(vocabulary);
    for (int id = 0; id < t->vocab_size; id++) {
        fputc(id ? ',' : '{', file);
        json_write_string(file, t->names[id], strlen(t->names[id]));
        fprintf(file, ":%d", id);
    }
    fputc('}', file);
    finish_file(file, vocabulary);
    file = create_file(merges);
    fputs("#version: 0.2\n", file);
    for (int i = 0; i < t->merge_count; i++)
        fprintf(file, "%s %s\n", t->names[t->merges[i].left], t->names[t->merges[i].right]);
    finish_file(file, merges);
}

// =====================================================================================================
// 13. Model folders
// =====================================================================================================
// A model is a folder as Hugging Face writes it: config.json, model.safetensors, vocab.json, merges.txt
// and some small files for the tokenizer and generation. A checkpoint is such a folder together with what
// training needs to go on. Everything but the weights is written back as it was read.

// ---- safetensors ----
// The format of model.safetensors: named arrays, and a header that says where each one lies.
//
//     0        8                   8 + N
//     +--------+-------------------+---------------------------------------------+
//     | N: u64 | JSON, N bytes     | tensors, one after the other, little-endian |
//     +--------+-------------------+---------------------------------------------+
//     {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"key": "value"}}
// Offsets count from the end of the JSON, which spaces fill up so that our data starts at a multiple of 64.

typedef struct {
    const char *name, *dtype;
    int dims;
    size_t shape[8], count, bytes; // count: elements
    char *data;
} StoredTensor;

typedef struct {
    char *path;
    Mapping mapping;
    Json *header;
    StoredTensor *tensors;
    size_t count;
} SafeTensors;

// The bytes of one element, or 0 for an unknown type.
static size_t dtype_size(const char *dtype) {
    static const char *const names[] = {"F64",  "I64", "U64", "F32", "I32", "U32", "F16",
                                        "BF16", "I16", "U16", "I8",  "U8",  "BOOL"};
    for (int i = 0; i < 13; i++)
        if (strcmp(dtype, names[i]) == 0) return i < 3 ? 8 : i < 6 ? 4 : i < 10 ? 2 : 1;
    return 0;
}

// A whole number of a header, not negative; ends the program when it is something else.
static size_t json_size(const Json *node, const char *path, const char *name) {
    if (!node || node->kind != JSON_NUMBER || node->number < 0 || node->number > 0x1p53 ||
        node->number != floor(node->number))
        die("%s: tensor %s: shape and data_offsets must be whole numbers", path, name);
    return (size_t)node->number;
}

// Checks a tensor's entry in the header against the `data_size` bytes at `data` that follow it.
static StoredTensor read_entry(const Json *entry, char *data, size_t data_size, const char *path) {
    const Json *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape");
    const Json *offsets = json_get(entry, "data_offsets");
    if (!dtype || dtype->kind != JSON_STRING || !shape || shape->kind != JSON_ARRAY || !offsets ||
        offsets->kind != JSON_ARRAY)
        die("%s: tensor %s: dtype, shape and data_offsets expected", path, entry->key);
    StoredTensor tensor = {.name = entry->key, .dtype = dtype->string, .count = 1};
    for (const Json *d = json_child(shape); d; d = d->next) {
        if (tensor.dims == 8) die("%s: tensor %s: at most 8 dimensions expected", path, entry->key);
        size_t extent = tensor.shape[tensor.dims++] = json_size(d, path, entry->key);
        if (extent && tensor.count > SIZE_MAX / 16 / extent)
            die("%s: tensor %s: its shape is too large", path, entry->key);
        tensor.count *= extent;
    }
    const Json *first = json_child(offsets);
    size_t begin = json_size(first, path, entry->key);
    size_t end = json_size(first ? first->next : NULL, path, entry->key);
    tensor.bytes = tensor.count * dtype_size(tensor.dtype);
    if (begin > end || end > data_size)
        die("%s: tensor %s: its data ends at byte %zu of %zu; the file is cut off", path, entry->key, end,
            data_size);
    if (dtype_size(tensor.dtype) == 0 || end - begin != tensor.bytes)
        die("%s: tensor %s: %zu bytes do not fit its dtype %s and shape", path, entry->key, end - begin,
            tensor.dtype);
    tensor.data = data + begin;
    return tensor;
}

// Maps a safetensors file and checks every size and offset in it against the file's length.
static SafeTensors safetensors_open(const char *path) {
    SafeTensors file = {.path = xstrdup(path), .mapping = map_file(path)};
    uint64_t length = 0;
    refuse_pointer(path, file.mapping.data, file.mapping.size);
    if (file.mapping.size < 8)
        die("%s: not a safetensors file: %zu bytes, at least 8 expected", path, file.mapping.size);
    memcpy(&length, file.mapping.data, 8);
    if (length > 100000000 || length > file.mapping.size - 8)
        die("%s: not a whole safetensors file: its header should have %llu bytes, the file has %zu", path,
            (unsigned long long)length, file.mapping.size);
    file.header = json_parse(file.mapping.data + 8, (size_t)length, path);
    char *data = file.mapping.data + 8 + length;
    size_t data_size = file.mapping.size - 8 - (size_t)length, capacity = 0;
    // Tensors without holes or overlaps: the first begins at 0, each other one where another ends, the last
    // one ends at data_size. So a sum of hashes, of each end minus each beginning, must leave those of
    // data_size and 0 only.
    uint64_t left = mix_bits(0) - mix_bits(data_size);
    if (file.header->kind != JSON_OBJECT) die("%s: the header must be a JSON object", path);
    for (const Json *entry = file.header->child; entry; entry = entry->next) {
        if (strcmp(entry->key, "__metadata__") == 0) continue;
        file.tensors = grow(file.tensors, file.count + 1, &capacity, sizeof *file.tensors);
        StoredTensor tensor = file.tensors[file.count++] = read_entry(entry, data, data_size, path);
        left += mix_bits((uint64_t)(tensor.data + tensor.bytes - data)) -
                mix_bits((uint64_t)(tensor.data - data));
    }
    if (left != 0) die("%s: the tensors do not fill its data: holes or overlaps", path);
    return file;
}

// Frees a file's lists, and its mapping unless the caller keeps that.
static void safetensors_close(SafeTensors *file, bool keep_mapping) {
    json_free(file->header);
    free(file->path);
    free(file->tensors);
    if (keep_mapping) return;
    unmap_file(&file->mapping);
}

// Hugging Face's names come with or without this prefix.
static const char *without_prefix(const char *name) {
    return strncmp(name, "transformer.", 12) == 0 ? name + 12 : name;
}

static StoredTensor *safetensors_find(const SafeTensors *file, const char *name) {
    for (size_t i = 0; i < file->count; i++)
        if (strcmp(without_prefix(file->tensors[i].name), without_prefix(name)) == 0)
            return &file->tensors[i];
    return NULL;
}

// Writes tensors to a safetensors file; of a StoredTensor it uses name, dtype, shape, bytes and data.
static void safetensors_write(const char *path, const StoredTensor *tensors, size_t count) {
    char *header = NULL;
    size_t size = 0, offset = 0;
    FILE *text = open_memstream(&header, &size), *file = create_file(path);
    if (!text) die("out of memory for the header of %s", path);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (const StoredTensor *t = tensors; t < tensors + count; offset += t++->bytes) {
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, t->dtype);
        for (int d = 0; d < t->dims; d++) fprintf(text, "%s%zu", d ? "," : "", t->shape[d]);
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", offset, offset + t->bytes);
    }
    fprintf(text, "}");
    if (fflush(text) != 0) die("out of memory for the header of %s", path); // now `size` is known
    fprintf(text, "%*s", (int)(-(8 + size) % 64), "");
    if (fclose(text) != 0) die("out of memory for the header of %s", path);
    uint64_t length = size;
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, size, file);
    for (size_t i = 0; i < count && !ferror(file); i++)
        fwrite(tensors[i].data, 1, tensors[i].bytes, file); // finish_file sees an error
    finish_file(file, path);
    free(header);
}

// ---- model folders ----

// The stored tensor of this name. Ends the program when there is none, or its shape is not that of `tensor`.
static StoredTensor *safetensors_need(const SafeTensors *file, const char *name, const Tensor *tensor) {
    StoredTensor *stored = safetensors_find(file, name);
    if (!stored) die("%s: tensor %s is missing", file->path, name);
    char expected[64], found[256] = "[";
    snprintf(expected, sizeof expected, tensor->dims == 2 ? "[%zu, %zu]" : "[%zu]", tensor->shape[0],
             tensor->shape[1]);
    for (int d = 0; d < stored->dims; d++)
        sprintf(found + strlen(found), "%s%zu", d ? ", " : "", stored->shape[d]);
    strcat(found, "]");
    if (strcmp(expected, found) != 0)
        die("%s: tensor %s has shape %s, expected %s", file->path, name, found, expected);
    return stored;
}

static bool is_float(const char *dtype) {
    return strcmp(dtype, "F32") == 0 || strcmp(dtype, "F16") == 0 || strcmp(dtype, "BF16") == 0;
}

// One float from BF16 (the upper half of a float) or F16 (5 bits of exponent, 10 of fraction).
static float widen(uint16_t bits, bool is_bf16) {
    union {
        uint32_t u;
        float f;
    } result = {.u = is_bf16 ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x7fff) << 13};
    if (is_bf16) return result.f;
    result.f *= 0x1p112f;                            // the exponents count from 15 and from 127
    if (result.f >= 0x1p16f) result.u |= 255u << 23; // infinity, or not a number
    return bits & 0x8000 ? -result.f : result.f;
}

// Gives every tensor of the model its value and closes the file. If all are F32, the values stay in the
// mapping; F16 and BF16 become float32. A tensor that is missing, misshaped or unknown ends the program;
// causal masks, which old files have, are ignored. Unless `with_values`, nothing is converted.
static void model_load_values(Model *model, SafeTensors *file, bool with_values) {
    const char *path = file->path;
    StoredTensor **stored = xcalloc((size_t)model->tensor_count, sizeof *stored);
    bool mapped = true;
    for (int i = 0; i < model->tensor_count; i++) {
        const char *name = model->tensors[i].name;
        bool only_head = i == WTE && model->config.tie_word_embeddings && !safetensors_find(file, name);
        stored[i] = safetensors_need(file, only_head ? "lm_head.weight" : name, &model->tensors[i]);
        bool is_f32 = strcmp(stored[i]->dtype, "F32") == 0;
        if (!is_float(stored[i]->dtype))
            die("%s: tensor %s is %s; F32, F16 or BF16 expected", path, stored[i]->name, stored[i]->dtype);
        mapped = mapped && is_f32 && (uintptr_t)stored[i]->data % sizeof(float) == 0;
    }
    for (StoredTensor *t = file->tensors; t < file->tensors + file->count; t++) {
        int i = 0;
        while (i < model->tensor_count && stored[i] != t) i++;
        bool is_mask = ends_with(t->name, ".attn.bias") || ends_with(t->name, ".attn.masked_bias");
        if (i == model->tensor_count && !is_mask && strcmp(t->name, "lm_head.weight") != 0)
            die("%s: tensor %s is not one of this GPT-2's (%d layers)", path, t->name, model->config.n_layer);
    }
    if (!mapped && with_values) model->value_memory = allocate_values(model, 0);
    for (int i = 0; i < model->tensor_count && (mapped || with_values); i++) {
        Tensor *tensor = &model->tensors[i];
        if (mapped) {
            tensor->value = (float *)stored[i]->data;
        } else if (strcmp(stored[i]->dtype, "F32") == 0) {
            memcpy(tensor->value, stored[i]->data, stored[i]->bytes);
        } else {
            bool is_bf16 = stored[i]->dtype[0] == 'B';
#pragma omp parallel for
            for (size_t j = 0; j < tensor->size; j++) {
                uint16_t bits;
                memcpy(&bits, stored[i]->data + 2 * j, 2);
                tensor->value[j] = widen(bits, is_bf16);
            }
        }
    }
    if (mapped) model->value_file = file->mapping;
    free(stored);
    safetensors_close(file, mapped);
}

// The sizes as config.json calls them, what they are when it does not say (0: n_inner is 4 n_embd), and
// limits that keep every count of elements far inside 64 bits.
static const struct {
    const char *name;
    size_t field;
    int otherwise, largest;
} config_sizes[] = {
    {"vocab_size", offsetof(Config, vocab_size), 50257, 1 << 24},
    {"n_positions", offsetof(Config, n_positions), 1024, 1 << 20},
    {"n_layer", offsetof(Config, n_layer), 12, 1000},
    {"n_head", offsetof(Config, n_head), 12, 1 << 16},
    {"n_embd", offsetof(Config, n_embd), 768, 1 << 16},
    {"n_inner", offsetof(Config, n_inner), 0, 1 << 18},
};
enum { CONFIG_SIZES = sizeof config_sizes / sizeof *config_sizes };

static int *config_size(Config *config, int i) { return (int *)((char *)config + config_sizes[i].field); }

// Ends the program when a size is out of range or does not fit the others. `where` names the
// file or the options.
static void check_config(Config config, const char *where) {
    for (int i = 0; i < CONFIG_SIZES; i++)
        if (*config_size(&config, i) < 1 || *config_size(&config, i) > config_sizes[i].largest)
            die("%s: %s must be between 1 and %d", where, config_sizes[i].name, config_sizes[i].largest);
    if (config.n_embd % config.n_head)
        die("%s: n_embd %d is not a multiple of n_head %d", where, config.n_embd, config.n_head);
    if (!(config.layer_norm_epsilon > 0 && config.layer_norm_epsilon < 1))
        die("%s: layer_norm_epsilon must be between 0 and 1", where);
}

// Reads config.json, and refuses by name the variants of GPT-2 that this program does not compute.
static Config config_read(const char *path) {
    Json *json = json_read_file(path);
    const Json *type = json_get(json, "model_type"), *activation = json_get(json, "activation_function");
    if (!json_is_text(type, "gpt2")) die("%s: model_type must be \"gpt2\"", path);
    if (activation && !json_is_text(activation, "gelu_new") && !json_is_text(activation, "gelu_pytorch_tanh"))
        die("%s: activation_function must be \"gelu_new\"", path);
    static const struct {
        const char *name;
        bool value; // the one that GPT-2 has, and the only one that is computed here
    } switches[] = {{"scale_attn_weights", true},
                    {"scale_attn_by_inverse_layer_idx", false},
                    {"add_cross_attention", false}};
    for (int i = 0; i < 3; i++)
        if (json_is_true(json, switches[i].name, switches[i].value, path) != switches[i].value)
            die("%s: %s %s is not supported", path, switches[i].name, switches[i].value ? "false" : "true");
    Config config = {.layer_norm_epsilon = (float)json_number(json, "layer_norm_epsilon", 1e-5, path),
                     .tie_word_embeddings = json_is_true(json, "tie_word_embeddings", true, path)};
    for (int i = 0; i < CONFIG_SIZES; i++) {
        double value = json_number(json, config_sizes[i].name, config_sizes[i].otherwise, path);
        if (!(value >= 0 && value < 0x1p30) || value != floor(value))
            die("%s: %s must be a whole number", path, config_sizes[i].name);
        *config_size(&config, i) = (int)value;
    }
    if (config.n_inner == 0) config.n_inner = 4 * config.n_embd;
    check_config(config, path);
    json_free(json);
    return config;
}

// Element i of a stored tensor of floats.
static float stored_float(const StoredTensor *tensor, size_t i) {
    float value;
    uint16_t bits;
    if (tensor->dtype[0] == 'F' && tensor->dtype[1] == '3')
        return memcpy(&value, tensor->data + 4 * i, 4), value;
    memcpy(&bits, tensor->data + 2 * i, 2);
    return widen(bits, tensor->dtype[0] == 'B');
}

// Whether a file has both wte.weight and lm_head.weight, and they differ.
static bool head_differs(const SafeTensors *file) {
    const StoredTensor *wte = safetensors_find(file, "wte.weight"),
                       *head = safetensors_find(file, "lm_head.weight");
    if (!wte || !head) return false;
    if (wte->count != head->count || !is_float(wte->dtype) || !is_float(head->dtype)) return true;
    if (strcmp(wte->dtype, head->dtype) == 0) return memcmp(wte->data, head->data, wte->bytes) != 0;
    size_t i = 0;
    while (i < wte->count && stored_float(wte, i) == stored_float(head, i)) i++;
    return i < wte->count;
}

static Model *adapter_open(const char *folder, bool with_values);

// A folder with an adapter of LoRA holds no model of its own.
static bool is_adapter(const char *folder) { return file_exists(path_of("%s/adapter_config.json", folder)); }

// Loads the weights of a model folder, or only checks them; or those of the model that an adapter's folder
// names, with the adapter. (tokenizer_load loads its tokenizer.)
static Model *model_open(const char *folder, bool with_values) {
    if (is_adapter(folder)) return adapter_open(folder, with_values);
    const char *config = path_of("%s/config.json", folder),
               *weights = path_of("%s/model.safetensors", folder);
    if (!file_exists(config))
        die("%s: no such model folder (a folder with config.json and model.safetensors), and not a size such "
            "as d4",
            folder);
    Config read = config_read(config);
    if (!file_exists(weights)) die("%s: is missing; it holds the weights, beside config.json", weights);
    SafeTensors file = safetensors_open(weights);
    for (size_t i = 0; i < file.count; i++)
        if (strstr(file.tensors[i].name, "module.") || strstr(file.tensors[i].name, "_orig_mod."))
            die("%s: tensor %s: named by a wrapper of PyTorch's; this gives the names of GPT-2: python3 "
                "data/convert.py %s FOLDER",
                weights, file.tensors[i].name, folder);
    if (read.tie_word_embeddings && head_differs(&file)) {
        warn("%s: holds an lm_head.weight that is not wte.weight: it is used, as transformers does, though "
             "config.json says that they are tied",
             weights);
        read.tie_word_embeddings = false;
    }
    Model *model = model_new(read);
    model_load_values(model, &file, with_values);
    return model;
}

static Model *model_load(const char *folder) { return model_open(folder, true); }

// ---- adapters ----
// PEFT's folder of an adapter (section 9): adapter_model.safetensors holds the pairs A and B alone, under
// their names with a prefix; adapter_config.json says r, alpha, and where the model is that they belong to.
static const char adapter_prefix[] = "base_model.model.";

// Ends the program when adapter_config.json asks for what is not computed here. Among that are the ways of
// init_lora_weights for which PEFT changes the model itself, each time that it loads the adapter.
static void check_adapter_config(const Json *config, const char *path) {
    static const char *const switches[] = {"use_dora", "use_rslora", "use_qalora", "lora_bias"};
    static const char *const lists[] = {
        "rank_pattern",      "alpha_pattern",     "modules_to_save", "trainable_token_indices",
        "target_parameters", "layer_replication", "arrow_config",    "alora_invocation_tokens",
        "use_bdlora",        "kasa_config",       "velora_config",   "monteclora_config"};
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const Json *bias = json_get(config, "bias"), *initial = json_get(config, "init_lora_weights");
    bool known = !json_text(initial);
    for (int i = 0; i < 3; i++) known = known || json_is_text(initial, harmless[i]);
    if (!known) die("%s: init_lora_weights \"%s\" is not supported", path, json_text(initial));
    if (!json_is_text(json_get(config, "peft_type"), "LORA")) die("%s: peft_type must be \"LORA\"", path);
    for (int i = 0; i < 4; i++)
        if (json_is_true(config, switches[i], false, path))
            die("%s: %s true is not supported", path, switches[i]);
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        const Json *list = json_get(config, lists[i]);
        if (!json_is_null(list) && json_child(list)) die("%s: %s is not supported", path, lists[i]);
    }
    if (!json_is_null(bias) && !json_is_text(bias, "none")) die("%s: bias must be \"none\"", path);
}

// The folder of the model that an adapter belongs to; it lies in `config`. Ends the program when it is none.
static const char *base_of(const Json *config, const char *path) {
    const char *base = json_text(json_get(config, "base_model_name_or_path"));
    if (!base || !file_exists(path_of("%s/config.json", base)) || is_adapter(base))
        die("%s: its model, base_model_name_or_path \"%s\", is not a model folder here; correct that line",
            path, base ? base : "");
    return base;
}

// The same for a folder; if that holds no adapter, the folder itself. A copy.
static char *base_folder(const char *folder) {
    if (!is_adapter(folder)) return xstrdup(folder);
    const char *path = path_of("%s/adapter_config.json", folder);
    Json *config = json_read_file(path);
    char *copy = xstrdup(base_of(config, path));
    json_free(config);
    return copy;
}

// May a tensor have an adapter? The matrices of the blocks may.
static bool is_adaptable(const Tensor *tensor) {
    return kind_is_per_layer(tensor->kind) && tensor->dims == 2;
}

// Loads an adapter's folder and the model that it belongs to. Which matrices are adapted is told by the names
// in adapter_model.safetensors; a tensor there that is not one of a pair ends the program.
static Model *adapter_open(const char *folder, bool with_values) {
    const char *path = path_of("%s/adapter_config.json", folder);
    Json *config = json_read_file(path);
    check_adapter_config(config, path);
    const char *base = base_of(config, path);
    const double r = json_number(config, "r", 8, path), alpha = json_number(config, "lora_alpha", 8, path);
    if (!(r >= 1 && r <= 65536) || r != floor(r)) die("%s: r must be a whole number from 1 to 65536", path);
    if (!isfinite(alpha)) die("%s: lora_alpha must be a number", path);
    Model *model = model_open(base, with_values);
    model->lora_rank = (int)r;
    model->lora_alpha = (float)alpha;
    SafeTensors file = safetensors_open(path_of("%s/adapter_model.safetensors", folder));
    const int plain = model->tensor_count;
    for (int i = 0; i < plain; i++) {
        Tensor *weight = &model->tensors[i];
        const int stem = (int)(strlen(weight->name) - strlen(".weight"));
        if (is_adaptable(weight) &&
            safetensors_find(&file, xprintf("%s%.*s.lora_A.weight", adapter_prefix, stem, weight->name)))
            model_add_adapter(model, weight);
    }
    if (file.count != (size_t)(model->tensor_count - plain) || file.count == 0)
        for (size_t i = 0; i <= file.count; i++) {
            if (i == file.count) die("%s: holds no adapter of this GPT-2 (or only one of a pair)", file.path);
            const char *name = file.tensors[i].name;
            bool known = strncmp(name, adapter_prefix, sizeof adapter_prefix - 1) == 0;
            if (known && (strstr(name, ".lora_A.weight") || strstr(name, ".lora_B.weight"))) continue;
            die("%s: tensor %s is not one of a pair lora_A, lora_B: it is not supported", file.path, name);
        }
    model->adapter_memory = allocate_values(model, plain);
    for (int i = plain; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        const StoredTensor *stored =
            safetensors_need(&file, xprintf("%s%s", adapter_prefix, tensor->name), tensor);
        if (!is_float(stored->dtype))
            die("%s: tensor %s is %s; F32, F16 or BF16 expected", file.path, stored->name, stored->dtype);
        for (size_t j = 0; j < tensor->size; j++) tensor->value[j] = stored_float(stored, j);
    }
    safetensors_close(&file, false);
    json_free(config);
    return model;
}

// Writes adapter_config.json for an adapter that was begun here. A kind of matrix that is adapted in every
// block is named once, as in "attn.c_attn".
static void save_adapter_config(const Model *model, const char *base, const char *folder) {
    const char *path = path_of("%s/adapter_config.json", folder), *comma = "";
    FILE *file = create_file(path);
    fprintf(
        file,
        "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  \"base_model_name_or_path\": ");
    json_write_string(file, base, strlen(base));
    fprintf(file,
            ",\n  \"r\": %d,\n  \"lora_alpha\": %.9g,\n  \"lora_dropout\": 0.0,\n  \"target_modules\": [",
            model->lora_rank, model->lora_alpha);
    for (int kind = LN_1_WEIGHT; kind < LN_F_WEIGHT; kind++) {
        int adapted = 0, layers = model->config.n_layer;
        for (int layer = 0; layer < layers; layer++)
            adapted += model_tensor(model, kind, layer)->adapter != NULL;
        for (int layer = 0; layer < (adapted == layers ? 1 : layers); layer++) {
            const Tensor *weight = model_tensor(model, kind, layer);
            const char *name = weight->name;
            if (!weight->adapter) continue;
            if (adapted == layers) name = strchr(name + strlen("transformer.h."), '.') + 1;
            fprintf(file, "%s\"%.*s\"", comma, (int)(strlen(name) - strlen(".weight")), name);
            comma = ", ";
        }
    }
    fprintf(file, "],\n  \"fan_in_fan_out\": true,\n  \"bias\": \"none\",\n  \"inference_mode\": true\n}\n");
    finish_file(file, path);
}

// Which of a tensor's three arrays a file holds.
typedef enum { STORE_VALUE, STORE_EXP_AVG, STORE_EXP_AVG_SQ } Stored;

static StoredTensor stored_tensor(const Tensor *tensor, Stored what) {
    static const char *const prefixes[] = {"", "exp_avg.", "exp_avg_sq."};
    float *const arrays[] = {tensor->value, tensor->exp_avg, tensor->exp_avg_sq};
    StoredTensor stored = {.dtype = "F32", .dims = tensor->dims, .count = tensor->size};
    const char *prefix = what == STORE_VALUE && tensor->kind >= LORA_A ? adapter_prefix : prefixes[what];
    stored.name = xprintf("%s%s", prefix, tensor->name);
    memcpy(stored.shape, tensor->shape, sizeof tensor->shape);
    stored.bytes = tensor->size * sizeof(float);
    stored.data = (char *)arrays[what];
    return stored;
}

// Writes all values (with LoRA the adapters' alone), or AdamW's moments of what is trained.
static void model_write_tensors(const Model *model, const char *path, bool moments) {
    Stored first = moments ? STORE_EXP_AVG : STORE_VALUE, last = moments ? STORE_EXP_AVG_SQ : STORE_VALUE;
    StoredTensor *list = xcalloc(2 * (size_t)model->tensor_count, sizeof *list);
    size_t count = 0;
    for (int i = 0; i < model->tensor_count; i++) {
        const bool of_base = model->lora_rank > 0 && model->tensors[i].kind < LORA_A;
        if (moments ? model->tensors[i].frozen : of_base) continue;
        for (Stored what = first; what <= last; what++)
            list[count++] = stored_tensor(&model->tensors[i], what);
    }
    safetensors_write(path, list, count);
    for (size_t i = 0; i < count; i++) free((char *)list[i].name);
    free(list);
}

// Writes FOLDER/NAME and frees the text.
static void save_text(const char *folder, const char *name, char *text) {
    write_file(path_of("%s/%s", folder, name), text, strlen(text));
    free(text);
}

// A file of a folder that is written back as it was read.
typedef struct {
    const char *name;
    Text bytes;
} KeptFile;

typedef struct {
    KeptFile *items;
    size_t size, capacity;
} KeptFiles;

static bool is_kept(const KeptFiles *files, const char *name) {
    for (size_t i = 0; i < files->size; i++)
        if (strcmp(files->items[i].name, name) == 0) return true;
    return false;
}

// Keeps FOLDER/NAME, if it is there, under the name `as`, if nothing has that name yet.
static void keep_file(KeptFiles *files, const char *folder, const char *name, const char *as) {
    const char *path = path_of("%s/%s", folder, name);
    if (!file_exists(path) || is_kept(files, as)) return;
    files->items = grow(files->items, files->size + 1, &files->capacity, sizeof *files->items);
    files->items[files->size++] = (KeptFile){as, read_file(path)};
}

// The files that make a tokenizer, one or several of them.
static const char *const tokenizer_names[] = {"tokenizer.json",     "vocab.json",
                                              "merges.txt",         "tokenizer_config.json",
                                              "added_tokens.json",  "special_tokens_map.json",
                                              "chat_template.jinja"};
enum { TOKENIZER_NAMES = sizeof tokenizer_names / sizeof *tokenizer_names };

// Keeps the files of a tokenizer's folder; OpenAI's names become Hugging Face's.
static void keep_tokenizer(KeptFiles *files, const char *folder) {
    for (int i = 0; i < TOKENIZER_NAMES; i++)
        keep_file(files, folder, tokenizer_names[i], tokenizer_names[i]);
    keep_file(files, folder, "encoder.json", "vocab.json");
    keep_file(files, folder, "vocab.bpe", "merges.txt");
}

// Keeps config.json and generation_config.json. One word is changed: the type of the weights, which will be
// float32.
static void keep_config(KeptFiles *files, const char *folder) {
    static const char *const names[] = {"dtype", "torch_dtype"}; // of today and of before
    keep_file(files, folder, "config.json", "config.json");
    for (int i = 0; i < 2 && files->size > 0; i++) {
        Text *old = &files->items[files->size - 1].bytes, changed = {0};
        Json *json = json_parse(old->data, old->size, folder);
        const char *type = json_text(json_get(json, names[i]));
        if (type) {
            size_t at = json_place(json, old, type), end = at + strcspn(old->data + at, "\"");
            text_append(&changed, old->data, at);
            text_append(&changed, "float32", 7);
            text_append(&changed, old->data + end, old->size - end);
            free(old->data);
            *old = changed;
        }
        json_free(json);
    }
    keep_file(files, folder, "generation_config.json", "generation_config.json");
}

// Of a kept file: does it belong into the folder of an adapter, or of a whole model? Those of the tokenizer
// belong into both.
static bool belongs(const KeptFile *file, bool adapter) {
    if (strcmp(file->name, "adapter_config.json") == 0) return adapter;
    return !adapter ||
           (strcmp(file->name, "config.json") != 0 && strcmp(file->name, "generation_config.json") != 0);
}

static void free_kept(KeptFiles *files) {
    for (size_t i = 0; i < files->size; i++) free(files->items[i].bytes.data);
    free(files->items);
}

// Writes config.json and generation_config.json of a model that comes from no folder.
static void save_config(const Config *c, int end_of_text, const char *folder) {
    char end[32] = "null", epsilon[32];
    for (int digits = 1; digits < 10; digits++) // the fewest that give the same float
        if (snprintf(epsilon, sizeof epsilon, "%.*g", digits, c->layer_norm_epsilon) &&
            strtof(epsilon, NULL) == c->layer_norm_epsilon)
            break;
    if (end_of_text >= 0) snprintf(end, sizeof end, "%d", end_of_text);
    save_text(folder, "config.json",
              xprintf("{\n  \"model_type\": \"gpt2\",\n  \"architectures\": [\"GPT2LMHeadModel\"],\n"
                      "  \"vocab_size\": %d,\n  \"n_positions\": %d,\n  \"n_embd\": %d,\n  \"n_layer\": %d,\n"
                      "  \"n_head\": %d,\n  \"n_inner\": %d,\n  \"activation_function\": \"gelu_new\",\n"
                      "  \"layer_norm_epsilon\": %s,\n  \"tie_word_embeddings\": %s,\n"
                      "  \"embd_pdrop\": 0.0,\n  \"attn_pdrop\": 0.0,\n  \"resid_pdrop\": 0.0,\n"
                      "  \"bos_token_id\": %s,\n  \"eos_token_id\": %s\n}\n",
                      c->vocab_size, c->n_positions, c->n_embd, c->n_layer, c->n_head, c->n_inner, epsilon,
                      c->tie_word_embeddings ? "true" : "false", end, end));
    save_text(folder, "generation_config.json",
              xprintf("{\n  \"bos_token_id\": %s,\n  \"eos_token_id\": %s\n}\n", end, end));
}

// Writes tokenizer_config.json for a tokenizer that comes from no folder, or from one without that file.
static void save_tokenizer_config(const Tokenizer *tokenizer, int n_positions, const char *folder) {
    const char *tasks[] = {"bos_token", "eos_token", "unk_token"},
               *path = path_of("%s/tokenizer_config.json", folder);
    FILE *file = create_file(path);
    fprintf(file, "{\n  \"tokenizer_class\": \"GPT2Tokenizer\",\n  \"model_max_length\": %d,\n", n_positions);
    for (int i = 0; i < 3 && tokenizer->end_of_text >= 0; i++) {
        const char *name = tokenizer->names[tokenizer->end_of_text];
        fprintf(file, "  \"%s\": ", tasks[i]);
        json_write_string(file, name, strlen(name));
        fprintf(file, ",\n");
    }
    fprintf(file, "  \"add_prefix_space\": false\n}\n");
    finish_file(file, path);
}

// Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load: the weights and the files
// that are kept. Those that are missing are made: there are none if the model began at random, or the
// tokenizer came from a merges file alone. A model with adapters becomes a folder that PEFT loads; `base` is
// then the folder of the model that they belong to. tokenizer may be NULL.
static void model_save(const Model *model, const Tokenizer *tokenizer, const KeptFiles *kept,
                       const char *base, const char *folder) {
    const int end_of_text = tokenizer ? tokenizer->end_of_text : -1;
    const bool vocabulary_kept = is_kept(kept, "vocab.json") || is_kept(kept, "tokenizer.json");
    const bool adapter = model->lora_rank > 0;
    make_folder(folder);
    model_write_tensors(model, path_of("%s/%s.safetensors", folder, adapter ? "adapter_model" : "model"),
                        false);
    for (size_t i = 0; i < kept->size; i++)
        if (belongs(&kept->items[i], adapter))
            write_file(path_of("%s/%s", folder, kept->items[i].name), kept->items[i].bytes.data,
                       kept->items[i].bytes.size);
    if (adapter && !is_kept(kept, "adapter_config.json")) save_adapter_config(model, base, folder);
    if (!adapter && !is_kept(kept, "config.json")) save_config(&model->config, end_of_text, folder);
    if (tokenizer && !vocabulary_kept) tokenizer_save(tokenizer, folder);
    bool complete =
        is_kept(kept, "tokenizer_config.json") || (vocabulary_kept && is_kept(kept, "config.json"));
    if (tokenizer && !complete) save_tokenizer_config(tokenizer, model->config.n_positions, folder);
}

// ---- checkpoints ----
// OUT/checkpoint-000300 is a model folder with optimizer.safetensors and trainer_state.json. It is written as
// OUT/checkpoint-000300.tmp and renamed when it is whole: whatever happens, the one before it stays.

// AdamW's moments, mapped privately from a checkpoint's optimizer.safetensors, which must have them all.
static void model_load_moments(Model *model, const char *path) {
    SafeTensors file = safetensors_open(path);
    for (int i = 0; i < model->tensor_count; i++) {
        Tensor *tensor = &model->tensors[i];
        for (Stored what = STORE_EXP_AVG; what <= STORE_EXP_AVG_SQ && !tensor->frozen; what++) {
            StoredTensor wanted = stored_tensor(tensor, what);
            if (!safetensors_find(&file, wanted.name))
                die("%s: no %s: a tensor that was frozen cannot be trained after --resume", path,
                    wanted.name);
            const StoredTensor *found = safetensors_need(&file, wanted.name, tensor);
            if (strcmp(found->dtype, "F32") != 0)
                die("%s: tensor %s is %s; F32 expected", path, wanted.name, found->dtype);
            *(what == STORE_EXP_AVG ? &tensor->exp_avg : &tensor->exp_avg_sq) = (float *)found->data;
            free((char *)wanted.name);
        }
    }
    model->moment_file = file.mapping;
    safetensors_close(&file, true);
}

#define checkpoint_path(out, step) path_of("%s/checkpoint-%06ld", out, (long)(step))

// The steps of all whole checkpoints in a folder, ascending; *count tells how many. A folder that is not
// there has none; one that cannot be read ends the program.
static long *list_checkpoints(const char *out, size_t *count) {
    long *steps = NULL;
    size_t capacity = *count = 0;
    DIR *folder = opendir(out);
    if (!folder && errno != ENOENT) die("%s: cannot be read: %s", out, strerror(errno));
    errno = 0;
    for (struct dirent *entry; folder && (entry = readdir(folder)); errno = 0) {
        const char *name = entry->d_name;
        long step = strncmp(name, "checkpoint-", 11) == 0 ? strtol(name + 11, NULL, 10) : -1;
        if (step < 0 || strcmp(path_of("%s/%s", out, name), checkpoint_path(out, step)) != 0)
            continue; // "checkpoint-7" and "checkpoint-000007.tmp" are not ours, or not whole
        steps = grow(steps, *count + 1, &capacity, sizeof *steps);
        size_t i = (*count)++;
        for (; i > 0 && steps[i - 1] > step; i--) steps[i] = steps[i - 1];
        steps[i] = step;
    }
    if (errno) die("%s: cannot be read: %s", out, strerror(errno));
    if (folder) closedir(folder);
    return steps;
}

// Deletes what an interrupted run left in OUT under temporary names.
static void remove_leftovers(const char *out) {
    DIR *folder = opendir(out);
    if (!folder) die("%s: cannot be read: %s", out, strerror(errno));
    errno = 0;
    for (struct dirent *entry; (entry = readdir(folder)); errno = 0)
        if ((strncmp(entry->d_name, "checkpoint-", 11) == 0 && ends_with(entry->d_name, ".tmp")) ||
            strcmp(entry->d_name, "model.tmp") == 0)
            remove_folder(path_of("%s/%s", out, entry->d_name));
    if (errno) die("%s: cannot be read: %s", out, strerror(errno));
    closedir(folder);
    remove_folder(path_of("%s/merged/model.tmp", out));
}

// Deletes a checkpoint. It loses its name first: whatever happens meanwhile, there is never half of one.
static void remove_checkpoint(const char *out, long step) {
    char *path = xstrdup(checkpoint_path(out, step)), *temporary = xprintf("%s.tmp", path);
    remove_folder(temporary);
    rename_for_good(path, temporary);
    remove_folder(temporary);
    free(path);
    free(temporary);
}

// Makes a folder unloadable, whatever it holds: without its config no program takes it for a model.
static void withdraw_model(const char *folder) {
    static const char *const names[] = {"config.json", "adapter_config.json"};
    for (int i = 0; i < 2; i++)
        if (unlink(path_of("%s/%s", folder, names[i])) != 0 && errno != ENOENT)
            die("%s/%s: cannot be deleted: %s", folder, names[i], strerror(errno));
    if (is_folder(folder)) sync_folder(folder);
}

// Moves a whole model folder, FOLDER/model.tmp, into FOLDER, file by file. A folder without its config is no
// model to any program: it goes first and comes last, and in between nobody can load a mixture of two models.
static void publish_model(const char *folder) {
    static const char *const weights[] = {"model.safetensors", "adapter_model.safetensors"};
    char *from = xprintf("%s/model.tmp", folder);
    const char *config = is_adapter(from) ? "adapter_config.json" : "config.json";
    withdraw_model(folder);
    for (int i = 0; i < TOKENIZER_NAMES + 2;
         i++) { // an earlier model's would be read in place of the new ones
        const char *name = i < TOKENIZER_NAMES ? tokenizer_names[i] : weights[i - TOKENIZER_NAMES];
        if (!file_exists(path_of("%s/%s", from, name))) remove_folder(path_of("%s/%s", folder, name));
    }
    DIR *files = opendir(from);
    if (!files) die("%s: cannot be read: %s", from, strerror(errno));
    errno = 0;
    for (struct dirent *entry; (entry = readdir(files)); errno = 0)
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, config) != 0)
            rename_for_good(path_of("%s/%s", from, entry->d_name), path_of("%s/%s", folder, entry->d_name));
    if (errno) die("%s: cannot be read: %s", from, strerror(errno));
    closedir(files);
    rename_for_good(path_of("%s/%s", from, config), path_of("%s/%s", folder, config));
    remove_folder(from);
    free(from);
}

// =====================================================================================================
// 14. Data
// =====================================================================================================
// Text comes in three kinds of files, and training wants one thing: examples. An example of n tokens makes
// n - 1 rows: row i reads token i and is scored on token i + 1, unless that is part of the prompt.
//   .txt    documents, separated by lines that are only <|endoftext|>. Each becomes the tokenizer's end of text
//           and its tokens; the stream of them all is cut into windows of seq_len rows
//   .bin    llm.c's token shards, such a stream already: 256 int32 of header [20240520, 1, count], then
//           uint16 tokens
//   .jsonl  a line is an example:
//           {"prompt": "...", "completion": "..."}  scores the completion and the end of text behind it
//           {"text": "..."}  scores everything, and has the end of text at both ends
//           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
//                            a talk: the end of text behind each turn; scores the assistant's turns with theirs
// Which example comes when is a pure function of seed and epoch, so that a resumed run goes on where it was.

typedef struct {
    int source;   // which file
    size_t start; // first token within it
    int size;     // tokens
    int targets;  // how many of them are scored; never the first, which nothing predicts
} Example;

// The tokens of a file: in memory, or, when it is a shard, mapped.
typedef struct {
    Ids ids; // a token that is not scored is stored as ~id, a negative number
    Mapping shard;
    const uint16_t *shorts; // the tokens of the shard; NULL: there is none
} Source;

typedef struct {
    const char *path; // as the command line names it
    Source *sources;
    Example *examples;
    size_t source_count, source_capacity, count, capacity;
    size_t lost_end, lost_beginning; // examples longer than seq_len: what was cut off
    size_t skipped;                  // examples with nothing to score
    bool prompts;                    // exact match makes sense: examples, not windows of a stream
    bool is_part;                    // split off another dataset, which owns sources and examples
} Dataset;

// Token i of an example, as ~id if it is not scored.
static int dataset_token(const Dataset *data, const Example *example, int i) {
    const Source *source = &data->sources[example->source];
    size_t at = example->start + (size_t)i;
    return source->shorts ? source->shorts[at] : source->ids.data[at];
}

// Adds tokens start .. start + size - 1 of the newest source as an example.
static void dataset_add(Dataset *data, size_t start, size_t size) {
    data->examples = grow(data->examples, data->count + 1, &data->capacity, sizeof *data->examples);
    Example *example = &data->examples[data->count++];
    *example = (Example){(int)data->source_count - 1, start, (int)size, 0};
    for (int i = 1; i < example->size; i++) example->targets += dataset_token(data, example, i) >= 0;
}

// Cuts a stream of tokens into windows of seq_len rows; neighbours share a token, since the last one of a
// window is only a target. A last, shorter window is kept.
static void add_windows(Dataset *data, size_t tokens, size_t seq_len) {
    for (size_t start = 0; start + 1 < tokens; start += seq_len)
        dataset_add(data, start, tokens - start > seq_len ? seq_len + 1 : tokens - start);
}

// Finds the next line of text[from ...] that is only <|endoftext|>: returns where the line starts, and in
// *end where the next one does. If there is none, both are `size`. `fresh`: text[from] begins a line. Unless
// the text is `whole`, more of it may follow; if the answer depends on that, *end is 0.
static size_t find_separator(const char *text, size_t size, size_t from, bool fresh, bool whole,
                             size_t *end) {
    size_t at = from;
    for (const char *found; (found = memmem(text + at, size - at, END_OF_TEXT, END_OF_TEXT_SIZE)); at++) {
        at = (size_t)(found - text);
        if (at > from ? text[at - 1] != '\n' : !fresh) continue;
        size_t after = at + END_OF_TEXT_SIZE;
        if (after < size && text[after] == '\r') after++;
        *end = after < size ? after + 1 : whole ? size : 0;
        if (after >= size || text[after] == '\n') return at;
    }
    return *end = size;
}

// How far a file has been checked, which may be read in parts.
typedef struct {
    const char *path;
    size_t byte, line;
} Utf8Check;

// Ends the program when the next part of a file is not UTF-8: text in another encoding would be trained on as
// garbage. Says where, which encoding it probably is, and the command that converts it. Returns how many
// bytes are checked: where the part ends inside a character, that one must be given again, unless this is the
// `last`.
static size_t check_utf8(Utf8Check *check, const char *text, size_t size, bool last) {
    const unsigned char *bytes = (const unsigned char *)text;
    size_t at = 0, nuls = 0, windows = 0, end = last ? size : utf8_whole(text, size);
    const char *probably = NULL;
    if (check->byte == 0) { // UTF-16 begins with a mark, or has many NULs
        const size_t sampled = smaller(size, 1 << 12);
        for (size_t i = 0; i < sampled; i++) nuls += bytes[i] == 0;
        if (nuls * 4 > sampled) probably = bytes[0] == 0 ? "UTF-16BE" : "UTF-16LE";
        if (size >= 2 && bytes[0] == 0xff && bytes[1] == 0xfe) probably = "UTF-16LE";
        if (size >= 2 && bytes[0] == 0xfe && bytes[1] == 0xff) probably = "UTF-16BE";
    }
    for (unsigned code, length = 1; at < end && length > 0 && !probably; at += length) {
        length = bytes[at] < 0x80 ? 1 : (unsigned)utf8_read(text + at, end - at, &code);
        check->line += bytes[at] == '\n';
    }
    check->byte += at;
    if (at == end && !probably) return end;
    for (size_t i = at; i < size; i++) windows += bytes[i] >= 0x80 && bytes[i] < 0xa0;
    if (!probably) probably = windows > 0 ? "WINDOWS-1252" : "ISO-8859-1";
    die("%s: not UTF-8 at byte %zu, line %zu; probably %s: iconv -f %s -t UTF-8 '%s' > utf8.txt converts it",
        check->path, check->byte, check->line, probably, probably, check->path);
}

// The bytes of the mark with which a UTF-8 file may begin: 3 or 0.
static size_t utf8_mark(const char *text, size_t size) {
    return size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

// Reads a text file that must be UTF-8; *start is behind a byte order mark, if there is one.
static Text read_utf8_file(const char *path, const char **start) {
    Text text = read_file(path);
    text_append(&text, "", 0); // an empty file has data, too
    refuse_pointer(path, text.data, text.size);
    check_utf8(&(Utf8Check){path, 0, 1}, text.data, text.size, true);
    *start = text.data + utf8_mark(text.data, text.size);
    return text;
}

// Ends the program when the model has no row in wte for one of these tokens. A tokenizer may know more tokens
// than its model: added ones that the model was not resized for. They do no harm as long as no text has them.
static void check_tokens(const Tokenizer *tokenizer, const Ids *ids, int vocab_size, const char *where) {
    for (size_t i = 0; i < ids->size; i++) {
        int token = ids->data[i] < 0 ? ~ids->data[i] : ids->data[i];
        if (token >= vocab_size)
            die("%s: holds the token \"%s\"%s, id %d, and the model's vocabulary ends at %d: resize the "
                "model, "
                "or name another token in tokenizer_config.json",
                where, tokenizer->names[token],
                token == tokenizer->end_of_text ? " (or a text ends with it)" : "", token, vocab_size - 1);
    }
}

// Encodes a .txt file: each document begins with the end of text.
static void load_text(Dataset *data, Source *source, const char *path, Tokenizer *tokenizer, int seq_len) {
    const char *start;
    Text text = read_utf8_file(path, &start);
    for (size_t at = (size_t)(start - text.data), end; at < text.size; at = end) {
        size_t stop = find_separator(text.data, text.size, at, true, true, &end);
        if (stop == at) continue;
        if (tokenizer->end_of_text >= 0) ids_push(&source->ids, tokenizer->end_of_text);
        tokenizer_encode(tokenizer, &source->ids, text.data + at, stop - at);
    }
    free(text.data);
    add_windows(data, source->ids.size, (size_t)seq_len);
}

// Maps a .bin file and checks that its tokens are below vocab_size.
static void load_shard(Dataset *data, Source *source, const char *path, int seq_len, int vocab_size) {
    source->shard = map_file(path);
    const int32_t *header = (const int32_t *)source->shard.data;
    refuse_pointer(path, source->shard.data, source->shard.size);
    if (source->shard.size < 1024 || header[0] != 20240520 || header[1] != 1)
        die("%s: not a token shard of llm.c: header 20240520, 1 expected", path);
    size_t count = (source->shard.size - 1024) / 2;
    if (header[2] < 0 || (size_t)header[2] != count)
        die("%s: its header promises %d tokens, the file has %zu", path, header[2], count);
    source->shorts = (const uint16_t *)(source->shard.data + 1024);
    for (size_t i = 0; i < count; i++)
        if (source->shorts[i] >= vocab_size)
            die("%s: token %zu is %d, but the model's vocabulary has %d entries", path, i, source->shorts[i],
                vocab_size);
    add_windows(data, count, (size_t)seq_len);
}

static const char JSONL_SHAPES[] = "{\"prompt\": \"...\", \"completion\": \"...\"}, {\"text\": \"...\"} or "
                                   "{\"messages\": [...]} expected";

// Ends the program because a line is no example, and says what to write instead.
static void __attribute__((noreturn)) refuse_line(const Json *line, const char *where) {
    static const char *const others[][2] = {{"instruction", "output"}, {"question", "answer"},
                                            {"input", "output"},       {"prompt", "response"},
                                            {"prompt", "answer"},      {"prompt", "output"}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (json_get(line, others[i][0]) && json_get(line, others[i][1]))
            die("%s: \"%s\" and \"%s\" are not the keys: write {\"prompt\": \"...\", \"completion\": "
                "\"...\"}",
                where, others[i][0], others[i][1]);
    die("%s: %s", where, JSONL_SHAPES);
}

// Ends the program when a line shows that the file is not JSONL but one JSON array, or objects over several
// lines.
static void check_line(const char *line, size_t length, const char *path, const char *where) {
    size_t begin = strspn(line, " \t"), size = length;
    while (size > begin && strchr(" \t\r", line[size - 1])) size--;
    if (line[begin] == '[')
        die("%s: a JSON array: expected an object a line, without brackets or commas around: jq -c '.[]' "
            "'%s'",
            where, path);
    if (line[begin] == '{' && (size == begin + 1 || line[size - 1] == ',' || line[size - 1] == '{'))
        die("%s: an object that goes on in the next line: expected all of it in one: jq -c . '%s'", where,
            path);
}

// Appends the tokens of the string called `key`, which must be there. Tokens that are not scored become ~id.
static void encode_member(Tokenizer *tokenizer, Ids *ids, const Json *object, const char *key, bool scored,
                          const char *where) {
    const Json *member = json_get(object, key);
    if (json_is_null(member)) refuse_line(object, where);
    if (member->kind == JSON_NUMBER)
        die("%s: \"%s\" is a number: expected a string, \"%.17g\"", where, key, member->number);
    if (member->kind != JSON_STRING) die("%s: \"%s\" must be a string", where, key);
    size_t before = ids->size;
    tokenizer_encode(tokenizer, ids, member->string, member->length);
    for (size_t i = before; i < ids->size && !scored; i++) ids->data[i] = ~ids->data[i];
}

// Appends a talk: each turn, then the end of text. Returns where its last scored turn begins.
static size_t encode_talk(Tokenizer *tokenizer, Ids *ids, const Json *messages, const char *where) {
    size_t last = ids->size, first = ids->size;
    if (tokenizer->end_of_text < 0) die("%s: \"messages\" need a tokenizer with an end of text", where);
    if (messages->kind != JSON_ARRAY) die("%s: \"messages\" must be an array", where);
    for (const Json *turn = messages->child; turn; turn = turn->next) {
        const char *role = json_text(json_get(turn, "role"));
        if (!role || !json_text(json_get(turn, "content")))
            die("%s: a message is {\"role\": \"user\" or \"assistant\", \"content\": \"...\"}", where);
        bool scored = strcmp(role, "assistant") == 0;
        if (scored && ids->size == first) ids_push(ids, ~tokenizer->end_of_text); // it is predicted from this
        if (scored) last = ids->size;
        encode_member(tokenizer, ids, turn, "content", scored, where);
        ids_push(ids, scored ? tokenizer->end_of_text : ~tokenizer->end_of_text);
    }
    return last;
}

// Appends the tokens of a line. Returns where its last scored text begins.
static size_t encode_line(Tokenizer *tokenizer, Ids *ids, const Json *line, const char *where) {
    const Json *messages = json_get(line, "messages");
    const bool talk = !json_is_null(messages), text = !json_is_null(json_get(line, "text"));
    const size_t start = ids->size;
    if (talk + text + !json_is_null(json_get(line, "completion")) > 1)
        die("%s: only one of completion, text and messages expected", where);
    if (talk) return encode_talk(tokenizer, ids, messages, where);
    if (!text && json_is_null(json_get(line, "completion"))) refuse_line(line, where);
    if (!text) encode_member(tokenizer, ids, line, "prompt", false, where);
    if (ids->size == start && tokenizer->end_of_text >= 0)
        ids_push(ids, ~tokenizer->end_of_text); // the first token needs something to be predicted from
    size_t scored = ids->size;
    encode_member(tokenizer, ids, line, text ? "text" : "completion", true, where);
    if (tokenizer->end_of_text >= 0 && ids->size > scored) ids_push(ids, tokenizer->end_of_text);
    return scored;
}

// Adds the example ids[start ...], of which ids[scored ...] is the last text to learn. If it is too long, its
// beginning is cut off, far from the answer; if that does not do, the end of the answer too.
static void add_example(Dataset *data, size_t start, size_t scored, int seq_len, const char *where) {
    const Ids *ids = &data->sources[data->source_count - 1].ids;
    const size_t size = ids->size - start, room = (size_t)seq_len + 1, prompt = scored - start;
    if (scored >= ids->size || prompt == 0) {
        if (data->skipped++ < 3) warn("%s: nothing to learn here (empty text or completion), skipped", where);
        return;
    }
    size_t cut = size <= room ? 0 : smaller(size - room, prompt - 1);
    bool ends = size - cut > room;
    if (size > room && data->lost_end + data->lost_beginning < 3)
        warn("%s: %zu tokens are more than --seq-len %d: %s%s%s cut off", where, size - 1, seq_len,
             cut ? "the beginning" : "", cut && ends ? " and " : "",
             ends ? "the end, with its end of text," : "");
    data->lost_beginning += cut > 0;
    data->lost_end += ends;
    dataset_add(data, start + cut, smaller(size - cut, room));
}

// Encodes a .jsonl file, line by line.
static void load_jsonl(Dataset *data, Source *source, const char *path, Tokenizer *tokenizer, int seq_len) {
    const char *at, *line;
    Text text = read_utf8_file(path, &at);
    data->prompts = true;
    for (size_t length, number = 1; next_line(&at, text.data + text.size, &line, &length); number++) {
        if (strspn(line, " \t\r") >= length) continue;
        char *where = xprintf("%s:%zu", path, number);
        check_line(line, length, path, where);
        Json *json = json_parse(line, length, where);
        size_t start = source->ids.size, scored = encode_line(tokenizer, &source->ids, json, where);
        add_example(data, start, scored, seq_len, where);
        json_free(json);
        free(where);
    }
    free(text.data);
}

// The files that a pattern names: the one of that name, if there is one (a name may have a [), else all that
// it matches. Ends the program when there is none.
static glob_t find_files(const char *pattern) {
    glob_t found = {0};
    if (file_exists(pattern) || strcmp(pattern, "-") == 0) {
        char *escaped = xmalloc(2 * strlen(pattern) + 1), *to = escaped;
        for (const char *c = pattern; *c; *to++ = *c++)
            if (strchr("*?[\\", *c)) *to++ = '\\';
        *to = 0;
        glob(escaped, GLOB_NOCHECK, NULL, &found);
        free(escaped);
    } else if (glob(pattern, 0, NULL, &found) != 0)
        die("%s: no such file, and none that it matches", pattern);
    return found;
}

// Says how many examples were cut or left out.
static void report_losses(const Dataset *data, int seq_len) {
    if (data->lost_end + data->lost_beginning + data->skipped == 0) return;
    warn("%s: %zu examples; cut to --seq-len %d: %zu lost the end of what is scored and the end of text, %zu "
         "the beginning of the prompt; %zu more skipped",
         data->path, data->count, seq_len, data->lost_end, data->lost_beginning, data->skipped);
}

// Does a name have this ending, in small or capital letters?
static bool has_ending(const char *path, const char *ending) {
    size_t n = strlen(path), m = strlen(ending);
    return n >= m && strcasecmp(path + n - m, ending) == 0;
}

// Ends the program because a path is neither .txt, .jsonl nor .bin, and says how to get there.
static void __attribute__((noreturn)) refuse_data(const char *path) {
    if (is_folder(path)) die("%s: a folder: name its files, as in '%s/*.txt'", path, path);
    if (has_ending(path, ".csv") || has_ending(path, ".tsv") || has_ending(path, ".parquet") ||
        has_ending(path, ".json"))
        die("%s: a table; this makes examples of it: python3 data/convert.py '%s' '%.*s.jsonl'", path, path,
            (int)(strrchr(path, '.') - path), path);
    if (has_ending(path, ".gz")) die("%s: packed: gunzip '%s'", path, path);
    die("%s: .txt, .jsonl or .bin expected; if it is plain text, give it such a name: cp '%s' '%s.txt'", path,
        path, path);
}

// Adds the examples of a file, or of all files that a glob matches.
static void dataset_read(Dataset *data, const char *pattern, Tokenizer *tokenizer, int seq_len,
                         int vocab_size) {
    const size_t before = data->count;
    glob_t found = find_files(pattern);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        const char *path = found.gl_pathv[i];
        data->sources =
            grow(data->sources, data->source_count + 1, &data->source_capacity, sizeof *data->sources);
        Source *source = &data->sources[data->source_count++];
        *source = (Source){0};
        bool is_shard = has_ending(path, ".bin"), is_jsonl = has_ending(path, ".jsonl");
        if (is_folder(path) || (!is_shard && !is_jsonl && !has_ending(path, ".txt"))) refuse_data(path);
        if (!is_shard && !tokenizer) die("%s: text needs a tokenizer; say --tokenizer FOLDER", path);
        if (is_shard)
            load_shard(data, source, path, seq_len, vocab_size);
        else if (is_jsonl)
            load_jsonl(data, source, path, tokenizer, seq_len);
        else
            load_text(data, source, path, tokenizer, seq_len);
        if (!is_shard) check_tokens(tokenizer, &source->ids, vocab_size, path);
    }
    globfree(&found);
    if (data->count == before) die("%s: holds no example to learn from", pattern);
}

// Loads all files that the patterns name. tokenizer may be NULL when there are only shards.
static Dataset *dataset_load_all(const Patterns *patterns, Tokenizer *tokenizer, int seq_len,
                                 int vocab_size) {
    Dataset *data = xcalloc(1, sizeof *data);
    data->path = patterns->items[0];
    for (size_t i = 0; i < patterns->size; i++) {
        if (i > 0) data->path = xprintf("%s, %s", data->path, patterns->items[i]);
        dataset_read(data, patterns->items[i], tokenizer, seq_len, vocab_size);
    }
    report_losses(data, seq_len);
    return data;
}

static Dataset *dataset_load(const char *pattern, Tokenizer *tokenizer, int seq_len, int vocab_size) {
    return dataset_load_all(&(Patterns){&pattern, 1, 1}, tokenizer, seq_len, vocab_size);
}

// Splits the last part off as a dataset of its own, at least one example. It lives no longer than the whole.
static Dataset *dataset_split(Dataset *data, double fraction) {
    size_t count = (size_t)((double)data->count * fraction + 0.5);
    count = count < 1 ? 1 : count;
    if (count >= data->count)
        die("%s: %zu examples are too few to split off --val-fraction; give --val, or --val-fraction 0",
            data->path, data->count);
    data->count -= count;
    Dataset *part = xmalloc(sizeof *part);
    *part = *data;
    part->is_part = true;
    part->examples += data->count;
    part->count = count;
    return part;
}

static void dataset_free(Dataset *data) {
    if (!data) return;
    for (size_t i = 0; i < data->source_count && !data->is_part; i++) {
        free(data->sources[i].ids.data);
        unmap_file(&data->sources[i].shard);
    }
    if (!data->is_part) {
        free(data->sources);
        free(data->examples);
    }
    free(data);
}

// How many rows (tokens that the model reads) and how many of them are scored.
static void dataset_size(const Dataset *data, size_t *rows, size_t *targets) {
    *rows = *targets = 0;
    for (size_t i = 0; i < data->count; i++) {
        *rows += (size_t)data->examples[i].size - 1;
        *targets += (size_t)data->examples[i].targets;
    }
}

// The order of examples in an epoch, (count) indices: shuffled as Fisher and Yates do it. Each run of
// batch size x accumulate of them makes an update; what is left over makes the last, smaller one.
static size_t *dataset_order(const Dataset *data, uint64_t seed, long epoch) {
    uint64_t stream = random_stream(seed, 0x6f72646572u + (uint64_t)epoch); // "order"
    size_t *order = xmalloc(data->count * sizeof *order);
    for (size_t i = 0; i < data->count; i++) order[i] = i;
    for (size_t i = data->count; i > 1; i--) {
        size_t j = random_bits(stream, i) % i, kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
    return order;
}

// Packs examples first .. first + count - 1 of the list `indices`, or of the file when it is
// NULL, into a batch.
static void dataset_batch(const Dataset *data, const size_t *indices, size_t first, size_t count,
                          Batch *batch) {
    batch_clear(batch);
    for (size_t i = first; i < first + count; i++) {
        const Example *example = &data->examples[indices ? indices[i] : i];
        for (int t = 0; t + 1 < example->size; t++) {
            int token = dataset_token(data, example, t), next = dataset_token(data, example, t + 1);
            batch_add_row(batch, token < 0 ? ~token : token, t, next < 0 ? -1 : next);
        }
        batch_end_sequence(batch);
    }
}

// An example taken apart: its last stretch of scored tokens is the answer that is expected, all before it is the
// prompt. A text that is scored from its beginning has no prompt.
typedef struct {
    Ids prompt, answer; // the answer without the end of text
    bool has_prompt;
    bool ends;        // the end of text is expected behind the answer
    bool one_stretch; // nothing else is scored
    Text asked, expected;
} Question;

static Question question_of(const Dataset *data, const Example *example, const Tokenizer *tokenizer) {
    Question q = {0};
    int end = example->size, begin;
    while (end > 1 && dataset_token(data, example, end - 1) < 0) end--;
    for (begin = end; begin > 1 && dataset_token(data, example, begin - 1) >= 0;) begin--;
    q.one_stretch = example->targets == end - begin;
    q.ends = end > begin && dataset_token(data, example, end - 1) == tokenizer->end_of_text;
    text_append(&q.asked, "", 0);
    text_append(&q.expected, "", 0);
    for (int i = 0; i < begin; i++) {
        int token = dataset_token(data, example, i);
        ids_push(&q.prompt, token < 0 ? ~token : token);
        if (i > 0 || q.prompt.data[0] != tokenizer->end_of_text)
            tokenizer_decode(tokenizer, &q.asked, q.prompt.data[i]);
    }
    for (int i = begin; i < end - q.ends; i++) {
        ids_push(&q.answer, dataset_token(data, example, i));
        tokenizer_decode(tokenizer, &q.expected, q.answer.data[i - begin]);
    }
    q.has_prompt = q.asked.size > 0 && dataset_token(data, example, 0) < 0;
    return q;
}

static void question_free(Question *q) {
    free(q->prompt.data), free(q->answer.data);
    free(q->asked.data), free(q->expected.data);
}

// #####################################################################################################
// PART IV. Running it
// #####################################################################################################
// A training step by itself is short. Around it stands what makes a run of hours: evaluation, progress, a
// log, checkpoints, signals, and the command line that sets all of it.

// =====================================================================================================
// 15. Training
// =====================================================================================================
// The recipe: the learning rate rises, then falls; evaluate now and then; keep the best model; on a signal,
// finish the step and save. A checkpoint holds all that must survive an interruption. Everything else follows
// from the options and the step.

static double seconds_on(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Seconds on a clock that never goes back.
static double now(void) { return seconds_on(CLOCK_MONOTONIC); }

// ---- ranks ----
// One model can be trained by several processes, on one machine or on many: `make MPI=1`, then `mpirun -np 8
// --hostfile hosts ./train_gpt2 ...`. MPI, the Message Passing Interface, calls such a process a rank and
// numbers them from 0. All N ranks hold the whole model and do the same, with one exception: of an update's
// examples each rank takes every N-th. MPI_Allreduce then gives every rank the sum of all gradients, so all
// take the same AdamW step, and their parameters stay equal without ever being sent. Rank 0 alone speaks and
// writes files. The result is the same for any number of ranks, but for rounding.
//
// Functions marked (all ranks) talk to the other ranks. Each rank must call them in the same order, or all
// wait for ever. So whatever decides about a call must be equal on all ranks: options and data are compared
// at the start, sums are equal, signals are agreed upon. Without MPI there is one rank, with nobody to talk to.

#ifdef USE_MPI
#include <mpi.h>
#endif
static int this_rank = 0, rank_count = 1, machine_count = 1;
static bool sums_in_bfloat16 = false; // --sum-precision bfloat16
static double summing = 0;            // seconds that sums of gradients took, with waiting for slower ranks

// (all ranks) The largest x of all ranks.
static long largest_over_ranks(long x) {
#ifdef USE_MPI
    if (rank_count > 1) MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_LONG, MPI_MAX, MPI_COMM_WORLD);
#endif
    return x;
}

// (all ranks) The sum of all ranks' x.
static double sum_over_ranks(double x) {
#ifdef USE_MPI
    if (rank_count > 1) MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
#endif
    return x;
}

#ifdef USE_MPI
static inline uint16_t bfloat16_of(float x); // section 18
static inline float float_of(uint16_t bfloat16);

// (all ranks) Sends n numbers to every other rank and gets n from each. What is sent to rank r stands at
// from + r · stride (stride 0: the same to all), what comes from rank r goes to to + r · n. In each step all
// ranks send and all receive, so that no cable is idle.
static void exchange(uint16_t *to, const uint16_t *from, size_t stride, size_t n) {
    for (int step = 1; step < rank_count; step++) {
        const int receiver = (this_rank + step) % rank_count;
        const int sender = (this_rank + rank_count - step) % rank_count;
        MPI_Sendrecv(from + (size_t)receiver * stride, (int)n, MPI_UINT16_T, receiver, 0,
                     to + (size_t)sender * n, (int)n, MPI_UINT16_T, sender, 0, MPI_COMM_WORLD,
                     MPI_STATUS_IGNORE);
    }
}

// (all ranks) Sums x (n) over the N ranks. It is rounded to bfloat16 on its way: half the bytes are sent. x is
// cut into N parts, and rank r sums part r: all send it that part, it adds up in float32, rounds the sum and
// sends it to all.
//   scratch: 2 (n + N) numbers
static void sum_rounded(float *x, size_t n, uint16_t *scratch) {
    const size_t N = (size_t)rank_count, part = (n + N - 1) / N, mine = (size_t)this_rank * part;
    uint16_t *rounded = scratch, *received = scratch + N * part;
#pragma omp parallel for
    for (size_t i = 0; i < N * part; i++) rounded[i] = bfloat16_of(i < n ? x[i] : 0);
    exchange(received, rounded, part, part);
    memcpy(received + mine, rounded + mine, part * sizeof *rounded);
#pragma omp parallel for
    for (size_t i = 0; i < part; i++) {
        float sum = 0;
        for (size_t rank = 0; rank < N; rank++) sum += float_of(received[rank * part + i]);
        rounded[mine + i] = bfloat16_of(sum);
    }
    exchange(rounded, rounded + mine, 0, part);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = float_of(rounded[i]);
}
#endif

// (all ranks) Each gradient becomes the sum of all ranks' gradients: the same bits on each. They lie one
// behind another (model_allocate_training), so they are summed as one array. It goes in pieces: MPI counts in
// int, and small pieces need little scratch memory.
static void sum_gradients_over_ranks(const Model *model) {
#ifdef USE_MPI
    const double started = now();
    float *begin = NULL, *end = NULL;
    for (int i = 0; i < model->tensor_count && rank_count > 1; i++) {
        const Tensor *tensor = &model->tensors[i];
        if (!tensor->gradient) continue;
        if (!begin) begin = tensor->gradient;
        end = tensor->gradient + tensor->size;
    }
    const size_t most = sums_in_bfloat16 ? (size_t)1 << 20 : (size_t)1 << 30; // floats in a piece
    uint16_t *scratch = sums_in_bfloat16 ? xmalloc(2 * (most + (size_t)rank_count) * sizeof *scratch) : NULL;
    for (size_t n; begin < end; begin += n) {
        n = smaller((size_t)(end - begin), most);
        if (sums_in_bfloat16)
            sum_rounded(begin, n, scratch);
        else
            MPI_Allreduce(MPI_IN_PLACE, begin, (int)n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    }
    free(scratch);
    summing += now() - started;
#endif
    (void)model;
}

// A number that is almost surely another one when a byte differs.
static uint64_t hash_of(const void *bytes, size_t size) {
    uint64_t sum = size;
#pragma omp parallel for reduction(+ : sum)
    for (size_t i = 0; i < size; i += 4) {
        uint32_t word = 0;
        memcpy(&word, (const char *)bytes + i, smaller(4, size - i));
        sum += random_bits(word, i);
    }
    return sum;
}

// (all ranks) Ends the program unless all ranks have the same hash of `what`; `advice` says what to do then.
static void need_same(const char *what, uint64_t hash, const char *advice) {
#ifdef USE_MPI
    uint64_t first = hash;
    if (rank_count == 1) return;
    MPI_Bcast(&first, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    if (sum_over_ranks(first != hash) == 0) return;
    if (first != hash) die("%s: not the same as on rank 0; %s", what, advice);
    MPI_Barrier(MPI_COMM_WORLD); // waits until those that differ have ended all
#endif
    (void)what, (void)hash, (void)advice;
}

// (all ranks) Compares weights and moments.
static void need_same_model(const Model *model) {
    uint64_t hash = 0;
    for (int i = 0; i < model->tensor_count && rank_count > 1; i++) {
        const Tensor *tensor = &model->tensors[i];
        const float *const arrays[] = {tensor->value, tensor->exp_avg, tensor->exp_avg_sq};
        for (int a = 0; a < 3 && arrays[a]; a++)
            hash = random_bits(hash, hash_of(arrays[a], tensor->size * sizeof(float)));
    }
    need_same("the model", hash,
              "start all ranks from the same files; --resume goes on from the last checkpoint");
}

// Lists in *share what this rank takes of examples begin .. end - 1 of the list `order` (NULL: of the file):
// every N-th. Returns how many.
static size_t take_share(const size_t *order, size_t begin, size_t end, size_t **share) {
    size_t count = 0;
    *share = xmalloc((end - begin) * sizeof **share);
    for (size_t i = begin + (size_t)this_rank; i < end; i += (size_t)rank_count)
        (*share)[count++] = order ? order[i] : i;
    return count;
}

// The cores of a machine are shared out evenly among its ranks when more than one rank may use a core: two
// ranks on one core would each wait for the other. Open MPI by itself binds each of two ranks to a single
// core, and each of more to a socket. So unless the user gave it --bind-to, what is shared out is what
// mpirun, our parent process, may use. Each rank has as many threads as cores, if neither --threads nor
// OMP_NUM_THREADS says another number.
static void share_cores(void) {
#if defined(USE_MPI) && defined(__linux__)
    int running = 0, rank_here, ranks_here;
    MPI_Comm here;
    cpu_set_t mine, all;
    MPI_Initialized(&running);
    if (!running || getenv("OMP_PROC_BIND") || sched_getaffinity(0, sizeof mine, &mine) != 0) return;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, this_rank, MPI_INFO_NULL, &here);
    MPI_Comm_rank(here, &rank_here);
    MPI_Comm_size(here, &ranks_here);
    machine_count = (int)sum_over_ranks(rank_here == 0);
    const bool by_default =
        getenv("OMPI_COMM_WORLD_SIZE") != NULL && getenv("OMPI_MCA_hwloc_base_binding_policy") == NULL;
    if (!by_default || sched_getaffinity(getppid(), sizeof all, &all) != 0) all = mine;
    int bound = CPU_COUNT(&mine);
    MPI_Allreduce(MPI_IN_PLACE, &bound, 1, MPI_INT, MPI_SUM, here);
    MPI_Allreduce(MPI_IN_PLACE, &all, sizeof all, MPI_BYTE, MPI_BOR, here);
    MPI_Comm_free(&here);
    const int cores = CPU_COUNT(&all), begin = rank_here * cores / ranks_here;
    const int end = (rank_here + 1) * cores / ranks_here;
    if (bound == cores) return; // each core belongs to one rank already
    CPU_ZERO(&mine);
    for (int core = 0, number = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, &all)) continue;
        if (number == begin || (number > begin && number < end)) CPU_SET(core, &mine);
        number++;
    }
    if (sched_setaffinity(0, sizeof mine, &mine) == 0 && !getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(CPU_COUNT(&mine));
#endif
}

// Ends the program when a launcher has started it several times, but MPI knows of one rank only. Each process
// would take itself for the only one, and all would write the same folder.
static void refuse_lonely_ranks(void) {
    static const char *const launchers[][2] = {{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
                                               {"PMI_SIZE", "PMI_RANK"},
                                               {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"}};
    for (int i = 0; i < 3 && rank_count == 1; i++) {
        const char *size = getenv(launchers[i][0]), *number = getenv(launchers[i][1]);
        if (!size || atoi(size) <= 1) continue;
        if (number && atoi(number) > 0) { // the first one says it; a launcher may end all when one ends
            sleep(1);
            exit(1);
        }
#ifdef USE_MPI
        die("started %s times, but not as one program: this launcher is of another MPI than train_gpt2 was "
            "built with; use that one's mpirun (srun: try --mpi=pmix or --mpi=pmi2)",
            size);
#else
        die("started %s times, but built without MPI: build it with make MPI=1", size);
#endif
    }
}

// The first thing in main. Rank 0 speaks: what another one prints is dropped, and its lines on stderr are kept
// back until it fails.
static void start_ranks(void) {
#ifdef USE_MPI
    int level;
    char machine[MPI_MAX_PROCESSOR_NAME] = "";
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level); // only the main thread talks
    MPI_Comm_rank(MPI_COMM_WORLD, &this_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &rank_count);
    MPI_Get_processor_name(machine, &level);
    if (this_rank > 0) {
        program_name = xprintf("train_gpt2: rank %d on %s", this_rank, machine);
        setvbuf(stderr, NULL, _IOFBF, 1 << 16);
        if (!freopen("/dev/null", "w", stdout)) die("/dev/null: %s", strerror(errno));
    }
#endif
    refuse_lonely_ranks();
}

#ifdef USE_MPI
static int final_status;

static void leave(int signal_number) {
    (void)signal_number;
    _exit(final_status);
}
#endif

// (all ranks) The last thing in main: a launcher that sees one rank leave with an error ends the others, so
// nobody leaves before all have saved. Some MPIs now and then hang in MPI_Finalize (MPICH with UCX before 4.2,
// over TCP): after ten seconds the program ends all the same.
static int end_ranks(int status) {
#ifdef USE_MPI
    final_status = status;
    signal(SIGALRM, leave);
    if (this_rank > 0) dup2(STDOUT_FILENO, STDERR_FILENO); // nothing failed: drops the lines kept back
    fflush(NULL);
    MPI_Barrier(MPI_COMM_WORLD);
    alarm(10);
    MPI_Finalize();
#endif
    return status;
}

// A rank that fails ends all: the others would wait for it for ever. What is wrong on all of them, such as an
// option, is said once: rank 0 comes first, and the others do not live to say it.
static void end_program(int status) {
#ifdef USE_MPI
    int running = 0;
    MPI_Initialized(&running);
    if (rank_count > 1) {
        if (this_rank > 0) usleep(300000);
        fflush(stderr);
        usleep(100000); // the launcher hands the line on, before it ends all
        MPI_Abort(MPI_COMM_WORLD, status);
    }
    if (running) MPI_Finalize();
#endif
    exit(status);
}

// ---- evaluation ----

// The settings of a run, as section 16 reads them from the command line.
typedef struct {
    const char *init, *tokenizer, *train, *out, *predictions, *warmup_steps, *prompt, *prompts, *stop;
    double val_fraction, epochs, learning_rate, final_lr, weight_decay, beta1, beta2, epsilon, max_grad_norm;
    double dropout, temperature, top_p, repetition_penalty;
    long n_layer, n_head, n_embd, n_positions, batch_size, seq_len, accumulate, steps;
    long val_every, val_batches, sample_every, sample_tokens, save_every, keep, patience;
    long generate, samples, top_k, threads, seed;
    long schedule, matmul, precision, sum_precision; // numbers of their choices
    Patterns no_decay, freeze, val, lora_target;
    long lora_rank;
    double lora_alpha;
    bool resume, overfit, eval, plan, find_rate, plain, recompute, quiet, help, chat, answer_only;
} Options;

// What --predictions writes.
typedef struct {
    FILE *file;
    Cache cache;      // of the text that is generated
    size_t different; // examples whose text says something else than their exact match
} Predictions;

// What a run is made of.
typedef struct {
    const Options *options;
    Patterns saved_options; // for checkpoints: the options that are not the default
    Model *model;
    Tokenizer *tokenizer; // NULL when there is none
    KeptFiles kept;       // what is written back as it was read
    char *base;           // with LoRA: the folder of the model that the adapters belong to
    Ids ends;             // a text ends at each of these ids
    Dataset *train, *val; // val may be NULL
    Activations activations;
    long warmup, steps_per_epoch;
    double started;           // on the clock of now(), less the time that was spent before a resume
    FILE *log;                // OUT/log.csv
    Predictions *predictions; // NULL: only figures are wanted
    Batch *batches;           // (--accumulate) of the update that is taken
    size_t *order;            // of the examples in epoch order_epoch; NULL: in none yet
    long order_epoch;
    double shown, seconds_per_step; // when the progress line was last written, and what it goes by
    double updating, processor;     // since watch_threads spoke or began anew: seconds of updates, and of all
                                    // threads together in them
    double accuracy;                // of the last update
    long saved_step;                // the step of the newest checkpoint
    bool unsaved;                   // something happened that it does not know of
    // What a checkpoint remembers:
    long step;             // updates done
    double best_loss;      // INFINITY before the first evaluation
    long best_step, stale; // stale: evaluations since the best one
    long evaluated_step;   // the last step that was evaluated, -1 for none
} Run;

typedef struct {
    double loss;     // mean over scored tokens
    double accuracy; // share of scored tokens whose logit was the highest
    double exact;    // share of examples with all scored tokens right: greedy generation would give them
    size_t targets, examples;
    size_t prompted; // the same examples, if exact match makes sense there; else 0
} Evaluation;

static int agreed_signal = 0; // the stop_signal of some rank: all ranks know of it and act on it

static void remember_signal(int signal_number) { stop_signal = signal_number; }

// (all ranks) A signal to one rank stops all of them, at the same step.
static void agree_on_stop(void) { agreed_signal = (int)largest_over_ranks(stop_signal); }

static bool is_ignored(int signal_number) {
    struct sigaction action;
    return sigaction(signal_number, NULL, &action) == 0 && action.sa_handler == SIG_IGN;
}

// From now on this signal is only remembered. With SA_RESTART a write that it interrupts goes on afterwards.
static void catch_signal(int signal_number, int flags) {
    const struct sigaction action = {.sa_handler = remember_signal, .sa_flags = flags | SA_RESTART};
    sigaction(signal_number, &action, NULL);
}

// From here on a signal does not end the program at once: the training loop finishes its step and saves. A
// second ^C (SIGINT) or SIGTERM ends it at once. SIGHUP (the terminal or the ssh connection is gone) and
// SIGPIPE (the reader of our output is gone) may come again and change nothing, as may SIGUSR1, by which batch
// systems say that time is nearly up. A signal that was ignored when the program began, as nohup does with
// SIGHUP, stays ignored; SIGPIPE is always caught.
static void catch_signals(void) {
    static const struct {
        int number, flags;
    } caught[] = {{SIGINT, SA_RESETHAND}, {SIGTERM, SA_RESETHAND}, {SIGHUP, 0}, {SIGPIPE, 0}, {SIGUSR1, 0}};
    for (int i = 0; i < 5; i++)
        if (!is_ignored(caught[i].number) || caught[i].number == SIGPIPE)
            catch_signal(caught[i].number, caught[i].flags);
}

// Returns a tensor that has a weight or moment which is not a finite number, or NULL. (0 · x is 0 for all
// finite x, else NaN: so this is one fast sum.)
static const Tensor *find_not_finite(const Model *model) {
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        const float *const arrays[] = {tensor->value, tensor->exp_avg, tensor->exp_avg_sq};
        for (int a = 0; a < 3 && arrays[a]; a++) {
            const float *x = arrays[a];
            float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
            for (size_t j = 0; j < tensor->size; j++) sum += 0 * x[j];
            if (sum != 0) return tensor;
        }
    }
    return NULL;
}

// Writes text as a JSON string: bytes that are not UTF-8, such as a part of a character, become U+FFFD.
static void write_json_text(FILE *file, const Text *text) {
    Text valid = {0};
    for (size_t at = 0, length; at < text->size; at += length ? length : 1) {
        unsigned code;
        length = (size_t)utf8_read(text->data + at, text->size - at, &code);
        text_append(&valid, length ? text->data + at : "\xef\xbf\xbd", length ? length : 3);
    }
    json_write_string(file, valid.data ? valid.data : "", valid.size);
    free(valid.data);
}

// What the model itself writes behind the prompt: always the likeliest token, up to `most` of them.
static Sample answer_greedily(const Run *run, Cache *cache, const Question *q, size_t most) {
    const Sampling greedy = {.top_p = 1, .repetition_penalty = 1, .silent = true};
    Sample answer = {0};
    cache->past = 0;
    continue_prompt(run->model, run->tokenizer, &q->prompt, (int)most, cache, &run->ends, &greedy, &answer);
    return answer;
}

// Writes the line of one example: a prompt and its answers, or a text. Its tokens have this mean loss; `exact`:
// all that are scored were the likeliest behind the right ones before them. Then greedy generation gives the
// same text, unless two logits are so near that rounding decides: such examples are counted.
static void write_prediction(Run *run, const Example *example, double loss, bool exact) {
    Predictions *p = run->predictions;
    Question q = question_of(run->val, example, run->tokenizer);
    fprintf(p->file, q.has_prompt ? "{\"prompt\": " : "{\"text\": ");
    write_json_text(p->file, q.has_prompt ? &q.asked : &q.expected);
    if (q.has_prompt) {
        const size_t size = q.answer.size, tokens = (size_t)run->options->sample_tokens;
        Sample answer = answer_greedily(run, &p->cache, &q, size >= tokens ? size + 1 : tokens);
        bool same = (q.ends ? answer.ids.size == size : answer.ids.size >= size) &&
                    memcmp(answer.ids.data, q.answer.data, size * sizeof(int)) == 0;
        fprintf(p->file, ", \"completion\": ");
        write_json_text(p->file, &q.expected);
        fprintf(p->file, ", \"prediction\": ");
        write_json_text(p->file, &answer.text);
        p->different += q.one_stretch && same != exact;
        sample_free(&answer);
    }
    fprintf(p->file, ", \"loss\": %.9g, \"exact_match\": %s}\n", loss, exact ? "true" : "false");
    question_free(&q);
}

// (all ranks) Mean loss, accuracy and exact match over run->val, or its first --val-batches batches. Each rank
// takes a share of the examples.
static Evaluation evaluate(Run *run) {
    const Options *options = run->options;
    Evaluation result = {0};
    Batch batch = {0};
    double loss = 0;
    size_t hits = 0, exact = 0, end = run->val->count, B = (size_t)options->batch_size;
    if (options->val_batches > 0 && (size_t)options->val_batches < (end + B - 1) / B)
        end = (size_t)options->val_batches * B;
    need_same_model(run->model);
    size_t *share, count = take_share(NULL, 0, end, &share);
    for (size_t begin = 0; begin < count && !stop_signal; begin += B) {
        dataset_batch(run->val, share, begin, smaller(B, count - begin), &batch);
        Activations *a = &run->activations;
        activations_reserve(a, run->model, batch.rows, KEEP_NOTHING);
        model_forward(run->model, a, &batch, NULL, (Dropout){0});
        loss += classifier(run->model, a, &batch, false, 0, false);
        result.targets += (size_t)batch.targets;
        for (int s = 0, i = 0; s < batch.sequences; s++) {
            const Example *example = &run->val->examples[share[begin + (size_t)s]];
            bool all = true;
            double own = 0;
            for (; i < batch.targets && a->scored[i] < batch.first_row[s + 1]; i++) {
                hits += a->correct[i];
                all = all && a->correct[i];
                own += a->loss[i];
            }
            exact += all;
            result.examples++;
            if (run->predictions) write_prediction(run, example, own / fmax(1, example->targets), all);
        }
    }
    batch_free(&batch);
    free(share);
    check_mapped_files();
    agree_on_stop();
    loss = sum_over_ranks(loss);
    result.targets = (size_t)sum_over_ranks((double)result.targets);
    result.examples = (size_t)sum_over_ranks((double)result.examples);
    if (!isfinite(loss)) {
        const Tensor *tensor = find_not_finite(run->model);
        die("%s: the loss is not finite%s%s", run->val->path, tensor ? ", nor are all values of " : "",
            tensor ? tensor->name : "");
    }
    double targets = result.targets ? (double)result.targets : 1;
    result.loss = loss / targets;
    result.accuracy = sum_over_ranks((double)hits) / targets;
    result.exact = sum_over_ranks((double)exact) / (result.examples ? (double)result.examples : 1);
    result.prompted = run->val->prompts ? result.examples : 0;
    return result;
}

// "1:02:03".
static const char *clock_time(double seconds, char text[32]) {
    long s = (long)(seconds + 0.5);
    snprintf(text, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    return text;
}

// On a terminal the line is written over the one before, cut or filled with blanks to the window's width;
// nothing but a carriage return is asked of the terminal. In a pipe each line stands.
static void show_progress(const char *line, bool on_terminal) {
    struct winsize window = {0};
    int width =
        on_terminal && ioctl(1, TIOCGWINSZ, &window) == 0 && window.ws_col > 1 ? window.ws_col - 1 : 79;
    if (on_terminal)
        printf("\r%-*.*s", width, width, line);
    else
        printf("%s\n", line);
    progress_line_open = on_terminal;
    fflush(stdout);
}

static void end_progress(void) {
    if (progress_line_open) putchar('\n');
    progress_line_open = false;
}

// The learning rate of update `step` = 0, 1, ...
static double rate_of(const Run *run, long step) {
    const Options *o = run->options;
    return o->learning_rate *
           schedule_factor((Schedule)o->schedule, step, run->warmup, o->steps, o->final_lr);
}

static double epoch_of(const Run *run, long step) { return (double)step / (double)run->steps_per_epoch; }

// ---- log.csv ----

// Opens OUT/log.csv and takes OUT for this process alone, by a lock on that file: two runs that write
// checkpoints with the same names would destroy each other's work. The system releases the lock when the
// process ends, in whatever way. When another process has it, this one ends with a line that names it.
// Without the file returns NULL, or makes it if `create`.
static FILE *lock_log(const char *out, bool create) {
    const char *path = path_of("%s/log.csv", out);
    int descriptor = open(path, O_RDWR | O_APPEND | (create ? O_CREAT : 0), 0666);
    if (descriptor < 0 && (errno == ENOENT || errno == ENOTDIR) && !create) return NULL;
    FILE *log = descriptor < 0 ? NULL : fdopen(descriptor, "a+");
    if (!log) die("%s: cannot be opened: %s", path, strerror(errno));
    const struct flock wanted = {.l_type = F_WRLCK, .l_whence = SEEK_SET}; // the whole file
    while (fcntl(descriptor, F_SETLK, &wanted) != 0) {
        if (errno != EACCES && errno != EAGAIN) { // some network file systems have no locks
            warn("%s: cannot be locked (%s): see to it that no other run uses this --out", path,
                 strerror(errno));
            break;
        }
        struct flock holder = wanted;
        if (fcntl(descriptor, F_GETLK, &holder) == 0 && holder.l_type == F_UNLCK)
            continue; // it ended just now
        die("%s: process %ld is training there; wait for its end, or choose another --out", out,
            (long)holder.l_pid);
    }
    return log;
}

// Appends to log.csv. Each line goes to the system at once, so that a process that is killed loses none.
static void __attribute__((format(printf, 2, 3))) write_log(const Run *run, const char *format, ...) {
    va_list arguments;
    if (this_rank > 0) return;
    va_start(arguments, format);
    if (vfprintf(run->log, format, arguments) < 0 || fflush(run->log) != 0)
        die("%s/log.csv: could not be written: %s", run->options->out, strerror(errno));
    va_end(arguments);
}

// Takes off the lines of an earlier run, or when resumed what its checkpoint does not know of.
static void begin_log(const Run *run) {
    Text old = {0};
    if (this_rank > 0) return;
    rewind(run->log);
    if (run->step > 0) read_stream(&old, run->log, "log.csv");
    const char *at = old.data, *line;
    size_t length, kept = 0; // bytes of the lines that stay: whole ones, in order
    while (old.size > 0 && next_line(&at, old.data + old.size, &line, &length) && at[-1] == '\n') {
        bool evaluation = memmem(line, length, ",val,", 5) != NULL;
        long step = isdigit((unsigned char)*line) ? atol(line) : 0; // 0: the header
        if (step > (evaluation ? run->evaluated_step : run->step)) break;
        kept = (size_t)(at - old.data);
    }
    free(old.data);
    if (ftruncate(fileno(run->log), (off_t)kept) != 0 || fseek(run->log, 0, SEEK_END) != 0)
        die("%s/log.csv: cannot be shortened: %s", run->options->out, strerror(errno));
    if (kept == 0)
        write_log(run, "step,epoch,split,loss,accuracy,learning_rate,grad_norm,tokens_per_second,seconds,"
                       "exact_match\n");
}

// ---- saving ----

// Writes what training needs to go on, beside weights and moments.
static void save_trainer_state(const Run *run, const char *folder) {
    char *state = NULL, best[32] = "null"; // JSON has no infinity
    size_t size;
    FILE *file = open_memstream(&state, &size);
    if (!file) die("out of memory for %s/trainer_state.json", folder);
    if (isfinite(run->best_loss)) snprintf(best, sizeof best, "%.17g", run->best_loss);
    fprintf(file,
            "{\n  \"step\": %ld,\n  \"epoch\": %.9g,\n  \"best_step\": %ld,\n  \"best_loss\": %s,\n"
            "  \"stale\": %ld,\n  \"evaluated_step\": %ld,\n  \"seconds\": %.3f,\n  \"options\": [",
            run->step, epoch_of(run, run->step), run->best_step, best, run->stale, run->evaluated_step,
            now() - run->started);
    for (size_t i = 0; i < run->saved_options.size; i++) {
        const char *option = run->saved_options.items[i];
        fputs(i ? ", " : "", file);
        json_write_string(file, option, strlen(option));
    }
    fprintf(file, "]\n}\n");
    if (fclose(file) != 0) die("out of memory for %s/trainer_state.json", folder);
    save_text(folder, "trainer_state.json", state);
}

// Deletes checkpoints that are neither among the --keep newest nor the best.
static void prune_checkpoints(const Run *run) {
    size_t count;
    long *steps = list_checkpoints(run->options->out, &count);
    for (size_t i = 0; i + (size_t)run->options->keep < count; i++)
        if (steps[i] != run->best_step) remove_checkpoint(run->options->out, steps[i]);
    free(steps);
}

// (all ranks) Saves everything that is needed to go on. The order of what reaches the disk is: the log, the new
// checkpoint, its name, and only then are older ones deleted.
static void save_checkpoint(Run *run) {
    const char *out = run->options->out;
    const Tensor *bad = find_not_finite(run->model);
    if (bad)
        die("step %ld: %s is not finite, so it is not saved; the last good checkpoint stays. A smaller "
            "--learning-rate may help",
            run->step, bad->name);
    check_mapped_files();
    need_same_model(run->model);
    const bool only_state = run->step == run->saved_step; // an evaluation has been made up for since
    run->saved_step = run->step;
    run->unsaved = false;
    if (this_rank > 0) return;
    if (!sync_to_disk(fileno(run->log)))
        die("%s/log.csv: could not be brought to the disk: %s", out, strerror(errno));
    char *path = xstrdup(checkpoint_path(out, run->step)), *temporary = xprintf("%s.tmp", path);
    if (only_state) {
        save_trainer_state(run, path);
    } else {
        remove_folder(temporary);
        model_save(run->model, run->tokenizer, &run->kept, run->base, temporary);
        model_write_tensors(run->model, path_of("%s/optimizer.safetensors", temporary), true);
        save_trainer_state(run, temporary);
        rename_for_good(temporary, path);
    }
    free(path);
    free(temporary);
    prune_checkpoints(run);
}

// A whole number out of trainer_state.json, from `least` to `most`.
static long state_number(const Json *json, const char *key, long least, long most, const char *path) {
    double value = json_number(json, key, NAN, path);
    if (!(value >= (double)least && value <= (double)most) || value != floor(value))
        die("%s: %s must be a whole number from %ld to %ld", path, key, least, most);
    return (long)value;
}

// Goes on from the checkpoint `folder` of update `step`, whose weights the model already has.
static void load_trainer_state(Run *run, const char *folder, long step) {
    const char *path = path_of("%s/trainer_state.json", folder);
    model_load_moments(run->model, path_of("%s/optimizer.safetensors", folder));
    Json *json = json_read_file(path);
    run->step = run->saved_step = state_number(json, "step", step, step, path);
    run->best_step = state_number(json, "best_step", 0, step, path);
    run->stale = state_number(json, "stale", 0, step, path);
    run->evaluated_step = state_number(json, "evaluated_step", -1, step, path);
    run->best_loss = json_number(json, "best_loss", INFINITY, path);
    double seconds = json_number(json, "seconds", 0, path);
    if (!(seconds >= 0 && seconds < 1e12)) die("%s: seconds must be from 0 to 1e12", path);
    run->started -= seconds;
    json_free(json);
}

// OUT itself becomes the model folder of the best state, or of the last one when nothing was evaluated.
static void save_result(Run *run) {
    const char *out = run->options->out;
    char text[32];
    if (this_rank > 0) return;
    bool judged = isfinite(run->best_loss), other = judged && run->best_step != run->step;
    Model *model = other ? model_load(checkpoint_path(out, run->best_step)) : run->model;
    const Tensor *bad = find_not_finite(model);
    if (bad) die("%s is not finite: the model is not saved", bad->name);
    check_mapped_files();
    char *temporary = xprintf("%s/model.tmp", out), *merged = xprintf("%s/merged", out);
    const bool adapter = model->lora_rank > 0;
    remove_folder(temporary);
    model_save(model, run->tokenizer, &run->kept, run->base, temporary);
    if (adapter || is_adapter(out)) withdraw_model(merged); // an earlier run's does not belong to this one
    publish_model(out);
    if (adapter) {
        activations_free(&run->activations); // merging copies each matrix that it changes
        model_merge(model);
        make_folder(merged);
        model_save(model, run->tokenizer, &run->kept, NULL, path_of("%s/model.tmp", merged));
        publish_model(merged);
    }
    if (other) model_free(model);
    free(temporary);
    free(merged);
    printf("%s saved in %s", adapter ? "adapter" : "model", out);
    if (adapter) printf(", with its model in %s/merged", out);
    if (judged) printf(" (step %ld, val loss %.4f)", run->best_step, run->best_loss);
    printf(" after %s\n", clock_time(now() - run->started, text));
}

// ---- what the loop does ----

// The token from which a text begins when there is no prompt: the end of the text before it, or 0 where the
// model has no such token.
static int first_token(const Run *run) {
    int end = run->tokenizer->end_of_text;
    return end >= 0 && end < run->model->config.vocab_size ? end : 0;
}

// Shows a held-out prompt, another one each time, with the answer that is expected and the greedy one. Returns
// false if the example whose turn it is has no prompt.
static bool print_answer(const Run *run) {
    if (!run->val || !run->val->prompts || !run->tokenizer) return false;
    const size_t index = (size_t)(run->step / run->options->sample_every - 1) % run->val->count;
    Question q = question_of(run->val, &run->val->examples[index], run->tokenizer);
    const bool has_prompt = q.has_prompt;
    if (has_prompt) {
        Cache cache = cache_new(run->model, 1);
        Sample answer = answer_greedily(run, &cache, &q, (size_t)run->options->sample_tokens);
        const Text *texts[] = {&q.asked, &q.expected, &answer.text};
        cache_free(&cache);
        end_progress();
        printf("--- held-out example %zu at step %ld ---", index + 1, run->step);
        for (int i = 0; i < 3; i++) {
            printf(i == 0 ? "\nprompt    " : i == 1 ? "\nexpected  " : "\ngiven     ");
            write_json_text(stdout, texts[i]);
        }
        printf("\n---\n");
        sample_free(&answer);
    }
    question_free(&q);
    return has_prompt;
}

// Shows what the model writes at the start of a text.
static void print_sample(const Run *run) {
    if (!run->tokenizer || this_rank > 0 || print_answer(run)) return;
    Ids prompt = {0};
    Sample output = {0};
    const Sampling sampling = {.temperature = 1,
                               .top_p = 1,
                               .seed = (uint64_t)run->options->seed + (uint64_t)run->step,
                               .repetition_penalty = 1};
    ids_push(&prompt, first_token(run));
    end_progress();
    printf("--- sample at step %ld ---\n", run->step);
    generate(run->model, run->tokenizer, &prompt, (int)run->options->sample_tokens, 1, &run->ends, &sampling,
             &output);
    printf("\n---\n");
    free(prompt.data);
    sample_free(&output);
}

// Evaluates and reports. Returns whether this is the best loss so far; step 0 is only reported. An evaluation
// that a signal cut short counts for nothing: --resume does it again.
static bool evaluate_and_judge(Run *run) {
    Evaluation e = evaluate(run);
    if (agreed_signal) return false;
    end_progress();
    printf("step %ld/%ld  val loss %.4f  perplexity %.2f  accuracy %.2f %%", run->step, run->options->steps,
           e.loss, exp(e.loss), 100 * e.accuracy);
    if (run->val->prompts) printf("  exact match %.2f %% of %zu", 100 * e.exact, e.examples);
    printf("\n");
    fflush(stdout);
    char exact[32] = ""; // windows of a text have none
    if (run->val->prompts) snprintf(exact, sizeof exact, "%.6g", e.exact);
    write_log(run, "%ld,%.6g,val,%.9g,%.6g,%.9g,,,%.3f,%s\n", run->step, epoch_of(run, run->step), e.loss,
              e.accuracy, run->step > 0 ? rate_of(run, run->step - 1) : 0, now() - run->started, exact);
    run->evaluated_step = run->step;
    if (run->step == 0) return false;
    run->unsaved = true;
    bool better = e.loss < run->best_loss;
    run->stale = better ? 0 : run->stale + 1;
    if (better) {
        run->best_loss = e.loss;
        run->best_step = run->step;
    }
    return better;
}

// Gives each row of a batch its number in the update, which dropout goes by: it is the same in whichever
// batch or rank an example is. Sequence 0 of the batch is example `first` of this rank's share.
static void number_rows(Batch *batch, size_t first, long seq_len) {
    batch->number = xrealloc(batch->number, (size_t)batch->rows * sizeof *batch->number);
    for (int s = 0; s < batch->sequences; s++) {
        size_t example = (first + (size_t)s) * (size_t)rank_count + (size_t)this_rank;
        for (int r = batch->first_row[s]; r < batch->first_row[s + 1]; r++)
            batch->number[r] = example * (size_t)seq_len + (size_t)(r - batch->first_row[s]);
    }
}

// Packs this rank's share of the next update's examples into run->batches, at most --accumulate of them;
// returns how many. When there is no share, one batch without rows stands for it.
static long next_batches(Run *run) {
    const size_t B = (size_t)run->options->batch_size, group = (size_t)run->options->accumulate * B;
    long step = run->options->overfit ? 0 : run->step, epoch = step / run->steps_per_epoch;
    if (!run->order || epoch != run->order_epoch) {
        free(run->order);
        run->order = dataset_order(run->train, (uint64_t)run->options->seed, epoch);
        run->order_epoch = epoch;
    }
    const size_t begin = (size_t)(step % run->steps_per_epoch) * group;
    size_t *share, size = take_share(run->order, begin, smaller(begin + group, run->train->count), &share);
    long count = 0;
    for (size_t first = 0; first < size || count == 0; first += B) {
        Batch *batch = &run->batches[count++];
        dataset_batch(run->train, share, first, smaller(B, size - first), batch);
        number_rows(batch, first, run->options->seq_len);
    }
    free(share);
    return count;
}

// Shows an update on the progress line, or about forty lines of a run in a pipe. What matters most stands
// first, since a narrow window cuts the line.
static void show_update(Run *run, const Update *update, double seconds) {
    const long steps = run->options->steps, every = steps / 40 > 0 ? steps / 40 : 1;
    const bool on_terminal = isatty(1);
    run->seconds_per_step =
        run->seconds_per_step == 0 ? seconds : 0.9 * run->seconds_per_step + 0.1 * seconds;
    bool due = on_terminal ? now() - run->shown > 0.2 : run->step % every == 0;
    if (run->options->quiet || !(due || run->step == steps)) return;
    run->shown = now();
    char line[256], left[32];
    clock_time(run->seconds_per_step * (double)(steps - run->step), left);
    snprintf(line, sizeof line,
             "step %ld/%ld  loss %.4f  %s left  epoch %.2f  lr %.2e  norm %.3f  %.0f tok/s", run->step, steps,
             update->loss, left, epoch_of(run, run->step), update->learning_rate, update->norm,
             (double)update->rows / seconds);
    show_progress(line, on_terminal);
}

// Threads wait for one another. When other programs keep the cores busy, a thread waits for a core, all others
// wait for it, and fewer threads may be many times faster. Says so once, after ten seconds of updates in which the
// threads had a core for less than half of the time. (Threads that spin while they wait use their core.)
static void watch_threads(Run *run, double seconds, double processor) {
    const int threads = omp_get_max_threads();
    run->updating += seconds;
    run->processor += processor;
    // With several ranks, waiting for the others would look the same. -INFINITY: it has been said.
    if (threads == 1 || rank_count > 1 || run->updating < 10) return;
    const double cores = run->processor / run->updating;
    const bool busy = cores < 0.5 * threads;
    if (busy)
        warn("%d threads have only %.1f cores, since other programs use them, and wait for one another: "
             "--threads %d may be faster",
             threads, cores, cores < 2 ? 1 : (int)cores);
    run->updating = busy ? -INFINITY : 0;
    run->processor = 0;
}

// Takes the next update: forward and backward over its examples, then AdamW.
static Update next_update(Run *run, const Hyperparameters *h, double learning_rate) {
    long count = next_batches(run);
    return take_update(run->model, &run->activations, run->batches, count, h, run->step++, learning_rate);
}

// Takes the next update, logs and shows it. Ends the program when it is not finite.
static void train_one_step(Run *run, const Hyperparameters *h) {
    const double begin = now(), processor = seconds_on(CLOCK_PROCESS_CPUTIME_ID);
    Update update = next_update(run, h, rate_of(run, run->step));
    if (update.not_finite)
        die("step %ld: %s is not finite; the last good checkpoint stays. A smaller --learning-rate may help",
            run->step, update.not_finite);
    run->unsaved = true;
    if (update.targets == 0) {
        warn("step %ld: no token of this batch is scored, skipped", run->step);
        return;
    }
    const double seconds = now() - begin;
    watch_threads(run, seconds, seconds_on(CLOCK_PROCESS_CPUTIME_ID) - processor);
    update.rows = (size_t)sum_over_ranks((double)update.rows);
    run->accuracy = update.accuracy;
    write_log(run, "%ld,%.6g,train,%.9g,%.6g,%.9g,%.9g,%.1f,%.3f,\n", run->step, epoch_of(run, run->step),
              update.loss, update.accuracy, update.learning_rate, update.norm, (double)update.rows / seconds,
              now() - run->started);
    show_update(run, &update, seconds);
}

// Says how training ended, and saves its result if there is one. Returns the program's exit status.
static int finish_training(Run *run) {
    const Options *options = run->options;
    end_progress();
    if (rank_count > 1 && !options->quiet)
        printf("sums of gradients took %.1f s of the updates' %.1f s, waiting for slower ranks included\n",
               summing, run->updating);
    if (agreed_signal) {
        bool saved = run->step > 0 && !options->overfit;
        printf("stopped at step %ld of %ld", run->step, options->steps);
        printf(saved ? ", saved in %s; --resume goes on from there\n" : "\n", options->out);
        return 128 + agreed_signal;
    }
    if (!options->overfit) {
        save_result(run);
        return 0;
    }
    bool passed = run->accuracy == 1;
    printf("overfit one batch: training accuracy %.2f %%, %s\n", 100 * run->accuracy,
           passed ? "passed"
                  : "NOT passed: 100 % expected; more --steps or a higher --learning-rate may help");
    return passed ? 0 : 1;
}

static Hyperparameters hyperparameters_of(const Options *o) {
    return (Hyperparameters){.beta1 = o->beta1,
                             .beta2 = o->beta2,
                             .epsilon = o->epsilon,
                             .weight_decay = o->weight_decay,
                             .max_grad_norm = o->max_grad_norm,
                             .dropout = (float)o->dropout,
                             .seed = (uint64_t)o->seed,
                             .keep = o->recompute ? KEEP_INPUTS : KEEP_ALL};
}

static bool is_due(long step, long every) { return every > 0 && step % every == 0; }

// No --patience left for another try? Then a resumed run ends at once, too.
static bool is_hopeless(const Run *run) {
    return run->options->patience > 0 && run->stale >= run->options->patience;
}

// The training loop, from run->step to --steps, or until a signal or --patience ends it. Each turn evaluates,
// shows a sample and saves, each if it is due, and then takes one update. Returns the program's exit status.
static int train(Run *run) {
    const Options *o = run->options;
    const Hyperparameters h = hyperparameters_of(o);
    catch_signals();
    begin_log(run);
    run->batches = xcalloc((size_t)o->accumulate, sizeof *run->batches);
    for (;; train_one_step(run, &h)) {
        agree_on_stop();
        const bool last = run->step >= o->steps;
        bool save = is_due(run->step, o->save_every) || run->step == run->saved_step;
        if (run->val && (last || is_due(run->step, o->val_every)) && run->evaluated_step != run->step)
            save = evaluate_and_judge(run) || save;
        const bool ending = last || is_hopeless(run) || agreed_signal;
        if (run->step > 0 && is_due(run->step, o->sample_every) && !agreed_signal) print_sample(run);
        if (run->unsaved && (save || ending) && !o->overfit) save_checkpoint(run);
        if (ending) break;
    }
    if (is_hopeless(run)) {
        end_progress();
        printf("no better loss in %ld evaluations: stopped (--patience)\n", run->stale);
    }
    return finish_training(run);
}

// ---- the finder of learning rates ----

typedef struct {
    long step;
    double rate, loss; // the loss before this rate was applied
} RatePoint;

// The mean loss of a point and up to four neighbours on each side.
static double smooth_loss(const RatePoint *points, long count, long at) {
    const long begin = at > 4 ? at - 4 : 0, end = at + 5 < count ? at + 5 : count;
    double sum = 0;
    for (long i = begin; i < end; i++) sum += points[i].loss;
    return sum / (double)(end - begin);
}

// Says which rate to take: a tenth of that at which the smoothed loss was lowest, where it still fell fast.
static void suggest_rate(const RatePoint *points, long count) {
    long best = 0;
    for (long i = 1; i < count; i++)
        if (smooth_loss(points, count, i) < smooth_loss(points, count, best)) best = i;
    const double rate = points[best].rate / 10;
    printf("lowest loss %.4f at rate %.2g, %.4f at the beginning (means of nine updates)\n",
           smooth_loss(points, count, best), points[best].rate, smooth_loss(points, count, 0));
    if (rate < points[0].rate)
        printf("no suggestion: at no rate did the loss fall\n");
    else
        printf("suggestion, a tenth of that rate: --learning-rate %.1g\n", rate);
}

// Writes the curve and says what follows from it.
static void report_rates(const Run *run, const RatePoint *points, long count) {
    const char *path = xprintf("%s/find-rate.csv", run->options->out);
    FILE *file = create_file(path);
    fprintf(file, "step,learning_rate,loss\n");
    for (const RatePoint *p = points; p < points + count; p++)
        fprintf(file, "%ld,%.9g,%.9g\n", p->step, p->rate, p->loss);
    finish_file(file, path);
    suggest_rate(points, count);
    printf("the curve is in %s\n", path);
}

// --find-rate: takes --steps updates as training would, but with a rate that rises from 1e-7 to 1, each time by
// the same factor. Too high a rate ends the search: the loss doubles (mean of nine updates) or is not finite.
// Only the curve is written; the model is forgotten.
static int find_rate(Run *run) {
    const long steps = run->options->steps;
    const Hyperparameters h = hyperparameters_of(run->options);
    RatePoint *points = xcalloc((size_t)steps, sizeof *points);
    const char *problem = NULL;
    long count = 0;
    run->batches = xcalloc((size_t)run->options->accumulate, sizeof *run->batches);
    while (run->step < steps && !problem) {
        const double begin = now(), part = steps > 1 ? (double)run->step / (double)(steps - 1) : 0;
        const Update update = next_update(run, &h, 1e-7 * pow(1e7, part));
        if (update.not_finite) problem = xprintf("%s is not finite", update.not_finite);
        if (update.not_finite || update.targets == 0) continue;
        points[count++] = (RatePoint){run->step, update.learning_rate, update.loss};
        if (smooth_loss(points, count, count - 5) > 2 * smooth_loss(points, count, 4))
            problem = "the loss has doubled";
        show_update(run, &update, now() - begin);
    }
    end_progress();
    check_mapped_files();
    if (count == 0) die("--find-rate: nothing was learned: %s", problem ? problem : "no token is scored");
    if (problem) printf("stopped after rate %.2g: %s\n", points[count - 1].rate, problem);
    report_rates(run, points, count);
    free(points);
    return 0;
}

// =====================================================================================================
// 16. Command line
// =====================================================================================================
// One table makes the parser, --help, defaults and range checks, and the settings that a
// checkpoint remembers.

typedef enum { FLAG, COUNT, REAL, WORD, CHOICE, LIST } OptionKind;
// Where an option applies; NOT_SAVED: a checkpoint does not remember it; START: it only counts when a run
// begins; ONCE: given twice it is refused, since the user may believe that both count.
enum { TRAIN = 1, EVAL = 2, GENERATE = 4, CHAT = 8, ANY = 15, NOT_SAVED = 16, START = 32, ONCE = 64 };

typedef struct {
    const char *name;
    char letter;
    OptionKind kind;
    size_t field;        // where its value goes in Options
    const char *initial; // its default; for a number out of range, such as 0: depends on something else
    double least, most;  // for numbers
    int modes;
    const char *argument; // what --help calls it; for a CHOICE the words, separated by |
    const char *help;
} Option;

// clang-format off
#define FIELD(name) offsetof(Options, name)
static const Option option_table[] = {
    {.help = "Model and files"},
    {"init", 'e', WORD, FIELD(init), "d4", 0, 0, ANY | START, "WHAT", "model folder, or a size to start at random: d4 d6 d12 d24 d36 d48"},
    {"n-layer", 0, COUNT, FIELD(n_layer), "0", 1, 1000, TRAIN | START, "N", "layers of a random start (default: from the size)"},
    {"n-head", 0, COUNT, FIELD(n_head), "0", 1, 1 << 16, TRAIN | START, "N", "its attention heads (default: one for each 64 channels)"},
    {"n-embd", 0, COUNT, FIELD(n_embd), "0", 1, 1 << 16, TRAIN | START, "N", "its channels (default: from the size)"},
    {"n-positions", 0, COUNT, FIELD(n_positions), "0", 1, 1 << 20, TRAIN | START, "N", "its longest text in tokens (default: 1024)"},
    {"tokenizer", 0, WORD, FIELD(tokenizer), "", 0, 0, ANY | START, "WHAT", "folder with vocab.json + merges.txt, or a merges file (default: the model folder's)"},
    {"plain", 0, FLAG, FIELD(plain), "", 0, 0, ANY, NULL, "added tokens in text, <|endoftext|> among them, are ordinary text"},
    {"train", 'i', WORD, FIELD(train), "", 0, 0, TRAIN | ONCE, "PATH", ".txt, .jsonl or llm.c .bin; a quoted glob takes several"},
    {"val", 'j', LIST, FIELD(val), "none", 0, 0, TRAIN | EVAL, "PATH", "the same, to evaluate on; may be given several times (default: see the next one)"},
    {"val-fraction", 0, REAL, FIELD(val_fraction), "0.05", 0, 0.9, TRAIN, "X", "without --val, this part of --train is split off its end"},
    {"out", 'o', WORD, FIELD(out), "out", 0, 0, TRAIN | NOT_SAVED, "DIR", "checkpoints, log.csv and the final model"},
    {"resume", 'y', FLAG, FIELD(resume), "", 0, 0, TRAIN | NOT_SAVED, NULL, "go on from the newest checkpoint in --out, if there is one"},
    {.help = "Length of the run"},
    {"batch-size", 'b', COUNT, FIELD(batch_size), "4", 1, 1 << 20, TRAIN | EVAL, "N", "examples in a micro-batch"},
    {"seq-len", 't', COUNT, FIELD(seq_len), "0", 1, 1 << 20, TRAIN | EVAL, "N", "longest sequence (default: the model's positions, at most 1024)"},
    {"accumulate", 0, COUNT, FIELD(accumulate), "1", 1, 1 << 20, TRAIN, "N", "micro-batches in an update"},
    {"epochs", 0, REAL, FIELD(epochs), "3", 0, 1e6, TRAIN, "X", "how often the data is gone through"},
    {"steps", 'x', COUNT, FIELD(steps), "0", 1, 1e9, TRAIN, "N", "how many updates (default: from --epochs)"},
    {.help = "Optimizer and schedule"},
    {"learning-rate", 'l', REAL, FIELD(learning_rate), "5e-5", 0, 1e3, TRAIN, "X", "the highest rate, after warm-up"},
    {"warmup-steps", 'u', WORD, FIELD(warmup_steps), "", 0, 0, TRAIN, "W", "steps, 10% or 1ep (default: 1ep when fine-tuning for longer, else 10%)"},
    {"schedule", 'k', CHOICE, FIELD(schedule), "linear", 0, 0, TRAIN, "linear|cosine|constant", "how the rate falls after warm-up"},
    {"final-lr", 'q', REAL, FIELD(final_lr), "0", 0, 1, TRAIN, "F", "the rate never falls below this part of the highest"},
    {"weight-decay", 'c', REAL, FIELD(weight_decay), "0.01", 0, 1e3, TRAIN, "X", "AdamW's, on all tensors but those of --no-decay"},
    {"no-decay", 0, LIST, FIELD(no_decay), "bias|ln_.+weight|ln_.+bias", 0, 0, TRAIN, "REGEX", "tensors that do not decay; may be given several times, then in place of these"},
    {"freeze", 0, LIST, FIELD(freeze), "none", 0, 0, TRAIN, "REGEX", "tensors that stay as they are; may be given several times"},
    {"beta1", 0, REAL, FIELD(beta1), "0.9", 0, 0.999999, TRAIN, "X", "how slowly AdamW's average of the gradient changes"},
    {"beta2", 0, REAL, FIELD(beta2), "0.999", 0, 0.9999999, TRAIN, "X", "and that of its square"},
    {"epsilon", 0, REAL, FIELD(epsilon), "1e-8", 1e-30, 1, TRAIN, "X", "what AdamW adds to the root it divides by"},
    {"max-grad-norm", 0, REAL, FIELD(max_grad_norm), "1", 0, 1e30, TRAIN, "X", "gradients with a larger norm are scaled down to it; 0: never"},
    {"lora-rank", 0, COUNT, FIELD(lora_rank), "0", 1, 65536, TRAIN | START, "R", "train adapters of this rank beside frozen matrices (LoRA)"},
    {"lora-alpha", 0, REAL, FIELD(lora_alpha), "0", 1e-6, 1e6, TRAIN | START, "X", "their weight is alpha / rank (default: twice the rank)"},
    {"lora-target", 0, LIST, FIELD(lora_target), "attn.c_attn", 0, 0, TRAIN | START, "REGEX", "matrices that get one, of attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj; may be given several times"},
    {"dropout", 0, REAL, FIELD(dropout), "0", 0, 0.99, TRAIN, "X", "probability, at the places where GPT-2 has it"},
    {"overfit", 0, FLAG, FIELD(overfit), "", 0, 0, TRAIN, NULL, "train on the first batch only; must reach 100 % accuracy"},
    {.help = "Evaluation, samples, checkpoints"},
    {"val-every", 'v', COUNT, FIELD(val_every), "0", 1, 1e9, TRAIN, "N", "evaluate every N steps (default: 20 times a run)"},
    {"val-batches", 'm', COUNT, FIELD(val_batches), "0", 1, 1e9, TRAIN | EVAL, "N", "on so many batches (default: all)"},
    {"sample-every", 's', COUNT, FIELD(sample_every), "0", 1, 1e9, TRAIN, "N", "show a sample, or a held-out prompt with its answers, every N steps (default: never)"},
    {"sample-tokens", 'g', COUNT, FIELD(sample_tokens), "128", 1, 1e6, TRAIN | EVAL, "N", "its length, and that of a prediction, at most"},
    {"save-every", 'n', COUNT, FIELD(save_every), "0", 1, 1e9, TRAIN, "N", "save a checkpoint every N steps (default: at each evaluation)"},
    {"keep", 0, COUNT, FIELD(keep), "2", 1, 1e6, TRAIN, "N", "how many checkpoints stay, and the best one besides"},
    {"patience", 0, COUNT, FIELD(patience), "0", 1, 1e6, TRAIN, "N", "stop after N evaluations without a better loss (default: never)"},
    {.help = "Instead of training"},
    {"eval", 0, FLAG, FIELD(eval), "", 0, 0, EVAL | NOT_SAVED, NULL, "loss, perplexity, accuracy and exact match of --val"},
    {"predictions", 0, WORD, FIELD(predictions), "", 0, 0, EVAL | NOT_SAVED | ONCE, "FILE", "with --eval: a JSON line for each example: prompt, completion, prediction (greedy), loss, exact_match"},
    {"generate", 0, COUNT, FIELD(generate), "0", 1, 1e9, GENERATE | CHAT | NOT_SAVED, "N", "continue --prompt by up to N tokens"},
    {"prompt", 0, WORD, FIELD(prompt), "", 0, 0, GENERATE | NOT_SAVED | ONCE, "TEXT", "how the text begins; - reads standard input"},
    {"prompts", 0, WORD, FIELD(prompts), "", 0, 0, GENERATE | NOT_SAVED | ONCE, "FILE", "a prompt in each line; - reads standard input"},
    {"answer-only", 0, FLAG, FIELD(answer_only), "", 0, 0, GENERATE | NOT_SAVED, NULL, "print what follows the prompt without the prompt"},
    {"chat", 0, FLAG, FIELD(chat), "", 0, 0, CHAT | NOT_SAVED, NULL, "talk to --init, answers of up to --generate N tokens (default: a quarter of the context)"},
    {"temperature", 0, REAL, FIELD(temperature), "1", 0, 1e6, GENERATE | CHAT | NOT_SAVED, "X", "below 1: likely tokens more often; 0: always the most likely one"},
    {"top-k", 0, COUNT, FIELD(top_k), "0", 1, 1e9, GENERATE | CHAT | NOT_SAVED, "K", "draw only from the K most likely tokens (default: from all)"},
    {"top-p", 0, REAL, FIELD(top_p), "1", 0, 1, GENERATE | CHAT | NOT_SAVED, "P", "draw only from the most likely tokens that together have probability P"},
    {"repetition-penalty", 0, REAL, FIELD(repetition_penalty), "1", 1e-3, 1e3, GENERATE | CHAT | NOT_SAVED, "X", "above 1: tokens that the text has already are less likely, as in transformers"},
    {"samples", 0, COUNT, FIELD(samples), "1", 1, 10000, GENERATE | NOT_SAVED, "N", "how many, side by side"},
    {"stop", 0, WORD, FIELD(stop), "", 0, 0, GENERATE | CHAT | NOT_SAVED | ONCE, "TEXT", "a sample ends before this text"},
    {"plan", 0, FLAG, FIELD(plan), "", 0, 0, TRAIN | NOT_SAVED, NULL, "print tensors, memory, steps and schedule, then stop"},
    {"find-rate", 0, FLAG, FIELD(find_rate), "", 0, 0, TRAIN | NOT_SAVED, NULL, "try rates from 1e-7 to 1 in --steps updates (default: 100), suggest one, then stop; writes OUT/find-rate.csv alone"},
    {"help", 'h', FLAG, FIELD(help), "", 0, 0, ANY | NOT_SAVED, NULL, "this text"},
    {.help = "The machine"},
    {"threads", 0, COUNT, FIELD(threads), "0", 1, 1024, ANY | NOT_SAVED, "N", "default: OMP_NUM_THREADS, or one for each core"},
    {"seed", 0, COUNT, FIELD(seed), "1337", 0, 1e15, TRAIN | GENERATE, "N", "of initial values, shuffling, dropout and samples"},
    {"recompute", 0, FLAG, FIELD(recompute), "", 0, 0, TRAIN, NULL, "keep less for the backward pass: less memory, more time"},
    {"matmul", 0, CHOICE, FIELD(matmul), "auto", 0, 0, ANY, "auto|openblas|builtin", "auto: OpenBLAS, unless it cannot use this processor or its threads"},
    {"precision", 0, CHOICE, FIELD(precision), "float32", 0, 0, ANY, "float32|bfloat16", "of what products multiply; bfloat16 is faster where the processor has it"},
    {"sum-precision", 0, CHOICE, FIELD(sum_precision), "float32", 0, 0, TRAIN, "float32|bfloat16", "of gradients on their way between ranks (MPI); bfloat16 halves what is sent"},
    {"quiet", 0, FLAG, FIELD(quiet), "", 0, 0, ANY | NOT_SAVED, NULL, "no banner and no progress line"},
};
// clang-format on
enum { OPTION_COUNT = sizeof option_table / sizeof *option_table };
// Numbers of a CHOICE's words, as Schedule has them for --schedule; a test compares both with the table.
enum { AUTO_CHOICE, OPENBLAS_CHOICE, BUILTIN_CHOICE }; // of --matmul
enum { FLOAT32_CHOICE, BFLOAT16_CHOICE };              // of --precision and --sum-precision

static void add_pattern(Patterns *patterns, const char *item) {
    patterns->items = grow(patterns->items, patterns->size + 1, &patterns->capacity, sizeof *patterns->items);
    patterns->items[patterns->size++] = item;
}

// The word of a CHOICE that has this number, a copy; NULL when there are not so many.
static char *choice_word(const Option *option, long number) {
    char *words = xstrdup(option->argument), *word = strsep(&words, "|");
    while (word && number-- > 0) word = strsep(&words, "|");
    return word;
}

// Sets one option from its text, or ends the program with status 2. `again`: a LIST goes on.
static void set_option(Options *options, const Option *option, const char *text, bool again) {
    char *field = (char *)options + option->field, *end = NULL;
    if (option->kind == FLAG) {
        *(bool *)field = true;
    } else if (option->kind == WORD) {
        *(const char **)field = xstrdup(text);
    } else if (option->kind == CHOICE) {
        long number = 0;
        const char *word;
        while ((word = choice_word(option, number)) && strcmp(word, text) != 0) number++;
        if (!word) die_usage("--%s %s: say one of %s", option->name, text, option->argument);
        *(long *)field = number;
    } else if (option->kind == LIST) {
        if (!again) *(Patterns *)field = (Patterns){0};
        if (strcmp(text, "none") != 0) add_pattern((Patterns *)field, xstrdup(text));
    } else {
        errno = 0;
        double value = strtod(text, &end);
        bool whole = option->kind == COUNT, in_range = value >= option->least && value <= option->most;
        in_range = in_range || text == option->initial; // a default of 0 depends on something else
        if (end == text || *end || errno || !in_range || (whole && value != floor(value)))
            die_usage("--%s %s: a %snumber from %g to %g expected", option->name, text, whole ? "whole " : "",
                      option->least, option->most);
        if (whole)
            *(long *)field = (long)value;
        else
            *(double *)field = value;
    }
}

static void set_defaults(Options *options) {
    *options = (Options){0};
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++)
        if (option->name && option->kind != FLAG) set_option(options, option, option->initial, false);
}

// The items of a list side by side, a copy; "" when there are none.
static char *joined(const Patterns *list) {
    size_t length = 1;
    for (size_t i = 0; i < list->size; i++) length += strlen(list->items[i]) + 1;
    char *text = xmalloc(length), *end = text;
    *end = 0;
    for (size_t i = 0; i < list->size; i++) end += sprintf(end, "%s%s", i ? " " : "", list->items[i]);
    return text;
}

// The value of an option, as text that set_option() takes (but for a LIST, whose items stand side by side).
static char *option_text(const Options *options, const Option *option) {
    const char *field = (const char *)options + option->field;
    const Patterns *list = (const Patterns *)field;
    if (option->kind == FLAG) return xstrdup(*(const bool *)field ? "yes" : "no");
    if (option->kind == COUNT) return xprintf("%ld", *(const long *)field);
    if (option->kind == WORD) return xstrdup(*(const char *const *)field);
    if (option->kind == CHOICE) return choice_word(option, *(const long *)field);
    if (option->kind == LIST) return list->size ? joined(list) : xstrdup("none");
    for (int digits = 1;; digits++) { // the fewest that give the same number
        char *text = xprintf("%.*g", digits, *(const double *)field);
        if (digits == 17 || strtod(text, NULL) == *(const double *)field) return text;
        free(text);
    }
}

// What a checkpoint remembers: "--name=value" for each option that has another value than its default.
static Patterns options_to_save(const Options *options) {
    Patterns saved = {0};
    Options defaults;
    set_defaults(&defaults);
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++) {
        if (!option->name || option->modes & NOT_SAVED) continue;
        const char *text = option_text(options, option);
        const Patterns *list = (const Patterns *)((const char *)options + option->field);
        if (strcmp(text, option_text(&defaults, option)) == 0) continue;
        if (option->kind == FLAG)
            add_pattern(&saved, xprintf("--%s", option->name));
        else if (option->kind != LIST || list->size == 0)
            add_pattern(&saved, xprintf("--%s=%s", option->name, text));
        for (size_t i = 0; option->kind == LIST && i < list->size; i++)
            add_pattern(&saved, xprintf("--%s=%s", option->name, list->items[i]));
    }
    return saved;
}

// What differs from the options `before` of those that a checkpoint remembers and that have one of `modes`:
// "--steps 9 (was 5), --train b.txt (was a.txt)"; NULL when nothing does.
static char *changed_options(const Options *options, const Options *before, int modes) {
    char *changes = NULL;
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++) {
        if (!option->name || option->modes & NOT_SAVED || !(option->modes & modes)) continue;
        const char *text = option_text(options, option), *old = option_text(before, option);
        if (strcmp(text, old) != 0)
            changes = xprintf("%s%s--%s %s (was %s)", changes ? changes : "", changes ? ", " : "",
                              option->name, *text ? text : "''", *old ? old : "''");
    }
    return changes;
}

// The option of this name (its first `length` bytes) or letter, or NULL.
static const Option *find_option(const char *name, size_t length, char letter) {
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++)
        if (option->name && (name ? strncmp(option->name, name, length) == 0 && !option->name[length]
                                  : option->letter && option->letter == letter))
            return option;
    return NULL;
}

// How many letters must be added, taken away or changed to make one word of the other (Levenshtein distance).
static size_t edit_distance(const char *a, size_t length, const char *b) {
    size_t above[64], n = smaller(strlen(b), 63); // above[j]: from the letters of a so far to j letters of b
    for (size_t j = 0; j <= n; j++) above[j] = j;
    for (size_t i = 1; i <= length; i++)
        for (size_t j = 1, diagonal = above[0]++, upper; j <= n; j++, diagonal = upper) {
            upper = above[j];
            above[j] = smaller(smaller(above[j], above[j - 1]) + 1, diagonal + (a[i - 1] != b[j - 1]));
        }
    return above[n];
}

// Ends the program because there is no such option; names the nearest one, if one is near.
static void __attribute__((noreturn)) refuse_option(const char *word) {
    const char *name = word + 2, *nearest = NULL;
    const size_t length = strcspn(name, "=");
    size_t best = length / 3 + 2; // so many letters are too many
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++) {
        size_t distance = option->name ? edit_distance(name, length, option->name) : SIZE_MAX;
        if (distance < best) best = distance, nearest = option->name;
    }
    if (nearest) die_usage("unknown option %s; the nearest is --%s, --help lists all", word, nearest);
    die_usage("unknown option %s; --help lists all", word);
}

// Ends the program because a word is no option where one must stand.
static void __attribute__((noreturn)) refuse_word(const char *word) {
    if (file_exists(word))
        die_usage(
            "'%s' is left over: if the shell has made several names of a pattern, quote it: --train '*.txt'",
            word);
    die_usage("'%s' is not an option; files are named by --train, --val, --init and --out", word);
}

// Sets the options that words[1], ... give: --name value, --name=value, -n value, -nvalue; letters of FLAGs
// may stand together, as in -yx5. A LIST's first word replaces what was there before.
static void take_words(Options *options, bool given[OPTION_COUNT], int count, char *const *words) {
    bool taken[OPTION_COUNT] = {false};
    for (int i = 1; i < count; i++) {
        const char *word = words[i], *rest = word + 1; // rest: what is still to be read of a word of letters
        if (word[0] != '-' || !word[1]) refuse_word(word);
        bool is_long = word[1] == '-';
        if (!is_long && word[2] && find_option(rest, strcspn(rest, "="), 0))
            die_usage("%s: a name is written with two dashes: -%.*s", word, (int)strcspn(word, "="), word);
        do {
            const char *name = is_long ? word + 2 : NULL;
            size_t length = is_long ? strcspn(name, "=") : 1;
            const Option *option = find_option(name, length, *rest);
            if (!option && is_long) refuse_option(word);
            if (!option) die_usage("unknown option -%c; --help lists all", *rest);
            const char *value = !is_long ? rest + 1 : name[length] ? name + length + 1 : "";
            bool has_value = is_long ? name[length] != 0 : *value != 0;
            rest = option->kind == FLAG && !is_long ? rest + 1 : "";
            if (option->kind == FLAG && is_long && has_value) die_usage("--%s takes no value", option->name);
            if (option->kind != FLAG && !has_value) {
                if (++i == count) die_usage("--%s needs a value; --help says which", option->name);
                value = words[i];
            }
            size_t index = (size_t)(option - option_table);
            if (taken[index] && option->modes & ONCE)
                die_usage("--%s is given twice, and only one can be taken%s", option->name,
                          option->kind == WORD && option->modes & TRAIN
                              ? "; a quoted glob names several files"
                              : "");
            set_option(options, option, value, taken[index]);
            taken[index] = given[index] = true;
        } while (*rest);
    }
}

// Reads the command line, on top of the options that the checkpoint `state` (or NULL) remembers: what is said
// again replaces what was said then. Ends the program with status 2 and one line when it is wrong.
static void parse_options(Options *options, const char *state, int argc, char **argv) {
    bool given[OPTION_COUNT] = {false};
    set_defaults(options);
    Json *json = state ? json_read_file(state) : NULL;
    const Json *saved = json_get(json, "options");
    Patterns words = {0};
    add_pattern(&words, argv[0]);
    for (const Json *item = json_child(saved); item; item = item->next)
        if (item->kind == JSON_STRING) add_pattern(&words, item->string);
    take_words(options, given, (int)words.size, (char *const *)words.items);
    json_free(json);
    take_words(options, given, argc, argv);
    int mode = options->chat ? CHAT : options->generate ? GENERATE : options->eval ? EVAL : TRAIN;
    const char *mode_name = options->chat       ? "--chat"
                            : options->generate ? "--generate"
                            : options->eval     ? "--eval"
                                                : "training";
    for (int i = 0; i < OPTION_COUNT && !options->help; i++)
        if (given[i] && !(option_table[i].modes & mode))
            die_usage("--%s does not apply to %s%s", option_table[i].name, mode_name,
                      option_table[i].modes & GENERATE ? "; it goes with --generate N" : "");
}

static void print_usage(FILE *file) {
    fprintf(file,
            "train_gpt2: train, fine-tune, evaluate and sample GPT-2 on CPU cores\n\n"
            "  train_gpt2 --tokenizer DIR --train FILE [options]        train a small model from nothing\n"
            "  train_gpt2 --init DIR --train FILE --out DIR [options]   fine-tune a model\n"
            "  train_gpt2 --init DIR --eval --val FILE [options]        evaluate it\n"
            "  train_gpt2 --init DIR --generate N --prompt TEXT         sample from it\n"
            "  train_gpt2 --init DIR --chat                             talk to it\n");
}

static void print_help(void) {
    print_usage(stdout);
    for (const Option *option = option_table; option < option_table + OPTION_COUNT; option++) {
        if (!option->name) {
            printf("\n%s\n", option->help);
            continue;
        }
        char left[80];
        snprintf(left, sizeof left, "  %c%c%c --%s %s", option->letter ? '-' : ' ',
                 option->letter ? option->letter : ' ', option->letter ? ',' : ' ', option->name,
                 option->argument ? option->argument : "");
        printf("%-34s %s", left, option->help);
        bool shown = option->initial[0] && !strstr(option->help, "default") &&
                     (strcmp(option->initial, "0") != 0 || option->least == 0);
        printf(shown ? " (default: %s)\n" : "\n", option->initial);
    }
    printf("\nExit status: 0 done, 1 a run failed, 2 the command line is wrong; above 128: stopped by signal "
           "number status - 128, and saved.\n");
}

static bool patterns_match(const Patterns *patterns, const char *name) {
    for (size_t i = 0; i < patterns->size; i++) {
        regex_t regex;
        int error = regcomp(&regex, patterns->items[i], REG_EXTENDED | REG_NOSUB);
        if (error) {
            char reason[128];
            regerror(error, &regex, reason, sizeof reason);
            die_usage("regular expression '%s': %s", patterns->items[i], reason);
        }
        bool found = regexec(&regex, name, 0, NULL, 0) == 0;
        regfree(&regex);
        if (found) return true;
    }
    return false;
}

// How alike two names are: the length of the longest piece that both have.
static size_t likeness(const char *a, const char *b) {
    size_t best = 0;
    for (const char *x = a; *x; x++)
        for (const char *y = b; *y; y++) {
            size_t n = 0;
            while (x[n] && x[n] == y[n]) n++;
            best = n > best ? n : best;
        }
    return best;
}

// Ends the program when a pattern of --NAME matches no tensor at all: it must be a slip. Lists the names that
// are most like it.
static void need_matches(const Model *model, const char *name, const Patterns *patterns) {
    for (size_t p = 0; p < patterns->size; p++) {
        const Patterns one = {&patterns->items[p], 1, 1};
        size_t best = 0, listed = 0;
        int i = 0;
        while (i < model->tensor_count && !patterns_match(&one, model->tensors[i].name)) i++;
        if (i < model->tensor_count) continue;
        char *near = xstrdup("");
        for (int kind = 0; kind < TENSOR_KINDS; kind++) {
            size_t alike = likeness(tensor_table[kind].name, one.items[0]);
            best = alike > best ? alike : best;
        }
        for (int kind = 0; kind < TENSOR_KINDS && listed < 4; kind++)
            if (likeness(tensor_table[kind].name, one.items[0]) == best)
                near = xprintf("%s%s %s", near, listed++ ? "," : "", tensor_table[kind].name);
        die_usage("--%s '%s' matches no tensor; near it are%s. --plan lists all", name, one.items[0], near);
    }
}

// How many parameters there are: all, or only those that are trained.
static size_t count_parameters(const Model *model, bool only_trainable) {
    size_t count = 0;
    for (int i = 0; i < model->tensor_count; i++)
        if (!(only_trainable && model->tensors[i].frozen)) count += model->tensors[i].size;
    return count;
}

// ---- the machine ----

static void choose_matmul(Options *options); // Part V
static const char *matmul_name(void);
static void choose_precision(Options *options);
static const char *precision_name(void);
static bool bfloat16_products = false; // --precision bfloat16

// Sets the number of threads: --threads, or what OpenMP makes of environment and cores. A parallel region may
// get fewer than were asked for (OMP_THREAD_LIMIT); OpenBLAS would wait for the missing ones for ever. So it
// is seen here how many a region really gets.
static void set_threads(long wanted) {
    int got = 0;
    if (wanted) omp_set_num_threads((int)wanted);
#pragma omp parallel reduction(+ : got)
    got++;
    omp_set_num_threads(got);
    if (got < wanted)
        warn("--threads %ld: only %d can be had (OMP_THREAD_LIMIT, or built without OpenMP)", wanted, got);
}

// Numbers below 1e-38 (denormals) cost some processors a hundred cycles each, and weights or moments that
// shrink towards 0 are full of them. From here on they count as 0 in the calling thread.
static void flush_denormals(void) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); // FTZ and DAZ: results, and operands
#elif defined(__aarch64__)
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(control | 1u << 24)); // FZ: both
#endif
}

// Gives each thread a core of its own when there are as many threads as cores. Left alone, the
// system puts two of them on one core as soon as another program runs, and each waits out the
// other's turn at every barrier.
static void pin_threads(void) {
#if defined(__linux__) && defined(_OPENMP)
    cpu_set_t allowed;
    if (getenv("OMP_PROC_BIND") || sched_getaffinity(0, sizeof allowed, &allowed) != 0 ||
        CPU_COUNT(&allowed) != omp_get_max_threads())
        return;
#pragma omp parallel
    {
        int core = -1;
        for (int passed = -1; passed < omp_get_thread_num(); passed += CPU_ISSET(core, &allowed) != 0) core++;
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(core, &own);
        sched_setaffinity(0, sizeof own, &own);
    }
#endif
}

// ---- starting a run ----

// The layers and channels of the sizes that --init knows, d4 to d48. Heads have 64 channels.
static const int sizes[][2] = {{4, 256}, {6, 384}, {12, 768}, {24, 1024}, {36, 1280}, {48, 1600}};

// The row of a size such as d12 in the table; NULL: then it is the name of a folder.
static const int *find_size(const char *name) {
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(name, path_of("d%d", sizes[i][0])) == 0) return sizes[i];
    return NULL;
}

// Ends the program when --init names no model folder that can be read, and says how to come by one.
static void refuse_other_formats(const char *folder) {
    static const char *const others[] = {"pytorch_model.bin", "pytorch_model.bin.index.json",
                                         "model.safetensors.index.json", "ckpt.pt"};
    bool found = ends_with(folder, ".bin") || ends_with(folder, ".pt");
    for (int i = 0; i < 4; i++) found = found || file_exists(path_of("%s/%s", folder, others[i]));
    if (found && !file_exists(path_of("%s/model.safetensors", folder)))
        die("%s: weights in another format; this converts them: python3 data/convert.py %s FOLDER", folder,
            folder);
    const char *slash = strrchr(folder, '/'), *name = slash ? slash + 1 : folder;
    if (ends_with(folder, ".gguf"))
        die("%s: a file for llama.cpp, which cannot be trained: --init takes the folder that it was made "
            "from",
            folder);
    if (file_exists(folder) && !is_folder(folder))
        die("%s: a file: --init takes the folder that it lies in", folder);
    bool is_gpt2 = strcmp(name, "gpt2") == 0 || strcmp(name, "gpt2-medium") == 0 ||
                   strcmp(name, "gpt2-large") == 0 || strcmp(name, "gpt2-xl") == 0;
    if (!file_exists(folder) && is_gpt2) die("%s: is not here; this downloads it: make %s", folder, name);
    if (!file_exists(folder) && slash > folder && strchr(folder, '/') == slash && folder[0] != '.')
        die("%s: is not here; this downloads it: hf download %s --local-dir %s", folder, folder, name);
    if (!is_folder(folder) || is_adapter(folder) || file_exists(path_of("%s/config.json", folder))) return;
    size_t count;
    const long *steps = list_checkpoints(folder, &count);
    if (count > 0)
        die("%s: has no model yet, but checkpoints, such as %s", folder,
            checkpoint_path(folder, steps[count - 1]));
    die("%s: has no config.json: a folder with config.json and model.safetensors expected", folder);
}

// The tokenizer of --tokenizer if that is given, else the model folder's; NULL when it has none.
static Tokenizer *load_tokenizer(const char *given, const char *folder) {
    char files[2][PATH_MAX];
    return *given ? tokenizer_load(given) : tokenizer_files(folder, files) ? tokenizer_load(folder) : NULL;
}

// A model of a size of the table with random values, or (size NULL) the one in a folder. --plan needs no values.
static Model *start_model(const Options *options, const int *size, const char *folder,
                          const Tokenizer *tokenizer) {
    if (!size) {
        Model *model = model_open(folder, !options->plan);
        if (tokenizer && tokenizer->base_size > model->config.vocab_size)
            die("the tokenizer has %d entries, the model only %d: name the model's own with --tokenizer",
                tokenizer->base_size, model->config.vocab_size);
        return model;
    }
    Config config = {.vocab_size = tokenizer ? tokenizer->vocab_size : 50257,
                     .n_positions = options->n_positions ? (int)options->n_positions : 1024,
                     .n_layer = options->n_layer ? (int)options->n_layer : size[0],
                     .n_embd = options->n_embd ? (int)options->n_embd : size[1],
                     .layer_norm_epsilon = 1e-5f,
                     .tie_word_embeddings = true};
    config.n_head = options->n_head           ? (int)options->n_head
                    : config.n_embd % 64 == 0 ? config.n_embd / 64
                                              : size[1] / 64;
    config.n_inner = 4 * config.n_embd;
    check_config(config, "--init");
    Model *model = model_new(config);
    if (!options->plan) model_initialise(model, (uint64_t)options->seed);
    return model;
}

// The ids at which a text ends: those of generation_config.json, else config.json, else the tokenizer's one.
// folder NULL: there is none.
static Ids read_ends(const char *folder, const Tokenizer *tokenizer) {
    static const char *const names[] = {"generation_config.json", "config.json"};
    Ids ends = {0};
    for (int i = 0; i < 2 && folder && ends.size == 0; i++) {
        Json *json = json_read_if_there(path_of("%s/%s", folder, names[i]));
        read_ids(json, "eos_token_id", &ends);
        json_free(json);
    }
    if (ends.size == 0 && tokenizer && tokenizer->end_of_text >= 0) ids_push(&ends, tokenizer->end_of_text);
    return ends;
}

// (all ranks) All must have been started with the same options, the number of threads apart, and by the same
// program: another build may round differently in what each rank does for itself.
static void need_same_options(const Options *options) {
    Patterns words = {0};
    for (const Option *option = option_table; option < option_table + OPTION_COUNT && rank_count > 1;
         option++)
        if (option->name && strcmp(option->name, "threads") != 0)
            add_pattern(&words, option_text(options, option));
    char *text = joined(&words);
    need_same("options", hash_of(text, strlen(text)), "give all ranks the same ones (but for --threads)");
    free(text);
    if (rank_count == 1 || !file_exists("/proc/self/exe")) return;
    Text program = read_file("/proc/self/exe");
    need_same("the program", hash_of(program.data, program.size),
              "copy one train_gpt2 to all machines; make NATIVE=-march=x86-64-v3 builds one for different "
              "processors");
    free(program.data);
}

// (all ranks) Compares examples and tokens; data may be NULL.
static void need_same_data(const Dataset *data) {
    uint64_t hash = 0;
    for (size_t i = 0; data && i < data->count && rank_count > 1; i++) {
        const Example *example = &data->examples[i];
        hash = random_bits(hash, (uint64_t)example->size);
        for (int t = 0; t < example->size; t++)
            hash = random_bits(hash, (uint64_t)dataset_token(data, example, t));
    }
    need_same(data ? data->path : "data", hash, "all ranks need the same file");
}

// Ends the program when what this run writes would take the place of the model that it begins with, and that
// its adapter needs for good: --out, or the folder merged in it, which any later run may replace.
static void spare_base(const Options *options, const char *base, bool adapter) {
    struct stat at_base, at_out;
    if (stat(base, &at_base) != 0) return;
    for (int in = adapter ? 0 : 1; in < 2; in++)
        if (stat(path_of(in ? "%s/merged" : "%s", options->out), &at_out) == 0 &&
            at_out.st_dev == at_base.st_dev && at_out.st_ino == at_base.st_ino)
            die_usage("--out %s would replace %s, with which this run begins: choose another --out",
                      options->out, base);
}

// Puts adapters beside the matrices of --lora-target. An adapter that comes from a folder is trained as it is.
static void start_adapters(Model *model, const Options *options) {
    const Patterns *target = &options->lora_target;
    const bool rank = options->lora_rank > 0, alpha = options->lora_alpha > 0,
               targets = target->size != 1 || strcmp(target->items[0], "attn.c_attn") != 0;
    if (model->lora_rank > 0 && (rank || alpha || targets))
        die_usage("%s is an adapter already, of rank %d: it is trained on as it is, without --lora options",
                  options->init, model->lora_rank);
    if (!rank && (alpha || targets)) die_usage("--lora-%s needs --lora-rank", alpha ? "alpha" : "target");
    if (!rank) return;
    if (find_size(options->init))
        die_usage("--lora-rank: an adapter belongs to a model folder; --init %s begins at random",
                  options->init);
    model->lora_rank = (int)options->lora_rank;
    model->lora_alpha = (float)(alpha ? options->lora_alpha : 2 * (double)options->lora_rank);
    const int plain = model->tensor_count;
    for (size_t p = 0; p < target->size; p++) {
        const Patterns one = {&target->items[p], 1, 1};
        bool found = false;
        for (int i = 0; i < plain; i++) {
            Tensor *weight = &model->tensors[i];
            if (weight->dims != 2 || !patterns_match(&one, weight->name)) continue;
            if (!is_adaptable(weight))
                die_usage("--lora-target '%s' matches %s, which cannot have an adapter: only the matrices of "
                          "blocks can",
                          one.items[0], weight->name);
            if (!weight->adapter) model_add_adapter(model, weight);
            found = true;
        }
        if (!found)
            die_usage("--lora-target '%s' matches no matrix of a block: they are attn.c_attn, attn.c_proj, "
                      "mlp.c_fc and mlp.c_proj",
                      one.items[0]);
    }
    model->adapter_memory = allocate_values(model, plain);
    adapters_initialise(model, random_stream((uint64_t)options->seed, 0x6c6f7261u)); // "lora"
}

// What training, evaluation and generation begin with: tokenizer and model, from `checkpoint` or (NULL) as
// --init says, and the datasets that are named.
static Run start_run(Options *options, const char *checkpoint) {
    const int *size = checkpoint ? NULL : find_size(options->init);
    const char *folder = checkpoint ? checkpoint : options->init;
    if (!find_size(options->init) &&
        (options->n_layer || options->n_head || options->n_embd || options->n_positions))
        die_usage("--n-layer, --n-head, --n-embd, --n-positions: for a random start, not for a model folder");
    if (!size) refuse_other_formats(folder);
    choose_precision(options);
    choose_matmul(options);
    Run run = {.options = options, .best_loss = INFINITY, .evaluated_step = -1, .started = now()};
    char *base = run.base = size ? NULL : base_folder(folder);
    run.tokenizer = load_tokenizer(checkpoint ? "" : options->tokenizer, folder);
    if (!run.tokenizer && base) run.tokenizer = load_tokenizer("", base);
    if (run.tokenizer) run.tokenizer->plain = options->plain;
    run.model = start_model(options, size, folder, run.tokenizer);
    const bool training = options->train[0] && !options->plan;
    if (!checkpoint && (options->train[0] || options->plan)) start_adapters(run.model, options);
    if (training && base) spare_base(options, base, run.model->lora_rank > 0);
    if (!size) keep_config(&run.kept, base);
    if (!size) keep_file(&run.kept, folder, "adapter_config.json", "adapter_config.json");
    if (checkpoint || !*options->tokenizer || is_folder(options->tokenizer))
        keep_tokenizer(&run.kept, checkpoint || !*options->tokenizer ? folder : options->tokenizer);
    run.ends = read_ends(size ? NULL : base, run.tokenizer);
    const Config *config = &run.model->config;
    if (options->seq_len > config->n_positions)
        die_usage("--seq-len %ld: the model has only %d positions, choose no more", options->seq_len,
                  config->n_positions);
    if (!options->seq_len) options->seq_len = config->n_positions < 1024 ? config->n_positions : 1024;
    if (options->train[0] || options->plan) {
        need_matches(run.model, "freeze", &options->freeze);
        need_matches(run.model, "no-decay", &options->no_decay);
        model_set_training(run.model, &options->freeze, &options->no_decay);
        if (count_parameters(run.model, true) == 0)
            die_usage("--freeze leaves nothing to train: name fewer tensors");
    }
    if (options->train[0])
        run.train = dataset_load(options->train, run.tokenizer, (int)options->seq_len, config->vocab_size);
    if (options->val.size > 0 && !options->eval)
        run.val = dataset_load_all(&options->val, run.tokenizer, (int)options->seq_len, config->vocab_size);
    else if (run.train && options->val_fraction > 0)
        run.val = dataset_split(run.train, options->val_fraction);
    run.saved_options = options_to_save(options);
    need_same_options(options);
    need_same_data(run.train);
    need_same_data(run.val);
    // Not before weights of 16 bits are read: they become what they mean by way of denormals. Some OpenMP
    // runtimes hand the calling thread's mode on to the others, some do not.
    flush_denormals();
#pragma omp parallel
    flush_denormals();
    return run;
}

// Rows of the largest batch: that of the longest examples.
static int largest_batch(const Dataset *data, long batch_size, int seq_len) {
    size_t *counts = xcalloc((size_t)seq_len + 1, sizeof *counts), rows = 0;
    for (size_t i = 0; i < data->count; i++) counts[data->examples[i].size - 1]++;
    for (int length = seq_len; length > 0 && batch_size > 0; length--) {
        size_t taken = counts[length] < (size_t)batch_size ? counts[length] : (size_t)batch_size;
        rows += taken * (size_t)length;
        batch_size -= (long)taken;
    }
    free(counts);
    if (rows > INT_MAX) die("a batch of %zu rows is too large: choose a smaller --batch-size", rows);
    return (int)rows;
}

// The number of warm-up steps from `300`, `10%` or `1ep`.
static long warmup_of(const Options *options, long steps, long steps_per_epoch) {
    const char *text = options->warmup_steps;
    if (!*text) text = !find_size(options->init) && steps > steps_per_epoch ? "1ep" : "10%";
    char *unit;
    double value = strtod(text, &unit);
    if (unit == text || !(value >= 0) || value > 1e12 ||
        (*unit && strcmp(unit, "%") != 0 && strcmp(unit, "ep") != 0))
        die_usage("--warmup-steps %s: steps, or a share such as 10%%, or epochs such as 1ep expected", text);
    double warmup = *unit == '%' ? value / 100 * (double)steps
                    : *unit      ? value * (double)steps_per_epoch
                                 : value;
    return warmup < (double)steps ? (long)(warmup + 0.5) : steps;
}

static double megabytes(size_t floats) { return (double)floats * sizeof(float) / 1e6; }

// Prints the first training example: its tokens in runs of what is scored and what is only read.
static void print_example(const Run *run) {
    enum { SHOWN = 200 };
    const Example *example = &run->train->examples[0];
    const int shown = example->size < SHOWN ? example->size : SHOWN;
    int scored = -1; // of the run at work
    Text text = {0};
    printf("\nfirst example: %d tokens, %d of them scored", example->size, example->targets);
    for (int i = 0; i < shown; i++) {
        int token = dataset_token(run->train, example, i), now_scored = i > 0 && token >= 0;
        if (now_scored != scored) printf(now_scored ? "\n  scored    " : "\n  not scored");
        scored = now_scored;
        tokenizer_decode(run->tokenizer, &text, token < 0 ? ~token : token);
        // the tokens of one character are shown together
        if (utf8_whole(text.data, text.size) < text.size && i + 1 < shown &&
            (dataset_token(run->train, example, i + 1) >= 0) == now_scored)
            continue;
        putchar(' ');
        write_json_text(stdout, &text);
        text.size = 0;
    }
    printf(example->size > shown ? "\n  and %d tokens more\n" : "\n", example->size - shown);
    free(text.data);
}

static void print_tensors(const Model *model) {
    size_t decayed = 0, trained = count_parameters(model, true), all = count_parameters(model, false);
    printf("%-40s %-16s %12s  %-6s %s\n", "tensor", "shape", "parameters", "decay", "frozen");
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *t = &model->tensors[i];
        bool decays = t->decay && !t->frozen;
        char shape[48];
        snprintf(shape, sizeof shape, t->dims == 2 ? "[%zu, %zu]" : "[%zu]", t->shape[0], t->shape[1]);
        printf("%-40s %-16s %12zu  %-6s %s\n", t->name, shape, t->size, decays ? "yes" : "-",
               t->frozen ? "yes" : "-");
        decayed += decays ? t->size : 0;
    }
    printf("\nparameters %zu, trained %zu, decayed %zu, frozen %zu\n", all, trained, decayed, all - trained);
}

// Multiplications of an update with weights, for each row; *skipped of them are not computed since something is
// frozen. A matrix takes part in three products: y = xW, dx = dy Wᵀ, dW = xᵀ dy. The last one goes when it is
// frozen, dx when nothing below is trained.
static double weight_products(const Model *model, double *skipped) {
    double products = 0;
    *skipped = 0;
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *t = &model->tensors[i];
        const bool in_block = kind_is_per_layer(t->kind),
                   no_dx = in_block && t->layer < model->lowest_trained;
        if (t->dims != 2 || !(in_block || t == model_head(model))) continue;
        products += 3 * (double)t->size;
        *skipped += (double)t->size * (t->frozen + no_dx);
    }
    return products;
}

static size_t packed_size(const Config *config, size_t rows); // Part V

static void print_memory(const Run *run) {
    const Model *model = run->model;
    size_t trained = count_parameters(model, true), all = count_parameters(model, false);
    size_t frozen = all - trained, activations = run->activations.memory_size;
    printf("\nmemory, MB\n  weights %.1f%s\n", megabytes(all),
           model->value_file.data ? " (mapped from the file; copied where trained)" : "");
    printf("  gradients %.1f\n  AdamW's moments %.1f\n", megabytes(trained), megabytes(2 * trained));
    printf("  activations %.1f (%d rows)\n", megabytes(activations), run->activations.rows);
    const size_t packed = packed_size(&model->config, (size_t)run->activations.rows);
    if (packed > 0) printf("  operands in bfloat16 %.1f\n", megabytes(packed));
    printf("  in all %.1f\n", megabytes(all + 3 * trained + activations + packed));
    if (frozen == 0) return;
    double skipped, products = weight_products(model, &skipped);
    Model unfrozen = *model;
    unfrozen.lowest_trained = -1;
    Activations full = {0};
    full.memory_size =
        activations_lay_out(&full, &unfrozen, run->activations.rows, run->activations.keep, NULL);
    printf("freezing saves %.1f MB of gradients, %.1f of moments, %.1f of activations, and %.0f %% of the "
           "products with weights\n",
           megabytes(frozen), megabytes(2 * frozen), megabytes(full.memory_size - activations),
           100 * skipped / products);
}

// What each rank sends for an update, beside what it computes: whether more machines pay. A sum over N ranks
// takes 2 (N - 1) / N times its bytes, sent and received, whatever the algorithm (Patarasuk, Yuan 2009).
static void print_traffic(const Run *run) {
    const Options *options = run->options;
    const Config *c = &run->model->config;
    const double N = rank_count, trained = (double)count_parameters(run->model, true);
    const double bytes = 2 * (N - 1) / N * trained * (sums_in_bfloat16 ? 2 : 4),
                 group = (double)(options->batch_size * options->accumulate);
    const double share =
        fmin((double)options->batch_size, ceil(group / N)); // examples of run->activations.rows
    double skipped, products = weight_products(run->model, &skipped), best = INFINITY;
    const int R = run->activations.rows, C = c->n_embd, F = c->n_inner;
    float *x = xfloats((size_t)R * C), *w = xfloats((size_t)C * F), *y = xfloats((size_t)R * F);
    memset(x, 0, (size_t)R * C * sizeof(float));
    memset(w, 0, (size_t)C * F * sizeof(float));
    for (int i = 0; i < 3; i++) { // how fast is a product here?
        const double begin = now();
        matmul(y, F, x, C, false, w, F, false, R, F, C, false);
        best = fmin(best, now() - begin);
    }
    const double rate = (double)R * C * F / best, work = (products - skipped) * R * ceil(group / N) / share;
    printf("\n%d ranks: each sends %.1f MB an update: %.3g s at 1 Gbit/s, %.3g at 10, %.3g at 100; its "
           "products take about %.3g s\n",
           rank_count, bytes / 1e6, bytes * 8e-9, bytes * 8e-10, bytes * 8e-11, work / rate);
    free(x), free(w), free(y);
}

static void print_plan(const Run *run) {
    const Options *options = run->options;
    size_t rows, targets;
    print_tensors(run->model);
    print_memory(run);
    if (rank_count > 1) print_traffic(run);
    if (!run->train) {
        printf("\n--train FILE adds the number of updates, the learning rates and the first example\n");
        return;
    }
    dataset_size(run->train, &rows, &targets);
    printf("\ntraining: %zu examples, %zu tokens, %zu of them scored\n", run->train->count, rows, targets);
    if (run->val) {
        dataset_size(run->val, &rows, &targets);
        printf("validation: %zu examples, %zu tokens, %zu of them scored\n", run->val->count, rows, targets);
    }
    printf("%ld updates of %ld x %ld examples, %ld an epoch; evaluation every %ld, checkpoint every %ld\n",
           options->steps, options->accumulate, options->batch_size, run->steps_per_epoch, options->val_every,
           options->save_every);
    printf("learning rate:");
    for (int i = 0; i <= 10; i++) printf(" %.3g", rate_of(run, (options->steps - 1) * i / 10));
    printf("  (warm-up %ld updates)\n", run->warmup);
    if (!run->tokenizer) return;
    print_example(run);
    const int vocab_size = run->model->config.vocab_size;
    if (run->tokenizer->vocab_size < vocab_size / 10 * 9)
        printf("\nThe tokenizer has %d tokens, the model's vocabulary %d: is it the model's own?\n",
               run->tokenizer->vocab_size, vocab_size);
}

static int end_run(Run *run, int status) {
    activations_free(&run->activations);
    dataset_free(run->val);
    dataset_free(run->train);
    model_free(run->model);
    if (run->tokenizer) tokenizer_free(run->tokenizer);
    free_kept(&run->kept);
    free(run->ends.data);
    return status;
}

// What runs where on what, before the first step.
static void print_banner(const Run *run, const char *checkpoint, const char *changes) {
    const Options *options = run->options;
    const Config *config = &run->model->config;
    size_t tokens, targets;
    dataset_size(run->train, &tokens, &targets);
    const char *products = bfloat16_products ? precision_name() : matmul_name();
    const int threads = (int)sum_over_ranks(omp_get_max_threads());
    if (rank_count > 1)
        printf("machine: %d ranks on %d machine%s, %d threads in all, %s\n", rank_count, machine_count,
               machine_count > 1 ? "s" : "", threads, products);
    else
        printf("machine: %d threads, %s\n", threads, products);
    printf(
        "model: %s, %d layers, %d channels, %d heads, vocabulary %d; %zu parameters, %zu of them trained\n",
        checkpoint ? checkpoint : options->init, config->n_layer, config->n_embd, config->n_head,
        config->vocab_size, count_parameters(run->model, false), count_parameters(run->model, true));
    printf("data: %zu examples, %zu tokens (%zu scored); %zu validation examples\n", run->train->count,
           tokens, targets, run->val ? run->val->count : 0);
    const char *beginning = checkpoint        ? "; resumed"
                            : options->resume ? "; no checkpoint yet, starting afresh"
                                              : "";
    printf("run: %ld updates, %.2f epochs, warm-up %ld%s\n", options->steps, epoch_of(run, options->steps),
           run->warmup, beginning);
    if (changes) printf("changed since that checkpoint: %s\n", changes);
    fflush(stdout);
}

// Sets the lengths that options leave open: those of the run, its warm-up, and the times between evaluations.
static void set_lengths(Run *run, Options *options) {
    size_t group = (size_t)(options->batch_size * options->accumulate);
    run->steps_per_epoch = (long)((run->train->count + group - 1) / group);
    if (!options->steps) options->steps = (long)(options->epochs * (double)run->steps_per_epoch + 0.5);
    if (options->steps < 1)
        die_usage("--epochs %g: less than one update; say --steps N, or more epochs", options->epochs);
    run->warmup = warmup_of(options, options->steps, run->steps_per_epoch);
    if (!options->val_every) options->val_every = options->steps >= 20 ? options->steps / 20 : 1;
    if (!options->save_every) options->save_every = options->val_every;
}

// A run that is finished has nothing to do any more; with other options this must be said, or what it did
// before would be taken for their result.
static void check_if_finished(const Run *run, const char *changes) {
    const Options *options = run->options;
    if (run->step < options->steps && !is_hopeless(run)) return;
    if (changes)
        die_usage(
            "%s: this run is finished (%ld of %ld updates), so that %s would change nothing. To start anew "
            "delete %s, or choose another --out; more --steps go on with it",
            options->out, run->step, options->steps, changes, options->out);
    printf("%s: finished already, %ld of %ld updates; to start anew delete it, or choose another --out\n",
           options->out, run->step, options->steps);
}

// (all ranks) Finds the newest checkpoint in --out to go on from, its step in *newest, or returns NULL. Rank 0
// looks for it: log.csv belongs to it, if it is there.
static char *find_checkpoint(const Options *options, long *newest) {
    size_t count;
    long *steps = list_checkpoints(options->out, &count);
    *newest = largest_over_ranks(count > 0 && this_rank == 0 ? steps[count - 1] : -1);
    free(steps);
    if (*newest < 0) return NULL;
    if (!options->resume && !options->plan && !options->find_rate)
        die_usage("%s holds checkpoints of an earlier run: --resume goes on with it; or choose another --out",
                  options->out);
    return options->resume ? xstrdup(checkpoint_path(options->out, *newest)) : NULL;
}

static int run_training(Options *options, int argc, char **argv) {
    const bool only_looks = options->plan || options->find_rate; // a run in --out may go on beside it
    if (options->find_rate && options->resume)
        die_usage("--find-rate begins with --init, not with a checkpoint: leave out --resume");
    if (options->find_rate && !options->steps) options->steps = 100;
    if (options->find_rate && rank_count > 1) die_usage("--find-rate runs on one machine: leave out mpirun");
    FILE *log = only_looks || this_rank > 0 ? NULL : lock_log(options->out, false);
    long newest, newer;
    char *checkpoint = find_checkpoint(options, &newest), *changes = NULL;
    Options before;
    if (checkpoint) {
        const char *state = path_of("%s/trainer_state.json", checkpoint);
        parse_options(&before, state, 1, argv);
        parse_options(options, state, argc, argv);
        if ((changes = changed_options(options, &before, START)))
            die_usage("%s: a run cannot change how it began: %s. Choose another --out for a new one",
                      options->out, changes);
    }
    if (!options->train[0] && !options->plan)
        die_usage("nothing to train on: say --train FILE (.txt, .jsonl or .bin); --help shows examples");
    Run run = start_run(options, checkpoint);
    if (checkpoint) changes = changed_options(options, &before, ANY);
    if (run.train) set_lengths(&run, options);
    const size_t N = (size_t)rank_count, group = (size_t)(options->batch_size * options->accumulate);
    const size_t share = smaller((size_t)options->batch_size, (group + N - 1) / N); // examples of a rank
    const double full = (double)share * (double)options->seq_len;                   // rows of whole sequences
    const int rows =
        run.train ? largest_batch(run.train, (long)share, (int)options->seq_len) : (int)fmin(full, INT_MAX);
    const Keep keep = options->recompute ? KEEP_INPUTS : KEEP_ALL;
    run.activations.memory_size = activations_lay_out(&run.activations, run.model, rows, keep, NULL);
    if (!options->plan) activations_reserve(&run.activations, run.model, rows, keep);
    if (options->plan) {
        print_plan(&run);
        return end_run(&run, 0);
    }
    if (this_rank == 0) make_folder(options->out);
    if (options->find_rate) {
        model_allocate_training(run.model, true);
        return end_run(&run, find_rate(&run));
    }
    if (this_rank == 0) run.log = log ? log : lock_log(options->out, true);
    free(find_checkpoint(options, &newer)); // until now another process may have had the lock
    if (newer != newest) die("%s: another run has just written there; start again", options->out);
    if (this_rank == 0) remove_leftovers(options->out);
    model_allocate_training(run.model, checkpoint == NULL);
    run.started = now();
    if (checkpoint) {
        load_trainer_state(&run, checkpoint, newest);
        check_if_finished(&run, changes);
        if (this_rank == 0) prune_checkpoints(&run); // a kill may have come between saving and pruning
    }
    need_same_model(run.model);
    if (!options->quiet) print_banner(&run, checkpoint, changes);
    return end_run(&run, train(&run));
}

// Prints the figures of one row; those of several have columns.
static void print_evaluation(const Evaluation *e, const char *where, bool column) {
    printf("loss %*.6f  perplexity %*.4f  accuracy %*.3f %%  of %*zu tokens", column * 9, e->loss,
           column * 11, exp(e->loss), column * 7, 100 * e->accuracy, column * 9, e->targets);
    if (e->prompted)
        printf("  exact match %*.2f %%  of %*zu examples", column * 6, 100 * e->exact, column * 6,
               e->prompted);
    else if (column)
        printf("%48s", "");
    printf("  in %s", where);
}

// Evaluates run->val, prints its row, and adds its figures to the sums in `all`.
static void evaluate_file(Run *run, Evaluation *all, bool column) {
    const Dataset *val = run->val;
    Evaluation e = evaluate(run);
    print_evaluation(&e, val->path, column);
    if (val->lost_end + val->lost_beginning + val->skipped > 0)
        printf(" (of %zu the end was cut off, of %zu the beginning; %zu skipped)", val->lost_end,
               val->lost_beginning, val->skipped);
    printf("\n");
    all->loss += e.loss * (double)e.targets;
    all->accuracy += e.accuracy * (double)e.targets;
    all->exact += e.exact * (double)e.prompted;
    all->targets += e.targets;
    all->examples += e.examples;
    all->prompted += e.prompted;
}

// --eval: a row for each --val and, for several, one for all their examples together.
static int run_evaluation(Options *options) {
    const char *path = options->predictions;
    const size_t files = options->val.size;
    if (files == 0) die_usage("--eval needs --val FILE");
    if (*path && rank_count > 1)
        die_usage("--predictions FILE: one process writes it; start it without mpirun");
    Run run = start_run(options, NULL);
    Evaluation all = {0};
    Predictions predictions = {0};
    if (*path) {
        if (!run.tokenizer) die("%s: --predictions need a tokenizer; say --tokenizer FOLDER", options->init);
        predictions = (Predictions){create_file(path), cache_new(run.model, 1), 0};
        run.predictions = &predictions;
    }
    for (size_t i = 0; i < files; i++) {
        dataset_free(run.val);
        run.val = dataset_load(options->val.items[i], run.tokenizer, (int)options->seq_len,
                               run.model->config.vocab_size);
        need_same_data(run.val);
        evaluate_file(&run, &all, files > 1);
    }
    if (files > 1) {
        all.loss /= (double)all.targets;
        all.accuracy /= (double)all.targets;
        all.exact /= fmax(1, (double)all.prompted);
        print_evaluation(&all, "all", true);
        printf("\n");
    }
    if (*path) {
        cache_free(&predictions.cache);
        finish_file(predictions.file, path);
        if (predictions.different > 0)
            warn("%s: %zu predictions differ from what exact_match says: two logits there are so near that "
                 "rounding decides",
                 path, predictions.different);
    }
    return end_run(&run, 0);
}

static Sampling sampling_of(const Options *options) {
    return (Sampling){.temperature = options->temperature,
                      .top_k = (int)options->top_k,
                      .top_p = options->top_p,
                      .seed = (uint64_t)options->seed,
                      .stop = options->stop[0] ? options->stop : NULL,
                      .repetition_penalty = options->repetition_penalty};
}

// Starts a run that needs a tokenizer.
static Run start_writing(Options *options) {
    if (rank_count > 1)
        die_usage("only training and evaluation can be shared out: start this without mpirun");
    Run run = start_run(options, NULL);
    if (!run.tokenizer)
        die("%s: has no tokenizer (vocab.json and merges.txt); say --tokenizer FOLDER", options->init);
    return run;
}

// Continues one prompt, number `index`, and prints it (unless --answer-only) with what follows. Several samples
// are separated as the documents of a text file.
static void write_samples(const Run *run, Cache *cache, const char *text, size_t size, size_t index) {
    const Options *options = run->options;
    const size_t shown = options->answer_only ? 0 : size;
    const bool stream = options->samples == 1;
    Ids prompt = {0};
    Sample *outputs = xcalloc((size_t)options->samples, sizeof *outputs);
    Sampling sampling = sampling_of(options);
    sampling.seed += index;
    tokenizer_encode(run->tokenizer, &prompt, text, size);
    check_tokens(run->tokenizer, &prompt, run->model->config.vocab_size, "--prompt");
    if (prompt.size == 0) ids_push(&prompt, first_token(run));
    if (stream) {
        fwrite(text, 1, shown, stdout);
        fflush(stdout);
    }
    cache->past = 0;
    continue_prompt(run->model, run->tokenizer, &prompt, (int)options->generate, cache, &run->ends, &sampling,
                    outputs);
    for (long s = 0; s < options->samples; s++) {
        const Text *sample = &outputs[s].text;
        char end = sample->size ? sample->data[sample->size - 1] : shown ? text[shown - 1] : 0;
        if (!stream) {
            printf("%s", s || index ? "<|endoftext|>\n" : "");
            fwrite(text, 1, shown, stdout);
            fwrite(sample->data, 1, sample->size, stdout);
        }
        printf("%s", stream || end != '\n' ? "\n" : "");
        sample_free(&outputs[s]);
    }
    free(outputs);
    free(prompt.data);
}

static int run_generation(Options *options) {
    if (options->prompt[0] && options->prompts[0]) die_usage("--prompt or --prompts expected, not both");
    Run run = start_writing(options);
    Cache cache = cache_new(run.model, (int)options->samples);
    Text text = {0};
    if (options->prompts[0]) {
        const char *at, *line;
        text = read_utf8_file(options->prompts, &at);
        for (size_t length, index = 0; next_line(&at, text.data + text.size, &line, &length); index++)
            write_samples(&run, &cache, line, length, index);
    } else {
        if (strcmp(options->prompt, "-") == 0)
            text = read_file("-");
        else
            text_append(&text, options->prompt, strlen(options->prompt));
        write_samples(&run, &cache, text.data, text.size, 0);
    }
    cache_free(&cache);
    free(text.data);
    return end_run(&run, 0);
}

// Reads the next turn, without its newline; false: the input has ended. Empty lines are passed over, and after
// /reset nothing of the talk is known any more.
static bool read_turn(Talk *talk, Text *turn, bool on_terminal) {
    static const char reset[] = "/reset";
    for (;;) {
        if (on_terminal) printf("> ");
        fflush(stdout);
        ssize_t size = getline(&turn->data, &turn->capacity, stdin);
        if (size < 0 && ferror(stdin)) die("standard input: cannot be read: %s", strerror(errno));
        if (size < 0) return false;
        while (size > 0 && (turn->data[size - 1] == '\n' || turn->data[size - 1] == '\r')) size--;
        turn->size = (size_t)size;
        const bool forgets = turn->size == sizeof reset - 1 && memcmp(turn->data, reset, turn->size) == 0;
        if (size > 0 && !forgets) return true;
        if (forgets) talk_forget(talk, talk->ids.size);
    }
}

// --chat: turns come from a terminal, whose own line editing serves, or from a pipe, one a line. ^C (SIGINT)
// ends an answer; while a turn is typed it has its usual meaning and ends the program, as ^D does.
static int run_chat(Options *options) {
    Run run = start_writing(options);
    const bool on_terminal = isatty(0), ignored = is_ignored(SIGINT); // then it stays so
    const int P = run.model->config.n_positions;
    const long most = options->generate ? options->generate : P > 4 ? P / 4 : 1;
    if (run.tokenizer->end_of_text < 0 || run.tokenizer->end_of_text >= run.model->config.vocab_size)
        die("%s: --chat needs a tokenizer with an end of text that the model knows; --generate does not",
            options->init);
    if (most >= P)
        die_usage("--generate %ld: a context of %d tokens has no room for such answers, choose less", most,
                  P);
    Talk talk = {.cache = cache_new(run.model, 1)};
    Sampling sampling = sampling_of(options);
    Text line = {0};
    if (on_terminal && !options->quiet)
        printf("A turn a line. /reset forgets the talk, ^C ends an answer; at the prompt ^C or ^D ends the "
               "program.\n");
    for (; read_turn(&talk, &line, on_terminal); sampling.seed++) {
        Ids turn = {0};
        tokenizer_encode(run.tokenizer, &turn, line.data, line.size);
        check_tokens(run.tokenizer, &turn, run.model->config.vocab_size, "this turn");
        if (!ignored) catch_signal(SIGINT, 0);
        talk_answer(&talk, run.model, run.tokenizer, &turn, (int)most, &run.ends, &sampling);
        if (!ignored) signal(SIGINT, SIG_DFL);
        stop_signal = 0;
        putchar('\n');
        free(turn.data);
    }
    if (on_terminal) putchar('\n');
    cache_free(&talk.cache);
    free(talk.ids.data), free(talk.begins.data), free(line.data);
    return end_run(&run, 0);
}

// A standard stream that was closed (>&-) leaves its number to the next file that is opened, and what is
// meant for the stream would land in that file. /dev/null takes these numbers.
static void keep_standard_streams(void) {
    int descriptor;
    while ((descriptor = open("/dev/null", O_RDWR)) >= 0 && descriptor <= 2)
        ;
    close(descriptor);
}

// The whole program; the tests call it too.
static int train_gpt2_main(int argc, char **argv) {
    Options options;
    int status = 0;
    keep_standard_streams();
    if (argc < 2) {
        print_usage(stderr);
        fprintf(stderr, "\n--help lists all options; `make train` shows a whole run\n");
        return 2;
    }
    parse_options(&options, NULL, argc, argv);
    if (options.help) {
        print_help();
    } else {
        share_cores();
        set_threads(options.threads);
        pin_threads();
        status = options.chat       ? run_chat(&options)
                 : options.generate ? run_generation(&options)
                 : options.eval     ? run_evaluation(&options)
                                    : run_training(&options, argc, argv);
    }
    if ((fflush(stdout) != 0 || ferror(stdout)) && status == 0)
        die("standard output: not all could be written: %s", strerror(errno));
    return status;
}

#ifndef TRAIN_GPT2_NO_MAIN
int main(int argc, char **argv) {
    keep_standard_streams();
    start_ranks();
    return end_ranks(train_gpt2_main(argc, argv));
}
#endif

// #####################################################################################################
// PART V. Speed
// #####################################################################################################
// Part I says what is computed and how threads share the work. This part makes it fast. Few places need that:
// products of matrices take nearly all the time, and of the rest only exp() is slow by itself.

// =====================================================================================================
// 17. How a product gets fast
// =====================================================================================================
// C = A · B is three loops around C[i][j] += A[i][k] * B[k][j]. Written like that it runs at a few percent of
// what the processor can do: every multiplication waits for memory. Four steps repair that.
// 1. Registers. A tile of C (6 x 16 floats with AVX2: 12 vectors) stays in registers while k runs. One step
//    of k loads 16 floats of B as 2 vectors and 6 single floats of A, and multiplies each with each: 8 loads
//    for 96 multiply-adds. The 12 sums are independent, so no addition waits for the one before it.
// 2. Cache. A panel is a strip of B, as wide as a tile and at most DEPTH deep. GROUP rows of A use it one
//    after another. With AVX2 it has 24 KB and stays in the first-level cache; with AVX-512 it has 72 KB and
//    stays in the second, where the block's other panels and the GROUP rows of A stay as well.
// 3. Packing. The panels of a block are first copied into the order in which tiles read them: one stream, few
//    pages. If B must be transposed, the copy does it. A is read in place, with two exceptions: when it must
//    be transposed, and when its rows are a multiple of 4 KB apart and would push each other out of the cache.
// 4. Threads. C is cut into blocks; each thread takes the next one when it is done with its last.
//
// Each element of C is summed over k = 0, 1, 2, ..., in pieces of at most DEPTH that are the same for every
// tile and thread. So the result does not depend on the number of threads. (After Goto and van de Geijn,
// "Anatomy of High-Performance Matrix Multiplication", 2008.)

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8, TILE_VECTORS = 3 }; // 32 registers: 24 sums, 3 of B, 1 of A
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2 };              // 16 registers: 12 sums, 2 of B, 1 of A
#elif defined(__aarch64__)
enum { LANES = 4, TILE_ROWS = 8, TILE_VECTORS = 3 }; // 32 registers, narrower
#else
enum { LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 2 };
#endif
enum { TILE_COLUMNS = LANES * TILE_VECTORS, DEPTH = 384, A_LD = DEPTH + 16, GROUP = 48, PACKED_B = 100000 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // at any address

// C (M, N) = op(A) (M, K) · op(B) (K, N), or C += with accumulate. op transposes when told; all is row-major;
// ldc, lda, ldb are the distances between rows as stored.
typedef struct {
    float *C;
    const float *A, *B;
    size_t ldc, lda, ldb, M, N, K;
    bool transpose_a, transpose_b, accumulate;
    size_t rows, columns, blocks_across; // of a block of C, and how many blocks lie side by side
    bool round_operands;                 // to bfloat16: section 18
} Product;

// C (rows, columns) = or += the sums of a tile; C may have less room than a tile has rows or columns.
static inline __attribute__((always_inline)) void
store_tile(float *C, size_t ldc, Vector sum[TILE_ROWS][TILE_VECTORS], size_t rows, size_t columns, bool add) {
    for (size_t i = 0; i < TILE_ROWS && i < rows; i++, C += ldc) {
        for (int v = 0; v < TILE_VECTORS && columns >= TILE_COLUMNS; v++)
            ((Vector *)C)[v] = sum[i][v] + (add ? ((Vector *)C)[v] : (Vector){0});
        for (size_t j = 0; j < columns && columns < TILE_COLUMNS; j++)
            C[j] = sum[i][j / LANES][j % LANES] + (add ? C[j] : 0);
    }
}

// C (rows, columns) = or += A (rows, depth) · panel (depth, TILE_COLUMNS). At the lower edge A has fewer rows
// than a tile: the tile computes the last row again instead. At the right edge the panel holds arbitrary
// numbers beyond B. Neither result is stored.
static void matmul_tile(float *C, size_t ldc, const float *A, size_t lda, const float *panel, size_t rows,
                        size_t columns, size_t depth, bool add) {
    Vector sum[TILE_ROWS][TILE_VECTORS] = {0};
    const float *a[TILE_ROWS];
    for (size_t i = 0; i < TILE_ROWS; i++) {
        a[i] = A + smaller(i, rows - 1) * lda;
        __builtin_prefetch(C + smaller(i, rows - 1) * ldc + columns - 1, 1);
    }
    for (size_t k = 0; k < depth; k++, panel += TILE_COLUMNS) {
        for (int j = 0; j < TILE_COLUMNS; j += 16) __builtin_prefetch(panel + 8 * TILE_COLUMNS + j);
        for (int i = 0; i < TILE_ROWS; i++)
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] += a[i][k] * ((const Vector *)panel)[v];
    }
    store_tile(C, ldc, sum, rows, columns, add);
}

// to (columns, rows) = from (rows, columns), transposed: four by four, which fits in registers.
static void transpose(float *to, size_t to_ld, const float *from, size_t from_ld, size_t rows,
                      size_t columns) {
    for (size_t i = 0; i < rows; i += 4)
        for (size_t j = 0; j < columns; j += 4) {
            const float *a = from + i * from_ld + j;
            float *out = to + j * to_ld + i;
            for (size_t x = 8; x < 12; x++) __builtin_prefetch(a + x * from_ld);
            if (i + 4 <= rows && j + 4 <= columns) {
                float r[4][4];
                for (size_t x = 0; x < 16; x++) r[x / 4][x % 4] = a[x / 4 * from_ld + x % 4];
                for (size_t y = 0; y < 16; y++) out[y / 4 * to_ld + y % 4] = r[y % 4][y / 4];
            } else // at an edge
                for (size_t x = 0; x < 4 && i + x < rows; x++)
                    for (size_t y = 0; y < 4 && j + y < columns; y++) out[y * to_ld + x] = a[x * from_ld + y];
        }
}

// Copies the rows k.. (depth of them) and columns j.. (panel by panel) of op(B).
static void matmul_pack(float *panel, size_t size, const Product *p, size_t k, size_t depth, size_t j,
                        size_t width) {
    const float *B = p->B + (p->transpose_b ? j * p->ldb + k : k * p->ldb + j);
    for (size_t c = 0; p->transpose_b && c < width; c += TILE_COLUMNS, panel += size)
        transpose(panel, TILE_COLUMNS, B + c * p->ldb, p->ldb, smaller(width - c, TILE_COLUMNS), depth);
    for (size_t d = 0; !p->transpose_b && d < depth; d++)
        for (size_t c = 0; c < width; c += TILE_COLUMNS) {
            const float *from = B + d * p->ldb + c;
            float *to = panel + c / TILE_COLUMNS * size + d * TILE_COLUMNS;
            for (int x = 0; x < TILE_COLUMNS; x += 16) __builtin_prefetch(from + 8 * p->ldb + x);
            if (width - c >= TILE_COLUMNS)
                memcpy(to, from, TILE_COLUMNS * sizeof(float)); // a constant size: two vectors, no call
            else
                memcpy(to, from, (width - c) * sizeof(float));
        }
}

static void round_in_place(float *x, size_t count); // to bfloat16: section 18

// One block of C, for all of K.
static void matmul_block(const void *product, size_t block) {
    const Product *p = product;
    static _Thread_local _Alignas(64) float packed_a[GROUP * A_LD], packed_b[PACKED_B];
    size_t row = block / p->blocks_across * p->rows, end = smaller(row + p->rows, p->M);
    size_t column = block % p->blocks_across * p->columns, columns = smaller(p->columns, p->N - column);
    bool in_place = !p->transpose_a && p->lda % 1024 != 0 && !p->round_operands;
    size_t lda = in_place ? p->lda : A_LD;
    for (size_t k = 0, depth, pieces = (p->K + DEPTH - 1) / DEPTH; pieces > 0; k += depth, pieces--) {
        depth = (p->K - k) / pieces;
        size_t panel_size = depth * TILE_COLUMNS + 16; // + 16: no multiple of 4 KB here either
        matmul_pack(packed_b, panel_size, p, k, depth, column, columns);
        if (p->round_operands)
            round_in_place(packed_b, (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * panel_size);
        for (size_t i = row, group; i < end; i += group) {
            group = smaller(GROUP, end - i);
            if (p->transpose_a) transpose(packed_a, A_LD, p->A + k * p->lda + i, p->lda, depth, group);
            for (size_t x = 0; !in_place && !p->transpose_a && x < group; x++)
                memcpy(packed_a + x * A_LD, p->A + (i + x) * p->lda + k, depth * sizeof(float));
            if (p->round_operands) round_in_place(packed_a, group * A_LD);
            const float *group_a = in_place ? p->A + i * p->lda + k : packed_a;
            for (size_t j = 0; j < columns; j += TILE_COLUMNS)
                for (size_t x = 0; x < group; x += TILE_ROWS)
                    matmul_tile(p->C + (i + x) * p->ldc + column + j, p->ldc, group_a + x * lda, lda,
                                packed_b + j / TILE_COLUMNS * panel_size, smaller(group - x, TILE_ROWS),
                                smaller(columns - j, TILE_COLUMNS), depth, p->accumulate || k > 0);
        }
    }
}

// At most FEW rows, as when tokens are generated: nothing of B is used again, so it is read once,
// in place. What is prefetched is what comes next: the processor's own guesses end at each page,
// and rows may be pages apart.
enum { FEW = 8 };

// Columns column .. end - 1 of A · Bᵀ: dot products with the rows of B.
static void few_rows_transposed(const Product *p, size_t column, size_t end) {
    for (size_t j = column; j < end; j++) {
        const float *B = p->B + j * p->ldb;
        for (size_t k = 0; k < p->K; k += 16) __builtin_prefetch(B + (1 + 2048 / p->K) * p->ldb + k);
        for (size_t i = 0; i < p->M; i++) {
            const float *A = p->A + i * p->lda;
            Vector sum[4] = {0};
            float total = p->accumulate ? p->C[i * p->ldc + j] : 0;
            size_t k = 0;
            for (; k + 4 * LANES <= p->K; k += 4 * LANES)
                for (int v = 0; v < 4; v++)
                    sum[v] += ((const Vector *)(A + k))[v] * ((const Vector *)(B + k))[v];
            const Vector all = sum[0] + sum[1] + (sum[2] + sum[3]);
            const float *lanes = (const float *)&all;
#pragma omp simd reduction(+ : total)
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
            for (; k < p->K; k++) total += A[k] * B[k];
            p->C[i * p->ldc + j] = total;
        }
    }
}

// Adds n <= 8 rows of B, from row k on, each times its elements of A, to columns column .. end - 1 of C. The
// eight rows are read side by side, so that each vector of C is loaded and stored only once for all of them.
static void few_rows_step(const Product *p, size_t k, size_t n, size_t column, size_t end) {
    const size_t rows_ahead = 8 + 2048 / (end - column); // to prefetch
    const float *B = p->B + k * p->ldb;
    float a[FEW][8] = {0};
    for (size_t i = 0; i < p->M; i++) memcpy(a[i], p->A + i * p->lda + k, n * sizeof(float));
    size_t j = column;
    for (; n == 8 && j + LANES <= end; j += LANES) {
        Vector b[8];
        for (size_t x = 0; x < 8; x++) {
            b[x] = *(const Vector *)(B + x * p->ldb + j);
            __builtin_prefetch(B + (x + rows_ahead) * p->ldb + j);
        }
        for (size_t i = 0; i < p->M; i++) {
            Vector sum = *(Vector *)(p->C + i * p->ldc + j);
            for (size_t x = 0; x < 8; x++) sum += a[i][x] * b[x];
            *(Vector *)(p->C + i * p->ldc + j) = sum;
        }
    }
    for (; j < end; j++) // what is left over: the last columns, or the last rows of B
        for (size_t i = 0; i < p->M; i++)
            for (size_t x = 0; x < n; x++) p->C[i * p->ldc + j] += a[i][x] * B[x * p->ldb + j];
}

// Columns column .. end - 1 of A · B.
static void few_rows_plain(const Product *p, size_t column, size_t end) {
    for (size_t i = 0; !p->accumulate && i < p->M; i++)
        memset(p->C + i * p->ldc + column, 0, (end - column) * sizeof(float));
    for (size_t k = 0; k < p->K; k += 8) few_rows_step(p, k, smaller(8, p->K - k), column, end);
}

static void matmul_few_rows(const void *product, size_t block) {
    const Product *p = product;
    size_t column = block * p->columns, end = smaller(column + p->columns, p->N);
    (p->transpose_b ? few_rows_transposed : few_rows_plain)(p, column, end);
}

// Calls work(product, 0) to work(product, count - 1), on all threads or on the calling one alone.
static void share_out(void (*work)(const void *, size_t), const void *product, size_t count, size_t threads) {
    if (threads == 1) // even an idle parallel region takes time
        for (size_t i = 0; i < count; i++) work(product, i);
    else
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < count; i++) work(product, i);
}

// Cuts C into blocks and shares them out. Inside a parallel region the calling thread works alone.
static void matmul_builtin(Product p) {
    if (p.M == 0 || p.N == 0) return;
    bool few = (p.M <= FEW && !p.transpose_a && !p.round_operands) || p.K == 0;
    bool alone = omp_in_parallel() || (double)p.M * p.N * p.K < 1e5;
    size_t threads = alone ? 1 : (size_t)omp_get_max_threads();
    // A block's panels: none wider than packed_b can hold, as many blocks as threads or a multiple of them.
    size_t panels = (p.N + TILE_COLUMNS - 1) / TILE_COLUMNS;
    size_t most = few ? panels : PACKED_B / (smaller(p.K, DEPTH) * TILE_COLUMNS + 16);
    p.blocks_across = ((panels + most - 1) / most + threads - 1) / threads * threads;
    p.columns = (panels + p.blocks_across - 1) / p.blocks_across * TILE_COLUMNS;
    p.blocks_across = (p.N + p.columns - 1) / p.columns;
    p.rows = few || threads == 1 ? p.M : smaller(p.M, 10 * GROUP);
    size_t blocks = p.blocks_across * ((p.M + p.rows - 1) / p.rows);
    share_out(few ? matmul_few_rows : matmul_block, &p, blocks, threads);
}

// =====================================================================================================
// 18. How a product gets faster with half the bits
// =====================================================================================================
// A bfloat16 is the upper half of a float: the sign, the eight bits of the exponent, and seven of the 23 bits
// behind the point. It has the range of a float, but only two to three decimal digits. For the operands of a
// product that is enough: hundreds of terms are summed, and their rounding errors, some up and some down,
// mostly cancel. With --precision bfloat16 every product rounds its operands to bfloat16 and sums in float32.
// Everything else stays float32: weights, gradients, moments, layernorm, softmax, the loss, checkpoints. So
// does the triangle in attention_forward_tile, a plain loop. (A product would multiply masked places by 0,
// and NaN times 0 is NaN.)
//
// What that brings depends on the processor. All of it rests on one idea, the pair: two neighbours along k
// stand side by side in 32 bits, where one float was before.
// 1. Pairs. One instruction multiplies 16 pairs by 16 pairs (arm64: 4 by 4) and adds both products of each to
//    a sum. A step is now two k long; the tiles of section 17 stay as they are.
// 2. Packing. Operands must be rounded anyway, so both are copied into pairs: A by rows, B by panels. The
//    tiles need only half the time now, so copies weigh twice as much as before, and most of their time is
//    waiting for memory. So all threads first share the packing of A. Then each packs B panel by panel, and
//    while its tiles use one panel, they prefetch what the next one will be packed from.
// 3. Whole tiles (AMX, in Xeons since 2023). Its registers hold 16 rows of 16 pairs. One instruction
//    multiplies such a tile of A by one of B, and it takes both as they are packed for the pairs. It is so
//    fast that B, too, is packed once for all threads.
// A processor without such an instruction splits each pair into two floats. With 32 vector registers
// (AVX-512) that is about as fast as float32. With 16 it is slower: there the float32 product rounds what it
// packs. The meaning is the same everywhere: exact products of rounded operands, summed in an order that
// depends on the kind of processor and on the sizes, but not on the number of threads.
//
// What ran where: AVX512_BF16 and the float32 product on real processors (AMD Zen 4), the kernel for arm64 in
// an emulator, the kernel for AMX with its instructions written out in plain C (dev/amx_emulation.h).

typedef uint16_t BFloat16;
typedef uint32_t __attribute__((may_alias)) BFloat16Pair; // the lower half comes first along k
typedef uint32_t PairVector __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// The nearest bfloat16, in the upper half; what lies in the lower half means nothing. Half of the last bit
// that stays is added, a little less when that bit is 0: so ties go to the even one. NaN stays NaN.
static inline uint32_t round_to_bfloat16(float x) {
    union {
        float f;
        uint32_t bits;
    } u = {x};
    return x == x ? u.bits + 0x7fff + (u.bits >> 16 & 1) : 0x7fc00000;
}

static inline BFloat16 bfloat16_of(float x) { return (BFloat16)(round_to_bfloat16(x) >> 16); }

// For the float32 product: rounds what it has packed.
static void round_in_place(float *x, size_t count) {
    BFloat16Pair *bits = (BFloat16Pair *)x;
    for (size_t i = 0; i < count; i++) bits[i] = round_to_bfloat16(x[i]) & 0xffff0000;
}

static inline BFloat16Pair pair_of(float first, float second) {
    return round_to_bfloat16(first) >> 16 | (round_to_bfloat16(second) & 0xffff0000);
}

// ---- what processors have ----
// All that is written for one kind of processor stands here.

// sum += a.first · b.first + a.second · b.second, lane by lane.
static inline Vector dot_pairs(Vector sum, PairVector a, PairVector b) {
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (Vector)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    sum += (Vector)(a << 16) * (Vector)(b << 16);
    return sum + (Vector)(a & 0xffff0000) * (Vector)(b & 0xffff0000);
#endif
}

static bool amx_allowed = false; // the processor has AMX, and the system lets us use it: choose_precision

#ifdef USE_AMX
// One palette for all: eight tiles of 16 rows, 64 bytes each. (Constant: gcc does not see that it is read.)
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// C (at most 32 x 32) = or += A (32, depth) · two tiles of columns of B. depth counts pairs, a multiple of 16.
// Four tiles hold sums, two hold A, two hold B. What lies beyond the edges of C goes through a buffer.
static void amx_tile(float *C, size_t ldc, const BFloat16Pair *A, size_t lda, const BFloat16Pair *B[2],
                     size_t rows, size_t columns, size_t depth, bool add) {
    float edge[32 * 32];
    const bool whole = rows >= 32 && columns >= 32;
    float *c = whole ? C : edge;
    const size_t ld = (whole ? ldc : 32) * sizeof(float), ld_b = TILE_COLUMNS * sizeof(BFloat16Pair);
    for (size_t x = 0; !whole && add && x < rows && x < 32; x++)
        memcpy(edge + x * 32, C + x * ldc, smaller(columns, 32) * sizeof(float));
    __asm__ volatile("" ::: "memory"); // tiles read and write memory unseen by the compiler
    if (add) {
        _tile_loadd(0, c, ld);
        _tile_loadd(1, c + 16, ld);
        _tile_loadd(2, (char *)c + 16 * ld, ld);
        _tile_loadd(3, (char *)c + 16 * ld + 64, ld);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t k = 0; k < depth; k += 16) {
        _tile_loadd(4, A + k, lda * sizeof(BFloat16Pair));
        _tile_loadd(5, A + 16 * lda + k, lda * sizeof(BFloat16Pair));
        _tile_loadd(6, B[0] + k * TILE_COLUMNS, ld_b);
        _tile_loadd(7, B[1] + k * TILE_COLUMNS, ld_b);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ld);
    _tile_stored(1, c + 16, ld);
    _tile_stored(2, (char *)c + 16 * ld, ld);
    _tile_stored(3, (char *)c + 16 * ld + 64, ld);
    __asm__ volatile("" ::: "memory");
    for (size_t x = 0; !whole && x < rows && x < 32; x++)
        memcpy(C + x * ldc, edge + x * 32, smaller(columns, 32) * sizeof(float));
}
#endif

// ---- packing pairs ----

// A piece of a product whose operands fit into the packed form: STRIPE rows, columns and steps at most. A is
// packed PAIR_GROUP rows at a time, and what must be transposed PIECE steps at a time, in the first-level cache.
enum { STRIPE = 2304, PAIR_GROUP = 96, PIECE = 64 };
typedef struct {
    Product p;
    BFloat16Pair *a, *b;       // op(A): M rows of lda pairs; for AMX op(B): panels of TILE_COLUMNS columns
    size_t lda, panel_size;    // pairs
    size_t size_a;             // pairs, of the memory for a
    size_t steps, whole_steps; // ceil(K / 2), and that rounded up to whole tiles of AMX, with zeros
} PairProduct;

// to[r][s] = the pair (from[r][2s], from[r][2s + 1]); from has K columns, and zeros fill up what is missing.
static void pack_neighbours(BFloat16Pair *to, size_t to_ld, const float *from, size_t ld, size_t rows,
                            size_t K, size_t steps) {
    for (size_t r = 0; r < rows; r++, to += to_ld, from += ld) {
        for (size_t s = 0; s < K / 2; s++) to[s] = pair_of(from[2 * s], from[2 * s + 1]);
        for (size_t s = K / 2; s < steps; s++) to[s] = pair_of(2 * s < K ? from[2 * s] : 0, 0);
    }
}

// to[s][c] = the pair (from[2s][c], from[2s + 1][c]); from has K rows, and zeros fill up what is missing.
static void pack_two_rows(BFloat16Pair *to, size_t to_ld, const float *from, size_t ld, size_t columns,
                          size_t K, size_t steps) {
    for (size_t s = 0; s < steps; s++, to += to_ld, from += 2 * ld) {
        const float *second = from + ld;
        for (size_t c = 0; c < columns; c += 16) {
            __builtin_prefetch(from + 8 * ld + c);
            __builtin_prefetch(second + 8 * ld + c);
        }
        for (size_t c = 0; c < columns && 2 * s + 1 < K; c++) to[c] = pair_of(from[c], second[c]);
        for (size_t c = 0; c < columns && 2 * s + 1 >= K; c++) to[c] = pair_of(2 * s < K ? from[c] : 0, 0);
    }
}

// Packs one group of rows of op(A), each row's steps side by side.
static void pack_a(const void *product, size_t group) {
    const PairProduct *q = product;
    const Product *p = &q->p;
    const size_t row = group * PAIR_GROUP, rows = smaller(PAIR_GROUP, p->M - row);
    BFloat16Pair *to = q->a + row * q->lda, piece[PIECE * PAIR_GROUP];
    if (!p->transpose_a) {
        pack_neighbours(to, q->lda, p->A + row * p->lda, p->lda, rows, p->K, q->whole_steps);
        return;
    }
    for (size_t s = 0; s < q->whole_steps; s += PIECE) {
        const size_t steps = smaller(PIECE, q->whole_steps - s), K = p->K > 2 * s ? p->K - 2 * s : 0;
        pack_two_rows(piece, PAIR_GROUP, p->A + 2 * s * p->lda + row, p->lda, rows, K, steps);
        transpose((float *)(to + s), q->lda, (float *)piece, PAIR_GROUP, steps, rows);
    }
}

// Packs `steps` steps of one panel of op(B), from its column `column` and its step `first` on.
static void pack_panel(BFloat16Pair *to, const Product *p, size_t column, size_t first, size_t steps) {
    const size_t columns = smaller(TILE_COLUMNS, p->N - column), end = first + steps;
    BFloat16Pair piece[TILE_COLUMNS * PIECE];
    if (!p->transpose_b) {
        const size_t K = p->K > 2 * first ? p->K - 2 * first : 0;
        pack_two_rows(to, TILE_COLUMNS, p->B + 2 * first * p->ldb + column, p->ldb, columns, K, steps);
        return;
    }
    for (size_t s = first, n; s < end; s += n, to += n * TILE_COLUMNS) {
        n = smaller(PIECE, end - s);
        const size_t K = p->K > 2 * s ? smaller(p->K - 2 * s, 2 * n) : 0;
        pack_neighbours(piece, PIECE, p->B + column * p->ldb + 2 * s, p->ldb, columns, K, n);
        transpose((float *)to, TILE_COLUMNS, (float *)piece, PIECE, columns, n);
    }
}

// Packs one whole panel.
static void pack_b(const void *product, size_t panel) {
    const PairProduct *q = product;
    pack_panel(q->b + panel * q->panel_size, &q->p, panel * TILE_COLUMNS, 0, q->whole_steps);
}

// ---- the product of pairs ----

// Memory that will be read soon: LINES cache lines that are `across` floats apart, then, `along` floats
// further, the next ones.
typedef struct {
    const float *from;
    size_t across, along;
} Ahead;
enum { LINES = (TILE_COLUMNS + 15) / 16 };

// matmul_tile for pairs. `height` is a constant: the rows of a tile, or fewer where the product has only a
// few. Every eighth step prefetches the next lines of what is `ahead`.
static inline __attribute__((always_inline)) void
pair_tile(int height, float *C, size_t ldc, const BFloat16Pair *A, size_t lda, const BFloat16Pair *panel,
          size_t rows, size_t columns, size_t depth, bool add, Ahead ahead) {
    Vector sum[TILE_ROWS][TILE_VECTORS] = {0};
    const BFloat16Pair *a[TILE_ROWS];
    for (int i = 0; i < height; i++) {
        a[i] = A + smaller((size_t)i, rows - 1) * lda;
        for (int j = 0; j < TILE_COLUMNS; j += 16)
            __builtin_prefetch(C + smaller((size_t)i, rows - 1) * ldc + j, 1);
    }
    for (size_t k = 0; k < depth; k++, panel += TILE_COLUMNS) {
        for (int j = 0; j < TILE_COLUMNS; j += 16) __builtin_prefetch(panel + 48 * TILE_COLUMNS + j);
        for (size_t line = 0; line < LINES && k % 8 == 0; line++)
            __builtin_prefetch(ahead.from + line * ahead.across, 0, 2); // 2: into the second-level cache
        ahead.from += k % 8 == 0 ? ahead.along : 0;
        for (int i = 0; i < height; i++)
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[i][v] = dot_pairs(sum[i][v], a[i][k] - (PairVector){0}, ((const PairVector *)panel)[v]);
    }
    store_tile(C, ldc, sum, smaller(rows, (size_t)height), columns, add);
}

// What the tile that begins at row x prefetches: a sixteenth of the floats that steps k .. k + depth - 1 of the
// panel at column j will be packed from. (At the edges of B that reaches beyond it, which does no harm.)
static Ahead ahead_of(const Product *p, size_t j, size_t k, size_t depth, size_t x) {
    const size_t part = smaller(x / TILE_ROWS, 15), rows = (depth + 7) / 8;
    if (p->transpose_b) return (Ahead){p->B + (j + part * LINES) * p->ldb + 2 * k, p->ldb, 16};
    return (Ahead){p->B + (2 * k + part * rows) * p->ldb + j, 16, p->ldb};
}

// One block of C. Its thread packs DEPTH steps of a panel, and all rows of the block use them.
static void pair_block(const void *product, size_t block) {
    static _Thread_local _Alignas(64) BFloat16Pair panel[DEPTH * TILE_COLUMNS];
    const PairProduct *q = product;
    const Product *p = &q->p;
    const size_t row = block / p->blocks_across * p->rows, end = smaller(row + p->rows, p->M);
    const size_t column = block % p->blocks_across * p->columns, right = smaller(column + p->columns, p->N);
    for (size_t k = 0; k < q->steps; k += DEPTH)
        for (size_t j = column; j < right; j += TILE_COLUMNS) {
            const size_t depth = smaller(DEPTH, q->steps - k);
            const bool last = j + TILE_COLUMNS >= right;
            const size_t next_j = last ? column : j + TILE_COLUMNS, next_k = last ? k + DEPTH : k;
            pack_panel(panel, p, j, k, depth);
            for (size_t x = row; x < end; x += TILE_ROWS)
                pair_tile(TILE_ROWS, p->C + x * p->ldc + j, p->ldc, q->a + x * q->lda + k, q->lda, panel,
                          end - x, right - j, depth, p->accumulate || k > 0,
                          ahead_of(p, next_j, next_k, depth, x - row));
        }
}

#ifndef USE_AMX
#define amx_block pair_block
#else
// The same by tiles of AMX, from panels that are packed already. A panel holds three tiles of B, or two.
static void amx_block(const void *product, size_t block) {
    const PairProduct *q = product;
    const Product *p = &q->p;
    const size_t row = block / p->blocks_across * p->rows, end = smaller(row + p->rows, p->M);
    const size_t column = block % p->blocks_across * p->columns, right = smaller(column + p->columns, p->N);
    _tile_loadconfig(&amx_tiles);
    for (size_t k = 0, depth; k < q->whole_steps; k += depth) {
        depth = smaller(DEPTH, q->whole_steps - k);
        for (size_t i = row; i < end; i += PAIR_GROUP)
            for (size_t j = column; j < right; j += 32) {
                const BFloat16Pair *b[2];
                for (size_t t = 0; t < 2; t++)
                    b[t] = q->b + (j + 16 * t) / TILE_COLUMNS * q->panel_size + k * TILE_COLUMNS +
                           (j + 16 * t) % TILE_COLUMNS;
                for (size_t x = i; x < end && x < i + PAIR_GROUP; x += 32)
                    amx_tile(p->C + x * p->ldc + j, p->ldc, q->a + x * q->lda + k, q->lda, b, end - x,
                             right - j, depth, p->accumulate || k > 0);
            }
    }
    _tile_release();
}
#endif

// Packs and multiplies a piece. With `same_b` AMX finds op(B) packed already.
static void multiply_piece(PairProduct *q, bool same_b, size_t threads) {
    Product *p = &q->p;
    const size_t panels = (p->N + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const size_t most = amx_allowed ? 6 : 16; // panels of a block
    p->blocks_across = ((panels + most - 1) / most + threads - 1) / threads * threads;
    p->columns = (panels + p->blocks_across - 1) / p->blocks_across * TILE_COLUMNS;
    p->blocks_across = (p->N + p->columns - 1) / p->columns;
    const bool all_rows = amx_allowed ? threads == 1 : p->blocks_across >= threads; // else too few blocks
    p->rows = all_rows ? p->M : smaller(p->M, 5 * PAIR_GROUP);
    const size_t blocks = p->blocks_across * ((p->M + p->rows - 1) / p->rows);
    share_out(pack_a, q, (p->M + PAIR_GROUP - 1) / PAIR_GROUP, threads);
    if (amx_allowed && !same_b) share_out(pack_b, q, panels, threads);
    share_out(amx_allowed ? amx_block : pair_block, q, blocks, threads);
}

// Sets the layout of packed operands and returns how many pairs they take. Rows are an odd number of cache
// lines apart, since multiples of 4 KB would push each other out of the cache.
static size_t pair_layout(PairProduct *q, size_t M, size_t N, size_t K) {
    const size_t steps = (smaller(K, 2 * STRIPE) + 31) / 32 * 16;
    const size_t panels = amx_allowed ? smaller(N, STRIPE) / TILE_COLUMNS + 2 : 0;
    q->lda = (steps / 16 | 1) * 16;
    q->panel_size = steps * TILE_COLUMNS + 16;
    q->size_a = (smaller(M, STRIPE) + PAIR_GROUP) * q->lda;
    return q->size_a + panels * q->panel_size;
}

// Any product, piece by piece. A thread that works alone, in a parallel region, packs into memory of its own;
// else all threads use one memory, which is kept for the next product.
static void matmul_pairs(Product p) {
    static float *kept = NULL;
    static size_t kept_size = 0;
    const bool alone = omp_in_parallel();
    const size_t threads = alone || (double)p.M * p.N * p.K < 1e5 ? 1 : (size_t)omp_get_max_threads();
    PairProduct q = {0};
    const size_t size = pair_layout(&q, p.M, p.N, p.K);
    if (!alone && size > kept_size) {
        free(kept);
        kept = xfloats(kept_size = size);
    }
    float *memory = alone ? xfloats(size) : kept;
    q.a = (BFloat16Pair *)memory;
    q.b = q.a + q.size_a;
    for (size_t k = 0; k < p.K; k += 2 * STRIPE)
        for (size_t j = 0; j < p.N; j += STRIPE)
            for (size_t i = 0; i < p.M; i += STRIPE) {
                q.p = p;
                q.p.M = smaller(p.M - i, STRIPE), q.p.N = smaller(p.N - j, STRIPE);
                q.p.K = smaller(p.K - k, 2 * STRIPE);
                q.p.A += p.transpose_a ? k * p.lda + i : i * p.lda + k;
                q.p.B += p.transpose_b ? j * p.ldb + k : k * p.ldb + j;
                q.p.C += i * p.ldc + j;
                q.p.accumulate = p.accumulate || k > 0;
                q.steps = (q.p.K + 1) / 2;
                q.whole_steps = (q.steps + 15) / 16 * 16;
                multiply_piece(&q, i > 0, threads);
            }
    if (alone) free(memory);
}

// Are products by pairs faster? Not on a processor that has only 16 vector registers and no instruction for
// pairs: splitting the pairs costs more time there than the smaller copies save.
static bool pairs_pay(void) {
#if defined(__AVX512F__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return true;
#else
    return amx_allowed;
#endif
}

// Any product in bfloat16: by pairs, or by the float32 product, which then rounds what it packs.
static void matmul_bfloat16(Product p) {
    p.round_operands = true;
    (pairs_pay() && p.K > 0 ? matmul_pairs : matmul_builtin)(p);
}

// The memory that packed operands take in a training step with so many rows, in floats; 0 when none are
// packed.
static size_t packed_size(const Config *config, size_t rows) {
    const size_t C = (size_t)config->n_embd, F = (size_t)config->n_inner, V = (size_t)config->vocab_size;
    const size_t chunk = smaller(rows, LOGIT_ROWS);
    const size_t products[][3] = {{rows, F, C},  {rows, C, F},  {C, F, rows}, {F, C, rows},
                                  {chunk, V, C}, {chunk, C, V}, {V, C, chunk}};
    size_t most = 0;
    for (size_t i = 0; bfloat16_products && pairs_pay() && i < sizeof products / sizeof *products; i++) {
        size_t size = pair_layout(&(PairProduct){0}, products[i][0], products[i][1], products[i][2]);
        most = size > most ? size : most;
    }
    return most;
}

// ---- few rows, from copies ----
// A token that is generated reads every weight, and every key and value in the cache, to multiply it once. So
// time is what memory needs, and half the bits are half the time: cache_new() keeps copies in bfloat16 of
// the arrays that are read again for each token. They hold what the product would round to anyway. Weights do not
// change meanwhile: their copies are packed in panels, one long stream for each thread.

typedef struct {
    const float *from;
    size_t size;
    BFloat16 *to;
    size_t panel_size; // pairs, in a packed copy
} Copy;

static Copy *copies = NULL;
static size_t copy_count = 0, copy_capacity = 0;

// The copy of the array in which B lies; NULL when there is none.
static const Copy *find_copy(const float *B) {
    for (size_t i = 0; i < copy_count; i++)
        if (B >= copies[i].from && B < copies[i].from + copies[i].size) return &copies[i];
    return NULL;
}

// Keeps a copy of an array from now on, with nothing in it. Large pages save the processor the search for
// where thousands of small ones are.
static Copy *add_copy(const float *from, size_t size, size_t panel_size, size_t bytes) {
    const size_t large_page = 1 << 21;
    void *to;
    if (posix_memalign(&to, large_page, bytes))
        die("out of memory: %.1f MB were asked for", (double)bytes / 1e6);
#ifdef MADV_HUGEPAGE
    madvise(to, bytes, MADV_HUGEPAGE); // a wish: nothing is lost when it is not granted
#endif
    copies = grow(copies, copy_count + 1, &copy_capacity, sizeof *copies);
    copies[copy_count] = (Copy){from, size, to, panel_size};
    return &copies[copy_count++];
}

static void keep_copy(const float *from, size_t size) {
    if (bfloat16_products) add_copy(from, size, 0, size * sizeof(BFloat16));
}

static void refresh_copy(const float *from, size_t size) {
    const Copy *copy = find_copy(from);
    for (size_t i = 0; copy && i < size; i++) copy->to[from - copy->from + i] = bfloat16_of(from[i]);
}

static void keep_packed_copy(const float *B, bool transpose_b, size_t K, size_t N) {
    if (!bfloat16_products) return;
    PairProduct q = {.p = {.B = B, .ldb = transpose_b ? K : N, .N = N, .K = K, .transpose_b = transpose_b}};
    const size_t panels = (N + TILE_COLUMNS - 1) / TILE_COLUMNS;
    q.whole_steps = (K + 1) / 2;
    q.panel_size = q.whole_steps * TILE_COLUMNS;
    q.b = (BFloat16Pair *)add_copy(B, K * N, q.panel_size, panels * q.panel_size * sizeof *q.b)->to;
    share_out(pack_b, &q, panels, (size_t)omp_get_max_threads());
}

static void drop_copies(void) {
    while (copy_count > 0) free(copies[--copy_count].to);
}

// A product of few rows: a is A rounded (M, lda), b is where B begins in its copy.
typedef struct {
    Product p;
    const BFloat16 *a, *b;
    size_t lda, panel_size;
} FewProduct;

// One panel of a packed copy.
static void few_pairs_packed(const void *product, size_t panel) {
    const FewProduct *q = product;
    const Product *p = &q->p;
    const BFloat16Pair *a = (const BFloat16Pair *)q->a,
                       *b = (const BFloat16Pair *)q->b + panel * q->panel_size;
    const size_t column = panel * TILE_COLUMNS, columns = p->N - column, steps = (p->K + 1) / 2,
                 lda = q->lda / 2;
    const Ahead nothing = {(const float *)b, 0, 0};
    float *C = p->C + column;
    if (p->M == 1)
        pair_tile(1, C, p->ldc, a, lda, b, 1, columns, steps, p->accumulate, nothing);
    else if (p->M <= 4)
        pair_tile(4, C, p->ldc, a, lda, b, p->M, columns, steps, p->accumulate, nothing);
    else
        for (size_t i = 0; i < p->M; i += TILE_ROWS)
            pair_tile(TILE_ROWS, C + i * p->ldc, p->ldc, a + i * lda, lda, b, p->M - i, columns, steps,
                      p->accumulate, nothing);
}

static inline float float_of(BFloat16 x) {
    union {
        uint32_t bits;
        float f;
    } u = {(uint32_t)x << 16};
    return u.f;
}

// Columns column .. end - 1 of A · Bᵀ: dot products with the rows of B, two vectors of pairs at a time.
static void few_pairs_transposed(const FewProduct *q, size_t column, size_t end) {
    const Product *p = &q->p;
    enum { STEP = 2 * LANES }; // elements in a vector of pairs
    for (size_t j = column; j < end; j++) {
        const BFloat16 *b = q->b + j * p->ldb;
        for (size_t k = 0; k < p->K; k += STEP) __builtin_prefetch(b + 96 * p->ldb + k);
        for (size_t i = 0; i < p->M; i++) {
            const BFloat16 *a = q->a + i * q->lda;
            Vector sum[2] = {0};
            float total = p->accumulate ? p->C[i * p->ldc + j] : 0;
            size_t k = 0;
            for (; k + 2 * STEP <= p->K; k += 2 * STEP)
                for (int v = 0; v < 2; v++)
                    sum[v] =
                        dot_pairs(sum[v], ((const PairVector *)(a + k))[v], ((const PairVector *)(b + k))[v]);
            const Vector all = sum[0] + sum[1];
            const float *lanes = (const float *)&all;
#pragma omp simd reduction(+ : total)
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
            for (; k < p->K; k++) total += float_of(a[k]) * float_of(b[k]);
            p->C[i * p->ldc + j] = total;
        }
    }
}

// few_rows_step for copies: adds eight rows of B, from row k on, to columns column .. end - 1 of C. A vector
// of a row holds two columns in each lane; two rows make pairs of the even columns and pairs of the odd ones.
static void few_pairs_step(const FewProduct *q, size_t k, size_t column, size_t end) {
    const Product *p = &q->p;
    const size_t n = smaller(8, p->K - k), rows_ahead = 8 + 8192 / (end - column); // to prefetch
    const BFloat16 *b = q->b + k * p->ldb;
    size_t j = column;
    for (; n == 8 && j + 2 * LANES <= end; j += 2 * LANES) {
        PairVector pairs[4][2];
        for (size_t x = 0; x < 4; x++) {
            const PairVector first = *(const PairVector *)(b + 2 * x * p->ldb + j);
            const PairVector second = *(const PairVector *)(b + (2 * x + 1) * p->ldb + j);
            pairs[x][0] = (first & 0xffff) | second << 16;
            pairs[x][1] = first >> 16 | (second & 0xffff0000);
            __builtin_prefetch(b + (2 * x + rows_ahead) * p->ldb + j);
            __builtin_prefetch(b + (2 * x + 1 + rows_ahead) * p->ldb + j);
        }
        for (size_t i = 0; i < p->M; i++) {
            const BFloat16Pair *a = (const BFloat16Pair *)(q->a + i * q->lda + k);
            float *c = p->C + i * p->ldc + j;
            Vector sum[2] = {0};
            for (size_t x = 0; x < 4; x++)
                for (int v = 0; v < 2; v++) sum[v] = dot_pairs(sum[v], a[x] - (PairVector){0}, pairs[x][v]);
            const float *even = (const float *)&sum[0], *odd = (const float *)&sum[1];
            for (int lane = 0; lane < LANES; lane++) {
                c[2 * lane] += even[lane];
                c[2 * lane + 1] += odd[lane];
            }
        }
    }
    for (; j < end; j++) // what is left over: the last columns, or the last rows of B
        for (size_t i = 0; i < p->M; i++)
            for (size_t x = 0; x < n; x++)
                p->C[i * p->ldc + j] += float_of(q->a[i * q->lda + k + x]) * float_of(b[x * p->ldb + j]);
}

static void few_pairs(const void *product, size_t block) {
    const FewProduct *q = product;
    const Product *p = &q->p;
    const size_t column = block * p->columns, end = smaller(column + p->columns, p->N);
    if (p->transpose_b) {
        few_pairs_transposed(q, column, end);
        return;
    }
    for (size_t i = 0; !p->accumulate && i < p->M; i++)
        memset(p->C + i * p->ldc + column, 0, (end - column) * sizeof(float));
    for (size_t k = 0; k < p->K; k += 8) few_pairs_step(q, k, column, end);
}

// A product of at most FEW rows whose B lies in a copy.
static void matmul_few_pairs(Product p, const Copy *copy) {
    if (p.M == 0 || p.N == 0) return;
    const bool alone = omp_in_parallel() || (double)p.M * p.N * p.K < 1e5;
    const bool packed = copy->panel_size > 0;
    const size_t threads = alone ? 1 : (size_t)omp_get_max_threads(), steps = (p.K + 1) / 2;
    BFloat16Pair *a = xmalloc(p.M * steps * sizeof *a);
    pack_neighbours(a, steps, p.A, p.lda, p.M, p.K, steps);
    const size_t panels = (p.N + TILE_COLUMNS - 1) / TILE_COLUMNS,
                 each = packed ? 1 : (panels + threads - 1) / threads;
    p.columns = each * TILE_COLUMNS;
    const FewProduct q = {p, (const BFloat16 *)a, copy->to + (packed ? 0 : p.B - copy->from), 2 * steps,
                          copy->panel_size};
    if (!packed || threads == 1)
        share_out(packed ? few_pairs_packed : few_pairs, &q, (panels + each - 1) / each, threads);
    else // `guided` hands out long runs of panels first: memory is fastest in one stream; then ever shorter ones
#pragma omp parallel for schedule(guided)
        for (size_t panel = 0; panel < panels; panel++) few_pairs_packed(&q, panel);
    free(a);
}

// =====================================================================================================
// 19. The one matmul, and a fast exp
// =====================================================================================================
// Every product of the program goes through matmul(): a CBLAS where there is one, or the built-in one.

typedef enum { MATMUL_BUILTIN, MATMUL_CBLAS } MatmulKind;

#ifdef USE_CBLAS
static MatmulKind matmul_kind = MATMUL_CBLAS;
#else
static MatmulKind matmul_kind = MATMUL_BUILTIN;
#endif

// C (M, N) = op(A) (M, K) · op(B) (K, N), or C +=, as Product says. Uses all threads, or only the calling one
// inside a parallel region.
static void matmul(float *C, size_t ldc, const float *A, size_t lda, bool transpose_a, const float *B,
                   size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, bool accumulate) {
#ifdef USE_CBLAS
    bool empty = M == 0 || N == 0 || K == 0 || bfloat16_products;
    bool few_rows = M <= 4 && !transpose_a; // single tokens: the built-in way reads B twice as fast
    if (matmul_kind == MATMUL_CBLAS && !few_rows && !empty) {
        // Not in a parallel region of one thread (`if (false)`): OpenMP would make new threads each time.
        cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans,
                    transpose_b ? CblasTrans : CblasNoTrans, (int)M, (int)N, (int)K, 1, A, (int)lda, B,
                    (int)ldb, accumulate, C, (int)ldc);
        return;
    }
#endif
    const Product p = {C, A, B, ldc, lda, ldb, M, N, K, transpose_a, transpose_b, accumulate, 0, 0, 0, false};
    const Copy *copy = M <= FEW && !transpose_a && K > 0 ? find_copy(B) : NULL;
    if (copy)
        matmul_few_pairs(p, copy);
    else if (bfloat16_products)
        matmul_bfloat16(p);
    else
        matmul_builtin(p);
}

#ifdef USE_OPENBLAS
// Which of the two is taken by --matmul auto follows from what they are, never from a stopwatch: the same
// command must give the same bits. With kernels for the same kind of vectors OpenBLAS is as fast as the
// built-in product or faster. It is slower where it has no kernels for this processor's widest vectors (an
// old version, or OPENBLAS_CORETYPE), and where it does not share OpenMP's threads (`parallel` is 0: it has
// none, 1: others).
//   core: openblas_get_corename(), the processor its kernels are for
static bool builtin_is_better(const char *core, int parallel, int threads) {
    static const struct {
        const char *core;
        int lanes; // floats in a vector
    } known[] = {{"skylakex", 16},  {"cooperlake", 16}, {"sapphirerapids", 16}, {"haswell", 8},
                 {"zen", 8},        {"excavator", 8},   {"sandybridge", 8},     {"bulldozer", 8},
                 {"piledriver", 8}, {"steamroller", 8}};
    int lanes = 4;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcasecmp(core, known[i].core) == 0) lanes = known[i].lanes;
    return (parallel != 2 && threads > 1) || lanes < LANES;
}
#endif

#ifdef USE_CBLAS
// OpenBLAS takes 128 MB of addresses for each thread and 128 more, some when it is loaded and the rest at its
// first large product. Where the system does not give them (ulimit -v) it asks again for ever, in silence. So
// this asks first, and ends the program.
static void need_room_for_openblas(size_t blocks) {
#if defined(USE_OPENBLAS) && defined(__linux__) && defined(__LP64__)
    size_t size = blocks << 27;
    void *room = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        die("OpenBLAS needs %zu MB of address space: raise the limit (ulimit -v), use fewer OMP_NUM_THREADS, "
            "or "
            "build with BLAS=none",
            size >> 20);
    munmap(room, size);
#else
    (void)blocks;
#endif
}
#endif

#if defined(USE_OPENBLAS) && defined(__GLIBC__)
// Runs before OpenBLAS is loaded, which is before main().
static void before_loading(void) {
    const char *given = getenv("OMP_NUM_THREADS");
    long cores = sysconf(_SC_NPROCESSORS_ONLN), threads = given ? atol(given) : 0;
    need_room_for_openblas(1 + (size_t)(threads > 0 && threads < cores ? threads : cores));
}
static void (*const run_before_loading)(void)
    __attribute__((section(".preinit_array"), used)) = before_loading;
#endif

// Settles which matmul is used.
static void choose_matmul(Options *options) {
#ifdef USE_OPENBLAS
    if (options->matmul == AUTO_CHOICE)
        options->matmul =
            builtin_is_better(openblas_get_corename(), openblas_get_parallel(), omp_get_max_threads())
                ? BUILTIN_CHOICE
                : OPENBLAS_CHOICE;
    bool own_threads = openblas_get_parallel() == 1; // a pool that would fight with OpenMP's
#ifndef _OPENMP
    own_threads = true; // this program is built for one core, whatever OpenBLAS is built for
#endif
    if (own_threads) openblas_set_num_threads(1);
#endif
#ifdef USE_CBLAS
    if (options->matmul == AUTO_CHOICE) options->matmul = OPENBLAS_CHOICE;
    matmul_kind = options->matmul == BUILTIN_CHOICE ? MATMUL_BUILTIN : MATMUL_CBLAS;
    if (matmul_kind == MATMUL_CBLAS) { // lets it take its memory now, before the model may leave it none
        enum { N = 256 };
        float *memory = xfloats(3 * N * N);
        memset(memory, 0, 3 * N * N * sizeof(float));
        need_room_for_openblas((size_t)omp_get_max_threads());
        matmul(memory, N, memory + N * N, N, false, memory + 2 * N * N, N, false, N, N, N, false);
        free(memory);
    }
#else
    if (options->matmul == OPENBLAS_CHOICE)
        die_usage("--matmul openblas: this program was built without a BLAS; --matmul builtin works");
    options->matmul = BUILTIN_CHOICE;
#endif
}

// --precision. Asks the system for AMX, whose registers it must save when it switches programs. (18 is their
// number in the processor's list of states, 0x1023 Linux's request for permission.)
static void choose_precision(Options *options) {
    bfloat16_products = options->precision == BFLOAT16_CHOICE;
    sums_in_bfloat16 = options->sum_precision == BFLOAT16_CHOICE;
    if (!bfloat16_products) return;
    if (options->matmul == OPENBLAS_CHOICE)
        die_usage("--precision bfloat16: its products are built in; leave out --matmul openblas");
    options->matmul = BUILTIN_CHOICE;
#ifdef USE_AMX
    amx_allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}

// What the banner says of the products in bfloat16.
static const char *precision_name(void) {
#if defined(__AVX512BF16__)
    return amx_allowed ? "built-in bfloat16 matmul (AMX)" : "built-in bfloat16 matmul (AVX512_BF16)";
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "built-in bfloat16 matmul (BF16)";
#else
    return "built-in bfloat16 matmul (without instructions for it)";
#endif
}

// What the banner says of the matmul in use.
static const char *matmul_name(void) {
#ifdef USE_OPENBLAS
    if (matmul_kind == MATMUL_CBLAS) return openblas_get_config(); // its version and the kind of core
#endif
    return matmul_kind == MATMUL_BUILTIN ? "built-in matmul" : "CBLAS";
}

// ---- exp ----
// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where eight terms of the series
// suffice: the relative error stays below 2e-7. Unlike expf it is plain arithmetic, so the compiler
// vectorises loops around it. Below -87 the result stays at 1.6e-38 in place of denormals; NaN stays NaN.
static inline float fast_exp(float x) {
    const float rounder = 12582912.0f; // 1.5 · 2^23: adding it leaves the rounded integer in the low bits
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    union {
        float f;
        int32_t i;
    } n = {.f = x * 1.44269504f + rounder}, power;
    // 2^n has n + 127 in the exponent's bits, and 0x4b400000 are rounder's. (Unsigned: NaN shifts bits out.)
    power.i = (int32_t)((uint32_t)(n.i - 0x4b400000 + 127) << 23);
    n.f -= rounder;
    float r = x - n.f * 0.693359375f + n.f * 2.12194440e-4f; // ln 2 in two parts, the first one exact in n.f
    float series = 1 / 5040.f;                               // of exp(r), innermost term first
    series = series * r + 1 / 720.f;
    series = series * r + 1 / 120.f;
    series = series * r + 1 / 24.f;
    series = series * r + 1 / 6.f;
    series = series * r + 1 / 2.f;
    series = series * r + 1;
    series = series * r + 1;
    return series * power.f;
}

// The largest of x (n), or -INFINITY. Sixteen maxima side by side, because compilers keep the
// order of comparisons.
static float largest_of(const float *x, int n) {
    float largest[16];
    int i = 0;
    for (int lane = 0; lane < 16; lane++) largest[lane] = -INFINITY;
    for (; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; lane++)
            largest[lane] = x[i + lane] > largest[lane] ? x[i + lane] : largest[lane];
    for (; i < n; i++) largest[0] = x[i] > largest[0] ? x[i] : largest[0];
    for (int lane = 1; lane < 16; lane++)
        largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
    return largest[0];
}
