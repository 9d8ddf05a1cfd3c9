// Row and column norms of matrices made equal, and the step with the result, one matrix in the cache at a time.
//
// X = diag(u)^1/2 G diag(v)^1/2 with u = n / (S v), v = m / (S' u), S = G * G. A row is read from the cache once an
// iteration: its product with v gives u, which at once weighs its part of S' u. Memory is read once for G and once for
// the weights, as long as a matrix fits into the cache of a core.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Far below the square of any entry that counts, the largest being 1. It comes second in std::max: a NaN stays one.
constexpr float SMALL = 1e-30f;
constexpr int64_t CHUNK = 1 << 20;  // numbers of a matrix that one thread takes
constexpr int64_t CACHED = 1 << 18;  // numbers of a matrix that fits, with its weights, into a core's cache

float largest(const float *x, int64_t n) {
    float most = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; ++j) most = std::max(most, std::fabs(x[j]));
    return most;
}

// The average moves towards g, and x becomes the average moved towards g once more; returns the largest |x|.
float look_ahead(const float *g, float *average, float *x, int64_t n, float weight) {
    float most = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; ++j) {
        const float moved = average[j] + weight * (g[j] - average[j]);
        average[j] = moved;
        x[j] = moved + weight * (g[j] - moved);
        most = std::max(most, std::fabs(x[j]));
    }
    return most;
}

// Some rows at once, for which v and the sums are read once: their products with v give u, which weighs their squares.
template <int ROWS>
void turn(const float *x, const float *v, float *u, float *sums, int64_t n, float scale) {
    float found[ROWS];
    if constexpr (ROWS == 4) {
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t j = 0; j < n; ++j) {
            const float e = x[j] * scale, f = x[n + j] * scale, g = x[2 * n + j] * scale, h = x[3 * n + j] * scale;
            a += e * e * v[j];
            b += f * f * v[j];
            c += g * g * v[j];
            d += h * h * v[j];
        }
        found[0] = a, found[1] = b, found[2] = c, found[3] = d;
    } else {
        float a = 0.0f;
#pragma omp simd reduction(+ : a)
        for (int64_t j = 0; j < n; ++j) a += x[j] * scale * (x[j] * scale) * v[j];
        found[0] = a;
    }
    float weights[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        u[r] = float(n) / std::max(found[r], SMALL);
        weights[r] = u[r];
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float sum = sums[j];
        for (int r = 0; r < ROWS; ++r) sum += weights[r] * (x[r * n + j] * scale * (x[r * n + j] * scale));
        sums[j] = sum;
    }
}

// w <- keep w - by x * roots, `by` with the row's root in it.
void move(float *w, const float *x, const float *roots, int64_t n, float keep, float by) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) w[j] = keep * w[j] - by * (x[j] * roots[j]);
}

struct Buffers {
    std::vector<float> x, u, v, sums, most;
};

// One matrix [m, n]; its rows in `chunks` parts, which OpenMP's threads take where there is more than one.
void step(float *w, const float *g, float *average, int64_t m, int64_t n, int64_t iterations, float momentum,
          float rate, float keep, int threads, Buffers &at) {
    const int64_t chunks = std::min(m, std::max<int64_t>(1, m * n / CHUNK));
    const int team = chunks > 1 ? threads : 1;
    const bool soon = m * n <= CACHED;  // the weights are fetched while the last iteration computes
    at.u.resize(m);
    at.v.assign(n, 1.0f);
    at.sums.resize(chunks * n);
    at.most.assign(chunks, 0.0f);
    const float *x = g;
    if (average) {
        at.x.resize(m * n);
        x = at.x.data();
    }
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = m * c / chunks * n, count = m * (c + 1) / chunks * n - from;
        at.most[c] = average ? look_ahead(g + from, average + from, at.x.data() + from, count, 1.0f - momentum)
                             : largest(g + from, count);
    }
    const float most = std::max(SMALL, *std::max_element(at.most.begin(), at.most.end()));
    const float scale = 1.0f / most;
    for (int64_t round = 0; round < iterations; ++round) {
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
        for (int64_t c = 0; c < chunks; ++c) {
            float *sums = at.sums.data() + c * n;
            std::fill(sums, sums + n, 0.0f);
            int64_t i = m * c / chunks;
            for (; i + 4 <= m * (c + 1) / chunks; i += 4) {
                if (soon && round == iterations - 1)
                    for (int64_t j = 0; j < 4 * n; j += 16) __builtin_prefetch(w + i * n + j, 1, 2);
                turn<4>(x + i * n, at.v.data(), &at.u[i], sums, n, scale);
            }
            for (; i < m * (c + 1) / chunks; ++i) turn<1>(x + i * n, at.v.data(), &at.u[i], sums, n, scale);
        }
        for (int64_t c = 1; c < chunks; ++c)
            for (int64_t j = 0; j < n; ++j) at.sums[j] += at.sums[c * n + j];
        for (int64_t j = 0; j < n; ++j) at.v[j] = float(m) / std::max(at.sums[j], SMALL);
    }
    for (int64_t j = 0; j < n; ++j) at.v[j] = std::sqrt(at.v[j]);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = m * c / chunks; i < m * (c + 1) / chunks; ++i)
            move(w + i * n, x + i * n, at.v.data(), n, keep, rate * scale * std::sqrt(at.u[i]));
}

}  // namespace

// W <- keep W - rate X. weights, gradients, averages: `count` pointers to matrices of shapes [m, n] (`shapes`),
// floats without gaps; averages is null without momentum. Small matrices go to the threads one by one, large ones to
// all of them.
extern "C" void hasten_sinkhorn_step(float *const *weights, const float *const *gradients, float *const *averages,
                                     const int64_t *shapes, const float *rates, const float *keeps, int64_t count,
                                     int64_t iterations, float momentum, int threads) {
    const auto large = [&](int64_t k) { return shapes[2 * k] * shapes[2 * k + 1] >= 2 * CHUNK; };
    const auto take = [&](int64_t k, Buffers &at) {
        step(weights[k], gradients[k], averages ? averages[k] : nullptr, shapes[2 * k], shapes[2 * k + 1], iterations,
             momentum, rates[k], keeps[k], threads, at);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Buffers at;
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < count; ++k)
            if (!large(k)) take(k, at);
    }
    Buffers at;
    for (int64_t k = 0; k < count; ++k)
        if (large(k)) take(k, at);
}
