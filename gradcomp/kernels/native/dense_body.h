// float16 to float32, exact, in integers. Signalling NaNs come out quiet, as the processor's own instruction does it.
GRADCOMP_INLINE float widened16(std::uint16_t half) {
    const std::uint32_t magnitude = half & 0x7fffu;
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);
    const std::uint32_t small = bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    const std::uint32_t special = (magnitude << 13) | kInfinity | (magnitude > 0x7c00u ? 1u << 22 : 0u);
    return float_of((magnitude < 0x0400u ? small : magnitude < 0x7c00u ? normal : special) | sign);
}

GRADCOMP_INLINE float widened_brain(std::uint16_t brain) { return float_of(static_cast<std::uint32_t>(brain) << 16); }

// float32 to float16, to nearest, ties to even; every NaN is 0x7e00.
GRADCOMP_INLINE std::uint16_t narrowed16(float value) {
    const std::uint32_t magnitude = bits_of(value) & kMagnitude;
    const std::uint32_t sign = bits_of(value) >> 16 & 0x8000u;
    // Below 2^-14 the spacing is 2^-24: that of floats at 0.5, where the addition rounds.
    const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const std::uint32_t large = magnitude < (143u << 23) ? normal : 0x7c00u;
    const std::uint32_t found = (magnitude < (113u << 23) ? small : large) | sign;
    return static_cast<std::uint16_t>(magnitude > kInfinity ? 0x7e00u : found);
}

// float32 to bfloat16, to nearest, ties to even; every NaN is 0x7fc0.
GRADCOMP_INLINE std::uint16_t narrowed_brain(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
}

GRADCOMP_ENTRY void narrow16(const float *from, std::size_t numel, std::uint16_t *to) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m128i nan = _mm_set1_epi16(0x7e00);
    for (; i + 8 <= numel; i += 8) {
        _mm_prefetch(reinterpret_cast<const char *>(from + i + kAhead), _MM_HINT_T0);
        const __m256 value = _mm256_loadu_ps(from + i);
        const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        const __m128i is_nan = _mm_packs_epi32(_mm256_castsi256_si128(unordered), _mm256_extracti128_si256(unordered, 1));
        const __m128i found = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm_blendv_epi8(found, nan, is_nan));
    }
#endif
    for (; i < numel; ++i) to[i] = narrowed16(from[i]);
}

GRADCOMP_ENTRY void narrow_brain(const float *from, std::size_t numel, std::uint16_t *to) {
    for (std::size_t i = 0; i < numel; ++i) to[i] = narrowed_brain(from[i]);
}

GRADCOMP_ENTRY void add16(float *out, const float *addend, const std::uint16_t *values, std::size_t numel, float scale) {
    std::size_t i = 0;
#if GRADCOMP_LEVEL >= 2
    const __m256 scale8 = _mm256_set1_ps(scale);
    for (; i + 8 <= numel; i += 8) {
        __m256 sum = _mm256_loadu_ps(out + i);
        if (addend) sum = _mm256_add_ps(sum, _mm256_loadu_ps(addend + i));
        const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values + i)));
        _mm256_storeu_ps(out + i, _mm256_add_ps(sum, _mm256_mul_ps(value, scale8)));
    }
#endif
    for (; i < numel; ++i) out[i] = (addend ? out[i] + addend[i] : out[i]) + widened16(values[i]) * scale;
}

GRADCOMP_ENTRY void add_brain(float *out, const float *addend, const std::uint16_t *values, std::size_t numel,
                              float scale) {
    if (addend) {
        for (std::size_t i = 0; i < numel; ++i) out[i] = (out[i] + addend[i]) + widened_brain(values[i]) * scale;
    } else {
        for (std::size_t i = 0; i < numel; ++i) out[i] += widened_brain(values[i]) * scale;
    }
}

GRADCOMP_ENTRY void add32(float *out, const float *addend, const float *values, std::size_t numel, float scale) {
    if (addend) {
        for (std::size_t i = 0; i < numel; ++i) out[i] = (out[i] + addend[i]) + values[i] * scale;
    } else {
        for (std::size_t i = 0; i < numel; ++i) out[i] += values[i] * scale;
    }
}
