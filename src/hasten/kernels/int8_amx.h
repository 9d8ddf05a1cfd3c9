// The AMX part of int8.cpp: tiles of 16 tokens, 16 outputs and 64 columns.
#pragma once

namespace {

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    Config() {
        for (int i = 0; i < 8; i++) bytes[i] = STEP, rows[i] = LANES;
    }
};

// 32 tokens times 32 outputs (or 16 of either): tiles 0 to 3 hold the sums, 4 and 5 x, 6 and 7 W.
template <int M, int N>
inline void tiles(const Work& work, int64_t m, int64_t n) {
    const int8_t *x = work.token(m), *w = work.block(n);
    const int64_t apart = work.steps * TILE;
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
    for (int64_t step = 0; step < work.steps; step++, x += TILE, w += TILE) {
        _tile_loadd(4, x, STEP);
        _tile_loadd(6, w, STEP);
        _tile_dpbssd(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, w + apart, STEP);
            _tile_dpbssd(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, x + apart, STEP);
            _tile_dpbssd(2, 5, 6);
        }
        if (M > 1 && N > 1) _tile_dpbssd(3, 5, 7);
    }
    alignas(64) int32_t out[4][LANES * LANES];
    _tile_stored(0, out[0], STEP);
    if (N > 1) _tile_stored(1, out[1], STEP);
    if (M > 1) _tile_stored(2, out[2], STEP);
    if (M > 1 && N > 1) _tile_stored(3, out[3], STEP);
    for (int i = 0; i < M; i++)
        for (int r = 0; r < LANES && m + i * LANES + r < work.tokens; r++)
            for (int j = 0; j < N; j++) work.put(m + i * LANES + r, n + j, out[2 * i + j] + r * LANES);
}

template <int N>
inline void tiles_of_tokens(const Work& work, int64_t n) {
    int64_t m = 0;
    for (; m + LANES < work.tokens; m += 2 * LANES) tiles<2, N>(work, m, n);
    if (m < work.tokens) tiles<1, N>(work, m, n);
}

void matrices(const Work& work, int64_t begin, int64_t end) {
    static const Config config;
    _tile_loadconfig(&config);
    int64_t n = begin;
    for (; n + 2 <= end; n += 2) tiles_of_tokens<2>(work, n);
    if (n < end) tiles_of_tokens<1>(work, n);
    _tile_release();
}

}  // namespace
