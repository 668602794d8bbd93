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

GRADCOMP_ENTRY std::uint64_t count_ones_of(const std::uint8_t *bytes, std::uint64_t nbytes) {
    return count_ones(bytes, nbytes);
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

GRADCOMP_ENTRY const char *check_words(const Set &set) {
    std::uint64_t next = 0;
    std::uint32_t all = 0;
    bool rising = true;
    for (std::uint64_t i = 0; i < set.count; ++i) {
        std::uint32_t word;
        std::memcpy(&word, set.bytes + 4 * i, sizeof word);
        const std::uint64_t position = word & 0x7fffffffu;
        all |= word;
        rising &= position >= next;
        next = position + 1;
    }
    if (!rising || next > set.numel) return kNotRising;
    return !set.is_signed && all >> 31 ? kSignInUnsigned : nullptr;
}

GRADCOMP_ENTRY const char *check_gaps(const Set &set) {
    std::uint64_t next = 0;
    std::uint32_t all = 0;
    for (std::uint64_t i = 0; i < set.count; ++i) {
        std::uint16_t unit;
        std::memcpy(&unit, set.bytes + 2 * i, sizeof unit);
        all |= unit;
        next += (unit >> 1) + 1u;
    }
    if (next > set.numel) return kNotRising;
    return !set.is_signed && all & 1 ? kSignInUnsigned : nullptr;
}

GRADCOMP_ENTRY const char *check_rice(const Set &set) {
    if (set.count == 0) return nullptr;
    const Rice rice = rice_of(set);
    if (rice.unary[rice.unary_nbytes - 1] == 0 || count_ones(rice.unary, rice.unary_nbytes) != set.count) {
        return "not as many elements as count says, or bytes after the last one";
    }
    const unsigned used = set.count * rice.width % 8;
    if (used && rice.unary[-1] >> used) return kPadding;
    std::uint64_t low = 0, fields[kChunk + 8];
    for (std::uint64_t i = 0; i < set.count; i += kChunk) {
        const std::size_t some = set.count - i < kChunk ? set.count - i : kChunk;
        load_fields(rice, i, some, fields);
        for (std::size_t k = 0; k < some; ++k) low += fields[k] >> set.is_signed;
    }
    const unsigned spare = static_cast<unsigned>(__builtin_clz(rice.unary[rice.unary_nbytes - 1])) - 24;
    const std::uint64_t zeros = 8 * rice.unary_nbytes - spare - set.count;
    return (zeros << rice.low_bits) + low + set.count > set.numel ? kNotRising : nullptr;
}

// What is done with the elements of a set, a struct for each use: expect(sink, mark) as soon as an element is known,
// take(sink, marks, count) later. A mark is a position times 2 plus the sign.
struct ListSink {
    std::int64_t *index;
    bool *negative;
};

GRADCOMP_INLINE void expect(const ListSink &, std::uint64_t) {}

GRADCOMP_INLINE void take(ListSink &sink, const std::uint64_t *marks, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
        sink.index[k] = static_cast<std::int64_t>(marks[k] >> 1);
        sink.negative[k] = marks[k] & 1;
    }
    sink.index += count;
    sink.negative += count;
}

struct SignsSink {
    float *out;
    std::uint32_t magnitude;
};

// The elements of a sparse set lie in cache lines of their own, which come while others are being decoded.
GRADCOMP_INLINE void expect(const SignsSink &sink, std::uint64_t mark) { __builtin_prefetch(sink.out + (mark >> 1), 1); }

GRADCOMP_INLINE void take(SignsSink &sink, const std::uint64_t *marks, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
        sink.out[marks[k] >> 1] += float_of(sink.magnitude ^ static_cast<std::uint32_t>(marks[k]) << 31);
    }
}

struct ValuesSink {
    float *out;
    const float *values;
    float scale;
};

GRADCOMP_INLINE void expect(const ValuesSink &sink, std::uint64_t mark) {
    __builtin_prefetch(sink.out + (mark >> 1), 1);
}

GRADCOMP_INLINE void take(ValuesSink &sink, const std::uint64_t *marks, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) sink.out[marks[k] >> 1] += sink.values[k] * sink.scale;
    sink.values += count;
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

// Decodes one chunk ahead of the one that is taken, so that what the sink expects has time to come.
template <typename Reader, typename Sink> GRADCOMP_INLINE void run(Reader reader, Sink sink) {
    std::uint64_t chunks[2][kChunk];
    std::size_t ready = read(reader, sink, chunks[0]);
    for (unsigned turn = 0; ready != 0; turn ^= 1) {
        const std::size_t after = read(reader, sink, chunks[turn ^ 1]);
        take(sink, chunks[turn], ready);
        ready = after;
    }
}

template <typename Sink> GRADCOMP_INLINE void run_list(const Set &set, Sink sink) {
    if (set.coding == Coding::words) return run(WordsReader{set}, sink);
    if (set.coding == Coding::gaps) return run(GapsReader{set}, sink);
    if (set.count != 0) run(RiceReader{set}, sink);
}

GRADCOMP_ENTRY void decode_set(const Set &set, std::int64_t *index, bool *negative) {
    const ListSink sink{index, negative};
    if (set.coding == Coding::map) return run(MapReader{set}, sink);
    run_list(set, sink);
}

// For all codings but MAP, of which there is more below.

GRADCOMP_ENTRY void add_signs_of(const Set &set, float *out, float magnitude) {
    run_list(set, SignsSink{out, bits_of(magnitude)});
}

GRADCOMP_ENTRY void add_values_of(const Set &set, float *out, const float *values, float scale) {
    run_list(set, ValuesSink{out, values, scale});
}

// The bits of `value`, from the lowest on, where `mask` has ones.
GRADCOMP_INLINE std::uint64_t spread_bits(std::uint64_t value, std::uint64_t mask) {
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    return _pdep_u64(value, mask);
#else
    std::uint64_t result = 0;
    for (; mask != 0; mask &= mask - 1, value >>= 1) result |= (mask & -mask) & -(value & 1);
    return result;
#endif
}

// Adds to 64 elements at out: magnitude where `mask`, its opposite where `minus` too, and -0.0, which changes nothing, where
// only `minus`.
GRADCOMP_INLINE void add_word(float *out, std::uint64_t mask, std::uint64_t minus, std::uint32_t magnitude) {
#if GRADCOMP_LEVEL >= 2
    const __m256i value = _mm256_set1_epi32(static_cast<int>(magnitude));
    const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);  // bit i to the top of lane i
    for (unsigned k = 0; k < 64; k += 8) {
        const __m256i named = _mm256_set1_epi32(static_cast<int>(mask >> k & 0xff));
        const __m256i signs = _mm256_set1_epi32(static_cast<int>(minus >> k & 0xff));
        const __m256i keep = _mm256_srai_epi32(_mm256_sllv_epi32(named, shifts), 31);
        const __m256i flip = _mm256_and_si256(_mm256_sllv_epi32(signs, shifts), top);
        const __m256 term = _mm256_castsi256_ps(_mm256_xor_si256(_mm256_and_si256(value, keep), flip));
        _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_loadu_ps(out + k), term));
    }
#else
    for (unsigned k = 0; k < 64; ++k) {
        const std::uint32_t keep = -static_cast<std::uint32_t>(mask >> k & 1);
        out[k] += float_of((magnitude & keep) ^ static_cast<std::uint32_t>(minus >> k & 1) << 31);
    }
#endif
}

// Adds to the `count` elements at out, 64 at most, those of `values` that `mask` names, times scale; returns where the next
// ones are.
GRADCOMP_INLINE const float *add_values_word(float *out, [[maybe_unused]] std::size_t count, std::uint64_t mask,
                                             const float *values, [[maybe_unused]] const float *end, float scale) {
    std::size_t k = 0;
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    for (; k + 8 <= count && end - values >= 8; k += 8) {
        const std::uint64_t named = mask >> k & 0xff;
        const std::uint64_t lanes = _pdep_u64(named, 0x0101010101010101u) * 0xff;
        const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(_pdep_u64(0x0706050403020100u, lanes)));
        const __m256 keep = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes))));
        const __m256 apart = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), _mm256_cvtepu8_epi32(order));
        const __m256 product = _mm256_mul_ps(apart, _mm256_set1_ps(scale));
        const __m256 term = _mm256_blendv_ps(_mm256_set1_ps(-0.0f), product, keep);
        _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_loadu_ps(out + k), term));
        values += __builtin_popcountll(named);
    }
    if (k == 64) return values;
#endif
    for (mask = mask >> k << k; mask != 0; mask &= mask - 1) out[__builtin_ctzll(mask)] += *values++ * scale;
    return values;
}

// Elements start..stop-1 of a MAP, of which `before` elements are named before start, a multiple of 64.
GRADCOMP_ENTRY void add_value_map_of(const Set &set, float *out, const float *values, float scale, std::size_t start,
                                     std::size_t stop, std::uint64_t before) {
    const float *next = values + before;
    for (std::size_t i = start; i < stop; i += 64) {
        const std::uint64_t mask = load_word(set.bytes, bytes_for(set.numel), i / 8);
        next = add_values_word(out + i, stop - i < 64 ? stop - i : 64, mask, next, values + set.count, scale);
    }
}

// Elements start..stop-1 of a signed MAP, of which `signs` elements are named before start, a multiple of 64.
GRADCOMP_ENTRY void add_sign_map_of(const Set &set, float *out, float magnitude, std::size_t start, std::size_t stop,
                                    std::uint64_t signs) {
    const std::uint64_t nbytes = bytes_for(set.numel);
    const std::uint32_t bits = bits_of(magnitude);
    for (std::size_t i = start; i < stop; i += 64) {
        const std::uint64_t mask = load_word(set.bytes, nbytes, i / 8);
        const std::uint64_t in_order = load_bits(set.bytes + nbytes, set.nbytes - nbytes, signs);
        const std::uint64_t minus = spread_bits(in_order, mask) | ~mask;
        signs += static_cast<std::uint64_t>(__builtin_popcountll(mask));
        if (stop - i >= 64) {
            add_word(out + i, mask, minus, bits);
            continue;
        }
        float last[64] = {};
        std::memcpy(last, out + i, (stop - i) * sizeof(float));
        add_word(last, mask, minus, bits);
        std::memcpy(out + i, last, (stop - i) * sizeof(float));
    }
}
