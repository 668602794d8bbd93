// Sums in float64 in the order of reference_sums.py: 16 lanes over each run of 512 elements, then a tree, then the runs.

constexpr std::size_t kLanes = 16;
constexpr std::size_t kRun = 512;

// Adds up the lanes of one run: 8 to 15 onto 0 to 7, 4 to 7 onto 0 to 3, 2 and 3 onto 0 and 1, 1 onto 0.
GRADCOMP_INLINE double fold_lanes(double *lanes) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

#if GRADCOMP_LEVEL >= 2
GRADCOMP_INLINE __m256d low_half(__m256 values) { return _mm256_cvtps_pd(_mm256_castps256_ps128(values)); }
GRADCOMP_INLINE __m256d high_half(__m256 values) { return _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)); }
#endif
