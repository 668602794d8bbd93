// Includes GRADCOMP_BODY once for each level. In a body file:
//   GRADCOMP_LEVEL     0, 2 (AVX2, BMI2, F16C) or 512 (also AVX-512 F, BW, DQ, VL), for #if around intrinsics
//   GRADCOMP_ENTRY     before each function that is called through GRADCOMP_AT
//   GRADCOMP_INLINE    before each helper; do not use lambdas or std algorithms in hot loops, they lose the level
// No include guard: every family includes it once. The body file includes nothing but other body files.

#define GRADCOMP_ALWAYS inline __attribute__((always_inline))

#define GRADCOMP_LEVEL 0
#define GRADCOMP_ENTRY static
#define GRADCOMP_INLINE static GRADCOMP_ALWAYS
namespace generic {
#include GRADCOMP_BODY
}
#undef GRADCOMP_LEVEL
#undef GRADCOMP_ENTRY
#undef GRADCOMP_INLINE

#if GRADCOMP_X86

#define GRADCOMP_TARGET __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt,f16c")))
#define GRADCOMP_LEVEL 2
#define GRADCOMP_ENTRY GRADCOMP_TARGET static
#define GRADCOMP_INLINE GRADCOMP_TARGET static GRADCOMP_ALWAYS
namespace avx2 {
#include GRADCOMP_BODY
}
#undef GRADCOMP_TARGET
#undef GRADCOMP_LEVEL
#undef GRADCOMP_ENTRY
#undef GRADCOMP_INLINE

#define GRADCOMP_TARGET \
    __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define GRADCOMP_LEVEL 512
#define GRADCOMP_ENTRY GRADCOMP_TARGET static
#define GRADCOMP_INLINE GRADCOMP_TARGET static GRADCOMP_ALWAYS
namespace avx512 {
#include GRADCOMP_BODY
}
#undef GRADCOMP_TARGET
#undef GRADCOMP_LEVEL
#undef GRADCOMP_ENTRY
#undef GRADCOMP_INLINE

#endif

#undef GRADCOMP_BODY
