// float32 to float16 and bfloat16, and adding them again.

#include <cstring>

#include "finite.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

[[maybe_unused]] constexpr std::size_t kAhead = 512;  // elements to fetch before they are needed

#define GRADCOMP_BODY "dense_body.h"
#include "foreach_level.h"

enum class Type { float32, float16, bfloat16 };

Type type_named(const std::string &name) {
    if (name == "float32") return Type::float32;
    if (name == "float16") return Type::float16;
    if (name == "bfloat16") return Type::bfloat16;
    throw std::invalid_argument("dtype must be float32, float16 or bfloat16, not " + name);
}

std::size_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

nb::object cast(const Floats &grad, const std::string &dtype, int threads, const std::string &level_name) {
    const std::size_t numel = grad.shape(0);
    const Type type = type_named(dtype);
    const Level level = level_named(level_name);
    Array<std::uint8_t> payload = new_array<std::uint8_t>(numel * size_of(type));
    {
        nb::gil_scoped_release released;
        parallel(split(numel, 64, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
            std::uint8_t *to = payload.get() + start * size_of(type);
            const float *from = grad.data() + start;
            const std::size_t count = stop - start;
            if (type == Type::float32) {
                std::memcpy(to, from, count * sizeof(float));
            } else if (type == Type::float16) {
                GRADCOMP_AT(level, narrow16)(from, count, reinterpret_cast<std::uint16_t *>(to));
            } else {
                GRADCOMP_AT(level, narrow_brain)(from, count, reinterpret_cast<std::uint16_t *>(to));
            }
        });
    }
    return nb::cast(as_tensor(std::move(payload), numel * size_of(type)));
}

void add_scaled(const MutableFloats &out, const Bytes &payload, const std::string &dtype, float scale,
                const std::optional<Floats> &addend, int threads, const std::string &level_name) {
    const std::size_t numel = out.shape(0);
    const Type type = type_named(dtype);
    const Level level = level_named(level_name);
    if (payload.shape(0) != numel * size_of(type)) throw std::invalid_argument("payload does not fit out");
    if (addend) require_same_size("addend", *addend, out);
    nb::gil_scoped_release released;
    parallel(split(numel, 64, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        float *to = out.data() + start;
        const float *other = addend ? addend->data() + start : nullptr;
        const std::uint8_t *from = payload.data() + start * size_of(type);
        const auto *halves = reinterpret_cast<const std::uint16_t *>(from);
        const std::size_t count = stop - start;
        if (type == Type::float32) {
            GRADCOMP_AT(level, add32)(to, other, reinterpret_cast<const float *>(from), count, scale);
        } else if (type == Type::float16) {
            GRADCOMP_AT(level, add16)(to, other, halves, count, scale);
        } else {
            GRADCOMP_AT(level, add_brain)(to, other, halves, count, scale);
        }
    });
}

bool all_finite(const Floats &values, int threads, const std::string &level) {
    const Level chosen = level_named(level);
    nb::gil_scoped_release released;
    return largest_magnitude(values.data(), values.shape(0), chosen, threads) < kInfinity;
}

// memset: it writes past the caches where a loop would first read what it overwrites.
void clear(const MutableFloats &out) {
    nb::gil_scoped_release released;
    if (out.shape(0)) std::memset(out.data(), 0, 4 * out.shape(0));
}

}  // namespace

void bind_dense(nb::module_ &module) {
    module.def("all_finite", &all_finite, "values"_a.noconvert(), "threads"_a, "level"_a = module.attr("LEVEL"));
    module.def("clear", &clear, "out"_a.noconvert());
    const nb::object level = module.attr("LEVEL");
    module.def("cast", &cast, "grad"_a.noconvert(), "dtype"_a, "threads"_a = 1, "level"_a = level);
    module.def("add_scaled", &add_scaled, "out"_a.noconvert(), "payload"_a.noconvert(), "dtype"_a, "scale"_a,
               "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1, "level"_a = level);
}

}  // namespace gradcomp
