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
        for (; start < end; start += kCodesAtOnce) {
            const std::size_t count = std::min(end - start, kCodesAtOnce);
            const std::uint8_t *some = coded.codes + packed_nbytes(start, coded.bits);
            if (coded.bits != 8) {
                unpack_codes(some, count, coded.bits, codes);
                some = codes;
            }
            add_some<kForm, kAddend>(out + start, kAddend ? addend + start : nullptr, some, count, bias, low, step, scale);
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

GRADCOMP_ENTRY bool find(const std::uint8_t *packed, std::size_t count, unsigned bits, std::uint8_t mask) {
    alignas(64) std::uint8_t codes[kCodesAtOnce];
    for (std::size_t start = 0; start < count; start += kCodesAtOnce) {
        const std::size_t some = std::min(count - start, kCodesAtOnce);
        unpack_codes(packed + packed_nbytes(start, bits), some, bits, codes);
        std::uint8_t any = 0;
        for (std::size_t i = 0; i < some; ++i) any |= (codes[i] & mask) == mask;
        if (any) return true;
    }
    return false;
}
