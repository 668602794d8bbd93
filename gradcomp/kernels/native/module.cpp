#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "select.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T> nb::ndarray<nb::pytorch, T, nb::ndim<1>> tensor(gradcomp::Array<T> array, std::size_t count) {
    nb::capsule owner(array.get(), [](void *memory) noexcept { std::free(memory); });
    T *data = array.release();
    return nb::ndarray<nb::pytorch, T, nb::ndim<1>>(data, {count}, owner);
}

bool use_avx2(const std::string &level) {
    if (level == "generic") return false;
    if (level != "avx2") throw std::invalid_argument("level must be generic or avx2");
    if (!gradcomp::cpu_has_avx2()) throw std::invalid_argument("this processor has no AVX2");
    return true;
}

nb::object select_threshold(const Floats &grad, const std::optional<Floats> &residual, float tau,
                            const std::string &level) {
    const std::size_t numel = grad.shape(0);
    if (residual && residual->shape(0) != numel) throw std::invalid_argument("residual must have grad's size");
    if (!(tau >= 0.0f)) throw std::invalid_argument("tau must be at least 0");
    const bool avx2 = use_avx2(level);
    gradcomp::Selection found;
    {
        nb::gil_scoped_release released;
        found = gradcomp::select_threshold(grad.data(), residual ? residual->data() : nullptr, numel, tau, avx2);
    }
    if (!found.finite) return nb::float_(found.nonfinite);
    const std::size_t count = found.count;
    return nb::make_tuple(tensor(std::move(found.index), count), tensor(std::move(found.negative), count));
}

}  // namespace

NB_MODULE(_native, module) {
    module.attr("LEVEL") = gradcomp::cpu_has_avx2() ? "avx2" : "generic";
    module.def("select_threshold", &select_threshold, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a,
               "level"_a = module.attr("LEVEL"));
}
