// Attention of a few queries over listed tokens (contract: kernels/gather_attention.py): what decoding costs is reading keys and
// values, so each is read once for all queries of the heads that share a list, from where it lies, in its own dtype. Lists are cut
// into parts of CHUNK tokens that threads take in any order; the parts are put together by their log-sum-exp, so the result does
// not depend on the number of threads. Built by hasten/kernels/native.py.
#include "block_forward.h"

extern "C" struct Lists {  // kernels/gather_attention.py has the same fields
    const int32_t* rows;     // [rows_b, rows_h, M], tokens of the head; null: all of them
    const int64_t* starts;   // [B, Hk], a head's first slot of flat storage; null: none
    const int64_t* lengths;  // [B, rows_h], of the lists
    int64_t rows_b, rows_h, M, longest;
};

namespace {

constexpr int64_t CHUNK = 1024;       // tokens of a part
constexpr int FEW = 8, TILE = 64;  // rows that read keys as they lie; tokens of a tile at most
constexpr int AHEAD = 16;          // tokens that are fetched before their turn

INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

// The sums of 16 vectors.
INLINE void sums16(const float* from, float* to) {
#ifdef __AVX512F__
    const float* rows[PANEL];
    alignas(64) float turned[PANEL * PANEL];
    for (int i = 0; i < PANEL; i++) rows[i] = from + i * WIDTH;
    transpose16(rows, turned);
    vfloat total[4] = {};
    for (int i = 0; i < PANEL; i += 4)
        for (int j = 0; j < 4; j++) total[j] += load(turned + (i + j) * PANEL);
    store(to, (total[0] + total[1]) + (total[2] + total[3]));
#else
    for (int i = 0; i < PANEL; i++) to[i] = sum(load(from + i * WIDTH));
#endif
}

struct Gather : Forward {
    const Lists& lists;
    const int64_t size;                 // bytes of a number
    const float *keys[TILE], *values[TILE];  // rows padded to whole vectors
    const char *at_keys[TILE + AHEAD], *at_values[TILE + AHEAD];  // where the rows of a tile and the ones after it lie
    Buffer plain, wide_k, wide_v, part_sums;  // queries [rows][d]; rows that had to be copied; [FEW][16][WIDTH]

    Gather(const Work& w, const Lists& lists)
        : Forward(w), lists(lists), size(c.half ? 2 : 4), plain(FEW * w.dp), wide_k(TILE * w.dp), wide_v(TILE * w.ep),
          part_sums(FEW * PANEL * WIDTH) {}

    const char* raw(const float* base, const int64_t* strides, int64_t token) const {
        return (const char*)base + w.offset(strides, b, hk, token) * size;
    }

    // Row i of a tile in fp32, padded with zeros; where it lies if it is so already.
    const float* ready(const char* row, int64_t n, int64_t padded, const Buffer& room, int i) const {
        if (!c.half && n == padded) return (const float*)row;
        float* to = room.floats() + i * padded;
        if (c.half) widen((const uint16_t*)row, n, c.half, to);
        else memcpy(to, row, n * 4);
        memset(to + n, 0, (padded - n) * 4);
        return to;
    }

    // The softmax over tokens from `first` to before `last` of the list of `head`.
    void run(int64_t head, int64_t first, int64_t last) {
        const int64_t length = lists.lengths[b * lists.rows_h + head * lists.rows_h / c.H];
        const int32_t* list = lists.rows;
        if (list) list += ((b % lists.rows_b) * lists.rows_h + head * lists.rows_h / c.H) * lists.M;
        const int64_t start = lists.starts ? lists.starts[b * c.Hk + hk] : 0;
        for (Band& band : bands) {
            band.low = NEVER, band.high = -1;
            for (int r = band.first; r < band.first + band.rows; r++) {
                rows[r].limit = (int32_t)(length - c.Nq + rows[r].query);  // the last tokens are the queries' own
                band.low = std::min(band.low, rows[r].limit), band.high = std::max(band.high, rows[r].limit);
            }
        }
        begin();
        last = std::min(last, length);
        auto at = [&](int64_t i) { return start + (list ? list[i] : i); };
        if (rows.size() <= FEW) {
            for (size_t r = 0; r < rows.size(); r++) {
                memset(plain.floats() + r * w.dp, 0, w.dp * 4);
                for (int64_t i = 0; i < c.d; i++) plain.floats()[r * w.dp + i] = query_row(rows[r])[i] * (float)(c.scaling * LOG2E);
            }
            const int64_t step = rows.size() <= 2 || c.half ? PANEL : TILE;  // small tiles mix reading and computing best
            for (int64_t i = first; i < last; i += step) tile_of(i, (int)std::min(step, last - i), last, at);
            return;
        }
        filled = pending = 0;
        for (int64_t i = first; i < last; i++) {
            token[filled][pending] = at(i), place[filled][pending] = (int32_t)i;
            const int64_t soon = at(std::min(i + AHEAD, last - 1));
            fetch(raw(c.k, c.k_strides, soon), c.d * size), fetch(raw(c.v, c.v_strides, soon), c.e * size);
            if (++pending == PANEL) gather();
            if (filled == PANELS) process(), filled = 0;
        }
        gather();
        if (filled) process();
    }

    template <class At>
    void tile_of(int64_t first, int n, int64_t last, At at) {
        for (int i = 0; i < n + AHEAD; i++) {
            const int64_t token = at(std::min(first + i, last - 1));
            at_keys[i] = raw(c.k, c.k_strides, token), at_values[i] = raw(c.v, c.v_strides, token);
        }
        for (int i = 0; i < n; i++) keys[i] = ready(at_keys[i], c.d, w.dp, wide_k, i);
        for (int i = 0; i < n; i++) values[i] = ready(at_values[i], c.e, w.ep, wide_v, i);
        for (int i = n; i < round_up(n, PANEL); i++) keys[i] = keys[0];
        for_bands([&](auto r, const Band& band) { few<r>(band, first, n); });
    }

    template <int R>
    void few(const Band& band, int64_t start, int n) {
        float* const at = s.floats();
        const float* const query = plain.floats() + band.first * w.dp;
        const int whole = (int)round_up(n, PANEL);
        for (int i = 0; i < whole; i += PANEL) {
            for (int j = 0; j < PANEL; j++) {
                vfloat acc[R] = {};
                if (i + j < n) fetch(at_keys[i + j + AHEAD], c.d * size);
                for (int64_t k = 0; k < w.dp; k += WIDTH) {
                    const vfloat x = load(keys[i + j] + k);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) acc[r] = x * load(query + r * w.dp + k) + acc[r];
                }
                for (int r = 0; r < R; r++) store(part_sums.floats() + (r * PANEL + j) * WIDTH, acc[r]);
            }
            for (int r = 0; r < R; r++) sums16(part_sums.floats() + r * PANEL * WIDTH, at + r * LINE + i);
        }
        for (int r = 0; r < R; r++) {
            const int64_t seen = std::min<int64_t>(n, rows[band.first + r].limit - start + 1);
            for (int64_t i = std::max<int64_t>(0, seen); i < whole; i++) at[r * LINE + i] = -INF;
        }
        weights<R>(band.first, whole / PANEL, [](int i) { return i; });
        constexpr int W = R >= 8 ? 2 : R >= 4 ? 4 : 8;  // vectors of a value row at a time
        for (int64_t k = 0; k < w.ep; k += WIDTH * W) {
            if (k + WIDTH * W <= w.ep) add_values<R, W>(band.first, k, n);
            else
                for (int64_t j = k; j < w.ep; j += WIDTH) add_values<R, 1>(band.first, j, n);
        }
    }

    template <int R, int W>
    INLINE void add_values(int first, int64_t k, int n) {
        vfloat acc[R][W];
        float* const to = o.floats() + first * w.ep + k;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < W; j++) acc[r][j] = load(to + r * w.ep + j * WIDTH);
        for (int i = 0; i < n; i++) {
            vfloat x[W];
            if (k == 0) fetch(at_values[i + AHEAD], c.e * size);
            for (int j = 0; j < W; j++) x[j] = load(values[i] + k + j * WIDTH);
            for (int r = 0; r < R; r++) {
                const vfloat p = splat(s.floats()[r * LINE + i]);
                for (int j = 0; j < W; j++) acc[r][j] = p * x[j] + acc[r][j];
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < W; j++) store(to + r * w.ep + j * WIDTH, acc[r][j]);
    }
};

}  // namespace

extern "C" void hasten_gather_attention(const Call* call, const Lists* given) {
    const Call& c = *call;
    const Lists& lists = *given;
    const Work w(c, false);
    const int64_t heads = c.H / w.group, lanes = c.B * heads * w.pieces, rows_all = c.B * c.H * c.Nq;
    const int64_t parts = std::max<int64_t>(1, (lists.longest + CHUNK - 1) / CHUNK);
    Buffer outs(parts > 1 ? parts * rows_all * c.e : 0), logs(parts > 1 ? parts * rows_all : 0);
    float *const out = parts > 1 ? outs.floats() : c.out, *const log = parts > 1 ? logs.floats() : c.lse;
#pragma omp parallel num_threads(c.threads)
    {
        Gather rows(w, lists);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < lanes * parts; i++) {
            const int64_t lane = i / parts, part = i % parts, h = lane / w.pieces % heads * w.group;
            if (!rows.take(lane / w.pieces / heads, h, 0, lane % w.pieces)) continue;
            rows.run(h, part * CHUNK, (part + 1) * CHUNK);
            for (size_t r = 0; r < rows.rows.size(); r++) {
                const int64_t at = part * rows_all + rows.place_of(rows.rows[r]);
                rows.finish(r, out + at * c.e, log + at);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (parts > 1 ? rows_all : 0); i++) {
            float highest = -INF, total = 0;
            for (int64_t p = 0; p < parts; p++) highest = std::max(highest, log[p * rows_all + i]);
            memset(c.out + i * c.e, 0, c.e * 4);
            c.lse[i] = highest;
            if (highest == -INF) continue;
            for (int64_t p = 0; p < parts; p++) {
                const float share = std::exp(log[p * rows_all + i] - highest), *from = out + (p * rows_all + i) * c.e;
                total += share;
                for (int64_t j = 0; share > 0 && j < c.e; j++) c.out[i * c.e + j] += share * from[j];
            }
            for (int64_t j = 0; j < c.e; j++) c.out[i * c.e + j] /= total;
            c.lse[i] = highest + std::log(total);
        }
    }
}
