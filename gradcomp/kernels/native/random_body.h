// Philox4x32-10: eight counters are the random bits of a group of 64 elements, as reference_random.py orders them.

constexpr std::size_t kGroups = GRADCOMP_LEVEL >= 512 ? 2 : 1;  // drawn at a time; two keep the multipliers busy

// The numbers of some groups: for each element its 16 bits u as (u + 1/2) * 2^7, an even part of 2^23.
struct Draw {
    std::uint64_t key, step;
    std::uint64_t span = ~std::uint64_t{0};
    alignas(64) std::uint32_t chance[64 * kGroups];
};

constexpr std::uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr std::uint32_t kChances = 0x007fff80u, kHalf = 64;

#if GRADCOMP_LEVEL >= 512
// A group's counters, one word each in the low half of 64-bit lanes; the high halves are never looked at.
struct Eight {
    __m512i words[4];
};

GRADCOMP_INLINE void philox_round(Eight &eight, __m512i key0, __m512i key1) {
    constexpr int kXor = 0x96;  // of three
    const __m512i first = _mm512_mul_epu32(eight.words[0], _mm512_set1_epi64(kPhilox0));
    const __m512i second = _mm512_mul_epu32(eight.words[2], _mm512_set1_epi64(kPhilox1));
    const __m512i next = _mm512_ternarylogic_epi64(_mm512_srli_epi64(second, 32), eight.words[1], key0, kXor);
    eight.words[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(first, 32), eight.words[3], key1, kXor);
    eight.words[0] = next;
    eight.words[1] = second;
    eight.words[3] = first;
}

// Both halves of a word for eight elements each, one after the other.
GRADCOMP_INLINE void store_chances(const Eight &eight, std::uint32_t *chances) {
    const __m512i twice = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i places = _mm512_setr_epi32(7, 7, 7, 7, 7, 7, 7, 7, 23, 23, 23, 23, 23, 23, 23, 23);
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kChances)), half = _mm512_set1_epi32(static_cast<int>(kHalf));
    for (int word = 0; word < 4; ++word) {
        const __m512i both = _mm512_rolv_epi32(_mm512_permutexvar_epi32(twice, eight.words[word]), places);
        _mm512_store_si512(chances + 16 * word, _mm512_or_si512(_mm512_and_si512(both, mask), half));
    }
}

GRADCOMP_INLINE void refill(Draw &draw, std::uint64_t span) {
    draw.span = span;
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i position = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(8 * kGroups * span)), lanes);
    const __m512i after = _mm512_add_epi64(position, _mm512_set1_epi64(8));
    const __m512i step = _mm512_set1_epi64(static_cast<long long>(draw.step)), high_step = _mm512_srli_epi64(step, 32);
    Eight a{{position, _mm512_srli_epi64(position, 32), step, high_step}};
    Eight b{{after, _mm512_srli_epi64(after, 32), step, high_step}};
    __m512i key0 = _mm512_set1_epi64(static_cast<long long>(draw.key & 0xffffffffu));
    __m512i key1 = _mm512_set1_epi64(static_cast<long long>(draw.key >> 32));
    for (int round = 0; round < kRounds; ++round) {
        philox_round(a, key0, key1);
        philox_round(b, key0, key1);
        key0 = _mm512_add_epi32(key0, _mm512_set1_epi64(kWeyl0));
        key1 = _mm512_add_epi32(key1, _mm512_set1_epi64(kWeyl1));
    }
    store_chances(a, draw.chance);
    store_chances(b, draw.chance + 64);
}
#elif GRADCOMP_LEVEL >= 2
// Four counters, one word each in the low half of 64-bit lanes; the high halves are never looked at.
struct Four {
    __m256i words[4];
};

GRADCOMP_INLINE void philox_round(Four &four, __m256i key0, __m256i key1) {
    const __m256i first = _mm256_mul_epu32(four.words[0], _mm256_set1_epi64x(kPhilox0));
    const __m256i second = _mm256_mul_epu32(four.words[2], _mm256_set1_epi64x(kPhilox1));
    const __m256i next = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), four.words[1]), key0);
    four.words[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), four.words[3]), key1);
    four.words[0] = next;
    four.words[1] = second;
    four.words[3] = first;
}

GRADCOMP_INLINE void refill(Draw &draw, std::uint64_t span) {
    draw.span = span;
    const __m256i position = _mm256_set1_epi64x(static_cast<long long>(8 * span));
    const __m256i even = _mm256_add_epi64(position, _mm256_setr_epi64x(0, 2, 4, 6));
    const __m256i odd = _mm256_add_epi64(position, _mm256_setr_epi64x(1, 3, 5, 7));
    const __m256i step = _mm256_set1_epi64x(static_cast<long long>(draw.step)), high_step = _mm256_srli_epi64(step, 32);
    Four a{{even, _mm256_srli_epi64(even, 32), step, high_step}};
    Four b{{odd, _mm256_srli_epi64(odd, 32), step, high_step}};
    __m256i key0 = _mm256_set1_epi64x(static_cast<long long>(draw.key & 0xffffffffu));
    __m256i key1 = _mm256_set1_epi64x(static_cast<long long>(draw.key >> 32));
    for (int round = 0; round < kRounds; ++round) {
        philox_round(a, key0, key1);
        philox_round(b, key0, key1);
        key0 = _mm256_add_epi32(key0, _mm256_set1_epi64x(kWeyl0));
        key1 = _mm256_add_epi32(key1, _mm256_set1_epi64x(kWeyl1));
    }
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(kChances)), half = _mm256_set1_epi32(static_cast<int>(kHalf));
    for (int word = 0; word < 4; ++word) {
        const __m256i eight = _mm256_blend_epi32(a.words[word], _mm256_slli_epi64(b.words[word], 32), 0xAA);
        const __m256i low = _mm256_and_si256(_mm256_slli_epi32(eight, 7), mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi32(eight, 9), mask);
        __m256i *rows = reinterpret_cast<__m256i *>(draw.chance + 16 * word);
        _mm256_store_si256(rows, _mm256_or_si256(low, half));
        _mm256_store_si256(rows + 1, _mm256_or_si256(high, half));
    }
}
#else
GRADCOMP_INLINE void refill(Draw &draw, std::uint64_t span) {
    draw.span = span;
    std::uint32_t words[4][8];
    for (std::uint32_t lane = 0; lane < 8; ++lane) {
        const std::uint64_t position = 8 * span + lane;
        words[0][lane] = static_cast<std::uint32_t>(position);
        words[1][lane] = static_cast<std::uint32_t>(position >> 32);
        words[2][lane] = static_cast<std::uint32_t>(draw.step);
        words[3][lane] = static_cast<std::uint32_t>(draw.step >> 32);
    }
    std::uint32_t key0 = static_cast<std::uint32_t>(draw.key), key1 = static_cast<std::uint32_t>(draw.key >> 32);
    for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1) {
        for (int lane = 0; lane < 8; ++lane) {
            const std::uint64_t first = std::uint64_t{kPhilox0} * words[0][lane];
            const std::uint64_t second = std::uint64_t{kPhilox1} * words[2][lane];
            words[0][lane] = static_cast<std::uint32_t>(second >> 32) ^ words[1][lane] ^ key0;
            words[2][lane] = static_cast<std::uint32_t>(first >> 32) ^ words[3][lane] ^ key1;
            words[1][lane] = static_cast<std::uint32_t>(second);
            words[3][lane] = static_cast<std::uint32_t>(first);
        }
    }
    for (int word = 0; word < 4; ++word) {
        for (int lane = 0; lane < 8; ++lane) {
            draw.chance[16 * word + lane] = (words[word][lane] << 7 & kChances) | kHalf;
            draw.chance[16 * word + 8 + lane] = (words[word][lane] >> 9 & kChances) | kHalf;
        }
    }
}
#endif

// The chances of an element and those after it in its group.
GRADCOMP_INLINE const std::uint32_t *chances_at(Draw &draw, std::size_t element) {
    constexpr std::size_t kElements = 64 * kGroups;
    if (draw.span != element / kElements) refill(draw, element / kElements);
    return draw.chance + element % kElements;
}
