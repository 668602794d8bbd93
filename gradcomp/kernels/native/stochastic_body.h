#include "pack_body.h"
#include "random_body.h"
#include "sums_body.h"

template <bool kResidual> GRADCOMP_INLINE float sum(const float *grad, const float *residual, std::size_t i) {
    return kResidual ? residual[i] + grad[i] : grad[i];
}

// The largest magnitude of a block, as bits.
template <bool kResidual>
GRADCOMP_INLINE std::uint32_t largest(const float *grad, const float *residual, std::size_t count) {
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t magnitude = bits_of(sum<kResidual>(grad, residual, i)) & kMagnitude;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

template <bool kResidual>
GRADCOMP_INLINE double squares(const float *grad, const float *residual, std::size_t count) {
    double total = 0.0;
    for (std::size_t start = 0; start < count; start += kRun) {
        const std::size_t stop = count - start < kRun ? count : start + kRun;
        double lanes[kLanes] = {};
        std::size_t i = start;
        for (; i + kLanes <= stop; i += kLanes) {
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                const double value = static_cast<double>(sum<kResidual>(grad, residual, i + lane));
                lanes[lane] += value * value;
            }
        }
        for (std::size_t lane = 0; i < stop; ++i, ++lane) {
            const double value = static_cast<double>(sum<kResidual>(grad, residual, i));
            lanes[lane] += value * value;
        }
        total += fold_lanes(lanes);
    }
    return total;
}

// A code, and what it stands for.
template <Form kForm>
GRADCOMP_INLINE std::uint8_t code_of(float acc, std::uint32_t chance, const Scale &scale, float &value) {
    if (kForm == Form::powers) {
        const std::uint32_t magnitude = bits_of(float_of(bits_of(acc) & kMagnitude) * scale.inverse);
        std::uint32_t exponent = (magnitude + chance) >> 23;
        exponent = exponent < 127 ? exponent : 127;
        const std::uint32_t sign = acc < 0.0f && exponent ? 0x80 : 0;
        value = float_of(exponent << 23 | sign << 24) * scale.scale;
        return static_cast<std::uint8_t>((exponent ^ 127) | sign);
    }
    const float random = float_of(chance | bits_of(1.0f)) - 1.0f;
    float level = float_of(bits_of(acc) & kMagnitude) * scale.inverse;
    level = level < scale.levels ? level : scale.levels;
    const std::int32_t whole = static_cast<std::int32_t>(level + random);
    const std::int32_t code = acc < 0.0f ? -whole : whole;
    value = scale.scale * static_cast<float>(code);
    if (kForm == Form::ternary) return static_cast<std::uint8_t>(code < 0 ? 2 : code);
    return static_cast<std::uint8_t>(code + scale.bias);
}

#if GRADCOMP_LEVEL >= 512
struct Spread {  // a Scale, in every lane
    __m512 scale, inverse, levels;
    __m512i bias;
};

// As code_of(), for sixteen elements.
template <Form kForm>
GRADCOMP_INLINE __m128i codes_of(__m512 acc, __m512i chance, const Spread &scale, __m512 &value) {
    const __m512i zero = _mm512_setzero_si512();
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(acc));
    const __m512 scaled = _mm512_mul_ps(_mm512_abs_ps(acc), scale.inverse);
    if (kForm == Form::powers) {
        const __m512i carried = _mm512_add_epi32(_mm512_castps_si512(scaled), chance);
        const __m512i exponent = _mm512_min_epi32(_mm512_srli_epi32(carried, 23), _mm512_set1_epi32(127));
        const __mmask16 below = _mm512_mask_cmpneq_epi32_mask(negative, exponent, zero);
        const __m512i sign = _mm512_maskz_set1_epi32(below, 0x80);
        const __m512i power = _mm512_or_si512(_mm512_slli_epi32(exponent, 23), _mm512_slli_epi32(sign, 24));
        value = _mm512_mul_ps(_mm512_castsi512_ps(power), scale.scale);
        return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_xor_si512(exponent, _mm512_set1_epi32(127)), sign));
    }
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 random = _mm512_sub_ps(_mm512_or_ps(_mm512_castsi512_ps(chance), one), one);
    const __m512i whole = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_min_ps(scaled, scale.levels), random));
    const __m512i code = _mm512_mask_sub_epi32(whole, negative, zero, whole);
    value = _mm512_mul_ps(scale.scale, _mm512_cvtepi32_ps(code));
    if (kForm == Form::ternary) return _mm512_cvtepi32_epi8(_mm512_mask_add_epi32(whole, negative, whole, whole));
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(code, scale.bias));
}
#elif GRADCOMP_LEVEL >= 2
struct Spread {  // a Scale, in every lane
    __m256 scale, inverse, levels;
    __m256i bias;
};

// As code_of(), for eight elements; codes in the low bytes of eight lanes.
template <Form kForm>
GRADCOMP_INLINE __m256i codes_of(__m256 acc, __m256i chance, const Spread &scale, __m256 &value) {
    const __m256i bits = _mm256_castps_si256(acc);
    const __m256 magnitude = _mm256_and_ps(acc, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kMagnitude))));
    const __m256 scaled = _mm256_mul_ps(magnitude, scale.inverse);
    if (kForm == Form::powers) {
        const __m256i carried = _mm256_add_epi32(_mm256_castps_si256(scaled), chance);
        const __m256i exponent = _mm256_min_epi32(_mm256_srli_epi32(carried, 23), _mm256_set1_epi32(127));
        const __m256i nothing = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
        const __m256i sign = _mm256_andnot_si256(nothing, _mm256_slli_epi32(_mm256_srli_epi32(bits, 31), 7));
        const __m256i power = _mm256_or_si256(_mm256_slli_epi32(exponent, 23), _mm256_slli_epi32(sign, 24));
        value = _mm256_mul_ps(_mm256_castsi256_ps(power), scale.scale);
        return _mm256_or_si256(_mm256_xor_si256(exponent, _mm256_set1_epi32(127)), sign);
    }
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 random = _mm256_sub_ps(_mm256_or_ps(_mm256_castsi256_ps(chance), one), one);
    const __m256i whole = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_min_ps(scaled, scale.levels), random));
    const __m256i code = _mm256_sign_epi32(whole, bits);  // 0 stays 0, whatever its sign
    value = _mm256_mul_ps(scale.scale, _mm256_cvtepi32_ps(code));
    if (kForm == Form::ternary) return _mm256_add_epi32(whole, _mm256_and_si256(whole, _mm256_srai_epi32(bits, 31)));
    return _mm256_add_epi32(code, scale.bias);
}
#endif

// Codes, a byte each, of up to eight elements from `at` on, which is a multiple of 8.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE void quantize_eight(const Job &job, std::size_t at, std::size_t count, const Scale &scale, Draw &draw,
                                    std::uint8_t *codes) {
    const float *grad = job.grad + at;
    float *residual = kResidual ? job.residual + at : nullptr;
    const std::uint32_t *chances = chances_at(draw, at);
    for (std::size_t i = 0; i < count; ++i) {
        const float acc = sum<kResidual>(grad, residual, i);
        float value;
        codes[i] = code_of<kForm>(acc, chances[i], scale, value);
        if (kUpdate) residual[i] = acc - value;
    }
}

// The same of elements at..at+count-1; at is a multiple of 8.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE void quantize(const Job &job, std::size_t at, std::size_t count, const Scale &scale, Draw &draw,
                              std::uint8_t *codes) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const float *grad = job.grad + at;
    float *residual = kResidual ? job.residual + at : nullptr;
#endif
#if GRADCOMP_LEVEL >= 512
    const Spread spread{_mm512_set1_ps(scale.scale), _mm512_set1_ps(scale.inverse), _mm512_set1_ps(scale.levels),
                        _mm512_set1_epi32(scale.bias)};
    if (at % 16 != 0 && count >= 8) {
        quantize_eight<kForm, kResidual, kUpdate>(job, at, 8, scale, draw, codes);
        i = 8;
    }
    for (; i + 16 <= count; i += 16) {
        const __m512i chance = _mm512_load_si512(chances_at(draw, at + i));
        __m512 acc = _mm512_loadu_ps(grad + i);
        if (kResidual) acc = _mm512_add_ps(_mm512_loadu_ps(residual + i), acc);
        __m512 value;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), codes_of<kForm>(acc, chance, spread, value));
        if (kUpdate) _mm512_storeu_ps(residual + i, _mm512_sub_ps(acc, value));
    }
#elif GRADCOMP_LEVEL >= 2
    const Spread spread{_mm256_set1_ps(scale.scale), _mm256_set1_ps(scale.inverse), _mm256_set1_ps(scale.levels),
                        _mm256_set1_epi32(scale.bias)};
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within halves of a register
    for (; i + 32 <= count; i += 32) {
        __m256i four[4];
        for (std::size_t k = 0; k < 4; ++k) {
            const std::size_t here = i + 8 * k;
            const std::uint32_t *chances = chances_at(draw, at + here);
            const __m256i chance = _mm256_load_si256(reinterpret_cast<const __m256i *>(chances));
            __m256 acc = _mm256_loadu_ps(grad + here);
            if (kResidual) acc = _mm256_add_ps(_mm256_loadu_ps(residual + here), acc);
            __m256 value;
            four[k] = codes_of<kForm>(acc, chance, spread, value);
            if (kUpdate) _mm256_storeu_ps(residual + here, _mm256_sub_ps(acc, value));
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(four[0], four[1]),
                                                  _mm256_packus_epi32(four[2], four[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + i), _mm256_permutevar8x32_epi32(bytes, in_order));
    }
#endif
    for (; i < count; i += 8) {
        quantize_eight<kForm, kResidual, kUpdate>(job, at + i, count - i < 8 ? count - i : 8, scale, draw, codes + i);
    }
}

// Blocks of elements start..stop-1; false as soon as one is not finite.
template <Form kForm, bool kResidual, bool kUpdate>
GRADCOMP_INLINE bool encode(const Job &job, std::size_t start, std::size_t stop) {
    alignas(32) std::uint8_t codes[kCodesAtOnce + 8];
    Draw draw;
    draw.key = job.key;
    draw.step = job.step;
    for (std::size_t at = start; at < stop; at += job.block) {
        const std::size_t count = stop - at < job.block ? stop - at : job.block;
        const float *grad = job.grad + at, *residual = kResidual ? job.residual + at : nullptr;
        const std::uint32_t most = largest<kResidual>(grad, residual, count);
        if (most >= kInfinity) return false;
        Scale scale;
        if (kForm == Form::powers) {
            scale = power_scale(most);
        } else {
            double bound = static_cast<double>(float_of(most));
            if (job.l2 || job.clip != 0.0) {
                const double total = squares<kResidual>(grad, residual, count);
                bound = bound_of(job, bound, total, count);
            }
            scale = level_scale(job, bound);
        }
        job.scales[at / job.block] = scale.scale;
        for (std::size_t done = 0; done < count; done += kCodesAtOnce) {
            const std::size_t some = count - done < kCodesAtOnce ? count - done : kCodesAtOnce;
            quantize<kForm, kResidual, kUpdate>(job, at + done, some, scale, draw, codes);
            for (std::size_t i = some; i % 8; ++i) codes[i] = 0;
            pack_some(codes, some, job.bits, job.codes + packed_nbytes(at + done, job.bits));
        }
    }
    return true;
}

template <Form kForm>
GRADCOMP_INLINE bool encode_form(const Job &job, bool update, std::size_t start, std::size_t stop) {
    if (!job.residual) return encode<kForm, false, false>(job, start, stop);
    return update ? encode<kForm, true, true>(job, start, stop) : encode<kForm, true, false>(job, start, stop);
}

GRADCOMP_ENTRY bool encode_any(const Job &job, bool update, std::size_t start, std::size_t stop) {
    switch (job.form) {
        case Form::ternary: return encode_form<Form::ternary>(job, update, start, stop);
        case Form::powers: return encode_form<Form::powers>(job, update, start, stop);
        default: return encode_form<Form::centred>(job, update, start, stop);
    }
}

// out, plus addend if given, plus the powers that codes stand for times scale.
template <bool kAddend>
GRADCOMP_INLINE void add_some(float *out, const float *addend, const std::uint8_t *codes, std::size_t count, float of_block,
                              float scale) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256 of_block8 = _mm256_set1_ps(of_block), scale8 = _mm256_set1_ps(scale);
    const __m256i seven = _mm256_set1_epi32(127), eight = _mm256_set1_epi32(0x80);
    for (; i + 8 <= count; i += 8) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + i)));
        const __m256i exponent = _mm256_andnot_si256(code, seven), sign = _mm256_and_si256(code, eight);
        const __m256i power = _mm256_or_si256(_mm256_slli_epi32(exponent, 23), _mm256_slli_epi32(sign, 24));
        const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(power), of_block8);
        __m256 sum = _mm256_loadu_ps(out + i);
        if (kAddend) sum = _mm256_add_ps(sum, _mm256_loadu_ps(addend + i));
        _mm256_storeu_ps(out + i, _mm256_add_ps(sum, _mm256_mul_ps(value, scale8)));
    }
#endif
    for (; i < count; ++i) {
        const std::uint32_t code = codes[i];
        const float value = float_of((~code & 127) << 23 | (code & 0x80) << 24) * of_block;
        const float sum = kAddend ? out[i] + addend[i] : out[i];
        out[i] = sum + value * scale;
    }
}

GRADCOMP_ENTRY void add_powers_any(float *out, const float *addend, const float *scales, const std::uint8_t *codes,
                                   std::size_t block, float scale, std::size_t start, std::size_t stop) {
    for (std::size_t at = start; at < stop; at += block) {
        const std::size_t count = stop - at < block ? stop - at : block;
        if (addend) {
            add_some<true>(out + at, addend + at, codes + at, count, scales[at / block], scale);
        } else {
            add_some<false>(out + at, nullptr, codes + at, count, scales[at / block], scale);
        }
    }
}

GRADCOMP_ENTRY void halves(std::uint64_t key, std::uint64_t step, std::size_t start, std::size_t count,
                           std::int32_t *found) {
    Draw draw;
    draw.key = key;
    draw.step = step;
    for (std::size_t i = 0; i < count; ++i) found[i] = static_cast<std::int32_t>(*chances_at(draw, start + i) >> 7);
}
