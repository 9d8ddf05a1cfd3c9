// y (+)= x S^T for a sparse S in compressed rows (contract: kernels/csr.py). One row of x: each sum gathers from x. More: 16 of
// them are turned into [K][16] once, and a number of S is multiplied with 16 neighbours at a time. Built by hasten/kernels/native.py.
#include "vectors.h"

extern "C" struct Sparse {  // kernels/csr.py has the same fields
    const void* values;     // [n], of `kind` 0 fp32, 1 bf16, 2 fp16
    const void* columns;    // [n], uint16 where `narrow`, else int32
    const int32_t* starts;  // [rows + 1]
    const float* x;         // [count, width]
    float* y;               // [count, rows]
    int64_t kind, narrow, count, rows, width, add, threads;
};

namespace {

constexpr int64_t CHUNK = 512;  // numbers of a row widened at a time

#ifdef __AVX512F__
INLINE __m512i sixteen(const int32_t* from, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, from); }
INLINE __m512i sixteen(const uint16_t* from, __mmask16 some) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
}
INLINE __m512 numbers(const Sparse& s, int64_t i, __mmask16 some) {
    if (s.kind == 0) return _mm512_maskz_loadu_ps(some, (const float*)s.values + i);
    const __m256i bits = _mm256_maskz_loadu_epi16(some, (const uint16_t*)s.values + i);
    if (s.kind == 2) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif

template <class Index>
struct Rows {
    const Sparse& s;
    float wide[CHUNK];

    explicit Rows(const Sparse& s) : s(s) {}

    // fn(values, columns, n) for parts of one row.
    template <class Fn>
    INLINE void row(int64_t r, Fn fn) {
        for (int64_t i = s.starts[r]; i < s.starts[r + 1]; i += CHUNK) {
            const int64_t n = std::min<int64_t>(CHUNK, s.starts[r + 1] - i);
            const float* values = (const float*)s.values + i;
            if (s.kind) {
#ifdef __AVX512F__
                for (int64_t j = 0; j < n; j += 16)
                    _mm512_storeu_ps(wide + j, numbers(s, i + j, n - j >= 16 ? 0xffff : (1 << (n - j)) - 1));
#else
                widen((const uint16_t*)s.values + i, n, s.kind, wide);
#endif
                values = wide;
            }
            fn(values, (const Index*)s.columns + i, n);
        }
    }

    void single(int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            float total = s.add ? s.y[r] : 0.f;
#ifdef __AVX512F__
            __m512 sums = _mm512_setzero_ps();
            for (int64_t i = s.starts[r], end = s.starts[r + 1]; i < end; i += 16) {
                const __mmask16 some = end - i >= 16 ? 0xffff : (1 << (end - i)) - 1;
                const __m512i at = sixteen((const Index*)s.columns + i, some);
                const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, s.x, 4);
                sums = _mm512_fmadd_ps(numbers(s, i, some), x, sums);
            }
            total += _mm512_reduce_add_ps(sums);
#else
            row(r, [&](const float* values, const Index* columns, int64_t n) {
                float part[4] = {};
                for (int64_t i = 0; i < n; i++) part[i % 4] += values[i] * s.x[columns[i]];
                total += (part[0] + part[1]) + (part[2] + part[3]);
            });
#endif
            s.y[r] = total;
        }
    }

    // Rows from `first` to before `last` for the 16 rows of x from m on, which are turned.
    void many(int64_t first, int64_t last, const float* turned, int64_t m) {
        const int64_t have = std::min<int64_t>(PANEL, s.count - m);
        float tile[PANEL][PANEL], back[PANEL * PANEL];
        for (int64_t r = first; r < last; r += PANEL) {
            const int64_t rows = std::min<int64_t>(PANEL, last - r);
            for (int64_t j = 0; j < rows; j++) {
                vfloat acc[SUB] = {};
                row(r + j, [&](const float* values, const Index* columns, int64_t n) {
                    for (int64_t i = 0; i < n; i++)
                        for (int c = 0; c < SUB; c++)
                            acc[c] += splat(values[i]) * load(turned + (int64_t)columns[i] * PANEL + c * WIDTH);
                });
                for (int c = 0; c < SUB; c++) store(tile[j] + c * WIDTH, acc[c]);
            }
            const float* at[PANEL];
            for (int64_t j = 0; j < PANEL; j++) at[j] = tile[std::min(j, rows - 1)];
            ::columns(at, PANEL, back);
            for (int64_t i = 0; i < have; i++) {
                float* y = s.y + (m + i) * s.rows + r;
                for (int64_t j = 0; j < rows; j++) y[j] = (s.add ? y[j] : 0.f) + back[i * PANEL + j];
            }
        }
    }
};

template <class Index>
void work(const Sparse& s) {
    const int64_t pieces = s.threads <= 1 ? 1 : s.threads * 4, span = round_up((s.rows + pieces - 1) / pieces, PANEL);
    if (s.count == 1) {
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1)
        for (int64_t p = 0; p < pieces; p++) Rows<Index>(s).single(p * span, std::min(s.rows, (p + 1) * span));
        return;
    }
    const int64_t panels = (s.count + PANEL - 1) / PANEL;
    Buffer turned(panels * s.width * PANEL);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            const float* at[PANEL];
            for (int64_t j = 0; j < PANEL; j++) at[j] = s.x + std::min(p * PANEL + j, s.count - 1) * s.width;
            columns(at, s.width, turned.floats() + p * s.width * PANEL);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < pieces * panels; t++) {
            const int64_t first = t / panels * span, p = t % panels;
            Rows<Index>(s).many(first, std::min(s.rows, first + span), turned.floats() + p * s.width * PANEL, p * PANEL);
        }
    }
}

}  // namespace

extern "C" void hasten_csr(const Sparse* s) { (s->narrow ? work<uint16_t> : work<int32_t>)(*s); }
