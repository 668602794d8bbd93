// Adds sets coded as MAP to a vector, a word of the map at a time.

// The bits of `value`, from the lowest on, where `mask` has ones.
GRADCOMP_INLINE std::uint64_t spread_bits(std::uint64_t value, std::uint64_t mask) {
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    return _pdep_u64(value, mask);
#else
    std::uint64_t result = 0;
    for (; mask != 0; mask &= mask - 1, value >>= 1) result |= (mask & -mask) & -(value & 1);
    return result;
#endif
}

// Adds to 64 elements at out: magnitude where `mask`, its opposite where `minus` too, and -0.0, which changes nothing, where
// only `minus`.
GRADCOMP_INLINE void add_word(float *out, std::uint64_t mask, std::uint64_t minus, std::uint32_t magnitude) {
#if GRADCOMP_LEVEL >= 2
    const __m256i value = _mm256_set1_epi32(static_cast<int>(magnitude));
    const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);  // bit i to the top of lane i
    for (unsigned k = 0; k < 64; k += 8) {
        const __m256i named = _mm256_set1_epi32(static_cast<int>(mask >> k & 0xff));
        const __m256i signs = _mm256_set1_epi32(static_cast<int>(minus >> k & 0xff));
        const __m256i keep = _mm256_srai_epi32(_mm256_sllv_epi32(named, shifts), 31);
        const __m256i flip = _mm256_and_si256(_mm256_sllv_epi32(signs, shifts), top);
        const __m256 term = _mm256_castsi256_ps(_mm256_xor_si256(_mm256_and_si256(value, keep), flip));
        _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_loadu_ps(out + k), term));
    }
#else
    for (unsigned k = 0; k < 64; ++k) {
        const std::uint32_t keep = -static_cast<std::uint32_t>(mask >> k & 1);
        out[k] += float_of((magnitude & keep) ^ static_cast<std::uint32_t>(minus >> k & 1) << 31);
    }
#endif
}

// Adds to the `count` elements at out, 64 at most, those of `values` that `mask` names, times scale; returns where the next
// ones are.
GRADCOMP_INLINE const float *add_values_word(float *out, [[maybe_unused]] std::size_t count, std::uint64_t mask,
                                             const float *values, [[maybe_unused]] const float *end, float scale) {
    std::size_t k = 0;
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    for (; k + 8 <= count && end - values >= 8; k += 8) {
        const std::uint64_t named = mask >> k & 0xff;
        const std::uint64_t lanes = _pdep_u64(named, 0x0101010101010101u) * 0xff;
        const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(_pdep_u64(0x0706050403020100u, lanes)));
        const __m256 keep = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes))));
        const __m256 apart = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), _mm256_cvtepu8_epi32(order));
        const __m256 product = _mm256_mul_ps(apart, _mm256_set1_ps(scale));
        const __m256 term = _mm256_blendv_ps(_mm256_set1_ps(-0.0f), product, keep);
        _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_loadu_ps(out + k), term));
        values += __builtin_popcountll(named);
    }
    if (k == 64) return values;
#endif
    for (mask = mask >> k << k; mask != 0; mask &= mask - 1) out[__builtin_ctzll(mask)] += *values++ * scale;
    return values;
}

// Adds elements start..stop-1 of a MAP to those at `out`; `before` elements are named before start, a multiple of 64. Returns
// how many are named before stop.
GRADCOMP_ENTRY std::uint64_t add_value_map_of(const Set &set, float *out, const float *values, float scale,
                                              std::size_t start, std::size_t stop, std::uint64_t before) {
    const float *next = values + before;
    for (std::size_t i = start; i < stop; i += 64, out += 64) {
        const std::uint64_t mask = load_word(set.bytes, bytes_for(set.numel), i / 8);
        next = add_values_word(out, stop - i < 64 ? stop - i : 64, mask, next, values + set.count, scale);
    }
    return static_cast<std::uint64_t>(next - values);
}

// The same for a signed MAP.
GRADCOMP_ENTRY std::uint64_t add_sign_map_of(const Set &set, float *out, float magnitude, std::size_t start,
                                             std::size_t stop, std::uint64_t before) {
    const std::uint64_t nbytes = bytes_for(set.numel);
    const std::uint32_t bits = bits_of(magnitude);
    for (std::size_t i = start; i < stop; i += 64, out += 64) {
        const std::uint64_t mask = load_word(set.bytes, nbytes, i / 8);
        const std::uint64_t in_order = load_bits(set.bytes + nbytes, set.nbytes - nbytes, before);
        const std::uint64_t minus = spread_bits(in_order, mask) | ~mask;
        before += static_cast<std::uint64_t>(__builtin_popcountll(mask));
        if (stop - i >= 64) {
            add_word(out, mask, minus, bits);
            continue;
        }
        float last[64] = {};
        std::memcpy(last, out, (stop - i) * sizeof(float));
        add_word(last, mask, minus, bits);
        std::memcpy(out, last, (stop - i) * sizeof(float));
    }
    return before;
}
