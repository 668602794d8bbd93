// Which instructions a kernel may use, chosen when it runs.
//
// A family of kernels is written once, in a body file, and compiled for each level by foreach_level.h into a namespace of
// its own. All levels give the same bits: no reassociation, no contraction to fused multiply-add (-ffp-contract=off).

#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define GRADCOMP_X86 1
#include <immintrin.h>
#else
#define GRADCOMP_X86 0
#endif

namespace gradcomp {

enum class Level { generic, avx2, avx512 };

// The best this processor has.
Level best_level();

}  // namespace gradcomp

// The level's copy of a function: GRADCOMP_AT(level, f)(arguments...).
#if GRADCOMP_X86
#define GRADCOMP_AT(level, function)                                 \
    ((level) == ::gradcomp::Level::avx512 ? &avx512::function        \
     : (level) == ::gradcomp::Level::avx2 ? &avx2::function          \
                                          : &generic::function)
#else
#define GRADCOMP_AT(level, function) ((void)(level), &generic::function)
#endif
