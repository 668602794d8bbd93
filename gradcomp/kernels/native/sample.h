// The largest magnitudes of a sample, as bits: for floats without their sign the order is the same.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "finite.h"

namespace gradcomp {

// Of weight * grad + left: every stride-th element, and how many of the largest are wanted.
struct Sampling {
    std::size_t stride;
    std::size_t count;
    float weight;
};

// Leaves the `count` largest, falling.
inline void sort_largest(std::vector<std::uint32_t> &sample, std::size_t count) {
    count = std::min(count, sample.size());
    std::nth_element(sample.begin(), sample.begin() + count, sample.end(), std::greater<>());
    sample.resize(count);
    std::sort(sample.begin(), sample.end(), std::greater<>());
}

// Of these magnitudes the one that times its place is the largest, of equal ones the first, and just below it: what
// gradcomp.kernels.reference.best_threshold finds.
inline float best_threshold(const std::vector<std::uint32_t> &falling) {
    if (falling.empty() || falling.front() >= kInfinity) return 0.0f;
    double most = -1.0;
    std::uint32_t best = 0;
    for (std::size_t i = 0; i < falling.size(); ++i) {
        const double sent = static_cast<double>(float_of(falling[i])) * static_cast<double>(i + 1);
        if (sent > most) {
            most = sent;
            best = falling[i];
        }
    }
    return float_of(best > 1 ? best - 1 : best);
}

// Takes the sample while a sweep goes by: before() for each chunk of it in turn, after() once what is left was written.
struct Sampler {
    // Elements, a multiple of 64. So few that the processor, which fetches ahead what is read in order, is not led astray:
    // in passes of r.add_(g), sampling costs 0.1 in place of 0.6 with 2048.
    static constexpr std::size_t kChunk = 128;

    // `start`: where the sweep begins in the vector that is sampled.
    Sampler(const Sampling &what, std::size_t start)
        : sampling(what), next((what.stride - start % what.stride) % what.stride) {}

    void before(const float *grad, std::size_t length) {
        std::size_t count = 0;
        for (std::size_t i = next; i < length; i += sampling.stride) scaled[count++] = grad[i] * sampling.weight;
        taken = count;
    }

    void after(const float *left, std::size_t length) {
        std::size_t i = next;
        for (std::size_t k = 0; k < taken; ++k, i += sampling.stride) {
            const std::uint32_t magnitude = bits_of(scaled[k] + left[i]) & kMagnitude;
            if (magnitude >= least_wanted) largest.push_back(magnitude);
        }
        next = i - length;
        if (largest.size() >= 2 * sampling.count + 1024) drop();
    }

    // With `count` there, others are wanted only if they are larger than the least of these.
    void drop() {
        const auto least = largest.begin() + static_cast<std::ptrdiff_t>(sampling.count - 1);
        std::nth_element(largest.begin(), least, largest.end(), std::greater<>());
        least_wanted = *least + 1;
        largest.resize(sampling.count);
    }

    const Sampling sampling;
    std::size_t next;  // element of the sample, counted from the first one of the next chunk
    std::size_t taken = 0;
    std::uint32_t least_wanted = 0;
    std::vector<std::uint32_t> largest;  // at least the `count` largest so far, in any order
    float scaled[kChunk];
};

}  // namespace gradcomp
