// Which coding an index set takes, and the set written in it: from two bit planes, or from lists.

#include <cstring>

#include "indices.h"

namespace gradcomp {

std::uint64_t max_coded_nbytes(std::uint64_t count, std::uint64_t numel, Coding coding, bool is_signed) {
    switch (coding) {
        case Coding::words:
            return 4 * count;
        case Coding::gaps:
            return 2 * count;
        case Coding::map:
            return bytes_for(numel) + (is_signed ? bytes_for(count) : 0);
        case Coding::rice: {
            if (count == 0) return 0;
            const unsigned low_bits = rice_bits(count, numel);
            return bytes_for(count * (low_bits + is_signed)) + bytes_for(count + ((numel - count) >> low_bits));
        }
        default:
            throw std::invalid_argument("coding must be 1 to 4");
    }
}

Coding choose_coding(std::uint64_t count, std::uint64_t numel, bool is_signed) {
    if (count > numel / 8) return Coding::map;
    Coding best = Coding::rice;
    for (const Coding coding : {Coding::map, Coding::gaps, Coding::words}) {  // of equal ones the last
        if (numel <= max_numel(coding) &&
            max_coded_nbytes(count, numel, coding, is_signed) <= max_coded_nbytes(count, numel, best, is_signed)) {
            best = coding;
        }
    }
    return best;
}

namespace {

#define GRADCOMP_BODY "indices_encode_body.h"
#include "foreach_level.h"

Coding coding_numbered(int number) {
    if (number < 1 || number > 4) throw std::invalid_argument("coding must be 1 to 4");
    return static_cast<Coding>(number);
}

void require_countable(std::uint64_t count, std::uint64_t numel, Coding coding) {
    if (count > numel || numel > max_numel(coding)) {
        throw std::invalid_argument("so many elements of so many cannot be written in this coding");
    }
}

auto as_bytes(Coded coded) { return as_tensor(std::move(coded.bytes), coded.nbytes); }

nb::object encode_list(const Vector<const std::int64_t> &index, const std::optional<Vector<const bool>> &negative,
                       std::uint64_t numel, int coding_number, const std::string &level_name) {
    const std::uint64_t count = index.shape(0);
    const Coding coding = coding_numbered(coding_number);
    const Level level = level_named(level_name);
    require_countable(count, numel, coding);
    if (negative && negative->shape(0) != count) throw std::invalid_argument("negative must have index's size");
    Coded coded;
    {
        nb::gil_scoped_release released;
        std::uint64_t next = 0;
        bool right = true;
        for (std::uint64_t i = 0; i < count; ++i) {
            const std::uint64_t position = static_cast<std::uint64_t>(index.data()[i]);
            right &= position >= next && position < numel;
            next = position + 1;
        }
        if (!right) throw std::invalid_argument("index must be strictly increasing, from 0 on and below numel");
        coded.bytes = new_array<std::uint8_t>(max_coded_nbytes(count, numel, coding, negative.has_value()));
        coded.nbytes = GRADCOMP_AT(level, encode_set_of_list)(coded.bytes.get(), index.data(),
                                                              negative ? negative->data() : nullptr, numel, count, coding);
    }
    return nb::cast(as_bytes(std::move(coded)));
}

nb::object encode_planes_bound(const Vector<const std::int64_t> &mask,
                               const std::optional<Vector<const std::int64_t>> &negative, std::uint64_t numel,
                               int coding_number, const std::string &level_name) {
    const Coding coding = coding_numbered(coding_number);
    const Level level = level_named(level_name);
    const std::uint64_t words = numel / 64 + (numel % 64 != 0);
    if (mask.shape(0) != words) throw std::invalid_argument("mask must have a word for every 64 elements");
    if (negative) require_same_size("negative", *negative, mask);
    const auto *bits = reinterpret_cast<const std::uint64_t *>(mask.data());
    const auto *signs = negative ? reinterpret_cast<const std::uint64_t *>(negative->data()) : nullptr;
    if (numel % 64 && bits[words - 1] >> numel % 64) throw std::invalid_argument("mask has bits beyond numel");
    const std::uint64_t count = GRADCOMP_AT(level, count_ones)(bits, words);
    require_countable(count, numel, coding);
    Coded coded;
    {
        nb::gil_scoped_release released;
        coded = encode_planes(bits, signs, numel, count, coding, level);
    }
    return nb::cast(as_bytes(std::move(coded)));
}

}  // namespace

std::size_t encode_planes_to(std::uint8_t *out, const std::uint64_t *mask, const std::uint64_t *negative,
                             std::uint64_t numel, std::uint64_t count, Coding coding, Level level) {
    return GRADCOMP_AT(level, encode_set_of_planes)(out, mask, negative, numel, count, coding);
}

Coded encode_planes(const std::uint64_t *mask, const std::uint64_t *negative, std::uint64_t numel, std::uint64_t count,
                    Coding coding, Level level) {
    Coded coded;
    coded.bytes = new_array<std::uint8_t>(max_coded_nbytes(count, numel, coding, negative != nullptr));
    coded.nbytes = encode_planes_to(coded.bytes.get(), mask, negative, numel, count, coding, level);
    return coded;
}

void bind_indices_encode(nb::module_ &module) {
    module.def(
        "choose_coding",
        [](std::uint64_t count, std::uint64_t numel, bool is_signed) {
            return static_cast<int>(choose_coding(count, numel, is_signed));
        },
        "count"_a, "numel"_a, "signed"_a);
    module.def(
        "max_coded_nbytes",
        [](std::uint64_t count, std::uint64_t numel, int coding, bool is_signed) {
            return max_coded_nbytes(count, numel, coding_numbered(coding), is_signed);
        },
        "count"_a, "numel"_a, "coding"_a, "signed"_a);
    module.def("encode_indices", &encode_list, "index"_a.noconvert(), "negative"_a.noconvert().none(), "numel"_a,
               "coding"_a, "level"_a = module.attr("LEVEL"));
    module.def("encode_planes", &encode_planes_bound, "mask"_a.noconvert(), "negative"_a.noconvert().none(), "numel"_a,
               "coding"_a, "level"_a = module.attr("LEVEL"));
}

}  // namespace gradcomp
