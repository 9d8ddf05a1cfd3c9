// The k largest of each row, by bisection on the floats' bits: counting what lies above a threshold is one vector
// compare per 8 or 16 numbers, and the numbers between the bounds are moved together as they become few.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Floats to integers of the same order; -0 counts as 0, a NaN as larger than all numbers or smaller, by its sign.
void to_keys(const float *x, int64_t n, int32_t *keys) {
    for (int64_t i = 0; i < n; ++i) {
        const float value = x[i] + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        keys[i] = bits ^ ((bits >> 31) & 0x7fffffff);
    }
}

int64_t above(const int32_t *keys, int64_t n, int32_t limit) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] > limit;
    return count;
}

// `keys` of one row, 1 <= k <= n; `spare` has room for n. Writes the places of the k largest in ascending order.
void top(const int32_t *keys, int64_t n, int64_t k, int32_t *spare, int32_t *out) {
    int32_t least = keys[0], most = keys[0];
    for (int64_t i = 1; i < n; ++i) {
        least = std::min(least, keys[i]);
        most = std::max(most, keys[i]);
    }
    int64_t low = int64_t(least) - 1, high = most;  // more than k, or k, lie above `low`; fewer above `high`
    int64_t over_low = n, over_high = 0, base = 0, m = n;
    const int32_t *among = keys;
    while (over_low != k && high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const int64_t count = base + above(among, m, int32_t(middle));
        if (count >= k) {
            low = middle;
            over_low = count;
        } else {
            high = middle;
            over_high = count;
        }
        if (over_low - over_high < m / 2) {  // those above `high` are counted, those up to `low` are out
            int64_t kept = 0;
            for (int64_t i = 0; i < m; ++i) {
                const int32_t key = among[i];
                spare[kept] = key;
                kept += (key > low) & (key <= high);
            }
            among = spare;
            m = kept;
            base = over_high;
        }
    }
    int64_t ties = 0, limit = low;  // all above `low` are k exactly, or all above `high` and some that equal it
    if (over_low != k) {
        limit = high;
        ties = k - over_high;
    }
    int64_t found = 0;
    for (int64_t i = 0; i < n && found < k; ++i) {
        const bool tie = (keys[i] == limit) & (ties > 0);
        out[found] = int32_t(i);
        found += (keys[i] > limit) | tie;
        ties -= tie;
    }
}

}  // namespace

// x: rows of n floats, `stride` apart; out: rows of k.
extern "C" void hasten_top_rows(const float *x, int64_t rows, int64_t n, int64_t stride, int64_t k, int32_t *out,
                                int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<int32_t> keys(n), spare(n + 1);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            to_keys(x + row * stride, n, keys.data());
            top(keys.data(), n, k, spare.data(), out + row * k);
        }
    }
}
