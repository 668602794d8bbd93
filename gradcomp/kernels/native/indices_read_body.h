// Reads checked index sets, chunk by chunk.

// 8 bytes, those beyond the end as 0.
GRADCOMP_INLINE std::uint64_t load_word(const std::uint8_t *bytes, std::uint64_t nbytes, std::uint64_t at) {
    std::uint64_t word = 0;
    if (at + 8 <= nbytes) {
        std::memcpy(&word, bytes + at, 8);
    } else if (at < nbytes) {
        std::memcpy(&word, bytes + at, nbytes - at);
    }
    return word;
}

// The 64 bits from bit `at` on, those beyond the end as 0.
GRADCOMP_INLINE std::uint64_t load_bits(const std::uint8_t *bytes, std::uint64_t nbytes, std::uint64_t at) {
    const unsigned shift = at % 8;
    const std::uint64_t low = load_word(bytes, nbytes, at / 8) >> shift;
    if (shift == 0 || at / 8 + 8 >= nbytes) return low;
    return low | std::uint64_t{bytes[at / 8 + 8]} << (64 - shift);
}

GRADCOMP_INLINE std::uint64_t count_ones(const std::uint8_t *bytes, std::uint64_t nbytes) {
    std::uint64_t ones = 0;
    for (std::uint64_t at = 0; at < nbytes; at += 8) {
        ones += static_cast<std::uint64_t>(__builtin_popcountll(load_word(bytes, nbytes, at)));
    }
    return ones;
}

// RICE's fields first..first+count-1, of which the first begins at a byte. May write up to 8 more.
GRADCOMP_INLINE void load_fields(const Rice &rice, std::uint64_t first, std::size_t count, std::uint64_t *fields) {
    std::size_t done = 0;
    std::uint64_t at = first * rice.width;
#if GRADCOMP_LEVEL >= 2
    // Eight fields at once: four from each of two loads of 16 bytes, moved to lanes of 4 bytes, which hold 25 bits wherever
    // these begin, then shifted down.
    if (rice.width <= 25) {
        alignas(32) std::uint8_t order[32];
        alignas(32) std::uint32_t shifts[8];
        for (unsigned lane = 0; lane < 8; ++lane) {
            const unsigned bit = (lane < 4 ? 0 : 4 * rice.width % 8) + lane % 4 * rice.width;
            for (unsigned k = 0; k < 4; ++k) order[4 * lane + k] = static_cast<std::uint8_t>(bit / 8 + k);
            shifts[lane] = bit % 8;
        }
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i *>(order));
        const __m256i down = _mm256_load_si256(reinterpret_cast<const __m256i *>(shifts));
        const __m256i mask = _mm256_set1_epi32(static_cast<int>(rice.field_mask));
        const std::uint64_t half = 4 * rice.width / 8;
        for (; done < count && at / 8 + half + 16 <= rice.set_nbytes; done += 8, at += 8 * rice.width) {
            const std::uint8_t *bytes = rice.fields + at / 8;
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + half));
            const __m256i both = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), lanes);
            const __m256i found = _mm256_and_si256(_mm256_srlv_epi32(both, down), mask);
            auto *to = reinterpret_cast<__m256i *>(fields + done);
            _mm256_storeu_si256(to, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(found)));
            _mm256_storeu_si256(to + 1, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(found, 1)));
        }
    }
#endif
    for (; done < count; ++done, at += rice.width) {
        fields[done] = load_bits(rice.fields, rice.set_nbytes, at) & rice.field_mask;
    }
}

// What reads a set, a struct for each coding: read(reader, sink, marks) writes up to kChunk marks and returns how many; 0
// at the end. The set was checked.
struct WordsReader {
    const Set &set;
    std::uint64_t i = 0;
};

template <typename Sink> GRADCOMP_INLINE std::size_t read(WordsReader &reader, const Sink &sink, std::uint64_t *marks) {
    const std::uint64_t left = reader.set.count - reader.i;
    const std::size_t found = left < kChunk ? left : kChunk;
    for (std::size_t k = 0; k < found; ++k) {
        std::uint32_t word;
        std::memcpy(&word, reader.set.bytes + 4 * (reader.i + k), sizeof word);
        marks[k] = std::uint64_t{word & 0x7fffffffu} << 1 | word >> 31;
        expect(sink, marks[k]);
    }
    reader.i += found;
    return found;
}

struct GapsReader {
    const Set &set;
    std::uint64_t i = 0;
    std::uint64_t next = 0;  // twice the lowest position that may come now
};

template <typename Sink> GRADCOMP_INLINE std::size_t read(GapsReader &reader, const Sink &sink, std::uint64_t *marks) {
    const std::uint64_t left = reader.set.count - reader.i;
    const std::size_t found = left < kChunk ? left : kChunk;
    for (std::size_t k = 0; k < found; ++k) {
        std::uint16_t unit;
        std::memcpy(&unit, reader.set.bytes + 2 * (reader.i + k), sizeof unit);
        marks[k] = reader.next + unit;
        reader.next = (marks[k] | 1) + 1;
        expect(sink, marks[k]);
    }
    reader.i += found;
    return found;
}

struct RiceReader {
    const Set &set;
    std::uint64_t i = 0;
    std::uint64_t at = 0;    // byte of the unary part that comes next
    std::uint64_t ones = 0;  // those left of the 8 bytes before
    // An element's mark is its one's place in the unary part, times 2^(low_bits + 1), plus its own field, plus the sum over
    // the elements before it of: field without sign, and one for itself, less the one that it takes in the unary part.
    std::uint64_t sum = 0;
};

template <typename Sink> GRADCOMP_INLINE std::size_t read(RiceReader &reader, const Sink &sink, std::uint64_t *marks) {
    const Rice rice = rice_of(reader.set);
    const unsigned high = rice.low_bits + 1, widen = !reader.set.is_signed;
    const std::uint64_t step = 2 - (std::uint64_t{2} << rice.low_bits);
    const std::uint64_t left = reader.set.count - reader.i;
    const std::size_t wanted = left < kChunk ? left : kChunk;
    std::uint64_t fields[kChunk + 8];
    load_fields(rice, reader.i, wanted, fields);
    std::uint64_t ones = reader.ones, sum = reader.sum;
    for (std::size_t found = 0; found < wanted;) {
        if (ones == 0) {
            ones = load_word(rice.unary, rice.unary_nbytes, reader.at);
            reader.at += 8;
        }
        const std::uint64_t base = (reader.at - 8) * 8 << high;
        for (; ones != 0 && found < wanted; ones &= ones - 1, ++found) {
            const std::uint64_t field = fields[found] << widen;
            marks[found] = base + (static_cast<std::uint64_t>(__builtin_ctzll(ones)) << high) + sum + field;
            expect(sink, marks[found]);
            sum += (field & ~std::uint64_t{1}) + step;
        }
    }
    reader.i += wanted;
    reader.ones = ones;
    reader.sum = sum;
    return wanted;
}

struct MapReader {
    const Set &set;
    std::uint64_t at = 0;     // byte of the map
    std::uint64_t signs = 0;  // of them so far
};

template <typename Sink> GRADCOMP_INLINE std::size_t read(MapReader &reader, const Sink &, std::uint64_t *marks) {
    const Set &set = reader.set;
    const std::uint64_t nbytes = bytes_for(set.numel);
    std::size_t found = 0;
    for (; found + 64 <= kChunk && reader.at < nbytes; reader.at += 8) {
        std::uint64_t ones = load_word(set.bytes, nbytes, reader.at);
        std::uint64_t signs = 0;
        if (set.is_signed && ones != 0) {
            signs = load_bits(set.bytes + nbytes, set.nbytes - nbytes, reader.signs);
            reader.signs += static_cast<std::uint64_t>(__builtin_popcountll(ones));
        }
        for (; ones != 0; ones &= ones - 1, signs >>= 1) {
            const std::uint64_t position = reader.at * 8 + static_cast<std::uint64_t>(__builtin_ctzll(ones));
            marks[found++] = position << 1 | (signs & 1);
        }
    }
    return found;
}
