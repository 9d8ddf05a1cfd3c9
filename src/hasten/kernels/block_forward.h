// The softmax of some rows over the panels that they meet, tile by tile (FlashAttention-2).
#pragma once
#include "block_rows.h"

namespace {

constexpr float LAG = 8;  // how far a maximum may be behind, as a power of two

struct Forward : Rows {
    Buffer o, l, done, s;            // [rows][e], [rows][WIDTH] of this and of earlier blocks, [ROWS][LINE]
    std::vector<float> base, ceiling;  // what is subtracted from a row's scores, and where that changes

    explicit Forward(const Work& w)
        : Rows(w), o(w.most * w.ep), l(w.most * WIDTH), done(w.most * WIDTH), s(ROWS * LINE), base(w.most), ceiling(w.most) {}

    void run(int64_t t) {
        begin();
        turn_queries();
        walk(t, [&] { process(); }, [&] { return small(); });
        end();
    }

    void end() {
        for (size_t r = 0; r < rows.size(); r++) finish(r, c.out + place_of(rows[r]) * c.e, c.lse + place_of(rows[r]));
    }

    void begin() {
        const int64_t n = rows.size();
        memset(o.floats(), 0, n * w.ep * 4), memset(l.floats(), 0, n * WIDTH * 4), memset(done.floats(), 0, n * WIDTH * 4);
        std::fill(base.begin(), base.end(), 0.f), std::fill(ceiling.begin(), ceiling.end(), -INF);
    }

    void process() {
        for_bands([&](auto r, const Band& band) { step<r>(band); });
    }

    void finish(int64_t r, float* out, float* lse) const {
        const float total = sum(load(l.floats() + r * WIDTH) + load(done.floats() + r * WIDTH));
        const bool none = ceiling[r] == -INF && total == 0;
        const float inverse = none ? 0.f : 1.f / total;
        for (int64_t i = 0; i < c.e; i++) out[i] = o.floats()[r * w.ep + i] * inverse;
        *lse = none ? -INF : (base[r] + std::log2(total)) * LN2;
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

    // Scores of R rows with n panels, which lie at slot(i), to their weights against the rows' running maxima.
    template <int R, class Slot>
    INLINE void weights(int first, int n, Slot slot) {
        float* const at = s.floats();
        for (int r = 0; r < R; r++) {
            vfloat top = splat(-INF);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < PANEL; j += WIDTH) {
                    const vfloat x = load(at + r * LINE + slot(i) * PANEL + j);
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
                    float* const x = at + r * LINE + slot(i) * PANEL + j;
                    const vfloat p = exp2v(load(x) - minus);
                    total += p;
                    store(x, p);
                }
            store(sums, total);
        }
    }

    template <int R>
    void step(const Band& band) {
        int slots[PANELS];
        const int n = seen(band, slots), first = band.first;
        if (!n) return;
        float* const at = s.floats();
        all_scores<R>(at_row(q, first, c.d), &Panel::kt, c.d, slots, n, at);
        const float* values[PANELS];
        for (int i = 0; i < n; i++) {
            const Panel& one = tile[slots[i]];
            values[i] = one.v;
            if (partly(band, one)) hide(band, one, at + slots[i] * PANEL);
        }
        weights<R>(first, n, [&](int i) { return slots[i]; });
        add_strips<R, LINE, 1>(o.floats() + first * w.ep, w.ep, at, slots, values, n, PANEL);
    }
};

}  // namespace
