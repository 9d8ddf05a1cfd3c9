// y = x W^T + b with W in int8, one scale per row, and x rounded to int8 here: per token, or with scales that were given before
// (contract: hasten/kernels/int8.py). W lies as [rows / 16][columns / 4][16][4], columns padded to 64: 64 bytes are one operand of
// vpdpbusd, 1024 one tile of AMX. Codes of x lie as [tokens / 16][columns / 64][16][64], tiles of AMX too. Without AMX and VNNI,
// AVX2 multiplies |x| by W with x's signs, which can't saturate as all codes are in -127 .. 127; else plain loops. All give the
// same integers. Plain C interface over raw pointers; built by hasten/kernels/native.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16, STEP = 64, TILE = LANES * STEP;
constexpr int64_t CHUNK_BYTES = 1 << 20;  // codes of x that are multiplied before the next are made: they stay in the L2 cache
constexpr int64_t SERIAL = 1 << 16;       // fewer numbers of x than this are rounded by one thread
#ifdef __AMX_INT8__
constexpr int64_t FEW = 2;  // up to so many tokens, vectors keep up with the memory that W comes from
#endif
constexpr float LEAST = 1e-30f;  // a row with nothing above this is taken as zero

struct Call {
    const int8_t* w;
    const float *scales, *bias;  // [rows]; bias may be null
    const int32_t* sums;         // [rows], of the codes of W
    const void* x;               // [count, columns]
    const float* given;          // [givens]: one over what x is divided by; null: each token's own
    float* y;                    // [count, rows]
    int64_t count, rows, columns, kind, givens;  // kind of x: 0 fp32, 1 bfloat16, 2 int8 codes
    int64_t wide() const { return (columns + STEP - 1) / STEP * STEP; }
};

typedef float vfloat __attribute__((vector_size(4 * LANES)));  // without AVX-512, several instructions
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

template <class V, class T>
INLINE V load(const T* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE int32_t bits_of(float v) {
    int32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
INLINE float from_bits(int32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// 64 or fewer numbers of x as fp32; the rest of `to` is zero.
INLINE void widen(const Call& c, int64_t token, int64_t column, int n, float* to) {
    if (c.kind == 0) {
        const float* from = (const float*)c.x + token * c.columns + column;
        if (n == STEP) memcpy(to, from, 4 * STEP);
        else memcpy(to, from, 4 * n), memset(to + n, 0, 4 * (STEP - n));
        return;
    }
    const uint16_t* from = (const uint16_t*)c.x + token * c.columns + column;
    uint16_t part[STEP] = {};
    memcpy(part, from, 2 * n);
    for (int i = 0; i < STEP; i++) to[i] = from_bits((int32_t)part[i] << 16);
}

// The largest magnitude of a token; the bits of infinity or more where it holds infinity or NaN.
inline int32_t largest(const Call& c, int64_t token) {
    int32_t most[LANES] = {};
    for (int64_t column = 0; column < c.columns; column += STEP) {
        float part[STEP];
        widen(c, token, column, (int)std::min<int64_t>(STEP, c.columns - column), part);
        for (int i = 0; i < STEP; i += LANES)
            for (int j = 0; j < LANES; j++) most[j] = std::max(most[j], bits_of(part[i + j]) & 0x7fffffff);
    }
    return *std::max_element(most, most + LANES);
}

// 64 codes of numbers that were divided.
INLINE void round_run(const float* __restrict from, float by, bool clamp, uint8_t flip, int8_t* __restrict to) {
    for (int i = 0; i < STEP; i++) {
        float v = from[i] * by;
        if (clamp) v = std::min(std::max(v, -127.f), 127.f);
        to[i] = (int8_t)((uint8_t)(int32_t)std::rint(v == v ? v : 0.f) ^ flip);  // NaN has no whole number
    }
}

// Rounds one token into `to` (tile after tile) and returns what its products are multiplied by. `flip`: x + 128, unsigned.
float encode(const Call& c, int64_t token, int8_t* to, uint8_t flip) {
    float scale = 1.f, inverse = 1.f;
    if (c.kind < 2 && !c.given) {
        const int32_t most = largest(c, token);
        const bool finite = most < bits_of(std::numeric_limits<float>::infinity());
        const float top = from_bits(most);
        scale = !finite ? std::numeric_limits<float>::quiet_NaN() : top < LEAST ? 0.f : top / 127.f;
        inverse = !finite || top < LEAST ? 0.f : 127.f / top;
    } else if (c.kind < 2 && c.givens == 1) {
        inverse = c.given[0];
    }
    bool sound = true;
    for (int64_t column = 0; column < c.columns; column += STEP, to += TILE) {
        const int n = (int)std::min<int64_t>(STEP, c.columns - column);
        if (c.kind == 2) {
            const int8_t* from = (const int8_t*)c.x + token * c.columns + column;
            uint8_t part[STEP] = {};
            memcpy(part, from, n);
            for (int i = 0; i < STEP; i++) to[i] = (int8_t)(part[i] ^ flip);
            continue;
        }
        float part[STEP];
        widen(c, token, column, n, part);
        if (!c.given) {
            round_run(part, inverse, false, flip, to);
            continue;
        }
        if (c.givens > 1)
            for (int i = 0; i < n; i++) part[i] *= c.given[column + i];
        const float by = c.givens > 1 ? 1.f : inverse;
        int32_t worst = 0;
        for (int i = 0; i < STEP; i++) worst = std::max(worst, bits_of(part[i]) & 0x7fffffff);
        if (worst > bits_of(std::numeric_limits<float>::infinity())) sound = false;  // NaN
        round_run(part, by, true, flip, to);
    }
    return sound ? scale : std::numeric_limits<float>::quiet_NaN();
}

struct Work {
    const Call& c;
    const int8_t* codes;   // of this chunk of x
    const float* factors;  // of its tokens
    int64_t first, tokens, steps;  // steps: of 64 columns

    const int8_t* token(int64_t m) const { return codes + (m / LANES * steps) * TILE + m % LANES * STEP; }
    const int8_t* block(int64_t n) const { return c.w + n * steps * TILE; }

    // 16 outputs of a token: sums become floats.
    INLINE void put(int64_t m, int64_t n, const int32_t* sums) const {
        const float factor = factors[m];
        float* to = c.y + (first + m) * c.rows + n * LANES;
        const int64_t left = c.rows - n * LANES;
        const float *scales = c.scales + n * LANES, *bias = c.bias ? c.bias + n * LANES : nullptr;
        if (left >= LANES) {  // vectors by hand: the compiler can't know that y is nothing else of these
            vfloat out = __builtin_convertvector(load<vint>(sums), vfloat) * (load<vfloat>(scales) * factor);
            if (bias) out += load<vfloat>(bias);
            memcpy(to, &out, sizeof out);
        } else
            for (int i = 0; i < left; i++) to[i] = (float)sums[i] * (scales[i] * factor) + (bias ? bias[i] : 0.f);
    }
};

#ifdef __AVX512VNNI__
constexpr uint8_t FLIP = 128;  // codes of x are unsigned, 128 more; 128 times the sum of W's codes is taken off in the end
constexpr int TOKENS = 6, BLOCKS = 4;

template <int M, int N>
INLINE void few(const Work& work, int64_t m, int64_t n) {
    __m512i sums[M][N] = {};
    const int8_t *at = work.block(n), *x[M];
    for (int i = 0; i < M; i++) x[i] = work.token(m + i);
    const int64_t apart = work.steps * TILE;
    for (int64_t step = 0; step < work.steps; step++, at += TILE) {
#pragma GCC unroll 4
        for (int four = 0; four < LANES; four++) {
            __m512i w[N];
            for (int j = 0; j < N; j++) {
                w[j] = _mm512_loadu_si512(at + j * apart + four * STEP);
                if (M <= 2) _mm_prefetch((const char*)(at + j * apart + four * STEP + 2048), _MM_HINT_T0);
            }
            for (int i = 0; i < M; i++) {
                int32_t part;
                memcpy(&part, x[i] + step * TILE + 4 * four, 4);
                const __m512i xs = _mm512_set1_epi32(part);
                for (int j = 0; j < N; j++) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], xs, w[j]);
            }
        }
    }
    for (int j = 0; j < N; j++) {
        int32_t off[LANES] = {};
        memcpy(off, work.c.sums + (n + j) * LANES, 4 * std::min<int64_t>(LANES, work.c.rows - (n + j) * LANES));
        const __m512i less = _mm512_slli_epi32(_mm512_loadu_si512(off), 7);
        for (int i = 0; i < M; i++) {
            int32_t out[LANES];
            _mm512_storeu_si512(out, _mm512_sub_epi32(sums[i][j], less));
            work.put(m + i, n + j, out);
        }
    }
}

// One token: one block of W after another, in the order of memory; four chains of sums.
INLINE void one(const Work& work, int64_t m, int64_t n) {
    __m512i sums[4] = {};
    const int8_t *at = work.block(n), *x = work.token(m);
    for (int64_t step = 0; step < work.steps; step++, at += TILE, x += TILE) {
#pragma GCC unroll 16
        for (int four = 0; four < LANES; four++) {
            int32_t part;
            memcpy(&part, x + 4 * four, 4);
            _mm_prefetch((const char*)(at + four * STEP + 4096), _MM_HINT_T0);
            sums[four % 4] = _mm512_dpbusd_epi32(sums[four % 4], _mm512_set1_epi32(part), _mm512_loadu_si512(at + four * STEP));
        }
    }
    int32_t off[LANES] = {}, out[LANES];
    memcpy(off, work.c.sums + n * LANES, 4 * std::min<int64_t>(LANES, work.c.rows - n * LANES));
    const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
    _mm512_storeu_si512(out, _mm512_sub_epi32(all, _mm512_slli_epi32(_mm512_loadu_si512(off), 7)));
    work.put(m, n, out);
}
#elif defined(__AVX2__)
constexpr uint8_t FLIP = 0;
constexpr int TOKENS = 4, BLOCKS = 1;

template <int M, int N>
INLINE void few(const Work& work, int64_t m, int64_t n) {
    static_assert(N == 1, "one block at a time");
    __m256i sums[M][2] = {};
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t *at = work.block(n), *x[M];
    for (int i = 0; i < M; i++) x[i] = work.token(m + i);
    for (int64_t step = 0; step < work.steps; step++, at += TILE) {
        for (int four = 0; four < LANES; four++) {
            const __m256i low = _mm256_loadu_si256((const __m256i*)(at + four * STEP));
            const __m256i high = _mm256_loadu_si256((const __m256i*)(at + four * STEP + 32));
            for (int i = 0; i < M; i++) {
                int32_t part;
                memcpy(&part, x[i] + step * TILE + 4 * four, 4);
                const __m256i xs = _mm256_set1_epi32(part), size = _mm256_abs_epi8(xs);
                const __m256i a = _mm256_maddubs_epi16(size, _mm256_sign_epi8(low, xs));
                const __m256i b = _mm256_maddubs_epi16(size, _mm256_sign_epi8(high, xs));
                sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(a, ones));
                sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(b, ones));
            }
        }
    }
    for (int i = 0; i < M; i++) {
        int32_t out[LANES];
        _mm256_storeu_si256((__m256i*)out, sums[i][0]), _mm256_storeu_si256((__m256i*)(out + 8), sums[i][1]);
        work.put(m + i, n, out);
    }
}
INLINE void one(const Work& work, int64_t m, int64_t n) { few<1, 1>(work, m, n); }
#else
constexpr uint8_t FLIP = 0;
constexpr int TOKENS = 1, BLOCKS = 1;

template <int M, int N>
INLINE void few(const Work& work, int64_t m, int64_t n) {
    int32_t sums[LANES] = {};
    const int8_t *at = work.block(n), *x = work.token(m);
    for (int64_t step = 0; step < work.steps; step++)
        for (int four = 0; four < LANES; four++)
            for (int i = 0; i < LANES; i++)
                for (int j = 0; j < 4; j++) sums[i] += x[step * TILE + 4 * four + j] * at[step * TILE + four * STEP + 4 * i + j];
    work.put(m, n, sums);
}
INLINE void one(const Work& work, int64_t m, int64_t n) { few<1, 1>(work, m, n); }
#endif

template <int N>
inline void column_of_tokens(const Work& work, int64_t n) {
    int64_t m = 0;
    if (work.tokens == 1) {
        for (int j = 0; j < N; j++) one(work, 0, n + j);
        return;
    }
    for (; m + TOKENS <= work.tokens; m += TOKENS) few<TOKENS, N>(work, m, n);
#if defined(__AVX2__)
    switch (work.tokens - m) {
#ifdef __AVX512VNNI__
        case 5: return few<5, N>(work, m, n);
        case 4: return few<4, N>(work, m, n);
#endif
        case 3: return few<3, N>(work, m, n);
        case 2: return few<2, N>(work, m, n);
        case 1: return few<1, N>(work, m, n);
    }
#endif
}

// Blocks of outputs from `begin` to before `end`, all tokens of the chunk.
void vectors(const Work& work, int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + BLOCKS <= end; n += BLOCKS) column_of_tokens<BLOCKS>(work, n);
    for (; n < end; n++) column_of_tokens<1>(work, n);
}

}  // namespace

#ifdef __AMX_INT8__
#include "int8_amx.h"
#endif

namespace {

struct Scratch {
    int8_t* codes = nullptr;
    float* floats = nullptr;
    int64_t size = 0, number = 0;

    void fit(int64_t bytes, int64_t count) {
        if (bytes > size) free(codes), codes = (int8_t*)aligned_alloc(64, size = bytes);
        if (count > number) free(floats), floats = (float*)malloc(4 * (number = count));
    }
    ~Scratch() { free(codes), free(floats); }
};

}  // namespace

// Whether this process may use the instructions that the library is built for; asks the kernel for AMX's state.
extern "C" int hasten_int8_allowed() {
#ifdef __AMX_INT8__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 1;
#endif
}

extern "C" void hasten_int8_linear(const int8_t* w, const float* scales, const int32_t* sums, const float* bias, const void* x,
                                   const float* given, float* y, int64_t count, int64_t rows, int64_t columns, int64_t kind,
                                   int64_t givens, int threads) {
    Call c{w, scales, bias, sums, x, given, y, count, rows, columns, kind, givens};
    const int64_t wide = c.wide(), steps = wide / STEP, blocks = (rows + LANES - 1) / LANES;
    auto multiply = vectors;
    uint8_t flip = FLIP;
#ifdef __AMX_INT8__
    if (count > FEW) multiply = matrices, flip = 0;
#endif
    static thread_local Scratch scratch;
    const int64_t most = std::max<int64_t>(2 * LANES, CHUNK_BYTES / wide / (2 * LANES) * 2 * LANES);
    const int64_t chunk = std::min(most, (count + 2 * LANES - 1) / (2 * LANES) * 2 * LANES);
    scratch.fit(chunk * wide, chunk + givens);
    int8_t* const codes = scratch.codes;
    float *const factors = scratch.floats, *const inverses = factors + chunk;
    for (int64_t k = 0; k < givens; k++) inverses[k] = 1.f / given[k];
    if (given) c.given = inverses;
    for (int64_t first = 0; first < count; first += chunk) {
        const int64_t tokens = std::min(chunk, count - first);
        const Work work{c, codes, factors, first, tokens, steps};
        const auto round = [&](int64_t m) {
            factors[m] = encode(c, first + m, codes + (m / LANES * steps) * TILE + m % LANES * STEP, flip);
        };
        const int pieces = (int)std::max<int64_t>(1, std::min<int64_t>({threads, blocks, tokens * rows * wide / SERIAL}));
        if (tokens * wide < SERIAL || pieces == 1) {
            for (int64_t m = 0; m < tokens; m++) round(m);
            if (pieces == 1) {
                multiply(work, 0, blocks);
                continue;
            }
#pragma omp parallel for num_threads(pieces) schedule(static)
            for (int i = 0; i < pieces; i++) multiply(work, blocks * i / pieces, blocks * (i + 1) / pieces);
        } else {
#pragma omp parallel num_threads(pieces)
            {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < tokens; m++) round(m);
#pragma omp for schedule(static)
                for (int i = 0; i < pieces; i++) multiply(work, blocks * i / pieces, blocks * (i + 1) / pieces);
            }
        }
    }
}
