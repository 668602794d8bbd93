// Sums in the order of reference_sums.py: 16 lanes over each run of 512 elements, then a tree, then the runs.

constexpr std::size_t kLanes = 16;
constexpr std::size_t kRun = 512;
constexpr float kScaleDown = 0x1p-40f;
constexpr double kScaleUp = 0x1p40;

// Adds up the lanes of one run: 8 to 15 onto 0 to 7, 4 to 7 onto 0 to 3, 2 and 3 onto 0 and 1, 1 onto 0.
template <typename Number> GRADCOMP_INLINE Number fold_lanes(Number *lanes) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}
