// The products of integers of lowbit_gemm.cpp, for AMX, AVX-512 VNNI and AVX2 (there up to 6 bits, where sums of two products fit
// 16 bits). A part is a run of columns of one group, at most 64.
#pragma once

namespace {

// A panel of x: codes [steps][16 columns / 4][16 tokens][4], the scales of its runs [steps][16], and scale times the sum of
// the codes of each part [steps][parts][16].
struct Rounded {
    int8_t* codes;
    float *scales, *sums;
    int64_t steps, parts;  // steps: of 64 columns

    int8_t* tile(int64_t t, int64_t step) const { return codes + (t * steps + step) * TILE; }
    float* scale(int64_t t, int64_t step) const { return scales + (t * steps + step) * LANES; }
    float* sum(int64_t t, int64_t step) const { return sums + (t * steps + step) * parts * LANES; }
};

// Rounds 64 numbers; NaN and infinity give a scale of NaN and codes of zero.
INLINE float round_run(const float* x, int n, int8_t* to) {
    int32_t part[STEP] = {}, most = 0;
    memcpy(part, x, 4 * n);
    for (int i = 0; i < STEP; i++) most = std::max(most, part[i] & 0x7fffffff);
    float top, numbers[STEP];
    memcpy(&top, &most, 4);
    memcpy(numbers, part, sizeof part);
    const bool finite = most < bits_of(std::numeric_limits<float>::infinity());
    const float inverse = !finite || top < LEAST ? 0.f : 127.f / top;
    for (int i = 0; i < STEP; i++) to[i] = finite ? (int8_t)(int32_t)std::rint(numbers[i] * inverse) : 0;
    return !finite ? std::numeric_limits<float>::quiet_NaN() : top < LEAST ? 0.f : top / 127.f;
}

void round_panel(const Product& p, int64_t first, int64_t t, const Rounded& x) {
    const int64_t tokens = std::min<int64_t>(LANES, p.count - first);
    const int part = STEP / (int)x.parts;
    alignas(64) int8_t codes[STEP];
    for (int64_t step = 0; step < x.steps; step++) {
        int8_t* tile = x.tile(t, step);
        for (int m = 0; m < LANES; m++) {
            const int64_t n = m < tokens ? std::min<int64_t>(STEP, std::max<int64_t>(0, p.columns - step * STEP)) : 0;
            const float scale = round_run(p.x + (first + m) * p.columns + step * STEP, (int)n, codes);
            x.scale(t, step)[m] = scale;
            for (int64_t i = 0; i < x.parts; i++) {
                int32_t sum = 0;
                for (int k = 0; k < part; k++) sum += codes[i * part + k];
                x.sum(t, step)[i * LANES + m] = scale * (float)sum;
            }
            for (int k = 0; k < STEP / 4; k++) memcpy(tile + k * STEP + 4 * m, codes + 4 * k, 4);
        }
    }
}

// sums[r] += scale of the row times (products * scale of x) - scale * zero * (sum of x), 16 tokens.
INLINE void add(vfloat* sums, const vint* products, const float* x_scale, const float* x_sum, float scale, float offset) {
    for (int i = 0; i < PARTS; i++) {
        const vfloat one = __builtin_convertvector(products[i], vfloat) * load<vfloat>(x_scale + i * WIDTH);
        sums[i] += splat(scale) * one - splat(offset) * load<vfloat>(x_sum + i * WIDTH);
    }
}

#ifdef __AMX_INT8__
struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    explicit Config(int part) {
        for (int set = 0; set < 2; set++) {
            bytes[set] = STEP, rows[set] = LANES;                                // sums [16 rows][16 tokens]
            bytes[4 + set] = (uint16_t)part, rows[4 + set] = LANES;              // W
            bytes[6 + set] = STEP, rows[6 + set] = (uint8_t)(part / 4);          // x
        }
    }
};

// The products of 16 rows with 16 tokens over one part, with one of two sets of tiles (whose numbers must be literals).
INLINE void tiles(bool second, const uint8_t* codes, const int8_t* x, int32_t* out) {
    if (!second) {
        _tile_zero(0);
        _tile_loadd(4, codes, STEP);
        _tile_loadd(6, x, STEP);
        _tile_dpbusd(0, 4, 6);
        _tile_stored(0, out, STEP);
    } else {
        _tile_zero(1);
        _tile_loadd(5, codes, STEP);
        _tile_loadd(7, x, STEP);
        _tile_dpbusd(1, 5, 7);
        _tile_stored(1, out, STEP);
    }
}
#endif

// The products of R rows with 16 tokens over `n` columns.
template <int R>
INLINE void products(const uint8_t* codes, const int8_t* x, int n, vint out[R][PARTS]) {
    for (int r = 0; r < R; r++)
        for (int i = 0; i < PARTS; i++) out[r][i] = vint{};
    for (int k = 0; k < n; k += 4)
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, codes + r * STEP + k, 4);
#ifdef __AVX512VNNI__
            out[r][0] = (vint)_mm512_dpbusd_epi32((__m512i)out[r][0], _mm512_set1_epi32(four), _mm512_loadu_si512(x + k * LANES));
#elif defined(__AVX512F__)
            const __m512i two = _mm512_maddubs_epi16(_mm512_set1_epi32(four), _mm512_loadu_si512(x + k * LANES));
            out[r][0] += (vint)_mm512_madd_epi16(two, _mm512_set1_epi16(1));
#else
            for (int i = 0; i < PARTS; i++) {
                const __m256i xs = _mm256_loadu_si256((const __m256i*)(x + k * LANES + 32 * i));
                const __m256i two = _mm256_maddubs_epi16(_mm256_set1_epi32(four), xs);
                out[r][i] += (vint)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
            }
#endif
        }
}

// 16 rows times the panels.
void integer_slab(const Product& p, int64_t row, int64_t first, int64_t panels, const Rounded& x) {
    const int64_t wide = x.steps * STEP;
    const int part = STEP / (int)x.parts;
    float *scales = own.scales.fit(p.groups * LANES), *offsets = own.zeros.fit(p.groups * LANES);
    uint8_t* codes = own.codes.fit(LANES * (wide + UNIT));
    statistics(p, row, scales, offsets);
    for (int64_t i = 0; i < p.groups * LANES; i++) offsets[i] *= scales[i];
    unpack(p, row, 0, wide, codes);
#ifdef __AMX_INT8__
    const Config config(part);
    _tile_loadconfig(&config);
#endif
    const int64_t all = x.steps * x.parts;
    const int shift = x.parts == 4 ? 2 : (int)x.parts - 1;
    int64_t* groups = own.groups.fit(all);
    for (int64_t at = 0; at < all; at++) groups[at] = std::min(p.groups - 1, at * part / p.group) * LANES;
    for (int64_t t = 0; t < panels; t++) {
        vfloat sums[LANES][PARTS] = {};
        const auto codes_of = [&](int64_t at) { return codes + (at >> shift) * TILE + (at & (x.parts - 1)) * part; };
        const auto x_of = [&](int64_t at) { return x.tile(t, at >> shift) + (at & (x.parts - 1)) * part * LANES; };
#ifdef __AMX_INT8__
        // Tiles take long and work beside the vectors: they are two parts ahead.
        alignas(64) int32_t out[4][LANES * LANES];
        const auto ahead = [&](int64_t at) {
            if (at < all) tiles(at % 2, codes_of(at), x_of(at), out[at % 4]);
        };
        ahead(0), ahead(1);
#endif
        for (int64_t at = 0; at < all; at++) {
            const int64_t step = at >> shift, g = groups[at];
            const float *x_scale = x.scale(t, step), *x_sum = x.sum(t, step) + (at & (x.parts - 1)) * LANES;
#ifdef __AMX_INT8__
            ahead(at + 2);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                const vint one = load<vint>(out[at % 4] + r * LANES);
                add(sums[r], &one, x_scale, x_sum, scales[g + r], offsets[g + r]);
            }
#else
            constexpr int R = WIDTH == 16 ? 8 : 4;
#pragma GCC unroll 4
            for (int some = 0; some < LANES; some += R) {
                vint out[R][PARTS];
                products<R>(codes_of(at) + some * STEP, x_of(at), part, out);
                for (int r = 0; r < R; r++)
                    add(sums[some + r], out[r], x_scale, x_sum, scales[g + some + r], offsets[g + some + r]);
            }
#endif
        }
        alignas(64) float turned[LANES * LANES];
        memcpy(turned, sums, sizeof turned);
        put(p, first + t * LANES, row, turned);
    }
#ifdef __AMX_INT8__
    _tile_release();
#endif
}

}  // namespace
