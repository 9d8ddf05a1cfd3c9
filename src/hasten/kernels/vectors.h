// Vectors of fp32 and the small matrix products that attention kernels are made of, for AVX-512, AVX2 and plain builds.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#define WIDTH 16
#define PAIR 2
#define ROWS 8
#else
#define WIDTH 8
#define PAIR 1
#define ROWS 4
#endif
#define INLINE inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * WIDTH)));
namespace {

constexpr int PANEL = 16, SUB = PANEL / WIDTH, STRIP = PANEL * PAIR;
constexpr float INF = std::numeric_limits<float>::infinity(), LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE vfloat load(const float* from) {
    vfloat v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE void store(float* to, vfloat v) { memcpy(to, &v, sizeof v); }

INLINE vfloat splat(float x) {
#ifdef __AVX512F__
    return (vfloat)_mm512_set1_ps(x);
#else
    return vfloat{x, x, x, x, x, x, x, x};
#endif
}

[[maybe_unused]] INLINE bool any_above(vfloat x, float than) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(than), _CMP_GT_OQ) != 0;
#else
    bool found = false;
    for (int i = 0; i < WIDTH; i++) found |= x[i] > than;
    return found;
#endif
}

inline float sum(vfloat x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

// 2^x to 1e-7; zero for -inf. The polynomial is the minimax one for [-1/2, 1/2].
INLINE vfloat exp2v(vfloat x) {
#ifdef __AVX512F__
    const __m512 low = _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // in this order NaN stays
    const __m512 whole = _mm512_roundscale_ps(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vfloat f = (vfloat)_mm512_sub_ps(low, whole);
#else
    x = x < -127.f ? splat(-127.f) : x;
    const vfloat magic = splat(12582912.f), whole = (x + magic) - magic, f = x - whole;
#endif
    vfloat y = f * 1.3276471993e-3f + 9.6755413344e-3f;
    y = y * f + 5.5507132735e-2f;
    y = y * f + 2.4022119724e-1f;
    y = y * f + 6.9314696706e-1f;
    y = y * f + 1.0000000717f;
#ifdef __AVX512F__
    return (vfloat)_mm512_scalef_ps((__m512)y, whole);
#else
    const vint power = (__builtin_convertvector(whole, vint) + 127) << 23;
    return y * (vfloat)power;
#endif
}

// acc[r] += sum over i < length of a[r RS + i KS] times row i of b: N pieces of 16, a `gap` apart, rows BS apart.
template <int R, int N, int RS, int KS, int BS>
INLINE void multiply(vfloat (&acc)[R][N * SUB], const float* a, const float* b, int64_t gap, int64_t length) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < length; i++) {
        vfloat w[N * SUB];
#pragma GCC unroll 4
        for (int c = 0; c < N * SUB; c++) w[c] = load(b + i * BS + (c / SUB) * gap + c % SUB * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vfloat x = splat(a[r * RS + i * KS]);
#pragma GCC unroll 4
            for (int c = 0; c < N * SUB; c++) acc[r][c] = x * w[c] + acc[r][c];
        }
    }
}

// c[r][:] += the product of `multiply` over the n pieces b[i] of `length` rows each; piece i starts at column 16 slots[i] of a.
template <int R, int N, int RS, int KS, int BS>
inline void add_product(float* c, int64_t ldc, const float* a, const int* slots, const float* const* b, int64_t offset, int n,
                        int64_t length) {
    vfloat acc[R][N * SUB];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < N * SUB; j++) acc[r][j] = load(c + r * ldc + j * WIDTH);
    for (int i = 0; i < n; i++) multiply<R, N, RS, KS, BS>(acc, a + slots[i] * PANEL, b[i] + offset, PANEL, length);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < N * SUB; j++) store(c + r * ldc + j * WIDTH, acc[r][j]);
}

// c[r][:] += a x [b_0; b_1; ...] over `width` columns (a multiple of 16), strip by strip.
template <int R, int RS, int KS>
inline void add_strips(float* c, int64_t width, const float* a, const int* slots, const float* const* b, int n, int64_t length) {
    int64_t at = 0;
    for (; at + STRIP <= width; at += STRIP)
        add_product<R, PAIR, RS, KS, STRIP>(c + at, width, a, slots, b, at * length, n, length);
    if (PAIR > 1 && at < width) add_product<R, 1, RS, KS, PANEL>(c + at, width, a, slots, b, at * length, n, length);
}

struct Buffer {  // zero-filled on demand, on large pages where there are
    char* at = nullptr;
    explicit Buffer(int64_t floats, bool zero = false) {
        const int64_t page = floats * 4 >= (1 << 21) ? 1 << 21 : 4096, bytes = round_up(floats * 4 + 64, page);
        at = (char*)aligned_alloc(page, bytes);
#ifdef __linux__
        if (at && page > 4096) madvise(at, bytes, MADV_HUGEPAGE);
#endif
        if (at && zero) memset(at, 0, bytes);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(at); }
    float* floats() const { return (float*)at; }
};

#ifdef __AVX512F__
INLINE void transpose16(const float* const* rows, float* to) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(rows[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
        const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        _mm512_storeu_ps(to + (i + 0) * 16, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(to + (i + 4) * 16, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(to + (i + 8) * 16, _mm512_shuffle_f32x4(a, c, 0xdd));
        _mm512_storeu_ps(to + (i + 12) * 16, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
}
#endif

// 16 rows of n numbers to [n][16].
void columns(const float* const* rows, int64_t n, float* to) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        const float* at[16];
        for (int r = 0; r < 16; r++) at[r] = rows[r] + i;
        transpose16(at, to + i * 16);
    }
#endif
    for (; i < n; i++)
        for (int r = 0; r < 16; r++) to[i * 16 + r] = rows[r][i];
}

// `count` rows of n numbers to strips [count][STRIP], the last one [count][16] where that is enough, padded with zeros.
void strips(const float* const* rows, int64_t count, int64_t n, float* to) {
    for (int64_t at = 0; at < n; at += STRIP) {
        const int64_t have = std::min<int64_t>(STRIP, n - at), width = have > PANEL ? STRIP : PANEL;
        for (int64_t r = 0; r < count; r++, to += width) {
            memcpy(to, rows[r] + at, have * 4);
            if (have < width) memset(to + have, 0, (width - have) * 4);
        }
    }
}

// n numbers of bf16 (kind 1) or fp16 (2) to fp32.
[[maybe_unused]] inline void widen(const uint16_t* __restrict from, int64_t n, int64_t kind, float* __restrict to) {
    typedef uint32_t __attribute__((may_alias)) word;
    word* const bits = (word*)to;
    if (kind == 1) {
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)from[i] << 16;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint32_t x = from[i], sign = (x & 0x8000) << 16, endless = (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
        union {
            uint32_t bits;
            float value;
        } number{(x & 0x7fff) << 13};
        number.value *= 5.192296858534828e33f;  // 2^112: the exponents' biases differ by that much
        bits[i] = number.bits | sign | endless;
    }
}

}  // namespace
