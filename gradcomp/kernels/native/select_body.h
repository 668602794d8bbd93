template <bool kResidual> GRADCOMP_INLINE float sum(const float *grad, const float *residual, std::size_t i) {
    return kResidual ? grad[i] + residual[i] : grad[i];
}

// Adds what passes in one block of at most kBlock elements to what was found. Returns the largest magnitude if it passes.
template <bool kResidual>
GRADCOMP_INLINE std::uint32_t scan_block(const float *grad, const float *residual, std::size_t start,
                                         std::size_t length, std::uint32_t limit, Selection &found,
                                         std::size_t &capacity) {
    std::uint32_t magnitude[kBlock];
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < length; ++i) {
        magnitude[i] = bits_of(sum<kResidual>(grad, residual, start + i)) & kMagnitude;
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
    const std::uint32_t limit = std::min(bits_of(tau) & kMagnitude, kInfinity - 1);
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
        found.nonfinite = sum_nonfinite(grad, residual, numel);
    }
    return found;
}

GRADCOMP_ENTRY Selection scan_any(const float *grad, const float *residual, std::size_t numel, float tau) {
    return residual ? scan<true>(grad, residual, numel, tau) : scan<false>(grad, nullptr, numel, tau);
}
