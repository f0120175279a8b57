// bench.c: how close a training step comes to what this machine can do, kernel by kernel.
//
//   make bench                                                  124M parameters, 4 x 64
//   dev/bench LENGTHS [train_gpt2's options]                    for instance:
//   dev/bench 64,64,64,64 --init d12 --steps 9
//   dev/bench 1024,512,256,128 --matmul builtin --recompute
//   dev/bench 64,64,64,64 --init d12 --precision bfloat16
//
// LENGTHS are the sequences of one batch. The floor of a step is its products' time at the rate that matmul()
// reaches now, alone, for the same shapes, plus one pass over weights, gradients and moments at the measured
// memory bandwidth. All of it comes from one run, so that a noisy neighbour disturbs both sides alike; figures
// are medians. The products of attention are those of its tiles, one thread each, the visible half only.
#define TRAIN_GPT2_NO_MAIN
#include "../train_gpt2.c"

enum { PRODUCTS = 19, MOST = 64 };

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return values[count / 2];
}

// ---- products ----

typedef struct {
    const char *name;
    size_t M, N, K;
    bool transpose_a, transpose_b, accumulate;
    double calls; // in one step
    bool tile;    // one of attention's: a thread each
    double seconds;
} Shape;

static size_t product_size(const Shape *p) {
    return aligned_size(p->M * p->K) + aligned_size(p->K * p->N) + aligned_size(p->M * p->N);
}

// The median time of a product, on operands that are not in the cache from the call before.
static double time_product(const Shape *p, float *arena, size_t arena_size) {
    size_t a = p->M * p->K, b = p->K * p->N, size = product_size(p), copies = arena_size / size, copy = 0;
    size_t lda = p->transpose_a ? p->M : p->K, ldb = p->transpose_b ? p->K : p->N;
    double times[MOST], begun = now();
    int count = 0, threads = p->tile ? omp_get_max_threads() : 1;
    for (int i = 0; count < 3 || (count < MOST && now() - begun < 0.25); i++) {
        int repeat = p->tile ? 64 : 1;
        double start = now();
        if (p->tile) { // all threads at once, each on tiles of its own
#pragma omp parallel for schedule(static)
            for (int t = 0; t < threads * repeat; t++) {
                float *A = arena + (size_t)t % copies * size, *B = A + aligned_size(a),
                      *C = B + aligned_size(b);
                matmul(C, p->N, A, lda, p->transpose_a, B, ldb, p->transpose_b, p->M, p->N, p->K,
                       p->accumulate);
            }
        } else {
            float *A = arena + copy * size, *B = A + aligned_size(a), *C = B + aligned_size(b);
            matmul(C, p->N, A, lda, p->transpose_a, B, ldb, p->transpose_b, p->M, p->N, p->K, p->accumulate);
        }
        if (i > 0) // the first one warms up
            times[count++] = (now() - start) / (threads * repeat);
        copy = (copy + 1) % copies;
    }
    return median(times, count);
}

// Seconds for one pass like AdamW's over `floats` parameters: four arrays read, three written.
static double time_update_pass(float *arena, size_t floats) {
    double times[5];
    float *p = arena, *m = p + floats, *v = m + floats;
    const float *g = v + floats;
    for (int i = 0; i < 5; i++) {
        double start = now();
#pragma omp parallel for simd
        for (size_t j = 0; j < floats; j++) {
            m[j] += 0.1f * (g[j] - m[j]);
            v[j] += 0.1f * (g[j] - v[j]);
            p[j] -= 1e-3f * m[j];
        }
        times[i] = now() - start;
    }
    return median(times, 5) / (double)floats;
}

// Seconds to read `floats` floats once: what a generated token cannot go below.
static double time_read_pass(const float *arena, size_t floats) {
    double times[5], total = 0;
    for (int i = 0; i < 5; i++) {
        double start = now();
        float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
        for (size_t j = 0; j < floats; j++) sum += arena[j];
        total += sum;
        times[i] = now() - start;
    }
    return total == 0.5 ? 0 : median(times, 5);
}

// GFLOP/s of all threads with nothing but multiply-adds in registers: no product can be faster.
static double peak_rate(void) {
    enum { SUMS = 12, STEPS = 4000000 };
    double best = 0;
    for (int repeat = 0; repeat < 3; repeat++) {
        double start = now();
#pragma omp parallel
        {
            Vector sum[SUMS];
            for (int v = 0; v < SUMS; v++) sum[v] = (Vector){0} + (float)v; // else all would be one
            for (int i = 0; i < STEPS; i++)
                for (int v = 0; v < SUMS; v++) sum[v] = sum[v] * 0.5f + 1.0f;
            for (int v = 1; v < SUMS; v++) sum[0] += sum[v];
            if (sum[0][0] == 0.5f) // never: keeps the loop
                printf("%g\n", sum[0][0]);
        }
        best = fmax(best, 2e-9 * SUMS * LANES * STEPS * omp_get_max_threads() / (now() - start));
    }
    return best;
}

// The same for pairs of bfloat16, by the instruction that the products use, or by tiles of AMX.
static double pair_peak_rate(void) {
    enum { SUMS = 12, STEPS = 3000000 };
    double best = 0;
    for (int repeat = 0; repeat < 3; repeat++) {
        double start = now(), work = 4e-9 * SUMS * LANES * STEPS;
#pragma omp parallel
        {
            Vector sum[SUMS];
            PairVector a = {0}, b = {0};
            for (int v = 0; v < SUMS; v++) sum[v] = (Vector){0} + (float)v;
            a += (uint32_t)omp_get_thread_num();
#ifdef USE_AMX
            if (amx_allowed) {
                _tile_loadconfig(&amx_tiles);
                for (int i = 0; i < STEPS; i++) {
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_release();
            } else
#endif
                for (int i = 0; i < STEPS; i++)
                    for (int v = 0; v < SUMS; v++) sum[v] = dot_pairs(sum[v], a, b);
            for (int v = 1; v < SUMS; v++) sum[0] += sum[v];
            if (sum[0][0] == 0.5f) // never: keeps the loop
                printf("%g\n", sum[0][0]);
        }
        if (amx_allowed) work = 1e-9 * STEPS * 4 * 2 * 16 * 16 * 32;
        best = fmax(best, work * omp_get_max_threads() / (now() - start));
    }
    return best;
}

// ---- kernels ----

static double time_kernel(void (*kernel)(const Model *, Activations *, const Batch *), const Model *model,
                          Activations *a, const Batch *batch) {
    double times[MOST], begun = now();
    int count = 0;
    while (count < 3 || (count < MOST && now() - begun < 0.15)) {
        double start = now();
        kernel(model, a, batch);
        times[count++] = now() - start;
    }
    return median(times, count);
}

#define KERNEL(name) static void name(const Model *model, Activations *a, const Batch *batch)
#define SIZES                                                                                                \
    const int R = batch->rows, C = model->config.n_embd, F = model->config.n_inner,                          \
              NH = model->config.n_head;                                                                     \
    const Block b = block_at(a, model, 0);                                                                   \
    const Tensor *t = model->tensors;                                                                        \
    (void)b;                                                                                                 \
    (void)t;                                                                                                 \
    (void)R;                                                                                                 \
    (void)C;                                                                                                 \
    (void)F;                                                                                                 \
    (void)NH

KERNEL(run_embedding_forward) {
    SIZES;
    embedding_forward(a->residual, t[WTE].value, t[WPE].value, batch->token, batch->position, R, C);
}
KERNEL(run_embedding_backward) {
    SIZES;
    embedding_backward(t[WTE].gradient, a->d_residual, batch->token, R, C);
    embedding_backward(t[WPE].gradient, a->d_residual, batch->position, R, C);
}
KERNEL(run_layernorm_forward) {
    SIZES;
    layernorm_forward(a->normed, b.mean_1, b.rstd_1, a->residual, t[LN_1_WEIGHT].value, t[LN_1_BIAS].value,
                      1e-5f, R, C);
}
KERNEL(run_layernorm_backward) {
    SIZES;
    layernorm_backward(a->d_residual, t[LN_1_WEIGHT].gradient, t[LN_1_BIAS].gradient, a->d_normed,
                       a->residual, b.mean_1, b.rstd_1, t[LN_1_WEIGHT].value, false, R, C);
}
KERNEL(run_attention_forward) {
    SIZES;
    const Attention attention = block_attention(model, a, batch, &b, 0, (Dropout){0});
    attention_forward(&attention);
}
KERNEL(run_attention_backward) {
    SIZES;
    const Attention attention = block_attention(model, a, batch, &b, 0, (Dropout){0});
    attention_backward(&attention, a->d_qkv, a->d_normed);
}
KERNEL(run_gelu_forward) {
    SIZES;
    gelu_forward(a->gelu, b.hidden, (size_t)R * F);
}
KERNEL(run_gelu_backward) {
    SIZES;
    gelu_backward(a->d_hidden, b.hidden, (size_t)R * F);
}
KERNEL(run_column_sums) {
    SIZES;
    column_sums(t[FC_BIAS].gradient, b.hidden, NULL, NULL, NULL, false, R, F);
    column_sums(t[ATTN_BIAS].gradient, b.qkv, NULL, NULL, NULL, false, R, 3 * C);
    column_sums(t[ATTN_PROJ_BIAS].gradient, b.attention, NULL, NULL, NULL, false, R, C);
    column_sums(t[FC_PROJ_BIAS].gradient, b.attention, NULL, NULL, NULL, false, R, C);
}
KERNEL(run_cross_entropy) {
    static int target[LOGIT_ROWS]; // all zeros
    int rows = batch->rows < LOGIT_ROWS ? batch->rows : LOGIT_ROWS;
    cross_entropy(a->logits, a->loss, a->correct, target, true, 1e-3f, rows, model->config.vocab_size);
}
KERNEL(run_gradient_norm) {
    const Tensor *worst;
    (void)a, (void)batch;
    gradient_norm(model, &worst);
}
KERNEL(run_adamw) {
    const Hyperparameters h = {0.9, 0.999, 1e-8, 0.01, 1, 0, 0, false};
    (void)a, (void)batch;
    adamw_update(model, &h, 1e-6, 1000, 1);
}

// ---- the machine ----

static void print_machine(void) {
    char line[256] = "", cpu[200] = "unknown processor";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %199[^\n]", cpu) == 1) break;
    if (file) fclose(file);
    const char *matmul = "built-in matmul";
#ifdef USE_OPENBLAS
    matmul = matmul_kind == MATMUL_CBLAS ? openblas_get_config() : matmul;
#elif defined(USE_CBLAS)
    matmul = matmul_kind == MATMUL_CBLAS ? "CBLAS" : matmul;
#endif
    if (bfloat16_products) matmul = precision_name();
    printf("machine: %s, %d threads, %s, %d lanes\n", cpu, omp_get_max_threads(), matmul, LANES);
#ifdef USE_OPENBLAS
    if (openblas_get_parallel() == 1)
        printf("warning: a pthread build of OpenBLAS: products are cut up over OpenMP threads; the OpenMP "
               "build is faster\n");
#if defined(__x86_64__)
    const char *core = openblas_get_corename();
    bool old = strstr("Prescott Core2 Nehalem Penryn Dunnington Sandybridge Barcelona", core) != NULL;
    if ((__builtin_cpu_supports("avx512f") && (old || strstr("Haswell Zen", core))) ||
        (__builtin_cpu_supports("avx2") && old))
        printf("warning: OpenBLAS uses kernels for %s, older than this processor (OPENBLAS_CORETYPE is %s)\n",
               core, getenv("OPENBLAS_CORETYPE") ? getenv("OPENBLAS_CORETYPE") : "not set");
#endif
#endif
}

int main(int argc, char **argv) {
    const char *lengths = "64,64,64,64";
    char *no_options[2] = {argv[0], NULL};
    program_name = "bench";
    if (argc > 1 && isdigit((unsigned char)argv[1][0])) {
        lengths = argv[1];
        argv[1] = argv[0];
        argc--, argv++;
    }
    Options options;
    parse_options(&options, NULL, argc > 1 ? argc : 1, argc > 1 ? argv : no_options);
    if (argc == 1) options.init = "d12";
    if (options.threads) omp_set_num_threads((int)options.threads);
    pin_threads();
    Run run = start_run(&options, NULL);
    print_machine();

    Model *model = run.model;
    const Config *config = &model->config;
    model_set_training(model, &options.freeze, &options.no_decay);
    model_allocate_training(model, true);
    Batch batch = {0};
    batch_clear(&batch);
    uint64_t index = 0;
    for (const char *at = lengths; *at; at += strspn(at, ",")) {
        char *end;
        long length = strtol(at, &end, 10);
        if (length < 1 || length > config->n_positions || (*end && *end != ','))
            die_usage("%s: lengths from 1 to %d, separated by commas, expected", lengths,
                      config->n_positions);
        for (int t = 0; t < length; t++, index++)
            batch_add_row(&batch, (int)(random_bits(1, index) % (unsigned)config->vocab_size), t,
                          (int)(random_bits(2, index) % (unsigned)config->vocab_size));
        batch_end_sequence(&batch);
        at = end;
    }
    Activations a = {0};
    activations_reserve(&a, model, batch.rows, options.recompute ? KEEP_INPUTS : KEEP_ALL);
    const size_t R = (size_t)batch.rows, C = (size_t)config->n_embd, F = (size_t)config->n_inner;
    const size_t V = (size_t)config->vocab_size, HS = C / (size_t)config->n_head;
    const double L = config->n_layer, parameters = (double)count_parameters(model, true);

    // The step.
    double times[MOST];
    int steps = options.steps ? (int)smaller((size_t)options.steps, MOST) : R > 1500 ? 5 : 9;
    const Hyperparameters h = hyperparameters_of(&options);
    take_update(model, &a, &batch, 1, &h, 0, 1e-6);
    for (int i = 0; i < steps; i++) {
        double start = now();
        take_update(model, &a, &batch, 1, &h, i + 1, 1e-6);
        times[i] = now() - start;
    }
    double step = median(times, steps), best = times[0];
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    double peak = (double)usage.ru_maxrss / 1e6;
#else
    double peak = (double)usage.ru_maxrss * 1024 / 1e6;
#endif

    // Products, their rates and their floor.
    size_t chunk = R < LOGIT_ROWS ? R : LOGIT_ROWS;
    double chunks = (double)R / (double)chunk, pairs = 0; // pairs of query tile and key block, visible share
    size_t longest = 0;
    for (int s = 0; s < batch.sequences; s++)
        longest = longest > (size_t)(batch.first_row[s + 1] - batch.first_row[s])
                      ? longest
                      : (size_t)(batch.first_row[s + 1] - batch.first_row[s]);
    size_t tile = longest < QUERY_TILE ? longest : QUERY_TILE;
    size_t keys = longest < KEY_BLOCK ? longest : KEY_BLOCK;
    for (int s = 0; s < batch.sequences; s++) {
        double T = batch.first_row[s + 1] - batch.first_row[s];
        pairs += T * (T + 1) / 2 / (double)(tile * keys);
    }
    double tiles = pairs * L * config->n_head, again = options.recompute ? 1 - 1 / L : 0;
    Shape shapes[PRODUCTS] = {
        {"forward c_attn", R, 3 * C, C, false, false, true, L * (1 + again), false, 0},
        {"forward c_proj", R, C, C, false, false, true, L * (1 + again), false, 0},
        {"forward c_fc", R, F, C, false, false, true, L * (1 + again), false, 0},
        {"forward mlp.c_proj", R, C, F, false, false, true, L, false, 0},
        {"dX c_attn", R, C, 3 * C, false, true, false, L, false, 0},
        {"dX c_proj", R, C, C, false, true, false, L, false, 0},
        {"dX c_fc", R, C, F, false, true, false, L, false, 0},
        {"dX mlp.c_proj", R, F, C, false, true, false, L, false, 0},
        {"dW c_attn", C, 3 * C, R, true, false, false, L, false, 0},
        {"dW c_proj", C, C, R, true, false, false, L, false, 0},
        {"dW c_fc", C, F, R, true, false, false, L, false, 0},
        {"dW mlp.c_proj", F, C, R, true, false, false, L, false, 0},
        {"logits", chunk, V, C, false, true, false, chunks, false, 0},
        {"dX head", chunk, C, V, false, false, false, chunks, false, 0},
        {"dW head", V, C, chunk, true, false, true, chunks, false, 0},
        {"attention q k", tile, keys, HS, false, true, false, tiles * (3 + again), true, 0}, // with dout v
        {"attention p v", tile, HS, keys, false, false, false, tiles * (1 + again), true, 0},
        {"attention dk, dv", keys, HS, tile, true, false, true, tiles * 2, true, 0},
        {"attention dq", tile, HS, keys, false, false, true, tiles, true, 0},
    };
    size_t arena_size = 4 * (size_t)parameters; // room for AdamW's four arrays, and for two of each product
    for (int i = 0; i < PRODUCTS; i++) {
        size_t twice = 2 * product_size(&shapes[i]);
        arena_size = arena_size > twice ? arena_size : twice;
    }

    float *arena = xfloats(arena_size);
#pragma omp parallel for
    for (size_t i = 0; i < arena_size; i++) arena[i] = (float)(i % 1000) * 1e-3f - 0.5f;
    double update = time_update_pass(arena, (size_t)parameters) * parameters;
    double read = time_read_pass(arena, (size_t)count_parameters(model, false));
    double products = 0, multiplies = 0;
    printf("\n%-20s %6s %6s %6s %10s %9s %10s\n", "product", "M", "N", "K", "calls", "GFLOP/s", "ms a step");
    for (int i = 0; i < PRODUCTS; i++) {
        Shape *p = &shapes[i];
        p->seconds = time_product(p, arena, arena_size) * p->calls;
        double work = (double)p->M * (double)p->N * (double)p->K * p->calls;
        products += p->seconds, multiplies += work;
        printf("%-20s %6zu %6zu %6zu %10.1f %9.1f %10.2f\n", p->name, p->M, p->N, p->K, p->calls,
               2e-9 * work / p->seconds, 1e3 * p->seconds);
    }
    free(arena);
    printf("%-20s %31s %9.1f %10.2f\n", "together", "", 2e-9 * multiplies / products, 1e3 * products);
    printf("%-20s %31s %9.1f\n", "multiply-add peak", "", peak_rate());
    if (bfloat16_products) printf("%-20s %31s %9.1f\n", "bfloat16 peak", "", pair_peak_rate());

    // Kernels, each alone.
    const struct {
        const char *name, *part;
        void (*run)(const Model *, Activations *, const Batch *);
        double calls;
    } kernels[] = {
        {"embedding", "forward", run_embedding_forward, 1},
        {"layernorm", "forward", run_layernorm_forward, 2 * L * (1 + again)},
        {"attention", "forward", run_attention_forward, L * (1 + again)},
        {"gelu", "forward", run_gelu_forward, L},
        {"cross-entropy", "both", run_cross_entropy, chunks},
        {"gelu", "backward", run_gelu_backward, L},
        {"layernorm, rebuilt", "backward", run_layernorm_forward, 2 * L},
        {"layernorm", "backward", run_layernorm_backward, 2 * L},
        {"attention", "backward", run_attention_backward, L},
        {"biases", "backward", run_column_sums, L},
        {"embedding", "backward", run_embedding_backward, 1},
        {"gradient norm", "update", run_gradient_norm, 1},
        {"AdamW", "update", run_adamw, 1},
    };
    bool whole = true; // kernels are timed with all gradients
    for (int i = 0; i < model->tensor_count; i++) whole = whole && !model->tensors[i].frozen;
    printf("\n%-20s %-10s %10s\n", "kernel", "", "ms a step");
    for (size_t i = 0; whole && i < sizeof kernels / sizeof *kernels; i++)
        printf("%-20s %-10s %10.2f\n", kernels[i].name, kernels[i].part,
               1e3 * kernels[i].calls * time_kernel(kernels[i].run, model, &a, &batch));
    if (!whole) puts("(with --freeze kernels are not timed, and the floor is that of the whole model)");

    double floor_seconds = products + update;
    printf("\nbatch: %d sequences, %zu rows; update pass %.1f ms (%.1f GB/s); reading the weights once %.1f "
           "ms (%.1f GB/s)\n",
           batch.sequences, R, 1e3 * update, 28e-9 * parameters / update, 1e3 * read,
           4e-9 * (double)count_parameters(model, false) / read);
    printf("step %.1f ms (median of %d, best %.1f), floor %.1f ms, step / floor %.3f, %.0f tokens/s\n",
           1e3 * step, steps, 1e3 * best, 1e3 * floor_seconds, step / floor_seconds, (double)R / step);
    double planned = megabytes(count_parameters(model, false) + 3 * (size_t)parameters + a.memory_size);
    printf("memory: weights %.0f MB, gradients %.0f, moments %.0f, activations %.0f: %.0f planned; peak "
           "before the products "
           "%.0f (%.2f of the plan)\n",
           megabytes(count_parameters(model, false)), megabytes((size_t)parameters),
           megabytes(2 * (size_t)parameters), megabytes(a.memory_size), planned, peak, peak / planned);
    activations_free(&a);
    batch_free(&batch);
    model_free(model);
    return 0;
}
