// Products of many tokens with packed codes of BITS = 2, 3, 4, 6 or 8 bits (contract: hasten/kernels/lowbit_gemm.py). Codes are
// unpacked 16 rows at a time, for all tokens at once, in the cache. Two products:
//   floats    codes become fp32 weights, 256 columns at a time; x lies as [columns][16 tokens]: each number of W times 16.
//   integers  x is rounded to int8 in runs of 64 columns, [columns / 4][16 tokens][4]; codes times x in integers, with AMX one
//             instruction for 16 rows, 16 tokens and 64 columns, with VNNI or AVX2 4 columns at a time; then scales.
// Plain C interface over raw pointers; built by hasten/kernels/native.py with -DBITS=n.
#include <cmath>
#include <limits>

#include "lowbit_slab.h"
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
typedef float vfloat __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * WIDTH)));

namespace {

constexpr int PARTS = LANES / WIDTH;     // vectors of 16 tokens
constexpr int COLUMNS = 256;             // that are fp32 at a time: 16 KB, in the L1 cache
constexpr int64_t PANEL_BYTES = 1 << 20;  // of x that stays in the L2 cache while W passes
constexpr float LEAST = 1e-30f;          // a run of x with nothing above this is taken as zero

template <class V, class T>
INLINE V load(const T* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T>
INLINE void store(T* to, V v) {
    memcpy(to, &v, sizeof v);
}
INLINE vfloat splat(float v) {
#ifdef __AVX512F__
    return (vfloat)_mm512_set1_ps(v);
#else
    return vfloat{v, v, v, v, v, v, v, v};
#endif
}
INLINE int32_t bits_of(float v) {
    int32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

// What one thread works with.
struct Thread {
    Buffer<uint8_t> codes;
    Buffer<float> weights, scales, zeros, sums;
    Buffer<int64_t> groups;
};
thread_local Thread own;
// x of all threads.
struct Shared {
    Buffer<float> floats;
    Buffer<int8_t> bytes;
};
thread_local Shared given;

// ---- floats ----

// Codes of 64 columns of 16 rows become weights [16][COLUMNS].
INLINE void dequantize(const Product& p, int64_t column, const uint8_t* codes, const float* scales, const float* zeros,
                       float* to) {
    const int64_t part = std::min<int64_t>(p.group, STEP);
    for (int64_t start = 0; start < STEP; start += part) {
        const int64_t g = std::min(p.groups - 1, (column + start) / p.group);
        for (int r = 0; r < LANES; r++) {
            const uint8_t* __restrict from = codes + r * STEP + start;
            float* __restrict out = to + r * COLUMNS + start;
            const float scale = scales[g * LANES + r], zero = zeros[g * LANES + r];
            if (p.tables) {
                const float* table = p.tables + (int64_t)zero * (1 << BITS);
                for (int i = 0; i < part; i++) out[i] = scale * table[from[i]];
            } else
                for (int i = 0; i < part; i++) out[i] = scale * ((float)from[i] - zero);
        }
    }
}

// R rows times T panels of 16 tokens, `n` columns; sums are added to.
template <int R, int T>
INLINE void multiply(const float* w, const float* x, int64_t apart, int n, float* sums, int64_t sums_apart) {
    vfloat s[R][T][PARTS];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < PARTS; i++) s[r][t][i] = load<vfloat>(sums + t * sums_apart + r * LANES + i * WIDTH);
    for (int k = 0; k < n; k++) {
        vfloat xs[T][PARTS];
        for (int t = 0; t < T; t++)
            for (int i = 0; i < PARTS; i++) xs[t][i] = load<vfloat>(x + t * apart + k * LANES + i * WIDTH);
        for (int r = 0; r < R; r++) {
            const vfloat one = splat(w[r * COLUMNS + k]);
            for (int t = 0; t < T; t++)
                for (int i = 0; i < PARTS; i++) s[r][t][i] += one * xs[t][i];
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < PARTS; i++) store(sums + t * sums_apart + r * LANES + i * WIDTH, s[r][t][i]);
}

// 16 rows times `panels` panels of tokens from token `first` on; x: [panels][width][16].
void floats(const Product& p, int64_t row, int64_t first, int64_t panels, const float* x) {
    const int64_t wide = width(p), apart = wide * LANES;
    float *scales = own.scales.fit(p.groups * LANES), *zeros = own.zeros.fit(p.groups * LANES);
    float *weights = own.weights.fit(LANES * COLUMNS), *sums = own.sums.fit(panels * LANES * LANES);
    uint8_t* codes = own.codes.fit(LANES * (COLUMNS + UNIT));
    statistics(p, row, scales, zeros);
    memset(sums, 0, 4 * panels * LANES * LANES);
    for (int64_t start = 0; start < wide; start += COLUMNS) {
        const int64_t end = std::min(wide, start + COLUMNS);
        unpack(p, row, start, end, codes);
        for (int64_t column = start; column < end; column += STEP)
            dequantize(p, column, codes + (column - start) / STEP * TILE, scales, zeros, weights + column - start);
        const int n = (int)(std::min(p.columns, end) - start);
        int64_t t = 0;
#ifdef __AVX512F__
        for (; t + 2 <= panels; t += 2)
            for (int r = 0; r < LANES; r += 8)
                multiply<8, 2>(weights + r * COLUMNS, x + t * apart + start * LANES, apart, n,
                               sums + t * LANES * LANES + r * LANES, LANES * LANES);
        constexpr int R = 16;
#else
        constexpr int R = 4;
#endif
        for (; t < panels; t++)
            for (int r = 0; r < LANES; r += R)
                multiply<R, 1>(weights + r * COLUMNS, x + t * apart + start * LANES, apart, n,
                               sums + t * LANES * LANES + r * LANES, 0);
    }
    for (int64_t t = 0; t < panels; t++) put(p, first + t * LANES, row, sums + t * LANES * LANES);
}

// One panel of x: [columns][16 tokens].
void turn(const Product& p, int64_t first, float* to) {
    const int64_t tokens = std::min<int64_t>(LANES, p.count - first);
    constexpr int BLOCK = 16;
    for (int64_t column = 0; column < p.columns; column += BLOCK) {
        const int n = (int)std::min<int64_t>(BLOCK, p.columns - column);
        for (int m = 0; m < LANES; m++)
            for (int k = 0; k < n; k++)
                to[(column + k) * LANES + m] = m < tokens ? p.x[(first + m) * p.columns + column + k] : 0.f;
    }
}

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && BITS < 8)
#define INTEGERS 1
#include "lowbit_integers.h"
#endif

// Panels of x that are held at a time, each of so many bytes.
int64_t held(const Product& p, int64_t panel_bytes) {
    return std::min<int64_t>((p.count + LANES - 1) / LANES, std::max<int64_t>(2, PANEL_BYTES / panel_bytes / 2 * 2));
}

// prepare(t, token): the t-th held panel, of 16 tokens from `token` on; work(slab, token, panels): a slab of 16 rows times them.
template <class Prepare, class Work>
void run(const Product& p, int64_t most, Prepare prepare, Work work) {
    const int64_t slabs = (p.rows + LANES - 1) / LANES, all = (p.count + LANES - 1) / LANES;
    const int threads = (int)std::max<int64_t>(1, std::min({p.threads, slabs, p.rows * p.columns * p.count >> 18}));
    for (int64_t first = 0; first < all; first += most) {
        const int64_t panels = std::min(most, all - first);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < panels; t++) prepare(t, (first + t) * LANES);
#pragma omp for schedule(static)
            for (int64_t slab = 0; slab < slabs; slab++) work(slab * LANES, first * LANES, panels);
        }
    }
}

#ifdef INTEGERS
void integers(const Product& p) {
    const int64_t steps = width(p) / STEP, parts = STEP / std::min<int64_t>(p.group, STEP);
    const int64_t panel = steps * (TILE + 4 * LANES * (1 + parts));
    const int64_t most = held(p, panel);
    int8_t* codes = given.bytes.fit(most * steps * TILE);
    float* floats = given.floats.fit(most * steps * LANES * (1 + parts));
    const Rounded x{codes, floats, floats + most * steps * LANES, steps, parts};
    run(
        p, most, [&](int64_t t, int64_t first) { round_panel(p, first, t, x); },
        [&](int64_t row, int64_t first, int64_t panels) { integer_slab(p, row, first, panels, x); });
}
#endif

}  // namespace

// Whether this process may use the instructions that the library is built for; asks the kernel for AMX's state.
extern "C" int hasten_lowbit_gemm_allowed() {
#ifdef __AMX_INT8__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 1;
#endif
}

// y = x W^T + bias; 1: done, 0: not for this instruction set.
extern "C" int hasten_lowbit_gemm(const Product* product, int activations) {
    const Product& p = *product;
    if (activations == 32) {
        const int64_t size = width(p) * LANES, most = held(p, 4 * size);
        float* x = given.floats.fit(most * size);
        run(
            p, most, [&](int64_t t, int64_t first) { turn(p, first, x + t * size); },
            [&](int64_t row, int64_t first, int64_t panels) { floats(p, row, first, panels, x); });
        return 1;
    }
#ifdef INTEGERS
    integers(p);
    return 1;
#else
    return 0;
#endif
}
