// numbers.c: prints as JSON the numbers that the book's pictures show. Each comes from the program's own functions.
//
//   make book        runs it and hands its output to dev/book/build.py
//
// The batch, the model and its 100 updates are those of the tour (dev/tour.c).
#define TOUR_NO_MAIN
#include "../tour.c"

static const char *separator = ""; // what stands before the next item: nothing, or a comma

static void item(void) {
    printf("%s", separator);
    separator = ",";
}

static void key(const char *name) {
    item();
    printf("\"%s\":", name);
}

static void open_list(char bracket) {
    printf("%c", bracket);
    separator = "";
}

static void close_list(char bracket) {
    printf("%c\n", bracket);
    separator = ",";
}

static void number(double value) {
    item();
    printf("%.5g", value);
}

static void whole(const char *name, long value) {
    key(name);
    printf("%ld", value);
}

static void string(const char *text) {
    putchar('"');
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || (unsigned char)*text < 0x20)
            printf("\\u%04x", (unsigned char)*text);
        else
            putchar(*text);
    putchar('"');
}

// The blocks of dev/tour.md, as the program prints them now.
static void print_blocks(void) {
    walk();
    key("blocks");
    open_list('{');
    for (int i = 0; i < block_count; i++) {
        key(blocks[i].name);
        string(blocks[i].text);
    }
    close_list('}');
}

// ---- tokens and the merges that make them ----
// A merge never has a lower rank than those that made its two parts. So where a piece stands after the first n
// ranks is what a vocabulary of only the first n merges makes of it.
static void print_merges(void) {
    static const char sentence[] = "I like the tea, the cat sat there!";
    enum { MOST = 64 };
    Tokenizer *first[MOST];
    int count = 0;
    for (const char *end = strchr(merges, '\n') + 1; end && count < MOST; count++) {
        write_file("build/tour/first_merges.txt", merges, (size_t)(end - merges));
        first[count] = tokenizer_load("build/tour/first_merges.txt");
        end = *end ? strchr(end, '\n') + 1 : NULL;
    }
    const Tokenizer *all = first[count - 1];
    key("merges");
    open_list('[');
    for (size_t at = 0, end; at < strlen(sentence); at = end) {
        end = find_piece(all, sentence, at, strlen(sentence));
        item();
        open_list('{');
        key("piece");
        string(xprintf("%.*s", (int)(end - at), sentence + at));
        key("steps"); // [rank of the merge, or -1, then the tokens]
        open_list('[');
        size_t before = SIZE_MAX;
        for (int n = 0; n < count; n++) {
            Ids ids = encode_piece(first[n], sentence + at, end - at);
            if (ids.size != before) {
                item();
                open_list('[');
                number(n - 1);
                for (size_t i = 0; i < ids.size; i++) {
                    item();
                    string(shown(first[n], ids.data[i]));
                }
                close_list(']');
            }
            before = ids.size;
            free(ids.data);
        }
        close_list(']');
        key("ids");
        open_list('[');
        Ids ids = encode_piece(all, sentence + at, end - at);
        for (size_t i = 0; i < ids.size; i++) number(ids.data[i]);
        close_list(']');
        close_list('}');
        free(ids.data);
    }
    close_list(']');
    for (int n = 0; n < count; n++) tokenizer_free(first[n]);
}

// ---- the batch ----

static void print_rows(const Tour *tour) {
    const Batch *batch = &tour->batch;
    key("rows");
    open_list('[');
    for (int s = 0; s < batch->sequences; s++)
        for (int r = batch->first_row[s]; r < batch->first_row[s + 1]; r++) {
            item();
            open_list('{');
            whole("sequence", s);
            whole("first", batch->first_row[s]);
            whole("position", batch->position[r]);
            whole("token", batch->token[r]);
            key("reads");
            string(shown(tour->tokenizer, batch->token[r]));
            whole("target", batch->target[r]);
            key("says");
            string(batch->target[r] < 0 ? "" : shown(tour->tokenizer, batch->target[r]));
            close_list('}');
        }
    close_list(']');
}

// ---- attention and loss, while the batch is learned by heart ----

// probability[block][head][row] lists the keys that the row sees.
static void print_attention(const Tour *tour) {
    const Model *model = tour->model;
    const Batch *batch = &tour->batch;
    const int NH = model->config.n_head, C = model->config.n_embd, HS = C / NH;
    key("probability");
    open_list('[');
    for (int layer = 0; layer < model->config.n_layer; layer++) {
        const Block b = block_at(&tour->activations, model, layer);
        item();
        open_list('[');
        for (int head = 0; head < NH; head++) {
            item();
            open_list('[');
            for (int s = 0; s < batch->sequences; s++)
                for (int i = batch->first_row[s]; i < batch->first_row[s + 1]; i++) {
                    item();
                    open_list('[');
                    for (int j = batch->first_row[s]; j <= i; j++) {
                        const float *q = b.qkv + i * 3 * C + head * HS;
                        const float *k = b.qkv + j * 3 * C + C + head * HS;
                        float score = 0;
                        for (int c = 0; c < HS; c++) score += q[c] * k[c] / sqrtf((float)HS);
                        number(expf(score - b.log_sum_exp[i * NH + head]));
                    }
                    close_list(']');
                }
            close_list(']');
        }
        close_list(']');
    }
    close_list(']');
}

static void print_learning(Tour *tour) {
    const Tensor *worst;
    key("learning"); // after some of the updates
    open_list('[');
    for (int step = 0; step <= 100; step++) {
        if (step == 0 || step == 1 || step == 10 || step == 30 || step == 100) {
            model_forward(tour->model, &tour->activations, &tour->batch, NULL, (Dropout){0});
            classifier(tour->model, &tour->activations, &tour->batch, false, 0, false);
            item();
            open_list('{');
            whole("updates", step);
            print_attention(tour);
            key("loss"); // of each scored row
            open_list('[');
            for (int i = 0; i < tour->batch.targets; i++) number(tour->activations.loss[i]);
            close_list(']');
            close_list('}');
        }
        tour_gradients(tour);
        float clip = clip_factor(gradient_norm(tour->model, &worst), tour->adam.max_grad_norm);
        adamw_update(tour->model, &tour->adam, tour->rate, step + 1, clip);
    }
    close_list(']');
}

// ---- the schedule ----

static void print_schedules(void) {
    static const char *const names[] = {"linear", "cosine", "constant"};
    enum { STEPS = 200 };
    key("schedules");
    open_list('[');
    for (int schedule = SCHEDULE_LINEAR; schedule <= SCHEDULE_CONSTANT; schedule++)
        for (long warmup = 0; warmup <= 60; warmup += 20)
            for (int tenths = 0; tenths <= 2; tenths++) {
                item();
                open_list('{');
                key("schedule");
                string(names[schedule]);
                whole("warmup", warmup);
                key("final");
                printf("%.1f", tenths / 10.0);
                key("factor");
                open_list('[');
                for (long step = 0; step < STEPS; step++)
                    number(schedule_factor((Schedule)schedule, step, warmup, STEPS, tenths / 10.0));
                close_list(']');
                close_list('}');
            }
    close_list(']');
}

// ---- memory ----
// The program's own layout, of addresses that nothing is stored at: an array reaches to where the next begins.

static void print_memory(int sequences, int length, Keep keep) {
    Model *model = model_new((Config){50257, 1024, 12, 12, 768, 3072, 1e-5f, true});
    Activations a = {0};
    const int rows = sequences * length;
    const size_t size = activations_lay_out(&a, model, rows, keep, NULL) * sizeof(float);
    char *memory = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no room to lay out %zu bytes", size);
    activations_lay_out(&a, model, rows, keep, (float *)memory);
    const Block b = block_at(&a, model, 0), next = block_at(&a, model, 1);
    const int kept = keep == KEEP_ALL ? model->config.n_layer : 1;
    const struct {
        const char *name;
        const float *begin, *end;
        int times;
    } parts[] = {{"residual", a.residual, a.blocks, 1},
                 {"qkv", b.qkv, b.attention, kept},
                 {"attention", b.attention, b.middle, kept},
                 {"middle", b.middle, b.hidden, kept},
                 {"hidden", b.hidden, b.mean_1, kept},
                 {"means, log_sum_exp", b.mean_1, keep == KEEP_ALL ? next.qkv : a.normed, kept},
                 {"shared by all blocks", a.normed, a.selected, 1},
                 {"logits", a.selected, (float *)(memory + size), 1}};
    size_t parameters = 0;
    for (int i = 0; i < model->tensor_count; i++) parameters += model->tensors[i].size;
    item();
    open_list('{');
    whole("sequences", sequences);
    whole("length", length);
    whole("recompute", keep == KEEP_INPUTS);
    whole("parameters", (long)(parameters * sizeof(float)));
    whole("activations", (long)size);
    key("parts"); // [name, bytes, kept for the backward pass]
    open_list('[');
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        item();
        open_list('[');
        item();
        string(parts[i].name);
        item();
        if (parts[i].end <= parts[i].begin) die("the arrays of Activations no longer lie in this order");
        printf("%ld", (long)((parts[i].end - parts[i].begin) * (long)sizeof(float) * parts[i].times));
        item();
        printf("%d", i < 6 && (i == 0 || keep == KEEP_ALL));
        close_list(']');
    }
    close_list(']');
    close_list('}');
    munmap(memory, size);
    model_free(model);
}

int main(void) {
    program_name = "numbers";
    matmul_kind = MATMUL_BUILTIN;
    omp_set_num_threads(1);
    open_list('{');
    print_blocks();
    print_merges();
    Tour tour = tour_begin();
    print_rows(&tour);
    print_learning(&tour);
    tour_end(&tour);
    print_schedules();
    key("memory");
    open_list('[');
    for (int long_ones = 0; long_ones < 2; long_ones++)
        for (Keep keep = KEEP_ALL; keep <= KEEP_INPUTS; keep++) print_memory(4, long_ones ? 1024 : 64, keep);
    close_list(']');
    close_list('}');
    return 0;
}
