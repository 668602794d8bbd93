// Threshold selection: the positions of what passes +-tau, in one pass over the gradient.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace gradcomp {

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

template <typename T> using Array = std::unique_ptr<T[], Free>;

struct Selection {
    Array<std::int64_t> index;  // strictly increasing
    Array<bool> negative;       // whether the element at that position is below zero
    std::size_t count = 0;
    bool finite = true;         // else nonfinite says what was found, and index and negative mean nothing
    float nonfinite = 0.0f;     // NaN if there is a NaN or both infinities, else the infinity
};

// Everything in grad + residual whose magnitude is above tau. residual may be null; tau is >= 0.
Selection select_threshold(const float *grad, const float *residual, std::size_t numel, float tau, bool avx2);

bool cpu_has_avx2();

}  // namespace gradcomp
