// A norm over the last dimension whose output is int8 codes (contract: hasten/kernels/int8_norm.py): scales were folded into
// its gain, so rounding is all that is left to do. Built by hasten/kernels/native.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;

struct Call {
    const void* x;  // [count, columns], fp32 (kind 0) or bfloat16 (1)
    const float *gain, *shift;  // [columns]; shift may be null
    const int64_t *source, *place;  // [extra], or null
    int8_t* y;  // [count, columns + extra]
    int64_t count, columns, extra, kind, centred, most;
    float eps;
};

inline const float* numbers(const Call& c, int64_t token, float* wide) {
    if (c.kind == 0) return (const float*)c.x + token * c.columns;
    const uint16_t* from = (const uint16_t*)c.x + token * c.columns;
    for (int64_t k = 0; k < c.columns; k++) {
        const uint32_t bits = (uint32_t)from[k] << 16;
        memcpy(wide + k, &bits, 4);
    }
    return wide;
}

// The sum of f(k) in 16 running sums, so that it vectorises and does not depend on the number of threads.
template <class F>
inline float sum(int64_t n, F f) {
    float some[LANES] = {}, total = 0;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < LANES; i++) some[i] += f(k + i);
    for (; k < n; k++) some[k % LANES] += f(k);
    for (int i = 0; i < LANES; i++) total += some[i];
    return total;
}

void round(const float* __restrict x, const float* __restrict gain, const float* __restrict shift, int32_t* __restrict whole,
           int8_t* __restrict y, int64_t n, float mean, float factor, float limit, int32_t most) {
    for (int64_t k = 0; k < n; k++) {
        float v = (x[k] - mean) * factor * gain[k];
        if (shift) v += shift[k];
        v = std::min(limit, std::max(-limit, v));  // in this order NaN becomes -limit
        whole[k] = (int32_t)std::rint(v);
    }
    for (int64_t k = 0; k < n; k++) y[k] = (int8_t)std::min(std::max(whole[k], -most), most);
}

void run(const Call& c, int64_t token, float* wide, int32_t* whole) {
    const float* x = numbers(c, token, wide);
    const float mean = c.centred ? sum(c.columns, [&](int64_t k) { return x[k]; }) / (float)c.columns : 0.f;
    const float square = sum(c.columns, [&](int64_t k) { return (x[k] - mean) * (x[k] - mean); }) / (float)c.columns;
    const float factor = 1.f / std::sqrt(square + c.eps), limit = 64.f * (float)c.most;
    int8_t* y = c.y + token * (c.columns + c.extra);
    round(x, c.gain, c.shift, whole, y, c.columns, mean, factor, limit, (int32_t)c.most);
    for (int64_t i = 0; i < c.extra; i++) {
        const int32_t code = whole[c.source[i]], taken = (int32_t)(c.place[i] * c.most);
        const int32_t left = std::min(std::max(std::abs(code) - taken, 0), (int32_t)c.most);
        y[c.columns + i] = (int8_t)(code < 0 ? -left : left);
    }
}

}  // namespace

extern "C" void hasten_int8_norm(const void* x, const float* gain, const float* shift, const int64_t* source,
                                 const int64_t* place, int8_t* y, int64_t count, int64_t columns, int64_t extra, int64_t kind, int64_t centred,
                                 int64_t most, float eps, int threads) {
    const Call c{x, gain, shift, source, place, y, count, columns, extra, kind, centred, most, eps};
    const int pieces = (int)std::max<int64_t>(1, std::min<int64_t>(threads, count * columns >> 14));
#pragma omp parallel for num_threads(pieces) schedule(static) if (pieces > 1)
    for (int i = 0; i < pieces; i++) {
        static thread_local std::vector<float> scratch;
        scratch.resize(std::max<size_t>(scratch.size(), 2 * columns));
        float* wide = scratch.data();
        for (int64_t t = count * i / pieces; t < count * (i + 1) / pieces; t++) run(c, t, wide, (int32_t*)(wide + columns));
    }
}
