// Adding what packed codes stand for, and looking for codes that must not be.

#include "codes.h"

#include <algorithm>

#include "finite.h"
#include "float8.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

enum class Form { levels, centred, ternary, float8 };

struct Coded {
    Form form;
    const float *parameters;  // one a block, or two: low, step
    const std::uint8_t *codes;
    std::size_t nbytes;  // of codes
    unsigned bits;
    std::size_t block;  // never 0
};

#define GRADCOMP_BODY "codes_body.h"
#include "foreach_level.h"

std::size_t blocks_of(std::size_t numel, std::size_t block) { return numel / block + (numel % block != 0); }

void add(const MutableFloats &out, const Floats &parameters, const Bytes &codes, Form form, unsigned bits,
         std::size_t block, float scale, const std::optional<Floats> &addend, int threads,
         const std::string &level_name) {
    const std::size_t numel = out.shape(0);
    if (bits < 1 || bits > 8 || block % 8) throw std::invalid_argument("bits must be in 1..8, block a multiple of 8");
    if (addend) require_same_size("addend", *addend, out);
    const std::size_t rows = block ? blocks_of(numel, block) : 1;
    if (parameters.shape(0) != rows * (form == Form::levels ? 2 : 1)) {
        throw std::invalid_argument("there must be parameters for " + std::to_string(rows) + " blocks");
    }
    if (codes.shape(0) != packed_nbytes(numel, bits)) throw std::invalid_argument("codes do not fit out");
    const Level level = level_named(level_name);
    const Coded coded{form, parameters.data(), codes.data(), codes.shape(0), bits,
                       block ? block : std::max<std::size_t>(numel, 1)};
    nb::gil_scoped_release released;
    parallel(split(numel, 64, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        GRADCOMP_AT(level, add_any)(out.data(), addend ? addend->data() : nullptr, coded, scale, start, stop);
    });
}

void add_levels(const MutableFloats &out, const Floats &parameters, const Bytes &codes, unsigned bits,
                std::size_t block, float scale, const std::optional<Floats> &addend, int threads,
                const std::string &level) {
    add(out, parameters, codes, Form::levels, bits, block, scale, addend, threads, level);
}

void add_codes(const MutableFloats &out, const Floats &scales, const Bytes &codes, unsigned bits, std::size_t block,
               float scale, const std::optional<Floats> &addend, int threads, const std::string &level) {
    if (bits < 2) throw std::invalid_argument("signed codes have 2 bits at least");
    add(out, scales, codes, bits == 2 ? Form::ternary : Form::centred, bits, block, scale, addend, threads, level);
}

void add_float8(const MutableFloats &out, const Floats &scales, const Bytes &codes, std::size_t block, float scale,
                const std::optional<Floats> &addend, int threads, const std::string &level) {
    add(out, scales, codes, Form::float8, 8, block, scale, addend, threads, level);
}

bool find_code(const Bytes &packed, std::size_t count, unsigned bits, unsigned mask, int threads,
               const std::string &level_name) {
    if (bits < 1 || bits > 8 || packed.shape(0) != packed_nbytes(count, bits)) {
        throw std::invalid_argument("packed does not hold so many codes");
    }
    const Level level = level_named(level_name);
    nb::gil_scoped_release released;
    const auto starts = split(count, 64, threads);
    std::vector<char> found(starts.size() - 1);
    parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
        found[part] = GRADCOMP_AT(level, find)(packed.data() + packed_nbytes(start, bits), stop - start, bits,
                                               static_cast<std::uint8_t>(mask));
    });
    return std::find(found.begin(), found.end(), 1) != found.end();
}

}  // namespace

void bind_codes(nb::module_ &module) {
    const nb::object level = module.attr("LEVEL");
    module.def("add_levels", &add_levels, "out"_a.noconvert(), "parameters"_a.noconvert(), "codes"_a.noconvert(), "bits"_a,
               "block"_a, "scale"_a, "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1, "level"_a = level);
    module.def("add_codes", &add_codes, "out"_a.noconvert(), "scales"_a.noconvert(), "codes"_a.noconvert(), "bits"_a,
               "block"_a, "scale"_a, "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1, "level"_a = level);
    module.def("add_float8", &add_float8, "out"_a.noconvert(), "scales"_a.noconvert(), "codes"_a.noconvert(), "block"_a,
               "scale"_a, "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1, "level"_a = level);
    module.def("find_code", &find_code, "packed"_a.noconvert(), "count"_a, "bits"_a, "mask"_a, "threads"_a = 1,
               "level"_a = level);
}

}  // namespace gradcomp
