// Block-sparse attention, forward and backward, in fp32 (contract: kernels/block_attention.py). A thread takes some rows of
// queries at a time (64, the heads that share a list together) and walks their list of key blocks in tiles of PANELS panels
// of 16 keys. Keys lie transposed, [d][16] a panel, and values in strips of the product's width, so both products run from
// registers: ROWS queries times PAIR panels. The softmax is FlashAttention-2's; its maximum follows only when it is more than
// 2^8 behind, so most tiles rescale nothing. Panels seen whole are never tested against a mask, panels not seen are skipped.
// Where blocks are visited often, keys and values are laid out once, in the order of the blocks; else (single tokens, few
// queries) tile by tile. Plain C interface over raw pointers; built by hasten/kernels/native.py.
#include "block_few.h"

namespace {

// Recomputes p = softmax(s) from the log-sum-exp; with dp = do v^T and delta = do o - d(log-sum-exp):
//   ds = p (dp - delta),  dq = scaling ds k,  dk = scaling ds^T q,  dv = p^T do
struct Backward : Rows {
    Buffer g, q_strips, g_strips;  // do like q; q unscaled and do as right sides of products
    Buffer p, s, dq, part_k, part_v;  // [rows][LINE] twice, [rows][d], a gathered panel's sums [16][d], [16][e]
    std::vector<float> log, delta;
    std::vector<const float*> from_g;
    float *dk = nullptr, *dv = nullptr;  // sums of this kv head, [keys as they lie][d], [keys][e]
    int64_t first_panel = 0;

    explicit Backward(const Work& w)
        : Rows(w), g(w.most * c.e), q_strips(w.most * w.dp), g_strips(w.most * w.ep), p(w.most * LINE), s(w.most * LINE),
          dq(w.most * w.dp), part_k(PANEL * w.dp), part_v(PANEL * w.ep), log(w.most), delta(w.most) {}

    void run(int64_t t) {
        const int64_t n = rows.size();
        turn_queries();
        from_g.clear();
        for (int64_t r = 0; r < n; r++) {
            const int64_t at = place_of(rows[r]);
            const float *grad = c.dout + at * c.e, *out = c.out + at * c.e;
            from_g.push_back(grad);
            log[r] = c.lse[at] > -INF ? c.lse[at] * LOG2E : INF;  // a row that sees nothing has no probabilities
            float total = c.dlse && c.lse[at] > -INF ? -c.dlse[at] : 0.f;
            for (int64_t i = 0; i < c.e; i++) total += grad[i] * out[i];
            delta[r] = total;
        }
        turn(from_g, c.e, 1.f, g);
        strips(from_q.data(), n, c.d, q_strips.floats()), strips(from_g.data(), n, c.e, g_strips.floats());
        memset(dq.floats(), 0, n * w.dp * 4);
        auto process = [&] {
            for_bands([&](auto r, const Band& band) { step<r>(band); });
            for (int i = 0; i < filled; i++) keys(i);
        };
        walk(t, process, [] { return false; });
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < c.d; i++)
                c.dq[place_of(rows[r]) * c.d + i] = dq.floats()[r * w.dp + i] * (float)c.scaling;
    }

    template <int R>
    void step(const Band& band) {
        int slots[PANELS];
        const int n = seen(band, slots), first = band.first;
        float *const probs = p.floats() + first * LINE, *const scores = s.floats() + first * LINE;
        if (n < filled) memset(probs, 0, R * LINE * 4), memset(scores, 0, R * LINE * 4);
        if (!n) return;
        all_scores<R>(at_row(q, first, c.d), &Panel::kt, c.d, slots, n, probs);
        all_scores<R>(at_row(g, first, c.e), &Panel::vt, c.e, slots, n, scores);
        const float* right[PANELS];
        for (int i = 0; i < n; i++) {
            const Panel& one = tile[slots[i]];
            right[i] = one.k;
            if (partly(band, one)) hide(band, one, probs + slots[i] * PANEL);
        }
        for (int r = 0; r < R; r++) {
            const vfloat minus = splat(log[first + r]), less = splat(delta[first + r]);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < PANEL; j += WIDTH) {
                    float *const x = probs + r * LINE + slots[i] * PANEL + j, *const y = scores + (x - probs);
                    const vfloat weight = exp2v(load(x) - minus);
                    store(x, weight), store(y, weight * (load(y) - less));
                }
        }
        add_strips<R, LINE, 1>(dq.floats() + first * w.dp, w.dp, scores, slots, right, n, PANEL);
    }

    // What the rows give to the keys of a panel.
    void keys(int slot) {
        const Panel& one = tile[slot];
        const bool own = one.id >= 0;
        float* to_k = own ? dk + (one.id - first_panel) * PANEL * w.dp : part_k.floats();
        float* to_v = own ? dv + (one.id - first_panel) * PANEL * w.ep : part_v.floats();
        if (!own) memset(to_k, 0, PANEL * w.dp * 4), memset(to_v, 0, PANEL * w.ep * 4);
        const float *right_k[] = {q_strips.floats()}, *right_v[] = {g_strips.floats()};
        for (int i = 0; i < PANEL; i += ROWS) {
            add_strips<ROWS, 1, LINE>(to_v + i * w.ep, w.ep, p.floats() + i, &slot, right_v, 1, rows.size());
            add_strips<ROWS, 1, LINE>(to_k + i * w.dp, w.dp, s.floats() + i, &slot, right_k, 1, rows.size());
        }
        for (int i = 0; !own && i < one.count; i++) {
            for (int64_t j = 0; j < w.dp; j++) dk[one.tokens[i] * w.dp + j] += to_k[i * w.dp + j];
            for (int64_t j = 0; j < w.ep; j++) dv[one.tokens[i] * w.ep + j] += to_v[i * w.ep + j];
        }
    }
};

}  // namespace

extern "C" void hasten_block_attention(const Call* call) {
    const Call& c = *call;
    const Work w(c, false);
    const int64_t heads = c.H / w.group, tasks = c.B * heads * c.Tq * w.pieces;
#pragma omp parallel num_threads(c.threads)
    {
        Few rows(w);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t t = c.Tq - 1 - i / w.pieces % c.Tq, h = i / w.pieces / c.Tq % heads * w.group;
            if (rows.take(i / w.pieces / c.Tq / heads, h, t, i % w.pieces)) rows.run(t);
        }
    }
}

// A key/value head's gradients are one thread's to sum; where there are fewer heads than threads, the query blocks of a head
// are dealt to several sums, which are added at the end. The result depends on the number of threads alone.
extern "C" void hasten_block_attention_backward(const Call* call) {
    const Call& c = *call;
    const Work w(c, true);
    const int64_t lanes = c.B * c.Hk, splits = lanes % c.threads == 0 || lanes >= 4 * c.threads ? 1 : c.threads;
    const int64_t keys = w.whole ? w.panels * PANEL : c.Nk, groups = c.H / c.Hk / w.group, units = groups * c.Tq * w.pieces;
    Buffer dk(lanes * splits * keys * w.dp), dv(lanes * splits * keys * w.ep);
#pragma omp parallel num_threads(c.threads)
    {
        Backward rows(w);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < lanes * splits; i++) {
            const int64_t lane = i / splits, b = lane / c.Hk, first = lane % c.Hk * (c.H / c.Hk);
            rows.dk = dk.floats() + i * keys * w.dp, rows.dv = dv.floats() + i * keys * w.ep, rows.first_panel = lane * w.panels;
            memset(rows.dk, 0, keys * w.dp * 4), memset(rows.dv, 0, keys * w.ep * 4);
            for (int64_t u = i % splits; u < units; u += splits) {
                const int64_t t = u / w.pieces % c.Tq, h = first + u / w.pieces / c.Tq * w.group;
                if (rows.take(b, h, t, u % w.pieces)) rows.run(t);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < lanes * c.Nk; i++) memset(c.dk + i * c.d, 0, c.d * 4), memset(c.dv + i * c.e, 0, c.e * 4);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < lanes * keys; i++) {
            const int64_t lane = i / keys, key = w.whole ? w.place[i] : i % keys;
            if (key == NEVER) continue;
            float *to_k = c.dk + (lane * c.Nk + key) * c.d, *to_v = c.dv + (lane * c.Nk + key) * c.e;
            for (int64_t part = 0; part < splits; part++) {
                const int64_t at = (lane * splits + part) * keys + i % keys;
                for (int64_t j = 0; j < c.d; j++) to_k[j] += dk.floats()[at * w.dp + j] * (float)c.scaling;
                for (int64_t j = 0; j < c.e; j++) to_v[j] += dv.floats()[at * w.ep + j];
            }
        }
    }
}
