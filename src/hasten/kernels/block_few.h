// Few rows of queries over single tokens: keys and values are read where they lie, with no layout of their own.
#pragma once
#include "block_forward.h"

namespace {

constexpr int FEW = 8, TILE = 64;  // rows that read keys as they lie; tokens of a tile at most
constexpr int AHEAD = 16;          // tokens that are fetched before their turn

INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

// The sums of 16 vectors.
INLINE void sums16(const float* from, float* to) {
#ifdef __AVX512F__
    const float* rows[PANEL];
    alignas(64) float turned[PANEL * PANEL];
    for (int i = 0; i < PANEL; i++) rows[i] = from + i * WIDTH;
    transpose16(rows, turned);
    vfloat total[4] = {};
    for (int i = 0; i < PANEL; i += 4)
        for (int j = 0; j < 4; j++) total[j] += load(turned + (i + j) * PANEL);
    store(to, (total[0] + total[1]) + (total[2] + total[3]));
#else
    for (int i = 0; i < PANEL; i++) to[i] = sum(load(from + i * WIDTH));
#endif
}

struct Few : Forward {
    const int64_t size;                      // bytes of a number
    const float *keys[TILE], *values[TILE];  // rows padded to whole vectors
    const char *at_keys[TILE + AHEAD], *at_values[TILE + AHEAD];  // where the rows of a tile and the ones after it lie
    Buffer plain, wide_k, wide_v, part_sums;  // queries [rows][d]; rows that had to be copied; [FEW][16][WIDTH]
    std::vector<int64_t> tokens;

    explicit Few(const Work& w)
        : Forward(w), size(c.half ? 2 : 4), plain(w.whole ? 0 : FEW * w.dp), wide_k(w.whole ? 0 : TILE * w.dp),
          wide_v(w.whole ? 0 : TILE * w.ep), part_sums(FEW * PANEL * WIDTH) {}

    // A query block's list. Queries of one position (heads that share the list) see all tokens up to it, so no mask is needed.
    void run(int64_t t) {
        bool direct = !w.whole && rows.size() <= FEW && c.stop < 0 && !c.mask_of;
        for (const Row& row : rows) direct &= row.limit == limit;
        if (!direct) return Forward::run(t);
        begin();
        tokens.clear();
        const int64_t list = list_of(t);
        for (int32_t i = 0; i < c.counts[list]; i++) {
            const int64_t first = c.indices[list * c.M + i] * c.block_k, last = std::min(first + c.block_k, c.Nk);
            for (int64_t n = first; n < last; n++) {
                const int64_t key = w.key_at(b, hk, n);
                if (key <= limit && w.real(b, key)) tokens.push_back(key);
            }
        }
        span(0, tokens.size(), NEVER, [&](int64_t i) { return tokens[i]; });
        end();
    }

    // The softmax over tokens at(first) to before at(last); a row sees them while `first` - `shift` is within its limit.
    template <class At>
    void span(int64_t first, int64_t last, int64_t shift, At at) {
        for (size_t r = 0; r < rows.size(); r++) {
            float* to = plain.floats() + r * w.dp;
            memset(to, 0, w.dp * 4);
            for (int64_t i = 0; i < c.d; i++) to[i] = query_row(rows[r])[i] * (float)(c.scaling * LOG2E);
        }
        const int64_t step = rows.size() <= 2 || c.half ? PANEL : TILE;  // small tiles mix reading and computing best
        for (int64_t i = first; i < last; i += step) tile_of(i, (int)std::min(step, last - i), last, shift, at);
    }

    const char* raw(const float* base, const int64_t* strides, int64_t token) const {
        return (const char*)base + w.offset(strides, b, hk, token) * size;
    }

    // Row i of a tile in fp32, padded with zeros; where it lies if it is so already.
    const float* ready(const char* row, int64_t n, int64_t padded, const Buffer& room, int i) const {
        if (!c.half && n == padded) return (const float*)row;
        float* to = room.floats() + i * padded;
        if (c.half) widen((const uint16_t*)row, n, c.half, to);
        else memcpy(to, row, n * 4);
        memset(to + n, 0, (padded - n) * 4);
        return to;
    }

    template <class At>
    void tile_of(int64_t first, int n, int64_t last, int64_t shift, At at) {
        for (int i = 0; i < n + AHEAD; i++) {
            const int64_t token = at(std::min(first + i, last - 1));
            at_keys[i] = raw(c.k, c.k_strides, token), at_values[i] = raw(c.v, c.v_strides, token);
        }
        for (int i = 0; i < n; i++) keys[i] = ready(at_keys[i], c.d, w.dp, wide_k, i);
        for (int i = 0; i < n; i++) values[i] = ready(at_values[i], c.e, w.ep, wide_v, i);
        for (int i = n; i < round_up(n, PANEL); i++) keys[i] = keys[0];
        for_bands([&](auto r, const Band& band) { few<r>(band, first - shift, n); });
    }

    template <int R>
    void few(const Band& band, int64_t start, int n) {
        float* const at = s.floats();
        const float* const query = plain.floats() + band.first * w.dp;
        const int whole = (int)round_up(n, PANEL);
        for (int i = 0; i < whole; i += PANEL) {
            for (int j = 0; j < PANEL; j++) {
                vfloat acc[R] = {};
                if (i + j < n) fetch(at_keys[i + j + AHEAD], c.d * size);
                for (int64_t k = 0; k < w.dp; k += WIDTH) {
                    const vfloat x = load(keys[i + j] + k);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) acc[r] = x * load(query + r * w.dp + k) + acc[r];
                }
                for (int r = 0; r < R; r++) store(part_sums.floats() + (r * PANEL + j) * WIDTH, acc[r]);
            }
            for (int r = 0; r < R; r++) sums16(part_sums.floats() + r * PANEL * WIDTH, at + r * LINE + i);
        }
        for (int r = 0; r < R; r++) {
            const int64_t seen = std::min<int64_t>(n, rows[band.first + r].limit - start + 1);
            for (int64_t i = std::max<int64_t>(0, seen); i < whole; i++) at[r * LINE + i] = -INF;
        }
        weights<R>(band.first, whole / PANEL, [](int i) { return i; });
        constexpr int W = R >= 8 ? 2 : R >= 4 ? 4 : 8;  // vectors of a value row at a time
        for (int64_t k = 0; k < w.ep; k += WIDTH * W) {
            if (k + WIDTH * W <= w.ep) add_values<R, W>(band.first, k, n);
            else
                for (int64_t j = k; j < w.ep; j += WIDTH) add_values<R, 1>(band.first, j, n);
        }
    }

    template <int R, int W>
    INLINE void add_values(int first, int64_t k, int n) {
        vfloat acc[R][W];
        float* const to = o.floats() + first * w.ep + k;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < W; j++) acc[r][j] = load(to + r * w.ep + j * WIDTH);
        for (int i = 0; i < n; i++) {
            vfloat x[W];
            if (k == 0) fetch(at_values[i + AHEAD], c.e * size);
            for (int j = 0; j < W; j++) x[j] = load(values[i] + k + j * WIDTH);
            for (int r = 0; r < R; r++) {
                const vfloat p = splat(s.floats()[r * LINE + i]);
                for (int j = 0; j < W; j++) acc[r][j] = p * x[j] + acc[r][j];
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < W; j++) store(to + r * w.ep + j * WIDTH, acc[r][j]);
    }
};

}  // namespace
