// Intel's tiles (AMX) in plain C, to test the code that uses them on processors without: dev/portability.sh builds
// with -include dev/amx_emulation.h. It ends the program when tiles are used without a configuration, or when a
// configuration is loaded twice without a release in between.
#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define USE_AMX
#define syscall(...) 0L // the permission to use tiles is granted

// The compiler's own functions of these names, where it has them, are not used.
#include <immintrin.h>
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_loadconfig
#define _tile_release amx_release
#define _tile_zero amx_zero
#define _tile_loadd amx_loadd
#define _tile_stored amx_stored
#define _tile_dpbf16ps amx_dpbf16ps

static _Thread_local uint32_t amx_tile_data[8][16][16];
static _Thread_local int amx_configured = 0;

static void amx_expect(int right, const char *what) {
    if (right) return;
    fprintf(stderr, "AMX emulation: %s\n", what);
    abort();
}

static void amx_loadconfig(const void *config) { // only what the program asks for: 8 tiles of 16 rows of 64 bytes
    const uint8_t *bytes = config;
    int right = bytes[0] == 1 && bytes[1] == 0;
    for (int t = 0; t < 8; t++) right = right && bytes[16 + 2 * t] == 64 && bytes[17 + 2 * t] == 0 && bytes[48 + t] == 16;
    for (int t = 8; t < 16; t++) right = right && bytes[16 + 2 * t] == 0 && bytes[48 + t] == 0;
    amx_expect(right && !amx_configured, "another configuration than expected, or one not released");
    amx_configured = 1;
    memset(amx_tile_data, 0, sizeof amx_tile_data);
}

static void amx_release(void) {
    amx_expect(amx_configured, "release without a configuration");
    amx_configured = 0;
}

static void amx_zero(int t) {
    amx_expect(amx_configured, "no configuration");
    memset(amx_tile_data[t], 0, sizeof amx_tile_data[t]);
}

static void amx_loadd(int t, const void *from, size_t stride) {
    amx_expect(amx_configured, "no configuration");
    for (size_t row = 0; row < 16; row++) memcpy(amx_tile_data[t][row], (const char *)from + row * stride, 64);
}

static void amx_stored(int t, void *to, size_t stride) {
    amx_expect(amx_configured, "no configuration");
    for (size_t row = 0; row < 16; row++) memcpy((char *)to + row * stride, amx_tile_data[t][row], 64);
}

static float amx_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// C[m][n] += A[m][2k] · B[2k][n] + A[m][2k + 1] · B[2k + 1][n]: a tile of A holds row m's pairs, one of B pair k's
// columns.
static void amx_dpbf16ps(int c, int a, int b) {
    amx_expect(amx_configured, "no configuration");
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                uint32_t x = amx_tile_data[a][m][k], y = amx_tile_data[b][k][n];
                float sum = amx_float(amx_tile_data[c][m][n]) + amx_float(x << 16) * amx_float(y << 16) +
                            amx_float(x & 0xffff0000) * amx_float(y & 0xffff0000);
                memcpy(&amx_tile_data[c][m][n], &sum, 4);
            }
}
#endif
