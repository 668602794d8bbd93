// Codes of 1 to 8 bits, packed lowest bits first: eight of them, a group, take `bits` bytes. Unused bits are 0.
//
// Plain arithmetic on words of eight bytes: inlined into a body file's functions it is compiled for their level.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "levels.h"

namespace gradcomp {

constexpr std::size_t kCodesAtOnce = 1024;  // unpacked at a time, a byte each; a multiple of 8

inline std::size_t packed_nbytes(std::size_t count, unsigned bits) {
    return count / 8 * bits + (count % 8 * bits + 7) / 8;
}

// Eight bytes below 2^bits to 8 * bits bits: neighbours move together in pairs, then fours, then all eight.
inline __attribute__((always_inline)) std::uint64_t pack_group(std::uint64_t word, unsigned bits) {
    const unsigned gap = 8 - bits;
    word = (word & 0x00ff00ff00ff00ffu) | (word & 0xff00ff00ff00ff00u) >> gap;
    word = (word & 0x0000ffff0000ffffu) | (word & 0xffff0000ffff0000u) >> 2 * gap;
    return (word & 0x00000000ffffffffu) | (word & 0xffffffff00000000u) >> 4 * gap;
}

// The inverse.
inline __attribute__((always_inline)) std::uint64_t unpack_group(std::uint64_t word, unsigned bits) {
    const unsigned gap = 8 - bits;
    const std::uint64_t half = (std::uint64_t{1} << 4 * bits) - 1;
    const std::uint64_t pair = 0x0000000100000001u * ((std::uint64_t{1} << 2 * bits) - 1);
    const std::uint64_t one = 0x0001000100010001u * ((std::uint64_t{1} << bits) - 1);
    word = (word & half) | (word >> 4 * bits & half) << 32;
    word = (word & pair) | (word & pair << 2 * bits) << 2 * gap;
    return (word & one) | (word & one << bits) << gap;
}

#if GRADCOMP_X86
// Packs whole vectors of 32 codes as long as there is room to write eight bytes a group; how many codes that were.
__attribute__((target("avx2"), always_inline)) inline std::size_t pack_vectors(const std::uint8_t *codes,
                                                                               std::size_t nbytes, unsigned bits,
                                                                               std::uint8_t *packed) {
    const __m256i two = _mm256_set1_epi16(static_cast<short>(1 | 1 << (bits + 8)));  // bytes 1, 2^bits
    const __m256i four = _mm256_set1_epi32(1 | 1 << (2 * bits + 16));                 // words 1, 4^bits
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    const __m128i gap = _mm_cvtsi32_si128(static_cast<int>(32 - 4 * bits));
    std::size_t done = 0;
    for (std::size_t at = 0; at + 3 * bits + 8 <= nbytes; at += 4 * bits, done += 32) {
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i *>(codes + done));
        const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(two, bytes), four);
        const __m256i upper = _mm256_srl_epi64(_mm256_andnot_si256(low, fours), gap);
        const __m256i eights = _mm256_or_si256(_mm256_and_si256(fours, low), upper);
        alignas(32) std::uint64_t words[4];
        _mm256_store_si256(reinterpret_cast<__m256i *>(words), eights);
        for (unsigned k = 0; k < 4; ++k) std::memcpy(packed + at + k * bits, words + k, 8);
    }
    return done;
}
#endif

// Packs `count` codes, one a byte, each below 2^bits. Reads up to the next multiple of 8, where there must be zeros.
inline __attribute__((always_inline)) void pack_codes(const std::uint8_t *codes, std::size_t count, unsigned bits,
                                                      std::uint8_t *packed) {
    const std::size_t nbytes = packed_nbytes(count, bits);
    if (bits == 8) {
        std::memcpy(packed, codes, nbytes);
        return;
    }
    std::size_t at = 0;
    for (; at + 8 <= nbytes; at += bits, codes += 8) {  // eight bytes: the next group overwrites what is too much
        std::uint64_t word;
        std::memcpy(&word, codes, 8);
        word = pack_group(word, bits);
        std::memcpy(packed + at, &word, 8);
    }
    for (; at < nbytes; codes += 8) {
        std::uint64_t word;
        std::memcpy(&word, codes, 8);
        word = pack_group(word, bits);
        for (unsigned k = 0; k < bits && at < nbytes; ++k) packed[at++] = static_cast<std::uint8_t>(word >> 8 * k);
    }
}

// The inverse. Writes up to the next multiple of 8.
inline __attribute__((always_inline)) void unpack_codes(const std::uint8_t *packed, std::size_t count, unsigned bits,
                                                        std::uint8_t *codes) {
    const std::size_t nbytes = packed_nbytes(count, bits);
    if (bits == 8) {
        std::memcpy(codes, packed, nbytes);
        return;
    }
    std::size_t at = 0;
    for (; at + 8 <= nbytes; at += bits, codes += 8) {
        std::uint64_t word;
        std::memcpy(&word, packed + at, 8);
        word = unpack_group(word, bits);
        std::memcpy(codes, &word, 8);
    }
    for (; at < nbytes; codes += 8) {
        std::uint64_t word = 0;
        for (unsigned k = 0; k < bits && at < nbytes; ++k) word |= std::uint64_t{packed[at++]} << 8 * k;
        word = unpack_group(word, bits);
        std::memcpy(codes, &word, 8);
    }
}

}  // namespace gradcomp
