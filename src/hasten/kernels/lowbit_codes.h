// The codes of 64 columns as 64 bytes, from the packed layout of hasten/math/packing.py, with BITS = 2, 3, 4, 6 or 8; and
// their exact integer products with signed bytes. For AVX-512 (VNNI or not), AVX2 and plain builds.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define WIDTH 16  // 32-bit lanes of a vector
#else
#define WIDTH 8
#endif
#define INLINE inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vword __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t vbyte __attribute__((vector_size(4 * WIDTH)));

namespace {

// A block is 64 columns; a vector holds its bytes, or one of its two halves. Lane j has the columns 4j to 4j + 3.
constexpr int BLOCK = 64, HALVES = 16 / WIDTH, SPAN = BLOCK / HALVES;
constexpr int PLANE = BITS == 3 ? 2 : BITS == 6 ? 4 : BITS;  // bits of the first plane
constexpr int BLOCKS = 8 / PLANE, UNIT = BLOCK * BLOCKS;     // of a whole unit
constexpr int UNIT_BYTES = UNIT * BITS / 8;
constexpr int HALF_BLOCKS = BLOCKS > 1 ? BLOCKS / 2 : 1;     // 8 bits: half a block

template <class V>
INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE vint bytes_of(int value) { return (vint)(vbyte{} + (uint8_t)value); }

#ifdef __AVX512F__

INLINE vint twice(const void* from) { return (vint)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from)); }

// Right shifts of the 64-bit words, one for each quarter of the vector.
template <int A, int B, int C, int D>
INLINE vint shifted(vint v) {
    return (vint)_mm512_srlv_epi64((__m512i)v, _mm512_set_epi64(D, D, C, C, B, B, A, A));
}

// The same as rotations to the left of the 32-bit words.
template <int A, int B, int C, int D>
INLINE vint rotated(vint v) {
    return (vint)_mm512_rolv_epi32((__m512i)v, _mm512_set_epi32(D, D, D, D, C, C, C, C, B, B, B, B, A, A, A, A));
}

// Block S of the unit, all 64 columns. HALF: the unit is the half one that ends a row.
template <int S, int, bool HALF>
INLINE vint codes(const uint8_t* at) {
    constexpr int MASK = (1 << PLANE) - 1, STEP = S * PLANE;
    if (BITS == 8) return HALF ? (vint)_mm512_maskz_loadu_epi64(0x0f, at) : load<vint>(at);
    vint low;
    if (!HALF) low = STEP ? load<vint>(at) >> STEP : load<vint>(at);  // the bytes' neighbours fall to the mask
    else low = shifted<2 * STEP, 2 * STEP, 2 * STEP + PLANE, 2 * STEP + PLANE>(twice(at));
    low &= bytes_of(MASK);
    if (BITS == 3) {
        const uint64_t high = load<uint64_t>(at + (HALF ? 32 : 64) + 8 * S);
        return (vint)_mm512_mask_add_epi8((__m512i)low, high, (__m512i)low, _mm512_set1_epi8(4));
    }
    if (BITS == 6) {
        vint high;
        if (!HALF) high = S ? rotated<0, 0, 30, 30>(twice(at + 64)) : rotated<4, 4, 2, 2>(twice(at + 64));
        else high = rotated<4, 2, 0, 30>((vint)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(at + 32))));
        return low | (high & bytes_of(0x30));
    }
    return low;
}

#else

#ifdef __AVX2__
// Byte i is 4 where bit i is set.
INLINE vint fours(uint32_t bits) {
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), _mm256_setr_epi64x(0, 0x0101010101010101,
                                               0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(0x8040201008040201);
    return (vint)_mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(4));
}
#else
inline vint fours(uint32_t bits) {
    uint8_t bytes[32];
    for (int i = 0; i < 32; i++) bytes[i] = (bits >> i & 1) << 2;
    return load<vint>(bytes);
}
#endif

// Half H of block S of the unit: 32 columns.
template <int S, int H, bool HALF>
INLINE vint codes(const uint8_t* at) {
    constexpr int MASK = (1 << PLANE) - 1, SLOT = 2 * S + H;
    if (BITS == 8) return HALF && H ? vint{} : load<vint>(at + (HALF ? 0 : 32 * H));
    const vint low = (HALF ? load<vint>(at) >> SLOT * PLANE : load<vint>(at + 32 * H) >> S * PLANE) & bytes_of(MASK);
    if (BITS == 3) return low | fours(load<uint32_t>(at + (HALF ? 32 : 64) + 4 * SLOT));
    if (BITS == 6 && !HALF) return low | (load<vint>(at + 64) >> (2 * SLOT) & bytes_of(3)) << 4;
    if (BITS == 6) {
        uint8_t high[32];
        for (int i = 0; i < 32; i++) high[i] = (at[32 + i % 16] >> (4 * H + i / 16 * 2) & 3) << 4;
        return low | load<vint>(high);
    }
    return low;
}

#endif

// Lane by lane, the sum of four products of codes (unsigned) with x (signed bytes from -127 to 127); exact.
INLINE vint dot(vint codes, vint x) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
    // Sums of two products fit 16 bits up to codes of 7 bits; of 8 bits, the lowest is multiplied apart.
#ifdef __AVX512F__
    const __m512i one = _mm512_set1_epi16(1);
    auto product = [&](vint c) { return (vint)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)c, (__m512i)x), one); };
#else
    const __m256i one = _mm256_set1_epi16(1);
    auto product = [&](vint c) { return (vint)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)c, (__m256i)x), one); };
#endif
    if (BITS < 8) return product(codes);
    const vint high = product(codes >> 1 & bytes_of(0x7f));
    return high + high + product(codes & bytes_of(1));
#else
    vint total{};
    for (int i = 0; i < 4; i++) total += (codes >> 8 * i & 0xff) * (x << (24 - 8 * i) >> 24);
    return total;
#endif
}

}  // namespace
