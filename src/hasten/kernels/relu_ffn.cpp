// A feed-forward layer with ReLU for a few tokens (contract: kernels/relu_ffn.py). Hidden neurons are cut into pieces that threads
// take; a piece computes what enters the ReLU, lists the neurons that are active for any token, and only their rows of the up and
// the transposed down matrix are read. Pieces do not depend on the number of threads. Built by hasten/kernels/native.py.
#include "vectors.h"

extern "C" struct Layer {  // kernels/relu_ffn.py has the same fields
    const void *gate, *up, *down;  // [hidden, width], [hidden, width] or null, [hidden, out]; `kind` 0 fp32, 1 bf16
    const float *gate_bias, *up_bias, *down_bias;  // or null
    const float* x;                                // [count, width]
    float* y;                                      // [count, out]
    float* partial;                                // [pieces, count, out]
    int64_t kind, count, width, hidden, out, pieces, threads;
    float threshold;
};

namespace {

typedef uint16_t vhalf __attribute__((vector_size(2 * WIDTH)));

template <int KIND>
struct Matrix {
    const char* at;
    int64_t width;
    static constexpr int SIZE = KIND ? 2 : 4;

    const char* row(int64_t i) const { return at + i * width * SIZE; }
    static INLINE vfloat vec(const char* row, int64_t k) {
        if (!KIND) return load((const float*)row + k);
        vhalf bits;
        memcpy(&bits, row + k * 2, sizeof bits);
        return (vfloat)(__builtin_convertvector(bits, vint) << 16);
    }
    static INLINE float one(const char* row, int64_t k) {
        if (!KIND) return ((const float*)row)[k];
        const uint32_t word = (uint32_t)((const uint16_t*)row)[k] << 16;
        float number;
        memcpy(&number, &word, 4);
        return number;
    }
};

// out[r][m] = row r of the matrix times row m of x.
template <int KIND, int R, int M>
INLINE void dots(const char* const* rows, const float* x, int64_t width, float (*out)[4]) {
    constexpr int CHAINS = R * M < 8 ? 2 : 1;
    vfloat acc[R][M][CHAINS] = {};
    auto step = [&](int64_t k, int c) __attribute__((always_inline)) {
        vfloat xs[M];
        for (int m = 0; m < M; m++) xs[m] = load(x + m * width + k);
        for (int r = 0; r < R; r++) {
            const vfloat w = Matrix<KIND>::vec(rows[r], k);
            for (int m = 0; m < M; m++) acc[r][m][c] += w * xs[m];
        }
    };
    int64_t k = 0;
    for (; k + CHAINS * WIDTH <= width; k += CHAINS * WIDTH)
#pragma GCC unroll 2
        for (int c = 0; c < CHAINS; c++) step(k + c * WIDTH, c);
    for (; k + WIDTH <= width; k += WIDTH) step(k, 0);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            if (CHAINS == 2) acc[r][m][0] += acc[r][m][CHAINS - 1];
            float total = sum(acc[r][m][0]);
            for (int64_t j = k; j < width; j++) total += Matrix<KIND>::one(rows[r], j) * x[m * width + j];
            out[r][m] = total;
        }
}

// fn(r, m, value) for R rows and all tokens.
template <int KIND, int R, class Fn>
INLINE void all_dots(const Layer& l, const char* const* rows, Fn fn) {
    float out[R][4];
    int64_t m = 0;
    auto give = [&](int n) {
        for (int r = 0; r < R; r++)
            for (int i = 0; i < n; i++) fn(r, m + i, out[r][i]);
    };
    for (; m + 4 <= l.count; m += 4) dots<KIND, R, 4>(rows, l.x + m * l.width, l.width, out), give(4);
    for (; m + 2 <= l.count; m += 2) dots<KIND, R, 2>(rows, l.x + m * l.width, l.width, out), give(2);
    for (; m < l.count; m++) dots<KIND, R, 1>(rows, l.x + m * l.width, l.width, out), give(1);
}

// fn(r, m, value) for rows at(0), at(1), ... before n.
template <int KIND, class At, class Fn>
INLINE void products(const Layer& l, const Matrix<KIND>& matrix, int64_t n, At at, Fn fn) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const char* rows[4] = {matrix.row(at(i)), matrix.row(at(i + 1)), matrix.row(at(i + 2)), matrix.row(at(i + 3))};
        all_dots<KIND, 4>(l, rows, [&](int r, int64_t m, float value) { fn(i + r, m, value); });
    }
    for (; i < n; i++) {
        const char* rows[1] = {matrix.row(at(i))};
        all_dots<KIND, 1>(l, rows, [&](int, int64_t m, float value) { fn(i, m, value); });
    }
}

template <int KIND>
void piece(const Layer& l, int64_t first, int64_t last, float* y, std::vector<float>& values, std::vector<int64_t>& active) {
    const Matrix<KIND> gate{(const char*)l.gate, l.width}, up{(const char*)l.up, l.width}, down{(const char*)l.down, l.out};
    values.resize((last - first) * l.count), active.clear();
    products<KIND>(l, gate, last - first, [&](int64_t i) { return first + i; }, [&](int64_t i, int64_t m, float z) {
        z += l.gate_bias ? l.gate_bias[first + i] : 0.f;
        values[i * l.count + m] = z <= l.threshold ? 0.f : z;  // NaN stays
    });
    for (int64_t i = 0; i < last - first; i++) {
        bool any = false;
        for (int64_t m = 0; m < l.count; m++) any |= values[i * l.count + m] != 0.f;
        if (!any) continue;
        std::copy_n(&values[i * l.count], l.count, &values[active.size() * l.count]);
        active.push_back(first + i);
    }
    const int64_t n = (int64_t)active.size();
    if (l.up)
        products<KIND>(l, up, n, [&](int64_t i) { return active[i]; }, [&](int64_t i, int64_t m, float value) {
            values[i * l.count + m] *= value + (l.up_bias ? l.up_bias[active[i]] : 0.f);
        });
    memset(y, 0, l.count * l.out * 4);
    for (int64_t i = 0; i < n; i += 4) {
        const int64_t have = std::min<int64_t>(4, n - i);
        const char* rows[4];
        for (int64_t j = 0; j < 4; j++) rows[j] = down.row(active[i + std::min(j, have - 1)]);
        for (int64_t m = 0; m < l.count; m++) {
            float a[4];
            bool any = false;
            for (int64_t j = 0; j < 4; j++) a[j] = j < have ? values[(i + j) * l.count + m] : 0.f, any |= a[j] != 0.f;
            if (!any) continue;
            float* to = y + m * l.out;
            int64_t k = 0;
            const vfloat b[4] = {splat(a[0]), splat(a[1]), splat(a[2]), splat(a[3])};
            for (; k + WIDTH <= l.out; k += WIDTH) {
                vfloat sums = load(to + k);
                for (int j = 0; j < 4; j++)
                    if (j < have) sums += b[j] * Matrix<KIND>::vec(rows[j], k);
                store(to + k, sums);
            }
            for (; k < l.out; k++)
                for (int64_t j = 0; j < have; j++) to[k] += a[j] * Matrix<KIND>::one(rows[j], k);
        }
    }
}

}  // namespace

extern "C" void hasten_relu_ffn(const Layer* given) {
    const Layer& l = *given;
    const int64_t size = l.count * l.out;
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
    {
        std::vector<float> values;
        std::vector<int64_t> active;
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < l.pieces; p++)
            (l.kind ? piece<1> : piece<0>)(l, l.hidden * p / l.pieces, l.hidden * (p + 1) / l.pieces, l.partial + p * size, values,
                                           active);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < size; i++) {
            float total = l.down_bias ? l.down_bias[i % l.out] : 0.f;
            for (int64_t p = 0; p < l.pieces; p++) total += l.partial[p * size + i];
            l.y[i] = total;
        }
    }
}
