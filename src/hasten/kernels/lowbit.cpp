// y = x W^T + b with W held as packed codes of BITS = 2, 3, 4, 6 or 8 bits (layout: hasten/math/packing.py) and statistics per
// row and group (hasten/kernels/lowbit_weights.py). A tile is a few rows of W times a few rows of x; in it, the sum over the 64
// columns of a block is taken over codes, and only that is scaled:
//     y[n] = sum_g scale[n, g] * (sum_{k in g} code[n, k] x[k] - zero[n, g] sum_{k in g} x[k])
// The sums over x are taken once. With activations of 8 bits the inner sum is one of whole numbers. The dense weight never
// exists. Plain C interface over raw pointers; built by hasten/kernels/native.py with -DBITS=n.
#include "lowbit_codes.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

struct Weight {
    const uint8_t* packed;  // [rows, row_bytes]
    const void *scales, *zeros, *bias;
    const float *tables, *levels;
    int64_t rows, columns, width, groups, group;          // columns: padded to a packed row's; width: the weight's
    int64_t scale_kind, zero_kind, bias_kind, one_zero, count;  // kinds: 0 fp32, 1 fp16, 2 uint8, 3 int32, 4 bf16
};

namespace {

constexpr int CENTRE = 1 << (BITS - 1);  // codes are summed around it where x is fp32: less to cancel
constexpr int ENTRIES = BITS <= 4 ? 1 << BITS : 1;

INLINE vfloat madd(vfloat a, vfloat b, vfloat c) { return a * b + c; }  // contracted to one instruction
INLINE vfloat splat(float x) { return x - vfloat{}; }
INLINE vfloat floats(vint v) { return __builtin_convertvector(v, vfloat); }

inline float total(vfloat v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
#endif
}

float half(uint16_t from) {
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

// `n` numbers of a kind, from number `at` on, as fp32.
INLINE void widen(const void* from, int64_t kind, int64_t at, int64_t n, float* to) {
    if (kind == 0) memcpy(to, (const float*)from + at, 4 * n);
    if (kind == 1)
        for (int64_t i = 0; i < n; i++) to[i] = half(((const uint16_t*)from)[at + i]);
    if (kind == 2)
        for (int64_t i = 0; i < n; i++) to[i] = ((const uint8_t*)from)[at + i];
    if (kind == 4)
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)((const uint16_t*)from)[at + i] << 16;
            memcpy(to + i, &bits, 4);
        }
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of x as a tile reads them.
struct Inputs {
    int64_t blocks, groups;         // groups: rounded up to vectors
    std::vector<float> values;      // fp32: [m, block, 4, 16], value 4j + i of a block at [i, j]
    std::vector<int8_t> bytes;      // 8 bits: [m, columns]
    std::vector<float> steps;       // 8 bits: [m, block]
    std::vector<float> sums;        // [m, groups]: sums of x, as rounded
    std::vector<int32_t> places;    // of a block: its group

    Inputs(const Weight& w, int most, bool small) : blocks(up(w.columns, BLOCK) / BLOCK), groups(up(w.groups, WIDTH)) {
        if (small) bytes.resize(most * blocks * BLOCK), steps.resize(most * blocks);
        else values.resize(most * blocks * BLOCK);
        sums.resize(most * groups);
        places.resize(blocks);
        for (int64_t b = 0; b < blocks; b++) places[b] = (int32_t)std::min(b * BLOCK / w.group, w.groups - 1);
    }

    void fill(const Weight& w, const float* x, int m, bool small) {
        float* sum = &sums[m * groups];
        std::fill(sum, sum + groups, 0.f);
        for (int64_t b = 0; b < blocks; b++) {
            float block[BLOCK] = {};
            const int64_t have = std::min<int64_t>(BLOCK, w.width - b * BLOCK);
            if (have > 0) memcpy(block, x + b * BLOCK, 4 * have);
            float parts[4];  // sums of 16 columns
            if (small) round(block, m, b, parts);
            else {
                for (int q = 0; q < 4; q++) {
                    parts[q] = 0;
                    for (int i = 0; i < 16; i++) parts[q] += block[16 * q + i];
                }
                float* to = &values[(m * blocks + b) * BLOCK];
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 16; j++) to[16 * i + j] = block[4 * j + i];
            }
            for (int q = 0; q < 4; q++) sum[std::min((b * BLOCK + 16 * q) / w.group, w.groups - 1)] += parts[q];
        }
    }

    void round(const float* block, int m, int64_t b, float* parts) {
        uint32_t most = 0;  // of absolute values, as bits: in this order NaN comes last
        for (int i = 0; i < BLOCK; i++) {
            uint32_t bits;
            memcpy(&bits, block + i, 4);
            most = std::max(most, bits & 0x7fffffff);
        }
        float largest;
        memcpy(&largest, &most, 4);
        const bool broken = most >= 0x7f800000, live = !broken && largest >= 1e-30f;
        const float inverse = live ? 127.f / largest : 0.f;
        const float step = broken ? std::nanf("") : live ? largest / 127.f : 0.f;
        int8_t* to = &bytes[(m * blocks + b) * BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            // Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
            const float shifted = live ? block[i] * inverse + 0.f : 0.f;
            to[i] = (int8_t)(int32_t)std::nearbyintf(shifted);
        }
        for (int q = 0; q < 4; q++) {
            int32_t count = 0;
            for (int i = 0; i < 16; i++) count += to[16 * q + i];
            parts[q] = step * (float)count;
        }
        steps[m * blocks + b] = step;
    }
};

// The statistics of one row in fp32.
struct Row {
    std::vector<float> scales, zeros;
    std::vector<int32_t> tables;

    explicit Row(const Weight& w) : scales(up(w.groups, 16) + 16), zeros(up(w.groups, 16) + 16) {
        if (w.tables) tables.resize(w.groups + 4);
    }

    void read(const Weight& w, int64_t row) {
        widen(w.scales, w.scale_kind, row * w.groups, w.groups, scales.data());
        if (w.tables) {
            const int32_t* from = (const int32_t*)w.zeros;
            for (int64_t g = 0; g < w.groups; g++) {
                const int32_t t = from[w.one_zero ? 0 : row * w.groups + g];
                tables[g] = t >= 0 && t < w.count ? t : 0;
            }
        } else if (w.one_zero) {
            float zero;
            widen(w.zeros, w.zero_kind, 0, 1, &zero);
            std::fill(zeros.begin(), zeros.begin() + w.groups, zero);
        } else widen(w.zeros, w.zero_kind, row * w.groups, w.groups, zeros.data());
        if (w.levels) {
            const float* level = w.levels + row * (up(w.groups, 16) / 16) * 4;
            for (int64_t g = 0; g < w.groups; g++) {
                const float* of = level + g / 16 * 4;
                scales[g] = of[0] * (scales[g] - of[1]);
                zeros[g] = of[2] * (zeros[g] - of[3]);
            }
        }
    }

    // What zeros take from the sum over a row of x.
    float taken(const float* sums, int64_t groups, float centre) const {
        vfloat all{};
        for (int64_t g = 0; g < groups; g += WIDTH)
            all += load<vfloat>(&scales[g]) * (load<vfloat>(&zeros[g]) - centre) * load<vfloat>(sums + g);
        return total(all);
    }
};

// The numbers that codes stand for, before scaling.
struct Numbers {
    vfloat entries[16 / WIDTH];

    void centred() {
        for (int i = 0; i < 16; i++) entries[i / WIDTH][i % WIDTH] = (float)((i & ((1 << BITS) - 1)) - CENTRE);
    }
    void read(const float* table) {
        float all[16] = {};
        memcpy(all, table, 4 * ENTRIES);
        memcpy(entries, all, 64);
    }
    INLINE vfloat at(vint codes) const {  // the codes in the lanes' lowest 8 bits
#ifdef __AVX512F__
        return (vfloat)_mm512_permutexvar_ps((__m512i)codes, (__m512)entries[0]);  // reads the lowest four
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

enum Mode { SMALL, PLAIN, TABLE, TABLES };  // 8-bit x; uniform; one table; a table for each group

template <int R, int M, Mode MODE, bool FINE>
struct Tile {
    const Weight& w;
    const Inputs& in;
    const Row* rows;
    const uint8_t* at;  // the first row of W
    Numbers numbers;
    vfloat sums[R][M] = {};

    // The scale of each lane: one for the block, or of groups of 16 or 32 columns.
    template <int H>
    INLINE vfloat scale(int r, int64_t block) const {
        if (!FINE) return splat(rows[r].scales[in.places[block]]);
        const int64_t each = w.group == 16 ? 4 : 8, first = block * (16 / each);
        vfloat v;
#ifdef __AVX512F__
        const __m512i lanes = w.group == 16 ? _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
                                            : _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        v = (vfloat)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(&rows[r].scales[first])));
#else
        for (int i = 0; i < WIDTH; i++) v[i] = rows[r].scales[first + (WIDTH * H + i) / each];
#endif
        return v;
    }

    template <int H>
    INLINE vfloat number(int r, int64_t block, vint codes) const {
        if (MODE == PLAIN && !LOOKUP) return floats(codes << 24 >> 24);
        if (MODE != TABLES) return numbers.at(codes);
        Numbers own;
        if (!FINE) {
            own.read(w.tables + rows[r].tables[in.places[block]] * ENTRIES);
            return own.at(codes);
        }
        return mixed(r, block * 4 + WIDTH * H / 4, codes);
    }

    // Groups of 16 or 32 columns with tables of their own; `first`: 16ths of columns.
    __attribute__((noinline)) vfloat mixed(int r, int64_t first, vint codes) const {
        vfloat v;
        for (int i = 0; i < WIDTH; i++) {
            const int64_t g = std::min((first + i / 4) * 16 / w.group, w.groups - 1);
            v[i] = w.tables[rows[r].tables[g] * ENTRIES + codes[i]];
        }
        return v;
    }

    template <int S, int H, bool HALF>
    INLINE void span(int64_t unit, int64_t block) {
        vint v[R];
        vfloat scales[R];
        for (int r = 0; r < R; r++) {
            v[r] = codes<S, H, HALF>(at + r * (w.columns * BITS / 8) + unit * UNIT_BYTES);
            scales[r] = scale<H>(r, block);
            if (MODE == PLAIN && !LOOKUP) v[r] = (vint)((vbyte)v[r] - (uint8_t)CENTRE);
        }
        if (MODE == SMALL) {
            for (int m = 0; m < M; m++) {
                const vint x = load<vint>(&in.bytes[(m * in.blocks + block) * BLOCK + SPAN * H]);
                const vfloat step = splat(in.steps[m * in.blocks + block]);
                for (int r = 0; r < R; r++) sums[r][m] = madd(floats(dot(v[r], x)) * step, scales[r], sums[r][m]);
            }
            return;
        }
        vfloat raw[R][M];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vfloat number_of[R];
            for (int r = 0; r < R; r++) {
                const vint low = MODE == PLAIN && !LOOKUP ? v[r] << (24 - 8 * i) : (v[r] >> 8 * i) & 0xff;
                if (MODE == PLAIN && !LOOKUP) number_of[r] = floats(low >> 24);
                else number_of[r] = number<H>(r, block, low);
                if (M > 1) number_of[r] *= scales[r];
            }
            for (int m = 0; m < M; m++) {
                const vfloat x = load<vfloat>(&in.values[(m * in.blocks + block) * BLOCK + 16 * i + WIDTH * H]);
                for (int r = 0; r < R; r++) {
                    if (M > 1) sums[r][m] = madd(number_of[r], x, sums[r][m]);
                    else raw[r][m] = i ? madd(number_of[r], x, raw[r][m]) : number_of[r] * x;
                }
            }
        }
        if (M == 1)
            for (int r = 0; r < R; r++) sums[r][0] = madd(raw[r][0], scales[r], sums[r][0]);
    }

    template <int S, bool HALF>
    INLINE void block(int64_t unit) {
        span<S, 0, HALF>(unit, unit * BLOCKS + S);
        if (HALVES == 2) span<S, HALVES - 1, HALF>(unit, unit * BLOCKS + S);
    }

    void run(int64_t row, float* y) {
        const int64_t units = w.columns / UNIT;
        for (int64_t u = 0; u < units; u++) {
            block<0, false>(u);
            if (BLOCKS > 1) block<1 % BLOCKS, false>(u);
            if (BLOCKS > 2) block<2 % BLOCKS, false>(u), block<3 % BLOCKS, false>(u);
        }
        if (units * UNIT < w.columns) {
            block<0, true>(units);
            if (HALF_BLOCKS > 1) block<1 % HALF_BLOCKS, true>(units);
        }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++) {
                float bias = 0;
                if (w.bias) widen(w.bias, w.bias_kind, row + r, 1, &bias);
                float zero = 0;
                if (MODE == SMALL || MODE == PLAIN)
                    zero = rows[r].taken(&in.sums[m * in.groups], w.groups, MODE == PLAIN ? CENTRE : 0);
                y[m * w.rows + row + r] = total(sums[r][m]) - zero + bias;
            }
    }
};

template <int R, int M, Mode MODE, bool FINE>
void tile(const Weight& w, const Inputs& in, Row* rows, int64_t row, float* y) {
    for (int r = 0; r < R; r++) rows[r].read(w, row + r);
    Tile<R, M, MODE, FINE> it{w, in, rows, w.packed + row * (w.columns * BITS / 8), {}};
    if (MODE == TABLE) it.numbers.read(w.tables);
    else it.numbers.centred();
    it.run(row, y);
}

template <int M, Mode MODE, bool FINE>
__attribute__((noinline)) void strip(const Weight& w, const Inputs& in, std::vector<Row>& rows, int64_t first, int64_t last, float* y) {
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) tile<ROWS, M, MODE, FINE>(w, in, rows.data(), row, y);
    for (; ROWS > 1 && row < last; row++) tile<1, M, MODE, FINE>(w, in, rows.data(), row, y);
}

template <Mode MODE, bool FINE>
void work(const Weight& w, int64_t first, int64_t last, const float* x, float* y, int64_t count) {
    Inputs in(w, count < COUNT ? 1 : COUNT, MODE == SMALL);
    std::vector<Row> rows(ROWS, Row(w));
    for (int64_t m = 0; m < count;) {
        const int take = count - m >= COUNT ? COUNT : 1;
        for (int i = 0; i < take; i++) in.fill(w, x + (m + i) * w.width, i, MODE == SMALL);
        if (take == COUNT) strip<COUNT, MODE, FINE>(w, in, rows, first, last, y + m * w.rows);
        else strip<1, MODE, FINE>(w, in, rows, first, last, y + m * w.rows);
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
