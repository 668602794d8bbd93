GRADCOMP_ENTRY std::uint32_t largest(const float *grad, std::size_t numel) {
    std::uint32_t most = 0;
    for (std::size_t i = 0; i < numel; ++i) {
        const std::uint32_t magnitude = bits_of(grad[i]) & kMagnitude;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}
