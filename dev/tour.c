// tour.c: walks one batch through the program and prints what happens; dev/tour.md explains it.
//
//   make tour                          prints everything
//   dev/tour --check dev/tour.md       compares the blocks of the text with what the program does now
//   dev/tour --write dev/tour.md       writes them anew
//
// A block of the text is fenced by ``` and stands behind a line <!-- NAME -->. Numbers may differ by one in their
// last digit, since another processor adds in another order. dev/book/numbers.c includes this file.
#define TRAIN_GPT2_NO_MAIN
#include "../train_gpt2.c"

static const char *const texts[3][2] = {{"I like", " tea"}, {NULL, "Hi!"}, {NULL, "the cat sat there"}};
static const char merges[] =
    "#version: 0.2\nh e\nt he\na t\n\304\240 t\n\304\240t he\ni k\nik e\n\304\240 l\n"
    "\304\240l ike\ne a\nc at\n\304\240 cat\nr e\n";
enum { ROW = 2, QUERY = 5 }; // the row that is looked at closely; the sequence's token whose scores are shown

typedef struct {
    const char *name;
    char *text;
    size_t size;
} Passage;

static Passage blocks[16];
static int block_count;
static FILE *out; // the block at work

static void begin_block(const char *name) {
    if (out) fclose(out);
    Passage *block = &blocks[block_count++];
    block->name = name;
    out = open_memstream(&block->text, &block->size);
}

// A token as text; a space shows as _.
static const char *shown(const Tokenizer *t, int id) {
    static char places[8][32];
    static int used;
    Text text = {0};
    tokenizer_decode(t, &text, id);
    char *place = places[used++ % 8];
    snprintf(place, 32, "%.20s", id == t->end_of_text ? "<end>" : text.data);
    for (char *c = place; *c; c++) *c = *c == ' ' ? '_' : *c;
    free(text.data);
    return place;
}

static void print_values(const char *what, const float *values, int count) {
    fprintf(out, "%-34s", what);
    for (int i = 0; i < count; i++) fprintf(out, " %8.4f", values[i]);
    fprintf(out, " ...\n");
}

// The ids of one piece of text. The caller frees ids.data.
static Ids encode_piece(const Tokenizer *t, const char *piece, size_t size) {
    Ids ids = {0};
    tokenizer_encode((Tokenizer *)t, &ids, piece, size);
    return ids;
}

// ---- the steps ----

static void show_text(const Tokenizer *t, const Dataset *data) {
    begin_block("ids");
    for (int s = 0; s < 3; s++) {
        for (int part = 0; part < 2; part++) {
            const char *text = texts[s][part];
            size_t size = text ? strlen(text) : 0;
            for (size_t at = 0, end; at < size; at = end) {
                end = find_piece(t, text, at, size);
                Ids ids = encode_piece(t, text + at, end - at);
                fprintf(out, "piece \"%.*s\" ->", (int)(end - at), text + at);
                for (size_t i = 0; i < ids.size; i++)
                    fprintf(out, " %s %d", shown(t, ids.data[i]), ids.data[i]);
                fprintf(out, "\n");
                free(ids.data);
            }
        }
        const Example *example = &data->examples[s];
        fprintf(out, "example %d:", s);
        for (int i = 0; i < example->size; i++) {
            int token = dataset_token(data, example, i);
            fprintf(out, " %d", token < 0 ? ~token : token);
        }
        fprintf(out, "   (the first %d not scored)\n", example->size - example->targets);
    }
}

static void show_batch(const Tokenizer *t, const Batch *batch) {
    begin_block("rows");
    fprintf(out, "row  sequence  position  token          target\n");
    for (int s = 0; s < batch->sequences; s++)
        for (int r = batch->first_row[s]; r < batch->first_row[s + 1]; r++) {
            fprintf(out, "%3d  %8d  %8d  %4d %-8s ", r, s, batch->position[r], batch->token[r],
                    shown(t, batch->token[r]));
            if (batch->target[r] < 0)
                fprintf(out, "   -\n");
            else
                fprintf(out, "%4d %s\n", batch->target[r], shown(t, batch->target[r]));
        }
    fprintf(out, "first_row:");
    for (int s = 0; s <= batch->sequences; s++) fprintf(out, " %d", batch->first_row[s]);
    fprintf(out, "; %d rows, %d of them scored\n", batch->rows, batch->targets);

    begin_block("mask");
    for (int s = 0; s < batch->sequences; s++)
        for (int i = batch->first_row[s]; i < batch->first_row[s + 1]; i++) {
            fprintf(out, "row %2d sees ", i);
            for (int j = 0; j < batch->rows; j++)
                fprintf(out, "%s", j >= batch->first_row[s] && j <= i ? " x" : " .");
            fprintf(out, "\n");
        }
}

static void show_forward(const Model *model, const Tokenizer *t, Activations *a, const Batch *batch) {
    const Config *config = &model->config;
    const int R = batch->rows, C = config->n_embd, NH = config->n_head, HS = C / NH, F = config->n_inner;
    const Block b = block_at(a, model, 0);
    begin_block("shapes");
    fprintf(out, "x = wte[token] + wpe[position]   (%d, %d)\n", R, C);
    fprintf(out, "layernorm_1(x)                   (%d, %d)\n", R, C);
    fprintf(out, "q, k, v side by side             (%d, %d) = (R, 3C), %d heads of %d\n", R, 3 * C, NH, HS);
    fprintf(out, "attention                        (%d, %d)\n", R, C);
    fprintf(out, "x + attention · c_proj           (%d, %d)\n", R, C);
    fprintf(out, "hidden, gelu(hidden)             (%d, %d) = (R, F)\n", R, F);
    fprintf(out, "x + gelu(hidden) · c_proj        (%d, %d)\n", R, C);
    fprintf(out, "logits of scored rows            (%d, %d)\n", batch->targets, config->vocab_size);

    begin_block("block");
    print_values("wte[token]", model->tensors[WTE].value + (size_t)batch->token[ROW] * C, 4);
    print_values("wpe[position]", model->tensors[WPE].value + (size_t)batch->position[ROW] * C, 4);
    print_values("x", b.x + ROW * C, 4);
    fprintf(out, "layernorm_1: mean %.4f, rstd %.4f\n", b.mean_1[ROW], b.rstd_1[ROW]);
    print_values("q of head 0", b.qkv + ROW * 3 * C, 4);
    print_values("k of head 0", b.qkv + ROW * 3 * C + C, 4);
    print_values("v of head 0", b.qkv + ROW * 3 * C + 2 * C, 4);
    print_values("attention", b.attention + ROW * C, 4);
    print_values("x + attention · c_proj + bias", b.middle + ROW * C, 4);
    print_values("hidden", b.hidden + ROW * F, 4);
    print_values("x behind the block", residual_at(a, model, 1) + ROW * C, 4);

    begin_block("attention");
    const int first = batch->first_row[2], i = first + QUERY;
    fprintf(out, "sequence 2, head 0, query %s (row %d):\n", shown(t, batch->token[i]), i);
    fprintf(out, "key        score  probability\n");
    for (int j = first; j <= i; j++) {
        float score = 0;
        for (int c = 0; c < HS; c++)
            score += b.qkv[i * 3 * C + c] * b.qkv[j * 3 * C + C + c] / sqrtf((float)HS);
        fprintf(out, "%-8s %7.4f  %11.4f\n", shown(t, batch->token[j]), score,
                expf(score - b.log_sum_exp[i * NH]));
    }
    fprintf(out, "log-sum-exp %.4f\n", b.log_sum_exp[i * NH]);
}

static void show_loss(const Model *model, const Tokenizer *t, Activations *a, const Batch *batch,
                      double sum) {
    begin_block("loss");
    fprintf(out, "row  reads     should say  probability    loss\n");
    for (int i = 0; i < batch->targets; i++) {
        int r = a->scored[i];
        fprintf(out, "%3d  %-8s  %-10s  %11.4f  %.4f\n", r, shown(t, batch->token[r]),
                shown(t, batch->target[r]), exp(-a->loss[i]), a->loss[i]);
    }
    fprintf(out, "sum %.3f, mean over %d targets %.4f; log(V) = log(%d) = %.4f\n", sum, batch->targets,
            sum / batch->targets, model->config.vocab_size, log(model->config.vocab_size));
}

static void show_gradients(const Model *model, double norm) {
    begin_block("gradients");
    fprintf(out, "%-36s %-5s  norm of the gradient\n", "tensor", "decay");
    for (int i = 0; i < model->tensor_count; i++) {
        const Tensor *tensor = &model->tensors[i];
        double squares = 0;
        for (size_t j = 0; j < tensor->size; j++)
            squares += (double)tensor->gradient[j] * tensor->gradient[j];
        fprintf(out, "%-36s %-5s  %.4f\n", tensor->name, tensor->decay ? "yes" : "-", sqrt(squares));
    }
    fprintf(out, "all together %.4f, so gradients are multiplied by %.4f\n", norm, clip_factor(norm, 1));
}

// One weight through AdamW, before and after.
static void show_weight(const Tensor *tensor, float before, float clip, const Hyperparameters *adam, double rate) {
    double g = tensor->gradient[0] * clip, m = tensor->exp_avg[0], v = tensor->exp_avg_sq[0];
    fprintf(out, "%s[0]:\n", tensor->name);
    fprintf(out, "  g = %.6f   m = %.7f   v = %.3e\n", g, m, v);
    fprintf(out, "  m / (1 - beta1) = %.6f   sqrt(v / (1 - beta2)) = %.6f   their quotient %.3f\n",
            m / (1 - adam->beta1), sqrt(v / (1 - adam->beta2)),
            m / (1 - adam->beta1) / (sqrt(v / (1 - adam->beta2)) + adam->epsilon));
    fprintf(out, "  decay takes %.1e   p: %.6f -> %.6f\n",
            tensor->decay ? rate * adam->weight_decay * before : 0.0, before, tensor->value[0]);
}

// What the tour works on.
typedef struct {
    Tokenizer *tokenizer;
    Dataset *data;
    Batch batch;
    Model *model;
    Activations activations;
    Hyperparameters adam;
    double rate;
} Tour;

static Tour tour_begin(void) {
    Tour tour = {.adam = {0.9, 0.999, 1e-8, 0.01, 1, 0, 0, KEEP_ALL}, .rate = 1e-2};
    make_folder("build/tour");
    write_file("build/tour/merges.txt", merges, strlen(merges));
    FILE *file = create_file("build/tour/batch.jsonl");
    for (int s = 0; s < 3; s++)
        if (texts[s][0])
            fprintf(file, "{\"prompt\": \"%s\", \"completion\": \"%s\"}\n", texts[s][0], texts[s][1]);
        else
            fprintf(file, "{\"text\": \"%s\"}\n", texts[s][1]);
    finish_file(file, "build/tour/batch.jsonl");
    tour.tokenizer = tokenizer_load("build/tour/merges.txt");
    tour.data = dataset_load("build/tour/batch.jsonl", tour.tokenizer, 16, tour.tokenizer->vocab_size);
    dataset_batch(tour.data, NULL, 0, 3, &tour.batch);
    tour.model = model_new((Config){.vocab_size = tour.tokenizer->vocab_size,
                                    .n_positions = 16,
                                    .n_layer = 2,
                                    .n_head = 2,
                                    .n_embd = 16,
                                    .n_inner = 64,
                                    .layer_norm_epsilon = 1e-5f,
                                    .tie_word_embeddings = true});
    const char *no_decay[] = {"bias", "ln_.+weight", "ln_.+bias"};
    model_initialise(tour.model, 1);
    model_set_training(tour.model, &(Patterns){0}, &(Patterns){no_decay, 3, 3});
    model_allocate_training(tour.model, true);
    activations_reserve(&tour.activations, tour.model, tour.batch.rows, KEEP_ALL);
    return tour;
}

static void tour_end(Tour *tour) {
    model_free(tour->model);
    activations_free(&tour->activations);
    batch_free(&tour->batch);
    dataset_free(tour->data);
    tokenizer_free(tour->tokenizer);
}

// Forward and backward; returns the mean loss.
static double tour_gradients(Tour *tour) {
    int targets = tour->batch.targets;
    return model_forward_backward(tour->model, &tour->activations, &tour->batch, 1.0f / (float)targets, false,
                                  (Dropout){0}) /
           targets;
}

static void walk(void) {
    Tour tour = tour_begin();
    Model *model = tour.model;
    show_text(tour.tokenizer, tour.data);
    show_batch(tour.tokenizer, &tour.batch);
    model_forward(model, &tour.activations, &tour.batch, NULL, (Dropout){0});
    show_forward(model, tour.tokenizer, &tour.activations, &tour.batch);
    show_loss(model, tour.tokenizer, &tour.activations, &tour.batch,
              classifier(model, &tour.activations, &tour.batch, false, 0, false));

    const Tensor *worst, *weight = model_tensor(model, FC_WEIGHT, 0), *bias = model_tensor(model, FC_BIAS, 0);
    double losses[101];
    for (int step = 0; step <= 100; step++) {
        losses[step] = tour_gradients(&tour);
        double norm = gradient_norm(model, &worst);
        float clip = clip_factor(norm, tour.adam.max_grad_norm), before = weight->value[0],
              before_bias = bias->value[0];
        if (step == 0) show_gradients(model, norm);
        adamw_update(model, &tour.adam, tour.rate, step + 1, clip);
        if (step > 0) continue;
        begin_block("update");
        show_weight(weight, before, clip, &tour.adam, tour.rate);
        show_weight(bias, before_bias, clip, &tour.adam, tour.rate);
    }
    begin_block("after");
    for (int step = 0; step <= 100; step = step == 0 ? 1 : step * 10)
        fprintf(out, "loss after %3d updates: %.*f\n", step, step < 10 ? 4 : 1, losses[step]);
    fclose(out);
    out = NULL;
    tour_end(&tour);
}

// ---- the text ----

// Whether two lines are the same, but for one in the last digit of numbers.
static bool same_line(const char *a, const char *b) {
    while (*a && *b) {
        bool number = (*a >= '0' && *a <= '9') && (*b >= '0' && *b <= '9');
        if (!number) {
            if (*a++ != *b++) return false;
            continue;
        }
        char *a_end, *b_end;
        double x = strtod(a, &a_end), y = strtod(b, &b_end), unit = 1;
        const char *point = strchr(a, '.');
        for (const char *c = point && point < a_end ? point + 1 : a_end; c < a_end && *c >= '0' && *c <= '9';
             c++)
            unit /= 10;
        const char *power = memchr(a, 'e', (size_t)(a_end - a));
        unit *= power ? pow(10, atoi(power + 1)) : 1;
        bool whole = !point || point >= a_end;
        if (whole ? x != y : fabs(x - y) > 1.01 * unit) return false;
        a = a_end, b = b_end;
    }
    return *a == *b;
}

// Puts the blocks into the text, or compares them. Returns how many lines differ; blocks that are missing count.
static int update_text(const char *path, bool write) {
    Text text = read_file(path), result = {0};
    int different = 0, found = 0;
    const Passage *block = NULL;
    char *rest = text.data, *line;
    while ((line = strsep(&rest, "\n")) && (rest || *line)) {
        text_append(&result, line, strlen(line));
        text_append(&result, "\n", 1);
        for (int i = 0; i < block_count; i++)
            if (strcmp(line, path_of("<!-- %s -->", blocks[i].name)) == 0) block = &blocks[i];
        if (!block || strcmp(line, "```") != 0) continue;
        text_append(&result, block->text, block->size);
        char *ours = block->text, *wanted;
        while ((line = strsep(&rest, "\n")) && strcmp(line, "```") != 0) {
            wanted = ours && *ours ? strsep(&ours, "\n") : "";
            if (!write && !same_line(wanted, line) && ++different < 4)
                warn("%s, block %s:\n  the text has  %s\n  it should be  %s", path, block->name, line,
                     wanted);
        }
        different += !write && ours && *ours;
        text_append(&result, "```\n", 4);
        block = NULL;
        found++;
    }
    if (found != block_count) die("%s: %d blocks found, %d expected", path, found, block_count);
    if (write) write_file(path, result.data, result.size);
    free(text.data);
    free(result.data);
    return different;
}

#ifndef TOUR_NO_MAIN
int main(int argc, char **argv) {
    program_name = "tour";
    matmul_kind = MATMUL_BUILTIN;
    omp_set_num_threads(1);
    bool check = argc == 3 && strcmp(argv[1], "--check") == 0,
         write = argc == 3 && strcmp(argv[1], "--write") == 0;
    if (argc != 1 && !check && !write) die_usage("no argument, --check FILE or --write FILE expected");
    walk();
    for (int i = 0; argc == 1 && i < block_count; i++)
        printf("---- %s ----\n%s\n", blocks[i].name, blocks[i].text);
    int different = argc == 3 ? update_text(argv[2], write) : 0;
    if (check)
        printf("%-6s tour: the blocks of %s are what the program prints\n", different ? "FAILED" : "ok",
               argv[2]);
    return different > 0;
}
#endif
