// Packs codes, one a byte, each below 2^bits, from memory aligned to 32 bytes. Reads up to the next multiple of 8, where
// there must be zeros.
GRADCOMP_INLINE void pack_some(const std::uint8_t *codes, std::size_t count, unsigned bits, std::uint8_t *packed) {
    std::size_t done = 0;
#if GRADCOMP_LEVEL >= 2
    if (bits < 8) done = pack_vectors(codes, packed_nbytes(count, bits), bits, packed);
#endif
    pack_codes(codes + done, count - done, bits, packed + packed_nbytes(done, bits));
}
