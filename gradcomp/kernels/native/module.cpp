// The extension module: what every family binds, and what all of them share.

#include <nanobind/stl/vector.h>

#include "finite.h"
#include "parallel.h"
#include "tensors.h"

#if GRADCOMP_X86
#include <cpuid.h>
#endif

namespace gradcomp {

#if GRADCOMP_X86
namespace {
// Not every compiler's __builtin_cpu_supports knows the name. That the system saves the registers follows from AVX2.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
}  // namespace
#endif

Level best_level() {
#if GRADCOMP_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) return avx512 ? Level::avx512 : Level::avx2;
#endif
    return Level::generic;
}

const char *name_of(Level level) {
    return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "generic";
}

Level level_named(const std::string &name) {
    for (const Level level : {Level::generic, Level::avx2, Level::avx512}) {
        if (name != name_of(level)) continue;
        if (level > best_level()) throw std::invalid_argument("this processor has no " + name);
        return level;
    }
    throw std::invalid_argument("level must be generic, avx2 or avx512, not " + name);
}

void bind_indices_decode(nb::module_ &module);
void bind_indices_encode(nb::module_ &module);
void bind_indices_sum(nb::module_ &module);
void bind_select(nb::module_ &module);
void bind_transform(nb::module_ &module);
void bind_bits(nb::module_ &module);
void bind_codes(nb::module_ &module);
void bind_dense(nb::module_ &module);
void bind_quantize(nb::module_ &module);
void bind_stochastic(nb::module_ &module);

}  // namespace gradcomp

NB_MODULE(_native, module) {
    using namespace gradcomp;
    module.attr("LEVEL") = name_of(best_level());
    module.def("split", &split, "numel"_a, "align"_a, "threads"_a);
    bind_indices_decode(module);
    bind_indices_encode(module);
    bind_indices_sum(module);
    bind_select(module);
    bind_transform(module);
    bind_bits(module);
    bind_codes(module);
    bind_dense(module);
    bind_quantize(module);
    bind_stochastic(module);
}
