// The rows of queries that a thread takes, their lists of key blocks and the panels of keys that these name.
#pragma once
#include "vectors.h"

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
    int64_t half;          // gathered keys and values: 0 fp32, 1 bf16, 2 fp16
};

namespace {

constexpr int PANELS = 8, LINE = PANELS * PANEL, MOST = 64;  // panels and keys of a tile, rows that a thread takes
constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();

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
          most(round_up((group * std::min(c.block_q, c.Nq) + pieces - 1) / pieces, PANEL)),
          per_block((c.block_k + PANEL - 1) / PANEL), panels(num_panels(c)), whole(worth(c)), kt(room(c, c.d)),
          v(back ? 0 : room(c, ep)), k(back ? room(c, dp) : 0), vt(back ? room(c, c.e) : 0) {
        if (whole) lay_out();
    }

    int64_t key_at(int64_t b, int64_t hk, int64_t place) const {
        return c.k_order ? c.k_order[((b % c.ko_b) * c.ko_h + hk * c.ko_h / c.Hk) * c.Nk + place] : place;
    }
    static int64_t offset(const int64_t* strides, int64_t b, int64_t h, int64_t n) {
        return b * strides[0] + h * strides[1] + n * strides[2];
    }
    const float* key_row(int64_t b, int64_t h, int64_t n) const { return c.k + offset(c.k_strides, b, h, n); }
    const float* value_row(int64_t b, int64_t h, int64_t n) const { return c.v + offset(c.v_strides, b, h, n); }
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
    std::vector<const float*> from_q;
    Buffer q, flat, kt, v, k, vt, wide;

    explicit Rows(const Work& w)
        : w(w), c(w.c), q(w.most * c.d), flat(PANEL * std::max(c.d, c.e), true), kt(w.whole ? 0 : LINE * c.d), v(w.whole || w.back ? 0 : LINE * w.ep),
          k(!w.whole && w.back ? LINE * w.dp : 0), vt(!w.whole && w.back ? LINE * c.e : 0),
          wide(c.half ? PANEL * (c.d + c.e) : 0) {}

    const float* query_row(const Row& row) const {
        return c.q + b * c.q_strides[0] + row.head * c.q_strides[1] + row.query * c.q_strides[2];
    }
    int64_t place_of(const Row& row) const { return (b * c.H + row.head) * c.Nq + row.query; }  // in contiguous [B, H, Nq]

    // Rows of n numbers to [n][16] for each 16 of them.
    void turn(const std::vector<const float*>& from, int64_t n, float scale, const Buffer& to) const {
        const float* sixteen[PANEL];
        for (size_t first = 0; first < from.size(); first += PANEL) {
            for (size_t r = 0; r < PANEL; r++) {
                float* copy = flat.floats() + r * n;
                sixteen[r] = copy;
                if (first + r < from.size())
                    for (int64_t i = 0; i < n; i++) copy[i] = from[first + r][i] * scale;
            }
            columns(sixteen, n, to.floats() + first * n);
        }
    }
    void turn_queries() {
        from_q.clear();
        for (const Row& row : rows) from_q.push_back(query_row(row));
        turn(from_q, c.d, (float)(c.scaling * LOG2E), q);
    }
    static const float* at_row(const Buffer& groups, int64_t r, int64_t n) {
        return groups.floats() + r / PANEL * PANEL * n + r % PANEL;
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
        return !rows.empty();
    }

    int64_t list_of(int64_t t) const { return ((b % c.lists_b) * c.lists_h + rows[0].head * c.lists_h / c.H) * c.Tq + t; }

    // Calls process() for each full tile of the list and end() after each block of an early-stopping one.
    template <class Process, class End>
    void walk(int64_t t, Process process, End end) {
        const int64_t list = list_of(t);
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
            if (!c.half) continue;
            widen(w.offset(c.k_strides, b, hk, key) + (const uint16_t*)c.k, c.d, c.half, wide.floats() + i * c.d);
            widen(w.offset(c.v_strides, b, hk, key) + (const uint16_t*)c.v, c.e, c.half, wide.floats() + PANEL * c.d + i * c.e);
            keys[i] = wide.floats() + i * c.d, values[i] = wide.floats() + PANEL * c.d + i * c.e;
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
        multiply<R, N, 1, PANEL, PANEL>(acc, a, x, y - x, length);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < N * SUB; j++) store((j < SUB ? s : s2) + r * LINE + j % SUB * WIDTH, acc[r][j]);
    }
    // Of all n panels that `slots` names: `kt` (or `vt`) of each, a: [length][16].
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
    // Calls step(rows as a constant, band) for each band.
    template <class Step>
    inline void for_bands(Step step) const {
        for (const Band& band : bands) switch (band.rows) {
#if ROWS >= 8
                case 8: step(std::integral_constant<int, 8>(), band); break;
#endif
                case 4: step(std::integral_constant<int, 4>(), band); break;
                case 2: step(std::integral_constant<int, 2>(), band); break;
                default: step(std::integral_constant<int, 1>(), band);
            }
    }
    inline bool partly(const Band& band, const Panel& one) const { return one.high > band.low || one.bytes || one.fine; }
};

}  // namespace
