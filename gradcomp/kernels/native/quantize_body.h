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
            float *residual = kResidual ? job.residual + start : nullptr;
            const std::uint32_t most =
                quantize<kForm, kResidual, kUpdate>(job.grad + start, residual, count, scale, last, codes);
            if (kForm == Form::ternary && most >= kInfinity) return false;
            for (std::size_t i = count; i % 8; ++i) codes[i] = 0;
            pack_codes(codes, count, job.bits, job.codes + packed_nbytes(start, job.bits));
        }
        start = end;
    }
    return true;
}

template <Form kForm> GRADCOMP_INLINE bool encode_form(const Job &job, bool update, std::size_t start, std::size_t stop) {
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
