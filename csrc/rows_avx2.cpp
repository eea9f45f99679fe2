// The row kernels for x86 processors with AVX2 and FMA.
#ifdef __x86_64__

// First, so that what they define is compiled for every processor: the linker may keep this file's copy.
#include "rows_kernels_includes.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MOEBERT_ISA avx2
#define MOEBERT_VECTOR_BYTES 32
#include "rows_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
