// y += x L^T for a plane L of two low bits that only some groups of 64 columns of each row have (contract: kernels/low_plane.py).
// With activations of 8 bits, groups of x are rounded as lowbit.cpp rounds them, and codes are multiplied as integers. Plain C
// interface over raw pointers; built by hasten/kernels/native.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

extern "C" struct Plane {  // kernels/low_plane.py has the same fields
    const uint8_t *codes, *places;  // [rows, slots, 16], [rows, slots]
    const uint16_t* scales;         // fp16 [rows, groups]
    const float* x;                 // [count, columns]
    float* y;                       // [count, rows]
    int64_t rows, columns, slots, block, wide, count, activations, threads;
};

namespace {

constexpr int GROUP = 64, BYTES = 16;

float half(uint16_t from) {
    const uint32_t x = from;
    uint32_t bits = (x & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;  // 2^112: the exponents' biases differ by that much
    memcpy(&bits, &value, 4);
    bits |= (x & 0x8000) << 16 | ((x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&value, &bits, 4);
    return value;
}

// Some rows of x, zeros after the last column; with `small`, rounded to whole numbers.
struct Inputs {
    int64_t groups;
    std::vector<float> values, steps;
    std::vector<int8_t> bytes;

    Inputs(const Plane& p, bool small) : groups((p.columns + GROUP - 1) / GROUP), values(p.count * groups * GROUP) {
        for (int64_t m = 0; m < p.count; m++)
            memcpy(&values[m * groups * GROUP], p.x + m * p.columns, 4 * p.columns);
        if (!small) return;
        bytes.resize(values.size());
        steps.resize(p.count * groups);
        for (size_t g = 0; g < steps.size(); g++) {
            const float* from = &values[g * GROUP];
            uint32_t most = 0;  // of absolute values, as bits: in this order NaN comes last
            for (int i = 0; i < GROUP; i++) {
                uint32_t bits;
                memcpy(&bits, from + i, 4);
                most = std::max(most, bits & 0x7fffffff);
            }
            float largest;
            memcpy(&largest, &most, 4);
            const bool broken = most >= 0x7f800000, live = !broken && largest >= 1e-30f;
            const float inverse = live ? 127.f / largest : 0.f;
            steps[g] = broken ? std::nanf("") : live ? largest / 127.f : 0.f;
            for (int i = 0; i < GROUP; i++)
                bytes[g * GROUP + i] = (int8_t)(int32_t)std::nearbyintf(live ? from[i] * inverse : 0.f);
        }
    }
};

// The group's 64 codes times x. Byte i of the 16 holds, from the lowest bits up, the columns i, i + 16, i + 32, i + 48.
#ifdef __AVX512VNNI__
inline __m512i unpack(const uint8_t* codes) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
    const __m512i shifts = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi64(four, shifts), _mm512_set1_epi8(3));
}
#endif

template <bool SMALL>
void work(const Plane& p, const Inputs& in, int64_t first, int64_t last) {
    std::vector<float> scales(p.slots);
    std::vector<int64_t> groups(p.slots);
    for (int64_t n = first; n < last; n++) {
        for (int64_t s = 0; s < p.slots; s++) {
            groups[s] = std::min(s / p.wide * p.block + p.places[n * p.slots + s], in.groups - 1);
            scales[s] = half(p.scales[n * in.groups + groups[s]]);
        }
        for (int64_t m = 0; m < p.count; m++) {
            const uint8_t* codes = p.codes + n * p.slots * BYTES;
            float total = 0;
            if (SMALL) {
                const int8_t* x = &in.bytes[m * in.groups * GROUP];
                const float* steps = &in.steps[m * in.groups];
#ifdef __AVX512VNNI__
                __m512 sums = _mm512_setzero_ps();
                for (int64_t s = 0; s < p.slots; s++, codes += BYTES) {
                    const __m512i at = _mm512_loadu_si512(x + groups[s] * GROUP);
                    const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), unpack(codes), at);
                    const __m512 scale = _mm512_set1_ps(scales[s] * steps[groups[s]]);
                    sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums);
                }
                total = _mm512_reduce_add_ps(sums);
#else
                for (int64_t s = 0; s < p.slots; s++, codes += BYTES) {
                    const int8_t* at = x + groups[s] * GROUP;
                    int32_t dot = 0;
                    for (int q = 0; q < 4; q++)
                        for (int i = 0; i < BYTES; i++) dot += (codes[i] >> 2 * q & 3) * at[BYTES * q + i];
                    total += scales[s] * steps[groups[s]] * (float)dot;
                }
#endif
            } else {
                for (int64_t s = 0; s < p.slots; s++, codes += BYTES) {
                    const float* at = &in.values[(m * in.groups + groups[s]) * GROUP];
                    float sums[BYTES] = {};
                    for (int q = 0; q < 4; q++)
                        for (int i = 0; i < BYTES; i++) sums[i] += (float)(codes[i] >> 2 * q & 3) * at[BYTES * q + i];
                    float dot = 0;
                    for (int i = 0; i < BYTES; i++) dot += sums[i];
                    total += scales[s] * dot;
                }
            }
            p.y[m * p.rows + n] += total / 4;
        }
    }
}

}  // namespace

extern "C" void hasten_low_plane(const Plane* plane) {
    const Plane& p = *plane;
    const bool small = p.activations == 8;
    const Inputs in(p, small);
    const int64_t parts = std::max<int64_t>(1, std::min(p.threads, p.rows / 16));
    const auto part = small ? work<true> : work<false>;
    if (parts == 1) return part(p, in, 0, p.rows);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int64_t t = 0; t < parts; t++) part(p, in, p.rows * t / parts, p.rows * (t + 1) / parts);
}
