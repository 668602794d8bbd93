// Reads acc = grad + residual and marks in two bit planes what passes +-tau, 64 elements a word; without kSigns also lists
// the values of that. With kLeft writes what is left of acc to `left`, which may be grad or residual: where it passes
// acc -+ tau with kSigns, else 0; elsewhere acc.

struct Marks {
    std::uint64_t mask;
    std::uint64_t negative;
};

GRADCOMP_INLINE void list_values(std::uint64_t mask, const float *block, Values *values) {
    if (values->size + 64 > values->capacity) grow(values);
    float *out = values->data.get() + values->size;
    for (; mask != 0; mask &= mask - 1) *out++ = block[trailing_zeros(mask)];
    values->size = static_cast<std::size_t>(out - values->data.get());
}

#if GRADCOMP_LEVEL >= 2

template <bool kResidual, bool kLeft, bool kSigns>
GRADCOMP_INLINE Marks mark_64(const float *grad, const float *residual, float *left, float tau, __m256i &most,
                              Values *values) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 limit = _mm256_set1_ps(tau);
    __m256 acc[8];
    __m256 passes[8];
    __m256 any = _mm256_setzero_ps();
    for (int k = 0; k < 8; ++k) {
        acc[k] = _mm256_loadu_ps(grad + 8 * k);
        if (kResidual) acc[k] = _mm256_add_ps(acc[k], _mm256_loadu_ps(residual + 8 * k));
        const __m256 magnitude = _mm256_andnot_ps(sign, acc[k]);
        most = _mm256_max_epi32(most, _mm256_castps_si256(magnitude));
        passes[k] = _mm256_cmp_ps(magnitude, limit, _CMP_GT_OQ);
        any = _mm256_or_ps(any, passes[k]);
    }
    Marks marks{0, 0};
    if (_mm256_testz_ps(any, any)) {
        if (kLeft) {
            for (int k = 0; k < 8; ++k) _mm256_storeu_ps(left + 8 * k, acc[k]);
        }
        return marks;
    }
    for (int k = 0; k < 8; ++k) {
        marks.mask |= static_cast<std::uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(passes[k]))) << (8 * k);
        const __m256 below = _mm256_and_ps(passes[k], acc[k]);
        marks.negative |= static_cast<std::uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(below))) << (8 * k);
        if (kLeft) {
            const __m256 sent = _mm256_or_ps(limit, _mm256_and_ps(sign, acc[k]));
            const __m256 rest = kSigns ? _mm256_sub_ps(acc[k], _mm256_and_ps(passes[k], sent))
                                       : _mm256_andnot_ps(passes[k], acc[k]);
            _mm256_storeu_ps(left + 8 * k, rest);
        }
    }
    if (!kSigns) {
        alignas(32) float here[64];
        for (int k = 0; k < 8; ++k) _mm256_store_ps(here + 8 * k, acc[k]);
        list_values(marks.mask, here, values);
    }
    return marks;
}

#endif

// The same, an element at a time after one look at the block: for the end of a vector, and for other processors.
template <bool kResidual, bool kLeft, bool kSigns>
GRADCOMP_INLINE Marks mark_some(const float *grad, const float *residual, float *left, std::size_t length, float tau,
                                std::uint32_t limit, std::uint32_t &most, Values *values) {
    float acc[64];
    std::uint32_t largest = 0;
    for (std::size_t i = 0; i < length; ++i) {
        acc[i] = kResidual ? grad[i] + residual[i] : grad[i];
        const std::uint32_t magnitude = bits_of(acc[i]) & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
        if (kLeft) left[i] = acc[i];
    }
    most = largest > most ? largest : most;
    Marks marks{0, 0};
    if (largest <= limit) return marks;
    for (std::size_t i = 0; i < length; ++i) {
        const std::uint32_t bits = bits_of(acc[i]);
        const std::uint64_t pass = (bits & kMagnitude) > limit;
        const std::uint64_t below = pass & (bits >> 31);
        marks.mask |= pass << i;
        marks.negative |= below << i;
        if (kLeft && pass) left[i] = kSigns ? acc[i] - (below ? -tau : tau) : 0.0f;
    }
    if (!kSigns) list_values(marks.mask, acc, values);
    return marks;
}

template <bool kResidual, bool kLeft, bool kSigns>
GRADCOMP_INLINE Found scan(const float *grad, const float *residual, float *left, std::size_t numel, float tau, std::uint64_t *mask,
                           std::uint64_t *negative, Values *values) {
    // Magnitudes are compared as integers: for floats without their sign that is the same order, and it puts Inf and NaN
    // above every finite tau.
    const std::uint32_t limit = bits_of(tau);
    std::uint32_t most = 0;
    std::uint64_t count = 0;
    std::size_t start = 0;
#if GRADCOMP_LEVEL >= 2
    __m256i most_of_8 = _mm256_setzero_si256();
    for (; start + 64 <= numel; start += 64) {
        const Marks marks = mark_64<kResidual, kLeft, kSigns>(grad + start, kResidual ? residual + start : nullptr, kLeft ? left + start : nullptr,
                                                             tau, most_of_8, values);
        mask[start / 64] = marks.mask;
        negative[start / 64] = marks.negative;
        count += static_cast<std::uint64_t>(_mm_popcnt_u64(marks.mask));
    }
    alignas(32) std::uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), most_of_8);
    for (const std::uint32_t lane : lanes) most = lane > most ? lane : most;
#endif
    for (; start < numel; start += 64) {
        const std::size_t length = numel - start < 64 ? numel - start : 64;
        const Marks marks =
            mark_some<kResidual, kLeft, kSigns>(
            grad + start, kResidual ? residual + start : nullptr, kLeft ? left + start : nullptr, length, tau, limit, most, values);
        mask[start / 64] = marks.mask;
        negative[start / 64] = marks.negative;
        for (std::uint64_t rest = marks.mask; rest != 0; rest &= rest - 1) ++count;
    }
    return Found{count, most};
}

GRADCOMP_ENTRY Found scan_signs(const float *grad, const float *residual, float *left, std::size_t numel, float tau,
                           std::uint64_t *mask, std::uint64_t *negative) {
    if (residual == nullptr) return scan<false, false, true>(grad, nullptr, nullptr, numel, tau, mask, negative, nullptr);
    if (left == nullptr) return scan<true, false, true>(grad, residual, nullptr, numel, tau, mask, negative, nullptr);
    return scan<true, true, true>(grad, residual, left, numel, tau, mask, negative, nullptr);
}

GRADCOMP_ENTRY Found scan_values(const float *grad, const float *residual, float *left, std::size_t numel, float tau,
                           std::uint64_t *mask, std::uint64_t *negative, Values *values) {
    if (residual == nullptr) return scan<false, false, false>(grad, nullptr, nullptr, numel, tau, mask, negative, values);
    if (left == nullptr) return scan<true, false, false>(grad, residual, nullptr, numel, tau, mask, negative, values);
    return scan<true, true, false>(grad, residual, left, numel, tau, mask, negative, values);
}
