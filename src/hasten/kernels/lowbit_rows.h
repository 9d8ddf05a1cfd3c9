// What a tile of lowbit.cpp reads beside codes: rows of x, whole or rounded to 8 bits, and the statistics of rows of W in fp32.
#pragma once
#include "lowbit_codes.h"

#include <algorithm>
#include <cmath>
#include <vector>

struct Weight {
    const uint8_t* packed;  // [rows, row_bytes]
    const void *scales, *zeros, *bias;
    const float *tables, *levels;
    int64_t rows, columns, width, groups, group;                // columns: padded to a packed row's; width: the weight's
    int64_t scale_kind, zero_kind, bias_kind, one_zero, count;  // kinds: 0 fp32, 1 fp16, 2 uint8, 3 int32, 4 bf16
};

namespace {

INLINE vfloat madd(vfloat a, vfloat b, vfloat c) { return a * b + c; }  // contracted to one instruction
INLINE vfloat splat(float x) {
#ifdef __AVX512F__
    return (vfloat)_mm512_set1_ps(x);
#else
    return vfloat{x, x, x, x, x, x, x, x};
#endif
}
INLINE vfloat floats(vint v) { return __builtin_convertvector(v, vfloat); }
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE float total(vfloat v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
#endif
}

// To the nearest whole number, ties to even.
INLINE vint nearest(vfloat v) {
#ifdef __AVX512F__
    return (vint)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (vint)_mm256_cvtps_epi32((__m256)v);
#else
    vint whole;
    for (int i = 0; i < WIDTH; i++) whole[i] = (int32_t)std::nearbyint(v[i]);
    return whole;
#endif
}

inline float half(uint16_t from) {
    const uint32_t x = from, endless = (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    uint32_t bits = (x & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;  // 2^112: the exponents' biases differ by that much
    memcpy(&bits, &value, 4);
    bits |= (x & 0x8000) << 16 | endless;
    memcpy(&value, &bits, 4);
    return value;
}

inline float one(const void* from, int64_t kind, int64_t at) {
    if (kind == 0) return ((const float*)from)[at];
    if (kind == 2) return ((const uint8_t*)from)[at];
    const uint16_t word = ((const uint16_t*)from)[at];
    if (kind == 1) return half(word);
    const uint32_t bits = (uint32_t)word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// WIDTH numbers of a kind from number `at` on, the first `have` of them real, the rest zeros.
INLINE vfloat some(const void* from, int64_t kind, int64_t at, int64_t have) {
#ifdef __AVX512F__
    const __mmask16 real = have >= 16 ? 0xffff : (1 << have) - 1;
    if (kind == 0) return (vfloat)_mm512_maskz_loadu_ps(real, (const float*)from + at);
    if (kind == 1) return (vfloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(real, (const uint16_t*)from + at));
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(real, (const uint8_t*)from + at)));
#else
    if (kind == 0 && have >= WIDTH) return load<vfloat>((const float*)from + at);
    vfloat v{};
    for (int i = 0; i < WIDTH && i < have; i++) v[i] = one(from, kind, at + i);
    return v;
#endif
}

// Rows of x as a tile reads them, and room for the statistics of a tile's rows of W.
struct Inputs {
    int64_t blocks, stride;  // stride: groups, rounded up, with room for a vector
    float* values;           // fp32: [m, block, 4, 16], column 4j + i of a block at [i, j]
    int8_t* bytes;           // 8 bits: [m, block, 64]
    float* steps;            // 8 bits: [m, block], what a byte's unit is worth
    float* sums;             // [m, stride]: of x (as rounded) over each group
    int32_t* places;         // the group of each 16 columns
    float *scales, *taken;   // [r, stride]; [r, m]: what zeros take from the sum
    int32_t* tables;         // [r, stride]

    Inputs(const Weight& w, int r, int m, bool small) {
        blocks = up(w.columns, BLOCK) / BLOCK;
        stride = up(w.groups, 16) + 16;
        thread_local std::vector<float> room;  // kept: allocating costs as much as a small product
        const int64_t parts[] = {blocks * BLOCK * m / (small ? 4 : 1), blocks * m, stride * m, blocks * 4,
                                 stride * r, r * m, stride * r};
        int64_t need = 16;
        for (int64_t part : parts) need += up(part, 16);
        if ((int64_t)room.size() < need) room.resize(need);
        float* at = (float*)(((uintptr_t)room.data() + 63) & ~(uintptr_t)63);
        auto take = [&](int64_t part) { return at += up(part, 16), at - up(part, 16); };
        values = take(parts[0]), bytes = (int8_t*)values;
        steps = take(parts[1]), sums = take(parts[2]), places = (int32_t*)take(parts[3]);
        scales = take(parts[4]), taken = take(parts[5]), tables = (int32_t*)take(parts[6]);
        memset(sums, 0, 4 * stride * m);
        memset(scales, 0, 4 * stride * r);
        memset(tables, 0, 4 * stride * r);
        int64_t left = w.group;
        for (int64_t q = 0, g = 0; q < blocks * 4; q++, left -= 16) {
            if (left <= 0) left += w.group, g += g + 1 < w.groups;
            places[q] = (int32_t)g;
        }
    }

    void fill(const Weight& w, const float* x, int m, bool small) {
        float* const sum = sums + m * stride;
        memset(sum, 0, 4 * stride);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t have = w.width - b * BLOCK;
            const float* block = x + b * BLOCK;
            float last[BLOCK] = {};
            if (have < BLOCK) {
                if (have > 0) memcpy(last, block, 4 * have);
                block = last;
            }
            float parts[4];  // sums of 16 columns
            if (small) round(block, m * blocks + b, parts);
            else order(block, m * blocks + b, parts);
            for (int q = 0; q < 4; q++) sum[places[4 * b + q]] += parts[q];
        }
    }

    INLINE void order(const float* block, int64_t place, float* parts) {
        float* to = values + place * BLOCK;
#ifdef __AVX512F__
        const __m512i even = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
        __m512 v[4];
        for (int q = 0; q < 4; q++) v[q] = _mm512_loadu_ps(block + 16 * q), parts[q] = _mm512_reduce_add_ps(v[q]);
        for (int i = 0; i < 4; i++) {
            const __m512i lanes = _mm512_add_epi32(even, _mm512_set1_epi32(i));
            const __m512 low = _mm512_permutex2var_ps(v[0], lanes, v[1]), high = _mm512_permutex2var_ps(v[2], lanes, v[3]);
            _mm512_store_ps(to + 16 * i, _mm512_shuffle_f32x4(low, high, 0x44));
        }
#else
        for (int q = 0; q < 4; q++) {
            vfloat all = load<vfloat>(block + 16 * q);
            if (WIDTH == 8) all += load<vfloat>(block + 16 * q + 8);
            parts[q] = total(all);
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 16; j++) to[16 * i + j] = block[4 * j + i];
#endif
    }

    INLINE void round(const float* block, int64_t place, float* parts) {
        constexpr int COUNT = BLOCK / WIDTH;
        vfloat v[COUNT];
        vint most{};  // of absolute values, as bits: in this order infinity and NaN come last
        for (int i = 0; i < COUNT; i++) {
            v[i] = load<vfloat>(block + WIDTH * i);
            const vint bits = (vint)v[i] & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        int32_t top = 0;
#ifdef __AVX512F__
        top = _mm512_reduce_max_epi32((__m512i)most);
#else
        for (int i = 0; i < WIDTH; i++) top = std::max(top, most[i]);
#endif
        float largest;
        memcpy(&largest, &top, 4);
        const bool broken = top >= 0x7f800000, live = !broken && largest >= 1e-30f;
        const float inverse = live ? 127.f / largest : 0.f, step = broken ? NAN : live ? largest / 127.f : 0.f;
        steps[place] = step;
        int8_t* to = bytes + place * BLOCK;
        for (int q = 0; q < 4; q++) {
            vint all{};
            for (int i = q * COUNT / 4; i < (q + 1) * COUNT / 4; i++) {
                const vint whole = live ? nearest(v[i] * inverse) : vint{};
                all += whole;
                typedef int8_t small __attribute__((vector_size(WIDTH)));
                const small narrow = __builtin_convertvector(whole, small);
                memcpy(to + WIDTH * i, &narrow, WIDTH);
            }
            int32_t count = 0;
#ifdef __AVX512F__
            count = _mm512_reduce_add_epi32((__m512i)all);
#else
            for (int i = 0; i < WIDTH; i++) count += all[i];
#endif
            parts[q] = step * (float)count;
        }
    }

    // The statistics of row `row` of W become those of row r of a tile. `centre`: what codes are counted from.
    INLINE void read(const Weight& w, int r, int64_t row, int rows_of_x, float centre) {
        float *const to = scales + r * stride, *const take = taken + r * rows_of_x;
        if (w.tables) {
            const int32_t* from = (const int32_t*)w.zeros + (w.one_zero ? 0 : row * w.groups);
            for (int64_t g = 0; g < w.groups; g++) {
                const int32_t t = from[w.one_zero ? 0 : g];
                tables[r * stride + g] = t >= 0 && t < w.count ? t : 0;
            }
        }
        const float* level = w.levels ? w.levels + row * (up(w.groups, 16) / 16) * 4 : nullptr;
        const vfloat same = splat(w.one_zero && !w.tables ? one(w.zeros, w.zero_kind, 0) : 0.f);
        vfloat all[4] = {};
        for (int64_t g = 0; g < w.groups; g += WIDTH) {
            const int64_t have = w.groups - g;
            vfloat scale = some(w.scales, w.scale_kind, row * w.groups + g, have), zero = same;
            if (!w.one_zero && !w.tables) zero = some(w.zeros, w.zero_kind, row * w.groups + g, have);
            if (level) {
                const float* of = level + g / 16 * 4;
                scale = (scale - of[1]) * of[0];
                zero = (zero - of[3]) * of[2];
            }
            memcpy(to + g, &scale, sizeof scale);
            if (w.tables) continue;
            const vfloat product = scale * (zero - centre);
            for (int m = 0; m < rows_of_x; m++) all[m] = madd(product, load<vfloat>(sums + m * stride + g), all[m]);
        }
        for (int m = 0; m < rows_of_x; m++) take[m] = total(all[m]);
    }
};

}  // namespace
