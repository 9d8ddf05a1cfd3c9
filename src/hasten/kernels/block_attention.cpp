// Block-sparse attention, forward and backward, in fp32 (contract: kernels/block_attention.py). A thread takes some rows of
// queries at a time (64, the heads that share a list together) and walks their list of key blocks in tiles of PANELS panels
// of 16 keys. Keys lie transposed, [d][16] a panel, and values in strips of the product's width, so both products run from
// registers: ROWS queries times PAIR panels. The softmax is FlashAttention-2's; its maximum follows only when it is more than
// 2^8 behind, so most tiles rescale nothing. Panels seen whole are never tested against a mask, panels not seen are skipped.
// Where blocks are visited often, keys and values are laid out once, in the order of the blocks; else (single tokens, few
// queries) tile by tile. Plain C interface over raw pointers; built by hasten/kernels/native.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
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

extern "C" struct Call {  // kernels/_block_native.py has the same fields
    const float *q, *k, *v;  // [B, H, Nq, d], [B, Hk, Nk, d], [B, Hk, Nk, e], last dimension contiguous
    float *out, *lse;        // [B, H, Nq, e], [B, H, Nq]
    const float *dout, *dlse;
    float *dq, *dk, *dv;
    const int32_t *counts, *indices, *mask_of;  // [lists_b, lists_h, Tq(, M)]
    const uint8_t* masks;                       // [P, block_q, block_k]
    const int64_t *q_order, *k_order, *begin, *end;
    int64_t B, H, Hk, Nq, Nk, d, e, q_strides[3], k_strides[3], v_strides[3];
    int64_t lists_b, lists_h, Tq, M, qo_b, qo_h, ko_b, ko_h, block_q, block_k, causal, threads;
    double scaling, stop;  // stop below 0: never
};

namespace {

constexpr int PANEL = 16, SUB = PANEL / WIDTH, STRIP = PANEL * PAIR, GROUP = 8;
#ifndef PANELS
#define PANELS 8
#endif
#ifndef MOST
#define MOST 64
#endif
constexpr int LINE = PANELS * PANEL;
constexpr float INF = std::numeric_limits<float>::infinity(), LAG = 8, LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();

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

INLINE bool any_above(vfloat x, float than) {
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

// c[r][:] += the product of `multiply` over the n pieces b[i] of `length` rows each; a moves on by `step` for each.
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

struct Panel {  // 16 keys
    const float *kt, *v, *k, *vt;  // [d][16], strips; backward: strips, [e][16]
    const int32_t* place;          // positions, NEVER where there is no key
    int32_t low, high;             // of `place`
    const uint8_t* bytes;          // its first row in a finer mask, `width` columns there; null for none
    int64_t width;
    const int64_t* fine;  // each key's column in a finer mask of its own, -1 for none; null where `bytes` says it
    int64_t id;           // which of the laid-out panels, -1: gathered from
    const int64_t* tokens;
    int count;
};

struct Row {
    int64_t head, query, inside;  // inside: its row of the query block
    int32_t limit;                // the last position it sees
};

struct Band {  // rows that a product takes at a time
    int first, rows;
    int32_t low, high;  // of their limits
};

struct Work {
    const Call& c;
    const bool back;
    const int64_t ep, dp, group, pieces, most;  // padded dims; heads that share a list; parts of their rows, rows of a part
    int64_t per_block, panels;                  // panels of a block and of all
    bool whole;                                 // laid out once
    std::vector<int32_t> place, low, high;
    Buffer kt, v, k, vt;

    static int64_t heads_together(const Call& c) { return c.stop >= 0 || c.lists_h == c.H ? 1 : c.H / c.Hk; }
    static int64_t parts(const Call& c) {
        return c.stop >= 0 ? 1 : (heads_together(c) * std::min(c.block_q, c.Nq) + MOST - 1) / MOST;
    }
    static bool worth(const Call& c) {  // whether blocks are visited more often than they would be laid out
        if (c.block_k < PANEL) return false;
        int64_t visits = 0;
        for (int64_t i = 0; i < c.lists_b * c.lists_h * c.Tq; i++) visits += c.counts[i];
        const int64_t times = c.B / c.lists_b * (c.H / heads_together(c)) / c.lists_h * parts(c);
        return visits * times >= c.B * c.Hk * ((c.Nk + c.block_k - 1) / c.block_k);
    }
    static int64_t num_panels(const Call& c) {
        return (c.Nk + c.block_k - 1) / c.block_k * ((c.block_k + PANEL - 1) / PANEL);
    }
    static int64_t room(const Call& c, int64_t width) { return worth(c) ? c.B * c.Hk * num_panels(c) * PANEL * width : 0; }

    Work(const Call& c, bool back)
        : c(c), back(back), ep(round_up(c.e, PANEL)), dp(round_up(c.d, PANEL)), group(heads_together(c)), pieces(parts(c)),
          most(round_up((group * std::min(c.block_q, c.Nq) + pieces - 1) / pieces, GROUP)),
          per_block((c.block_k + PANEL - 1) / PANEL), panels(num_panels(c)), whole(worth(c)), kt(room(c, c.d)),
          v(back ? 0 : room(c, ep)), k(back ? room(c, dp) : 0), vt(back ? room(c, c.e) : 0) {
        if (whole) lay_out();
    }

    int64_t key_at(int64_t b, int64_t hk, int64_t place) const {
        return c.k_order ? c.k_order[((b % c.ko_b) * c.ko_h + hk * c.ko_h / c.Hk) * c.Nk + place] : place;
    }
    const float* key_row(int64_t b, int64_t h, int64_t n) const {
        return c.k + b * c.k_strides[0] + h * c.k_strides[1] + n * c.k_strides[2];
    }
    const float* value_row(int64_t b, int64_t h, int64_t n) const {
        return c.v + b * c.v_strides[0] + h * c.v_strides[1] + n * c.v_strides[2];
    }
    bool real(int64_t b, int64_t key) const { return (!c.begin || key >= c.begin[b]) && (!c.end || key < c.end[b]); }

    void lay_out() {
        const int64_t all = c.B * c.Hk * panels;
        place.resize(all * PANEL), low.resize(all), high.resize(all);
        const std::vector<float> zeros(std::max(c.d, c.e), 0.f);
#pragma omp parallel for num_threads(c.threads) schedule(static)
        for (int64_t id = 0; id < all; id++) {
            const int64_t b = id / panels / c.Hk, h = id / panels % c.Hk, in_head = id % panels;
            const int64_t inside = in_head % per_block * PANEL, first = in_head / per_block * c.block_k + inside;
            const float *keys[PANEL], *values[PANEL];
            int32_t* at = &place[id * PANEL];
            for (int i = 0; i < PANEL; i++) {
                at[i] = NEVER, keys[i] = values[i] = zeros.data();
                if (inside + i >= c.block_k || first + i >= c.Nk) continue;
                const int64_t key = key_at(b, h, first + i);
                if (!real(b, key)) continue;
                at[i] = (int32_t)key, keys[i] = key_row(b, h, key), values[i] = value_row(b, h, key);
            }
            low[id] = *std::min_element(at, at + PANEL), high[id] = *std::max_element(at, at + PANEL);
            columns(keys, c.d, kt.floats() + id * PANEL * c.d);
            if (!back) strips(values, PANEL, c.e, v.floats() + id * PANEL * ep);
            if (back) strips(keys, PANEL, c.d, k.floats() + id * PANEL * dp);
            if (back) columns(values, c.e, vt.floats() + id * PANEL * c.e);
        }
    }

    Panel laid_out(int64_t b, int64_t hk, int64_t block, int64_t piece, int64_t mask) const {
        const int64_t id = (b * c.Hk + hk) * panels + block * per_block + piece, width = c.block_k - piece * PANEL;
        const uint8_t* bytes = mask < 0 ? nullptr : c.masks + mask * c.block_q * c.block_k + piece * PANEL;
        return {kt.floats() + id * PANEL * c.d, v.floats() + id * PANEL * ep, k.floats() + id * PANEL * dp,
                vt.floats() + id * PANEL * c.e, &place[id * PANEL], low[id], high[id], bytes,
                std::min<int64_t>(width, PANEL), nullptr, id, nullptr, PANEL};
    }
};

// What one thread holds of its rows.
struct Rows {
    const Work& w;
    const Call& c;
    std::vector<Row> rows;
    std::vector<Band> bands;
    Panel tile[PANELS];
    int filled = 0, pending = 0;
    int64_t b = 0, hk = 0;
    int32_t limit = 0;
    int64_t token[PANELS][PANEL], fine[PANELS][PANEL];
    int32_t place[PANELS][PANEL];
    Buffer q, kt, v, k, vt;

    explicit Rows(const Work& w)
        : w(w), c(w.c), q(w.most * c.d), kt(w.whole ? 0 : LINE * c.d), v(w.whole || w.back ? 0 : LINE * w.ep),
          k(!w.whole && w.back ? LINE * w.dp : 0), vt(!w.whole && w.back ? LINE * c.e : 0) {}

    const float* query_row(const Row& row) const {
        return c.q + b * c.q_strides[0] + row.head * c.q_strides[1] + row.query * c.q_strides[2];
    }

    // Rows of part `piece` of query block t for the heads from h on; false where there are none.
    bool take(int64_t b_, int64_t h, int64_t t, int64_t piece) {
        b = b_, hk = h * c.Hk / c.H;
        rows.clear(), bands.clear();
        const int64_t length = std::min(c.block_q, c.Nq - t * c.block_q), all = w.group * length;
        for (int64_t i = piece * w.most; i < std::min(all, (piece + 1) * w.most); i++) {
            const int64_t head = h + i / length, inside = i % length, at = t * c.block_q + inside;
            const int64_t query = c.q_order ? c.q_order[((b % c.qo_b) * c.qo_h + head * c.qo_h / c.H) * c.Nq + at] : at;
            rows.push_back({head, query, inside, c.causal ? (int32_t)(query + c.Nk - c.Nq) : NEVER - 1});
        }
        limit = -1;
        for (int first = 0, n; first < (int)rows.size(); first += n) {
            const int left = (int)rows.size() - first;
            n = left >= 8 && ROWS >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            Band band{first, n, NEVER, -1};
            for (int r = first; r < first + n; r++)
                band.low = std::min(band.low, rows[r].limit), band.high = std::max(band.high, rows[r].limit);
            limit = std::max(limit, band.high);
            bands.push_back(band);
        }
        const float scale = (float)(c.scaling * LOG2E);
        for (size_t r = 0; r < rows.size(); r++) {
            const float* from = query_row(rows[r]);
            float* to = q.floats() + r / GROUP * GROUP * c.d + r % GROUP;
            for (int64_t i = 0; i < c.d; i++) to[i * GROUP] = from[i] * scale;
        }
        return !rows.empty();
    }

    // Calls process() for each full tile of the list and end() after each block of an early-stopping one.
    template <class Process, class End>
    void walk(int64_t t, Process process, End end) {
        const int64_t list = ((b % c.lists_b) * c.lists_h + rows[0].head * c.lists_h / c.H) * c.Tq + t;
        filled = pending = 0;
        auto flush = [&] {
            gather();
            if (filled) process();
            filled = 0;
        };
        for (int32_t i = 0; i < c.counts[list]; i++) {
            const int64_t block = c.indices[list * c.M + i], mask = c.mask_of ? c.mask_of[list * c.M + i] : -1;
            if (w.whole) {
                for (int64_t piece = 0; piece < w.per_block; piece++) {
                    const Panel one = w.laid_out(b, hk, block, piece, mask);
                    if (one.low > limit) continue;
                    tile[filled++] = one;
                    if (filled == PANELS) flush();
                }
            } else {
                const int64_t first = block * c.block_k, last = std::min(first + c.block_k, c.Nk);
                for (int64_t n = first; n < last; n++) {
                    const int64_t key = w.key_at(b, hk, n);
                    if (key > limit || !w.real(b, key)) continue;
                    token[filled][pending] = key, place[filled][pending] = (int32_t)key;
                    fine[filled][pending] = mask < 0 ? -1 : mask * c.block_q * c.block_k + n - first;
                    if (++pending == PANEL) gather();
                    if (filled == PANELS) flush();
                }
            }
            if (c.stop >= 0) {
                flush();
                if (end()) break;
            }
        }
        flush();
    }

    void gather() {
        if (!pending) return;
        const float *keys[PANEL], *values[PANEL];
        for (int i = 0; i < PANEL; i++) {
            if (i >= pending) place[filled][i] = NEVER, fine[filled][i] = -1;
            const int64_t key = token[filled][i < pending ? i : 0];  // what stands in for a missing key is masked
            keys[i] = w.key_row(b, hk, key), values[i] = w.value_row(b, hk, key);
        }
        Panel& one = tile[filled];
        float *a = kt.floats() + filled * PANEL * c.d, *x = v.floats() + filled * PANEL * w.ep;
        float *y = k.floats() + filled * PANEL * w.dp, *z = vt.floats() + filled * PANEL * c.e;
        columns(keys, c.d, a);
        if (!w.back) strips(values, PANEL, c.e, x);
        if (w.back) strips(keys, PANEL, c.d, y), columns(values, c.e, z);
        const int32_t* at = place[filled];
        one = {a, x, y, z, at, *std::min_element(at, at + PANEL), *std::max_element(at, at + PANEL), nullptr, 0,
               c.mask_of ? fine[filled] : nullptr, -1, token[filled], pending};
        filled++, pending = 0;
    }

    // s[r][slot]: scores of a band's R rows with a panel or two.
    template <int R, int N>
    INLINE void scores(const float* a, const float* x, const float* y, int64_t length, float* s, float* s2) const {
        vfloat acc[R][N * SUB];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < N * SUB; j++) acc[r][j] = vfloat{};
        multiply<R, N, 1, GROUP, PANEL>(acc, a, x, y - x, length);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < N * SUB; j++) store((j < SUB ? s : s2) + r * LINE + j % SUB * WIDTH, acc[r][j]);
    }
    // Of all n panels that `slots` names: `kt` (or `vt`) of each, a: [length][8].
    template <int R>
    inline void all_scores(const float* a, const float* Panel::*side, int64_t length, const int* slots, int n, float* s) const {
        int i = 0;
        for (; i + PAIR <= n; i += PAIR) {
            const int x = slots[i], y = slots[i + PAIR - 1];
            scores<R, PAIR>(a, tile[x].*side, tile[y].*side, length, s + x * PANEL, s + y * PANEL);
        }
        if (PAIR > 1 && i < n)
            scores<R, 1>(a, tile[slots[i]].*side, tile[slots[i]].*side, length, s + slots[i] * PANEL, nullptr);
    }

    // Scores that a band may not see become -inf.
    inline void hide(const Band& band, const Panel& one, float* s) const {
        for (int r = 0; r < band.rows; r++, s += LINE) {
            const Row& row = rows[band.first + r];
            for (int i = 0; i < PANEL; i++) s[i] = one.place[i] <= row.limit ? s[i] : -INF;
            const int64_t at = row.inside * c.block_k;
            if (one.bytes)
                for (int i = 0; i < one.width; i++) s[i] = one.bytes[at + i] ? s[i] : -INF;
            if (one.fine)
                for (int i = 0; i < PANEL; i++) s[i] = one.fine[i] < 0 || c.masks[one.fine[i] + at] ? s[i] : -INF;
        }
    }
    // Which panels of the tile a band sees; their number.
    inline int seen(const Band& band, int* slots) const {
        int n = 0;
        for (int i = 0; i < filled; i++)
            if (tile[i].low <= band.high) slots[n++] = i;
        return n;
    }
    inline bool partly(const Band& band, const Panel& one) const { return one.high > band.low || one.bytes || one.fine; }
};

struct Forward : Rows {
    Buffer o, l, done, s;            // [rows][e], [rows][WIDTH] of this and of earlier blocks, [ROWS][LINE]
    std::vector<float> base, ceiling;  // what is subtracted from a row's scores, and where that changes

    explicit Forward(const Work& w)
        : Rows(w), o(w.most * w.ep), l(w.most * WIDTH), done(w.most * WIDTH), s(ROWS * LINE), base(w.most), ceiling(w.most) {}

    void run(int64_t t) {
        const int64_t n = rows.size();
        memset(o.floats(), 0, n * w.ep * 4), memset(l.floats(), 0, n * WIDTH * 4), memset(done.floats(), 0, n * WIDTH * 4);
        std::fill(base.begin(), base.end(), 0.f), std::fill(ceiling.begin(), ceiling.end(), -INF);
        walk(t, [&] { process(); }, [&] { return small(); });
        for (int64_t r = 0; r < n; r++) {
            const float total = sum(load(l.floats() + r * WIDTH) + load(done.floats() + r * WIDTH));
            const bool none = ceiling[r] == -INF && total == 0;
            const int64_t at = (b * c.H + rows[r].head) * c.Nq + rows[r].query;
            const float* from = o.floats() + r * w.ep;
            const float inverse = none ? 0.f : 1.f / total;
            for (int64_t i = 0; i < c.e; i++) c.out[at * c.e + i] = from[i] * inverse;
            c.lse[at] = none ? -INF : (base[r] + std::log2(total)) * LN2;
        }
    }

    // Whether no row gave the last block a share of `stop`.
    bool small() {
        float largest = 0;
        for (size_t r = 0; r < rows.size(); r++) {
            const vfloat now = load(l.floats() + r * WIDTH), before = load(done.floats() + r * WIDTH);
            const float part = sum(now), total = part + sum(before);
            if (total > 0) largest = std::max(largest, part / total);
            store(done.floats() + r * WIDTH, now + before), store(l.floats() + r * WIDTH, vfloat{});
        }
        return largest < c.stop;
    }

    void process() {
        for (const Band& band : bands) switch (band.rows) {
#if ROWS >= 8
                case 8: step<8>(band); break;
#endif
                case 4: step<4>(band); break;
                case 2: step<2>(band); break;
                default: step<1>(band);
            }
    }

    void grow(int r, vfloat top) {
        float highest = top[0];
        for (int i = 1; i < WIDTH; i++) highest = std::max(highest, top[i]);
        if (ceiling[r] > -INF) {
            const vfloat shrink = splat(std::exp2(base[r] - highest));
            float *sums = l.floats() + r * WIDTH, *before = done.floats() + r * WIDTH, *out = o.floats() + r * w.ep;
            store(sums, load(sums) * shrink), store(before, load(before) * shrink);
            for (int64_t i = 0; i < w.ep; i += WIDTH) store(out + i, load(out + i) * shrink);
        }
        base[r] = highest, ceiling[r] = highest + LAG;
    }

    template <int R>
    void step(const Band& band) {
        int slots[PANELS];
        const int n = seen(band, slots), first = band.first;
        if (!n) return;
        float* const at = s.floats();
        all_scores<R>(q.floats() + first / GROUP * GROUP * c.d + first % GROUP, &Panel::kt, c.d, slots, n, at);
        const float* values[PANELS];
        for (int i = 0; i < n; i++) {
            const Panel& one = tile[slots[i]];
            values[i] = one.v;
            if (partly(band, one)) hide(band, one, at + slots[i] * PANEL);
        }
        for (int r = 0; r < R; r++) {
            vfloat top = splat(-INF);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < PANEL; j += WIDTH) {
                    const vfloat x = load(at + r * LINE + slots[i] * PANEL + j);
                    top = x > top ? x : top;
                }
            if (any_above(top, ceiling[first + r])) grow(first + r, top);
        }
        for (int r = 0; r < R; r++) {
            const vfloat minus = splat(base[first + r]);
            float* const sums = l.floats() + (first + r) * WIDTH;
            vfloat total = load(sums);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < PANEL; j += WIDTH) {
                    float* const x = at + r * LINE + slots[i] * PANEL + j;
                    const vfloat p = exp2v(load(x) - minus);
                    total += p;
                    store(x, p);
                }
            store(sums, total);
        }
        add_strips<R, LINE, 1>(o.floats() + first * w.ep, w.ep, at, slots, values, n, PANEL);
    }
};

}  // namespace

extern "C" void hasten_block_attention(const Call* call) {
    const Call& c = *call;
    const Work w(c, false);
    const int64_t heads = c.H / w.group, tasks = c.B * heads * c.Tq * w.pieces;
#pragma omp parallel num_threads(c.threads)
    {
        Forward rows(w);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t t = c.Tq - 1 - i / w.pieces % c.Tq, h = i / w.pieces / c.Tq % heads * w.group;
            if (rows.take(i / w.pieces / c.Tq / heads, h, t, i % w.pieces)) rows.run(t);
        }
    }
}
