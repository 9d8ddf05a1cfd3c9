// y = x W^T + b where bands of r rows of W have their own lists of columns (contract: kernels/block_sparse.py). Many tokens: x is
// turned into panels [K][tokens], and the weights of R rows in one column are multiplied with T vectors of tokens, R x T sums in
// registers; a chunk of bands that fits in the cache meets all panels. Few tokens: a vector of rows at a time. Codes of eight bits
// go through block_vnni.h where the CPU has the instruction, else they are multiplied in fp32. Built by hasten/kernels/native.py.
#include "vectors.h"

#include <memory>
#ifdef __linux__
#include <unistd.h>
#endif

extern "C" struct Product {  // kernels/block_sparse.py has the same fields
    const void* values;      // fp32 [n, r], or int8 [n / 4, r, 4]
    const int32_t* columns;  // [n]
    const int32_t* starts;   // [bands + 1], in columns
    const float* scales;     // [bands * r] of codes; null: fp32
    const int32_t* sums;     // [bands * r], of the codes of a row
    const float* bias;       // [bands * r] or null
    const float* x;          // [count, width]
    float* y;                // [count, rows]
    int64_t r, bands, count, rows, width, threads, vnni;
};

namespace {

constexpr int64_t TALLEST = 64;  // rows of a band at most, and of a tile
constexpr int64_t FEW = 8;       // tokens up to which rows are vectorised
constexpr int64_t SLAB = 256 << 10, MOST_ROWS = 1024;  // bytes of a panel that stay in the cache; rows of W in a chunk
constexpr int64_t AHEAD = 8, FITS = 4 << 20;  // columns fetched ahead; bytes of weights that a shared cache holds
constexpr int64_t KEPT = 8 << 20;  // numbers of scratch memory that outlive a larger call

// Bytes of weights that stay in a core's own cache while all panels of tokens go by.
int64_t resident() {
#if defined __linux__ && defined _SC_LEVEL2_CACHE_SIZE
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    constexpr int64_t size = 0;
#endif
    return std::min<int64_t>(1 << 20, std::max<int64_t>(256 << 10, size / 2));
}

// Memory that a thread keeps for its next call: new pages cost as much as a small product.
float* scratch(int64_t floats) {
    static thread_local std::unique_ptr<Buffer> held;
    static thread_local int64_t have = 0;
    if (floats > have || have > KEPT) {
        held.reset(), have = floats;
        held = std::make_unique<Buffer>(floats);
    }
    return held->floats();
}

// The symmetric eight-bit code of each token: what a code stands for, and its inverse. NaN stays NaN.
void ranges(const Product& p, int64_t m, float* scale, float* inverse) {
    const float* x = p.x + m * p.width;
    vfloat high = {}, odd = {};
    int64_t k = 0;
    for (; k + WIDTH <= p.width; k += WIDTH) {
        const vfloat v = load(x + k), size = v < 0.f ? -v : v;
        high = size > high ? size : high, odd += v * 0.f;
    }
    float most = 0, wrong = sum(odd);
    for (int i = 0; i < WIDTH; i++) most = std::max(most, high[i]);
    for (; k < p.width; k++) most = std::max(most, std::fabs(x[k])), wrong += x[k] * 0.f;
    *scale = most / 127.f + wrong, *inverse = most > 0 ? 127.f / most : 0.f;
}

// How tokens are cut into panels of up to `most` vectors, as even as can be.
struct Panels {
    int64_t units, number;

    Panels(int64_t count, int64_t vector, int64_t most) : units((count + vector - 1) / vector), number((units + most - 1) / most) {}
    int64_t first(int64_t panel) const { return units * panel / number; }
    int64_t vectors(int64_t panel) const { return first(panel + 1) - first(panel); }
};

// Bands that make up a tile, so that what is stored is a run of memory.
struct Tiles {
    int64_t bands, number;

    explicit Tiles(const Product& p) : bands(std::max<int64_t>(1, TALLEST / p.r)), number((p.bands + bands - 1) / bands) {}
};

// tile[rows][stride] of tokens m.. to y, with scales and bias.
void put(const Product& p, const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t m, const float* scale) {
    float back[TALLEST / PANEL][96 * PANEL];  // a panel has at most 96 tokens
    const int64_t tokens = std::min(stride, p.count - m), whole = std::min(stride, round_up(tokens, PANEL));
    rows = std::min(rows, p.rows - row);
    for (int64_t at = 0; at < rows; at += PANEL) {
        const float* from[PANEL];
        for (int64_t i = 0; i < PANEL; i++) from[i] = tile + std::min(at + i, rows - 1) * stride;
        columns(from, whole, back[at / PANEL]);
    }
    for (int64_t t = 0; t < tokens; t++) {
        float* to = p.y + (m + t) * p.rows + row;
        int64_t at = 0;
        for (; at + PANEL <= rows; at += PANEL)
            for (int64_t i = 0; i < PANEL; i += WIDTH) {
                vfloat v = load(back[at / PANEL] + t * PANEL + i);
                if (scale) v *= load(p.scales + row + at + i) * scale[m + t];
                if (p.bias) v += load(p.bias + row + at + i);
                store(to + at + i, v);
            }
        for (; at < rows; at++) {
            const float v = back[at / PANEL][t * PANEL + at % PANEL];
            to[at] = (scale ? v * (p.scales[row + at] * scale[m + t]) : v) + (p.bias ? p.bias[row + at] : 0.f);
        }
    }
}

// fn(first tile, last tile, panel) for all of both; called by all threads. A thread takes tiles whose weights fit in its cache and
// meets all panels.
template <class Fn>
INLINE void chunks(const Product& p, int64_t panels, int64_t bytes, Fn fn) {
    const Tiles tiles(p);
    const int64_t total = std::max(p.starts[p.bands] * p.r * bytes / resident(), p.bands * p.r / MOST_ROWS);
    const int64_t number = std::min(tiles.number, (total / p.threads + 1) * p.threads);
    const int64_t spans = number >= 4 * p.threads ? 1 : std::min<int64_t>(panels, 4);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < number * spans; task++) {
        const int64_t span = task / number, c = task % number;
        for (int64_t panel = panels * span / spans; panel < panels * (span + 1) / spans; panel++)
            fn(tiles.number * c / number, tiles.number * (c + 1) / number, panel);
    }
}

// Adds to (or, at the start of a band, sets) R rows of a tile what entries from `i` on give whose columns lie before `limit`, and
// says where they end.
template <int R, int T, bool CODED>
int64_t pass(const Product& p, int64_t band, int64_t i, int64_t limit, const float* panel, const int64_t sub, float* tile) {
    constexpr int64_t STRIDE = T * WIDTH;
    vfloat acc[R][T] = {};
    tile += sub * STRIDE;
    if (i > p.starts[band])
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) acc[r][t] = load(tile + r * STRIDE + t * WIDTH);
    const float* const weights = (const float*)p.values + sub;
    const int8_t* const codes = (const int8_t*)p.values + sub * 4;
    for (const int64_t end = p.starts[band + 1]; i < end && p.columns[i] < limit; i++) {
        const float* x = panel + (int64_t)p.columns[i] * STRIDE;
        const float* soon = panel + (int64_t)p.columns[std::min(i + AHEAD, end - 1)] * STRIDE;
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) __builtin_prefetch(soon + t * WIDTH);
        vfloat xs[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) xs[t] = load(x + t * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vfloat w = splat(CODED ? (float)codes[(i / 4 * p.r + r) * 4 + i % 4] : weights[i * p.r + r]);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) acc[r][t] += w * xs[t];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) store(tile + r * STRIDE + t * WIDTH, acc[r][t]);
    return i;
}

// Many tokens. x: p.x, or its codes.
template <int R, int T, bool CODED>
void many(const Product& p, const float* x, const float* scale) {
    constexpr int64_t (*PASSES[])(const Product&, int64_t, int64_t, int64_t, const float*, int64_t, float*) = {
        pass<R, 1, CODED>,
        pass<R, (T > 2 ? 2 : T), CODED>,
        pass<R, (T > 3 ? 3 : T), CODED>,
        pass<R, (T > 4 ? 4 : T), CODED>,
        pass<R, (T > 5 ? 5 : T), CODED>,
        pass<R, (T > 6 ? 6 : T), CODED>,
    };
    static_assert(T <= 6, "the table of passes");
    const Panels panels(p.count, WIDTH, T);
    const Tiles tiles(p);
    // Columns from k to before `last` of a panel's tokens.
    auto turn = [&](int64_t panel, int64_t k, int64_t last, float* to) {
        const int64_t first = panels.first(panel), vectors = panels.vectors(panel);
        for (; k < last; k += PANEL)
            for (int64_t v = 0; v < vectors; v++) {
                const float* from[PANEL];
                float square[PANEL * PANEL];
                for (int64_t i = 0; i < PANEL; i++)
                    from[i] = x + std::min((first + v) * WIDTH + std::min<int64_t>(i, WIDTH - 1), p.count - 1) * p.width + k;
                const int64_t have = std::min<int64_t>(PANEL, last - k);
                columns(from, have, square);
                for (int64_t i = 0; i < have; i++) store(to + ((k + i) * vectors + v) * WIDTH, load(square + i * PANEL));
            }
    };
    // The tiles from `t` to before `end` for a panel.
    auto multiply = [&](int64_t t, int64_t end, int64_t panel, const float* from, std::vector<int64_t>& place,
                        std::vector<float>& sums) {
        const int64_t first = panels.first(panel), vectors = panels.vectors(panel), stride = vectors * WIDTH;
        const int64_t begin = t * tiles.bands, last = std::min(p.bands, end * tiles.bands), slab = SLAB / stride / 4;
        place.assign(p.starts + begin, p.starts + last), sums.resize((last - begin) * p.r * stride);
        for (int64_t limit = slab;; limit += slab) {
            for (int64_t band = begin; band < last; band++) {
                float* const tile = sums.data() + (band - begin) * p.r * stride;
                int64_t next = 0;
                for (int64_t sub = 0; sub < p.r; sub += R)
                    next = PASSES[vectors - 1](p, band, place[band - begin], limit < p.width ? limit : INT64_MAX, from, sub, tile);
                place[band - begin] = next;
                const int64_t of = (band - begin) % tiles.bands + 1;
                if (limit >= p.width && (of == tiles.bands || band + 1 == last))
                    put(p, tile - (of - 1) * p.r * stride, stride, (band + 1 - of) * p.r, of * p.r, first * WIDTH, scale);
            }
            if (limit >= p.width) break;
        }
    };
    const int64_t bytes = CODED ? 1 : 4, parts = (p.width + 255) / 256;
    if (panels.number >= 4 * p.threads && p.starts[p.bands] * p.r * bytes <= FITS) {
        // Many tokens for few weights: each thread turns a panel of its own and reads all weights.
#pragma omp parallel num_threads(p.threads)
        {
            std::vector<int64_t> place;
            std::vector<float> sums;
            float* const own = scratch(T * WIDTH * p.width);
            const int64_t step = std::max<int64_t>(1, MOST_ROWS / (tiles.bands * p.r));
#pragma omp for schedule(dynamic, 1)
            for (int64_t panel = 0; panel < panels.number; panel++) {
                turn(panel, 0, p.width, own);
                for (int64_t t = 0; t < tiles.number; t += step)
                    multiply(t, std::min(tiles.number, t + step), panel, own, place, sums);
            }
        }
        return;
    }
    float* const turned = scratch(panels.units * WIDTH * p.width);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t job = 0; job < panels.number * parts; job++) {
            const int64_t panel = job / parts, k = job % parts * 256;
            turn(panel, k, std::min(p.width, k + 256), turned + panels.first(panel) * WIDTH * p.width);
        }
        std::vector<int64_t> place;
        std::vector<float> sums;
        chunks(p, panels.number, bytes, [&](int64_t t, int64_t end, int64_t panel) {
            multiply(t, end, panel, turned + panels.first(panel) * WIDTH * p.width, place, sums);
        });
    }
}

template <bool CODED>
void many_of(const Product& p, const float* x, const float* scale) {
#ifdef __AVX512F__
    if (p.r % 8 == 0) return many<8, 3, CODED>(p, x, scale);
    if (p.r % 4 == 0) return many<4, 6, CODED>(p, x, scale);
    return p.r % 2 ? many<1, 6, CODED>(p, x, scale) : many<2, 6, CODED>(p, x, scale);
#else
    if (p.r % 4 == 0) return many<4, 3, CODED>(p, x, scale);
    return p.r % 2 ? many<1, 6, CODED>(p, x, scale) : many<2, 4, CODED>(p, x, scale);
#endif
}

// W rows of a band for M tokens; chains of additions hide the latency of one.
template <int W, int M>
INLINE void lanes(const Product& p, int64_t band, int64_t sub, const float* x, float* y) {
    typedef float vec __attribute__((vector_size(4 * W)));
    constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;
    vec acc[M][CHAINS] = {};
    const float* const weights = (const float*)p.values + sub;
    auto step = [&](int64_t i, int chain) __attribute__((always_inline)) {
        vec w;
        memcpy(&w, weights + i * p.r, sizeof w);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[m][chain] += w * x[m * p.width + p.columns[i]];
    };
    int64_t i = p.starts[band];
    const int64_t end = p.starts[band + 1];
    for (; i + CHAINS <= end; i += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) step(i + c, c);
    for (; i < end; i++) step(i, 0);
    const int64_t row = band * p.r + sub;
    for (int m = 0; m < M; m++) {
        for (int c = 1; c < CHAINS; c++) acc[m][0] += acc[m][c];
        float* to = y + m * p.rows + row;
        if (row + W <= p.rows) {
            vec b = {};
            if (p.bias) memcpy(&b, p.bias + row, sizeof b);
            b += acc[m][0];
            memcpy(to, &b, sizeof b);
        } else
            for (int64_t w = 0; w < p.rows - row; w++) to[w] = acc[m][0][w] + (p.bias ? p.bias[row + w] : 0.f);
    }
}

template <int W>
void few(const Product& p) {
    const int64_t pieces = p.threads > 1 ? std::min(p.bands, 4 * p.threads) : 1;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t band = p.bands * piece / pieces; band < p.bands * (piece + 1) / pieces; band++)
            for (int64_t sub = 0; sub < p.r; sub += W) {
                int64_t m = 0;
                for (; m + 4 <= p.count; m += 4) lanes<W, 4>(p, band, sub, p.x + m * p.width, p.y + m * p.rows);
                for (; m + 2 <= p.count; m += 2) lanes<W, 2>(p, band, sub, p.x + m * p.width, p.y + m * p.rows);
                for (; m < p.count; m++) lanes<W, 1>(p, band, sub, p.x + m * p.width, p.y + m * p.rows);
            }
}

void plain(const Product& p) {
    if (p.count > FEW || p.r % 4) return many_of<false>(p, p.x, nullptr);
#ifdef __AVX512F__
    if (p.r % 16 == 0) return few<16>(p);
#endif
    return p.r % 8 == 0 ? few<8>(p) : few<4>(p);
}

}  // namespace

#ifdef __AVX512F__
#include "block_vnni.h"
#endif

extern "C" void hasten_block_sparse(const Product* given) {
    const Product& p = *given;
    if (!p.scales) return plain(p);
    std::vector<float> scale(p.count), inverse(p.count);
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t m = 0; m < p.count; m++) ranges(p, m, &scale[m], &inverse[m]);
#ifdef __AVX512F__
    if (p.vnni && p.r % 4 == 0 && __builtin_cpu_supports("avx512vnni")) return coded(p, scale.data(), inverse.data());
#endif
    Buffer codes(p.count * p.width);
    for (int64_t m = 0; m < p.count; m++)
        for (int64_t k = 0; k < p.width; k++)
            codes.floats()[m * p.width + k] = std::nearbyint(p.x[m * p.width + k] * inverse[m]);
    many_of<true>(p, codes.floats(), scale.data());
}
