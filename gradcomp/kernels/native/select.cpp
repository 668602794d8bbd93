// Threshold selection: the positions of what passes +-tau, in one pass over the gradient.

#include <algorithm>
#include <cstring>

#include "finite.h"
#include "tensors.h"

namespace gradcomp {
namespace {

struct Selection {
    Array<std::int64_t> index;  // strictly increasing
    Array<bool> negative;       // whether the element at that position is below zero
    std::size_t count = 0;
    bool finite = true;         // else nonfinite says what was found, and index and negative mean nothing
    float nonfinite = 0.0f;
};

// Elements looked at together. Most blocks hold nothing that passes and are left after one vectorised comparison.
constexpr std::size_t kBlock = 64;
constexpr std::uint32_t kFew = 6;  // up to so many in a block, looking for each costs less than writing all 64

template <typename T> void grow(Array<T> &array, std::size_t capacity) {
    void *memory = std::realloc(array.get(), capacity * sizeof(T));
    if (memory == nullptr) throw std::bad_alloc();
    (void)array.release();
    array.reset(static_cast<T *>(memory));
}

void reserve(Selection &found, std::size_t &capacity, std::size_t wanted) {
    if (wanted <= capacity) return;
    capacity = std::max(wanted, capacity * 2);
    grow(found.index, capacity);
    grow(found.negative, capacity);
}

#define GRADCOMP_BODY "select_body.h"
#include "foreach_level.h"

nb::object select_threshold(const Floats &grad, const std::optional<Floats> &residual, float tau,
                            const std::string &level_name) {
    const std::size_t numel = grad.shape(0);
    if (residual) require_same_size("residual", *residual, grad);
    if (!(tau >= 0.0f)) throw std::invalid_argument("tau must be at least 0");
    const Level level = level_named(level_name);
    Selection found;
    {
        nb::gil_scoped_release released;
        found = GRADCOMP_AT(level, scan_any)(grad.data(), residual ? residual->data() : nullptr, numel, tau);
    }
    if (!found.finite) return nb::float_(found.nonfinite);
    const std::size_t count = found.count;
    return nb::make_tuple(as_tensor(std::move(found.index), count), as_tensor(std::move(found.negative), count));
}

}  // namespace

void bind_select(nb::module_ &module) {
    module.def("select_threshold", &select_threshold, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a,
               "level"_a = module.attr("LEVEL"));
}

}  // namespace gradcomp
