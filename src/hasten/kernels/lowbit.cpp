// y = x W^T + b with W held as packed codes of BITS = 2, 3, 4, 6 or 8 bits (layout: hasten/math/packing.py) and statistics per
// row and group (hasten/kernels/lowbit_weights.py). A tile is a few rows of W times a few rows of x; in it, the sum over the 64
// columns of a block is taken over codes, and only that is scaled:
//     y[n] = sum_g scale[n, g] * (sum_{k in g} code[n, k] x[k] - zero[n, g] sum_{k in g} x[k])
// The sums over x are taken once. With activations of 8 bits the inner sum is one of whole numbers. The dense weight never
// exists. Plain C interface over raw pointers; built by hasten/kernels/native.py with -DBITS=n.
#include "lowbit_rows.h"

#ifdef __AVX512F__
#define ROWS 4   // rows of W in a tile
#define COUNT 4  // rows of x in a tile
#elif defined(__AVX2__)
#define ROWS 2
#define COUNT 4
#else  // quick to build
#define ROWS 1
#define COUNT 1
#endif
#define LOOKUP (WIDTH == 16 && BITS <= 4)  // one permute turns codes into numbers

namespace {

constexpr int CENTRE = 1 << (BITS - 1);  // codes are counted from it where x is fp32: less to cancel
constexpr int ENTRIES = BITS <= 4 ? 1 << BITS : 1;

enum Mode { SMALL, PLAIN, TABLE, TABLES };  // 8-bit x; uniform; one table; a table for each group

// The numbers that codes stand for, before scaling.
struct Numbers {
    vfloat entries[16 / WIDTH];

    void centred() {
        for (int i = 0; i < 16; i++) entries[i / WIDTH][i % WIDTH] = (float)((i & ((1 << BITS) - 1)) - CENTRE);
    }
    INLINE void read(const float* table) {
#ifdef __AVX512F__
        entries[0] = (vfloat)_mm512_maskz_loadu_ps((1 << ENTRIES) - 1, table);
#else
        float all[16] = {};
        memcpy(all, table, 4 * ENTRIES);
        memcpy(entries, all, 64);
#endif
    }
    INLINE vfloat at(vint codes) const {  // the lanes' lowest 4 bits
#ifdef __AVX512F__
        return (vfloat)_mm512_permutexvar_ps((__m512i)codes, (__m512)entries[0]);
#elif defined(__AVX2__)
        const __m256 low = _mm256_permutevar8x32_ps((__m256)entries[0], (__m256i)codes);
        if (BITS < 4) return (vfloat)low;
        const __m256 high = _mm256_permutevar8x32_ps((__m256)entries[1], (__m256i)codes);
        return (vfloat)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
        vfloat v;
        for (int i = 0; i < WIDTH; i++) v[i] = ((const float*)entries)[codes[i] & 15];
        return v;
#endif
    }
};

// Groups of 16 or 32 columns with tables of their own, lane by lane; `first`: in 16ths of columns.
__attribute__((noinline)) void mixed(const Weight& w, const Inputs& in, int r, int64_t first, const vint& codes, vfloat& to) {
    for (int i = 0; i < WIDTH; i++)
        to[i] = w.tables[in.tables[r * in.stride + in.places[first + i / 4]] * ENTRIES + (codes[i] & (ENTRIES - 1))];
}

// The scale of each lane: one for the block, or of groups of 16 or 32 columns.
template <bool FINE, int H>
INLINE vfloat scale_of(const float* scales, int64_t block, int64_t group, int32_t place) {
    if (!FINE) return splat(scales[place]);
#ifdef __AVX512F__
    const __m512i sixteen = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i lanes = group == 16 ? sixteen : _mm512_srli_epi32(sixteen, 1);
    const float* from = scales + (group == 16 ? 4 * block : 2 * block);
    return (vfloat)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(from)));
#else
    const float* from = scales + (group == 16 ? 4 * block + 2 * H : 2 * block + H);
    const float a = from[0], b = from[group == 16];
    return vfloat{a, a, a, a, b, b, b, b};
#endif
}

// The SPAN columns at half H of block S of a unit: R rows of W times M rows of x.
template <int R, int M, Mode MODE, bool FINE, int S, int H, bool HALF>
INLINE void span(const Weight& w, const Inputs& in, const Numbers& numbers, const uint8_t* at, int64_t row_bytes, int64_t block,
                 vfloat (&sums)[R][M]) {
    constexpr bool DIRECT = MODE == PLAIN && !LOOKUP;  // codes are converted, not looked up
    vint v[R];
    vfloat scales[R];
    const int32_t place = in.places[4 * block];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        v[r] = codes<S, H, HALF>(at + r * row_bytes);
        scales[r] = scale_of<FINE, H>(in.scales + r * in.stride, block, w.group, place);
        if (DIRECT) v[r] = (vint)((vbyte)v[r] - (uint8_t)CENTRE);
    }
    if (MODE == SMALL) {
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const vint x = load<vint>(in.bytes + (m * in.blocks + block) * BLOCK + SPAN * H);
            const vfloat step = splat(in.steps[m * in.blocks + block]);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r][m] = madd(floats(dot(v[r], x)) * step, scales[r], sums[r][m]);
        }
        return;
    }
    Numbers own[R];
    if (MODE == TABLES && !FINE)
        for (int r = 0; r < R; r++) own[r].read(w.tables + in.tables[r * in.stride + place] * ENTRIES);
    vfloat raw[R];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vfloat number[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            if (DIRECT) number[r] = floats(v[r] << (24 - 8 * i) >> 24);
            else if (MODE == TABLES && FINE) mixed(w, in, r, 4 * block + WIDTH * H / 4, v[r] >> 8 * i, number[r]);
            else number[r] = (MODE == TABLES ? own[r] : numbers).at(v[r] >> 8 * i);
            if (M > 1) number[r] *= scales[r];
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const vfloat x = load<vfloat>(in.values + (m * in.blocks + block) * BLOCK + 16 * i + WIDTH * H);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                if (M > 1) sums[r][m] = madd(number[r], x, sums[r][m]);
                else raw[r] = i ? madd(number[r], x, raw[r]) : number[r] * x;
            }
        }
    }
    if (M == 1)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r][0] = madd(raw[r], scales[r], sums[r][0]);
}

template <int R, int M, Mode MODE, bool FINE>
INLINE void tile(const Weight& w, Inputs& in, const Numbers& numbers, int64_t row, float* y) {
    for (int r = 0; r < R; r++) in.read(w, r, row + r, M, MODE == SMALL ? 0 : CENTRE);
    const int64_t row_bytes = w.columns * BITS / 8, units = w.columns / UNIT;
    const uint8_t* at = w.packed + row * row_bytes;
    vfloat sums[R][M] = {};
#define SPANS(S, HALF)                                                                                        \
    span<R, M, MODE, FINE, S, 0, HALF>(w, in, numbers, at, row_bytes, u * BLOCKS + S, sums);                  \
    if (HALVES == 2) span<R, M, MODE, FINE, S, HALVES - 1, HALF>(w, in, numbers, at, row_bytes, u * BLOCKS + S, sums);
    int64_t u = 0;
    for (; u < units; u++, at += UNIT_BYTES) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)  // rows are too short for the hardware to see a stream in each
            for (int line = 0; line < UNIT_BYTES; line += 64) {
                __builtin_prefetch(at + (2 * R + r) * row_bytes + line, 0, 2);  // the tile after the next, to the second level
                __builtin_prefetch(at + (R + r) * row_bytes + line, 0, 3);
            }
        SPANS(0, false)
        if (BLOCKS > 1) { SPANS(1 % BLOCKS, false) }
        if (BLOCKS > 2) { SPANS(2 % BLOCKS, false) SPANS(3 % BLOCKS, false) }
    }
    if (units * UNIT < w.columns) {
        SPANS(0, true)
        if (HALF_BLOCKS > 1) { SPANS(1 % HALF_BLOCKS, true) }
    }
#undef SPANS
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const float bias = w.bias ? one(w.bias, w.bias_kind, row + r) : 0.f;
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) y[m * w.rows + row + r] = total(sums[r][m]) - in.taken[r * M + m] + bias;
    }
}

template <int M, Mode MODE, bool FINE>
__attribute__((noinline)) void strip(const Weight& w, Inputs& in, int64_t first, int64_t last, float* y) {
    Numbers numbers;
    if (MODE == TABLE) numbers.read(w.tables);
    else numbers.centred();
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) tile<ROWS, M, MODE, FINE>(w, in, numbers, row, y);
    for (; ROWS > 1 && row < last; row++) tile<1, M, MODE, FINE>(w, in, numbers, row, y);
}

template <Mode MODE, bool FINE>
void work(const Weight& w, int64_t first, int64_t last, const float* x, float* y, int64_t count) {
    constexpr int MOST = MODE == TABLES ? 1 : COUNT;
    Inputs in(w, ROWS, count < MOST ? 1 : MOST, MODE == SMALL);
    for (int64_t m = 0; m < count;) {
        const int take = count - m >= MOST ? MOST : 1;
        for (int i = 0; i < take; i++) in.fill(w, x + (m + i) * w.width, i, MODE == SMALL);
        if (take > 1) strip<MOST, MODE, FINE>(w, in, first, last, y + m * w.rows);
        else strip<1, MODE, FINE>(w, in, first, last, y + m * w.rows);
        m += take;
    }
}

}  // namespace

// x: [count, width] fp32; y: [count, rows] fp32; activations: 8 or 32.
extern "C" void hasten_lowbit_linear(const Weight* weight, const float* x, float* y, int64_t count, int64_t activations,
                                     int threads) {
    const Weight& w = *weight;
    const bool fine = w.group < BLOCK;
    auto part = fine ? work<PLAIN, true> : work<PLAIN, false>;
    if (activations == 8) part = fine ? work<SMALL, true> : work<SMALL, false>;
#if BITS <= 4
    else if (w.tables && w.count == 1) part = fine ? work<TABLE, true> : work<TABLE, false>;
    else if (w.tables) part = fine ? work<TABLES, true> : work<TABLES, false>;
#endif
    const int64_t blocks = (w.rows + 15) / 16;
    if (threads > blocks) threads = (int)blocks;
    if (threads <= 1) return part(w, 0, w.rows, x, y, count);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < threads; n++) {
        const int64_t last = blocks * (n + 1) / threads * 16;
        part(w, blocks * n / threads * 16, last < w.rows ? last : w.rows, x, y, count);
    }
}
