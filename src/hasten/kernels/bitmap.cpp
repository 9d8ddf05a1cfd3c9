// y = x W^T + b with W held as a bitmap and the numbers that are not zero (contract: kernels/bitmap.py): 16 bits say where the next
// numbers of a row belong among 16 columns, and they are spread there in a register. The numbers are read once for up to eight rows
// of x. Built by hasten/kernels/native.py.
#if defined __AVX2__ || defined __AVX512F__
#include <immintrin.h>
#endif
#include "vectors.h"

extern "C" struct Bitmap {  // kernels/bitmap.py has the same fields
    const void* values;     // [n + 64], of `kind` 0 fp32, 1 bf16, 3 int8
    const uint8_t* bits;    // [rows, 2 * chunks]
    const int64_t* starts;  // [rows + 1]
    const float* scales;    // [rows] of int8, else null
    const float* bias;      // [rows] or null
    const float* x;         // [count, 16 * chunks], or null: W is made dense
    float* y;               // [count, rows]; or [rows, 16 * chunks], rows from `first` to before `last` of W
    int64_t kind, count, rows, chunks, first, last, threads;
};

namespace {

constexpr int MOST = 8;  // rows of x for which numbers are spread once

#if defined __AVX2__ && !defined __AVX512F__
// For each byte the places of its bits, counted: where column j is set, the number that belongs there.
struct Places {
    uint8_t at[256][8];
    constexpr Places() : at() {
        for (int byte = 0; byte < 256; byte++)
            for (int j = 0, n = 0; j < 8; j++) at[byte][j] = byte >> j & 1 ? n++ : 0;
    }
};
constexpr Places PLACES;
#endif

template <int KIND>
struct Reader {
    const char* at;
    static constexpr int SIZE = KIND == 0 ? 4 : KIND == 1 ? 2 : 1;

    INLINE float one(int i) const {
        if (KIND == 0) return ((const float*)at)[i];
        if (KIND == 3) return (float)((const int8_t*)at)[i];
        const uint32_t word = (uint32_t)((const uint16_t*)at)[i] << 16;
        float number;
        memcpy(&number, &word, 4);
        return number;
    }

    // The next numbers where `mask` has bits, zero elsewhere.
    INLINE void next(uint32_t mask, vfloat (&w)[SUB]) {
#ifdef __AVX512F__
        if (KIND == 0) w[0] = (vfloat)_mm512_maskz_expand_ps(mask, _mm512_loadu_ps(at));
        else if (KIND == 1) {
            const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
            w[0] = (vfloat)_mm512_maskz_expand_ps(mask, _mm512_castsi512_ps(bits));
        } else {
            const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
            w[0] = (vfloat)_mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(mask, codes));
        }
        at += SIZE * __builtin_popcount(mask);
#else
        for (int half = 0; half < 2; half++) {
            const int byte = mask >> 8 * half & 255;
#ifdef __AVX2__
            const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES.at[byte]));
            const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit);
            __m256 numbers;
            if (KIND == 0) numbers = _mm256_loadu_ps((const float*)at);
            else if (KIND == 1)
                numbers = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at)), 16));
            else numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
            w[half] = (vfloat)_mm256_and_ps(_mm256_permutevar8x32_ps(numbers, order), _mm256_castsi256_ps(set));
#else
            w[half] = vfloat{};
            int n = 0;
            for (int left = byte; left; left &= left - 1) w[half][__builtin_ctz(left)] = one(n++);
#endif
            at += SIZE * __builtin_popcount(byte);
        }
#endif
    }
};

INLINE uint32_t mask_of(const Bitmap& b, int64_t row, int64_t chunk) {
    uint16_t mask;
    memcpy(&mask, b.bits + (row * b.chunks + chunk) * 2, 2);
    return mask;
}

// R rows of W times M rows of x from m on.
template <int KIND, int R, int M>
void product(const Bitmap& b, int64_t row, int64_t m) {
    vfloat acc[R][M] = {};
    Reader<KIND> readers[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) readers[r].at = (const char*)b.values + b.starts[row + r] * Reader<KIND>::SIZE;
    const int64_t width = b.chunks * 16;
    const float* const x = b.x + m * width;
    for (int64_t chunk = 0; chunk < b.chunks; chunk++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vfloat w[SUB];
            readers[r].next(mask_of(b, row + r, chunk), w);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++)
#pragma GCC unroll 2
                for (int s = 0; s < SUB; s++) acc[r][i] += w[s] * load(x + i * width + chunk * 16 + s * WIDTH);
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const float total = sum(acc[r][i]) * (b.scales ? b.scales[row + r] : 1.f);
            b.y[(m + i) * b.rows + row + r] = total + (b.bias ? b.bias[row + r] : 0.f);
        }
}

template <int KIND, int R>
void some(const Bitmap& b, int64_t row) {
    constexpr void (*PRODUCTS[])(const Bitmap&, int64_t, int64_t) = {
        product<KIND, R, 1>, product<KIND, R, 2>, product<KIND, R, 3>, product<KIND, R, 4>,
        product<KIND, R, 5>, product<KIND, R, 6>, product<KIND, R, 7>, product<KIND, R, 8>};
    for (int64_t m = 0; m < b.count; m += MOST) PRODUCTS[std::min<int64_t>(MOST, b.count - m) - 1](b, row, m);
}

template <int KIND>
void rows(const Bitmap& b, int64_t first, int64_t last) {
    int64_t row = first;
    if (b.count == 1)
        for (; row + 4 <= last; row += 4) product<KIND, 4, 1>(b, row, 0);
    else if (b.count == 2)
        for (; row + 2 <= last; row += 2) product<KIND, 2, 2>(b, row, 0);
    for (; row < last; row++) some<KIND, 1>(b, row);
}

template <int KIND>
void dense(const Bitmap& b, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        Reader<KIND> reader{(const char*)b.values + b.starts[row] * Reader<KIND>::SIZE};
        float* const to = b.y + (row - b.first) * b.chunks * 16;
        const vfloat scale = splat(b.scales ? b.scales[row] : 1.f);
        for (int64_t chunk = 0; chunk < b.chunks; chunk++) {
            vfloat w[SUB];
            reader.next(mask_of(b, row, chunk), w);
            for (int s = 0; s < SUB; s++) store(to + chunk * 16 + s * WIDTH, w[s] * scale);
        }
    }
}

template <int KIND>
void work(const Bitmap& b) {
    const int64_t all = b.last - b.first, pieces = b.threads > 1 ? std::min(all, 4 * b.threads) : 1;
#pragma omp parallel for num_threads(b.threads) schedule(dynamic, 1) if (pieces > 1)
    for (int64_t p = 0; p < pieces; p++)
        (b.x ? rows<KIND> : dense<KIND>)(b, b.first + all * p / pieces, b.first + all * (p + 1) / pieces);
}

}  // namespace

extern "C" void hasten_bitmap(const Bitmap* b) { (b->kind == 0 ? work<0> : b->kind == 1 ? work<1> : work<3>)(*b); }
