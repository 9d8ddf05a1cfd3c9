// The products of block_sparse.cpp with eight-bit codes: vpdpbusd adds four products of a byte of x (its code + 128) and a byte of W
// to each of 16 sums. What 128 adds is taken off with the sums of W's rows. Four columns make a group, [groups, r, 4] in memory.
#pragma once

namespace {

constexpr int64_t TOKENS = 64;  // of a panel [K][64] of bytes

INLINE void dot(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }
INLINE void dot(__m256i& sum, __m256i x, __m256i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }
INLINE void dot(__m128i& sum, __m128i x, __m128i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

INLINE __m512i four(const int8_t* from) {
    int32_t word;
    memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

// Columns k.. (at most 16) of 64 tokens from m on to bytes. Tokens lie so that `quads` gives them in order: place 16 L + 4 j + i
// holds token 16 j + 4 L + i.
void turn(const Product& p, int64_t m, int64_t k, int64_t n, const float* inverse, uint8_t* to) {
    float square[4][PANEL * PANEL], factor[TOKENS];
    for (int64_t j = 0; j < TOKENS; j++) factor[j] = inverse[std::min(m + j, p.count - 1)];
    for (int64_t j = 0; j < 4; j++) {
        const float* from[PANEL];
        for (int64_t i = 0; i < PANEL; i++) from[i] = p.x + std::min(m + j * PANEL + i, p.count - 1) * p.width + k;
        columns(from, n, square[j]);
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < n; i++) {
        __m128i codes[4];
        for (int64_t j = 0; j < 4; j++) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(square[j] + i * PANEL), _mm512_loadu_ps(factor + j * PANEL));
            codes[j] = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128)));
        }
        __m512i all = _mm512_castsi128_si512(codes[0]);
        all = _mm512_inserti32x4(all, codes[1], 1), all = _mm512_inserti32x4(all, codes[2], 2);
        all = _mm512_inserti32x4(all, codes[3], 3);
        _mm512_storeu_si512(to + (k + i) * TOKENS, _mm512_permutexvar_epi32(order, all));
    }
}

// Four columns of a panel as 64 tokens of four bytes each.
INLINE void quads(const uint8_t* panel, const int32_t* at, __m512i* x) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) v[j] = _mm512_loadu_si512(panel + (int64_t)at[j] * TOKENS);
    const __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpackhi_epi8(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi8(v[2], v[3]), d = _mm512_unpackhi_epi8(v[2], v[3]);
    x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
    x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
}

// Four rows of a band from `sub` on times 16 T tokens, to tile[row][64]. `ready`: the band's quads, or null.
template <int T>
void quad_pass(const Product& p, int64_t band, int64_t sub, const uint8_t* panel, const __m512i* ready, float* tile) {
    __m512i acc[4][T];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const __m512i offset = _mm512_set1_epi32(-128 * p.sums[band * p.r + sub + r]);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) acc[r][t] = offset;
    }
    const int64_t first = p.starts[band] / 4, end = p.starts[band + 1] / 4;
    const int8_t* w = (const int8_t*)p.values + (first * p.r + sub) * 4;
    for (int64_t g = first; g < end; g++, w += p.r * 4) {
        __m512i x[4];
        if (ready)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) x[t] = _mm512_loadu_si512(ready + (g - first) * 4 + t);
        else quads(panel, p.columns + g * 4, x);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m512i weight = four(w + r * 4);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) dot(acc[r][t], x[t], weight);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) _mm512_storeu_ps(tile + (sub + r) * TOKENS + t * 16, _mm512_cvtepi32_ps(acc[r][t]));
}

void many_coded(const Product& p, const float* scale, const float* inverse) {
    constexpr void (*PASSES[])(const Product&, int64_t, int64_t, const uint8_t*, const __m512i*, float*) = {
        quad_pass<1>, quad_pass<2>, quad_pass<3>, quad_pass<4>};
    const int64_t panels = (p.count + TOKENS - 1) / TOKENS, parts = (p.width + 255) / 256;
    const Tiles tiles(p);
    uint8_t* const bytes = (uint8_t*)scratch(panels * p.width * TOKENS / 4);
    int64_t longest = 0;
    for (int64_t band = 0; band < p.bands; band++) longest = std::max<int64_t>(longest, p.starts[band + 1] - p.starts[band]);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t job = 0; job < panels * parts; job++) {
            const int64_t panel = job / parts, last = std::min(p.width, (job % parts + 1) * 256);
            for (int64_t k = job % parts * 256; k < last; k += PANEL)
                turn(p, panel * TOKENS, k, std::min<int64_t>(PANEL, last - k), inverse, bytes + panel * p.width * TOKENS);
        }
        Buffer held(p.r > 4 ? longest * 16 : 0);
        __m512i* const ready = p.r > 4 ? (__m512i*)held.floats() : nullptr;
        float tile[TALLEST * TOKENS];
        chunks(p, panels, 1, [&](int64_t t, int64_t end, int64_t panel) {
            const uint8_t* from = bytes + panel * p.width * TOKENS;
            const int64_t vectors = std::min<int64_t>(4, (p.count - panel * TOKENS + 15) / 16);
            for (; t < end; t++) {
                const int64_t begin = t * tiles.bands, stop = std::min(p.bands, begin + tiles.bands);
                for (int64_t band = begin; band < stop; band++) {
                    const int64_t first = p.starts[band] / 4, last = p.starts[band + 1] / 4;
                    if (ready)
                        for (int64_t g = first; g < last; g++) quads(from, p.columns + g * 4, ready + (g - first) * 4);
                    for (int64_t sub = 0; sub < p.r; sub += 4)
                        PASSES[vectors - 1](p, band, sub, from, ready, tile + (band - begin) * p.r * TOKENS);
                }
                put(p, tile, TOKENS, begin * p.r, (stop - begin) * p.r, panel * TOKENS, scale);
            }
        });
    }
}

INLINE __m512i spread(uint32_t word, __m512i) { return _mm512_set1_epi32((int)word); }
INLINE __m256i spread(uint32_t word, __m256i) { return _mm256_set1_epi32((int)word); }
INLINE __m128i spread(uint32_t word, __m128i) { return _mm_set1_epi32((int)word); }

// A vector of rows for M tokens. x: bytes [M, width].
template <class V, int M>
INLINE void byte_lanes(const Product& p, int64_t band, int64_t sub, const uint8_t* x, const float* scale, float* y) {
    constexpr int W = sizeof(V) / 4, CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;
    V acc[M][CHAINS] = {};
    const int8_t* const weights = (const int8_t*)p.values + sub * 4;
    auto step = [&](int64_t g, int chain) __attribute__((always_inline)) {
        const int32_t* at = p.columns + g * 4;
        V w;
        memcpy(&w, weights + g * p.r * 4, sizeof w);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const uint8_t* from = x + m * p.width;
            const uint32_t word = from[at[0]] | from[at[1]] << 8 | from[at[2]] << 16 | (uint32_t)from[at[3]] << 24;
            dot(acc[m][chain], spread(word, V{}), w);
        }
    };
    int64_t g = p.starts[band] / 4;
    const int64_t end = p.starts[band + 1] / 4, row = band * p.r + sub;
    for (; g + CHAINS <= end; g += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) step(g + c, c);
    for (; g < end; g++) step(g, 0);
    for (int m = 0; m < M; m++) {
        int32_t out[CHAINS][W];
        memcpy(out, acc[m], sizeof out);
        for (int w = 0; w < W && row + w < p.rows; w++) {
            int32_t total = -128 * p.sums[row + w];
            for (int c = 0; c < CHAINS; c++) total += out[c][w];
            y[m * p.rows + row + w] = (float)total * (p.scales[row + w] * scale[m]) + (p.bias ? p.bias[row + w] : 0.f);
        }
    }
}

template <class V>
void few_coded(const Product& p, const float* scale, const float* inverse) {
    std::vector<uint8_t> bytes(p.count * p.width);
    for (int64_t m = 0; m < p.count; m++)
        for (int64_t k = 0; k < p.width; k += 16) {
            const __mmask16 some = p.width - k >= 16 ? 0xffff : (1 << (p.width - k)) - 1;
            const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, p.x + m * p.width + k), _mm512_set1_ps(inverse[m]));
            const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
            _mm512_mask_cvtepi32_storeu_epi8(bytes.data() + m * p.width + k, some, codes);
        }
    constexpr int W = sizeof(V) / 4;
    const int64_t pieces = p.threads > 1 ? std::min(p.bands, 4 * p.threads) : 1;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t band = p.bands * piece / pieces; band < p.bands * (piece + 1) / pieces; band++)
            for (int64_t sub = 0; sub < p.r; sub += W) {
                int64_t m = 0;
                for (; m + 4 <= p.count; m += 4)
                    byte_lanes<V, 4>(p, band, sub, bytes.data() + m * p.width, scale + m, p.y + m * p.rows);
                for (; m < p.count; m++)
                    byte_lanes<V, 1>(p, band, sub, bytes.data() + m * p.width, scale + m, p.y + m * p.rows);
            }
}

void coded(const Product& p, const float* scale, const float* inverse) {
    if (p.count > FEW) return many_coded(p, scale, inverse);
    if (p.r % 16 == 0) return few_coded<__m512i>(p, scale, inverse);
    return p.r % 8 == 0 ? few_coded<__m256i>(p, scale, inverse) : few_coded<__m128i>(p, scale, inverse);
}

}  // namespace
