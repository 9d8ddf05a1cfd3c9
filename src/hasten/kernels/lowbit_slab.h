// What the products of many tokens share (lowbit_gemm.cpp): packed codes as bytes, 16 rows at a time (layout:
// hasten/math/packing.py), the statistics of these rows, and where things lie.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))

extern "C" struct Product {  // kernels/lowbit_gemm.py has the same fields
    const uint8_t* packed;   // [rows, row_bytes]
    const void *scales, *zeros;  // [rows, groups]; zeros of kind 3: numbers of tables; one_zero: a single number
    const float *bias, *tables;  // [rows] and [tables, 2^BITS], or null
    const float* x;              // [count, columns]
    float* y;                    // [count, rows]
    int64_t rows, columns, row_bytes, groups, group, count;
    int64_t scale_kind, zero_kind, one_zero, threads;  // kinds: 0 fp32, 1 fp16, 2 uint8, 3 int32
};

namespace {

constexpr int LANES = 16, STEP = 64, TILE = LANES * STEP;  // rows or tokens; columns; bytes of a tile of codes
constexpr int FIRST = BITS == 3 ? 2 : BITS == 6 ? 4 : BITS;  // bits of a code in the first plane
constexpr int UNIT = 512 / FIRST, UNIT_BYTES = UNIT * BITS / 8;

INLINE float half_to_float(uint16_t half) {  // no NaN or infinity
    const uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float v;
    memcpy(&v, &bits, 4);
    v *= 0x1p112f;
    uint32_t out;
    memcpy(&out, &v, 4);
    out |= sign;
    memcpy(&v, &out, 4);
    return v;
}

INLINE float number(const void* from, int64_t kind, int64_t at) {
    switch (kind) {
        case 0: return ((const float*)from)[at];
        case 1: return half_to_float(((const uint16_t*)from)[at]);
        case 2: return ((const uint8_t*)from)[at];
        default: return (float)((const int32_t*)from)[at];
    }
}

// The codes of a whole unit: 64 columns at `to`, the next 64 `apart` bytes on.
INLINE void unpack_unit(const uint8_t* __restrict at, uint8_t* __restrict to, int64_t apart) {
    for (int block = 0; block < UNIT / STEP; block++, to += apart) {
        constexpr int MASK = (1 << FIRST) - 1;
        if (BITS == 8) {
            memcpy(to, at, STEP);
            continue;
        }
        for (int i = 0; i < STEP; i++) to[i] = (uint8_t)(at[i] >> block * FIRST) & MASK;
        if (BITS == 3) {
#ifdef __AVX512BW__
            uint64_t high;
            memcpy(&high, at + 64 + 8 * block, 8);
            _mm512_storeu_si512(to, _mm512_or_si512(_mm512_loadu_si512(to), _mm512_maskz_set1_epi8(high, 4)));
#elif defined(__AVX2__)
            const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201ull);
            const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
            for (int half = 0; half < 2; half++) {
                int32_t word;
                memcpy(&word, at + 64 + 8 * block + 4 * half, 4);
                const __m256i some = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), bit);
                const __m256i high = _mm256_and_si256(_mm256_cmpeq_epi8(some, bit), _mm256_set1_epi8(4));
                __m256i* out = (__m256i*)(to + 32 * half);
                _mm256_storeu_si256(out, _mm256_or_si256(_mm256_loadu_si256(out), high));
            }
#else
            for (int i = 0; i < STEP; i++) to[i] |= (at[64 + 8 * block + i / 8] >> i % 8 & 1) << 2;
#endif
        }
        if (BITS == 6)
            for (int i = 0; i < STEP; i++) to[i] |= (at[64 + i % 32] >> 2 * (2 * block + i / 32) & 3) << 4;
    }
}

// The half unit that ends some rows, code by code; at least one block of 64 columns is written.
inline void unpack_half(const uint8_t* at, uint8_t* to, int64_t apart) {
    constexpr int WIDTH = UNIT / 2, SECOND = BITS == 6 ? 2 : 1;
    for (int i = 0; i < std::max(WIDTH, STEP); i++) {
        int code = 0;
        if (i < WIDTH) {
            code = at[i % 32] >> i / 32 * FIRST & ((1 << FIRST) - 1);
            if (BITS == 3) code |= (at[32 + i / 8] >> i % 8 & 1) << 2;
            if (BITS == 6) code |= (at[32 + i % 16] >> i / 16 * SECOND & 3) << 4;
        }
        to[i / STEP * apart + i % STEP] = (uint8_t)code;
    }
}

// Codes of 16 rows from `row` on, columns from `from` (where a unit starts) to before `to`: [columns / 64][16][64] bytes. Rows
// after the last are zero.
inline void unpack(const Product& p, int64_t row, int64_t from, int64_t to, uint8_t* codes) {
    const int64_t whole = p.row_bytes / UNIT_BYTES * UNIT;
    for (int r = 0; r < LANES; r++) {
        uint8_t* out = codes + r * STEP;
        if (row + r >= p.rows) {
            for (int64_t column = from; column < to; column += STEP, out += TILE) memset(out, 0, STEP);
            continue;
        }
        const uint8_t* at = p.packed + (row + r) * p.row_bytes + from * BITS / 8;
        for (int64_t column = from; column < to; column += UNIT, at += UNIT_BYTES, out += UNIT / STEP * TILE) {
            if (column < whole) unpack_unit(at, out, TILE);
            else unpack_half(at, out, TILE);
        }
    }
}

// Columns of all codes that `unpack` writes for a whole row.
INLINE int64_t width(const Product& p) {
    const int64_t columns = p.row_bytes * 8 / BITS;
    return (columns + STEP - 1) / STEP * STEP;
}

// 16 rows' scales and zeros [groups][16]; rows after the last have zeros.
inline void statistics(const Product& p, int64_t row, float* scales, float* zeros) {
    for (int r = 0; r < LANES; r++)
        for (int64_t g = 0; g < p.groups; g++) {
            const int64_t at = (row + r) * p.groups + g;
            scales[g * LANES + r] = row + r < p.rows ? number(p.scales, p.scale_kind, at) : 0.f;
            zeros[g * LANES + r] = row + r < p.rows ? number(p.zeros, p.zero_kind, p.one_zero ? 0 : at) : 0.f;
        }
}

// Sums [16 rows][16 tokens] go to y [tokens, rows] with the bias.
inline void put(const Product& p, int64_t token, int64_t row, const float* sums) {
    const int64_t tokens = std::min<int64_t>(LANES, p.count - token), rows = std::min<int64_t>(LANES, p.rows - row);
    alignas(64) float turned[LANES * LANES], bias[LANES] = {};
    if (p.bias) memcpy(bias, p.bias + row, 4 * rows);
    typedef float four __attribute__((vector_size(16)));
    typedef int32_t order __attribute__((vector_size(16)));
    for (int m = 0; m < LANES; m += 4)
        for (int r = 0; r < LANES; r += 4) {
            four v[4], to;
            for (int i = 0; i < 4; i++) memcpy(v + i, sums + (r + i) * LANES + m, 16);
            const four a = __builtin_shuffle(v[0], v[1], order{0, 4, 1, 5}), b = __builtin_shuffle(v[2], v[3], order{0, 4, 1, 5});
            const four c = __builtin_shuffle(v[0], v[1], order{2, 6, 3, 7}), d = __builtin_shuffle(v[2], v[3], order{2, 6, 3, 7});
            memcpy(&to, bias + r, 16);
            v[0] = __builtin_shuffle(a, b, order{0, 1, 4, 5}) + to, v[1] = __builtin_shuffle(a, b, order{2, 3, 6, 7}) + to;
            v[2] = __builtin_shuffle(c, d, order{0, 1, 4, 5}) + to, v[3] = __builtin_shuffle(c, d, order{2, 3, 6, 7}) + to;
            for (int i = 0; i < 4; i++) memcpy(turned + (m + i) * LANES + r, v + i, 16);
        }
    for (int64_t m = 0; m < tokens; m++) {
        float* y = p.y + (token + m) * p.rows + row;
        if (rows == LANES) memcpy(y, turned + m * LANES, 4 * LANES);
        else memcpy(y, turned + m * LANES, 4 * rows);
    }
}

template <class T>
struct Buffer {  // grows, never shrinks
    T* data = nullptr;
    int64_t size = 0;

    T* fit(int64_t count) {
        if (count > size) {
            free(data);
            size = (count + 63) / 64 * 64;
            data = (T*)aligned_alloc(64, size * sizeof(T));
        }
        return data;
    }
    ~Buffer() { free(data); }
};

}  // namespace
