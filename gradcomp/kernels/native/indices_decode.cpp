// Coded index sets: checked, decoded, and added to a vector straight from their bytes.
//
// Everything is checked before anything is written: a set that is refused leaves no trace, and what reads a set after that
// looks at nothing again.

#include <cstring>

#include "finite.h"
#include "indices_read.h"
#include "parallel.h"

namespace gradcomp {
namespace {

constexpr const char *kWrongSize = "its size does not fit count, numel and coding";
constexpr const char *kNotRising = "indices are not strictly increasing and below numel";
constexpr const char *kSignInUnsigned = "a sign bit is set in a set without signs";
constexpr const char *kPadding = "a bit is set beyond the last element";

#define GRADCOMP_BODY "indices_decode_body.h"
#include "foreach_level.h"

}  // namespace

const char *find_fault(const Set &set, Level level, const std::vector<std::size_t> &starts,
                       std::vector<std::uint64_t> &before) {
    if (set.count > set.numel || set.numel > max_numel(set.coding)) return kWrongSize;
    const std::uint64_t most = max_coded_nbytes(set.count, set.numel, set.coding, set.is_signed);
    std::uint64_t least = most;
    if (set.coding == Coding::rice) {
        least = bytes_for(set.count * (rice_bits(set.count, set.numel) + set.is_signed)) + bytes_for(set.count);
    }
    if (set.nbytes < least || set.nbytes > most) return kWrongSize;
    if (set.coding == Coding::words) return GRADCOMP_AT(level, check_words)(set);
    if (set.coding == Coding::gaps) return GRADCOMP_AT(level, check_gaps)(set);
    if (set.coding == Coding::rice) return GRADCOMP_AT(level, check_rice)(set);
    const std::uint64_t nbytes = bytes_for(set.numel);
    if (set.numel % 8 && set.bytes[nbytes - 1] >> set.numel % 8) return kPadding;
    if (set.is_signed && set.count % 8 && set.bytes[set.nbytes - 1] >> set.count % 8) return kPadding;
    before.assign(starts.size(), 0);
    parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
        before[part + 1] = GRADCOMP_AT(level, count_ones_of)(set.bytes + start / 8, bytes_for(stop) - start / 8);
    });
    for (std::size_t part = 1; part < before.size(); ++part) before[part] += before[part - 1];
    return before.back() == set.count ? nullptr : "the map does not name as many elements as count says";
}

namespace {

const char *find_fault(const Set &set, Level level) {
    std::vector<std::uint64_t> before;
    return find_fault(set, level, {0, set.numel}, before);
}

Set set_of(const Bytes &payload, std::uint64_t count, std::uint64_t numel, int coding, bool is_signed) {
    if (coding < 1 || coding > 4) throw std::invalid_argument("coding must be 1 to 4");
    return Set{payload.data(), payload.shape(0), count, numel, static_cast<Coding>(coding), is_signed};
}

nb::object as_error(const char *fault) { return fault == nullptr ? nb::none() : nb::cast(fault); }

nb::object check_indices(const Bytes &payload, std::uint64_t count, std::uint64_t numel, int coding, bool is_signed,
                         const std::string &level_name) {
    const Set set = set_of(payload, count, numel, coding, is_signed);
    const Level level = level_named(level_name);
    const char *fault;
    {
        nb::gil_scoped_release released;
        fault = find_fault(set, level);
    }
    return as_error(fault);
}

nb::object decode_indices(const Bytes &payload, std::uint64_t count, std::uint64_t numel, int coding, bool is_signed,
                          const std::string &level_name) {
    const Set set = set_of(payload, count, numel, coding, is_signed);
    const Level level = level_named(level_name);
    Array<std::int64_t> index;
    Array<bool> negative;
    const char *fault;
    {
        nb::gil_scoped_release released;
        fault = find_fault(set, level);
        if (fault == nullptr) {
            index = new_array<std::int64_t>(count);
            negative = new_array<bool>(count);
            GRADCOMP_AT(level, decode_set)(set, index.get(), negative.get());
        }
    }
    if (fault != nullptr) return as_error(fault);
    return nb::make_tuple(as_tensor(std::move(index), count), as_tensor(std::move(negative), count));
}

nb::object add_signs(const MutableFloats &out, const Bytes &payload, std::uint64_t count, int coding, float magnitude,
                     const std::string &level_name, int threads) {
    const Set set = set_of(payload, count, out.shape(0), coding, true);
    const Level level = level_named(level_name);
    const char *fault;
    {
        nb::gil_scoped_release released;
        const auto starts = split(set.numel, 64, threads);
        std::vector<std::uint64_t> before;
        fault = find_fault(set, level, starts, before);
        if (fault == nullptr && set.coding == Coding::map) {
            parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
                GRADCOMP_AT(level, add_sign_map_of)(set, out.data() + start, magnitude, start, stop, before[part]);
            });
        } else if (fault == nullptr) {
            GRADCOMP_AT(level, add_signs_of)(set, out.data(), magnitude);
        }
    }
    return as_error(fault);
}

nb::object add_values(const MutableFloats &out, const Bytes &payload, std::uint64_t count, int coding,
                      const Floats &values, float scale, const std::string &level_name, int threads) {
    const Set set = set_of(payload, count, out.shape(0), coding, false);
    const Level level = level_named(level_name);
    if (values.shape(0) != count) throw std::invalid_argument("values must be as many as count says");
    const char *fault;
    {
        nb::gil_scoped_release released;
        const auto starts = split(set.numel, 64, threads);
        std::vector<std::uint64_t> before;
        fault = find_fault(set, level, starts, before);
        if (fault == nullptr && set.coding == Coding::map) {
            parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
                GRADCOMP_AT(level, add_value_map_of)(set, out.data() + start, values.data(), scale, start, stop,
                                                      before[part]);
            });
        } else if (fault == nullptr) {
            GRADCOMP_AT(level, add_values_of)(set, out.data(), values.data(), scale);
        }
    }
    return as_error(fault);
}

}  // namespace

void bind_indices_decode(nb::module_ &module) {
    module.def("check_indices", &check_indices, "payload"_a.noconvert(), "count"_a, "numel"_a, "coding"_a, "signed"_a,
               "level"_a = module.attr("LEVEL"));
    module.def("decode_indices", &decode_indices, "payload"_a.noconvert(), "count"_a, "numel"_a, "coding"_a, "signed"_a,
               "level"_a = module.attr("LEVEL"));
    module.def("add_signs", &add_signs, "out"_a.noconvert(), "payload"_a.noconvert(), "count"_a, "coding"_a,
               "magnitude"_a, "level"_a = module.attr("LEVEL"), "threads"_a = 1);
    module.def("add_values", &add_values, "out"_a.noconvert(), "payload"_a.noconvert(), "count"_a, "coding"_a,
               "values"_a.noconvert(), "scale"_a, "level"_a = module.attr("LEVEL"), "threads"_a = 1);
}

}  // namespace gradcomp
