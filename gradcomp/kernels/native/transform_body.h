// Rows as sums of weighted rows, added term after term: a product is rounded before it is added, on every level.

// value = sum over terms of weights[t] * terms[t][j]; out = (out + addend) + value * scale, addend may be null.
GRADCOMP_INLINE void combine_scalar(float *out, const float *addend, const float *weights, const float *const *terms,
                                    std::size_t count, float scale, std::size_t start, std::size_t stop) {
    for (std::size_t j = start; j < stop; ++j) {
        float value = weights[0] * terms[0][j];
        for (std::size_t t = 1; t < count; ++t) value += weights[t] * terms[t][j];
        const float before = addend ? out[j] + addend[j] : out[j];
        out[j] = before + value * scale;
    }
}

#if GRADCOMP_LEVEL >= 2
template <std::size_t kVectors>
GRADCOMP_INLINE void combine_vectors(float *out, const float *addend, const float *weights, const float *const *terms,
                                     std::size_t count, float scale, std::size_t j) {
    __m256 value[kVectors];
    for (std::size_t k = 0; k < kVectors; ++k) {
        value[k] = _mm256_mul_ps(_mm256_set1_ps(weights[0]), _mm256_loadu_ps(terms[0] + j + 8 * k));
    }
    for (std::size_t t = 1; t < count; ++t) {
        const __m256 weight = _mm256_set1_ps(weights[t]);
        const float *term = terms[t] + j;
        for (std::size_t k = 0; k < kVectors; ++k) {
            value[k] = _mm256_add_ps(value[k], _mm256_mul_ps(weight, _mm256_loadu_ps(term + 8 * k)));
        }
    }
    const __m256 factor = _mm256_set1_ps(scale);
    for (std::size_t k = 0; k < kVectors; ++k) {
        const std::size_t at = j + 8 * k;
        __m256 before = _mm256_loadu_ps(out + at);
        if (addend) before = _mm256_add_ps(before, _mm256_loadu_ps(addend + at));
        _mm256_storeu_ps(out + at, _mm256_add_ps(before, _mm256_mul_ps(value[k], factor)));
    }
}
#endif

GRADCOMP_INLINE void combine(float *out, const float *addend, const float *weights, const float *const *terms,
                             std::size_t count, float scale, std::size_t width) {
    std::size_t j = 0;
#if GRADCOMP_LEVEL >= 2
    for (; j + 64 <= width; j += 64) combine_vectors<8>(out, addend, weights, terms, count, scale, j);
    for (; j + 8 <= width; j += 8) combine_vectors<1>(out, addend, weights, terms, count, scale, j);
#endif
    combine_scalar(out, addend, weights, terms, count, scale, j, width);
}

// Rows first to last of the matrix out += scale * transposed left * right.
GRADCOMP_ENTRY void add_factors_rows(float *out, const float *addend, const Factors &factors, float scale,
                                     std::size_t first, std::size_t last) {
    const std::size_t rank = factors.rank, columns = factors.columns;
    std::vector<float> weights(rank);
    std::vector<const float *> terms(rank);
    for (std::size_t t = 0; t < rank; ++t) terms[t] = factors.right + t * columns;
    for (std::size_t row = first; row < last; ++row) {
        for (std::size_t t = 0; t < rank; ++t) weights[t] = factors.left[t * factors.rows + row];
        const std::size_t at = row * columns;
        combine(out + at, addend ? addend + at : nullptr, weights.data(), terms.data(), rank, scale, columns);
    }
}

// Tiles first to last of the matrix out += scale * inverse transform.
GRADCOMP_ENTRY void add_spectrum_tiles(float *out, const float *addend, const Spectrum &spectrum, float scale,
                                       std::size_t first, std::size_t last) {
    const std::size_t kept = spectrum.kept, height = spectrum.height, width = spectrum.width;
    std::vector<float> weights(kept);
    std::vector<const float *> terms(kept), factors(kept);
    for (std::size_t tile = first; tile < last; ++tile) {
        const std::size_t top = tile / spectrum.across_count * height, left = tile % spectrum.across_count * width;
        const std::size_t inside_rows = std::min(height, spectrum.rows - top);
        const std::size_t inside_columns = std::min(width, spectrum.columns - left);
        const float *values = spectrum.values + tile * kept;
        const std::uint16_t *index = spectrum.index + tile * kept;
        for (std::size_t t = 0; t < kept; ++t) {
            terms[t] = spectrum.across + index[t] % width * width;
            factors[t] = spectrum.down + index[t] / width * height;
        }
        for (std::size_t i = 0; i < inside_rows; ++i) {
            for (std::size_t t = 0; t < kept; ++t) weights[t] = values[t] * factors[t][i];
            const std::size_t at = (top + i) * spectrum.columns + left;
            combine(out + at, addend ? addend + at : nullptr, weights.data(), terms.data(), kept, scale, inside_columns);
        }
    }
}
