#include "indices_read_body.h"
#include "indices_map_body.h"

GRADCOMP_ENTRY std::uint64_t count_ones_of(const std::uint8_t *bytes, std::uint64_t nbytes) {
    return count_ones(bytes, nbytes);
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

// For all codings but MAP, of which there is more in indices_map_body.h.

GRADCOMP_ENTRY void add_signs_of(const Set &set, float *out, float magnitude) {
    run_list(set, SignsSink{out, bits_of(magnitude)});
}

GRADCOMP_ENTRY void add_values_of(const Set &set, float *out, const float *values, float scale) {
    run_list(set, ValuesSink{out, values, scale});
}
