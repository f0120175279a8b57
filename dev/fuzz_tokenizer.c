// fuzz_tokenizer.c - libFuzzer target: damaged vocabulary files, and any bytes as text.
//
//   clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -I. \
//       dev/fuzz_tokenizer.c -o build/fuzz_tokenizer -lm
//   mkdir -p build/corpus
//   ./build/fuzz_tokenizer -close_fd_mask=2 -max_len=4096 -max_total_time=600 build/corpus dev/fuzz_seeds
//
// The first byte says what the others are: text for a vocabulary that is known to be good; or files,
// separated by NUL bytes, and a text at the end: a merges file; vocab.json and merges.txt; tokenizer.json. A
// loader that refuses a file ends the program; here it jumps back, and its memory is taken back, so that
// leaks stay visible.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct HeapBlock {
    struct HeapBlock *previous, *next;
} HeapBlock;

static HeapBlock blocks = {&blocks, &blocks};
static jmp_buf refused;

static void fuzz_free(void *pointer) {
    if (!pointer) return;
    HeapBlock *block = (HeapBlock *)pointer - 1;
    block->previous->next = block->next;
    block->next->previous = block->previous;
    free(block);
}

static void *fuzz_realloc(void *pointer, size_t size) {
    HeapBlock *block = pointer ? (HeapBlock *)pointer - 1 : NULL;
    if (block) {
        block->previous->next = block->next;
        block->next->previous = block->previous;
    }
    block = realloc(block, size + sizeof *block);
    if (!block) abort();
    *block = (HeapBlock){&blocks, blocks.next};
    block->next->previous = block->previous->next = block;
    return block + 1;
}

static void *fuzz_calloc(size_t count, size_t size) {
    if (size && count > (1u << 28) / size) abort(); // files of some kilobytes never need so much
    return memset(fuzz_realloc(NULL, count * size), 0, count * size);
}

static int fuzz_posix_memalign(void **out, size_t alignment, size_t size) {
    (void)alignment; // only for speed
    *out = fuzz_realloc(NULL, size);
    return 0;
}

static int fuzz_vasprintf(char **out, const char *format, va_list arguments) {
    char *string = NULL;
    int size = vasprintf(&string, format, arguments);
    if (size >= 0) *out = memcpy(fuzz_realloc(NULL, (size_t)size + 1), string, (size_t)size + 1);
    free(string);
    return size;
}

static void __attribute__((noreturn)) fuzz_exit(int status) { longjmp(refused, status); }

#define free fuzz_free
#define realloc fuzz_realloc
#define calloc fuzz_calloc
#define posix_memalign fuzz_posix_memalign
#define vasprintf fuzz_vasprintf
#define exit fuzz_exit
#define TRAIN_GPT2_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "train_gpt2.c"

static void require(bool ok) {
    if (!ok) abort();
}

// Text must come back whole, and cut text must have the ids of uncut text.
static void try_text(Tokenizer *t, const char *text, size_t size) {
    for (int special = 0; special < 2; special++) {
        Ids whole = {0}, parts = {0};
        Text back = {0};
        t->plain = !special;
        tokenizer_encode(t, &whole, text, size);
        for (size_t i = 0; i < whole.size; i++) tokenizer_decode(t, &back, whole.data[i]);
        require(back.size == size && (size == 0 || memcmp(back.data, text, size) == 0));
        for (size_t at = 0, cut, end = size / 3; at < size; at += cut, end = end < at ? at : end) {
            cut = tokenizer_cut(t, text + at, end - at);
            if (cut == 0) end = end == size ? size : end + (size - end + 1) / 2;
            if (cut == 0 && end == size) cut = size - at;
            tokenizer_encode(t, &parts, text + at, cut);
        }
        require(whole.size == parts.size &&
                (size == 0 || !memcmp(whole.data, parts.data, whole.size * sizeof(int))));
        require(utf8_whole(text, size) <= size && size - utf8_whole(text, size) < 4);
        free(whole.data);
        free(parts.data);
        free(back.data);
    }
}

static void write_input(const char *folder, const char *name, const char *bytes, size_t size) {
    char path[200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    require(file && fwrite(bytes, 1, size, file) == size && fclose(file) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char folders[4][100];
    static const char *const names[4][2] = {
        {"good"}, {"merges.txt"}, {"vocab.json", "merges.txt"}, {"tokenizer.json"}};
    static const char good[] =
        "a a\naa a\nĠ a\nĠa b\na b\nab ab\nb c\nĊ Ċ\nĊĊ ĊĊ\naa aa\naaaa aaaa\nt e\ne x\nÃ ©\nĠ Ġ\nĠĠ Ġ\n";
    if (!folders[0][0])
        for (int i = 0; i < 4; i++) {
            strcpy(folders[i], "/tmp/fuzz_tokenizer.XXXXXX");
            require(mkdtemp(folders[i]) != NULL);
        }
    if (size == 0) return 0;
    int kind = data[0] % 4;
    const char *at = (const char *)data + 1, *end = (const char *)data + size;
    char path[200];
    write_input(folders[0], "good", good, sizeof good - 1);
    for (int i = 0; i < 2 && kind > 0 && names[kind][i]; i++) {
        const char *stop = at < end ? memchr(at, 0, (size_t)(end - at)) : NULL;
        write_input(folders[kind], names[kind][i], at, (size_t)((stop ? stop : end) - at));
        at = stop ? stop + 1 : end;
    }
    snprintf(path, sizeof path, "%s%s", folders[kind], kind == 0 ? "/good" : kind == 1 ? "/merges.txt" : "");
    if (setjmp(refused) == 0) {
        Tokenizer *t = tokenizer_load(path);
        try_text(t, at, (size_t)(end - at));
        tokenizer_free(t);
        require(blocks.next == &blocks); // nothing leaks
    }
    while (blocks.next != &blocks) free(blocks.next + 1);
    return 0;
}
