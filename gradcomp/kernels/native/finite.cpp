#include "finite.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace gradcomp {
namespace {
#define GRADCOMP_BODY "finite_body.h"
#include "foreach_level.h"
}  // namespace

std::uint32_t largest_magnitude(const float *grad, std::size_t numel, Level level, int threads) {
    const auto starts = split(numel, 64, threads);
    std::vector<std::uint32_t> most(starts.size() - 1);
    parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
        most[part] = GRADCOMP_AT(level, largest)(grad + start, stop - start);
    });
    return *std::max_element(most.begin(), most.end());
}

float sum_nonfinite(const float *grad, const float *residual, std::size_t numel) {
    float total = 0.0f;
    for (std::size_t i = 0; i < numel; ++i) {
        const float value = residual ? grad[i] + residual[i] : grad[i];
        if (!std::isfinite(value)) total += value;
    }
    return total;
}

}  // namespace gradcomp
