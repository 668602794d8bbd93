// Whether a gradient is finite, and whether its sum with a residual must be.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "levels.h"

namespace gradcomp {

constexpr std::uint32_t kMagnitude = 0x7fffffff;  // all bits of a float but the sign
constexpr std::uint32_t kInfinity = 0x7f800000;   // the magnitude of Inf; that of NaN is above
// 2^102. A smaller number added to any finite float32 rounds to a finite float32: FLT_MAX is more than 2^103 away from
// where rounding to infinity begins.
constexpr std::uint32_t kHarmless = (102u + 127u) << 23;

inline std::uint32_t bits_of(float value) {
    std::uint32_t result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

inline float float_of(std::uint32_t bits) {
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void prefetch(const void *address) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// Position of the lowest bit set; word must not be 0.
inline unsigned trailing_zeros(std::uint64_t word) {
#if defined(__GNUC__) || defined(__clang__)
    return static_cast<unsigned>(__builtin_ctzll(word));
#else
    unsigned position = 0;
    for (; (word & 1) == 0; word >>= 1) ++position;
    return position;
#endif
}

// The largest magnitude in grad, as bits; above kInfinity if there is a NaN.
std::uint32_t largest_magnitude(const float *grad, std::size_t numel, Level level, int threads);

// The sum of what is not finite in grad + residual (may be null): NaN if there is a NaN or both infinities, else the
// infinity. Rare and cold.
float sum_nonfinite(const float *grad, const float *residual, std::size_t numel);

// Runs sweep(update), which reads grad + residual and returns something with a member `finite`, and with update=true
// writes the residual as it goes: but only where it cannot meet anything that is not finite half-way. Else the residual
// would be changed before that is known, and it must not be. Costs one more reading of grad.
template <typename Sweep>
auto sweep_safely(const float *grad, std::size_t numel, bool update, Level level, int threads, const Sweep &sweep) {
    if (!update) return sweep(false);
    if (largest_magnitude(grad, numel, level, threads) < kHarmless) return sweep(true);
    auto result = sweep(false);
    if (!result.finite) return result;
    return sweep(true);
}

}  // namespace gradcomp
