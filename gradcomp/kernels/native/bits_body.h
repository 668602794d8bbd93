#include "sums_body.h"

// One run of at most kRun elements: its sign bits, and the sums of its negative elements and of the others. With kUpdate
// the residual becomes acc. NaN counts as not negative, so a sum is not finite wherever an element is not.
template <bool kResidual, bool kUpdate>
GRADCOMP_INLINE void sum_run(const float *grad, float *residual, std::uint8_t *bits, std::size_t count, float scale,
                             BlockSums &sums) {
    alignas(32) float below[kLanes] = {};
    alignas(32) float above[kLanes] = {};
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256 zero = _mm256_setzero_ps(), factor = _mm256_set1_ps(scale);
    __m256 down[2] = {zero, zero}, up[2] = {zero, zero};
    for (; i + kLanes <= count; i += kLanes) {
        for (int half = 0; half < 2; ++half) {
            const std::size_t at = i + 8 * half;
            __m256 acc = _mm256_loadu_ps(grad + at);
            if (kResidual) acc = _mm256_add_ps(_mm256_loadu_ps(residual + at), acc);
            if (kUpdate) _mm256_storeu_ps(residual + at, acc);
            const __m256 mask = _mm256_cmp_ps(acc, zero, _CMP_LT_OQ);
            bits[at / 8] = static_cast<std::uint8_t>(_mm256_movemask_ps(mask));
            acc = _mm256_mul_ps(acc, factor);
            down[half] = _mm256_add_ps(down[half], _mm256_and_ps(mask, acc));
            up[half] = _mm256_add_ps(up[half], _mm256_andnot_ps(mask, acc));
        }
    }
    for (int half = 0; half < 2; ++half) {
        _mm256_store_ps(below + 8 * half, down[half]);
        _mm256_store_ps(above + 8 * half, up[half]);
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
            below[(i + k) % kLanes] += negative ? acc * scale : 0.0f;
            above[(i + k) % kLanes] += negative ? 0.0f : acc * scale;
        }
        bits[i / 8] = static_cast<std::uint8_t>(byte);
    }
    sums.below += static_cast<double>(fold_lanes(below));
    sums.above += static_cast<double>(fold_lanes(above));
}

template <bool kResidual, bool kUpdate>
GRADCOMP_INLINE BlockSums sum_block(const float *grad, float *residual, std::uint8_t *bits, std::size_t count,
                                    float scale) {
    BlockSums sums;
    for (std::size_t at = 0; at < count; at += kRun) {
        const std::size_t length = count - at < kRun ? count - at : kRun;
        sum_run<kResidual, kUpdate>(grad + at, kResidual ? residual + at : nullptr, bits + at / 8, length, scale, sums);
    }
    return sums;
}

GRADCOMP_INLINE std::size_t count_ones(const std::uint8_t *bits, std::size_t bytes) {
    std::size_t count = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, bits + i, sizeof word);
        count += static_cast<std::size_t>(__builtin_popcountll(word));
    }
    for (; i < bytes; ++i) count += static_cast<std::size_t>(__builtin_popcount(bits[i]));
    return count;
}

// values plus one number where they are negative and another where they are not. Meanwhile memory is idle, for the values
// are in the cache: asks for what comes next, of values and of beside.
GRADCOMP_INLINE void add_by_sign(float *values, const float *beside, std::size_t count, float negative, float other) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256 if_negative = _mm256_set1_ps(negative), if_not = _mm256_set1_ps(other);
    for (; i + 16 <= count; i += 16) {
        __builtin_prefetch(values + count + i);
        __builtin_prefetch(beside + count + i);
        for (std::size_t k = i; k < i + 16; k += 8) {
            const __m256 value = _mm256_loadu_ps(values + k);
            const __m256 mask = _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_LT_OQ);
            _mm256_storeu_ps(values + k, _mm256_add_ps(value, _mm256_blendv_ps(if_not, if_negative, mask)));
        }
    }
#endif
    for (; i < count; ++i) values[i] += values[i] < 0.0f ? negative : other;
}

// out, plus addend if given, plus one of two values for each element.
template <bool kAddend>
GRADCOMP_INLINE void add_two(float *out, const float *addend, const std::uint8_t *bits, std::size_t count, float one,
                             float zero) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256 if_one = _mm256_set1_ps(one), if_zero = _mm256_set1_ps(zero);
    const __m256i first = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (; i + 32 <= count; i += 32) {
        std::int32_t word;
        std::memcpy(&word, bits + i / 8, sizeof word);
        const __m256i all = _mm256_set1_epi32(word);
        for (int k = 0; k < 4; ++k) {
            // Each lane's bit to the top, which is where blendv looks.
            const __m256i top = _mm256_sllv_epi32(all, _mm256_sub_epi32(first, _mm256_set1_epi32(8 * k)));
            __m256 sum = _mm256_loadu_ps(out + i + 8 * k);
            if (kAddend) sum = _mm256_add_ps(sum, _mm256_loadu_ps(addend + i + 8 * k));
            sum = _mm256_add_ps(sum, _mm256_blendv_ps(if_zero, if_one, _mm256_castsi256_ps(top)));
            _mm256_storeu_ps(out + i + 8 * k, sum);
        }
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
        BlockSums sums = sum_block<kResidual, kUpdate>(job.grad + at, residual, bits, count, 1.0f);
        if (!std::isfinite(sums.above) || !std::isfinite(sums.below)) {
            // The sum of finite numbers may not be a float32. With kUpdate the residual is acc by now.
            const float *again = kUpdate ? residual : job.grad + at;
            const BlockSums small = sum_block<kResidual && !kUpdate, false>(again, residual, bits, count, kScaleDown);
            if (!std::isfinite(sums.above)) sums.above = small.above * kScaleUp;
            if (!std::isfinite(sums.below)) sums.below = small.below * kScaleUp;
            if (!std::isfinite(sums.above) || !std::isfinite(sums.below)) return false;
        }
        float *scales = job.scales + 2 * (at / job.block);
        if (job.symmetric) {
            scales[1] = as_float32((sums.above - sums.below) / static_cast<double>(count));
            scales[0] = 0.0f - scales[1];
        } else {
            const std::size_t negatives = count_ones(bits, count / 8 + (count % 8 != 0)), others = count - negatives;
            scales[0] = as_float32(sums.below / static_cast<double>(negatives ? negatives : 1));
            scales[1] = as_float32(sums.above / static_cast<double>(others ? others : 1));
        }
        if (kUpdate) add_by_sign(residual, job.grad + at, count, -scales[0], -scales[1]);
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
