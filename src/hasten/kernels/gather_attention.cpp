// Attention of a few queries over listed tokens (contract: kernels/gather_attention.py): what decoding costs is reading keys and
// values, so each is read once for all queries of the heads that share a list, from where it lies, in its own dtype. Lists are cut
// into parts of CHUNK tokens that threads take in any order; the parts are put together by their log-sum-exp, so the result does
// not depend on the number of threads. Built by hasten/kernels/native.py.
#include "block_few.h"

extern "C" struct Lists {  // kernels/gather_attention.py has the same fields
    const int32_t* rows;     // [rows_b, rows_h, M], tokens of the head; null: all of them
    const int64_t* starts;   // [B, Hk], a head's first slot of flat storage; null: none
    const int64_t* lengths;  // [B, rows_h], of the lists
    int64_t rows_b, rows_h, M, longest;
};

namespace {

constexpr int64_t CHUNK = 1024;  // tokens of a part

struct Gather : Few {
    const Lists& lists;

    Gather(const Work& w, const Lists& lists) : Few(w), lists(lists) {}

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
        if (rows.size() <= FEW) return span(first, last, 0, at);
        turn_queries();
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
