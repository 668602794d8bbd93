#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#if defined(__GNUC__) || defined(__clang__)
#define GRADCOMP_INLINE inline __attribute__((always_inline))
#else
#define GRADCOMP_INLINE inline
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define GRADCOMP_AVX2 1
#endif

namespace gradcomp {
namespace {

// Elements looked at together. Most blocks hold nothing that passes and are left after one vectorised comparison.
constexpr std::size_t kBlock = 64;
constexpr std::uint32_t kFew = 6;  // up to so many in a block, looking for each costs less than writing all 64
constexpr std::uint32_t kMagnitude = 0x7fffffff;
constexpr std::uint32_t kInfinity = 0x7f800000;

std::uint32_t bits(float value) {
    std::uint32_t result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

template <typename T> void grow(Array<T> &array, std::size_t capacity) {
    void *memory = std::realloc(array.get(), capacity * sizeof(T));
    if (memory == nullptr) throw std::bad_alloc();
    (void)array.release();
    array.reset(static_cast<T *>(memory));
}

void reserve(Selection &found, std::size_t &capacity, std::size_t wanted) {
    if (wanted <= capacity) return;
    capacity = std::max(wanted, capacity * 2);
    grow(found.index, capacity);
    grow(found.negative, capacity);
}

template <bool kResidual> GRADCOMP_INLINE float sum(const float *grad, const float *residual, std::size_t i) {
    return kResidual ? grad[i] + residual[i] : grad[i];
}

// Rare and cold. The sum: NaN if there is a NaN or both infinities, else the infinity.
template <bool kResidual> float sum_nonfinite(const float *grad, const float *residual, std::size_t numel) {
    float total = 0.0f;
    for (std::size_t i = 0; i < numel; ++i) {
        const float value = sum<kResidual>(grad, residual, i);
        if (!std::isfinite(value)) total += value;
    }
    return total;
}

// Adds what passes in one block of at most kBlock elements to what was found. Returns the largest magnitude if it passes.
template <bool kResidual>
GRADCOMP_INLINE std::uint32_t scan_block(const float *grad, const float *residual, std::size_t start,
                                         std::size_t length, std::uint32_t limit, Selection &found,
                                         std::size_t &capacity) {
    std::uint32_t magnitude[kBlock];
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < length; ++i) {
        magnitude[i] = bits(sum<kResidual>(grad, residual, start + i)) & kMagnitude;
        most = std::max(most, magnitude[i]);
    }
    if (most <= limit) return 0;
    std::uint8_t passes[kBlock] = {};
    std::uint32_t count = 0;
    for (std::size_t i = 0; i < length; ++i) {
        const std::uint8_t pass = magnitude[i] > limit;
        passes[i] = pass;
        count += pass;
    }
    reserve(found, capacity, found.count + kBlock);
    std::int64_t *index = found.index.get() + found.count;
    bool *negative = found.negative.get() + found.count;
    found.count += count;
    if (count > kFew) {
        // Writes every candidate and moves on only past the ones that pass: no branch to mispredict.
        std::size_t k = 0;
        for (std::size_t i = 0; i < length; ++i) {
            index[k] = static_cast<std::int64_t>(start + i);
            negative[k] = sum<kResidual>(grad, residual, start + i) < 0.0f;
            k += passes[i];
        }
        return most;
    }
    for (std::size_t group = 0; group < kBlock; group += 8) {
        std::uint64_t any;
        std::memcpy(&any, passes + group, sizeof any);
        if (any == 0) continue;
        for (std::size_t i = group; i < group + 8; ++i) {
            if (!passes[i]) continue;
            *index++ = static_cast<std::int64_t>(start + i);
            *negative++ = sum<kResidual>(grad, residual, start + i) < 0.0f;
        }
    }
    return most;
}

// Written once and compiled for each instruction set, so that all of them give the same bits. Magnitudes are compared as
// integers: for floats without their sign that is the same order, and it puts Inf and NaN above every finite tau.
template <bool kResidual>
GRADCOMP_INLINE Selection scan(const float *grad, const float *residual, std::size_t numel, float tau) {
    const std::uint32_t limit = std::min(bits(tau) & kMagnitude, kInfinity - 1);
    Selection found;
    std::size_t capacity = 0;
    std::uint32_t most = 0;
    reserve(found, capacity, numel / 256 + kBlock);
    const std::size_t whole = numel - numel % kBlock;
    for (std::size_t start = 0; start < whole; start += kBlock) {
        most = std::max(most, scan_block<kResidual>(grad, residual, start, kBlock, limit, found, capacity));
    }
    most = std::max(most, scan_block<kResidual>(grad, residual, whole, numel - whole, limit, found, capacity));
    if (most >= kInfinity) {
        found.finite = false;
        found.nonfinite = sum_nonfinite<kResidual>(grad, residual, numel);
    }
    return found;
}

Selection scan_generic(const float *grad, const float *residual, std::size_t numel, float tau) {
    return residual ? scan<true>(grad, residual, numel, tau) : scan<false>(grad, nullptr, numel, tau);
}

#ifdef GRADCOMP_AVX2
__attribute__((target("avx2"))) Selection scan_avx2(const float *grad, const float *residual, std::size_t numel,
                                                    float tau) {
    return residual ? scan<true>(grad, residual, numel, tau) : scan<false>(grad, nullptr, numel, tau);
}
#endif

}  // namespace

bool cpu_has_avx2() {
#ifdef GRADCOMP_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

Selection select_threshold(const float *grad, const float *residual, std::size_t numel, float tau, bool avx2) {
#ifdef GRADCOMP_AVX2
    if (avx2) return scan_avx2(grad, residual, numel, tau);
#endif
    (void)avx2;
    return scan_generic(grad, residual, numel, tau);
}

}  // namespace gradcomp
