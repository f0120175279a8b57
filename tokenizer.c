// tokenizer.c - text to token ids and back, on the command line; it also learns new vocabularies.
//
//   cc -O3 -march=native -fopenmp tokenizer.c -o tokenizer -lm
//   ./tokenizer --help
//
// Encoding and decoding are in section 10 of train_gpt2.c, the vocabulary's files in section 12. Here are
//   1. Input      any number of files, of any size, in bounded memory
//   2. Output     encode, count, decode, padded examples, token shards
//   3. Learning   byte pair encoding: from text to merges
//   4. Commands

#define TRAIN_GPT2_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "train_gpt2.c"
#include <getopt.h>

// What the command line asks for.
typedef struct {
    const char *command, *tokenizer, *pad, *out;
    bool plain;
    long length, vocab_size, threads;
    double val_fraction;
    Tokenizer *t; // NULL for a command that takes none
    char **files; // the last is NULL
} Settings;

// =====================================================================================================
// 1. Input
// =====================================================================================================
// Files are read in chunks of some megabytes. Each chunk is cut into spans at places where the tokenizer may
// cut (tokenizer_cut), so that threads can work on spans, and their ids put together are the ids of the whole
// text. What follows a chunk's last cut waits for the next chunk. Where a model is to learn from the text, it must
// be UTF-8, as for train_gpt2.

enum { CHUNK_BYTES = 8 << 20, SPAN_BYTES = 1 << 16, GROUPS = 64 };

typedef struct {
    size_t start, size;
    bool starts_document;
} Span;

typedef struct {
    const Tokenizer *t;
    bool documents; // for a model: it must be UTF-8, and lines that are only <|endoftext|> separate documents
    char **paths;   // files still to read; NULL at the end
    FILE *file;     // the one at work
    bool starts_document;
    Utf8Check check;
    Text buffer;          // the chunk, then what waits for the next one
    size_t done, checked; // bytes of the buffer that spans cover, and that are known to be UTF-8
    Span *spans;
    size_t span_count, span_capacity;
    size_t groups[GROUPS + 1]; // spans groups[g] to groups[g+1] are one thread's work
} Reader;

// Adds text up to `stop` as spans of moderate size.
static void reader_add(Reader *reader, size_t stop) {
    while (reader->done < stop) {
        size_t start = reader->done, left = stop - start, size = 0;
        for (size_t window = SPAN_BYTES; window < left && size == 0; window *= 2)
            size = tokenizer_cut(reader->t, reader->buffer.data + start, window);
        size = size ? size : left;
        reader->spans = grow(reader->spans, reader->span_count + 1, &reader->span_capacity, sizeof(Span));
        reader->spans[reader->span_count++] = (Span){start, size, reader->starts_document};
        reader->starts_document = false;
        reader->done += size;
    }
}

// Turns the buffer into spans: all of it where a file has ended, otherwise up to the last safe cut.
static void reader_split(Reader *reader, bool file_ended) {
    while (reader->done < reader->buffer.size) {
        size_t end = reader->buffer.size;
        size_t stop = end;
        if (reader->documents)
            stop = find_separator(reader->buffer.data, end, reader->done, reader->starts_document, file_ended,
                                  &end);
        bool separator = stop < reader->buffer.size && end > 0;
        if (!separator && !file_ended)
            stop = reader->done +
                   tokenizer_cut(reader->t, reader->buffer.data + reader->done, stop - reader->done);
        reader_add(reader, stop);
        if (!separator) break;
        reader->done = end;
        reader->starts_document = true;
    }
}

// Opens the file of a path, or standard input for "-".
static FILE *open_input(const char *path) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!file) die("%s: cannot be opened: %s", path, strerror(errno));
    return file;
}

static void close_input(FILE *file) {
    if (file != stdin) fclose(file);
}

// Reads from the file at work until the buffer has `wanted` bytes; true when the file has ended.
static bool reader_fill(Reader *reader, size_t wanted) {
    Text *buffer = &reader->buffer;
    const bool begins = !reader->file;
    const char *path = *reader->paths;
    if (begins) {
        reader->file = open_input(path);
        reader->starts_document = true;
        reader->check = (Utf8Check){path, 0, 1};
        reader->checked = buffer->size;
    }
    buffer->data = grow(buffer->data, wanted, &buffer->capacity, 1);
    size_t room = wanted - buffer->size, got = fread(buffer->data + buffer->size, 1, room, reader->file);
    if (ferror(reader->file)) die("%s: cannot be read: %s", path, strerror(errno));
    if (begins && reader->documents) reader->done += utf8_mark(buffer->data + buffer->size, got);
    buffer->size += got;
    if (reader->documents)
        reader->checked += check_utf8(&reader->check, buffer->data + reader->checked,
                                      buffer->size - reader->checked, got < room);
    return got < room;
}

// Reads the next chunk; false when nothing is left.
static bool reader_next(Reader *reader) {
    Text *buffer = &reader->buffer;
    buffer->size -= reader->done;
    reader->checked -= smaller(reader->checked, reader->done);
    if (buffer->size) memmove(buffer->data, buffer->data + reader->done, buffer->size);
    reader->done = reader->span_count = 0;
    for (size_t wanted = CHUNK_BYTES; *reader->paths;) {
        bool ended = reader_fill(reader, wanted);
        reader_split(reader, ended);
        if (ended) {
            close_input(reader->file);
            reader->file = NULL;
            reader->paths++;
        } else if (reader->done > 0) {
            break;
        } else {
            wanted *= 2; // one piece longer than the buffer: it must be seen as a whole
        }
    }
    for (size_t group = 0, i = 0; group <= GROUPS; group++) {
        while (i < reader->span_count &&
               (group == GROUPS || reader->spans[i].start < reader->done / GROUPS * group))
            i++;
        reader->groups[group] = i;
    }
    return reader->span_count > 0 || *reader->paths;
}

static void reader_free(Reader *reader) {
    free(reader->buffer.data);
    free(reader->spans);
}

// The files that the arguments name: each is a file, a quoted glob, or "-"; none means standard input.
static char **list_files(char **arguments, int count) {
    static char *standard_input[] = {"-"};
    if (count == 0) return list_files(standard_input, 1);
    char **files = NULL;
    size_t n = 0, capacity = 0;
    for (int i = 0; i < count; i++) {
        glob_t found = find_files(arguments[i]);
        files = grow(files, n + found.gl_pathc + 1, &capacity, sizeof *files);
        for (size_t k = 0; k < found.gl_pathc; k++) files[n++] = xstrdup(found.gl_pathv[k]);
        globfree(&found);
    }
    files[n] = NULL;
    return files;
}

static void free_files(char **files) {
    for (char **file = files; *file; file++) free(*file);
    free(files);
}

// =====================================================================================================
// 2. Output
// =====================================================================================================

static void finish_output(void) {
    if (fflush(stdout) != 0 || ferror(stdout))
        die("standard output: could not be written: %s", strerror(errno));
}

static void write_text(const Text *text) {
    if (text->size && fwrite(text->data, 1, text->size, stdout) != text->size) finish_output();
}

// Appends an id's digits and a newline.
static void text_append_line(Text *text, int number) {
    char digits[16], *at = digits + sizeof digits;
    *--at = '\n';
    do *--at = (char)('0' + number % 10);
    while (number /= 10);
    text_append(text, at, (size_t)(digits + sizeof digits - at));
}

// Encodes one group of spans; with `marks`, each document starts with the end of text. The work is done on a copy
// of *result: the results of groups lie side by side, and threads would fight for the cache line they share.
static void encode_group(Tokenizer *t, const Reader *reader, int group, bool marks, Ids *result) {
    Ids ids = *result;
    ids.size = 0;
    for (size_t i = reader->groups[group]; i < reader->groups[group + 1]; i++) {
        Span span = reader->spans[i];
        if (span.starts_document && marks) ids_push(&ids, t->end_of_text);
        tokenizer_encode(t, &ids, reader->buffer.data + span.start, span.size);
    }
    *result = ids;
}

// One id per line.
static void format_ids(const Ids *ids, Text *result) {
    Text lines = *result; // a copy, for the same reason
    lines.size = 0;
    for (size_t i = 0; i < ids->size; i++) text_append_line(&lines, ids->data[i]);
    *result = lines;
}

// encode: one id per line. The threads also write the digits, which takes as long as finding the ids.
static void command_encode(const Settings *settings) {
    Tokenizer *t = settings->t;
    Reader reader = {.t = t, .paths = settings->files};
    Ids ids[GROUPS] = {{0}};
    Text lines[GROUPS] = {{0}};
    while (reader_next(&reader)) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int g = 0; g < GROUPS; g++) {
            encode_group(t, &reader, g, false, &ids[g]);
            format_ids(&ids[g], &lines[g]);
        }
        for (int g = 0; g < GROUPS; g++) write_text(&lines[g]);
    }
    for (int g = 0; g < GROUPS; g++) {
        free(ids[g].data);
        free(lines[g].data);
    }
    reader_free(&reader);
}

// count: how many ids and bytes each file has, like wc.
static void command_count(const Settings *settings) {
    Tokenizer *t = settings->t;
    char **files = settings->files;
    size_t all_tokens = 0, all_bytes = 0;
    printf("%12s %14s %11s  file\n", "tokens", "bytes", "bytes/token");
    for (char **path = files; *path; path++) {
        char *one[] = {*path, NULL};
        Reader reader = {.t = t, .paths = one};
        Ids ids[GROUPS] = {{0}};
        size_t tokens = 0, bytes = 0;
        while (reader_next(&reader)) {
            bytes += reader.done;
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : tokens)
            for (int g = 0; g < GROUPS; g++) {
                encode_group(t, &reader, g, false, &ids[g]);
                tokens += ids[g].size;
            }
        }
        for (int g = 0; g < GROUPS; g++) free(ids[g].data);
        reader_free(&reader);
        printf("%12zu %14zu %11.3f  %s\n", tokens, bytes, tokens ? (double)bytes / (double)tokens : 0, *path);
        all_tokens += tokens;
        all_bytes += bytes;
    }
    if (files[0] && files[1])
        printf("%12zu %14zu %11.3f  total\n", all_tokens, all_bytes,
               all_tokens ? (double)all_bytes / (double)all_tokens : 0);
}

// decode: ids separated by white space become exactly their bytes, as soon as they are read.
static void command_decode(const Settings *settings) {
    Tokenizer *t = settings->t;
    Text text = {0};
    char *chunk = xmalloc(SPAN_BYTES);
    for (char **path = settings->files; *path; path++) {
        FILE *file = open_input(*path);
        size_t line = 1;
        long id = -1; // -1: between numbers
        for (ssize_t got = 1; got > 0;) {
            got = read(fileno(file), chunk, SPAN_BYTES); // not fread: ids from a pipe should not wait
            if (got < 0 && errno == EINTR)
                got = 1;
            else if (got < 0)
                die("%s: cannot be read: %s", *path, strerror(errno));
            for (ssize_t i = 0; i < got + (got == 0); i++) {
                char c = got ? chunk[i] : '\n'; // the end of the file ends the last number
                if (c >= '0' && c <= '9') {
                    id = (id < 0 ? 0 : id) * 10 + (c - '0');
                } else if (!c || !strchr(" \t\r\n\v\f", c)) {
                    die("%s: line %zu: expected ids separated by white space, found '%c'", *path, line,
                        c >= ' ' && c < 127 ? c : '?');
                } else if (id >= 0) {
                    tokenizer_decode(t, &text, (int)id);
                    id = -1;
                }
                if (id >= t->vocab_size)
                    die("%s: line %zu: expected ids from 0 to %d", *path, line, t->vocab_size - 1);
                line += c == '\n';
            }
            write_text(&text);
            finish_output(); // at once, for who reads a pipe
            text.size = 0;
        }
        close_input(file);
    }
    free(chunk);
    free(text.data);
}

static void print_ids(const char *name, const int *ids, long count) {
    printf("\"%s\": [", name);
    for (long i = 0; i < count; i++) printf(i ? ", %d" : "%d", ids[i]);
    putchar(']');
}

// encode --pad: each line is an example of exactly `length` ids, cut on the right, filled up with the pad token
// (GPT-2 has none: then the end of text) on one side; the mask has 1 for ids and 0 for filling, as transformers gives with
// padding="max_length".
//   "Hello world", --pad left --length 3 -> {"input_ids": [50256, 15496, 995], "attention_mask": [0, 1, 1]}
static void command_pad(const Settings *settings) {
    Tokenizer *t = settings->t;
    long length = settings->length;
    bool left = strcmp(settings->pad, "left") == 0;
    int *row = xcalloc((size_t)length, sizeof(int)), *mask = xcalloc((size_t)length, sizeof(int));
    Ids ids = {0};
    char *line = NULL;
    size_t capacity = 0;
    if (t->pad < 0) die("%s: expected a tokenizer with a pad token", settings->tokenizer);
    for (char **path = settings->files; *path && !ferror(stdout); path++) {
        FILE *file = open_input(*path);
        for (ssize_t size; (size = getline(&line, &capacity, file)) >= 0 && !ferror(stdout);) {
            size -= size > 0 && line[size - 1] == '\n';
            ids.size = 0;
            tokenizer_encode(t, &ids, line, (size_t)size);
            long used = (long)ids.size < length ? (long)ids.size : length, first = left ? length - used : 0;
            for (long i = 0; i < length; i++) {
                mask[i] = i >= first && i < first + used;
                row[i] = mask[i] ? ids.data[i - first] : t->pad;
            }
            putchar('{');
            print_ids("input_ids", row, length);
            fputs(", ", stdout);
            print_ids("attention_mask", mask, length);
            puts("}");
        }
        if (ferror(file)) die("%s: cannot be read: %s", *path, strerror(errno));
        close_input(file);
    }
    free(row);
    free(mask);
    free(line);
    free(ids.data);
}

// A shard: 256 int32 (20240520, version 1, number of tokens, zeros), then the tokens as uint16.
static void write_shard_header(FILE *file, const char *path, size_t tokens) {
    int32_t header[256] = {20240520, 1, (int32_t)tokens};
    if (tokens > INT32_MAX)
        die("%s: %zu tokens are too many for one shard: expected at most %d, give fewer files at a time",
            path, tokens, INT32_MAX);
    if (fseeko(file, 0, SEEK_SET) != 0)
        die("%s: expected a file that can be written at its start: %s", path, strerror(errno));
    fwrite(header, sizeof header, 1, file);
}

// Where the validation part starts, of which `wanted` is the ideal place: at the next start of a document, or
// right there when none is near.
static size_t find_split(FILE *file, size_t wanted, size_t total, int end_of_text) {
    uint16_t tokens[4096];
    size_t limit = wanted + (total - wanted) / 2;
    fseeko(file, (off_t)(1024 + 2 * wanted), SEEK_SET);
    for (size_t at = wanted, got; at < limit && (got = fread(tokens, 2, 4096, file)) > 0; at += got)
        for (size_t i = 0; i < got && at + i < limit; i++)
            if (tokens[i] == end_of_text) return at + i;
    return wanted;
}

// shard: writes PREFIX_train.bin, and PREFIX_val.bin with the last part of the tokens. How many there will be
// is not known before the end, so all go into the first file, and the last part is moved then.
static void command_shard(const Settings *settings) {
    Tokenizer *t = settings->t;
    if (t->end_of_text < 0) die("%s: expected a tokenizer with an end of text", settings->tokenizer);
    if (t->vocab_size > UINT16_MAX + 1)
        die("%s: %d tokens do not fit the 16 bits that a shard has for each", settings->tokenizer,
            t->vocab_size);
    char *train_path = xprintf("%s_train.bin", settings->out),
         *val_path = xprintf("%s_val.bin", settings->out);
    FILE *train = create_file(train_path);
    write_shard_header(train, train_path, 0);
    Reader reader = {.t = t, .paths = settings->files, .documents = true};
    Ids ids[GROUPS] = {{0}};
    size_t total = 0, documents = 0;
    while (reader_next(&reader)) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int g = 0; g < GROUPS; g++) encode_group(t, &reader, g, true, &ids[g]);
        for (int g = 0; g < GROUPS; g++) {
            for (size_t i = 0; i < ids[g].size; i++) {
                uint16_t token = (uint16_t)ids[g].data[i];
                fwrite(&token, sizeof token, 1, train);
            }
            total += ids[g].size;
        }
        if (ferror(train)) die("%s: could not be written: %s", train_path, strerror(errno));
        for (size_t i = 0; i < reader.span_count; i++) documents += reader.spans[i].starts_document;
    }
    if (total == 0) die("there is no text: expected at least one document");

    size_t split = total - (size_t)((double)total * settings->val_fraction);
    if (split < total) {
        char *temporary = xprintf("%s.tmp", train_path); // the name it has until finish_file
        FILE *back = fflush(train) == 0 ? fopen(temporary, "rb") : NULL;
        if (!back) die("%s: cannot be read back: %s", temporary, strerror(errno));
        split = find_split(back, split, total, t->end_of_text);
        FILE *val = create_file(val_path);
        write_shard_header(val, val_path, total - split);
        fseeko(back, (off_t)(1024 + 2 * split), SEEK_SET);
        uint16_t tokens[4096];
        for (size_t got; (got = fread(tokens, 2, 4096, back)) > 0;) fwrite(tokens, 2, got, val);
        if (ferror(back)) die("%s: cannot be read back: %s", temporary, strerror(errno));
        fclose(back);
        free(temporary);
        finish_file(val, val_path);
    }
    write_shard_header(train, train_path, split);
    if (fflush(train) != 0 || ftruncate(fileno(train), (off_t)(1024 + 2 * split)) != 0)
        die("%s: could not be written: %s", train_path, strerror(errno));
    finish_file(train, train_path);
    printf("%s: %zu tokens\n", train_path, split);
    if (split < total) printf("%s: %zu tokens\n", val_path, total - split);
    printf("%zu documents\n", documents);
    for (int g = 0; g < GROUPS; g++) free(ids[g].data);
    reader_free(&reader);
    free(train_path);
    free(val_path);
}

static void command_info(const Settings *settings) {
    const Tokenizer *t = settings->t;
    int longest = t->byte_ids[0], tokens = 0;
    for (int id = 0; id < t->vocab_size; id++) {
        tokens += t->names[id] != NULL;
        if (t->names[id] && strlen(t->names[id]) > strlen(t->names[longest])) longest = id;
    }
    printf("vocab_size %d\nmerges %d\nadded_tokens %zu\n", tokens, t->merge_count, t->added_count);
    printf("end_of_text %d\npad %d\n", t->end_of_text, t->pad);
    printf("longest_token %d %s\n", longest, t->names[longest]);
}

// =====================================================================================================
// 3. Learning a vocabulary
// =====================================================================================================
// Byte pair encoding: start with the bytes, count how often each two neighbouring tokens stand side by side
// inside a piece, join the most frequent two into a new token, and again. "low low lower" -> o w (3), l ow
// (3), ...
//
// Text is first reduced to its distinct pieces and their counts. Then each step touches only the pieces that
// hold the pair at work: a pair remembers them, and a heap gives the most frequent pair. The merges are those
// of Hugging Face's BpeTrainer, ties included: equal counts are decided by the smaller left id, then the
// smaller right id.

// ---- counting pieces ----

typedef struct {
    uint64_t hash, count; // count 0: an empty slot
    size_t start, size;   // its bytes in the arena
} Word;

typedef struct {
    Text arena;
    Word *slots;
    size_t used, mask;
} WordTable;

static uint64_t hash_bytes(const char *bytes, size_t size) {
    uint64_t hash = size, block;
    for (; size >= 8; bytes += 8, size -= 8) {
        memcpy(&block, bytes, 8);
        hash = (hash ^ block) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    block = 0;
    memcpy(&block, bytes, size);
    return mix_bits(hash ^ block);
}

// Adds `count` occurrences of a word.
static void count_word(WordTable *table, const char *bytes, size_t size, uint64_t hash, uint64_t count) {
    if (2 * table->used >= table->mask) { // more than half full, or empty: make it twice as large
        size_t mask = table->mask ? 2 * table->mask + 1 : 4095;
        Word *slots = xcalloc(mask + 1, sizeof *slots);
        for (size_t i = 0; table->slots && i <= table->mask; i++) {
            size_t at = table->slots[i].hash & mask;
            while (slots[at].count) at = (at + 1) & mask;
            if (table->slots[i].count) slots[at] = table->slots[i];
        }
        free(table->slots);
        table->slots = slots;
        table->mask = mask;
    }
    Word *slot = &table->slots[hash & table->mask];
    while (slot->count && (slot->hash != hash || slot->size != size ||
                           memcmp(table->arena.data + slot->start, bytes, size) != 0))
        slot = slot == table->slots + table->mask ? table->slots : slot + 1;
    if (!slot->count) {
        *slot = (Word){hash, 0, table->arena.size, size};
        text_append(&table->arena, bytes, size);
        table->used++;
    }
    slot->count += count;
}

// Counts the pieces of all files: each thread in a table of its own, put together at the end.
static WordTable count_words(const Tokenizer *t, char **files, size_t *bytes) {
    int threads = omp_get_max_threads();
    WordTable *tables = xcalloc((size_t)threads, sizeof *tables);
    Reader reader = {.t = t, .paths = files, .documents = true};
    *bytes = 0;
    while (reader_next(&reader)) {
#pragma omp parallel for schedule(dynamic, 1)
        for (int g = 0; g < GROUPS; g++)
            for (size_t i = reader.groups[g]; i < reader.groups[g + 1]; i++) {
                const char *text = reader.buffer.data + reader.spans[i].start;
                size_t size = reader.spans[i].size;
                for (size_t at = 0, end; at < size; at = end) {
                    end = find_piece(t, text, at, size);
                    uint64_t hash = hash_bytes(text + at, end - at);
                    count_word(&tables[omp_get_thread_num()], text + at, end - at, hash, 1);
                }
            }
        for (size_t i = 0; i < reader.span_count; i++) *bytes += reader.spans[i].size;
    }
    reader_free(&reader);
    for (int k = 1; k < threads; k++) {
        for (size_t i = 0; tables[k].slots && i <= tables[k].mask; i++) {
            Word word = tables[k].slots[i];
            if (word.count)
                count_word(&tables[0], tables[k].arena.data + word.start, word.size, word.hash, word.count);
        }
        free(tables[k].arena.data);
        free(tables[k].slots);
    }
    WordTable all = tables[0];
    free(tables);
    return all;
}

// ---- joining pairs ----

typedef struct {
    int *data; // numbers of words, each once
    size_t size, capacity;
} WordList;

// Two tokens that stand side by side somewhere.
typedef struct {
    int left, right;
    int64_t count;
    WordList fresh; // words in which the merge at work brought them together
    int rank;       // of the last merge that joined them
} Pair;

// A pair that waits in the heap, with the count it had then, and where to find it.
typedef struct {
    int64_t count;
    int left, right, pair;
    WordList words;
} PairEntry;

typedef struct {
    int *symbols; // of all words; word w has lengths[w] of them from starts[w] on
    size_t *starts, *lengths;
    int64_t *counts;
    size_t word_count;
    Pair *pairs;
    size_t pair_count, pair_capacity;
    int *pair_slots; // hash table: (left, right) -> number of the pair, -1: empty
    size_t pair_mask;
    int *touched; // pairs with fresh words
    size_t touched_count, touched_capacity;
    PairEntry *heap;
    size_t heap_size, heap_capacity;
} Trainer;

static size_t pair_slot(const Trainer *trainer, int left, int right) {
    size_t at = mix_bits((uint64_t)(unsigned)left << 32 | (unsigned)right) & trainer->pair_mask;
    for (int i; (i = trainer->pair_slots[at]) >= 0; at = (at + 1) & trainer->pair_mask)
        if (trainer->pairs[i].left == left && trainer->pairs[i].right == right) break;
    return at;
}

// Changes how often a pair was seen, by what one place in a word adds or takes away.
static void pair_change(Trainer *trainer, int left, int right, int64_t change, int word) {
    if (2 * trainer->pair_count >= trainer->pair_mask) {
        trainer->pair_mask = trainer->pair_mask ? 2 * trainer->pair_mask + 1 : (1 << 16) - 1;
        trainer->pair_slots = xrealloc(trainer->pair_slots, (trainer->pair_mask + 1) * sizeof(int));
        memset(trainer->pair_slots, -1, (trainer->pair_mask + 1) * sizeof(int));
        for (size_t i = 0; i < trainer->pair_count; i++)
            trainer->pair_slots[pair_slot(trainer, trainer->pairs[i].left, trainer->pairs[i].right)] = (int)i;
    }
    size_t slot = pair_slot(trainer, left, right);
    if (trainer->pair_slots[slot] < 0) {
        trainer->pairs = grow(trainer->pairs, trainer->pair_count + 1, &trainer->pair_capacity, sizeof(Pair));
        trainer->pairs[trainer->pair_count] = (Pair){.left = left, .right = right, .rank = -1};
        trainer->pair_slots[slot] = (int)trainer->pair_count++;
    }
    Pair *pair = &trainer->pairs[trainer->pair_slots[slot]];
    pair->count += change;
    if (change < 0) return;
    WordList *fresh = &pair->fresh;
    if (fresh->size == 0) {
        trainer->touched =
            grow(trainer->touched, trainer->touched_count + 1, &trainer->touched_capacity, sizeof(int));
        trainer->touched[trainer->touched_count++] = trainer->pair_slots[slot];
    }
    if (fresh->size == 0 || fresh->data[fresh->size - 1] != word) {
        if (fresh->size == fresh->capacity) { // most lists stay short
            fresh->capacity = fresh->capacity ? 2 * fresh->capacity : 2;
            fresh->data = xrealloc(fresh->data, fresh->capacity * sizeof(int));
        }
        fresh->data[fresh->size++] = word;
    }
}

// Which candidate goes first: the more frequent one, then the smaller left id, then the smaller right id.
static bool goes_first(const PairEntry *a, const PairEntry *b) {
    if (a->count != b->count) return a->count > b->count;
    return a->left != b->left ? a->left < b->left : a->right < b->right;
}

static void entry_push(Trainer *trainer, PairEntry candidate) {
    trainer->heap = grow(trainer->heap, trainer->heap_size + 1, &trainer->heap_capacity, sizeof(PairEntry));
    size_t at = trainer->heap_size++;
    for (; at > 0 && goes_first(&candidate, &trainer->heap[(at - 1) / 2]); at = (at - 1) / 2)
        trainer->heap[at] = trainer->heap[(at - 1) / 2];
    trainer->heap[at] = candidate;
}

static PairEntry entry_pop(Trainer *trainer) {
    PairEntry *heap = trainer->heap, top = heap[0], last = heap[--trainer->heap_size];
    size_t size = trainer->heap_size, at = 0;
    for (size_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && goes_first(&heap[child + 1], &heap[child])) child++;
        if (!goes_first(&heap[child], &last)) break;
        heap[at] = heap[child];
    }
    heap[at] = last;
    return top;
}

// Moves pairs that were brought together since the last call into the heap.
static void push_touched(Trainer *trainer) {
    for (size_t i = 0; i < trainer->touched_count; i++) {
        Pair *pair = &trainer->pairs[trainer->touched[i]];
        if (pair->count > 0)
            entry_push(trainer,
                       (PairEntry){pair->count, pair->left, pair->right, trainer->touched[i], pair->fresh});
        else
            free(pair->fresh.data);
        pair->fresh = (WordList){0};
    }
    trainer->touched_count = 0;
}

// Joins left and right into `id` in one word, from left to right, and changes the counts of the neighbours.
// The count of the pair itself stays: nothing asks for it any more, unless a token can be made in two ways;
// then BpeTrainer counts on from there, and so do we.
//   x l r y -> x id y:   (x, l) and (r, y) are seen less often, (x, id) and (id, y) more
static void merge_word(Trainer *trainer, int word, int left, int right, int id) {
    int *symbols = trainer->symbols + trainer->starts[word];
    size_t length = trainer->lengths[word], kept = 0;
    int64_t count = trainer->counts[word];
    for (size_t i = 0; i < length; i++) {
        if (symbols[i] != left || i + 1 == length || symbols[i + 1] != right) {
            symbols[kept++] = symbols[i];
            continue;
        }
        if (kept > 0) {
            pair_change(trainer, symbols[kept - 1], left, -count, word);
            pair_change(trainer, symbols[kept - 1], id, count, word);
        }
        i++;
        if (i + 1 < length) {
            pair_change(trainer, right, symbols[i + 1], -count, word);
            pair_change(trainer, id, symbols[i + 1], count, word);
        }
        symbols[kept++] = id;
    }
    trainer->lengths[word] = kept;
}

static void trainer_free(Trainer *trainer) {
    for (size_t i = 0; i < trainer->heap_size; i++) free(trainer->heap[i].words.data);
    free(trainer->heap);
    free(trainer->symbols);
    free(trainer->starts);
    free(trainer->lengths);
    free(trainer->counts);
    free(trainer->pairs);
    free(trainer->pair_slots);
    free(trainer->touched);
}

// Begins with the bytes of all words and counts the pairs in them.
static Trainer trainer_new(const WordTable *words, const Tokenizer *t) {
    Trainer trainer = {0};
    trainer.symbols = xmalloc(words->arena.size * sizeof(int));
    trainer.starts = xcalloc(words->used, sizeof(size_t));
    trainer.lengths = xcalloc(words->used, sizeof(size_t));
    trainer.counts = xcalloc(words->used, sizeof(int64_t));
    for (size_t i = 0; i < words->arena.size; i++)
        trainer.symbols[i] = t->byte_ids[(unsigned char)words->arena.data[i]];
    for (size_t i = 0; i <= words->mask; i++) {
        if (words->slots[i].count == 0) continue;
        size_t w = trainer.word_count++;
        trainer.starts[w] = words->slots[i].start;
        trainer.lengths[w] = words->slots[i].size;
        trainer.counts[w] = (int64_t)words->slots[i].count;
        for (size_t k = 1; k < trainer.lengths[w]; k++) {
            const int *symbol = &trainer.symbols[trainer.starts[w] + k];
            pair_change(&trainer, symbol[-1], symbol[0], trainer.counts[w], (int)w);
        }
    }
    push_touched(&trainer);
    return trainer;
}

// Joins the most frequent pair into a token, again and again, until the tokenizer has `wanted` tokens or no pair
// is left; then gives the tokenizer its merges.
static void learn_merges(Trainer *trainer, Tokenizer *t, long wanted) {
    int *merge_pairs = NULL, merge_count = 0; // the pair that each merge joins
    size_t merge_capacity = 0;
    while (t->vocab_size < wanted && trainer->heap_size > 0) {
        PairEntry best = entry_pop(trainer);
        if (best.count != trainer->pairs[best.pair].count) { // out of date: back with its present count
            best.count = trainer->pairs[best.pair].count;
            entry_push(trainer, best);
            continue;
        }
        if (best.count < 1) {
            free(best.words.data);
            break;
        }
        char *name = xprintf("%s%s", t->names[best.left], t->names[best.right]);
        int id = name_add(t, name); // there may be one already, which other parts made
        free(name);
        merge_pairs = grow(merge_pairs, (size_t)merge_count + 1, &merge_capacity, sizeof(int));
        merge_pairs[merge_count] = best.pair;
        trainer->pairs[best.pair].rank = merge_count++;
        for (size_t i = 0; i < best.words.size; i++)
            merge_word(trainer, best.words.data[i], best.left, best.right, id);
        free(best.words.data);
        push_touched(trainer);
    }
    for (int i = 0; i < merge_count; i++) {
        const Pair *pair = &trainer->pairs[merge_pairs[i]];
        if (pair->rank == i) // of a pair that was joined twice, the last merge counts
            t->merges[t->merge_count++] = (Merge){pair->left, pair->right, -1};
    }
    free(merge_pairs);
}

// train: learns a vocabulary of 256 bytes, merges, and <|endoftext|>, and writes it into a folder.
static void command_train(const Settings *settings) {
    double start = now();
    Tokenizer *t = tokenizer_new((size_t)settings->vocab_size, (size_t)settings->vocab_size);
    find_byte_ids(t, true, "");
    size_t bytes;
    WordTable words = count_words(t, settings->files, &bytes);
    double counted = now();
    if (words.used == 0) die("there is no text: expected at least one document");
    Trainer trainer = trainer_new(&words, t);
    learn_merges(&trainer, t, settings->vocab_size - 1);
    name_add(t, END_OF_TEXT);
    tokenizer_save(t, settings->out);
    if (t->vocab_size < settings->vocab_size)
        warn("the text has no more pairs to join: the vocabulary has %d tokens, not %ld", t->vocab_size,
             settings->vocab_size);
    printf("%s: %d tokens from %.1f MB of text, %zu distinct pieces; counting %.1f s, joining %.1f s\n",
           settings->out, t->vocab_size, (double)bytes / 1e6, words.used, counted - start, now() - counted);
    trainer_free(&trainer);
    free(words.arena.data);
    free(words.slots);
    tokenizer_free(t);
}

// =====================================================================================================
// 4. Commands
// =====================================================================================================

static const char HELP[] =
    "usage: tokenizer COMMAND [options] [FILE...]\n"
    "\n"
    "Text to GPT-2 token ids and back. FILE may be a quoted glob; - or no file is standard input.\n"
    "\n"
    "commands\n"
    "  encode    text to ids, one per line; with --pad, an example per line to JSON\n"
    "  decode    ids separated by white space to exactly the bytes they stand for\n"
    "  count     tokens and bytes of each file\n"
    "  shard     text to llm.c's token files; lines that are only <|endoftext|> separate documents\n"
    "  train     learn a vocabulary from text; such lines separate documents here, too\n"
    "  info      what is in a vocabulary\n"
    "\n"
    "options\n"
    "  --tokenizer WHAT     a folder with vocab.json and merges.txt, or a merges file alone (vocab.bpe)\n"
    "  --plain              encode, count, shard: added tokens in the text, <|endoftext|> among them, are "
    "text\n"
    "  --pad left|right     encode: make every line --length ids long, filled up on this side\n"
    "  --length N           encode --pad: how many ids; longer lines lose their end\n"
    "  --vocab-size N       train: tokens in all: 256 bytes, N - 257 merges, <|endoftext|>\n"
    "  --out WHAT           train: folder to write; shard: writes WHAT_train.bin and WHAT_val.bin\n"
    "  --val-fraction F     shard: part of the tokens, off the end, that goes into WHAT_val.bin (0)\n"
    "  --threads N          all cores\n"
    "  --help\n"
    "\n"
    "examples\n"
    "  echo -n 'Hello world' | tokenizer encode --tokenizer vocab.bpe | tokenizer decode --tokenizer "
    "vocab.bpe\n"
    "  tokenizer train --vocab-size 8192 --out my_vocabulary 'texts/*.txt'\n"
    "  tokenizer shard --tokenizer my_vocabulary --val-fraction 0.05 --out my_text 'texts/*.txt'\n"
    "\n"
    "Exit status: 0 done, 1 something is wrong with a file, 2 something is wrong with the command line.\n";

// Reads a number from `least` to `most`, or ends the program with what to write instead.
static double parse_number(const char *option, const char *text, double least, double most, bool whole) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most) || (whole && value != floor(value)))
        die_usage("--%s %s: expected a %s from %.10g to %.10g", option, text,
                  whole ? "whole number" : "number", least, most);
    return value;
}

// What main() can do. An option is known by a letter: takes and needs list those of each command; all take --threads
// and --help.
static const struct Command {
    const char *name, *takes, *needs;
    void (*run)(const Settings *settings);
} commands[] = {
    {"encode", "tpsl", "t", command_encode}, {"decode", "t", "t", command_decode},
    {"count", "tp", "t", command_count},     {"shard", "tpof", "to", command_shard},
    {"train", "ov", "ov", command_train},    {"info", "t", "t", command_info},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static const struct option options[] = {{"tokenizer", required_argument, NULL, 't'},
                                        {"plain", no_argument, NULL, 'p'},
                                        {"pad", required_argument, NULL, 's'},
                                        {"length", required_argument, NULL, 'l'},
                                        {"vocab-size", required_argument, NULL, 'v'},
                                        {"out", required_argument, NULL, 'o'},
                                        {"val-fraction", required_argument, NULL, 'f'},
                                        {"threads", required_argument, NULL, 'j'},
                                        {"help", no_argument, NULL, 'h'},
                                        {0}};

static void __attribute__((noreturn)) show_help(void) {
    fputs(HELP, stdout);
    finish_output();
    exit(0);
}

// The command of this name; ends the program when there is none.
static const struct Command *find_command(const char *name) {
    if (!*name)
        die_usage("expected a command: encode, decode, count, shard, train or info; --help tells more");
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) show_help();
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    die_usage("%s: expected a command: encode, decode, count, shard, train or info", name);
}

// Reads the options behind a command. Leaves `optind` at the first file.
static Settings read_options(const struct Command *command, int count, char **arguments) {
    Settings settings = {.command = command->name};
    char given[16] = "";
    opterr = 0;
    optind = 2;
    for (int letter, at = optind, which;
         (letter = getopt_long(count, arguments, ":h", options, &which)) != -1; at = optind) {
        const char *written = arguments[at < count ? at : count - 1];
        if (letter == 'h') show_help();
        if (letter == ':') die_usage("%s: expected a value after it", written);
        if (letter == '?') die_usage("%s: there is no such option; --help lists them", written);
        if (letter != 'j' && !strchr(command->takes, letter))
            die_usage("--%s does not apply to %s; --help tells where it does", options[which].name,
                      command->name);
        if (!strchr(given, letter)) given[strlen(given)] = (char)letter;
        if (letter == 't') settings.tokenizer = optarg;
        if (letter == 'p') settings.plain = true;
        if (letter == 's') settings.pad = optarg;
        if (letter == 'o') settings.out = optarg;
        if (letter == 'l') settings.length = (long)parse_number("length", optarg, 1, 1 << 24, true);
        if (letter == 'v') settings.vocab_size = (long)parse_number("vocab-size", optarg, 257, 1 << 24, true);
        if (letter == 'f') settings.val_fraction = parse_number("val-fraction", optarg, 0, 0.99, false);
        if (letter == 'j') settings.threads = (long)parse_number("threads", optarg, 1, 1024, true);
    }
    for (const struct option *option = options; option->name; option++)
        if (strchr(command->needs, option->val) && !strchr(given, option->val))
            die_usage("%s: expected --%s; --help tells what it takes", command->name, option->name);
    if (settings.pad && strcmp(settings.pad, "left") != 0 && strcmp(settings.pad, "right") != 0)
        die_usage("--pad %s: expected left or right", settings.pad);
    if (!settings.pad != !settings.length)
        die_usage("%s: expected --pad and --length together", command->name);
    return settings;
}

int main(int count, char **arguments) {
    program_name = "tokenizer";
    keep_standard_streams();
    const struct Command *command = find_command(count > 1 ? arguments[1] : "");
    Settings settings = read_options(command, count, arguments);
    if (strcmp(command->name, "info") == 0 && optind < count)
        die_usage("%s: info takes no file", arguments[optind]);
    if (settings.threads) omp_set_num_threads((int)settings.threads);
    settings.files = list_files(arguments + optind, count - optind);
    if (settings.tokenizer) settings.t = tokenizer_load(settings.tokenizer);
    if (settings.t) settings.t->plain = settings.plain;
    (settings.pad ? command_pad : command->run)(&settings);
    finish_output();
    free_files(settings.files);
    tokenizer_free(settings.t);
    return 0;
}
