#include "sums_body.h"

// One run of at most kRun elements: its sign bits, how many are negative, and the sums of those and of the others. With
// kUpdate the residual becomes acc. NaN counts as not negative, so the sums are finite only if every element is.
template <bool kResidual, bool kUpdate>
GRADCOMP_INLINE void sum_run(const float *grad, float *residual, std::uint8_t *bits, std::size_t count, BlockSums &sums) {
    alignas(32) double below[kLanes] = {};
    alignas(32) double above[kLanes] = {};
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    __m256d down[4], up[4];
    for (int k = 0; k < 4; ++k) down[k] = up[k] = _mm256_setzero_pd();
    for (; i + kLanes <= count; i += kLanes) {
        for (int half = 0; half < 2; ++half) {
            const std::size_t at = i + 8 * half;
            __m256 acc = _mm256_loadu_ps(grad + at);
            if (kResidual) acc = _mm256_add_ps(_mm256_loadu_ps(residual + at), acc);
            if (kUpdate) _mm256_storeu_ps(residual + at, acc);
            const __m256 mask = _mm256_cmp_ps(acc, _mm256_setzero_ps(), _CMP_LT_OQ);
            const int byte = _mm256_movemask_ps(mask);
            bits[at / 8] = static_cast<std::uint8_t>(byte);
            sums.negatives += __builtin_popcount(byte);
            const __m256 negative = _mm256_and_ps(mask, acc), other = _mm256_andnot_ps(mask, acc);
            down[2 * half] = _mm256_add_pd(down[2 * half], low_half(negative));
            down[2 * half + 1] = _mm256_add_pd(down[2 * half + 1], high_half(negative));
            up[2 * half] = _mm256_add_pd(up[2 * half], low_half(other));
            up[2 * half + 1] = _mm256_add_pd(up[2 * half + 1], high_half(other));
        }
    }
    for (int k = 0; k < 4; ++k) {
        _mm256_store_pd(below + 4 * k, down[k]);
        _mm256_store_pd(above + 4 * k, up[k]);
    }
#endif
    for (; i < count; i += 8) {
        const std::size_t length = count - i < 8 ? count - i : 8;
        std::uint32_t byte = 0;
        for (std::size_t k = 0; k < length; ++k) {
            const float acc = kResidual ? residual[i + k] + grad[i + k] : grad[i + k];
            if (kUpdate) residual[i + k] = acc;
            const bool negative = acc < 0.0f;
            byte |= static_cast<std::uint32_t>(negative) << k;
            below[(i + k) % kLanes] += negative ? acc : 0.0f;
            above[(i + k) % kLanes] += negative ? 0.0f : acc;
        }
        bits[i / 8] = static_cast<std::uint8_t>(byte);
        sums.negatives += __builtin_popcount(byte);
    }
    sums.below += fold_lanes(below);
    sums.above += fold_lanes(above);
}

// out, plus addend if given, plus one of two values for each element.
template <bool kAddend>
GRADCOMP_INLINE void add_two(float *out, const float *addend, const std::uint8_t *bits, std::size_t count, float one,
                             float zero) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256i position = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 if_one = _mm256_set1_ps(one), if_zero = _mm256_set1_ps(zero);
    for (; i + 8 <= count; i += 8) {
        const __m256i bit = _mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), position);
        const __m256 mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bit, position));
        __m256 sum = _mm256_loadu_ps(out + i);
        if (kAddend) sum = _mm256_add_ps(sum, _mm256_loadu_ps(addend + i));
        _mm256_storeu_ps(out + i, _mm256_add_ps(sum, _mm256_blendv_ps(if_zero, if_one, mask)));
    }
#endif
    for (; i < count; ++i) {
        const float sum = kAddend ? out[i] + addend[i] : out[i];
        out[i] = sum + (bits[i / 8] >> i % 8 & 1 ? one : zero);
    }
}

// Blocks first..last of a tensor. Returns whether all of it is finite; if not, it stops there.
template <bool kResidual, bool kUpdate>
GRADCOMP_INLINE bool encode(const BitsJob &job, std::size_t start, std::size_t stop) {
    for (std::size_t at = start; at < stop; at += job.block) {
        const std::size_t count = stop - at < job.block ? stop - at : job.block;
        std::uint8_t *bits = job.bits + at / 8;
        float *residual = kResidual ? job.residual + at : nullptr;
        BlockSums sums;
        for (std::size_t run = 0; run < count; run += kRun) {
            const std::size_t length = count - run < kRun ? count - run : kRun;
            sum_run<kResidual, kUpdate>(job.grad + at + run, kResidual ? residual + run : nullptr, bits + run / 8, length,
                                        sums);
        }
        const double magnitude = sums.above - sums.below;
        if (!(magnitude <= std::numeric_limits<double>::max())) return false;
        float *scales = job.scales + 2 * (at / job.block);
        if (job.symmetric) {
            scales[1] = static_cast<float>(magnitude / static_cast<double>(count));
            scales[0] = 0.0f - scales[1];
        } else {
            const std::size_t others = count - sums.negatives;
            scales[0] = static_cast<float>(sums.below / static_cast<double>(sums.negatives ? sums.negatives : 1));
            scales[1] = static_cast<float>(sums.above / static_cast<double>(others ? others : 1));
        }
        if (kUpdate) add_two<false>(residual, nullptr, bits, count, -scales[0], -scales[1]);
    }
    return true;
}

GRADCOMP_ENTRY bool encode_any(const BitsJob &job, bool update, std::size_t start, std::size_t stop) {
    if (!job.residual) return encode<false, false>(job, start, stop);
    return update ? encode<true, true>(job, start, stop) : encode<true, false>(job, start, stop);
}

GRADCOMP_ENTRY void add_any(float *out, const float *addend, const float *scales, const std::uint8_t *bits,
                            std::size_t block, std::size_t start, std::size_t stop) {
    for (std::size_t at = start; at < stop; at += block) {
        const std::size_t count = stop - at < block ? stop - at : block;
        const float *pair = scales + 2 * (at / block);
        if (addend) {
            add_two<true>(out + at, addend + at, bits + at / 8, count, pair[0], pair[1]);
        } else {
            add_two<false>(out + at, nullptr, bits + at / 8, count, pair[0], pair[1]);
        }
    }
}

// Signs of elements start..stop, a multiple of 8 to begin with. Returns how many are 0, and the largest magnitude.
GRADCOMP_ENTRY SignCount signs(const float *grad, std::uint8_t *bits, std::size_t start, std::size_t stop) {
    SignCount found;
    std::size_t i = start;
#if GRADCOMP_LEVEL >= 2
    const __m256i magnitude = _mm256_set1_epi32(static_cast<int>(kMagnitude));
    __m256i most = _mm256_setzero_si256();
    for (; i + 8 <= stop; i += 8) {
        const __m256 values = _mm256_loadu_ps(grad + i);
        const __m256 zero = _mm256_setzero_ps();
        bits[i / 8] = static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(values, zero, _CMP_LT_OQ)));
        found.zeros += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(values, zero, _CMP_EQ_OQ)));
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
    }
    alignas(32) std::uint32_t largest[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(largest), most);
    for (const std::uint32_t value : largest) found.largest = value > found.largest ? value : found.largest;
#endif
    for (; i < stop; i += 8) {
        const std::size_t length = stop - i < 8 ? stop - i : 8;
        std::uint32_t byte = 0;
        for (std::size_t k = 0; k < length; ++k) {
            const float value = grad[i + k];
            const std::uint32_t size = bits_of(value) & kMagnitude;
            byte |= static_cast<std::uint32_t>(value < 0.0f) << k;
            found.zeros += value == 0.0f;
            found.largest = size > found.largest ? size : found.largest;
        }
        bits[i / 8] = static_cast<std::uint8_t>(byte);
    }
    return found;
}

// Two bits an element: 1 for plus, 2 for minus, 0 for zero. start is a multiple of 8.
GRADCOMP_ENTRY void sign_map(const float *grad, std::uint8_t *codes, std::size_t start, std::size_t stop) {
    std::size_t i = start;
#if GRADCOMP_LEVEL >= 2
    for (; i + 8 <= stop; i += 8) {
        const __m256 values = _mm256_loadu_ps(grad + i);
        const __m256 zero = _mm256_setzero_ps();
        const int plus = _mm256_movemask_ps(_mm256_cmp_ps(values, zero, _CMP_GT_OQ));
        const int minus = _mm256_movemask_ps(_mm256_cmp_ps(values, zero, _CMP_LT_OQ));
        const std::uint16_t pair = static_cast<std::uint16_t>(spread(plus) | spread(minus) << 1);
        std::memcpy(codes + i / 4, &pair, sizeof pair);
    }
#endif
    for (; i < stop; i += 4) {
        const std::size_t length = stop - i < 4 ? stop - i : 4;
        std::uint32_t byte = 0;
        for (std::size_t k = 0; k < length; ++k) {
            byte |= (static_cast<std::uint32_t>(grad[i + k] > 0.0f) | static_cast<std::uint32_t>(grad[i + k] < 0.0f) << 1)
                    << 2 * k;
        }
        codes[i / 4] = static_cast<std::uint8_t>(byte);
    }
}
