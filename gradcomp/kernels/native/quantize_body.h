#include "pack_body.h"

template <bool kResidual> GRADCOMP_INLINE float sum(const float *grad, const float *residual, std::size_t i) {
    return kResidual ? residual[i] + grad[i] : grad[i];
}

// Floats in order as integers, -0 below 0, NaN and the infinities outside of all that is finite.
GRADCOMP_INLINE std::int32_t order_of(float value) {
    const std::int32_t bits = static_cast<std::int32_t>(bits_of(value));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The parameters of a block; false if it holds something that is not finite.
template <Form kForm, bool kResidual>
GRADCOMP_INLINE bool measure(const float *grad, const float *residual, std::size_t count, unsigned bits, Scale &scale) {
    if (kForm == Form::levels) {
        std::int32_t lowest = 0x7fffffff, highest = -0x7fffffff - 1;
        for (std::size_t i = 0; i < count; ++i) {
            const std::int32_t order = order_of(sum<kResidual>(grad, residual, i));
            lowest = order < lowest ? order : lowest;
            highest = order > highest ? order : highest;
        }
        scale = levels_between(lowest, highest, bits);
        return highest < static_cast<std::int32_t>(kInfinity) && lowest > -static_cast<std::int32_t>(kInfinity) - 1;
    }
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t magnitude = bits_of(sum<kResidual>(grad, residual, i)) & kMagnitude;
        most = magnitude > most ? magnitude : most;
    }
    scale = scale_for(float_of(most), kForm == Form::float8 ? kFloat8Max : kMostSigned8);
    return most < kInfinity;
}

// Codes of some elements, a byte each. Returns the largest magnitude where nobody has looked for it yet.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE std::uint32_t quantize(const float *grad, float *residual, std::size_t count, const Scale &scale,
                                       float last, std::uint8_t *codes) {
    const float low = scale.low, step = scale.step, divisor = scale.divisor;
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const float acc = sum<kResidual>(grad, residual, i);
        float value;
        if (kForm == Form::ternary) {
            const std::uint32_t magnitude = bits_of(acc) & kMagnitude;
            most = magnitude > most ? magnitude : most;
            const int plus = acc >= step, minus = acc <= -step;
            codes[i] = static_cast<std::uint8_t>(plus + 2 * minus);
            value = step * static_cast<float>(plus - minus);
        } else if (kForm == Form::float8) {
            float quotient = acc / divisor;
            quotient = quotient < last ? quotient : last;
            quotient = quotient > -last ? quotient : -last;
            codes[i] = float8_code(quotient);
            value = step * float8_value(codes[i]);
        } else {
            float quotient = (kForm == Form::levels ? acc - low : acc) / divisor;
            quotient = quotient < last ? quotient : last;
            if (kForm == Form::centred) quotient = quotient > -last ? quotient : -last;
            const float shifted = quotient + kRounder;  // the addition rounds: floats at 2^23 are whole numbers
            const std::uint32_t bias = kForm == Form::centred ? static_cast<std::uint32_t>(kMostSigned8) : 0;
            codes[i] = static_cast<std::uint8_t>(bits_of(shifted) - bits_of(kRounder) + bias);
            const float whole = shifted - kRounder;
            value = kForm == Form::levels ? low + whole * step : step * whole;
        }
        if (kUpdate) residual[i] = acc - value;
    }
    return most;
}

#if GRADCOMP_LEVEL >= 2
constexpr std::size_t kVector = 32;  // elements of four registers, whose codes fill one

struct Spread {  // a Scale, in every lane
    __m256 low, step, divisor, last;
};

// As quantize(): codes of eight elements, in the low bytes of eight lanes, and what they stand for.
template <Form kForm> GRADCOMP_INLINE __m256i codes_of(__m256 acc, const Spread &scale, __m256 &value) {
    const __m256 minus_last = _mm256_xor_ps(scale.last, _mm256_set1_ps(-0.0f));
    if (kForm == Form::ternary) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        const __m256 plus = _mm256_cmp_ps(acc, scale.step, _CMP_GE_OQ);
        const __m256 minus = _mm256_cmp_ps(acc, _mm256_xor_ps(scale.step, sign), _CMP_LE_OQ);
        value = _mm256_and_ps(_mm256_or_ps(plus, minus), _mm256_or_ps(scale.step, _mm256_and_ps(minus, sign)));
        return _mm256_sub_epi32(_mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(minus), 31), 1),
                                _mm256_castps_si256(plus));
    }
    __m256 quotient = kForm == Form::levels ? _mm256_sub_ps(acc, scale.low) : acc;
    quotient = _mm256_min_ps(_mm256_div_ps(quotient, scale.divisor), scale.last);
    if (kForm != Form::levels) quotient = _mm256_max_ps(quotient, minus_last);
    if (kForm == Form::float8) {
        const __m256i bits = _mm256_castps_si256(quotient);
        const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(kMagnitude)));
        const __m256i sign = _mm256_xor_si256(bits, magnitude);
        const __m256 grid = _mm256_set1_ps(0x1p14f);
        const __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(magnitude), grid);
        const __m256i small = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(grid));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
        // Rounded in place: what is left of the 23 bits of mantissa is the value itself.
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7ffff)), odd);
        const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(up, 20), _mm256_set1_epi32(120 << 3));
        const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), magnitude);
        const __m256i normal_value = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xfff00000u)));
        const __m256 small_value = _mm256_sub_ps(shifted, grid);
        const __m256 absolute =
            _mm256_blendv_ps(_mm256_castsi256_ps(normal_value), small_value, _mm256_castsi256_ps(is_small));
        value = _mm256_mul_ps(scale.step, _mm256_or_ps(absolute, _mm256_castsi256_ps(sign)));
        return _mm256_or_si256(_mm256_blendv_epi8(normal, small, is_small), _mm256_srli_epi32(sign, 24));
    }
    const __m256 rounder = _mm256_set1_ps(kRounder);
    const __m256 shifted = _mm256_add_ps(quotient, rounder);
    const __m256 scaled = _mm256_mul_ps(_mm256_sub_ps(shifted, rounder), scale.step);
    value = kForm == Form::levels ? _mm256_add_ps(scale.low, scaled) : scaled;
    // The low byte of kRounder is 0.
    const __m256i code = _mm256_castps_si256(shifted);
    if (kForm == Form::levels) return _mm256_and_si256(code, _mm256_set1_epi32(0xff));
    return _mm256_and_si256(_mm256_add_epi32(code, _mm256_set1_epi32(127)), _mm256_set1_epi32(0xff));
}

// As quantize(), for whole vectors; fetches what lies `ahead` elements further.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE std::uint32_t quantize_vectors(const float *grad, float *residual, std::size_t count,
                                               const Scale &scale, float last, std::size_t ahead,
                                               std::uint8_t *codes) {
    const Spread spread{_mm256_set1_ps(scale.low), _mm256_set1_ps(scale.step), _mm256_set1_ps(scale.divisor),
                        _mm256_set1_ps(last)};
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within halves of a register
    __m256i most = _mm256_setzero_si256();
    for (std::size_t i = 0; i < count; i += kVector) {
        __m256i four[4];
        _mm_prefetch(reinterpret_cast<const char *>(grad + i + ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char *>(grad + i + ahead + 16), _MM_HINT_T0);
        if (kResidual) {
            _mm_prefetch(reinterpret_cast<const char *>(residual + i + ahead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(residual + i + ahead + 16), _MM_HINT_T0);
        }
        for (std::size_t k = 0; k < 4; ++k) {
            const std::size_t at = i + 8 * k;
            __m256 acc = _mm256_loadu_ps(grad + at);
            if (kResidual) acc = _mm256_add_ps(_mm256_loadu_ps(residual + at), acc);
            if (kForm == Form::ternary) {
                const __m256i magnitude = _mm256_set1_epi32(static_cast<int>(kMagnitude));
                most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(acc), magnitude));
            }
            __m256 value;
            four[k] = codes_of<kForm>(acc, spread, value);
            if (kUpdate) _mm256_storeu_ps(residual + at, _mm256_sub_ps(acc, value));
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(four[0], four[1]),
                                                  _mm256_packus_epi32(four[2], four[3]));
        _mm256_store_si256(reinterpret_cast<__m256i *>(codes + i), _mm256_permutevar8x32_epi32(bytes, in_order));
    }
    alignas(32) std::uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), most);
    std::uint32_t found = 0;
    for (std::size_t lane = 0; lane < 8; ++lane) found = std::max(found, lanes[lane]);
    return found;
}
#endif

// Blocks start..stop-1 of elements; false as soon as one is not finite.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE bool encode_range(const Job &job, std::size_t start, std::size_t stop) {
    alignas(64) std::uint8_t codes[kCodesAtOnce];
    const float last = kForm == Form::float8    ? kFloat8Max
                       : kForm == Form::centred ? kMostSigned8
                                                : static_cast<float>((1u << job.bits) - 1);
    Scale scale{0.0f, job.tau, 1.0f};
    while (start < stop) {
        const std::size_t end = std::min(stop, start + job.block);
        if (kForm != Form::ternary) {
            const float *residual = kResidual ? job.residual + start : nullptr;
            if (!measure<kForm, kResidual>(job.grad + start, residual, end - start, job.bits, scale)) return false;
            float *parameters = job.parameters + start / job.block * (kForm == Form::levels ? 2 : 1);
            if (kForm == Form::levels) *parameters++ = scale.low;
            *parameters = scale.step;
        }
        for (; start < end; start += kCodesAtOnce) {
            const std::size_t count = std::min(end - start, kCodesAtOnce);
            const float *grad = job.grad + start;
            float *residual = kResidual ? job.residual + start : nullptr;
            std::size_t done = 0;
            std::uint32_t most = 0;
#if GRADCOMP_LEVEL >= 2
            done = count / kVector * kVector;
            // Fetches what comes after this block, or part of it, while there is arithmetic to be done.
            const std::size_t ahead = std::min(job.block, kCodesAtOnce);
            most = quantize_vectors<kForm, kResidual, kUpdate>(grad, residual, done, scale, last, ahead, codes);
#endif
            if (done < count) {
                float *rest = kResidual ? residual + done : nullptr;
                most = std::max(most, quantize<kForm, kResidual, kUpdate>(grad + done, rest, count - done, scale, last,
                                                                          codes + done));
            }
            if (kForm == Form::ternary && most >= kInfinity) return false;
            for (std::size_t i = count; i % 8; ++i) codes[i] = 0;
            pack_some(codes, count, job.bits, job.codes + packed_nbytes(start, job.bits));
        }
        start = end;
    }
    return true;
}

template <Form kForm>
GRADCOMP_INLINE bool encode_form(const Job &job, bool update, std::size_t start, std::size_t stop) {
    if (job.residual == nullptr) return encode_range<kForm, false, false>(job, start, stop);
    return update ? encode_range<kForm, true, true>(job, start, stop)
                  : encode_range<kForm, true, false>(job, start, stop);
}

GRADCOMP_ENTRY bool encode_any(const Job &job, bool update, std::size_t start, std::size_t stop) {
    switch (job.form) {
        case Form::levels: return encode_form<Form::levels>(job, update, start, stop);
        case Form::centred: return encode_form<Form::centred>(job, update, start, stop);
        case Form::ternary: return encode_form<Form::ternary>(job, update, start, stop);
        case Form::float8: return encode_form<Form::float8>(job, update, start, stop);
    }
    return false;
}
