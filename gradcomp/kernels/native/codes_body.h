// What a code stands for. Written without branches, so that loops over it become vector instructions.
template <Form kForm> GRADCOMP_INLINE float decoded(std::uint8_t code, float bias, float low, float step) {
    if (kForm == Form::levels) return low + static_cast<float>(code) * step;
    if (kForm == Form::centred) return step * (static_cast<float>(code) - bias);
    if (kForm == Form::ternary) return step * static_cast<float>((code & 1) - (code >> 1));
    return step * float8_value(code);
}

template <Form kForm, bool kAddend>
GRADCOMP_INLINE void add_some(float *out, const float *addend, const std::uint8_t *codes, std::size_t count, float bias,
                              float low, float step, float scale) {
    for (std::size_t i = 0; i < count; ++i) {
        const float sum = kAddend ? out[i] + addend[i] : out[i];
        out[i] = sum + decoded<kForm>(codes[i], bias, low, step) * scale;
    }
}

#if GRADCOMP_LEVEL >= 2
// Takes eight codes of any width out of eight bytes: each lane gets the two bytes its code lies in, and shifts.
struct Unpacker {
    __m256i bytes, shift, mask;
};

GRADCOMP_INLINE Unpacker unpacker(unsigned bits, std::uint32_t mask) {
    alignas(32) std::uint32_t bytes[8], shift[8];
    for (unsigned lane = 0; lane < 8; ++lane) {
        const std::uint32_t first = lane * bits / 8;
        bytes[lane] = first | (first + 1) << 8 | 0x80800000u;
        shift[lane] = lane * bits % 8;
    }
    return {_mm256_load_si256(reinterpret_cast<const __m256i *>(bytes)),
            _mm256_load_si256(reinterpret_cast<const __m256i *>(shift)), _mm256_set1_epi32(static_cast<int>(mask))};
}

GRADCOMP_INLINE __m256i unpack(const std::uint8_t *packed, const Unpacker &unpacker) {
    const __m256i both = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed)));
    const __m256i windows = _mm256_shuffle_epi8(both, unpacker.bytes);
    return _mm256_and_si256(_mm256_srlv_epi32(windows, unpacker.shift), unpacker.mask);
}

template <Form kForm> GRADCOMP_INLINE __m256 decoded(__m256i code, __m256 bias, __m256 low, __m256 step) {
    if (kForm == Form::levels) return _mm256_add_ps(low, _mm256_mul_ps(_mm256_cvtepi32_ps(code), step));
    if (kForm == Form::centred) return _mm256_mul_ps(step, _mm256_sub_ps(_mm256_cvtepi32_ps(code), bias));
    if (kForm == Form::ternary) {
        const __m256i minus = _mm256_srli_epi32(code, 1);
        const __m256i plus = _mm256_and_si256(code, _mm256_set1_epi32(1));
        return _mm256_mul_ps(step, _mm256_cvtepi32_ps(_mm256_sub_epi32(plus, minus)));
    }
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(code, 7), 31);
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, _mm256_castsi256_ps(is_small));
    return _mm256_mul_ps(step, _mm256_or_ps(value, _mm256_castsi256_ps(sign)));
}

// Whole groups, as long as eight bytes may be read of the packed codes; how many elements that were.
template <Form kForm, bool kAddend>
GRADCOMP_INLINE std::size_t add_groups(float *out, const float *addend, const std::uint8_t *packed, std::size_t readable,
                                       std::size_t count, unsigned bits, float bias, float low, float step,
                                       float scale) {
    const Unpacker of_eight = unpacker(bits, (1u << bits) - 1);
    const __m256 bias8 = _mm256_set1_ps(bias), low8 = _mm256_set1_ps(low);
    const __m256 step8 = _mm256_set1_ps(step), scale8 = _mm256_set1_ps(scale);
    const std::size_t groups = readable < 8 ? 0 : std::min(count / 8, (readable - 8) / bits + 1);
    for (std::size_t i = 0; i < 8 * groups; i += 8, packed += bits) {
        const __m256 value = decoded<kForm>(unpack(packed, of_eight), bias8, low8, step8);
        __m256 sum = _mm256_loadu_ps(out + i);
        if (kAddend) sum = _mm256_add_ps(sum, _mm256_loadu_ps(addend + i));
        _mm256_storeu_ps(out + i, _mm256_add_ps(sum, _mm256_mul_ps(value, scale8)));
    }
    return 8 * groups;
}

GRADCOMP_INLINE std::size_t find_in_groups(const std::uint8_t *packed, std::size_t count, unsigned bits,
                                           std::uint32_t mask, bool &found) {
    const Unpacker of_eight = unpacker(bits, mask);
    const std::size_t nbytes = packed_nbytes(count, bits);
    const std::size_t groups = nbytes < 8 ? 0 : std::min(count / 8, (nbytes - 8) / bits + 1);
    __m256i any = _mm256_setzero_si256();
    for (std::size_t group = 0; group < groups; ++group, packed += bits) {
        any = _mm256_or_si256(any, _mm256_cmpeq_epi32(unpack(packed, of_eight), of_eight.mask));
    }
    found = _mm256_movemask_epi8(any) != 0;
    return 8 * groups;
}
#else
template <Form kForm, bool kAddend>
GRADCOMP_INLINE std::size_t add_groups(float *, const float *, const std::uint8_t *, std::size_t, std::size_t, unsigned,
                                       float, float, float, float) {
    return 0;
}

GRADCOMP_INLINE std::size_t find_in_groups(const std::uint8_t *, std::size_t, unsigned, std::uint32_t, bool &found) {
    found = false;
    return 0;
}
#endif

template <Form kForm, bool kAddend>
GRADCOMP_INLINE void add_range(float *out, const float *addend, const Coded &coded, float scale, std::size_t start,
                               std::size_t stop) {
    alignas(64) std::uint8_t codes[kCodesAtOnce];
    const float bias = static_cast<float>((1 << (coded.bits - 1)) - 1);
    while (start < stop) {
        const std::size_t row = start / coded.block;
        const std::size_t end = std::min(stop, (row + 1) * coded.block);
        const float low = kForm == Form::levels ? coded.parameters[2 * row] : 0.0f;
        const float step = coded.parameters[kForm == Form::levels ? 2 * row + 1 : row];
        const std::size_t at = packed_nbytes(start, coded.bits);
        start += add_groups<kForm, kAddend>(out + start, kAddend ? addend + start : nullptr, coded.codes + at,
                                            coded.nbytes - at, end - start, coded.bits, bias, low, step, scale);
        for (; start < end; start += kCodesAtOnce) {
            const std::size_t count = std::min(end - start, kCodesAtOnce);
            unpack_codes(coded.codes + packed_nbytes(start, coded.bits), count, coded.bits, codes);
            add_some<kForm, kAddend>(out + start, kAddend ? addend + start : nullptr, codes, count, bias, low, step, scale);
        }
        start = end;
    }
}

template <Form kForm>
GRADCOMP_INLINE void add_form(float *out, const float *addend, const Coded &coded, float scale, std::size_t start,
                              std::size_t stop) {
    if (addend) {
        add_range<kForm, true>(out, addend, coded, scale, start, stop);
    } else {
        add_range<kForm, false>(out, nullptr, coded, scale, start, stop);
    }
}

GRADCOMP_ENTRY void add_any(float *out, const float *addend, const Coded &coded, float scale, std::size_t start,
                            std::size_t stop) {
    switch (coded.form) {
        case Form::levels: return add_form<Form::levels>(out, addend, coded, scale, start, stop);
        case Form::centred: return add_form<Form::centred>(out, addend, coded, scale, start, stop);
        case Form::ternary: return add_form<Form::ternary>(out, addend, coded, scale, start, stop);
        case Form::float8: return add_form<Form::float8>(out, addend, coded, scale, start, stop);
    }
}

// The widths that do not straddle bytes, a byte at a time; returns how many codes were looked at.
GRADCOMP_INLINE std::size_t find_in_bytes(const std::uint8_t *packed, std::size_t count, unsigned bits,
                                          std::uint8_t mask, bool &found) {
    std::uint8_t any = 0;
    const bool whole = bits == 8 || (bits == 4 && mask == 15) || (bits == 2 && mask == 3);
    const std::size_t nbytes = whole ? count * bits / 8 : 0;
    if (bits == 8) {
        for (std::size_t i = 0; i < nbytes; ++i) any |= (packed[i] & mask) == mask;
    } else if (bits == 4) {
        for (std::size_t i = 0; i < nbytes; ++i) {
            const std::uint8_t pairs = packed[i] & (packed[i] >> 1);
            any |= pairs & (pairs >> 2) & 0x11;
        }
    } else if (bits == 2) {
        for (std::size_t i = 0; i < nbytes; ++i) any |= packed[i] & (packed[i] >> 1) & 0x55;
    }
    found = any != 0;
    return nbytes * 8 / bits;
}

GRADCOMP_ENTRY bool find(const std::uint8_t *packed, std::size_t count, unsigned bits, std::uint8_t mask) {
    alignas(64) std::uint8_t codes[kCodesAtOnce];
    bool found = false;
    std::size_t start = find_in_bytes(packed, count, bits, mask, found);
    if (start == 0) start = find_in_groups(packed, count, bits, mask, found);
    for (; start < count && !found; start += kCodesAtOnce) {
        const std::size_t some = std::min(count - start, kCodesAtOnce);
        unpack_codes(packed + packed_nbytes(start, bits), some, bits, codes);
        for (std::size_t i = 0; i < some; ++i) found |= (codes[i] & mask) == mask;
    }
    return found;
}
